//! Sums on request: the disk's plain SHA-256, and what `--verify` reads again.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use kiln::disk::{self, BlockMap, Digest, Image, Work};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Bench, Kiln, wait_until};

fn bench() -> Bench {
    let bench = Bench::new();
    bench.one_step();
    bench
}

fn build(bench: &Bench) -> Kiln {
    bench.build(&json!({}))
}

fn manifest(bench: &Bench) -> Value {
    serde_json::from_str(&bench.read("out/web/manifest.json")).unwrap()
}

fn sha256sum(path: &Path) -> String {
    let output = std::process::Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

/// What happened in a run that succeeded, as the names of its phases.
#[track_caller]
fn phases(bench: &Bench, arguments: &[&str]) -> Vec<String> {
    let kiln = bench.kiln(["--format", "json", "build", "web.toml", "--accel", "tcg"]).args(arguments);
    let ran = kiln.run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let events = ran.events();
    let done = events.iter().filter(|event| event["event"] == "phase_done");
    done.map(|event| event["phase"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_sum_is_what_sha256sum_prints() {
    let bench = bench();
    let phases = phases(&bench, &["--sha256"]);
    assert!(phases.ends_with(&["export".to_owned(), "sha256".to_owned()]), "{phases:?}");
    assert_eq!(manifest(&bench)["sha256"], sha256sum(&bench.path("out/web/disk.raw")));
    let timed = manifest(&bench)["phases"].as_array().unwrap().last().unwrap()["phase"].clone();
    assert_eq!(timed, "sha256");
    build(&bench).arg("--no-cache").run().succeeded();
    assert_eq!(manifest(&bench).get("sha256"), None, "it was not asked for");
    bench.assert_tidy(&["web"]);
}

#[test]
fn a_sum_that_is_asked_for_later_needs_no_guest() {
    let bench = bench();
    build(&bench).run().succeeded();
    let (before, qemus) = (manifest(&bench), bench.qemus().len());
    let disk = || {
        let disk = bench.path("out/web/disk.raw").metadata().unwrap();
        (disk.ino(), disk.mtime(), disk.mtime_nsec())
    };
    let untouched = disk();
    // Neither the recipe's text nor the option is a part of what the disk is.
    bench.write("web.toml", bench.read("web.toml") + "[disk]\nsha256 = true\n");
    assert_eq!(phases(&bench, &[]), ["sha256"]);
    let mut after = manifest(&bench);
    // Its being what sha256sum prints is another test's business: that takes seconds.
    let image = Image::raw(&bench.path("out/web/disk.raw")).unwrap();
    let sum = json!(disk::sha256(&image, &Work::quiet(1)).unwrap());
    assert_eq!(after["sha256"], sum);
    after.as_object_mut().unwrap().remove("sha256");
    // The recipe's text is another, and so is the digest of the manifest itself.
    after["inputs"]["recipe_sha256"] = before["inputs"]["recipe_sha256"].clone();
    after["manifest_sha256"] = before["manifest_sha256"].clone();
    assert_eq!(after, before, "nothing else changed");
    assert_eq!((bench.qemus().len(), disk()), (qemus, untouched));
    bench.assert_tidy(&["web"]);

    assert_eq!(phases(&bench, &["--sha256"]), [""; 0], "it is there");
    assert_eq!(phases(&bench, &["--set", "disk.sha256=false"]), [""; 0]);
    assert!(manifest(&bench)["sha256"].is_string(), "it stays");
    // A wrong one is believed as long as the disk is not read.
    bench.signed_manifest(|manifest| manifest["sha256"] = json!("0".repeat(64)));
    assert_eq!(phases(&bench, &[]), [""; 0]);
    assert_eq!(manifest(&bench)["sha256"], "0".repeat(64));
    assert_eq!(phases(&bench, &["--verify"]), ["verify", "verify", "verify", "sha256"]);
    assert_eq!(manifest(&bench)["sha256"], sum);
}

#[test]
fn a_kiln_that_is_stopped_while_it_sums_changes_nothing() {
    let bench = bench();
    bench.write("web.toml", bench.read("web.toml") + "[disk]\nsize = \"64GiB\"\n");
    build(&bench).run().succeeded();
    let before = bench.read("out/web/manifest.json");
    for signal in [Signal::INT, Signal::KILL] {
        let arguments = ["--format", "json", "build", "web.toml", "--accel", "tcg", "--sha256"];
        let (kiln, stderr) = bench.kiln(arguments).start_with_stderr();
        let mut lines = BufReader::new(stderr).lines().map(Result::unwrap);
        let progress = |line: &String| line.contains("\"progress\"") && line.contains("\"sha256\"");
        lines.find(progress).expect("kiln ended before it had a sum");
        kiln.signal(signal);
        let last = lines.last().unwrap_or_default();
        assert_eq!(kiln.end().code, (signal == Signal::INT).then_some(130), "{last}");
        assert_eq!(bench.read("out/web/manifest.json"), before);
        bench.assert_tidy(&["web"]);
    }
}

/// What a later kiln adds to a manifest, and what an earlier one did not have yet.
#[test]
fn manifests_of_other_kilns_are_read() {
    let bench = bench();
    build(&bench).run().succeeded();
    for change in [json!({ "sha256": "0".repeat(64), "of-a-later-kiln": [1, 2] }), json!({})] {
        bench.manifest(|manifest| manifest.as_object_mut().unwrap().extend(change.as_object().unwrap().clone()));
        let said = bench.kiln(["test", "out/web", "--firmware", "bios", "--accel", "tcg"]).run().failed(8);
        assert!(said.contains("the disk can't be started by BIOS"), "it is read: {said}");
    }
}

/// The only file of a kind in a folder of the cache.
fn only(bench: &Bench, folder: &str, file: &str) -> PathBuf {
    let names = bench.names(folder);
    assert_eq!(names.len(), 1, "{names:?}");
    bench.path(folder).join(&names[0]).join(file)
}

fn cached_base(bench: &Bench) -> PathBuf {
    only(bench, "cache/bases", "disk.raw")
}

/// Changes a byte of the root filesystem.
fn spoil(disk: &Path) {
    std::fs::set_permissions(disk, std::fs::Permissions::from_mode(0o644)).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(disk).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5 << 20).unwrap();
    file.write_all_at(&[!byte[0]], 5 << 20).unwrap();
}

/// Makes kiln believe that a file is unchanged and has this digest, as a disk does that fails in silence.
fn believe(bench: &Bench, file: &Path, sha256: &str) {
    note(bench, file, "", json!({ "sha256": sha256, "sha512": null }));
}

/// As [`believe`] of a disk that was built in this boot of the host, or in another.
fn believe_disk(bench: &Bench, digest: &str, boot: &str) {
    note(bench, &bench.path("out/web/disk.raw"), ".disk", json!({ "digest": digest, "boot": boot }));
}

fn this_boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned()
}

fn note(bench: &Bench, file: &Path, kind: &str, mut note: Value) {
    let metadata = file.metadata().unwrap();
    note["identity"] = json!({
        "device": metadata.dev(), "inode": metadata.ino(), "size": metadata.len(),
        "modified": [metadata.mtime(), metadata.mtime_nsec()], "changed": [metadata.ctime(), metadata.ctime_nsec()],
    });
    let name = Digest::of(format!("{} {}", metadata.dev(), metadata.ino()).as_bytes()).to_string();
    bench.write(&format!("cache/known/{}{kind}", &name[..32]), note.to_string());
}

#[test]
fn a_damaged_base_in_the_cache_is_unpacked_again() {
    let bench = bench();
    build(&bench).run().succeeded();
    let good = (manifest(&bench)["digest"].clone(), std::fs::read(cached_base(&bench)).unwrap());
    assert_eq!(phases(&bench, &["--verify"]), ["verify", "verify", "verify"], "all is well");
    spoil(&cached_base(&bench));
    let qemus = bench.qemus().len();
    assert_eq!(build(&bench).run().stderr, "", "nobody looks");
    assert_eq!(bench.qemus().len(), qemus);
    let said = build(&bench).arg("--verify").run();
    insta::assert_snapshot!(said.stderr, @r"
    warning: the base in the cache is damaged and is unpacked again: 1 of its 32 blocks differ, the first at byte 5242880
      help: what was kept after steps on it is removed: guests may have read what was wrong
    ");
    assert_eq!(said.code, Some(0));
    assert_eq!(bench.qemus().len(), qemus + 1, "built from the base on");
    assert!((manifest(&bench)["digest"].clone(), std::fs::read(cached_base(&bench)).unwrap()) == good);
    assert_eq!(phases(&bench, &["--verify"]), ["verify", "verify", "verify"]);
    bench.assert_tidy(&["web"]);
}

#[test]
fn a_damaged_base_that_is_in_use_is_left() {
    let bench = bench();
    let running = bench.build(&json!({ "step hello": [["wait-for", "go"]] })).start();
    bench.wait_for("at-step-hello");
    spoil(&cached_base(&bench));
    let said = build(&bench).arg("--verify").run().failed(4);
    assert!(said.contains("error: the damaged base can't be removed: another kiln is using "), "{said}");
    assert!(said.contains("help: wait until that has ended, and build again with --verify"), "{said}");
    bench.write("traces/go", "");
    running.end().succeeded();
    assert!(build(&bench).arg("--verify").run().stderr.contains("is damaged and is unpacked again"));
}

#[test]
fn a_base_of_an_earlier_kiln_is_noted() {
    let bench = bench();
    build(&bench).run().succeeded();
    let noted = only(&bench, "cache/bases", "blocks");
    let text = std::fs::read(&noted).unwrap();
    std::fs::remove_file(&noted).unwrap();
    let said = build(&bench).arg("--verify").run();
    insta::assert_snapshot!(said.stderr, @r"
    warning: the base in the cache can't be compared: an earlier kiln noted nothing of it
      help: it is noted as it is now; to unpack it anew: kiln cache gc --keep 0B
    ");
    assert!(std::fs::read(&noted).unwrap() == text);
    assert_eq!(build(&bench).arg("--verify").run().stderr, "");
    // Half a note is no reason to trust the base.
    std::fs::write(&noted, &text[..text.len() / 2]).unwrap();
    assert!(build(&bench).arg("--verify").run().stderr.contains("the base in the cache is damaged"));
    assert!(std::fs::read(&noted).unwrap() == text);
}

#[test]
fn a_base_image_that_is_not_what_it_was() {
    let bench = bench();
    let (base, other) = (bench.path("base.raw"), "0".repeat(64));
    let found = sha256sum(&base);
    believe(&bench, &base, &other);
    build(&bench).run().succeeded();
    assert_eq!(manifest(&bench)["inputs"]["base_sha256"], other, "it is believed");
    let said = build(&bench).arg("--verify").run();
    assert!(said.stderr.starts_with("warning: the base image `base.raw` has changed, though its times and size"));
    assert!(said.stderr.contains(&format!("it was {other} and is {found}")), "{}", said.stderr);
    assert_eq!(said.code, Some(0));
    assert_eq!(manifest(&bench)["inputs"]["base_sha256"], found);

    believe(&bench, &base, &other);
    let with_digest = format!("image = \"base.raw\"\nsha256 = \"{other}\"");
    bench.write("web.toml", bench.read("web.toml").replace("image = \"base.raw\"", &with_digest));
    build(&bench).run().succeeded();
    let said = build(&bench).arg("--verify").run().failed(3);
    assert!(said.contains("has another sha256 than the recipe says\n --> web.toml:4:10"), "{said}");
    assert!(said.contains(&found), "{said}");
}

#[test]
fn a_damaged_output_is_built_again() {
    let bench = bench();
    build(&bench).run().succeeded();
    let (digest, disk) = (manifest(&bench)["digest"].clone(), bench.path("out/web/disk.raw"));
    spoil(&disk);
    believe_disk(&bench, digest.as_str().unwrap(), &this_boot());
    let qemus = bench.qemus().len();
    assert_eq!(build(&bench).run().stderr, "", "nobody looks");
    let said = build(&bench).arg("--verify").run();
    insta::assert_snapshot!(said.stderr, @"warning: `out/web` is not what was built and is built again: 1 of its 2048 blocks differ, the first at byte 5242880");
    assert_eq!((said.code, bench.qemus().len()), (Some(0), qemus + 1));
    assert_eq!(manifest(&bench)["digest"], digest);
    assert_eq!(build(&bench).arg("--verify").run().stderr, "");

    let blocks = bench.read("out/web/blocks");
    bench.write("out/web/blocks", &blocks[..blocks.len() / 2]);
    let said = build(&bench).arg("--verify").run().stderr;
    assert!(said.starts_with("warning: `out/web` is not what was built and is built again: line "), "{said}");
    assert_eq!(bench.read("out/web/blocks"), blocks);
    bench.assert_tidy(&["web"]);
}

#[test]
fn after_the_host_was_started_again_the_output_is_compared() {
    let bench = bench();
    build(&bench).run().succeeded();
    let digest = manifest(&bench)["digest"].as_str().unwrap().to_owned();
    let qemus = bench.qemus().len();
    believe_disk(&bench, &digest, "an earlier one");
    // A file that has only just changed may change again without its times telling.
    let changed = bench.path("out/web/disk.raw").metadata().unwrap().ctime();
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    wait_until("the disk's times to tell", || now() >= u64::try_from(changed).unwrap() + 2);
    assert_eq!(phases(&bench, &[]), ["verify"]);
    assert_eq!(phases(&bench, &[]), [""; 0], "once is enough");
    assert_eq!(bench.qemus().len(), qemus, "nothing was lost");

    // Its last blocks had not reached the host's disk when the power went.
    spoil(&bench.path("out/web/disk.raw"));
    believe_disk(&bench, &digest, "an earlier one");
    let said = build(&bench).run();
    insta::assert_snapshot!(said.stderr, @"warning: `out/web` is not what was built and is built again: 1 of its 2048 blocks differ, the first at byte 5242880");
    assert_eq!((said.code, bench.qemus().len()), (Some(0), qemus + 1));
    assert_eq!(manifest(&bench)["digest"], digest);
    assert_eq!(phases(&bench, &[]), [""; 0]);
}

/// Builds with this scenario although there is an output already, because of a damage: with this warning, and then there
/// is nothing to do.
#[track_caller]
fn assert_built_again(bench: &Bench, why: &str) {
    let qemus = bench.qemus().len();
    let ran = build(bench).run();
    assert_eq!(ran.stderr, format!("warning: `out/web` is not what was built and is built again: {why}\n"));
    assert_eq!(ran.succeeded(), "out/web\n");
    assert_eq!(bench.qemus().len(), qemus + 1, "{why}");
    assert_nothing_to_do(bench);
    bench.assert_tidy(&["web"]);
}

#[track_caller]
fn assert_nothing_to_do(bench: &Bench) {
    let qemus = bench.qemus().len();
    let ran = build(bench).run();
    assert_eq!((ran.stderr.as_str(), ran.stdout.as_str(), ran.code), ("", "out/web\n", Some(0)));
    assert_eq!(bench.qemus().len(), qemus);
}

/// Publishing needs it, and so does a later publish by `--parent-blocks`.
#[test]
fn an_output_without_its_block_map_is_built_again() {
    let bench = bench();
    build(&bench).run().succeeded();
    let (blocks, path) = (bench.read("out/web/blocks"), bench.path("out/web/blocks"));
    std::fs::remove_file(&path).unwrap();
    assert_built_again(&bench, "failed to read or write a block map: No such file or directory (os error 2)");
    assert_eq!(bench.read("out/web/blocks"), blocks);

    let mut other = Vec::new();
    BlockMap::hole(1 << 30).write_to(&mut other).unwrap();
    std::fs::write(&path, other).unwrap();
    assert_built_again(&bench, "its block map is another disk's");
    assert_eq!(bench.read("out/web/blocks"), blocks);

    // A hole that became a block of zeros changes no digest.
    let holes = (0_usize..).zip(blocks.lines().skip(1)).find(|(index, line)| !line.starts_with(&format!("{index} ")));
    let (hole, next) = holes.unwrap();
    bench.write("out/web/blocks", blocks.replace(next, &format!("{hole} {}\n{next}", Digest::of_zeros())));
    let digest = BlockMap::open(&path).unwrap().digest();
    assert_eq!(manifest(&bench)["digest"], digest.to_string());
    assert_built_again(&bench, "its block map is another disk's");
    assert_eq!(bench.read("out/web/blocks"), blocks);
}

#[test]
fn an_output_with_an_edited_manifest_is_built_again() {
    let bench = bench();
    build(&bench).run().succeeded();
    let facts = || {
        let mut manifest = manifest(&bench);
        for key in ["manifest_sha256", "phases", "steps", "lineage"] {
            assert!(manifest.as_object_mut().unwrap().remove(key).is_some(), "{key}");
        }
        manifest
    };
    let built = facts();
    let edits: [&dyn Fn(&mut Value); 4] = [
        &|manifest| manifest["boot_modes"] = json!(["uefi"]),
        &|manifest| manifest["packages"] = json!(["nginx 1.0 amd64"]),
        &|manifest| manifest["data_bytes"] = json!(0),
        &|manifest| manifest["unknown"] = json!(1),
    ];
    for edit in edits {
        bench.manifest(edit);
        assert_built_again(&bench, "its manifest was edited");
        assert_eq!(facts(), built);
    }
    bench.manifest(|manifest| drop(manifest.as_object_mut().unwrap().remove("manifest_sha256")));
    assert_built_again(&bench, "its manifest has no digest of its own");
    // Other spaces and another order of fields are no other manifest.
    bench.manifest(|_| {});
    assert_nothing_to_do(&bench);
}

/// What is in no key: the disk stays, and its manifest says what a build from nothing would say.
#[test]
fn a_manifest_follows_the_recipe_where_the_disk_does_not() {
    let bench = bench();
    bench.build(&json!({ "step hello": [["print", "hello\n"]] })).run().succeeded();
    std::fs::copy(bench.path("base.raw"), bench.path("other.raw")).unwrap();
    let disk = || bench.path("out/web/disk.raw").metadata().unwrap().ino();
    let untouched = disk();
    let text = bench.read("web.toml");
    let changes: [(&str, &str, &[&str]); 4] = [
        ("name = \"web\"", "# A comment.\nname = \"web\"", &[]),
        ("base.raw", "other.raw", &[]),
        ("name = \"hello\"", "name = \"greet\"", &[]),
        ("name = \"web\"", "name = \"web\"", &["--set", "machine.timeout=5m"]),
    ];
    for (old, new, arguments) in changes {
        let before = manifest(&bench);
        bench.forget();
        bench.write("web.toml", text.replacen(old, new, 1));
        let ran = build(&bench).args(arguments).run();
        assert_eq!((ran.stderr.as_str(), ran.stdout.as_str(), ran.code), ("", "out/web\n", Some(0)));
        assert_eq!((bench.qemus().len(), disk()), (0, untouched), "{new}");
        let after = manifest(&bench);
        assert_ne!(after["manifest_sha256"], before["manifest_sha256"], "{new}");

        let cold = bench.kiln(["-q", "build", "web.toml", "--accel", "tcg", "--out", "cold"]).args(arguments);
        cold.run().succeeded();
        let cold: Value = serde_json::from_str(&bench.read("cold/web/manifest.json")).unwrap();
        std::fs::remove_dir_all(bench.path("cold")).unwrap();
        assert_eq!(
            (&after["inputs"], &after["steps"][0]["name"]),
            (&cold["inputs"], &cold["steps"][0]["name"]),
            "{new}"
        );
        let (mut after, mut before) = (after, before);
        for manifest in [&mut after, &mut before] {
            let manifest = manifest.as_object_mut().unwrap();
            manifest.retain(|key, _| !["manifest_sha256", "inputs"].contains(&key.as_str()));
            manifest["steps"][0].as_object_mut().unwrap().remove("name");
        }
        assert_eq!(after, before, "{new}: what only the build that made the disk knows");
        assert_eq!(bench.read(&format!("out/web/{}", after["steps"][0]["log"].as_str().unwrap())), "hello\n");
    }
    bench.forget();
    std::fs::remove_file(bench.path("out/web/steps/01-hello.log")).unwrap();
    build(&bench).args(["--set", "machine.timeout=5m"]).run().succeeded();
    assert_eq!((&manifest(&bench)["steps"][0]["log"], bench.qemus().len()), (&json!(""), 0), "the log is gone");
    bench.assert_tidy(&["web"]);
}
