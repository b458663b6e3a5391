//! Preprocessing configured by a model folder, in all commands that run a model on images, and flags that override it.

mod support;

use std::path::{Path, PathBuf};

use advxl::image::Preprocessing;
use advxl::model::{Model, ModelConfig, VitConfig};
use advxl::ops::Device;
use advxl::weights::{Outputs, import as weights};
use image::RgbImage;
use serde_json::{Value, json};
use support::{advxl, command};

/// Writes a folder with two classes of images, none of the model's size or square.
fn pictures(folder: &Path) -> PathBuf {
    let root = folder.join("images");
    for (class, width, height) in [("cat", 41, 29), ("dog", 24, 50)] {
        std::fs::create_dir_all(root.join(class)).unwrap();
        let pixel =
            |x: u32, y: u32| image::Rgb([(x * 6) as u8, (y * 5) as u8, ((x * y) % 251) as u8]);
        let picture = RgbImage::from_fn(width, height, pixel);
        picture.save(root.join(class).join("1.png")).unwrap();
    }
    root
}

/// Writes a model folder for images of 16 pixels, with a changed configuration.
fn model(folder: &Path, name: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
    let config = ModelConfig::Vit(VitConfig {
        width: 16,
        depth: 1,
        heads: 2,
        hidden: 16,
        ..VitConfig::named("vit_micro").unwrap()
    });
    let model = Model::new(&config, 2, 16, 1, &Device::cpu());
    let classes = ["cat", "dog"].map(str::to_owned);
    let path = folder.join(name);
    weights::save(
        &model,
        &Preprocessing::new(16),
        Outputs::Logits,
        &classes,
        &path,
    )
    .unwrap();
    let file = path.join("config.json");
    let mut config = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&file, config.to_string()).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[track_caller]
fn ok(arguments: &[&str]) -> String {
    let (code, stderr) = advxl(arguments);
    assert_eq!(code, 0, "{stderr}");
    stderr
}

#[track_caller]
fn refused(arguments: &[&str], parts: &[&str]) {
    let (code, stderr) = advxl(arguments);
    assert_eq!(code, 2, "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "no `{part}` in: {stderr}");
    }
}

