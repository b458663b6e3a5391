//! GELU, casts, sums of two tensors and sums over rows.

use crate::gpu::Gpu;
use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Rows;
use crate::values::Values;

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gelu {
    /// `x / 2 * (1 + erf(x / sqrt(2)))`, PyTorch's default and timm's.
    Erf,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, big_vision's.
    Tanh,
    /// `x / (1 + e^(-1.702 x))`, that of OpenAI's CLIP.
    Quick,
}

impl Gelu {
    /// As the kernels have it.
    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Erf => 0,
            Self::Tanh => 1,
            Self::Quick => 2,
        }
    }
}

/// Blocks of 256 threads that each take eight numbers at a time.
pub(crate) fn blocks_for(count: usize) -> [usize; 3] {
    [count.div_ceil(8 * 256).min(1 << 16), 1, 1]
}

pub(crate) fn check_eights(what: &str, len: usize) {
    assert!(len.is_multiple_of(8), "{what} has {len} numbers, which is not a multiple of 8");
}

/// `y = gelu(x)`.
pub fn gelu(kind: Gelu, x: &Values) -> Values {
    let y = Values::new(x.gpu(), x.len(), x.kind());
    let name = format!("gelu_{}", x.kind().suffix());
    // SAFETY: both have as many numbers of this kind.
    unsafe { launch!(x.gpu(), Rows, &name, blocks_for(x.len()), 256, 0, &y, x, x.len() as u64, kind.number()) };
    y
}

/// `dx = dy * gelu'(x)` for rows of `width`, and the sum of the rows of `dx` where it is wanted.
///
/// # Panics
///
/// If the sizes do not match, or the sum is wanted of bf16 rows whose `width` is not a multiple of 8.
pub fn gelu_gradient(kind: Gelu, x: &Values, dy: &Values, width: usize, sums: bool) -> (Values, Option<Values>) {
    assert!((x.len(), x.kind()) == (dy.len(), dy.kind()), "`x` is {x:?}, `dy` {dy:?}");
    if !width.is_multiple_of(8) {
        let dx = gelu_slopes(kind, x, dy);
        let sums = sums.then(|| sum_of_rows(&dx, width));
        return (dx, sums);
    }
    let (gpu, rows) = (x.gpu(), rows_of(x, width));
    let dx = Values::new(gpu, x.len(), x.kind());
    let grid = column_grid(rows, width);
    let parts = sums.then(|| Values::new(gpu, grid[1] * width, Kind::F32));
    let name = format!("gelu_gradient_{}", x.kind().suffix());
    // SAFETY: the tensors have `rows * width` numbers of this kind, the parts as many as the grid has in its second
    // axis.
    unsafe {
        launch!(
            gpu,
            Rows,
            &name,
            grid,
            256,
            8 * 256 * 4,
            &dx,
            parts.as_ref(),
            x,
            dy,
            rows as i32,
            width as i32,
            kind.number()
        );
    }
    (dx, parts.map(|parts| sum_of_parts(&parts, grid[1], width)))
}

fn gelu_slopes(kind: Gelu, x: &Values, dy: &Values) -> Values {
    let dx = Values::new(x.gpu(), x.len(), x.kind());
    let (name, count) = (format!("gelu_slopes_{}", x.kind().suffix()), x.len());
    let grid = [count.div_ceil(256).min(1 << 16), 1, 1];
    // SAFETY: all have as many numbers of this kind.
    unsafe { launch!(x.gpu(), Rows, &name, grid, 256, 0, &dx, x, dy, count as u64, kind.number()) };
    dx
}

/// The sum of all rows of `width`, in f32: the gradient of a bias.
///
/// # Panics
///
/// If `x` is not whole rows, or in bf16 and `width` is not a multiple of 8.
pub fn sum_of_rows(x: &Values, width: usize) -> Values {
    if !width.is_multiple_of(8) {
        // Few columns, as of a head of ten classes: the rows are the parts.
        assert!(
            x.kind() == Kind::F32 && width > 0 && x.len().is_multiple_of(width),
            "{x:?} is not whole rows of {width} in f32"
        );
        return sum_of_parts(x, x.len() / width, width);
    }
    let (gpu, rows) = (x.gpu(), rows_of(x, width));
    let grid = column_grid(rows, width);
    let parts = Values::new(gpu, grid[1] * width, Kind::F32);
    let name = format!("column_parts_{}", x.kind().suffix());
    // SAFETY: as in `gelu_gradient`.
    unsafe { launch!(gpu, Rows, &name, grid, 256, 8 * 256 * 4, &parts, x, rows as i32, width as i32) };
    sum_of_parts(&parts, grid[1], width)
}

