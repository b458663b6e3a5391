//! `advxl eval` gives the same verdicts for any batch size, number of threads and interruptions.

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde_json::Value;
use support::processes::{done, launched};
use support::{advxl, command, trained};

/// A few steps of every attack, in all norms.
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

/// Returns the arguments of an evaluation that writes to a folder.
fn arguments<'a>(run: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["eval", run, "--out", out], &ATTACK[..], more].concat()
}

/// Reads `result.json` without times and paths.
fn read_result(out: &Path) -> Value {
    read_file(&out.join("result.json"))
}

fn read_file(path: &Path) -> Value {
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
    let mut result = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
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
            "no attack fooled the model: {counts:?}"
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
    // The evaluation continues while a line is read, so the kill hits the next batch, or while that is saved.
    for lines in [1, 2, 4, 7, 9, 12, 5, 16, 3, 20] {
        let mut child = command(&arguments).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap())
            .lines()
            .map(Result::unwrap);
        for (number, line) in stderr.enumerate() {
            resumed += usize::from(line.contains("resuming after"));
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
    assert!(resumed > 5, "too few kills during the evaluation");
    assert!(read_result(&killed) == read_result(&whole));

    // The saved images are those that the verdicts are based on.
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
        "progress must be removed at the end"
    );
}

#[test]
fn every_attack_with_epsilon_zero_keeps_clean_accuracy() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let run = run.to_str().unwrap();
    let attacks = "pgd,apgd-ce,apgd-dlr,apgd-t,malt,pma,fab,fab-t,square";
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
        assert_eq!(stages.len(), 10);
        assert!(
            stages
                .iter()
                .all(|stage| stage["robust_count"] == stages[0]["robust_count"])
        );
    }
}

#[test]
fn the_curve_starts_at_clean_accuracy_and_decreases() {
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
fn log_lines_that_people_search_for_are_printed() {
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
    assert!(text.contains("kept the earlier result as"), "{text}");
    let text = ask("4/255");
    assert!(!text.contains("kept the earlier result as"), "{text}");
    let first: Value =
        serde_json::from_slice(&std::fs::read(format!("{out}/result-1.json")).unwrap()).unwrap();
    assert_eq!(first["epsilon"], "8/255");
}

/// Starts an evaluation and sends signals once a line appears. Returns the exit code, standard error and the seconds
/// from the first signal to the end.
fn signaled(arguments: &[&str], after: &str, signals: &[&str]) -> (i32, String, f64) {
    let mut child: Child = command(arguments).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = String::new();
    let mut sent = None;
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if sent.is_none() && line.contains(after) {
            sent = Some(Instant::now());
            for (number, signal) in signals.iter().enumerate() {
                if number > 0 {
                    std::thread::sleep(Duration::from_millis(400));
                }
                let id = child.id().to_string();
                let done = Command::new("kill")
                    .args([&format!("-{signal}"), &id])
                    .status();
                assert!(done.unwrap().success());
            }
        }
        stderr += &format!("{line}\n");
    }
    let code = child.wait().unwrap().code().unwrap_or(-1);
    let sent = sent.unwrap_or_else(|| panic!("`{after}` was not printed:\n{stderr}"));
    (code, stderr, sent.elapsed().as_secs_f64())
}

#[test]
fn a_signaled_evaluation_ends_within_seconds_and_resumes_to_the_same_result() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let run = run.to_str().unwrap();
    let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
    let (code, text) = advxl(&arguments(run, whole.to_str().unwrap(), &[]));
    assert_eq!(code, 0, "{text}");

    let file = folder.path().join("adversarial.safetensors");
    // One batch holds all images; the results of earlier targets and queries are kept.
    let save = ["--save-adversarial", file.to_str().unwrap()];
    let arguments = arguments(run, stopped.to_str().unwrap(), &save);
    let mut stops = 0;
    for (after, signal) in [
        ("initial accuracy", "TERM"),
        ("robust accuracy after APGD-CE", "INT"),
        ("robust accuracy after APGD-T", "USR1"),
        ("robust accuracy after FAB-T", "TERM"),
        ("l2, epsilon", "INT"),
        ("robust accuracy after FAB-T", "USR1"),
        ("l1, epsilon", "TERM"),
    ] {
        let (code, text, seconds) = signaled(&arguments, after, &[signal]);
        assert_eq!(code, 75, "{after}: {text}");
        assert!(seconds < 30.0, "{after}: {seconds}");
        for part in [
            &format!("received SIG{signal}: stopping"),
            "error: stopped by signal after ",
            "hint: run the same command again to resume",
        ] {
            assert!(text.contains(part), "`{part}` is not in:\n{text}");
        }
        assert!(!stopped.join("result.json").exists());
        stops += 1;
    }
    assert_eq!(stops, 7);
    let (code, text) = advxl(&arguments);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("resuming after "), "{text}");
    assert!(read_result(&stopped) == read_result(&whole));
    let left = std::fs::read_dir(&stopped).unwrap();
    let left: Vec<PathBuf> = left.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [stopped.join("result.json")]);

    // A second signal exits immediately.
    let out = folder.path().join("twice");
    let twice = self::arguments(run, out.to_str().unwrap(), &[]);
    let (code, text, _) = signaled(&twice, "initial accuracy", &["INT", "INT"]);
    assert_eq!(code, 75, "{text}");
}

