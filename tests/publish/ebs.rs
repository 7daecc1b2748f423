//! Publishing without a bucket: block by block into a snapshot.

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{NOTHING, ONE_IMAGE, Stage};
use crate::support::{append_data, wait_until};

const BLOCK: u64 = 512 << 10;
const PUT: &str = "ebs:PutSnapshotBlock";

fn stage() -> Stage {
    Stage::of("[publish]\nimage_name = \"web-1\"\nvia = \"ebs\"\n")
}

/// Indices of the blocks that AWS took since the log was last forgotten, each time that it did.
fn taken(stage: &Stage) -> Vec<u64> {
    let calls = stage.aws.requests(PUT);
    let well = calls.iter().filter(|call| call["status"] == 201);
    let mut indices: Vec<_> = well
        .map(|call| {
            assert_eq!(call["bytes"], BLOCK);
            call["resource"].as_str().unwrap().rsplit('/').next().unwrap().parse().unwrap()
        })
        .collect();
    indices.sort_unstable();
    indices
}

fn blocks_of_data(stage: &Stage) -> u64 {
    let manifest: Value = serde_json::from_str(&stage.bench.read("out/web/manifest.json")).unwrap();
    manifest["data_bytes"].as_u64().unwrap() / BLOCK
}

#[test]
fn a_disk_without_a_bucket_costs_what_its_data_costs() {
    let stage = stage();
    stage.published(stage.publish().run());
    stage.assert_arrived();
    let taken = taken(&stage);
    assert_eq!(taken.len() as u64, blocks_of_data(&stage), "each block of data, once");
    let mut actions = stage.aws.actions();
    actions.dedup();
    insta::assert_snapshot!(actions.join("\n"), @r"
    ec2:DescribeImages
    ec2:DescribeSnapshots
    ec2:DescribeImages
    ec2:DescribeSnapshots
    ebs:StartSnapshot
    ebs:PutSnapshotBlock
    ebs:CompleteSnapshot
    ec2:DescribeSnapshots
    ec2:RegisterImage
    ec2:DescribeImages
    ");
    assert!(!stage.bench.path("out/web/publish.us-east-1.journal").exists());
    let snapshot = stage.remembered()[0]["snapshot_id"].clone();
    stage.aws.reset();
    stage.published(stage.publish().run());
    assert_eq!(stage.remembered()[0]["snapshot_id"], snapshot, "published again, nothing is made");
    assert_eq!(stage.aws.requests(PUT), [] as [Value; 0]);
}

#[test]
fn the_next_disk_costs_what_differs() {
    let stage = stage();
    stage.published(stage.publish().run());
    let (first, of_first) = (stage.remembered()[0]["snapshot_id"].clone(), taken(&stage).len());
    stage.aws.reset();
    append_data(&stage.bench.path("base.raw"), 300 << 10);
    stage.bench.build(&json!({})).run().succeeded();
    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--image-name", "web-2", "--dry-run"])).run();
    let plan = format!("the rest is that of {}\n", first.as_str().unwrap());
    assert!(ran.stderr.contains(&plan), "{}", ran.stderr);
    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--image-name", "web-2"])).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let again = taken(&stage).len();
    assert!(again > 0 && again * 50 <= of_first, "{again} of {of_first}");
    assert!(ran.stderr.contains(&format!(", the rest is {}'s", first.as_str().unwrap())), "{}", ran.stderr);
    stage.assert_arrived();

    // Without a note of what the earlier one has, all is sent.
    for map in std::fs::read_dir(stage.bench.path("cache/known")).unwrap() {
        let map = map.unwrap().path();
        if map.extension().is_some_and(|extension| extension == "blocks") {
            std::fs::write(map, "damaged").unwrap();
        }
    }
    append_data(&stage.bench.path("base.raw"), 300 << 10);
    stage.bench.build(&json!({})).run().succeeded();
    stage.aws.reset();
    stage.publish().args(["--image-name", "web-3"]).run().succeeded();
    assert_eq!(taken(&stage).len() as u64, blocks_of_data(&stage));
    stage.assert_arrived();
}

#[test]
fn a_killed_kilns_snapshot_is_gone_on_with() {
    let stage = stage();
    // Refused after a while, so that a killed kiln's requests are never carried out.
    let later = json!({ "action": PUT, "skip": 30, "delay": 3, "error": "InternalServerException" });
    stage.aws.fault(&later);
    let kiln = stage.publish().start();
    stage.aws.wait_until_struck(PUT);
    wait_until("thirty blocks", || taken(&stage).len() == 30);
    kiln.signal(Signal::KILL);
    assert_eq!(kiln.end().code, None);
    assert_eq!(stage.aws.resources(), [0, 0, 1, 0, 0], "a snapshot that takes blocks");
    stage.aws.reset();
    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web"])).run();
    assert!(ran.stderr.contains(", which an earlier publish has begun\n"), "{}", ran.stderr);
    stage.published(ran);
    let again = taken(&stage).len() as u64;
    // What it had not heard of when it was killed is sent again.
    assert!(again >= blocks_of_data(&stage) - 30 && again < blocks_of_data(&stage), "{again}");
    stage.assert_arrived();
    assert!(!stage.bench.path("out/web/publish.us-east-1.journal").exists());

    // Sealed, and killed before the image was made.
    let stage = self::stage();
    stage.aws.control("POST", "snapshots", Some(&json!({ "describes": 40 })));
    let kiln = stage.publish().start();
    wait_until("the seal", || stage.aws.requests("ebs:CompleteSnapshot").iter().any(|call| call["status"] == 202));
    wait_until("the wait", || stage.aws.requests("ec2:DescribeSnapshots").len() > 4);
    kiln.signal(Signal::KILL);
    kiln.end();
    stage.aws.reset();
    stage.published(stage.publish().run());
    assert_eq!(stage.aws.requests(PUT), [] as [Value; 0]);
    stage.assert_arrived();
}

#[test]
fn passing_trouble_changes_nothing() {
    let stage = stage();
    for fault in [
        json!({ "action": "ebs:StartSnapshot", "close": true, "when": "after", "count": 1 }),
        json!({ "action": PUT, "error": "RequestThrottledException", "count": 3 }),
        json!({ "action": PUT, "error": "ResourceNotFoundException", "skip": 5, "count": 2 }),
        json!({ "action": PUT, "close": true, "when": "after", "skip": 9, "count": 2 }),
        json!({ "action": PUT, "error": "InternalServerException", "skip": 15, "count": 2 }),
        json!({ "action": PUT, "error": "ValidationException", "message": "Failed to read block data", "skip": 20, "count": 1 }),
        json!({ "action": "ebs:CompleteSnapshot", "close": true, "when": "after", "count": 1 }),
    ] {
        stage.aws.fault(&fault);
    }
    stage.published(stage.publish().run());
    stage.assert_arrived();
}

#[test]
fn what_was_begun_is_taken_back() {
    let stage = stage();
    stage.aws.fault(&json!({ "action": "ebs:StartSnapshot", "error": "AccessDeniedException" }));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(
        said.contains("not permitted to call StartSnapshot") && said.contains("allow `ebs:StartSnapshot`"),
        "{said}"
    );

    stage.aws.reset();
    stage.aws.fault(&json!({ "action": PUT, "error": "AccessDeniedException", "skip": 9 }));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(said.contains("not permitted to call PutSnapshotBlock"), "{said}");
    assert!(!stage.bench.path("out/web/publish.us-east-1.journal").exists());

    // No answer comes, and the snapshot is found by its tag.
    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "ebs:StartSnapshot", "close": true, "when": "after" }));
    let said = stage.fails(stage.publish().env("AWS_MAX_ATTEMPTS", "1"), 7, NOTHING);
    assert!(said.contains("StartSnapshot"), "{said}");

    stage.aws.reset();
    stage.aws.control("POST", "snapshots", Some(&json!({ "result": "error" })));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(said.contains("AWS could not make snapshot snap-"), "{said}");

    stage.aws.reset();
    stage.aws.fault(&json!({ "action": PUT, "delay": 2, "skip": 9 }));
    let kiln = stage.publish().start();
    stage.aws.wait_until_struck(PUT);
    kiln.signal(Signal::INT);
    let said = kiln.end().failed(130);
    assert!(said.contains("error: stopped by Ctrl-C\n") && !said.contains("left behind"), "{said}");
    stage.assert_left(NOTHING);
}

