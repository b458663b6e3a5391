//! Several processes of one run over MPI: the same results for any number of processes, and failures of processes.
//!
//! Needs `mpirun`. All processes run on this machine, more than it has processors.
#![cfg(feature = "mpi")]

mod support;

use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use support::processes::*;

#[test]
fn one_two_and_four_processes_train_to_the_same_bits_and_resume_where_others_stopped() {
    train_and_resume(processes);
}

#[test]
fn captions_are_compared_with_the_images_of_all_processes() {
    let folder = tempfile::tempdir().unwrap();
    let stage = |name: &str, of_text: &str, attack: &str| {
        format!(
            r#"
[[stage]]
name = "{name}"
batch = 32
phases = [{{ image_size = 16, samples = 96 }}]
{attack}
objective = {{ kind = "contrastive" }}
text = {{ {of_text}, templates = ["a {{}}"] }}
optimizer = {{ kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95], clip_norm = 1.0 }}
learning_rate = {{ peak = 1e-3, warmup_samples = 32, decay = "cosine" }}
augmentation = {{ flip = false }}
"#
        )
    };
    let new = "new = { context = 12, width = 32, depth = 1, heads = 2, embedding = 24 }";
    let attack = "attack = { norm = \"linf\", epsilon = \"8/255\", step_size = \"8/255\", steps = 1, start = \"random\" }";
    let whole = recipe(folder.path(), "whole", &[]);
    let whole = std::fs::read_to_string(whole).unwrap();
    let head = &whole[..whole.find("[[stage]]").unwrap()];
    let path = folder.path().join("captions.toml");
    let stages = stage("clip", new, "") + &stage("pretrain", "from = \"clip\"", attack);
    std::fs::write(&path, head.to_owned() + &stages).unwrap();
    let mut all = Vec::new();
    for count in [1, 2, 4] {
        let run = folder.path().join(count.to_string());
        succeed(count, &train(&path, &run));
        let files = [
            "checkpoints/000000000192.safetensors",
            "stages/clip/text/open_clip_model.safetensors",
        ];
        all.push(files.map(|file| std::fs::read(run.join(file)).unwrap()));
    }
    assert!(all[0] == all[1] && all[0] == all[2]);
}

