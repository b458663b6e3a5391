//! A stage of a run and its phases.

use super::data::Data;
use super::start::Head;
use super::text::Text;
use super::training_attack::{TrainingAttack, check_precision};
use crate::attack::Pgd;
use crate::data::{Augmentation, Mixing};
use crate::loss::{Loss, LossKind};
use crate::model::{Masking, ModelConfig};
use crate::optim::OptimizerConfig;
use crate::schedule::Schedule;
use crate::settings::{Section, Table, settings};

/// Limits of a recipe's counts: larger than in any run, and far below what overflows when costs are summed.
const LARGEST_BATCH: f64 = (1u64 << 24) as f64;
const LARGEST_IMAGE: f64 = 4096.0;
const LONGEST_PHASE: f64 = 1e15;

settings! {
    /// A part of the run with one loss, attack and learning-rate schedule. Weights and their average carry over to the next stage; the moments of the optimizer start at zero.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Stage(table, model: Option<&ModelConfig>) {
        /// Name in messages, metrics and file names: 1 to 64 of `A-Z a-z 0-9 . _ -`.
        pub name: String { kind: super::names::KIND, example: "\"finetune\"" } [=> table.name(Self::DESCRIPTION.key("name"))],
        /// Images of this stage; those of the recipe without it.
        pub data: Option<Data> {},
        /// What becomes of the head of the stage before.
        pub head: Head { omit_default: true, example: "\"new\"" } [= Head::Keep],
        /// Images per update.
        pub batch: u64 { limits: within(1.0, LARGEST_BATCH), unit: "images", example: "1_024" },
        /// Images that pass through the model at a time (gradient accumulation); the whole batch without it. Changes no gradient except by the order of sums; with captions it costs one more forward pass.
        pub chunk: Option<u64> { limits: within(1.0, LARGEST_BATCH), unit: "images", example: "256" },
        /// Image sizes, and for how many samples each is used.
        pub phases: Vec<Phase> {} [
            => table.children(Self::DESCRIPTION.key("phases"), |phase| Phase::read(phase, model, batch))
        ],
        /// Attack that perturbs each batch; without it the stage is standard training.
        pub attack: Option<TrainingAttack> {},
        /// Samples over which epsilon and step size rise linearly from 0 (Debenedetti et al. 2022); at most those of the stage.
        pub attack_warmup_samples: Option<u64> { limits: at_least(1.0), unit: "samples", example: "1_281_024" },
        /// Loss that training minimizes and the attack maximizes.
        pub loss: Loss {},
        /// Text model or embeddings of the captions, with the contrastive loss.
        pub text: Option<Text> {},
        /// Optimizer.
        pub optimizer: OptimizerConfig {},
        /// Learning-rate schedule.
        pub learning_rate: Schedule {},
        /// Drop path (stochastic depth): probability that the last block's residual branch is dropped, rising linearly over the blocks.
        pub drop_path: Option<f64> { limits: above(0.0).below(1.0), example: "0.2" },
        /// Random changes of single images.
        pub augmentation: Augmentation {},
        /// MixUp and CutMix.
        pub mixing: Option<Mixing> {},
    }
    check {
        check_attack(table);
        check_precision(table, attack.as_ref().and_then(Option::as_ref), model);
        if let Some(loss) = &loss {
            check_text(table, loss);
        }
    }
    verify check_warmups
}

settings! {
    /// A part of a stage at one image size.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Phase(table, model: Option<&ModelConfig>, batch: Option<u64>) {
        /// Side of the square images; a multiple of the patch size.
        pub image_size: u64 { limits: within(1.0, LARGEST_IMAGE), unit: "pixels", example: "224" },
        /// Training samples of the phase; a multiple of the batch.
        pub samples: u64 { limits: within(1.0, LONGEST_PHASE), unit: "samples", example: "1_281_024" },
        /// Token reduction by masking.
        pub masking: Option<Masking> {},
    }
    check {
        check_image_size(table, image_size, model);
        check_masking(table, model);
        check_samples(table, samples, batch);
    }
}

impl Stage {
    /// Whether something that is done every `every` samples is due after the update that ends at `samples` of the run.
    pub fn is_due(&self, samples: u64, every: u64) -> bool {
        samples % every < self.batch
    }

