//! One error type: what happened and where, what to do about it, and how the program should end.
//!
//! Not for programming mistakes, which panic, nor for the faults of a recipe, which are gathered
//! by [`crate::settings`] and told together.

use std::fmt;

/// Result of everything that can fail on a user's input or machine.
pub type Result<T> = std::result::Result<T, Error>;

/// Who has to act, which decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The work itself failed, for example a loss that is not finite. Exit code 1.
    Failed,
    /// Something that the user gave is wrong. Exit code 2.
    Input,
    /// Nothing is wrong; the same command should be run again. Exit code 75.
    TryAgain,
}

impl Kind {
    /// The exit code of a program that ends with such an error.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Failed => 1,
            Kind::Input => 2,
            Kind::TryAgain => 75,
        }
    }
}

/// An error with the place it arose, outermost first, and a hint.
#[derive(Clone, Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
    context: Vec<String>,
    everywhere: bool,
}

impl Error {
    /// Something that the user gave is wrong.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Kind::Input, message)
    }

    /// The work itself failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// An error of a given kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
            context: Vec::new(),
            everywhere: false,
        }
    }

    /// A failure of an NVIDIA GPU.
    pub fn of_gpu(error: &advxl_cuda::Error) -> Self {
        let kind = match error.kind() {
            advxl_cuda::ErrorKind::Lost => Kind::TryAgain,
            _ => Kind::Failed,
        };
        let failed = Self::new(kind, error.message());
        match error.advice() {
            Some(advice) => failed.hint(advice),
            None => failed,
        }
    }

    /// Adds what the user should do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds what was being done, outside what is there already.
    pub fn context(mut self, doing: impl Into<String>) -> Self {
        self.context.push(doing.into());
        self
    }

    /// Says that all processes of the run have this error, of which one is to tell it.
    pub fn everywhere(mut self) -> Self {
        self.everywhere = true;
        self
    }

    /// Whether all processes of the run have it.
    pub fn is_everywhere(&self) -> bool {
        self.everywhere
    }

    /// The message with what was being done, and the hint.
    pub fn into_parts(mut self) -> (String, Option<String>) {
        let hint = self.hint.take();
        (self.to_string(), hint)
    }

    /// Who has to act.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The exit code of a program that ends with this error.
    pub fn exit_code(&self) -> u8 {
        self.kind.exit_code()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for doing in self.context.iter().rev() {
            write!(f, "{doing}: ")?;
        }
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

/// Adds what was being done to the error of a result.
pub trait Context<T> {
    /// The text is only made when there is an error.
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.context(doing()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reads_from_the_outermost_place_to_the_hint() {
        let error = Error::input("3 bytes are missing")
            .hint("copy the file again")
            .context("`a.bin`")
            .context("reading the data");
        let text = "reading the data: `a.bin`: 3 bytes are missing\n  hint: copy the file again";
        assert_eq!(error.to_string(), text);
        assert_eq!(error.exit_code(), 2);
    }
}