#[test]
fn fast_sums_differ_only_by_rounding() {
    let folder = tempfile::tempdir().unwrap();
    let changes = [
        ("\"exact\"", "\"fast\""),
        // One update without an attack, because the sign of a gradient near 0 turns rounding into a whole step.
        (
            "samples = 128, masking = { kind = \"random\", ratio = 0.5 } }, { image_size = 16, samples = 64 }]",
            "samples = 32 }]",
        ),
        ("warmup_samples = 64", "warmup_samples = 32"),
        ("steps = 1, start", "steps = 0, start"),
    ];
    let whole = recipe(folder.path(), "fast", &[]);
    let mut text = std::fs::read_to_string(&whole).unwrap();
    for (from, to) in changes {
        text = text.replace(from, to);
    }
    let text: String = text
        .lines()
        .filter(|line| {
            !line.starts_with(
                "attack = { norm = \"linf\", epsilon = \"8/255\", step_size = \"8/255\"",
            )
        })
        .map(|line| format!("{line}\n"))
        .collect();
    let text = &text[..text.rfind("[[stage]]").unwrap()];
    std::fs::write(&whole, text).unwrap();
    let weights = |count: usize| {
        let run = folder.path().join(count.to_string());
        succeed(count, &train(&whole, &run));
        let bytes = std::fs::read(run.join("checkpoints/000000000032.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        // Compare the first moment, a tenth of the gradient, since Adam's first step is a sign, too.
        let mut named = tensors.tensors();
        named.retain(|(name, _)| name.starts_with("first_moment."));
        named.sort_by(|(a, _), (b, _)| a.cmp(b));
        let floats = named
            .iter()
            .map(|(_, view)| bytemuck::pod_collect_to_vec::<u8, f32>(view.data()));
        floats.collect::<Vec<_>>()
    };
    let alone = weights(1);
    for count in [2, 4] {
        for (found, right) in weights(count).iter().zip(&alone) {
            let most = right
                .iter()
                .fold(0.0f32, |most, value| most.max(value.abs()));
            for (found, right) in found.iter().zip(right) {
                assert!((found - right).abs() <= 4e-6 * most, "{found} {right}");
            }
        }
    }
}

#[test]
fn evaluation_and_data_tools_give_the_same_files_in_any_number_of_processes() {
    let folder = tempfile::tempdir().unwrap();
    let run = support::trained(folder.path());
    let path = |name: &str| folder.path().join(name);

    let evaluate = "--data synthetic:50 --attack pgd,square --eps 4/255 --steps 3 --queries 20 --batch 8 --seed 3";
    let evaluate: Vec<&str> = evaluate.split(' ').collect();
    let judged = |count: usize| {
        let (out, images) = (
            path(&format!("eval{count}")),
            path(&format!("images{count}.safetensors")),
        );
        let given = [
            "eval",
            text(&run),
            "--out",
            text(&out),
            "--save-adversarial",
            text(&images),
        ];
        succeed(count, &[&given[..], &evaluate].concat());
        let result = std::fs::read(out.join("result.json")).unwrap();
        let result: serde_json::Value = serde_json::from_slice(&result).unwrap();
        let images = std::fs::read(images).unwrap();
        (
            [
                "robust",
                "broken_by",
                "distance",
                "margin",
                "flags",
                "images_hash",
            ]
            .map(|key| result[key].clone()),
            images,
        )
    };
    let alone = judged(1);
    assert!(!alone.0[0].is_null() && !alone.0[2].is_null());
    assert!(judged(2) == alone);
    assert!(judged(3) == alone);

    let packed = |count: usize| {
        let out = path(&format!("packed{count}.safetensors"));
        let given = [
            "data",
            "pack",
            "synthetic:150@40",
            "--image-size",
            "24",
            "--out",
            text(&out),
        ];
        succeed(count, &given);
        std::fs::read(out).unwrap()
    };
    assert!(packed(2) == packed(1) && packed(4) == packed(1));

    let images = path("images/a");
    std::fs::create_dir_all(&images).unwrap();
    std::fs::create_dir_all(path("images/b")).unwrap();
    std::fs::write(path("images/b/empty.png"), b"").unwrap();
    let good = include_bytes!("golden/jpeg.safetensors");
    for number in 0..30 {
        std::fs::write(images.join(format!("{number:02}.jpg")), &good[..number]).unwrap();
    }
    let checked = |count: usize| {
        let out = path(&format!("broken{count}.jsonl"));
        let given =
            ["data", "check", text(&path("images")), "--out", text(&out)].map(str::to_owned);
        let given: Vec<&str> = given.iter().map(String::as_str).collect();
        let output = processes(count, &given).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr_of(&output));
        let table = String::from_utf8_lossy(&output.stdout).into_owned();
        let table = table.split_once('\n').unwrap().1.to_owned();
        (table, std::fs::read_to_string(out).unwrap())
    };
    assert_eq!(checked(2), checked(1));
}

#[test]
fn killed_stopped_and_signaled_processes_end_the_run_and_cost_only_the_last_updates() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "long", &LONG);
    let run = folder.path().join("run");

    let (code, _) = disturbed(processes(2, &train(&recipe, &run)), &run, |ranks, _| {
        signal("KILL", ranks[1])
    });
    assert_eq!(code, 137);
    let (code, stderr) = disturbed(processes(2, &train(&recipe, &run)), &run, |ranks, _| {
        signal("STOP", ranks[1])
    });
    assert_eq!(code, 75, "{stderr}");
    assert!(stderr.contains("process 1 on"), "{stderr}");
    assert!(stderr.contains("sent no heartbeat for 20 s"), "{stderr}");
    assert!(stderr.contains("resuming after"), "{stderr}");

    // A scheduler signals one process, or the launcher.
    let before = newest(&run);
    let (code, stderr) = disturbed(processes(2, &train(&recipe, &run)), &run, |ranks, _| {
        signal("USR1", ranks[1])
    });
    assert_eq!(code, 75, "{stderr}");
    assert!(stderr.contains("stopped by signal after"), "{stderr}");
    let after = newest(&run);
    assert!(after > before);
    let (code, stderr) = disturbed(processes(2, &train(&recipe, &run)), &run, |_, launcher| {
        signal("TERM", launcher.id())
    });
    assert!(stderr.contains("stopped by signal after"), "{stderr}");
    assert_ne!(code, 0);
    assert!(newest(&run) > after);

    // One process and two processes resume the newest checkpoint to the same result.
    let finished = |count: usize| {
        let out = folder.path().join(format!("finished{count}"));
        std::fs::create_dir_all(out.join("checkpoints")).unwrap();
        let file = format!("checkpoints/{}", newest(&run));
        for file in ["recipe.toml", &file] {
            std::fs::copy(run.join(file), out.join(file)).unwrap();
        }
        let samples: u64 = newest(&run)
            .trim_end_matches(".safetensors")
            .parse()
            .unwrap();
        // The previous stage ends at 192 samples.
        let end = format!(
            "stage.finetune.phases=[{{ image_size = 32, samples = {} }}]",
            samples + 320 - 192
        );
        let short = ["--accept-changes", "--set", &end];
        succeed(count, &[&train(&recipe, &out)[..], &short].concat());
        std::fs::read(out.join("stages/finetune/model.safetensors")).unwrap()
    };
    assert!(finished(1) == finished(2));
}

