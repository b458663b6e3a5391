//! Human-readable quantities: fractions such as `4/255`, grouped counts and durations.

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};

use crate::settings::{Invalid, Kind, Setting, Value};

/// A number that remembers the fraction it was written as, such as `8/255`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fraction {
    text: String,
    value: f64,
}

impl Fraction {
    /// Returns the value of the fraction.
    pub fn value(&self) -> f64 {
        self.value
    }

    /// Returns the fraction multiplied by `share`, written as a decimal.
    pub fn times(&self, share: f64) -> Self {
        let value = self.value * share;
        Self {
            text: value.to_string(),
            value,
        }
    }
}

impl FromStr for Fraction {
    type Err = String;

    /// Parses a number, or a fraction of two numbers.
    ///
    /// Errors: any other text, a zero divisor, or a value that is not finite.
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| {
            part.trim()
                .parse::<f64>()
                .ok()
                .filter(|value| value.is_finite())
        };
        let value = match text.split_once('/') {
            None => number(text),
            Some((_, below)) if number(below) == Some(0.0) => {
                return Err(format!("`{text}` divides by zero"));
            }
            Some((above, below)) => number(above).zip(number(below)).map(|(a, b)| a / b),
        };
        match value {
            Some(value) if value.is_finite() => Ok(Self {
                text: text.trim().to_owned(),
                value,
            }),
            _ => Err(format!(
                "`{text}` is not a number or a fraction such as 8/255"
            )),
        }
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.text)
    }
}

impl Serialize for Fraction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl Setting for Fraction {
    const KIND: Kind = Kind::Fraction;

    fn from_value(value: &Value) -> Option<Result<Self, Invalid>> {
        let text = match value {
            Value::Text(text) => text.clone(),
            Value::Float(number) => number.to_string(),
            Value::Integer(number) => number.to_string(),
            _ => return None,
        };
        Some(text.parse().map_err(Invalid::from))
    }

    fn numbers(&self) -> Vec<f64> {
        vec![self.value]
    }

    fn print<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

/// Formats a count with thousands separators: `226,560`.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats seconds as `41 s`, `3 min 20 s` or `2 h 05 min`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fraction_keeps_its_text() {
        let epsilon: Fraction = "8/255".parse().unwrap();
        assert_eq!(epsilon.value(), 8.0 / 255.0);
        assert_eq!(epsilon.to_string(), "8/255");
        assert_eq!("0.5".parse::<Fraction>().unwrap().value(), 0.5);
    }

    #[test]
    fn invalid_numbers_are_rejected_with_the_reason() {
        for (text, reason) in [
            ("8/0", "divides by zero"),
            ("eight", "is not a number or a fraction"),
            ("1e999", "is not a number or a fraction"),
            ("8/255/2", "is not a number or a fraction"),
        ] {
            let found = text.parse::<Fraction>().unwrap_err();
            assert!(found.contains(reason), "{found}");
        }
    }

    #[test]
    fn counts_and_durations_are_formatted_for_reading() {
        assert_eq!(grouped(5_120_000_000), "5,120,000,000");
        assert_eq!(grouped(12), "12");
        assert_eq!(duration(200.2), "3 min 20 s");
        assert_eq!(duration(7500.0), "2 h 05 min");
    }
}
