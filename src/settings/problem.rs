//! Problems of a settings file, and suggestions for misspelled words.

use std::fmt;

use crate::error::Error;

/// A problem in a settings file: where, what, and how to fix it.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// Location, such as ``stage `finetune`, line 22``.
    pub place: String,
    /// What is wrong and what is expected.
    pub message: String,
    /// How to fix it.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n    hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// Why a value of the right type is invalid.
#[derive(Clone, Debug, PartialEq)]
pub struct Invalid {
    /// What is wrong.
    pub message: String,
    /// How to fix it.
    pub hint: Option<String>,
}

impl From<String> for Invalid {
    fn from(message: String) -> Self {
        Self {
            message,
            hint: None,
        }
    }
}

impl From<Error> for Invalid {
    fn from(error: Error) -> Self {
        let (message, hint) = error.into_parts();
        Self { message, hint }
    }
}

/// Returns the known word that `found` is most likely a typo of, if one is close enough.
pub fn nearest<'a>(found: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|word| (strsim::damerau_levenshtein(found, word), *word))
        .min()
        .filter(|(distance, word)| *distance <= word.len().max(found.len()) / 3 + 1)
        .map(|(_, word)| word)
}
