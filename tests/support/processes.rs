//! Programs in several processes, and faults injected into them.
#![allow(dead_code)] // Not every test file needs all of it.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::{RECIPE, command};

pub const ADVXL: &str = env!("CARGO_BIN_EXE_advxl");
/// The longest time that a fault may cost.
pub const A_MINUTE: Duration = Duration::from_secs(60);

/// Returns an `mpirun` command with its own arguments and those of a program.
pub fn mpirun(arguments: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    // Tests run as root in containers, and on two processors.
    command.envs([
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_hwloc_base_binding_policy", "none"),
        // Seconds between SIGTERM and SIGKILL, enough to write a checkpoint; after a fault, mpirun always waits for all
        // of them.
        ("OMPI_MCA_odls_base_sigkill_timeout", "4"),
    ]);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Returns the command for `count` processes, started by the program's own launcher.
pub fn launched(count: usize, arguments: &[&str]) -> Command {
    let count = count.to_string();
    let launch = ["--processes", &count, "--threads", "1"];
    command(&[arguments, &launch].concat())
}

/// Returns the command for `count` processes, started by `mpirun`.
pub fn processes(count: usize, arguments: &[&str]) -> Command {
    if count == 1 {
        return command(arguments);
    }
    let count = count.to_string();
    let launch = ["-n", &count, ADVXL];
    mpirun(&[&launch[..], arguments, &["--threads", "1"]].concat())
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn stderr_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn succeed(count: usize, arguments: &[&str]) -> Output {
    done(processes(count, arguments))
}

/// Runs a command and asserts that it succeeds.
pub fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        stderr_of(&output)
    );
    output
}

/// Trains in one, two and four processes, and resumes runs with other numbers of processes in the middle of each stage.
pub fn train_and_resume(start: fn(usize, &[&str]) -> Command) {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "recipe", &[("keep = 3", "keep = 9")]);
    let out = |name: &str| folder.path().join(name);
    for count in [1, 2, 4] {
        let run = out(&count.to_string());
        done(start(count, &train(&recipe, &run)));
        assert!(made(&run) == made(&out("1")), "{count} processes");
        let log = |run: &Path| {
            let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
            let lines = metrics.lines().map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).unwrap();
                ["loss", "gradient_norm", "train_accuracy", "evaluation"]
                    .map(|key| line[key].to_string())
            });
            lines.collect::<Vec<_>>()
        };
        assert_eq!(log(&run), log(&out("1")), "{count} processes");
    }
    for (before, after, checkpoint) in [
        (1, 4, 64),
        (4, 2, 128),
        (2, 1, 256),
        (4, 1, 192),
        (2, 4, 256),
    ] {
        let run = out(&format!("{before} to {after}"));
        let from = out(&before.to_string());
        std::fs::create_dir_all(run.join("checkpoints")).unwrap();
        let mut files = vec!["recipe.toml".to_owned()];
        files.push(format!("checkpoints/{checkpoint:012}.safetensors"));
        for file in &files {
            std::fs::copy(from.join(file), run.join(file)).unwrap();
        }
        if checkpoint >= 192 {
            std::fs::create_dir_all(run.join("stages/pretrain")).unwrap();
            let file = "stages/pretrain/model.safetensors";
            std::fs::copy(from.join(file), run.join(file)).unwrap();
        }
        done(start(after, &train(&recipe, &run)));
        assert!(made(&run) == made(&out("1")), "{before} to {after}");
    }
}

/// Asserts that a command fails with a code and a message.
pub fn fail(mut command: Command, code: i32, parts: &[&str]) {
    let begun = Instant::now();
    let output = command.output().unwrap();
    let stderr = stderr_of(&output);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "`{part}` is not in:\n{stderr}");
    }
    assert!(begun.elapsed() < A_MINUTE);
}

/// Writes the recipe with a table and other changes to a file.
pub fn recipe(folder: &Path, name: &str, changes: &[(&str, &str)]) -> PathBuf {
    let mut recipe = RECIPE.replace(
        "precision = \"f32\"",
        "precision = \"f32\"\nparallel = { shards = 4, reduce = \"exact\" }",
    );
    for (from, to) in changes {
        assert!(recipe.contains(from), "{from}");
        recipe = recipe.replace(from, to);
    }
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, recipe).unwrap();
    path
}

