//! The objective of a stage: which loss training minimizes and which its attack maximizes.
//!
//! `x` is a clean image, `x'` the adversarial one, `f` the model in training, `g` a frozen reference, `y` the label. The
//! attack maximizes the loss in evaluation mode with the weights frozen. [`crate::objective::named`] builds the terms.

use std::path::PathBuf;

use serde::Serialize;
use serde::ser::SerializeMap;

use crate::attack::{BatchAttack, Norm, Pgd, Start};
use crate::settings::{Described, Field, Key, Kind, Section, Table, settings, words};
use crate::units::Fraction;

words! {
    /// Name of an objective.
    pub enum ObjectiveKind {
        /// Adversarial training with labels.
        CrossEntropy = "cross_entropy",
        /// CLIP's contrastive loss between adversarial images and captions.
        Contrastive = "contrastive",
        /// TRADES: clean accuracy, and equal predictions for clean and adversarial images.
        Trades = "trades",
        /// FARE: adversarial embeddings stay where a frozen model's clean embeddings are.
        Fare = "fare",
        /// TeCoA: cross entropy over the embedded class names.
        Tecoa = "tecoa",
        /// Sim-CLIP: adversarial and clean embeddings of the same model agree.
        SimClip = "sim_clip",
        /// AdvFLYP: the contrastive loss, close to a frozen model.
        Advflyp = "advflyp",
        /// DeACL: distillation of a frozen teacher, and agreement under attack.
        Deacl = "deacl",
        /// A penalty on the norm of the input gradient, without an attack.
        GradientNorm = "gradient_norm",
    }
}

settings! {
    /// Adversarial training with labels (Madry et al. 2018): `CE(f(x'), y)`, which the attack maximizes too.
    #[derive(Clone, Debug, PartialEq)]
    pub struct CrossEntropy(table) {
        /// Name of the objective.
        pub kind: ObjectiveKind { kind: Kind::Words(&[("cross_entropy", "")]) },
        /// Label smoothing: fraction of the target spread evenly over all classes.
        pub label_smoothing: f64 { limits: at_least(0.0).below(1.0), example: "0.1" } [= 0.0],
    }
}

settings! {
    /// CLIP's contrastive loss between adversarial images and captions (AdvXL, equations 2 and 3), with a trained
    /// temperature. The attack maximizes it too. Requires captions and the table `text`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Contrastive(table) {
        /// Name of the objective.
        pub kind: ObjectiveKind { kind: Kind::Words(&[("contrastive", "")]) },
    }
}

settings! {
    /// TRADES (Zhang et al. 2019, equation 5): `CE(f(x), y) + beta KL(f(x) || f(x'))`. The attack maximizes the
    /// divergence, whose gradient is zero at the clean image: it needs a random start. The paper uses beta = 6 on
    /// CIFAR-10, Wang et al. 2023 use 5 with generated images.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Trades(table) {
        /// Name of the objective.
        pub kind: ObjectiveKind { kind: Kind::Words(&[("trades", "")]) },
        /// Weight of the divergence.
        pub beta: f64 { limits: above(0.0), example: "6" } [= 6.0],
        /// Label smoothing: fraction of the target spread evenly over all classes.
        pub label_smoothing: f64 { limits: at_least(0.0).below(1.0), example: "0.1" } [= 0.0],
    }
}

settings! {
    /// FARE (Schlarmann et al. 2024, equation 2): `|f(x') - g(x)|^2` with the frozen reference `g`, which the attack
    /// maximizes too. No labels and no captions. Fine-tunes an image encoder, from `start`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Fare(table) {
        /// Name of the objective.
        pub kind: ObjectiveKind { kind: Kind::Words(&[("fare", "")]) },
        /// Weights of the frozen reference; `start.weights` if omitted.
        pub reference: Option<PathBuf> { example: "\"models/clip_vit_l14\"" },
    }
}

