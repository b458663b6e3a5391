//! Multi-head attention `softmax(q k^T / sqrt(head_dim)) v`.

use crate::launch;
use crate::machine::{Facts, Kind};
use crate::programs::Program;
use crate::rows::{sum_of_parts, sum_of_rows};
use crate::values::Values;

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Samples.
    pub batch: usize,
    /// Tokens of a sample.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Length of a head: a multiple of 8, up to 128.
    pub head_dim: usize,
}

/// What [`attention_gradient`] needs of [`attention`].
#[derive(Clone, Debug)]
pub struct AttentionSaved {
    shape: AttentionShape,
    qkv: Values,
    /// The result and the logarithms of the softmax's sums, where the kernel does not compute all scores at once.
    tiled: Option<(Values, Values)>,
}

/// Which kernels serve a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// All scores of a head in registers.
    Small {
        tiles: usize,
    },
    /// Two tensors of a head in shared memory: warps, and bytes of shared memory for the keys' gradient (second) and the
    /// others.
    Long {
        warps: usize,
        shared: [usize; 2],
    },
    Tiled,
}

impl AttentionShape {
    fn elements(&self) -> usize {
        self.batch * self.tokens * self.heads * self.head_dim
    }

    fn route(&self, kind: Kind, facts: &Facts) -> Route {
        let tiles = self.tokens.div_ceil(16);
        let small = kind == Kind::Bf16 && tiles <= 5 && self.small_memory(tiles)[1] <= facts.shared_memory;
        if small {
            return Route::Small { tiles };
        }
        let rows = 16 * tiles;
        let tensors = 2 * rows * (self.head_dim.next_multiple_of(16) + 8) * 2;
        let shared = [tensors, tensors + 2 * rows * 4];
        if kind == Kind::Bf16 && self.head_dim <= 96 && shared[1] <= facts.shared_memory {
            // Two blocks at a time on a multiprocessor, so that one computes while the other loads, where both fit.
            let two = 2 * (shared[1] + 1024) <= facts.shared_memory + 1024;
            let most = if self.head_dim <= 64 { 16 } else { 12 } / if two { 2 } else { 1 };
            return Route::Long { warps: tiles.div_ceil(tiles.div_ceil(most)), shared };
        }
        Route::Tiled
    }

    /// Shared memory of `attention.cuh`, forward and gradient.
    fn small_memory(&self, tiles: usize) -> [usize; 2] {
        let rows = 16 * tiles;
        let tile = rows * (self.head_dim.next_multiple_of(16) + 8) * 2;
        [3 * tile, 4 * tile + 2 * rows * (rows + 8) * 2]
    }

