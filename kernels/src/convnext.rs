//! A whole ConvNeXt block, forward and backward (Liu et al. 2022).
//!
//! ```text
//! y = x + s * gamma * fc2(gelu(fc1(norm(depthwise(x)))))
//! ```
//!
//! The lines of all images are cut into chunks, and each chunk goes from the convolution to the sum in one task, so
//! that its activations stay in the cache. The cut depends on the shape alone. The convolution reads what it needs
//! around the chunk from the input. Backward the chunks go to the convolution's output; its gradient is whole before it
//! passes on to the input, since a line of that needs the lines around it.
//!
//! `gamma` is folded into `fc2` where that is packed: `gamma (W h + b) = (gamma W) h + gamma b`. From the gradients `G`
//! and `g` of the folded weight and bias come those of the parts: `gamma G` and `gamma g`, and for `gamma` the sums of
//! `W G` along the rows, and `b g`.

use rayon::prelude::*;

use crate::buffer::{Buffer, Floats, as_f32_mut};
use crate::cells::{Element, ElementOp, With, padded};
use crate::depthwise::{DepthwiseShape, PackedDepthwise, depthwise_input_gradient, weight_gradient};
use crate::detect::Isa;
use crate::factors::{GROUP, LayerTarget, NormTarget, add_gradients};
use crate::gelu::Gelu;
use crate::lanes::{Lanes, Op};
use crate::linear::{Norm, Spread, pack_linear};
use crate::mlp::{Mlp, MlpGradients, MlpSaved, Wanted, branch_gradient};
use crate::weights::ConvNextWeights;
use crate::{Path, Precision};

/// Sizes of a ConvNeXt block and of the batch that goes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvNextShape {
    /// Images.
    pub batch: usize,
    /// Lines of an image.
    pub height: usize,
    /// Pixels of a line.
    pub width: usize,
    /// Elements of a pixel.
    pub channels: usize,
    /// Elements of a pixel inside the MLP.
    pub hidden: usize,
    /// Pixels on a side of the depthwise kernel: odd.
    pub kernel: usize,
}

impl ConvNextShape {
    /// Elements of the input, `[batch, height * width, channels]`.
    pub fn elements(&self) -> usize {
        self.depthwise().elements()
    }

    /// Useful work of a forward pass: `2 (k^2 c + 2 c hidden)` for each pixel. The gradient of the input is as much
    /// again, so are the gradients of the weights.
    pub fn flops(&self) -> f64 {
        self.depthwise().flops() + 4.0 * self.elements() as f64 * self.hidden as f64
    }

    fn depthwise(&self) -> DepthwiseShape {
        let Self { batch, height, width, channels, kernel, .. } = *self;
        DepthwiseShape { batch, height, width, channels, kernel }
    }

    /// Lines of a chunk: about 144 pixels, but as many as the kernel has, so that the lines around a chunk, which are
    /// copied with it, are no more than its own.
    fn chunk_lines(&self) -> usize {
        const PIXELS: usize = 144;
        self.depthwise().band(PIXELS).max(self.kernel)
    }

    /// Elements of a chunk.
    fn chunk(&self) -> usize {
        (self.chunk_lines() * self.width * self.channels).max(1)
    }

    /// The factors of the pixels of the chunk `index`, `pixels` of them, from those of the images.
    fn factors(&self, scale: Option<&[f32]>, index: usize, pixels: usize) -> Option<Vec<f32>> {
        let start = index * self.chunk_lines() * self.width;
        scale.map(|scale| (start..start + pixels).map(|pixel| scale[pixel / (self.height * self.width)]).collect())
    }
}

/// The weights of a ConvNeXt block, packed and rounded for both directions.
///
/// Make it once per update; every pass until the next update shares it. It keeps the [`Path`] of
/// the thread that made it.
#[derive(Debug)]
pub struct PackedConvNext {
    isa: Isa,
    precision: Precision,
    channels: usize,
    hidden: usize,
    kernel: usize,
    depthwise: PackedDepthwise,
    /// With `gamma` folded into `fc2`.
    mlp: Mlp,
    gamma: Vec<f32>,
    /// As they are, for the gradient of `gamma`.
    fc2_weight: Floats,
    fc2_bias: Vec<f32>,
}

