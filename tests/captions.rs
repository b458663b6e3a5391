//! Training on captions: new and frozen text models, files of embeddings, heads made of class names.

mod support;

use std::path::{Path, PathBuf};

use advxl::data::{Dataset, Spec, Split};
use advxl::loss::predictions;
use advxl::model::{Model, Pass};
use advxl::ops::{Device, from_vec, to_vec};
use advxl::text::zero_shot::by_text;
use advxl::text::{TextModel, ZeroShot};
use advxl::weights::import as weights;
use burn::tensor::Tensor;
use support::{advxl, kill_after};

/// Both towers, then the image tower against the frozen text tower, then classes.
const RECIPE: &str = r#"
seed = 5
precision = "f32"
model = { size = "vit_micro", width = 32, depth = 2, heads = 2, hidden = 64, pool = "average", class_token = true, position = "sincos2d" }
data = { train = "synthetic:96", test = "synthetic:48" }
average = { decay = 0.9 }
checkpoint = { every_samples = 32, keep = 3 }
log = { every_samples = 32 }

[evaluation]
every_samples = 96
images = 24
attack = { norm = "linf", epsilon = "8/255", step_size = "4/255", steps = 1, start = "random" }

[[stage]]
name = "clip"
batch = 32
phases = [{ image_size = 16, samples = 96 }]
objective = { kind = "contrastive" }
text = { new = { context = 12, width = 32, depth = 1, heads = 2, embedding = 24 }, templates = ["a red {} on a plain blue background", "a {}"] }
optimizer = { kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95], clip_norm = 1.0 }
learning_rate = { peak = 1e-3, warmup_samples = 32, decay = "cosine" }
augmentation = { flip = false }

[[stage]]
name = "pretrain"
batch = 32
chunk = 12
phases = [{ image_size = 16, samples = 96, masking = { kind = "random", ratio = 0.25 } }]
attack = { norm = "linf", epsilon = "8/255", step_size = "8/255", steps = 1, start = "random" }
objective = { kind = "contrastive" }
text = { from = "clip", templates = ["a red {} on a plain blue background", "a {}"] }
optimizer = { kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95] }
learning_rate = { peak = 1e-3, warmup_samples = 32, decay = "cosine" }
augmentation = { flip = false }

[[stage]]
name = "finetune"
head = "text"
batch = 32
phases = [{ image_size = 32, samples = 64 }]
attack = { norm = "linf", epsilon = "8/255", step_size = "4/255", steps = 2, start = "random" }
objective = { kind = "cross_entropy" }
optimizer = { kind = "adamw", weight_decay = 0.0, betas = [0.9, 0.95] }
learning_rate = { peak = 1e-12, warmup_samples = 32, decay = "cosine" }
augmentation = { flip = false }
"#;

fn write(folder: &Path, name: &str, changes: &[(&str, &str)]) -> PathBuf {
    let mut text = RECIPE.to_owned();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, text).unwrap();
    path
}

fn train(recipe: &Path, out: &Path) -> (i32, String) {
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    advxl(&["train", &text(recipe), "--out", &text(out)])
}

fn trained(recipe: &Path, out: &Path) -> String {
    let (code, text) = train(recipe, out);
    assert_eq!(code, 0, "{text}");
    text
}

fn model(folder: &Path) -> Model {
    weights::load(folder, &Device::cpu()).unwrap().model
}

fn head_weight(model: &Model) -> Vec<f32> {
    model.head()[0].to_vec()
}

#[test]
fn a_run_trains_on_captions_then_classes_and_resumes_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = write(folder.path(), "recipe", &[]);
    let whole = folder.path().join("whole");
    let text = trained(&recipe, &whole);
    // Both contrastive stages are evaluated zero-shot by class names.
    assert!(text.contains("clip: evaluation on 24 images"), "{text}");
    assert!(text.contains("pretrain: evaluation on 24 images"), "{text}");

    let killed = folder.path().join("killed");
    let arguments = [
        "train",
        recipe.to_str().unwrap(),
        "--out",
        killed.to_str().unwrap(),
    ];
    for lines in [2, 5, 7, 9] {
        kill_after(lines, &arguments, &killed);
    }
    trained(&recipe, &killed);
    for file in [
        "checkpoints/000000000256.safetensors",
        "stages/clip/text/open_clip_model.safetensors",
        "stages/pretrain/model.safetensors",
        "model/model.safetensors",
    ] {
        let read = |out: &Path| std::fs::read(out.join(file)).unwrap();
        assert!(read(&killed) == read(&whole), "{file}");
    }
}

