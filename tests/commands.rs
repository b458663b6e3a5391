//! Runs the commands as a user would, in sequence on one small run.

mod support;

use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;
use support::{advxl, command, trained, write_recipe};

/// Parses the last line of standard output as JSON.
#[track_caller]
fn json(arguments: &[&str]) -> Value {
    let output = command(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

fn floats(file: &Path, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    bytemuck::pod_collect_to_vec(tensors.tensor(name).unwrap().data())
}

#[test]
fn a_run_is_evaluated_and_its_logits_agree_with_its_accuracy() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let run = run.to_str().unwrap();

    let data = ["--data", "synthetic:64", "--seed", "3"];
    let attack = [
        "--attack",
        "clean,pgd",
        "--eps",
        "8/255",
        "--steps",
        "5",
        "--json",
    ];
    let result = json(&[&["eval", run], &data[..], &attack[..]].concat());
    let in_batches = json(&[&["eval", run, "--batch", "7"], &data[..], &attack[..]].concat());
    assert_eq!(result["robust"], in_batches["robust"]);
    assert_eq!(result["images"], 64);
    let stages = result["stages"].as_array().unwrap();
    assert_eq!(stages[0]["attack"], "clean");
    assert_eq!(stages[1]["attack"], "pgd-5");
    assert!(stages[1]["robust_count"].as_u64() <= stages[0]["robust_count"].as_u64());
    assert!(Path::new(run).join("result.json").is_file());

    let out = folder.path().join("logits.safetensors");
    let predict = ["predict", run, "--gradient", "--out", out.to_str().unwrap()];
    let (code, text) = advxl(&[&predict[..], &data[..]].concat());
    assert_eq!(code, 0, "{text}");
    let logits = floats(&out, "logits");
    assert_eq!(logits.len(), 64 * 12);
    assert_eq!(floats(&out, "gradients").len(), 64 * 3 * 32 * 32);
    // Synthetic images cycle through the classes.
    let best = |row: &[f32]| (0..12).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
    let right = logits
        .chunks(12)
        .enumerate()
        .filter(|(i, row)| best(row) == i % 12)
        .count();
    assert_eq!(right as u64, stages[0]["robust_count"].as_u64().unwrap());
}

#[test]
fn a_step_is_timed_with_the_keys_of_the_comparison() {
    let line = json(&[
        "bench",
        "step",
        "--model",
        "vit_micro",
        "--image-size",
        "8",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--classes",
        "10",
    ]);
    for key in [
        "program",
        "precision",
        "model",
        "image_size",
        "batch",
        "attack_steps",
        "threads",
        "seconds_per_step",
        "images_per_second",
        "gflops",
        "peak_gflops",
    ] {
        assert!(!line[key].is_null(), "{key} is missing in {line}");
    }
}

#[test]
fn a_misspelled_model_size_is_corrected_by_every_command() {
    for arguments in [
        &["inspect", "vit_h15"][..],
        &["bench", "step", "--model", "vit_h15"],
        &["plan", "recipes/demo.toml", "--set", "model.size=vit_h15"],
    ] {
        let (code, text) = advxl(arguments);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains("did you mean `vit_h14`?"), "{text}");
    }
    let (code, text) = advxl(&["predict", "vit_h14", "--data", "synthetic:4", "--out", "x"]);
    assert!(
        code == 2 && text.contains("is a model size without weights"),
        "{text}"
    );
}

#[test]
fn none_removes_a_key_and_the_largest_seed_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let arguments = [
        "train",
        recipe.to_str().unwrap(),
        "--dry-run",
        "--set",
        "seed=18446744073709551615",
        "--set",
        "stage.pretrain.attack=none",
        "--set",
        "stage.finetune.attack=\"none\"",
        "--set",
        "evaluation=none",
        "--set",
        "final_evaluation=none",
    ];
    let output = command(&arguments).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}");
    assert!(
        printed.contains("seed = 18446744073709551615\n"),
        "{printed}"
    );
    assert!(
        !printed.contains("attack") && !printed.contains("evaluation"),
        "{printed}"
    );
}

#[test]
fn a_dry_run_prints_a_recipe_that_can_be_run() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write_recipe(folder.path());
    let recipe = recipe.to_str().unwrap();
    let dry = |recipe: &str| {
        let output = command(&["train", recipe, "--dry-run"]).output().unwrap();
        assert!(output.status.success());
        output.stdout
    };
    let printed = folder.path().join("printed.toml");
    std::fs::write(&printed, dry(recipe)).unwrap();
    assert_eq!(
        dry(printed.to_str().unwrap()),
        std::fs::read(&printed).unwrap()
    );
}

