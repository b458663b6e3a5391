//! Parsers of option values.

use super::device::device;
use super::print::note;
use crate::error::Result;
use crate::model::config::common::{check_mean, check_std};
use crate::ops::Precision;
use crate::ops::precision::PRECISIONS;

pub(crate) fn parse_channels(text: &str) -> std::result::Result<[f64; 3], String> {
    let numbers = text
        .split(',')
        .map(|number| number.trim().parse::<f64>().ok());
    let numbers: Option<Vec<f64>> = numbers
        .map(|number| number.filter(|n| n.is_finite()))
        .collect();
    let three = numbers.and_then(|numbers| numbers.try_into().ok());
    three.ok_or_else(|| "give three numbers, such as 0.5,0.5,0.5".to_owned())
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

pub(crate) fn parse_precision(text: &str) -> std::result::Result<Precision, String> {
    let found = PRECISIONS.iter().find(|(word, _)| *word == text);
    found
        .map(|(_, precision)| *precision)
        .ok_or_else(|| "use f32 or bf16".to_owned())
}

/// The arithmetic that is used for what was asked; says so where it is another.
pub(crate) fn usable_precision(wanted: Precision) -> Result<Precision> {
    let (precision, notice) = crate::ops::usable(wanted, &device()?);
    if let Some(notice) = notice {
        note(&format!("note: {notice}"));
    }
    Ok(precision)
}
