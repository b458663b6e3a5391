//! Tensors of exported models under the names of other programs.

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::Tensor;

use crate::error::Result;
use crate::files;
use crate::model::{Model, ModelConfig, Vit};
use crate::ops::{Device, Stored, from_vec, to_vec};
use crate::weights::import::Loaded;
use crate::weights::names::{Origin, Scheme, transposed};

/// A tensor to write.
pub(crate) struct NamedTensor {
    pub(crate) name: String,
    pub(crate) values: Tensor<1>,
    pub(crate) shape: Vec<usize>,
}

impl NamedTensor {
    pub(crate) fn new(name: String, values: Vec<f32>, shape: Vec<usize>) -> Self {
        let length = values.len();
        Self {
            name,
            values: from_vec(values, [length], &Device::cpu()),
            shape,
        }
    }

    /// Returns the tensors of another program that hold this one; none for zeros, which are not stored.
    pub(crate) fn renamed(mut self, origin: Origin) -> Vec<Self> {
        match origin {
            Origin::Same(name) => self.name = name,
            Origin::Lifted(name) => {
                self.name = name;
                let first = self.shape.iter().position(|size| *size != 1);
                self.shape.drain(..first.unwrap_or(0));
            }
            Origin::Transposed(name) => {
                let values = transposed(&to_vec(self.values), self.shape[1]);
                self.shape.reverse();
                self = Self::new(name, values, self.shape);
            }
            Origin::Stacked(names) => {
                self.shape[0] /= names.len();
                let values = to_vec(self.values);
                let part = values.len() / names.len();
                let parts = names.into_iter().zip(values.chunks_exact(part));
                return parts
                    .map(|(name, values)| Self::new(name, values.to_vec(), self.shape.clone()))
                    .collect();
            }
            Origin::Zeros(..) => return Vec::new(),
        }
        vec![self]
    }
}

/// Writes tensors to a safetensors file.
pub(crate) fn write_parts(file: &Path, parts: &[NamedTensor]) -> Result<()> {
    let tensors = parts.iter().map(|part| {
        let (values, shape) = (&part.values, &part.shape[..]);
        (part.name.clone(), Stored { values, shape })
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    files::write_tensors(file, tensors, &metadata)
}

/// Returns the tensors of an image tower under timm's names, with fixed positions as weights.
pub(crate) fn tower_parts(loaded: &Loaded) -> Vec<NamedTensor> {
    let parameters = loaded.model.parameters();
    let mut parts: Vec<NamedTensor> = parameters
        .into_iter()
        .filter(|parameter| parameter.name != "pos_embed")
        .map(|parameter| NamedTensor {
            name: parameter.name.clone(),
            values: parameter.value.clone(),
            shape: parameter.shape.clone(),
        })
        .collect();
    if let Model::Vit(vit) = &loaded.model {
        let table = vit.position_table(loaded.image_size);
        let shape = vec![1, table.len() / vit.config.width, vit.config.width];
        parts.push(NamedTensor::new("pos_embed".into(), table, shape));
    }
    parts
}

/// Returns the tensors of an image tower under the names of a scheme.
pub(crate) fn image_parts(loaded: &Loaded, scheme: Scheme) -> Vec<NamedTensor> {
    let convolutions = match loaded.model.config() {
        // The MLP layers of timm's smaller ConvNeXts are 1 x 1 convolutions.
        ModelConfig::ConvNext(convnext) => convnext.widths[0] < 96,
        ModelConfig::Vit(_) => false,
    };
    let renamed = |mut part: NamedTensor| {
        if convolutions && part.name.contains(".mlp.") && part.shape.len() == 2 {
            part.shape.extend([1, 1]);
        }
        let origin = scheme.origin(&part.name);
        origin.map_or(Vec::new(), |origin| part.renamed(origin))
    };
    tower_parts(loaded).into_iter().flat_map(renamed).collect()
}

/// Returns whether a weight of a transformer is absent or zero.
pub(crate) fn is_zero(vit: &Vit, name: &str) -> bool {
    let parameters = vit.parameters();
    let mut found = parameters.iter().filter(|parameter| parameter.name == name);
    found.all(|parameter| parameter.to_vec().iter().all(|value| *value == 0.0))
}
