//! Multi-head attention `softmax(q k^T / sqrt(head_dim)) v`, causal where it is asked for.

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
    /// Whether query i sees only the keys up to i.
    pub causal: bool,
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
    Small { tiles: usize },
    /// Two tensors of a head in shared memory.
    Long { forward: Block, gradient: Gradient },
    /// Number of queries and keys of a tile in shared memory.
    Tiled { tile: usize },
}

/// Warps, and bytes of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    warps: usize,
    shared: usize,
}

/// The gradient of `attention_long.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gradient {
    /// In one kernel, `attention_long_gradient.cuh`: tiles of keys a warp, the third shared by all warps, and blocks of
    /// a multiprocessor at a time.
    Once { tiles: usize, block: Block, blocks: usize },
    /// In two, for queries and for keys.
    Twice([Block; 2]),
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
        if kind == Kind::Bf16
            && let Some(route) = self.long(tiles, facts.shared_memory)
        {
            return route;
        }
        let fits = self.tiled_memory(4, 64) <= facts.shared_memory;
        Route::Tiled { tile: if fits { 64 } else { 32 } }
    }

    /// Shared memory of `attention.cuh`, forward and gradient.
    fn small_memory(&self, tiles: usize) -> [usize; 2] {
        let rows = 16 * tiles;
        let tile = rows * (self.head_dim.next_multiple_of(16) + 8) * 2;
        [3 * tile, 4 * tile + 2 * rows * (rows + 8) * 2]
    }

    /// Where a block has the shared memory.
    fn long(&self, tiles: usize, shared_memory: usize) -> Option<Route> {
        let (rows, row) = (16 * tiles, (self.head_dim.next_multiple_of(16) + 8) * 2);
        let (tensors, stats) = (2 * rows * row, 2 * rows * 4);
        // Two blocks at a time on a multiprocessor, so that one computes while the other loads, where both fit.
        let half = (shared_memory + 1024) / 2 - 1024;
        let two = tensors + stats.max(4 * 16 * row) <= half;
        let most = match self.head_dim {
            ..=64 => 16,
            65..=96 => 12,
            _ => 8,
        };
        // Those of more than 96 elements take all registers in one block.
        let most = if two && self.head_dim <= 96 { most / 2 } else { most };
        let even = |most: usize| tiles.div_ceil(tiles.div_ceil(most));
        // Each warp of the forward pass has its next queries there.
        let room = (if two { half } else { shared_memory }).saturating_sub(tensors) / (16 * row);
        if room == 0 || tensors + stats > shared_memory {
            return None;
        }
        let forward = even(most.min(room));
        let block = |warps, shared| Block { warps, shared };
        let gradient = self.once(tiles, shared_memory).unwrap_or_else(|| {
            let warps = even(most);
            Gradient::Twice([block(warps, tensors), block(warps, tensors + stats)])
        });
        Some(Route::Long { forward: block(forward, tensors + forward * 16 * row), gradient })
    }

    /// The gradient in one kernel, where a block has the registers and shared memory for a head.
    fn once(&self, tiles: usize, shared_memory: usize) -> Option<Gradient> {
        // Up to 16 warps have a tile each. More would have too few registers: eight have two, and share a 17th.
        let (a_warp, warps) = match tiles {
            5..=16 => (1, tiles),
            17 => (3, 8),
            _ => return None,
        };
        let (rows, head) = (16 * tiles, self.head_dim);
        let tensors = (3 * rows + 192) * (head.next_multiple_of(16) + 8) + 2 * rows * 40 + 32 * head;
        let shared = 2 * tensors + 128 * 4 + if a_warp == 3 { 16 * 40 * 2 } else { 0 };
        // Of 128 registers, eight warps are half of what a multiprocessor has.
        let two = tiles <= 8 && 2 * (shared + 1024) <= shared_memory + 1024;
        let fits = head <= 80 && shared <= shared_memory;
        let block = Block { warps, shared };
        fits.then_some(Gradient::Once { tiles: a_warp, block, blocks: if two { 2 } else { 1 } })
    }

    /// The programs of the forward pass and of its gradient.
    pub(crate) fn programs(&self, kind: Kind, facts: &Facts) -> [Program; 2] {
        let head = self.head_dim;
        match self.route(kind, facts) {
            Route::Small { tiles } => [Program::Attention { tiles, head }; 2],
            Route::Long { gradient, .. } => {
                let gradient = match gradient {
                    Gradient::Once { tiles, .. } => Program::AttentionLongGradient { head, tiles },
                    Gradient::Twice(_) => Program::AttentionLongTwice { head },
                };
                [Program::AttentionLong { head }, gradient]
            }
            Route::Tiled { tile } => [Program::AttentionAny { bf16: kind == Kind::Bf16, head, tile }; 2],
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Shared memory of `attention_any.cuh` with `count` tiles of `tile` rows.
    fn tiled_memory(&self, count: usize, tile: usize) -> usize {
        (count * tile * (self.head_dim + 1) + tile * (tile + 1)) * 4
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
/// If `qkv` has a length that does not match `shape`, or heads are longer than 128 or no multiple of 8.
pub fn attention(shape: AttentionShape, qkv: &Values) -> (Values, AttentionSaved) {
    shape.check("qkv", qkv, 3);
    let AttentionShape { batch, tokens, heads, head_dim, causal } = shape;
    let (gpu, kind) = (qkv.gpu(), qkv.kind());
    let y = Values::new(gpu, shape.elements(), kind);
    let [program, _] = shape.programs(kind, gpu.facts());
    let (n, h, causal, scale) = (tokens as i32, heads as i32, i32::from(causal), shape.scale());
    let tiled = match shape.route(kind, gpu.facts()) {
        Route::Small { tiles } => {
            let (name, [shared, _]) = (format!("attention_{tiles}_{head_dim}"), shape.small_memory(tiles));
            // SAFETY: `qkv` and `y` were checked against the shape; shared memory is that of the kernel's tiles.
            unsafe {
                launch!(gpu, program, &name, [heads, batch, 1], 32 * tiles, shared, qkv, &y, n, h, causal, scale)
            };
            None
        }
        Route::Long { forward: Block { warps, shared }, .. } => {
            let log_sums = Values::new(gpu, batch * heads * tokens, Kind::F32);
            let name = format!("attention_long_{head_dim}");
            // SAFETY: as above; there is a sum for every query of every head.
            unsafe {
                launch!(
                    gpu,
                    program,
                    &name,
                    [heads, batch, 1],
                    32 * warps,
                    shared,
                    qkv,
                    &y,
                    &log_sums,
                    n,
                    h,
                    causal,
                    scale
                )
            };
            Some((y.clone(), log_sums))
        }
        Route::Tiled { tile } => {
            let log_sums = Values::new(gpu, batch * heads * tokens, Kind::F32);
            let name = format!("attention_any_{}_{head_dim}_{tile}", kind.suffix());
            let (grid, shared) = ([tokens.div_ceil(tile), heads, batch], shape.tiled_memory(3, tile));
            // SAFETY: as above; there is a sum for every query of every head.
            unsafe { launch!(gpu, program, &name, grid, 256, shared, qkv, &y, &log_sums, n, h, causal, scale) };
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
    let AttentionShape { batch, tokens, heads, head_dim, causal } = *shape;
    let (gpu, kind) = (qkv.gpu(), qkv.kind());
    let dqkv = Values::new(gpu, qkv.len(), kind);
    let [_, program] = shape.programs(kind, gpu.facts());
    let (n, h, causal, scale) = (tokens as i32, heads as i32, i32::from(causal), shape.scale());
    let Some((y, log_sums)) = tiled else {
        let tiles = tokens.div_ceil(16);
        let (name, [_, shared]) = (format!("attention_gradient_{tiles}_{head_dim}"), shape.small_memory(tiles));
        // SAFETY: all were checked against the shape; shared memory is that of the kernel's tiles.
        unsafe {
            launch!(
                gpu,
                program,
                &name,
                [heads, batch, 1],
                32 * tiles,
                shared,
                qkv,
                dy,
                &dqkv,
                parts,
                n,
                h,
                causal,
                scale
            )
        };
        return dqkv;
    };
    let route = shape.route(kind, gpu.facts());
    if let Route::Long { gradient: Gradient::Once { tiles, block: Block { warps, shared }, blocks }, .. } = route {
        let (name, items) = (format!("attention_long_gradient_{tiles}_{head_dim}"), batch * heads);
        let grid = [items.min(blocks * gpu.facts().multiprocessors), 1, 1];
        // SAFETY: all were checked against the shape; there is a sum for every query of every head; shared memory is
        // that of the kernel's tensors.
        unsafe {
            launch!(
                gpu,
                program,
                &name,
                grid,
                32 * warps,
                shared,
                qkv,
                y,
                dy,
                log_sums,
                &dqkv,
                n,
                h,
                items as i32,
                causal,
                scale
            )
        };
        return dqkv;
    }
    let count = batch * heads * tokens;
    let delta = Values::new(gpu, count, Kind::F32);
    if let Route::Long { gradient: Gradient::Twice([queries, keys]), .. } = route {
        let name = |part: &str| format!("attention_long_{part}_{head_dim}");
        let grid = [heads, batch, 1];
        // SAFETY: all were checked against the shape; there is a sum and a delta for every query of every head.
        unsafe {
            launch!(
                gpu,
                program,
                &name("queries"),
                grid,
                32 * queries.warps,
                queries.shared,
                qkv,
                y,
                dy,
                log_sums,
                &delta,
                &dqkv,
                n,
                h,
                causal,
                scale
            );
            launch!(
                gpu,
                program,
                &name("keys"),
                grid,
                32 * keys.warps,
                keys.shared,
                qkv,
                dy,
                log_sums,
                &delta,
                &dqkv,
                n,
                h,
                causal,
                scale
            );
        }
        return dqkv;
    }
    let Route::Tiled { tile } = route else { unreachable!("attention in registers saves no sums") };
    let name = |part: &str| format!("attention_{part}_{}_{head_dim}_{tile}", kind.suffix());
    let (grid, shared) = ([tokens.div_ceil(tile), heads, batch], shape.tiled_memory(4, tile));
    // SAFETY: all were checked against the shape; there is a sum and a delta for every query of every head.
    unsafe {
        launch!(gpu, program, &name("delta"), [count.div_ceil(8), 1, 1], 256, 0, y, dy, &delta, n, h, count as i32);
        launch!(
            gpu,
            program,
            &name("queries"),
            grid,
            256,
            shared,
            qkv,
            dy,
            log_sums,
            &delta,
            &dqkv,
            n,
            h,
            causal,
            scale
        );
        launch!(gpu, program, &name("keys"), grid, 256, shared, qkv, dy, log_sums, &delta, &dqkv, n, h, causal, scale);
    }
    dqkv
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By shared memory of a block: A100, H100, and consumer GPUs.
    fn facts(kib: usize) -> Facts {
        Facts {
            name: "test".into(),
            id: String::new(),
            capability: (8, 0),
            multiprocessors: 100,
            shared_memory: kib << 10,
        }
    }

    #[test]
    fn every_shape_has_kernels_that_fit_into_every_gpu() {
        for kib in [163, 227, 99] {
            for head_dim in (8..=128).step_by(8) {
                for tokens in [1, 16, 37, 50, 77, 96, 101, 145, 197, 257, 273, 577, 1370] {
                    for kind in [Kind::Bf16, Kind::F32] {
                        let shape = AttentionShape { batch: 1, tokens, heads: 16, head_dim, causal: false };
                        let route = shape.route(kind, &facts(kib));
                        let shared = match route {
                            Route::Small { tiles } => {
                                assert!(tokens <= 16 * tiles && kind == Kind::Bf16);
                                shape.small_memory(tiles)[1]
                            }
                            Route::Long { forward, gradient } => {
                                let threads = match head_dim {
                                    ..=64 => 512,
                                    65..=96 => 384,
                                    _ => 256,
                                };
                                assert!(kind == Kind::Bf16);
                                let blocks = match gradient {
                                    Gradient::Once { tiles, block, blocks } => {
                                        let Block { warps, shared } = block;
                                        let most = 16 * if tiles == 3 { 2 * warps + 1 } else { tiles * warps };
                                        assert!(tokens <= most && 32 * warps <= [512, 0, 256][tiles - 1]);
                                        assert!(blocks * (shared + 1024) <= (kib + 1) << 10, "{shape:?}: {gradient:?}");
                                        assert!(warps <= tokens.div_ceil(16) && block.shared <= kib << 10);
                                        vec![forward]
                                    }
                                    Gradient::Twice([queries, keys]) => vec![forward, queries, keys],
                                };
                                for Block { warps, .. } in &blocks {
                                    assert!((1..=threads / 32).contains(warps) && *warps <= tokens.div_ceil(16));
                                }
                                blocks.iter().map(|block| block.shared).max().expect("there are some")
                            }
                            Route::Tiled { tile } => shape.tiled_memory(4, tile),
                        };
                        assert!(shared <= kib << 10, "{shape:?} {kind:?}: {route:?} needs {shared} of {kib} KiB");
                    }
                }
            }
        }
    }

    #[test]
    fn shapes_of_the_model_zoo_use_matrix_instructions_where_they_fit() {
        let route = |tokens, head_dim, kib| {
            let shape = AttentionShape { batch: 1, tokens, heads: 16, head_dim, causal: true };
            shape.route(Kind::Bf16, &facts(kib))
        };
        for kib in [99, 163, 227] {
            for head_dim in [64, 72, 80, 88] {
                for tokens in [16, 37, 50, 77] {
                    assert_eq!(route(tokens, head_dim, kib), Route::Small { tiles: tokens.div_ceil(16) });
                }
            }
            assert!(matches!(route(197, 64, kib), Route::Long { .. }));
        }
        for head_dim in [64, 72, 80, 88, 104] {
            for tokens in [197, 257] {
                for kib in [163, 227] {
                    assert!(matches!(route(tokens, head_dim, kib), Route::Long { .. }), "{tokens} {head_dim} {kib}");
                }
            }
        }
        assert!(matches!(route(577, 80, 227), Route::Long { gradient: Gradient::Twice(_), .. }));
        let gradient = |tokens, head_dim, kib| match route(tokens, head_dim, kib) {
            Route::Long { gradient: Gradient::Once { tiles, block, blocks }, .. } => Some((tiles, block.warps, blocks)),
            _ => None,
        };
        for head_dim in [64, 72, 80] {
            assert_eq!(gradient(145, head_dim, 227), Some((1, 10, 1)));
            assert_eq!(gradient(197, head_dim, 227), Some((1, 13, 1)));
            assert_eq!(gradient(257, head_dim, 227), Some((3, 8, 1)));
        }
        assert_eq!(gradient(101, 64, 227), Some((1, 7, 2)));
        assert_eq!(gradient(197, 64, 163), Some((1, 13, 1)));
        let forward = |tokens, head_dim| match route(tokens, head_dim, 227) {
            Route::Long { forward, .. } => (forward.warps, 2 * (forward.shared + 1024) <= 228 << 10),
            _ => unreachable!(),
        };
        assert_eq!([forward(197, 64), forward(257, 64), forward(257, 80)], [(7, true), (6, true), (6, true)]);
        assert_eq!([gradient(257, 64, 163), gradient(197, 64, 99), gradient(257, 88, 227)], [None; 3]);
        assert_eq!(route(577, 64, 163), Route::Tiled { tile: 64 });
        assert_eq!(route(257, 104, 99), Route::Tiled { tile: 32 });
    }
}
