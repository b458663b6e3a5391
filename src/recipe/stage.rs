//! A stage of a run and its phases.

use super::data::Data;
use super::objective::{ObjectiveConfig, ObjectiveKind};
use super::start::Head;
use super::text::Text;
use super::training_attack::{TrainingAttack, check_precision};
use crate::attack::{BatchAttack, Start};
use crate::data::{Augmentation, Mixing};
use crate::model::{Masking, ModelConfig};
use crate::optim::OptimizerConfig;
use crate::schedule::Schedule;
use crate::settings::{Section, Table, settings};

/// Limits of a recipe's counts: larger than any real run needs, and small enough that sums of costs cannot overflow.
const LARGEST_BATCH: f64 = (1u64 << 24) as f64;
const LARGEST_IMAGE: f64 = 4096.0;
const LONGEST_PHASE: f64 = 1e15;

settings! {
    /// A part of the run with its own loss, attack and learning-rate schedule. Weights and their EMA carry over to the
    /// next stage; optimizer moments are reset to zero.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Stage(table, model: Option<&ModelConfig>) {
        /// Name used in messages, metrics and file names: 1 to 64 of `A-Z a-z 0-9 . _ -`, not starting with `.` or `-`.
        pub name: String { kind: super::names::KIND, example: "\"finetune\"" } [=> table.name(Self::DESCRIPTION.key("name"))],
        /// Training and test images of this stage; the top-level `data` if omitted.
        pub data: Option<Data> {},
        /// What to do with the head of the previous stage.
        pub head: Head { omit_default: true, example: "\"new\"" } [= Head::Keep],
        /// Batch size: images per update, over all ranks.
        pub batch: u64 { limits: within(1.0, LARGEST_BATCH), unit: "images", example: "1_024" },
        /// Microbatch size (gradient accumulation): images per forward pass. If omitted, all images of a shard pass at
        /// once. Set it if a batch does not fit into memory. Gradients differ only in the order of summation; with
        /// captions, each gradient costs one more forward pass.
        pub chunk: Option<u64> { limits: within(1.0, LARGEST_BATCH), unit: "images", example: "256" },
        /// Phases of the stage, in order: image sizes and how many samples each is used for.
        pub phases: Vec<Phase> {} [
            => table.children(Self::DESCRIPTION.key("phases"), |phase| Phase::read(phase, model, batch))
        ],
        /// Attack that perturbs each training batch. If omitted, the stage is standard (non-adversarial) training.
        pub attack: Option<TrainingAttack> {},
        /// Length of the attack warmup; at most the length of the stage. Epsilon and step size rise linearly from 0
        /// (Debenedetti et al. 2022).
        pub attack_warmup_samples: Option<u64> { limits: at_least(1.0), unit: "samples", example: "1_281_024" },
        /// Which loss training minimizes and the attack maximizes. `f` is the model in training, `x` a clean and `x'` an
        /// adversarial image, `y` a label, `g` a frozen reference.
        pub objective: ObjectiveConfig {},
        /// Text model or caption embeddings: for objectives with captions or class names, and to classify images by
        /// class names in evaluations of a model that outputs embeddings.
        pub text: Option<Text> {},
        /// Parameters to train, by name; all others are frozen. A pattern matches names that begin with its parts:
        /// `blocks.0-5` the first six blocks, `norm`, `blocks.*.attn`, `head`. All are trained if empty.
        pub train: Vec<String> { omit_default: true, example: "[\"blocks.0-5\", \"norm\"]" } [= Vec::new()],
        /// Optimizer and its hyperparameters.
        pub optimizer: OptimizerConfig {},
        /// Learning-rate schedule.
        pub learning_rate: Schedule {},
        /// Drop path (stochastic depth): probability of dropping the last block's residual branch. The probability
        /// rises linearly over the blocks.
        pub drop_path: Option<f64> { limits: above(0.0).below(1.0), example: "0.2" },
        /// Augmentation of single training images.
        pub augmentation: Augmentation {},
        /// MixUp and CutMix of each batch; off if omitted.
        pub mixing: Option<Mixing> {},
    }
    check {
        check_attack(table);
        check_precision(table, attack.as_ref().and_then(Option::as_ref), model);
        if let Some(objective) = &objective {
            check_objective(table, objective, attack.as_ref().and_then(Option::as_ref));
            check_text(table, objective, text.as_ref().and_then(Option::as_ref));
        }
    }
    verify check_warmups
}

settings! {
    /// A part of a stage with a single image size.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Phase(table, model: Option<&ModelConfig>, batch: Option<u64>) {
        /// Side of the square images; must be a multiple of the patch size.
        pub image_size: u64 { limits: within(1.0, LARGEST_IMAGE), unit: "pixels", example: "224" },
        /// Length of the phase; must be a multiple of `batch`.
        pub samples: u64 { limits: within(1.0, LONGEST_PHASE), unit: "samples", example: "1_281_024" },
        /// Token reduction by masking patches; off if omitted.
        pub masking: Option<Masking> {},
    }
    check {
        check_image_size(table, image_size, model);
        check_masking(table, model);
        check_samples(table, samples, batch);
    }
}

impl Stage {
    /// Returns whether an action with the interval `every` is due after the update that ends at `samples` of the run.
    pub fn is_due(&self, samples: u64, every: u64) -> bool {
        samples % every < self.batch
    }

