//! Bases and recipes that can't be built.

use serde_json::json;

use super::fails;
use crate::support::Bench;

#[track_caller]
fn refused(bench: &Bench) -> String {
    let said = fails(bench, &json!({}), 3, &[]);
    assert_eq!(bench.qemus(), [0; 0], "nothing is started");
    said
}

/// With this file as the base.
#[track_caller]
fn refused_base(content: &[u8]) -> String {
    let bench = Bench::empty();
    bench.write("base.raw", content);
    bench.one_step();
    refused(&bench)
}

#[test]
fn a_missing_recipe() {
    let bench = Bench::empty();
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the recipe `web.toml` does not exist
     |
    help: `kiln init` writes a recipe to start from
    "#);
}

#[test]
fn a_folder_without_recipes() {
    let bench = Bench::empty();
    bench.write("web.toml/x", "");
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the folder `web.toml` has no recipe in it
     |
    help: recipes are the *.toml directly in it; `kiln init` writes one to start from
    "#);
}

#[test]
fn a_recipe_that_is_no_text() {
    let bench = Bench::empty();
    bench.write("web.toml", b"name = \"\xff\xfe\"");
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the recipe `web.toml` is not UTF-8 text
     |
    help: `kiln init` writes a recipe to start from
    "#);
}

#[test]
fn a_recipe_that_is_no_toml() {
    let bench = Bench::empty();
    bench.write("web.toml", "name = \"web\"\n[base\nimage = 1\n");
    insta::assert_snapshot!(refused(&bench), @r#"
    error: unclosed table, expected `]`
     --> web.toml:2:6
      |
    2 | [base
      |      ^
    "#);
}

#[test]
fn an_unknown_key() {
    let bench = Bench::new();
    bench.recipe("[disk]\nsizes = \"4GiB\"\n");
    insta::assert_snapshot!(refused(&bench), @r#"
    error: unknown key `sizes` in [disk]
     --> web.toml:7:1
      |
    7 | sizes = "4GiB"
      | ^^^^^
      |
    help: did you mean `size`?
    "#);
}

#[test]
fn an_unknown_provisioner() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nuses = \"ngnix\"\n");
    insta::assert_snapshot!(refused(&bench), @r#"
    error: no provisioner is called `ngnix`
     --> web.toml:7:8
      |
    7 | uses = "ngnix"
      |        ^^^^^^^
      |
    help: did you mean `nginx`? there are `environment`, `firewall`, `nginx`, `nodejs`, `permissions`, `updates`, `users`
    "#);
}

#[test]
fn a_script_that_is_not_there() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nrun = \"scripts/app.sh\"\n");
    insta::assert_snapshot!(refused(&bench), @r#"
    error: cannot read `./scripts/app.sh`: no such file or folder
     --> web.toml:7:7
      |
    7 | run = "scripts/app.sh"
      |       ^^^^^^^^^^^^^^^^
      |
    help: paths are relative to the recipe's folder
    "#);
}

#[test]
fn a_file_to_copy_that_is_not_there() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\ncopy = \"site/\"\nto = \"/var/www/\"\n");
    insta::assert_snapshot!(refused(&bench), @r#"
    error: cannot read `./site/`: no such file or folder
     --> web.toml:7:8
      |
    7 | copy = "site/"
      |        ^^^^^^^
      |
    help: paths are relative to the recipe's folder
    "#);
}

