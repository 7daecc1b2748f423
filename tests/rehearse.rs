//! `kiln test` and `kiln run`: what they start, what they say, and that the disk stays as it is.

use std::io::Write as _;
use std::time::SystemTime;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Base, Bench, Kiln, write_base};

/// A disk that was built with the fake QEMU; with `tests`, its recipe has one.
fn built(tests: bool) -> Bench {
    let bench = Bench::empty();
    write_base(&bench.path("base.raw"), Base::Mbr);
    bench.recipe(if tests { "[[test]]\nname = \"serves\"\nrun = \"curl localhost\"\ntimeout = \"1s\"\n" } else { "" });
    bench.build(&json!({})).run().succeeded();
    for trace in bench.names("traces") {
        std::fs::remove_file(bench.path("traces").join(trace)).unwrap();
    }
    bench
}

fn test(bench: &Bench, scenario: &Value) -> Kiln {
    bench.kiln(["-q", "test", "out/web", "--accel", "tcg"]).scenario(scenario)
}

/// It fails with `code`; the disk is as it was, and only what `left` names is new.
#[track_caller]
fn fails(bench: &Bench, kiln: Kiln, code: i32, left: &[&str]) -> String {
    let disk = bench.path("out/web/disk.raw");
    let modified = || -> SystemTime { disk.metadata().unwrap().modified().unwrap() };
    let (before, names) = (modified(), bench.names("out/web"));
    let said = kiln.run().failed(code);
    assert_eq!(modified(), before, "the disk is not changed");
    let mut expected = [names, left.iter().map(|name| (*name).to_owned()).collect()].concat();
    expected.sort();
    assert_eq!(bench.names("out/web"), expected);
    bench.assert_tidy(&["web"]);
    said
}

const CONSOLE: &[&str] = &["test-legacy-bios-console.log"];

#[test]
fn a_disk_that_comes_up() {
    let bench = built(true);
    let scenario = json!({ "own is-system-running": [["print", "running\n"]] });
    let said = test(&bench, &scenario).run().succeeded();
    assert!(said.starts_with("BIOS: running after ") && said.ends_with(", 1 test passed\n"), "{said}");
    let arguments = bench.read(&format!("traces/{}", bench.traces("pid-")[0]));
    assert!(arguments.contains("nvme,drive=root"), "as EC2 has it: {arguments}");
    assert!(!arguments.contains("-kernel"), "by its own boot loader: {arguments}");
    bench.assert_tidy(&["web"]);
}

#[test]
fn a_disk_without_tests_is_up_when_it_asks_for_a_login() {
    let bench = built(false);
    let scenario = json!({ "boot": [["console", "Debian GNU/Linux 12 web ttyS0\r\n\r\nweb login: "], ["hang"]] });
    let said = test(&bench, &scenario).run().succeeded();
    assert!(said.starts_with("BIOS: login after ") && said.ends_with(" s\n"), "{said}");
}

#[test]
fn units_that_failed_are_named() {
    let bench = built(true);
    let state = json!({ "own is-system-running": [["print", "degraded\nnginx.service\n"]] });
    let ran = test(&bench, &state).run();
    assert_eq!(ran.stderr, "warning: units that failed to start: nginx.service\n");
    assert!(ran.succeeded().starts_with("BIOS: degraded after "));
}

