//! A whole pre-norm encoder block, forward and backward.
//!
//! ```text
//! x1 = x  + s1 * proj(attention(qkv(norm1(x))))
//! y  = x1 + s2 * fc2(gelu(fc1(norm2(x1))))
//! ```
//!
//! The residual stream (`x`, `y` and their gradients) is f32, or in bf16 mode either f32 or bf16, as the caller sends
//! it. What is between is in the precision's format. Biases, residuals and, for the tanh GELU in bf16, the GELU are
//! part of cuBLASLt's products. The gradients of biases are not: its epilogues for them are slow, so the kernels that
//! hold the values sum them, or passes of their own.

use crate::Precision;
use crate::attention::{self, AttentionSaved, AttentionShape, attention};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::linear::{Linear, Then};
use crate::machine::Kind;
use crate::norm::{self, Also, NormGradient, NormSaved, layer_norm, normed};
use crate::programs::Program;
use crate::rows::{Gelu, gelu, gelu_gradient, residual, scaled};
use crate::values::Values;

/// Sizes of a block and of the batch that goes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Samples.
    pub batch: usize,
    /// Tokens of a sample, class token included.
    pub tokens: usize,
    /// Length of a token, a multiple of 8.
    pub width: usize,
    /// Attention heads; they divide `width`.
    pub heads: usize,
    /// Length of a token inside the MLP, a multiple of 8.
    pub hidden: usize,
    /// Whether a token sees only itself and those before it, as in a text tower.
    pub causal: bool,
}

impl BlockShape {
    /// Elements of the input, `[batch, tokens, width]`.
    pub fn elements(&self) -> usize {
        self.batch * self.tokens * self.width
    }

    pub(crate) fn attention(&self) -> AttentionShape {
        let Self { batch, tokens, width, heads, causal, .. } = *self;
        AttentionShape { batch, tokens, heads, head_dim: width / heads, causal }
    }

    /// Compiles, or loads from the cache, all kernels that a block of this shape needs, in parallel.
    ///
    /// # Errors
    ///
    /// If the compiler is missing or fails.
    pub fn prepare(&self, gpu: &Gpu, precision: Precision) -> Result<()> {
        let attention = self.attention().programs(precision.kind(), gpu.facts());
        gpu.prepare(&[&[Program::Norm, Program::Rows][..], &attention].concat())
    }
}

/// Which gradients will be asked for after a forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None: nothing is saved.
    Nothing,
    /// That of the input alone, as attacks do: only what it needs is saved.
    Input,
    /// Those of the input and of the weights.
    Weights,
}

/// Weights of a block in f32 and torch's layout, `[out, in]`, in timm's order; or their gradients.
///
/// Shapes: norms, `proj_bias` and `fc2_bias` `[width]`; `qkv_weight` `[3 width, width]`, rows in the order `3, heads,
/// head_dim`; `proj_weight` `[width, width]`; `fc1_weight` `[hidden, width]`; `fc2_weight` `[width, hidden]`.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // The names are timm's; the shapes are above.
pub struct BlockWeights {
    pub norm1_weight: Values,
    pub norm1_bias: Values,
    pub qkv_weight: Values,
    pub qkv_bias: Values,
    pub proj_weight: Values,
    pub proj_bias: Values,
    pub norm2_weight: Values,
    pub norm2_bias: Values,
    pub fc1_weight: Values,
    pub fc1_bias: Values,
    pub fc2_weight: Values,
    pub fc2_bias: Values,
}

impl BlockWeights {
    /// In timm's order.
    pub fn in_order(self) -> [Values; 12] {
        [
            self.norm1_weight,
            self.norm1_bias,
            self.qkv_weight,
            self.qkv_bias,
            self.proj_weight,
            self.proj_bias,
            self.norm2_weight,
            self.norm2_bias,
            self.fc1_weight,
            self.fc1_bias,
            self.fc2_weight,
            self.fc2_bias,
        ]
    }

