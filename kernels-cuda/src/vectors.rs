//! Small operations on rows of any length, in f32.

use crate::gpu::Gpu;
use crate::launch;
use crate::machine::{Epilogue, Form, Kind, Operands, Product};
use crate::programs::Program::Vectors;
use crate::values::Values;

/// Blocks of 256 threads that take a number each at a time.
fn blocks(count: usize) -> [usize; 3] {
    [count.div_ceil(256).min(1 << 16), 1, 1]
}

fn check(what: &str, values: &Values) {
    assert!(values.kind() == Kind::F32, "`{what}` is {values:?}, not f32");
}

impl Values {
    /// The same number, `len` times.
    pub fn filled(gpu: &Gpu, len: usize, value: f32) -> Self {
        let to = Self::new(gpu, len, Kind::F32);
        // SAFETY: allocated for as many.
        unsafe { launch!(gpu, Vectors, "fill", blocks(len), 256, 0, &to, value, len as u64) };
        to
    }

    /// Lists one after another, all in the same format.
    ///
    /// # Panics
    ///
    /// If there are none, or their formats differ.
    pub fn joined(parts: &[&Self]) -> Self {
        let first = parts.first().expect("at least one part");
        let (gpu, kind) = (first.gpu(), first.kind());
        let all = Self::new(gpu, parts.iter().map(|part| part.len()).sum(), kind);
        let mut at = all.at();
        for part in parts {
            assert!(part.kind() == kind, "{part:?} after {first:?}");
            // SAFETY: `all` is as long as the parts together, and new.
            unsafe { gpu.copy(part.at(), at, part.bytes()) };
            at += part.bytes() as u64;
        }
        all
    }
}

/// `factors[row] * x` for every row.
///
/// Shapes: `x` and the result `[rows, width]`; `factors` `[rows]`.
///
/// # Panics
///
/// If `x` is not one row a factor, or not f32.
pub fn times_rows(x: &Values, factors: &Values) -> Values {
    check("x", x);
    check("factors", factors);
    let width = x.len() / factors.len().max(1);
    assert!(width * factors.len() == x.len(), "{} factors for {x:?}", factors.len());
    let to = Values::new(x.gpu(), x.len(), Kind::F32);
    // SAFETY: the lengths were checked above.
    unsafe {
        launch!(
            x.gpu(),
            Vectors,
            "times_rows",
            blocks(x.len()),
            256,
            0,
            &to,
            x,
            factors,
            x.len() as u64,
            width.max(1) as i32
        )
    };
    to
}

/// The inner products of the rows of `a` and `b`.
///
/// Shapes: `a` and `b` `[rows, width]`; the result `[rows]`.
///
/// # Panics
///
/// If they differ in length, are not whole rows, or not f32.
pub fn row_dots(a: &Values, b: &Values, width: usize) -> Values {
    check("a", a);
    check("b", b);
    assert!(a.len() == b.len() && width > 0 && a.len().is_multiple_of(width), "`a` is {a:?}, `b` {b:?}, width {width}");
    let rows = a.len() / width;
    let to = Values::new(a.gpu(), rows, Kind::F32);
    // SAFETY: the lengths were checked above.
    unsafe { launch!(a.gpu(), Vectors, "row_dots", [rows, 1, 1], 256, 8 * 4, &to, a, b, width as i32) };
    to
}

/// `x` with its last two axes swapped, such as a convolution's weight with the channels last.
///
/// Shapes: `x` `[a, b, c]` with `sizes` `[b, c]`; the result `[a, c, b]`.
///
/// # Panics
///
/// If `x` has not whole matrices of these sizes, or is not f32.
pub fn swap_axes(x: &Values, [b, c]: [usize; 2]) -> Values {
    check("x", x);
    assert!(b * c > 0 && x.len().is_multiple_of(b * c), "{x:?} is not matrices of {b} x {c}");
    let to = Values::new(x.gpu(), x.len(), Kind::F32);
    let count = x.len() / (b * c);
    let grid = [c.div_ceil(32), b.div_ceil(32), count.min(65_535)];
    // SAFETY: the lengths were checked above.
    unsafe { launch!(x.gpu(), Vectors, "swap_axes", grid, 256, 32 * 33 * 4, &to, x, count as u64, b as i32, c as i32) };
    to
}

/// `a + b` for any number of values.
///
/// # Panics
///
/// If they differ in length, or are not f32.
pub fn sum(a: &Values, b: &Values) -> Values {
    check("a", a);
    check("b", b);
    assert!(a.len() == b.len(), "`a` is {a:?}, `b` {b:?}");
    let to = Values::new(a.gpu(), a.len(), Kind::F32);
    // SAFETY: all have as many numbers.
    unsafe { launch!(a.gpu(), Vectors, "add_any", blocks(a.len()), 256, 0, &to, a, b, a.len() as u64) };
    to
}

/// Which of a product's operands are transposed in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transposed {
    /// Neither: A `[rows, inner]`, B `[inner, columns]`.
    Neither,
    /// A `[inner, rows]`, B `[inner, columns]`.
    First,
    /// A `[rows, inner]`, B `[columns, inner]`.
    Second,
}

/// A product of matrices in f32 (no TF32).
///
/// Shapes: `sizes` are rows, inner and columns; the result `[rows, columns]`.
///
/// # Panics
///
/// If the operands have not these sizes, or are not f32.
pub fn matmul(a: &Values, b: &Values, transposed: Transposed, [rows, inner, columns]: [usize; 3]) -> Values {
    check("a", a);
    check("b", b);
    let right = (rows * inner, inner * columns);
    assert!((a.len(), b.len()) == right, "`a` is {a:?}, `b` {b:?}, a product of {rows} x {inner} x {columns}");
    let form = match transposed {
        Transposed::Neither => Form::Input,
        Transposed::First => Form::Weight,
        Transposed::Second => Form::Forward,
    };
    let to = Values::new(a.gpu(), rows * columns, Kind::F32);
    let product = Product {
        form,
        rows,
        columns,
        inner,
        operands: Kind::F32,
        out: Kind::F32,
        tf32: false,
        add: false,
        epilogue: Epilogue::None,
    };
    let operands = Operands { a: a.at(), b: b.at(), d: to.at(), ..Operands::default() };
    // SAFETY: the lengths were checked above.
    unsafe { a.gpu().product(&product, &operands) };
    to
}
