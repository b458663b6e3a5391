//! Replaces [`crate::storage::cloud`] in a build without the feature `cloud`: rejects every URL.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};

/// Never exists in this build.
#[derive(Debug)]
pub enum Pending<T> {
    #[doc(hidden)]
    Never(std::convert::Infallible, std::marker::PhantomData<T>),
}

impl<T> Pending<T> {
    /// Never called.
    pub fn wait(self) -> Result<T> {
        match self {
            Self::Never(never, _) => match never {},
        }
    }
}

/// Never exists in this build.
#[derive(Debug)]
pub enum Remote {}

impl Remote {
    /// Rejects any URL.
    pub fn find(urls: &[String]) -> Result<Vec<Option<Arc<Self>>>> {
        match urls.first() {
            None => Ok(Vec::new()),
            Some(url) => Err(refused(url)),
        }
    }

    /// Never called, like the methods below.
    pub fn url(&self) -> &str {
        match *self {}
    }

    #[allow(missing_docs)]
    pub fn length(&self) -> u64 {
        match *self {}
    }

    #[allow(missing_docs)]
    pub fn stamp(&self) -> (u64, u64) {
        match *self {}
    }

    #[allow(missing_docs)]
    pub fn accepts(&self, _: (u64, u64)) -> bool {
        match *self {}
    }

    #[allow(missing_docs)]
    pub fn ask(self: &Arc<Self>, _: Range<u64>) -> Result<Pending<Vec<u8>>> {
        match **self {}
    }

    #[allow(missing_docs)]
    pub fn ask_index(&self, _: Option<u64>) -> Result<Pending<Option<Vec<u8>>>> {
        match *self {}
    }
}

/// Rejects any URL.
pub fn list(url: &str) -> Result<Vec<String>> {
    Err(refused(url))
}

fn refused(url: &str) -> Error {
    let message = format!(
        "`{url}` is not on this machine, and this program was built without the feature `cloud`"
    );
    Error::input(message).hint(
        "rebuild with `cargo build --release --features cloud`, or copy the shards to this machine",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_refused_with_the_build_command_that_adds_support() {
        let urls = ["s3://bucket/0.tar".to_owned()];
        for error in [
            Remote::find(&urls).unwrap_err(),
            list(&urls[0]).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("built without the feature `cloud`"), "{text}");
            assert!(
                text.contains("`cargo build --release --features cloud`"),
                "{text}"
            );
            assert_eq!(error.exit_code(), 2);
        }
        assert!(Remote::find(&[]).unwrap().is_empty());
    }
}