#[test]
fn a_plan_prints_the_papers_cost_and_the_parts_of_memory() {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/vit_b16_in1k.toml");
    let found = json(&[
        "plan",
        recipe,
        "--device-tflops",
        "400",
        "--devices",
        "8",
        "--price",
        "2",
        "--json",
    ]);
    let plan = &found["plan"];
    // The paper's 0.5 x 10^10 giga multiply-adds; its own formula gives 0.491.
    assert!(
        (plan["paper_macs"].as_f64().unwrap() / 1e19 - 0.491).abs() < 1e-3,
        "{plan}"
    );
    assert_eq!(plan["phases"].as_array().unwrap().len(), 2);
    for part in [
        "weights",
        "gradients",
        "moments",
        "average",
        "packed",
        "activations",
        "base",
    ] {
        assert!(plan["memory"][part].as_u64().unwrap() > 0, "{part}");
    }
    let (hours, price) = (
        plan["hours"].as_f64().unwrap(),
        plan["price"].as_f64().unwrap(),
    );
    assert!((price - 16.0 * hours).abs() < 1e-6);
}

#[test]
fn a_plan_prints_the_cores_that_a_gpu_needs_for_loading_and_warns_if_there_are_fewer() {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/vit_b16_in1k.toml");
    let plan = |more: &[&'static str]| {
        let usual = ["plan", recipe, "--device", "cuda", "--device-tflops", "400"];
        let output = command(&[&usual[..], &["--json"], more].concat())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let json: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        (json["loading"].clone(), text)
    };
    let (loading, text) = plan(&["--cores-per-gpu", "4", "--loader-rate", "500"]);
    let first = &loading[0];
    let speed = first["images_per_second"].as_f64().unwrap();
    // One more core for the host, and 5 % more images than the GPU needs.
    let cores = 1 + (1.05 * speed / 500.0).ceil() as u64;
    assert_eq!(first["cores"], cores);
    assert_eq!(first["source"], "jpeg");
    let warning = format!(
        "needs {cores} cores per GPU, but --cores-per-gpu has 4; set data.reduced_decode = true: "
    );
    assert!(text.contains(&warning), "{text}");
    assert!(
        text.contains("or pack the images (`advxl data pack --shorter-side`): "),
        "{text}"
    );

    let (_, text) = plan(&["--cores-per-gpu", "1024"]);
    assert!(
        text.contains("loading for one GPU") && !text.contains("warning"),
        "{text}"
    );
    let (packed, _) = plan(&["--set", "data.train=\"shards:x/{00..09}-146px.tar\""]);
    assert_eq!(packed[0]["source"], "packed");
    assert!(packed[0]["cores"].as_u64() < first["cores"].as_u64());
    let on_cpu = json(&["plan", recipe, "--device", "cpu", "--json"]);
    assert_eq!(on_cpu["loading"], serde_json::json!([]));
}

#[test]
fn a_plan_for_many_devices_prints_their_traffic_and_waiting_times() {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/vit_b16_in1k.toml");
    let arguments = |link: &'static str| {
        let devices = ["--devices", "256", "--device-tflops", "400"];
        [&["plan", recipe][..], &devices, &["--link", link, "--json"]].concat()
    };
    let found = json(&arguments("400Gb"));
    let update = &found["plan"]["phases"][0]["update"];
    let seconds = |key: &str| update[key].as_f64().unwrap();
    assert!(seconds("exchange") > seconds("compute"), "{update}");
    assert_eq!(seconds("contrast"), 0.0);
    let efficiency = found["plan"]["efficiency"].as_f64().unwrap();
    assert!(efficiency > 0.0 && efficiency < 0.5, "{efficiency}");
    assert!(found["plan"]["checkpoints"]["seconds"].as_f64().unwrap() > 0.0);

    let output = command(&arguments("400Gb")).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stdout);
    assert!(
        stderr.contains("256 devices cannot share batches of 1 shard"),
        "{stderr}"
    );
    let (code, stderr) = advxl(&arguments("400"));
    assert_eq!(code, 2);
    assert!(stderr.contains("such as 400Gb"), "{stderr}");
}

#[test]
fn devices_are_chosen_by_name_and_missing_ones_are_refused() {
    let step = |device: &str| advxl(&["bench", "step", "--device", device]);
    let (code, stderr) = step("gpu");
    assert_eq!(code, 2);
    assert!(
        stderr.contains("unknown device `gpu`: use auto, cpu, cuda"),
        "{stderr}"
    );
    // Either a feature or a GPU is missing on this machine.
    let (code, stderr) = step("rocm:9");
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("device `rocm:9`"), "{stderr}");

    let folder = tempfile::tempdir().unwrap();
    let path = support::write_recipe(folder.path());
    let recipe = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("device = \"tpu\"{recipe}")).unwrap();
    let (code, stderr) = advxl(&["train", path.to_str().unwrap(), "--dry-run"]);
    assert_eq!(code, 2);
    assert!(
        stderr.contains("line 1") && stderr.contains("unknown device `tpu`"),
        "{stderr}"
    );
}