/// Returns the images of a pack, or the logits of a prediction.
fn floats(file: &Path, name: &str) -> Vec<f32> {
    let bytes = std::fs::read(file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    bytemuck::pod_collect_to_vec(tensors.tensor(name).unwrap().data())
}

#[test]
fn all_commands_apply_the_preprocessing_of_a_model_folder() {
    let folder = tempfile::tempdir().unwrap();
    let data = pictures(folder.path());
    let (data, out) = (text(&data), |name: &str| folder.path().join(name));
    let mut all = Vec::new();
    for (name, keys, line) in [
        (
            "half",
            json!({ "crop_pct": 0.5 }),
            "resize the shorter side to 32 (bilinear), center crop 16 (from config.json); mean 0.485, 0.456, 0.406; std",
        ),
        (
            "whole",
            json!({ "crop_pct": 1.0, "interpolation": "bicubic" }),
            "resize the shorter side to 16 (bicubic), center crop 16 (from config.json)",
        ),
        (
            "squash",
            json!({ "crop_mode": "squash" }),
            "resize to 16 x 16 (bilinear), ignoring the aspect ratio (from config.json)",
        ),
        (
            "border",
            json!({ "crop_mode": "border" }),
            "resize the longer side to 16 (bilinear), center crop or pad to 16 with color 124,116,104 (from config.json)",
        ),
    ] {
        let path = model(folder.path(), name, |config| {
            for (key, value) in keys.as_object().unwrap() {
                config["pretrained_cfg"][key] = value.clone();
            }
        });
        let (direct, packed, pack) = (out("direct"), out("packed"), out("pack"));
        let stderr = ok(&[
            "predict",
            text(&path),
            "--data",
            data,
            "--out",
            text(&direct),
        ]);
        assert!(
            stderr.contains(&format!("preprocessing: {line}")),
            "{stderr}"
        );
        ok(&[
            "data",
            "pack",
            data,
            "--split",
            "test",
            "--like",
            text(&path),
            "--out",
            text(&pack),
        ]);
        let tensors = format!("tensors:{}", pack.display());
        // Packed images are not cropped again.
        let stderr = ok(&[
            "predict",
            text(&path),
            "--data",
            &tensors,
            "--out",
            text(&packed),
        ]);
        assert!(
            stderr.contains("preprocessing: none, all images are already 16 x 16 pixels"),
            "{stderr}"
        );
        assert_eq!(
            floats(&direct, "logits"),
            floats(&packed, "logits"),
            "{name}"
        );
        let result = out("results").join(name);
        let stderr = ok(&[
            "eval",
            text(&path),
            "--data",
            data,
            "--attack",
            "clean",
            "--out",
            text(&result),
        ]);
        assert!(
            stderr.contains(&format!("preprocessing: {line}")),
            "{stderr}"
        );
        let result = std::fs::read_to_string(result.join("result.json")).unwrap();
        let result: Value = serde_json::from_str(&result).unwrap();
        assert_eq!(result["image_size"], 16);
        assert_eq!(result["std"], json!([0.229, 0.224, 0.225]));
        for key in ["resize_mode", "crop_fraction", "interpolation"] {
            assert!(!result[key].is_null(), "{key}");
        }
        all.push((floats(&pack, "images"), result["fingerprints"].clone()));
    }
    for (one, other) in [(0, 1), (0, 2), (1, 2), (2, 3)] {
        assert_ne!(all[one], all[other], "{one} and {other}");
        assert_ne!(all[one].1, all[other].1, "{one} and {other}");
    }
}

#[test]
fn flags_override_the_preprocessing_of_a_model_folder() {
    let folder = tempfile::tempdir().unwrap();
    let data = pictures(folder.path());
    let odd = model(folder.path(), "odd", |config| {
        config["pretrained_cfg"]["interpolation"] = "sinc".into();
    });
    let usual = model(folder.path(), "usual", |config| {
        config["pretrained_cfg"]["crop_pct"] = 0.875.into();
        config["pretrained_cfg"]["crop_mode"] = "squash".into();
        config["pretrained_cfg"]["interpolation"] = "lanczos".into();
    });
    let out = folder.path().join("out");
    let run = |model: &Path, more: &[&str]| {
        let arguments = [
            "predict",
            text(model),
            "--data",
            text(&data),
            "--out",
            text(&out),
        ];
        advxl(&[&arguments[..], more].concat())
    };
    let (code, stderr) = run(&odd, &["--crop-fraction", "1"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("`config.json` has interpolation = \"sinc\", expected one of nearest, box"),
        "{stderr}"
    );
    assert!(
        stderr.contains("hint: set --resize-mode, --crop-fraction and --interpolation together"),
        "{stderr}"
    );
    let flags = [
        "--resize-mode",
        "squash",
        "--crop-fraction",
        "0.875",
        "--interpolation",
        "lanczos",
    ];
    let (code, stderr) = run(&odd, &flags);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stderr.contains("(from --crop-fraction, --interpolation, --resize-mode)"),
        "{stderr}"
    );
    let by_flags = floats(&out, "logits");
    let (_, stderr) = run(&usual, &[]);
    assert!(stderr.contains("resize to 18 x 18 (lanczos)"), "{stderr}");
    assert_eq!(floats(&out, "logits"), by_flags);
    let (_, stderr) = run(&usual, &["--image-size", "32"]);
    assert!(stderr.contains("resize to 36 x 36 (lanczos)"), "{stderr}");
    assert!(
        stderr.contains("(from config.json, --image-size)"),
        "{stderr}"
    );
    let (_, stderr) = run(&usual, &["--mean", "0.5,0.5,0.5"]);
    assert!(stderr.contains("mean 0.5, 0.5, 0.5; std 0.229"), "{stderr}");
    assert_ne!(floats(&out, "logits"), by_flags);
    let (code, stderr) = run(&usual, &["--mean", "123.675,116.28,103.53"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("divide it by 255, which gives 0.485, 0.456, 0.406"),
        "{stderr}"
    );
    // Images of the model's size are cropped only if flags request it, not by the folder's configuration.
    let synthetic = |more: &[&str]| {
        let arguments = [
            "predict",
            text(&usual),
            "--data",
            "synthetic:4@16",
            "--out",
            text(&out),
        ];
        ok(&[&arguments[..], more].concat())
    };
    assert!(synthetic(&[]).contains("preprocessing: none, all images are already 16 x 16 pixels"));
    let whole = floats(&out, "logits");
    assert!(synthetic(&["--crop-fraction", "0.5"]).contains("shorter side to 32"));
    assert_ne!(floats(&out, "logits"), whole);
}

#[test]
fn sizes_that_exceed_memory_are_refused_before_allocation() {
    let folder = tempfile::tempdir().unwrap();
    let data = pictures(folder.path());
    let (path, out) = (
        model(folder.path(), "model", |_| {}),
        folder.path().join("out"),
    );
    let (path, data, out) = (text(&path), text(&data), text(&out));
    let (packed, result) = (format!("{out}.safetensors"), format!("{out}-eval"));
    let predict = ["predict", path, "--data", data, "--out", out];
    let eval = [
        "eval", path, "--data", data, "--attack", "clean", "--out", &result,
    ];
    let pack = [
        "data",
        "pack",
        data,
        "--split",
        "test",
        "--image-size",
        "224",
        "--out",
        &packed,
    ];
    for arguments in [&predict[..], &eval] {
        refused(
            &[arguments, &["--image-size", "80000000"]].concat(),
            &["from 1 to 4096"],
        );
        let tiny = ["--crop-fraction", "0.00001"];
        refused(
            &[arguments, &tiny].concat(),
            &["would resize images to 1600000 pixels", "hint: "],
        );
        refused(
            &[arguments, &["--crop-fraction", "0"]].concat(),
            &["above 0 and at most 1"],
        );
    }
    refused(
        &[&pack[..], &["--crop-fraction", "0.0001"]].concat(),
        &["would resize images to 2240000 pixels"],
    );
    refused(
        &["inspect", path, "--image-size", "80000000"],
        &["from 1 to 4096"],
    );
    refused(
        &["inspect", "vit_b16", "--image-size", "8388608"],
        &["from 1 to 4096"],
    );
    refused(
        &["inspect", "vit_b16", "--classes", "18446744073709551615"],
        &["from 1 to 100000000"],
    );
    let step = ["bench", "step", "--model", "vit_s16", "--image-size", "224"];
    refused(
        &[&step[..], &["--batch", "1000000000"]].concat(),
        &[
            "a step on 1000000000 images of 224 pixels needs",
            "of memory, but only",
            "hint: use a smaller --batch",
        ],
    );
    refused(
        &[&step[..], &["--batch", "18446744073709551615"]].concat(),
        &["of memory, but only"],
    );
    // More than the available memory, but limited by the number of images.
    let stderr = ok(&[&predict[..], &["--batch", "1000000000"]].concat());
    assert!(stderr.contains("preprocessing: "), "{stderr}");
    refused(
        &[
            "predict",
            path,
            "--data",
            "synthetic:1000000@1024",
            "--image-size",
            "1024",
            "--batch",
            "1000000",
            "--out",
            out,
        ],
        &[
            "a batch of 1000000 images of 1024 pixels needs",
            "hint: use a smaller --batch",
        ],
    );
    refused(
        &[
            "predict",
            path,
            "--data",
            "synthetic:1000000@1024",
            "--gradient",
            "--image-size",
            "1024",
            "--batch",
            "1",
            "--out",
            out,
        ],
        &["of all images", "hint: use fewer images with --n"],
    );
}

#[test]
fn a_pack_is_made_for_an_image_size_or_like_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (pictures(folder.path()), folder.path().join("out"));
    refused(
        &[
            "data",
            "pack",
            text(&data),
            "--split",
            "test",
            "--out",
            text(&out),
        ],
        &["--image-size is missing", "--like MODEL"],
    );
    let output = command(&[
        "--json",
        "data",
        "pack",
        text(&data),
        "--split",
        "test",
        "--image-size",
        "20",
        "--out",
        text(&out),
    ])
    .output()
    .unwrap();
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let right = json!({ "image_size": 20, "resize_mode": "shortest", "crop_fraction": 1.0, "interpolation": "bicubic" });
    assert_eq!(printed["preprocessing"], right);
}

#[test]
fn an_embedding_is_not_used_as_logits() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/clip");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    for name in [
        "open_clip",
        "clipa",
        "hugging_face_clip",
        "hugging_face_clip_vision",
    ] {
        let path = golden.join(name);
        let data = ["--data", "synthetic:20@16", "--out", text(&out)];
        let (eval, predict) = (
            ["eval", text(&path), "--attack", "clean"],
            ["predict", text(&path)],
        );
        let result = folder.path().join(name);
        let of_eval = ["--data", "synthetic:20@16", "--out", text(&result)];
        refused(
            &[&eval[..], &of_eval].concat(),
            &[
                "10 outputs of",
                "an embedding, not class logits",
                "hint: add --zero-shot CLASSES --text FOLDER to classify by text",
            ],
        );
        let stderr = ok(&[&predict[..], &data].concat());
        assert!(
            stderr.contains("note: the outputs are an embedding of size 10, not class logits"),
            "{stderr}"
        );
        refused(
            &[&predict[..], &data, &["--gradient"]].concat(),
            &["--gradient requires class logits"],
        );
        let export = [
            "export",
            text(&path),
            "--to",
            "robustbench",
            "--out",
            text(folder.path()),
        ];
        refused(&export, &["an embedding, but RobustBench's leaderboards"]);
    }
    let classes = model(folder.path(), "model", |_| {});
    let tower = golden.join("open_clip");
    let export = [
        "export",
        text(&classes),
        "--to",
        "open-clip",
        "--text",
        text(&tower),
        "--out",
    ];
    let exported = folder.path().join("exported");
    refused(
        &[&export[..], &[text(&exported)]].concat(),
        &["class logits, but open_clip models output embeddings"],
    );
}

