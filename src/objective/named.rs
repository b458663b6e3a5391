//! The named objectives as weighted sums: what each paper minimizes, and what its attack maximizes.
//!
//! `x` is a clean image, `x'` the adversarial one, `f` the model in training, `g` a frozen reference.

use super::weighted::Point::{Output, Reference, Stopped};
use super::weighted::View::{Adversarial, Clean};
use super::weighted::{Space, Term, TermKind};
use crate::ops::RowDistance;
use crate::recipe::ObjectiveConfig;

/// The terms that an objective minimizes, then those that its attack maximizes; `None` for cross entropy and the
/// contrastive loss, which have a single term that the attack shares.
pub fn terms(objective: &ObjectiveConfig) -> Option<[Vec<Term>; 2]> {
    let term = |weight, kind| Term { weight, kind };
    let distance = |kind, from, to| TermKind::Distance(kind, from, to, Space::Outputs);
    Some(match objective {
        ObjectiveConfig::CrossEntropy(_) | ObjectiveConfig::Contrastive(_) => return None,
        // CE(f(x), y) + beta KL(f(x) || f(x'))
        ObjectiveConfig::Trades(trades) => {
            let divergence = |from| distance(RowDistance::Kl, from, Output(Adversarial));
            [
                vec![
                    term(1.0, TermKind::CrossEntropy(Clean)),
                    term(trades.beta, divergence(Output(Clean))),
                ],
                vec![term(1.0, divergence(Reference(Clean)))],
            ]
        }
        // |f(x') - g(x)|^2
        ObjectiveConfig::Fare(_) => {
            let (from, to) = (Output(Adversarial), Reference(Clean));
            let away = vec![term(1.0, distance(RowDistance::SquaredL2, from, to))];
            [away.clone(), away]
        }
        // CE(scale cos(f(x'), t), y)
        ObjectiveConfig::Tecoa(_) => {
            let wrong = vec![term(1.0, TermKind::CrossEntropy(Adversarial))];
            [wrong.clone(), wrong]
        }
        // -cos(f(x'), sg f(x)) / 2 - cos(f(x), sg f(x')) / 2
        ObjectiveConfig::SimClip(_) => {
            let apart = |from, to| distance(RowDistance::Cosine, from, to);
            [
                vec![
                    term(0.5, apart(Output(Adversarial), Stopped(Clean))),
                    term(0.5, apart(Output(Clean), Stopped(Adversarial))),
                ],
                vec![term(1.0, apart(Output(Adversarial), Reference(Clean)))],
            ]
        }
        // Contrastive + features (|f(x') - g(x')| + |f(x') - f(x)|) + logits (KL(f(x') || g(x')) + KL(f(x') || f(x)))
        ObjectiveConfig::Advflyp(advflyp) => {
            let mut terms = vec![term(1.0, TermKind::Contrastive)];
            let regularizers = [
                (advflyp.features, RowDistance::L2, Space::UnitLength),
                (
                    advflyp.logits,
                    RowDistance::Kl,
                    Space::Captions(advflyp.scale),
                ),
            ];
            for (weight, kind, space) in regularizers {
                if weight > 0.0 {
                    for to in [Reference(Adversarial), Output(Clean)] {
                        let kind = TermKind::Distance(kind, Output(Adversarial), to, space);
                        terms.push(term(weight, kind));
                    }
                }
            }
            [terms, vec![term(1.0, TermKind::Contrastive)]]
        }
        // -cos(f(x), g(x)) - gamma cos(f(x'), f(x))
        ObjectiveConfig::Deacl(deacl) => {
            let apart = |from, to| distance(RowDistance::Cosine, from, to);
            [
                vec![
                    term(1.0, apart(Output(Clean), Reference(Clean))),
                    term(deacl.gamma, apart(Output(Adversarial), Output(Clean))),
                ],
                vec![term(1.0, apart(Output(Adversarial), Reference(Clean)))],
            ]
        }
        // CE(f(x), y) + weight (CE(f(x + step sign(g)), y) - CE(f(x), y)) / step
        ObjectiveConfig::GradientNorm(config) => {
            let share = config.weight / config.step.value();
            [
                vec![
                    term(1.0 - share, TermKind::CrossEntropy(Clean)),
                    term(share, TermKind::CrossEntropy(Adversarial)),
                ],
                vec![term(1.0, TermKind::CrossEntropy(Adversarial))],
            ]
        }
    })
}
