//! Losses of evaluation attacks and their derivatives, as functions of the logits of one image.
//!
//! Computed in f64 on the host, since attacks make decisions per image from these numbers. The model's part of the
//! gradient follows from the slope ([`crate::attack::target_model::TargetModel::climb`]).
//! Source: Croce and Hein 2020 (arXiv:2003.01690), section 4; `tests/attacks.rs` compares them with the reference.

/// Added to denominators to keep quotients finite.
const TINY: f64 = 1e-12;

/// A loss of one image's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Cross entropy with the label.
    CrossEntropy {
        /// The class of the image.
        label: usize,
    },
    /// Margin of the probabilities, `max p_i - p_y` over the other classes, of the softmax `p` of the logits.
    /// Source: Xie et al. 2024 (arXiv:2411.15210), probability margin loss.
    ProbabilityMargin {
        /// The class of the image.
        label: usize,
    },
    /// Difference of logits ratio: `-(z_y - max z_i) / (z_(1) - z_(3))`, where `z_(k)` is the k-th largest.
    Dlr {
        /// The class of the image.
        label: usize,
    },
    /// Targeted DLR: `-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)`.
    TargetedDlr {
        /// The class of the image.
        label: usize,
        /// The class to reach.
        target: usize,
    },
    /// `z_t - z_y`, which is 0 on the decision boundary.
    Difference {
        /// The class of the image.
        label: usize,
        /// The class to reach.
        target: usize,
    },
}

impl Goal {
    /// Returns the class of the image.
    pub fn label(self) -> usize {
        match self {
            Self::CrossEntropy { label }
            | Self::ProbabilityMargin { label }
            | Self::Dlr { label }
            | Self::TargetedDlr { label, .. }
            | Self::Difference { label, .. } => label,
        }
    }

    /// Returns the loss and writes its derivative with respect to the logits to `slope`.
    ///
    /// With too few classes for a ratio's denominator, the available logits are used instead; with two classes the loss
    /// is the difference alone.
    /// The slope is zero if there is nothing to maximize: non-finite logits (the loss is infinite, since such an image
    /// is already fooled), a label or target out of range, or a single class.
    ///
    /// Shapes: `logits` and `slope` `[classes]`.
    pub fn slope(self, logits: &[f32], slope: &mut [f32]) -> f64 {
        slope.fill(0.0);
        if !are_finite(logits) {
            return f64::INFINITY;
        }
        let exists = |class: usize| class < logits.len();
        match self {
            Self::CrossEntropy { label } if exists(label) => cross_entropy(logits, label, slope),
            Self::ProbabilityMargin { label } if exists(label) => {
                probability_margin(logits, label, slope)
            }
            Self::Dlr { label } if exists(label) => {
                let order = largest(logits, 3);
                let Some(rival) = order.iter().copied().find(|class| *class != label) else {
                    return 0.0;
                };
                let below = order.get(2).map(|third| [(order[0], 1.0), (*third, -1.0)]);
                ratio(logits, label, rival, below.as_ref().map(|b| &b[..]), slope)
            }
            Self::TargetedDlr { label, target } if exists(label) && exists(target) => {
                let order = largest(logits, 4);
                let below: Option<Vec<(usize, f64)>> = match order[..] {
                    [first, _, third, fourth] => {
                        Some(vec![(first, 1.0), (third, -0.5), (fourth, -0.5)])
                    }
                    [first, _, third] => Some(vec![(first, 1.0), (third, -1.0)]),
                    _ => None,
                };
                ratio(logits, label, target, below.as_deref(), slope)
            }
            Self::Difference { label, target } if exists(label) && exists(target) => {
                ratio(logits, label, target, None, slope)
            }
            _ => 0.0,
        }
    }
}

/// Whether all logits are finite.
pub(crate) fn are_finite(logits: &[f32]) -> bool {
    logits.iter().all(|logit| logit.is_finite())
}

