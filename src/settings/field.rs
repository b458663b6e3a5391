//! Reading the fields of a declared struct.

use serde::Serialize;
use serde::ser::SerializeMap;

use super::describe::{Described, Key, Kind, Section};
use super::setting::Setting;
use super::table::Table;

/// A type that can be read from a key, required or optional.
pub trait Field: Described {
    /// Reads the value of `key`. Returns `None` if it is invalid or missing; the table records the problem.
    fn read(table: &Table, key: &Key) -> Option<Self>
    where
        Self: Sized;
}

impl<T: Setting> Field for T {
    fn read(table: &Table, key: &Key) -> Option<Self> {
        table.value(key)
    }
}

impl<T: Described> Described for Option<T> {
    const KIND: Kind = T::KIND;
    const OPTIONAL: bool = true;

    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error> {
        match self {
            Some(value) => value.print(key, map),
            None => Ok(()),
        }
    }
}

impl<T: Field> Field for Option<T> {
    fn read(table: &Table, key: &Key) -> Option<Self> {
        match table.has(key.name) {
            true => T::read(table, key).map(Some),
            false => Some(None),
        }
    }
}

impl<T: Section + Serialize> Described for Vec<T> {
    const KIND: Kind = Kind::Tables(T::DESCRIPTION);

    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error> {
        map.serialize_entry(key, self)
    }
}

/// Formats a value as TOML.
pub(crate) fn printed<T: Described>(value: &T) -> String {
    struct Entry<'a, T>(&'a T);

    impl<T: Described> Serialize for Entry<'_, T> {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut map = serializer.serialize_map(None)?;
            self.0.print("value", &mut map)?;
            map.end()
        }
    }

    let table = toml::Table::try_from(Entry(value)).expect("settings consist of TOML types");
    let value = table.get("value").map(toml::Value::to_string);
    value.unwrap_or_default()
}