#[test]
fn a_head_made_of_class_names_predicts_like_the_text_model() {
    let folder = tempfile::tempdir().unwrap();
    // Without the average, because its head also starts with the stage, and with positions that scale with the size.
    let last = r#"
[[final_evaluation]]
name = "by_text"
stage = "pretrain"
images = 40
attacks = ["pgd"]
norm = "linf"
epsilon = "2/255"

[[stage]]
name = "clip""#;
    let changes = [
        ("average = { decay = 0.9 }", ""),
        ("[[stage]]\nname = \"clip\"", last),
    ];
    let recipe = write(folder.path(), "recipe", &changes);
    let run = folder.path().join("run");
    trained(&recipe, &run);
    let spec: Spec = "synthetic:48".parse().unwrap();
    let dataset = Dataset::open(&spec, Split::Test, 5).unwrap();
    let zero_shot = ZeroShot {
        classes: dataset.classes().to_vec(),
        templates: vec!["a red {} on a plain blue background".into(), "a {}".into()],
    };
    let text = TextModel::load(&run.join("stages/clip/text"), &Device::cpu()).unwrap();
    let head = zero_shot.head_of(&text).unwrap();
    let pixels: Vec<f32> = (0..8 * 3 * 32 * 32)
        .map(|i| (i * 7919 % 1009) as f32 / 1008.0)
        .collect();
    let images: Tensor<4> = from_vec(pixels, [8, 3, 32, 32], &Device::cpu());
    let before = model(&run.join("stages/pretrain")).logits(images.clone(), &Pass::evaluation());
    let after = model(&run.join("model")).logits(images, &Pass::evaluation());
    let by_text = by_text(before, &head);
    assert_eq!(predictions(after.clone()), predictions(by_text.clone()));
    // Equal up to one factor per image, the length of its embedding.
    for (row, right) in to_vec(after).chunks(12).zip(to_vec(by_text).chunks(12)) {
        let factor = row[0] / right[0];
        for (found, right) in row.iter().zip(right) {
            assert!(
                (found - factor * right).abs() < 1e-4 * row[0].abs().max(0.1),
                "{row:?}"
            );
        }
    }

    // The same accuracy on the command line.
    let (names, templates) = (
        folder.path().join("names.txt"),
        folder.path().join("templates.txt"),
    );
    std::fs::write(&names, zero_shot.classes.join("\n")).unwrap();
    std::fs::write(&templates, zero_shot.templates.join("\n")).unwrap();
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let [text_out, head_out, wrong_out] =
        ["text", "head", "wrong"].map(|name| text(folder.path().join(name)));
    let accuracy = |out: &str| {
        let result = std::fs::read_to_string(Path::new(out).join("result.json")).unwrap();
        let result: serde_json::Value = serde_json::from_str(&result).unwrap();
        result["robust"].clone()
    };
    let (stage, tower) = (
        text(run.join("stages/pretrain")),
        text(run.join("stages/clip/text")),
    );
    let (names, templates) = (text(names), text(templates));
    let common = [
        "--data",
        "synthetic:48@32",
        "--attack",
        "clean",
        "--image-size",
        "32",
        "--seed",
        "5",
    ];
    let zero = [
        "--zero-shot",
        &names,
        "--templates",
        &templates,
        "--text",
        &tower,
    ];
    let by_text = [
        &["eval", &stage[..], "--out", &text_out],
        &common[..],
        &zero,
    ]
    .concat();
    let (code, stderr) = advxl(&by_text);
    assert_eq!(code, 0, "{stderr}");
    let whole = text(run.clone());
    let by_head = [&["eval", &whole[..], "--out", &head_out], &common[..]].concat();
    let (code, stderr) = advxl(&by_head);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(accuracy(&text_out), accuracy(&head_out));

    // The recipe's own evaluation of the caption stage equals that of the command line.
    let again = text(folder.path().join("again"));
    // Preprocessing and image size come from the stage's folder.
    let settings = "--data synthetic:48 --attack pgd --eps 2/255 --n 40 --seed 5";
    let settings: Vec<&str> = settings.split(' ').collect();
    let arguments = [&["eval", &stage[..], "--out", &again], &settings[..], &zero].concat();
    let (code, stderr) = advxl(&arguments);
    assert_eq!(code, 0, "{stderr}");
    let own = std::fs::read_to_string(run.join("result-by_text.json")).unwrap();
    let own: serde_json::Value = serde_json::from_str(&own).unwrap();
    assert_eq!(own["robust"], accuracy(&again));
    assert_eq!(own["images"], 40);

    // Without class names an embedding is not used as logits, not even in older folders that do not declare it.
    let config = run.join("stages/pretrain/config.json");
    let written = std::fs::read_to_string(&config).unwrap();
    let older = written.replace("\"outputs\": \"embedding\",", "");
    assert_ne!(older, written);
    for text in [&written, &older] {
        std::fs::write(&config, text).unwrap();
        let wrong = [&["eval", &stage[..], "--out", &wrong_out], &common[..]].concat();
        let (code, stderr) = advxl(&wrong);
        assert_eq!(code, 2, "{stderr}");
        assert!(
            stderr.contains("24 outputs") && stderr.contains("an embedding, not class logits"),
            "{stderr}"
        );
        assert!(
            stderr.contains("--zero-shot CLASSES --text FOLDER"),
            "{stderr}"
        );
    }

    // A classifier outputs no embeddings.
    let wrong = [
        &["eval", &whole[..], "--out", &wrong_out],
        &common[..],
        &zero,
    ]
    .concat();
    let (code, stderr) = advxl(&wrong);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("--zero-shot requires embeddings, but the 12 outputs of"),
        "{stderr}"
    );
}

