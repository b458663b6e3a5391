//! Settings that may change between stages: image size, images, classes and head; and start weights of a run.

mod support;

use std::path::{Path, PathBuf};

use advxl::data::sources::tensors;
use advxl::data::{Dataset, Spec, Split, evaluation_batch};
use advxl::image::Preprocessing;
use advxl::loss::predictions;
use advxl::model::{Model, Pass};
use advxl::ops::{Device, from_vec};
use advxl::weights::import as weights;
use burn::tensor::Tensor;
use support::{RECIPE, advxl, class_folders, command, kill_after};

/// Writes images of three classes, which the synthetic ones do not have.
fn three_classes(folder: &Path) -> String {
    let path = folder.join("three.safetensors");
    let (count, size) = (60, 20);
    let pixels = count * 3 * size * size;
    let images: Vec<f32> = (0..pixels).map(|i| (i % 251) as f32 / 250.0).collect();
    let labels: Vec<i64> = (0..count as i64).map(|i| i % 3).collect();
    let names = ["cat", "dog", "owl"].map(str::to_owned);
    tensors::save(&path, &images, [count, 3, size, size], &labels, &names).unwrap();
    format!("tensors:{}", path.display())
}

/// Writes the recipe, with parts of its text replaced, to a file.
fn recipe(folder: &Path, name: &str, changes: &[(&str, &str)]) -> PathBuf {
    let mut text = RECIPE.to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, text).unwrap();
    path
}

/// Returns the arguments that train a recipe in a folder.
fn training(recipe: &Path, out: &Path) -> [String; 4] {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    ["train".into(), text(recipe), "--out".into(), text(out)]
}

fn train(recipe: &Path, out: &Path) -> (i32, String) {
    let arguments = training(recipe, out);
    advxl(&arguments.each_ref().map(String::as_str))
}

fn trained(recipe: &Path, out: &Path) -> String {
    let (code, text) = train(recipe, out);
    assert_eq!(code, 0, "{text}");
    text
}

fn refused(recipe: &Path, out: &Path, parts: &[&str]) {
    let (code, text) = train(recipe, out);
    assert_eq!(code, 2, "{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in:\n{text}");
    }
}

fn model(folder: &Path) -> Model {
    weights::load(folder, &Device::cpu()).unwrap().model
}

fn values(model: &Model, name: &str) -> Vec<f32> {
    let parameters = model.parameters();
    let found = parameters.iter().find(|parameter| parameter.name == name);
    found.unwrap().to_vec()
}

/// Returns the replacement that gives the recipe's second stage separate images and a head.
fn switched(data: &str, head: &str) -> (String, String) {
    let name = "name = \"finetune\"";
    let data = format!(
        "{name}\ndata = {{ train = \"{data}\", test = \"{data}\", test_on_train = true }}\n{head}"
    );
    (name.to_owned(), data)
}

#[test]
fn a_stage_may_have_other_images_and_a_head_for_their_classes() {
    let folder = tempfile::tempdir().unwrap();
    let data = three_classes(folder.path());
    let (from, to) = switched(&data, "head = \"new\"");
    let recipe = recipe(folder.path(), "switch", &[(&from, &to)]);
    let whole = folder.path().join("whole");
    trained(&recipe, &whole);
    let (first, last) = (
        model(&whole.join("stages/pretrain")),
        model(&whole.join("model")),
    );
    assert_eq!((first.classes(), last.classes()), (12, 3));
    let config = std::fs::read_to_string(whole.join("model/config.json")).unwrap();
    assert!(config.contains("\"owl\""), "{config}");

    // Killed before and after the change, the run ends with the same bits.
    let killed = folder.path().join("killed");
    let arguments = training(&recipe, &killed);
    for lines in [7, 9] {
        kill_after(lines, &arguments.each_ref().map(String::as_str), &killed);
    }
    trained(&recipe, &killed);
    let made = |out: &Path| {
        let file = "checkpoints/000000000320.safetensors";
        std::fs::read(out.join(file)).unwrap()
    };
    assert!(made(&killed) == made(&whole));
}

#[test]
fn other_classes_without_a_new_head_are_refused_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let data = three_classes(folder.path());
    let (from, to) = switched(&data, "");
    let recipe = recipe(folder.path(), "switch", &[(&from, &to)]);
    let out = folder.path().join("run");
    refused(
        &recipe,
        &out,
        &[
            "stage `finetune` has other classes than the previous stage (3 and 12)",
            "hint: set head = \"new\" in that stage",
        ],
    );
    assert!(
        !out.join("recipe.toml").exists(),
        "the run folder must still be empty"
    );
}

/// Writes the recipe with class folders instead of synthetic images, for both stages.
fn of_folders(folder: &Path, name: &str, train: &str, test: &str) -> PathBuf {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    // Allow the same images for training and testing.
    let test = format!("{}\", test_on_train = true }}", path(test));
    let changes = [("synthetic:200", path(train)), ("synthetic:64\" }", test)];
    recipe(
        folder,
        name,
        &changes.each_ref().map(|(from, to)| (*from, &to[..])),
    )
}

