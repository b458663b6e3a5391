//! A whole ConvNeXt block, forward and backward (Liu et al. 2022).
//!
//! ```text
//! y = x + s * gamma * fc2(gelu(fc1(norm(depthwise(x)))))
//! ```
//!
//! The residual stream (`x`, `y` and their gradients) is f32, or in bf16 mode either f32 or bf16, as the caller sends
//! it. What is between, the convolution's output included, is in the precision's format; sums of convolutions are f32.
//!
//! `gamma` is folded into `fc2` in f32 before that is rounded: `gamma (W h + b) = (gamma W) h + gamma b`. So the branch and
//! the residual are one product, and nothing of the branch is saved. From the gradients `G` and `g` of the folded
//! weight and bias come those of the parts: `gamma G` and `gamma g`, and for `gamma` the sums of `W G` along the rows,
//! and `b g`.

use crate::Precision;
use crate::block::{Wanted, fused};
use crate::depthwise::{Depthwise, DepthwiseShape, depthwise, depthwise_input_gradient, depthwise_weight_gradient};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::launch;
use crate::linear::{Linear, Then};
use crate::machine::Kind;
use crate::norm::{NormSaved, layer_norm, layer_norm_gradient};
use crate::programs::Program::{Conv, Norm};
use crate::rows::{Gelu, gelu, gelu_gradient, residual, same_gpu, scaled};
use crate::values::Values;

/// Sizes of a ConvNeXt block and of the batch that goes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvNextShape {
    /// Images.
    pub batch: usize,
    /// Lines of an image.
    pub height: usize,
    /// Pixels of a line.
    pub width: usize,
    /// Elements of a pixel, a multiple of 8, at most 2048.
    pub channels: usize,
    /// Elements of a pixel inside the MLP, a multiple of 8.
    pub hidden: usize,
    /// Pixels on a side of the depthwise kernel: odd, at most 11.
    pub kernel: usize,
}

impl ConvNextShape {
    /// Elements of the input, `[batch, height * width, channels]`.
    pub fn elements(&self) -> usize {
        self.depthwise().elements()
    }

    fn depthwise(&self) -> DepthwiseShape {
        let Self { batch, height, width, channels, kernel, .. } = *self;
        DepthwiseShape { batch, height, width, channels, kernel }
    }

    /// Compiles, or loads from the cache, all kernels that a block of this shape needs, in parallel.
    ///
    /// # Errors
    ///
    /// If the compiler is missing or fails.
    pub fn prepare(&self, gpu: &Gpu) -> Result<()> {
        let [first, second, third] = self.depthwise().programs();
        gpu.prepare(&[first, second, third, Norm])
    }
}

/// Weights of a ConvNeXt block in f32 and torch's layout, in timm's order; or their gradients.
///
/// Shapes: `gamma`, `conv_dw_bias`, the norm's and `fc2_bias` `[channels]`; `conv_dw_weight` `[channels, 1, k, k]`;
/// `fc1_weight` `[hidden, channels]`; `fc1_bias` `[hidden]`; `fc2_weight` `[channels, hidden]`.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // The names are timm's; the shapes are above.
pub struct ConvNextWeights {
    pub gamma: Values,
    pub conv_dw_weight: Values,
    pub conv_dw_bias: Values,
    pub norm_weight: Values,
    pub norm_bias: Values,
    pub fc1_weight: Values,
    pub fc1_bias: Values,
    pub fc2_weight: Values,
    pub fc2_bias: Values,
}

impl ConvNextWeights {
    /// In timm's order.
    pub fn in_order(self) -> [Values; 9] {
        [
            self.gamma,
            self.conv_dw_weight,
            self.conv_dw_bias,
            self.norm_weight,
            self.norm_bias,
            self.fc1_weight,
            self.fc1_bias,
            self.fc2_weight,
            self.fc2_bias,
        ]
    }

    /// From values in timm's order.
    pub fn of([a, b, c, d, e, f, g, h, i]: [Values; 9]) -> Self {
        Self {
            gamma: a,
            conv_dw_weight: b,
            conv_dw_bias: c,
            norm_weight: d,
            norm_bias: e,
            fc1_weight: f,
            fc1_bias: g,
            fc2_weight: h,
            fc2_bias: i,
        }
    }
}

/// The weights of a ConvNeXt block, rounded for all products of both directions. Make it once per update.
#[derive(Clone, Debug)]
pub struct ConvNext {
    precision: Precision,
    channels: usize,
    hidden: usize,
    kernel: usize,
    depthwise: Depthwise,
    norm: [Values; 2],
    fc1: Linear,
    /// With `gamma` folded in.
    fc2: Linear,
    gamma: Values,
    /// Weight and bias as they are, for the gradient of `gamma`.
    unfolded: [Values; 2],
}

