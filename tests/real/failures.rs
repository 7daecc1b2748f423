//! What only a real kernel can run out of.

use super::{Bench, base, said};

fn fails(bench: &Bench, arguments: &[&str]) -> String {
    let output = bench.kiln().args(["-q", "build"]).args(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    said(&output)
}

fn recipe(memory: &str, script: &str) -> String {
    format!(
        "name = \"short\"\n[base]\nimage = \"{}\"\n[machine]\nnetwork = \"none\"\nmemory = \"{memory}\"\n\
         [[provision]]\nname = \"greedy\"\ninline = \"{script}\"\n",
        base("bookworm").display()
    )
}

#[test]
fn a_guest_without_memory() {
    let bench = Bench::new();
    bench.write("short.toml", recipe("512MiB", "tail /dev/zero"));
    let said = fails(&bench, &["short.toml"]);
    assert!(said.contains("the guest ran out of memory (512 MiB): raise [machine] memory"), "{said}");
    assert!(!bench.path("out/short").exists());
}

/// The failed guest's disk is kept, with what the step wrote last.
#[test]
fn a_guest_whose_disk_is_full() {
    let bench = Bench::new();
    bench.write("short.toml", recipe("1GiB", "echo last words > /root/note; head -c 9G /dev/zero > /var/large"));
    let said = fails(&bench, &["short.toml", "--keep-on-error"]);
    assert!(said.contains("the guest's disk is full: raise [disk] size"), "{said}");
    let start = said.split("offset=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap();
    let root = super::Root::of(&bench.path("out/short.failed/failed-disk.raw"), start, &bench.path("kept.ext4"));
    // The guest was stopped as it was: some is only in the filesystem's journal, which a mount would replay.
    let replay = std::process::Command::new("/sbin/e2fsck").arg("-fy").arg(bench.path("kept.ext4")).output().unwrap();
    assert!(matches!(replay.status.code(), Some(0..=2)), "{}", super::said(&replay));
    assert_eq!(root.read("/root/note"), "last words\n");
}
