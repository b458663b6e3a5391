//! The attacked model: a function from images to logits, with gradients and a count of passes.
//!
//! An image with non-finite logits counts as misclassified, regardless of its largest logit.

use std::cell::Cell;
use std::ops::AddAssign;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::gradient::{pull, select};
use super::objective::{Goal, are_finite};
use crate::ops::{Device, finite, from_vec, to_vec, zeros};

/// A differentiable function from images in [0, 1] to logits: the interface that attacks require of a model.
///
/// Implemented by every function that Burn can differentiate, and by models of other frameworks that provide
/// vector-Jacobian products. An image's logits must depend on that image alone.
pub trait Network {
    /// Returns the logits of a batch.
    ///
    /// Shapes: `images` `[batch, 3, height, width]`; the logits `[batch, classes]`. Both untracked.
    fn logits(&self, images: Tensor<4>) -> Tensor<2>;

    /// Returns the gradient of `<slopes(logits), logits>` with respect to the images, with the slopes held fixed.
    ///
    /// `slopes` is called once, with the logits of the images. Returns `None` if the logits do not depend
    /// differentiably on the images.
    /// Shapes: slopes `[batch, classes]`, the gradient `[batch, 3, height, width]`.
    fn gradient(
        &self,
        images: Tensor<4>,
        slopes: &mut dyn FnMut(Tensor<2>) -> Tensor<2>,
    ) -> Option<Tensor<4>>;
}

impl<F: Fn(Tensor<4>) -> Tensor<2>> Network for F {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        self(images)
    }

    fn gradient(
        &self,
        images: Tensor<4>,
        slopes: &mut dyn FnMut(Tensor<2>) -> Tensor<2>,
    ) -> Option<Tensor<4>> {
        let images = images.autodiff().require_grad();
        let output = self(images.clone());
        let slopes = slopes(output.clone().without_autodiff());
        pull(&images, output, slopes)
    }
}

/// A model under attack.
pub struct TargetModel<'a> {
    network: &'a dyn Network,
    /// A faster approximation of the network that attacks search with.
    search: Option<&'a dyn Network>,
    device: Device,
    passes: Cell<Passes>,
    kept: Cell<Passes>,
    watch: &'a dyn Fn(Passes),
    stop: &'a dyn Fn() -> bool,
}

/// Number of images passed through the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passes {
    /// Forward passes.
    pub forward: u64,
    /// Backward passes to the pixels.
    pub backward: u64,
}

impl AddAssign for Passes {
    fn add_assign(&mut self, more: Self) {
        self.forward += more.forward;
        self.backward += more.backward;
    }
}

/// The logits of a batch, on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    values: Vec<f32>,
    classes: usize,
}

impl Logits {
    /// Creates logits from values of shape `[batch, classes]`.
    pub fn new(values: Vec<f32>, classes: usize) -> Self {
        Self { values, classes }
    }

    /// Returns the number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Returns the logits of one image.
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[index * self.classes..][..self.classes]
    }

    /// Iterates over the rows.
    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.values.chunks_exact(self.classes.max(1))
    }

    /// Returns whether all logits of an image are finite.
    pub fn is_finite(&self, index: usize) -> bool {
        are_finite(self.row(index))
    }

    /// Returns the predicted class, or None if a logit is not finite. Ties go to the lower class.
    pub fn prediction(&self, index: usize) -> Option<usize> {
        let row = self.row(index);
        let largest = (1..row.len()).fold(
            0,
            |best, class| if row[class] > row[best] { class } else { best },
        );
        (!row.is_empty() && are_finite(row)).then_some(largest)
    }

    /// Returns whether an image is classified as `label`; false if a logit is not finite. Ties go to the lower class.
    pub fn is_right(&self, index: usize, label: usize) -> bool {
        self.prediction(index) == Some(label)
    }

    /// Returns the softmax probability of the predicted class, or None if a logit is not finite.
    pub fn confidence(&self, index: usize) -> Option<f64> {
        let predicted = self.prediction(index)?;
        let row = self.row(index);
        let most = f64::from(row[predicted]);
        let sum: f64 = row
            .iter()
            .map(|logit| (f64::from(*logit) - most).exp())
            .sum();
        Some(1.0 / sum)
    }

    /// Returns the margin `z_y - max z_i`, with the maximum over the other classes.
    ///
    /// Minus infinity if a logit is not finite or the label is out of range; infinity for a single class.
    pub fn margin(&self, index: usize, label: usize) -> f64 {
        let row = self.row(index);
        if label >= row.len() || !are_finite(row) {
            return f64::NEG_INFINITY;
        }
        let others = row.iter().enumerate().filter(|(class, _)| *class != label);
        let rival = others.fold(f32::NEG_INFINITY, |most, (_, logit)| most.max(*logit));
        f64::from(row[label]) - f64::from(rival)
    }
}

