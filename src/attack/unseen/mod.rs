//! Unseen attacks: corruptions of an image whose parameters maximize the loss.
//!
//! None of them is bounded by a norm of the perturbation: what is bounded are the parameters of a differentiable
//! corruption. A model that was trained against one norm has not seen them.
//! An attack is projected gradient ascent on the cross entropy over the parameters. The model's gradient with respect to
//! the corrupted images is pulled back through the corruption ([`Renderer::pull`]), so any [`TargetModel`] can be attacked.
//! Source: Kaufmann et al., "Testing Robustness Against Unforeseen Adversaries" (arXiv:1908.08016), the eight core attacks
//! of ImageNet-UA, with the settings of the authors' code ([`Preset`]). What differs from that code is said at each
//! corruption; in docs/decisions/0029-unseen-attacks.md for all of them.
//!
//! | corruption | parameters | bounded by |
//! |---|---|---|
//! | [`Gabor`](gabor) | weights of wave kernels at random points | linf |
//! | [`Snow`](snow) | brightness of flakes at random points | l2 |
//! | [`Pixel`](pixel) | share of a block's corner in the block | l2, [0, 1] |
//! | [`Jpeg`](jpeg) | noise on the coefficients of JPEG | linf |
//! | [`Kaleidoscope`](kaleidoscope) | colors of random shapes, grey of their edges | linf |
//! | [`Glitch`](glitch) | displacement of horizontal bars | linf |
//! | [`Wood`](wood) | displacement of concentric rings | linf |
//! | [`Elastic`](elastic) | a coarse flow of pixels | l2 |

pub mod corruption;
pub mod elastic;
pub mod gabor;
pub mod glitch;
pub mod jpeg;
pub mod kaleidoscope;
pub mod pixel;
pub mod preset;
pub mod renderer;
pub mod sample;
pub mod snow;
pub mod wood;

pub use corruption::{ALL, Corruption, Strength};
pub use preset::Preset;
pub use renderer::{Extent, Renderer};

use burn::tensor::Tensor;
use rayon::prelude::*;
use serde::Serialize;

use super::attempt::{Attempt, Batch};
use super::draws::Draws;
use super::objective::Goal;
use super::target_model::{Passes, TargetModel};
use super::threat::Norm;
use crate::ops::{Device, from_vec, to_vec};
use crate::rng::{AttackKind, Rng};
use crate::units::Fraction;

/// An unseen attack: projected gradient ascent over the parameters of a corruption. The last iterate is the result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Unseen {
    /// The corruption.
    pub corruption: Corruption,
    /// Its strength.
    pub strength: Strength,
    /// The published settings in use.
    pub preset: Preset,
    /// The norm that bounds the parameters.
    pub parameter_norm: Norm,
    /// Largest norm of the parameters, in the corruption's own unit.
    pub parameter_epsilon: Fraction,
    /// Number of steps. Each costs one forward and one backward pass.
    pub steps: u64,
    /// Step size, in the unit of the parameters.
    pub step_size: f64,
}

impl Unseen {
    /// Returns the attack with the published settings for images of this size.
    pub fn new(corruption: Corruption, strength: Strength, image_size: usize) -> Self {
        let preset = Preset::of(image_size);
        let (steps, step_size) = preset.steps(corruption);
        let epsilon = preset.epsilon(corruption, strength);
        Self {
            corruption,
            strength,
            preset,
            parameter_norm: corruption.norm(),
            parameter_epsilon: epsilon.parse().expect("a published number"),
            steps,
            step_size,
        }
    }

