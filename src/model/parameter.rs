//! One tensor of weights under its published name.

use burn::tensor::{Device, Tensor};

use crate::fused::{from_vec, to_vec};

/// A named tensor that training moves.
///
/// Kept flat, so that optimizer, checkpoint and average treat all alike; the model reshapes it
/// where it is used, which costs nothing.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The name in timm's weight files.
    pub name: String,
    /// The shape in timm's weight files.
    pub shape: Vec<usize>,
    /// Whether weight decay applies: to matrices, not to biases, norms, positions, class token.
    pub decays: bool,
    /// The values, flat.
    pub value: Tensor<1>,
}

impl Parameter {
    /// A tensor with given values, outside automatic differentiation.
    ///
    /// # Panics
    /// When the shape does not hold the values.
    pub fn new(
        name: impl Into<String>,
        shape: &[usize],
        decays: bool,
        values: Vec<f32>,
        device: &Device,
    ) -> Self {
        assert_eq!(
            shape.iter().product::<usize>(),
            values.len(),
            "values must fill the shape"
        );
        let length = values.len();
        Self {
            name: name.into(),
            shape: shape.to_vec(),
            decays,
            value: from_vec(values, [length], device),
        }
    }

    /// The values in a shape.
    pub fn shaped<const D: usize>(&self, shape: [usize; D]) -> Tensor<D> {
        self.value.clone().reshape(shape)
    }

    /// The values on the host.
    pub fn to_vec(&self) -> Vec<f32> {
        to_vec(self.value.clone())
    }
}
