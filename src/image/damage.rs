//! Kinds of damage and oddities of samples, and counts of each.
//!
//! A [`Reason`] is either damage, which costs the sample, or an oddity: the sample is used and counted.
//! Error messages are written where the problem is detected.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::Error;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident $word:literal $damage:literal $text:literal,)*) => {
        /// A kind of damage or oddity.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Reason {
            $(#[doc = $text] $name,)*
        }

        impl Reason {
            /// All kinds, in the order of tables.
            pub const ALL: &[Reason] = &[$(Reason::$name,)*];

            /// Returns the name in tables and files.
            pub fn word(self) -> &'static str {
                match self { $(Reason::$name => $word,)* }
            }

            /// Returns a short description.
            pub fn text(self) -> &'static str {
                match self { $(Reason::$name => $text,)* }
            }

            /// Returns whether it costs data. Samples with other reasons are used anyway.
            pub fn is_damage(self) -> bool {
                match self { $(Reason::$name => $damage,)* }
            }
        }
    };
}

// Append new kinds at the end: index files store the position in this list.
reasons! {
    Unreadable "unreadable" true "the file cannot be read",
    TruncatedHeader "truncated_header" true "the tar ends inside a header",
    TruncatedMember "truncated_member" true "the tar ends inside a member",
    BadChecksum "bad_checksum" true "a tar header's checksum is wrong",
    Garbage "garbage" true "invalid bytes where a tar header is expected",
    SizePastEnd "size_past_end" true "a member's size is not a number or extends past the end of the tar",
    EmptyShard "empty_shard" true "a tar without samples",
    EmptyMember "empty_member" true "an empty member",
    MemberTooLarge "member_too_large" true "a member above the size limit",
    DuplicateKey "duplicate_key" true "two members of the same kind under one key",
    MissingImage "missing_image" true "no image under the key",
    MissingCaption "missing_caption" true "no caption under the key",
    CaptionEmpty "caption_empty" true "the caption is empty",
    CaptionNotUtf8 "caption_not_utf8" true "the caption is not UTF-8 text",
    JsonBroken "json_broken" true "the caption's json is invalid",
    BadLabel "bad_label" true "the .cls is missing or is not a class number from 0 to 999999",
    TruncatedImage "truncated_image" true "the image data is truncated",
    DamagedImage "damaged_image" true "the image data is damaged",
    NotAnImage "not_an_image" true "not an image at all, such as a web page",
    UnknownFormat "unknown_format" true "an unsupported image format, such as AVIF",
    TooManyPixels "too_many_pixels" true "more pixels than the limit",
    ZeroSize "zero_size" true "an image of zero width or height",
    WrongExtension "wrong_extension" false "the image format does not match the file extension",
    Cmyk "cmyk" false "CMYK colors, converted to RGB",
    SixteenBit "sixteen_bit" false "16 bits per channel, reduced to 8 as Pillow does: colors keep the high byte, gray is clipped at 255",
    Grey "grey" false "grayscale, repeated to three channels",
    Alpha "alpha" false "an alpha channel, dropped",
    Rotated "rotated" false "rotated or mirrored according to its orientation tag, set upright",
    Animated "animated" false "several images in one file, the first is used",
    NoExtension "no_extension" false "a member without key or extension, skipped",
    UnsafeName "unsafe_name" false "a path that must not be unpacked",
    UnusedMember "unused_member" false "a member of an unused kind",
    NoEndMarker "no_end_marker" false "the tar has no end marker; it may be truncated between members",
    ZerosBetween "zeros_between" false "zeros between the members of a tar",
    SpareJsonBroken "spare_json_broken" false "the json is invalid, the caption comes from the txt",
    MissingLabel "missing_label" false "no .cls where other samples have one",
    UnsupportedImage "unsupported_image" true "an unsupported variant of an image format, such as a JPEG with arithmetic coding",
    Irregular "irregular" false "an image file that violates its format's rules but has all its pixels",
    SparseMember "sparse_member" true "a GNU tar sparse file, whose holes are not filled in",
    LinkMember "link_member" true "a link instead of a file",
    DottedKey "dotted_key" true "no image under the key, which ends at the first dot of a name with several dots",
    NotATar "not_a_tar" true "a shard that is not a tar file",
    DamagedGzip "damaged_gzip" true "the gzip data of a shard is damaged or truncated; the part that could be unpacked is used",
}

