//! Data sets in common layouts, evaluated with models of known predictions, so that accuracies can be counted by hand.

mod support;

use std::path::{Path, PathBuf};

use advxl::data::{Dataset, Split};
use advxl::image::Preprocessing;
use advxl::model::{Model, ModelConfig, VitConfig};
use advxl::ops::{Device, from_vec};
use advxl::storage::cache::use_cache;
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

/// Returns the path of a file that `tests/golden/make_archives.py` wrote.
fn archive(name: &str) -> String {
    format!(
        "{}/tests/golden/archives/{name}",
        env!("CARGO_MANIFEST_DIR")
    )
}

/// Opens a data set, with one cache for all tests of this file.
fn open(spec: &str, split: Split) -> advxl::error::Result<Dataset> {
    static CACHE: std::sync::OnceLock<tempfile::TempDir> = std::sync::OnceLock::new();
    use_cache(CACHE.get_or_init(|| tempfile::tempdir().unwrap()).path());
    Dataset::open(&spec.parse()?, split, 0)
}

fn refusal(spec: &str) -> String {
    let error = open(spec, Split::Train).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    let text = error.to_string();
    assert!(text.contains("hint: "), "{text}");
    text
}

/// The pixels of image `number` in the files of `make_archives.py`.
fn pixels(number: usize, height: usize, width: usize) -> Vec<u8> {
    let pixel = |at: usize| {
        let (row, column, channel) = (at / 3 / width, at / 3 % width, at % 3);
        (40 * number + 16 * row + 3 * column + 70 * channel) as u8
    };
    (0..3 * height * width).map(pixel).collect()
}

/// Compares images and labels with those of `make_archives.py`, from image `first` on.
fn compare(dataset: &Dataset, first: usize, count: usize, width: usize) {
    assert_eq!(dataset.len(), count);
    // Not in order, as training reads them.
    for index in (0..count).rev() {
        let picture = dataset.picture(index).unwrap();
        assert_eq!((picture.height(), picture.width()), (16, width));
        let number = first + index;
        assert!(
            picture.to_bytes() == pixels(number, 16, width)[..],
            "{number}"
        );
        assert_eq!(dataset.label(index).unwrap() as usize, 3 * number % 4);
    }
}

#[test]
fn numpy_archives_have_numpys_pixels_and_labels() {
    for (file, width, is_unpacked) in [
        ("stored", 17, false),
        ("deflated", 16, true),
        ("zip64", 16, false),
        ("zip64_deflated", 16, true),
    ] {
        let spec = format!("npz:{}", archive(&format!("{file}.npz")));
        let dataset = open(&spec, Split::Train).unwrap();
        compare(&dataset, 0, 6, width);
        assert_eq!(dataset.classes(), ["0", "1", "2", "3"]);
        assert_eq!(dataset.image_size(), (width == 16).then_some(16));
        assert_eq!(dataset.summary(), format!("{spec}: 6 images, 4 classes"));
        assert_eq!(dataset.name_of(2), format!("{file}.npz image 2"));
        assert_eq!(dataset.id_of(2).unwrap(), "2");
        // Unpacked once: the second time, the copy is used.
        let again = open(&spec, Split::Test).unwrap();
        assert_eq!(again.fingerprint(), dataset.fingerprint());
        match dataset.notices() {
            [] => assert!(!is_unpacked),
            [notice] => {
                assert!(
                    is_unpacked && notice.contains("is compressed; its images are unpacked in"),
                    "{notice}"
                );
                compare(&again, 0, 6, width);
            }
            _ => unreachable!(),
        }
        assert!(again.overlaps(&dataset));
    }
    let unlabeled = open(&format!("npz:{}", archive("unlabeled.npz")), Split::Train).unwrap();
    assert!(unlabeled.classes().is_empty());
    let text = unlabeled.require_classes().unwrap_err().to_string();
    assert!(
        text.contains("have no labels") && text.contains("add `label` int64 [n]"),
        "{text}"
    );
}