#[test]
fn embeddings_from_a_file_train_like_those_computed_during_training() {
    let folder = tempfile::tempdir().unwrap();
    let first = folder.path().join("first");
    trained(&write(folder.path(), "first", &[]), &first);
    let tower = first.join("stages/clip/text");

    let spec: Spec = "synthetic:96".parse().unwrap();
    let dataset = Dataset::open(&spec, Split::Train, 5).unwrap();
    let captions: Vec<String> = (0..96)
        .map(|i| dataset.caption(i).ok().flatten().unwrap())
        .collect();
    let (list, file) = (
        folder.path().join("captions.txt"),
        folder.path().join("embeddings.safetensors"),
    );
    std::fs::write(&list, captions.join("\n")).unwrap();
    let embed = |list: &Path, file: &Path| {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let arguments = [
            "embed".into(),
            text(&tower),
            "--captions".into(),
            text(list),
            "--out".into(),
            text(file),
        ];
        let (code, stderr) = advxl(&arguments.each_ref().map(String::as_str));
        assert_eq!(code, 0, "{stderr}");
    };
    embed(&list, &file);

    // Only the second stage, from the weights of the first.
    let i = RECIPE.find("[[stage]]\nname = \"clip\"").unwrap();
    let j = RECIPE.find("[[stage]]\nname = \"pretrain\"").unwrap();
    let k = RECIPE.find("[[stage]]\nname = \"finetune\"").unwrap();
    let alone = |name: &str, text: &str| {
        let recipe = format!("{}{}", &RECIPE[..i], &RECIPE[j..k]);
        // A file of embeddings cannot embed class names, so there is nothing to evaluate.
        let measured = RECIPE.find("[evaluation]").unwrap();
        let recipe = match text.contains("model") {
            true => recipe,
            false => recipe.replace(&RECIPE[measured..i], ""),
        };
        let line = recipe
            .lines()
            .find(|line| line.starts_with("text ="))
            .unwrap()
            .to_owned();
        let path = folder.path().join(format!("{name}.toml"));
        std::fs::write(
            &path,
            recipe.replace(&line, &format!("text = {{ {text} }}")),
        )
        .unwrap();
        path
    };
    let (tower, file) = (tower.display(), file.display());
    let run = |name: &str, text: &str| {
        let out = folder.path().join(name);
        trained(&alone(name, text), &out);
        head_weight(&model(&out.join("model")))
    };
    let computed = run("computed", &format!("model = \"{tower}\""));
    let read = run("read", &format!("embeddings = \"{file}\""));
    let both = run(
        "both",
        &format!("model = \"{tower}\", embeddings = \"{file}\""),
    );
    assert_eq!(read, both);
    for (read, computed) in read.iter().zip(&computed) {
        // Captions are embedded in different batches, so rounding differs.
        assert!((read - computed).abs() < 1e-5, "{read} {computed}");
    }

    std::fs::write(&list, captions[..90].join("\n")).unwrap();
    let short = folder.path().join("short.safetensors");
    embed(&list, &short);
    let recipe = alone("short", &format!("embeddings = \"{}\"", short.display()));
    let (code, stderr) = train(&recipe, &folder.path().join("short"));
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("got 90 embeddings without keys for 96 samples"),
        "{stderr}"
    );
}

