//! RobustBench leaderboards and the evaluation that each requires of an entry.
//!
//! Source: <https://github.com/RobustBench/robustbench>, its `model_info` and the README's rules for new entries.
//! Does not check that the images are the leaderboard's: a result records only their number and their class names.

use serde_json::Value;

use crate::attack::Norm;
use crate::error::{Error, Result};
use crate::units::{Fraction, grouped};
use crate::weights::import::Loaded;

/// The leaderboards of a dataset.
#[derive(Debug)]
pub(crate) struct Board {
    /// Name in `--dataset` and RobustBench.
    name: &'static str,
    /// Description of the test images.
    images_of: &'static str,
    images: usize,
    /// Norms and radii; each pair is a separate leaderboard.
    threats: &'static [(Norm, &'static str)],
    classes: Classes,
}

/// How the classes of a dataset are recognized.
#[derive(Debug)]
enum Classes {
    /// By their names, sorted and separated by spaces.
    Named(&'static str),
    /// ImageNet's 1000 classes: by ids such as `n01440764`, or by names.
    ImageNet,
}

const BOARDS: [Board; 3] = [
    Board {
        name: "cifar10",
        images_of: "the CIFAR-10 test set",
        images: 10_000,
        threats: &[(Norm::Linf, "8/255"), (Norm::L2, "0.5")],
        classes: Classes::Named("airplane automobile bird cat deer dog frog horse ship truck"),
    },
    Board {
        name: "cifar100",
        images_of: "the CIFAR-100 test set",
        images: 10_000,
        threats: &[(Norm::Linf, "8/255")],
        classes: Classes::Named(
            "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can \
             castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin \
             elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster \
             man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck \
             pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk \
             skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television \
             tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm",
        ),
    },
    Board {
        name: "imagenet",
        images_of: "RobustBench's 5,000 ImageNet validation images",
        images: 5_000,
        threats: &[(Norm::Linf, "4/255")],
        classes: Classes::ImageNet,
    },
];

/// Returns the leaderboards of a dataset.
pub(crate) fn named(dataset: &str) -> Result<&'static Board> {
    let found = BOARDS.iter().find(|board| board.name == dataset);
    found.ok_or_else(|| {
        let message = match dataset {
            "" => "--dataset is missing: a RobustBench entry needs a leaderboard".to_owned(),
            other => format!("--dataset {other}: unknown RobustBench leaderboard"),
        };
        Error::input(message).hint("use cifar10, cifar100 or imagenet")
    })
}

impl Board {
    /// Returns how to produce the required result.
    pub(crate) fn command(&self) -> String {
        let (norm, epsilon) = &self.threats[0];
        format!(
            "run `advxl eval MODEL --data SPEC --attack autoattack --norm {} --eps {epsilon}` on {}, then pass its \
             result.json with --result",
            norm.word(),
            self.images_of
        )
    }

    /// Checks that an AutoAttack result and its model qualify; returns the radius as the leaderboard writes it.
    ///
    /// Errors: a list of all mismatches.
    pub(crate) fn check(
        &self,
        loaded: &Loaded,
        result: &Value,
        evaluation: &Value,
    ) -> Result<&'static str> {
        let mut faults = Vec::new();
        let data = result["data"].as_str().unwrap_or_default();
        if data.starts_with("synthetic:") {
            faults.push(format!("the images are synthetic (`{data}`)"));
        }
        let images = evaluation["robust"].as_array().map_or(0, Vec::len);
        if images != self.images {
            let (found, right) = (grouped(images as u64), grouped(self.images as u64));
            faults.push(format!("{found} images, expected {right}"));
        }
        let classes = self.classes.count();
        if loaded.model.classes() != classes {
            let found = loaded.model.classes();
            faults.push(format!("a model with {found} classes, expected {classes}"));
        }
        faults.extend(self.classes.fault(&result["data_classes"]));
        let word = evaluation["norm"].as_str().unwrap_or_default();
        let written = evaluation["epsilon"].as_str().unwrap_or_default();
        let value = written.parse::<Fraction>().ok().map(|found| found.value());
        let threat = self.threats.iter().find(|(norm, epsilon)| {
            let right = epsilon.parse::<Fraction>().ok();
            let near = right.zip(value).is_some_and(|(right, value)| {
                // Accept a fraction written as a decimal number.
                (right.value() - value).abs() < 1e-6
            });
            norm.word() == word && near
        });
        if threat.is_none() {
            let threats = self.threats.iter();
            let threats = threats.map(|(norm, epsilon)| format!("{} {epsilon}", norm.word()));
            let threats = threats.collect::<Vec<_>>().join(" or ");
            faults.push(format!("{word} {written}, expected {threats}"));
        }
        if result["precision"] != "f32" {
            let found = &result["precision"];
            faults.push(format!("precision {found}, expected \"f32\""));
        }
        match threat {
            Some((_, epsilon)) if faults.is_empty() => Ok(epsilon),
            _ => {
                let message = format!(
                    "the result does not qualify for RobustBench's leaderboard `{}`: {}",
                    self.name,
                    faults.join("; ")
                );
                Err(Error::input(message).hint(self.command()))
            }
        }
    }
}

impl Classes {
    fn count(&self) -> usize {
        match self {
            Self::Named(names) => names.split_whitespace().count(),
            Self::ImageNet => 1000,
        }
    }

    /// Describes the mismatch if the class names of a dataset are not the leaderboard's.
    fn fault(&self, found: &Value) -> Option<String> {
        let found: Vec<&str> = found
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let fits = match self {
            Self::Named(names) => {
                let mut found = found.clone();
                found.sort_unstable();
                found.iter().copied().eq(names.split_whitespace())
            }
            Self::ImageNet => {
                let is_id = |name: &&str| {
                    let digits = name.strip_prefix('n').unwrap_or_default();
                    digits.len() == 8 && digits.bytes().all(|digit| digit.is_ascii_digit())
                };
                let in_words = |name: &&str| name.starts_with("tench");
                found.len() == 1000 && (found.iter().all(is_id) || found.iter().any(in_words))
            }
        };
        let names = found.first().zip(found.last());
        let names = names.map_or(String::new(), |(first, last)| {
            format!(" (`{first}` to `{last}`)")
        });
        (!fits).then(|| {
            let count = found.len();
            format!("the {count} classes of the dataset{names} are not the leaderboard's")
        })
    }
}
