//! The attack on a training batch: PGD or APGD, in one norm or in several.

use burn::tensor::Tensor;

use super::apgd::maximize;
use super::draws::Draws;
use super::gradient::AttackLoss;
use super::pgd::Pgd;
use crate::ops::{replace_rows, to_vec};
use crate::settings::{Words, words};

words! {
    /// How the attack's steps are chosen.
    pub enum Algorithm {
        /// PGD: steps of `step_size` along the gradient's direction in the norm.
        Pgd = "pgd",
        /// APGD (Croce and Hein 2020): adaptive step sizes that start at twice epsilon (l1: epsilon), momentum, and the
        /// iterate with the largest loss. Costs one forward pass more.
        Apgd = "apgd",
    }
}

words! {
    /// How several norms share the batches.
    pub enum Combine {
        /// One norm per batch, in turn (E-AT, Croce and Hein 2022). Costs as much as a single norm.
        Alternate = "alternate",
        /// All norms for each batch; of each image the result with the largest loss (MAX, Tramer and Boneh 2019).
        Worst = "worst",
    }
}

/// An attack on whole batches with any loss.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchAttack {
    /// How steps are chosen.
    pub algorithm: Algorithm,
    /// The norms, at least one, each with its epsilon and step size; steps and start are the same in all. APGD ignores
    /// the step size.
    pub threats: Vec<Pgd>,
    /// How the norms share the batches.
    pub combine: Combine,
}

impl BatchAttack {
    /// Creates PGD in one norm.
    pub fn pgd(pgd: Pgd) -> Self {
        Self {
            algorithm: Algorithm::Pgd,
            threats: vec![pgd],
            combine: Combine::Alternate,
        }
    }

    /// Perturbs a batch; `number` counts the batches of the run.
    ///
    /// Shapes: `images` and the result `[batch, 3, height, width]`. Units: pixels in [0, 1].
    pub fn perturb(
        &self,
        images: Tensor<4>,
        loss: &AttackLoss,
        draws: &Draws,
        number: u64,
    ) -> Tensor<4> {
        let count = self.threats.len();
        if count == 1 || self.combine == Combine::Alternate {
            let threat = &self.threats[(number % count as u64) as usize];
            return self.in_norm(threat, images, loss, draws).0;
        }
        let mut worst: Option<(Tensor<4>, Vec<f32>)> = None;
        for threat in &self.threats {
            let (found, losses) = self.in_norm(threat, images.clone(), loss, draws);
            let losses = losses.unwrap_or_else(|| to_vec((loss.losses)(&found)));
            worst = Some(match worst {
                None => (found, losses),
                Some((images, before)) => {
                    let pairs = before.iter().zip(&losses);
                    let larger: Vec<bool> = pairs.clone().map(|(old, new)| new > old).collect();
                    let losses = pairs.map(|(old, new)| old.max(*new)).collect();
                    (replace_rows(images, &found, &larger), losses)
                }
            });
        }
        worst.expect("an attack has a norm").0
    }

    /// Attacks in one norm. Also returns the loss of each image if the attack computed it.
    fn in_norm(
        &self,
        threat: &Pgd,
        images: Tensor<4>,
        loss: &AttackLoss,
        draws: &Draws,
    ) -> (Tensor<4>, Option<Vec<f32>>) {
        match self.algorithm {
            Algorithm::Pgd => {
                let gradient = |images| (loss.gradient)(images).0;
                (threat.climb(images, &gradient, draws), None)
            }
            Algorithm::Apgd => maximize(threat, images, loss, draws),
        }
    }

    /// Returns the attack with epsilon and step size scaled by `share`.
    pub fn weakened(&self, share: f64) -> Self {
        let threats = self.threats.iter().map(|threat| threat.weakened(share));
        Self {
            threats: threats.collect(),
            ..self.clone()
        }
    }

    /// Returns the gradients per image of a batch.
    pub fn gradients(&self) -> u64 {
        self.threats[0].steps * self.runs()
    }

    /// Returns the forward passes per image of a batch besides those of the gradients.
    pub fn extra_passes(&self) -> u64 {
        let needs_losses = self.algorithm == Algorithm::Apgd || self.runs() > 1;
        self.runs() * u64::from(needs_losses)
    }

    /// Returns the number of norms that attack each batch.
    fn runs(&self) -> u64 {
        match self.combine {
            Combine::Alternate => 1,
            Combine::Worst => self.threats.len() as u64,
        }
    }

