//! `kiln shell`: whose guest it opens, what comes in and goes out, and that nothing that is kept changes.

use std::io::Write as _;
use std::time::SystemTime;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Bench, Kiln, Running, Terminal, wait_until};

const STEPS: [&str; 3] = ["one", "two", "three"];

/// With a build of three steps, whose memory is kept after all of them.
fn built() -> Bench {
    let bench = Bench::new();
    let step = |name: &str| format!("[[provision]]\nname = \"{name}\"\ninline = \"{name}\"\ncheckpoint = true\n");
    bench.recipe(&STEPS.map(step).concat());
    bench.build(&json!({})).run().succeeded();
    forget(&bench);
    bench
}

fn forget(bench: &Bench) {
    for name in bench.names("traces") {
        std::fs::remove_file(bench.path("traces").join(name)).unwrap();
    }
}

fn shell(bench: &Bench, scenario: &Value) -> Kiln {
    bench.kiln(["shell", "web.toml", "--accel", "tcg"]).scenario(scenario)
}

/// Everything that is kept, but when it was used.
fn kept(bench: &Bench) -> Vec<(String, u64, SystemTime)> {
    let mut files = Vec::new();
    for layer in bench.names("cache/layers") {
        for name in bench.names(&format!("cache/layers/{layer}")).into_iter().filter(|name| name != "used") {
            let name = format!("cache/layers/{layer}/{name}");
            let metadata = std::fs::metadata(bench.path(&name)).unwrap();
            files.push((name, metadata.len(), metadata.modified().unwrap()));
        }
    }
    files
}

/// The shell's own command to the guest.
fn sent(bench: &Bench) -> Value {
    let commands = bench.commands();
    commands.into_iter().find(|command| command["moment"] == "step shell").unwrap()
}

fn with_commands(kiln: Kiln, commands: &[u8]) -> Running {
    let (running, mut input) = kiln.start_with_stdin();
    input.write_all(commands).unwrap();
    running
}

#[test]
fn a_person_gets_a_shell() {
    let bench = built();
    let before = kept(&bench);
    let terminal = Terminal::new(33, 101);
    let scenario = json!({
        "resume": [["console", "noise of a resumed guest\r\n"]],
        "step shell": [["console", "root@web:~# "], ["echo-line"], ["console", "bye\r\n"], ["status", 3]],
    });
    let running = shell(&bench, &scenario).env("TERM", "xterm-256color").start_at(&terminal);
    bench.wait_for("at-step-shell");
    assert!(!terminal.is_as_it_was(), "keys are the guest's");
    terminal.type_in(b"exit 3\r");
    let ran = running.end();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.ends_with("root@web:~# exit 3\r\nbye\r\n"), "{}", ran.stdout);
    assert!(ran.stderr.contains("the guest is as it was after step 3/3 `three`; nothing that you do is kept"));
    assert!(terminal.is_as_it_was());
    let files = sent(&bench)["files"].clone();
    let env = files[".kiln/env"]["content"].as_str().unwrap();
    for line in ["KILN_ROWS='33'", "KILN_COLUMNS='101'", "TERM='xterm-256color'", "KILN_NAME='web'"] {
        assert!(env.contains(&format!("export {line}\n")), "{line}: {env}");
    }
    assert_eq!(kept(&bench), before);
    bench.assert_tidy(&["web"]);
}

/// What a person looks at in the guest says nothing of the guest.
#[test]
fn what_the_shell_shows_is_not_judged() {
    let bench = built();
    let terminal = Terminal::new(24, 80);
    let shows = json!({ "step shell": [["console", "# grep panic log\r\nKernel panic - not syncing: VFS\r\n"], ["sleep", 0.2]] });
    let ran = shell(&bench, &shows).start_at(&terminal).end();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("Kernel panic"));
}

#[test]
fn the_end_key_and_a_power_off_end_it() {
    let bench = built();
    let terminal = Terminal::new(24, 80);
    let running = shell(&bench, &json!({ "step shell": [["echo-input"]] })).start_at(&terminal);
    bench.wait_for("at-step-shell");
    terminal.type_in(b"sleep 1000\r\x1d");
    assert_eq!(running.end().code, Some(0));
    let off =
        json!({ "step shell": [["event", "SHUTDOWN", { "guest": true, "reason": "guest-shutdown" }], ["exit", 0]] });
    let ran = shell(&bench, &off).start_at(&terminal).end();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(terminal.is_as_it_was());
    bench.assert_tidy(&["web"]);
}

