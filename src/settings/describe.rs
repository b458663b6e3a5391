//! Descriptions of settings: constant data shared by readers, messages, the reference page and the JSON schema.

use std::fmt;

use serde::ser::SerializeMap;

/// A table of settings.
#[derive(Debug)]
pub struct Description {
    /// What the table is for.
    pub about: &'static str,
    /// The table's keys, in the order in which they are read and printed.
    pub keys: &'static [Key],
}

/// A setting: one key of a table.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// The key.
    pub name: &'static str,
    /// What the key sets, in one line.
    pub meaning: &'static str,
    /// Type of the value.
    pub kind: Kind,
    /// Whether the key can be omitted without a default.
    pub optional: bool,
    /// Returns the default as TOML.
    pub default: Option<fn() -> String>,
    /// Describes the default in words, for defaults that depend on other keys.
    pub fallback: &'static str,
    /// Whether a resolved recipe omits the key if its value is the default.
    pub omit_default: bool,
    /// Range of the number, or of each number in a list.
    pub limits: Limits,
    /// Unit of the number, in the plural; empty if it has none.
    pub unit: &'static str,
    /// An example value in TOML syntax.
    pub example: &'static str,
}

/// Type of a value.
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
    /// A string, optionally restricted by a regular expression.
    Text {
        /// Description of the expected string, for messages: "a string".
        expected: &'static str,
        /// A regular expression for the JSON schema; empty if any string is allowed.
        pattern: &'static str,
    },
    /// One of several words, each with its meaning.
    Words(&'static [(&'static str, &'static str)]),
    /// A list, with its length if that is fixed.
    List(&'static Kind, Option<usize>),
    /// A table.
    Table(&'static Description),
    /// A list of at least one table.
    Tables(&'static Description),
    /// One of several tables, each with its name.
    Variants(&'static [(&'static str, &'static Description)]),
    /// Exactly one of several keys, which belong to the enclosing table.
    OneOf(&'static [Key]),
}

impl Kind {
    /// Any string.
    pub const TEXT: Self = Self::Text {
        expected: "a string",
        pattern: "",
    };

    /// Describes the expected value, for messages.
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

    /// Returns the tables that a path can lead into; if there are several, each has a name.
    pub fn tables_inside(&self) -> Vec<(&'static str, &'static Description)> {
        match self {
            Self::Table(description) | Self::Tables(description) => vec![("", description)],
            Self::Variants(variants) => variants.to_vec(),
            _ => Vec::new(),
        }
    }
}

impl Key {
    /// Creates a key without limits or default.
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

    /// Returns whether a file must contain the key.
    pub fn is_required(&self) -> bool {
        !self.optional && self.default.is_none() && self.fallback.is_empty()
    }

    /// Describes what happens if the key is omitted: `required`, `optional` or the default.
    pub fn absence(&self) -> String {
        match self.default {
            _ if !self.fallback.is_empty() => self.fallback.to_owned(),
            Some(default) => default(),
            None if self.optional => "optional".to_owned(),
            None => "required".to_owned(),
        }
    }

    /// Describes the value briefly, with range and unit: `whole number, 1 to 4096 pixels`.
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
    /// Full path of the key.
    pub path: String,
    /// Name of the table variant that it belongs to, if the table has several.
    pub variant: &'static str,
    /// The key.
    pub key: &'static Key,
}

impl Description {
    /// Returns the key with a name.
    ///
    /// # Panics
    /// If there is no such key. Declarations only request their own keys.
    pub fn key(&'static self, name: &str) -> &'static Key {
        let found = self.keys.iter().find(|key| key.name == name);
        found.expect("a declared key")
    }

    /// Returns all keys of the table and its nested tables, each table before its keys.
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

    /// Iterates over the keys as they are written in a file: [`Kind::OneOf`] is replaced by its alternatives.
    pub fn written(&'static self) -> impl Iterator<Item = &'static Key> {
        self.keys.iter().flat_map(|key| match key.kind {
            Kind::OneOf(keys) => keys,
            _ => std::slice::from_ref(key),
        })
    }
}

/// Range of a number. Bounds are exact up to 2^53.
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

/// At least `low`.
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

    /// Adds the inclusive upper bound `high`.
    pub const fn at_most(self, high: f64) -> Self {
        Self {
            high: included(high),
            ..self
        }
    }

    /// Adds the exclusive upper bound `high`.
    pub const fn below(self, high: f64) -> Self {
        Self {
            high: excluded(high),
            ..self
        }
    }

    /// Returns whether there is a bound.
    pub fn are_set(&self) -> bool {
        *self != Self::NONE
    }

    /// Returns whether a number is within the limits.
    pub fn contain(&self, number: f64) -> bool {
        let above =
            |bound: &Bound| number > bound.value || (bound.is_included && number == bound.value);
        let below =
            |bound: &Bound| number < bound.value || (bound.is_included && number == bound.value);
        self.low.as_ref().is_none_or(above) && self.high.as_ref().is_none_or(below)
    }

    /// Describes what a number outside the limits must be. For a wide range, whose upper bound is only a safeguard, it
    /// gives just the violated bound.
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

    /// Returns the bounds as JSON schema keywords.
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

/// A type that a key can have, with its description and serialization.
pub trait Described {
    /// Type of the value.
    const KIND: Kind;
    /// Whether the key can be omitted.
    const OPTIONAL: bool = false;

    /// Serializes the key and the value into a table. An absent value is skipped.
    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error>;
}

/// The type of a whole table.
pub trait Section {
    /// Description of the table.
    const DESCRIPTION: &'static Description;
}
