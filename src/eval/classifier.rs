//! A model used as a classifier: by its own logits, or zero-shot by the text embeddings of the class names.

use burn::tensor::Tensor;

use super::accuracy::{Evaluation, Observer, Outcome};
use super::images::Images;
use super::result::Subject;
use crate::attack::{Attack, Network};
use crate::data::{Dataset, Subset};
use crate::distributed::Comm;
use crate::error::Result;
use crate::image::Preprocessing;
use crate::model::{Model, Pass};
use crate::ops::{Device, Precision, select_columns, to_vec};
use crate::text::zero_shot::by_text;

/// A model with an optional text head, and the precision of its evaluation.
pub struct Classifier {
    model: Model,
    name: String,
    hash: String,
    precision: Precision,
    logits: Logits,
    /// The same model in the precision that attacks search with.
    search: Option<(Precision, Logits)>,
}

/// A function from images to logits.
type Logits = Box<dyn Fn(Tensor<4>) -> Tensor<2>>;

/// How to run an evaluation. Batch size and ranks do not affect verdicts.
#[derive(Clone, Copy)]
pub struct Setup<'a> {
    /// Batch size.
    pub batch: usize,
    /// Seed of the attacks' random numbers.
    pub seed: u64,
    /// Device of the computation.
    pub device: &'a Device,
    /// The ranks that share the images.
    pub comm: &'a Comm,
}

impl Classifier {
    /// Creates a classifier from the model's own logits, or, given a text head, from its image embeddings.
    ///
    /// Shapes: `head` `[classes, width]`, rows of length 1.
    pub fn new(model: Model, head: Option<Tensor<2>>, precision: Precision) -> Self {
        let logits = logits_of(&model, head, precision);
        Self {
            model,
            name: String::new(),
            hash: String::new(),
            precision,
            logits,
            search: None,
        }
    }

    /// Makes attacks search in another precision. `head` is that of [`Self::new`].
    pub fn searching(self, head: Option<Tensor<2>>, precision: Precision) -> Self {
        // With caches of its own: packed weights have one precision at a time.
        let values = self.model.parameters().into_iter();
        let model = self
            .model
            .with_values(values.map(|parameter| parameter.value.clone()));
        let logits = logits_of(&model, head, precision);
        Self {
            search: Some((precision, logits)),
            ..self
        }
    }

    /// Sets the name and hash that results report. The hash must cover the text head, see [`hash_with_head`].
    pub fn named(self, name: &str, hash: &str) -> Self {
        Self {
            name: name.to_owned(),
            hash: hash.to_owned(),
            ..self
        }
    }

    /// Restricts the logits to some classes, in this order. It becomes a different model, so its hash changes.
    pub fn restricted(mut self, classes: Vec<usize>) -> Self {
        self.hash = blake3::hash(format!("{} {classes:?}", self.hash).as_bytes()).to_string();
        let restrict = |all: Logits, classes: Vec<usize>| -> Logits {
            Box::new(move |images| select_columns(all(images), &classes))
        };
        self.logits = restrict(self.logits, classes.clone());
        self.search = self
            .search
            .map(|(precision, all)| (precision, restrict(all, classes)));
        self
    }

    /// Returns the logits of a batch.
    ///
    /// Shapes: `images` `[batch, 3, height, width]`; the result `[batch, classes]`. Units: pixels in [0, 1].
    pub fn logits(&self, images: Tensor<4>) -> Tensor<2> {
        (self.logits)(images)
    }

    /// Returns an evaluation of this classifier: attacks in order, each on the images that survived the previous ones.
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
            search: self
                .search
                .as_ref()
                .map(|(_, logits)| logits as &dyn Network),
            images,
            attacks,
            sample: None,
            batch,
            seed,
            device,
            comm,
        }
    }

    /// Runs an evaluation of this classifier.
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

    /// Describes this classifier and the evaluated images for `result.json`.
    ///
    /// Errors: the names of the images cannot be read.
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
            search_precision: self
                .search
                .as_ref()
                .map(|(precision, _)| precision.word().to_owned()),
        })
    }
}

fn logits_of(model: &Model, head: Option<Tensor<2>>, precision: Precision) -> Logits {
    // Cloning shares the tensors.
    let model = model.clone();
    let pass = Pass {
        numerics: precision.into(),
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

/// Returns the hash of a model with a text head. A different text model or prompt template gives a different hash.
pub fn hash_with_head(model: &str, head: &Tensor<2>) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(model.as_bytes());
    hasher.update(bytemuck::cast_slice(&to_vec(head.clone())));
    hasher.finalize().to_string()
}
