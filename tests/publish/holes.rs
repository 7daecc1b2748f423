//! Holes that are left out of encrypted snapshots, which are told apart from whole ones for ever after.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::ebs::{BLOCK, PUT, blocks_of_data, taken};
use super::parent::{another_disk, forget_maps, last, publish};
use super::{NOTHING, Stage};
use crate::support::Bench;

/// Blocks of the disk, all of them.
const ALL: usize = 2048;

/// How many blocks of the snapshot are not those of the disk; all of data are.
#[track_caller]
fn differing(stage: &Stage, snapshot: &str) -> usize {
    let map = stage.bench.read("out/web/blocks");
    let data: Vec<u64> = map.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect();
    let disk = File::open(stage.bench.path("out/web/disk.raw")).unwrap();
    let url = format!("{}/kiln-test/snapshots/{snapshot}", stage.aws.url());
    let mut curl =
        Command::new("curl").args(["-fsS", "--max-time", "120", &url]).stdout(Stdio::piped()).spawn().unwrap();
    let mut from = curl.stdout.take().unwrap();
    let [mut sent, mut read] = [(); 2].map(|()| vec![0; usize::try_from(BLOCK).unwrap()]);
    let mut count = 0;
    for index in 0..ALL as u64 {
        disk.read_exact_at(&mut sent, index * BLOCK).unwrap();
        from.read_exact(&mut read).unwrap();
        if sent != read {
            assert!(!data.contains(&index), "block {index} has data");
            count += 1;
        }
    }
    assert!(curl.wait().unwrap().success());
    count
}

/// Whether something that `action` describes has the tag.
fn tag(stage: &Stage, region: &str, action: &str) -> bool {
    let answer = stage.aws.ec2(
        region,
        action,
        &[("Owner.1", "self"), ("Filter.1.Name", "tag-key"), ("Filter.1.Value.1", "kiln:holes")],
    );
    answer.contains("<key>kiln:holes</key>")
}

#[test]
fn holes_are_left_out_of_an_encrypted_snapshot_and_it_says_so() {
    let stage = Stage::small("");
    stage.aws.encrypt_by_default();
    let ran = publish(&stage, ["--omit-holes", "--dry-run"]).run();
    assert!(ran.stderr.contains(" blocks; the rest are holes\n"), "{}", ran.stderr);
    let said = publish(&stage, ["-q", "--omit-holes", "--check"]).run().succeeded();
    assert!(said.contains("new snapshots are encrypted: holes are left out all the same\n"), "{said}");
    stage.published(publish(&stage, ["-q", "--omit-holes"]).run());
    let sent = taken(&stage).len();
    assert_eq!(sent as u64, blocks_of_data(&stage));
    let noisy = last(&stage);
    assert_eq!(differing(&stage, &noisy), ALL - sent, "every hole is noise");
    assert!(tag(&stage, "us-east-1", "DescribeSnapshots") && tag(&stage, "us-east-1", "DescribeImages"));

    // To whom zeros matter it is no snapshot of the disk: not as it is, and not to build on.
    let ran = publish(&stage, ["--image-name", "web-2", "--dry-run"]).run();
    assert!(ran.stderr.contains("; it is encrypted, so that holes are sent too\n"), "{}", ran.stderr);
    another_disk(&stage);
    let said = publish(&stage, ["-q", "--image-name", "web-3", "--parent", &noisy]).run().failed(7);
    assert!(said.contains("it was published with --omit-holes, so that its holes don't read as zeros"), "{said}");
    publish(&stage, ["-q", "--image-name", "web-3"]).run().succeeded();
    assert_eq!(taken(&stage).len(), ALL);
    assert_eq!(differing(&stage, &last(&stage)), 0);

    // To whom they don't, both are.
    let whole = last(&stage);
    stage.aws.reset();
    publish(&stage, ["-q", "--image-name", "web-4", "--omit-holes"]).run().succeeded();
    assert_eq!((last(&stage), taken(&stage)), (whole, Vec::new()));
    another_disk(&stage);
    publish(&stage, ["-q", "--image-name", "web-5", "--parent", &noisy, "--omit-holes"]).run().succeeded();
    assert!(taken(&stage).len() as u64 <= blocks_of_data(&stage));
    assert!(differing(&stage, &last(&stage)) > 0);
}

