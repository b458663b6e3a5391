//! A run that is killed at any moment and resumed ends as if it had never stopped.

mod support;

use std::path::{Path, PathBuf};

use support::{advxl, class_folders, files_below, kill_after, write_recipe};

/// Returns the path of a run folder.
fn out(folder: &Path, name: &str) -> PathBuf {
    folder.join(name)
}

/// Trains to the end with `more` arguments and returns standard error.
fn train(recipe: &Path, out: &Path, more: &[&str]) -> String {
    let arguments = [
        "train",
        recipe.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    let (code, text) = advxl(&[&arguments[..], more].concat());
    assert_eq!(code, 0, "{text}");
    text
}

/// Reads the results of training: the last checkpoint holds weights, moments, average and counters.
fn made(out: &Path) -> [Vec<u8>; 3] {
    [
        "checkpoints/000000000320.safetensors",
        "model/model.safetensors",
        "model/config.json",
    ]
    .map(|file| std::fs::read(out.join(file)).unwrap())
}

#[test]
fn two_runs_of_one_seed_are_equal_to_the_bit_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let mut results = Vec::new();
    for threads in ["1", "2", "3"] {
        let out = out(folder.path(), threads);
        train(&recipe, &out, &["--threads", threads]);
        results.push(made(&out));
    }
    assert!(results[0] == results[1] && results[1] == results[2]);
}

#[test]
fn recomputed_activations_and_a_processor_without_bf16_change_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let run = |name: &str, overrides: &[&str]| {
        let out = out(folder.path(), name);
        let text = train(&recipe, &out, overrides);
        let weights = std::fs::read(out.join("model/model.safetensors")).unwrap();
        (weights, text)
    };
    let (plain, _) = run("plain", &[]);
    let (recomputed, _) = run("recomputed", &["--set", "recompute=true"]);
    assert!(plain == recomputed, "recompute changed the weights");
    let (bf16, text) = run("bf16", &["--set", "precision=bf16"]);
    let notices = text.matches("computing in f32").count();
    if advxl_kernels::bf16_is_faster() {
        assert!(notices == 0 && bf16 != plain, "{text}");
    } else {
        assert!(notices == 1 && bf16 == plain, "{text}");
    }
}

#[test]
fn a_run_killed_at_any_moment_resumes_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let whole = out(folder.path(), "whole");
    train(&recipe, &whole, &[]);

    let killed = out(folder.path(), "killed");
    let arguments = [
        "train",
        recipe.to_str().unwrap(),
        "--out",
        killed.to_str().unwrap(),
    ];
    // Kills by the number of metrics lines: within a phase, at a checkpoint, at the change of phase and of stage, and
    // near the end.
    for lines in [1, 3, 5, 8, 11] {
        kill_after(lines, &arguments, &killed);
    }
    // Leftovers of a kill during a write, which rarely occur by chance.
    let leftovers = [
        "model/model.safetensors.1.tmp",
        "stages/pretrain/config.json.22.tmp",
        "checkpoints/000000000064.safetensors.4194304.tmp",
        "recipe.toml.333.tmp",
        "result-pgd.json.7.tmp",
        "vocabulary/vocab.txt.7.tmp",
        "crash/000000000064/report.json.7.tmp",
    ];
    for name in leftovers {
        let path = killed.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "half of").unwrap();
    }
    train(&recipe, &killed, &[]);
    assert!(made(&killed) == made(&whole));
    for path in files_below(&killed) {
        assert!(
            !path.to_str().unwrap().ends_with(".tmp"),
            "{}",
            path.display()
        );
    }
}

/// Returns all files in a folder with their contents.
fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = files_below(folder);
    files.sort();
    let read = |path: PathBuf| (path.clone(), std::fs::read(path).unwrap());
    files.into_iter().map(read).collect()
}

#[test]
fn another_model_is_refused_with_the_differences_and_the_run_is_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let run = out(folder.path(), "run");
    train(&recipe, &run, &[]);
    let before = content(&run);
    for (change, parts) in [
        (
            "model.width=64",
            [
                "`weights.blocks.0.attn.proj.bias` is [32] in the checkpoint but [64] in the recipe",
                "model.width: 32 -> 64",
            ],
        ),
        (
            "model.depth=1",
            [
                "`weights.blocks.1.attn.proj.bias` is [32] in the checkpoint but absent in the recipe",
                "more tensors differ",
            ],
        ),
        (
            "average=none",
            [
                "`average.blocks.0.attn.proj.bias` is [32] in the checkpoint but absent in the recipe",
                "average.decay: 0.9 -> absent",
            ],
        ),
    ] {
        let arguments = [
            "train",
            recipe.to_str().unwrap(),
            "--out",
            run.to_str().unwrap(),
            "--accept-changes",
            "--set",
            change,
        ];
        let (code, text) = advxl(&arguments);
        assert_eq!(code, 2, "{text}");
        for part in parts.iter().chain(&["its own recipe can still resume it"]) {
            assert!(text.contains(part), "`{part}` is not in:\n{text}");
        }
        assert!(!text.contains("damaged"), "{text}");
        assert!(content(&run) == before, "{change}");
    }
    train(&recipe, &run, &[]);
}