impl PackedConvNext {
    /// Packs the weights of a block with a depthwise kernel of this size; the other sizes follow from the slices.
    ///
    /// # Panics
    ///
    /// If the lengths of the slices do not match, or the kernel's size is even.
    pub fn new(kernel: usize, weights: &ConvNextWeights<&[f32]>, precision: Precision) -> Self {
        let (channels, hidden) = (weights.norm_weight.len(), weights.fc1_bias.len());
        for (name, found, right) in [
            ("gamma", weights.gamma.len(), channels),
            ("conv_dw_weight", weights.conv_dw_weight.len(), channels * kernel * kernel),
            ("conv_dw_bias", weights.conv_dw_bias.len(), channels),
            ("norm_bias", weights.norm_bias.len(), channels),
            ("fc1_weight", weights.fc1_weight.len(), hidden * channels),
            ("fc2_weight", weights.fc2_weight.len(), channels * hidden),
            ("fc2_bias", weights.fc2_bias.len(), channels),
        ] {
            assert!(
                found == right,
                "`{name}` has {found} elements, {channels} channels, hidden {hidden} and kernel {kernel} need {right}"
            );
        }
        let isa = Isa::current();
        let norm = Norm::new(weights.norm_weight, weights.norm_bias);
        let (outside, inside) = (Spread::whole(channels), Spread::whole(hidden));
        let pack = |weight, bias, rows, columns, norm| pack_linear(isa, precision, weight, bias, rows, columns, norm);
        let fc1 = pack(weights.fc1_weight, weights.fc1_bias, inside, outside, Some(&norm));
        let mut folded = Floats::new(channels * hidden);
        let rows = folded.chunks_exact_mut(hidden.max(1)).zip(weights.fc2_weight.chunks_exact(hidden.max(1)));
        for ((to, from), gamma) in rows.zip(weights.gamma) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = gamma * from);
        }
        let folded_bias: Vec<f32> = weights.fc2_bias.iter().zip(weights.gamma).map(|(b, gamma)| gamma * b).collect();
        let fc2 = pack(&folded, &folded_bias, outside, inside, None);
        // The folded weight is packed: its memory keeps the weight as it is.
        let mut fc2_weight = folded;
        fc2_weight.copy_from_slice(weights.fc2_weight);
        Self {
            isa,
            precision,
            channels,
            hidden,
            kernel,
            depthwise: PackedDepthwise::new(weights.conv_dw_weight, weights.conv_dw_bias, kernel),
            mlp: Mlp { norm, fc1, fc2 },
            gamma: weights.gamma.to_vec(),
            fc2_weight,
            fc2_bias: weights.fc2_bias.to_vec(),
        }
    }

    /// The format of the products' operands.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The instructions its kernels run on.
    pub fn path(&self) -> Path {
        self.isa.path()
    }

    fn check(&self, shape: &ConvNextShape) {
        let found = (shape.channels, shape.hidden, shape.kernel);
        let packed = (self.channels, self.hidden, self.kernel);
        assert!(found == packed, "shape has (channels, hidden, kernel) = {found:?}, the packed weights {packed:?}");
    }
}

/// What the backward pass needs of a forward pass, apart from its input: in bf16 where the products are.
#[derive(Debug)]
pub struct ConvNextSaved {
    wanted: Wanted,
    chunks: Vec<MlpSaved>,
    shape: ConvNextShape,
    precision: Precision,
    gelu: Gelu,
    path_scale: Option<Vec<f32>>,
}

impl ConvNextSaved {
    /// Memory held, in bytes.
    pub fn bytes(&self) -> usize {
        self.chunks.iter().map(MlpSaved::bytes).sum()
    }
}

/// Applies a block: `y = x + s * gamma * fc2(gelu(fc1(norm(depthwise(x)))))`.
///
/// `path_scale` is the factor `s` of each image (stochastic depth: 0, or one over the probability to stay). The result
/// holds what [`convnext_backward`] needs for what is `wanted`.
///
/// Shapes: `x` and `y` `[batch, height * width, channels]`; the factors `[batch]`.
///
/// # Panics
///
/// If a slice has a length that does not match `shape`, or `weights` are of another shape.
#[allow(clippy::too_many_arguments)] // A block has that many inputs.
pub fn convnext_forward(
    shape: ConvNextShape,
    weights: &PackedConvNext,
    gelu: Gelu,
    eps: f32,
    path_scale: Option<&[f32]>,
    x: &[f32],
    y: &mut [f32],
    wanted: Wanted,
) -> Option<ConvNextSaved> {
    weights.check(&shape);
    let elements = shape.elements();
    assert!(x.len() == elements, "`x` has {} elements, {shape:?} needs {elements}", x.len());
    assert!(y.len() == elements, "`y` has {} elements, {shape:?} needs {elements}", y.len());
    if let Some(factors) = path_scale {
        let found = factors.len();
        assert!(found == shape.batch, "`path_scale` has {found} factors, batch = {}", shape.batch);
    }
    let chunks = y.par_chunks_mut(shape.chunk()).enumerate().with_max_len(1).map(|(index, y)| {
        let scale = shape.factors(path_scale, index, y.len() / shape.channels);
        weights.isa.run(With(weights.precision, Forward { shape, weights, gelu, eps, scale, index, x, y, wanted }))
    });
    let chunks: Vec<_> = chunks.collect::<Vec<_>>().into_iter().flatten().collect();
    let path_scale = path_scale.map(<[f32]>::to_vec);
    let saved = ConvNextSaved { wanted, chunks, shape, precision: weights.precision, gelu, path_scale };
    (wanted != Wanted::Nothing).then_some(saved)
}