    /// Width and hidden width.
    ///
    /// # Panics
    ///
    /// If the lengths do not match.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        let (width, hidden) = (self.norm1_weight.len(), self.fc1_bias.len());
        for (name, found, right) in [
            ("norm1_bias", self.norm1_bias.len(), width),
            ("qkv_weight", self.qkv_weight.len(), 3 * width * width),
            ("qkv_bias", self.qkv_bias.len(), 3 * width),
            ("proj_weight", self.proj_weight.len(), width * width),
            ("proj_bias", self.proj_bias.len(), width),
            ("norm2_weight", self.norm2_weight.len(), width),
            ("norm2_bias", self.norm2_bias.len(), width),
            ("fc1_weight", self.fc1_weight.len(), hidden * width),
            ("fc2_weight", self.fc2_weight.len(), width * hidden),
            ("fc2_bias", self.fc2_bias.len(), width),
        ] {
            assert!(found == right, "`{name}` has {found} elements, width {width} and hidden {hidden} need {right}");
        }
        (width, hidden)
    }

    /// From values in timm's order.
    pub fn of([a, b, c, d, e, f, g, h, i, j, k, l]: [Values; 12]) -> Self {
        Self {
            norm1_weight: a,
            norm1_bias: b,
            qkv_weight: c,
            qkv_bias: d,
            proj_weight: e,
            proj_bias: f,
            norm2_weight: g,
            norm2_bias: h,
            fc1_weight: i,
            fc1_bias: j,
            fc2_weight: k,
            fc2_bias: l,
        }
    }
}

/// The weights of a block, rounded for all products of both directions. Make it once per update.
#[derive(Clone, Debug)]
pub struct Block {
    precision: Precision,
    width: usize,
    heads: usize,
    hidden: usize,
    norm1: [Values; 2],
    qkv: Linear,
    proj: Linear,
    norm2: [Values; 2],
    fc1: Linear,
    fc2: Linear,
}

impl Block {
    /// Prepares the weights of a block of `heads` heads; the other sizes follow from them.
    ///
    /// # Panics
    ///
    /// If the lengths do not match, or `heads` does not divide the width.
    pub fn new(heads: usize, weights: &BlockWeights, precision: Precision) -> Self {
        let (width, hidden) = weights.sizes();
        assert!(heads > 0 && width > 0 && width.is_multiple_of(heads), "heads = {heads} must divide width = {width}");
        Self {
            precision,
            width,
            heads,
            hidden,
            norm1: [weights.norm1_weight.clone(), weights.norm1_bias.clone()],
            qkv: Linear::new(&weights.qkv_weight, &weights.qkv_bias, precision),
            proj: Linear::new(&weights.proj_weight, &weights.proj_bias, precision),
            norm2: [weights.norm2_weight.clone(), weights.norm2_bias.clone()],
            fc1: Linear::new(&weights.fc1_weight, &weights.fc1_bias, precision),
            fc2: Linear::new(&weights.fc2_weight, &weights.fc2_bias, precision),
        }
    }
}

/// What the backward pass needs of a forward pass.
#[derive(Clone, Debug)]
pub struct BlockSaved {
    shape: BlockShape,
    gelu: Gelu,
    path: Option<[Values; 2]>,
    norm1: NormSaved,
    attention: AttentionSaved,
    norm2: NormSaved,
    /// Before the GELU.
    hidden: Values,
    weights: Option<FactorsSaved>,
}

impl BlockSaved {
    /// Where it is.
    pub fn gpu(&self) -> &Gpu {
        self.hidden.gpu()
    }
}

/// The inputs of two layers, for the gradients of their weights; those of the others are results of norms.
#[derive(Clone, Debug)]
struct FactorsSaved {
    attended: Values,
    activated: Values,
}

