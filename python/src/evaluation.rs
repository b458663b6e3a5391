//! Evaluations of Python models and of models loaded by advxl.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use advxl::attack::{Attack, Batch, Network, TargetModel};
use advxl::distributed::Comm;
use advxl::error::{Error, Result};
use advxl::eval::autoattack::Version;
use advxl::eval::result::{Findings, found};
use advxl::eval::session::{Progress, examine, watch};
use advxl::eval::{Evaluation, Images, Sample, moved};
use advxl::ops::{Api, Device, DeviceName, to_vec};
use advxl::screen::Screen;
use burn::tensor::Tensor;
use pyo3::prelude::*;
use serde_json::{Value, json};

use crate::attacks::AttackSpec;
use crate::errors::{guarded, raised, throw};
use crate::model::Model;
use crate::network::PythonNetwork;
use crate::tensor::{CrossingTensor, imported};

/// A stop request, set by Python's signal handler.
#[pyclass(module = "advxl._advxl", frozen)]
pub(crate) struct Stop(AtomicBool);

#[pymethods]
impl Stop {
    #[new]
    fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Requests a stop after the pass in progress.
    fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether a stop was requested.
    #[getter]
    fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A network that lets Python handle signals after each pass.
struct Interruptible<'a> {
    network: &'a dyn Network,
    stop: &'a Stop,
    comm: &'a Comm,
}

impl Interruptible<'_> {
    fn look(&self) {
        if let Err(error) = Python::attach(|py| py.check_signals()) {
            throw(error);
        }
        if self.stop.requested() {
            self.comm.request_stop();
        }
    }
}

impl Network for Interruptible<'_> {
    fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        let logits = self.network.logits(images);
        self.look();
        logits
    }

    fn gradient(
        &self,
        images: Tensor<4>,
        slopes: &mut dyn FnMut(Tensor<2>) -> Tensor<2>,
    ) -> Option<Tensor<4>> {
        let gradient = self.network.gradient(images, slopes);
        self.look();
        gradient
    }
}

/// Forwards lines and progress to Python.
struct Lines<'a>(Option<&'a Py<PyAny>>);

impl Screen for Lines<'_> {
    fn line(&mut self, text: &str) {
        let Some(screen) = self.0 else { return };
        let shown = Python::attach(|py| screen.call_method1(py, "line", (text,)).map(drop));
        shown.unwrap_or_else(|error| throw(error));
    }

    fn progress(&mut self, done: u64, total: u64, text: &str) {
        let Some(screen) = self.0 else { return };
        let shown = Python::attach(|py| {
            screen
                .call_method1(py, "progress", (done, total, text))
                .map(drop)
        });
        shown.unwrap_or_else(|error| throw(error));
    }
}

/// The model of an evaluation.
enum Subject {
    Loaded(Py<Model>),
    /// A Python model, with the device on which attacks compute and the number of the GPU.
    Adapter(Py<PyAny>, Device, i32),
}

impl Subject {
    /// Creates the subject. An adapter's `gpu` is the number of the GPU with its images. If our engine cannot open that
    /// GPU, images are exchanged through host memory, and `without_gpu` is called with the reason.
    fn of(model: &Bound<PyAny>) -> PyResult<Self> {
        if let Ok(loaded) = model.cast::<Model>() {
            return Ok(Self::Loaded(loaded.clone().unbind()));
        }
        let requested: Option<usize> = match model.getattr_opt("gpu")? {
            Some(gpu) => gpu.extract()?,
            None => None,
        };
        let opened = match requested {
            Some(number) => model.py().detach(|| gpu(number)),
            None => Ok(Device::cpu()),
        };
        let device = opened.or_else(|error| {
            let (message, _) = error.into_parts();
            model.call_method1("without_gpu", (message,))?;
            Ok::<_, PyErr>(Device::cpu())
        })?;
        let number = requested.unwrap_or_default() as i32;
        Ok(Self::Adapter(model.clone().unbind(), device, number))
    }