#[test]
fn other_numpy_archives_are_refused_with_what_is_wrong() {
    for (file, message, hint) in [
        (
            "fortran.npz",
            "`image` is in Fortran order",
            "ascontiguousarray",
        ),
        (
            "floats.npz",
            "`image` has dtype <f4, expected uint8 (|u1)",
            "(255 * image)",
        ),
        (
            "int64.npz",
            "`image` has dtype <i8, expected uint8",
            "astype('uint8')",
        ),
        ("structured.npz", "`image` has dtype [(", "astype"),
        (
            "first.npz",
            "`image` has shape [6, 3, 2, 2], expected [n, height, width, 3]",
            "transpose(0, 2, 3, 1)",
        ),
        (
            "gray.npz",
            "`image` has shape [6, 2, 2, 1]",
            "repeat(3, axis=3)",
        ),
        (
            "flat.npz",
            "`image` has shape [6, 12]",
            "`image` uint8 [n, height, width, 3]",
        ),
        ("none.npz", "`image` has shape [0, 2, 2, 3]", "no pixels"),
        (
            "missing.npz",
            "missing array `image`; found `x_train`, `y_train`",
            "must contain `image`",
        ),
        (
            "both.npz",
            "both `image` and `images` are in the file",
            "one of them",
        ),
        (
            "lengths.npz",
            "`image` has 6 images, but `label` has shape [5]",
            "one for each image",
        ),
        (
            "negative.npz",
            "image 0 has label -1, expected 0 to 999999",
            "labels start at 0",
        ),
        (
            "great.npz",
            "image 1 has label 1000001, expected 0 to 999999",
            "labels start at 0",
        ),
        (
            "float_labels.npz",
            "`label` has dtype <f4, expected whole numbers",
            "astype('int64')",
        ),
        (
            "big_endian.npz",
            "`label` has dtype >i8, expected whole numbers",
            "astype('int64')",
        ),
        (
            "bzip2.npz",
            "`image` is encrypted, or compressed with another method",
            "numpy.savez",
        ),
        (
            "single.npy",
            "this is a single array (.npy)",
            "use `npy:FILE`",
        ),
    ] {
        let path = archive(&format!("bad_{file}"));
        let text = refusal(&format!("npz:{path}"));
        assert!(text.starts_with(&format!("`{path}`: ")), "{text}");
        let (found, advice) = text.split_once("hint: ").unwrap();
        assert!(
            found.contains(message) && advice.contains(hint),
            "{file}: {text}"
        );
    }
    let text = refusal(&archive("stored.npz"));
    assert!(
        text.contains("hint: for a NumPy archive, use `npz:"),
        "{text}"
    );
    assert!(refusal("npz:no/such.npz").contains("cannot read `no/such.npz`"));
}

#[test]
fn damaged_numpy_archives_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    let with = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        refusal(&format!("npz:{}", path.display()))
    };
    let text = with(b"<!DOCTYPE html><html>");
    assert!(
        text.contains("not a NumPy archive (.npz); this is an HTML page"),
        "{text}"
    );
    for file in ["stored", "deflated", "zip64"] {
        let whole = std::fs::read(archive(&format!("{file}.npz"))).unwrap();
        for length in [60, whole.len() / 2, whole.len() - 1] {
            let text = with(&whole[..length]);
            assert!(
                text.contains("truncated or invalid zip file, the format of NumPy archives"),
                "{text}"
            );
        }
    }
    // A changed byte in the middle of the compressed images, and one in a stored label.
    let mut bytes = std::fs::read(archive("deflated.npz")).unwrap();
    bytes[500] ^= 0x10;
    let text = with(&bytes);
    assert!(
        text.contains("`images` is damaged: ") && text.contains("download it again"),
        "{text}"
    );
    let mut bytes = std::fs::read(archive("stored.npz")).unwrap();
    let table = bytes.windows(4).position(|four| four == b"PK\x01\x02");
    bytes[table.unwrap() - 1] ^= 1;
    let text = with(&bytes);
    assert!(
        text.contains("`label` is damaged: wrong checksum"),
        "{text}"
    );
    // A header that promises more images than there are bytes.
    let text = with(&small_archive(9, 6, 2));
    let message = "`image` has 4,608 bytes, but its shape [9, 16, 16, 3] needs 6,912";
    assert!(text.contains(message), "{text}");
}

