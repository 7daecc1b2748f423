//! Hosts that lack something, and QEMUs that die.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use super::{fails, fails_with};
use crate::support::{Base, Bench, Kiln, step, write_base};

const FAILED: &[&str] = &["web.failed"];

fn bench() -> Bench {
    let bench = Bench::new();
    bench.one_step();
    bench
}

/// Folders with random names have others instead.
fn plain(bench: &Bench, said: &str) -> String {
    let fixtures = crate::support::fixtures();
    let said = said.replace(bench.path("").to_str().unwrap(), "[BENCH]/");
    let said = said.replace(fixtures.to_str().unwrap(), "[FIXTURES]");
    match said.split_once(".web.kiln-") {
        Some((before, after)) => format!("{before}.web.kiln-[RANDOM]{}", &after[6..]),
        None => said,
    }
}

fn script(bench: &Bench, name: &str, text: &str) -> std::path::PathBuf {
    bench.write(name, format!("#!/bin/sh\n{text}"));
    let path = bench.path(name);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn qemu_is_missing() {
    let bench = bench();
    let kiln = bench.build(&json!({})).without("KILN_QEMU").env("PATH", bench.path("nothing"));
    insta::assert_snapshot!(fails_with(&bench, kiln, 4, &[]), @r#"
    error: `qemu-system-x86_64` not found
     |
    help: install it: apt install qemu-system-x86 qemu-utils (Debian, Ubuntu), dnf install qemu-kvm qemu-img (Fedora, EL), pacman -S qemu-base (Arch), or name it in KILN_QEMU
    "#);
}

#[test]
fn qemu_is_not_where_it_was_said_to_be() {
    let bench = bench();
    let kiln = bench.build(&json!({})).env("KILN_QEMU", "/opt/qemu/bin/qemu-system-x86_64");
    insta::assert_snapshot!(fails_with(&bench, kiln, 4, &[]), @r#"
    error: KILN_QEMU names `/opt/qemu/bin/qemu-system-x86_64`, which is not a program that can be run
     |
    help: correct KILN_QEMU or unset it
    "#);
}

#[test]
fn qemu_img_is_missing() {
    let bench = bench();
    let python = script(&bench, "bin/python3", "exec /usr/bin/python3 \"$@\"\n");
    let kiln = bench.build(&json!({})).env("PATH", python.parent().unwrap());
    insta::assert_snapshot!(fails_with(&bench, kiln, 4, &[]), @r#"
    error: `qemu-img` not found
     |
    help: install it: apt install qemu-system-x86 qemu-utils (Debian, Ubuntu), dnf install qemu-kvm qemu-img (Fedora, EL), pacman -S qemu-base (Arch), or name it in KILN_QEMU_IMG
    "#);
}

#[test]
fn qemu_is_too_old() {
    let bench = bench();
    let said = fails(&bench, &json!({ "says-version": "5.2.0 (Debian 1:5.2+dfsg-11)" }), 4, &[]);
    insta::assert_snapshot!(plain(&bench, &said), @r#"
    error: `[FIXTURES]/fake-qemu/qemu-system-x86_64` is QEMU 5.2.0 (Debian 1:5.2+dfsg-11), and kiln needs 6.2 or newer
     |
    help: install a newer QEMU, or name one in KILN_QEMU
    "#);
}

#[test]
fn qemu_cannot_even_say_its_version() {
    let bench = bench();
    let broken = "error while loading shared libraries: libfoo.so.1: cannot open shared object file\n";
    let said = fails(&bench, &json!({ "version": [["stderr", broken], ["exit", 127]] }), 4, &[]);
    insta::assert_snapshot!(plain(&bench, &said), @r#"
    error: `[FIXTURES]/fake-qemu/qemu-system-x86_64` failed with exit code 127: error while loading shared libraries: libfoo.so.1: cannot open shared object file
    "#);
}

#[test]
fn qemu_refuses_its_arguments() {
    let bench = bench();
    let refusal = "qemu-system-x86_64: -device virtio-rng-pci: 'virtio-rng-pci' is not a valid device model name\n";
    let said = fails(&bench, &json!({ "start": [["stderr", refusal], ["exit", 1]] }), 4, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: QEMU failed with exit code 1 while the guest was running: qemu-system-x86_64: -device virtio-rng-pci: 'virtio-rng-pci' is not a valid device model name
     |
     = log: out/web.failed/build.log
    help: build again; if it ends the same way, try --accel tcg or another QEMU
    "#);
}

#[test]
fn qemu_dies_while_booting() {
    let bench = bench();
    let said = fails(&bench, &json!({ "boot": [["stderr", "qemu: fatal: oops\n"], ["exit", 1]] }), 4, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: QEMU failed with exit code 1 while the guest was running: qemu: fatal: oops
     |
     = log: out/web.failed/build.log
    help: build again; if it ends the same way, try --accel tcg or another QEMU
    "#);
}

#[test]
fn qemu_is_killed_in_a_step() {
    let bench = bench();
    let said = fails(&bench, &step(json!([["print", "half a li"], ["kill", 9]])), 4, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: step `hello`: QEMU was killed by signal 9 while the guest was running
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = log: out/web.failed/build.log
    help: was it the host's out-of-memory killer? see dmesg; a smaller [machine] memory may help
    "#);
    assert_eq!(bench.read("out/web.failed/steps/01-hello.log"), "half a li", "what it printed is kept");
}

#[test]
fn qemu_is_told_to_stop_by_someone_else() {
    let bench = bench();
    let event = json!(["event", "SHUTDOWN", { "guest": false, "reason": "host-signal" }]);
    let said = fails(&bench, &step(json!([event, ["exit", 0]])), 4, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: step `hello`: QEMU ended while the guest was running: QEMU was told to stop (host-signal)
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = log: out/web.failed/build.log
    help: build again; if it ends the same way, try --accel tcg or another QEMU
    "#);
}

#[test]
fn qemu_dies_while_the_disk_is_frozen() {
    let bench = bench();
    let said = fails(&bench, &json!({ "freeze": [["kill", 9]] }), 4, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: QEMU was killed by signal 9 while the guest was running
     |
     = log: out/web.failed/build.log
    help: was it the host's out-of-memory killer? see dmesg; a smaller [machine] memory may help
    "#);
}

#[test]
fn qemu_dies_before_its_disk_is_written_out() {
    let bench = bench();
    let said = fails(&bench, &json!({ "qmp quit": [["exit", 1]] }), 4, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: QEMU failed with exit code 1 while the guest was running
     |
     = log: out/web.failed/build.log
    help: build again; if it ends the same way, try --accel tcg or another QEMU
    "#);
}

#[test]
fn the_guest_writes_more_than_the_host_has() {
    let bench = bench();
    let event = json!(["event", "BLOCK_IO_ERROR",
        { "device": "", "node-name": "root", "operation": "write", "action": "stop", "nospace": true,
          "reason": "No space left on device" }]);
    let said = fails(&bench, &step(json!([event, ["hang"]])), 4, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: step `hello`: the host's disk is full: the guest's writes have nowhere to go
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = log: out/web.failed/build.log
    help: free some space, or choose another place with --cache-dir
    "#);
}

#[test]
fn the_hosts_disk_fails() {
    let bench = bench();
    let event = json!(["event", "BLOCK_IO_ERROR",
        { "device": "", "node-name": "root", "operation": "read", "action": "report", "nospace": false,
          "reason": "Input/output error" }]);
    let said = fails(&bench, &step(json!([event, ["hang"]])), 4, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: step `hello`: the guest's disk failed on the host: Input/output error
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = log: out/web.failed/build.log
    "#);
}

/// What gives a script a mount namespace of its own in which it may mount, and what gives it this user back in there.
/// Root may at once; others by a user namespace, where the kernel lets them have one, or else by sudo.
fn mount_namespace() -> (Vec<String>, String) {
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    if rustix::process::geteuid().is_root() {
        return (words("unshare -m"), String::new());
    }
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let back = format!("setpriv --reuid={user} --regid={group} --clear-groups");
    let ways = [("unshare -r -m", String::new()), ("sudo -n -E unshare -m", back)];
    let mut said = Vec::new();
    for (way, back) in ways {
        let probe = words(&format!("{way} mount -t tmpfs probe /mnt"));
        match std::process::Command::new(&probe[0]).args(&probe[1..]).output() {
            Ok(output) if output.status.success() => return (words(way), back),
            Ok(output) => said.push(format!("{}: {}", probe.join(" "), String::from_utf8_lossy(&output.stderr))),
            Err(error) => said.push(format!("{}: {error}", probe.join(" "))),
        }
    }
    panic!(
        "this test mounts a small filesystem: run it as root, give this user sudo without a password, or let it have \
         user namespaces (Ubuntu: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0)\n{}",
        said.join("\n")
    );
}

/// kiln in a mount namespace of its own, with a small filesystem of its own on `folder`: real ENOSPC, and no trace.
fn on_small_filesystem(bench: &Bench, folder: &str, options: &str, scenario: &serde_json::Value) -> Kiln {
    std::fs::create_dir_all(bench.path(folder)).unwrap();
    let (namespace, back) = mount_namespace();
    let script = format!(
        "mount -t tmpfs -o mode=1777,{options} small {folder} || exit 99\n\
         {back} \"$@\"; code=$?\nls -A {folder} >traces/left\nexit $code"
    );
    let kiln = env!("CARGO_BIN_EXE_kiln");
    let arguments = ["sh", "-c", &script, "sh", kiln, "-q", "build", "web.toml", "--accel", "tcg"];
    let arguments = namespace[1..].iter().map(String::as_str).chain(arguments);
    bench.program(namespace[0].as_ref(), arguments).scenario(scenario)
}

/// It says that the disk is full and ends with 4; `left` is what is on the small filesystem then.
#[track_caller]
fn runs_full(bench: &Bench, kiln: Kiln, left: &str) -> String {
    let said = kiln.run().failed(4);
    assert_eq!(bench.read("traces/left"), left, "{said}");
    assert_eq!(bench.names("cache/work"), [""; 0]);
    bench.assert_no_qemu();
    plain(bench, &said)
}

#[test]
fn there_is_too_little_space_for_the_output() {
    let bench = bench();
    let kiln = on_small_filesystem(&bench, "out", "size=20m", &json!({}));
    insta::assert_snapshot!(runs_full(&bench, kiln, ""), @r#"
    error: the filesystem of `out` has 20 MiB free, and this build needs about 512.1 MiB
     |
    help: free some space, or choose another place with --out
    "#);
    assert_eq!(bench.qemus(), [0; 0], "nothing is started");
}

#[test]
fn there_is_too_little_space_to_unpack_the_base() {
    let bench = Bench::empty();
    write_base(&bench.path("base.raw"), Base::Large(4));
    bench.one_step();
    let kiln = on_small_filesystem(&bench, "cache", "size=1m", &json!({}));
    insta::assert_snapshot!(runs_full(&bench, kiln, "bases\nknown\nlayers\nlocks\nwork\n"), @r#"
    error: the cache's filesystem has 1 MiB free, and unpacking the base may need 15.8 MiB
     |
    help: free some space, or choose another place with --cache-dir
    "#);
}

#[test]
fn the_hosts_disk_runs_full_while_the_disk_is_written() {
    let bench = Bench::empty();
    write_base(&bench.path("base.raw"), Base::Large(4));
    bench.one_step();
    let fill = json!({ "freeze": [["fill", bench.path("out"), 0]] });
    let kiln = on_small_filesystem(&bench, "out", "size=560m", &fill);
    // The disk is begun before the guest is done: it may be whole by then, and its block map has no room.
    let said = runs_full(&bench, kiln, "filling\nweb.failed\n").replace("/new/blocks:", "/new/disk.raw:");
    insta::assert_snapshot!(said, @r#"
    error: no space left for [BENCH]/out/.web.kiln-[RANDOM]/new/disk.raw: No space left on device (os error 28)
     |
     = log: out/web.failed/build.log
    help: free some space, or choose another place with --out or --cache-dir
    "#);
}

#[test]
fn the_hosts_disk_runs_full_while_a_step_prints() {
    let bench = bench();
    let fill = json!([["fill", bench.path("out"), 65_536], ["flood", 1_000_000, 100]]);
    let kiln = on_small_filesystem(&bench, "out", "size=560m", &step(fill));
    insta::assert_snapshot!(runs_full(&bench, kiln, "filling\nweb.failed\n"), @r#"
    error: cannot write the step's log: No space left on device (os error 28)
     |
     = log: out/web.failed/build.log
    help: free space on that filesystem, or choose another with --out, --cache-dir or TMPDIR
    "#);
}

/// A host or a QEMU that lacks a feature of the processor, before and after QEMU has connected.
#[test]
fn the_processor_that_the_recipe_asks_for_is_not_to_be_had() {
    let bench = bench();
    let refuses = |words: &str| json!([["stderr", format!("qemu-system-x86_64: {words}\n")], ["exit", 1]]);
    let words = "warning: TCG doesn't support requested feature: CPUID.07H:EBX.avx2 [bit 5]\n\
                 qemu-system-x86_64: TCG doesn't support requested features";
    let said = bench.build(&json!({ "start": refuses(words) })).run().failed(4);
    insta::assert_snapshot!(said, @r#"
    error: QEMU can't give the guest an x86-64-v3 processor: TCG doesn't support requested feature: CPUID.07H:EBX.avx2 [bit 5]
     |
     = log: out/web.failed/build.log
    help: set [machine] cpu = "x86-64-v2", or install a newer QEMU
    "#);
    let words = "TCG doesn't support requested feature: CPUID.07H:EBX.avx2 [bit 5]";
    assert_eq!(bench.build(&json!({ "qmp qmp_capabilities": refuses(words) })).run().failed(4), said);
    // KVM's words.
    let words = "warning: host doesn't support requested feature: CPUID.01H:ECX.ssse3 [bit 9]";
    let kvm = || bench.build(&json!({ "start": refuses(words) }));
    let said = kvm().run().failed(4);
    assert!(said.ends_with("\nhelp: set [machine] cpu = \"x86-64-v2\", or use --accel tcg\n"), "{said}");
    let said = kvm().arg("--set").arg("machine.cpu=x86-64-v2").run().failed(4);
    insta::assert_snapshot!(said, @r#"
    error: QEMU can't give the guest an x86-64-v2 processor: host doesn't support requested feature: CPUID.01H:ECX.ssse3 [bit 9]
     |
     = log: out/web.failed/build.log
    help: use --accel tcg
    "#);
    bench.assert_tidy(&["web.failed"]);
}
