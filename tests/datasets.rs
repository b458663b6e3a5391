//! Data sets in common layouts, evaluated with models of known predictions, so that accuracies can be counted by hand.

mod support;

use std::path::{Path, PathBuf};

use advxl::image::Preprocessing;
use advxl::model::{Model, ModelConfig, VitConfig};
use advxl::ops::{Device, from_vec};
use advxl::weights;
use serde_json::Value;
use support::command;

/// Writes class folders with the given numbers of images.
fn class_folders(root: &Path, counts: &[(&str, usize)]) {
    for (class, count) in counts {
        let folder = root.join(class);
        std::fs::create_dir_all(&folder).unwrap();
        for number in 0..*count {
            let shade = (7 * number % 256) as u8;
            let picture = image::RgbImage::from_pixel(16, 16, image::Rgb([shade, 100, 50]));
            picture
                .save(folder.join(format!("{number:03}.png")))
                .unwrap();
        }
    }
}

/// Writes a model that always predicts one class.
fn constant(folder: &Path, outputs: usize, answer: usize, names: &[&str]) -> PathBuf {
    let config = ModelConfig::Vit(VitConfig {
        width: 8,
        depth: 1,
        heads: 1,
        hidden: 8,
        ..VitConfig::named("vit_micro").unwrap()
    });
    let mut model = Model::new(&config, outputs, 16, 0, &Device::cpu());
    for parameter in model.parameters_mut() {
        let length: usize = parameter.shape.iter().product();
        let mut values = vec![0.0; length];
        match parameter.name.as_str() {
            "head.weight" => {}
            "head.bias" => values[answer] = 1.0,
            _ => continue,
        }
        parameter.value = from_vec(values, [length], &Device::cpu());
    }
    let path = folder.join(format!("always-{answer}-of-{}", names.join("")));
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    weights::save(
        &model,
        &Preprocessing::new(16),
        weights::Outputs::Logits,
        &names,
        &path,
    )
    .unwrap();
    path
}

/// Runs an evaluation. Returns the exit code, the result and the messages.
fn evaluate(model: &Path, data: &str, more: &[&str]) -> (i32, Value, String) {
    let out = model.with_extension(format!("{}-out", more.len()));
    let mut arguments = vec![
        "eval",
        model.to_str().unwrap(),
        "--data",
        data,
        "--attack",
        "clean",
        "--out",
        out.to_str().unwrap(),
        "--json",
    ];
    arguments.extend(more);
    let output = command(&arguments).output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let result = printed
        .lines()
        .last()
        .map_or(Value::Null, |line| serde_json::from_str(line).unwrap());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code().unwrap(), result, text)
}

#[test]
fn a_subset_has_the_accuracy_of_the_whole_set() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    class_folders(&data, &["a", "b", "c", "d", "e"].map(|class| (class, 40)));
    let model = constant(folder.path(), 5, 0, &["a", "b", "c", "d", "e"]);
    let data = data.to_str().unwrap();
    let (code, whole, text) = evaluate(&model, data, &[]);
    assert_eq!(
        (code, &whole["robust_accuracy"]),
        (0, &Value::from(0.2)),
        "{text}"
    );
    assert!(
        text.contains("(no split folders): 200 images, 5 classes"),
        "{text}"
    );
    assert_eq!(whole["subset"]["rule"], "all");
    let (code, part, text) = evaluate(&model, data, &["--n", "40"]);
    assert_eq!(
        (code, &part["robust_accuracy"]),
        (0, &Value::from(0.2)),
        "{text}"
    );
    assert!(
        text.contains("40 of 200 images, a stratified sample"),
        "{text}"
    );
    let ids = part["subset"]["ids"].as_array().unwrap();
    assert_eq!(ids.len(), 40);
    assert!(ids.contains(&ids[0]) && ids[0].as_str().unwrap().starts_with("a/"));

    // The ids of a result select the same images again, and any list selects the images that it names.
    let list = folder.path().join("ids.txt");
    let lines: Vec<&str> = ids.iter().map(|id| id.as_str().unwrap()).collect();
    std::fs::write(&list, lines.join("\n")).unwrap();
    let (_, same, _) = evaluate(
        &model,
        data,
        &["--ids", list.to_str().unwrap(), "--seed", "3"],
    );
    assert_eq!(same["subset"]["ids"], part["subset"]["ids"]);
    assert_eq!(same["images_hash"], part["images_hash"]);
    std::fs::write(&list, "a/003.png\nb/004.png\n").unwrap();
    let (_, two, _) = evaluate(&model, data, &["--ids", list.to_str().unwrap()]);
    assert_eq!(two["robust"], serde_json::json!([true, false]));
    let (code, _, text) = evaluate(&model, data, &["--n", "0"]);
    assert!(
        code == 2 && text.contains("--n must be at least 1"),
        "{text}"
    );
}