#[test]
fn a_signal_ends_the_guest_and_gives_the_terminal_back() {
    let bench = built();
    let before = kept(&bench);
    let terminal = Terminal::new(24, 80);
    let running = shell(&bench, &json!({ "step shell": [["hang"]] })).arg("-q").start_at(&terminal);
    bench.wait_for("at-step-shell");
    wait_until("the terminal is the guest's", || !terminal.is_as_it_was());
    running.signal(Signal::TERM);
    assert_eq!(running.end().failed(143), "error: stopped by SIGTERM\n");
    assert!(terminal.is_as_it_was());
    assert_eq!(kept(&bench), before);
    bench.assert_tidy(&["web"]);
}

#[test]
fn a_guest_that_has_no_terminal_for_it() {
    let bench = built();
    let terminal = Terminal::new(24, 80);
    let lacks = json!({ "step shell": [["print", "kiln: the guest has no setsid (util-linux)\n"], ["status", 127]] });
    let said = shell(&bench, &lacks).arg("-q").start_at(&terminal).end().failed(3);
    insta::assert_snapshot!(said, @r#"
    error: the shell could not be opened: the guest has no setsid (util-linux)
     |
    help: commands can be run in it all the same: kiln shell RECIPE <COMMANDS
    "#);
}

#[test]
fn commands_from_standard_input() {
    let bench = built();
    let before = kept(&bench);
    let prints = json!({ "step shell": [["print", "uid=0(root)\nno line end"]] });
    let ran = with_commands(shell(&bench, &prints).arg("-q"), b"id\nprintf 'no line end'\n").end();
    assert_eq!(ran.stderr, "");
    assert_eq!(ran.succeeded(), "uid=0(root)\nno line end");
    let files = sent(&bench)["files"].clone();
    assert_eq!(files["script"]["content"], "id\nprintf 'no line end'\n");
    assert_eq!(files[".kiln/step"]["content"], "script=$PWD/script\ncd /root\nexec sh -eu \"$script\"\n");
    assert_eq!(kept(&bench), before);
    bench.assert_tidy(&["web"]);
    forget(&bench);
    with_commands(shell(&bench, &json!({})), b"#!/usr/bin/python3\nprint(1)\n").end().succeeded();
    let script = sent(&bench)["files"][".kiln/step"]["content"].clone();
    assert_eq!(script, "script=$PWD/script\ncd /root\nexec \"$script\"\n");
}

#[test]
fn commands_that_fail() {
    let bench = built();
    let fails = json!({ "step shell": [["print", "cat: x: No such file\n"], ["status", 1]] });
    let ran = with_commands(shell(&bench, &fails).arg("-q"), b"cat x\n").end();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(5), "cat: x: No such file\n"));
    assert_eq!(ran.stderr, "error: the commands from standard input failed with exit code 1\n");
    let running = with_commands(shell(&bench, &json!({ "step shell": [["hang"]] })).arg("-q"), b"sleep 1000\n");
    wait_until("the second one", || bench.traces("pid-").len() == 2 && bench.commands().len() >= 4);
    running.signal_job(Signal::INT);
    assert_eq!(running.end().failed(130), "error: stopped by Ctrl-C\n");
    bench.assert_tidy(&["web"]);
}

