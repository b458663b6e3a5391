//! `advxl demo`: trains one network twice on synthetic images, adversarially in two stages and normally, and attacks both.
//!
//! Training and evaluation run through the same code as any recipe. This file holds the comparison: the two recipes,
//! the time left over all of it, the table and the figure.

use std::cell::Cell;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::attack::{Attack, Batch, Norm, TargetModel};
use crate::data::{Selection, Subset};
use crate::distributed::Comm;
use crate::error::{Context, Error, Result};
use crate::eval::autoattack::{Settings, Version};
use crate::eval::{Classifier, Images, Setup, curve};
use crate::figure::{Attacked, Curve, Example, Figure};
use crate::files;
use crate::ops::{Device, Precision, from_vec, to_vec};
use crate::output::{Content, Inputs};
use crate::recipe::{Recipe, TestImages, cannot_be_run};
use crate::screen::Screen;
use crate::train::{Monitor, Run, evaluate_finally, train};
use crate::units::{Fraction, duration, grouped};
use crate::weights;

/// The recipe of the robust model. The normal one is the same without attacks.
const RECIPE: &str = include_str!("../recipes/demo.toml");

/// Images on which accuracy over epsilon is measured. The figure shows the first few that both models classify
/// correctly.
const CURVE_IMAGES: usize = 64;
/// Epsilons of the curve, in 1/255.
const EPSILONS: [u32; 5] = [2, 4, 8, 12, 16];
/// Rows of the figure.
const EXAMPLES: usize = 3;

/// Trains and attacks both models in two folders. Writes `result.json` and `demo.svg` there. An interrupted demo
/// resumes.
///
/// `overrides` change the recipe, as `--set` does.
pub fn run(
    folder: &Path,
    overrides: &[String],
    device: &Device,
    screen: &mut dyn Screen,
) -> Result<Value> {
    files::make_folder(folder)?;
    let (path, figure) = (folder.join("result.json"), folder.join("demo.svg"));
    Inputs::default().check_file("--out", &path, Content::Json("models"))?;
    let robust = Recipe::parse(RECIPE, overrides)
        .map_err(|faults| cannot_be_run("recipes/demo.toml", &faults))?;
    let mut normal = robust.clone();
    for stage in &mut normal.stage {
        stage.attack = None;
        stage.attack_warmup_samples = None;
    }
    for line in introduction(&robust) {
        screen.line(&line);
    }
    let work = Work::new(&robust, &normal);
    let mut models = Vec::new();
    let both = [
        ("robust", "it sees attacked images only", robust),
        ("normal", "the same without attacks", normal),
    ];
    for (number, (name, how, recipe)) in both.into_iter().enumerate() {
        let part = 2 * number;
        let mut watched = work.part(part, screen);
        watched.line("");
        watched.line(&format!(
            "[{}/5] training the {name} model: {how}",
            part + 1
        ));
        let model = Trained::new(name, recipe, &folder.join(name), device, &mut watched)
            .context(|| format!("the {name} model"))?;
        let mut watched = work.part(part + 1, screen);
        watched.line("");
        watched.line(&format!("[{}/5] attacking the {name} model", part + 2));
        let result = model
            .attacked(&mut watched)
            .context(|| format!("the {name} model"))?;
        models.push((model, result));
    }
    let mut watched = work.part(4, screen);
    watched.line("");
    watched.line("[5/5] measuring accuracy over epsilon, and drawing");
    let curves = draw(&models, &figure, device, &mut watched)?;
    let mut results = Vec::new();
    for ((_, mut result), curve) in models.into_iter().zip(curves) {
        result["curve"] = json!(curve);
        results.push(result);
    }
    let result = json!({ "models": results, "figure": figure.display().to_string() });
    files::write(&path, format!("{result:#}\n").as_bytes())?;
    files::remove_leftovers(folder, "result.json")?;
    files::remove_leftovers(folder, "demo.svg")?;
    Ok(result)
}

