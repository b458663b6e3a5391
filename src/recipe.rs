//! A recipe: one complete run in one TOML file.
//!
//! The types of its parts live beside the code they configure; here they come together, and what
//! concerns more than one part is checked.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::attack::pgd::check_range;
use crate::attack::{Attack, Norm, Pgd};
use crate::data::{Augmentation, Mixing, Selection, Spec};
use crate::distributed::Parallel;
use crate::error::{Error, Result};
use crate::eval::autoattack::{Settings, Version};
use crate::loss::{Loss, LossKind};
use crate::model::config::common::{DEEPEST, LARGEST_WIDTH};
use crate::model::{Masking, ModelConfig};
use crate::ops::{DeviceName, Precision};
use crate::optim::{AverageConfig, OptimizerConfig};
use crate::schedule::Schedule;
use crate::settings::{Fault, Table};
use crate::units::Fraction;
use crate::{files, settings};

pub use crate::ops::precision::{PRECISIONS, word_of};

/// The form of recipes; written into the resolved recipe of a run.
const SCHEMA: u64 = 1;

/// Limits of a recipe's counts: above any run that is made, and far below what overflows when costs are added up.
const LARGEST_BATCH: u64 = 1 << 24;
const LARGEST_IMAGE: u64 = 4096;
const LONGEST_PHASE: u64 = 1_000_000_000_000_000;

/// A complete run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recipe {
    /// Version of the form of recipes, 1.
    pub schema: u64,
    /// Seed of every random number.
    pub seed: u64,
    /// Arithmetic of the matrix products in training, where the device is faster with it.
    #[serde(serialize_with = "precision_word")]
    pub precision: Precision,
    /// Where to compute.
    #[serde(
        serialize_with = "device_word",
        skip_serializing_if = "DeviceName::is_auto"
    )]
    pub device: DeviceName,
    /// Whether backward passes compute activations anew instead of keeping them: less memory, more time.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub recompute: bool,
    /// How processes share batches.
    #[serde(skip_serializing_if = "Parallel::is_default")]
    pub parallel: Parallel,
    /// The model.
    pub model: ModelConfig,
    /// The weights that training begins with; random ones if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<Start>,
    /// Where images come from, in stages that do not say it themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Data>,
    /// The stages, in order.
    pub stage: Vec<Stage>,
    /// The running average of the weights; without one the weights themselves are evaluated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub average: Option<AverageConfig>,
    /// Evaluation while training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Evaluation>,
    /// Evaluations at the end of the run.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub final_evaluation: Vec<FinalEvaluation>,
    /// Checkpoints.
    pub checkpoint: Checkpoints,
    /// Lines of metrics.
    pub log: Log,
}

/// The weights that training begins with.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Start {
    /// A model folder, a run, or a file of weights.
    pub weights: PathBuf,
    /// The architecture of a file of weights, such as `vit_huge_patch14_224`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// What becomes of the head.
    pub head: Head,
}

/// What becomes of the head where weights meet other images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Head {
    /// It goes on.
    #[default]
    Keep,
    /// It is drawn anew, for the classes of the images that follow.
    New,
    /// It is made of the embedded names of the classes: the model begins as it classified by text.
    Text,
}

impl Head {
    fn read(table: &Table) -> Option<Self> {
        match table.has("head") {
            true => table.choice(
                "head",
                &[
                    ("keep", Self::Keep),
                    ("new", Self::New),
                    ("text", Self::Text),
                ],
            ),
            false => Some(Self::Keep),
        }
    }

    fn is_keep(&self) -> bool {
        *self == Self::Keep
    }
}

/// Where images come from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Data {
    /// To learn from.
    #[serde(serialize_with = "as_text")]
    pub train: Spec,
    /// To measure with; the same place as `train` where that has both parts.
    #[serde(serialize_with = "as_text")]
    pub test: Spec,
    /// Share of broken images that is replaced and counted; without it the first one ends the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub broken_rate: Option<f64>,
    /// Measures with the very images that are learned from, which is refused otherwise.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub test_on_train: bool,
}