#[test]
fn a_wrong_value_on_the_command_line() {
    let bench = Bench::new();
    bench.one_step();
    let kiln = bench.build(&json!({})).arg("--set").arg("machine.memory=lots");
    insta::assert_snapshot!(super::fails_with(&bench, kiln, 3, &[]), @r#"
    error: `--set machine.memory=lots`: `lots` has no number
     |
    help: write for example `4GiB`
    "#);
}

#[test]
fn a_disk_smaller_than_its_base() {
    let bench = Bench::empty();
    crate::support::write_base(&bench.path("base.raw"), crate::support::Base::Direct);
    std::fs::OpenOptions::new().write(true).open(bench.path("base.raw")).unwrap().set_len(3 << 29).unwrap();
    bench.recipe("[disk]\nsize = \"1GiB\"\n");
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the disk's size 1 GiB is smaller than the base's 1.5 GiB
     --> web.toml:7:8
      |
    7 | size = "1GiB"
      |        ^^^^^^
      |
    help: use size = "2GiB" or more
    "#);
}

#[test]
fn another_architecture() {
    let bench = Bench::new();
    bench.write("web.toml", "name = \"web\"\n[base]\nimage = \"base.raw\"\narch = \"aarch64\"\n");
    insta::assert_snapshot!(fails(&bench, &json!({}), 4, &[]), @r#"
    error: aarch64 can't be built yet
     --> web.toml:4:8
      |
    4 | arch = "aarch64"
      |        ^^^^^^^^^
      |
    help: missing in kiln: machines for qemu-system-aarch64 and AAVMF firmware; x86_64 works
    "#);
}

#[test]
fn a_missing_base() {
    let bench = Bench::empty();
    bench.one_step();
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the base image `base.raw` does not exist
     --> web.toml:3:9
      |
    3 | image = "base.raw"
      |         ^^^^^^^^^^
      |
    help: download a cloud image (qcow2, raw, VMDK or VHDX) there, or make a Debian one with scripts/base-image
    "#);
}

#[test]
fn a_base_to_download() {
    let bench = Bench::empty();
    let digest = "a".repeat(64);
    let base = format!("image = \"https://example.com/debian.qcow2\"\nsha256 = \"{digest}\"");
    bench.write("web.toml", format!("name = \"web\"\n[base]\n{base}\n"));
    insta::assert_snapshot!(refused(&bench), @r#"
    error: kiln can't download `https://example.com/debian.qcow2` yet
     --> web.toml:3:9
      |
    3 | image = "https://example.com/debian.qcow2"
      |         ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
      |
    help: download it and name the file: image = "FILE"
    "#);
}

#[test]
fn a_wrong_digest_names_both() {
    let bench = Bench::empty();
    bench.write("base.raw", "abc");
    let base = format!("image = \"base.raw\"\nsha256 = \"{}\"", "0".repeat(64));
    bench.write("web.toml", format!("name = \"web\"\n[base]\n{base}\n"));
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the base image `base.raw` has another sha256 than the recipe says
     --> web.toml:4:10
      |
    4 | sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
      |          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
      |
      = expected 0000000000000000000000000000000000000000000000000000000000000000
      = found    ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad
    help: if you trust the file, put what was found into the recipe; if not, download it again
    "#);
}

#[test]
fn a_wrong_sha512_names_both() {
    let bench = Bench::empty();
    bench.write("base.raw", "abc");
    let base = format!("image = \"base.raw\"\nsha512 = \"{}\"", "0".repeat(128));
    bench.write("web.toml", format!("name = \"web\"\n[base]\n{base}\n"));
    let said = refused(&bench);
    assert!(said.contains("has another sha512 than the recipe says"), "{said}");
    assert!(said.contains(&format!("expected {}", "0".repeat(128))), "{said}");
    assert!(said.contains("found    ddaf35a193617abacc417349ae204131"), "{said}");
}

#[test]
fn a_base_that_is_text() {
    insta::assert_snapshot!(refused_base(&b"<html>404 Not Found</html>\n".repeat(100)), @r#"
    error: base.raw is not a disk image: no partition table or filesystem found
     --> web.toml:3:9
      |
    3 | image = "base.raw"
      |         ^^^^^^^^^^
      |
    help: base.image must be a bootable cloud image: qcow2, raw, VMDK or VHDX, gzipped or not
    "#);
}

#[test]
fn a_base_that_is_empty() {
    insta::assert_snapshot!(refused_base(b""), @r#"
    error: base.raw is not a disk image: no partition table or filesystem found
     --> web.toml:3:9
      |
    3 | image = "base.raw"
      |         ^^^^^^^^^^
      |
    help: base.image must be a bootable cloud image: qcow2, raw, VMDK or VHDX, gzipped or not
    "#);
}

#[test]
fn a_base_of_zeros() {
    insta::assert_snapshot!(refused_base(&vec![0; 1 << 20]), @r#"
    error: base.raw is not a disk image: no partition table or filesystem found
     --> web.toml:3:9
      |
    3 | image = "base.raw"
      |         ^^^^^^^^^^
      |
    help: base.image must be a bootable cloud image: qcow2, raw, VMDK or VHDX, gzipped or not
    "#);
}

#[test]
fn a_base_that_is_packed() {
    insta::assert_snapshot!(refused_base(b"\xfd7zXZ\0and so on"), @r#"
    error: the base image `base.raw` is packed with xz
     --> web.toml:3:9
      |
    3 | image = "base.raw"
      |         ^^^^^^^^^^
      |
    help: unpack it first with xz -d
    "#);
}

#[test]
fn a_base_that_is_a_folder() {
    let bench = Bench::empty();
    bench.one_step();
    bench.write("base.raw/x", "");
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the base image `base.raw` is a folder
     --> web.toml:3:9
      |
    3 | image = "base.raw"
      |         ^^^^^^^^^^
    "#);
}

#[test]
fn a_qcow2_that_is_cut_short() {
    let bench = Bench::new();
    let mut convert = std::process::Command::new("qemu-img");
    convert.args(["convert", "-O", "qcow2"]).arg(bench.path("base.raw")).arg(bench.path("base.qcow2"));
    crate::support::tool(&mut convert, "");
    let qcow2 = std::fs::read(bench.path("base.qcow2")).unwrap();
    bench.write("base.raw", &qcow2[..qcow2.len() / 4]);
    bench.one_step();
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the base image `base.raw` holds no disk that can be read
     --> web.toml:3:9
      |
    3 | image = "base.raw"
      |         ^^^^^^^^^^
      |
    help: download it again and compare its digest with the publisher's
    "#);
    assert_eq!(bench.names("cache/bases"), [""; 0], "no such base is kept");
}

#[test]
fn a_layer_over_another_image() {
    let bench = Bench::new();
    bench.write("secret.raw", [0; 1024]);
    let mut create = std::process::Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/secret.raw", "-u"]);
    crate::support::tool(create.arg(bench.path("base.raw")).arg("1M"), "");
    bench.one_step();
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the base image `base.raw` is only a layer over `/secret.raw`
     --> web.toml:3:9
      |
    3 | image = "base.raw"
      |         ^^^^^^^^^^
      |
    help: flatten it: qemu-img convert -O qcow2 LAYER WHOLE
    "#);
}

#[test]
fn a_format_that_no_cloud_hands_out() {
    let bench = Bench::new();
    let mut create = std::process::Command::new("qemu-img");
    create.args(["create", "-q", "-f", "vdi"]);
    crate::support::tool(create.arg(bench.path("base.raw")).arg("1M"), "");
    bench.one_step();
    insta::assert_snapshot!(refused(&bench), @r#"
    error: the base image `base.raw` has the format vdi, which kiln doesn't take
     --> web.toml:3:9
      |
    3 | image = "base.raw"
      |         ^^^^^^^^^^
      |
    help: convert it: qemu-img convert -O qcow2 IMAGE NEW
    "#);
}
