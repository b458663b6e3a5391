//! The demonstration: the paper's two stages on synthetic images beside normal training.
//!
//! Everything runs through the same code as any recipe; here are only the recipe, the comparison and
//! the table.

use std::path::Path;

use burn::tensor::Device;
use serde_json::{Value, json};

use crate::attack::{Attack, Pgd, Start};
use crate::data::EvaluationTransform;
use crate::data::resize::Filter;
use crate::error::{Context, Result};
use crate::eval::autoattack::{Settings, Version};
use crate::eval::session::{Progress, watch};
use crate::eval::{Evaluation, Images, Outcome};
use crate::files;
use crate::model::Pass;
use crate::recipe::{Recipe, cannot_be_run};
use crate::screen::Screen;
use crate::train::{Monitor, Run, train};
use crate::units::{duration, grouped};

/// AutoAttack takes some ten thousand passes for an image that stands: a part of the images must do.
const AUTOATTACK_IMAGES: usize = 64;

/// The recipe of the robust model; the normal one is the same without the attacks.
const RECIPE: &str = include_str!("../recipes/demo.toml");

/// Trains both models in two folders and measures them; also writes `result.json` there.
///
/// A stopped demonstration goes on where it was.
pub fn run(folder: &Path, seed: u64, device: &Device, screen: &mut dyn Screen) -> Result<Value> {
    let overrides = [format!("seed={seed}")];
    let robust = Recipe::parse(RECIPE, &overrides)
        .map_err(|faults| cannot_be_run("recipes/demo.toml", &faults))?;
    let mut normal = robust.clone();
    for stage in &mut normal.stage {
        stage.attack = None;
        stage.attack_warmup_samples = None;
    }
    let models = [("robust", robust), ("normal", normal)];
    let models = models.map(|(name, recipe)| {
        screen.line(&format!("training the {name} model"));
        one_model(name, recipe, &folder.join(name), device, screen)
            .context(|| format!("the {name} model"))
    });
    let mut found = Vec::new();
    for model in models {
        found.push(model?);
    }
    let result = json!({ "models": found });
    files::write(
        &folder.join("result.json"),
        format!("{result:#}\n").as_bytes(),
    )?;
    Ok(result)
}

fn one_model(
    name: &str,
    recipe: Recipe,
    folder: &Path,
    device: &Device,
    screen: &mut dyn Screen,
) -> Result<Value> {
    let run = Run::open(recipe, folder, false, device)?;
    let mut monitor = Monitor::new(&run.recipe, &run.folder, screen);
    let state = train(&run, &mut monitor)?;

    let evaluation = run
        .recipe
        .evaluation
        .as_ref()
        .expect("the demo's recipe has an evaluation");
    let attack = Pgd {
        steps: 20,
        start: Start::Random,
        ..evaluation.attack.clone()
    };
    let model = state.averaged();
    let logits = |images| model.logits(images, &Pass::evaluation());
    let last = run
        .recipe
        .stage
        .last()
        .and_then(|stage| stage.phases.last());
    let image_size = last.expect("a recipe has a stage and a phase").image_size as usize;
    let transform = EvaluationTransform {
        image_size,
        crop_fraction: 1.0,
        interpolation: Filter::Bilinear,
    };
    let measured = |name: &str, count: usize, attacks: &[Attack], screen: &mut dyn Screen| {
        let count = count.min(run.test.len());
        let images = Images::Stored {
            dataset: &run.test,
            transform,
            count,
        };
        let evaluation = Evaluation {
            logits: &logits,
            images: &images,
            attacks,
            batch: 128,
            seed: run.recipe.seed,
            device,
        };
        screen.line(&format!("{name} on {count} images"));
        let progress = Progress::new(folder, name, false);
        let outcome: Outcome = watch(&evaluation, Some(&progress), screen)?;
        Ok((outcome, progress))
    };
    let settings = Settings::new(Version::Standard, attack.norm, attack.epsilon.clone());
    let pgd = [Attack::Pgd(attack)];
    let (pgd, of_pgd) = measured("pgd", run.test.len(), &pgd, screen)?;
    let (autoattack, of_autoattack) = measured(
        "autoattack",
        AUTOATTACK_IMAGES,
        &settings.autoattack(),
        screen,
    )?;
    of_pgd.remove()?;
    of_autoattack.remove()?;
    let seconds = run.folder.stage_seconds()?;
    let stages = run.recipe.stage.iter().map(|stage| {
        let attack = stage.attack.as_ref().map_or("none".to_owned(), Pgd::name);
        json!({
            "name": stage.name,
            "image_size": stage.phases[0].image_size,
            "attack": attack,
            "samples": stage.samples(),
            "seconds": seconds.get(&stage.name),
        })
    });
    Ok(json!({
        "name": name,
        "run": folder.display().to_string(),
        "images": pgd.robust.len(),
        "clean": pgd.accuracy_after(0),
        "pgd-20": pgd.accuracy_after(1),
        "autoattack_images": autoattack.robust.len(),
        "autoattack": autoattack.standing() as f64 / autoattack.robust.len() as f64,
        "stages": stages.collect::<Vec<_>>(),
    }))
}

/// The result as lines of text.
pub fn table(result: &Value) -> Vec<String> {
    let percent = |value: &Value| format!("{:.1} %", 100.0 * value.as_f64().unwrap_or(f64::NAN));
    let models = result["models"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let mut lines = vec![
        String::new(),
        format!(
            "{:<8} {:>9} {:>9} {:>11}   stages",
            "model", "clean", "PGD-20", "AutoAttack"
        ),
    ];
    for model in models {
        let stages = model["stages"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        for (index, stage) in stages.iter().enumerate() {
            let head = match index {
                0 => format!(
                    "{:<8} {:>9} {:>9} {:>11}",
                    model["name"].as_str().unwrap_or_default(),
                    percent(&model["clean"]),
                    percent(&model["pgd-20"]),
                    percent(&model["autoattack"])
                ),
                _ => " ".repeat(40),
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
    lines.push(String::new());
    lines
}
