//! `advxl eval`.

use std::path::PathBuf;

use super::screen::Terminal;
use super::{
    check_classes, device, image_count, load_model, parse_precision, print_json, usable_precision,
};
use crate::attack::{Norm, Pgd, Start};
use crate::data::resize::Filter;
use crate::data::{Dataset, EvaluationTransform, Spec, Split};
use crate::error::{Error, Result};
use crate::eval::result::{Subject, to_json, wilson};
use crate::eval::{Images, Outcome, evaluate};
use crate::files;
use crate::fused::Precision;
use crate::model::Pass;
use crate::recipe::word_of;
use crate::train::Screen;
use crate::units::{Fraction, duration};

/// Robust accuracy of a model: each attack is tried on the images that survived those before it.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  advxl eval runs/demo/robust --data synthetic:1000 --attack \
    clean,pgd --eps 8/255"
)]
pub(super) struct Eval {
    /// A model folder (config.json and model.safetensors) or the folder of a run.
    model: PathBuf,
    /// Test images: a folder, tensors:FILE or synthetic:N.
    #[arg(long, value_name = "SPEC")]
    data: String,
    /// Attacks in order: clean, pgd.
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "clean,pgd"
    )]
    attack: Vec<String>,
    /// The norm that bounds perturbations: linf, l2 or l1.
    #[arg(long, default_value = "linf")]
    norm: String,
    /// Largest perturbation, in pixels of [0, 1], such as 8/255.
    #[arg(long, value_name = "FRACTION")]
    eps: Option<String>,
    /// Length of a step; a quarter of eps if absent, as in the paper's PGD-20.
    #[arg(long, value_name = "FRACTION")]
    step_size: Option<String>,
    /// Steps of pgd.
    #[arg(long, default_value_t = 20)]
    steps: u64,
    /// How many images, from the first; all if absent.
    #[arg(short, long, value_name = "N")]
    n: Option<usize>,
    /// Images at a time; changes no result.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Seed of random starts and of synthetic images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Pixels on a side; the model's own if absent.
    #[arg(long)]
    image_size: Option<usize>,
    /// Share of the resized image that the central crop keeps.
    #[arg(long, default_value_t = 1.0)]
    crop_fraction: f64,
    /// How images are resized: bilinear or bicubic.
    #[arg(long, default_value = "bicubic")]
    interpolation: String,
    /// Arithmetic: f32 or bf16.
    #[arg(long, default_value = "f32", value_parser = parse_precision)]
    precision: Precision,
    /// Where result.json goes; the model's folder if absent.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Eval {
    pub(super) fn run(&self, json: bool) -> Result<()> {
        let attacks = self.attacks()?;
        let transform = EvaluationTransform {
            image_size: 0,
            crop_fraction: self.crop_fraction()?,
            interpolation: self.filter()?,
        };
        let loaded = load_model(&self.model)?;
        let image_size = self.image_size.unwrap_or(loaded.image_size);
        loaded
            .model
            .config
            .grid(image_size)
            .map_err(|(message, hint)| {
                Error::input(message.replace("image_size =", "--image-size")).hint(hint)
            })?;
        let dataset = Dataset::open(&self.data.parse::<Spec>()?, Split::Test, self.seed)?;
        check_classes(&loaded, &dataset, &self.data)?;
        let count = image_count(self.n, &dataset);
        let images = Images {
            dataset: &dataset,
            transform: EvaluationTransform {
                image_size,
                ..transform
            },
            count,
        };
        let precision = usable_precision(self.precision);
        let pass = Pass {
            precision,
            ..Pass::evaluation()
        };
        let logits = |images| loaded.model.logits(images, &pass);
        let outcome = self.watched(&images, &logits, &attacks)?;

        let result = to_json(
            &outcome,
            &Subject {
                model: &self.model.display().to_string(),
                model_hash: &loaded.hash,
                data: &self.data,
                data_hash: &dataset.fingerprint(),
                image_size,
                seed: self.seed,
                precision: word_of(precision),
                attacks: &attacks,
            },
        );
        let out = self.out.clone().unwrap_or_else(|| self.model.clone());
        files::make_folder(&out)?;
        files::write(&out.join("result.json"), format!("{result:#}\n").as_bytes())?;
        if json {
            print_json(&result);
        }
        Ok(())
    }

    fn watched(
        &self,
        images: &Images,
        logits: &dyn Fn(burn::tensor::Tensor<4>) -> burn::tensor::Tensor<2>,
        attacks: &[Pgd],
    ) -> Result<Outcome> {
        let mut screen = Terminal::new();
        let mut progress = |attack: &str, done: usize, of: usize, robust: usize| {
            let share = 100.0 * robust as f64 / images.count as f64;
            let text = format!("{attack}: {done} of {of} images, {share:.1} % standing");
            screen.progress(done as u64, of as u64, &text);
        };
        let outcome = evaluate(
            logits,
            images,
            attacks,
            self.batch.max(1),
            self.seed,
            &device(),
            &mut progress,
        )?;
        for (index, stage) in outcome.stages.iter().enumerate() {
            let (low, high) = wilson(stage.robust_count, images.count);
            screen.line(&format!(
                "{:<8} {:6.2} %  (95 %: {:.1} to {:.1}, {} of {} images, {})",
                stage.attack,
                100.0 * outcome.accuracy_after(index),
                100.0 * low,
                100.0 * high,
                stage.robust_count,
                images.count,
                duration(stage.seconds),
            ));
        }
        Ok(outcome)
    }

    fn attacks(&self) -> Result<Vec<Pgd>> {
        let known = ["clean", "pgd"];
        if let Some(unknown) = self.attack.iter().find(|name| !known.contains(&&name[..])) {
            let message = format!("--attack {unknown}: there is no such attack");
            return Err(Error::input(message).hint("use clean, pgd or both, as in clean,pgd"));
        }
        if !self.attack.iter().any(|name| name == "pgd") {
            return Ok(Vec::new());
        }
        let norm = Norm::WORDS.iter().find(|(word, _)| *word == self.norm);
        let (_, norm) = norm.ok_or_else(|| {
            Error::input(format!("--norm {}: there is no such norm", self.norm))
                .hint("use linf, l2 or l1")
        })?;
        let eps = self.eps.as_ref().ok_or_else(|| {
            Error::input("--eps is missing")
                .hint("give the largest perturbation, such as --eps 8/255")
        })?;
        let parse = |flag: &str, text: &str| {
            let found = text.parse::<Fraction>();
            let found = found.map_err(|error| Error::input(format!("{flag}: {error}")))?;
            match found.value() >= 0.0 {
                true => Ok(found),
                false => Err(Error::input(format!("{flag} {text} must be 0 or more"))),
            }
        };
        let epsilon = parse("--eps", eps)?;
        let step_size = match &self.step_size {
            Some(text) => parse("--step-size", text)?,
            None => (epsilon.value() / 4.0)
                .to_string()
                .parse()
                .expect("a number"),
        };
        let start = Start::Random;
        Ok(vec![Pgd {
            norm: *norm,
            epsilon,
            step_size,
            steps: self.steps,
            start,
        }])
    }

    fn crop_fraction(&self) -> Result<f64> {
        match self.crop_fraction > 0.0 && self.crop_fraction <= 1.0 {
            true => Ok(self.crop_fraction),
            false => {
                let found = self.crop_fraction;
                Err(Error::input(format!(
                    "--crop-fraction {found} must be above 0 and at most 1"
                )))
            }
        }
    }

    fn filter(&self) -> Result<Filter> {
        match &self.interpolation[..] {
            "bilinear" => Ok(Filter::Bilinear),
            "bicubic" => Ok(Filter::Bicubic),
            other => {
                let message = format!("--interpolation {other}: there is no such filter");
                Err(Error::input(message).hint("use bilinear or bicubic"))
            }
        }
    }
}
