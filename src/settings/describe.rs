//! Descriptions of settings: constant data that readers, messages, the reference page and the JSON schema share.

use std::fmt;

use serde::ser::SerializeMap;

/// A table of settings.
#[derive(Debug)]
pub struct Description {
    /// What the table is for.
    pub about: &'static str,
    /// Its keys, in the order in which they are read and printed.
    pub keys: &'static [Key],
}

/// A setting: one key of a table.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The key.
    pub name: &'static str,
    /// What it sets, in one line.
    pub meaning: &'static str,
    /// What its value can be.
    pub kind: Kind,
    /// Whether the key can be absent without a default.
    pub optional: bool,
    /// Prints the value of an absent key.
    pub default: Option<fn() -> String>,
    /// Says in words what an absent key means, where the default depends on other keys.
    pub fallback: &'static str,
    /// Whether a resolved recipe leaves the key out when its value is the default.
    pub omit_default: bool,
    /// Range of the number, or of each number of a list.
    pub limits: Limits,
    /// Unit of the number, in the plural; empty if it has none.
    pub unit: &'static str,
    /// A value as it is written in TOML.
    pub example: &'static str,
}

/// What a value can be.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A whole number, 0 or more.
    Whole,
    /// A number.
    Number,
    /// A number, or a string with a fraction.
    Fraction,
    /// `true` or `false`.
    Boolean,
    /// A string; with a regular expression that it matches, or an empty one.
    Text {
        /// What the string is, for messages: "a string".
        expected: &'static str,
        /// A regular expression of JSON schema.
        pattern: &'static str,
    },
    /// One of several words, each with its meaning.
    Words(&'static [(&'static str, &'static str)]),
    /// A list; its length if that is fixed.
    List(&'static Kind, Option<usize>),
    /// A table.
    Table(&'static Description),
    /// A list of at least one table.
    Tables(&'static Description),
    /// One of several tables, each with its name.
    Variants(&'static [(&'static str, &'static Description)]),
    /// Exactly one of several keys, each of which belongs to the table around it.
    OneOf(&'static [Key]),
}

impl Kind {
    /// Any string.
    pub const TEXT: Self = Self::Text {
        expected: "a string",
        pattern: "",
    };

    /// What is expected, for messages.
    pub fn expected(&self) -> String {
        match self {
            Self::Whole => "a whole number, 0 or more".to_owned(),
            Self::Number => "a number".to_owned(),
            Self::Fraction => "a number or a fraction such as \"8/255\"".to_owned(),
            Self::Boolean => "true or false".to_owned(),
            Self::Text { expected, .. } => (*expected).to_owned(),
            Self::Words(words) => {
                let words: Vec<_> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
                format!("one of {}", words.join(", "))
            }
            Self::List(item, length) => {
                let count = match length {
                    Some(2) => "two ",
                    Some(3) => "three ",
                    Some(4) => "four ",
                    _ => "",
                };
                let items = match item {
                    Self::Whole => "whole numbers",
                    Self::Text { .. } => "strings",
                    _ => "numbers",
                };
                format!("a list of {count}{items}")
            }
            Self::Table(_) | Self::Variants(_) => "a table".to_owned(),
            Self::Tables(_) => "a list of tables".to_owned(),
            Self::OneOf(keys) => {
                let names: Vec<_> = keys.iter().map(|key| format!("`{}`", key.name)).collect();
                format!("exactly one of {}", names.join(", "))
            }
        }
    }

    /// The tables that a path can lead into, each with its name where there are several.
    pub fn tables_inside(&self) -> Vec<(&'static str, &'static Description)> {
        match self {
            Self::Table(description) | Self::Tables(description) => vec![("", description)],
            Self::Variants(variants) => variants.to_vec(),
            _ => Vec::new(),
        }
    }
}

impl Key {
    /// A key with neither limits nor a default.
    pub const fn of<T: Described>(name: &'static str, meaning: &'static str) -> Self {
        Self {
            name,
            meaning,
            kind: T::KIND,
            optional: T::OPTIONAL,
            default: None,
            fallback: "",
            omit_default: false,
            limits: Limits::NONE,
            unit: "",
            example: "",
        }
    }

    /// Whether a file must have the key.
    pub fn is_required(&self) -> bool {
        !self.optional && self.default.is_none() && self.fallback.is_empty()
    }

    /// What happens without the key: `required`, `optional` or the default.
    pub fn absence(&self) -> String {
        match self.default {
            _ if !self.fallback.is_empty() => self.fallback.to_owned(),
            Some(default) => default(),
            None if self.optional => "optional".to_owned(),
            None => "required".to_owned(),
        }
    }

    /// The value in short, with range and unit: `whole number, 1 to 4096 pixels`.
    pub fn value(&self) -> String {
        let kind = match self.kind {
            Kind::Whole => "whole number".to_owned(),
            Kind::Fraction => "number or fraction".to_owned(),
            Kind::Words(words) => {
                let words: Vec<_> = words.iter().map(|(word, _)| format!("`{word}`")).collect();
                words.join(", ")
            }
            kind => kind.expected().trim_start_matches("a ").to_owned(),
        };
        let range = match self.kind {
            Kind::Whole if !self.limits.are_set() => "0 or more".to_owned(),
            Kind::List(..) if self.limits.are_set() => format!("each {}", self.limits),
            _ => self.limits.to_string(),
        };
        match (&range[..], self.unit) {
            ("", "") => kind,
            ("", unit) => format!("{kind} of {unit}"),
            (range, unit) => format!("{kind}, {range} {unit}").trim_end().to_owned(),
        }
    }
}

/// A key with its full path, such as `stage.attack.epsilon`.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The path.
    pub path: String,
    /// The name of the variant of the table that it belongs to, where there are several.
    pub variant: &'static str,
    /// The key.
    pub key: &'static Key,
}

impl Description {
    /// The key of a name.
    ///
    /// # Panics
    /// If there is none; declarations ask for their own keys.
    pub fn key(&'static self, name: &str) -> &'static Key {
        let found = self.keys.iter().find(|key| key.name == name);
        found.expect("a declared key")
    }

    /// All keys of the table and of those inside it, each table before its keys.
    pub fn entries(&'static self) -> Vec<Entry> {
        let mut entries = Vec::new();
        self.collect("", "", &mut entries);
        entries
    }

    fn collect(&'static self, prefix: &str, variant: &'static str, entries: &mut Vec<Entry>) {
        for key in self.written() {
            let path = format!("{prefix}{}", key.name);
            let below = format!("{path}.");
            entries.push(Entry { path, variant, key });
            for (variant, table) in key.kind.tables_inside() {
                table.collect(&below, variant, entries);
            }
        }
    }

    /// The keys as they are written: the alternatives of [`Kind::OneOf`] in its place.
    pub fn written(&'static self) -> impl Iterator<Item = &'static Key> {
        self.keys.iter().flat_map(|key| match key.kind {
            Kind::OneOf(keys) => keys,
            _ => std::slice::from_ref(key),
        })
    }
}

/// The range of a number. Bounds are exact up to 2^53.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    low: Option<Bound>,
    high: Option<Bound>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Bound {
    value: f64,
    is_included: bool,
}

const fn included(value: f64) -> Option<Bound> {
    Some(Bound {
        value,
        is_included: true,
    })
}

const fn excluded(value: f64) -> Option<Bound> {
    Some(Bound {
        value,
        is_included: false,
    })
}

/// `low` and more.
pub const fn at_least(low: f64) -> Limits {
    Limits {
        low: included(low),
        high: None,
    }
}

/// More than `low`.
pub const fn above(low: f64) -> Limits {
    Limits {
        low: excluded(low),
        high: None,
    }
}

/// `low` to `high`, both included.
pub const fn within(low: f64, high: f64) -> Limits {
    at_least(low).at_most(high)
}

impl Limits {
    /// Any number.
    pub const NONE: Self = Self {
        low: None,
        high: None,
    };

    /// Up to `high`, which is included.
    pub const fn at_most(self, high: f64) -> Self {
        Self {
            high: included(high),
            ..self
        }
    }

    /// Up to `high`, which is not included.
    pub const fn below(self, high: f64) -> Self {
        Self {
            high: excluded(high),
            ..self
        }
    }

    /// Whether there are any.
    pub fn are_set(&self) -> bool {
        *self != Self::NONE
    }

    /// Whether a number is within them.
    pub fn contain(&self, number: f64) -> bool {
        let above =
            |bound: &Bound| number > bound.value || (bound.is_included && number == bound.value);
        let below =
            |bound: &Bound| number < bound.value || (bound.is_included && number == bound.value);
        self.low.as_ref().is_none_or(above) && self.high.as_ref().is_none_or(below)
    }

    /// What a number outside of them must be. Of a wide range, whose upper bound is a safeguard, only the violated
    /// bound.
    pub fn rule_for(&self, number: f64, unit: &str) -> String {
        let text = match (self.low, self.high) {
            (Some(low), Some(high))
                if low.is_included && high.is_included && high.value - low.value > 1024.0 =>
            {
                match number < low.value {
                    true => format!("at least {}", low.value),
                    false => format!("at most {}", high.value),
                }
            }
            _ => self.to_string(),
        };
        let is_single = text.ends_with(" 1") && number < 1.0;
        match unit {
            "" => text,
            unit if is_single => format!("{text} {}", unit.trim_end_matches('s')),
            unit => format!("{text} {unit}"),
        }
    }

    /// The bounds as keywords of JSON schema.
    pub fn keywords(&self) -> Vec<(&'static str, f64)> {
        let keyword = |bound: Option<Bound>, included, excluded| {
            bound.map(|bound| match bound.is_included {
                true => (included, bound.value),
                false => (excluded, bound.value),
            })
        };
        let low = keyword(self.low, "minimum", "exclusiveMinimum");
        let high = keyword(self.high, "maximum", "exclusiveMaximum");
        low.into_iter().chain(high).collect()
    }
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let low = |bound: Bound| match bound.is_included {
            true => format!("at least {}", bound.value),
            false => format!("above {}", bound.value),
        };
        let high = |bound: Bound| match bound.is_included {
            true => format!("at most {}", bound.value),
            false => format!("below {}", bound.value),
        };
        f.write_str(&match (self.low, self.high) {
            (None, None) => String::new(),
            (Some(bound), None) => low(bound),
            (None, Some(bound)) => high(bound),
            (Some(a), Some(b)) if a == b => a.value.to_string(),
            (Some(a), Some(b)) if a.is_included && b.is_included => {
                format!("{} to {}", a.value, b.value)
            }
            (Some(a), Some(b)) => format!("{} and {}", low(a), high(b)),
        })
    }
}

/// A type that a key of a table can have, with its description and its print.
pub trait Described {
    /// What the value can be.
    const KIND: Kind;
    /// Whether the key can be absent.
    const OPTIONAL: bool = false;

    /// Prints the key and the value into a table; nothing for an absent one.
    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error>;
}

/// A type of a whole table.
pub trait Section {
    /// Its keys.
    const DESCRIPTION: &'static Description;
}
