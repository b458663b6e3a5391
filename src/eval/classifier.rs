//! A model that classifies: by its own logits, or by the embedded names of the classes.

use burn::tensor::{Device, Tensor};

use super::accuracy::{Evaluation, Observer, Outcome};
use super::images::Images;
use super::result::Subject;
use crate::attack::Attack;
use crate::data::{Dataset, Subset};
use crate::distributed::Comm;
use crate::error::Result;
use crate::image::Preprocessing;
use crate::model::{Model, Pass};
use crate::ops::{Precision, to_vec};
use crate::settings::Words;
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
    /// A model that classifies by its own logits, in f32.
    pub fn new(model: Model) -> Self {
        Self {
            logits: logits(&model, None, Precision::F32),
            model,
            name: String::new(),
            hash: String::new(),
            precision: Precision::F32,
        }
    }

    /// The same under the name and the hash that results state. A text head that is added later changes the hash.
    pub fn named(self, name: &str, hash: &str) -> Self {
        Self {
            name: name.to_owned(),
            hash: hash.to_owned(),
            ..self
        }
    }

    /// The same model in another arithmetic. Set it before a text head.
    pub fn in_precision(self, precision: Precision) -> Self {
        Self {
            logits: logits(&self.model, None, precision),
            precision,
            ..self
        }
    }

    /// The same model, whose outputs are embeddings, classifying by text; its hash is that of the head as well.
    ///
    /// Shapes: `head` `[classes, width]`, rows of length 1.
    pub fn with_text_head(self, head: Tensor<2>) -> Self {
        // With another text model, or other templates, it is another classifier.
        let values = to_vec(head.clone());
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.hash.as_bytes());
        hasher.update(bytemuck::cast_slice(&values));
        Self {
            hash: hasher.finalize().to_string(),
            logits: logits(&self.model, Some(head), self.precision),
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
            logits: &*self.logits,
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

fn logits(
    model: &Model,
    head: Option<Tensor<2>>,
    precision: Precision,
) -> Box<dyn Fn(Tensor<4>) -> Tensor<2>> {
    // Tensors are shared, not copied.
    let model = model.clone();
    let pass = Pass {
        precision,
        ..Pass::evaluation()
    };
    Box::new(move |images| {
        let outputs = model.logits(images, &pass);
        match &head {
            None => outputs,
            Some(head) => by_text(outputs, head),
        }
    })
}