settings! {
    /// TeCoA (Mao et al. 2023): cross entropy over the classes, with `scale cos(f(x'), t_c)` as the logit of a class
    /// whose embedded name is `t_c`. The attack maximizes it too. Requires classes and the table `text`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Tecoa(table) {
        /// Name of the objective.
        pub kind: ObjectiveKind { kind: Kind::Words(&[("tecoa", "")]) },
        /// Scale of the similarities: 1 / temperature. CLIP's is 100.
        pub scale: f64 { limits: above(0.0), example: "100" } [= 100.0],
        /// Label smoothing: fraction of the target spread evenly over all classes.
        pub label_smoothing: f64 { limits: at_least(0.0).below(1.0), example: "0.1" } [= 0.0],
    }
}

settings! {
    /// Sim-CLIP (Hossain and Imteaj 2024, equation 5): `-cos(f(x'), sg f(x)) / 2 - cos(f(x), sg f(x')) / 2`, where `sg`
    /// stops the gradient. The attack maximizes `-cos(f(x'), f(x))`. No labels and no captions. Fine-tunes an image
    /// encoder, from `start`. The authors' code differs: it uses the original model's `g(x)` in place of `f(x)`.
    #[derive(Clone, Debug, PartialEq)]
    pub struct SimClip(table) {
        /// Name of the objective.
        pub kind: ObjectiveKind { kind: Kind::Words(&[("sim_clip", "")]) },
    }
}

settings! {
    /// AdvFLYP (Xing et al. 2026): the contrastive loss of adversarial images with a fixed temperature, plus
    /// `features (|f(x') - g(x')| + |f(x') - f(x)|)` between embeddings of length 1, plus
    /// `logits (KL(f(x') || g(x')) + KL(f(x') || f(x)))` between softmaxes over the captions of the batch. The attack
    /// maximizes the contrastive loss. Requires captions and a frozen text model.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Advflyp(table) {
        /// Name of the objective.
        pub kind: ObjectiveKind { kind: Kind::Words(&[("advflyp", "")]) },
        /// Weight of the distances between embeddings.
        pub features: f64 { limits: at_least(0.0), example: "1" } [= 1.0],
        /// Weight of the divergences between similarities to captions.
        pub logits: f64 { limits: at_least(0.0), example: "1" } [= 1.0],
        /// Scale of the similarities: 1 / temperature. CLIP's is 100.
        pub scale: f64 { limits: above(0.0), example: "100" } [= 100.0],
        /// Weights of the frozen reference; `start.weights` if omitted.
        pub reference: Option<PathBuf> { example: "\"models/clip_vit_b32\"" },
    }
}

settings! {
    /// DeACL (Zhang et al. 2022, equation 4): `-cos(f(x), g(x)) - gamma cos(f(x'), f(x))` with a frozen, self-supervised
    /// teacher `g`. The attack maximizes `-cos(f(x'), g(x))`. No labels and no captions.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Deacl(table) {
        /// Name of the objective.
        pub kind: ObjectiveKind { kind: Kind::Words(&[("deacl", "")]) },
        /// Weight of the agreement under attack.
        pub gamma: f64 { limits: above(0.0), example: "2" } [= 2.0],
        /// Weights of the frozen teacher; `start.weights` if omitted.
        pub reference: Option<PathBuf> { example: "\"models/teacher\"" },
    }
}

settings! {
    /// Gradient-norm regularization (Rodriguez-Munoz et al. 2024): `CE(f(x), y) + weight |g|_1` with the input gradient
    /// `g` of the cross entropy, without an attack. The norm is a finite difference along its own sign,
    /// `(CE(f(x + step sign(g)), y) - CE(f(x), y)) / step`, which needs no second derivatives. Only for smooth
    /// activations.
    #[derive(Clone, Debug, PartialEq)]
    pub struct GradientNorm(table) {
        /// Name of the objective.
        pub kind: ObjectiveKind { kind: Kind::Words(&[("gradient_norm", "")]) },
        /// Weight of the norm, for pixels in [0, 1].
        pub weight: f64 { limits: above(0.0), example: "1e-3" },
        /// Length of the finite difference, for pixels in [0, 1].
        pub step: Fraction { limits: above(0.0).below(1.0), example: "\"1/255\"" } [= "1/255".parse().expect("a fraction")],
        /// Label smoothing: fraction of the target spread evenly over all classes.
        pub label_smoothing: f64 { limits: at_least(0.0).below(1.0), example: "0.1" } [= 0.0],
    }
}