#[test]
fn a_signaled_final_evaluation_resumes_where_it_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.toml");
    let evaluation = "\n[[final_evaluation]]\nname = \"fab\"\nimages = 64\nattacks = [\"apgd-ce\", \"fab\"]\n\
                      norm = \"linf\"\nepsilon = \"1/255\"\n";
    std::fs::write(&recipe, support::RECIPE.to_owned() + evaluation).unwrap();
    let train = |out: &Path| {
        let given = [
            "train",
            recipe.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ];
        given.map(str::to_owned)
    };
    let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
    let words = train(&whole);
    let (code, text) = advxl(&words.each_ref().map(String::as_str));
    assert_eq!(code, 0, "{text}");

    let words = train(&stopped);
    let words = words.each_ref().map(String::as_str);
    let (code, text, seconds) = signaled(&words, "robust accuracy after APGD-CE", &["TERM"]);
    assert_eq!(code, 75, "{text}");
    // The time that schedulers grant; on an idle machine it takes less than 5 seconds, but tests run in parallel.
    assert!(seconds < 30.0, "{seconds}");
    assert!(text.contains("stopped by signal after "), "{text}");
    let (code, text) = advxl(&words);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("resuming after "), "{text}");
    let [one, other] = [&stopped, &whole].map(|out| {
        let mut result = read_file(&out.join("result-fab.json"));
        result.as_object_mut().unwrap().remove("model");
        result
    });
    assert!(one == other);
}

#[test]
fn damaged_progress_is_reported_and_the_evaluation_starts_over() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let run = run.to_str().unwrap();
    let file = folder.path().join("adversarial.safetensors");
    let arguments = |out: &Path, more: &[&str]| -> Vec<String> {
        let data = [
            "--data",
            "synthetic:60",
            "--attack",
            "apgd-ce,square",
            "--eps",
            "1/255",
        ];
        let few = ["--steps", "4", "--queries", "100", "--batch", "1"];
        let out = ["--out", out.to_str().unwrap()];
        let save = ["--save-adversarial", file.to_str().unwrap()];
        let parts = [&["eval", run][..], &data, &few, &out, &save, more];
        parts.concat().into_iter().map(str::to_owned).collect()
    };
    let run = |arguments: &[String]| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        advxl(&arguments)
    };
    let whole = folder.path().join("whole");
    let (code, text) = run(&arguments(&whole, &[]));
    assert_eq!(code, 0, "{text}");
    let images = std::fs::read(&file).unwrap();

    let out = folder.path().join("damaged");
    let arguments = arguments(&out, &[]);
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (code, text, _) = signaled(&words, "square - 1/", &["TERM"]);
    assert_eq!(code, 75, "{text}");
    let list = || -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&out).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let saved: Vec<(PathBuf, Vec<u8>)> = list()
        .into_iter()
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    assert_eq!(saved.len(), 2, "{saved:?}");
    for (damaged, bytes) in &saved {
        let is_state = damaged.extension().unwrap() == "progress";
        let mut kinds: Vec<Vec<u8>> = vec![Vec::new(), bytes[..bytes.len() / 2].to_vec()];
        for place in [0, 40, bytes.len() / 2, bytes.len() - 1] {
            let mut flipped = bytes.clone();
            flipped[place] ^= 0x10;
            kinds.push(flipped);
        }
        if is_state {
            // Another program's file, a longer file, and a list of 2^64 numbers with a valid hash.
            kinds.push(b"{\"outcome\":{}}".to_vec());
            kinds.push([&bytes[..], &[0; 9]].concat());
            let huge = [0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
            kinds.push([&blake3::hash(&huge).as_bytes()[..], &huge].concat());
        }
        for kind in kinds {
            for path in list() {
                std::fs::remove_file(path).unwrap();
            }
            for (path, bytes) in &saved {
                std::fs::write(path, bytes).unwrap();
            }
            std::fs::write(damaged, &kind).unwrap();
            let (code, text) = run(&arguments);
            assert_eq!(code, 0, "{text}");
            let name = damaged.file_name().unwrap().to_string_lossy();
            let warning = format!("{name}` is damaged: starting the evaluation over");
            assert!(text.contains(&warning), "{text}");
            assert!(read_result(&out) == read_result(&whole));
            assert!(std::fs::read(&file).unwrap() == images);
            assert_eq!(list().len(), 1, "only the result must remain");
        }
    }
    // Files of a process that was killed before it saved its progress are not used as images.
    for (path, bytes) in &saved {
        if path.extension().unwrap() != "progress" {
            std::fs::write(path, bytes).unwrap();
        }
    }
    std::fs::remove_file(out.join("result.json")).unwrap();
    let (code, text) = run(&arguments);
    assert_eq!(code, 0, "{text}");
    assert!(std::fs::read(&file).unwrap() == images);
}