#[test]
fn any_state_that_is_kept() {
    let bench = built();
    for (at, after) in [("two", "two"), ("1", "one"), ("0", "the booted base"), ("base", "the booted base")] {
        let ran = with_commands(shell(&bench, &json!({})).args(["--at", at]), b"id").end();
        assert!(ran.stderr.contains("resume"), "{}", ran.stderr);
        let running = shell(&bench, &json!({})).args(["--format", "json", "--at", at]);
        let events = with_commands(running, b"id").end().events();
        assert_eq!(events[0]["detail"], format!("taking up the guest after `{after}`"));
    }
    let said = with_commands(shell(&bench, &json!({})).args(["--at", "four"]), b"").end().failed(2);
    insta::assert_snapshot!(said, @r#"
    error: --at: the recipe has no step `four`
     |
    help: name a step, or give its number, or 0 for the booted base; `kiln plan` lists them
    "#);
}

/// What can't be had is said, with what to do.
#[test]
fn states_that_are_not_kept() {
    let bench = built();
    let text = bench.read("web.toml");
    bench.write("web.toml", text.replace("inline = \"two\"", "inline = \"changed\""));
    let said = with_commands(shell(&bench, &json!({})).args(["--at", "two"]), b"").end().failed(3);
    insta::assert_snapshot!(said, @r#"
    error: the state after `two` is not kept
     |
    help: run `kiln build web.toml` first; `kiln plan web.toml` says what is kept
    "#);
    bench.write("web.toml", text.replace("inline = \"two\"", "inline = \"two\"\ncache = false"));
    let said = with_commands(shell(&bench, &json!({})).args(["--at", "3"]), b"").end().failed(3);
    insta::assert_snapshot!(said, @r#"
    error: the state after `three` is never kept: it always runs, or follows a step that does
     |
    help: name a step before it with --at, or none for the last that is kept
    "#);
    std::fs::remove_dir_all(bench.path("cache/layers")).unwrap();
    let said = with_commands(shell(&bench, &json!({})), b"").end().failed(3);
    insta::assert_snapshot!(said, @r#"
    error: no state of this recipe's guest is kept
     |
    help: run `kiln build web.toml` first; `kiln plan web.toml` says what is kept
    "#);
    assert_eq!(bench.qemus(), [0; 0], "no guest was started for any of them");
    bench.assert_tidy(&["web"]);
}

/// The guest as the next step meets it, whatever was kept: a quick step runs again.
#[test]
fn a_state_without_memory_is_made_again() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nname = \"one\"\ninline = \"one\"\ncheckpoint = false\n");
    bench.build(&json!({ "boot": [["sleep", 1]] })).run().succeeded();
    forget(&bench);
    let before = kept(&bench);
    let ran = with_commands(shell(&bench, &json!({})), b"id").end();
    assert!(bench.traces("at-boot").is_empty());
    let moments: Vec<_> = bench.commands().iter().map(|command| command["moment"].clone()).collect();
    assert_eq!(moments, ["wake", "step one", "step shell"], "{}", ran.stderr);
    assert_eq!(kept(&bench), before);
}

/// Where the step took longer than a boot, its disk is booted, unless it left something outside it.
#[test]
fn a_disk_is_booted_if_it_is_all_that_there_was() {
    for (left, expected) in [("", &["boot", "step shell"][..]), ("web.service", &["wake", "step one", "step shell"])] {
        let bench = Bench::new();
        bench.recipe("[[provision]]\nname = \"one\"\ninline = \"one\"\ncheckpoint = false\n");
        bench.build(&json!({ "sync": [["left", left]], "step one": [["sleep", 2]] })).run().succeeded();
        forget(&bench);
        with_commands(shell(&bench, &json!({})), b"id").end();
        let boots = bench.traces("at-boot").into_iter().map(|_| "boot".to_owned());
        let moments =
            bench.commands().into_iter().map(|command| command["moment"].as_str().unwrap_or_default().to_owned());
        assert_eq!(boots.chain(moments).collect::<Vec<_>>(), expected, "{left}");
    }
}

#[test]
fn after_a_failed_step_it_is_the_state_before() {
    let bench = Bench::new();
    let step = |name: &str| format!("[[provision]]\nname = \"{name}\"\ninline = \"{name}\"\ncheckpoint = true\n");
    bench.recipe(&STEPS.map(step).concat());
    let said =
        bench.build(&json!({ "step three": [["status", 1]] })).arg("--set").arg("disk.size=4GiB").run().failed(5);
    let look = "look at the guest as it was before: kiln shell web.toml --set 'disk.size=4GiB'";
    assert!(said.ends_with(&format!("help: {look}\n")), "{said}");
    let kiln = shell(&bench, &json!({})).args(["--set", "disk.size=4GiB", "--format", "json"]);
    let events = with_commands(kiln, b"id").end().events();
    assert_eq!(events[0]["detail"], "taking up the guest after `two`");
    // What a build leaves aside may be kept, and lie deeper than what failed.
    let fails = bench.build(&json!({ "step two": [["status", 1]] })).arg("--no-cache");
    assert!(fails.run().failed(5).ends_with("help: look at the guest as it was before: kiln shell web.toml --at 1\n"));
}

#[test]
fn what_a_shell_stands_on_is_not_removed() {
    let bench = built();
    let before = kept(&bench);
    let running = with_commands(shell(&bench, &json!({ "step shell": [["wait-for", "go"]] })), b"id");
    bench.wait_for("at-step-shell");
    bench.kiln(["cache", "gc", "--keep", "0"]).run();
    assert_eq!(kept(&bench), before);
    // And a build goes on beside it.
    bench.build(&json!({})).arg("--no-cache=three").run().succeeded();
    bench.write("traces/go", "");
    running.end().succeeded();
}
