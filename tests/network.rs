//! Two hosts with a slow network between them, with MPI and without: the same numbers, and an end when the network goes.
//!
//! The hosts are network namespaces (`tests/network/hosts`), which root alone can make; for others these tests do nothing.
#![cfg(all(feature = "mpi", target_os = "linux"))]

mod support;

use std::process::{Command, Stdio};

use support::processes::*;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/network/hosts");

/// Two hosts that are gone when this is dropped.
struct Hosts(&'static str);

impl Hosts {
    /// Hosts joined by a cable that takes five milliseconds and a gigabit a second; none without the right to make them.
    fn up(name: &'static str) -> Option<Self> {
        let id = Command::new("id").arg("-u").output().ok()?;
        let there_are = |program| Command::new(program).arg("-V").output().is_ok();
        let devices = std::path::Path::new("/dev/net/tun").exists();
        if id.stdout != b"0\n" || !devices || !there_are("ip") || !there_are("python3") {
            eprintln!("left out: two hosts need root, iproute2, Python and /dev/net/tun");
            return None;
        }
        let hosts = Self(name);
        hosts.tell(&["down"]);
        hosts.tell(&["up", "5", "1gbit"]);
        Some(hosts)
    }

    fn tell(&self, what: &[&str]) {
        let done = Command::new(SCRIPT).arg(self.0).args(what).status();
        assert!(done.unwrap().success(), "{what:?}");
    }

    /// The program in one process on each host.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(SCRIPT);
        command.args([self.0, "run", ADVXL]).args(arguments);
        command.args(["--threads", "1"]);
        command
    }
}

impl Hosts {
    /// The program in one process on each host, over TCP: rank 0 last.
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
fn a_slow_network_changes_no_bit_and_a_lost_one_costs_the_last_updates_alone() {
    let Some(hosts) = Hosts::up("adv") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let short = recipe(folder.path(), "recipe", &[]);
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    succeed(1, &train(&short, &one));
    let output = hosts.command(&train(&short, &two)).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
    assert!(made(&one) == made(&two));

    let long = recipe(folder.path(), "long", &LONG);
    let run = folder.path().join("run");
    let command = || hosts.command(&train(&long, &run));
    let (code, told) = disturbed(command(), &run, |_, _| hosts.tell(&["pull"]));
    assert_ne!(code, 0, "{told}");
    // Open MPI's own connections are told to notice it (docs/guides/several_processes.md), which they do before ours.
    let lost = "lost communication with a remote daemon";
    assert!(told.contains(lost), "{told}");
    hosts.tell(&["plug"]);

    // Beats come, and nothing else does.
    let (code, told) = disturbed(command(), &run, |_, _| {
        hosts.tell(&["without", "2000-2099"])
    });
    assert_eq!(code, 75, "{told}");
    assert!(
        told.contains("all processes have waited for each other for 40 s"),
        "{told}"
    );
    assert!(told.contains("resuming after"), "{told}");
    hosts.tell(&["without", "1-1"]);

    // Whoever cannot be watched is told, and works all the same.
    hosts.tell(&["only", "2000-2199"]);
    let run = folder.path().join("unwatched");
    let output = hosts.command(&train(&short, &run)).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert!(
        told.contains("the processes 1 on host-b cannot reach this one over TCP"),
        "{told}"
    );
    assert!(made(&one) == made(&run));
}

#[test]
fn without_mpi_two_hosts_train_to_the_same_bits_and_notice_a_lost_network() {
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
    hosts.tell(&["pull"]);
    for (rank, lost) in ranks.into_iter().zip([0, 1]) {
        let output = rank.wait_with_output().unwrap();
        let told = told(&output);
        assert_eq!(output.status.code(), Some(75), "{told}");
        let host = ["host-a", "host-b"][lost];
        let expected = format!("process {lost} on {host} sent no heartbeat for 20 s");
        assert!(told.contains(&expected), "{told}");
    }
}