#[test]
fn a_named_size_is_inspected_with_the_papers_multiply_adds() {
    for (size, gigas) in [
        ("vit_b16", 17.56),
        ("vit_l16", 61.6),
        ("vit_h14", 167.3),
        ("vit_g14", 267.0),
    ] {
        let found = json(&["inspect", size, "--json"]);
        let macs = found["forward_macs"].as_f64().unwrap() / 1e9;
        assert!((macs / gigas - 1.0).abs() < 1e-3, "{size}: {macs}");
    }
}

#[test]
fn an_exported_model_gives_the_same_logits_and_its_card_lists_the_results() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path()).to_str().unwrap().to_owned();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (out, eval) = (path("export"), path("eval"));
    let ok = |arguments: &[&str]| {
        let (code, text) = advxl(arguments);
        assert_eq!(code, 0, "{text}");
    };
    let evaluate = |more: &[&str]| {
        let attack = [
            "--data",
            "synthetic:24",
            "--attack",
            "autoattack",
            "--eps",
            "8/255",
            "--out",
            &eval,
        ];
        ok(&[&["eval", &run], &attack[..], more].concat());
    };
    let result = format!("{eval}/result.json");
    let export = |to: &str| {
        let given = [
            "export",
            &run,
            "--to",
            to,
            "--dataset",
            "cifar10",
            "--name",
            "Doe2026Small",
        ];
        advxl(&[&given[..], &["--out", &out, "--result", &result]].concat())
    };
    // Attacks weaker than the published ones are not exported as AutoAttack, nor a small sample as a benchmark.
    evaluate(&["--steps", "2", "--queries", "2"]);
    let (code, text) = export("robustbench");
    assert!(
        code == 2
            && text.contains(
                "expected one result of standard AutoAttack with its default settings, got 0"
            ),
        "{text}"
    );
    // Neither is the fast version, whose last attacks ran on a sample.
    evaluate(&["--version", "fast"]);
    let (code, text) = export("robustbench");
    assert!(code == 2 && text.contains("got 0"), "{text}");
    evaluate(&[]);
    let (code, text) = export("robustbench");
    assert_eq!(code, 2, "{text}");
    for part in [
        "does not qualify for RobustBench's leaderboard `cifar10`",
        "the images are synthetic (`synthetic:24`)",
        "24 images, expected 10,000",
        "a model with 12 classes, expected 10",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!Path::new(&out).exists());
    let (code, text) = export("timm");
    assert_eq!(code, 0, "{text}");

    let card = std::fs::read_to_string(format!("{out}/README.md")).unwrap();
    assert!(
        card.contains("## Recipe") && card.contains("schema = 1"),
        "{card}"
    );
    assert!(card.contains("| linf 8/255 | 24 | square |"), "{card}");

    let logits = |model: &str, name: &str| {
        let file = path(name);
        ok(&["predict", model, "--data", "synthetic:16", "--out", &file]);
        floats(Path::new(&file), "logits")
    };
    assert_eq!(logits(&run, "before"), logits(&out, "after"));

    let foreign = ["export", &run, "--to", "timm", "--out", &eval];
    let (code, text) = advxl(&foreign);
    assert!(code == 2 && text.contains("is not empty"), "{text}");
}

#[test]
fn a_recipe_is_checked_and_explained_without_its_data() {
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/vit_b16_in1k.toml");
    let printed = |arguments: &[&str]| {
        let output = command(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let text = printed(&["recipe", "check", recipe]);
    assert!(text.contains("ok: vit_b16, 2 stages"), "{text}");
    let changes = ["--set", "model.heads=5", "--set", "seed=-1"];
    let (code, text) = advxl(&[&["recipe", "check", recipe][..], &changes].concat());
    assert_eq!(code, 2, "{text}");
    for part in ["is invalid: 2 errors", "heads = 5 must divide", "seed = -1"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let text = printed(&["recipe", "explain", "stage.attack"]);
    assert!(text.contains("step_size"), "{text}");
    let (code, text) = advxl(&["recipe", "explain", "stage.atack"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("did you mean `stage.attack`?"), "{text}");
    let schema = json(&["recipe", "schema", "--json"]);
    assert_eq!(schema["additionalProperties"], false);
}