/// Returns `-(z_label - z_rival) / (sum of weight * z)`, with the sum over `below`; without `below`, no denominator.
fn ratio(
    logits: &[f32],
    label: usize,
    rival: usize,
    below: Option<&[(usize, f64)]>,
    slope: &mut [f32],
) -> f64 {
    let z = |class: usize| f64::from(logits[class]);
    let denominator = below.map_or(1.0, |below| {
        below
            .iter()
            .map(|(class, weight)| weight * z(*class))
            .sum::<f64>()
            + TINY
    });
    let value = (z(rival) - z(label)) / denominator;
    // Nearly equal logits give slopes too large for f32, whose gradients would not be finite.
    let mut add = |class: usize, amount: f64| {
        slope[class] = (slope[class] + amount as f32).clamp(f32::MIN, f32::MAX);
    };
    add(rival, 1.0 / denominator);
    add(label, -1.0 / denominator);
    for (class, weight) in below.unwrap_or_default() {
        add(*class, -value * weight / denominator);
    }
    value
}

fn cross_entropy(logits: &[f32], label: usize, slope: &mut [f32]) -> f64 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let shifted = |logit: f32| f64::from(logit) - f64::from(most);
    let sum: f64 = logits.iter().map(|logit| shifted(*logit).exp()).sum();
    let others: f64 = {
        let others = logits
            .iter()
            .enumerate()
            .filter(|(class, _)| *class != label);
        others.map(|(_, logit)| shifted(*logit).exp()).sum()
    };
    for (slope, logit) in slope.iter_mut().zip(logits) {
        *slope = (shifted(*logit).exp() / sum) as f32;
    }
    // For a confident correct prediction 1 - p would cancel to 0; the sum over the other classes does not.
    slope[label] = -(others / sum) as f32;
    sum.ln() - shifted(logits[label])
}

/// Returns `p_r - p_y` with `r` the most likely other class. Its derivative by the logit of class `i` is
/// `p_r [i = r] - p_y [i = y] - p_i (p_r - p_y)`.
fn probability_margin(logits: &[f32], label: usize, slope: &mut [f32]) -> f64 {
    let Some(rival) = largest(logits, 2).into_iter().find(|class| *class != label) else {
        return 0.0;
    };
    let most = f64::from(logits[rival].max(logits[label]));
    let power = |class: usize| (f64::from(logits[class]) - most).exp();
    // Of a confident prediction 1 - p would cancel to 0; the sum over the other classes does not.
    let others = (0..logits.len()).filter(|class| *class != label && *class != rival);
    let others: f64 = others.map(power).sum();
    let sum = others + power(label) + power(rival);
    let [p_label, p_rival] = [label, rival].map(|class| power(class) / sum);
    let not_label = (others + power(rival)) / sum;
    let not_rival = (others + power(label)) / sum;
    for (class, slope) in slope.iter_mut().enumerate() {
        *slope = (power(class) / sum * (p_label - p_rival)) as f32;
    }
    slope[label] = (-p_label * (not_label + p_rival)) as f32;
    slope[rival] = (p_rival * (not_rival + p_label)) as f32;
    p_rival - p_label
}