/// Blocks of 256 columns, and enough of them one below the other to fill a GPU. Depends on the sizes alone, as the
/// order of the sums does.
fn column_grid(rows: usize, width: usize) -> [usize; 3] {
    let across = width.div_ceil(256).max(1);
    [across, (1056 / across).clamp(1, 352).min(rows.div_ceil(8)).max(1), 1]
}

/// The second stage of every sum over rows.
pub(crate) fn sum_of_parts(parts: &Values, count: usize, width: usize) -> Values {
    let sum = Values::new(parts.gpu(), width, Kind::F32);
    // SAFETY: `parts` are `count` rows of `width` floats.
    unsafe {
        launch!(
            parts.gpu(),
            Rows,
            "column_sums",
            [width.div_ceil(32), 1, 1],
            512,
            512 * 4,
            &sum,
            parts,
            count as i32,
            width as i32
        );
    }
    sum
}

/// `a + b`.
///
/// # Panics
///
/// If they differ in length or format.
pub fn add(a: &Values, b: &Values) -> Values {
    assert!((a.len(), a.kind()) == (b.len(), b.kind()), "`a` is {a:?}, `b` {b:?}");
    let sum = Values::new(a.gpu(), a.len(), a.kind());
    let name = format!("add_{}", a.kind().suffix());
    // SAFETY: all have as many numbers of this kind.
    unsafe { launch!(a.gpu(), Rows, &name, blocks_for(a.len()), 256, 0, &sum, a, b, a.len() as u64) };
    sum
}

/// `x` in another format, every sample times its factor where there are some.
pub(crate) fn scaled(x: &Values, factors: Option<&Values>, kind: Kind) -> Values {
    let y = Values::new(x.gpu(), x.len(), kind);
    let sample = factors.map_or(x.len(), |factors| sample_len(x, factors));
    let name = format!("scale_rows_{}_{}", x.kind().suffix(), kind.suffix());
    // SAFETY: both have as many numbers; there is a factor for every sample.
    unsafe {
        launch!(x.gpu(), Rows, &name, blocks_for(x.len()), 256, 0, &y, x, factors, x.len() as u64, sample as i32)
    };
    y
}

/// `x + factor * branch`, a factor a sample, in the format of `x`.
pub(crate) fn residual(x: &Values, branch: &Values, factors: &Values) -> Values {
    assert!(x.len() == branch.len(), "`x` is {x:?}, `branch` {branch:?}");
    let y = Values::new(x.gpu(), x.len(), x.kind());
    let sample = sample_len(x, factors);
    let name = format!("residual_{}_{}", x.kind().suffix(), branch.kind().suffix());
    // SAFETY: all have as many numbers; there is a factor for every sample.
    unsafe {
        launch!(
            x.gpu(),
            Rows,
            &name,
            blocks_for(x.len()),
            256,
            0,
            &y,
            x,
            branch,
            factors,
            x.len() as u64,
            sample as i32
        );
    }
    y
}

/// f32 rows with another number of columns, cut off or filled up with zeros.
///
/// Shapes: `x` `[rows, from]`; the result `[rows, to]`.
///
/// # Panics
///
/// If `x` is not whole rows in f32.
pub fn resize_rows(x: &Values, from: usize, to: usize) -> Values {
    if from == to { x.clone() } else { resized(x, from, to, Kind::F32) }
}

/// The same in `kind`.
pub(crate) fn resized(x: &Values, from: usize, to: usize, kind: Kind) -> Values {
    assert!(
        x.kind() == Kind::F32 && from > 0 && x.len().is_multiple_of(from),
        "{x:?} is not whole rows of {from} in f32"
    );
    let y = Values::new(x.gpu(), x.len() / from * to, kind);
    let (name, count) = (format!("resize_rows_{}", kind.suffix()), y.len());
    // SAFETY: both have as many rows of the widths named.
    unsafe {
        launch!(
            x.gpu(),
            Rows,
            &name,
            [count.div_ceil(256).min(1 << 16), 1, 1],
            256,
            0,
            &y,
            x,
            count as u64,
            to as i32,
            from as i32
        )
    };
    y
}

fn sample_len(x: &Values, factors: &Values) -> usize {
    let sample = x.len() / factors.len().max(1);
    assert!(sample * factors.len() == x.len(), "{} factors for {x:?}", factors.len());
    sample.max(1)
}

pub(crate) fn rows_of(x: &Values, width: usize) -> usize {
    check_eights("a row", width);
    assert!(width > 0 && x.len().is_multiple_of(width), "{x:?} is not whole rows of {width}");
    x.len() / width
}

/// Panics if some values are on another GPU.
pub(crate) fn same_gpu(gpu: &Gpu, values: &[&Values]) {
    for values in values {
        assert!(gpu.is(values.gpu()), "{values:?} is on another GPU than {gpu:?}");
    }
}
