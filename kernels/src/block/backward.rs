//! The backward pass of a block: the gradient of its input, and the factors of the weights' gradients.

use rayon::prelude::*;

use crate::attention::{self, ToCells, ToF32};
use crate::block::forward::{ChunkSaved, Sizes, row_factors};
use crate::block::gradients::ChunkGradients;
use crate::block::{BlockGradients, BlockSaved, PackedBlock};
use crate::buffer::{Buffer, as_f32, as_f32_mut};
use crate::cells::{Element, ElementOp, With};
use crate::factors::{GROUP, column_sums, factors};
use crate::gelu::Gelu;
use crate::gemm::product;
use crate::lanes::Lanes;
use crate::mlp::{Wanted, branch_gradient};
use crate::norm;

/// Gradients of a block from `dy`, the gradient of its output.
///
/// `dx` is always written. With `gradients` those of the weights are too (set, not added to);
/// without, no product for them is computed.
///
/// Shapes: `dy` and `dx` `[batch, tokens, width]`.
///
/// # Panics
///
/// If a slice does not have the length of the forward pass, `weights` are of another shape, or `gradients`
/// are asked for and the forward pass saved for its input alone.
pub fn block_backward(
    weights: &PackedBlock,
    saved: &BlockSaved,
    dy: &[f32],
    dx: &mut [f32],
    mut gradients: Option<&mut BlockGradients>,
) {
    let shape = saved.shape;
    weights.check(&shape);
    let (found, right) = (weights.precision, saved.precision);
    assert!(found == right, "weights are packed for {found:?}, the forward pass ran in {right:?}");
    let elements = shape.elements();
    assert!(dy.len() == elements, "`dy` has {} elements, {shape:?} needs {elements}", dy.len());
    assert!(dx.len() == elements, "`dx` has {} elements, {shape:?} needs {elements}", dx.len());
    let samples = shape.chunk_samples();
    let size = (samples * shape.tokens * shape.width).max(1);
    let wanted = gradients.is_some();
    assert!(!wanted || saved.wanted == Wanted::Weights, "the forward pass saved for the gradient of its input alone");
    let chunk = |index: usize, dy: &[f32], dx: &mut [f32], activations: &ChunkSaved| {
        let sizes = Sizes::new(shape, dy.len());
        let scale = saved
            .path_scale
            .as_ref()
            .map(|(first, second)| [first, second].map(|factors| row_factors(&factors[index * samples..], &sizes)));
        let gelu = (saved.wanted == Wanted::Weights).then_some(saved.gelu);
        let backward = Backward { sizes, weights, gelu, scale, saved: activations, dy, dx, wanted };
        weights.isa.run(With(weights.precision, backward))
    };
    let count = saved.chunks.len();
    // Once for a batch of no samples too, whose gradients are zero.
    for start in (0..count.max(1)).step_by(GROUP) {
        let end = count.min(start + GROUP);
        let group = (start * size).min(elements)..(end * size).min(elements);
        let chunks = dy[group.clone()].par_chunks(size).zip(dx[group].par_chunks_mut(size));
        let chunks = chunks.zip(&saved.chunks[start..end]).enumerate().with_max_len(1);
        let chunks: Vec<_> =
            chunks.map(|(index, ((dy, dx), activations))| chunk(start + index, dy, dx, activations)).collect();
        if let Some(gradients) = &mut gradients {
            let chunks: Vec<_> = chunks.into_iter().flatten().collect();
            gradients.add(&shape, weights, &chunks, start == 0, end == count);
        }
    }
}

/// The backward pass of one chunk.
struct Backward<'a> {
    sizes: Sizes,
    weights: &'a PackedBlock,
    /// If the hidden layer was saved as it was before its GELU, which that is.
    gelu: Option<Gelu>,
    scale: Option<[Vec<f32>; 2]>,
    saved: &'a ChunkSaved,
    dy: &'a [f32],
    dx: &'a mut [f32],
    wanted: bool,
}