/// Returns the classes of the `count` largest logits, largest first. Ties go to the lower class.
pub(crate) fn largest(logits: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let by_size = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, by_size);
        order.truncate(count);
    }
    order.sort_unstable_by(by_size);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_are_the_derivatives_of_the_values() {
        let logits = [0.3f32, 2.0, -1.0, 0.9, 1.1];
        for goal in [
            Goal::CrossEntropy { label: 1 },
            Goal::ProbabilityMargin { label: 1 },
            Goal::ProbabilityMargin { label: 2 },
            Goal::Dlr { label: 1 },
            Goal::Dlr { label: 2 },
            Goal::TargetedDlr {
                label: 1,
                target: 4,
            },
            Goal::TargetedDlr {
                label: 0,
                target: 2,
            },
            Goal::Difference {
                label: 1,
                target: 3,
            },
        ] {
            let mut slope = [0.0; 5];
            goal.slope(&logits, &mut slope);
            for class in 0..5 {
                let step = 1.0 / 1024.0; // exact in f32
                let at = |change: f32| {
                    let mut moved = logits;
                    moved[class] += change;
                    goal.slope(&moved, &mut [0.0; 5])
                };
                let right = (at(step) - at(-step)) / f64::from(2.0 * step);
                let off = (f64::from(slope[class]) - right).abs();
                assert!(
                    off < 1e-5,
                    "{goal:?} class {class}: {} is not {right}",
                    slope[class]
                );
            }
        }
    }

    #[test]
    fn two_and_three_classes_have_losses_too() {
        let mut slope = [0.0; 2];
        let goal = Goal::Dlr { label: 0 };
        assert_eq!(goal.slope(&[2.0, 0.5], &mut slope), -1.5);
        assert_eq!(slope, [-1.0, 1.0]);
        let mut slope = [0.0; 3];
        let goal = Goal::TargetedDlr {
            label: 0,
            target: 2,
        };
        let value = goal.slope(&[3.0, 2.0, 1.0], &mut slope);
        assert!(
            (value + 1.0).abs() < 1e-9,
            "(1 - 3) / (3 - 1) is not {value}"
        );
    }

    #[test]
    fn the_margin_of_a_confident_prediction_keeps_its_slope() {
        let mut slope = [0.0; 3];
        let goal = Goal::ProbabilityMargin { label: 0 };
        // In f32, and even in f64, 1 - p_y is exactly 0 here.
        assert_eq!(goal.slope(&[60.0, 0.0, -5.0], &mut slope), -1.0);
        let p = (-60.0f64).exp();
        for (slope, right) in
            slope
                .into_iter()
                .zip([-2.0 * p - p * (-5.0f64).exp(), 2.0 * p, p * (-5.0f64).exp()])
        {
            let off = (f64::from(slope) - right).abs();
            assert!(off < 1e-6 * right.abs(), "{slope} is not {right}");
        }
        assert_eq!(goal.slope(&[1.0], &mut [7.0]), 0.0);
    }

    const KINDS: [fn(usize, usize) -> Goal; 5] = [
        |label, _| Goal::CrossEntropy { label },
        |label, _| Goal::ProbabilityMargin { label },
        |label, _| Goal::Dlr { label },
        |label, target| Goal::TargetedDlr { label, target },
        |label, target| Goal::Difference { label, target },
    ];

    #[test]
    fn invalid_logits_labels_and_targets_have_zero_slope() {
        for kind in KINDS {
            for (logits, label) in [
                (&[][..], 0),
                (&[1.0][..], 0),
                (&[1.0, 2.0, 3.0, 4.0, 5.0][..], 5),
            ] {
                let mut slope = vec![7.0; logits.len()];
                assert_eq!(kind(label, 9).slope(logits, &mut slope), 0.0);
                assert!(slope.iter().all(|slope| *slope == 0.0), "{slope:?}");
            }
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut slope = [7.0; 3];
                let loss = kind(0, 1).slope(&[1.0, bad, 0.5], &mut slope);
                assert_eq!((loss, slope), (f64::INFINITY, [0.0; 3]));
            }
        }
    }

    #[test]
    fn losses_and_slopes_of_finite_logits_are_finite() {
        let logits = [f32::MAX, f32::MIN, 0.0, 1e-38, 1.0, 1.0, 1.0, 1.0];
        for kind in KINDS {
            for classes in 1..=logits.len() {
                for (label, target) in (0..classes).flat_map(|l| (0..classes).map(move |t| (l, t)))
                {
                    let mut rows = vec![logits[..classes].to_vec(), vec![3e38; classes]];
                    rows.push(logits[logits.len() - classes..].to_vec());
                    for row in rows {
                        let mut slope = vec![0.0; classes];
                        let loss = kind(label, target).slope(&row, &mut slope);
                        assert!(loss.is_finite(), "{:?} {row:?}", kind(label, target));
                        assert!(are_finite(&slope), "{:?} {row:?}", kind(label, target));
                    }
                }
            }
        }
    }
}