/// The forward pass of one chunk.
struct Forward<'a> {
    shape: ConvNextShape,
    weights: &'a PackedConvNext,
    gelu: Gelu,
    eps: f32,
    /// Of each pixel.
    scale: Option<Vec<f32>>,
    index: usize,
    /// All of the input.
    x: &'a [f32],
    /// The chunk.
    y: &'a mut [f32],
    wanted: Wanted,
}

impl ElementOp for Forward<'_> {
    type Output = Option<MlpSaved>;

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) -> Option<MlpSaved> {
        let Self { shape, weights, gelu, eps, scale, index, x, y, wanted } = self;
        let mut saved = MlpSaved::new::<P>(y.len() / shape.channels, padded(shape.channels), padded(shape.hidden));
        let mut convolved = Buffer::new(y.len());
        let start = index * shape.chunk_lines();
        weights.depthwise.lines(shape.depthwise(), start, x, as_f32_mut(&mut convolved)).run(s);
        saved.normalize::<S, P>(s, as_f32_mut(&mut convolved), shape.channels, eps);
        y.copy_from_slice(&x[index * shape.chunk()..][..y.len()]);
        weights.mlp.forward::<S, P>(s, gelu, scale.as_deref(), &mut saved, y, wanted);
        (wanted != Wanted::Nothing).then_some(saved)
    }
}

/// Gradients of the weights, same names and layouts.
pub type ConvNextGradients = ConvNextWeights<Floats>;

impl ConvNextGradients {
    /// Room for those of a block of these channels, hidden length and kernel; not yet set.
    pub fn new(channels: usize, hidden: usize, kernel: usize) -> Self {
        Self {
            gamma: Floats::new(channels),
            conv_dw_weight: Floats::new(channels * kernel * kernel),
            conv_dw_bias: Floats::new(channels),
            norm_weight: Floats::new(channels),
            norm_bias: Floats::new(channels),
            fc1_weight: Floats::new(hidden * channels),
            fc1_bias: Floats::new(hidden),
            fc2_weight: Floats::new(channels * hidden),
            fc2_bias: Floats::new(channels),
        }
    }

    /// Adds what a group of chunks gives to the gradients of norm and MLP; the `first` group sets, and after the `last`
    /// they are whole.
    fn add(&mut self, weights: &PackedConvNext, chunks: &[MlpGradients], first: bool, last: bool) {
        let PackedConvNext { mlp, hidden, .. } = weights;
        let norms = vec![NormTarget {
            chunks: chunks.iter().map(|chunk| &chunk.norm).collect(),
            weight: &mut self.norm_weight,
            bias: &mut self.norm_bias,
        }];
        let layers = vec![
            LayerTarget {
                layer: &mlp.fc1,
                norm: Some(&mlp.norm),
                chunks: chunks.iter().map(|chunk| &chunk.fc1).collect(),
                weight: &mut self.fc1_weight,
                bias: &mut self.fc1_bias,
            },
            LayerTarget {
                layer: &mlp.fc2,
                norm: None,
                chunks: chunks.iter().map(|chunk| &chunk.fc2).collect(),
                weight: &mut self.fc2_weight,
                bias: &mut self.fc2_bias,
            },
        ];
        add_gradients((weights.isa, weights.precision), norms, layers, first, last);
        if last {
            // From those of the folded weights to those of the parts.
            for (i, gamma) in weights.gamma.iter().enumerate() {
                let row = i * hidden..(i + 1) * hidden;
                let mut sum = weights.fc2_bias[i] * self.fc2_bias[i];
                for (gradient, weight) in self.fc2_weight[row.clone()].iter_mut().zip(&weights.fc2_weight[row]) {
                    sum += *gradient * weight;
                    *gradient *= gamma;
                }
                self.gamma[i] = sum;
                self.fc2_bias[i] *= gamma;
            }
        }
    }
}