#[test]
fn overflowing_logits_are_reported_by_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let model = run.join("model");
    // A head so large that most logits overflow.
    let path = model.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let scaled: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let mut values: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
            if name == "head.weight" {
                let largest = values
                    .iter()
                    .fold(0.0f32, |most, value| most.max(value.abs()));
                values.iter_mut().for_each(|value| *value *= 1.0 / largest);
                values.iter_mut().for_each(|value| *value *= 3e38);
            }
            let shape = view.shape().to_vec();
            (name, shape, bytemuck::cast_slice(&values).to_vec())
        })
        .collect();
    let views = scaled.iter().map(|(name, shape, bytes)| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes);
        (name.clone(), view.unwrap())
    });
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let out = folder.path().join("out");
    let attacks = "pgd,apgd-ce,apgd-dlr,apgd-t,malt,pma,fab,fab-t,square";
    for norm in ["linf", "l2", "l1"] {
        let (code, text) = advxl(&[
            "eval",
            model.to_str().unwrap(),
            "--data",
            "synthetic:24",
            "--attack",
            attacks,
            "--norm",
            norm,
            "--eps",
            "1/255",
            "--steps",
            "2",
            "--restarts",
            "1",
            "--targets",
            "2",
            "--queries",
            "3",
            "--out",
            out.to_str().unwrap(),
        ]);
        assert_eq!(code, 0, "{text}");
        assert!(
            text.contains("non-finite logits and count as misclassified"),
            "{text}"
        );
        let result = read_result(&out);
        let margins = result["margin"].as_array().unwrap();
        let bad = margins.iter().filter(|margin| margin.is_null()).count();
        assert!(bad > 0);
        let robust = result["robust"].as_array().unwrap().iter().zip(margins);
        for (robust, margin) in robust {
            assert!(!(margin.is_null() && robust.as_bool().unwrap()));
        }
        let flags = result["flags"].as_array().unwrap();
        let count = format!("{bad} of 24 images");
        let is_told = |flag: &&Value| {
            flag["check"] == "not_finite" && flag["message"].as_str().unwrap().starts_with(&count)
        };
        assert_eq!(flags.iter().filter(is_told).count(), 1, "{flags:?}");
    }
    let logits = folder.path().join("logits.safetensors");
    let output = command(&[
        "predict",
        model.to_str().unwrap(),
        "--data",
        "synthetic:24",
        "--json",
        "--out",
        logits.to_str().unwrap(),
    ])
    .output()
    .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(
        text.contains("of 24 images have non-finite logits"),
        "{text}"
    );
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(printed["not_finite"].as_u64().unwrap() > 0, "{printed}");
}

