//! Words for the precisions of matrix products.

use advxl_kernels::Precision;

/// Each precision by its word.
pub const PRECISIONS: [(&str, Precision); 2] = [("f32", Precision::F32), ("bf16", Precision::Bf16)];

/// The word for a precision.
pub fn word_of(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    }
}