fn introduction(recipe: &Recipe) -> Vec<String> {
    let stages = recipe.stage.iter().map(|stage| {
        let attack = stage.attack.as_ref();
        format!(
            "{} samples at {} pixels{}",
            grouped(stage.samples()),
            stage.phases[0].image_size,
            attack.map_or(String::new(), |attack| format!(
                " under {}",
                attack.attack.name()
            ))
        )
    });
    let stages: Vec<String> = stages.collect();
    vec![
        "This demo trains the same small vision transformer twice on drawn images of 12 classes: adversarially,".to_owned(),
        "in the two stages of AdvXL, and normally. Then it attacks both: every pixel may change by up to 8/255.".to_owned(),
        format!("stages: {}", stages.join(", then ")),
    ]
}

/// A trained model and the images it is tested on.
struct Trained {
    name: &'static str,
    run: Run,
}

impl Trained {
    fn new(
        name: &'static str,
        recipe: Recipe,
        folder: &Path,
        device: &Device,
        screen: &mut dyn Screen,
    ) -> Result<Self> {
        let run = Run::open(recipe, folder, false, device, &Comm::single())?;
        train(
            &run,
            &mut Monitor::new(&run.recipe, &run.folder, &run.comm, screen),
        )?;
        Ok(Self { name, run })
    }

    /// Runs the final evaluation of the recipe.
    fn attacked(&self, screen: &mut dyn Screen) -> Result<Value> {
        let run = &self.run;
        let results = evaluate_finally(run, screen)?;
        let [(_, result)] = &results[..] else {
            return Err(Error::failed("the demo's recipe has one final evaluation"));
        };
        let seconds = run.folder.stage_seconds();
        let stages = run.recipe.stage.iter().map(|stage| {
            let attack = stage.attack.as_ref();
            let attack = attack.map_or("none".to_owned(), |attack| attack.attack.name());
            json!({
                "name": stage.name,
                "image_size": stage.phases[0].image_size,
                "attack": attack,
                "samples": stage.samples(),
                "seconds": seconds.get(&stage.name),
            })
        });
        Ok(json!({
            "name": self.name,
            "run": run.folder.path().display().to_string(),
            "images": result["images"],
            "clean": result["stages"][0]["robust_accuracy"],
            "pgd-20": result["stages"][1]["robust_accuracy"],
            "apgd-ce": result["robust_accuracy"],
            "interval_95": result["interval_95"],
            "stages": stages.collect::<Vec<_>>(),
        }))
    }
}