/// Two disks may read the same, one with a hole where zeros were written to the other: what is noise of one isn't of the other.
#[test]
fn zeros_that_were_written_are_told_apart_from_what_was_left_out() {
    let stage = Stage::small("");
    stage.aws.encrypt_by_default();
    stage.published(publish(&stage, ["-q", "--omit-holes"]).run());
    let noisy = last(&stage);
    let (map, before) = (stage.bench.path("out/web/blocks"), stage.bench.read("out/web/blocks"));
    let index = (1..2048).find(|index| !before.contains(&format!("\n{index} "))).unwrap();
    let digest = Sha256::digest(vec![0; 512 << 10]);
    let zeros = digest.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    let at = before.find(&format!("\n{} ", index - 1)).unwrap() + 1;
    let end = at + before[at..].find('\n').unwrap() + 1;
    let written = format!("{}{index} {zeros}\n{}", &before[..end], &before[end..]);
    std::fs::write(&map, &written).unwrap();
    stage.aws.reset();
    publish(&stage, ["-q", "--image-name", "web-2", "--omit-holes"]).run().succeeded();
    assert_ne!(last(&stage), noisy, "another image would be of a snapshot with noise there");
    assert_eq!(taken(&stage), [index], "all the rest is the first one's");

    // Nor is that disk's map the first one's, for a host that has kept none.
    another_disk(&stage);
    forget_maps(&stage);
    for (name, text) in [("before", &before), ("written", &written)] {
        std::fs::write(stage.bench.path(name), text).unwrap();
    }
    let on = |map: &str| {
        publish(&stage, ["-q", "--image-name", "web-3", "--omit-holes", "--parent", &noisy, "--parent-blocks", map])
    };
    let said = on("written").run().failed(3);
    assert!(said.contains(" is not the one given, nor kept on this host\n"), "{said}");
    on("before").run().succeeded();
}

#[test]
fn the_recipe_may_say_so_and_copies_are_marked_too() {
    let more = "omit_holes = true\nbucket = \"images\"\nregions = [\"us-east-1\", \"eu-west-1\"]\n";
    let stage = Stage::small(more);
    stage.aws.encrypt_by_default();
    publish(&stage, ["-q"]).run().succeeded();
    assert_eq!(taken(&stage).len() as u64, blocks_of_data(&stage));
    assert!(tag(&stage, "eu-west-1", "DescribeSnapshots"), "the copy's snapshot");
    stage.aws.clean();
    // An import has no choice.
    publish(&stage, ["-q", "--via", "s3", "--region", "us-east-1"]).run().succeeded();
    assert!(!tag(&stage, "us-east-1", "DescribeSnapshots"));
    stage.assert_arrived();
}

#[test]
fn an_import_leaves_nothing_out() {
    let bench = Bench::new();
    bench.recipe("[publish]\nomit_holes = true\n");
    let said = bench.build(&json!({})).run().failed(3);
    assert!(said.contains("`omit_holes` is of use only with EBS direct"), "{said}");
    let stage = Stage::small("bucket = \"images\"\n");
    let said = publish(&stage, ["-q", "--via", "s3", "--omit-holes"]).run().failed(2);
    assert!(said.contains("so that --omit-holes does nothing\n"), "{said}");
    assert_eq!(stage.aws.resources(), NOTHING);
}

#[test]
fn what_was_begun_without_holes_is_not_gone_on_with_by_who_wants_them() {
    let stage = Stage::small("");
    stage.aws.encrypt_by_default();
    stage.aws.fault(&json!({ "action": PUT, "hold": true, "error": "InternalServerException" }));
    let kiln = publish(&stage, ["-q", "--omit-holes"]).start();
    stage.aws.wait_until_held("a block");
    kiln.signal(Signal::KILL);
    kiln.end();
    stage.aws.reset();
    let ran = publish(&stage, []).run();
    assert!(ran.stderr.contains("deleting snap-"), "{}", ran.stderr);
    assert_eq!((ran.code, taken(&stage).len()), (Some(0), ALL), "{}", ran.stderr);
    let begun: &[Value] = &stage.aws.requests("ebs:StartSnapshot");
    assert!(!begun[0]["parameters"]["Tags"].to_string().contains("kiln:holes"), "{begun:?}");
    stage.assert_arrived();
}
