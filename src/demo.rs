//! The demonstration: the paper's two stages on synthetic images beside normal training.
//!
//! Everything runs through the same code as any recipe; here are only the recipe, the comparison and
//! the table.

use std::path::Path;

use serde_json::{Value, json};

use crate::distributed::Comm;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::ops::Device;
use crate::output::{Content, Inputs};
use crate::recipe::{Recipe, cannot_be_run};
use crate::screen::Screen;
use crate::train::{Monitor, Run, evaluate_finally, train};
use crate::units::{duration, grouped};

/// The recipe of the robust model; the normal one is the same without the attacks.
const RECIPE: &str = include_str!("../recipes/demo.toml");

/// Trains both models in two folders and measures them; also writes `result.json` there.
///
/// A stopped demonstration goes on where it was.
pub fn run(folder: &Path, seed: u64, device: &Device, screen: &mut dyn Screen) -> Result<Value> {
    files::make_folder(folder)?;
    let path = folder.join("result.json");
    Inputs::default().check_file("--out", &path, Content::Json("models"))?;
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
    files::write(&path, format!("{result:#}\n").as_bytes())?;
    files::remove_leftovers(folder, "result.json")?;
    Ok(result)
}

fn one_model(
    name: &str,
    recipe: Recipe,
    folder: &Path,
    device: &Device,
    screen: &mut dyn Screen,
) -> Result<Value> {
    let run = Run::open(recipe, folder, false, device, &Comm::single())?;
    let mut monitor = Monitor::new(&run.recipe, &run.folder, &run.comm, screen);
    train(&run, &mut monitor)?;
    let results = evaluate_finally(&run, screen)?;
    let [(_, pgd), (_, autoattack)] = &results[..] else {
        return Err(Error::failed("the demo's recipe has two final evaluations"));
    };
    let seconds = run.folder.stage_seconds();
    let stages = run.recipe.stage.iter().map(|stage| {
        let attack = stage.attack.as_ref();
        let attack = attack.map_or("none".to_owned(), |attack| attack.pgd.name());
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
        "images": pgd["images"],
        "clean": pgd["stages"][0]["robust_accuracy"],
        "pgd-20": pgd["robust_accuracy"],
        "autoattack_images": autoattack["images"],
        "autoattack": autoattack["robust_accuracy"],
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