/// Measures accuracy over epsilon, draws the figure and returns the curves.
fn draw(
    models: &[(Trained, Value)],
    path: &Path,
    device: &Device,
    screen: &mut dyn Screen,
) -> Result<Vec<Vec<(f64, f64)>>> {
    let run = &models[0].0.run;
    let test = &run.images.last().expect("recipes have stages").test;
    let subset = Subset::choose(test, &Selection::Sample(CURVE_IMAGES))?;
    let setup = Setup {
        batch: CURVE_IMAGES,
        seed: run.recipe.seed,
        device,
        comm: &Comm::single(),
    };
    let attacks = EPSILONS.map(|units| {
        let epsilon = format!("{units}/255").parse().expect("a fraction");
        let settings = Settings::new(Version::Standard, Norm::Linf, epsilon);
        settings.attack("pgd").expect("a known attack")
    });
    let (mut measured, mut side) = (Vec::new(), 0);
    for (number, (model, _)) in models.iter().enumerate() {
        screen.progress(number as u64, models.len() as u64, "accuracy over epsilon");
        let saved = weights::load(&model.run.folder.path().join("model"), device)?;
        let preprocessing = saved.preprocessing.preprocessing?;
        side = preprocessing.image_size;
        let images = Images::Stored {
            dataset: test,
            subset: &subset,
            preprocessing,
        };
        let classifier = Classifier::new(saved.model, None, Precision::F32);
        let outcome = classifier.evaluate(&images, &attacks, setup, &())?;
        measured.push((classifier, images, outcome));
    }
    let curves = measured.iter().map(|(.., outcome)| {
        let points = curve::points(outcome, &attacks).into_iter();
        points
            .map(|point| (point.value, point.robust_accuracy))
            .collect()
    });
    let curves: Vec<Vec<(f64, f64)>> = curves.collect();

    let all_are_right = |index: &usize| {
        let mut broken_by = measured
            .iter()
            .map(|(.., outcome)| &outcome.broken_by[*index]);
        broken_by.all(|attack| attack.as_deref() != Some("clean"))
    };
    let chosen: Vec<usize> = (0..subset.len())
        .filter(all_are_right)
        .take(EXAMPLES)
        .collect();
    let attack = &run.recipe.final_evaluation[0].attacks()[0];
    // The normal model first: what goes wrong, then the remedy.
    let shown = models.iter().zip(&curves).rev();
    let figure = Figure {
        curves: shown
            .map(|((model, _), points)| Curve {
                model: model.name.to_owned(),
                points: points.clone(),
            })
            .collect(),
        examples: match &chosen[..] {
            [] => Vec::new(),
            chosen => {
                let models = measured.iter().rev();
                let models = models.map(|(classifier, images, _)| (classifier, images));
                examples(models, chosen, attack, test.classes(), setup)?
            }
        },
        side,
        attack: format!(
            "{}, {} {}",
            attack.name().to_uppercase(),
            attack.norm().map_or("", Norm::word),
            attack.epsilon().map_or(String::new(), Fraction::to_string)
        ),
        gain: 8.0,
    };
    files::write(path, figure.to_svg()?.as_bytes())?;
    Ok(curves)
}

/// Attacks every model on some images, at least one.
fn examples<'a>(
    models: impl Iterator<Item = (&'a Classifier, &'a Images<'a>)>,
    chosen: &[usize],
    attack: &Attack,
    classes: &[String],
    setup: Setup,
) -> Result<Vec<Example>> {
    let class = |label: usize| classes.get(label).cloned().unwrap_or_default();
    let mut examples: Vec<Example> = Vec::new();
    for (classifier, images) in models {
        let evaluation = classifier.evaluation(images, &[], setup);
        let target = TargetModel::new(evaluation.network, setup.device);
        let (pixels, labels) = images.batch(chosen, setup.device)?;
        let shape = pixels.dims();
        if examples.is_empty() {
            let clean = to_vec(pixels.clone());
            let clean = clean.chunks(clean.len() / chosen.len());
            examples = clean
                .zip(&labels)
                .map(|(clean, label)| Example {
                    clean: clean.to_vec(),
                    class: class(*label as usize),
                    attacked: Vec::new(),
                })
                .collect();
        }
        let batch = Batch {
            images: pixels,
            labels: labels.clone(),
            keys: chosen.iter().map(|index| images.key(*index)).collect(),
            seed: setup.seed,
        };
        let adversarial: Vec<Vec<f32>> = attack
            .perturb(&target, &batch)
            .into_iter()
            .flatten()
            .collect();
        let logits = target.logits(from_vec(adversarial.concat(), shape, setup.device));
        let examples = examples.iter_mut().zip(adversarial).zip(labels);
        for (row, ((example, adversarial), label)) in examples.enumerate() {
            let prediction = logits.prediction(row);
            example.attacked.push(Attacked {
                adversarial,
                prediction: prediction.map_or("not finite".to_owned(), class),
                is_right: prediction == Some(label as usize),
            });
        }
    }
    Ok(examples)
}

/// The demo's work by part, in multiply-adds, for the time left.
struct Work {
    parts: [f64; 5],
    recipes: [Recipe; 2],
    /// When the first progress was reported, and the work that was done by then, by an interrupted demo too.
    began: Cell<Option<(Instant, f64)>>,
}

