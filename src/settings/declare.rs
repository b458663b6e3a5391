//! Declaration of settings tables, from which everything else about their keys is generated.

/// Declares a settings table as a struct: for each key the type, the meaning (its doc comment) and further properties
/// (fields of [`Key`](crate::settings::Key)). Generates the struct, its reader, its serialization and its description.
///
/// ```text
/// settings! {
///     /// Linear warmup to a peak, then decay until the end of the stage.
///     #[derive(Clone, Debug, PartialEq)]
///     pub struct Schedule(table) {
///         /// Peak learning rate, reached at the end of the warmup.
///         pub peak: f64 { limits: above(0.0), example: "5e-4" },
///         /// Learning rate at the end of the stage.
///         pub end: f64 { limits: at_least(0.0) } [= 0.0],
///     }
///     check { check_end(table, peak, end) }
/// }
/// ```
///
/// | after the braces | the key |
/// |---|---|
/// | nothing | is required, or optional if the type is an `Option` |
/// | `[= value]` | has this default |
/// | `[or value]` | has a default that depends on earlier keys; `fallback` describes it |
/// | `[else value]` | is required; where it is invalid, checks continue with `value` |
/// | `[=> read]` | is read with this expression, an `Option`, which must enforce the limits itself |
///
/// The names in parentheses after the struct's name are the table and further arguments of `read`. In `check`, each
/// field is an `Option` under its name, `None` if it is invalid; `verify` is a function that takes the table and the
/// complete struct.
macro_rules! settings {
    (
        $(#[doc = $about:literal])+
        #[derive($($derive:ident),*)]
        pub struct $name:ident($table:ident $(, $argument:ident: $given:ty)*) {
            $(
                $(#[doc = $meaning:literal])+
                pub $field:ident: $type:ty { $($option:ident: $value:expr),* $(,)? }
                $([$($how:tt)+])?
            ),+ $(,)?
        }
        $(check $check:block)?
        $(verify $verify:expr)?
    ) => {
        $(#[doc = $about])+
        #[derive($($derive),*)]
        pub struct $name {
            $($(#[doc = $meaning])+ pub $field: $type,)+
        }

        impl $crate::settings::Section for $name {
            const DESCRIPTION: &'static $crate::settings::Description = {
                #[allow(unused_imports)]
                use $crate::settings::{above, at_least, within};
                &$crate::settings::Description {
                    about: concat!($($about),+),
                    keys: &[$(
                        #[allow(clippy::needless_update)]
                        $crate::settings::Key {
                            default: $crate::settings::settings!(@default $type [$($($how)+)?]),
                            $($option: $value,)*
                            ..$crate::settings::Key::of::<$type>(
                                stringify!($field),
                                concat!($($meaning),+),
                            )
                        }
                    ),+],
                }
            };
        }

        impl $name {
            /// Reads the table.
            pub fn read($table: &$crate::settings::Table $(, $argument: $given)*) -> Option<Self> {
                $(
                    let $field = $crate::settings::settings!(
                        @read $name $table $field $type
                        [$($($how)+)?]
                    );
                )+
                $($check)?
                let read = Self { $($field: $field?),+ };
                $($verify($table, &read);)?
                Some(read)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                use serde::ser::SerializeMap;
                let mut map = serializer.serialize_map(None)?;
                $(
                    let key = <Self as $crate::settings::Section>::DESCRIPTION.key(stringify!($field));
                    let is_default =
                        $crate::settings::settings!(@is_default $type, self.$field, [$($($how)+)?]);
                    if !(key.omit_default && is_default) {
                        $crate::settings::Described::print(&self.$field, key.name, &mut map)?;
                    }
                )+
                map.end()
            }
        }

        impl $crate::settings::Described for $name {
            const KIND: $crate::settings::Kind =
                $crate::settings::Kind::Table(<Self as $crate::settings::Section>::DESCRIPTION);

            fn print<M: serde::ser::SerializeMap>(
                &self,
                key: &'static str,
                map: &mut M,
            ) -> std::result::Result<(), M::Error> {
                map.serialize_entry(key, self)
            }
        }

        $crate::settings::settings!(@field $name [$($argument)*]);
    };
    // A table with further arguments is read by its parent table.
    (@field $name:ident [$($argument:ident)+]) => {};
    (@field $name:ident []) => {
        impl $crate::settings::Field for $name {
            fn read(
                table: &$crate::settings::Table,
                key: &$crate::settings::Key,
            ) -> Option<Self> {
                table.child(key, $name::read)
            }
        }

        impl $crate::settings::Field for Vec<$name> {
            fn read(
                table: &$crate::settings::Table,
                key: &$crate::settings::Key,
            ) -> Option<Self> {
                table.children(key, $name::read)
            }
        }
    };
    (@default $type:ty [= $default:expr]) => {
        Some(|| $crate::settings::printed::<$type>(&$default))
    };
    (@default $type:ty [$($how:tt)*]) => { None };
    (@is_default $type:ty, $field:expr, [= $default:expr]) => {
        <$type as PartialEq>::eq(&$field, &$default)
    };
    (@is_default $type:ty, $field:expr, [$($how:tt)*]) => { false };
    (@read $name:ident $table:ident $field:ident $type:ty []) => {
        <$type as $crate::settings::Field>::read(
            $table,
            <$name as $crate::settings::Section>::DESCRIPTION.key(stringify!($field)),
        )
    };
    (@read $name:ident $table:ident $field:ident $type:ty [= $default:expr]) => {
        match $table.has(stringify!($field)) {
            true => {
                $crate::settings::settings!(@read $name $table $field $type []).or(Some($default))
            }
            false => Some($default),
        }
    };
    (@read $name:ident $table:ident $field:ident $type:ty [or $default:expr]) => {
        $crate::settings::settings!(@read $name $table $field $type [= $default])
    };
    (@read $name:ident $table:ident $field:ident $type:ty [else $stand_in:expr]) => {
        $crate::settings::settings!(@read $name $table $field $type []).or(Some($stand_in))
    };
    (@read $name:ident $table:ident $field:ident $type:ty [=> $read:expr]) => {
        $read
    };
}

pub(crate) use settings;