#[test]
fn test_classes_are_matched_by_name_and_unknown_ones_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    class_folders(&root.join("train"), &["ant", "bee", "cat"], 20);
    // Two of the three classes, which would match the first two if matched by position.
    class_folders(&root.join("some"), &["bee", "cat"], 10);
    class_folders(&root.join("others"), &["Ant", "bee", "cat"], 10);
    let run = root.join("run");
    trained(&of_folders(root, "some", "train", "some"), &run);
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let evaluation = metrics
        .lines()
        .rfind(|line| line.contains("\"clean\""))
        .unwrap();
    let evaluation: serde_json::Value = serde_json::from_str(evaluation).unwrap();
    let clean = evaluation["evaluation"]["clean"].as_f64().unwrap();
    assert_eq!(evaluation["evaluation"]["images"], 20);

    // Accuracy is computed with the images' own classes.
    let spec: Spec = root.join("some").to_str().unwrap().parse().unwrap();
    let dataset = Dataset::open(&spec, Split::Test, 3).unwrap();
    let all: Vec<usize> = (0..20).collect();
    let pixels = evaluation_batch(&dataset, &all, &Preprocessing::new(32)).unwrap();
    let images: Tensor<4> = from_vec(pixels, [20, 3, 32, 32], &Device::cpu());
    let found = predictions(model(&run.join("model")).logits(images, &Pass::evaluation()));
    let right = (0..20)
        .filter(|index| found[*index] as usize == 1 + index / 10)
        .count();
    assert_eq!(clean, right as f64 / 20.0);

    refused(
        &of_folders(root, "others", "train", "others"),
        &root.join("other"),
        &[
            "class `Ant` is not among the 3 classes of the training images",
            "did you mean `ant`?",
        ],
    );
}

#[test]
fn a_run_does_not_resume_with_classes_of_other_names() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    class_folders(&root.join("data"), &["ant", "bee", "cat"], 20);
    let (path, run) = (of_folders(root, "recipe", "data", "data"), root.join("run"));
    trained(&path, &run);
    let rename = |from: &str, to: &str| {
        std::fs::rename(root.join("data").join(from), root.join("data").join(to)).unwrap();
    };
    for (from, to) in [("cat", "dog"), ("ant", "Ant")] {
        rename(from, to);
        let names = format!("only in the trained model: `{from}`; only in the images: `{to}`");
        refused(
            &path,
            &run,
            &[
                "it was trained on other classes than",
                &names,
                "--accept-changes",
            ],
        );
        rename(to, from);
    }
    trained(&path, &run);
    // Its weights cannot start a run with other classes without a new head.
    let begin = format!(
        "seed = 3\nstart = {{ weights = \"{}\", head = \"keep\" }}",
        run.display()
    );
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("seed = 3", &begin)).unwrap();
    rename("cat", "dog");
    refused(
        &path,
        &root.join("other"),
        &["class `dog` is not among the 3 classes of the start weights"],
    );
}

#[test]
fn data_and_heads_without_effect_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let data = "data = { train = \"synthetic:200\", test = \"synthetic:64\" }";
    let own = format!("{data}\nobjective = {{");
    let out = folder.path().join("run");
    let everywhere = recipe(folder.path(), "everywhere", &[("objective = {", &own)]);
    refused(
        &everywhere,
        &out,
        &["data has no effect, because every stage sets its own"],
    );
    let nowhere = recipe(folder.path(), "nowhere", &[(data, "")]);
    refused(
        &nowhere,
        &out,
        &["the table `data` is missing, and stage `pretrain` does not set its own"],
    );
    let name = "name = \"pretrain\"";
    let first = recipe(
        folder.path(),
        "first",
        &[(name, "name = \"pretrain\"\nhead = \"new\"")],
    );
    refused(
        &first,
        &out,
        &["head has no effect in the first stage", "the table `start`"],
    );
}

