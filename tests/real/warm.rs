//! Real guests that are taken up again: what they see, and that nobody can tell their disks from those of a cold build.

use std::process::Command;

use super::{Bench, base, run};

fn recipe(bench: &Bench, suite: &str, last: &str) {
    bench.write(
        "warm.toml",
        format!(
            "name = \"warm\"\n[base]\nimage = \"{}\"\n\
             [[provision]]\nname = \"files\"\ninline = \"mkdir -p /srv/a && seq 100000 > /srv/a/numbers\"\ncheckpoint = true\n\
             [[provision]]\nname = \"user\"\ninline = \"useradd -m deploy; seq 5 > /srv/a/more; rm /srv/a/numbers\"\ncheckpoint = true\n\
             [[provision]]\nname = \"last\"\ninline = '''\n{last}\n'''\n",
            base(suite).display()
        ),
    );
}

/// The files of a built disk with their kinds, modes, owners and bytes; without what no two builds have alike.
fn tree(bench: &Bench) -> String {
    bench.clean_root("warm");
    let folder = bench.path("tree");
    std::fs::create_dir(&folder).unwrap();
    let dump = Command::new("/sbin/debugfs")
        .arg("-R")
        .arg(format!("rdump / {}", folder.display()))
        .arg(bench.path("warm.ext4"))
        .output();
    assert!(dump.unwrap().status.success());
    let script = "cd \"$0\" && rm -rf lost+found var/log && find . -printf '%y %m %U:%G %p -> %l\\n' | sort \
                  && find . -type f -print0 | sort -z | xargs -0 sha256sum";
    let listing = run(Command::new("sh").arg("-c").arg(script).arg(&folder));
    run(Command::new("rm").arg("-rf").arg(&folder));
    listing
}

/// Cold, and taken up after the boot or after the last step but one: the same files.
#[test]
fn a_resumed_build_gives_the_same_files() {
    let bench = Bench::new();
    recipe(&bench, "bookworm", "echo done > /srv/a/last");
    bench.ok(&["build", "warm.toml"]);
    let cold = tree(&bench);
    assert!(cold.contains("./srv/a/last") && !cold.contains("./srv/a/numbers"), "the tree was read");
    assert!(cold.lines().count() > 10_000);
    let cold: std::collections::BTreeSet<_> = cold.lines().map(str::to_owned).collect();
    for from in ["files", "last"] {
        bench.ok(&["build", "warm.toml", &format!("--no-cache={from}")]);
        let log = std::fs::read_to_string(bench.path("out/warm/build.log")).unwrap();
        assert!(log.contains("resume: taking up the guest after"), "{log}");
        let resumed: std::collections::BTreeSet<_> = tree(&bench).lines().map(str::to_owned).collect();
        let differ: Vec<_> = resumed.symmetric_difference(&cold).collect();
        assert!(differ.is_empty(), "from {from}: {differ:?}");
    }
}

/// Time goes on, names resolve, and no two restores draw the same random numbers.
#[track_caller]
fn is_awake(suite: &str) {
    let bench = Bench::new();
    recipe(
        &bench,
        suite,
        "date +%s; getent hosts deb.debian.org >&2; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'",
    );
    bench.ok(&["build", "warm.toml"]);
    let mut draws = Vec::new();
    for _ in 0..2 {
        bench.ok(&["build", "warm.toml", "--no-cache=last"]);
        let build = std::fs::read_to_string(bench.path("out/warm/build.log")).unwrap();
        assert!(build.contains("resume: taking up the guest after `user`"), "{build}");
        let log = std::fs::read_to_string(bench.path("out/warm/steps/03-last.log")).unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let clock: u64 = log.lines().next().unwrap().parse().unwrap();
        assert!(now.abs_diff(clock) < 60, "{clock} and {now}");
        draws.push(log.lines().last().unwrap().to_owned());
    }
    assert!(draws[0].len() == 64 && draws[0] != draws[1], "{draws:?}");
}

#[test]
fn a_resumed_guest_is_awake() {
    is_awake("bookworm");
}

/// Its kernel does not know `vmgenid`.
#[test]
fn a_resumed_guest_with_an_old_kernel_is_awake() {
    is_awake("bullseye");
}