    /// Calls `work` with the network and its device.
    fn with<T>(&self, work: impl FnOnce(&dyn Network, &Device) -> T) -> T {
        match self {
            Self::Loaded(model) => {
                let model = model.get();
                work(&|images| model.classify(images), model.device())
            }
            Self::Adapter(adapter, device, number) => {
                let network = PythonNetwork {
                    adapter,
                    device,
                    number: *number,
                };
                work(&network, device)
            }
        }
    }
}

/// Returns a GPU by its number. Each GPU is opened once.
fn gpu(number: usize) -> Result<Device> {
    static OPENED: Mutex<BTreeMap<usize, Device>> = Mutex::new(BTreeMap::new());
    let mut opened = OPENED.lock().expect("not poisoned");
    if let Some(device) = opened.get(&number) {
        return Ok(device.clone());
    }
    let name = DeviceName::Gpu(Api::Cuda, Some(number));
    let device = advxl_cuda::caught(|| name.open(0)).map_err(|error| Error::of_gpu(&error))??;
    opened.insert(number, device.device.clone());
    Ok(device.device)
}

/// Reads images from a Python object with `shape` (channels, height, width) and `read(indices)`.
fn read(images: &Py<PyAny>, indices: &[usize]) -> Tensor<4> {
    let read = Python::attach(|py| {
        let read = images.call_method1(py, "read", (indices.to_vec(),))?;
        imported(read.bind(py), &Device::cpu())
    });
    read.unwrap_or_else(|error| throw(error))
}

/// Runs each group of attacks (one per norm) in order, each attack on the images that survived the previous ones.
/// Returns the results as JSON.
///
/// `sink(group, indices, images)` receives the adversarial images of each batch. With `state`, progress is saved after
/// each batch. With `bound`, in percentage points, each group is AutoAttack's fast version: its last attacks run on a
/// sample.
#[pyfunction]
#[pyo3(signature = (model, images, labels, groups, *, batch, seed, stop, state=None, screen=None, sink=None, checks=true, bound=None))]
#[expect(clippy::too_many_arguments, reason = "the keywords of one Python call")]
pub(crate) fn evaluate(
    py: Python,
    model: &Bound<PyAny>,
    images: Py<PyAny>,
    labels: Vec<u32>,
    groups: Vec<Vec<AttackSpec>>,
    batch: usize,
    seed: u64,
    stop: Bound<Stop>,
    state: Option<PathBuf>,
    screen: Option<Py<PyAny>>,
    sink: Option<Py<PyAny>>,
    checks: bool,
    bound: Option<f64>,
) -> PyResult<String> {
    let subject = Subject::of(model)?;
    let shape: [usize; 3] = images.getattr(py, "shape")?.extract(py)?;
    let groups: Vec<Vec<Attack>> = groups
        .iter()
        .map(|group| group.iter().map(AttackSpec::attack).collect())
        .collect::<Result<_>>()
        .map_err(|error| raised(py, error))?;
    let sample = bound.map(|points| Sample {
        first: Version::Fast.attacks().len() - Version::Fast.sampled().len(),
        points,
    });
    let stop = stop.get();
    guarded(py, || {
        subject.with(|network, device| {
            let comm = Comm::single();
            let network = Interruptible {
                network,
                stop,
                comm: &comm,
            };
            let read = |indices: &[usize]| Ok(read(&images, indices));
            let images = Images::Read {
                shape,
                labels: &labels,
                read: &read,
            };
            let hash = match state {
                Some(_) => hash_of(&images, batch)?,
                None => String::new(),
            };
            let mut screen = Lines(screen.as_ref());
            let mut all = Vec::new();
            for (number, attacks) in groups.into_iter().enumerate() {
                let take = |fooled: &[(usize, Option<Vec<f32>>)]| {
                    pass_on(sink.as_ref(), number, fooled, shape);
                    Ok(())
                };
                let progress = match &state {
                    None => Progress::unsaved(&comm),
                    Some(state) => {
                        let mut text = json!({ "images": hash, "attacks": attacks, "seed": seed });
                        if let Some(sample) = sample {
                            text["sample"] = json!(sample);
                        }
                        let fingerprint = blake3::hash(text.to_string().as_bytes());
                        let path = of_group(state, number);
                        Progress::at(&path, fingerprint.to_hex().as_str(), &comm)?
                    }
                };
                let progress = progress.with_sink(&take);
                let evaluation = Evaluation {
                    network: &network,
                    search: None,
                    images: &images,
                    attacks: &attacks,
                    sample,
                    batch,
                    seed,
                    device,
                    comm: &comm,
                };
                let findings = match checks {
                    true => examine(&evaluation, &progress, &mut screen)?,
                    false => Findings {
                        outcome: watch(&evaluation, &progress, &mut screen)?,
                        attacks: attacks.clone(),
                        sample,
                        flags: Vec::new(),
                        curve: None,
                    },
                };
                all.push(findings);
            }
            Ok(Value::Object(found(&all)).to_string())
        })
    })
}

