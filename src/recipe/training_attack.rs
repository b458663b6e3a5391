//! The attack of a stage: PGD, and the precision of its passes.

use serde::Serialize;
use serde::ser::SerializeMap;

use crate::attack::Pgd;
use crate::model::ModelConfig;
use crate::ops::AttackPrecision;
use crate::settings::{Described, Description, Field, Key, Kind, Section, Table};

/// The PGD attack of a training stage, with its precision.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainingAttack {
    /// The attack.
    #[serde(flatten)]
    pub pgd: Pgd,
    /// Precision of the attack's passes; the recipe's `precision` if `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<AttackPrecision>,
}

const PRECISION: Key = Key {
    example: "\"fp8\"",
    fallback: "the recipe's `precision`",
    ..Key::of::<Option<AttackPrecision>>(
        "precision",
        "Precision of the attack's passes. Lower precision is faster; updates and evaluations keep the recipe's.",
    )
};

const KEYS: [Key; 6] = {
    let mut keys = [PRECISION; 6];
    let pgd = Pgd::DESCRIPTION.keys;
    assert!(pgd.len() == 5);
    let mut index = 0;
    while index < 5 {
        keys[index] = pgd[index];
        index += 1;
    }
    keys
};

impl Section for TrainingAttack {
    const DESCRIPTION: &'static Description = &Description {
        about: Pgd::DESCRIPTION.about,
        keys: &KEYS,
    };
}

impl Described for TrainingAttack {
    const KIND: Kind = Kind::Table(Self::DESCRIPTION);

    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error> {
        map.serialize_entry(key, self)
    }
}

impl Field for TrainingAttack {
    fn read(table: &Table, key: &Key) -> Option<Self> {
        table.child(key, |table| {
            let pgd = Pgd::read(table);
            let precision = Option::read(table, &PRECISION);
            Some(Self {
                pgd: pgd?,
                precision: precision?,
            })
        })
    }
}

/// Reports FP8 for models that do not support it.
pub(super) fn check_precision(
    stage: &Table,
    attack: Option<&TrainingAttack>,
    model: Option<&ModelConfig>,
) {
    if attack.and_then(|attack| attack.precision) != Some(AttackPrecision::Fp8) {
        return;
    }
    let why = match model {
        Some(ModelConfig::ConvNext(_)) => "the model is a ConvNeXt".to_owned(),
        Some(ModelConfig::Vit(vit)) => {
            let sizes = [("width", vit.width), ("hidden", vit.hidden)];
            match sizes.iter().find(|(_, size)| !size.is_multiple_of(16)) {
                Some((name, size)) => format!("the model's {name} is {size}"),
                None => return,
            }
        }
        None => return,
    };
    let message = format!(
        "attack.precision = `fp8` requires a transformer whose `width` and `hidden` are multiples of 16, but {why}"
    );
    stage.problem_with_hint("attack", message, "use \"bf16\", or omit attack.precision");
}
