//! A model that classifies: by its own logits, or by the embedded names of the classes.

use burn::tensor::Tensor;

use super::accuracy::{Evaluation, Observer, Outcome};
use super::images::Images;
use super::result::Subject;
use crate::attack::Attack;
use crate::data::{Dataset, Subset};
use crate::distributed::Comm;
use crate::error::Result;
use crate::image::Preprocessing;
use crate::model::{Model, Pass};
use crate::ops::{Device, Precision, to_vec};
use crate::text::zero_shot::by_text;

/// A model with an optional text head, and the arithmetic that it is evaluated in.
pub struct Classifier {
    model: Model,
    name: String,
    hash: String,
    precision: Precision,
    logits: Box<dyn Fn(Tensor<4>) -> Tensor<2>>,
}

/// How an evaluation is run; none of it changes a verdict.
#[derive(Clone, Copy)]
pub struct Setup<'a> {
    /// Images at a time.
    pub batch: usize,
    /// Seed of the attacks' random numbers.
    pub seed: u64,
    /// Where to compute.
    pub device: &'a Device,
    /// The ranks that share the images.
    pub comm: &'a Comm,
}

impl Classifier {
    /// A model that classifies by its own logits; with a head, whose outputs are embeddings, by text.
    ///
    /// Shapes: `head` `[classes, width]`, rows of length 1.
    pub fn new(model: Model, head: Option<Tensor<2>>, precision: Precision) -> Self {
        // Tensors are shared, not copied.
        let (passed, pass) = (
            model.clone(),
            Pass {
                numerics: precision.into(),
                ..Pass::evaluation()
            },
        );
        let logits = move |images| {
            let outputs = passed.logits(images, &pass);
            match &head {
                None => outputs,
                Some(head) => by_text(outputs, head),
            }
        };
        Self {
            model,
            name: String::new(),
            hash: String::new(),
            precision,
            logits: Box::new(logits),
        }
    }

    /// The same under the name and the hash that results state; the hash covers the head, see [`hash_with_head`].
    pub fn named(self, name: &str, hash: &str) -> Self {
        Self {
            name: name.to_owned(),
            hash: hash.to_owned(),
            ..self
        }
    }

    /// The logits of a batch.
    ///
    /// Shapes: `images` `[batch, 3, height, width]`; the result `[batch, classes]`. Units: pixels in [0, 1].
    pub fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        (self.logits)(images)
    }

    /// An evaluation of this classifier: attacks in order, each on the images that survived those before it.
    pub fn evaluation<'a>(
        &'a self,
        images: &'a Images<'a>,
        attacks: &'a [Attack],
        setup: Setup<'a>,
    ) -> Evaluation<'a> {
        let Setup {
            batch,
            seed,
            device,
            comm,
        } = setup;
        Evaluation {
            network: &self.logits,
            images,
            attacks,
            batch,
            seed,
            device,
            comm,
        }
    }

    /// Runs such an evaluation.
    ///
    /// Errors: those of [`Evaluation::run`].
    pub fn evaluate(
        &self,
        images: &Images,
        attacks: &[Attack],
        setup: Setup,
        observer: &dyn Observer,
    ) -> Result<Outcome> {
        self.evaluation(images, attacks, setup).run(observer)
    }

    /// What a result states of this classifier and of the images that it is evaluated on.
    ///
    /// Errors: those of naming the images.
    pub fn subject(
        &self,
        data: &str,
        dataset: &Dataset,
        subset: &Subset,
        preprocessing: Preprocessing,
        seed: u64,
    ) -> Result<Subject> {
        let (mean, std) = self.model.config().statistics();
        Ok(Subject {
            program: format!("advxl {}", env!("CARGO_PKG_VERSION")),
            model: self.name.clone(),
            model_hash: self.hash.clone(),
            data: data.to_owned(),
            data_hash: dataset.fingerprint(),
            data_classes: dataset.classes().to_vec(),
            images: subset.len(),
            subset: subset.record(dataset)?,
            left_out: Vec::new(),
            preprocessing,
            mean,
            std,
            seed,
            precision: self.precision.word().to_owned(),
        })
    }
}

/// The hash of a model with a text head: with another text model, or other templates, it is another classifier.
pub fn hash_with_head(model: &str, head: &Tensor<2>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(model.as_bytes());
    hasher.update(bytemuck::cast_slice(&to_vec(head.clone())));
    hasher.finalize().to_string()
}
