//! A person at a booted disk: the console, and ssh with a key of their own.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use super::{Bench, base, run};

/// Nobody is at the keyboard; ssh comes in on loopback, and what it does stays on the overlay.
#[test]
fn ssh_with_a_key() {
    let bench = Bench::new();
    bench.write(
        "disk.toml",
        format!(
            "name = \"disk\"\n[base]\nimage = \"{}\"\n[machine]\nnetwork = \"none\"\n[[provision]]\ninline = \"echo built > /etc/mark\"\n",
            base("bookworm").display()
        ),
    );
    bench.ok(&["build", "disk.toml"]);
    let key = bench.path("key");
    run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
    let modified = || std::fs::metadata(bench.path("out/disk/disk.raw")).unwrap().modified().unwrap();
    let before = modified();

    let mut kiln = bench.kiln();
    kiln.args(["run", "out/disk", "--firmware", "uefi", "--ssh-key"]).arg(bench.path("key.pub"));
    let mut kiln = kiln.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(kiln.stderr.take().unwrap()).lines().map(Result::unwrap);
    let port = lines.find_map(|line| line.split("ssh -p ").nth(1)?.split(' ').next()?.parse::<u16>().ok()).unwrap();
    let drain = std::thread::spawn(move || lines.count());
    let mut console = BufReader::new(kiln.stdout.take().unwrap());
    // The login is on the console before cloud-init has put the key into place: it says so there too.
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("finished at") {
        assert_ne!(console.read_until(b'\n', &mut seen).unwrap(), 0, "{}", String::from_utf8_lossy(&seen));
    }
    let output = Command::new("ssh")
        .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes"])
        .args(["-o", "ConnectTimeout=60", "-i"])
        .arg(&key)
        .args(["-p", &port.to_string(), "debian@127.0.0.1", "cat /etc/mark; sudo touch /changed"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "built\n", "{}", super::said(&output));

    kiln.stdin.take().unwrap().write_all(b"\x1d").unwrap();
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut console, &mut rest).unwrap();
    assert!(kiln.wait().unwrap().success());
    drain.join().unwrap();
    assert_eq!(modified(), before);
    assert!(!bench.clean_root("disk").has("/changed"), "the disk is as it was built");
}