/// The losses of a batch and their gradient.
pub struct Slope {
    /// The logits.
    pub logits: Logits,
    /// Each image's loss.
    pub losses: Vec<f64>,
    /// The gradient of each image's loss with respect to its pixels, `[batch, 3, height, width]`.
    pub gradient: Tensor<4>,
}

impl<'a> TargetModel<'a> {
    /// Creates a target model.
    ///
    /// # Panics
    /// Later calls panic if the network does not return one row of logits per image.
    pub fn new(network: &'a dyn Network, device: &Device) -> Self {
        Self::watched(network, device, &|_| ())
    }

    /// Like [`Self::new`], and reports every pass to `watch`.
    pub fn watched(network: &'a dyn Network, device: &Device, watch: &'a dyn Fn(Passes)) -> Self {
        Self {
            network,
            search: None,
            device: device.clone(),
            passes: Cell::default(),
            kept: Cell::default(),
            watch,
            stop: &|| false,
        }
    }

    /// Makes attacks search with a faster approximation of the network, such as the same model in bf16. What they find
    /// is confirmed with the network itself.
    pub fn searched_by(self, search: Option<&'a dyn Network>) -> Self {
        Self { search, ..self }
    }

    /// Returns whether attacks search with an approximation.
    pub(crate) fn is_approximate(&self) -> bool {
        self.search.is_some()
    }

    /// Makes attacks stop before their next pass once `stop` returns true. It must not return false afterwards.
    pub fn stopped_by(self, stop: &'a dyn Fn() -> bool) -> Self {
        Self { stop, ..self }
    }

    /// Returns whether attacks should stop, abandoning the work in progress.
    pub fn is_stopped(&self) -> bool {
        (self.stop)()
    }

    /// Returns the device of the computation.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns and resets the number of passes.
    pub fn take_passes(&self) -> Passes {
        self.kept.take();
        self.passes.take()
    }

    /// Marks the passes so far as kept: a stop does not discard their results.
    pub(crate) fn keep_passes(&self) {
        self.kept.set(self.passes.get());
    }

    /// Discards the passes of work abandoned by a stop, which will be repeated.
    pub fn forget_passes(&self) {
        self.passes.set(self.kept.get());
    }

    fn count(&self, forward: usize, backward: usize) {
        let these = Passes {
            forward: forward as u64,
            backward: backward as u64,
        };
        let mut passes = self.passes.get();
        passes += these;
        self.passes.set(passes);
        (self.watch)(these);
    }

    /// Returns the logits of images.
    pub fn logits(&self, images: Tensor<4>) -> Logits {
        self.logits_by(self.network, images)
    }

    /// Returns the logits of images by the network that attacks search with.
    pub(crate) fn search_logits(&self, images: Tensor<4>) -> Logits {
        self.logits_by(self.search.unwrap_or(self.network), images)
    }

    fn logits_by(&self, network: &dyn Network, images: Tensor<4>) -> Logits {
        let batch = images.dims()[0];
        let logits = on_host(network.logits(images.without_autodiff()), batch);
        self.count(batch, 0);
        logits
    }

    /// Replaces the logits of images that the search considers misclassified by those of the network itself.
    pub(crate) fn confirmed(
        &self,
        images: &Tensor<4>,
        mut logits: Logits,
        label: impl Fn(usize) -> usize,
    ) -> Logits {
        if self.search.is_none() {
            return logits;
        }
        let rows = 0..images.dims()[0];
        let wrong: Vec<usize> = rows
            .filter(|row| !logits.is_right(*row, label(*row)))
            .collect();
        if !wrong.is_empty() {
            let exact = self.logits(select(images.clone(), &wrong));
            for (row, exact) in wrong.iter().zip(exact.rows()) {
                logits.values[row * logits.classes..][..logits.classes].copy_from_slice(exact);
            }
        }
        logits
    }

