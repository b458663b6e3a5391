//! Several processes of one run without MPI, started with `--processes` or by hand with torchrun's variables.
//!
//! All run on this machine, more than it has processors. `tests/distributed.rs` tests the same over MPI, and more
//! failures.

mod support;

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use support::command;
use support::processes::*;

/// Returns a port that is currently free.
fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

/// Returns the command of a rank as torchrun starts it, which waits only seconds for other ranks.
fn rank(rank: &str, world_size: &str, port: &str, arguments: &[&str]) -> Command {
    let mut command = command(&[arguments, &["--threads", "1"]].concat());
    command.envs([
        ("RANK", rank),
        ("WORLD_SIZE", world_size),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
        ("ADVXL_RENDEZVOUS_TIMEOUT", "20"),
    ]);
    command.stdin(Stdio::null());
    command
}

/// Runs commands concurrently.
fn at_once(commands: Vec<Command>) -> Vec<Output> {
    let start = |mut command: Command| {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let started: Vec<Child> = commands.into_iter().map(start).collect();
    let ended = started.into_iter();
    ended
        .map(|child| child.wait_with_output().unwrap())
        .collect()
}

/// Asserts that all commands fail with a code and a message.
fn all_fail(commands: Vec<Command>, code: i32, part: &str) {
    let begun = Instant::now();
    for output in at_once(commands) {
        let stderr = stderr_of(&output);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(part), "`{part}` is not in:\n{stderr}");
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "{part}");
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < A_MINUTE, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn one_two_and_four_processes_train_to_the_same_bits_and_resume_with_other_numbers_of_processes() {
    train_and_resume(launched);
}

#[test]
fn ranks_started_by_hand_with_torchruns_variables_train_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "recipe", &[]);
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    let mut single = launched(1, &train(&recipe, &one));
    // As set by torchrun for a run with one process.
    single.env("WORLD_SIZE", "1");
    done(single);
    let port = free_port();
    let start = |number| rank(number, "2", &port, &train(&recipe, &two));
    for output in at_once(vec![start("1"), start("0")]) {
        assert!(output.status.success(), "{}", stderr_of(&output));
    }
    assert!(made(&one) == made(&two));
}

#[test]
fn evaluation_and_data_tools_share_their_work_and_print_once() {
    let folder = tempfile::tempdir().unwrap();
    let run = support::trained(folder.path());
    let path = |name: &str| folder.path().join(name);
    let judged = |count: usize| {
        let out = path(&format!("eval{count}"));
        let given = ["eval", text(&run), "--out", text(&out), "--json"];
        let evaluate =
            "--data synthetic:30 --attack pgd,square --eps 4/255 --steps 3 --queries 20 --batch 8";
        let evaluate: Vec<&str> = evaluate.split(' ').collect();
        let output = done(launched(count, &[&given[..], &evaluate].concat()));
        let printed = String::from_utf8(output.stdout).unwrap();
        let last: serde_json::Value =
            serde_json::from_str(printed.lines().last().unwrap()).unwrap();
        assert_eq!(
            printed.lines().filter(|line| line.starts_with('{')).count(),
            1
        );
        last["robust_accuracy"].clone()
    };
    assert!(judged(1) == judged(3));

    let packed = |count: usize| {
        let out = path(&format!("packed{count}.safetensors"));
        let spec = "synthetic:150@40";
        let given = ["data", "pack", spec, "--image-size", "24", "--out"];
        done(launched(count, &[&given[..], &[text(&out)]].concat()));
        std::fs::read(out).unwrap()
    };
    assert!(packed(2) == packed(1));

    let exchange = ["bench", "exchange", "--parameters", "300000"];
    let output = done(launched(2, &exchange));
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["processes"], 2);
}

