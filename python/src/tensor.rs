//! Tensors passed between Rust and Python, in host memory or on an NVIDIA GPU.

use std::sync::Mutex;

use advxl::error::Error;
use advxl::ops::{Device, from_vec, gpu_values, of_gpu_values, to_vec};
use advxl_cuda::{Gpu, Values};
use burn::tensor::Tensor;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::dlpack;
use crate::errors::raised;

/// Values that a framework can consume once with its `from_dlpack`.
#[pyclass(module = "advxl._advxl", frozen)]
pub(crate) struct CrossingTensor {
    values: Mutex<Option<Crossing>>,
    shape: Vec<usize>,
    device: dlpack::Place,
}

/// The values of a tensor passed between Rust and Python.
pub(crate) enum Crossing {
    /// Host memory.
    Host(Vec<f32>),
    /// GPU memory, with all writes complete.
    Gpu(Values),
}

impl CrossingTensor {
    /// Wraps values in host memory.
    pub(crate) fn new(values: Vec<f32>, shape: Vec<usize>) -> Self {
        Self {
            values: Mutex::new(Some(Crossing::Host(values))),
            shape,
            device: dlpack::Place::HOST,
        }
    }

    /// Copies a tensor to host memory.
    pub(crate) fn of<const D: usize>(tensor: Tensor<D>) -> Self {
        let shape = tensor.dims().to_vec();
        Self::new(to_vec(tensor), shape)
    }

    /// Wraps a tensor on a GPU, which has the given number in this process.
    pub(crate) fn on_gpu<const D: usize>(tensor: &Tensor<D>, gpu: &Gpu, number: i32) -> Self {
        let values = gpu_values(gpu, tensor);
        // The streams of other libraries do not wait for ours.
        gpu.wait().unwrap_or_else(|error| advxl_cuda::fail(error));
        Self {
            values: Mutex::new(Some(Crossing::Gpu(values))),
            shape: tensor.dims().to_vec(),
            device: dlpack::Place::gpu(number),
        }
    }
}

#[pymethods]
impl CrossingTensor {
    /// Lengths of the dimensions.
    #[getter]
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    /// DLPack device type and number.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (self.device.kind, self.device.number)
    }

    /// Returns the values as a DLPack capsule, which owns them.
    #[pyo3(signature = (**_options))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        _options: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let taken = self.values.lock().ok().and_then(|mut values| values.take());
        let values =
            taken.ok_or_else(|| PyValueError::new_err("the tensor was already consumed"))?;
        dlpack::export(py, values, &self.shape, self.device)
    }
}

/// Imports a Python tensor with the expected number of dimensions to a device, from host memory or from that GPU.
pub(crate) fn imported<const D: usize>(
    object: &Bound<PyAny>,
    device: &Device,
) -> PyResult<Tensor<D>> {
    let (crossing, shape) = dlpack::import(object, device.gpu())?;
    let count = shape.len();
    let shape: [usize; D] = shape.try_into().map_err(|_| {
        let message = format!("expected a tensor of {D} dimensions, got {count}");
        raised(object.py(), Error::input(message))
    })?;
    Ok(match crossing {
        Crossing::Host(values) => from_vec(values, shape, device),
        Crossing::Gpu(values) => of_gpu_values(values, shape),
    })
}
