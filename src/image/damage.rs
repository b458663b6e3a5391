//! What can be wrong with a sample, by kind, and how often it was met.
//!
//! A [`Reason`] either costs a sample (damage) or is only odd: the sample is used, and counted.
//! Not for the messages, which the place that finds something writes.

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
            /// Every kind, in the order of tables.
            pub const ALL: &[Reason] = &[$(Reason::$name,)*];

            /// The name in tables and files.
            pub fn word(self) -> &'static str {
                match self { $(Reason::$name => $word,)* }
            }

            /// What it means, in a few words.
            pub fn text(self) -> &'static str {
                match self { $(Reason::$name => $text,)* }
            }

            /// Whether it costs data; otherwise the sample is used all the same.
            pub fn is_damage(self) -> bool {
                match self { $(Reason::$name => $damage,)* }
            }
        }
    };
}

// New kinds go to the end: index files hold the place in this list.
reasons! {
    Unreadable "unreadable" true "the file cannot be read",
    TruncatedHeader "truncated_header" true "the tar ends within a header",
    TruncatedMember "truncated_member" true "the tar ends within a member",
    BadChecksum "bad_checksum" true "a tar header's checksum is wrong",
    Garbage "garbage" true "bytes that are no tar header where one must be",
    SizePastEnd "size_past_end" true "a member's size is no number or leads beyond the end of the tar",
    EmptyShard "empty_shard" true "a tar without samples",
    EmptyMember "empty_member" true "a member of no bytes",
    MemberTooLarge "member_too_large" true "a member larger than any sound one",
    DuplicateKey "duplicate_key" true "two members of one kind under one key",
    MissingImage "missing_image" true "no image under the key",
    MissingCaption "missing_caption" true "no caption under the key",
    CaptionEmpty "caption_empty" true "the caption is empty",
    CaptionNotUtf8 "caption_not_utf8" true "the caption is not UTF-8 text",
    JsonBroken "json_broken" true "the caption's json is broken",
    BadLabel "bad_label" true "the .cls is missing, or is not a class number from 0 to 999999",
    TruncatedImage "truncated_image" true "the image data is cut short",
    DamagedImage "damaged_image" true "the image data is damaged",
    NotAnImage "not_an_image" true "no image at all, such as a web page",
    UnknownFormat "unknown_format" true "an image format that is not read, such as AVIF",
    TooManyPixels "too_many_pixels" true "more pixels than the cap",
    ZeroSize "zero_size" true "a picture without width or height",
    WrongExtension "wrong_extension" false "another image format than the name says",
    Cmyk "cmyk" false "printing colours, converted",
    SixteenBit "sixteen_bit" false "16 bits a channel, made 8 as Pillow does: colors keep the high byte, grey is clipped at 255",
    Grey "grey" false "grey, repeated to three channels",
    Alpha "alpha" false "an alpha channel, dropped",
    Rotated "rotated" false "turned or mirrored by its orientation tag, set upright",
    Animated "animated" false "several pictures in one file, the first is used",
    NoExtension "no_extension" false "a member without key or extension, left out",
    UnsafeName "unsafe_name" false "a path that must not be unpacked",
    UnusedMember "unused_member" false "a member of a kind that is not used",
    NoEndMarker "no_end_marker" false "the tar has no end marker; it may be cut between members",
    ZerosBetween "zeros_between" false "zeros between the members of a tar",
    SpareJsonBroken "spare_json_broken" false "the json is broken, the caption comes from the txt",
    MissingLabel "missing_label" false "no .cls where other samples have one",
    UnsupportedImage "unsupported_image" true "an image of a kind that is not supported, such as a JPEG with arithmetic coding",
    Irregular "irregular" false "an image file that breaks its format's rules, but whose pixels are all there",
    SparseMember "sparse_member" true "a sparse file of GNU tar, whose holes are not filled in",
    LinkMember "link_member" true "a link in place of a file",
    DottedKey "dotted_key" true "no image under the key, which ends at the first dot of a name that has several",
    NotATar "not_a_tar" true "a shard that is not a tar file",
    DamagedGzip "damaged_gzip" true "the gzip data of a shard are damaged or cut short; what could be unpacked is used",
}

impl Reason {
    /// The place in [`Self::ALL`], for index files.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The kind at a place.
    pub fn numbered(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// Why a sample cannot be used: the kind for counting, the message for people.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The kind.
    pub reason: Reason,
    /// Where and what exactly.
    pub error: Error,
    /// Nothing is wrong with the sample: the store that it lies in does not give it. Never counted, replaced or
    /// quarantined; whoever meets it ends.
    pub outage: bool,
}

impl Fault {
    /// Something wrong with the user's data.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            error: Error::input(message),
            outage: false,
        }
    }

    /// Adds what the user should do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.error = self.error.hint(hint);
        self
    }

    /// Adds where it was found.
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

/// How often each kind was met, with one example. Its memory does not grow with the counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Count and first example.
    found: BTreeMap<Reason, (u64, String)>,
}

impl Health {
    /// Counts one.
    pub fn add(&mut self, reason: Reason, example: impl FnOnce() -> String) {
        self.add_times(reason, 1, example);
    }

    /// Counts several.
    pub fn add_times(&mut self, reason: Reason, times: u64, example: impl FnOnce() -> String) {
        if times > 0 {
            let entry = self.found.entry(reason);
            entry.or_insert_with(|| (0, example())).0 += times;
        }
    }

    /// Adds the counts of another.
    pub fn join(&mut self, other: &Self) {
        for (reason, (count, example)) in &other.found {
            let entry = self.found.entry(*reason);
            entry.or_insert_with(|| (0, example.clone())).0 += count;
        }
    }

    /// The same with a place before each example.
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

    /// Kinds with their counts and an example each.
    pub fn iter(&self) -> impl Iterator<Item = (Reason, u64, &str)> {
        let found = self.found.iter();
        found.map(|(reason, (count, example))| (*reason, *count, example.as_str()))
    }

    /// How often a kind was met.
    pub fn count(&self, reason: Reason) -> u64 {
        self.found.get(&reason).map_or(0, |(count, _)| *count)
    }

    /// How often anything was met that costs data.
    pub fn damages(&self) -> u64 {
        let damages = self.iter().filter(|(reason, _, _)| reason.is_damage());
        damages.map(|(_, count, _)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_word_of_its_own_and_is_found_by_its_number() {
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
    fn the_first_example_stays_and_counts_add_up() {
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