    /// The attack for the update that ends at `seen` samples of the stage.
    pub fn attack_at(&self, seen: u64) -> Option<Pgd> {
        let attack = &self.attack.as_ref()?.pgd;
        match self.attack_warmup_samples {
            Some(warmup) if seen < warmup => Some(attack.weakened(seen as f64 / warmup as f64)),
            _ => Some(attack.clone()),
        }
    }

    /// Steps of its attack.
    pub fn attack_steps(&self) -> u64 {
        self.attack.as_ref().map_or(0, |attack| attack.pgd.steps)
    }

    /// What an image costs, in forward passes: 2k + 3, since an attack pass needs the gradient of its input alone; one
    /// more for each of the k + 1 gradients where captions are compared over several chunks.
    pub fn passes(&self) -> u64 {
        let steps = self.attack_steps();
        let chunked = self.chunk.is_some_and(|chunk| chunk < self.batch);
        let again = chunked && self.loss.kind == LossKind::Contrastive;
        2 * steps + 3 + if again { steps + 1 } else { 0 }
    }

    /// Samples of all its phases.
    pub fn samples(&self) -> u64 {
        self.phases.iter().map(|phase| phase.samples).sum()
    }
}

fn check_attack(stage: &Table) {
    if stage.has("attack_warmup_samples") && !stage.has("attack") {
        let message = "attack_warmup_samples has no effect without `attack`";
        stage.problem("attack_warmup_samples", message);
    }
}

/// A warmup that is longer than the stage would end before the recipe's peak is reached.
fn check_warmups(table: &Table, stage: &Stage) {
    let length = stage.samples();
    let too_long = |key: &str, warmup: u64| {
        (warmup > length)
            .then(|| format!("{key} = {warmup} is longer than the stage, {length} samples"))
    };
    if let Some(message) = too_long("warmup_samples", stage.learning_rate.warmup_samples) {
        table.problem("learning_rate", message);
    }
    let attack_warmup = stage.attack_warmup_samples.unwrap_or_default();
    if let Some(message) = too_long("attack_warmup_samples", attack_warmup) {
        let hint = format!("use at most {length}, or leave it out");
        table.problem_with_hint("attack_warmup_samples", message, hint);
    }
}

/// Captions need a text model or its embeddings, and class labels have no use for one.
fn check_text(stage: &Table, loss: &Loss) {
    match (loss.kind, stage.has("text")) {
        (LossKind::Contrastive, false) => {
            let message = "loss.kind = `contrastive` needs the table `text`";
            let hint = "such as text = { model = \"models/ViT-L-16-CLIPA\" }";
            stage.problem_with_hint("loss", message, hint);
        }
        (LossKind::CrossEntropy, true) => {
            stage.problem(
                "text",
                "text has no effect with loss.kind = `cross_entropy`",
            );
        }
        _ => {}
    }
    if loss.kind == LossKind::Contrastive && stage.has("mixing") {
        let message = "mixing is invalid with loss.kind = `contrastive`: captions cannot be mixed";
        stage.problem("mixing", message);
    }
}

fn check_image_size(phase: &Table, image_size: Option<u64>, model: Option<&ModelConfig>) {
    if let (Some(size), Some(model)) = (image_size, model)
        && let Err((message, hint)) = model.grid(size as usize)
    {
        phase.problem_with_hint("image_size", message, hint);
    }
}

fn check_masking(phase: &Table, model: Option<&ModelConfig>) {
    if phase.has("masking") && matches!(model, Some(ModelConfig::ConvNext(_))) {
        let message = "masking leaves out tokens, and a ConvNeXt has none";
        phase.problem_with_hint("masking", message, "train at a smaller image_size instead");
    }
}

fn check_samples(phase: &Table, samples: Option<u64>, batch: Option<u64>) {
    if let (Some(samples), Some(batch)) = (samples, batch)
        && !samples.is_multiple_of(batch)
    {
        let below = samples / batch * batch;
        let hint = match below {
            0 => format!("use {batch}"),
            _ => format!("use {below} or {}", below + batch),
        };
        let message = format!("samples = {samples} is not a whole number of batches of {batch}");
        phase.problem_with_hint("samples", message, hint);
    }
}