/// A stretch of the run with one loss, attack and learning rate schedule.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stage {
    /// What messages and metrics call it.
    pub name: String,
    /// Where its images come from; the recipe's if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Data>,
    /// Whether its head is drawn anew.
    #[serde(skip_serializing_if = "Head::is_keep")]
    pub head: Head,
    /// Images in an update.
    pub batch: u64,
    /// Images that pass through the model at a time; all of the batch if absent. Changes no gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk: Option<u64>,
    /// Image sizes and how long each is used.
    pub phases: Vec<Phase>,
    /// What images are perturbed by; without it the stage is ordinary training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attack: Option<Pgd>,
    /// Samples of the stage over which epsilon and step size rise from 0 to their full values
    /// (Debenedetti et al. 2022); without it they are full from the first update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attack_warmup_samples: Option<u64>,
    /// What is descended, and climbed by the attack.
    pub loss: Loss,
    /// Where the embeddings of captions come from, with the contrastive loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<Text>,
    /// How weights move.
    pub optimizer: OptimizerConfig,
    /// How fast.
    pub learning_rate: Schedule,
    /// Chance that a residual branch of the last block is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop_path: Option<f64>,
    /// Random changes of single images.
    pub augmentation: Augmentation,
    /// MixUp and CutMix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixing: Option<Mixing>,
}

/// Embeddings of captions: by a text model that is frozen, or by a new one that learns with the images.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Text {
    /// A folder of a text model, which embeds captions as they come.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// An earlier stage whose new text model is used, frozen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// A new text model that learns in this stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new: Option<NewText>,
    /// A file of embeddings that `advxl embed` wrote, in place of computing them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<PathBuf>,
    /// Names of the test images' classes in words, one a line, for evaluations by the text model; those of the data set
    /// if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classes: Option<PathBuf>,
    /// Sentences with `{}` in the place of a class; the names alone if there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub templates: Vec<String>,
}

/// A text model to be trained, of CLIPA's form; its vocabulary is made of the training captions' words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct NewText {
    /// Token ids of a caption.
    pub context: usize,
    /// Width of the tokens.
    pub width: usize,
    /// Blocks.
    pub depth: usize,
    /// Attention heads; they divide the width.
    pub heads: usize,
    /// Dimensions of an embedding.
    pub embedding: usize,
}

/// A stretch of a stage at one image size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// Pixels on a side.
    pub image_size: u64,
    /// Images seen.
    pub samples: u64,
    /// Patches left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub masking: Option<Masking>,
}

/// Which of the test images an evaluation uses: a stratified sample of a size, or those that a file lists.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TestImages {
    /// `images = N`: a sample spread over the classes; all images where there are no more.
    Images(u64),
    /// `ids = "FILE"`: one image a line.
    Ids(String),
}

/// Evaluation while training.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Samples between two evaluations; there is one at the end of each stage besides.
    pub every_samples: u64,
    /// Which of the test images.
    #[serde(flatten)]
    pub images: TestImages,
    /// The attack beside clean accuracy.
    pub attack: Pgd,
}

/// An evaluation of the model at the end of a stage, by the names of the classes if the stage learns by captions. Its
/// result is `result-NAME.json` in the run's folder.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FinalEvaluation {
    /// What its result is called.
    pub name: String,
    /// The stage at whose end the model is taken; the last one if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// Which of the test images.
    #[serde(flatten)]
    pub images: TestImages,
    /// The attacks by name, in order.
    pub attacks: Vec<String>,
    /// The norm that bounds perturbations.
    pub norm: Norm,
    /// Largest perturbation.
    pub epsilon: Fraction,
}

/// Checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Checkpoints {
    /// Samples between two checkpoints; there is one at the end of each stage besides.
    pub every_samples: u64,
    /// How many are kept.
    pub keep: u64,
}

/// Lines of metrics.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Log {
    /// Samples between two lines.
    pub every_samples: u64,
}

fn as_text<S: Serializer>(spec: &Spec, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(spec)
}

fn device_word<S: Serializer>(
    device: &DeviceName,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(device)
}

fn precision_word<S: Serializer>(
    precision: &Precision,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(word_of(*precision))
}

