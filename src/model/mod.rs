//! Models, which map images in [0, 1] to logits. Normalization is the first layer.
//!
//! Knows nothing of attacks, datasets or training.

pub mod config;
pub(crate) mod conv;
pub mod convnext;
pub(crate) mod init;
pub mod parameter;
pub mod pass;
pub mod position;
pub mod tokens;
pub mod vit;

pub use config::ModelConfig;
pub use config::common::Stem;
pub use config::convnext::ConvNextConfig;
pub use config::vit::{Pool, Position, VitConfig};
pub use convnext::ConvNext;
pub use parameter::Parameter;
pub use pass::{DropPath, NORM_EPS, Pass};
pub use tokens::{Kept, Masking};
pub use vit::Vit;

use std::convert::Infallible;

use burn::tensor::{Gradients, Tensor};

use crate::ops::Device;

use init::Init;

/// A model with its weights.
// A run has only a handful of models, and their size is in the weights.
#[allow(clippy::large_enum_variant)]
#[derive(Clone, Debug)]
pub enum Model {
    /// A vision transformer.
    Vit(Vit),
    /// A ConvNeXt.
    ConvNext(ConvNext),
}

impl From<Vit> for Model {
    fn from(vit: Vit) -> Self {
        Self::Vit(vit)
    }
}

impl From<ConvNext> for Model {
    fn from(convnext: ConvNext) -> Self {
        Self::ConvNext(convnext)
    }
}

impl Model {
    /// Creates a model with random weights.
    ///
    /// `image_size` is the image size of the learned positions.
    pub fn new(
        config: &ModelConfig,
        classes: usize,
        image_size: usize,
        seed: u64,
        device: &Device,
    ) -> Self {
        let mut init = Init::new(seed);
        let start = |name: &str, shape: &[usize]| Ok::<_, Infallible>(init.values(name, shape));
        let Ok(model) = Self::with_weights(config, classes, image_size, device, start);
        model
    }

    /// Builds a model, requesting its weights one by one by timm's name and shape, in timm's order.
    ///
    /// Each list of values becomes the memory of its tensor.
    ///
    /// Errors: the first error of `weights`.
    ///
    /// # Panics
    /// If values do not fill their shape.
    pub fn with_weights<E>(
        config: &ModelConfig,
        classes: usize,
        image_size: usize,
        device: &Device,
        weights: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
    ) -> Result<Self, E> {
        Ok(match config {
            ModelConfig::Vit(config) => {
                Vit::with_weights(config, classes, image_size, device, weights)?.into()
            }
            ModelConfig::ConvNext(config) => {
                ConvNext::with_weights(config, classes, device, weights)?.into()
            }
        })
    }

    /// Returns the configuration.
    pub fn config(&self) -> ModelConfig {
        match self {
            Self::Vit(vit) => ModelConfig::Vit(vit.config.clone()),
            Self::ConvNext(convnext) => ModelConfig::ConvNext(convnext.config.clone()),
        }
    }

    /// Returns the number of classes.
    pub fn classes(&self) -> usize {
        match self {
            Self::Vit(vit) => vit.classes,
            Self::ConvNext(convnext) => convnext.classes,
        }
    }

    /// Sets the channel mean and standard deviation, if given.
    pub fn normalize_by(&mut self, mean: Option<[f64; 3]>, std: Option<[f64; 3]>) {
        let (own_mean, own_std) = match self {
            Self::Vit(vit) => (&mut vit.config.mean, &mut vit.config.std),
            Self::ConvNext(convnext) => (&mut convnext.config.mean, &mut convnext.config.std),
        };
        *own_mean = mean.unwrap_or(*own_mean);
        *own_std = std.unwrap_or(*own_std);
    }

    /// Returns the weight and bias of the last layer.
    pub fn head(&self) -> &[Parameter; 2] {
        match self {
            Self::Vit(vit) => &vit.head,
            Self::ConvNext(convnext) => &convnext.head,
        }
    }

    /// Returns the weight and bias of the last layer, mutable.
    pub fn head_mut(&mut self) -> &mut [Parameter; 2] {
        match self {
            Self::Vit(vit) => &mut vit.head,
            Self::ConvNext(convnext) => &mut convnext.head,
        }
    }

    /// Returns the model with a new, random head for the given number of classes. Each `draw` of a seed gives a
    /// different head.
    pub fn with_new_head(mut self, classes: usize, seed: u64, draw: u64) -> Self {
        let mut init = Init::of_head(seed, draw);
        let (of_model, head) = match &mut self {
            Self::Vit(vit) => (&mut vit.classes, &mut vit.head),
            Self::ConvNext(convnext) => (&mut convnext.classes, &mut convnext.head),
        };
        *of_model = classes;
        for parameter in head {
            let device = Device::of(&parameter.value);
            let mut shape = parameter.shape.clone();
            shape[0] = classes;
            let values = init.values(&parameter.name, &shape);
            let name = parameter.name.clone();
            *parameter = Parameter::new(name, &shape, parameter.decays, values, &device);
        }
        self
    }

    /// Returns the model with its learned positions, if it has any, resampled to another image size.
    pub fn at_image_size(mut self, image_size: usize) -> Self {
        if let Self::Vit(vit) = &mut self {
            vit.resample_positions(image_size);
        }
        self
    }

    /// Computes the logits of a batch.
    ///
    /// Shapes: `images` `[batch, 3, height, width]` with height = width, a size that
    /// [`ModelConfig::grid`] allows; returns `[batch, classes]`.
    /// Units: pixels in [0, 1].
    pub fn logits(&self, images: Tensor<4>, pass: &Pass) -> Tensor<2> {
        match self {
            Self::Vit(vit) => vit.logits(images, pass),
            Self::ConvNext(convnext) => convnext.logits(images, pass),
        }
    }

    /// Returns all weights, in timm's order.
    pub fn parameters(&self) -> Vec<&Parameter> {
        match self {
            Self::Vit(vit) => vit.parameters(),
            Self::ConvNext(convnext) => convnext.parameters(),
        }
    }

    /// Returns all weights, mutable, in timm's order.
    pub fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        // Packed weights keep references to the memory of the weights, which would prevent in-place updates.
        match self {
            Self::Vit(vit) => vit.clear_caches(),
            Self::ConvNext(convnext) => convnext.clear_caches(),
        }
        self.places_of_parameters()
    }

    fn places_of_parameters(&mut self) -> Vec<&mut Parameter> {
        match self {
            Self::Vit(vit) => vit.places_of_parameters(),
            Self::ConvNext(convnext) => convnext.places_of_parameters(),
        }
    }

    /// Returns a copy of the model whose weights require gradients.
    ///
    /// The model itself is never tracked, so attacks compute no weight gradients.
    pub fn tracked(&self) -> Self {
        let mut model = self.clone();
        parameter::track(model.places_of_parameters());
        model
    }

    /// Returns the weight gradients of a tracked model, in the order of [`Self::parameters`], without frozen ones.
    pub fn gradients(&self, gradients: &mut Gradients) -> Vec<Tensor<1>> {
        parameter::gradients_of(self.parameters(), gradients)
    }

    /// Returns a copy of the model with other values, such as averaged weights.
    ///
    /// # Panics
    /// If there is not exactly one tensor of the right length per parameter.
    pub fn with_values(&self, values: impl IntoIterator<Item = Tensor<1>>) -> Self {
        let mut model = self.clone();
        match &mut model {
            Self::Vit(vit) => vit.renew_caches(),
            Self::ConvNext(convnext) => convnext.renew_caches(),
        }
        parameter::replace(model.places_of_parameters(), values);
        model
    }
}
