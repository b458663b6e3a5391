//! The complete recipe: loading, checks across tables, TOML output, sample counts and costs.

use std::path::Path;

use super::checks;
use super::data::Data;
use super::evaluation::{Evaluation, FinalEvaluation};
use super::records::{Checkpoints, Log};
use super::stage::{Phase, Stage};
use super::start::Start;
use crate::data::Spec;
use crate::distributed::Parallel;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::ops::{DeviceName, Precision};
use crate::optim::AverageConfig;
use crate::settings::{Problem, Section, Table, settings};
use crate::{files, settings};

/// Version of the recipe format; written to the resolved recipe of a run.
const SCHEMA: u64 = 1;

settings! {
    /// A complete run. All durations are counted in samples (images seen).
    #[derive(Clone, Debug, PartialEq)]
    pub struct Recipe(table) {
        /// Version of the recipe format.
        pub schema: u64 { limits: within(SCHEMA as f64, SCHEMA as f64) } [= SCHEMA],
        /// Random seed for weight initialization, sample order, augmentation, masking, drop path and attacks.
        pub seed: u64 { example: "0" },
        /// Precision of the matrix products in training. Norms, softmax, loss, head, weights and optimizer moments are
        /// always f32; on CPUs the patch embedding is too.
        pub precision: Precision { example: "\"bf16\"" },
        /// Device to train on. `--device` takes precedence.
        pub device: DeviceName { omit_default: true, example: "\"cuda:0\"" } [= DeviceName::Auto],
        /// Activation checkpointing: recompute each block's activations in the backward pass. Saves memory, but
        /// training passes take a third more time; results are bitwise identical.
        pub recompute: bool { omit_default: true, example: "true" } [= false],
        /// How batches are split over processes; a single shard if omitted.
        pub parallel: Parallel { omit_default: true, fallback: "one shard" } [= Parallel::default()],
        /// Model architecture.
        pub model: ModelConfig {} [=> table.draft(Self::DESCRIPTION.key("model"), ModelConfig::read)],
        /// Weights to start from; random initialization if omitted.
        pub start: Option<Start> {},
        /// Training and test images for all stages that do not set their own `data`.
        pub data: Option<Data> {},
        /// Training stages, in order.
        pub stage: Vec<Stage> {} [
            => table.children(Self::DESCRIPTION.key("stage"), |stage| Stage::read(stage, model.as_ref()))
        ],
        /// Exponential moving average (EMA) of the weights. If omitted, the weights themselves are evaluated and saved.
        pub average: Option<AverageConfig> {},
        /// Evaluation during training; off if omitted.
        pub evaluation: Option<Evaluation> {},
        /// Evaluations of the saved models at the end of the run.
        pub final_evaluation: Vec<FinalEvaluation> { omit_default: true, fallback: "none" } [= Vec::new()],
        /// How often checkpoints are saved, and how many are kept.
        pub checkpoint: Checkpoints {},
        /// How often training metrics are logged.
        pub log: Log {},
    }
    check { check_tables(table, stage.as_deref(), parallel, final_evaluation.as_deref()) }
}

/// Runs the checks that involve more than one table.
fn check_tables(
    table: &Table,
    stages: Option<&[Stage]>,
    parallel: Option<Parallel>,
    evaluations: Option<&[FinalEvaluation]>,
) {
    let evaluations = evaluations.unwrap_or_default();
    if let Some(stages) = stages {
        checks::check_data(table, stages);
        checks::check_shards(table, stages, parallel.unwrap_or_default());
        checks::check_heads(table, stages);
        checks::check_references(table, stages);
        checks::check_final(table, stages, evaluations);
        checks::check_names(table, "stage", stages.iter().map(|stage| &stage.name[..]));
    }
    let names = evaluations.iter().map(|one| &one.name[..]);
    checks::check_names(table, "final_evaluation", names);
}