/// Returns the state file of a group. The first group uses the given name.
fn of_group(state: &Path, number: usize) -> PathBuf {
    match number {
        0 => state.to_owned(),
        _ => {
            let mut name = state.as_os_str().to_owned();
            name.push(format!(".{number}"));
            name.into()
        }
    }
}

/// Passes the adversarial images to Python in one call.
fn pass_on(
    sink: Option<&Py<PyAny>>,
    group: usize,
    fooled: &[(usize, Option<Vec<f32>>)],
    shape: [usize; 3],
) {
    let adversarial = fooled
        .iter()
        .filter_map(|(index, image)| Some((*index, image.as_ref()?)));
    let (indices, images): (Vec<usize>, Vec<&Vec<f32>>) = adversarial.unzip();
    let Some(sink) = sink.filter(|_| !indices.is_empty()) else {
        return;
    };
    let shape = [&[indices.len()], &shape[..]].concat();
    let values = images.into_iter().flatten().copied().collect();
    let passed = Python::attach(|py| {
        let images = CrossingTensor::new(values, shape).into_pyobject(py)?;
        sink.call1(py, (group, indices, images)).map(drop)
    });
    passed.unwrap_or_else(|error| throw(error));
}

/// Returns the hash of all images and labels.
fn hash_of(images: &Images, batch: usize) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let indices: Vec<usize> = (0..images.count()).collect();
    for indices in indices.chunks(batch.max(1)) {
        let (pixels, labels) = images.batch(indices, &Device::cpu())?;
        hasher.update(bytemuck::cast_slice(&to_vec(pixels)));
        hasher.update(bytemuck::cast_slice(&labels));
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Attacks all images of a batch, including misclassified ones. Returns the last iterates of PGD or the adversarial
/// images of another attack, and the clean image where the attack found none. Random streams are selected by the keys.
#[pyfunction]
pub(crate) fn perturb(
    py: Python,
    model: &Bound<PyAny>,
    images: &Bound<PyAny>,
    labels: Vec<u32>,
    keys: Vec<u64>,
    attack: AttackSpec,
    seed: u64,
) -> PyResult<CrossingTensor> {
    let subject = Subject::of(model)?;
    let attack = attack.attack().map_err(|error| raised(py, error))?;
    let images = imported::<4>(images, &Device::cpu())?;
    guarded(py, || {
        subject.with(|network, device| {
            let classifier = TargetModel::new(network, device);
            let shape = images.dims();
            let numbers: usize = shape[1..].iter().product();
            let mut values = to_vec(images.clone());
            let batch = Batch {
                images: moved(images, device),
                labels,
                keys,
                seed,
            };
            let found = attack.perturb(&classifier, &batch);
            for (place, image) in values.chunks_exact_mut(numbers.max(1)).zip(found) {
                if let Some(image) = image {
                    place.copy_from_slice(&image);
                }
            }
            Ok(CrossingTensor::new(values, shape.to_vec()))
        })
    })
}