impl Recipe {
    /// Reads and checks a recipe file with overrides such as `stage.finetune.attack.steps=3`.
    ///
    /// Errors: the file cannot be read, or all its faults at once.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = files::read_text(path).map_err(|error| {
            error.hint("give the path of a recipe, such as recipes/cifar10_micro.toml")
        })?;
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Self::parse(&text, overrides).map_err(|faults| cannot_be_run(&name, &faults))
    }

    /// Reads and checks the text of a recipe.
    pub fn parse(text: &str, overrides: &[String]) -> std::result::Result<Self, Vec<Fault>> {
        settings::read(text, overrides, Self::read)
    }

    fn read(table: &Table) -> Option<Self> {
        let schema = table.optional_where("schema", "1", |schema: &u64| *schema == SCHEMA);
        let seed = table.required("seed");
        let precision = table.choice("precision", &PRECISIONS);
        let device = table.optional("device").unwrap_or_default();
        let recompute = table.optional("recompute").unwrap_or(false);
        let parallel = match table.has("parallel") {
            true => table.child("parallel", Parallel::read),
            false => Some(Parallel::default()),
        };
        // Kept apart, so that image sizes are checked even where something else of the model is wrong.
        let read = OnceCell::new();
        let model = table.required_child("model", |model| {
            let model = ModelConfig::read(model)?;
            Some(read.get_or_init(|| model).clone())
        });
        let start = table.child("start", Start::read);
        let data = table.child("data", Data::read);
        let stages = table.children("stage", |stage| Stage::read(stage, read.get()));
        let average = table.child("average", AverageConfig::read);
        let evaluation = table.child("evaluation", Evaluation::read);
        let final_evaluation = match table.has("final_evaluation") {
            true => table.children("final_evaluation", FinalEvaluation::read),
            false => Some(Vec::new()),
        };
        let checkpoint = table.required_child("checkpoint", Checkpoints::read);
        let log = table.required_child("log", Log::read);
        if let Some(stages) = &stages {
            check_data(table, stages);
            check_shards(table, stages, parallel.unwrap_or_default());
            check_heads(table, stages);
            check_final(
                table,
                stages,
                final_evaluation.as_deref().unwrap_or_default(),
            );
            check_names(table, "stage", stages.iter().map(|stage| &stage.name[..]));
        }
        let finals = final_evaluation.iter().flatten();
        check_names(table, "final_evaluation", finals.map(|one| &one.name[..]));
        Some(Self {
            schema: schema.unwrap_or(SCHEMA),
            seed: seed?,
            precision: precision?,
            device,
            recompute,
            parallel: parallel?,
            model: model?,
            start,
            data,
            stage: stages?,
            average,
            evaluation,
            final_evaluation: final_evaluation?,
            checkpoint: checkpoint?,
            log: log?,
        })
    }

    /// The recipe with every value, as it is saved with the run.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe is made of TOML's types")
    }

    /// Where the images of a stage come from.
    ///
    /// # Panics
    /// For a stage of another recipe.
    pub fn data_of<'a>(&'a self, stage: &'a Stage) -> &'a Data {
        let data = stage.data.as_ref().or(self.data.as_ref());
        data.expect("recipes are checked")
    }

    /// Whether no stage needs images from outside.
    pub fn is_synthetic(&self) -> bool {
        let drawn = |spec: &Spec| matches!(spec, Spec::Synthetic { .. });
        let mut all = self.stage.iter().map(|stage| self.data_of(stage));
        all.all(|data| drawn(&data.train) && drawn(&data.test))
    }

    /// A run of two updates in each phase, of so many images each if told, without evaluations: what shows that
    /// nothing is wrong before the real one. A tiny text model takes the place of one that is not there.
    pub fn rehearsal(&self, batch: Option<u64>) -> Self {
        let mut recipe = self.clone();
        for stage in &mut recipe.stage {
            stage.batch = batch.unwrap_or(stage.batch);
            for phase in &mut stage.phases {
                phase.samples = 2 * stage.batch;
            }
            if let Some(text) = &mut stage.text {
                text.rehearse();
            }
            let schedule = &mut stage.learning_rate;
            schedule.warmup_samples = schedule.warmup_samples.min(stage.batch);
            let warmup = stage.attack_warmup_samples;
            stage.attack_warmup_samples = warmup.map(|warmup| warmup.min(stage.batch));
        }
        let whole = |stage: &Stage| stage.batch.is_multiple_of(recipe.parallel.shards);
        if !recipe.stage.iter().all(whole) {
            recipe.parallel = Parallel::default();
        }
        recipe.evaluation = None;
        recipe.final_evaluation = Vec::new();
        recipe.log.every_samples = 1;
        recipe
    }

    /// The stage and the phase whose update ends at so many samples of the run, and whether it is the stage's last.
    pub fn update_at(&self, samples: u64) -> Option<(&Stage, &Phase, bool)> {
        let mut end = 0;
        for stage in &self.stage {
            for (number, phase) in stage.phases.iter().enumerate() {
                end += phase.samples;
                if (1..=end).contains(&samples) {
                    let is_last = number + 1 == stage.phases.len() && samples == end;
                    return Some((stage, phase, is_last));
                }
            }
        }
        None
    }

    /// Samples of the whole run.
    pub fn samples(&self) -> u64 {
        self.stage.iter().map(Stage::samples).sum()
    }

    /// Patches of an image that a phase keeps.
    fn patches(&self, phase: &Phase) -> usize {
        let grid = phase.image_size as usize / self.model.patch();
        let masking = phase.masking.as_ref();
        masking.map_or(grid * grid, |masking| masking.kept(grid))
    }

    /// Tokens of an image in a phase, class token included, if the model has tokens.
    pub fn tokens(&self, phase: &Phase) -> Option<u64> {
        self.model.tokens(self.patches(phase))
    }

    /// Multiply-adds of one forward pass of an image in a phase.
    pub fn forward_macs(&self, phase: &Phase) -> u64 {
        let patches = self.patches(phase);
        self.model.forward_macs(phase.image_size as usize, patches)
    }

    /// Multiply-adds of the run's forward passes from a sample on, each counted as often as `passes` says.
    fn macs(&self, from: u64, passes: impl Fn(&Stage) -> u64) -> f64 {
        let (mut total, mut start) = (0.0, 0);
        for stage in &self.stage {
            let passes = passes(stage) as f64;
            for phase in &stage.phases {
                let end = start + phase.samples;
                let samples = end.saturating_sub(from.max(start)) as f64;
                total += samples * passes * self.forward_macs(phase) as f64;
                start = end;
            }
        }
        total
    }

    /// The cost of the run as the paper counts it: attack steps + 1 forward passes a sample.
    ///
    /// Source: the compute column of the paper's tables.
    pub fn paper_macs(&self) -> f64 {
        self.macs(0, |stage| stage.attack_steps() + 1)
    }

    /// The arithmetic that is left from a sample on.
    pub fn macs_left(&self, from: u64) -> f64 {
        self.macs(from, Stage::passes)
    }

    /// The image size that learned positions are made for: that of the first phase.
    pub fn first_image_size(&self) -> usize {
        self.stage[0].phases[0].image_size as usize
    }
}