/// Applies a block.
///
/// `path` are the factors `s1` and `s2` of each sample (stochastic depth: 0, or one over the probability to stay), in f32.
///
/// Shapes: `x` and the result `[batch, tokens, width]`; the factors `[batch]`.
///
/// # Panics
///
/// If values have not the length that `shape` says, or the weights are of another shape.
pub fn block_forward(
    shape: BlockShape,
    weights: &Block,
    gelu_kind: Gelu,
    eps: f32,
    path: Option<(&Values, &Values)>,
    x: &Values,
    wanted: Wanted,
) -> (Values, Option<BlockSaved>) {
    let Block { precision, norm1, qkv, proj, norm2, fc1, fc2, .. } = weights;
    let found = (shape.width, shape.heads, shape.hidden);
    let prepared = (weights.width, weights.heads, weights.hidden);
    assert!(found == prepared, "shape has (width, heads, hidden) = {found:?}, the weights {prepared:?}");
    assert!(x.len() == shape.elements(), "`x` has {} elements, {shape:?} needs {}", x.len(), shape.elements());
    let (kind, stream) = (precision.kind(), x.kind());
    assert!(stream == Kind::F32 || kind == Kind::Bf16, "`x` is {x:?}, the precision {precision:?}");
    if let Some((first, second)) = path {
        let found = (first.len(), second.len());
        assert!(found == (shape.batch, shape.batch), "`path` has {found:?} factors, batch = {}", shape.batch);
    }

    let (normed1, mut norm1_saved) = layer_norm(x, &norm1[0], &norm1[1], eps, kind);
    let (attended, attention_saved) = attention(shape.attention(), &qkv.forward(&normed1, kind));
    let (normed2, mut norm2_saved) = match path {
        None => {
            let x1 = proj.then(&attended, stream, Then::Add(x));
            layer_norm(&x1, &norm2[0], &norm2[1], eps, kind)
        }
        Some((first, _)) => {
            let branch = proj.forward(&attended, kind);
            normed(x, Some((&branch, first)), &norm2[0], &norm2[1], eps, kind)
        }
    };
    if wanted == Wanted::Weights {
        norm1_saved = norm1_saved.with_result(&normed1);
        norm2_saved = norm2_saved.with_result(&normed2);
    }
    drop(normed1);
    let x1 = &norm2_saved.x;
    let (hidden, activated) = if fused(gelu_kind, kind) {
        if wanted == Wanted::Nothing {
            (None, fc1.then(&normed2, kind, Then::Gelu))
        } else {
            let hidden = Values::new(x.gpu(), shape.batch * shape.tokens * shape.hidden, kind);
            let activated = fc1.then(&normed2, kind, Then::GeluKeeping(&hidden));
            (Some(hidden), activated)
        }
    } else {
        let hidden = fc1.forward(&normed2, kind);
        let activated = gelu(gelu_kind, &hidden);
        (Some(hidden), activated)
    };
    let y = match path {
        None => fc2.then(&activated, stream, Then::Add(x1)),
        Some((_, second)) => residual(x1, &fc2.forward(&activated, kind), second),
    };
    let saved = hidden.filter(|_| wanted != Wanted::Nothing).map(|hidden| BlockSaved {
        shape,
        gelu: gelu_kind,
        path: path.map(|(first, second)| [first.clone(), second.clone()]),
        norm1: norm1_saved,
        attention: attention_saved,
        norm2: norm2_saved.clone(),
        hidden,
        weights: (wanted == Wanted::Weights).then_some(FactorsSaved { attended, activated }),
    });
    (y, saved)
}

/// Whether the GELU is part of cuBLASLt's products, which have the tanh form alone.
pub(crate) fn fused(gelu: Gelu, kind: Kind) -> bool {
    gelu == Gelu::Tanh && kind == Kind::Bf16
}

