//! What `advxl eval` promises: the same verdicts whatever the batch, the threads and the kills in between.

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use safetensors::SafeTensors;
use serde_json::Value;
use support::{advxl, command, trained};

/// Few steps of every attack, in all norms.
const ATTACK: [&str; 16] = [
    "--data",
    "synthetic:60",
    "--attack",
    "autoattack",
    "--norm",
    "linf,l2,l1",
    "--eps",
    "2/255,0.1,1.5",
    "--steps",
    "12",
    "--targets",
    "3",
    "--queries",
    "60",
    "--seed",
    "3",
];

/// The arguments of an evaluation into a folder.
fn arguments<'a>(run: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["eval", run, "--out", out], &ATTACK[..], more].concat()
}

/// `result.json` without what a clock says and without the paths.
fn read_result(out: &Path) -> Value {
    fn forget(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.remove("seconds");
                fields.values_mut().for_each(forget);
            }
            Value::Array(items) => items.iter_mut().for_each(forget),
            _ => {}
        }
    }
    let mut result =
        serde_json::from_slice(&std::fs::read(out.join("result.json")).unwrap()).unwrap();
    forget(&mut result);
    result
}

#[test]
fn batch_and_threads_change_no_verdict() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let evaluate = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        let (code, text) = advxl(&arguments(
            run.to_str().unwrap(),
            out.to_str().unwrap(),
            more,
        ));
        assert_eq!(code, 0, "{text}");
        read_result(&out)
    };
    let whole = evaluate("whole", &["--batch", "256"]);
    assert!(whole == evaluate("seven", &["--batch", "7"]));
    assert!(whole == evaluate("single", &["--batch", "1", "--threads", "1"]));
    for evaluation in whole["evaluations"].as_array().unwrap() {
        let counts = evaluation["stages"].as_array().unwrap().iter();
        let counts: Vec<u64> = counts
            .map(|stage| stage["robust_count"].as_u64().unwrap())
            .collect();
        assert!(counts.is_sorted_by(|a, b| a >= b), "{counts:?}");
        assert!(
            counts[0] > counts[4],
            "no attack found anything: {counts:?}"
        );
    }
}

#[test]
fn an_evaluation_killed_ten_times_ends_with_the_same_result() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let whole = folder.path().join("whole");
    let (code, text) = advxl(&arguments(
        run.to_str().unwrap(),
        whole.to_str().unwrap(),
        &["--batch", "4"],
    ));
    assert_eq!(code, 0, "{text}");

    let killed = folder.path().join("killed");
    let file = folder.path().join("adversarial.safetensors");
    let save = ["--batch", "4", "--save-adversarial", file.to_str().unwrap()];
    let arguments = arguments(run.to_str().unwrap(), killed.to_str().unwrap(), &save);
    let mut resumed = 0;
    // Each line that is told lets the evaluation go on while it is killed: in the next batch, or as that is saved.
    for lines in [1, 2, 4, 7, 9, 12, 5, 16, 3, 20] {
        let mut child = command(&arguments).stderr(Stdio::piped()).spawn().unwrap();
        let told = BufReader::new(child.stderr.take().unwrap())
            .lines()
            .map(Result::unwrap);
        for (number, line) in told.enumerate() {
            resumed += usize::from(line.contains("going on after"));
            if number + 1 == lines {
                break;
            }
        }
        // SIGKILL: the process cannot clean up.
        let _ = child.kill();
        child.wait().unwrap();
    }
    let (code, text) = advxl(&arguments);
    assert_eq!(code, 0, "{text}");
    assert!(resumed > 5, "no kill fell into the evaluation");
    assert!(read_result(&killed) == read_result(&whole));

    // The images are those that the model was judged by.
    let result = read_result(&whole);
    for evaluation in result["evaluations"].as_array().unwrap() {
        let norm = evaluation["norm"].as_str().unwrap();
        let file = folder
            .path()
            .join(format!("adversarial-{norm}.safetensors"));
        let bytes = std::fs::read(&file).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.tensor("images").unwrap().shape(), [60, 3, 32, 32]);
        let data = format!("tensors:{}", file.display());
        let out = folder.path().join(norm);
        let out = out.to_str().unwrap();
        let clean = [
            "eval",
            run.to_str().unwrap(),
            "--data",
            &data,
            "--attack",
            "clean",
            "--out",
            out,
        ];
        let (code, text) = advxl(&clean);
        assert_eq!(code, 0, "{text}");
        let clean = read_result(Path::new(out));
        assert_eq!(clean["robust"], evaluation["robust"], "{norm}");
    }
    let left: Vec<PathBuf> = std::fs::read_dir(&killed)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert_eq!(
        left,
        [killed.join("result.json")],
        "progress is removed at the end"
    );
}

