//! Bases that are not one ext4 partition: `/boot` on its own, and roots of other kinds that have to grow.

use std::process::Command;

use super::{Bench, base, root, run};

const MIB: u64 = 1 << 20;

/// The stock base with its `/boot` moved to a partition of its own before the root, as distributions lay theirs out.
fn with_own_boot(bench: &Bench) {
    let (stock, disk, boot) = (bench.path("stock.raw"), bench.path("base.raw"), bench.path("boot"));
    run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(base("bookworm")).arg(&stock));
    std::fs::File::create(&disk).unwrap().set_len(3328 * MIB).unwrap();
    run(Command::new("/sbin/sgdisk")
        .args(["-n14:2048:8191", "-t14:ef02", "-n15:8192:262143", "-t15:ef00"])
        .args(["-n13:262144:786431", "-t13:8300", "-n1:786432:0", "-t1:8304"])
        .arg(&disk));
    let place = |from: u64, count: u64, to: u64| {
        run(Command::new("dd")
            .args(["bs=1M", "conv=notrunc,sparse", "status=none"])
            .arg(format!("if={}", stock.display()))
            .arg(format!("of={}", disk.display()))
            .args([format!("skip={from}"), format!("count={count}"), format!("seek={to}")]));
    };
    place(1, 127, 1);
    place(128, 2943, 384);

    let at = format!("{}?offset={}", disk.display(), 384 * MIB);
    let debugfs = |request: &str| run(Command::new("/sbin/debugfs").args(["-R", request]).arg(&at));
    std::fs::create_dir(&boot).unwrap();
    debugfs(&format!("rdump /boot {}", boot.display()));
    let uuid = "4b1d5a9e-0f3c-4c55-9c1d-6b696c6e0001";
    let stock_lines = debugfs("cat /etc/fstab");
    let lines = stock_lines.lines().filter(|line| line.starts_with("UUID="));
    let fstab = lines.fold(format!("UUID={uuid} /boot ext4 defaults 0 2\n"), |all, line| all + line + "\n");
    std::fs::write(bench.path("fstab"), fstab).unwrap();
    // What stayed behind in the root's own /boot would be found there as well.
    let names = std::fs::read_dir(boot.join("boot")).unwrap().map(|entry| entry.unwrap().file_name());
    let kernels = names.map(|name| name.into_string().unwrap()).filter(|name| name.contains("-cloud-"));
    let requests = kernels.fold(String::new(), |all, name| format!("{all}rm /boot/{name}\n"));
    let requests = format!("{requests}rm /etc/fstab\nwrite {} /etc/fstab\n", bench.path("fstab").display());
    std::fs::write(bench.path("requests"), requests).unwrap();
    run(Command::new("/sbin/debugfs").args(["-w", "-f"]).arg(bench.path("requests")).arg(&at));
    run(Command::new("/sbin/mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-U", uuid, "-E", &format!("offset={}", 128 * MIB), "-d"])
        .arg(boot.join("boot"))
        .arg(&disk)
        .arg("256M"));
}

#[test]
fn boot_on_its_own_partition() {
    let bench = Bench::new();
    with_own_boot(&bench);
    bench.write(
        "own.toml",
        "name = \"own\"\n[base]\nimage = \"base.raw\"\n[machine]\nnetwork = \"none\"\nboot = \"direct\"\n\
         [[provision]]\nname = \"look\"\ninline = \"mountpoint /boot && ls /boot/vmlinuz-*-cloud-amd64\"\n",
    );
    bench.ok(&["build", "own.toml"]);
    let log = std::fs::read_to_string(bench.path("out/own/steps/01-look.log")).unwrap();
    assert!(log.starts_with("/boot is a mountpoint\n/boot/vmlinuz-"), "{log}");
    bench.clean_root("own");
}

/// kiln's script for growing a root, in a real kernel with each filesystem as the root of a small system.
#[test]
fn xfs_and_btrfs_grow_by_their_own_tools() {
    let bench = Bench::new();
    std::fs::copy(root().join("src/build/guest/grow.sh"), {
        std::fs::create_dir(bench.path("scripts")).unwrap();
        bench.path("scripts/grow.sh")
    })
    .unwrap();
    bench.write(
        "scripts/grow-one",
        r#"set -eu
kind=$1
truncate -s 400M "/var/$kind"
"mkfs.$kind" -q "/var/$kind"
place=/mnt/$kind
mkdir -p "$place"
loop=$(losetup --find --show "/var/$kind")
mount "$loop" "$place"
mkdir "$place/usr" "$place/proc" "$place/dev" "$place/etc" "$place/sys"
for link in bin sbin lib lib64; do ln -s "usr/$link" "$place/$link"; done
for folder in usr proc dev etc sys; do mount --rbind "/$folder" "$place/$folder"; done
cp grow.sh "$place/grow.sh"
before=$(df -Pk "$place" | awk 'NR==2{print $2}')
truncate -s 800M "/var/$kind"
losetup -c "$loop"
chroot "$place" sh -eu /grow.sh
after=$(df -Pk "$place" | awk 'NR==2{print $2}')
echo "$kind: $before $after"
test "$after" -gt $((before + 350000))
umount -R -l "$place"
losetup -d "$loop"
rm "/var/$kind"
"#,
    );
    bench.write(
        "grow.toml",
        format!(
            "name = \"grow\"\n[base]\nimage = \"{}\"\n[[provision]]\nname = \"tools\"\ninline = \"\"\"\n\
             sed -i s/=yes/=no/ /etc/initramfs-tools/update-initramfs.conf\napt-get update -q\n\
             apt-get install -q -y --no-install-recommends xfsprogs btrfs-progs\n\"\"\"\n\
             [[provision]]\nname = \"grow\"\nrun = \"scripts/both.sh\"\nfiles = [\"grow.sh\", \"grow-one\"]\n",
            base("bookworm").display()
        ),
    );
    bench.write("scripts/both.sh", "for kind in xfs btrfs; do sh ./grow-one $kind; done\n");
    bench.ok(&["build", "grow.toml"]);
    let log = std::fs::read_to_string(bench.path("out/grow/steps/02-grow.log")).unwrap();
    assert!(log.contains("xfs: ") && log.contains("btrfs: "), "{log}");
}
