//! A person, and a script, in the guest of a build.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::{Bench, base, said};
use crate::support::Terminal;

/// What is kept, but when it was used.
fn kept(bench: &Bench) -> String {
    let script = "find . -type f ! -name used -printf '%p %s %T@\\n' | sort";
    super::run(Command::new("sh").args(["-c", script]).current_dir(bench.path("cache/layers")))
}

#[test]
fn a_shell_in_the_guest_changes_nothing() {
    let bench = Bench::new();
    let recipe = format!(
        "name = \"disk\"\n[base]\nimage = \"{}\"\n[machine]\nnetwork = \"none\"\n[env]\nAPP = \"it's\"\n\
         [[provision]]\nname = \"mark\"\ninline = \"echo made > /etc/mark\"\ncheckpoint = true\n\
         [[provision]]\nname = \"fails\"\ninline = \"touch /etc/failed; exit 3\"\n",
        base("bookworm").display()
    );
    bench.write("disk.toml", recipe);
    let failed = bench.kiln().args(["build", "disk.toml"]).output().unwrap();
    assert_eq!(failed.status.code(), Some(5), "{}", said(&failed));
    assert!(said(&failed).contains("kiln shell disk.toml"));
    let before = kept(&bench);

    let commands = |arguments: &[&str], text: &str| {
        let mut kiln = bench.kiln();
        let kiln = kiln.args(["-q", "shell", "disk.toml"]).args(arguments).stdin(Stdio::piped());
        let mut kiln = kiln.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        kiln.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = kiln.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let look = "pwd; cat /etc/mark; echo \"$APP $KILN_NAME\"; test ! -e /etc/failed; touch /etc/left; rm /etc/mark\n";
    assert_eq!(commands(&[], look), (Some(0), "/root\nmade\nit's disk\n".to_owned()));
    let (code, said) = commands(&["--at", "base"], "test ! -e /etc/left; cat /etc/mark");
    assert_eq!(code, Some(5));
    assert!(said.contains("/etc/mark: No such file"), "{said}");

    let screen = typed(&bench, b"tty; stty size; echo $TERM $PWD; cat /etc/mark\rsleep 100\r\x03exit\r");
    for line in ["/dev/ttyS0", "33 101", "xterm /root", "made"] {
        assert!(screen.split(['\r', '\n']).any(|shown| shown == line), "{line}: {screen}");
    }
    assert_eq!(kept(&bench), before);
}

/// What a terminal of 33 rows and 101 columns shows of a shell in which this is typed, at a person's pace.
fn typed(bench: &Bench, keys: &[u8]) -> String {
    let terminal = Terminal::new(33, 101);
    let mut kiln = bench.kiln();
    let kiln = kiln.args(["shell", "disk.toml"]).env("TERM", "xterm").stdin(terminal.far_end());
    let mut kiln = kiln.stdout(Stdio::piped()).spawn().unwrap();
    let mut console = kiln.stdout.take().unwrap();
    let (sender, screen) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = console.read(&mut buffer) {
            let _ = sender.send(buffer[..n].to_vec());
        }
    });
    let mut shown = Vec::new();
    let mut rest = keys;
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        match screen.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(bytes) => shown.extend(bytes),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let _ = kiln.kill();
                break;
            }
        }
        let sleeps = rest.first() == Some(&3) && String::from_utf8_lossy(&shown).contains("sleep 100\r\n");
        if sleeps || shown.ends_with(b"# ") {
            let end = rest.iter().position(|&key| key == b'\r' || key == 3).map_or(rest.len(), |at| at + 1);
            terminal.type_in(&rest[..end]);
            rest = &rest[end..];
        }
    }
    assert!(kiln.wait().unwrap().success(), "{}", String::from_utf8_lossy(&shown));
    assert!(terminal.is_as_it_was());
    String::from_utf8_lossy(&shown).into_owned()
}
