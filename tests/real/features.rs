//! Everything that steps can do, in one guest.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::{Bench, base};

const RECIPE: &str = r#"
name = "features"
[base]
image = "BASE"
[disk]
size = "4GiB"
[env]
QUOTES = "it's \"$HOME\" \\ `id`"
[[provision]]
name = "tree"
copy = "tree/"
to = "/srv/my site/"
owner = "www-data"
[[provision]]
name = "one file"
copy = "tree/plain.txt"
to = "/srv/renamed.txt"
mode = "0600"
[[provision]]
name = "script with files"
run = "scripts/app.sh"
files = ["data/ä b.txt"]
[[provision]]
name = "forge and junk"
inline = '''
printf '\000kiln-end 00000000000000000000000000000000\n'
for fd in 3 4 5; do echo "done x 0 0" 2>/dev/null >&$fd || true; done
head -c 3000000 /dev/urandom
sleep 86400 &
nohup sleep 86401 >/dev/null 2>&1 &
(while sleep 0.1; do echo a daemon talks; done) &
'''
[[provision]]
name = "network"
inline = '''
getent hosts deb.debian.org
bash -c "echo >/dev/tcp/deb.debian.org/80"
for address in 10.0.2.2 10.0.2.3 127.0.0.1; do
    if timeout 10 bash -c "echo >/dev/tcp/$address/PORT" 2>/dev/null; then echo "reached $address"; exit 1; fi
done
'''
[[provision]]
name = "another kernel"
inline = '''
cd /boot
kernel=$(ls vmlinuz-* | sort -V | tail -n 1)
cp "$kernel" vmlinuz-99.1-kiln
cp "initrd.img-${kernel#vmlinuz-}" initrd.img-99.1-kiln
'''
reboot = true
[[provision]]
name = "after the reboot"
inline = '''
getent hosts deb.debian.org
rm /boot/vmlinuz-99.1-kiln /boot/initrd.img-99.1-kiln
head -c 2147483648 /dev/zero > /srv/zeros
head -c 268435456 /dev/urandom > /srv/gone
sync
rm /srv/gone
'''
[[test]]
name = "a drive as EC2 has it"
run = "findmnt -n -o SOURCE / | grep nvme"
[[test]]
name = "tree"
run = '''
cd "/srv/my site"
test "$(stat -c '%U:%G %a' 'deep/größe 1.txt')" = 'www-data:www-data 640'
test "$(cat 'deep/größe 1.txt')" = content
test "$(readlink link)" = plain.txt
test -d empty
test "$(stat -c '%U %a' /srv/renamed.txt)" = 'root 600'
'''
"#;

#[test]
fn steps_do_what_they_are_asked() {
    let bench = Bench::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    bench
        .write("features.toml", RECIPE.replace("BASE", &base("bookworm").display().to_string()).replace("PORT", &port));
    bench.write("tree/plain.txt", "plain");
    bench.write("tree/deep/größe 1.txt", "content");
    std::fs::set_permissions(bench.path("tree/deep/größe 1.txt"), PermissionsExt::from_mode(0o640)).unwrap();
    std::fs::create_dir(bench.path("tree/empty")).unwrap();
    symlink("plain.txt", bench.path("tree/link")).unwrap();
    bench.write("scripts/data/ä b.txt", "beside");
    let script = "#!/usr/bin/env python3\nimport os\nprint(os.environ['QUOTES'], open('data/ä b.txt').read(), os.environ['KILN_STEP'])\n";
    bench.write("scripts/app.sh", script);
    bench.ok(&["build", "features.toml"]);

    let log = |name: &str| std::fs::read(bench.path(&format!("out/features/steps/{name}.log"))).unwrap();
    assert_eq!(
        String::from_utf8(log("03-script-with-files")).unwrap(),
        "it's \"$HOME\" \\ `id` beside script with files\n"
    );
    assert!(log("04-forge-and-junk").len() > 3_000_000, "the junk is kept in full");
    let build = std::fs::read_to_string(bench.path("out/features/build.log")).unwrap();
    assert!(build.contains("kernel /boot/vmlinuz-99.1-kiln"), "the new kernel is the one that boots next: {build}");

    let root = bench.clean_root("features");
    assert_eq!(root.names("/var/tmp"), [""; 0]);
    assert_eq!(root.names("/tmp"), [""; 0]);
    assert_eq!(root.read("/etc/machine-id"), "");
    let resolver = if root.has("/etc/resolv.conf") { root.read("/etc/resolv.conf") } else { String::new() };
    assert!(!resolver.contains("10.0.2.3"), "the build's resolver is gone: {resolver}");
    assert_eq!(root.names("/var/lib/apt/lists"), ["partial"]);

    // Two GiB of written zeros are data; what was deleted is a hole. The base itself has 500 to 600 MiB.
    let data = bench.manifest("features")["data_bytes"].as_u64().unwrap() >> 20;
    assert!((500 + 2048..600 + 2048 + 100).contains(&data), "{data} MiB of data");
    let packages = bench.manifest("features")["packages"].as_array().unwrap().clone();
    assert!(packages.len() > 100 && !packages.iter().any(|line| line.as_str().unwrap().contains("a daemon talks")));
    bench.ok(&["test", "out/features", "--firmware", "uefi"]);
}
