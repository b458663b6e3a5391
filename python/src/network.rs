//! Adapts a Python model to the interface of attacks.
//!
//! The Python side is an object with three methods on batches, independent of the framework
//! (`python/advxl/_adapters.py`): `logits(images)`, `trace(images) -> (logits, tape)` and
//! `pull(tape, slopes) -> gradient or None`. There are no calls per image. Images and gradients stay on the GPU if the
//! framework has them on a GPU that our engine can open. Logits and slopes are small and are exchanged through host
//! memory.

use advxl::attack::Network;
use advxl::ops::{Device, to_vec};
use burn::tensor::Tensor;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::throw;
use crate::tensor::{CrossingTensor, imported};

/// A Python model, see the module documentation. Its methods must be called inside [`crate::errors::guarded`].
pub(crate) struct PythonNetwork<'a> {
    pub(crate) adapter: &'a Py<PyAny>,
    /// Device on which attacks compute.
    pub(crate) device: &'a Device,
    /// Number of the GPU in this process.
    pub(crate) number: i32,
}

impl PythonNetwork<'_> {
    /// Runs work with the GIL. An exception aborts the attack or evaluation in progress.
    fn attached<T>(&self, work: impl FnOnce(Python, &Bound<PyAny>) -> PyResult<T>) -> T {
        Python::attach(|py| work(py, self.adapter.bind(py))).unwrap_or_else(|error| throw(error))
    }

    fn exported(&self, images: Tensor<4>) -> CrossingTensor {
        match self.device.gpu() {
            Some(gpu) => CrossingTensor::on_gpu(&images, gpu, self.number),
            None => CrossingTensor::of(images),
        }
    }
}

impl Network for PythonNetwork<'_> {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        let images = self.exported(images);
        self.attached(|py, adapter| {
            let logits = adapter.call_method1("logits", (images.into_pyobject(py)?,))?;
            imported(&logits, self.device)
        })
    }

    fn gradient(
        &self,
        images: Tensor<4>,
        slopes: &mut dyn FnMut(Tensor<2>) -> Tensor<2>,
    ) -> Option<Tensor<4>> {
        let shape = images.dims();
        let images = self.exported(images);
        let (logits, tape) = self.attached(|py, adapter| {
            let traced = adapter.call_method1("trace", (images.into_pyobject(py)?,))?;
            let (logits, tape): (Bound<PyAny>, Py<PyAny>) = traced.extract()?;
            Ok((imported::<2>(&logits, self.device)?, tape))
        });
        let slopes = slopes(logits);
        let slopes_shape = slopes.dims();
        let slopes = to_vec(slopes);
        self.attached(|py, adapter| {
            let slopes = CrossingTensor::new(slopes, slopes_shape.to_vec()).into_pyobject(py)?;
            let gradient = adapter.call_method1("pull", (tape, slopes))?;
            if gradient.is_none() {
                return Ok(None);
            }
            let gradient = imported::<4>(&gradient, self.device)?;
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