/// Writes a recipe of class folders, evaluated twice and at the end.
fn recipe_of_folders(folder: &Path) -> PathBuf {
    let path = write_recipe(folder);
    let last = r#"
[[final_evaluation]]
name = "end"
images = 20
attacks = ["pgd"]
norm = "linf"
epsilon = "2/255"

[[stage]]
name = "pretrain""#;
    let data = folder.join("data");
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replacen("\n[[stage]]\nname = \"pretrain\"", last, 1);
    let text = text.replace("synthetic:200", data.join("train").to_str().unwrap());
    let text = text.replace("synthetic:64", data.join("val").to_str().unwrap());
    std::fs::write(&path, text).unwrap();
    class_folders(&data.join("train"), &["cat", "dog", "owl"], 30);
    class_folders(&data.join("val"), &["cat", "dog", "owl"], 7);
    path
}

fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn the_number_of_loader_threads_changes_no_bit_and_may_change_on_resume() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe_of_folders(folder.path());
    let (one, two) = (out(folder.path(), "one"), out(folder.path(), "two"));
    train(&recipe, &one, &["--set", "data.workers=1"]);
    train(&recipe, &two, &["--set", "data.workers=7"]);
    let made = |run: &Path| std::fs::read(run.join("model/model.safetensors")).unwrap();
    assert!(made(&one) == made(&two));
    train(&recipe, &one, &["--set", "data.workers=3"]);
}

#[test]
fn broken_test_images_are_skipped_counted_and_named_once() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe_of_folders(folder.path());
    let broken = folder.path().join("data/val/dog/02.png");
    std::fs::write(&broken, b"<html>").unwrap();
    let run = out(folder.path(), "run");
    let text = train(&recipe, &run, &["--set", "data.broken_rate=0.1"]);
    assert_eq!(text.matches("dog/02.png").count(), 1, "{text}");
    assert!(
        text.contains("evaluation on 20 images (1 of 21 broken and left out)"),
        "{text}"
    );

    let lines = metrics(&run);
    let evaluations: Vec<_> = lines
        .iter()
        .filter(|line| line["evaluation"].is_object())
        .collect();
    assert_eq!(evaluations.len(), 4);
    for line in evaluations {
        assert_eq!(line["evaluation"]["images"], 20, "{line}");
        assert_eq!(line["evaluation"]["broken_images"], 1, "{line}");
        // Fractions of 20 images, not of 21.
        let clean = line["evaluation"]["clean"].as_f64().unwrap() * 20.0;
        assert!((clean - clean.round()).abs() < 1e-9, "{line}");
    }
    let last = lines.last().unwrap();
    assert_eq!(
        (&last["images"], &last["broken_images"]),
        (&19.into(), &1.into())
    );
    let result = std::fs::read_to_string(run.join("result-end.json")).unwrap();
    let result: serde_json::Value = serde_json::from_str(&result).unwrap();
    assert_eq!(
        (&result["images"], &result["left_out"]),
        (&19.into(), &serde_json::json!([9]))
    );
    let quarantine = std::fs::read_to_string(run.join("quarantine.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(quarantine.trim_end()).unwrap();
    assert_eq!(
        (&line["split"], &line["sample"]),
        (&"test".into(), &9.into())
    );
}

#[test]
fn more_broken_test_images_than_allowed_fail_the_evaluation_but_never_training() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe_of_folders(folder.path());
    let broken = folder.path().join("data/val/dog/02.png");
    let sound = std::fs::read(&broken).unwrap();
    std::fs::write(&broken, &sound[..40]).unwrap();
    for (name, more, reason) in [
        (
            "none",
            &[][..],
            "1 of 21 test images are broken; the first is ",
        ),
        (
            "low",
            &["--set", "data.broken_rate=0.01"],
            "1 of 21 test images are broken, above data.broken_rate = 0.01; the first is ",
        ),
    ] {
        let run = out(folder.path(), name);
        let arguments = [
            "train",
            recipe.to_str().unwrap(),
            "--out",
            run.to_str().unwrap(),
        ];
        let arguments = [&arguments[..], more].concat();
        // Repeatedly: nothing is trained twice, and only the final evaluation is missing.
        for attempt in 0..2 {
            let (code, text) = advxl(&arguments);
            assert_eq!(code, 2, "{text}");
            let error = format!(
                "error: final evaluation `end`: {}",
                reason.replace("21", "20")
            );
            assert!(text.contains(&error), "`{error}` is not in:\n{text}");
            let warned = text.matches(&format!("samples failed: {reason}")).count();
            assert_eq!(warned, if attempt == 0 { 4 } else { 0 }, "{text}");
            assert!(!made(&run)[0].is_empty());
        }
        let evaluations = metrics(&run);
        let failed = evaluations
            .iter()
            .filter(|line| line["evaluation"]["failed"].is_string());
        assert_eq!(failed.count(), 4);
        // With the image repaired, the run succeeds.
        std::fs::write(&broken, &sound).unwrap();
        let (code, text) = advxl(&arguments);
        assert_eq!(code, 0, "{text}");
        std::fs::write(&broken, &sound[..40]).unwrap();
    }
}

