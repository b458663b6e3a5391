//! A run that is killed at any moment and started again ends as if it had never stopped.

mod support;

use std::path::{Path, PathBuf};

use support::{advxl, kill_after, write_recipe};

/// The run's folder as an argument.
fn out(folder: &Path, name: &str) -> PathBuf {
    folder.join(name)
}

/// Trains to the end with `more` arguments and gives what was written to standard error.
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

/// Everything that training made: the last checkpoint holds weights, moments, average, counters.
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
    // Moments by what the run has written so far: within a phase, at a checkpoint, at the change of
    // phase and of stage, near the end.
    for lines in [1, 3, 5, 8, 11] {
        kill_after(lines, &arguments, &killed);
    }
    train(&recipe, &killed, &[]);
    assert!(made(&killed) == made(&whole));
}

#[test]
fn a_finished_run_is_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let run = out(folder.path(), "run");
    train(&recipe, &run, &[]);
    let before = made(&run);
    train(&recipe, &run, &[]);
    assert!(made(&run) == before);
}

#[test]
fn a_damaged_checkpoint_is_told_and_the_one_before_it_used() {
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
fn a_loss_that_is_not_finite_stops_the_run_and_leaves_what_reproduces_it() {
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
    // The bundle is the folder of a run that fails at once, at the same update.
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