#[test]
fn evaluating_images_without_classes_is_refused_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("captions.tar");
    let mut tar = Vec::new();
    for number in 0..8 {
        let picture = image::GrayImage::from_pixel(16, 16, image::Luma([number * 30]));
        let mut png = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut png, image::ImageFormat::Png).unwrap();
        member(&mut tar, &format!("{number}.png"), &png.into_inner());
        member(&mut tar, &format!("{number}.txt"), b"a grey square");
    }
    tar.extend([0; 1024]);
    std::fs::write(&data, tar).unwrap();
    let shards = format!("test = \"shards:{}\"", data.display());
    let only_captions = &RECIPE[..RECIPE.find("[[stage]]\nname = \"finetune\"").unwrap()];
    let only_captions = only_captions.replace("test = \"synthetic:48\"", &shards);
    let run = |name: &str, text: &str| {
        let path = folder.path().join(format!("{name}.toml"));
        std::fs::write(&path, text).unwrap();
        train(&path, &folder.path().join(name))
    };
    let (code, stderr) = run("evaluation", &only_captions);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("`evaluation` has no effect: no stage can classify images"),
        "{stderr}"
    );
    let last = "[[final_evaluation]]\nname = \"a\"\nimages = 8\nattacks = [\"pgd\"]\nnorm = \"linf\"\nepsilon = \"2/255\"\n";
    let measured = RECIPE.find("[evaluation]").unwrap();
    let end = RECIPE.find("[[stage]]").unwrap();
    let (code, stderr) = run(
        "final",
        &only_captions.replace(&RECIPE[measured..end], last),
    );
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr
            .contains("final evaluation `a`: the test images of stage `pretrain` have no classes"),
        "{stderr}"
    );
    assert!(!folder.path().join("final/recipe.toml").exists());
}

/// Adds a file to a tar.
fn member(tar: &mut Vec<u8>, name: &str, bytes: &[u8]) {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    header[124..135].copy_from_slice(format!("{:011o}", bytes.len()).as_bytes());
    header[156] = b'0';
    header[257..263].copy_from_slice(b"ustar\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    tar.extend(header);
    tar.extend(bytes);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

#[test]
fn incompatible_settings_are_refused_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let new = "text = { new = { context = 12, width = 32, depth = 1, heads = 2, embedding = 24 }, templates = [\"a red {} on a plain blue background\", \"a {}\"] }";
    let names = folder.path().join("names.txt");
    std::fs::write(&names, "cat\ndog\n").unwrap();
    let named = format!("from = \"clip\", classes = \"{}\"", names.display());
    let out = folder.path().join("run");
    for (changes, message) in [
        (
            vec![(new, "")],
            "objective.kind = `contrastive` requires the table `text`",
        ),
        (
            vec![("from = \"clip\"", "from = \"clop\"")],
            "text.from = `clop` is not an earlier stage with a `new` text model",
        ),
        (
            vec![(
                "[[stage]]\nname = \"clip\"",
                "[[final_evaluation]]\nname = \"a\"\nstage = \"pretain\"\nimages = 8\nattacks = [\"pgd\"]\nnorm = \"linf\"\nepsilon = \"2/255\"\n\n[[stage]]\nname = \"clip\"",
            )],
            "final evaluation `a`: unknown stage `pretain`\n    hint: known stages are clip, pretrain, finetune",
        ),
        (
            vec![("from = \"clip\"", "from = \"clip\", model = \"x\"")],
            "set exactly one of `model`, `from` or `new`",
        ),
        (
            vec![(
                "\"a {}\"] }\noptimizer = { kind = \"adamw\", weight_decay = 0.05, betas = [0.9, 0.95], clip_norm",
                "\"a thing\"] }\noptimizer = { kind = \"adamw\", weight_decay = 0.05, betas = [0.9, 0.95], clip_norm",
            )],
            "the template `a thing` has no placeholder {} for the class",
        ),
        (
            vec![(
                "objective = { kind = \"cross_entropy\" }",
                "objective = { kind = \"cross_entropy\" }\ntext = { from = \"clip\" }",
            )],
            "text has no effect with objective.kind = `cross_entropy`",
        ),
        (
            vec![("head = \"text\"", "")],
            "cannot keep the head of the previous stage, which outputs embeddings of 24 dimensions",
        ),
        (
            vec![(
                "chunk = 12",
                "chunk = 12\nmixing = { mixup_alpha = 0.8, probability = 1.0, switch_probability = 0.5 }",
            )],
            "captions cannot be mixed",
        ),
        (
            vec![("heads = 2, embedding", "heads = 5, embedding")],
            "heads = 5 must divide width = 32",
        ),
        (
            vec![("from = \"clip\"", &named)],
            "has 2 names, but there are 12 classes",
        ),
        (
            vec![("from = \"clip\"", "model = \"nowhere\"")],
            "`nowhere` is not a text model folder",
        ),
    ] {
        let recipe = write(folder.path(), "wrong", &changes);
        let (code, text) = train(&recipe, &out);
        assert_eq!(code, 2, "{message}: {text}");
        assert!(text.contains(message), "`{message}` is not in:\n{text}");
    }
}