#[test]
fn the_way_is_chosen_on_the_command_line_too() {
    let stage = Stage::new();
    stage.published(stage.publish().args(["--via", "ebs"]).run());
    assert_eq!(taken(&stage).len() as u64, blocks_of_data(&stage));
    assert!(stage.aws.actions().iter().all(|action| !action.starts_with("s3:")));
    assert_eq!(stage.aws.resources(), ONE_IMAGE);
    let said = stage.publish().args(["--via", "ebs", "--bucket", "images"]).run().failed(2);
    assert!(said.contains("error: EBS direct needs no bucket\n"), "{said}");
}

#[test]
fn a_snapshot_that_can_not_be_deleted_is_gone_on_with() {
    let stage = stage();
    stage.aws.fault(&json!({ "action": PUT, "error": "AccessDeniedException", "skip": 30 }));
    stage.aws.fault(&json!({ "action": "ec2:DeleteSnapshot", "error": "UnauthorizedOperation" }));
    let said = stage.fails(stage.publish(), 7, [0, 0, 1, 0, 0]);
    assert!(said.contains("left behind: snapshot snap-"), "{said}");
    stage.aws.reset();
    stage.published(stage.publish().run());
    // Answers that came after the refusal were not heard.
    assert!((taken(&stage).len() as u64) < blocks_of_data(&stage));
    stage.assert_arrived();
}
