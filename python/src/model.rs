//! Models loaded by advxl, for Python.

use std::path::PathBuf;

use advxl::attack::pull;
use advxl::error::{Error, Result};
use advxl::model::Pass;
use advxl::ops::{Device, DeviceName, Opened, Precision, usable, zeros};
use advxl::settings::Words;
use advxl::weights::{self, Loaded, Outputs};
use burn::tensor::Tensor;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::{guarded, raised};
use crate::tensor::{CrossingTensor, imported};

/// A loaded model; see `advxl.load` in `python/advxl/_model.py`.
#[pyclass(module = "advxl._advxl", frozen, subclass)]
pub(crate) struct Model {
    loaded: Loaded,
    device: Device,
    pass: Pass<'static>,
    notes: Vec<String>,
}

/// A recorded forward pass, for the backward pass.
#[pyclass(module = "advxl._advxl", frozen)]
pub(crate) struct Tape {
    images: Tensor<4>,
    logits: Tensor<2>,
}

impl Model {
    /// Returns the logits of a batch, tracked by autodiff if the images are.
    pub(crate) fn classify(&self, images: Tensor<4>) -> Tensor<2> {
        self.loaded.model.logits(images, &self.pass)
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    fn open(
        path: &std::path::Path,
        arch: Option<&str>,
        device: &str,
        precision: &str,
        statistics: [Option<[f64; 3]>; 2],
    ) -> Result<Self> {
        let device: DeviceName = device.parse().map_err(Error::input)?;
        let precision = Precision::from_word(precision).ok_or_else(|| {
            let words = Precision::WORDS.iter().map(|(word, _)| *word);
            let words: Vec<&str> = words.collect();
            Error::input(format!("unknown precision `{precision}`"))
                .hint(format!("use one of {}", words.join(", ")))
        })?;
        let Opened { device, notice } = device.open(0)?;
        let mut notes: Vec<String> = notice
            .map(|notice| format!("using the CPU instead of the GPU: {notice}"))
            .into_iter()
            .collect();
        if !path.exists() {
            return Err(Error::input(format!("`{}` does not exist", path.display()))
                .hint("pass a model folder, a run folder, or a weight file with arch=..."));
        }
        let mut loaded = match arch {
            None => weights::load_any(path, &device)?,
            Some(_) if path.is_dir() => {
                let message = "`arch` applies to a weight file, not to a folder";
                return Err(
                    Error::input(message).hint("omit it: the folder names its architecture")
                );
            }
            Some(arch) => weights::load_file(path, arch, &device)?,
        };
        let [mean, std] = statistics;
        if mean.is_some() || std.is_some() {
            loaded.model.normalize_by(mean, std);
        }
        notes.extend(loaded.notes.clone());
        let (precision, notice) = usable(precision, &device);
        notes.extend(notice.map(str::to_owned));
        Ok(Self {
            pass: Pass {
                numerics: precision.into(),
                ..Pass::evaluation()
            },
            loaded,
            device,
            notes,
        })
    }

    /// Imports images from Python to the model's device.
    fn images(&self, object: &Bound<PyAny>) -> PyResult<Tensor<4>> {
        let images = imported::<4>(object, &self.device)?;
        let shape @ [_, channels, height, width] = images.dims();
        if channels != 3 || height != width {
            let message = format!("images have shape {shape:?}, expected [batch, 3, size, size]");
            return Err(raised(object.py(), Error::input(message)));
        }
        if let Err((message, hint)) = self.loaded.model.config().grid(height) {
            let error = Error::input(message).hint(hint);
            return Err(raised(object.py(), error));
        }
        Ok(images)
    }
}

#[pymethods]
impl Model {
    #[new]
    #[pyo3(signature = (path, arch, device, precision, mean, std))]
    fn new(
        py: Python,
        path: PathBuf,
        arch: Option<String>,
        device: String,
        precision: String,
        mean: Option<[f64; 3]>,
        std: Option<[f64; 3]>,
    ) -> PyResult<Self> {
        guarded(py, || {
            Self::open(&path, arch.as_deref(), &device, &precision, [mean, std])
        })
    }

    /// Number of outputs.
    #[getter]
    fn num_classes(&self) -> usize {
        self.loaded.model.classes()
    }

    /// Names of the classes, empty if the model has none.
    #[getter]
    fn class_names(&self) -> Vec<String> {
        self.loaded.classes.clone()
    }

    /// Image size in pixels that the model expects.
    #[getter]
    fn image_size(&self) -> usize {
        self.loaded.image_size
    }

    /// Mean of each channel, subtracted inside the model.
    #[getter]
    fn mean(&self) -> [f64; 3] {
        self.loaded.model.config().statistics().0
    }

    /// Standard deviation of each channel, by which the model divides.
    #[getter]
    fn std(&self) -> [f64; 3] {
        self.loaded.model.config().statistics().1
    }

    /// Whether the outputs are embeddings instead of logits.
    #[getter]
    fn outputs_embeddings(&self) -> bool {
        self.loaded.outputs == Outputs::Embedding
    }

    /// Number of parameters.
    #[getter]
    fn num_parameters(&self) -> usize {
        let parameters = self.loaded.model.parameters();
        parameters.iter().map(|p| p.value.dims()[0]).sum()
    }

    /// Hash of the weights.
    #[getter]
    fn hash(&self) -> String {
        self.loaded.hash.clone()
    }

    /// Notes on the file or the device.
    #[getter]
    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    /// Returns the logits of images in [0, 1].
    pub(crate) fn logits(&self, py: Python, images: &Bound<PyAny>) -> PyResult<CrossingTensor> {
        let images = self.images(images)?;
        guarded(py, || Ok(CrossingTensor::of(self.classify(images))))
    }

    /// Returns the logits and a tape for `pull`.
    fn trace(&self, py: Python, images: &Bound<PyAny>) -> PyResult<(CrossingTensor, Tape)> {
        let images = self.images(images)?;
        guarded(py, || {
            let images = images.autodiff().require_grad();
            let logits = self.classify(images.clone());
            let values = CrossingTensor::of(logits.clone().without_autodiff());
            Ok((values, Tape { images, logits }))
        })
    }

    /// Returns the gradient of `<slopes, logits>` with respect to the images of a tape.
    fn pull(
        &self,
        py: Python,
        tape: Bound<Tape>,
        slopes: &Bound<PyAny>,
    ) -> PyResult<CrossingTensor> {
        let slopes = imported::<2>(slopes, &self.device)?;
        let tape = tape.get();
        let logits = tape.logits.clone();
        let (expected, shape) = (logits.dims(), slopes.dims());
        if shape != expected {
            return Err(PyValueError::new_err(format!(
                "expected slopes of shape {expected:?}, got {shape:?}"
            )));
        }
        guarded(py, || {
            let gradient = pull(&tape.images, logits, slopes);
            let gradient = gradient.unwrap_or_else(|| zeros(tape.images.dims(), &self.device));
            Ok(CrossingTensor::of(gradient))
        })
    }
}
