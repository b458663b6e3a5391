//! Enums of words: each word with its value and meaning, shared by recipes, the command line and files.

use serde::Serializer;

use super::describe::Kind;
use super::problem::Invalid;
use super::setting::Setting;
use super::value::Value;

/// A choice among words, declared with `words!`.
pub trait Words: Copy + Send + Sync + 'static {
    /// Each word with its meaning.
    const WORDS: &'static [(&'static str, &'static str)];
    /// The values, in the order of their words.
    const VALUES: &'static [Self];

    /// Returns the word of this value. Data in a variant is ignored.
    fn word(&self) -> &'static str {
        let kind = std::mem::discriminant(self);
        let is_it = |value: &Self| std::mem::discriminant(value) == kind;
        let place = Self::VALUES.iter().position(is_it);
        Self::WORDS[place.expect("each value has its word")].0
    }

    /// Returns the value of a word.
    fn from_word(word: &str) -> Option<Self> {
        let place = Self::WORDS.iter().position(|(known, _)| *known == word);
        place.map(|place| Self::VALUES[place])
    }

    /// Returns each word with its value.
    fn pairs() -> Vec<(&'static str, Self)> {
        let words = Self::WORDS.iter().map(|(word, _)| *word);
        words.zip(Self::VALUES.iter().copied()).collect()
    }

    /// Returns the words as a list in a sentence: `linf, l2 or l1`.
    fn listed() -> String {
        let words: Vec<&str> = Self::WORDS.iter().map(|(word, _)| *word).collect();
        match words.split_last() {
            Some((last, [])) => (*last).to_owned(),
            Some((last, others)) => format!("{} or {last}", others.join(", ")),
            None => String::new(),
        }
    }
}

impl<T: Words> Setting for T {
    const KIND: Kind = Kind::Words(T::WORDS);

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        match value {
            Value::Text(text) => T::from_word(text).map(Ok),
            _ => None,
        }
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

/// Declares an enum with a word for each variant, whose doc comment is the word's meaning. Can also assign words to an
/// enum that is declared elsewhere.
macro_rules! words {
    (
        $(#[$attribute:meta])*
        $visibility:vis enum $name:ident {
            $($(#[doc = $meaning:literal])+ $variant:ident = $word:literal),+ $(,)?
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $visibility enum $name {
            $($(#[doc = $meaning])+ $variant),+
        }

        impl $name {
            /// Returns its word in recipes, on the command line and in results.
            #[allow(dead_code)]
            pub fn word(self) -> &'static str {
                $crate::settings::Words::word(&self)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serializer.serialize_str(self.word())
            }
        }

        $crate::settings::words!(for $name: $($word => Self::$variant, concat!($($meaning),+);)+);
    };
    (for $name:ty: $($word:literal => $value:expr, $meaning:expr;)+) => {
        impl $crate::settings::Words for $name {
            const WORDS: &'static [(&'static str, &'static str)] = &[$(($word, $meaning)),+];
            const VALUES: &'static [Self] = &[$($value),+];
        }
    };
}

pub(crate) use words;