#[test]
fn a_subset_of_the_models_classes_is_matched_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    class_folders(&data, &[("b", 15), ("c", 5)]);
    let data = data.to_str().unwrap();
    let model = constant(folder.path(), 3, 1, &["a", "b", "c"]);
    let (code, result, text) = evaluate(&model, data, &[]);
    assert_eq!(
        (code, &result["robust_accuracy"]),
        (0, &Value::from(0.75)),
        "{text}"
    );
    assert!(
        text.contains("has 2 of the 3 classes of the model, matched by name"),
        "{text}"
    );
    assert_eq!(result["subset"]["classes"], "by name");

    let other = constant(folder.path(), 3, 1, &["x", "y", "z"]);
    let (code, _, text) = evaluate(&other, data, &[]);
    assert_eq!(code, 2);
    assert!(
        text.contains("2 of its 2 classes are not among the 3 classes of the model"),
        "{text}"
    );
    let names = folder.path().join("classes.txt");
    std::fs::write(&names, "a\nc\nb\n").unwrap();
    let (code, result, text) = evaluate(&other, data, &["--classes", names.to_str().unwrap()]);
    assert_eq!(
        (code, &result["robust_accuracy"]),
        (0, &Value::from(0.25)),
        "{text}"
    );

    let unnamed = constant(folder.path(), 3, 1, &[]);
    let (code, _, text) = evaluate(&unnamed, data, &[]);
    assert!(
        code == 2 && text.contains("without names, so they cannot be matched"),
        "{text}"
    );
    assert!(text.contains("hint: use --classes FILE"), "{text}");
}

#[test]
fn images_without_labels_are_never_scored() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    class_folders(&data, &[("a", 3), ("b", 3)]);
    let packed = folder.path().join("packed.safetensors");
    // A file with images but no labels.
    let pixels: Vec<u8> = [0.5_f32; 2 * 3 * 16 * 16]
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3, 16, 16], &pixels);
    let bytes = safetensors::serialize([("images", view.unwrap())], None).unwrap();
    std::fs::write(&packed, bytes).unwrap();
    let model = constant(folder.path(), 2, 0, &["a", "b"]);
    let spec = format!("tensors:{}", packed.display());
    let (code, _, text) = evaluate(&model, &spec, &[]);
    assert!(code == 2 && text.contains("have no labels"), "{text}");
    assert!(text.contains("2 images, no labels"), "{text}");
    let logits = folder.path().join("logits.safetensors");
    let predict = |more: &[&str]| {
        let mut arguments = vec![
            "predict",
            model.to_str().unwrap(),
            "--data",
            &spec,
            "--out",
            logits.to_str().unwrap(),
        ];
        arguments.extend(more);
        support::advxl(&arguments)
    };
    assert_eq!(predict(&[]).0, 0);
    let (code, text) = predict(&["--gradient"]);
    assert!(code == 2 && text.contains("have no labels"), "{text}");
}

#[test]
fn every_command_prints_what_it_opened() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("images");
    class_folders(&data.join("Train"), &[("a", 3), ("b", 3)]);
    class_folders(&data.join("Val"), &[("b", 2)]);
    std::fs::write(data.join("Val/b/notes.TXT"), "").unwrap();
    std::fs::write(data.join("Val/b/scan.heic"), "").unwrap();
    let model = constant(folder.path(), 2, 1, &["a", "b"]);
    let (code, result, text) = evaluate(&model, data.to_str().unwrap(), &[]);
    assert_eq!(
        (code, &result["robust_accuracy"]),
        (0, &Value::from(1.0)),
        "{text}"
    );
    let line = format!(
        "data: {}/Val (split Val): 2 images, 2 classes, 2 files ignored (1 .heic, 1 .txt)",
        data.display()
    );
    assert!(text.contains(&line), "{text}");
    let (code, text) = support::advxl(&["data", "check", data.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    assert!(
        text.contains("Train (split Train): 6 images, 2 classes"),
        "{text}"
    );
}

#[test]
fn training_on_the_test_images_requires_test_on_train() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("images");
    class_folders(&data, &[("a", 64), ("b", 64)]);
    let recipe = support::write_recipe(folder.path());
    let out = folder.path().join("run");
    let train = |more: &[&str]| {
        let mut arguments = vec![
            "train",
            recipe.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ];
        let (train, test) = (
            format!("data.train={}", data.display()),
            format!("data.test={}/.", data.display()),
        );
        arguments.extend(["--set", &train, "--set", &test]);
        arguments.extend(more);
        support::advxl(&arguments)
    };
    let (code, text) = train(&[]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("are part of the training images"), "{text}");
    assert!(
        text.contains("hint: set data.test to other images"),
        "{text}"
    );
    let (code, text) = train(&["--set", "data.test_on_train=true"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("128 images, 2 classes"), "{text}");
}
