//! What differs between objectives: the losses of one batch.

use std::iter::{self, Chain, Once};
use std::ops::Range;
use std::option;

use burn::tensor::{Gradients, Tensor};

use crate::distributed::Comm;

/// The same thing at the adversarial images and, for objectives that use them, at the clean images.
#[derive(Clone, Debug)]
pub struct Views<T> {
    /// At the adversarial images.
    pub adversarial: T,
    /// At the clean images; none unless [`BatchLoss::uses_clean_images`].
    pub clean: Option<T>,
}

impl<T> Views<T> {
    /// Of the adversarial images alone.
    pub fn adversarial(adversarial: T) -> Self {
        let clean = None;
        Self { adversarial, clean }
    }

    /// Applies a function to each view.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Views<U> {
        Views {
            adversarial: f(self.adversarial),
            clean: self.clean.map(f),
        }
    }

    /// References to each view.
    pub fn as_ref(&self) -> Views<&T> {
        Views {
            adversarial: &self.adversarial,
            clean: self.clean.as_ref(),
        }
    }
}

/// The views, adversarial first.
impl<T> IntoIterator for Views<T> {
    type Item = T;
    type IntoIter = Chain<Once<T>, option::IntoIter<T>>;

    fn into_iter(self) -> Self::IntoIter {
        iter::once(self.adversarial).chain(self.clean)
    }
}

/// The loss of one batch as a function of the model's outputs.
///
/// Implementations hold what the outputs are compared with: labels, caption embeddings, outputs of a frozen reference.
pub trait BatchLoss {
    /// The loss of each image, which training minimizes.
    ///
    /// Shapes: outputs `[rows, outputs]`; the result `[rows]`.
    fn losses(&self, outputs: Views<Tensor<2>>) -> Tensor<1>;

    /// The loss of each image, which the attack maximizes; the same unless an objective says otherwise.
    ///
    /// Shapes: as [`Self::losses`].
    fn attack_losses(&self, outputs: Tensor<2>) -> Tensor<1> {
        self.losses(Views::adversarial(outputs))
    }

    /// Whether [`Self::losses`] also needs the outputs at the clean images, which costs another pass.
    fn uses_clean_images(&self) -> bool {
        false
    }

    /// The same loss for some of the rows; `None` if the loss of an image depends on the other images of the batch, those of
    /// other ranks included. The outputs of all are gathered then.
    fn of_rows(&self, rows: Range<usize>) -> Option<Box<dyn BatchLoss>>;

    /// Images that count as correct.
    ///
    /// Shapes: `outputs` `[rows, outputs]` at the adversarial images.
    fn count_correct(&self, outputs: Tensor<2>) -> u64;

    /// The same loss with its own parameters recorded for their gradients, if it has any.
    fn tracked(&self) -> Option<Box<dyn BatchLoss>> {
        None
    }

    /// The gradients of its own parameters, in the order of [`crate::objective::parameters::ExtraParameters`], from those of a
    /// [tracked](Self::tracked) loss. The ranks' gradients are summed.
    fn parameter_gradients(&self, _gradients: &mut Gradients, _comm: &Comm) -> Vec<Tensor<1>> {
        Vec::new()
    }
}
