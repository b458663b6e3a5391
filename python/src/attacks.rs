//! Attack settings passed from Python.

use advxl::attack::{Attack, Norm};
use advxl::error::{Error, Result};
use advxl::eval::autoattack::{ATTACKS, Settings, Version};
use advxl::settings::Words;
use advxl::units::Fraction;
use pyo3::prelude::*;

/// Settings of one attack. AutoAttack's defaults apply where a value is None.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct AttackSpec {
    name: String,
    norm: String,
    eps: String,
    #[pyo3(default)]
    step_size: Option<String>,
    #[pyo3(default)]
    steps: Option<u64>,
    #[pyo3(default)]
    targets: Option<u64>,
    #[pyo3(default)]
    restarts: Option<u64>,
    #[pyo3(default)]
    queries: Option<u64>,
    #[pyo3(default)]
    averages: Option<u64>,
    #[pyo3(default)]
    enlarged: Option<bool>,
}

impl AttackSpec {
    /// Builds the attack.
    ///
    /// Errors: an unknown name or norm, an invalid epsilon, a count of 0.
    pub(crate) fn attack(&self) -> Result<Attack> {
        let norm = Norm::from_word(&self.norm).ok_or_else(|| {
            Error::input(format!("unknown norm `{}`", self.norm)).hint("use Linf, L2 or L1")
        })?;
        let epsilon = size("eps", &self.eps)?;
        if norm == Norm::Linf && epsilon.value() > 1.0 {
            let message = format!("eps {} is larger than the range of a pixel", self.eps);
            return Err(Error::input(message).hint("pixels are in [0, 1]: use 8 / 255, not 8"));
        }
        let counts = [
            ("n_iter", self.steps),
            ("n_target_classes", self.targets),
            ("n_restarts", self.restarts),
            ("n_queries", self.queries),
            ("eot_iter", self.averages),
        ];
        for (name, count) in counts {
            if count == Some(0) {
                return Err(Error::input(format!("{name} must be at least 1")));
            }
        }
        let step_size = self.step_size.as_deref();
        let settings = Settings {
            step_size: step_size.map(|text| size("step_size", text)).transpose()?,
            steps: self.steps,
            targets: self.targets,
            restarts: self.restarts,
            queries: self.queries,
            ..Settings::new(Version::Standard, norm, epsilon)
        };
        let mut attack = settings.attack(&self.name).ok_or_else(|| {
            let message = format!("unknown attack `{}`", self.name);
            Error::input(message).hint(format!("use any of {}", ATTACKS.join(", ")))
        })?;
        if let Attack::Apgd(apgd) = &mut attack {
            apgd.averages = self.averages.unwrap_or(apgd.averages);
            apgd.enlarged = self.enlarged.unwrap_or(apgd.enlarged);
        }
        Ok(attack)
    }
}

fn size(name: &str, text: &str) -> Result<Fraction> {
    let parsed = text.parse::<Fraction>().ok();
    let parsed = parsed.filter(|size| size.value().is_finite() && size.value() >= 0.0);
    parsed.ok_or_else(|| {
        let message = format!("invalid {name} `{text}`");
        Error::input(message).hint("use a number of at least 0, or a string such as \"8/255\"")
    })
}