    /// Returns the attack for the update that ends at `seen` samples of the stage.
    pub fn attack_at(&self, seen: u64) -> Option<BatchAttack> {
        if let Some(step) = self.objective.finite_difference() {
            return Some(step);
        }
        let attack = &self.attack.as_ref()?.attack;
        match self.attack_warmup_samples {
            Some(warmup) if seen < warmup => Some(attack.weakened(seen as f64 / warmup as f64)),
            _ => Some(attack.clone()),
        }
    }

    /// Returns the number of input gradients per image: those of the attack, 0 without one.
    pub fn attack_steps(&self) -> u64 {
        let attack = self.attack.as_ref();
        let is_difference = self.objective.finite_difference().is_some();
        attack.map_or(u64::from(is_difference), |attack| attack.attack.gradients())
    }

    /// Returns the cost of an image in forward passes: 2k + 3 with k attack steps, since an attack pass needs only the
    /// gradient of its input, plus those of an adaptive attack and of the objective's clean images and references. A contrastive loss over several
    /// chunks adds one pass for each of the k + 1 gradients.
    pub fn passes(&self) -> u64 {
        let steps = self.attack_steps();
        let chunked = self.chunk.is_some_and(|chunk| chunk < self.batch);
        let again = chunked && self.objective.uses_captions();
        let attack = self.attack.as_ref();
        let of_attack = attack.map_or(0, |attack| attack.attack.extra_passes());
        let of_objective = self.objective.extra_passes();
        2 * steps + 3 + of_attack + of_objective + if again { steps + 1 } else { 0 }
    }

    /// Returns the number of passes whose activations an update keeps at once: clean images pass before the backward pass
    /// of the adversarial ones.
    pub fn passes_at_once(&self) -> u64 {
        match self.objective.uses_clean_images() {
            true => 2,
            false => 1,
        }
    }

    /// Returns the number of samples of all phases.
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

/// Reports warmups that are longer than the stage, which would end before the peak is reached.
fn check_warmups(table: &Table, stage: &Stage) {
    let length = stage.samples();
    let too_long = |key: &str, warmup: u64| {
        (warmup > length)
            .then(|| format!("{key} = {warmup} is longer than the stage ({length} samples)"))
    };
    if let Some(message) = too_long("warmup_samples", stage.learning_rate.warmup_samples) {
        table.problem("learning_rate", message);
    }
    let attack_warmup = stage.attack_warmup_samples.unwrap_or_default();
    if let Some(message) = too_long("attack_warmup_samples", attack_warmup) {
        let hint = format!("use at most {length}, or omit it");
        table.problem_with_hint("attack_warmup_samples", message, hint);
    }
}

/// Reports objectives that need an attack or a random start of it.
fn check_objective(stage: &Table, objective: &ObjectiveConfig, attack: Option<&TrainingAttack>) {
    let kind = objective.kind();
    let name = kind.word();
    if kind == ObjectiveKind::GradientNorm && stage.has("attack") {
        let message = format!("attack has no effect with objective.kind = `{name}`");
        let hint = "remove it; objective.step is the length of the finite difference";
        stage.problem_with_hint("attack", message, hint);
    }
    if objective.requires_attack() && !stage.has("attack") {
        let message = format!("objective.kind = `{name}` requires the table `attack`");
        stage.problem("objective", message);
    }
    if objective.is_flat_at_clean_images()
        && attack.is_some_and(|attack| attack.attack.threats[0].start == Start::Clean)
    {
        let message = format!(
            "attack.start = `clean` finds nothing with objective.kind = `{name}`: its gradient is zero at the clean image"
        );
        stage.problem_with_hint("attack", message, "set attack.start = \"random\"");
    }
    if objective.uses_captions() && stage.has("mixing") {
        let message =
            format!("mixing is invalid with objective.kind = `{name}`: captions cannot be mixed");
        stage.problem("mixing", message);
    }
}

/// Reports a table `text` that the objective lacks, or that has no effect.
fn check_text(stage: &Table, objective: &ObjectiveConfig, text: Option<&Text>) {
    let kind = objective.kind();
    let name = kind.word();
    let needs_text = objective.uses_captions() || kind == ObjectiveKind::Tecoa;
    if needs_text && !stage.has("text") {
        let message = format!("objective.kind = `{name}` requires the table `text`");
        let hint = "add it, such as text = { model = \"models/ViT-L-16-CLIPA\" }";
        stage.problem_with_hint("objective", message, hint);
    }
    if objective.uses_logits() && stage.has("text") {
        let message = format!("text has no effect with objective.kind = `{name}`");
        stage.problem("text", message);
        return;
    }
    let Some(text) = text else {
        return;
    };
    if text.new.is_some() && kind != ObjectiveKind::Contrastive {
        let message = format!("text.new is trained by captions, not by objective.kind = `{name}`");
        let hint = "use a trained text model: text.model or text.from";
        stage.problem_with_hint("text", message, hint);
    }
    if text.embeddings.is_some() && !objective.uses_captions() {
        let message = format!("text.embeddings has no effect with objective.kind = `{name}`");
        stage.problem("text", message);
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
        let message = "masking is invalid for a ConvNeXt, which has no tokens";
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
        let message = format!("samples = {samples} is not a multiple of the batch size {batch}");
        phase.problem_with_hint("samples", message, hint);
    }
}
