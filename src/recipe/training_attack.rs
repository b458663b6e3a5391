//! The attack of a stage or of an evaluation during training: PGD or APGD, in one norm or in several.

use serde::ser::SerializeMap;

use crate::attack::pgd::check_range;
use crate::attack::{Algorithm, BatchAttack, Combine, Norm, Pgd, Start};
use crate::model::ModelConfig;
use crate::ops::AttackPrecision;
use crate::settings::{
    Described, Description, Field, Key, Kind, Section, Table, above, at_least, settings,
};
use crate::units::Fraction;

/// The attack of a training stage, with its precision.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingAttack {
    /// The attack.
    pub attack: BatchAttack,
    /// Precision of the attack's passes; the recipe's `precision` if `None`.
    pub precision: Option<AttackPrecision>,
}

/// The attack of an evaluation during training: PGD, in one norm or in several.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationAttack(pub Vec<Pgd>);

settings! {
    /// A norm with its epsilon.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Threat(table) {
        /// Norm that bounds the perturbation.
        pub norm: Norm { example: "\"l1\"" },
        /// Maximum size of the perturbation in this norm, for pixels in [0, 1].
        pub epsilon: Fraction { limits: at_least(0.0), example: "\"75\"" },
        /// Step size in this norm, for pixels in [0, 1]; not for APGD, which adapts it.
        pub step_size: Option<Fraction> { limits: above(0.0), example: "\"15\"" },
    }
    check { check_range(table, norm, epsilon.as_ref()) }
}

const ALGORITHM: Key = Key {
    omit_default: true,
    example: "\"apgd\"",
    fallback: "`pgd`",
    ..Key::of::<Algorithm>("algorithm", "How the steps are chosen.")
};

const NORM: Key = Key {
    example: "\"linf\"",
    fallback: "either `norm` or `norms`",
    ..Key::of::<Norm>("norm", "Norm that bounds the perturbation.")
};

const EPSILON: Key = Key {
    limits: at_least(0.0),
    example: "\"4/255\"",
    fallback: "required with `norm`",
    ..Key::of::<Fraction>(
        "epsilon",
        "Maximum size of the perturbation in this norm, for pixels in [0, 1].",
    )
};

const STEP_SIZE: Key = Key {
    limits: above(0.0),
    example: "\"1/255\"",
    fallback: "required with `norm` and PGD",
    ..Key::of::<Fraction>(
        "step_size",
        "Step size in this norm, for pixels in [0, 1]; not for APGD, which adapts it.",
    )
};

const NORMS: Key = Key {
    fallback: "either `norm` or `norms`",
    ..Key::of::<Vec<Threat>>(
        "norms",
        "Several norms, instead of `norm`, `epsilon` and `step_size`.",
    )
};

const COMBINE: Key = Key {
    example: "\"worst\"",
    fallback: "`alternate`; only with `norms`",
    ..Key::of::<Combine>("combine", "How several norms share the batches.")
};

const STEPS: Key = Pgd::DESCRIPTION.keys[3];
const START: Key = Pgd::DESCRIPTION.keys[4];

const PRECISION: Key = Key {
    example: "\"fp8\"",
    fallback: "the recipe's `precision`",
    ..Key::of::<Option<AttackPrecision>>(
        "precision",
        "Precision of the attack's passes. Lower precision is faster; updates and evaluations keep the recipe's.",
    )
};

impl TrainingAttack {
    /// Creates PGD in one norm.
    pub fn pgd(pgd: Pgd, precision: Option<AttackPrecision>) -> Self {
        let attack = BatchAttack::pgd(pgd);
        Self { attack, precision }
    }
}

impl EvaluationAttack {
    /// Returns the name as shown in tables, such as `pgd-20`.
    pub fn name(&self) -> String {
        self.0[0].name()
    }
}

impl Section for TrainingAttack {
    const DESCRIPTION: &'static Description = &Description {
        about: "PGD or APGD on each batch: projected gradient ascent on the loss, in one norm or in several.",
        keys: &[
            ALGORITHM, NORM, EPSILON, STEP_SIZE, NORMS, COMBINE, STEPS, START, PRECISION,
        ],
    };
}

impl Section for EvaluationAttack {
    const DESCRIPTION: &'static Description = &Description {
        about: "PGD on the test images, in one norm or in several: accuracy in each norm and in their union.",
        keys: &[NORM, EPSILON, STEP_SIZE, NORMS, STEPS, START],
    };
}

impl Described for TrainingAttack {
    const KIND: Kind = Kind::Table(Self::DESCRIPTION);

    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error> {
        map.serialize_entry(key, self)
    }
}

impl Described for EvaluationAttack {
    const KIND: Kind = Kind::Table(Self::DESCRIPTION);

    fn print<M: SerializeMap>(&self, key: &'static str, map: &mut M) -> Result<(), M::Error> {
        map.serialize_entry(key, self)
    }
}

