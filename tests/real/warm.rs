//! Real guests that are taken up again: what they see, and that nobody can tell their disks from those of a cold build.

use std::collections::BTreeSet;
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

/// The files of these folders of a built disk with their kinds, modes, owners and bytes; without what no two builds have alike.
fn tree(bench: &Bench, name: &str, folders: &str) -> BTreeSet<String> {
    bench.clean_root(name);
    let folder = bench.path("tree");
    std::fs::create_dir(&folder).unwrap();
    let dump = Command::new("/sbin/debugfs")
        .arg("-R")
        .arg(format!("rdump {folders} {}", folder.display()))
        .arg(bench.path(&format!("{name}.ext4")))
        .output();
    assert!(dump.unwrap().status.success());
    let script = "cd \"$0\" && rm -rf lost+found var/log && find . -printf '%y %m %U:%G %p -> %l\\n' | sort \
                  && find . -type f -print0 | sort -z | xargs -0 sha256sum";
    let listing = run(Command::new("sh").arg("-c").arg(script).arg(&folder));
    run(Command::new("rm").arg("-rf").arg(&folder));
    listing.lines().map(str::to_owned).collect()
}

/// Cold, and taken up after the boot or after the last step but one: the same files.
#[test]
fn a_resumed_build_gives_the_same_files() {
    let bench = Bench::new();
    recipe(&bench, "bookworm", "echo done > /srv/a/last");
    bench.ok(&["build", "warm.toml"]);
    let cold = tree(&bench, "warm", "/");
    let has = |path: &str| cold.iter().any(|line| line.contains(path));
    assert!(has(" ./srv/a/last") && !has(" ./srv/a/numbers") && cold.len() > 10_000, "the tree was read");
    for from in ["files", "last"] {
        bench.ok(&["build", "warm.toml", &format!("--no-cache={from}")]);
        let log = std::fs::read_to_string(bench.path("out/warm/build.log")).unwrap();
        assert!(log.contains("resume: taking up the guest after"), "{log}");
        let resumed = tree(&bench, "warm", "/");
        let differ: Vec<_> = resumed.symmetric_difference(&cold).collect();
        assert!(differ.is_empty(), "from {from}: {differ:?}");
    }
}

/// Where steps and boots write: reading all of a disk takes longer than building it.
const CHANGED: &str = "/boot /etc /home /root /srv /tmp /var";

/// What a later step looks at is the same whether the guest went on, was taken up from its memory, or had to boot a
/// kept disk: what a boot would lose is made again. Each recipe: its name, its steps, and whether the disk before the
/// last step is enough to go on from.
const RECIPES: [(&str, &[(&str, &str)], bool); 3] = [
    (
        "state",
        &[
            ("files", "mkdir /srv/a; echo web >/etc/hostname; hostname web"),
            (
                "service",
                "printf '[Service]\\nExecStart=sleep 1000\\n' >/etc/systemd/system/one.service; systemctl start one
                 echo 1 >/tmp/one; echo 2 >/run/two; echo 3 >/dev/shm/three; mount -t tmpfs none /mnt; touch /mnt/four",
            ),
            (
                "last",
                "{ systemctl is-active one; hostname; cat /tmp/one /run/two /dev/shm/three; ls /mnt; pwd; env; } \
                 >/srv/a/seen",
            ),
        ],
        false,
    ),
    (
        "resolver",
        &[
            ("own", "echo 'nameserver 192.0.2.1' >/etc/resolv.conf; echo 'search example.org' >>/etc/resolv.conf"),
            ("last", "cat /etc/resolv.conf >/srv/seen; ls -a /etc | grep -i resolv >>/srv/seen"),
        ],
        true,
    ),
    ("kernel", &[("none", "rm /boot/vmlinuz-*"), ("last", "ls /boot >/srv/seen")], false),
];

#[test]
fn cold_from_memory_and_from_disks_are_alike() {
    let bench = Bench::new();
    for (name, steps, from_disk) in RECIPES {
        let step = |(name, script): &(&str, &str)| {
            format!("[[provision]]\nname = \"{name}\"\ninline = '''\n{script}\n'''\ncheckpoint = true\n")
        };
        let (recipe, steps) = (format!("{name}.toml"), steps.iter().map(step).collect::<String>());
        let image = base("bookworm");
        bench.write(&recipe, format!("name = \"{name}\"\n[base]\nimage = \"{}\"\n{steps}", image.display()));
        bench.ok(&["build", &recipe]);
        let cold = tree(&bench, name, CHANGED);
        let log = || std::fs::read_to_string(bench.path(&format!("out/{name}/build.log"))).unwrap();
        for memory in [true, false] {
            if !memory {
                run(Command::new("sh").arg("-c").arg("rm \"$0\"/*/memory.*").arg(bench.path("cache/layers")));
            }
            bench.ok(&["build", &recipe, "--no-cache=last"]);
            assert_eq!(log().contains("resume: taking up the guest after"), memory, "{}", log());
            let alone = log().contains("step 1/") || log().contains("step 2/3");
            assert_eq!(alone, !memory && !from_disk, "whether earlier steps ran: {}", log());
            let warm = tree(&bench, name, CHANGED);
            let differ: Vec<_> = warm.symmetric_difference(&cold).collect();
            assert!(differ.is_empty(), "{name}, from memory: {memory}: {differ:?}");
        }
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