#[test]
fn a_run_starts_from_given_weights_and_reports_where_they_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let earlier = folder.path().join("earlier");
    trained(&recipe(folder.path(), "earlier", &[]), &earlier);
    let start = |more: &str| {
        format!(
            "seed = 3\nstart = {{ weights = \"{}\"{more} }}",
            earlier.display()
        )
    };
    // A learning rate close to zero, so that weights do not change.
    let still = [
        ("peak = 1e-3", "peak = 1e-12"),
        (
            "peak = 5e-4, warmup_samples = 32, decay = \"cosine\", end = 1e-5",
            "peak = 1e-12, warmup_samples = 32, decay = \"cosine\"",
        ),
        ("average = { decay = 0.9 }", ""),
        ("weight_decay = 0.05", "weight_decay = 0.0"),
    ];
    let from = |name: &str, more: &str, changes: &[(&str, &str)]| {
        let start = start(more);
        let all = [&[("seed = 3", &start[..])], &still[..], changes].concat();
        recipe(folder.path(), name, &all)
    };
    let out = |name: &str| folder.path().join(name);
    trained(&from("kept", "", &[]), &out("kept"));
    let (before, after) = (
        model(&earlier.join("model")),
        model(&out("kept").join("model")),
    );
    for name in ["blocks.1.mlp.fc2.weight", "head.weight"] {
        let (before, after) = (values(&before, name), values(&after, name));
        let off = before.iter().zip(&after).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f32::max) < 1e-6, "{name}");
    }
    trained(&from("new", ", head = \"new\"", &[]), &out("new"));
    let after = model(&out("new").join("model"));
    assert_ne!(
        values(&after, "head.weight"),
        values(&before, "head.weight")
    );

    refused(
        &from(
            "other",
            "",
            &[
                ("depth = 2", "depth = 3"),
                ("pool = \"average\"", "pool = \"token\""),
            ],
        ),
        &out("other"),
        &[
            "the architecture differs from the recipe's `model`",
            "depth: 2 -> 3",
            "pool: \"average\" -> \"token\"",
        ],
    );
    let data = three_classes(folder.path());
    let three = (
        "data = { train = \"synthetic:200\", test = \"synthetic:64\" }",
        &format!("data = {{ train = \"{data}\", test = \"{data}\", test_on_train = true }}")[..],
    );
    refused(
        &from("classes", "", &[three]),
        &out("classes"),
        &[
            "the head has 12 classes, but the images have 3",
            "start.head = \"new\"",
        ],
    );
    trained(
        &from("fitted", ", head = \"new\"", &[three]),
        &out("fitted"),
    );
    let weights = earlier.join("model/model.safetensors");
    let file = format!(
        "seed = 3\nstart = {{ weights = \"{}\", architecture = \"vit_huge_patch14_224\" }}",
        weights.display()
    );
    refused(
        &recipe(folder.path(), "file", &[("seed = 3", &file)]),
        &out("file"),
        &["`vit_huge_patch14_224` has width 1280, but the weights have width 32"],
    );
}

#[test]
fn a_convnext_trains_and_resumes_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let vit = RECIPE
        .lines()
        .find(|line| line.starts_with("model ="))
        .unwrap();
    for (name, stem) in [("patch", ""), ("conv", ", stem = \"conv\"")] {
        let convnext = format!(
            "model = {{ size = \"convnext_atto\", patch = 1, widths = [8, 12, 16, 24], depths = [1, 1, 2, 1]{stem} }}"
        );
        let changes = [
            (vit, &convnext[..]),
            (", masking = { kind = \"random\", ratio = 0.5 }", ""),
        ];
        let recipe = recipe(folder.path(), name, &changes);
        let whole = folder.path().join(format!("{name}-whole"));
        trained(&recipe, &whole);
        let last = "checkpoints/000000000320.safetensors";
        let right = std::fs::read(whole.join(last)).unwrap();
        std::fs::remove_file(whole.join(last)).unwrap();
        let text = trained(&recipe, &whole);
        assert!(text.contains("resuming after 256"), "{text}");
        assert!(std::fs::read(whole.join(last)).unwrap() == right, "{name}");
        let saved = model(&whole.join("model"));
        assert!(matches!(saved, Model::ConvNext(_)));
    }
    let convnext = "model = { size = \"convnext_atto\" }";
    refused(
        &recipe(folder.path(), "masked", &[(vit, convnext)]),
        &folder.path().join("masked"),
        &[
            "masking is invalid for a ConvNeXt",
            "image_size = 16 is too small, the last stage needs at least 32 pixels",
            "hint: use 32",
        ],
    );
}

#[test]
fn a_dry_run_on_synthetic_images_runs_two_updates_of_each_phase_and_keeps_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "dry", &[]);
    let recipe = recipe.to_str().unwrap();
    let run = |more: &[&str]| {
        let output = command(&[&["train", recipe, "--dry-run"], more].concat())
            .env("TMPDIR", folder.path())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap(),
            String::from_utf8(text).unwrap(),
        )
    };
    let (code, text) = run(&["--batch", "4"]);
    assert_eq!(code, 0, "{text}");
    for part in [
        "stage `finetune`: 8 samples at 32 pixels",
        "ran two updates of each phase",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 1, "only the recipe must remain");
    // A text model counts as data.
    let captions = [
        "--batch",
        "4",
        "--set",
        "stage.pretrain.objective={kind=\"contrastive\"}",
        "--set",
        "stage.pretrain.text={model=\"nowhere\"}",
        "--set",
        "stage.finetune.head=new",
    ];
    let text = std::fs::read_to_string(recipe).unwrap();
    let (mixing, label) = (
        "mixing = {",
        "objective = { kind = \"cross_entropy\", label_smoothing = 0.1 }",
    );
    let without: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with(mixing))
        .collect();
    std::fs::write(
        recipe,
        without
            .join("\n")
            .replace(label, "objective = { kind = \"cross_entropy\" }"),
    )
    .unwrap();
    let (code, text) = run(&captions);
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("text model not found; using a tiny new one"),
        "{text}"
    );
    let real = ["--set", "data.train=somewhere", "--batch", "4"];
    let (code, text) = run(&real);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("--batch has no effect"), "{text}");
    let (code, text) = run(&real[..2]);
    assert_eq!(code, 0, "{text}");
    assert!(!text.contains("two updates"), "{text}");
}
