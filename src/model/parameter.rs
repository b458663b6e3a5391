//! One tensor of weights under its published name.

use burn::tensor::{Gradients, Tensor};

use crate::ops::{Device, from_vec, to_vec, zeros};

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

/// Records parameters for their gradients.
pub(crate) fn track<'a>(parameters: impl IntoIterator<Item = &'a mut Parameter>) {
    for parameter in parameters {
        parameter.value = parameter.value.clone().autodiff().require_grad();
    }
}

/// The gradients of recorded parameters, in their order.
pub(crate) fn gradients_of<'a>(
    parameters: impl IntoIterator<Item = &'a Parameter>,
    gradients: &mut Gradients,
) -> Vec<Tensor<1>> {
    let of = |parameter: &Parameter| {
        let found = parameter.value.grad_remove(gradients);
        // A weight that the loss does not depend on, such as the class token of a model
        // without blocks.
        found.unwrap_or_else(|| {
            let value = &parameter.value;
            zeros(value.dims(), &Device::of(value))
        })
    };
    parameters.into_iter().map(of).collect()
}

/// Gives parameters other values, such as the average of the weights.
///
/// # Panics
/// When there is not one tensor of the right length for each parameter.
pub(crate) fn replace(
    parameters: Vec<&mut Parameter>,
    values: impl IntoIterator<Item = Tensor<1>>,
) {
    let values: Vec<_> = values.into_iter().collect();
    assert_eq!(
        parameters.len(),
        values.len(),
        "one tensor for each parameter"
    );
    for (parameter, value) in parameters.into_iter().zip(values) {
        assert_eq!(parameter.value.dims(), value.dims(), "{}", parameter.name);
        parameter.value = value;
    }
}
