//! Training with the named objectives: a tiny CLIP model is made robust, from the command line.

mod support;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use support::{advxl, kill_after};

const MODEL: &str = r#"
seed = 5
precision = "f32"
model = { size = "vit_micro", width = 32, depth = 2, heads = 2, hidden = 64, pool = "average", class_token = true, position = "sincos2d" }
data = { train = "synthetic:96", test = "synthetic:48" }
checkpoint = { every_samples = 32, keep = 9 }
log = { every_samples = 32 }
"#;

const STAGE: &str = r#"
[[stage]]
name = "NAME"
batch = 32
phases = [{ image_size = 16, samples = 96 }]
objective = OBJECTIVE
optimizer = { kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95] }
learning_rate = { peak = 1e-3, warmup_samples = 32, decay = "cosine" }
augmentation = { flip = true }
"#;

const ATTACK: &str = r#"attack = { norm = "linf", epsilon = "8/255", step_size = "4/255", steps = 2, start = "random" }
"#;

const EVALUATION: &str = r#"
[evaluation]
every_samples = 96
images = 24
attack = { norm = "linf", epsilon = "8/255", step_size = "4/255", steps = 1, start = "random" }
"#;

fn stage(name: &str, objective: &str) -> String {
    STAGE.replace("NAME", name).replace("OBJECTIVE", objective)
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, text).unwrap();
    path
}

fn name_of(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn train(recipe: &Path, out: &Path, further: &[&str]) -> (i32, String) {
    let arguments = ["train", name_of(recipe), "--out", name_of(out)];
    advxl(&[&arguments[..], further].concat())
}

#[track_caller]
fn trained(recipe: &Path, out: &Path, further: &[&str]) -> String {
    let (code, text) = train(recipe, out, further);
    assert_eq!(code, 0, "{text}");
    text
}

/// A tiny CLIP model: the folder of its run.
fn clip() -> &'static Path {
    static RUN: OnceLock<PathBuf> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap().keep();
        let new =
            "text = { new = { context = 12, width = 32, depth = 1, heads = 2, embedding = 24 } }\n";
        let recipe = format!(
            "{MODEL}{}{new}",
            stage("clip", r#"{ kind = "contrastive" }"#)
        );
        let recipe = write(&folder, "clip", &recipe);
        trained(&recipe, &folder.join("run"), &[]);
        folder.join("run")
    })
}

/// A recipe that fine-tunes the tiny CLIP model.
fn recipe(objective: &str) -> String {
    let run = clip().display();
    format!(
        "{MODEL}start = {{ weights = \"{run}/stages/clip\" }}\n{EVALUATION}{}{ATTACK}\
         text = {{ model = \"{run}/stages/clip/text\" }}\n",
        stage("robust", objective)
    )
}

