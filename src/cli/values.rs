//! Parsers for flag values.

use std::ffi::OsStr;
use std::marker::PhantomData;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::ErrorKind;

use super::device::device;
use super::print::note;
use crate::error::Result;
use crate::model::config::common::{check_mean, check_std};
use crate::ops::Precision;
use crate::settings::Words;

pub(crate) fn parse_channels(text: &str) -> std::result::Result<[f64; 3], String> {
    let numbers = text
        .split(',')
        .map(|number| number.trim().parse::<f64>().ok());
    let numbers: Option<Vec<f64>> = numbers
        .map(|number| number.filter(|n| n.is_finite()))
        .collect();
    let three = numbers.and_then(|numbers| numbers.try_into().ok());
    three.ok_or_else(|| "expected three numbers, such as 0.5,0.5,0.5".to_owned())
}

pub(crate) fn parse_mean(text: &str) -> std::result::Result<[f64; 3], String> {
    let mean = parse_channels(text)?;
    let text = |(message, hint): (String, String)| format!("{message}; {hint}");
    check_mean(&mean).map(|()| mean).map_err(text)
}

pub(crate) fn parse_std(text: &str) -> std::result::Result<[f64; 3], String> {
    let std = parse_channels(text)?;
    let text = |(message, hint): (String, String)| format!("{message}; {hint}");
    check_std(&std).map(|()| std).map_err(text)
}

/// Returns a parser for a flag that takes one of several words, which help lists. `what` names the kind of value in
/// messages.
pub(crate) fn one_of<T: Words>(what: &'static str) -> OneOf<T> {
    OneOf {
        what,
        of: PhantomData,
    }
}

/// See [`one_of`].
#[derive(Clone)]
pub(crate) struct OneOf<T> {
    what: &'static str,
    of: PhantomData<T>,
}

impl<T: Words> TypedValueParser for OneOf<T> {
    type Value = T;

    fn parse_ref(
        &self,
        _: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> std::result::Result<T, clap::Error> {
        let word = value.to_string_lossy();
        T::from_word(&word).ok_or_else(|| {
            let flag = argument.and_then(clap::Arg::get_long).unwrap_or_default();
            let text = format!(
                "--{flag}: unknown {} `{word}`\n  hint: use {}\n",
                self.what,
                T::listed()
            );
            clap::Error::raw(ErrorKind::InvalidValue, text)
        })
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let words = T::WORDS.iter();
        let value = |(word, meaning): &(&'static str, &'static str)| {
            PossibleValue::new(*word).help(meaning.trim())
        };
        Some(Box::new(words.map(value)))
    }
}

/// Returns the precision to compute in for a requested one, and prints a note if they differ.
pub(crate) fn usable_precision(wanted: Precision) -> Result<Precision> {
    let (precision, notice) = crate::ops::usable(wanted, &device()?);
    if let Some(notice) = notice {
        note(&format!("note: {notice}"));
    }
    Ok(precision)
}