impl Work {
    fn new(robust: &Recipe, normal: &Recipe) -> Self {
        let last = normal.stage.last().expect("recipes have stages");
        let update = normal.macs_left(normal.samples() - last.samples()) / last.samples() as f64;
        // An update is a forward pass and two of its size backward, an attack step one of each.
        let step = update * 2.0 / 3.0;
        let images = match robust.final_evaluation[0].images {
            TestImages::Images(images) => images as f64,
            TestImages::Ids(_) => 0.0,
        };
        // PGD-20 on the images that are classified right, then APGD's 100 steps on the survivors. The shares are those
        // of the demo's models.
        let attacked =
            |right: f64, survivors: f64| images * step * (20.0 * right + 100.0 * survivors);
        let curve = CURVE_IMAGES as f64 * step * 20.0 * (0.6 * EPSILONS.len() as f64 + 2.0);
        Self {
            parts: [
                robust.macs_left(0),
                attacked(0.7, 0.4),
                normal.macs_left(0),
                attacked(0.9, 0.02),
                curve,
            ],
            recipes: [robust.clone(), normal.clone()],
            began: Cell::new(None),
        }
    }

    fn part<'a>(&'a self, part: usize, screen: &'a mut dyn Screen) -> Watched<'a> {
        Watched {
            work: self,
            part,
            screen,
        }
    }

    /// Share of a part that is done; None for progress of something within it.
    fn share(&self, part: usize, done: u64, total: u64) -> Option<f64> {
        match part {
            0 | 2 => {
                let recipe = &self.recipes[part / 2];
                let left = recipe.macs_left(done) / recipe.macs_left(0);
                (total == recipe.samples()).then_some(1.0 - left)
            }
            _ => Some(done as f64 / total.max(1) as f64),
        }
    }

    /// Seconds left, at the speed since the first report.
    fn left(&self, part: usize, share: f64) -> Option<f64> {
        let here = self.parts[..part].iter().sum::<f64>() + share * self.parts[part];
        let all: f64 = self.parts.iter().sum();
        match self.began.get() {
            Some((instant, before)) if here > before => {
                Some((all - here) * instant.elapsed().as_secs_f64() / (here - before))
            }
            Some(_) => None,
            None => {
                self.began.set(Some((Instant::now(), here)));
                None
            }
        }
    }
}

/// A screen that adds the time left of the whole demo to the progress of a part.
struct Watched<'a> {
    work: &'a Work,
    part: usize,
    screen: &'a mut dyn Screen,
}

impl Screen for Watched<'_> {
    fn line(&mut self, text: &str) {
        self.screen.line(text);
    }

    fn progress(&mut self, done: u64, total: u64, text: &str) {
        let share = self.work.share(self.part, done, total);
        match share.and_then(|share| self.work.left(self.part, share)) {
            Some(left) => {
                let text = format!("{text}; whole demo: about {} left", duration(left));
                self.screen.progress(done, total, &text);
            }
            None => self.screen.progress(done, total, text),
        }
    }
}

