//! Pieces of a model on a GPU that keep nothing but their input for the backward pass, which computes them once more.

use std::fmt;
use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::{Autodiff, Cube};
use burn::tensor::Tensor;

/// A function of tokens and weights: shapes `[batch, tokens, width]` and flat.
pub(crate) type Piece = Arc<dyn Fn(Tensor<3>, &[Tensor<1>]) -> Tensor<3> + Send + Sync>;

/// What `piece` gives, as one node of automatic differentiation.
///
/// # Panics
/// When the number of weights is not that of a piece that there is.
pub(crate) fn recomputed(x: Tensor<3>, weights: &[Tensor<1>], piece: Piece) -> Tensor<3> {
    if weights.first().is_some_and(Tensor::is_autodiff) {
        match weights.len() {
            12 => recorded::<13>(x, weights, piece),
            9 => recorded::<10>(x, weights, piece),
            count => unreachable!("there is no block of {count} weights"),
        }
    } else if x.is_autodiff() {
        recorded::<1>(x, weights, piece)
    } else {
        piece(x, weights)
    }
}

/// With one node the gradient of the input alone, with more those of the weights too.
fn recorded<const N: usize>(x: Tensor<3>, weights: &[Tensor<1>], piece: Piece) -> Tensor<3> {
    let mut nodes = vec![node(&x)];
    if N > 1 {
        nodes.extend(weights.iter().map(node));
    }
    let nodes: [NodeGuard; N] = nodes.try_into().expect("an input and its weights");
    let x = x.without_autodiff();
    let weights: Vec<_> = weights
        .iter()
        .map(|weight| weight.clone().without_autodiff())
        .collect();
    let y = piece(x.clone(), &weights).try_into_primitive::<Cube>();
    let y = y.expect("a tensor of a GPU");
    let prepared = PieceBackward
        .prepare::<NoCheckpointing>(nodes)
        .compute_bound()
        .stateful();
    let output = match prepared {
        OpsKind::Tracked(prep) => prep.finish(State { x, weights, piece }, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    };
    Tensor::from_primitive::<Autodiff<Cube>>(output)
}

fn node<const D: usize>(tensor: &Tensor<D>) -> NodeGuard {
    let tensor = tensor.clone().autodiff();
    let primitive = tensor.try_into_primitive::<Autodiff<Cube>>();
    primitive.expect("a tensor of a GPU").node()
}

#[derive(Clone)]
struct State {
    x: Tensor<3>,
    weights: Vec<Tensor<1>>,
    piece: Piece,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a piece of {:?}", self.x.dims())
    }
}

#[derive(Debug)]
struct PieceBackward;

impl<const N: usize> Backward<Cube, N> for PieceBackward {
    type State = State;

    fn backward(self, ops: Ops<State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let State { x, weights, piece } = ops.state;
        let dy: Tensor<3> = Tensor::from_primitive::<Cube>(grads.consume::<Cube>(&ops.node));
        let x = x.autodiff().require_grad();
        let weights: Vec<Tensor<1>> = match N {
            1 => weights,
            _ => weights
                .into_iter()
                .map(|weight| weight.autodiff().require_grad())
                .collect(),
        };
        // A graph of its own: the chain rule through the piece, from the gradient of its result.
        let along = (piece(x.clone(), &weights) * dy.autodiff()).sum();
        let mut found = along.backward();
        let mut parents = ops.parents.into_iter().map(|parent| parent.map(|p| p.id));
        let first = parents.next().flatten();
        hand_on(grads, first, x.grad_remove(&mut found));
        for (parent, weight) in parents.zip(weights) {
            hand_on(grads, parent, weight.grad_remove(&mut found));
        }
    }
}

fn hand_on<const D: usize>(
    grads: &mut Gradients,
    parent: Option<NodeId>,
    gradient: Option<Tensor<D>>,
) {
    if let (Some(parent), Some(gradient)) = (parent, gradient) {
        let primitive = gradient.without_autodiff().try_into_primitive::<Cube>();
        grads.register::<Cube>(parent, primitive.expect("a tensor of a GPU"));
    }
}