/// The objective of a stage and its numbers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
#[allow(missing_docs)] // The structs have them.
pub enum ObjectiveConfig {
    CrossEntropy(CrossEntropy),
    Contrastive(Contrastive),
    Trades(Trades),
    Fare(Fare),
    Tecoa(Tecoa),
    SimClip(SimClip),
    Advflyp(Advflyp),
    Deacl(Deacl),
    GradientNorm(GradientNorm),
}

impl Described for ObjectiveConfig {
    const KIND: Kind = Kind::Variants(&[
        ("cross_entropy", CrossEntropy::DESCRIPTION),
        ("contrastive", Contrastive::DESCRIPTION),
        ("trades", Trades::DESCRIPTION),
        ("fare", Fare::DESCRIPTION),
        ("tecoa", Tecoa::DESCRIPTION),
        ("sim_clip", SimClip::DESCRIPTION),
        ("advflyp", Advflyp::DESCRIPTION),
        ("deacl", Deacl::DESCRIPTION),
        ("gradient_norm", GradientNorm::DESCRIPTION),
    ]);

    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error> {
        map.serialize_entry(key, self)
    }
}

const KIND: Key = Key::of::<ObjectiveKind>("kind", "Name of the objective.");

/// Key of the objective until version 0.1.
const OLD_KEY: &str = "loss";

impl Field for ObjectiveConfig {
    fn read(table: &Table, key: &Key) -> Option<Self> {
        let mut key = *key;
        match (table.has(key.name), table.has(OLD_KEY)) {
            (true, true) => {
                let message = format!("`{OLD_KEY}` is the old name of `{}`", key.name);
                table.problem_with_hint(OLD_KEY, message, "remove it");
            }
            (false, true) => key.name = OLD_KEY,
            _ => {}
        }
        table.child(&key, |table| {
            Some(match table.value::<ObjectiveKind>(&KIND)? {
                ObjectiveKind::CrossEntropy => Self::CrossEntropy(CrossEntropy::read(table)?),
                ObjectiveKind::Contrastive => Self::Contrastive(Contrastive::read(table)?),
                ObjectiveKind::Trades => Self::Trades(Trades::read(table)?),
                ObjectiveKind::Fare => Self::Fare(Fare::read(table)?),
                ObjectiveKind::Tecoa => Self::Tecoa(Tecoa::read(table)?),
                ObjectiveKind::SimClip => Self::SimClip(SimClip::read(table)?),
                ObjectiveKind::Advflyp => Self::Advflyp(Advflyp::read(table)?),
                ObjectiveKind::Deacl => Self::Deacl(Deacl::read(table)?),
                ObjectiveKind::GradientNorm => Self::GradientNorm(GradientNorm::read(table)?),
            })
        })
    }
}

impl ObjectiveConfig {
    /// Cross entropy without label smoothing.
    pub fn cross_entropy() -> Self {
        Self::CrossEntropy(CrossEntropy {
            kind: ObjectiveKind::CrossEntropy,
            label_smoothing: 0.0,
        })
    }

