//! Evaluations while training and at the end of a run.

use serde::ser::SerializeMap;

use super::stage::Stage;
use crate::attack::pgd::check_range;
use crate::attack::{Attack, Norm, Pgd};
use crate::data::Selection;
use crate::eval::autoattack::{Settings, Version};
use crate::settings::{Described, Field, Key, Kind, Section, Table, at_least, settings};
use crate::units::Fraction;

settings! {
    /// Evaluation while training, at this interval and at the end of each stage.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Evaluation(table) {
        /// Samples between evaluations.
        pub every_samples: u64 { limits: at_least(1.0), unit: "samples", example: "1_281_024" },
        /// Test images that are evaluated.
        pub images: TestImages {},
        /// Attack for robust accuracy; clean accuracy is measured as well.
        pub attack: Pgd {},
    }
}

settings! {
    /// Evaluations of the trained model, each written to `result-NAME.json` in the run's folder.
    #[derive(Clone, Debug, PartialEq)]
    pub struct FinalEvaluation(table) {
        /// Name of the result: 1 to 64 of `A-Z a-z 0-9 . _ -`.
        pub name: String { kind: super::names::KIND, example: "\"autoattack\"" } [=> table.name(Self::DESCRIPTION.key("name"))],
        /// Stage whose final model is evaluated, zero-shot by class names if it trains with captions; the last stage without it.
        pub stage: Option<String> { example: "\"pretrain\"" },
        /// Test images that are evaluated.
        pub images: TestImages {},
        /// Attacks in order, by the names of `advxl eval --attack`.
        pub attacks: Vec<String> { example: "[\"autoattack\"]" },
        /// Norm that bounds the perturbation.
        pub norm: Norm { example: "\"linf\"" },
        /// Largest perturbation in this norm, for pixels in [0, 1].
        pub epsilon: Fraction { limits: at_least(0.0), example: "\"4/255\"" },
    }
    check { check_range(table, norm, epsilon.as_ref()) }
    verify check_attacks
}

/// Which of the test images an evaluation uses.
#[derive(Clone, Debug, PartialEq)]
pub enum TestImages {
    /// `images = N`: a stratified sample; all images if there are no more.
    Images(u64),
    /// `ids = "FILE"`: the images that a file lists.
    Ids(String),
}

const IMAGES: Key = Key {
    limits: at_least(1.0),
    unit: "images",
    example: "5_000",
    fallback: "exactly one of `images` and `ids`",
    ..Key::of::<u64>(
        "images",
        "Size of a sample of the test images, stratified by class; all images if there are no more.",
    )
};

const IDS: Key = Key {
    example: "\"subset.txt\"",
    fallback: "exactly one of `images` and `ids`",
    ..Key::of::<String>("ids", "File that lists the test images, one id a line.")
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
                let hint = "`images` takes a stratified sample of a size, `ids` the images that a file lists";
                table.problem_with_hint("ids", message, hint);
                None
            }
        }
    }
}

impl TestImages {
    /// The same for a data set.
    pub fn selection(&self) -> Selection {
        match self {
            Self::Images(count) => Selection::Sample(*count as usize),
            Self::Ids(path) => Selection::Listed(path.into()),
        }
    }
}

fn check_attacks(table: &Table, evaluation: &FinalEvaluation) {
    match evaluation.settings().named(&evaluation.attacks) {
        Ok(attacks) if !attacks.is_empty() => {}
        Ok(_) => {
            let message = "attacks names no attack";
            table.problem_with_hint("attacks", message, "such as [\"autoattack\"]");
        }
        Err((unknown, hint)) => {
            table.problem_with_hint("attacks", format!("unknown attack `{unknown}`"), hint);
        }
    }
}

impl FinalEvaluation {
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
