//! A suite by a boot path of the build, and the result by both kinds of firmware.

use super::{Bench, base};

fn builds_and_boots(suite: &str, boot: &str) {
    let bench = Bench::new();
    let base = base(suite);
    bench.write(
        "disk.toml",
        format!(
            "name = \"disk\"\n[base]\nimage = \"{}\"\n[disk]\nsize = \"4GiB\"\n[machine]\nboot = \"{boot}\"\nnetwork = \"none\"\n\
             [[provision]]\nname = \"mark\"\ninline = \"ls /sys/class/net; echo $KILN_NAME-$KILN_ARCH > /etc/kiln-was-here\"\n\
             [[test]]\nname = \"has the mark\"\nrun = \"grep -q disk-x86_64 /etc/kiln-was-here\"\n\
             [[test]]\nname = \"root has grown\"\nrun = \"test $(df -Pk / | awk 'NR==2{{print $2}}') -gt 3500000\"\n",
            base.display()
        ),
    );
    assert_eq!(bench.ok(&["build", "disk.toml"]), "out/disk\n");
    let manifest = bench.manifest("disk");
    assert_eq!(manifest["guest"]["boot"], boot);
    assert_eq!(manifest["size"], 4_u64 << 30);
    let step = std::fs::read_to_string(bench.path("out/disk/steps/01-mark.log")).unwrap();
    assert_eq!(step, "lo\n", "network = \"none\" is no card at all");
    let root = bench.clean_root("disk");
    assert_eq!(root.read("/etc/machine-id"), "");
    assert_eq!(root.names("/var/lib/cloud"), [""; 0]);
    assert!(!root.names("/etc/ssh").iter().any(|name| name.starts_with("ssh_host_")));
    bench.boots("disk");
}

#[test]
fn bookworm_directly() {
    builds_and_boots("bookworm", "direct");
}