impl ConvNext {
    /// Prepares the weights of a block with a depthwise kernel of this size; the other sizes follow from them.
    ///
    /// # Panics
    ///
    /// If the lengths do not match, the kernel's size is even or above 11, or channels are not a multiple of 8.
    pub fn new(kernel: usize, weights: &ConvNextWeights, precision: Precision) -> Self {
        let ConvNextWeights { gamma, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, .. } = weights;
        let (channels, hidden) = (norm_weight.len(), fc1_bias.len());
        for (name, found, right) in [
            ("gamma", gamma.len(), channels),
            ("conv_dw_weight", weights.conv_dw_weight.len(), channels * kernel * kernel),
            ("conv_dw_bias", weights.conv_dw_bias.len(), channels),
            ("norm_bias", norm_bias.len(), channels),
            ("fc1_weight", fc1_weight.len(), hidden * channels),
            ("fc2_weight", fc2_weight.len(), channels * hidden),
            ("fc2_bias", fc2_bias.len(), channels),
        ] {
            assert!(
                found == right,
                "`{name}` has {found} elements, {channels} channels, hidden {hidden} and kernel {kernel} need {right}"
            );
        }
        let gpu = gamma.gpu();
        same_gpu(gpu, &[fc2_weight, fc2_bias]);
        let [folded, folded_bias] = [fc2_weight, fc2_bias].map(|values| Values::new(gpu, values.len(), Kind::F32));
        let (grid, inputs) = ([channels, 1, 1], hidden as i32);
        // SAFETY: the weights are `[channels, hidden]`, biases and gamma `[channels]`.
        unsafe {
            launch!(gpu, Conv, "fold_gamma", grid, 256, 0, &folded, &folded_bias, fc2_weight, fc2_bias, gamma, inputs);
        }
        Self {
            precision,
            channels,
            hidden,
            kernel,
            depthwise: Depthwise::new(&weights.conv_dw_weight, &weights.conv_dw_bias, kernel),
            norm: [norm_weight.clone(), norm_bias.clone()],
            fc1: Linear::new(fc1_weight, fc1_bias, precision),
            fc2: Linear::new(&folded, &folded_bias, precision),
            gamma: gamma.clone(),
            unfolded: [fc2_weight.clone(), fc2_bias.clone()],
        }
    }

    /// The gradients of `gamma`, `fc2_weight` and `fc2_bias` from those of the folded weight and bias.
    fn unfold(&self, mut d_weight: Values, mut d_bias: Values) -> [Values; 3] {
        let gpu = self.gamma.gpu();
        let to_gamma = Values::new(gpu, self.channels, Kind::F32);
        let [weight, bias] = &self.unfolded;
        let (grid, inputs) = ([self.channels, 1, 1], self.hidden as i32);
        // SAFETY: the weights are `[channels, hidden]`, the others `[channels]`; the gradients are nobody else's.
        unsafe {
            launch!(
                gpu,
                Conv,
                "fold_gamma_gradient",
                grid,
                256,
                8 * 4,
                &to_gamma,
                d_weight.own(),
                d_bias.own(),
                weight,
                bias,
                &self.gamma,
                inputs
            );
        }
        [to_gamma, d_weight, d_bias]
    }
}

/// What the backward pass needs of a forward pass.
#[derive(Clone, Debug)]
pub struct ConvNextSaved {
    shape: ConvNextShape,
    gelu: Gelu,
    path: Option<Values>,
    stream: Kind,
    norm: NormSaved,
    /// Before the GELU.
    hidden: Values,
    weights: Option<FactorsSaved>,
}

/// The inputs of convolution and layers, for the gradients of their weights.
#[derive(Clone, Debug)]
struct FactorsSaved {
    x: Values,
    normed: Values,
    activated: Values,
}