impl serde::Serialize for TrainingAttack {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        let BatchAttack {
            algorithm,
            threats,
            combine,
        } = &self.attack;
        if *algorithm != Algorithm::Pgd {
            Described::print(algorithm, ALGORITHM.name, &mut map)?;
        }
        print_threats(threats, *algorithm, &mut map)?;
        if threats.len() > 1 {
            Described::print(combine, COMBINE.name, &mut map)?;
        }
        Described::print(&self.precision, PRECISION.name, &mut map)?;
        map.end()
    }
}

impl serde::Serialize for EvaluationAttack {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        print_threats(&self.0, Algorithm::Pgd, &mut map)?;
        map.end()
    }
}

fn print_threats<M: SerializeMap>(
    threats: &[Pgd],
    algorithm: Algorithm,
    map: &mut M,
) -> Result<(), M::Error> {
    let has_step_size = algorithm == Algorithm::Pgd;
    match threats {
        [threat] => {
            Described::print(&threat.norm, NORM.name, map)?;
            Described::print(&threat.epsilon, EPSILON.name, map)?;
            if has_step_size {
                Described::print(&threat.step_size, STEP_SIZE.name, map)?;
            }
        }
        threats => {
            let norms = threats.iter().map(|threat| Threat {
                norm: threat.norm,
                epsilon: threat.epsilon.clone(),
                step_size: has_step_size.then(|| threat.step_size.clone()),
            });
            map.serialize_entry(NORMS.name, &norms.collect::<Vec<_>>())?;
        }
    }
    Described::print(&threats[0].steps, STEPS.name, map)?;
    Described::print(&threats[0].start, START.name, map)
}

impl Field for TrainingAttack {
    fn read(table: &Table, key: &Key) -> Option<Self> {
        table.child(key, |table| {
            let algorithm = match table.has(ALGORITHM.name) {
                true => table.value(&ALGORITHM),
                false => Some(Algorithm::Pgd),
            };
            let threats = read_threats(table, algorithm.unwrap_or(Algorithm::Pgd));
            let combine = match (table.has(COMBINE.name), table.has(NORMS.name)) {
                (true, true) => table.value(&COMBINE),
                (true, false) => {
                    table.problem(COMBINE.name, "combine has no effect without `norms`");
                    None
                }
                (false, _) => Some(Combine::Alternate),
            };
            let precision = Option::read(table, &PRECISION);
            Some(Self {
                attack: BatchAttack {
                    algorithm: algorithm?,
                    threats: threats?,
                    combine: combine?,
                },
                precision: precision?,
            })
        })
    }
}

impl Field for EvaluationAttack {
    fn read(table: &Table, key: &Key) -> Option<Self> {
        table.child(key, |table| read_threats(table, Algorithm::Pgd).map(Self))
    }
}

/// Reads the norms of an attack, with the steps and the start that they share.
fn read_threats(table: &Table, algorithm: Algorithm) -> Option<Vec<Pgd>> {
    let steps = table.value(&STEPS);
    let start: Option<Start> = table.value(&START);
    let alone = [NORM.name, EPSILON.name, STEP_SIZE.name];
    let threats = if table.has(NORMS.name) {
        for key in alone.into_iter().filter(|key| table.has(key)) {
            table.problem(key, format!("set either `norms` or `{key}`"));
        }
        table.children(&NORMS, |norm| {
            Threat::read(norm).filter(|threat| check_step_size(norm, threat, algorithm))
        })
    } else {
        let norm = table.value(&NORM);
        let epsilon: Option<Fraction> = table.value(&EPSILON);
        check_range(table, norm, epsilon.as_ref());
        let step_size = match table.has(STEP_SIZE.name) {
            true => table.value(&STEP_SIZE).map(Some),
            false => Some(None),
        };
        let threat = norm.zip(epsilon).zip(step_size);
        let threat = threat.map(|((norm, epsilon), step_size)| Threat {
            norm,
            epsilon,
            step_size,
        });
        threat
            .filter(|threat| check_step_size(table, threat, algorithm))
            .map(|threat| vec![threat])
    };
    let (steps, start) = (steps?, start?);
    let threats = threats?.into_iter().map(|threat| Pgd {
        norm: threat.norm,
        step_size: threat.step_size.unwrap_or_else(|| threat.epsilon.clone()),
        epsilon: threat.epsilon,
        steps,
        start,
    });
    Some(threats.collect())
}

/// Reports a step size that PGD lacks, or that APGD ignores.
fn check_step_size(table: &Table, threat: &Threat, algorithm: Algorithm) -> bool {
    match (&threat.step_size, algorithm) {
        (None, Algorithm::Pgd) => table.missing(&STEP_SIZE),
        (Some(_), Algorithm::Apgd) => {
            let message = "step_size has no effect with algorithm = `apgd`, which adapts it";
            table.problem_with_hint(STEP_SIZE.name, message, "remove it");
        }
        _ => return true,
    }
    false
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