#[test]
fn a_disk_that_does_not_come_up_shows_its_console() {
    let bench = built(false);
    let scenario =
        json!({ "boot": [["console", "Loading Linux\r\n[ TIME ] Timed out waiting for nvme\r\n"], ["hang"]] });
    let said = fails(&bench, test(&bench, &scenario).arg("--timeout").arg("1s"), 6, CONSOLE);
    insta::assert_snapshot!(said, @r#"
    error: waited 1.0 s for the system to come up
     |
     = console: Loading Linux
     = console: [ TIME ] Timed out waiting for nvme
     = log: out/web/test-legacy-bios-console.log
    help: read the console's log; does the image have a login on its serial console (console=ttyS0)?
    "#);
    assert!(bench.read("out/web/test-legacy-bios-console.log").contains("Timed out waiting for nvme"));
}

#[test]
fn a_disk_that_does_not_boot_at_all() {
    let bench = built(false);
    let scenario = json!({ "boot": [["console", "No bootable device.\r\n"], ["hang"]] });
    insta::assert_snapshot!(fails(&bench, test(&bench, &scenario), 8, CONSOLE), @r#"
    error: the guest can't go on: No bootable device.
     |
     = log: out/web/test-legacy-bios-console.log
    help: read the console's log: it ends where the boot did
    "#);
}

#[test]
fn a_test_that_fails() {
    let bench = built(true);
    let scenario = json!({ "own curl": [["print", "curl: (7) Failed to connect\n"], ["status", 7]] });
    insta::assert_snapshot!(fails(&bench, test(&bench, &scenario), 5, CONSOLE), @r#"
    error: test `serves` failed with exit code 7
     |
     = it ran: curl localhost
     = output: curl: (7) Failed to connect
     = log: out/web/test-legacy-bios-console.log
    help: boot it and look: kiln run out/web
    "#);
}

#[test]
fn a_test_that_hangs() {
    let bench = built(true);
    insta::assert_snapshot!(fails(&bench, test(&bench, &json!({ "own curl": [["hang"]] })), 6, CONSOLE), @r#"
    error: waited 1.0 s for test `serves`
     |
     = log: out/web/test-legacy-bios-console.log
    help: give the test a longer timeout = "…", or boot it and look with kiln run
    "#);
}

#[test]
fn a_firmware_that_cannot_start_the_disk() {
    let bench = built(false);
    let kiln = test(&bench, &json!({})).arg("--firmware").arg("uefi");
    insta::assert_snapshot!(fails(&bench, kiln, 8, &[]), @r#"
    error: the disk can't be started by UEFI: it has no boot loader for it
     |
    help: take a base that has one
    "#);
}

#[test]
fn ctrl_c_while_it_boots() {
    let bench = built(false);
    let kiln = test(&bench, &json!({ "boot": [["hang"]] })).start();
    bench.wait_for("at-boot");
    kiln.signal(Signal::INT);
    assert_eq!(kiln.end().failed(130), "error: stopped by Ctrl-C\n");
    bench.assert_tidy(&["web"]);
    assert!(!bench.names("out/web").iter().any(|name| name.starts_with("test-")), "{:?}", bench.names("out/web"));
}

#[test]
fn the_console_is_the_persons_and_the_end_key_ends_it() {
    let bench = built(false);
    std::fs::write(bench.path("key.pub"), "ssh-ed25519 AAAA me@laptop\n").unwrap();
    let scenario = json!({ "boot": [["console", "web login: "], ["echo-input"]] });
    let kiln = bench.kiln(["run", "out/web", "--accel", "tcg", "--ssh-key", "key.pub", "--ssh-port", "2299"]);
    let (running, mut keyboard) = kiln.scenario(&scenario).start_with_stdin();
    bench.wait_for("at-boot");
    keyboard.write_all(b"debian\x1d").unwrap();
    let ran = running.end();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.starts_with("web login: "), "{}", ran.stdout);
    assert!(ran.stderr.contains("ssh -p 2299 "), "{}", ran.stderr);
    let arguments = bench.read(&format!("traces/{}", bench.traces("pid-")[0]));
    assert!(arguments.contains("restrict=on,hostfwd=tcp:127.0.0.1:2299-:22"), "loopback only: {arguments}");
    bench.assert_tidy(&["web"]);
}

/// A script that only wants ssh: nobody is at the keyboard, and the guest runs until it powers off.
#[test]
fn without_a_keyboard_the_guest_runs_on() {
    let bench = built(false);
    let off = json!({ "boot": [["echo-input"], ["wait-for", "go"],
        ["event", "SHUTDOWN", { "guest": true, "reason": "guest-shutdown" }], ["exit", 0]] });
    let kiln = bench.kiln(["-q", "run", "out/web", "--accel", "tcg"]).scenario(&off).start();
    bench.wait_for("input-ended");
    assert!(!bench.qemus().is_empty());
    bench.write("traces/go", "");
    assert_eq!(kiln.end().code, Some(0));
    bench.assert_tidy(&["web"]);
}

#[test]
fn a_private_key_is_not_taken_for_a_public_one() {
    let bench = built(false);
    std::fs::write(bench.path("key"), "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
    let kiln = bench.kiln(["-q", "run", "out/web", "--accel", "tcg", "--ssh-key", "key"]);
    insta::assert_snapshot!(fails(&bench, kiln, 2, &[]), @r#"
    error: --ssh-key: `key` is not a public key
     |
    help: name the file that ends in .pub
    "#);
}