#[test]
fn epsilon_zero_leaves_clean_accuracy_to_every_attack() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let run = run.to_str().unwrap();
    let attacks = "pgd,apgd-ce,apgd-dlr,apgd-t,fab,fab-t,square";
    for norm in ["linf", "l2", "l1"] {
        let out = folder.path().join(norm);
        let (code, text) = advxl(&[
            "eval",
            run,
            "--data",
            "synthetic:24",
            "--attack",
            attacks,
            "--norm",
            norm,
            "--eps",
            "0",
            "--steps",
            "3",
            "--queries",
            "5",
            "--out",
            out.to_str().unwrap(),
        ]);
        assert_eq!(code, 0, "{text}");
        let result = read_result(&out);
        let stages = result["stages"].as_array().unwrap();
        assert_eq!(stages.len(), 8);
        assert!(
            stages
                .iter()
                .all(|stage| stage["robust_count"] == stages[0]["robust_count"])
        );
    }
}

#[test]
fn the_curve_starts_at_clean_accuracy_and_falls() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let out = folder.path().join("curve");
    let (code, text) = advxl(&[
        "eval",
        run.to_str().unwrap(),
        "--data",
        "synthetic:60",
        "--seed",
        "3",
        "--attack",
        "clean",
        "--eps",
        "8/255",
        "--eps-curve",
        "--steps",
        "20",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert_eq!(code, 0, "{text}");
    let result = read_result(&out);
    let curve = result["curve"].as_array().unwrap();
    let shares: Vec<f64> = curve
        .iter()
        .map(|point| point["robust_accuracy"].as_f64().unwrap())
        .collect();
    assert_eq!(
        shares[0],
        result["stages"][0]["robust_accuracy"].as_f64().unwrap()
    );
    assert!(shares.is_sorted_by(|a, b| a >= b), "{shares:?}");
    assert_eq!(shares.last(), Some(&0.0), "{shares:?}");
    assert_eq!(result["flags"], serde_json::json!([]));
}

#[test]
fn the_lines_that_people_search_logs_for_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let run = run.to_str().unwrap();
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let ask = |eps: &str| {
        let (code, text) = advxl(&[
            "eval",
            run,
            "--data",
            "synthetic:32",
            "--attack",
            "apgd-ce",
            "--eps",
            eps,
            "--steps",
            "5",
            "--batch",
            "8",
            "--out",
            out,
        ]);
        assert_eq!(code, 0, "{text}");
        text
    };
    let text = ask("8/255");
    for line in [
        "initial accuracy: ",
        "apgd-ce - 1/",
        " successfully perturbed",
        "robust accuracy after APGD-CE: ",
        "% (total time ",
        "max Linf perturbation: 0.03137, nan in tensor: 0, max: ",
        "\nrobust accuracy: ",
    ] {
        assert!(text.contains(line), "`{line}` is missing in\n{text}");
    }
    // Another evaluation in the same folder does not overwrite the first.
    let text = ask("4/255");
    assert!(text.contains("the earlier result is kept as"), "{text}");
    let text = ask("4/255");
    assert!(!text.contains("the earlier result is kept as"), "{text}");
    let first: Value =
        serde_json::from_slice(&std::fs::read(format!("{out}/result-1.json")).unwrap()).unwrap();
    assert_eq!(first["epsilon"], "8/255");
}