/// A second stage so long that a fault comes before its end, and a checkpoint every hundred updates.
pub const LONG: [(&str, &str); 3] = [
    ("samples = 128 }]", "samples = 3_200_000 }]"),
    ("every_samples = 128", "every_samples = 3_200_000"),
    ("every_samples = 64", "every_samples = 3200"),
];

pub fn train<'a>(recipe: &'a Path, out: &'a Path) -> [&'a str; 4] {
    ["train", text(recipe), "--out", text(out)]
}

/// Reads the results of training: the last checkpoint holds weights, moments, average and counters.
pub fn made(out: &Path) -> [Vec<u8>; 3] {
    [
        "checkpoints/000000000320.safetensors",
        "stages/pretrain/model.safetensors",
        "model/model.safetensors",
    ]
    .map(|file| std::fs::read(out.join(file)).unwrap())
}

/// Returns the number of metrics lines that a run has written.
pub fn lines(run: &Path) -> usize {
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl"));
    metrics.unwrap_or_default().lines().count()
}

/// Waits until a run has written `wanted` lines of metrics.
pub fn wait_for(wanted: usize, run: &Path, child: &mut Child) {
    let begun = Instant::now();
    loop {
        if lines(run) >= wanted {
            return;
        }
        assert!(child.try_wait().unwrap().is_none(), "ended too early");
        assert!(begun.elapsed() < A_MINUTE, "does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns the processes of a run, in the order of their ranks.
pub fn of_run(run: &Path) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(id) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let read = |name: &str| std::fs::read(format!("/proc/{id}/{name}")).unwrap_or_default();
        let command = read("cmdline");
        let arguments: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
        let environment = read("environ");
        let rank = environment.split(|byte| *byte == 0).find_map(|entry| {
            let of_mpi = entry.strip_prefix(b"OMPI_COMM_WORLD_RANK=");
            of_mpi.or_else(|| entry.strip_prefix(b"RANK="))
        });
        if let (true, Some(rank)) = (arguments.contains(&text(run).as_bytes()), rank) {
            let rank: usize = String::from_utf8_lossy(rank).parse().unwrap();
            found.push((rank, id));
        }
    }
    found.sort_unstable();
    found.into_iter().map(|(_, id)| id).collect()
}

pub fn signal(name: &str, process: u32) {
    assert!(try_signal(name, process));
}

/// Returns whether the process got the signal, which one that has ended does not.
pub fn try_signal(name: &str, process: u32) -> bool {
    let process = process.to_string();
    let done = Command::new("kill")
        .args([&format!("-{name}"), &process])
        .stderr(Stdio::null())
        .status();
    done.unwrap().success()
}

/// Starts a long run and calls `disturb` on its processes once the stage has a checkpoint. Returns its exit code and
/// standard error.
pub fn disturbed(
    command: Command,
    run: &Path,
    disturb: impl FnOnce(&[u32], &Child),
) -> (i32, String) {
    disturbed_after(120, command, run, disturb)
}

/// Like [`disturbed`], once the run has written `wanted` more lines of metrics.
pub fn disturbed_after(
    wanted: usize,
    mut command: Command,
    run: &Path,
    disturb: impl FnOnce(&[u32], &Child),
) -> (i32, String) {
    let before = lines(run);
    let mut child = command
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).unwrap();
        text
    });
    wait_for(before + wanted, run, &mut child);
    disturb(&of_run(run), &child);
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > A_MINUTE {
            let _ = child.kill();
            panic!("hangs; stderr:\n{}", reader.join().unwrap());
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let code = status.code().unwrap_or(-1);
    assert!(of_run(run).is_empty(), "a process is still running");
    (code, reader.join().unwrap())
}

/// Returns the file name of the newest checkpoint.
pub fn newest(run: &Path) -> String {
    let folder = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let names = folder.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names
        .filter(|name| name.ends_with(".safetensors"))
        .max()
        .unwrap()
}
