//! Trainable parameters of objectives, in addition to the model's.

use crate::loss::LARGEST_SCALE;
use crate::model::Parameter;
use crate::ops::{Device, clamp};
use crate::text::TextTower;

/// CLIP's initial temperature.
const TEMPERATURE: f32 = 0.07;

/// Additional parameters that the contrastive objective trains.
#[derive(Clone, Debug, Default)]
pub struct ExtraParameters {
    /// Logarithm of the scale of the similarities (1 / temperature).
    pub log_scale: Option<Parameter>,
    /// A text tower that is trained jointly with the images.
    pub tower: Option<TextTower>,
}

impl ExtraParameters {
    /// Creates the contrastive objective's initial parameters: the scale, and a text tower if one is trained.
    pub fn contrastive(tower: Option<TextTower>, device: &Device) -> Self {
        let value = vec![(1.0 / TEMPERATURE).ln()];
        Self {
            log_scale: Some(Parameter::new("logit_scale", &[1], false, value, device)),
            tower,
        }
    }

    /// Iterates over the parameters, in the order of the optimizer and checkpoints.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let tower = self.tower.iter().flat_map(TextTower::parameters);
        self.log_scale.iter().chain(tower)
    }

    /// Iterates mutably over the parameters, in the same order.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        let tower = self.tower.iter_mut().flat_map(TextTower::parameters_mut);
        self.log_scale.iter_mut().chain(tower)
    }

    /// Clamps the scale to CLIP's bounds. Called after each update.
    pub fn clamp(&mut self) {
        if let Some(scale) = &mut self.log_scale {
            scale.value = clamp(scale.value.clone(), 0.0, LARGEST_SCALE.ln());
        }
    }
}
