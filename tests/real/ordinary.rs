//! kiln never needs root: all of it as an ordinary user.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::{Bench, base, run};

/// Where the tests run as root, as `nobody`; otherwise they are an ordinary user's anyway.
#[test]
fn a_build_and_a_boot() {
    let bench = Bench::outside();
    let root = rustix::process::geteuid().is_root();
    // What a user has of their own: kiln, a base, a recipe.
    for (from, name) in [(env!("CARGO_BIN_EXE_kiln").into(), "kiln"), (base("bookworm"), "base.qcow2")] {
        std::fs::copy(from, bench.path(name)).unwrap();
        std::fs::set_permissions(bench.path(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
    bench.write(
        "mine.toml",
        "name = \"mine\"\n[base]\nimage = \"base.qcow2\"\n[machine]\nnetwork = \"none\"\n\
         [[provision]]\ninline = \"id -u\"\n",
    );
    if root {
        run(Command::new("chown").args(["-R", "65534:65534"]).arg(bench.path("")));
    }
    let kiln = |arguments: &[&str]| {
        let mut command = if root {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(bench.path("kiln"));
            command
        } else {
            Command::new(bench.path("kiln"))
        };
        command.current_dir(bench.path("")).env("HOME", bench.path("")).env("TMPDIR", bench.path(""));
        run(command.env("KILN_CACHE_DIR", bench.path("cache")).args(arguments));
    };
    kiln(&["build", "mine.toml"]);
    assert_eq!(std::fs::read_to_string(bench.path("out/mine/steps/01-id-u.log")).unwrap(), "0\n", "root in the guest");
    bench.clean_root("mine");
    kiln(&["test", "out/mine", "--firmware", "bios"]);
}
