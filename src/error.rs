//! The error type: a message with context, a hint and an exit code.
//!
//! Programming mistakes panic instead. Problems in a recipe are collected by [`crate::settings`] and reported together.

use std::fmt;

/// Result of operations that can fail because of the user's input or machine.
pub type Result<T> = std::result::Result<T, Error>;

/// The kind of an error, which determines the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The work itself failed, for example with a non-finite loss. Exit code 1.
    Failed,
    /// Invalid user input. Exit code 2.
    Input,
    /// Temporary failure: running the same command again may succeed. Exit code 75.
    TryAgain,
}

impl Kind {
    /// Returns the exit code for this kind of error.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Failed => 1,
            Kind::Input => 2,
            Kind::TryAgain => 75,
        }
    }
}

/// An error with its context and a hint. It is displayed from the outermost context to the hint.
#[derive(Clone, Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
    context: Vec<String>,
    everywhere: bool,
}

impl Error {
    /// Creates an error for invalid user input.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Kind::Input, message)
    }

    /// Creates an error for failed work.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// Creates an error of the given kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
            context: Vec::new(),
            everywhere: false,
        }
    }

    /// Converts an error of an NVIDIA GPU.
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

    /// Sets the hint: what the user should do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds what was being done, outside the existing context.
    pub fn context(mut self, doing: impl Into<String>) -> Self {
        self.context.push(doing.into());
        self
    }

    /// Marks the error as common to all ranks, so that only one rank prints it.
    pub fn everywhere(mut self) -> Self {
        self.everywhere = true;
        self
    }

    /// Returns whether all ranks have this error.
    pub fn is_everywhere(&self) -> bool {
        self.everywhere
    }

    /// Returns the message with its context, and the hint.
    pub fn into_parts(mut self) -> (String, Option<String>) {
        let hint = self.hint.take();
        (self.to_string(), hint)
    }

    /// Returns the kind of the error.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the exit code for this error.
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

/// Adds context to the error of a result.
pub trait Context<T> {
    /// Adds what was being done. `doing` is only called for an error.
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
    fn an_error_is_displayed_from_the_outermost_context_to_the_hint() {
        let error = Error::input("3 bytes are missing")
            .hint("copy the file again")
            .context("`a.bin`")
            .context("reading the data");
        let text = "reading the data: `a.bin`: 3 bytes are missing\n  hint: copy the file again";
        assert_eq!(error.to_string(), text);
        assert_eq!(error.exit_code(), 2);
    }
}
