//! Publishing without a bucket: block by block into a snapshot.

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{NOTHING, ONE_IMAGE, Stage};
use crate::support::{append_data, wait_until};

pub(super) const BLOCK: u64 = 512 << 10;
pub(super) const PUT: &str = "ebs:PutSnapshotBlock";
const JOURNAL: &str = "out/web/publish.us-east-1.journal";

fn stage() -> Stage {
    Stage::of("[publish]\nimage_name = \"web-1\"\nvia = \"ebs\"\n")
}

/// Indices of the blocks that AWS took since the log was last forgotten, each time that it did.
pub(super) fn taken(stage: &Stage) -> Vec<u64> {
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

pub(super) fn blocks_of_data(stage: &Stage) -> u64 {
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
    ec2:GetEbsEncryptionByDefault
    ec2:DescribeSnapshots
    ebs:StartSnapshot
    ebs:PutSnapshotBlock
    ebs:CompleteSnapshot
    ec2:DescribeSnapshots
    ec2:RegisterImage
    ec2:DescribeImages
    ");
    assert!(!stage.bench.path(JOURNAL).exists());
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

/// A kiln that was killed when AWS had taken some blocks, and it had heard of some of them.
#[track_caller]
fn killed(stage: &Stage) {
    // Refused after a while, so that a killed kiln's requests are never carried out.
    stage.aws.fault(&json!({ "action": PUT, "skip": 30, "delay": 3, "error": "InternalServerException" }));
    let kiln = stage.publish().start();
    stage.aws.wait_until_struck(PUT);
    let journal = || std::fs::read_to_string(stage.bench.path(JOURNAL)).unwrap_or_default();
    // After two lines that say what is made.
    wait_until("ten blocks in the journal", || journal().lines().count() > 12);
    kiln.signal(Signal::KILL);
    assert_eq!(kiln.end().code, None);
    assert_eq!(stage.aws.resources(), [0, 0, 1, 0, 0], "a snapshot that takes blocks");
    stage.aws.reset();
}

#[test]
fn a_killed_kilns_snapshot_is_gone_on_with() {
    let stage = stage();
    killed(&stage);
    // Other runs that fail leave the journal to whoever can go on with it.
    stage.publish().args(["--via", "s3", "--bucket", "elsewhere"]).run().failed(7);
    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web"])).run();
    assert!(ran.stderr.contains(", which an earlier publish has begun\n"), "{}", ran.stderr);
    stage.published(ran);
    let again = taken(&stage).len() as u64;
    // What it had not heard of when it was killed is sent again.
    assert!(again >= blocks_of_data(&stage) - 30 && again <= blocks_of_data(&stage) - 10, "{again}");
    stage.assert_arrived();
    assert!(!stage.bench.path(JOURNAL).exists());
}

#[test]
fn a_killed_kilns_snapshot_of_another_disk_is_deleted() {
    let stage = stage();
    killed(&stage);
    append_data(&stage.bench.path("base.raw"), 300 << 10);
    stage.bench.build(&json!({})).run().succeeded();
    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web"])).run();
    assert!(ran.stderr.contains("deleting snap-"), "{}", ran.stderr);
    stage.published(ran);
    assert_eq!(taken(&stage).len() as u64, blocks_of_data(&stage));
    stage.assert_arrived();
}

/// Killed after it was sealed: the snapshot may be pending when the next kiln looks for it, and complete a moment later.
#[test]
fn a_sealed_snapshot_is_waited_for() {
    let sealed = |stage: &Stage| {
        let calls = stage.aws.requests("ebs:CompleteSnapshot");
        calls.iter().any(|call| call["status"] == 202)
    };
    for (describes, at) in [(40, "it stays pending"), (3, "it is complete at the second look")] {
        let stage = stage();
        stage.aws.control("POST", "snapshots", Some(&json!({ "describes": describes })));
        let looks = stage.aws.requests("ec2:DescribeSnapshots").len();
        // Two looks before anything is made, and one before a long pause.
        let kiln = stage.publish().env("KILN_POLL_INTERVAL", "1h").start();
        wait_until("the wait", || sealed(&stage) && stage.aws.requests("ec2:DescribeSnapshots").len() == looks + 3);
        kiln.signal(Signal::KILL);
        kiln.end();
        stage.aws.reset();
        stage.published(stage.publish().run());
        assert_eq!(taken(&stage), [] as [u64; 0], "{at}");
        assert_eq!(stage.aws.requests("ebs:StartSnapshot"), [] as [Value; 0], "{at}");
        stage.assert_arrived();
        assert!(!stage.bench.path(JOURNAL).exists());
    }
    // Sealed, and killed before it heard of that.
    let stage = stage();
    stage.aws.control("POST", "snapshots", Some(&json!({ "describes": 3 })));
    let unheard = json!({ "action": "ebs:CompleteSnapshot", "error": "InternalServerException", "when": "after" });
    stage.aws.fault(&unheard);
    let kiln = stage.publish().start();
    stage.aws.wait_until_struck("ebs:CompleteSnapshot");
    wait_until("the refusal", || !stage.aws.requests("ebs:CompleteSnapshot").is_empty());
    kiln.signal(Signal::KILL);
    kiln.end();
    stage.aws.reset();
    stage.published(stage.publish().run());
    assert_eq!(taken(&stage), [] as [u64; 0]);
    stage.assert_arrived();
}

#[test]
fn two_kilns_do_not_go_on_with_one_snapshot() {
    let stage = stage();
    stage.aws.fault(&json!({ "action": PUT, "delay": 4, "skip": 20, "count": 1 }));
    let first = stage.publish().start();
    wait_until("a journal", || stage.bench.path(JOURNAL).exists());
    stage.aws.wait_until_struck(PUT);
    let said = stage.publish().run().failed(7);
    assert!(said.contains("error: another kiln publishes this disk to us-east-1\n"), "{said}");
    stage.published(first.end());
    stage.assert_arrived();
}

/// An account whose snapshots are encrypted from some day on: earlier ones can't be built on, and holes are written.
#[test]
fn encrypted_snapshots_have_no_holes() {
    let stage = stage();
    stage.published(stage.publish().run());
    stage.aws.reset();
    stage.aws.encrypt_by_default();
    append_data(&stage.bench.path("base.raw"), 300 << 10);
    stage.bench.build(&json!({})).run().succeeded();
    // Who may not ask learns it from AWS's refusal.
    stage.aws.fault(&json!({ "action": "ec2:GetEbsEncryptionByDefault", "error": "UnauthorizedOperation" }));
    let ran = stage.aws.with(stage.bench.kiln(["-v", "publish", "out/web", "--image-name", "web-2"])).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains(" can't be built on: ValidationException"), "{}", ran.stderr);
    assert_eq!(taken(&stage), (0..2048).collect::<Vec<_>>());
    stage.assert_arrived();
    stage.aws.reset();
    append_data(&stage.bench.path("base.raw"), 300 << 10);
    stage.bench.build(&json!({})).run().succeeded();
    stage.publish().args(["--image-name", "web-3"]).run().succeeded();
    assert!((1..10).contains(&taken(&stage).len()), "{:?}", taken(&stage));
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
        said.contains("not permitted to call StartSnapshot")
            && said.contains("allow `ebs:StartSnapshot` (and `ec2:CreateTags`)"),
        "{said}"
    );

    stage.aws.reset();
    stage.aws.fault(&json!({ "action": PUT, "error": "AccessDeniedException", "skip": 9 }));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(said.contains("not permitted to call PutSnapshotBlock"), "{said}");
    assert!(!stage.bench.path(JOURNAL).exists());

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
    // After a while, so that it has heard of some that were taken.
    stage.aws.fault(&json!({ "action": PUT, "delay": 2, "error": "AccessDeniedException", "skip": 30 }));
    stage.aws.fault(&json!({ "action": "ec2:DeleteSnapshot", "error": "UnauthorizedOperation" }));
    let said = stage.fails(stage.publish(), 7, [0, 0, 1, 0, 0]);
    assert!(said.contains("left behind: snapshot snap-"), "{said}");
    stage.aws.reset();
    stage.published(stage.publish().run());
    // Answers that came after the refusal were not heard.
    assert!((taken(&stage).len() as u64) < blocks_of_data(&stage));
    stage.assert_arrived();
}
