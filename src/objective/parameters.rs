//! What objectives train besides the model.

use crate::loss::LARGEST_SCALE;
use crate::model::Parameter;
use crate::ops::{Device, clamp};
use crate::text::TextTower;

/// CLIP's initial temperature.
const TEMPERATURE: f32 = 0.07;

/// Parameters besides the model's, which the contrastive objective trains.
#[derive(Clone, Debug, Default)]
pub struct ExtraParameters {
    /// Logarithm of the similarities' scale (1 / temperature).
    pub log_scale: Option<Parameter>,
    /// A text tower that is trained with the images.
    pub tower: Option<TextTower>,
}

impl ExtraParameters {
    /// Those of the contrastive objective at the beginning of a stage: a scale, and the text tower if it is trained.
    pub fn contrastive(tower: Option<TextTower>, device: &Device) -> Self {
        let value = vec![(1.0 / TEMPERATURE).ln()];
        Self {
            log_scale: Some(Parameter::new("logit_scale", &[1], false, value, device)),
            tower,
        }
    }

    /// In the order in which optimizer and checkpoints have them.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let tower = self.tower.iter().flat_map(TextTower::parameters);
        self.log_scale.iter().chain(tower)
    }

    /// The same, to be changed.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        let tower = self.tower.iter_mut().flat_map(TextTower::parameters_mut);
        self.log_scale.iter_mut().chain(tower)
    }

    /// Keeps the scale within CLIP's bounds, after each update.
    pub fn clamp(&mut self) {
        if let Some(scale) = &mut self.log_scale {
            scale.value = clamp(scale.value.clone(), 0.0, LARGEST_SCALE.ln());
        }
    }
}