    /// The programs that this shape needs.
    pub(crate) fn program(&self, kind: Kind, facts: &Facts) -> Program {
        match self.route(kind, facts) {
            Route::Small { tiles } => Program::Attention { tiles, head: self.head_dim },
            Route::Long { .. } => Program::AttentionLong { head: self.head_dim },
            Route::Tiled => Program::AttentionAny { bf16: kind == Kind::Bf16, head: self.head_dim },
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Shared memory of `attention_any.cuh` with so many tiles of rows.
    fn tiled_memory(&self, tiles: usize) -> usize {
        (tiles * 64 * (self.head_dim + 1) + 64 * 65) * 4
    }

    fn check(&self, what: &str, values: &Values, parts: usize) {
        let right = parts * self.elements();
        assert!(values.len() == right, "`{what}` has {} elements, {self:?} needs {right}", values.len());
        assert!(
            self.head_dim.is_multiple_of(8) && (8..=128).contains(&self.head_dim),
            "heads of {}; the GPU's attention takes multiples of 8 up to 128",
            self.head_dim
        );
    }
}

/// Multi-head attention.
///
/// Shapes: `qkv` `[batch, tokens, 3, heads, head_dim]`, the result `[batch, tokens, heads, head_dim]`.
///
/// # Panics
///
/// If `qkv` has not the length that `shape` says, or heads are longer than 128 or no multiple of 8.
pub fn attention(shape: AttentionShape, qkv: &Values) -> (Values, AttentionSaved) {
    shape.check("qkv", qkv, 3);
    let AttentionShape { batch, tokens, heads, head_dim } = shape;
    let (gpu, kind) = (qkv.gpu(), qkv.kind());
    let y = Values::new(gpu, shape.elements(), kind);
    let program = shape.program(kind, gpu.facts());
    let (n, h, scale) = (tokens as i32, heads as i32, shape.scale());
    let tiled = match shape.route(kind, gpu.facts()) {
        Route::Small { tiles } => {
            let (name, [shared, _]) = (format!("attention_{tiles}_{head_dim}"), shape.small_memory(tiles));
            // SAFETY: `qkv` and `y` were checked against the shape; shared memory is that of the kernel's tiles.
            unsafe { launch!(gpu, program, &name, [heads, batch, 1], 32 * tiles, shared, qkv, &y, n, h, scale) };
            None
        }
        Route::Long { warps, shared: [shared, _] } => {
            let log_sums = Values::new(gpu, batch * heads * tokens, Kind::F32);
            let name = format!("attention_long_{head_dim}");
            // SAFETY: as above; there is a sum for every query of every head.
            unsafe {
                launch!(gpu, program, &name, [heads, batch, 1], 32 * warps, shared, qkv, &y, &log_sums, n, h, scale)
            };
            Some((y.clone(), log_sums))
        }
        Route::Tiled => {
            let log_sums = Values::new(gpu, batch * heads * tokens, Kind::F32);
            let name = format!("attention_any_{}_{head_dim}", kind.suffix());
            let grid = [tokens.div_ceil(64), heads, batch];
            // SAFETY: as above; there is a sum for every query of every head.
            unsafe { launch!(gpu, program, &name, grid, 256, shape.tiled_memory(3), qkv, &y, &log_sums, n, h, scale) };
            Some((y.clone(), log_sums))
        }
    };
    (y, AttentionSaved { shape, qkv: qkv.clone(), tiled })
}

/// The gradient of [`attention`]'s `qkv` from that of its result.
///
/// # Panics
///
/// If `dy` has not the length or format of the forward pass.
pub fn attention_gradient(saved: &AttentionSaved, dy: &Values) -> Values {
    gradient(saved, dy, false).0
}

/// The gradient of `qkv` and, where it is wanted, its sum over all tokens: the gradient of the bias.
pub(crate) fn gradient(saved: &AttentionSaved, dy: &Values, sums: bool) -> (Values, Option<Values>) {
    let width = 3 * saved.shape.heads * saved.shape.head_dim;
    let parts = (sums && saved.tiled.is_none()).then(|| Values::new(dy.gpu(), saved.shape.batch * width, Kind::F32));
    let dqkv = gradient_into(saved, dy, parts.as_ref());
    let sums = sums.then(|| match parts {
        Some(parts) => sum_of_parts(&parts, saved.shape.batch, width),
        None => sum_of_rows(&dqkv, width),
    });
    (dqkv, sums)
}

fn gradient_into(saved: &AttentionSaved, dy: &Values, parts: Option<&Values>) -> Values {
    let AttentionSaved { shape, qkv, tiled } = saved;
    shape.check("dy", dy, 1);
    assert!(dy.kind() == qkv.kind(), "`dy` is {dy:?}, `qkv` {qkv:?}");
    let AttentionShape { batch, tokens, heads, head_dim } = *shape;
    let (gpu, kind) = (qkv.gpu(), qkv.kind());
    let dqkv = Values::new(gpu, qkv.len(), kind);
    let program = shape.program(kind, gpu.facts());
    let (n, h, scale) = (tokens as i32, heads as i32, shape.scale());
    let Some((y, log_sums)) = tiled else {
        let tiles = tokens.div_ceil(16);
        let (name, [_, shared]) = (format!("attention_gradient_{tiles}_{head_dim}"), shape.small_memory(tiles));
        // SAFETY: all were checked against the shape; shared memory is that of the kernel's tiles.
        unsafe {
            launch!(gpu, program, &name, [heads, batch, 1], 32 * tiles, shared, qkv, dy, &dqkv, parts, n, h, scale)
        };
        return dqkv;
    };
    let count = batch * heads * tokens;
    let delta = Values::new(gpu, count, Kind::F32);
    if let Route::Long { warps, shared: [shared, more] } = shape.route(kind, gpu.facts()) {
        let name = |part: &str| format!("attention_long_{part}_{head_dim}");
        let (grid, threads) = ([heads, batch, 1], 32 * warps);
        // SAFETY: all were checked against the shape; there is a sum and a delta for every query of every head.
        unsafe {
            launch!(
                gpu,
                program,
                &name("queries"),
                grid,
                threads,
                shared,
                qkv,
                y,
                dy,
                log_sums,
                &delta,
                &dqkv,
                n,
                h,
                scale
            );
            launch!(gpu, program, &name("keys"), grid, threads, more, qkv, dy, log_sums, &delta, &dqkv, n, h, scale);
        }
        return dqkv;
    }
    let name = |part: &str| format!("attention_{part}_{}_{head_dim}", kind.suffix());
    let (grid, shared) = ([tokens.div_ceil(64), heads, batch], shape.tiled_memory(4));
    // SAFETY: all were checked against the shape; there is a sum and a delta for every query of every head.
    unsafe {
        launch!(gpu, program, &name("delta"), [count.div_ceil(8), 1, 1], 256, 0, y, dy, &delta, n, h, count as i32);
        launch!(gpu, program, &name("queries"), grid, 256, shared, qkv, dy, log_sums, &delta, &dqkv, n, h, scale);
        launch!(gpu, program, &name("keys"), grid, 256, shared, qkv, dy, log_sums, &delta, &dqkv, n, h, scale);
    }
    dqkv
}