    /// Returns the name.
    pub fn kind(&self) -> ObjectiveKind {
        match self {
            Self::CrossEntropy(_) => ObjectiveKind::CrossEntropy,
            Self::Contrastive(_) => ObjectiveKind::Contrastive,
            Self::Trades(_) => ObjectiveKind::Trades,
            Self::Fare(_) => ObjectiveKind::Fare,
            Self::Tecoa(_) => ObjectiveKind::Tecoa,
            Self::SimClip(_) => ObjectiveKind::SimClip,
            Self::Advflyp(_) => ObjectiveKind::Advflyp,
            Self::Deacl(_) => ObjectiveKind::Deacl,
            Self::GradientNorm(_) => ObjectiveKind::GradientNorm,
        }
    }

    /// Returns whether the model outputs one logit per class. Otherwise it outputs embeddings.
    pub fn uses_logits(&self) -> bool {
        matches!(
            self,
            Self::CrossEntropy(_) | Self::Trades(_) | Self::GradientNorm(_)
        )
    }

    /// Returns whether it compares images with their captions, and so with the other images of the batch.
    pub fn uses_captions(&self) -> bool {
        matches!(self, Self::Contrastive(_) | Self::Advflyp(_))
    }

    /// Returns whether it uses the labels of the training images.
    pub fn uses_labels(&self) -> bool {
        self.uses_logits() || matches!(self, Self::Tecoa(_))
    }

    /// Returns whether updates also pass the clean images through the model.
    pub fn uses_clean_images(&self) -> bool {
        matches!(
            self,
            Self::Trades(_)
                | Self::SimClip(_)
                | Self::Advflyp(_)
                | Self::Deacl(_)
                | Self::GradientNorm(_)
        )
    }

    /// Returns whether a frozen model computes a reference, and its weights if they are not the start weights.
    pub fn reference(&self) -> Option<Option<&PathBuf>> {
        match self {
            Self::Fare(Fare { reference, .. })
            | Self::Advflyp(Advflyp { reference, .. })
            | Self::Deacl(Deacl { reference, .. }) => Some(reference.as_ref()),
            _ => None,
        }
    }

    /// Returns whether it is about adversarial images only, so that a stage without an attack makes no sense.
    pub fn requires_attack(&self) -> bool {
        !matches!(
            self,
            Self::CrossEntropy(_) | Self::Contrastive(_) | Self::GradientNorm(_)
        )
    }

    /// Returns whether the attack's loss has no gradient at the clean image, at least while the model equals its
    /// reference: an attack must start elsewhere.
    pub fn is_flat_at_clean_images(&self) -> bool {
        matches!(
            self,
            Self::Trades(_) | Self::Fare(_) | Self::SimClip(_) | Self::Deacl(_)
        )
    }

    /// Returns the step of an objective that compares clean images with a point along their gradient's sign.
    pub(super) fn finite_difference(&self) -> Option<BatchAttack> {
        let Self::GradientNorm(config) = self else {
            return None;
        };
        Some(BatchAttack::pgd(Pgd {
            norm: Norm::Linf,
            epsilon: config.step.clone(),
            step_size: config.step.clone(),
            steps: 1,
            start: Start::Clean,
        }))
    }

    /// Drops a missing reference, as synthetic images replace real ones in a dry run.
    pub(super) fn rehearse(&mut self) {
        if let Self::Fare(Fare { reference, .. })
        | Self::Advflyp(Advflyp { reference, .. })
        | Self::Deacl(Deacl { reference, .. }) = self
        {
            reference.take_if(|path| !path.exists());
        }
    }

    /// Returns whether the attack's loss needs the model's own outputs on the clean images.
    pub fn attacks_own_outputs(&self) -> bool {
        matches!(self, Self::Trades(_) | Self::SimClip(_))
    }

    /// Returns the forward passes of an update besides those of the attack's steps and of the adversarial images:
    /// 3 for clean images, whose gradient is needed too, 1 for each reference.
    pub fn extra_passes(&self) -> u64 {
        let clean = if self.uses_clean_images() { 3 } else { 0 };
        let references = [self.reference().is_some(), self.attacks_own_outputs()];
        clean + references.into_iter().filter(|needed| *needed).count() as u64
    }
}