#[test]
fn unseen_attacks_are_evaluated_alone_and_resume_to_the_same_result() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let run = run.to_str().unwrap();
    let arguments = |out: &'static str, more: &[&str]| -> Vec<String> {
        let out = folder.path().join(out);
        let words = [
            &["eval", run, "--out", out.to_str().unwrap()],
            &["--data", "synthetic:30", "--attack", "clean,ua"][..],
            &["--strength", "high", "--steps", "4"],
            more,
        ];
        words.concat().into_iter().map(str::to_owned).collect()
    };
    let evaluate = |out, more: &[&str]| {
        let arguments = arguments(out, more);
        let (code, text) = advxl(&arguments.iter().map(|word| &word[..]).collect::<Vec<_>>());
        assert_eq!(code, 0, "{text}");
        (read_result(&folder.path().join(out)), text)
    };
    let (whole, text) = evaluate("whole", &["--batch", "30"]);
    assert!(
        text.contains("mean over the unseen attacks (UA2): "),
        "{text}"
    );
    assert!(text.contains("robust under all evaluations: "), "{text}");
    assert!(
        text.contains("wood, strength high (linf norm of the parameters at most 0.1)"),
        "{text}"
    );
    let (parts, _) = evaluate("parts", &["--batch", "7", "--processes", "2"]);
    assert!(parts == whole);

    let all = whole["evaluations"].as_array().unwrap();
    let names: Vec<&str> = all
        .iter()
        .map(|one| one["unseen"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        [
            "gabor",
            "snow",
            "pixel",
            "jpeg",
            "kaleidoscope",
            "glitch",
            "wood",
            "elastic"
        ]
    );
    let mut sum = 0.0;
    for one in all {
        assert!(one["norm"].is_null() && one["epsilon"].is_null());
        // Alone: every correctly classified image is attacked.
        assert_eq!(one["stages"][1]["tried"], one["stages"][0]["robust_count"]);
        let settings = &one["stages"][1]["settings"];
        assert_eq!(settings["preset"], "cifar10");
        assert_eq!(settings["steps"], 4);
        sum += one["robust_accuracy"].as_f64().unwrap();
        let broken = one["broken_by"].as_array().unwrap().iter();
        for (by, distance) in broken.zip(one["distance"].as_array().unwrap()) {
            assert_eq!(distance.is_null(), by.is_null() || by == "clean", "{by}");
        }
    }
    assert!((whole["ua2"].as_f64().unwrap() - sum / 8.0).abs() < 1e-12);

    let killed = arguments("killed", &["--batch", "7"]);
    let killed: Vec<&str> = killed.iter().map(|word| &word[..]).collect();
    let mut resumed = false;
    for lines in [6, 14, 40] {
        let mut child = command(&killed).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        for line in stderr.map(Result::unwrap).take(lines) {
            resumed |= line.contains("resuming after");
        }
        let _ = child.kill();
        child.wait().unwrap();
    }
    assert!(evaluate("killed", &["--batch", "7"]).0 == whole);
    assert!(resumed, "no kill during the evaluation");
}

#[test]
fn settings_that_unseen_attacks_do_not_have_are_refused() {
    let refused = |more: &[&str], message: &str, hint: &str| {
        let (code, text) = advxl(&[&["eval", ".", "--data", "synthetic:4"], more].concat());
        assert_eq!(code, 2, "{text}");
        assert!(
            text.contains(message) && text.contains(hint),
            "{more:?}: {text}"
        );
    };
    let strength = "--strength selects theirs";
    let eps = "--eps has no effect on unseen attacks";
    refused(&["--attack", "gabor", "--eps", "8/255"], eps, strength);
    let norm = "--norm has no effect on unseen attacks";
    refused(&["--attack", "clean,ua", "--norm", "l2"], norm, strength);
    let size = "--step-size has no effect on unseen attacks";
    refused(&["--attack", "wood", "--step-size", "0.1"], size, strength);
    let alone = "--strength has no effect without unseen attacks";
    let pgd = ["--attack", "pgd", "--eps", "8/255", "--strength", "low"];
    refused(&pgd, alone, "--attack ua");
    refused(
        &["--attack", "gabr"],
        "unknown attack `gabr`",
        "did you mean `gabor`?",
    );
    refused(
        &["--attack", "xyzw"],
        "unknown attack `xyzw`",
        "elastic, ua",
    );
    refused(
        &["--attack", "ua,snow"],
        "`snow` is given twice",
        "`ua` means all",
    );
    refused(&["--attack", "pgd,snow"], "--eps is missing", "8/255");
}

/// An evaluation whose gradient attacks are weak, so that fab-t and square find more.
const FAST: &str =
    "--data synthetic:600 --norm l1 --eps 2 --steps 3 --targets 1 --queries 300 --seed 3";