/// Faults where two tables of a list would write to one file on some file system.
fn check_names<'a>(table: &Table, key: &str, names: impl Iterator<Item = &'a str>) {
    let mut seen: Vec<&str> = Vec::new();
    for name in names {
        if let Some(other) = seen.iter().find(|seen| seen.eq_ignore_ascii_case(name)) {
            let message = match *other == name {
                true => format!("two tables `{key}` have the name `{name}`"),
                false => format!(
                    "`{key}` has the names `{other}` and `{name}`, which differ in case alone"
                ),
            };
            table.fault(key, message, Some("give each a name of its own".to_owned()));
        }
        seen.push(name);
    }
}

/// Faults where a batch is not a whole number of images for each shard.
fn check_shards(table: &Table, stages: &[Stage], parallel: Parallel) {
    let shards = parallel.shards;
    for stage in stages {
        if !stage.batch.is_multiple_of(shards) {
            let message = format!(
                "stage `{}`: a batch of {} is not a whole number of images for each of {shards} shards",
                stage.name, stage.batch
            );
            let hint = format!("use a batch of {}", stage.batch.next_multiple_of(shards));
            table.fault("parallel", message, Some(hint));
        }
    }
}

/// Faults where a stage has no images, or those of the recipe serve none.
fn check_data(table: &Table, stages: &[Stage]) {
    let without = stages.iter().find(|stage| stage.data.is_none());
    match (without, table.has("data")) {
        (Some(stage), false) => {
            let message = format!(
                "the table `data` is missing, and stage `{}` has none",
                stage.name
            );
            table.fault("data", message, None);
        }
        (None, true) => {
            let message = "data has no effect, since every stage has its own";
            table.fault("data", message, None);
        }
        _ => {}
    }
}

