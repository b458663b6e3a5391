//! `advxl predict`.

use std::path::PathBuf;

use burn::tensor::Tensor;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::screen::Terminal;
use super::{
    ChosenImages, NamedClasses, NamedModel, check_image_size, device, inputs, open_data,
    parse_precision, print_json, usable_precision,
};
use crate::attack::input_gradient;
use crate::data::resize::Filter;
use crate::data::{EvaluationTransform, Split};
use crate::error::{Error, Result};
use crate::eval::Images;
use crate::files;
use crate::fused::{Precision, to_vec};
use crate::loss::{Targets, cross_entropy};
use crate::model::Pass;
use crate::output::Content;
use crate::screen::Screen;

/// Logits of a model for a data set, and the gradient of the loss for its images.
#[derive(clap::Args)]
pub(super) struct Predict {
    #[command(flatten)]
    model: NamedModel,
    /// Test images: a folder, tensors:FILE or synthetic:N.
    #[arg(long, value_name = "SPEC")]
    data: String,
    /// The safetensors file to write: `logits` f32 `[n, classes]`.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Also write `gradients` f32 `[n, 3, h, w]` of the summed cross entropy.
    #[arg(long)]
    gradient: bool,
    #[command(flatten)]
    chosen: ChosenImages,
    #[command(flatten)]
    classes: NamedClasses,
    /// Images at a time; changes no result.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Seed of synthetic images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Pixels on a side; the model's own if absent.
    #[arg(long)]
    image_size: Option<usize>,
    /// Arithmetic: f32 or bf16.
    #[arg(long, default_value = "f32", value_parser = parse_precision)]
    precision: Precision,
}

impl Predict {
    pub(super) fn run(&self, json: bool) -> Result<()> {
        if self.batch == 0 {
            return Err(Error::input("--batch 0: expected at least 1"));
        }
        inputs(Some(&self.model.path), Some(&self.data))?.check_file(
            "--out",
            &self.out,
            Content::Tensors("logits"),
        )?;
        let loaded = self.model.load()?;
        let dataset = open_data(&self.data, Split::Test, self.seed)?;
        let mut subset = self.chosen.of(&dataset)?;
        // Logits need no labels.
        if self.gradient {
            subset = subset.mapped(self.classes.matched(&loaded, None, &dataset, &self.data)?);
        }
        let count = subset.len();
        let classes = loaded.model.classes();
        let size = self.image_size.unwrap_or(loaded.image_size);
        check_image_size(&loaded.model.config(), size)?;
        let images = Images::Stored {
            dataset: &dataset,
            subset: &subset,
            transform: EvaluationTransform {
                image_size: size,
                crop_fraction: 1.0,
                interpolation: Filter::Bicubic,
            },
        };
        let pass = Pass {
            precision: usable_precision(self.precision)?,
            ..Pass::evaluation()
        };
        let (mut logits, mut gradients) = (Vec::new(), Vec::new());
        let mut not_finite = 0;
        let mut screen = Terminal::new();
        let indices: Vec<usize> = (0..count).collect();
        for chunk in indices.chunks(self.batch) {
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
                "warning: {not_finite} of {count} images have logits that are not finite"
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
                "out": out, "images": count, "classes": classes, "not_finite": not_finite,
            }));
        }
        Ok(())
    }
}