/// Runs an evaluation with [`FAST`] and returns its result and standard error.
fn fast(run: &Path, out: &Path, more: &str) -> (Value, String) {
    let more = more.split(' ').chain(FAST.split(' '));
    let words = [
        "eval",
        run.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    let words: Vec<&str> = words.into_iter().chain(more).collect();
    let (code, text) = advxl(&words);
    assert_eq!(code, 0, "{text}");
    (read_result(out), text)
}

/// Returns the names of the attacks that fooled the model, per image; empty if none did.
fn broken_by(result: &Value) -> Vec<&str> {
    let names = result["broken_by"].as_array().unwrap().iter();
    names
        .map(|name| name.as_str().unwrap_or_default())
        .collect()
}

#[test]
fn the_fast_version_differs_from_the_standard_version_only_in_images_outside_the_sample() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let evaluate = |name: &str, more: &str| fast(&run, &folder.path().join(name), more);
    let (standard, text) = evaluate("standard", "--attack autoattack");
    assert!(!text.contains("fast") && standard["bound"].is_null());
    let (found, text) = evaluate("fast", "--attack autoattack --version fast --bound 1");
    let bound = &found["bound"];
    let number = |key: &str| bound[key].as_u64().unwrap() as usize;
    let (sampled, of, fooled) = (number("sampled"), number("of"), number("fooled"));
    let stages = found["stages"].as_array().unwrap();
    for (index, stage) in stages.iter().enumerate().take(3) {
        assert_eq!(*stage, standard["stages"][index]);
    }
    assert_eq!(stages[2]["robust_count"], of);
    assert_eq!(stages[3]["tried"], sampled);
    assert!(0 < sampled && sampled < of, "{bound}");
    assert_eq!(bound["confidence"], 0.95);
    assert_eq!(found["version"], "autoattack fast");

    // Verdicts of the sample are those of the standard version; the other survivors of apgd-t count as robust.
    let (fast, full) = (broken_by(&found), broken_by(&standard));
    let is_last = |name: &str| ["fab-t", "square"].contains(&name);
    let missed = fast.iter().zip(&full).filter(|(one, other)| {
        assert!(
            one == other || (one.is_empty() && is_last(other)),
            "{one} {other}"
        );
        one != other
    });
    let missed = missed.count();
    assert_eq!(fast.iter().filter(|name| is_last(name)).count(), fooled);
    let robust = |result: &Value| result["robust_accuracy"].as_f64().unwrap();
    let lower = 100.0 * (robust(&found) - robust(&standard));
    assert!((lower - 100.0 * missed as f64 / 600.0).abs() < 1e-9);
    assert!(fooled + missed > 0, "no image was left to fab-t and square");
    // True with 95 % probability, and for this seed.
    let points = bound["points"].as_f64().unwrap();
    assert!(lower <= points + 1e-9, "{lower} {bound}");

    let share = 100.0 * robust(&found);
    for line in [
        "l1, epsilon 2: apgd-ce, apgd-t, then on a sample fab-t, square (autoattack fast)",
        &format!("fab-t, square: on a random sample of {sampled} of the {of} remaining images"),
        &format!(
            "autoattack fast: robust {share:.1} %; the full standard version would be at most "
        ),
        &format!(", sample of {sampled})"),
    ] {
        assert!(text.contains(line), "`{line}` is missing in\n{text}");
    }
    let last = text.trim_end().lines().last().unwrap();
    assert!(last.contains("points lower (95 %)"), "{last}");

    // Neither batch size nor ranks change the sample.
    let more = "--attack autoattack --version fast --bound 1 --batch 7 --threads 1";
    assert!(evaluate("seven", more).0 == found);
    let out = folder.path().join("ranks");
    let words = [
        "eval",
        run.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ];
    let more = "--attack autoattack --version fast --bound 1 --batch 5".split(' ');
    let words: Vec<&str> = words
        .into_iter()
        .chain(more)
        .chain(FAST.split(' '))
        .collect();
    done(launched(3, &words));
    assert!(read_result(&out) == found);

    // Another bound is another evaluation, with a larger sample; by name, attacks run on all images.
    let (closer, _) = evaluate("closer", "--attack autoattack --version fast --bound 0.5");
    assert!(closer["bound"]["sampled"].as_u64().unwrap() > sampled as u64);
    assert_ne!(closer["fingerprints"], found["fingerprints"]);
    let (named, _) = evaluate("named", "--attack apgd-ce,apgd-t,fab-t --version fast");
    let (by_name, _) = evaluate("by_name", "--attack apgd-ce,apgd-t,fab-t");
    assert!(named == by_name);
    // A sample of no image, if fooling all of them would not lower accuracy by more.
    let (none, text) = evaluate("none", "--attack autoattack --version fast --bound 100");
    assert_eq!(none["bound"]["sampled"], 0);
    assert_eq!(none["stages"][4]["tried"], 0);
    assert_eq!(
        none["robust_accuracy"],
        none["stages"][2]["robust_accuracy"]
    );
    assert!(text.contains("on a random sample of 0 of the "), "{text}");
}

