//! Guests that don't boot, don't end, die or lie.

use serde_json::{Value, json};

use super::fails;
use crate::support::{Base, Bench, step, write_base};

const FAILED: &[&str] = &["web.failed"];

#[track_caller]
fn fails_to_boot(actions: Value, code: i32) -> String {
    let bench = Bench::new();
    bench.one_step();
    fails(&bench, &json!({ "boot": actions }), code, FAILED)
}

#[test]
fn a_kernel_panic() {
    let panic = "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n";
    insta::assert_snapshot!(fails_to_boot(json!([["console", panic], ["hang"]]), 3), @r#"
    error: the guest can't go on: [    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)
     |
     = log: out/web.failed/console.log
    help: read the console's log; [machine] boot = "firmware" starts the disk by its own boot loader
    "#);
}

#[test]
fn a_root_that_the_initramfs_does_not_find() {
    let console =
        "Gave up waiting for root file system device.\r\nALERT! UUID=1 does not exist.  Dropping to a shell!\r\n";
    insta::assert_snapshot!(fails_to_boot(json!([["console", console], ["hang"]]), 3), @r#"
    error: the guest can't go on: ALERT! UUID=1 does not exist.  Dropping to a shell!
     |
     = log: out/web.failed/console.log
    help: read the console's log; [machine] boot = "firmware" starts the disk by its own boot loader
    "#);
}

#[test]
fn a_system_in_emergency_mode() {
    let console = "You are in emergency mode. After logging in, type \"journalctl -xb\"\r\n";
    insta::assert_snapshot!(fails_to_boot(json!([["console", console], ["hang"]]), 3), @r#"
    error: the guest can't go on: You are in emergency mode. After logging in, type "journalctl -xb"
     |
     = log: out/web.failed/console.log
    help: read the console's log; [machine] boot = "firmware" starts the disk by its own boot loader
    "#);
}

#[test]
fn a_disk_that_does_not_boot() {
    let bench = Bench::empty();
    write_base(&bench.path("base.raw"), Base::Firmware);
    bench.one_step();
    let console = "SeaBIOS (version 1.16.2)\r\nBooting from Hard Disk...\r\nNo bootable device.\r\n";
    let scenario = json!({ "boot": [["console", console], ["hang"]] });
    insta::assert_snapshot!(fails(&bench, &scenario, 3, FAILED), @r#"
    error: the guest can't go on: No bootable device.
     |
     = log: out/web.failed/console.log
    help: read the console's log; is the base a bootable cloud image for this architecture?
    "#);
    assert!(bench.read("out/web.failed/console.log").contains("SeaBIOS"), "the console is kept");
}

#[test]
fn a_boot_loader_without_its_modules() {
    let bench = Bench::empty();
    write_base(&bench.path("base.raw"), Base::Firmware);
    bench.one_step();
    let console = "GRUB loading.\r\nerror: no such partition.\r\nEntering rescue mode...\r\ngrub rescue> ";
    let scenario = json!({ "boot": [["console", console], ["hang"]] });
    insta::assert_snapshot!(fails(&bench, &scenario, 3, FAILED), @r#"
    error: the guest can't go on: grub rescue>
     |
     = log: out/web.failed/console.log
    help: read the console's log; is the base a bootable cloud image for this architecture?
    "#);
}

#[test]
fn a_guest_that_hangs_at_boot() {
    let bench = Bench::new();
    bench.recipe("[machine]\nnetwork = \"none\"\ntimeout = \"1s\"\n");
    let scenario = json!({ "boot": [["console", "\u{1b}[2JLoading...\r\n[  OK  ] Reached target\r\n"], ["hang"]] });
    insta::assert_snapshot!(fails(&bench, &scenario, 6, FAILED), @r#"
    error: waited 1.0 s for the guest's agent
     |
     = console: Loading...
     = console: [  OK  ] Reached target
     = log: out/web.failed/console.log
    help: read the console's log; a slow host may need a longer [machine] timeout
    "#);
}

#[test]
fn a_guest_that_hangs_at_boot_by_its_firmware() {
    let bench = Bench::empty();
    write_base(&bench.path("base.raw"), Base::Firmware);
    bench.recipe("[machine]\nnetwork = \"none\"\ntimeout = \"1s\"\n");
    insta::assert_snapshot!(fails(&bench, &json!({ "boot": [["hang"]] }), 6, FAILED), @r#"
    error: waited 1.0 s for the guest's agent
     |
     = log: out/web.failed/build.log
    help: read the console's log; the agent is started by cloud-init, which the base must have
    "#);
}

/// As kernels under software emulation do now and then; QEMU tells it by how often the guest has read its disk.
#[test]
fn a_guest_that_hangs_before_it_reads_its_disk_is_started_again() {
    let bench = Bench::new();
    bench.recipe("[machine]\nnetwork = \"none\"\ntimeout = \"5s\"\n");
    let once = json!({ "reads": [0, 400], "boot 1": [["console", "Booting the kernel.\r\n"], ["hang"]] });
    let said = bench.build(&once).run();
    assert_eq!(said.stderr, "warning: the guest has not read its disk for 1.0 s: starting it again\n");
    assert_eq!((said.code, bench.qemus().len()), (Some(0), 2));
    bench.assert_tidy(&["web"]);

    let bench = Bench::new();
    bench.recipe("[machine]\nnetwork = \"none\"\ntimeout = \"1s\"\n");
    let said = fails(&bench, &json!({ "reads": [0, 0, 0], "boot": [["hang"]] }), 6, FAILED);
    assert!(
        said.contains(": starting it again\nerror: waited ") && said.contains(" for the guest's agent\n"),
        "{said}"
    );
    assert_eq!(bench.qemus().len(), 3);
}

#[test]
fn a_guest_that_powers_off_while_booting() {
    let off = json!([["console", "reboot: Power down\r\n"], ["sleep", 0.1],
        ["event", "SHUTDOWN", { "guest": true, "reason": "guest-shutdown" }], ["exit", 0]]);
    insta::assert_snapshot!(fails_to_boot(off, 3), @r#"
    error: the guest powered off by itself
     |
     = console: reboot: Power down
     = log: out/web.failed/console.log
    help: read the console's log; [machine] boot = "firmware" starts the disk by its own boot loader
    "#);
}

#[test]
fn a_guest_that_resets_while_booting() {
    let reset = json!([["event", "SHUTDOWN", { "guest": true, "reason": "guest-reset" }], ["exit", 0]]);
    insta::assert_snapshot!(fails_to_boot(reset, 3), @r#"
    error: the guest rebooted by itself
     |
     = log: out/web.failed/build.log
    help: read the console's log; [machine] boot = "firmware" starts the disk by its own boot loader
    "#);
}

#[test]
fn a_guest_that_reports_a_panic() {
    let panicked = json!([["event", "GUEST_PANICKED", { "action": "pause" }], ["hang"]]);
    insta::assert_snapshot!(fails_to_boot(panicked, 3), @r#"
    error: the guest can't go on: the guest reports a kernel panic
     |
     = log: out/web.failed/build.log
    help: read the console's log; [machine] boot = "firmware" starts the disk by its own boot loader
    "#);
}

#[test]
fn an_agent_with_another_protocol() {
    let bench = Bench::new();
    bench.one_step();
    let said = fails(&bench, &json!({ "ready": "ready 2 1.0\n" }), 70, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: the guest's agent answered `ready 2 1.0`, which kiln doesn't understand
     |
     = log: out/web.failed/build.log
    "#);
}

#[test]
fn an_agent_that_talks_nonsense() {
    let bench = Bench::new();
    bench.one_step();
    let said = fails(&bench, &json!({ "ready": "\u{1b}[31mlogin: \u{7}\n" }), 70, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: the guest's agent answered `�[31mlogin: �`, which kiln doesn't understand
     |
     = log: out/web.failed/build.log
    "#);
}

#[track_caller]
fn fails_in_step(actions: Value, code: i32) -> String {
    let bench = Bench::new();
    bench.one_step();
    fails(&bench, &step(actions), code, FAILED)
}

#[test]
fn a_step_that_fails() {
    let apt = "Reading package lists...\nE: Unable to locate package ngnix\n";
    insta::assert_snapshot!(fails_in_step(json!([["print", apt], ["status", 100]]), 5), @r#"
    error: step `hello` failed with exit code 100
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = last output: E: Unable to locate package ngnix
      = look at the guest as it was before: kiln shell web.toml
      = log: out/web.failed/steps/01-hello.log
    help: the guest had no network (network = "none"): set [machine] network = "open", or copy in what is needed
    "#);
}

#[test]
fn a_step_that_fails_without_a_word() {
    insta::assert_snapshot!(fails_in_step(json!([["status", 1]]), 5), @r#"
    error: step `hello` failed with exit code 1
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = log: out/web.failed/steps/01-hello.log
    help: look at the guest as it was before: kiln shell web.toml
    "#);
}

#[test]
fn a_provisioner_that_fails() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nname = \"web server\"\nuses = \"nginx\"\n");
    let said = json!({ "step web server": [["print", "E: Unable to locate package nginx\n"], ["status", 100]] });
    insta::assert_snapshot!(fails(&bench, &said, 5, FAILED), @r#"
    error: provisioner `web server` failed with exit code 100
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = last output: E: Unable to locate package nginx
      = look at the guest as it was before: kiln shell web.toml
      = log: out/web.failed/steps/01-web-server.log
    help: the guest had no network (network = "none"): set [machine] network = "open", or copy in what is needed
    "#);
}

#[test]
fn a_step_that_hangs() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nname = \"hello\"\ninline = \"sleep inf\"\ntimeout = \"1s\"\n");
    let said = fails(&bench, &step(json!([["print", "waiting for the database\n"], ["hang"]])), 6, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: step `hello` did not end within 1.0 s
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = last output: waiting for the database
      = look at the guest as it was before: kiln shell web.toml
      = log: out/web.failed/steps/01-hello.log
    help: give the step a longer timeout = "…", or find out in its log what it waits for
    "#);
}

#[test]
fn a_guest_that_floods_its_agent_port_is_timed_out_all_the_same() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nname = \"hello\"\ninline = \"x\"\ntimeout = \"1s\"\n");
    let said = fails(&bench, &step(json!([["ctl-flood"]])), 6, FAILED);
    assert!(said.starts_with("error: step `hello` did not end within 1.0 s"), "{said}");
}

#[test]
fn a_step_that_the_kernel_kills_for_memory() {
    let console = "[   9.1] Out of memory: Killed process 412 (node) total-vm:2097152kB\r\n";
    let actions = json!([["console", console], ["sleep", 0.1], ["status", 137]]);
    insta::assert_snapshot!(fails_in_step(actions, 5), @r#"
    error: step `hello` was killed by signal 9
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = look at the guest as it was before: kiln shell web.toml
      = log: out/web.failed/steps/01-hello.log
    help: the guest ran out of memory (1 GiB): raise [machine] memory
    "#);
}

#[test]
fn a_step_that_fills_the_disk() {
    let actions = json!([["print", "tar: web.tar: Cannot write\n"], ["free", 0], ["status", 2]]);
    insta::assert_snapshot!(fails_in_step(actions, 5), @r#"
    error: step `hello` failed with exit code 2
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = last output: tar: web.tar: Cannot write
      = look at the guest as it was before: kiln shell web.toml
      = log: out/web.failed/steps/01-hello.log
    help: the guest's disk is full: raise [disk] size
    "#);
}

#[test]
fn a_copy_for_a_user_that_the_guest_does_not_have() {
    let bench = Bench::new();
    bench.write("site/index.html", "hello");
    bench.recipe("[[provision]]\ncopy = \"site/\"\nto = \"/srv/\"\nowner = \"web:www\"\n");
    let said = fails(&bench, &json!({ "put": [["fail", "the guest has no user `web`"]] }), 5, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: step `copy site/`: the guest has no user `web`
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = log: out/web.failed/steps/01-copy-site.log
    help: look at the guest as it was before: kiln shell web.toml
    "#);
}

#[test]
fn a_panic_in_a_step() {
    let panic = "[   9.1] Kernel panic - not syncing: Fatal exception\r\n";
    insta::assert_snapshot!(fails_in_step(json!([["console", panic], ["hang"]]), 3), @r#"
    error: step `hello`: the guest can't go on: [   9.1] Kernel panic - not syncing: Fatal exception
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = log: out/web.failed/console.log
    "#);
}

#[test]
fn a_step_that_reboots_the_guest() {
    let reset = json!([["event", "SHUTDOWN", { "guest": true, "reason": "guest-reset" }], ["exit", 0]]);
    insta::assert_snapshot!(fails_in_step(reset, 3), @r#"
    error: step `hello`: the guest rebooted by itself
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = log: out/web.failed/build.log
    help: leave that to kiln: a step with `reboot = true` is followed by a reboot
    "#);
}

#[test]
fn a_guest_whose_network_does_not_come_up() {
    let bench = Bench::new();
    bench.write("web.toml", "name = \"web\"\n[base]\nimage = \"base.raw\"\n");
    let said = json!({ "own KILN_MAC": [["print", "kiln: the guest has no ip\n"], ["status", 1]] });
    insta::assert_snapshot!(fails(&bench, &said, 3, FAILED), @r#"
    error: the guest's network could not be set up (status 1): the guest has no ip
     |
     = log: out/web.failed/build.log
    help: the build's log has all that it said; does the base lack something?
    "#);
}

#[test]
fn a_filesystem_that_does_not_grow() {
    let bench = Bench::new();
    bench.one_step();
    let said = json!({ "own kiln_grow": [["print", "kiln: no resize2fs\n"], ["status", 1]] });
    insta::assert_snapshot!(fails(&bench, &said, 3, FAILED), @r#"
    error: the larger root filesystem could not be set up (status 1): no resize2fs
     |
     = log: out/web.failed/build.log
    help: the build's log has all that it said; does the base lack something?
    "#);
}

#[test]
fn a_seal_that_fails() {
    let bench = Bench::new();
    bench.one_step();
    let said = json!({ "own kiln_seal": [["print", "rm: read-only\n"], ["status", 1]] });
    insta::assert_snapshot!(fails(&bench, &said, 3, FAILED), @r#"
    error: the seal could not be set up (status 1): rm: read-only
     |
     = log: out/web.failed/build.log
    help: the build's log has all that it said; does the base lack something?
    "#);
}

#[test]
fn a_disk_that_cannot_be_frozen() {
    let bench = Bench::new();
    bench.one_step();
    let said = fails(&bench, &json!({ "freeze": [["fail", "/srv (ext4) stays in use"]] }), 5, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: the guest's disk can't be unmounted: /srv (ext4) stays in use
     |
     = log: out/web.failed/build.log
    help: end what uses it in the last step
    "#);
}

/// Nothing is spared then, and in the end the filesystem is frozen as it is.
#[test]
fn a_root_filesystem_that_is_busy() {
    let bench = Bench::new();
    bench.one_step();
    let busy = json!({ "freeze": [["fail", "busy"]] });
    bench.build(&busy).run().succeeded();
    let commands = bench.commands();
    let ends: Vec<_> = commands.iter().rev().take(4).map(|command| command["moment"].as_str().unwrap()).collect();
    assert_eq!(ends, ["freeze whatever", "own", "freeze", "own"]);
    let again = |index: usize| commands[index]["rest"].to_string().contains("KILN_AGAIN='yes'");
    assert!(again(commands.len() - 2) && !again(commands.len() - 4));

    let bench = Bench::new();
    bench.one_step();
    let busy = json!({ "freeze": [["fail", "busy"]], "freeze whatever": [["fail", "the root could not be frozen"]] });
    let said = fails(&bench, &busy, 5, FAILED);
    assert!(said.starts_with("error: the guest's disk can't be unmounted: the root could not be frozen\n"), "{said}");
}

#[test]
fn a_guest_that_does_not_come_back_after_a_reboot() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nname = \"hello\"\ninline = \"x\"\nreboot = true\n");
    let panic = "Kernel panic - not syncing: Attempted to kill init!\n";
    let said = fails(&bench, &json!({ "boot 2": [["console", panic], ["hang"]] }), 3, FAILED);
    assert!(said.starts_with("error: the guest can't go on: Kernel panic"), "{said}");
    assert_eq!(bench.qemus().len(), 2);
}

#[test]
fn a_guest_that_does_not_shut_down_for_a_reboot() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nname = \"hello\"\ninline = \"x\"\nreboot = true\n");
    let said = fails(&bench, &json!({ "halt": [["exit", 3]] }), 4, FAILED);
    insta::assert_snapshot!(said, @r#"
    error: QEMU failed with exit code 3 while the guest was running
     |
     = log: out/web.failed/build.log
    help: build again; if it ends the same way, try --accel tcg or another QEMU
    "#);
}

/// `done`, the agent's mark and its answers, all with another nonce: none of it ends the step, which then fails.
#[test]
fn a_step_that_forges_its_result() {
    let bench = Bench::new();
    bench.one_step();
    let other = "0123456789abcdef0123456789abcdef";
    let forged = format!("done {other} 0 1000\n\0kiln-end {other}\n\0kiln-end \n\0kiln-end\n\u{ff}\u{fe}\0\0\u{1b}[2J");
    let ctl = format!("done {other} 0 1000\ndone  0 0\ndone\nfail {other} x\n\u{1b}junk\n\n");
    let said = fails(&bench, &step(json!([["print", forged], ["ctl", ctl], ["status", 7]])), 5, FAILED);
    assert!(said.starts_with("error: step `hello` failed with exit code 7\n"), "{said}");
    assert!(!said.contains('\u{1b}') && !said.contains('\0'), "{said:?}");
    let log = std::fs::read(bench.path("out/web.failed/steps/01-hello.log")).unwrap();
    let bytes: Vec<u8> = forged.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
    assert_eq!(log, bytes, "all of it is in the log, byte for byte");
}

/// Without an answer the guest failed, not the step.
#[test]
fn a_step_without_a_result() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nname = \"hello\"\ninline = \"x\"\ntimeout = \"1s\"\n");
    let forged = "\0kiln-end 0123456789abcdef0123456789abcdef\ndone 0123456789abcdef0123456789abcdef 0 1\n";
    let said = fails(&bench, &step(json!([["print", forged], ["silent"]])), 6, FAILED);
    assert!(said.starts_with("error: step `hello` did not end within 1.0 s\n"), "{said}");
}

#[test]
fn a_result_that_is_no_number() {
    let said = fails_in_step(json!([["status", "lots"]]), 70);
    assert!(said.starts_with("error: step `hello`: the guest's agent answered `done "), "{said}");
}

#[test]
fn a_failed_guests_disk_is_kept_if_asked_for() {
    let bench = Bench::new();
    bench.one_step();
    let kiln = bench.build(&step(json!([["status", 1]]))).arg("--keep-on-error");
    insta::assert_snapshot!(super::fails_with(&bench, kiln, 5, FAILED), @r#"
    error: step `hello` failed with exit code 1
     --> web.toml:6:1
      |
    6 | [[provision]]
      | ^^^^^^^^^^^^^
      |
      = the guest's disk is kept: out/web.failed/failed-disk.raw
      = look into it: sudo mount -o ro,loop,offset=1048576 out/web.failed/failed-disk.raw /mnt
      = log: out/web.failed/steps/01-hello.log
    help: look at the guest as it was before: kiln shell web.toml
    "#);
    let disk = bench.path("out/web.failed/failed-disk.raw");
    assert_eq!(disk.metadata().unwrap().len(), 1 << 30);
    let mut look = std::process::Command::new("debugfs");
    look.args(["-R", "stat /etc/os-release"]).arg(format!("{}?offset=1048576", disk.display()));
    crate::support::tool(&mut look, "");
}