#[test]
fn parquet_files_have_the_images_of_their_split() {
    let spec = format!("parquet:{}", archive("named"));
    let train = open(&spec, Split::Train).unwrap();
    compare(&train, 0, 6, 17);
    assert_eq!(train.classes(), ["airplane", "bird", "cat", "deer"]);
    assert_eq!(train.image_size(), None);
    let summary = format!(
        "{spec} (2 files, split train): 6 images, 4 classes, 1 file ignored (of other splits)"
    );
    assert_eq!(train.summary(), summary);
    assert_eq!(train.id_of(4).unwrap(), "train-00001-of-00002.parquet/1");
    assert!(
        train
            .name_of(4)
            .ends_with("named/train-00001-of-00002.parquet row 1")
    );
    assert!(
        train.notices()[0].contains("are copied to"),
        "{:?}",
        train.notices()
    );
    let test = open(&spec, Split::Test).unwrap();
    compare(&test, 1, 2, 17);
    assert_eq!(test.classes(), train.classes());
    assert!(!train.overlaps(&test));
    assert_ne!(train.fingerprint(), test.fingerprint());
    // A pattern of one split is used for both.
    for split in [Split::Train, Split::Test] {
        let glob = open(&format!("{spec}/train-*.parquet"), split).unwrap();
        compare(&glob, 0, 6, 17);
        assert!(glob.overlaps(&train));
        assert_eq!(glob.fingerprint(), train.fingerprint());
        let braces = open(
            &format!("{spec}/train-{{00001..00001}}-of-00002.parquet"),
            split,
        )
        .unwrap();
        compare(&braces, 3, 3, 17);
        let file = open(&format!("{spec}/test-00000-of-00001.parquet"), split).unwrap();
        compare(&file, 1, 2, 17);
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("data")).unwrap();
    let part = "train-00000-of-00002.parquet";
    std::fs::copy(
        archive(&format!("named/{part}")),
        folder.path().join("data").join(part),
    )
    .unwrap();
    let spec = format!("parquet:{}", folder.path().display());
    compare(&open(&spec, Split::Train).unwrap(), 0, 3, 17);
    let text = open(&spec, Split::Test).unwrap_err().to_string();
    assert!(
        text.contains(
            "has files of the split `train`, but none that begins with `validation-` or `test-`"
        ),
        "{text}"
    );
    let text = refusal(&folder.path().display().to_string());
    assert!(
        text.contains("hint: for Parquet files, use `parquet:"),
        "{text}"
    );
}

#[test]
fn parquet_files_without_names_or_labels_are_read() {
    let plain = open(
        &format!("parquet:{}", archive("plain.parquet")),
        Split::Test,
    )
    .unwrap();
    assert_eq!((plain.len(), plain.classes().len()), (6, 4));
    assert_eq!(plain.classes()[3], "3");
    assert!(plain.picture(5).unwrap().to_bytes() == pixels(5, 16, 17)[..]);
    let fault = plain.read(4, false).unwrap_err();
    let text = fault.error.to_string();
    assert!(
        text.contains("plain.parquet row 4`: the row has no image"),
        "{text}"
    );
    let unlabeled = open(
        &format!("parquet:{}", archive("unlabeled.parquet")),
        Split::Test,
    )
    .unwrap();
    assert!(unlabeled.classes().is_empty() && unlabeled.label(0).is_err());
    let text = unlabeled.require_classes().unwrap_err().to_string();
    assert!(
        text.contains("hint: the files need a column `label`"),
        "{text}"
    );
}

