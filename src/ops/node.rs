//! An operation as one node of Burn's automatic differentiation.
//!
//! The only place that implements Burn's `Backward`. An operation computes its result, says what it keeps, and computes
//! the gradients of its parents from that; nothing here knows what an operation is.

use std::fmt;
use std::marker::PhantomData;

use advxl_kernels::Wanted;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, DispatchKindConversion, DispatchTensor};
use burn::tensor::Tensor;

/// What an operation keeps for its backward pass, and the backward pass itself.
pub(crate) trait Differentiable: Clone + fmt::Debug + Send + 'static {
    /// The backend that holds the operation's tensors.
    type Backend: Backend;

    /// The gradients of the parents, in their order, from `dy`, the gradient of the result.
    ///
    /// `wanted` says which parents take part in differentiation; the gradients of the others are dropped and need
    /// not be computed. With one parent that is the input, and no weight takes part.
    fn backward(
        self,
        dy: FloatTensor<Self::Backend>,
        wanted: &[bool],
    ) -> Vec<Option<FloatTensor<Self::Backend>>>;
}

/// The parents of an operation in automatic differentiation: its input and its weights; the input alone if no weight
/// takes part (as in attacks); nothing if nothing does.
pub(crate) fn parents<'a, B, const D: usize>(
    x: &Tensor<D>,
    weights: impl IntoIterator<Item = &'a Tensor<1>>,
) -> Vec<NodeGuard>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    let weights: Vec<_> = weights.into_iter().collect();
    if weights.iter().any(|weight| weight.is_autodiff()) {
        let weights = weights.into_iter().map(parent::<B, 1>);
        std::iter::once(parent::<B, D>(x)).chain(weights).collect()
    } else if x.is_autodiff() {
        vec![parent::<B, D>(x)]
    } else {
        Vec::new()
    }
}

/// The node of a tensor; a tensor outside automatic differentiation gets an untracked node.
pub(crate) fn parent<B, const D: usize>(tensor: &Tensor<D>) -> NodeGuard
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<Autodiff<B>>,
{
    let tensor = tensor.clone().autodiff();
    let primitive = tensor.try_into_primitive::<Autodiff<B>>();
    primitive.expect("a tensor of this backend").node()
}

/// Runs an operation and, if a parent is tracked, records it with what its backward pass needs.
///
/// `forward` receives which gradients are needed, and returns the result and what it saves.
pub(crate) fn record<S, const D: usize>(
    parents: Vec<NodeGuard>,
    forward: impl FnOnce(Wanted) -> (FloatTensor<S::Backend>, S),
) -> Tensor<D>
where
    S: Differentiable,
    DispatchTensor:
        DispatchKindConversion<S::Backend> + DispatchKindConversion<Autodiff<S::Backend>>,
{
    // Burn counts parents at compile time: an input alone, a layer's with weight and bias, a block's.
    match parents.len() {
        0 => Tensor::from_primitive::<S::Backend>(forward(Wanted::Nothing).0),
        1 => attach::<S, 1, D>(parents, Wanted::Input, forward),
        2 => attach::<S, 2, D>(parents, Wanted::Weights, forward),
        3 => attach::<S, 3, D>(parents, Wanted::Weights, forward),
        10 => attach::<S, 10, D>(parents, Wanted::Weights, forward),
        13 => attach::<S, 13, D>(parents, Wanted::Weights, forward),
        count => unreachable!("no operation has {count} parents"),
    }
}

fn attach<S, const N: usize, const D: usize>(
    parents: Vec<NodeGuard>,
    wanted: Wanted,
    forward: impl FnOnce(Wanted) -> (FloatTensor<S::Backend>, S),
) -> Tensor<D>
where
    S: Differentiable,
    DispatchTensor: DispatchKindConversion<Autodiff<S::Backend>>,
{
    let parents: [NodeGuard; N] = parents.try_into().expect("they were counted");
    let prepared =
        Backward::<S::Backend, N>::prepare::<NoCheckpointing>(Node::<S>(PhantomData), parents)
            .compute_bound()
            .stateful();
    let output = match prepared {
        OpsKind::Tracked(prepared) => {
            let (y, saved) = forward(wanted);
            prepared.finish(saved, y)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(forward(Wanted::Nothing).0),
    };
    Tensor::from_primitive::<Autodiff<S::Backend>>(output)
}

/// Any operation, as Burn's automatic differentiation takes it.
#[derive(Debug)]
struct Node<S>(PhantomData<S>);

impl<S: Differentiable, const N: usize> Backward<S::Backend, N> for Node<S> {
    type State = S;

    fn backward(self, ops: Ops<S, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<S::Backend>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let gradients = ops.state.backward(dy, &wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<S::Backend>(parent.id, gradient);
            }
        }
    }
}
