//! Ctrl-C at any moment, SIGTERM, and a kiln that is killed outright.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Base, Bench, Kiln, step, wait_until, write_base};

fn bench() -> Bench {
    let bench = Bench::new();
    bench.one_step();
    bench.earlier_output();
    bench
}

/// Stopped by `signal` when the trace `moment` is there: kiln says so in one line and leaves nothing at all.
#[track_caller]
fn stopped_at(bench: &Bench, kiln: Kiln, moment: &str, signal: Signal, says: &str) {
    let kiln = kiln.start();
    bench.wait_for(moment);
    kiln.signal(signal);
    assert_eq!(kiln.end().failed(128 + signal.as_raw()), says);
    bench.assert_tidy(&["web"]);
    bench.assert_earlier_output();
}

const CTRL_C: &str = "error: stopped by Ctrl-C\n";

#[test]
fn ctrl_c_while_qemu_is_asked_for_its_version() {
    let bench = bench();
    stopped_at(&bench, bench.build(&json!({ "version": [["hang"]] })), "at-version", Signal::INT, CTRL_C);
}

/// Where there is no `/dev/kvm` to be opened there is no probe to interrupt: then its absence is what kiln must name.
#[test]
fn ctrl_c_while_the_accelerator_is_probed() {
    let bench = bench();
    let kiln = || bench.kiln(["-q", "build", "web.toml", "--accel", "kvm"]).scenario(&json!({ "probe": [["hang"]] }));
    let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match kvm {
        Ok(_) => stopped_at(&bench, kiln(), "at-probe", Signal::INT, CTRL_C),
        Err(_) => assert!(kiln().run().failed(4).starts_with("error: --accel kvm: ")),
    }
}

#[test]
fn ctrl_c_while_the_base_is_unpacked() {
    let bench = bench();
    let hangs = "#!/bin/sh\n[ \"$1\" != convert ] || { : >\"$FAKE_QEMU_DIR/at-convert\"; exec sleep 100; }\nexec qemu-img \"$@\"\n";
    bench.write("qemu-img", hangs);
    std::fs::set_permissions(bench.path("qemu-img"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let kiln = bench.build(&json!({})).env("KILN_QEMU_IMG", bench.path("qemu-img"));
    stopped_at(&bench, kiln, "at-convert", Signal::INT, CTRL_C);
    assert_eq!(bench.names("cache/bases"), [""; 0], "no half of a base");
}

#[test]
fn ctrl_c_before_qemu_has_connected() {
    let bench = bench();
    stopped_at(&bench, bench.build(&json!({ "start": [["hang"]] })), "at-start", Signal::INT, CTRL_C);
}

#[test]
fn ctrl_c_while_the_guest_boots() {
    let bench = bench();
    stopped_at(&bench, bench.build(&json!({ "boot": [["hang"]] })), "at-boot", Signal::INT, CTRL_C);
}

#[test]
fn ctrl_c_in_a_step() {
    let bench = bench();
    let said = json!([["print", "x\n"], ["hang"]]);
    stopped_at(&bench, bench.build(&step(said)), "at-step-hello", Signal::INT, CTRL_C);
}

#[test]
fn ctrl_c_while_the_disk_is_frozen() {
    let bench = bench();
    stopped_at(&bench, bench.build(&json!({ "freeze": [["hang"]] })), "at-freeze", Signal::INT, CTRL_C);
}

#[test]
fn ctrl_c_while_qemu_ends() {
    let bench = bench();
    stopped_at(&bench, bench.build(&json!({ "qmp quit": [["hang"]] })), "at-qmp-quit", Signal::INT, CTRL_C);
}

/// Standard error that nobody reads holds kiln up in the middle of its export, for as long as it takes to stop it.
#[test]
fn ctrl_c_while_the_disk_is_written() {
    let bench = Bench::empty();
    write_base(&bench.path("base.raw"), Base::Large(48));
    bench.one_step();
    // F_SETPIPE_SZ: the smallest pipe there is.
    let small_pipe = "import fcntl, os, sys; fcntl.fcntl(2, 1031, 4096); os.execv(sys.argv[1], sys.argv[1:])";
    let kiln = bench.program("python3".as_ref(), ["-c", small_pipe, env!("CARGO_BIN_EXE_kiln")]);
    let kiln = ["--format", "json", "build", "web.toml", "--accel", "tcg"].into_iter().fold(kiln, Kiln::arg);
    let (kiln, stderr) = kiln.start_with_stderr();
    // One byte at a time: what comes after the line must stay in the pipe.
    let mut stderr = BufReader::with_capacity(1, stderr);
    let mut line = String::new();
    while !line.contains("\"export\"") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "kiln ended before it exported");
    }
    kiln.signal(Signal::INT);
    let mut last = String::new();
    for line in stderr.lines() {
        last = line.unwrap();
    }
    assert_eq!(kiln.end().code, Some(130), "{last}");
    let error: Value = serde_json::from_str(&last).unwrap();
    assert_eq!((&error["event"], &error["exit_code"]), (&json!("error"), &json!(130)));
    bench.assert_tidy(&[]);
}