#[test]
fn an_evaluation_in_two_processes_stops_when_one_is_signaled_and_resumes_in_any_number() {
    let folder = tempfile::tempdir().unwrap();
    let run = support::trained(folder.path());
    let evaluate = "--data synthetic:60 --attack apgd-t,square --eps 1/255 --steps 20 --targets 9 --queries 2000 --seed 3";
    let evaluate: Vec<&str> = evaluate.split(' ').collect();
    let arguments = |out: &Path| -> Vec<String> {
        let given = ["eval", text(&run), "--out", text(out)];
        let all = [&given[..], &evaluate].concat();
        all.into_iter().map(str::to_owned).collect()
    };
    let (whole, stopped) = (folder.path().join("whole"), folder.path().join("stopped"));
    let words = arguments(&whole);
    succeed(1, &words.iter().map(String::as_str).collect::<Vec<_>>());

    let words = arguments(&stopped);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut child = processes(2, &words).stderr(Stdio::piped()).spawn().unwrap();
    let (mut stderr, mut sent) = (String::new(), None);
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        // Early, so that work is left when the signal arrives.
        if sent.is_none() && line.contains("initial accuracy") {
            signal("USR1", of_run(&stopped)[1]);
            sent = Some(Instant::now());
        }
        stderr += &format!("{line}\n");
    }
    let code = child.wait().unwrap().code();
    assert_eq!(code, Some(75), "{stderr}");
    assert!(
        stderr.contains("error: stopped by signal after "),
        "{stderr}"
    );
    // The time that schedulers grant; on an idle machine it takes a few seconds.
    assert!(
        sent.unwrap().elapsed() < Duration::from_secs(30),
        "{stderr}"
    );
    succeed(1, &words);
    let result = |out: &Path| -> serde_json::Value {
        let mut result: serde_json::Value =
            serde_json::from_slice(&std::fs::read(out.join("result.json")).unwrap()).unwrap();
        for stage in result["stages"].as_array_mut().unwrap() {
            stage.as_object_mut().unwrap().remove("seconds");
        }
        result
    };
    assert!(result(&stopped) == result(&whole));
}

/// Flips one bit at every place in a process's memory that holds `bytes`. Returns the number of places, 0 if the
/// process has ended.
fn flip(process: u32, bytes: &[u8]) -> usize {
    if !try_signal("STOP", process) {
        return 0;
    }
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap_or_default();
    let memory = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{process}/mem"));
    let Ok(mut memory) = memory else {
        return 0;
    };
    let mut flipped = 0;
    for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
        let (begin, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let at = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (begin, end) = (at(begin), at(end));
        let mut held = Vec::new();
        memory.seek(SeekFrom::Start(begin)).unwrap();
        // Parts of it may be unreadable.
        let _ = (&mut memory).take(end - begin).read_to_end(&mut held);
        for place in (0..held.len().saturating_sub(bytes.len())).step_by(4) {
            if held[place..].starts_with(bytes) {
                memory.seek(SeekFrom::Start(begin + place as u64)).unwrap();
                memory.write_all(&[bytes[0] ^ 1]).unwrap();
                flipped += 1;
            }
        }
    }
    try_signal("CONT", process);
    flipped
}

