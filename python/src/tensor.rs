//! Tensors that leave for Python.

use advxl::ops::to_vec;
use burn::tensor::Tensor;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::dlpack;

/// Values in the host's memory that a framework takes with its `from_dlpack`, once.
#[pyclass(module = "advxl._advxl", frozen)]
pub(crate) struct HostTensor {
    values: std::sync::Mutex<Option<Vec<f32>>>,
    shape: Vec<usize>,
}

impl HostTensor {
    pub(crate) fn new(values: Vec<f32>, shape: Vec<usize>) -> Self {
        Self {
            values: std::sync::Mutex::new(Some(values)),
            shape,
        }
    }

    pub(crate) fn of<const D: usize>(tensor: Tensor<D>) -> Self {
        let shape = tensor.dims().to_vec();
        Self::new(to_vec(tensor), shape)
    }
}

#[pymethods]
impl HostTensor {
    /// Lengths of the dimensions.
    #[getter]
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    /// The type of device and its number: the host.
    fn __dlpack_device__(&self) -> (i32, i32) {
        (1, 0)
    }

    /// The values as a DLPack capsule, which owns them.
    #[pyo3(signature = (**_options))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        _options: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let taken = self.values.lock().ok().and_then(|mut values| values.take());
        let values = taken.ok_or_else(|| PyValueError::new_err("the tensor was taken already"))?;
        dlpack::export(py, values, &self.shape)
    }
}