/// Applies a block: `y = x + s * gamma * fc2(gelu(fc1(norm(depthwise(x)))))`.
///
/// `path` is the factor `s` of each image (stochastic depth: 0, or one over the probability to stay), in f32.
///
/// Shapes: `x` and the result `[batch, height * width, channels]`; the factors `[batch]`.
///
/// # Panics
///
/// If values have not the length that `shape` says, or the weights are of another shape.
pub fn convnext_forward(
    shape: ConvNextShape,
    weights: &ConvNext,
    gelu_kind: Gelu,
    eps: f32,
    path: Option<&Values>,
    x: &Values,
    wanted: Wanted,
) -> (Values, Option<ConvNextSaved>) {
    let ConvNext { precision, norm, fc1, fc2, .. } = weights;
    let found = (shape.channels, shape.hidden, shape.kernel);
    let prepared = (weights.channels, weights.hidden, weights.kernel);
    assert!(found == prepared, "shape has (channels, hidden, kernel) = {found:?}, the weights {prepared:?}");
    assert!(x.len() == shape.elements(), "`x` has {} elements, {shape:?} needs {}", x.len(), shape.elements());
    let (kind, stream) = (precision.kind(), x.kind());
    assert!(stream == Kind::F32 || kind == Kind::Bf16, "`x` is {x:?}, the precision {precision:?}");
    if let Some(path) = path {
        assert!(path.len() == shape.batch, "`path` has {} factors, batch = {}", path.len(), shape.batch);
    }

    let convolved = depthwise(shape.depthwise(), &weights.depthwise, x, kind);
    let (normed, norm_saved) = layer_norm(&convolved, &norm[0], &norm[1], eps, kind);
    drop(convolved);
    let (hidden, activated) = if fused(gelu_kind, kind) {
        if wanted == Wanted::Nothing {
            (None, fc1.then(&normed, kind, Then::Gelu))
        } else {
            let hidden = Values::new(x.gpu(), shape.batch * shape.height * shape.width * shape.hidden, kind);
            let activated = fc1.then(&normed, kind, Then::GeluKeeping(&hidden));
            (Some(hidden), activated)
        }
    } else {
        let hidden = fc1.forward(&normed, kind);
        let activated = gelu(gelu_kind, &hidden);
        (Some(hidden), activated)
    };
    let y = match path {
        None => fc2.then(&activated, stream, Then::Add(x)),
        Some(path) => residual(x, &fc2.forward(&activated, kind), path),
    };
    let saved = hidden.filter(|_| wanted != Wanted::Nothing).map(|hidden| ConvNextSaved {
        shape,
        gelu: gelu_kind,
        path: path.cloned(),
        stream,
        norm: norm_saved,
        hidden,
        weights: (wanted == Wanted::Weights).then(|| FactorsSaved { x: x.clone(), normed, activated }),
    });
    (y, saved)
}

/// Gradients of a block from `dy`, the gradient of its output and in its format: that of the input and, where the
/// forward pass saved for them and `wanted` says so, those of the weights.
///
/// # Panics
///
/// If `dy` has not the length or format of the forward pass, or gradients of the weights are wanted and the forward
/// pass saved for its input alone.
pub fn convnext_backward(
    weights: &ConvNext,
    saved: &ConvNextSaved,
    dy: &Values,
    wanted: Wanted,
) -> (Values, Option<ConvNextWeights>) {
    let ConvNext { precision, norm, fc1, fc2, .. } = weights;
    let ConvNextSaved { shape, gelu: gelu_kind, path, stream, hidden, .. } = saved;
    let kind = precision.kind();
    let right = (shape.elements(), *stream);
    assert!((dy.len(), dy.kind()) == right, "`dy` is {dy:?}, the forward pass had {right:?}");
    assert!(hidden.kind() == kind, "weights are for {precision:?}, the forward pass ran in {:?}", hidden.kind());
    let factors = (wanted == Wanted::Weights)
        .then(|| saved.weights.as_ref().expect("the forward pass saved for the gradient of its input alone"));
    let parameters = factors.is_some();

    // The branch's gradient: times the path's factor, in the precision's format. gamma is in fc2.
    let d_fc2 = match path {
        Some(path) => scaled(dy, Some(path), kind),
        None => dy.cast(kind),
    };
    let (d_hidden, fc1_bias) = if fused(*gelu_kind, kind) {
        let d_hidden = fc2.input_gradient_through(&d_fc2, Some(hidden));
        let bias = parameters.then(|| fc1.bias_gradient(&d_hidden));
        (d_hidden, bias)
    } else {
        gelu_gradient(*gelu_kind, hidden, &fc2.input_gradient(&d_fc2), shape.hidden, parameters)
    };
    let of_mlp = factors.map(|factors| {
        let fc1_weight = fc1.weight_gradient(&factors.normed, &d_hidden);
        let folded = (fc2.weight_gradient(&factors.activated, &d_fc2), fc2.bias_gradient(&d_fc2));
        (fc1_weight, fc1_bias.expect("wanted"), weights.unfold(folded.0, folded.1))
    });
    drop(d_fc2);
    let d_normed = fc1.input_gradient(&d_hidden);
    drop(d_hidden);
    let (d_convolved, of_norm) = layer_norm_gradient(&saved.norm, &norm[0], &d_normed, None, parameters);
    drop(d_normed);
    let dx = depthwise_input_gradient(shape.depthwise(), &weights.depthwise, &d_convolved, Some(dy), *stream);
    let of_depthwise = factors.map(|factors| depthwise_weight_gradient(shape.depthwise(), &factors.x, &d_convolved));

    let gradients = of_mlp.zip(of_depthwise).zip(of_norm).map(
        |(((fc1_weight, fc1_bias, [gamma, fc2_weight, fc2_bias]), depthwise), norm)| ConvNextWeights {
            gamma,
            conv_dw_weight: depthwise.0,
            conv_dw_bias: depthwise.1,
            norm_weight: norm.0,
            norm_bias: norm.1,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
        },
    );
    (dx, gradients)
}
