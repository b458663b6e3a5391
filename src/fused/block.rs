//! The encoder block as one operation, with gradients of the input alone or of the weights too.

use std::fmt;
use std::sync::{Arc, Mutex};

use advxl_kernels::{
    BlockGradients, BlockSaved, BlockShape, BlockWeights, PackedBlock, block_backward,
    block_forward,
};
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Autodiff, Flex};
use burn::tensor::{Bytes, DType, Shape, Tensor};

use super::{Gelu, Precision, on_kernels, plain, primitive};

/// What an encoder block is, apart from its weights.
#[derive(Clone, Debug)]
pub struct BlockSpec {
    /// Attention heads; they divide the width.
    pub heads: usize,
    /// Width of the hidden layer of the MLP.
    pub hidden: usize,
    /// Which GELU.
    pub gelu: Gelu,
    /// Added to the variance in the norms.
    pub eps: f64,
    /// Arithmetic of the matrix products.
    pub precision: Precision,
}

/// Factors of the two residual branches, one an image: 0 where drop path left the branch out,
/// else 1 / (1 - rate).
#[derive(Clone, Debug)]
pub struct PathScale {
    /// Of the attention branch.
    pub attention: Vec<f32>,
    /// Of the MLP branch.
    pub mlp: Vec<f32>,
}

/// The weights of one block as the kernels want them, packed once and used by all passes until
/// the weights change.
///
/// The cache holds on to the very buffers it packed: as long as it does, their memory is neither
/// reused nor written in place, so equal addresses mean equal weights.
#[derive(Clone, Default)]
pub struct WeightCache(Arc<Mutex<Option<Cached>>>);

struct Cached {
    weights: [FlexTensor; 12],
    precision: Precision,
    packed: Arc<PackedBlock>,
}

impl fmt::Debug for WeightCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeightCache")
    }
}

impl WeightCache {
    fn packed(&self, weights: [FlexTensor; 12], spec: &BlockSpec) -> Arc<PackedBlock> {
        let mut slot = self
            .0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(cached) = slot.as_ref() {
            let same =
                |(a, b): (&FlexTensor, &FlexTensor)| a.bytes().as_ptr() == b.bytes().as_ptr();
            if cached.precision == spec.precision && cached.weights.iter().zip(&weights).all(same) {
                return Arc::clone(&cached.packed);
            }
        }
        // Dropped before packing, so that two copies of the weights never stand side by side.
        *slot = None;
        let packed = Arc::new(PackedBlock::new(
            spec.heads,
            &kernel_weights(&weights),
            spec.precision,
        ));
        *slot = Some(Cached {
            weights,
            precision: spec.precision,
            packed: Arc::clone(&packed),
        });
        packed
    }
}

fn kernel_weights(weights: &[FlexTensor; 12]) -> BlockWeights<'_> {
    let [
        norm1_weight,
        norm1_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        norm2_weight,
        norm2_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
    ] = weights.each_ref().map(slice);
    BlockWeights {
        norm1_weight,
        norm1_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        norm2_weight,
        norm2_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
    }
}

/// The gradients in the order of the weights.
fn in_order(gradients: BlockGradients) -> [Vec<f32>; 12] {
    [
        gradients.norm1_weight,
        gradients.norm1_bias,
        gradients.qkv_weight,
        gradients.qkv_bias,
        gradients.proj_weight,
        gradients.proj_bias,
        gradients.norm2_weight,
        gradients.norm2_bias,
        gradients.fc1_weight,
        gradients.fc1_bias,
        gradients.fc2_weight,
        gradients.fc2_bias,
    ]
}