#[test]
fn timms_clip_towers_are_distinguished_from_classifiers_made_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let outputs = |name: &str, classes: usize, change: &dyn Fn(&mut Value)| {
        let config = ModelConfig::Vit(VitConfig {
            width: 16,
            depth: 1,
            heads: 2,
            hidden: 16,
            ..VitConfig::named("vit_micro").unwrap()
        });
        let model = Model::new(&config, classes, 16, 1, &Device::cpu());
        let path = folder.path().join(name);
        weights::save(&model, &Preprocessing::new(16), Outputs::Logits, &[], &path).unwrap();
        let file = path.join("config.json");
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        config["architecture"] = "vit_base_patch16_clip_224".into();
        config["pretrained_cfg"]["tag"] = "laion2b".into();
        // timm's folders do not have it.
        config["advxl"] = json!({ "position": "sincos2d" });
        change(&mut config);
        std::fs::write(&file, config.to_string()).unwrap();
        weights::load(&path, &Device::cpu()).unwrap().outputs
    };
    assert_eq!(outputs("tower", 512, &|_| {}), Outputs::Embedding);
    assert_eq!(outputs("other", 1000, &|_| {}), Outputs::Logits);
    let tuned = |config: &mut Value| config["pretrained_cfg"]["tag"] = "laion2b_ft_in1k".into();
    assert_eq!(outputs("tuned", 512, &tuned), Outputs::Logits);
    let marked = |config: &mut Value| config["advxl"]["outputs"] = "embedding".into();
    assert_eq!(outputs("marked", 7, &marked), Outputs::Embedding);
    let plain = |config: &mut Value| config["architecture"] = "vit_base_patch16_224".into();
    assert_eq!(outputs("plain", 512, &plain), Outputs::Logits);
}