    /// Returns logits, losses and the gradient of the losses, with one goal per image.
    ///
    /// The gradient is that of `sum_i <slope_i, logits_i>` with the slopes held fixed, which by the chain rule is the
    /// gradient of the summed losses. It takes one forward and one backward pass for any loss. All are those of the
    /// network that attacks search with.
    /// The gradient is finite: infinities become the largest finite value, and NaN becomes 0.
    pub fn climb(&self, images: Tensor<4>, goals: &[Goal]) -> Slope {
        let batch = images.dims()[0];
        assert_eq!(goals.len(), batch, "one goal per image");
        let images = images.without_autodiff();
        let shape = images.dims();
        let mut seen = None;
        let network = self.search.unwrap_or(self.network);
        let gradient = network.gradient(images, &mut |logits| {
            let logits = on_host(logits, batch);
            let classes = logits.classes();
            let mut slopes = vec![0.0; batch * classes];
            let losses: Vec<f64> = goals
                .iter()
                .enumerate()
                .map(|(row, goal)| {
                    let slope = &mut slopes[row * classes..][..classes];
                    goal.slope(logits.row(row), slope)
                })
                .collect();
            seen = Some((logits, losses));
            from_vec(slopes, [batch, classes], &self.device)
        });
        let (logits, losses) = seen.expect("a network calls `slopes`");
        // Zero if the logits do not depend differentiably on the images.
        let gradient = gradient.unwrap_or_else(|| zeros(shape, &self.device));
        self.count(batch, batch);
        Slope {
            logits,
            losses,
            gradient: finite(gradient),
        }
    }
}

/// Copies the logits of a batch to the host and checks the number of rows.
fn on_host(logits: Tensor<2>, batch: usize) -> Logits {
    let [rows, classes] = logits.dims();
    assert_eq!(rows, batch, "expected one row of logits per image");
    Logits::new(to_vec(logits.without_autodiff()), classes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_right_only_if_all_logits_are_finite_and_the_label_is_largest() {
        let logits = Logits::new(vec![1.0, 3.0, 2.0, f32::NAN, 1.0, 0.0], 3);
        assert!(logits.is_right(0, 1) && !logits.is_right(0, 2));
        assert!(!logits.is_right(1, 0) && !logits.is_right(1, 1));
        assert_eq!(logits.margin(0, 1), 1.0);
        assert_eq!(logits.margin(0, 0), -2.0);
        assert_eq!(logits.margin(1, 1), f64::NEG_INFINITY);
        for bad in [f32::INFINITY, f32::NEG_INFINITY] {
            // Whether or not the label has the largest logit, a non-finite logit makes the image misclassified.
            for row in [[5.0, 1.0, bad], [bad, 1.0, 0.0]] {
                let logits = Logits::new(row.to_vec(), 3);
                assert!(!logits.is_finite(0) && !logits.is_right(0, 0), "{row:?}");
                assert_eq!(logits.margin(0, 0), f64::NEG_INFINITY);
            }
        }
    }

    #[test]
    fn a_label_out_of_range_is_never_right() {
        let none = Logits::new(Vec::new(), 0);
        assert!(!none.is_right(0, 0));
        assert_eq!(none.margin(0, 0), f64::NEG_INFINITY);
        let one = Logits::new(vec![2.0], 1);
        assert!(one.is_right(0, 0) && !one.is_right(0, 1));
        assert_eq!(one.margin(0, 0), f64::INFINITY);
    }

    #[test]
    fn the_gradient_of_a_model_that_overflows_is_finite() {
        let device = Device::cpu();
        // Slopes of 1e30 * 1e30 overflow; the second channel's are undefined, infinity times zero.
        let logits = |images: Tensor<4>| {
            let pixels = images.reshape([1, 3]);
            let steep = from_vec(vec![1e30, 1e30, 1.0], [1, 3], &device);
            let steeper = from_vec(vec![1e30, 0.0, 1.0], [1, 3], &device);
            pixels * steep * steeper
        };
        let classifier = TargetModel::new(&logits, &device);
        let goals = [Goal::Difference {
            label: 2,
            target: 0,
        }];
        let images = from_vec(vec![0.0, 0.0, 0.5], [1, 3, 1, 1], &device);
        let gradient = to_vec(classifier.climb(images, &goals).gradient);
        assert_eq!(gradient, [f32::MAX, 0.0, -1.0]);
    }

    #[test]
    fn a_climb_gives_the_gradient_of_each_goal_and_counts() {
        let device = Device::cpu();
        let logits = |images: Tensor<4>| images.reshape([2, 3]) * 2.0;
        let classifier = TargetModel::new(&logits, &device);
        let images = from_vec(vec![0.1, 0.2, 0.3, 0.6, 0.5, 0.4], [2, 3, 1, 1], &device);
        let goals = [
            Goal::Difference {
                label: 0,
                target: 2,
            },
            Goal::Difference {
                label: 1,
                target: 0,
            },
        ];
        let slope = classifier.climb(images, &goals);
        assert_eq!(to_vec(slope.gradient), [-2.0, 0.0, 2.0, 2.0, -2.0, 0.0]);
        assert!((slope.losses[0] - 0.4).abs() < 1e-6);
        assert_eq!(
            classifier.take_passes(),
            Passes {
                forward: 2,
                backward: 2
            }
        );
    }
}