/// Faults where a stage counts on what no stage before it has.
fn check_heads(table: &Table, stages: &[Stage]) {
    for (number, stage) in stages.iter().enumerate() {
        let named = stage.text.as_ref().and_then(|text| text.from.as_ref());
        let has_new = |stage: &Stage| stage.text.as_ref().is_some_and(|text| text.new.is_some());
        let before = &stages[..number];
        if let Some(named) = named
            && !before
                .iter()
                .any(|earlier| earlier.name == *named && has_new(earlier))
        {
            let message = format!(
                "stage `{}`: text.from = `{named}` is no earlier stage with a new text model",
                stage.name
            );
            table.fault("stage", message, None);
        }
        let of_text = before
            .last()
            .is_some_and(|earlier| earlier.text.as_ref().is_some_and(Text::has_model));
        if stage.head == Head::Text && !of_text {
            let message = format!(
                "stage `{}`: head = `text` needs a text model in the stage before it",
                stage.name
            );
            table.fault("stage", message, None);
        }
    }
    if let Some(first) = stages.first()
        && first.head != Head::Keep
    {
        let message = format!("head has no effect in the first stage, `{}`", first.name);
        let hint = "the head of a run's beginning is chosen in the table `start`".to_owned();
        table.fault("stage", message, Some(hint));
    }
}

/// Faults where a final evaluation is of a stage that there is not, or that has nothing to tell classes by.
fn check_final(table: &Table, stages: &[Stage], evaluations: &[FinalEvaluation]) {
    for evaluation in evaluations {
        let name = &evaluation.name;
        let Some(stage) = evaluation.stage_of(stages) else {
            let known: Vec<_> = stages.iter().map(|stage| &stage.name[..]).collect();
            let named = evaluation.stage.as_deref().unwrap_or_default();
            let message = format!("final evaluation `{name}`: there is no stage `{named}`");
            let hint = format!("the stages are {}", known.join(", "));
            table.fault("final_evaluation", message, Some(hint));
            continue;
        };
        if let Some(text) = &stages[stage].text
            && !text.has_model()
        {
            let message = format!(
                "final evaluation `{name}`: stage `{}` has no text model, which would embed the names of the classes",
                stages[stage].name
            );
            table.fault("final_evaluation", message, None);
        }
    }
}

impl Start {
    fn read(table: &Table) -> Option<Self> {
        let weights: Option<String> = table.required("weights");
        let (architecture, head) = (table.optional("architecture"), Head::read(table));
        if head == Some(Head::Text) {
            let message = "head = `text` needs a stage with captions before it";
            table.fault("head", message, Some("use `keep` or `new`".into()));
        }
        Some(Self {
            weights: weights?.into(),
            architecture,
            head: head?,
        })
    }
}

/// Faults where captions are wanted and missing, or the other way round.
fn check_text(stage: &Table, loss: &Loss) {
    match (loss.kind, stage.has("text")) {
        (LossKind::Contrastive, false) => {
            let hint = "such as text = { model = \"models/ViT-L-16-CLIPA\" }".to_owned();
            let message = "loss.kind = `contrastive` needs the table `text`";
            stage.fault("loss", message, Some(hint));
        }
        (LossKind::CrossEntropy, true) => {
            let message = "text has no effect with loss.kind = `cross_entropy`";
            stage.fault("text", message, None);
        }
        _ => {}
    }
    if loss.kind == LossKind::Contrastive && stage.has("mixing") {
        let message =
            "mixing has no meaning with loss.kind = `contrastive`: captions cannot be mixed";
        stage.fault("mixing", message, None);
    }
}

impl Text {
    fn read(table: &Table) -> Option<Self> {
        let path = |key: &str| table.optional::<String>(key).map(PathBuf::from);
        let text = Self {
            model: path("model"),
            from: table.optional("from"),
            new: table.child("new", NewText::read),
            embeddings: path("embeddings"),
            classes: path("classes"),
            templates: table.optional("templates").unwrap_or_default(),
        };
        let models = ["model", "from", "new"].map(|key| table.has(key));
        let count = models.iter().filter(|given| **given).count();
        if count > 1 {
            let message = "of `model`, `from` and `new` a stage takes one";
            table.fault("model", message, None);
        }
        if count == 0 && text.embeddings.is_none() {
            let message =
                "text needs a `model`, a stage to take it `from`, a `new` one, or `embeddings`";
            table.fault("model", message, None);
        }
        if count == 0 && (text.classes.is_some() || !text.templates.is_empty()) {
            let message = "classes and templates are embedded by a text model, and text has none";
            table.fault("classes", message, None);
        }
        if text.new.is_some() && text.embeddings.is_some() {
            let message = "embeddings stand still, and a `new` text model learns";
            table.fault("embeddings", message, None);
        }
        if let Some(wrong) = text.templates.iter().find(|text| !text.contains("{}")) {
            let message = format!("the template `{wrong}` has no {{}} for the class");
            table.fault("templates", message, None);
        }
        Some(text)
    }
}