#[test]
fn other_parquet_files_are_refused_with_what_is_wrong() {
    for (file, message, hint) in [
        (
            "columns",
            "no column of encoded images; found `pixels` (BYTE_ARRAY), `label` (INT64)",
            "a column `image`",
        ),
        (
            "gzip",
            "column `image` is compressed with GZIP",
            "compression=\"snappy\"",
        ),
        (
            "labels",
            "bad_labels.parquet row 1`: no label, or a negative one",
            "remove the rows",
        ),
        (
            "names",
            "has 4 class names, but a row has label 4",
            "labels start at 0",
        ),
        (
            "great",
            "row 1 has label 1000000, expected 0 to 999999",
            "labels start at 0",
        ),
        ("rows", "contains no rows", "a folder, or a pattern"),
    ] {
        let text = refusal(&format!(
            "parquet:{}",
            archive(&format!("bad_{file}.parquet"))
        ));
        let (found, advice) = text.split_once("hint: ").unwrap();
        assert!(
            found.contains(message) && advice.contains(hint),
            "{file}: {text}"
        );
    }
    let (other, named) = (archive("other.parquet"), archive("plain.parquet"));
    let text = refusal(&format!("parquet:{other},{named}"));
    assert!(text.contains("have different columns of labels"), "{text}");
    let text = refusal(&format!("parquet:{other},{}", archive("bad_names.parquet")));
    assert!(text.contains("have different names of classes"), "{text}");
    assert!(refusal(&format!("parquet:{other},{other}")).contains("is listed twice"));
    assert!(refusal("parquet:no/*.parquet").contains("no file matches `no/*.parquet`"));
    assert!(refusal("parquet:no/such.parquet").contains("`no/such.parquet` does not exist"));
    assert!(refusal(&other).contains("hint: for Parquet files, use `parquet:"));

    let folder = tempfile::tempdir().unwrap();
    let text = refusal(&format!("parquet:{}", folder.path().display()));
    assert!(text.contains("no `.parquet` files in folder"), "{text}");
    let path = folder.path().join("a.parquet");
    let spec = format!("parquet:{}", path.display());
    let whole = std::fs::read(archive("plain.parquet")).unwrap();
    std::fs::write(&path, b"version https://git-lfs.github.com/spec/v1").unwrap();
    assert!(refusal(&spec).contains("not a Parquet file; this is a Git LFS pointer"));
    std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
    assert!(refusal(&spec).contains("invalid Parquet file"));
    // Damage anywhere is an error or other bytes, but never the end of the program.
    for at in (4..whole.len()).step_by(29) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        std::fs::write(&path, &bytes).unwrap();
        let _ = open(&spec, Split::Train);
    }
}