/// A pre-norm encoder block: attention and MLP, each after a layer norm and around a residual.
///
/// Gradients of the weights are computed when the weights take part in automatic differentiation,
/// and only then: an attack passes plain weights and pays for the gradient of its input alone.
///
/// Shapes: `x` and the result `[batch, tokens, width]`; `weights` flat, in timm's order from
/// `norm1.weight` to `mlp.fc2.bias`, matrices `[out, in]`.
/// Source: Dosovitskiy et al. 2021, equations 2 and 3.
pub fn encoder_block(
    x: Tensor<3>,
    weights: &[Tensor<1>; 12],
    spec: &BlockSpec,
    path: Option<&PathScale>,
    cache: &WeightCache,
) -> Tensor<3> {
    if !on_kernels(&x) {
        return plain::encoder_block(x, weights, spec, path);
    }
    let [batch, tokens, width] = x.dims();
    let shape = BlockShape {
        batch,
        tokens,
        width,
        heads: spec.heads,
        hidden: spec.hidden,
    };
    let call = Call {
        shape,
        packed: cache.packed(weights.clone().map(primitive), spec),
        gelu: spec.gelu,
        eps: spec.eps as f32,
        path: path.cloned(),
    };
    if weights[0].is_autodiff() {
        let x = x.autodiff();
        let mut nodes = vec![node(&x)];
        nodes.extend(weights.iter().map(node));
        let nodes: [_; 13] = nodes.try_into().expect("an input and 12 weights");
        call.tracked(primitive(x), nodes)
    } else if x.is_autodiff() {
        let nodes = [node(&x)];
        call.tracked(primitive(x), nodes)
    } else {
        Tensor::from_primitive::<Flex>(call.forward(&primitive(x), false).0)
    }
}

fn node<const D: usize>(tensor: &Tensor<D>) -> burn::backend::autodiff::ops::NodeGuard {
    let primitive = tensor.clone().try_into_primitive::<Autodiff<Flex>>();
    primitive.expect("an autodiff tensor of the CPU").node()
}

fn slice(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("contiguous f32 tensors")
}

fn tensor(values: Vec<f32>, shape: &[usize]) -> FlexTensor {
    let layout = Layout::contiguous(Shape::from(shape.to_vec()));
    FlexTensor::new(Bytes::from_elems(values), layout, DType::F32)
}

/// One use of a block: everything that forward and backward share.
#[derive(Clone)]
struct Call {
    shape: BlockShape,
    packed: Arc<PackedBlock>,
    gelu: Gelu,
    eps: f32,
    path: Option<PathScale>,
}

impl Call {
    fn forward(&self, x: &FlexTensor, save: bool) -> (FlexTensor, Option<BlockSaved>) {
        let BlockShape {
            batch,
            tokens,
            width,
            ..
        } = self.shape;
        let mut y = vec![0.0; batch * tokens * width];
        let path = self
            .path
            .as_ref()
            .map(|path| (&path.attention[..], &path.mlp[..]));
        let saved = block_forward(
            self.shape,
            &self.packed,
            self.gelu,
            self.eps,
            path,
            slice(x),
            &mut y,
            save,
        );
        (tensor(y, &[batch, tokens, width]), saved)
    }

    fn tracked<const N: usize>(
        self,
        x: FlexTensor,
        nodes: [burn::backend::autodiff::ops::NodeGuard; N],
    ) -> Tensor<3>
    where
        BlockBackward: Backward<Flex, N, State = State>,
    {
        let output = match BlockBackward
            .prepare::<NoCheckpointing>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (y, saved) = self.forward(&x, true);
                let saved = Arc::new(saved.expect("asked to save"));
                prep.finish(State { call: self, saved }, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(self.forward(&x, false).0),
        };
        Tensor::from_primitive::<Autodiff<Flex>>(output)
    }
}

#[derive(Clone)]
struct State {
    call: Call,
    saved: Arc<BlockSaved>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "encoder block {:?}", self.call.shape)
    }
}

/// With one parent the gradient of the input alone, with 13 those of the weights too.
#[derive(Debug)]
struct BlockBackward;

impl<const N: usize> Backward<Flex, N> for BlockBackward {
    type State = State;

    fn backward(self, ops: Ops<State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let State { call, saved } = ops.state;
        let dy = grads.consume::<Flex>(&ops.node).to_contiguous();
        let BlockShape {
            batch,
            tokens,
            width,
            hidden,
            ..
        } = call.shape;
        let mut dx = vec![0.0; batch * tokens * width];
        let mut weights = (N > 1).then(|| BlockGradients::zeros(width, hidden));
        block_backward(&call.packed, &saved, slice(&dy), &mut dx, weights.as_mut());

        let mut values = vec![(dx, vec![batch, tokens, width])];
        if let Some(weights) = weights {
            let flat = |values: Vec<f32>| {
                let length = values.len();
                (values, vec![length])
            };
            values.extend(in_order(weights).map(flat));
        }
        for (parent, (values, shape)) in ops.parents.into_iter().zip(values) {
            if let Some(parent) = parent {
                grads.register::<Flex>(parent.id, tensor(values, &shape));
            }
        }
    }
}