impl ElementOp for Backward<'_> {
    type Output = Option<ChunkGradients>;

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) -> Self::Output {
        let Self { sizes, weights, gelu, scale, saved, dy, dx, wanted } = self;
        let PackedBlock { norm1, qkv, proj, mlp, .. } = weights;
        let (rows, true_width) = (sizes.rows, sizes.shape.width);
        let (width, inner) = (sizes.width(), sizes.heads.inner());
        let scale = |i: usize| scale.as_ref().map(|scale| &scale[i][..]);
        let mut gradients = wanted.then(|| ChunkGradients::new::<P>(&sizes));
        let mut d_branch = Buffer::new(rows * P::cells(width));
        let mut d_norm = Buffer::new(rows * width);
        dx.copy_from_slice(dy);

        // The MLP: y = x1 + s2 * fc2(gelu(fc1(norm2(x1)))).
        branch_gradient::<S, P>(s, dx, true_width, scale(1), &mut d_branch);
        let of_mlp = gradients.as_mut().map(|gradients| &mut gradients.mlp);
        mlp.backward::<S, P>(s, gelu, &saved.mlp, &d_branch, &mut d_norm, dx, of_mlp);

        // Attention: x1 = x + s1 * proj(attention(qkv(norm1(x)))).
        branch_gradient::<S, P>(s, dx, true_width, scale(0), &mut d_branch);
        let mut d_attended = Buffer::new(rows * P::cells(inner));
        let a = sizes.left::<P>(&d_branch, width);
        let mut to = ToCells::<P>::new(&mut d_attended, P::cells(inner));
        product::<S, P>(s, a, proj.backward::<P>(), &mut to);
        let mut d_qkv = Buffer::new(rows * P::cells(3 * inner));
        attend_backward::<S, P>(s, &sizes, saved, &d_attended, &mut d_qkv);
        let mut to = ToF32 { to: as_f32_mut(&mut d_norm), stride: width };
        let a = sizes.left::<P>(&d_qkv, 3 * inner);
        product::<S, P>(s, a, qkv.backward::<P>(), &mut to);
        if let Some(gradients) = &mut gradients {
            factors::<S, P>(s, rows, (&d_branch, width), (&saved.attended, inner), &mut gradients.proj);
            factors::<S, P>(s, rows, (&d_qkv, 3 * inner), (&saved.normalized1, width), &mut gradients.qkv);
            column_sums::<S, P>(s, as_f32(&d_norm), &saved.normalized1, width, &mut gradients.norm1);
        }
        for (row, dx) in dx.chunks_exact_mut(true_width).enumerate() {
            let d_norm = &as_f32(&d_norm)[row * width..][..width];
            let normalized = &saved.normalized1[row * P::cells(width)..];
            norm::add_gradient::<S, P>(s, d_norm, normalized, saved.inverse_deviation1[row], &norm1.weight, dx);
        }
        gradients
    }
}

#[inline(always)]
fn attend_backward<S: Lanes, P: Element>(
    s: S,
    sizes: &Sizes,
    saved: &ChunkSaved,
    d_attended: &[u32],
    d_qkv: &mut [u32],
) {
    let (heads, tokens) = (sizes.heads, sizes.shape.tokens);
    let mut scratch = Buffer::new(heads.scratch::<P>());
    let (stride, out_stride) = (tokens * P::cells(3 * heads.inner()), tokens * P::cells(heads.inner()));
    let probabilities = heads.probabilities::<P>();
    for sample in 0..sizes.samples {
        attention::backward::<S, P>(
            s,
            heads,
            &saved.qkv[sample * stride..][..stride],
            &saved.probabilities[sample * probabilities..][..probabilities],
            &d_attended[sample * out_stride..][..out_stride],
            &mut d_qkv[sample * stride..][..stride],
            &mut scratch,
        );
    }
}
