//! The values of a TOML file, each with its origin.

use std::collections::BTreeMap;
use std::fmt;

use toml::de::{DeTable, DeValue};

use super::problem::Problem;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Origin {
    /// A line of the file, from 1.
    Line(usize),
    /// A `--set` option on the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Flag(text) => write!(f, "`--set {text}`"),
        }
    }
}

/// A value of the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number. Wider than any setting, so that messages can show numbers out of range.
    Integer(i128),
    /// A number with a decimal point or an exponent.
    Float(f64),
    /// `true` or `false`.
    Boolean(bool),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Node>),
    /// A table.
    Table(BTreeMap<String, Node>),
    /// A date, or a number beyond every range. Not used by recipes.
    Other(String),
    /// Removed on the command line: the key counts as absent but must still be a known key.
    Absent,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Integer(number) => write!(f, "{number}"),
            Self::Float(number) => write!(f, "{number:?}"),
            Self::Boolean(truth) => write!(f, "{truth}"),
            Self::Text(text) => write!(f, "{text:?}"),
            Self::List(items) => {
                let items: Vec<_> = items.iter().map(|item| item.value.to_string()).collect();
                write!(f, "[{}]", items.join(", "))
            }
            Self::Table(_) => f.write_str("{...}"),
            Self::Other(text) => f.write_str(text),
            Self::Absent => f.write_str(ABSENT),
        }
    }
}

/// The word that removes a key: `--set KEY=none`.
pub(super) const ABSENT: &str = "none";

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub(super) value: Value,
    pub(super) origin: Origin,
}
pub(super) fn parse(text: &str, problems: &mut Vec<Problem>) -> BTreeMap<String, Node> {
    let line_of = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let line = line_of(error.span().map_or(0, |span| span.start));
        problems.push(Problem {
            place: format!("line {line}"),
            message: format!("invalid TOML: {}", error.message()),
            hint: None,
        });
    }
    convert_table(table.get_ref(), &line_of)
}

fn convert_table(table: &DeTable<'_>, line_of: &dyn Fn(usize) -> usize) -> BTreeMap<String, Node> {
    table
        .iter()
        .map(|(key, value)| {
            // The line of the key, where a reader looks for `key = value`.
            let origin = Origin::Line(line_of(key.span().start));
            (
                key.get_ref().to_string(),
                Node {
                    value: convert(value.get_ref(), line_of),
                    origin,
                },
            )
        })
        .collect()
}

fn convert(value: &DeValue<'_>, line_of: &dyn Fn(usize) -> usize) -> Value {
    let other = |text: &str| Value::Other(text.to_owned());
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| other(number.as_str()), Value::Integer),
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .map_or_else(|_| other(number.as_str()), Value::Float),
        DeValue::Boolean(truth) => Value::Boolean(*truth),
        DeValue::Datetime(date) => other(&date.to_string()),
        DeValue::Array(items) => Value::List(
            items
                .iter()
                .map(|item| Node {
                    value: convert(item.get_ref(), line_of),
                    origin: Origin::Line(line_of(item.span().start)),
                })
                .collect(),
        ),
        DeValue::Table(table) => Value::Table(convert_table(table, line_of)),
    }
}

pub(super) fn name_of(entries: &BTreeMap<String, Node>) -> Option<&str> {
    match entries.get("name").map(|node| &node.value) {
        Some(Value::Text(name)) => Some(name),
        _ => None,
    }
}
