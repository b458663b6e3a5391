//! Values typed by users: data sets, quantities, devices, shard patterns.

use advxl::data::Spec;
use advxl::fuzzing::shard_names;
use advxl::ops::DeviceName;
use advxl::units::Fraction;

/// Longer inputs find nothing else.
const LONGEST: usize = 100;

/// Checks that a parsed value, printed and parsed again, is the same.
pub fn words(data: &[u8]) {
    let text = String::from_utf8_lossy(&data[..data.len().min(LONGEST)]);
    if let Ok(fraction) = text.parse::<Fraction>() {
        assert!(fraction.value().is_finite());
        assert_eq!(fraction.to_string().parse(), Ok(fraction));
    }
    if let Ok(spec) = text.parse::<Spec>() {
        assert_eq!(spec.to_string().parse().ok(), Some(spec));
    }
    if let Ok(device) = text.parse::<DeviceName>() {
        assert_eq!(device.to_string().parse(), Ok(device));
    }
    if let Ok(names) = shard_names(&text) {
        assert!(names.len() <= 1_000_000 * text.len().max(1));
    }
}