#[test]
fn a_lost_rank_ends_the_run_within_seconds_and_it_resumes_with_another_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let long = recipe(folder.path(), "long", &LONG);
    let run = folder.path().join("run");
    let start = || launched(2, &train(&long, &run));
    for lost in [1, 0] {
        let killed = std::cell::Cell::new(Instant::now());
        let (code, stderr) = disturbed_after(12, start(), &run, |ranks, _| {
            signal("KILL", ranks[lost]);
            killed.set(Instant::now());
        });
        assert_eq!(code, 75, "{stderr}");
        assert!(killed.get().elapsed() < Duration::from_secs(10));
        let parts = ["was killed by SIGKILL", "its connection closed"];
        for part in parts {
            assert!(stderr.contains(&format!("process {lost}")), "{stderr}");
            assert_eq!(stderr.matches(part).count(), 1, "{stderr}");
        }
    }

    // A scheduler signals the launcher, or one rank; Ctrl-C reaches all.
    let mut before = newest(&run);
    let warnings: [fn(&[u32], &Child); 3] = [
        |_, launcher| signal("INT", launcher.id()),
        |_, launcher| signal("TERM", launcher.id()),
        |ranks, _| signal("USR1", ranks[1]),
    ];
    for warn in warnings {
        let (code, stderr) = disturbed_after(12, start(), &run, warn);
        assert_eq!(code, 75, "{stderr}");
        assert_eq!(
            stderr.matches("stopped by signal after").count(),
            1,
            "{stderr}"
        );
        assert!(stderr.contains("resuming after"), "{stderr}");
        assert!(newest(&run) > before);
        before = newest(&run);
    }

    // Ranks exit by themselves when their launcher is killed.
    let mut launcher = start().stderr(Stdio::null()).spawn().unwrap();
    wait_for(lines(&run) + 20, &run, &mut launcher);
    assert_eq!(of_run(&run).len(), 2);
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    wait_until("ranks outlive their launcher", || of_run(&run).is_empty());

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
    done(launched(1, &[&train(&long, &run)[..], &short].concat()));
}

#[test]
fn a_rank_that_hangs_is_detected_by_its_missing_heartbeat() {
    let folder = tempfile::tempdir().unwrap();
    let long = recipe(folder.path(), "long", &LONG);
    let run = folder.path().join("run");
    let (code, stderr) = disturbed_after(12, launched(2, &train(&long, &run)), &run, |ranks, _| {
        signal("STOP", ranks[1]);
    });
    assert_eq!(code, 75, "{stderr}");
    let expected = "sent no heartbeat for 20 s";
    assert_eq!(stderr.matches(expected).count(), 1, "{stderr}");
    assert!(stderr.contains("process 1 on"), "{stderr}");
}

#[test]
fn a_launcher_stopped_before_the_rendezvous_leaves_no_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let long = recipe(folder.path(), "long", &LONG);
    let run = folder.path().join("run");
    let begun = Instant::now();
    let mut launcher = launched(4, &train(&long, &run));
    let mut launcher = launcher.stderr(Stdio::null()).spawn().unwrap();
    wait_until("no rank starts", || !of_run(&run).is_empty());
    signal("TERM", launcher.id());
    assert_eq!(launcher.wait().unwrap().code(), Some(75));
    assert!(of_run(&run).is_empty(), "a process is still running");
    assert!(begun.elapsed() < A_MINUTE);
}

#[test]
fn mismatched_ranks_are_refused_on_all_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let one = recipe(folder.path(), "one", &[]);
    let other = recipe(folder.path(), "other", &[("peak = 1e-3", "peak = 2e-3")]);
    let run = folder.path().join("run");
    let port = free_port();
    let start = |number, size| rank(number, size, &port, &train(&one, &run));
    let all = vec![start("0", "3"), start("1", "3"), start("1", "3")];
    all_fail(all, 2, "two processes have RANK = 1");
    all_fail(vec![start("0", "2"), start("1", "3")], 2, "process 1 on ");

    let recipes = vec![start("0", "2"), rank("1", "2", &port, &train(&other, &run))];
    let outputs = at_once(recipes);
    let codes = outputs.iter().map(|output| output.status.code());
    assert_eq!(codes.collect::<Vec<_>>(), [Some(2), Some(2)]);
    let stderr = stderr_of(&outputs[0]);
    assert!(
        stderr.contains("has a different recipe than process 0"),
        "{stderr}"
    );

    let changed = folder.path().join("advxl");
    let mut bytes = std::fs::read(ADVXL).unwrap();
    bytes.push(0);
    std::fs::write(&changed, bytes).unwrap();
    std::fs::set_permissions(&changed, std::fs::metadata(ADVXL).unwrap().permissions()).unwrap();
    let mut foreign = Command::new(&changed);
    let known = start("1", "2");
    foreign.args(known.get_args());
    foreign.envs(
        known
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    let outputs = at_once(vec![start("0", "2"), foreign]);
    let stderr = stderr_of(&outputs[0]);
    assert!(
        stderr.contains("has a different binary than process 0"),
        "{stderr}"
    );
    assert!(outputs.iter().all(|output| output.status.code() == Some(2)));

    let mut secret = start("1", "2");
    secret.env("ADVXL_TOKEN", "another run's");
    let mut alone = start("0", "2");
    alone.env("ADVXL_RENDEZVOUS_TIMEOUT", "2");
    let outputs = at_once(vec![alone, secret]);
    let codes = outputs.iter().map(|output| output.status.code());
    assert_eq!(codes.collect::<Vec<_>>(), [Some(75), Some(2)]);
    assert!(!run.exists());
}

