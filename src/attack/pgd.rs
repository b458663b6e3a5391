//! Projected gradient descent (PGD, Madry et al. 2018), the attack used in training and in the paper's ablations.

use burn::tensor::Tensor;

use super::draws::Draws;
use super::gradient::input_gradient;
use super::threat::{Ball, Norm};
use crate::rng::AttackKind;
use crate::settings::{Table, settings, words};
use crate::units::Fraction;

settings! {
    /// PGD: projected gradient ascent on the loss, applied to each batch.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Pgd(table) {
        /// Norm that bounds the perturbation.
        pub norm: Norm { example: "\"linf\"" },
        /// Maximum size of the perturbation in this norm, for pixels in [0, 1].
        pub epsilon: Fraction { limits: at_least(0.0), example: "\"4/255\"" },
        /// Step size in this norm, for pixels in [0, 1].
        pub step_size: Fraction { limits: above(0.0), example: "\"1/255\"" },
        /// Number of steps. Each costs one forward and one backward pass.
        pub steps: u64 { limits: within(1.0, 1e6), example: "3" },
        /// Starting point of the attack.
        pub start: Start { example: "\"random\"" },
    }
    check { check_range(table, norm, epsilon.as_ref()) }
}

/// Rejects an epsilon given in units of 0 to 255.
pub(crate) fn check_range(table: &Table, norm: Option<Norm>, epsilon: Option<&Fraction>) {
    if norm == Some(Norm::Linf) && epsilon.is_some_and(|epsilon| epsilon.value() > 1.0) {
        let message = "epsilon is larger than the range of a pixel";
        let hint = "pixels are in [0, 1]: use 8/255, not 8";
        table.problem_with_hint("epsilon", message, hint);
    }
}

words! {
    /// Starting point of an attack.
    pub enum Start {
        /// A random point in the epsilon ball.
        Random = "random",
        /// The clean image.
        Clean = "clean",
    }
}

impl Pgd {
    /// Returns the attack with epsilon and step size scaled by `share`.
    pub fn weakened(&self, share: f64) -> Self {
        Self {
            epsilon: self.epsilon.times(share),
            step_size: self.step_size.times(share),
            ..self.clone()
        }
    }

    /// Maximizes `loss` from each image within the threat model.
    ///
    /// `keys` select the images' random starts.
    ///
    /// Shapes: `images` and the result `[batch, 3, height, width]`; `loss` returns one value per image. Results are
    /// independent of the batch if an image's loss depends on that image alone.
    /// Units: pixels in [0, 1].
    /// Source: Madry et al. 2018, section 2.1; same as AdvXL's attacker except for the start, see [`Ball::sample`].
    pub fn perturb(
        &self,
        images: Tensor<4>,
        loss: &dyn Fn(Tensor<4>) -> Tensor<1>,
        seed: u64,
        keys: &[u64],
    ) -> Tensor<4> {
        let draws = Draws::new(seed, keys, AttackKind::Pgd);
        self.climb(images, &|images| input_gradient(loss, images).0, &draws)
    }

    /// Like [`Self::perturb`], with a function that returns the gradient of the loss.
    pub fn climb(
        &self,
        images: Tensor<4>,
        gradient: &dyn Fn(Tensor<4>) -> Tensor<4>,
        draws: &Draws,
    ) -> Tensor<4> {
        if self.epsilon.value() <= 0.0 {
            return images;
        }
        let ball = Ball::new(self.norm, self.epsilon.value(), images.clone());
        let size = self.step_size.value().min(f64::from(f32::MAX)) as f32;
        let sizes = vec![size; images.dims()[0]];
        let mut adversarial = match self.start {
            Start::Clean => images,
            Start::Random => ball.sample(draws),
        };
        for _ in 0..self.steps {
            let gradient = gradient(adversarial.clone());
            adversarial = ball.step(adversarial, gradient, &sizes);
        }
        adversarial
    }

    /// Returns the attack's name as shown in tables, such as `pgd-20`.
    pub fn name(&self) -> String {
        format!("pgd-{}", self.steps)
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::ops::{Device, from_vec, to_vec};

    fn pgd(norm: Norm, epsilon: &str, step_size: &str, steps: u64) -> Pgd {
        let fraction = |text: &str| text.parse().unwrap();
        let (epsilon, step_size) = (fraction(epsilon), fraction(step_size));
        Pgd {
            norm,
            epsilon,
            step_size,
            steps,
            start: Start::Clean,
        }
    }

    /// For a linear loss the optimum in each ball is known analytically.
    #[test]
    fn pgd_on_a_linear_loss_finds_the_optimum_of_each_ball() {
        let device = Device::cpu();
        let grey = from_vec(vec![0.5; 3], [1, 3, 1, 1], &device);
        let slope = from_vec(vec![3.0, -4.0, 0.0], [1, 3, 1, 1], &device);
        let loss = |images: Tensor<4>| (images * slope.clone()).sum();
        for (norm, best_move) in [
            (Norm::Linf, [0.1, -0.1, 0.0]), // every pixel as far as it goes
            (Norm::L2, [0.06, -0.08, 0.0]), // along the slope
            (Norm::L1, [0.0, -0.1, 0.0]),   // all of it on the steepest pixel
        ] {
            let found = pgd(norm, "0.1", "0.05", 4).perturb(grey.clone(), &loss, 0, &[0]);
            let moved = to_vec(found - grey.clone());
            for (found, best) in moved.iter().zip(best_move) {
                assert!((found - best).abs() < 1e-6, "{norm:?}: {moved:?}");
            }
        }
    }

    #[test]
    fn attack_at_epsilon_zero_returns_the_clean_image() {
        let images = from_vec(vec![0.2, 0.4, 0.9], [1, 3, 1, 1], &Device::cpu());
        let loss = |images: Tensor<4>| images.sum();
        for norm in [Norm::Linf, Norm::L2, Norm::L1] {
            let attack = Pgd {
                start: Start::Random,
                ..pgd(norm, "0", "0.1", 3)
            };
            let found = attack.perturb(images.clone(), &loss, 0, &[0]);
            assert_eq!(to_vec(found), to_vec(images.clone()));
        }
    }

    #[test]
    fn a_random_start_that_would_leave_the_range_is_clipped_to_it() {
        let white = from_vec(vec![1.0; 3 * 64], [1, 3, 8, 8], &Device::cpu());
        let seen = std::cell::RefCell::new(Vec::new());
        let loss = |images: Tensor<4>| {
            seen.borrow_mut()
                .push(to_vec(images.clone().without_autodiff()));
            images.sum()
        };
        let attack = Pgd {
            start: Start::Random,
            ..pgd(Norm::Linf, "8/255", "8/255", 1)
        };
        attack.perturb(white, &loss, 0, &[0]);
        assert!(
            seen.borrow()
                .iter()
                .flatten()
                .all(|pixel| (0.0..=1.0).contains(pixel))
        );
    }
}
