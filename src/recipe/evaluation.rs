//! Evaluations during training and at the end of a run.

use serde::ser::SerializeMap;

use super::stage::Stage;
use super::training_attack::EvaluationAttack;
use crate::attack::pgd::check_range;
use crate::attack::{Attack, Norm};
use crate::data::Selection;
use crate::eval::autoattack::{Settings, Version};
use crate::settings::{Described, Field, Key, Kind, Section, Table, at_least, settings};
use crate::units::Fraction;

settings! {
    /// Evaluation during training, at this interval and at the end of each stage.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Evaluation(table) {
        /// Samples between evaluations.
        pub every_samples: u64 { limits: at_least(1.0), unit: "samples", example: "1_281_024" },
        /// Test images to evaluate on.
        pub images: TestImages {},
        /// Attack for robust accuracy. Clean accuracy is always measured as well.
        pub attack: EvaluationAttack {},
    }
}

settings! {
    /// Evaluations at the end of the run, each written to `result-NAME.json` in the run folder.
    #[derive(Clone, Debug, PartialEq)]
    pub struct FinalEvaluation(table) {
        /// Name of the result: 1 to 64 of `A-Z a-z 0-9 . _ -`, not starting with `.` or `-`.
        pub name: String { kind: super::names::KIND, example: "\"autoattack\"" } [=> table.name(Self::DESCRIPTION.key("name"))],
        /// Stage whose final model is evaluated; the last stage if omitted. A model trained on captions is evaluated
        /// zero-shot by class names.
        pub stage: Option<String> { example: "\"pretrain\"" },
        /// Test images to evaluate on.
        pub images: TestImages {},
        /// Attacks to run, in order, named as in `advxl eval --attack`.
        pub attacks: Vec<String> { example: "[\"autoattack\"]" },
        /// Norm that bounds the perturbation.
        pub norm: Norm { example: "\"linf\"" },
        /// Maximum size of the perturbation in this norm, for pixels in [0, 1].
        pub epsilon: Fraction { limits: at_least(0.0), example: "\"4/255\"" },
    }
    check { check_range(table, norm, epsilon.as_ref()) }
    verify check_attacks
}

/// The test images of an evaluation.
#[derive(Clone, Debug, PartialEq)]
pub enum TestImages {
    /// `images = N`: a stratified sample of N images, or all images if there are fewer.
    Images(u64),
    /// `ids = "FILE"`: the images listed in a file.
    Ids(String),
}

const IMAGES: Key = Key {
    limits: at_least(1.0),
    unit: "images",
    example: "5_000",
    fallback: "exactly one of `images` and `ids`",
    ..Key::of::<u64>(
        "images",
        "Number of test images to sample, stratified by class. All images are used if there are fewer.",
    )
};

const IDS: Key = Key {
    example: "\"subset.txt\"",
    fallback: "exactly one of `images` and `ids`",
    ..Key::of::<String>("ids", "File with the ids of the test images, one per line.")
};

impl Described for TestImages {
    const KIND: Kind = Kind::OneOf(&[IMAGES, IDS]);

    fn print<M: SerializeMap>(&self, _: &'static str, map: &mut M) -> Result<(), M::Error> {
        match self {
            Self::Images(count) => map.serialize_entry(IMAGES.name, count),
            Self::Ids(file) => map.serialize_entry(IDS.name, file),
        }
    }
}

impl Field for TestImages {
    fn read(table: &Table, _: &Key) -> Option<Self> {
        match (table.has(IMAGES.name), table.has(IDS.name)) {
            (_, false) => table.value(&IMAGES).map(Self::Images),
            (false, true) => table.value(&IDS).map(Self::Ids),
            (true, true) => {
                let message = "set exactly one of `images` or `ids`";
                let hint =
                    "`images` sets the size of a stratified sample, `ids` a file that lists images";
                table.problem_with_hint("ids", message, hint);
                None
            }
        }
    }
}

impl TestImages {
    /// Converts to a selection of a data set.
    pub fn selection(&self) -> Selection {
        match self {
            Self::Images(count) => Selection::Sample(*count as usize),
            Self::Ids(path) => Selection::Listed(path.into()),
        }
    }
}

fn check_attacks(table: &Table, evaluation: &FinalEvaluation) {
    match evaluation.settings().named(&evaluation.attacks) {
        Ok(suite) if !suite.attacks.is_empty() => {}
        Ok(_) => {
            let message = "attacks is empty";
            table.problem_with_hint(
                "attacks",
                message,
                "list at least one, such as [\"autoattack\"]",
            );
        }
        Err((unknown, hint)) => {
            table.problem_with_hint("attacks", format!("unknown attack `{unknown}`"), hint);
        }
    }
}

impl FinalEvaluation {
    /// Returns the index of the stage to evaluate, or `None` if there is no such stage.
    pub fn stage_of(&self, stages: &[Stage]) -> Option<usize> {
        match &self.stage {
            None => stages.len().checked_sub(1),
            Some(named) => stages.iter().position(|stage| stage.name == *named),
        }
    }

    fn settings(&self) -> Settings {
        Settings::new(Version::Standard, self.norm, self.epsilon.clone())
    }

    /// Returns the attacks.
    ///
    /// # Panics
    /// If an attack name is invalid, which reading the recipe rules out.
    pub fn attacks(&self) -> Vec<Attack> {
        self.settings()
            .named(&self.attacks)
            .expect("names were checked")
            .attacks
    }
}