#[test]
fn commands_read_archives() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let mut command = command(arguments);
        let output = command
            .env("ADVXL_CACHE", folder.path().join("cache"))
            .output()
            .unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (npz, parquet) = (
        format!("npz:{}", archive("deflated.npz")),
        format!("parquet:{}", archive("named")),
    );
    let plain = format!("parquet:{}", archive("plain.parquet"));
    let (code, text) = run(&["data", "check", &npz]);
    assert!(code == 0 && text.contains("6 images, 4 classes"), "{text}");
    assert!(
        text.contains("note: `deflated.npz` is compressed"),
        "{text}"
    );
    assert_eq!(run(&["data", "check", &parquet]).0, 0);
    let (code, text) = run(&["data", "check", &plain]);
    assert_eq!(code, 1, "{text}");
    for spec in [&npz, &parquet] {
        let out = folder.path().join("packed");
        let out = out.to_str().unwrap();
        let (code, text) = run(&[
            "data",
            "pack",
            spec,
            "--split",
            "train",
            "--shorter-side",
            "16",
            "--out",
            out,
        ]);
        assert_eq!(code, 0, "{text}");
        let packed = open(&format!("shards:{out}"), Split::Train).unwrap();
        assert_eq!(packed.len(), 6);
        std::fs::remove_dir_all(out).unwrap();
    }
    // The id of a row selects it.
    let list = folder.path().join("ids.txt");
    std::fs::write(&list, "test-00000-of-00001.parquet/1\n").unwrap();
    let names = ["airplane", "bird", "cat", "deer"];
    let model = constant(folder.path(), 4, 2, &names);
    let out = folder.path().join("out");
    let (code, text) = run(&[
        "eval",
        model.to_str().unwrap(),
        "--data",
        &parquet,
        "--ids",
        list.to_str().unwrap(),
        "--attack",
        "clean",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert!(
        code == 0 && text.contains("1 of 2 images, as listed"),
        "{text}"
    );
}

#[test]
fn a_run_on_an_archive_resumes_only_on_the_same_archive() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = support::write_recipe(folder.path());
    let (data, out) = (folder.path().join("a.npz"), folder.path().join("run"));
    let train = |more: &[&str]| {
        let train = format!("data.train=npz:{}", data.display());
        let mut arguments = vec![
            "train",
            recipe.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ];
        arguments.extend(["--set", &train, "--set", "data.test_on_train=true"]);
        let test = format!("data.test=npz:{}", data.display());
        arguments.extend(["--set", &test]);
        arguments.extend(more);
        support::advxl(&arguments)
    };
    // 64 images of two classes, so that there is a batch.
    std::fs::write(&data, small_archive(64, 64, 2)).unwrap();
    let (code, text) = train(&[]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("64 images, 2 classes"), "{text}");
    std::fs::write(&data, small_archive(64, 64, 3)).unwrap();
    let (code, text) = train(&[]);
    assert_eq!(code, 2, "{text}");
}

/// Returns an archive of gray images, as `numpy.savez` writes it; the shape says `stated` images.
fn small_archive(stated: usize, count: usize, classes: usize) -> Vec<u8> {
    let array = |dtype: &str, shape: &str, values: Vec<u8>| {
        let mut header =
            format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}");
        header.extend(std::iter::repeat_n(' ', 117 - header.len()));
        header.push('\n');
        [b"\x93NUMPY\x01\x00\x76\x00", header.as_bytes(), &values].concat()
    };
    let pixels = (0..count)
        .flat_map(|number| vec![number as u8; 16 * 16 * 3])
        .collect();
    let labels = (0..count).map(|number| (number % classes) as u8).collect();
    let entries = [
        (
            "image.npy",
            array("|u1", &format!("({stated}, 16, 16, 3)"), pixels),
        ),
        ("label.npy", array("|u1", &format!("({count},)"), labels)),
    ];
    let (mut bytes, mut table) = (Vec::new(), Vec::new());
    for (name, content) in &entries {
        let at = bytes.len() as u32;
        let mut checksum = flate2::Crc::new();
        checksum.update(content);
        let sizes = [checksum.sum(), content.len() as u32, content.len() as u32];
        let sizes = sizes.map(u32::to_le_bytes).concat();
        let lengths = [name.len() as u16, 0].map(u16::to_le_bytes).concat();
        bytes.extend(
            [
                b"PK\x03\x04",
                &[0; 10][..],
                &sizes,
                &lengths,
                name.as_bytes(),
                content,
            ]
            .concat(),
        );
        let start = [b"PK\x01\x02", &[0; 12][..], &sizes, &lengths, &[0; 10]].concat();
        table.extend([&start, &at.to_le_bytes()[..], name.as_bytes()].concat());
    }
    let (at, size) = (bytes.len() as u32, table.len() as u32);
    bytes.append(&mut table);
    bytes.extend([b"PK\x05\x06", &[0, 0, 0, 0, 2, 0, 2, 0][..]].concat());
    bytes.extend([size, at].map(u32::to_le_bytes).concat());
    bytes.extend([0; 2]);
    bytes
}
