//! `advxl table`: its numbers are those of its commands, whatever interrupts it.

mod support;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use support::{advxl, command, files_below, trained};

const PROTOCOL: &str = r#"
title = "Test"
source = "none"
mean = true

[[evaluation]]
name = "clean"
attacks = ["clean"]

[[evaluation]]
name = "PGD"
attacks = ["pgd"]
norm = "linf"
epsilon = "2/255"
arguments = ["--steps", "3"]

[[data]]
name = "drawn"
spec = "synthetic:40"
obtain = "it is drawn"

[[data]]
name = "fog & snow"
spec = "npy:{corrupted}/fog.npy@{severity}"
baseline_error = 0.8
obtain = "https://example.org/c"

[[data]]
name = "elsewhere"
spec = "{elsewhere}"
obtain = "https://example.org/e"
"#;

/// A trained run, a protocol and its data in a folder.
struct Setup {
    _folder: tempfile::TempDir,
    root: PathBuf,
}

impl Setup {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        trained(&root);
        std::fs::write(root.join("protocol.toml"), PROTOCOL).unwrap();
        let corrupted = root.join("corrupted");
        std::fs::create_dir(&corrupted).unwrap();
        let pixel = |at: usize| ((at * 2654435761) >> 7) as u8;
        let pixels: Vec<u8> = (0..30 * 3072).map(pixel).collect();
        write_array(&corrupted.join("fog.npy"), "(30, 32, 32, 3)", &pixels);
        let labels: Vec<u8> = (0..30).map(|index| index % 6 % 12).collect();
        write_array(&corrupted.join("labels.npy"), "(30,)", &labels);
        Self {
            _folder: folder,
            root,
        }
    }

    fn path(&self, name: &str) -> String {
        self.root.join(name).display().to_string()
    }

    /// Returns the arguments of the table in the folder `out`.
    fn arguments(&self, out: &str, more: &[&str]) -> Vec<String> {
        let finetuned = format!("final={}", self.path("run"));
        let pretrained = format!("first stage={}", self.path("run/stages/pretrain"));
        let data = format!("corrupted={}", self.path("corrupted"));
        let words = [
            "table",
            &self.path("protocol.toml"),
            &finetuned,
            &pretrained,
            "--data",
            &data,
        ];
        let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        words.extend(["--out".to_owned(), self.path(out)]);
        words.extend(more.iter().map(|word| (*word).to_owned()));
        words
    }

    fn run(&self, out: &str, more: &[&str]) -> (i32, String) {
        let arguments = self.arguments(out, more);
        advxl(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

/// Writes a NumPy array of bytes.
fn write_array(path: &Path, shape: &str, bytes: &[u8]) {
    let header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n");
    let length = (header.len() as u16).to_le_bytes();
    let all = [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), bytes].concat();
    std::fs::write(path, all).unwrap();
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Returns the share of images that are right after the first or the last stage of a result.
fn accuracy(result: &Value, is_last: bool) -> f64 {
    let stages = result["stages"].as_array().unwrap();
    let stage = if is_last {
        stages.last()
    } else {
        stages.first()
    };
    100.0 * stage.unwrap()["robust_count"].as_f64().unwrap() / result["images"].as_f64().unwrap()
}

#[test]
fn the_numbers_are_those_of_the_commands() {
    let setup = Setup::new();
    let (code, text) = setup.run("table", &[]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("advxl eval"), "{text}");
    let table = read(&setup.root.join("table/table.json"));
    assert_eq!(
        table["columns"],
        serde_json::json!([
            "model",
            "drawn, clean",
            "fog & snow, clean",
            "mean, clean",
            "drawn, PGD",
            "fog & snow, PGD",
            "mean, PGD",
            "mCE"
        ])
    );
    let notes = table["notes"].to_string();
    for part in [
        "--data elsewhere=PATH",
        "https://example.org/e",
        "over 2 of the protocol's 3",
    ] {
        assert!(notes.contains(part), "{part}: {notes}");
    }
    for (row, model) in ["final", "first-stage"].into_iter().enumerate() {
        let folder = setup.root.join("table").join(model);
        let number = |column: usize| {
            table["rows"][row]["numbers"][column]["value"]
                .as_f64()
                .unwrap()
        };
        let drawn = read(&folder.join("drawn/pgd/result.json"));
        let parts: Vec<Value> = (1..=5)
            .map(|part| read(&folder.join(format!("fog-snow/{part}/pgd/result.json"))))
            .collect();
        let near =
            |found: f64, right: f64| assert!((found - right).abs() < 1e-9, "{found} {right}");
        for (is_last, first) in [(false, 0), (true, 3)] {
            let fog = parts
                .iter()
                .map(|part| accuracy(part, is_last))
                .sum::<f64>()
                / 5.0;
            near(number(first), accuracy(&drawn, is_last));
            near(number(first + 1), fog);
            near(number(first + 2), (accuracy(&drawn, is_last) + fog) / 2.0);
        }
        near(number(6), (100.0 - number(1)) / 0.8);
        // The severities are different images of the file.
        let hashes: Vec<&Value> = parts.iter().map(|part| &part["images_hash"]).collect();
        assert!((1..5).all(|part| hashes[part] != hashes[0]), "{hashes:?}");
        assert_eq!(parts[0]["images"], 6);
    }

    // The printed command alone gives the same result.
    let output = command(&[])
        .args(setup.arguments("other", &["--dry-run"]))
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let first = printed.lines().next().unwrap();
    assert!(!setup.root.join("other").exists());
    let words: Vec<&str> = first.split(' ').skip(1).collect();
    let (code, text) = advxl(&words);
    assert_eq!(code, 0, "{text}");
    let alone = read(&setup.root.join("other/final/drawn/pgd/result.json"));
    let cell = read(&setup.root.join("table/final/drawn/pgd/result.json"));
    assert_eq!(alone["robust"], cell["robust"]);
    assert_eq!(alone["margin"], cell["margin"]);

    // All forms have the numbers.
    let form = |name: &str| std::fs::read_to_string(setup.root.join("table").join(name)).unwrap();
    let value = format!(
        "{:.1}",
        table["rows"][0]["numbers"][3]["value"].as_f64().unwrap()
    );
    for (name, part) in [
        ("table.txt", format!("{value} ±")),
        (
            "table.md",
            format!("[{value}](final/drawn/pgd/result.json)"),
        ),
        ("table.tex", format!("{value} {{\\scriptsize")),
        ("table.tex", "fog \\& snow, PGD".to_owned()),
        ("table.csv", "first stage,\"mean, PGD\",".to_owned()),
    ] {
        assert!(
            form(name).contains(&part),
            "{name} has no {part}: {}",
            form(name)
        );
    }

    // Nothing is evaluated twice, unless the model changes.
    let results = || {
        let files = files_below(&setup.root.join("table"));
        let results = files
            .into_iter()
            .filter(|path| path.ends_with("result.json"));
        let mut times: Vec<_> = results
            .map(|path| (path.metadata().unwrap().modified().unwrap(), path))
            .collect();
        times.sort();
        times
    };
    let before = results();
    let (code, text) = setup.run("table", &[]);
    assert_eq!((code, text.contains("advxl eval")), (0, false), "{text}");
    assert_eq!(results(), before);
    let weights = setup.root.join("run/model/model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, bytes).unwrap();
    let (code, text) = setup.run("table", &[]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(text.matches("advxl eval").count(), 6, "{text}");
}

#[test]
fn a_killed_table_resumes_and_processes_share_the_work() {
    let setup = Setup::new();
    let start = |out: &str| {
        let mut command = command(&[]);
        command.args(setup.arguments(out, &["--batch", "3"]));
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let finished = |out: &str| {
        let folder = setup.root.join(out);
        let files = if folder.exists() {
            files_below(&folder)
        } else {
            Vec::new()
        };
        files
            .iter()
            .filter(|path| path.ends_with("cell.json"))
            .count()
    };
    let mut killed = start("killed");
    while finished("killed") < 2 && killed.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(finished("killed") < 12);
    let (code, text) = setup.run("killed", &["--batch", "3"]);
    assert_eq!(code, 0, "{text}");

    let mut both = [start("shared"), start("shared")];
    let codes = both
        .each_mut()
        .map(|child| child.wait().unwrap().code().unwrap());
    assert!(codes.iter().all(|code| [0, 75].contains(code)), "{codes:?}");
    assert!(codes.contains(&0), "{codes:?}");
    assert_eq!(finished("shared"), 12);
    let (code, text) = setup.run("shared", &["--batch", "3"]);
    assert_eq!((code, text.contains("advxl eval")), (0, false), "{text}");

    let table = |out: &str| std::fs::read_to_string(setup.root.join(out).join("table.md")).unwrap();
    assert_eq!(table("killed"), table("shared"));
}

#[test]
fn a_matrix_has_every_model_on_the_adversarial_images_of_every_model() {
    let setup = Setup::new();
    let protocol = "title = \"Transfer\"\nlayout = \"transfer\"\n[[evaluation]]\nname = \"PGD\"\nattacks = \
                    [\"pgd\"]\nnorm = \"linf\"\nepsilon = \"8/255\"\n[[data]]\nname = \"drawn\"\nspec = \
                    \"synthetic:40@32\"\n";
    std::fs::write(setup.root.join("protocol.toml"), protocol).unwrap();
    let same = format!("same={}", setup.path("run"));
    let other = setup.path("run");
    let words = [
        "table",
        &setup.path("protocol.toml"),
        &same,
        &format!("again={other}"),
        "--out",
        &setup.path("matrix"),
    ];
    let (code, text) = advxl(&words);
    assert_eq!(code, 0, "{text}");
    let table = read(&setup.root.join("matrix/table.json"));
    assert_eq!(
        table["columns"],
        serde_json::json!(["adversarial images of", "same", "again"])
    );
    let attack = read(&setup.root.join("matrix/same/drawn/pgd/result.json"));
    for row in 0..2 {
        for column in 0..2 {
            let number = table["rows"][row]["numbers"][column]["value"]
                .as_f64()
                .unwrap();
            assert_eq!(number, accuracy(&attack, true), "{row} {column}");
        }
    }
    // The labels are matched by name.
    let transfer = read(
        &setup
            .root
            .join("matrix/same/drawn/pgd/to-again/result.json"),
    );
    assert_eq!(transfer["subset"]["classes"], "by name");
    assert_eq!(transfer["predicted"], attack["predicted"]);

    std::fs::write(
        setup.root.join("protocol.toml"),
        PROTOCOL.replace("mean = true", "layout = \"transfer\""),
    )
    .unwrap();
    let (code, text) = setup.run("none", &[]);
    assert_eq!(code, 2);
    assert!(
        text.contains("needs one evaluation with attacks, and one data set"),
        "{text}"
    );
}

#[test]
fn unseen_attacks_give_their_mean_and_several_norms_their_union() {
    let setup = Setup::new();
    let protocol = r#"
title = "Several"
[[evaluation]]
name = "UA2"
attacks = ["ua"]
arguments = ["--steps", "2", "--strength", "high"]
[[evaluation]]
name = "union"
attacks = ["pgd"]
arguments = ["--norm", "linf,l2", "--eps", "2/255,0.2", "--steps", "2"]
[[evaluation]]
name = "clean"
attacks = ["clean"]
[[data]]
name = "drawn"
spec = "synthetic:40"
"#;
    let path = setup.root.join("several.toml");
    std::fs::write(&path, protocol).unwrap();
    let [path, run, out] = ["several.toml", "run", "several"].map(|name| setup.path(name));
    let (code, text) = advxl(&["table", &path, &run, "--out", &out]);
    assert_eq!(code, 0, "{text}");
    let table = read(&setup.root.join("several/table.json"));
    let numbers = &table["rows"][0]["numbers"];
    let at = |column: usize| {
        let result = &numbers[column]["results"][0];
        let result = read(&setup.root.join("several").join(result.as_str().unwrap()));
        (numbers[column]["value"].as_f64().unwrap(), result)
    };
    let (ua2, result) = at(0);
    assert!(
        (ua2 - 100.0 * result["ua2"].as_f64().unwrap()).abs() < 1e-9,
        "{ua2}"
    );
    assert_eq!(result["evaluations"].as_array().unwrap().len(), 8);
    let (union, result) = at(1);
    assert_eq!(union, 100.0 * result["robust_accuracy"].as_f64().unwrap());
    let (clean, _) = at(2);
    assert!(clean >= union && clean >= ua2);
}

#[test]
fn invalid_tables_are_refused_before_anything_is_evaluated() {
    let setup = Setup::new();
    let refused = |more: &[&str], parts: &[&str]| {
        let (code, text) = setup.run("refused", more);
        assert_eq!(code, 2, "{text}");
        for part in parts {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!setup.root.join("refused/table.json").exists());
    };
    let twice = format!("final={}", setup.path("run"));
    refused(&[&twice], &["several models have the folder name `final`"]);
    refused(&["--data", "nothing"], &["expected NAME=PATH"]);
    refused(
        &["--data", "other=x"],
        &["no data set `other`", "corrupted, elsewhere"],
    );
    refused(
        &["--root", &setup.path("recipe.toml")],
        &["is not a folder"],
    );
    refused(&["/nowhere"], &["`/nowhere` does not exist"]);
    let run = setup.path("run");
    let out = setup.path("refused");
    let (code, text) = advxl(&["table", "imagenet-cc", &run, "--out", &out]);
    assert_eq!(code, 2);
    assert!(text.contains("did you mean `imagenet-c`?"), "{text}");
    let wrong = PROTOCOL.replace("\"--steps\"", "\"--stepz\"");
    std::fs::write(setup.root.join("protocol.toml"), wrong).unwrap();
    refused(&[], &["unexpected argument '--stepz'"]);

    // A data set that cannot be used costs its own cells only.
    std::fs::write(setup.root.join("protocol.toml"), PROTOCOL).unwrap();
    std::fs::remove_file(setup.root.join("corrupted/labels.npy")).unwrap();
    let (code, text) = setup.run("partial", &[]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("labels.npy"), "{text}");
    let table = read(&setup.root.join("partial/table.json"));
    assert!(table["rows"][1]["numbers"][0]["value"].is_f64(), "{table}");
    assert!(table["rows"][1]["numbers"][1].is_null(), "{table}");
}