#[test]
fn a_flipped_bit_of_a_weight_is_detected_immediately() {
    let folder = tempfile::tempdir().unwrap();
    // The weights do not change, so a checkpoint has the bytes to search for in memory.
    let still = [
        ("peak = 5e-4", "peak = 1e-30"),
        ("end = 1e-5", "end = 0.0"),
        ("weight_decay = 0.05", "weight_decay = 0.0"),
    ];
    let recipe = recipe(folder.path(), "still", &[&LONG[..], &still].concat());
    let run = folder.path().join("run");
    let (code, stderr) = disturbed(processes(2, &train(&recipe, &run)), &run, |ranks, _| {
        let bytes = std::fs::read(run.join("checkpoints").join(newest(&run))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let weights = tensors.tensor("weights.patch_embed.proj.weight").unwrap();
        assert!(flip(ranks[1], &weights.data()[..64]) > 0);
        // A bit that is flipped between the check and the all-gather is overwritten before the weight is used: once
        // more.
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(300));
            flip(ranks[1], &weights.data()[..64]);
        }
    });
    assert_eq!(code, 75, "{stderr}");
    assert!(stderr.contains("weights differ between ranks"), "{stderr}");
}

#[test]
fn mismatched_processes_are_refused_before_anything_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let one = recipe(folder.path(), "one", &[]);
    let other = recipe(folder.path(), "other", &[("peak = 1e-3", "peak = 2e-3")]);
    let run = folder.path().join("run");
    let with = |program: &str, recipe: &Path| {
        let words = [
            "-n",
            "1",
            program,
            "train",
            text(recipe),
            "--out",
            text(&run),
        ];
        words.map(str::to_owned).to_vec()
    };
    let both = |first: Vec<String>, second: Vec<String>| {
        let words = [first, vec![":".into()], second].concat();
        mpirun(&words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let parts = [
        "process 1 of 2",
        "has a different recipe than process 0",
        "stage.0.learning_rate.peak",
    ];
    fail(both(with(ADVXL, &one), with(ADVXL, &other)), 2, &parts);

    let changed = folder.path().join("advxl");
    let mut bytes = std::fs::read(ADVXL).unwrap();
    bytes.push(0);
    std::fs::write(&changed, bytes).unwrap();
    std::fs::set_permissions(&changed, std::fs::metadata(ADVXL).unwrap().permissions()).unwrap();
    let parts = ["process 1 of 2", "has a different binary than process 0"];
    fail(
        both(with(ADVXL, &one), with(text(&changed), &one)),
        2,
        &parts,
    );

    let parts = [
        "8 processes cannot share batches of 4 shards",
        "parallel = { shards = 8",
    ];
    fail(processes(8, &train(&one, &run)), 2, &parts);
    let three = ["3 processes cannot share batches of 4 shards"];
    fail(processes(3, &train(&one, &run)), 2, &three);
    let missing = folder.path().join("missing.toml");
    fail(processes(2, &train(&missing, &run)), 2, &["cannot read"]);
    fail(
        processes(2, &["inspect", text(&one)]),
        2,
        &["runs in one process, but 2 were started"],
    );
    assert!(!run.exists());
}

#[test]
fn a_full_disk_in_the_writing_process_ends_all_processes_with_its_message() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "recipe", &[]);
    let run = folder.path().join("run");
    let words = |count: &str, limit: &str| {
        let script = format!("trap '' XFSZ; {limit} exec \"$@\"");
        let words = ["-n", count, "bash", "-c", &script, "bash", ADVXL];
        [&words[..], &train(&recipe, &run)]
            .concat()
            .iter()
            .map(|word| (*word).to_owned())
            .collect::<Vec<_>>()
    };
    // A checkpoint takes about 300 KB.
    let all = [
        words("1", "ulimit -f 64;"),
        vec![":".into()],
        words("1", ""),
    ]
    .concat();
    let full = mpirun(&all.iter().map(String::as_str).collect::<Vec<_>>());
    fail(full, 1, &["process 0 of 2", "cannot write"]);
    let left = std::fs::read_dir(run.join("checkpoints")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "an incomplete checkpoint must not be kept");
    succeed(2, &train(&recipe, &run));
    succeed(1, &train(&recipe, &folder.path().join("alone")));
    assert!(made(&run) == made(&folder.path().join("alone")));
}