/// The results as lines of text, with what they mean and what to try next.
pub fn report(result: &Value) -> Vec<String> {
    let percent = |value: &Value| format!("{:.1} %", 100.0 * value.as_f64().unwrap_or(f64::NAN));
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let models = list(&result["models"]);
    let mut lines = vec![
        String::new(),
        format!(
            "{:<8} {:>9} {:>9} {:>9}   trained on",
            "model", "clean", "PGD-20", "APGD-CE"
        ),
    ];
    for model in &models {
        for (index, stage) in list(&model["stages"]).iter().enumerate() {
            let head = match index {
                0 => format!(
                    "{:<8} {:>9} {:>9} {:>9}",
                    model["name"].as_str().unwrap_or_default(),
                    percent(&model["clean"]),
                    percent(&model["pgd-20"]),
                    percent(&model["apgd-ce"])
                ),
                _ => " ".repeat(38),
            };
            lines.push(format!(
                "{head}   {} samples at {} pixels, attack {}, {}",
                grouped(stage["samples"].as_u64().unwrap_or_default()),
                stage["image_size"],
                stage["attack"].as_str().unwrap_or_default(),
                duration(stage["seconds"].as_f64().unwrap_or_default()),
            ));
        }
    }
    let robust = &models[0];
    let interval = &robust["interval_95"];
    let run = robust["run"].as_str().unwrap_or_default();
    lines.extend([
        String::new(),
        format!(
            "Accuracy on {} test images: unchanged, under PGD with 20 steps, and on what survives that under APGD-CE, the first",
            robust["images"]
        ),
        "of AutoAttack's four attacks. An image counts as robust only if no attack so far fooled the model on it.".to_owned(),
        format!(
            "The robust model's last number is {} to {} with 95 % confidence. Robustness costs clean accuracy; the normal",
            percent(&interval[0]),
            percent(&interval[1])
        ),
        "model has more of that, and loses it to changes that are hard to see:".to_owned(),
        format!("  {}", result["figure"].as_str().unwrap_or_default()),
        String::new(),
        "Try next:".to_owned(),
        format!(
            "  advxl eval {run} --data synthetic:500 --n 32 --attack autoattack --eps 8/255   # all of AutoAttack"
        ),
        "  advxl eval MODEL --data DATA --n 100 --attack apgd-ce,apgd-t --eps 4/255       # a model of timm, a .pth file".to_owned(),
        "  advxl train recipes/my_images.toml --set data.train=TRAIN --set data.test=TEST --dry-run   # your own images".to_owned(),
    ]);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers lines and progress.
    #[derive(Default)]
    struct Paper(Vec<String>, Vec<String>);

    impl Screen for Paper {
        fn line(&mut self, text: &str) {
            self.0.push(text.to_owned());
        }

        fn progress(&mut self, _: u64, _: u64, text: &str) {
            self.1.push(text.to_owned());
        }
    }

    #[test]
    fn the_demo_trains_attacks_draws_and_resumes() {
        let folder = tempfile::tempdir().unwrap();
        let sets = [
            "seed=1",
            "data.train=synthetic:200",
            "data.test=synthetic:70",
            "model.depth=1",
            "final_evaluation.attacked.images=8",
            "stage.pretrain.phases.0.samples=320",
            "stage.pretrain.learning_rate.warmup_samples=64",
            "stage.finetune.phases.0.samples=64",
            "stage.finetune.learning_rate.warmup_samples=32",
        ]
        .map(str::to_owned);
        let mut paper = Paper::default();
        let result = run(folder.path(), &sets, &Device::cpu(), &mut paper).unwrap();
        for part in [
            "[1/5] training the robust model",
            "[4/5] attacking the normal model",
        ] {
            assert!(
                paper.0.iter().any(|line| line.starts_with(part)),
                "{part}: {:?}",
                paper.0
            );
        }
        assert!(
            paper
                .1
                .iter()
                .any(|text| text.contains("whole demo: about")),
            "{:?}",
            paper.1
        );
        let svg = files::read_text(&folder.path().join("demo.svg")).unwrap();
        assert!(svg.contains("attack on the normal model"), "{svg}");
        let text = report(&result).join("\n");
        assert!(
            text.contains("APGD-CE") && text.contains("advxl eval"),
            "{text}"
        );
        for model in result["models"].as_array().unwrap() {
            assert_eq!(model["images"], 8);
            assert_eq!(model["curve"].as_array().unwrap().len(), 6);
        }

        let mut second = Paper::default();
        let again = run(folder.path(), &sets, &Device::cpu(), &mut second).unwrap();
        assert_eq!(again, result);
    }
}