impl Recipe {
    /// Reads and checks a recipe file, with overrides such as `stage.finetune.attack.steps=3`.
    ///
    /// Errors: the file cannot be read or is invalid; all problems are reported at once.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = files::read_text(path).map_err(|error| {
            error.hint("pass the path of a recipe, such as recipes/cifar10_micro.toml")
        })?;
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Self::parse(&text, overrides).map_err(|problems| cannot_be_run(&name, &problems))
    }

    /// Parses and checks the text of a recipe.
    pub fn parse(text: &str, overrides: &[String]) -> std::result::Result<Self, Vec<Problem>> {
        settings::read(text, overrides, Self::read)
    }

    /// Returns the recipe as TOML with every value set, as it is saved with the run.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe consists of TOML types")
    }

    /// Returns the data of a stage.
    ///
    /// # Panics
    /// If the stage belongs to another recipe.
    pub fn data_of<'a>(&'a self, stage: &'a Stage) -> &'a Data {
        let data = stage.data.as_ref().or(self.data.as_ref());
        data.expect("recipes are checked")
    }

    /// Returns whether all images are synthetic.
    pub fn is_synthetic(&self) -> bool {
        let drawn = |spec: &Spec| matches!(spec, Spec::Synthetic { .. });
        let mut all = self.stage.iter().map(|stage| self.data_of(stage));
        all.all(|data| data.train.specs().into_iter().all(drawn) && drawn(&data.test))
    }

    /// Returns a shortened recipe for a dry run: two updates per phase, without evaluations, to find errors before the
    /// real run. `batch` overrides the batch size. A missing text model is replaced by a tiny one, missing start and
    /// reference weights by random ones.
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
            stage.objective.rehearse();
            let schedule = &mut stage.learning_rate;
            schedule.warmup_samples = schedule.warmup_samples.min(stage.batch);
            let warmup = stage.attack_warmup_samples;
            stage.attack_warmup_samples = warmup.map(|warmup| warmup.min(stage.batch));
        }
        let whole = |stage: &Stage| stage.batch.is_multiple_of(recipe.parallel.shards);
        if !recipe.stage.iter().all(whole) {
            recipe.parallel = Parallel::default();
        }
        recipe.start = recipe.start.filter(|start| start.weights.exists());
        recipe.evaluation = None;
        recipe.final_evaluation = Vec::new();
        recipe.log.every_samples = 1;
        recipe
    }

    /// Returns the stage and phase of the update that ends at `samples`, and whether it is the last update of the
    /// stage.
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

    /// Returns the number of samples in the whole run.
    pub fn samples(&self) -> u64 {
        self.stage.iter().map(Stage::samples).sum()
    }

    /// Returns the number of patches per image that a phase keeps.
    fn patches(&self, phase: &Phase) -> usize {
        let grid = phase.image_size as usize / self.model.patch();
        let masking = phase.masking.as_ref();
        masking.map_or(grid * grid, |masking| masking.kept(grid))
    }

    /// Returns the tokens per image in a phase, including the class token, or `None` if the model has no tokens.
    pub fn tokens(&self, phase: &Phase) -> Option<u64> {
        self.model.tokens(self.patches(phase))
    }

    /// Returns the multiply-adds of one image's forward pass in a phase.
    pub fn forward_macs(&self, phase: &Phase) -> u64 {
        let patches = self.patches(phase);
        self.model.forward_macs(phase.image_size as usize, patches)
    }

    /// Returns the multiply-adds from sample `from` to the end of the run, with `passes` forward passes per image.
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

    /// Returns the cost of the run as the paper counts it: attack steps + 1 forward passes per sample.
    ///
    /// Source: the compute column of the paper's tables.
    pub fn paper_macs(&self) -> f64 {
        self.macs(0, |stage| stage.attack_steps() + 1)
    }

    /// Returns the multiply-adds left from sample `from` to the end of the run.
    pub fn macs_left(&self, from: u64) -> f64 {
        self.macs(from, Stage::passes)
    }

    /// Returns the image size of the first phase, at which learned position embeddings are created.
    pub fn first_image_size(&self) -> usize {
        self.stage[0].phases[0].image_size as usize
    }
}

/// Combines the problems of a recipe into one error.
pub fn cannot_be_run(name: &str, problems: &[Problem]) -> Error {
    let plural = if problems.len() == 1 {
        "error"
    } else {
        "errors"
    };
    let mut text = format!("`{name}` is invalid: {} {plural}", problems.len());
    for problem in problems {
        text.push_str(&format!("\n\n  {problem}"));
    }
    Error::input(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tables 2 and 5 of the paper, in its unit of 10^10 giga multiply-adds, to the precision that its counts allow.
    #[test]
    fn recipes_reproduce_the_papers_compute_figures() {
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
    fn update_at_returns_the_stage_and_phase_of_an_update() {
        let text = include_str!("../../recipes/cifar10_micro.toml");
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
    fn attack_warmup_ends_at_full_strength() {
        let text = include_str!("../../recipes/cifar10_micro.toml");
        let mut stage = Recipe::parse(text, &[]).unwrap().stage.remove(0);
        stage.attack_warmup_samples = Some(1000);
        let epsilon = |seen| stage.attack_at(seen).unwrap().threats[0].epsilon.value();
        assert_eq!(epsilon(250), 2.0 / 255.0);
        let full = stage.attack.as_ref().map(|attack| attack.attack.clone());
        assert_eq!(stage.attack_at(1000), full);
        assert_eq!(stage.attack_at(5000), full);
    }

    #[test]
    fn every_recipe_in_the_repository_is_valid_and_round_trips() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        for path in files::list(&folder).unwrap() {
            let recipe = Recipe::load(&path, &[]).unwrap();
            let again = Recipe::parse(&recipe.to_toml(), &[]).unwrap();
            assert_eq!(again, recipe, "{}", path.display());
            assert_eq!(recipe.macs_left(recipe.samples()), 0.0);
        }
    }
}
