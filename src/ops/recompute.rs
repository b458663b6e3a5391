//! Pieces of a model that keep nothing but their input for the backward pass, which computes them once more.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::Tensor;

use super::engine::Engine;
use super::node::{Differentiable, parents, record};

/// A function of tokens and weights: shapes `[batch, tokens, width]` and flat.
type Piece = Arc<dyn Fn(Tensor<3>, &[Tensor<1>]) -> Tensor<3> + Send + Sync>;

/// The result of `piece`, as one node of automatic differentiation.
///
/// The result agrees with that of the piece itself up to rounding: it is computed outside of automatic differentiation,
/// where Burn's softmax is another program. The gradients are the same.
pub(crate) fn recomputed(
    x: Tensor<3>,
    weights: &[Tensor<1>],
    piece: impl Fn(Tensor<3>, &[Tensor<1>]) -> Tensor<3> + Send + Sync + 'static,
) -> Tensor<3> {
    match Engine::of(&x) {
        Engine::Cpu | Engine::Cuda(_) => on::<Flex>(x, weights, Arc::new(piece)),
        #[cfg(feature = "gpu")]
        Engine::Burn => on::<burn::backend::Cube>(x, weights, Arc::new(piece)),
        #[cfg(not(feature = "gpu"))]
        Engine::Burn => unreachable!("this build has no GPU"),
    }
}

fn on<B>(x: Tensor<3>, weights: &[Tensor<1>], piece: Piece) -> Tensor<3>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B>>,
{
    let parents = parents::<B, 3>(&x, weights);
    let x = x.without_autodiff();
    let weights = weights.iter().cloned().map(Tensor::without_autodiff);
    let weights: Vec<_> = weights.collect();
    record(parents, |_| {
        let y = primitive::<B, 3>(piece(x.clone(), &weights));
        let backend = PhantomData::<B>;
        (
            y,
            Recompute {
                x,
                weights,
                piece,
                backend,
            },
        )
    })
}

fn primitive<B, const D: usize>(tensor: Tensor<D>) -> FloatTensor<B>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    let primitive = tensor.try_into_primitive::<B>();
    primitive.expect("a tensor of this backend")
}

/// A piece and what it is computed from.
#[derive(Clone)]
struct Recompute<B> {
    x: Tensor<3>,
    weights: Vec<Tensor<1>>,
    piece: Piece,
    backend: PhantomData<B>,
}

impl<B> fmt::Debug for Recompute<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a piece of {:?}", self.x.dims())
    }
}

impl<B> Differentiable for Recompute<B>
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    type Backend = B;

    fn backward(self, dy: FloatTensor<B>, wanted: &[bool]) -> Vec<Option<FloatTensor<B>>> {
        let dy: Tensor<3> = Tensor::from_primitive::<B>(dy);
        let x = self.x.autodiff().require_grad();
        let weights: Vec<Tensor<1>> = if wanted.len() > 1 {
            let weights = self.weights.into_iter();
            weights
                .map(|weight| weight.autodiff().require_grad())
                .collect()
        } else {
            self.weights
        };
        // A graph of its own: the chain rule through the piece, from the gradient of its result.
        let along = ((self.piece)(x.clone(), &weights) * dy.autodiff()).sum();
        let mut gradients = along.backward();
        let of_x = x.grad_remove(&mut gradients);
        let mut found = vec![of_x.map(|gradient| primitive(gradient.without_autodiff()))];
        if wanted.len() > 1 {
            let of_weights = weights
                .iter()
                .map(|weight| weight.grad_remove(&mut gradients));
            found.extend(
                of_weights.map(|gradient| {
                    gradient.map(|gradient| primitive(gradient.without_autodiff()))
                }),
            );
        }
        found
    }
}
