//! Types of single values: reading from TOML and serialization.

use std::fmt;
use std::path::PathBuf;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::describe::{Described, Kind};
use super::problem::Invalid;
use super::value::Value;

/// The type of a single value.
pub trait Setting: Sized {
    /// Kind of value.
    const KIND: Kind;

    /// Converts a value. Returns `None` for a value of another type, and an error for an invalid value of the right
    /// type.
    fn from_value(value: &Value) -> Option<Result<Self, Invalid>>;

    /// Returns the numbers that limits apply to.
    fn numbers(&self) -> Vec<f64> {
        Vec::new()
    }

    /// Serializes the value.
    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error>;
}

struct Printed<'a, T>(&'a T);

impl<T: Setting> Serialize for Printed<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.print(serializer)
    }
}

impl<T: Setting> Described for T {
    const KIND: Kind = T::KIND;

    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error> {
        map.serialize_entry(key, &Printed(self))
    }
}

impl Setting for u64 {
    const KIND: Kind = Kind::Whole;

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        match value {
            Value::Integer(number) if *number < 0 => None,
            Value::Integer(number) => {
                Some(u64::try_from(*number).map_err(|_| too_large(number, u64::MAX)))
            }
            Value::Other(text) if is_digits(text) => Some(Err(too_large(text, u64::MAX))),
            _ => None,
        }
    }

    fn numbers(&self) -> Vec<f64> {
        vec![*self as f64]
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(*self)
    }
}

impl Setting for u32 {
    const KIND: Kind = Kind::Whole;

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        let found = u64::from_value(value)?;
        Some(found.and_then(|number| {
            u32::try_from(number).map_err(|_| too_large(number, u64::from(u32::MAX)))
        }))
    }

    fn numbers(&self) -> Vec<f64> {
        vec![f64::from(*self)]
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(*self)
    }
}

impl Setting for usize {
    const KIND: Kind = Kind::Whole;

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        let found = u64::from_value(value)?;
        Some(found.and_then(|number| {
            usize::try_from(number).map_err(|_| too_large(number, usize::MAX as u64))
        }))
    }

    fn numbers(&self) -> Vec<f64> {
        vec![*self as f64]
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(*self as u64)
    }
}

fn is_digits(text: &str) -> bool {
    text.bytes().all(|digit| digit.is_ascii_digit())
}

fn too_large(number: impl fmt::Display, largest: u64) -> Invalid {
    format!("{number} is too large; the maximum is {largest}").into()
}

impl Setting for f64 {
    const KIND: Kind = Kind::Number;

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        match value {
            Value::Integer(number) => Some(Ok(*number as f64)),
            Value::Float(number) if number.is_finite() => Some(Ok(*number)),
            Value::Float(number) => Some(Err(format!("{number} is not finite").into())),
            _ => None,
        }
    }

    fn numbers(&self) -> Vec<f64> {
        vec![*self]
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(*self)
    }
}

impl Setting for bool {
    const KIND: Kind = Kind::Boolean;

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        match value {
            Value::Boolean(truth) => Some(Ok(*truth)),
            _ => None,
        }
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bool(*self)
    }
}

impl Setting for String {
    const KIND: Kind = Kind::TEXT;

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        match value {
            Value::Text(text) => Some(Ok(text.clone())),
            _ => None,
        }
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self)
    }
}

impl Setting for PathBuf {
    const KIND: Kind = Kind::TEXT;

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        String::from_value(value).map(|text| text.map(PathBuf::from))
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

impl Setting for Vec<String> {
    const KIND: Kind = Kind::List(&Kind::TEXT, None);

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        items(value)
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

impl<const N: usize> Setting for [f64; N] {
    const KIND: Kind = Kind::List(&Kind::Number, Some(N));

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        fixed(items(value)?)
    }

    fn numbers(&self) -> Vec<f64> {
        self.to_vec()
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.as_slice().serialize(serializer)
    }
}

impl Setting for [usize; 4] {
    const KIND: Kind = Kind::List(&Kind::Whole, Some(4));

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        fixed(items(value)?)
    }

    fn numbers(&self) -> Vec<f64> {
        self.iter().map(|number| *number as f64).collect()
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.serialize(serializer)
    }
}

/// Reads the items of a list, all of one type.
fn items<T: Setting>(value: &Value) -> Option<Result<Vec<T>, Invalid>> {
    let Value::List(nodes) = value else {
        return None;
    };
    nodes
        .iter()
        .map(|node| T::from_value(&node.value))
        .collect()
}

fn fixed<T, const N: usize>(items: Result<Vec<T>, Invalid>) -> Option<Result<[T; N], Invalid>> {
    match items {
        Ok(items) => items.try_into().ok().map(Ok),
        Err(invalid) => Some(Err(invalid)),
    }
}