impl Reason {
    /// Returns the position in [`Self::ALL`], for index files.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// Returns the kind at a position in [`Self::ALL`].
    pub fn numbered(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// Why a sample cannot be used: a kind for counting and a message for people.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The kind.
    pub reason: Reason,
    /// The exact problem and where it is.
    pub error: Error,
    /// The sample may be fine, but its object store does not deliver it. Such a fault is never counted, replaced or
    /// quarantined; the command fails.
    pub outage: bool,
}

impl Fault {
    /// Makes a fault in the user's data.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            error: Error::input(message),
            outage: false,
        }
    }

    /// Adds a hint on how to fix it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.error = self.error.hint(hint);
        self
    }

    /// Adds where it was detected.
    pub fn context(mut self, place: impl Into<String>) -> Self {
        self.error = self.error.context(place);
        self
    }
}

/// A file that cannot be read.
impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self {
            reason: Reason::Unreadable,
            error,
            outage: false,
        }
    }
}

/// Counts of each kind, with one example each. Memory does not grow with the counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Count and first example.
    found: BTreeMap<Reason, (u64, String)>,
}

impl Health {
    /// Counts one occurrence.
    pub fn add(&mut self, reason: Reason, example: impl FnOnce() -> String) {
        self.add_times(reason, 1, example);
    }

    /// Counts several occurrences.
    pub fn add_times(&mut self, reason: Reason, times: u64, example: impl FnOnce() -> String) {
        if times > 0 {
            let entry = self.found.entry(reason);
            entry.or_insert_with(|| (0, example())).0 += times;
        }
    }

    /// Adds the counts of `other`.
    pub fn join(&mut self, other: &Self) {
        for (reason, (count, example)) in &other.found {
            let entry = self.found.entry(*reason);
            entry.or_insert_with(|| (0, example.clone())).0 += count;
        }
    }

    /// Returns the same counts, with `place` in front of each example.
    pub fn at(&self, place: &str) -> Self {
        let located = |(reason, (count, example)): (&Reason, &(u64, String))| {
            let example = match example.is_empty() {
                true => format!("`{place}`"),
                false => format!("`{place}`, {example}"),
            };
            (*reason, (*count, example))
        };
        Self {
            found: self.found.iter().map(located).collect(),
        }
    }

    /// Iterates over the kinds with their counts and examples.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, u64, &str)> {
        let found = self.found.iter();
        found.map(|(reason, (count, example))| (*reason, *count, example.as_str()))
    }

    /// Returns how often a kind occurred.
    pub fn count(&self, reason: Reason) -> u64 {
        self.found.get(&reason).map_or(0, |(count, _)| *count)
    }

    /// Returns how often data was lost to damage.
    pub fn damages(&self) -> u64 {
        let damages = self.iter().filter(|(reason, _, _)| reason.is_damage());
        damages.map(|(_, count, _)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_unique_word_and_is_found_by_its_number() {
        let mut words = std::collections::BTreeSet::new();
        for reason in Reason::ALL {
            assert_eq!(Reason::numbered(reason.number()), Some(*reason));
            assert!(words.insert(reason.word()));
            assert_eq!(serde_json::json!(reason), reason.word());
        }
        assert!(Reason::ALL.len() >= 20);
        assert_eq!(Reason::numbered(Reason::ALL.len() as u8), None);
    }

    #[test]
    fn the_first_example_is_kept_and_counts_add_up() {
        let mut health = Health::default();
        health.add(Reason::Grey, || "a".into());
        health.add(Reason::Grey, || "b".into());
        let mut other = health.clone();
        other.add(Reason::EmptyMember, || "c".into());
        health.join(&other);
        assert_eq!(health.count(Reason::Grey), 4);
        assert_eq!(health.damages(), 1);
        assert_eq!(health.iter().last(), Some((Reason::Grey, 4, "a")));
    }
}