const ENCODERS: [(&str, &str); 5] = [
    ("fare", r#"{ kind = "fare" }"#),
    ("tecoa", r#"{ kind = "tecoa", scale = 20 }"#),
    ("sim_clip", r#"{ kind = "sim_clip" }"#),
    ("advflyp", r#"{ kind = "advflyp", scale = 20 }"#),
    ("deacl", r#"{ kind = "deacl" }"#),
];

/// All objectives of a run.
fn all() -> Vec<(&'static str, String)> {
    let trades = r#"{ kind = "trades", beta = 6, label_smoothing = 0.1 }"#;
    let labels = format!("{MODEL}{EVALUATION}{}{ATTACK}", stage("robust", trades));
    let gradient = r#"{ kind = "gradient_norm", weight = 1e-3 }"#;
    let gradient = format!("{MODEL}{EVALUATION}{}", stage("robust", gradient));
    let plain = stage("robust", r#"{ kind = "cross_entropy" }"#);
    let norms = r#"[{ norm = "linf", epsilon = "8/255", step_size = "4/255" }, { norm = "l1", epsilon = "6", step_size = "3" }]"#;
    let both = EVALUATION.replace(
        r#"norm = "linf", epsilon = "8/255", step_size = "4/255""#,
        &format!("norms = {norms}"),
    );
    let alternating = format!(
        "{MODEL}{both}{plain}attack = {{ norms = {norms}, steps = 2, start = \"random\" }}\n"
    );
    let adaptive = norms
        .replace(", step_size = \"4/255\"", "")
        .replace(", step_size = \"3\"", "");
    let worst = format!(
        "{MODEL}{both}{plain}attack = {{ algorithm = \"apgd\", norms = {adaptive}, combine = \"worst\", steps = 3, start = \"random\" }}\n"
    );
    let encoders = ENCODERS
        .iter()
        .map(|(name, objective)| (*name, recipe(objective)));
    let mixed = format!("{MODEL}{EVALUATION}{plain}{ATTACK}").replace(
        r#"train = "synthetic:96""#,
        r#"sources = [{ train = "synthetic:96", fraction = 0.25 }, { train = "synthetic:64", fraction = "3/4" }]"#,
    );
    let others = [
        ("mixed_sources", mixed),
        ("gradient_norm", gradient),
        ("alternating", alternating),
        ("worst_of_apgd", worst),
        ("trades", labels),
    ];
    encoders.chain(others).collect()
}

fn losses(run: &Path) -> Vec<String> {
    let lines = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    lines
        .filter_map(|line: serde_json::Value| line.get("loss").map(ToString::to_string))
        .collect()
}

fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("checkpoints/000000000096.safetensors")).unwrap()
}

#[test]
fn every_objective_trains_is_evaluated_and_resumes_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in all() {
        let recipe = write(folder.path(), name, &text);
        let whole = folder.path().join(format!("{name}-whole"));
        let log = trained(&recipe, &whole, &[]);
        assert!(
            log.contains("robust: evaluation on 24 images"),
            "{name}: {log}"
        );
        if ["alternating", "worst_of_apgd"].contains(&name) {
            assert!(log.contains("% in all norms (linf "), "{name}: {log}");
            let how = match name {
                "alternating" => "pgd-2 linf 8/255 and l1 6, alternating",
                _ => "apgd-3 linf 8/255 and l1 6, the worst",
            };
            assert!(log.contains(how), "{name}: {log}");
        }
        if name == "mixed_sources" {
            let line = "data: 25 % of synthetic:96 (split train): 96 images, 12 classes, captions; \
                        75 % of synthetic:64 (split train): 64 images, 12 classes, captions";
            assert!(log.contains(line), "{log}");
        }
        // These have no correct answers.
        let has_accuracy = !["fare", "sim_clip", "deacl"].contains(&name);
        assert_eq!(
            log.contains("train accuracy"),
            has_accuracy,
            "{name}: {log}"
        );
        let killed = folder.path().join(format!("{name}-killed"));
        kill_after(
            1,
            &["train", name_of(&recipe), "--out", name_of(&killed)],
            &killed,
        );
        trained(&recipe, &killed, &[]);
        assert_eq!(weights(&whole), weights(&killed), "{name}");
    }
}

#[test]
fn every_objective_gives_the_same_bits_on_two_ranks_and_nearly_the_same_in_microbatches() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in all() {
        let sharded = text.replace(
            "seed = 5",
            "seed = 5\nparallel = { shards = 2, reduce = \"exact\" }",
        );
        let recipe = write(folder.path(), name, &sharded);
        let run = |what: &str| folder.path().join(format!("{name}-{what}"));
        trained(&recipe, &run("one"), &[]);
        trained(&recipe, &run("two"), &["--processes", "2"]);
        assert_eq!(weights(&run("one")), weights(&run("two")), "{name}");

        let parts = write(
            folder.path(),
            "parts",
            &text.replace("batch = 32", "batch = 32\nchunk = 12"),
        );
        trained(&parts, &run("parts"), &[]);
        for (one, other) in losses(&run("one")).iter().zip(losses(&run("parts"))) {
            let [one, other] = [one, &other].map(|loss| loss.parse::<f64>().unwrap());
            assert!(
                (one - other).abs() < 1e-4 * one.abs().max(1.0),
                "{name}: {one} {other}"
            );
        }
    }
}

/// With a learning rate of almost 0, the model stays the reference: its clean embeddings are the reference's, so the loss
/// is that of the attack alone, and without an attack's room it is 0.
#[test]
fn fare_of_an_unchanged_model_and_an_epsilon_of_zero_has_no_loss() {
    let folder = tempfile::tempdir().unwrap();
    let text = recipe(r#"{ kind = "fare" }"#)
        .replace("peak = 1e-3", "peak = 1e-30")
        .replace("weight_decay = 0.05", "weight_decay = 0.0")
        .replacen(
            "epsilon = \"8/255\", step_size = \"4/255\", steps = 2",
            "epsilon = \"0/255\", step_size = \"4/255\", steps = 2",
            1,
        );
    let run = folder.path().join("run");
    trained(&write(folder.path(), "fare", &text), &run, &[]);
    assert_eq!(losses(&run), ["0.0"; 3]);
}

#[test]
fn the_attack_of_fare_raises_its_loss() {
    let folder = tempfile::tempdir().unwrap();
    let still = recipe(r#"{ kind = "fare" }"#).replace("peak = 1e-3", "peak = 1e-30");
    let mean = |name: &str, text: String| {
        let run = folder.path().join(name);
        trained(&write(folder.path(), name, &text), &run, &[]);
        let losses = losses(&run);
        losses
            .iter()
            .map(|loss| loss.parse::<f64>().unwrap())
            .sum::<f64>()
            / losses.len() as f64
    };
    let one = mean("one", still.replace("steps = 2", "steps = 1"));
    let ten = mean(
        "ten",
        still.replace(
            "step_size = \"4/255\", steps = 2",
            "step_size = \"2/255\", steps = 10",
        ),
    );
    assert!(ten > 1.05 * one, "{ten} {one}");
}

/// The temperature of AdvFLYP is fixed, so a run's state is the model alone, and the encoder works without `text`.
#[test]
fn encoders_can_be_fine_tuned_without_a_text_model() {
    let folder = tempfile::tempdir().unwrap();
    for (name, objective) in [
        ("fare", r#"{ kind = "fare" }"#),
        ("sim_clip", r#"{ kind = "sim_clip" }"#),
    ] {
        let text = recipe(objective);
        let text: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("text ="))
            .collect();
        let run = folder.path().join(name);
        let text = text.join("\n");
        let without = text.replace(EVALUATION, "");
        trained(&write(folder.path(), name, &without), &run, &[]);
        let config = std::fs::read_to_string(run.join("model/config.json")).unwrap();
        assert!(config.contains("\"embedding\""), "{config}");
        let (code, log) = train(
            &write(folder.path(), "evaluated", &text),
            &folder.path().join("none"),
            &[],
        );
        assert_eq!(code, 2, "{log}");
        assert!(log.contains("no stage can classify images"), "{log}");
    }
}

#[test]
fn impossible_objectives_are_refused_with_their_reason() {
    let folder = tempfile::tempdir().unwrap();
    let fare = recipe(r#"{ kind = "fare" }"#);
    let start = fare
        .lines()
        .find(|line| line.starts_with("start ="))
        .unwrap()
        .to_owned();
    let of_text = fare
        .lines()
        .find(|line| line.starts_with("text ="))
        .unwrap()
        .to_owned();
    let trades = &all().last().unwrap().1.clone();
    for (name, changed, message) in [
        ("no_start", fare.replace(&start, ""), "objective.kind = `fare` compares with a frozen reference, but there are no start weights"),
        ("clean_start", fare.replace("steps = 2, start = \"random\"", "steps = 2, start = \"clean\""), "its gradient is zero at the clean image"),
        ("no_attack", fare.replace(ATTACK, ""), "objective.kind = `fare` requires the table `attack`"),
        ("trades_text", format!("{trades}{of_text}\n"), "text has no effect with objective.kind = `trades`"),
        ("tecoa", fare.replace("kind = \"fare\"", "kind = \"tecoa\"").replace(&of_text, ""), "objective.kind = `tecoa` requires the table `text`"),
        ("beta", fare.replace("kind = \"fare\"", "kind = \"fare\", beta = 6"), "unknown key `beta` in `objective`"),
        ("unknown", fare.replace("kind = \"fare\"", "kind = \"fair\""), "did you mean `fare`?"),
        ("step_size", trades.replace("attack = { norm", "attack = { algorithm = \"apgd\", norm"), "step_size has no effect with algorithm = `apgd`"),
        ("combine", trades.replace("attack = { norm", "attack = { combine = \"worst\", norm"), "combine has no effect without `norms`"),
        ("norms", trades.replace("attack = { norm", "attack = { norms = [{ norm = \"l2\", epsilon = \"0.5\" }], norm"), "set either `norms` or `norm`"),
        ("no_step_size", trades.replace("step_size = \"4/255\", steps = 2", "steps = 2"), "`step_size` is missing"),
        ("regularized", trades.replace("kind = \"trades\", beta = 6", "kind = \"gradient_norm\", weight = 0.1"), "attack has no effect with objective.kind = `gradient_norm`"),
        ("both", trades.replace("objective =", "loss = { kind = \"cross_entropy\" }\nobjective ="), "`loss` is the old name of `objective`"),
        ("new_text", fare.replace(&of_text, "text = { new = { context = 12, width = 32, depth = 1, heads = 2, embedding = 24 } }"), "text.new is trained by captions, not by objective.kind = `fare`"),
    ] {
        assert_ne!(changed, fare, "{name}");
        let (code, log) = train(&write(folder.path(), name, &changed), &folder.path().join("run"), &[]);
        assert_eq!(code, 2, "{name}: {log}");
        assert!(log.contains(message), "{name}: {log}");
    }
    // Weights that output class logits have no embeddings to compare.
    let labels = folder.path().join("labels");
    trained(&write(folder.path(), "trades", trades), &labels, &[]);
    let logits = format!(
        "start = {{ weights = \"{}\" }}",
        labels.join("model").display()
    );
    let (code, log) = train(
        &write(folder.path(), "logits", &fare.replace(&start, &logits)),
        &folder.path().join("run"),
        &[],
    );
    assert_eq!(code, 2, "{log}");
    assert!(
        log.contains("compares embeddings, but the model outputs logits of 12 classes"),
        "{log}"
    );
}

/// Returns the tensors of a checkpoint by name.
fn tensors(run: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let bytes = weights(run);
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let all = tensors.tensors().into_iter();
    all.map(|(name, view)| (name, view.data().to_vec()))
        .collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(bytes)
}

#[test]
fn frozen_parameters_keep_their_bits_and_have_no_moments() {
    let folder = tempfile::tempdir().unwrap();
    let trades = all().last().unwrap().1.clone();
    let run = |name: &str, text: String| {
        let path = folder.path().join(name);
        trained(&write(folder.path(), name, &text), &path, &[]);
        tensors(&path)
    };
    let average = "average = { decay = 0.5 }\n";
    let with = |line: &str| {
        trades
            .replace("batch = 32", &format!("batch = 32\n{line}"))
            .replace("[evaluation]", &format!("{average}[evaluation]"))
    };
    let whole = run("whole", with(""));
    let partly = run(
        "partly",
        with("train = [\"blocks.1\", \"head\", \"blocks.0.norm1\"]"),
    );
    let initial = run(
        "initial",
        with("")
            .replace("peak = 1e-3", "peak = 1e-30")
            .replace("weight_decay = 0.05", "weight_decay = 0.0"),
    );
    for name in whole.keys() {
        let (kind, parameter) = name.split_once('.').unwrap();
        let is_trained = ["blocks.1.", "head.", "blocks.0.norm1."]
            .iter()
            .any(|start| parameter.starts_with(start));
        assert_eq!(
            partly.contains_key(name),
            is_trained || kind == "weights",
            "{name}"
        );
        if kind == "weights" {
            let [now, before] = [&partly, &initial].map(|all| floats(&all[name]));
            let change = now.iter().zip(before).map(|(a, b)| (a - b).abs());
            let largest = change.fold(0f32, f32::max);
            // The learning rate of the run to compare with moves zeros by 1e-30.
            assert_eq!(largest > 1e-20, is_trained, "{name}: {largest:e}");
        }
    }
    // Frozen layers give the same results in several ranks and after a kill.
    let text = with("train = [\"blocks.1\", \"head\"]").replace(
        "seed = 5",
        "seed = 5\nparallel = { shards = 2, reduce = \"exact\" }",
    );
    let recipe = write(folder.path(), "ranks", &text);
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    trained(&recipe, &one, &["--processes", "2"]);
    kill_after(
        1,
        &["train", name_of(&recipe), "--out", name_of(&two)],
        &two,
    );
    trained(&recipe, &two, &[]);
    assert_eq!(weights(&one), weights(&two));
}

#[test]
fn a_pattern_that_matches_nothing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let trades = all().last().unwrap().1.clone();
    let text = trades.replace("batch = 32", "batch = 32\ntrain = [\"layers.0\"]");
    let (code, log) = train(
        &write(folder.path(), "none", &text),
        &folder.path().join("run"),
        &[],
    );
    assert_eq!(code, 2, "{log}");
    assert!(
        log.contains("train: `layers.0` matches no parameter of the model"),
        "{log}"
    );
}

#[test]
fn sources_that_cannot_be_mixed_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mixed = all();
    let mixed = &mixed
        .iter()
        .find(|(name, _)| *name == "mixed_sources")
        .unwrap()
        .1;
    let other = folder.path().join("other");
    support::class_folders(&other, &["cat", "dog"], 2);
    for (name, changed, message) in [
        (
            "sum",
            mixed.replace("\"3/4\"", "0.7"),
            "the fractions of data.sources add up to 0.95, not 1",
        ),
        (
            "both",
            mixed.replace("sources =", "train = \"synthetic:96\", sources ="),
            "set exactly one of `train` or `sources`",
        ),
        (
            "classes",
            mixed.replace("synthetic:64", other.to_str().unwrap()),
            "has 12 classes and",
        ),
    ] {
        let (code, log) = train(
            &write(folder.path(), name, &changed),
            &folder.path().join("run"),
            &[],
        );
        assert_eq!(code, 2, "{name}: {log}");
        assert!(log.contains(message), "{name}: {log}");
    }
}

#[test]
fn a_tensor_that_a_stage_freezes_keeps_its_average_and_one_that_it_trains_again_starts_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let plain = r#"{ kind = "cross_entropy" }"#;
    let frozen = |name: &str, train: &str| {
        stage(name, plain).replace("batch = 32", &format!("batch = 32\ntrain = [\"{train}\"]"))
    };
    let text = format!(
        "{MODEL}average = {{ decay = 0.5 }}\nparallel = {{ shards = 2, reduce = \"exact\" }}\n{}{}{}",
        stage("all", plain),
        frozen("head", "head"),
        frozen("blocks", "blocks"),
    );
    let recipe = write(folder.path(), "recipe", &text);
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    trained(&recipe, &one, &[]);
    trained(&recipe, &two, &["--processes", "2"]);
    let model = |run: &Path, stage: &str| {
        let path = run.join("stages").join(stage).join("model.safetensors");
        std::fs::read(path).unwrap()
    };
    for stage in ["all", "head", "blocks"] {
        assert_eq!(model(&one, stage), model(&two, stage), "{stage}");
    }
    let [first, second, third] = ["all", "head", "blocks"].map(|stage| model(&one, stage));
    let [first, second, third] = [&first, &second, &third]
        .map(|bytes| safetensors::SafeTensors::deserialize(bytes).unwrap());
    let data = |tensors: &safetensors::SafeTensors, name: &str| {
        tensors.tensor(name).unwrap().data().to_vec()
    };
    // Saved models have the averages.
    for name in ["blocks.0.attn.qkv.weight", "patch_embed.proj.weight"] {
        assert_eq!(data(&first, name), data(&second, name), "{name}");
    }
    assert_ne!(data(&first, "head.weight"), data(&second, "head.weight"));
    assert_eq!(data(&second, "head.weight"), data(&third, "head.weight"));
    assert_ne!(
        data(&second, "blocks.0.attn.qkv.weight"),
        data(&third, "blocks.0.attn.qkv.weight")
    );
}
