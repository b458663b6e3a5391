//! Distances between the rows of two matrices, and their gradients.

use crate::launch;
use crate::machine::Kind;
use crate::programs::Program::Distance;
use crate::values::Values;

/// Which distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowDistance {
    /// `|x - y|^2`.
    SquaredL2,
    /// `|x - y|`, at least 1e-12; its gradient is 0 there, as PyTorch's where the rows are equal.
    L2,
    /// `-cos(x, y)`, with lengths of at least 1e-12.
    Cosine,
    /// The Kullback-Leibler divergence `KL(softmax(x) || softmax(y))`.
    Kl,
}

impl RowDistance {
    /// As the kernels have it.
    fn number(self) -> i32 {
        match self {
            Self::SquaredL2 => 0,
            Self::L2 => 1,
            Self::Cosine => 2,
            Self::Kl => 3,
        }
    }
}

/// The distance of each row of `x` from the same row of `y`.
///
/// Shapes: `x` and `y` `[rows, width]` in f32; the result `[rows]`.
///
/// # Panics
///
/// If the lengths do not match.
pub fn row_distances(kind: RowDistance, x: &Values, y: &Values, width: usize) -> Values {
    let rows = rows(x, y, width);
    let to = Values::new(x.gpu(), rows, Kind::F32);
    let (grid, kind) = ([rows, 1, 1], kind.number());
    // SAFETY: the lengths were checked above.
    unsafe { launch!(x.gpu(), Distance, "row_distances", grid, 256, 32 * 4, &to, x, y, width as i32, kind) };
    to
}

/// The gradients of [`row_distances`]' rows `x` and, if wanted, `y`, from those of the distances.
///
/// Shapes: `d` `[rows]`; `x`, `y` and the results `[rows, width]`, all in f32.
///
/// # Panics
///
/// If the lengths do not match.
pub fn row_distances_gradient(
    kind: RowDistance,
    x: &Values,
    y: &Values,
    width: usize,
    d: &Values,
    wanted_y: bool,
) -> (Values, Option<Values>) {
    let rows = rows(x, y, width);
    assert!((d.len(), d.kind()) == (rows, Kind::F32), "`d` is {d:?}, rows {rows}");
    let dx = Values::new(x.gpu(), x.len(), Kind::F32);
    let dy = wanted_y.then(|| Values::new(x.gpu(), x.len(), Kind::F32));
    let (name, grid, kind) = ("row_distances_gradient", [rows, 1, 1], kind.number());
    // SAFETY: the lengths were checked above.
    unsafe {
        launch!(x.gpu(), Distance, name, grid, 256, 32 * 4, &dx, dy.as_ref(), d, x, y, width as i32, kind);
    }
    (dx, dy)
}

fn rows(x: &Values, y: &Values, width: usize) -> usize {
    let whole = width > 0 && x.len().is_multiple_of(width) && x.kind() == Kind::F32;
    assert!(whole, "`x` is {x:?}, not whole rows of {width} in f32");
    assert!((y.len(), y.kind()) == (x.len(), Kind::F32), "`y` is {y:?}, `x` {x:?}");
    x.len() / width
}
