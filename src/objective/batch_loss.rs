//! The interface of an objective: the losses of one batch.

use std::iter::{self, Chain, Once};
use std::ops::Range;
use std::option;

use burn::tensor::{Gradients, Tensor};

use crate::distributed::Comm;

/// A value for the adversarial images and, for objectives that use them, for the clean images.
#[derive(Clone, Debug)]
pub struct Views<T> {
    /// For the adversarial images.
    pub adversarial: T,
    /// For the clean images; `None` unless [`BatchLoss::uses_clean_images`].
    pub clean: Option<T>,
}

impl<T> Views<T> {
    /// Creates a view of the adversarial images only.
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

    /// Returns pairs of the values of two, which have the same views.
    pub fn zip<U>(self, other: Views<U>) -> Views<(T, U)> {
        Views {
            adversarial: (self.adversarial, other.adversarial),
            clean: self.clean.zip(other.clean),
        }
    }

    /// Returns references to each view.
    pub fn as_ref(&self) -> Views<&T> {
        Views {
            adversarial: &self.adversarial,
            clean: self.clean.as_ref(),
        }
    }
}

/// Iterates over the views, adversarial first.
impl<T> IntoIterator for Views<T> {
    type Item = T;
    type IntoIter = Chain<Once<T>, option::IntoIter<T>>;

    fn into_iter(self) -> Self::IntoIter {
        iter::once(self.adversarial).chain(self.clean)
    }
}

/// The loss of one batch as a function of the model's outputs.
///
/// Implementations contain the targets: labels, caption embeddings, or the outputs of a frozen reference model.
pub trait BatchLoss {
    /// Returns the loss of each image, which training minimizes.
    ///
    /// Shapes: outputs `[rows, outputs]`; the result `[rows]`.
    fn losses(&self, outputs: Views<Tensor<2>>) -> Tensor<1>;

    /// Returns the loss of each image, which the attack maximizes. Defaults to [`Self::losses`].
    ///
    /// Shapes: same as [`Self::losses`].
    fn attack_losses(&self, outputs: Tensor<2>) -> Tensor<1> {
        self.losses(Views::adversarial(outputs))
    }

    /// Returns whether [`Self::losses`] also needs the outputs on the clean images, which costs another pass.
    fn uses_clean_images(&self) -> bool {
        false
    }

    /// Returns the loss for some of the rows, or `None` if the loss of an image depends on the other images of the
    /// batch, including those of other ranks. In that case, the outputs of all images are gathered.
    fn of_rows(&self, rows: Range<usize>) -> Option<Box<dyn BatchLoss>>;

    /// Counts the correctly classified images; `None` if the loss has no correct answers.
    ///
    /// Shapes: `outputs` `[rows, outputs]` on the adversarial images.
    fn count_correct(&self, outputs: Tensor<2>) -> Option<u64>;

    /// Returns whether [`Self::losses`] needs the frozen reference's outputs on the adversarial images, which are known
    /// only after the attack.
    fn uses_adversarial_reference(&self) -> bool {
        false
    }

    /// Sets the frozen reference's outputs on the adversarial images.
    ///
    /// Shapes: `[images, outputs]`, like the outputs that [`Self::losses`] gets.
    fn set_adversarial_reference(&mut self, _outputs: Tensor<2>) {}

    /// Returns the loss with its own parameters tracked by autodiff, if it has any.
    fn tracked(&self) -> Option<Box<dyn BatchLoss>> {
        None
    }

    /// Returns the gradients of the loss's own parameters, in the order of
    /// [`ExtraParameters`](crate::objective::parameters::ExtraParameters), from the gradients of a
    /// [tracked](Self::tracked) loss. They are summed over the ranks afterwards.
    fn parameter_gradients(&self, _gradients: &mut Gradients, _comm: &Comm) -> Vec<Tensor<1>> {
        Vec::new()
    }
}