/// A terminal sends Ctrl-C to the whole job. QEMU is not of it, or it would die before kiln could say why.
#[test]
fn ctrl_c_to_the_whole_job() {
    let bench = bench();
    let kiln = bench.build(&step(json!([["hang"]]))).start();
    bench.wait_for("at-step-hello");
    kiln.signal_job(Signal::INT);
    assert_eq!(kiln.end().failed(130), CTRL_C);
    bench.assert_tidy(&["web"]);
}

#[test]
fn sigterm() {
    let bench = bench();
    let kiln = bench.build(&step(json!([["hang"]])));
    stopped_at(&bench, kiln, "at-step-hello", Signal::TERM, "error: stopped by SIGTERM\n");
}

#[test]
fn a_closed_terminal() {
    let bench = bench();
    let kiln = bench.build(&step(json!([["hang"]])));
    stopped_at(&bench, kiln, "at-step-hello", Signal::HUP, "error: stopped by SIGHUP\n");
}

#[test]
fn ctrl_c_keeps_nothing_even_where_errors_would() {
    let bench = bench();
    let kiln = bench.build(&step(json!([["hang"]]))).arg("--keep-on-error");
    stopped_at(&bench, kiln, "at-step-hello", Signal::INT, CTRL_C);
}

/// Whatever kiln still does after the first one, the second ends it: QEMU goes with it, and the next build tidies up.
#[test]
fn a_second_ctrl_c_ends_kiln_at_once() {
    let bench = bench();
    let kiln = bench.build(&step(json!([["hang"]]))).start();
    bench.wait_for("at-step-hello");
    kiln.signal(Signal::INT);
    // It may have ended after the first: then there is nobody to send the second to.
    let _ = rustix::process::kill_process(kiln.pid(), Signal::INT);
    assert_eq!(kiln.end().code, Some(130));
    wait_until("QEMU to die with kiln", || bench.qemus().iter().all(|pid| !alive(*pid)));
    bench.assert_earlier_output();
    assert_eq!(bench.build(&json!({})).run().succeeded(), "out/web\n");
    bench.assert_tidy(&["web"]);
}

#[test]
fn a_killed_kiln_takes_qemu_along_and_the_next_tidies_up() {
    let bench = bench();
    let kiln = bench.build(&step(json!([["print", "x\n"], ["hang"]]))).start();
    bench.wait_for("at-step-hello");
    kiln.signal(Signal::KILL);
    assert_eq!(kiln.end().code, None);
    wait_until("QEMU to die with kiln", || bench.qemus().iter().all(|pid| !alive(*pid)));
    assert_eq!(bench.names("cache/work").len(), 1, "nobody could tidy up yet");
    assert_eq!(bench.names("out").len(), 2);
    bench.assert_earlier_output();
    assert_eq!(bench.build(&json!({})).run().succeeded(), "out/web\n");
    bench.assert_tidy(&["web"]);
}

fn alive(pid: i32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|command| !command.is_empty())
}