/// Gradients of a block from `dy`, the gradient of its output and in its format: that of the input and, where the
/// forward pass saved for them and `wanted` says so, those of the weights.
///
/// # Panics
///
/// If `dy` has not the length or format of the forward pass, or gradients of the weights are wanted and the forward
/// pass saved for its input alone.
pub fn block_backward(
    weights: &Block,
    saved: &BlockSaved,
    dy: &Values,
    wanted: Wanted,
) -> (Values, Option<BlockWeights>) {
    let Block { precision, norm1, qkv, proj, norm2, fc1, fc2, .. } = weights;
    let BlockSaved { shape, gelu: gelu_kind, path, hidden, .. } = saved;
    let (kind, stream) = (precision.kind(), saved.norm1.x.kind());
    let right = (shape.elements(), stream);
    assert!((dy.len(), dy.kind()) == right, "`dy` is {dy:?}, the forward pass had {right:?}");
    assert!(hidden.kind() == kind, "weights are for {precision:?}, the forward pass ran in {:?}", hidden.kind());
    let factors = (wanted == Wanted::Weights)
        .then(|| saved.weights.as_ref().expect("the forward pass saved for the gradient of its input alone"));
    let parameters = factors.is_some();
    // The gradient of a branch: times the path's factor, in the precision's format.
    let branch = |d: &Values, index: usize| match path {
        Some(path) => scaled(d, Some(&path[index]), kind),
        None => d.cast(kind),
    };

    // The gradient of a bias: of the whole stream, or times the path's factors.
    let bias = |layer: &Linear, d: &Values, branch: &Values| match d.row_sum(shape.width) {
        Some(sum) if path.is_none() => sum.clone(),
        _ => layer.bias_gradient(branch),
    };

    // The MLP: y = x1 + s2 * fc2(gelu(fc1(norm2(x1)))).
    let d_fc2 = branch(dy, 1);
    let (d_hidden, fc1_bias) = if fused(*gelu_kind, kind) {
        let d_hidden = fc2.input_gradient_through(&d_fc2, Some(hidden));
        let bias = parameters.then(|| fc1.bias_gradient(&d_hidden));
        (d_hidden, bias)
    } else {
        gelu_gradient(*gelu_kind, hidden, &fc2.input_gradient(&d_fc2), shape.hidden, parameters)
    };
    let of_fc2 = factors.map(|factors| (fc2.weight_gradient(&factors.activated, &d_fc2), bias(fc2, dy, &d_fc2)));
    drop(d_fc2);
    let d_normed2 = fc1.input_gradient(&d_hidden);
    // Products take the gradients of the residual stream rounded, unless they are multiplied by a path's factors first.
    let rounded = kind == Kind::Bf16 && path.is_none();
    let also = |bias| Also { parameters, rounded, normed: parameters.then_some(bias) };
    let NormGradient { dx: dx1, parameters: of_norm2, normed: normed2 } =
        norm::gradient(&saved.norm2, &norm2[0], &d_normed2, Some(dy), also(&norm2[1]));
    drop(d_normed2);
    let fc1_weight = normed2.map(|normed2| fc1.weight_gradient(&normed2, &d_hidden));
    drop(d_hidden);

    // Attention: x1 = x + s1 * proj(attention(qkv(norm1(x)))).
    let d_proj = branch(&dx1, 0);
    let (d_qkv, qkv_bias) = attention::gradient(&saved.attention, &proj.input_gradient(&d_proj), parameters);
    let of_proj = factors.map(|factors| (proj.weight_gradient(&factors.attended, &d_proj), bias(proj, &dx1, &d_proj)));
    drop(d_proj);
    let d_normed1 = qkv.input_gradient(&d_qkv);
    let NormGradient { dx, parameters: of_norm1, normed: normed1 } =
        norm::gradient(&saved.norm1, &norm1[0], &d_normed1, Some(&dx1), also(&norm1[1]));
    drop(d_normed1);
    let qkv_weight = normed1.map(|normed1| qkv.weight_gradient(&normed1, &d_qkv));

    let gradients = parameters.then(|| {
        let [of_norm1, of_norm2, of_proj, of_fc2] =
            [of_norm1, of_norm2, of_proj, of_fc2].map(|pair| pair.expect("wanted"));
        let [qkv_weight, qkv_bias, fc1_weight, fc1_bias] =
            [qkv_weight, qkv_bias, fc1_weight, fc1_bias].map(|one| one.expect("wanted"));
        BlockWeights {
            norm1_weight: of_norm1.0,
            norm1_bias: of_norm1.1,
            qkv_weight,
            qkv_bias,
            proj_weight: of_proj.0,
            proj_bias: of_proj.1,
            norm2_weight: of_norm2.0,
            norm2_bias: of_norm2.1,
            fc1_weight,
            fc1_bias,
            fc2_weight: of_fc2.0,
            fc2_bias: of_fc2.1,
        }
    });
    (dx, gradients)
}
