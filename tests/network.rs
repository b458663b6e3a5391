//! Two hosts with a slow network between them, with and without MPI: the same results, and an exit when the network is
//! lost.
//!
//! The hosts are network namespaces (`tests/network/hosts`), which only root can create; for other users these tests do
//! nothing.
#![cfg(all(feature = "mpi", target_os = "linux"))]

mod support;

use std::process::{Command, Stdio};

use support::processes::*;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/network/hosts");

/// Two hosts, removed on drop.
struct Hosts(&'static str);

impl Hosts {
    /// Creates hosts connected with a latency of 5 ms and 1 Gbit/s. Returns `None` without the permission to create
    /// them.
    fn up(name: &'static str) -> Option<Self> {
        let id = Command::new("id").arg("-u").output().ok()?;
        let there_are = |program| Command::new(program).arg("-V").output().is_ok();
        let devices = std::path::Path::new("/dev/net/tun").exists();
        if id.stdout != b"0\n" || !devices || !there_are("ip") || !there_are("python3") {
            eprintln!("left out: two hosts need root, iproute2, Python and /dev/net/tun");
            return None;
        }
        let hosts = Self(name);
        hosts.script(&["down"]);
        hosts.script(&["up", "5", "1gbit"]);
        Some(hosts)
    }

    fn script(&self, what: &[&str]) {
        let done = Command::new(SCRIPT).arg(self.0).args(what).status();
        assert!(done.unwrap().success(), "{what:?}");
    }

    /// Returns the command for one process on each host.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(SCRIPT);
        command.args([self.0, "run", ADVXL]).args(arguments);
        command.args(["--threads", "1"]);
        command
    }
}

impl Hosts {
    /// Returns the commands for one process on each host over TCP, rank 0 last.
    fn ranks(&self, arguments: &[&str]) -> [Command; 2] {
        [("b", "1"), ("a", "0")].map(|(host, rank)| {
            let mut command = Command::new("ip");
            let name = format!("{}-{host}", self.0);
            let script = format!("hostname host-{host}; exec \"$@\"");
            command.args(["netns", "exec", &name, "unshare", "--uts", "sh", "-c"]);
            command.args([&script, "-", ADVXL]).args(arguments);
            command.args(["--threads", "1"]);
            command.envs([
                ("RANK", rank),
                ("WORLD_SIZE", "2"),
                ("MASTER_ADDR", "10.77.0.1"),
                ("MASTER_PORT", "29500"),
            ]);
            command
        })
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let _ = Command::new(SCRIPT).args([self.0, "down"]).status();
    }
}

#[test]
fn a_slow_network_changes_no_bit_and_a_lost_one_costs_only_the_last_updates() {
    let Some(hosts) = Hosts::up("adv") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let short = recipe(folder.path(), "recipe", &[]);
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    succeed(1, &train(&short, &one));
    let output = hosts.command(&train(&short, &two)).output().unwrap();
    assert!(output.status.success(), "{}", stderr_of(&output));
    assert!(made(&one) == made(&two));

    let long = recipe(folder.path(), "long", &LONG);
    let run = folder.path().join("run");
    let command = || hosts.command(&train(&long, &run));
    let (code, stderr) = disturbed(command(), &run, |_, _| hosts.script(&["pull"]));
    assert_ne!(code, 0, "{stderr}");
    // Open MPI's own connections are configured to detect it (docs/guides/several_processes.md) and do so before ours.
    let lost = "lost communication with a remote daemon";
    assert!(stderr.contains(lost), "{stderr}");
    hosts.script(&["plug"]);

    // Only heartbeats pass.
    let (code, stderr) = disturbed(command(), &run, |_, _| {
        hosts.script(&["without", "2000-2099"])
    });
    assert_eq!(code, 75, "{stderr}");
    assert!(
        stderr.contains("all processes have waited for each other for 40 s"),
        "{stderr}"
    );
    assert!(stderr.contains("resuming after"), "{stderr}");
    hosts.script(&["without", "1-1"]);

    // Without heartbeats the run prints a notice and still works.
    hosts.script(&["only", "2000-2199"]);
    let run = folder.path().join("unwatched");
    let output = hosts.command(&train(&short, &run)).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("the processes 1 on host-b cannot reach this one over TCP"),
        "{stderr}"
    );
    assert!(made(&one) == made(&run));
}

#[test]
fn without_mpi_two_hosts_train_to_the_same_bits_and_detect_a_lost_network() {
    let Some(hosts) = Hosts::up("adt") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let short = recipe(folder.path(), "recipe", &[]);
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    succeed(1, &train(&short, &one));
    let [mut other, first] = hosts.ranks(&train(&short, &two));
    let mut other = other.spawn().unwrap();
    done(first);
    assert!(other.wait().unwrap().success());
    assert!(made(&one) == made(&two));

    let long = recipe(folder.path(), "long", &LONG);
    let run = folder.path().join("run");
    let mut ranks = hosts.ranks(&train(&long, &run)).map(|mut rank| {
        rank.stderr(Stdio::piped());
        rank.spawn().unwrap()
    });
    wait_for(12, &run, &mut ranks[1]);
    hosts.script(&["pull"]);
    for (rank, lost) in ranks.into_iter().zip([0, 1]) {
        let output = rank.wait_with_output().unwrap();
        let stderr = stderr_of(&output);
        assert_eq!(output.status.code(), Some(75), "{stderr}");
        let host = ["host-a", "host-b"][lost];
        let expected = format!("process {lost} on {host} sent no heartbeat for 20 s");
        assert!(stderr.contains(&expected), "{stderr}");
    }
}