    /// Returns the attack's name as shown in tables, such as `gabor`.
    pub fn name(&self) -> &'static str {
        self.corruption.word()
    }

    /// Returns the maximum number of passes per image.
    pub(super) fn most_passes(&self) -> Passes {
        Passes {
            forward: self.steps,
            backward: self.steps,
        }
    }

    /// Renders the corruption of one image with parameters that [`Attempt::parameters`] holds: the same image, to the bit.
    ///
    /// Shapes: `clean` and the result `[3, height, width]`. Returns `None` if the number of parameters is not that of the
    /// corruption.
    pub fn render(
        &self,
        clean: &[f32],
        extent: Extent,
        seed: u64,
        key: u64,
        parameters: &[f32],
    ) -> Option<Vec<f32>> {
        let keys = [key];
        let draws = Draws::new(seed, &keys, AttackKind::Unseen);
        let mut renderer = self.renderer(extent, &draws, 0);
        renderer.redraw(&mut self.stream(&draws, 0, self.steps + 1));
        (renderer.count() == parameters.len()).then(|| renderer.render(clean, parameters))
    }

    /// Attacks a batch. A stop discards the run.
    pub(super) fn go_on(&self, classifier: &TargetModel, batch: &Batch) -> Attempt {
        let goals: Vec<Goal> = batch
            .labels
            .iter()
            .map(|label| Goal::CrossEntropy {
                label: *label as usize,
            })
            .collect();
        let nothing = Attempt::nothing(batch.labels.len());
        let gradient = |images: Tensor<4>| {
            (!classifier.is_stopped()).then(|| classifier.climb(images, &goals).gradient)
        };
        match self.climb(batch, gradient) {
            None => Attempt {
                stopped: true,
                ..nothing
            },
            Some(found) => {
                let (images, parameters): (Vec<_>, Vec<_>) = found.into_iter().unzip();
                Attempt {
                    found: images.into_iter().map(Some).collect(),
                    parameters: parameters.into_iter().map(Some).collect(),
                    ..nothing
                }
            }
        }
    }

    /// Maximizes a loss over the parameters and returns, for each image, the corrupted image and its parameters.
    ///
    /// `gradient` returns the gradient of the loss with respect to the corrupted images, or `None` to stop.
    /// Shapes: `batch.images` and the gradient `[batch, 3, height, width]`.
    pub fn climb(
        &self,
        batch: &Batch,
        mut gradient: impl FnMut(Tensor<4>) -> Option<Tensor<4>>,
    ) -> Option<Vec<(Vec<f32>, Vec<f32>)>> {
        let [count, channels, height, width] = batch.images.dims();
        assert_eq!(channels, 3, "corruptions are those of color images");
        let extent = Extent { height, width };
        let pixels = 3 * extent.pixels();
        let draws = Draws::new(batch.seed, &batch.keys, AttackKind::Unseen);
        let device = Device::of(&batch.images);
        let clean = to_vec(batch.images.clone());
        let mut climbs: Vec<Climb> = (0..count)
            .into_par_iter()
            .map(|index| {
                let renderer = self.renderer(extent, &draws, index);
                let epsilon = self.parameter_epsilon.value();
                let mut start = self.stream(&draws, index, 0);
                let mut parameters = renderer.start(epsilon, &mut start);
                self.project(&mut parameters);
                Climb {
                    renderer,
                    parameters,
                }
            })
            .collect();
        // Redraws what the corruption draws for every rendering, and renders.
        let render = |climbs: &mut [Climb], step: u64| -> Vec<Vec<f32>> {
            let images = climbs.par_iter_mut().zip(clean.par_chunks_exact(pixels));
            let images = images.enumerate().map(|(index, (climb, clean))| {
                climb
                    .renderer
                    .redraw(&mut self.stream(&draws, index, step + 1));
                climb.renderer.render(clean, &climb.parameters)
            });
            images.collect()
        };
        for step in 0..self.steps {
            let images = render(&mut climbs, step).concat();
            let images = from_vec(images, [count, 3, height, width], &device);
            let slopes = to_vec(gradient(images)?);
            let climbs = climbs.par_iter_mut().zip(clean.par_chunks_exact(pixels));
            let climbs = climbs.zip(slopes.par_chunks_exact(pixels));
            climbs.for_each(|((climb, clean), slopes)| {
                let slopes = climb.renderer.pull(clean, &climb.parameters, slopes);
                self.step(&mut climb.parameters, &slopes);
            });
        }
        let images = render(&mut climbs, self.steps);
        let parameters = climbs.into_iter().map(|climb| climb.parameters);
        Some(images.into_iter().zip(parameters).collect())
    }

    fn renderer(&self, extent: Extent, draws: &Draws, index: usize) -> Box<dyn Renderer> {
        let mut rng = draws.stream(index, 2 * self.corruption as usize, 0);
        self.preset.renderer(self.corruption, extent, &mut rng)
    }

    /// Returns the stream of the start (iteration 0) or of what a rendering draws. Every corruption has streams of its own.
    fn stream(&self, draws: &Draws, index: usize, iteration: u64) -> Rng {
        draws.stream(index, 2 * self.corruption as usize + 1, iteration as usize)
    }

    /// Takes a step of steepest ascent and projects to the parameter set.
    ///
    /// As in the reference, all corruptions but pixelation step along the sign, also those whose parameters are bounded in
    /// l2.
    fn step(&self, parameters: &mut [f32], slopes: &[f32]) {
        let size = self.step_size as f32;
        // Sums of the largest gradients overflow.
        let finite = |slope: &f32| match slope.is_nan() {
            true => 0.0,
            false => f64::from(slope.clamp(f32::MIN, f32::MAX)),
        };
        let length = Norm::L2.length(slopes.iter().map(finite));
        let unit = self.step_size / (length + 1e-8);
        for (parameter, slope) in parameters.iter_mut().zip(slopes) {
            *parameter += match self.corruption {
                Corruption::Pixel => (finite(slope) * unit) as f32,
                _ if *slope > 0.0 => size,
                _ if *slope < 0.0 => -size,
                _ => 0.0,
            };
        }
        self.project(parameters);
    }

    /// Projects to the parameter set: the ball of the norm, and for pixelation also shares in [0, 1].
    fn project(&self, parameters: &mut [f32]) {
        let epsilon = self.parameter_epsilon.value();
        let scale = match self.parameter_norm {
            Norm::Linf => 1.0,
            norm => {
                let length = norm.length(parameters.iter().map(|value| f64::from(*value)));
                (epsilon / length.max(f64::MIN_POSITIVE)).min(1.0)
            }
        };
        let [low, high] = match (self.corruption, self.parameter_norm) {
            (Corruption::Pixel, _) => [0.0, 1.0],
            (_, Norm::Linf) => [-epsilon as f32, epsilon as f32],
            _ => [f32::MIN, f32::MAX],
        };
        for parameter in parameters {
            *parameter = ((f64::from(*parameter) * scale) as f32).clamp(low, high);
        }
    }
}

/// The corruption of an image and its current parameters.
struct Climb {
    renderer: Box<dyn Renderer>,
    parameters: Vec<f32>,
}