#[test]
fn the_fast_version_in_several_norms_adds_its_bounds_and_has_a_curve() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let out = folder.path().join("out");
    let more = ["--version", "fast", "--bound", "8", "--eps-curve"];
    let (code, text) = advxl(&arguments(
        run.to_str().unwrap(),
        out.to_str().unwrap(),
        &more,
    ));
    assert_eq!(code, 0, "{text}");
    let result = read_result(&out);
    let evaluations = result["evaluations"].as_array().unwrap();
    let points = |result: &Value| result["bound"]["points"].as_f64().unwrap();
    let sum: f64 = evaluations.iter().map(points).sum();
    assert!((points(&result) - sum).abs() < 1e-9);
    assert_eq!(result["bound"]["confidence"], 0.85);
    assert!(evaluations.iter().all(|one| one["curve"].is_array()));
    let last = text.trim_end().lines().last().unwrap();
    assert!(last.starts_with("robust under all norms: "), "{last}");
    assert!(last.ends_with(" points lower (85 %)"), "{last}");
}

#[test]
fn a_stopped_fast_evaluation_resumes_with_the_same_sample() {
    let folder = tempfile::tempdir().unwrap();
    let run = trained(folder.path());
    let more = "--attack autoattack --version fast --bound 0.5 --queries 4000 --batch 6";
    let start = |out: &Path| -> Vec<String> {
        let words = [
            "eval",
            run.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ];
        let settings = FAST.replace(" --queries 300", "");
        let more = more.split(' ').chain(settings.split(' '));
        words.into_iter().chain(more).map(str::to_owned).collect()
    };
    let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
    let words = start(&whole);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (code, text) = advxl(&words);
    assert_eq!(code, 0, "{text}");
    let words = start(&stopped);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    for after in [
        "initial accuracy",
        "robust accuracy after APGD-T",
        "fab-t - 1/",
        "square - 1/",
    ] {
        let (code, text, _) = signaled(&words, after, &["TERM"]);
        assert_eq!(code, 75, "{after}: {text}");
    }
    let (code, text) = advxl(&words);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("resuming after "), "{text}");
    assert!(read_result(&stopped) == read_result(&whole));
}

#[test]
fn settings_of_the_fast_version_without_effect_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (more, message) in [
        (
            "--attack autoattack --bound 1",
            "--bound requires --version fast",
        ),
        (
            "--attack autoattack --version plus --bound 1",
            "--bound requires --version fast",
        ),
        (
            "--attack apgd-ce,apgd-t --version fast --bound 1",
            "--bound has no effect without autoattack in --attack",
        ),
        (
            "--attack autoattack --version fast --bound 0",
            "--bound must be above 0 and at most 100, got 0",
        ),
        (
            "--attack autoattack --version fast --bound=-3",
            "--bound must be above 0 and at most 100, got -3",
        ),
        (
            "--attack autoattack --version fast --bound 100.5",
            "--bound must be above 0 and at most 100, got 100.5",
        ),
        (
            "--attack autoattack --version fast --bound nan",
            "--bound must be above 0 and at most 100, got NaN",
        ),
        (
            "--attack autoattack,malt --version fast",
            "with --version fast, `malt` after autoattack would run on a sample only",
        ),
        (
            "--attack autoattack --version quick",
            "standard, plus, rand",
        ),
    ] {
        let more = more.split(' ').chain(FAST.split(' '));
        let words = ["eval", folder.path().to_str().unwrap()];
        let words: Vec<&str> = words.into_iter().chain(more).collect();
        let (code, text) = advxl(&words);
        assert_eq!(code, 2, "{text}");
        assert!(text.contains(message), "`{message}` is not in\n{text}");
    }
}
