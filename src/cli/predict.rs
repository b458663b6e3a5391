//! `advxl predict`.

use std::path::PathBuf;

use burn::tensor::Tensor;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::device::device;
use super::inputs::{ChosenImages, inputs, open_data};
use super::memory::check_memory;
use super::model::{NamedClasses, NamedModel, check_image_size};
use super::preprocessing::{PreprocessingFlags, announce};
use super::print::{note, print_json};
use super::screen::Terminal;
use super::shared::TestRun;
use super::values::usable_precision;
use crate::attack::input_gradient;
use crate::data::Split;
use crate::error::{Error, Result};
use crate::eval::Images;
use crate::files;
use crate::loss::{Targets, cross_entropy};
use crate::model::Pass;
use crate::ops::to_vec;
use crate::output::Content;
use crate::plan::Work;
use crate::screen::Screen;
use crate::weights::Outputs;

/// Predict the logits of a model for a data set, and optionally the input gradients of the loss
#[derive(clap::Args)]
pub(crate) struct Predict {
    #[command(flatten)]
    model: NamedModel,
    #[command(flatten)]
    test: TestRun,
    /// Write `logits`, f32 [n, classes], to this safetensors file; for an image tower these are its embeddings
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Also write `gradients`, f32 [n, 3, h, w], of the summed cross entropy
    #[arg(long)]
    gradient: bool,
    #[command(flatten)]
    chosen: ChosenImages,
    #[command(flatten)]
    classes: NamedClasses,
    #[command(flatten)]
    preprocessing: PreprocessingFlags,
}

impl Predict {
    pub(crate) fn run(&self, json: bool) -> Result<()> {
        if self.test.batch == 0 {
            return Err(Error::input("--batch must be at least 1, got 0"));
        }
        inputs(Some(&self.model.path), Some(&self.test.data))?.check_file(
            "--out",
            &self.out,
            Content::Tensors("logits"),
        )?;
        let loaded = self.model.load()?;
        let is_embedding = loaded.outputs == Outputs::Embedding;
        if self.gradient && is_embedding {
            let message =
                "--gradient requires class logits, but the outputs of this model are an embedding";
            return Err(
                Error::input(message).hint("remove --gradient, or use a model with classes")
            );
        }
        let dataset = open_data(&self.test.data, Split::Test, self.test.seed)?;
        let mut subset = self.chosen.of(&dataset)?;
        let count = subset.len();
        let classes = loaded.model.classes();
        let config = loaded.model.config();
        let (preprocessing, text) =
            self.preprocessing
                .over(&loaded.preprocessing, loaded.image_size, &dataset)?;
        let size = preprocessing.image_size;
        check_image_size(&config, size)?;
        let (work, gradient) = match self.gradient {
            true => (Work::Attack, preprocessing.numbers()),
            false => (Work::Forward, 0),
        };
        // The outputs are in memory twice: as values and as the serialized file.
        let kept = 2 * count * (classes + gradient);
        check_memory(
            &loaded,
            &preprocessing,
            self.test.batch.min(count),
            work,
            kept,
        )?;
        // Only gradients need labels.
        if self.gradient {
            subset =
                subset.mapped(
                    self.classes
                        .matched(&loaded, None, &dataset, &self.test.data)?,
                );
        }
        announce(&text, Some(&config));
        if is_embedding {
            note(&format!(
                "note: the outputs are an embedding of size {classes}, not class logits"
            ));
        }
        let images = Images::Stored {
            dataset: &dataset,
            subset: &subset,
            preprocessing,
        };
        let pass = Pass {
            numerics: usable_precision(self.test.precision)?.into(),
            ..Pass::evaluation()
        };
        let (mut logits, mut gradients) = (Vec::new(), Vec::new());
        let mut not_finite = 0;
        let mut screen = Terminal::new();
        let indices: Vec<usize> = (0..count).collect();
        for chunk in indices.chunks(self.test.batch) {
            let batch = images.pictures(chunk, &device()?)?;
            let rows = to_vec(loaded.model.logits(batch.clone(), &pass));
            let rows_of = rows.chunks_exact(classes.max(1));
            not_finite += rows_of
                .filter(|row| !row.iter().all(|logit| logit.is_finite()))
                .count();
            logits.extend(rows);
            if self.gradient {
                let labels = images.labels(chunk)?;
                let goal = Targets::classes(&labels).distributions(classes, 0.0, &device()?);
                let loss = |images: Tensor<4>| {
                    cross_entropy(loaded.model.logits(images, &pass), goal.clone())
                };
                gradients.extend(to_vec(input_gradient(&loss, batch).0));
            }
            let done = chunk.last().map_or(0, |last| last + 1);
            screen.progress(
                done as u64,
                count as u64,
                &format!("{done} of {count} images"),
            );
        }
        if not_finite > 0 {
            screen.line(&format!(
                "warning: {not_finite} of {count} images have non-finite logits"
            ));
        }
        drop(screen);
        let mut tensors = vec![("logits", &logits, vec![count, classes])];
        if self.gradient {
            tensors.push(("gradients", &gradients, vec![count, 3, size, size]));
        }
        let views = tensors.iter().map(|(name, values, shape)| {
            let bytes = bytemuck::cast_slice(values);
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            (*name, view.expect("shapes hold values"))
        });
        let bytes = safetensors::serialize(views, None)
            .map_err(|error| Error::failed(format!("cannot write the logits: {error}")))?;
        files::write(&self.out, &bytes)?;
        if json {
            let out = self.out.display().to_string();
            print_json(&json!({
                "out": out,
                "images": count,
                "classes": classes,
                "outputs": loaded.outputs,
                "preprocessing": preprocessing,
                "not_finite": not_finite,
            }));
        }
        Ok(())
    }
}
