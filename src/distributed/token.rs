//! Numbers that distinguish the connections of one run from those of another.

use std::fs::File;
use std::io::Read;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// What all processes of a run present when they connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Token([u8; Self::BYTES]);

impl Token {
    pub(crate) const BYTES: usize = 16;

    /// Returns a random token that cannot be guessed.
    pub(crate) fn random() -> Self {
        let mut random = [0; 32];
        let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random));
        if read.is_ok() {
            return Self::hashed(&random);
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self::hashed(format!("{} {}", std::process::id(), now.as_nanos()).as_bytes())
    }

    /// That of a secret which the processes were started with.
    pub(crate) fn hashed(secret: &[u8]) -> Self {
        let hash = blake3::hash(secret);
        let (bytes, _) = hash.as_bytes().split_at(Self::BYTES);
        Self(bytes.try_into().expect("as many bytes"))
    }

    pub(crate) fn bytes(self) -> [u8; Self::BYTES] {
        self.0
    }

    /// As text for an environment variable.
    pub(crate) fn to_hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What the acceptor of a connection answers, so that both sides know the other.
    pub(crate) fn answer(self) -> [u8; Self::BYTES] {
        self.0.map(|byte| !byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_unique_and_those_of_a_secret_are_equal() {
        assert_ne!(Token::random(), Token::random());
        assert_eq!(Token::hashed(b"a"), Token::hashed(b"a"));
        assert_ne!(Token::hashed(b"a"), Token::hashed(b"b"));
        assert_eq!(Token::random().to_hex().len(), 32);
    }
}