#[test]
fn an_evaluation_lost_to_a_kill_is_run_on_resume() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let run = out(folder.path(), "run");
    train(&recipe, &run, &[]);
    let is_last =
        |line: &serde_json::Value| line["samples"] == 320 && line["evaluation"].is_object();
    let lines = metrics(&run);
    let right = lines.iter().find(|line| is_last(line)).unwrap();
    // As after a kill during the evaluation, which follows the checkpoint.
    let others = lines.iter().filter(|line| !is_last(line));
    let text: String = others.map(|line| format!("{line}\n")).collect();
    std::fs::write(run.join("metrics.jsonl"), text).unwrap();
    for _ in 0..2 {
        train(&recipe, &run, &[]);
        let lines = metrics(&run);
        let found: Vec<_> = lines.iter().filter(|line| is_last(line)).collect();
        assert_eq!(found, [right]);
    }
}

#[test]
fn a_finished_run_is_not_changed() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let run = out(folder.path(), "run");
    train(&recipe, &run, &[]);
    let before = made(&run);
    train(&recipe, &run, &[]);
    assert!(made(&run) == before);
}

#[test]
fn a_damaged_checkpoint_is_reported_and_the_previous_one_used() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let run = out(folder.path(), "run");
    train(&recipe, &run, &[]);
    let right = made(&run);
    let last = run.join("checkpoints/000000000320.safetensors");

    // One bit in the middle, then half of the file.
    let mut flipped = right[0].clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for damaged in [&flipped[..], &right[0][..middle]] {
        std::fs::write(&last, damaged).unwrap();
        let (code, text) = advxl(&[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            run.to_str().unwrap(),
        ]);
        assert_eq!(code, 0, "{text}");
        assert!(
            text.contains("000000000320.safetensors` is damaged"),
            "{text}"
        );
        assert!(text.contains("resuming after 256"), "{text}");
        assert!(made(&run) == right);
    }
}

#[test]
fn a_non_finite_loss_stops_the_run_and_saves_a_bundle_that_reproduces_it() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let run = out(folder.path(), "run");
    // A learning rate that no model survives.
    let huge = "stage.pretrain.learning_rate.peak=1e30";
    let arguments = [
        "train",
        recipe.to_str().unwrap(),
        "--out",
        run.to_str().unwrap(),
        "--set",
        huge,
    ];
    let (code, text) = advxl(&arguments);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("the weights were not changed"), "{text}");

    let bundle = std::fs::read_dir(run.join("crash"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    for file in [
        "report.json",
        "images.safetensors",
        "adversarial.safetensors",
    ] {
        assert!(bundle.join(file).is_file(), "{file}");
    }
    // The bundle is a run folder that fails immediately, at the same update.
    let recipe = bundle.join("recipe.toml");
    let (code, again) = advxl(&[
        "train",
        recipe.to_str().unwrap(),
        "--out",
        bundle.to_str().unwrap(),
    ]);
    assert_eq!(code, 1, "{again}");
    let failure = |text: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with("error:"))
            .unwrap();
        line.to_owned()
    };
    assert_eq!(failure(&text), failure(&again));
}

/// `tests/golden/run_0_1_0` is a run folder of version 0.1.0 (commit 8200d32) after 256 of 320 samples: the tests'
/// recipe at half the width. The losses are those of that version when it continued.
#[test]
fn a_run_of_an_earlier_version_is_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/run_0_1_0");
    let run = out(folder.path(), "run");
    std::fs::create_dir_all(run.join("checkpoints")).unwrap();
    for file in ["recipe.toml", "checkpoints/000000000256.safetensors"] {
        std::fs::copy(golden.join(file), run.join(file)).unwrap();
    }
    let text = train(&run.join("recipe.toml"), &run, &[]);
    assert!(text.contains("resuming after 256 of 320"), "{text}");
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let lines: Vec<serde_json::Value> = lines.collect();
    for (samples, loss, norm) in [
        (288, 2.503_518_342_971_801_8, 0.701_603_740_905_318_5),
        (320, 2.508_531_332_015_991, 0.578_488_893_882_822_8),
    ] {
        let line = lines
            .iter()
            .find(|line| line["samples"] == samples && line["loss"].is_f64())
            .unwrap();
        // Other processors sum in another order.
        for (key, right) in [("loss", loss), ("gradient_norm", norm)] {
            let found = line[key].as_f64().unwrap();
            assert!(
                (found - right).abs() < 2e-4 * right,
                "{key} {found} {right}"
            );
        }
    }
}
