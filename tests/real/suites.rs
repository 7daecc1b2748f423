//! Every suite by both boot paths of the build, and booted afterwards by both kinds of firmware: of the newest stable
//! suite each disk by both, of the others one disk by each.

use super::{Bench, base};

/// Builds by `boot`, looks into the disk, and boots it by `firmware`. With `inside`, the recipe's own tests run there.
fn builds_and_boots(suite: &str, boot: &str, firmware: &[&str], inside: bool) {
    let bench = Bench::new();
    let base = base(suite);
    // Without a card a distribution's own boot waits two minutes for one.
    let network = if boot == "direct" { "none" } else { "open" };
    let tests = if inside {
        "[[test]]\nname = \"has the mark\"\nrun = \"grep -q disk-x86_64 /etc/kiln-was-here\"\n\
         [[test]]\nname = \"root has grown\"\nrun = \"test $(df -Pk / | awk 'NR==2{print $2}') -gt 3500000\"\n"
    } else {
        ""
    };
    bench.write(
        "disk.toml",
        format!(
            "name = \"disk\"\n[base]\nimage = \"{}\"\n[disk]\nsize = \"4GiB\"\n[machine]\nboot = \"{boot}\"\nnetwork = \"{network}\"\n\
             [[provision]]\nname = \"mark\"\ninline = \"ls /sys/class/net; echo $KILN_NAME-$KILN_ARCH > /etc/kiln-was-here\"\n{tests}",
            base.display()
        ),
    );
    assert_eq!(bench.ok(&["build", "disk.toml"]), "out/disk\n");
    let manifest = bench.manifest("disk");
    assert_eq!(manifest["guest"]["boot"], boot);
    assert_eq!(manifest["size"], 4_u64 << 30);
    assert_eq!(manifest["boot_modes"], serde_json::json!(["legacy-bios", "uefi"]));
    let step = std::fs::read_to_string(bench.path("out/disk/steps/01-mark.log")).unwrap();
    assert_eq!(step == "lo\n", network == "none", "`none` is no card at all: {step}");
    let root = bench.clean_root("disk");
    assert!(root.blocks() * root.block_size() > 3_800_000_000, "the filesystem has grown");
    assert_eq!(root.read("/etc/kiln-was-here"), "disk-x86_64\n");
    assert_eq!(root.read("/etc/machine-id"), "");
    assert_eq!(root.names("/var/lib/cloud"), [""; 0]);
    assert!(!root.names("/etc/ssh").iter().any(|name| name.starts_with("ssh_host_")));
    for gone in ["/var/lib/systemd/random-seed", "/var/lib/systemd/credential.secret", "/etc/passwd-", "/etc/shadow-"] {
        assert!(!root.has(gone), "{gone} is sealed away");
    }
    assert_eq!(root.names("/var/log/journal"), [""; 0]);
    for firmware in firmware {
        bench.boots("disk", firmware);
    }
}

#[test]
fn bookworm_directly() {
    builds_and_boots("bookworm", "direct", &["bios", "uefi"], true);
}

#[test]
fn bookworm_by_its_firmware() {
    builds_and_boots("bookworm", "firmware", &["bios", "uefi"], false);
}

#[test]
fn trixie_directly() {
    builds_and_boots("trixie", "direct", &["uefi"], false);
}

#[test]
fn trixie_by_its_firmware() {
    builds_and_boots("trixie", "firmware", &["bios"], false);
}

#[test]
fn bullseye_directly() {
    builds_and_boots("bullseye", "direct", &["uefi"], false);
}

#[test]
fn bullseye_by_its_firmware() {
    builds_and_boots("bullseye", "firmware", &["bios"], false);
}