    /// Returns the name as shown in tables, such as `pgd-2`.
    pub fn name(&self) -> String {
        format!("{}-{}", self.algorithm.word(), self.threats[0].steps)
    }

    /// Describes the attack, such as `pgd-2 linf 8/255`.
    pub fn describe(&self) -> String {
        let norms = self.threats.iter();
        let norms: Vec<String> = norms
            .map(|threat| format!("{} {}", threat.norm.word(), threat.epsilon))
            .collect();
        let how = match (norms.len(), self.combine) {
            (1, _) => "",
            (_, Combine::Alternate) => ", alternating",
            (_, Combine::Worst) => ", the worst",
        };
        format!("{} {}{how}", self.name(), norms.join(" and "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::pgd::Start;
    use crate::attack::{Norm, input_gradient};
    use crate::ops::{Device, from_vec};
    use crate::rng::AttackKind;

    fn threat(norm: Norm, epsilon: &str, steps: u64) -> Pgd {
        Pgd {
            norm,
            epsilon: epsilon.parse().unwrap(),
            step_size: epsilon.parse().unwrap(),
            steps,
            start: Start::Clean,
        }
    }

    /// Runs an attack on the loss `sum(slope * images)`.
    fn perturbed(attack: &BatchAttack, slope: &[f32], number: u64) -> Vec<f32> {
        let device = Device::cpu();
        let count = slope.len() / 3;
        let images = from_vec(vec![0.5; slope.len()], [count, 3, 1, 1], &device);
        let slope = from_vec(slope.to_vec(), [count, 3, 1, 1], &device);
        let loss = |images: Tensor<4>| {
            (images * slope.clone())
                .reshape([count, 3])
                .sum_dim(1)
                .squeeze_dim(1)
        };
        let loss = AttackLoss {
            gradient: &|images| input_gradient(&loss, images),
            losses: &|images| loss(images.clone()),
        };
        let keys: Vec<u64> = (0..count as u64).collect();
        let draws = Draws::new(0, &keys, AttackKind::Pgd);
        to_vec(attack.perturb(images, &loss, &draws, number))
    }

    fn assert_close(found: &[f32], right: &[f32]) {
        let pairs = found.iter().zip(right);
        assert!(
            pairs.clone().all(|(a, b)| (a - b).abs() < 1e-6),
            "{found:?} {right:?}"
        );
    }

    /// For a linear loss the optimum in each ball is known analytically.
    #[test]
    fn apgd_finds_the_optimum_of_a_linear_loss_in_each_ball() {
        let slope = [3.0, -4.0, 0.0];
        for (norm, right) in [
            (Norm::Linf, [0.6, 0.4, 0.5]),
            (Norm::L2, [0.56, 0.42, 0.5]),
            (Norm::L1, [0.5, 0.4, 0.5]),
        ] {
            let attack = BatchAttack {
                algorithm: Algorithm::Apgd,
                ..BatchAttack::pgd(threat(norm, "0.1", 10))
            };
            assert_close(&perturbed(&attack, &slope, 0), &right);
        }
    }

    #[test]
    fn norms_alternate_by_batch_or_the_worst_is_chosen_for_each_image() {
        let mut attack = BatchAttack::pgd(threat(Norm::Linf, "0.1", 1));
        attack.threats.push(threat(Norm::L2, "0.2", 1));
        let slope = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0];
        let third = 0.5 + 0.2 / 3f32.sqrt();
        let linf = [0.6, 0.6, 0.6, 0.6, 0.5, 0.5];
        let l2 = [third, third, third, 0.7, 0.5, 0.5];
        assert_close(&perturbed(&attack, &slope, 0), &linf);
        assert_close(&perturbed(&attack, &slope, 1), &l2);
        assert_close(&perturbed(&attack, &slope, 2), &linf);
        attack.combine = Combine::Worst;
        // 3 * 0.1 = 0.3 is less than 3 * 0.1155 = 0.346: l2 wins for the first too.
        assert_close(&perturbed(&attack, &slope, 0), &l2);
        attack.threats[0] = threat(Norm::Linf, "0.15", 1);
        let worst = [0.65, 0.65, 0.65, 0.7, 0.5, 0.5];
        assert_close(&perturbed(&attack, &slope, 0), &worst);
        assert_eq!((attack.gradients(), attack.extra_passes()), (2, 2));
    }
}
