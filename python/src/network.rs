//! A model that Python computes, as attacks see it.
//!
//! Python's side is an object with three methods on batches, whatever framework is behind them (`python/advxl/_adapters.py`):
//! `logits(images)`, `trace(images) -> (logits, tape)` and `pull(tape, slopes) -> gradient or None`. Nothing is called for each
//! image.

use advxl::attack::Network;
use advxl::ops::{Device, from_vec, to_vec};
use burn::tensor::Tensor;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::dlpack;
use crate::errors::throw;
use crate::tensor::HostTensor;

/// See the file's heading. Its methods must be called inside [`crate::errors::guarded`].
pub(crate) struct PythonNetwork<'a> {
    pub(crate) adapter: &'a Py<PyAny>,
    pub(crate) device: &'a Device,
}

impl PythonNetwork<'_> {
    /// Runs work with the interpreter's lock; its exception ends the work in progress.
    fn attached<T>(&self, work: impl FnOnce(Python, &Bound<PyAny>) -> PyResult<T>) -> T {
        Python::attach(|py| work(py, self.adapter.bind(py))).unwrap_or_else(|error| throw(error))
    }

    /// A tensor of Python's with as many dimensions as are expected.
    fn tensor<const D: usize>(&self, object: &Bound<PyAny>) -> PyResult<Tensor<D>> {
        let (values, shape) = dlpack::import(object)?;
        let count = shape.len();
        let shape: [usize; D] = shape
            .try_into()
            .map_err(|_| PyValueError::new_err(format!("expected {D} dimensions, got {count}")))?;
        Ok(from_vec(values, shape, self.device))
    }
}

impl Network for PythonNetwork<'_> {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        let images = HostTensor::of(images);
        self.attached(|py, adapter| {
            let logits = adapter.call_method1("logits", (images.into_pyobject(py)?,))?;
            self.tensor(&logits)
        })
    }

    fn gradient(
        &self,
        images: Tensor<4>,
        slopes: &mut dyn FnMut(Tensor<2>) -> Tensor<2>,
    ) -> Option<Tensor<4>> {
        let shape = images.dims();
        let images = HostTensor::of(images);
        let (logits, tape) = self.attached(|py, adapter| {
            let traced = adapter.call_method1("trace", (images.into_pyobject(py)?,))?;
            let (logits, tape): (Bound<PyAny>, Py<PyAny>) = traced.extract()?;
            Ok((self.tensor::<2>(&logits)?, tape))
        });
        let slopes = slopes(logits);
        let slopes_shape = slopes.dims();
        let slopes = to_vec(slopes);
        self.attached(|py, adapter| {
            let slopes = HostTensor::new(slopes, slopes_shape.to_vec()).into_pyobject(py)?;
            let gradient = adapter.call_method1("pull", (tape, slopes))?;
            if gradient.is_none() {
                return Ok(None);
            }
            let gradient = self.tensor::<4>(&gradient)?;
            match gradient.dims() == shape {
                true => Ok(Some(gradient)),
                false => Err(PyValueError::new_err(format!(
                    "expected a gradient of shape {shape:?}, got {:?}",
                    gradient.dims()
                ))),
            }
        })
    }
}