impl Text {
    /// Whether there is a model to embed the names of classes with, and not embeddings of captions alone.
    fn has_model(&self) -> bool {
        self.model.is_some() || self.from.is_some() || self.new.is_some()
    }

    /// Takes a tiny new text model in the place of files that are not there, as synthetic images are of real ones.
    fn rehearse(&mut self) {
        let missing = |path: &Option<PathBuf>| path.as_ref().is_some_and(|path| !path.exists());
        if missing(&self.classes) {
            self.classes = None;
        }
        if missing(&self.model) || missing(&self.embeddings) {
            let new = NewText {
                context: 32,
                width: 64,
                depth: 1,
                heads: 1,
                embedding: 64,
            };
            *self = Self {
                new: Some(new),
                ..Self::default()
            };
        }
    }
}

impl NewText {
    fn read(table: &Table) -> Option<Self> {
        let sizes = [
            ("context", 1 << 16),
            ("width", LARGEST_WIDTH),
            ("depth", DEEPEST),
            ("heads", LARGEST_WIDTH),
            ("embedding", LARGEST_WIDTH),
        ];
        let [context, width, depth, heads, embedding] =
            sizes.map(|(key, largest)| table.count(key, 1..=largest));
        if let (Some(width), Some(heads)) = (width, heads)
            && !width.is_multiple_of(heads)
        {
            let message = format!("heads = {heads} do not divide width = {width}");
            table.fault("heads", message, None);
        }
        Some(Self {
            context: context?,
            width: width?,
            depth: depth?,
            heads: heads?,
            embedding: embedding?,
        })
    }
}

impl Data {
    fn read(table: &Table) -> Option<Self> {
        let spec = |key: &str| {
            let text: String = table.required(key)?;
            text.parse::<Spec>()
                .map_err(|error| table.fault(key, error.to_string(), None))
                .ok()
        };
        let (train, test) = (spec("train"), spec("test"));
        let inside = |rate: &f64| *rate > 0.0 && *rate < 1.0;
        let broken_rate = table.optional_where("broken_rate", "above 0 and below 1", inside);
        Some(Self {
            train: train?,
            test: test?,
            broken_rate,
            test_on_train: table.optional("test_on_train").unwrap_or(false),
        })
    }
}

impl Stage {
    fn read(table: &Table, model: Option<&ModelConfig>) -> Option<Self> {
        let name = table.name("name");
        let (data, head) = (table.child("data", Data::read), Head::read(table));
        let batch = table.count("batch", 1..=LARGEST_BATCH);
        let chunk = table.optional_count("chunk", 1..=LARGEST_BATCH);
        let phases = table.children("phases", |phase| Phase::read(phase, model, batch));
        let attack = table.child("attack", Pgd::read);
        let attack_warmup_samples = table.optional_count("attack_warmup_samples", 1..=u64::MAX);
        if attack_warmup_samples.is_some() && !table.has("attack") {
            let message = "attack_warmup_samples has no effect without `attack`";
            table.fault("attack_warmup_samples", message, None);
        }
        let loss = table.required_child("loss", Loss::read);
        let text = table.child("text", Text::read);
        let optimizer = table.required_child("optimizer", OptimizerConfig::read);
        let learning_rate = table.required_child("learning_rate", Schedule::read);
        let drop_path = table.optional_where("drop_path", "above 0 and below 1", |rate: &f64| {
            *rate > 0.0 && *rate < 1.0
        });
        let augmentation = table.required_child("augmentation", Augmentation::read);
        let mixing = table.child("mixing", Mixing::read);
        if let Some(loss) = &loss {
            check_text(table, loss);
        }
        let stage = Self {
            name: name?,
            data,
            head: head?,
            batch: batch?,
            chunk,
            phases: phases?,
            attack,
            attack_warmup_samples,
            loss: loss?,
            text,
            optimizer: optimizer?,
            learning_rate: learning_rate?,
            drop_path,
            augmentation: augmentation?,
            mixing,
        };
        let length = stage.samples();
        let too_long = |key: &str, warmup: u64| {
            (warmup > length)
                .then(|| format!("{key} = {warmup} is longer than the stage, {length} samples"))
        };
        if let Some(message) = too_long("warmup_samples", stage.learning_rate.warmup_samples) {
            table.fault("learning_rate", message, None);
        }
        // The stage would end before its attack has the strength that the recipe names.
        let attack_warmup = stage.attack_warmup_samples.unwrap_or_default();
        if let Some(message) = too_long("attack_warmup_samples", attack_warmup) {
            let hint = format!("use at most {length}, or leave it out");
            table.fault("attack_warmup_samples", message, Some(hint));
        }
        Some(stage)
    }