/// Gradients of a block from `dy`, the gradient of its output.
///
/// `dx` is always written. With `gradients`, which come with the input of the forward pass, those of the weights are too
/// (set, not added to); without, no product for them is computed.
///
/// Shapes: `x`, `dy` and `dx` `[batch, height * width, channels]`.
///
/// # Panics
///
/// If a slice does not have the length of the forward pass, `weights` are of another shape, or `gradients`
/// are asked for and the forward pass saved for its input alone.
pub fn convnext_backward(
    weights: &PackedConvNext,
    saved: &ConvNextSaved,
    dy: &[f32],
    dx: &mut [f32],
    mut gradients: Option<(&[f32], &mut ConvNextGradients)>,
) {
    let shape = saved.shape;
    weights.check(&shape);
    let (found, right) = (weights.precision, saved.precision);
    assert!(found == right, "weights are packed for {found:?}, the forward pass ran in {right:?}");
    let elements = shape.elements();
    assert!(dy.len() == elements, "`dy` has {} elements, {shape:?} needs {elements}", dy.len());
    assert!(dx.len() == elements, "`dx` has {} elements, {shape:?} needs {elements}", dx.len());
    let wanted = gradients.is_some();
    assert!(!wanted || saved.wanted == Wanted::Weights, "the forward pass saved for the gradient of its input alone");
    if let Some((x, gradients)) = &mut gradients {
        assert!(x.len() == elements, "`x` has {} elements, {shape:?} needs {elements}", x.len());
        let found = (gradients.norm_weight.len(), gradients.fc1_bias.len(), gradients.conv_dw_weight.len());
        let (channels, hidden, kernel) = (shape.channels, shape.hidden, shape.kernel);
        if found != (channels, hidden, channels * kernel * kernel) {
            **gradients = ConvNextGradients::new(channels, hidden, kernel);
        }
    }
    let size = shape.chunk();
    let gelu = (saved.wanted == Wanted::Weights).then_some(saved.gelu);
    let mut d_convolved = Floats::new(elements);
    let count = saved.chunks.len();
    // Once for a batch of no images too, whose gradients are zero.
    for start in (0..count.max(1)).step_by(GROUP) {
        let end = count.min(start + GROUP);
        let group = (start * size).min(elements)..(end * size).min(elements);
        let chunks = dy[group.clone()].par_chunks(size).zip(d_convolved[group].par_chunks_mut(size));
        let chunks = chunks.zip(&saved.chunks[start..end]).enumerate().with_max_len(1);
        let chunks = chunks.map(|(index, ((dy, to), saved_chunk))| {
            let scale = shape.factors(saved.path_scale.as_deref(), start + index, dy.len() / shape.channels);
            let backward = Backward { shape, weights, gelu, scale, saved: saved_chunk, dy, to, wanted };
            weights.isa.run(With(weights.precision, backward))
        });
        let chunks: Vec<_> = chunks.collect::<Vec<_>>().into_iter().flatten().collect();
        if let Some((_, gradients)) = &mut gradients {
            gradients.add(weights, &chunks, start == 0, end == count);
        }
    }
    depthwise_input_gradient(shape.depthwise(), &weights.depthwise, &d_convolved, Some(dy), dx);
    if let Some((x, gradients)) = gradients {
        let ConvNextGradients { conv_dw_weight, conv_dw_bias, .. } = gradients;
        weight_gradient(weights.isa, shape.depthwise(), x, &d_convolved, conv_dw_weight, conv_dw_bias);
    }
}

/// The backward pass of one chunk, to the output of the convolution.
struct Backward<'a> {
    shape: ConvNextShape,
    weights: &'a PackedConvNext,
    /// If the hidden layer was saved as it was before its GELU, which that is.
    gelu: Option<Gelu>,
    /// Of each pixel.
    scale: Option<Vec<f32>>,
    saved: &'a MlpSaved,
    dy: &'a [f32],
    to: &'a mut [f32],
    wanted: bool,
}

impl ElementOp for Backward<'_> {
    type Output = Option<MlpGradients>;

    #[inline(always)]
    fn run<S: Lanes, P: Element>(self, s: S) -> Self::Output {
        let Self { shape, weights, gelu, scale, saved, dy, to, wanted } = self;
        let (rows, width) = (dy.len() / shape.channels, padded(shape.channels));
        let mut gradients = wanted.then(|| MlpGradients::new::<P>(rows, width, padded(shape.hidden)));
        let mut d_branch = Buffer::new(rows * P::cells(width));
        let mut d_norm = Buffer::new(rows * width);
        branch_gradient::<S, P>(s, dy, shape.channels, scale.as_deref(), &mut d_branch);
        to.fill(0.0);
        weights.mlp.backward::<S, P>(s, gelu, saved, &d_branch, &mut d_norm, to, gradients.as_mut());
        gradients
    }
}
