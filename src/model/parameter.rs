//! A weight tensor under its published name.

use burn::tensor::{Gradients, Tensor};

use crate::ops::{Device, from_vec, to_vec, zeros};

/// A named trainable tensor.
///
/// Stored flat, so that the optimizer, checkpoints and weight averages treat all parameters alike; the model reshapes
/// it on use, which costs nothing.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The name in timm's weights files.
    pub name: String,
    /// The shape in timm's weights files.
    pub shape: Vec<usize>,
    /// Whether weight decay applies: to matrices, not to biases, norms, positions or the class token.
    pub decays: bool,
    /// Factor of the learning rate; 0 if the tensor is frozen, which computes no gradient and keeps no moments.
    pub rate: f64,
    /// The values, flat.
    pub value: Tensor<1>,
}

impl Parameter {
    /// Creates a tensor with the given values, not tracked by automatic differentiation.
    ///
    /// # Panics
    /// If the values do not fill the shape.
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
            rate: 1.0,
            value: from_vec(values, [length], device),
        }
    }

    /// Returns whether training leaves the values unchanged.
    pub fn is_frozen(&self) -> bool {
        self.rate == 0.0
    }

    /// Returns the values in the given shape.
    pub fn shaped<const D: usize>(&self, shape: [usize; D]) -> Tensor<D> {
        self.value.clone().reshape(shape)
    }

    /// Copies the values to the host.
    pub fn to_vec(&self) -> Vec<f32> {
        to_vec(self.value.clone())
    }
}

/// Makes parameters require gradients, except frozen ones.
pub(crate) fn track<'a>(parameters: impl IntoIterator<Item = &'a mut Parameter>) {
    for parameter in parameters.into_iter().filter(|part| !part.is_frozen()) {
        parameter.value = parameter.value.clone().autodiff().require_grad();
    }
}

/// Returns the gradients of tracked parameters, in their order, without the frozen ones.
pub(crate) fn gradients_of<'a>(
    parameters: impl IntoIterator<Item = &'a Parameter>,
    gradients: &mut Gradients,
) -> Vec<Tensor<1>> {
    let of = |parameter: &Parameter| {
        let found = parameter.value.grad_remove(gradients);
        // The loss may not depend on a weight, such as the class token of a model without blocks.
        found.unwrap_or_else(|| {
            let value = &parameter.value;
            zeros(value.dims(), &Device::of(value))
        })
    };
    let trained = parameters.into_iter().filter(|part| !part.is_frozen());
    trained.map(of).collect()
}

/// Replaces the values of parameters, for example with averaged weights.
///
/// # Panics
/// If there is not exactly one tensor of the right length per parameter.
pub(crate) fn replace(
    parameters: Vec<&mut Parameter>,
    values: impl IntoIterator<Item = Tensor<1>>,
) {
    let values: Vec<_> = values.into_iter().collect();
    assert_eq!(parameters.len(), values.len(), "one tensor per parameter");
    for (parameter, value) in parameters.into_iter().zip(values) {
        assert_eq!(parameter.value.dims(), value.dims(), "{}", parameter.name);
        parameter.value = value;
    }
}