    /// The attack for the update that ends at `seen` samples of the stage.
    pub fn attack_at(&self, seen: u64) -> Option<Pgd> {
        let attack = self.attack.as_ref()?;
        match self.attack_warmup_samples {
            Some(warmup) if seen < warmup => Some(attack.weakened(seen as f64 / warmup as f64)),
            _ => Some(attack.clone()),
        }
    }

    /// Steps of its attack.
    pub fn attack_steps(&self) -> u64 {
        self.attack.as_ref().map_or(0, |attack| attack.steps)
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

impl Phase {
    fn read(table: &Table, model: Option<&ModelConfig>, batch: Option<u64>) -> Option<Self> {
        let image_size = table.count("image_size", 1..=LARGEST_IMAGE);
        let samples = table.count("samples", 1..=LONGEST_PHASE);
        let masking = table.child("masking", Masking::read);
        if let (Some(size), Some(model)) = (image_size, model)
            && let Err((message, hint)) = model.grid(size as usize)
        {
            table.fault("image_size", message, Some(hint));
        }
        if masking.is_some() && matches!(model, Some(ModelConfig::ConvNext(_))) {
            let message = "masking leaves out tokens, and a ConvNeXt has none";
            let hint = "reduce its work with a smaller image_size".to_owned();
            table.fault("masking", message, Some(hint));
        }
        if let (Some(samples), Some(batch)) = (samples, batch)
            && !samples.is_multiple_of(batch)
        {
            let below = samples / batch * batch;
            let hint = match below {
                0 => format!("use {batch}"),
                _ => format!("use {below} or {}", below + batch),
            };
            let message =
                format!("samples = {samples} is not a whole number of batches of {batch}");
            table.fault("samples", message, Some(hint));
        }
        Some(Self {
            image_size: image_size?,
            samples: samples?,
            masking,
        })
    }
}

impl TestImages {
    fn read(table: &Table) -> Option<Self> {
        let ids: Option<String> = table.optional("ids");
        match (ids, table.has("images")) {
            (None, _) => table.count("images", 1..=u64::MAX).map(Self::Images),
            (Some(ids), false) => Some(Self::Ids(ids)),
            (Some(_), true) => {
                let hint = "`images` takes a stratified sample of a size, `ids` the images that a file lists";
                table.fault(
                    "ids",
                    "set exactly one of `images` or `ids`",
                    Some(hint.into()),
                );
                None
            }
        }
    }

    /// The same for a data set.
    pub fn selection(&self) -> Selection {
        match self {
            Self::Images(count) => Selection::Sample(*count as usize),
            Self::Ids(path) => Selection::Listed(path.into()),
        }
    }
}

impl Evaluation {
    fn read(table: &Table) -> Option<Self> {
        let every_samples = table.count("every_samples", 1..=u64::MAX);
        let images = TestImages::read(table);
        let attack = table.required_child("attack", Pgd::read);
        Some(Self {
            every_samples: every_samples?,
            images: images?,
            attack: attack?,
        })
    }
}

impl FinalEvaluation {
    fn read(table: &Table) -> Option<Self> {
        let name = table.name("name");
        let stage = table.optional("stage");
        let images = TestImages::read(table);
        let attacks: Option<Vec<String>> = table.required("attacks");
        let norm = table.choice("norm", &Norm::WORDS);
        let epsilon = table.required_where("epsilon", "0 or more", |epsilon: &Fraction| {
            epsilon.value() >= 0.0
        });
        check_range(table, norm, epsilon.as_ref());
        let found = Self {
            name: name?,
            stage,
            images: images?,
            attacks: attacks?,
            norm: norm?,
            epsilon: epsilon?,
        };
        match found.settings().named(&found.attacks) {
            Ok(attacks) if !attacks.is_empty() => Some(found),
            Ok(_) => {
                table.fault(
                    "attacks",
                    "attacks names no attack",
                    Some("such as [\"autoattack\"]".into()),
                );
                None
            }
            Err((unknown, hint)) => {
                table.fault("attacks", format!("`{unknown}` is no attack"), Some(hint));
                None
            }
        }
    }

    /// The number of its stage, if there is one.
    pub fn stage_of(&self, stages: &[Stage]) -> Option<usize> {
        match &self.stage {
            None => stages.len().checked_sub(1),
            Some(named) => stages.iter().position(|stage| stage.name == *named),
        }
    }

    fn settings(&self) -> Settings {
        Settings::new(Version::Standard, self.norm, self.epsilon.clone())
    }

    /// Its attacks.
    pub fn attacks(&self) -> Vec<Attack> {
        self.settings()
            .named(&self.attacks)
            .expect("names were checked")
    }
}

impl Checkpoints {
    fn read(table: &Table) -> Option<Self> {
        let every_samples = table.count("every_samples", 1..=u64::MAX);
        let keep = table.required_where(
            "keep",
            "at least 2, so that a damaged one is no loss",
            |keep: &u64| *keep > 1,
        );
        Some(Self {
            every_samples: every_samples?,
            keep: keep?,
        })
    }
}

impl Log {
    fn read(table: &Table) -> Option<Self> {
        let every = table.count("every_samples", 1..=u64::MAX);
        Some(Self {
            every_samples: every?,
        })
    }
}

/// The faults of a file as one error.
pub fn cannot_be_run(name: &str, faults: &[Fault]) -> Error {
    let plural = if faults.len() == 1 { "fault" } else { "faults" };
    let mut text = format!("`{name}` cannot be run, {} {plural}", faults.len());
    for fault in faults {
        text.push_str(&format!("\n\n  {fault}"));
    }
    Error::input(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tables 2 and 5 of the paper, in its unit of 10^10 giga multiply-adds; to the digits that follow from its counts.
    #[test]
    fn the_papers_compute_figures_are_reproduced_by_its_recipes() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        for (name, stages, paper) in [
            ("vit_b16_in1k", 2, 0.49),
            ("vit_l16_in1k", 2, 1.73),
            ("vit_h14_in1k", 2, 5.74),
            ("vit_l16_in21k", 2, 1.73),
            ("vit_l16_in21k_long", 2, 3.35),
            ("vit_h14_in21k", 2, 8.11),
            ("vit_l16_laion400m", 2, 8.76),
            ("vit_h14_datacomp1b", 2, 38.54),
            ("vit_h14_datacomp1b", 3, 39.54),
            ("vit_g14_datacomp1b", 3, 63.33),
        ] {
            let mut recipe = Recipe::load(&folder.join(format!("{name}.toml")), &[]).unwrap();
            recipe.stage.truncate(stages);
            let found = recipe.paper_macs() / 1e19;
            let rounding = 0.005;
            assert!(
                (found - paper).abs() < rounding + 0.002 * paper,
                "{name}, {stages} stages: {found}"
            );
        }
    }

    #[test]
    fn the_update_that_ends_at_a_sample_belongs_to_one_phase() {
        let text = include_str!("../recipes/cifar10_micro.toml");
        let recipe = Recipe::parse(text, &[]).unwrap();
        let first = &recipe.stage[0];
        let at = |samples| {
            let found = recipe.update_at(samples);
            found.map(|(stage, _, is_last)| (&stage.name[..], is_last))
        };
        assert_eq!(at(0), None);
        assert_eq!(at(first.batch), Some((&first.name[..], false)));
        assert_eq!(at(first.samples()), Some((&first.name[..], true)));
        assert_eq!(
            at(first.samples() + 1),
            Some((&recipe.stage[1].name[..], false))
        );
        assert_eq!(
            at(recipe.samples()),
            Some((&recipe.stage[1].name[..], true))
        );
        assert_eq!(at(recipe.samples() + 1), None);
    }

    #[test]
    fn an_attack_warms_up_to_its_full_strength_and_stays_there() {
        let text = include_str!("../recipes/cifar10_micro.toml");
        let mut stage = Recipe::parse(text, &[]).unwrap().stage.remove(0);
        stage.attack_warmup_samples = Some(1000);
        let epsilon = |seen| stage.attack_at(seen).unwrap().epsilon.value();
        assert_eq!(epsilon(250), 2.0 / 255.0);
        assert_eq!(stage.attack_at(1000), stage.attack);
        assert_eq!(stage.attack_at(5000), stage.attack);
    }

    #[test]
    fn every_recipe_in_the_repository_passes_its_check_and_its_print_reads_back() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        for path in files::list(&folder).unwrap() {
            let recipe = Recipe::load(&path, &[]).unwrap();
            let again = Recipe::parse(&recipe.to_toml(), &[]).unwrap();
            assert_eq!(again, recipe, "{}", path.display());
            assert_eq!(recipe.macs_left(recipe.samples()), 0.0);
        }
    }
}