#[test]
fn a_missing_rank_is_named_and_so_is_a_missing_rank_0() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "recipe", &[]);
    let run = folder.path().join("run");
    let port = free_port();
    let start = |number, size, seconds| {
        let mut command = rank(number, size, &port, &train(&recipe, &run));
        command.env("ADVXL_RENDEZVOUS_TIMEOUT", seconds);
        command
    };
    let missing = format!("2 of 4 processes at 127.0.0.1:{port}: ranks 1, 3");
    let all = vec![start("0", "4", "6"), start("2", "4", "20")];
    let outputs = at_once(all);
    let stderr = stderr_of(&outputs[0]);
    assert!(
        stderr.contains(&format!("waiting for {missing}")),
        "{stderr}"
    );
    for output in &outputs {
        let stderr = stderr_of(output);
        assert_eq!(output.status.code(), Some(75), "{stderr}");
        let expected = format!("gave up after 6 s without {missing}");
        assert!(stderr.contains(&expected), "{stderr}");
    }
    let alone = vec![start("1", "2", "1")];
    all_fail(alone, 75, "process 0 cannot be reached at 127.0.0.1");
}

#[test]
fn wrong_variables_and_flags_are_refused_before_anything_is_started() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path(), "recipe", &[]);
    let run = folder.path().join("run");
    let train = train(&recipe, &run);
    let with = |variables: &[(&str, &str)], more: &[&str]| {
        let mut command = command(&[&train[..], more].concat());
        command.envs(variables.iter().copied());
        command
    };
    let incomplete = [
        "MASTER_ADDR, MASTER_PORT are missing",
        "RANK, WORLD_SIZE are set",
    ];
    fail(
        with(&[("RANK", "0"), ("WORLD_SIZE", "2")], &[]),
        2,
        &incomplete,
    );
    let beyond = ["RANK = `2`: expected 0 to 1, since WORLD_SIZE is 2"];
    fail(with(&[("RANK", "2"), ("WORLD_SIZE", "2")], &[]), 2, &beyond);
    fail(
        with(&[("WORLD_SIZE", "two")], &[]),
        2,
        &["WORLD_SIZE = `two`"],
    );

    let four = [
        ("RANK", "0"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "1"),
    ];
    let nested = ["this process already belongs to a run of world size 2, as rank 0"];
    fail(with(&four, &["--processes", "2"]), 2, &nested);
    let mut inspect = command(&["inspect", text(&recipe)]);
    inspect.envs(four);
    fail(inspect, 2, &["runs in one process, but 2 were started"]);
    fail(
        with(&[], &["--processes", "0"]),
        2,
        &["--processes must be at least 1"],
    );
    let cpu = ["--gpus", "2", "--device", "cpu"];
    fail(with(&[], &cpu), 2, &["but --device is cpu"]);
    let mut plan = command(&["plan", text(&recipe)]);
    plan.args(["--processes", "2"]);
    fail(plan, 2, &["this command runs in one process"]);

    // Each error is printed once, by one of the ranks.
    let once = |count: usize, arguments: &[&str], part: &str| {
        let output = launched(count, arguments).output().unwrap();
        let stderr = stderr_of(&output);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert_eq!(stderr.matches("error:").count(), 1, "{stderr}");
        assert!(stderr.contains(part), "{stderr}");
    };
    once(3, &train, "3 processes cannot share batches of 4 shards");
    once(8, &train, "parallel = { shards = 8");
    let missing = folder.path().join("missing.toml");
    let missing = ["train", text(&missing), "--out", text(&run)];
    once(2, &missing, "cannot read");
    assert!(!Path::new(&run).exists());
}
