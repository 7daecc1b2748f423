//! What a snapshot is built on that is written block by block: what `--parent` names, or nothing.

use rustix::process::Signal;
use serde_json::{Value, json};

use super::ebs::{PUT, blocks_of_data, taken};
use super::{ONE_IMAGE, Stage};
use crate::support::{Kiln, append_data};

const START: &str = "ebs:StartSnapshot";
const JOURNAL: &str = "out/web/publish.us-east-1.journal";

pub(super) fn publish<const N: usize>(stage: &Stage, more: [&str; N]) -> Kiln {
    let all = ["publish", "out/web"].into_iter().chain(more).collect::<Vec<_>>();
    stage.aws.with(stage.bench.kiln(all))
}

/// Builds the recipe with another base.
pub(super) fn another_disk(stage: &Stage) {
    append_data(&stage.bench.path("base.raw"), 300 << 10);
    stage.bench.build(&json!({})).run().succeeded();
    stage.aws.reset();
}

/// The id of the snapshot that was published last.
pub(super) fn last(stage: &Stage) -> String {
    let published = stage.remembered();
    published.as_array().unwrap().last().unwrap()["snapshot_id"].as_str().unwrap().to_owned()
}

/// What the only snapshot was built on that was begun since the log was last forgotten.
#[track_caller]
fn parent(stage: &Stage) -> Value {
    let calls = stage.aws.requests(START);
    assert_eq!(calls.len(), 1, "{calls:?}");
    calls[0]["parameters"]["ParentSnapshotId"].clone()
}

/// Makes the host forget what is in the snapshots that it has published.
pub(super) fn forget_maps(stage: &Stage) {
    for file in std::fs::read_dir(stage.bench.path("cache/known")).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "blocks") {
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// A publish to be refused before anything is made.
#[track_caller]
fn refused(stage: &Stage, kiln: Kiln, code: i32) -> String {
    stage.aws.reset();
    let before = stage.aws.resources();
    let said = kiln.arg("-q").run().failed(code);
    assert_eq!(stage.aws.resources(), before, "{said}");
    let made = [START, "s3:CreateMultipartUpload", "ec2:RegisterImage"];
    assert!(made.iter().all(|action| stage.aws.requests(action).is_empty()), "{said}");
    said
}

#[test]
fn a_disk_is_built_on_the_snapshot_that_is_named_or_on_none() {
    let stage = Stage::small("");
    stage.published(stage.publish().run());
    let first = last(&stage);
    another_disk(&stage);
    publish(&stage, ["--image-name", "web-2"]).run().succeeded();
    assert_eq!(parent(&stage), first.as_str(), "the last one, by itself");

    another_disk(&stage);
    let ran = publish(&stage, ["--image-name", "web-3", "--parent", &first, "--dry-run"]).run();
    assert!(ran.stderr.contains(&format!("; the rest is that of {first}\n")), "{}", ran.stderr);
    publish(&stage, ["--image-name", "web-3", "--parent", &first]).run().succeeded();
    assert_eq!(parent(&stage), first.as_str());
    let on_first = taken(&stage).len() as u64;
    assert!(on_first > 0 && on_first < blocks_of_data(&stage), "{on_first}");
    stage.assert_arrived();

    another_disk(&stage);
    publish(&stage, ["--image-name", "web-4", "--parent", "none"]).run().succeeded();
    assert_eq!((parent(&stage), taken(&stage).len() as u64), (Value::Null, blocks_of_data(&stage)));
    stage.assert_arrived();
}

#[test]
fn an_earlier_builds_block_map_stands_in_for_the_one_that_is_not_kept() {
    let stage = Stage::small("");
    stage.published(stage.publish().run());
    let first = last(&stage);
    std::fs::copy(stage.bench.path("out/web/blocks"), stage.bench.path("earlier")).unwrap();
    another_disk(&stage);
    forget_maps(&stage);

    let named = ["--image-name", "web-2", "--parent", &first];
    let said = refused(&stage, publish(&stage, named), 3);
    assert!(said.contains(&format!("error: can't build on {first}: the block map of its disk ")), "{said}");
    assert!(said.contains(" is not kept on this host\n") && said.contains("--parent-blocks FILE"), "{said}");
    let said = refused(&stage, publish(&stage, named).args(["--parent-blocks", "out/web/blocks"]), 3);
    assert!(said.contains(" is not the one given, nor kept on this host\n"), "{said}");
    let said = refused(&stage, publish(&stage, named).args(["--parent-blocks", "out/web/manifest.json"]), 3);
    assert!(said.contains("error: cannot read the block map `out/web/manifest.json`: "), "{said}");

    let maps = ["--parent-blocks", "out/web/blocks", "--parent-blocks", "earlier"];
    publish(&stage, named).args(maps).run().succeeded();
    assert_eq!(parent(&stage), first.as_str());
    assert!((taken(&stage).len() as u64) < blocks_of_data(&stage));
    stage.assert_arrived();

    // The snapshot itself is found, and the map is all that is missing.
    another_disk(&stage);
    forget_maps(&stage);
    publish(&stage, ["--image-name", "web-3", "--parent-blocks", "earlier"]).run().succeeded();
    assert_eq!(parent(&stage), first.as_str());
    stage.assert_arrived();
}

#[test]
fn what_can_not_be_built_on_is_told_before_anything_is_made() {
    let stage = Stage::small("");
    stage.published(stage.publish().run());
    let first = last(&stage);
    let digest = stage.remembered()[0]["digest"].as_str().unwrap().to_owned();
    another_disk(&stage);
    let tagged = [("kiln:digest", digest.as_str()), ("kiln:name", "web")];
    let nowhere = "snap-0123456789abcdef0".to_owned();
    let cases = [
        (nowhere.clone(), format!("there is no snapshot {nowhere} in us-east-1 to build on")),
        (stage.aws.snapshot(1, &tagged, false), "it is not completed yet".to_owned()),
        (stage.aws.snapshot(1, &[], true), "it has no tag kiln:digest".to_owned()),
        (stage.aws.snapshot(2, &tagged, true), "it has 2 GiB and the disk 1, and they must be as large".to_owned()),
    ];
    for (id, why) in cases {
        let said = refused(&stage, publish(&stage, ["--image-name", "web-2", "--parent", &id]), 7);
        assert!(said.contains(&why) && said.contains(&id) && said.contains("help: "), "{said}");
    }
    let with_key = ["--image-name", "web-2", "--parent", &first, "--encrypted"];
    let said = refused(&stage, publish(&stage, with_key), 7);
    assert!(said.contains("it isn't encrypted, and the new snapshot is to be"), "{said}");
    let ran = publish(&stage, with_key).arg("--check").run();
    assert_eq!(ran.code, Some(7), "{}", ran.stderr);
    let row = format!("us-east-1       parent               fails    can't build on {first} in us-east-1: ");
    assert!(ran.stdout.contains(&row), "{}", ran.stdout);
    let said = publish(&stage, ["-q", "--image-name", "web-2", "--parent", &first, "--check"]).run().succeeded();
    assert!(said.contains(&format!("parent               ok       {first} can be built on\n")), "{said}");

    // By default they are encrypted, with what the account has for that; a key that is asked for is another.
    stage.aws.encrypt_by_default();
    let said = refused(&stage, publish(&stage, ["--image-name", "web-2", "--parent", &first]), 7);
    assert!(said.contains("it isn't encrypted, and the new snapshot is to be"), "{said}");
    publish(&stage, ["--image-name", "web-2"]).run().succeeded();
    let of_account = last(&stage);
    another_disk(&stage);
    let key = stage.aws.kms_key("alias/web");
    let keyed = ["--image-name", "web-3", "--parent", &of_account, "--kms-key", &key];
    let said = refused(&stage, publish(&stage, keyed), 7);
    assert!(said.contains(&format!("what the account does by itself, and asked for is {key}\n")), "{said}");
    publish(&stage, ["--image-name", "web-3", "--parent", &of_account]).run().succeeded();
    stage.assert_arrived();
}

#[test]
fn a_parent_that_aws_refuses_is_no_reason_to_send_all() {
    // Who may not begin a snapshot goes through the bucket, unless it was to be built on something.
    let stage = Stage::small("bucket = \"images\"\n");
    stage.published(stage.publish().run());
    let first = last(&stage);
    another_disk(&stage);
    let named = ["-q", "--image-name", "web-2", "--parent", &first];
    for (error, words) in [
        ("ValidationException", "help: name another snapshot, or send all with --parent none"),
        ("AccessDeniedException", "not permitted to call StartSnapshot"),
    ] {
        stage.aws.fault(&json!({ "action": START, "error": error }));
        let said = publish(&stage, named).run().failed(7);
        assert!(said.contains(words), "{said}");
        assert!(said.contains(&format!("it was to be built on {first}")), "{said}");
        assert_eq!(stage.aws.requests(START).len(), 1, "asked once");
        assert!(stage.aws.requests("s3:CreateMultipartUpload").is_empty());
        assert_eq!(stage.aws.resources(), ONE_IMAGE, "nothing is left");
        stage.aws.reset();
    }
    // One that was only found is passed over.
    stage.aws.fault(&json!({ "action": START, "error": "ValidationException", "count": 1 }));
    publish(&stage, ["-q", "--image-name", "web-2"]).run().succeeded();
    assert_eq!(taken(&stage).len() as u64, blocks_of_data(&stage));
}

#[test]
fn a_snapshot_that_was_begun_on_another_parent_is_not_gone_on_with() {
    let stage = Stage::small("");
    stage.published(stage.publish().run());
    let first = last(&stage);
    another_disk(&stage);
    let killed = |name: &str| {
        stage.aws.fault(&json!({ "action": PUT, "hold": true, "error": "InternalServerException" }));
        let kiln = publish(&stage, ["-q", "--image-name", name, "--parent", &first]).start();
        stage.aws.wait_until_held("a block");
        kiln.signal(Signal::KILL);
        kiln.end();
        assert!(stage.bench.path(JOURNAL).exists());
        assert_eq!(parent(&stage), first.as_str());
        stage.aws.reset();
    };
    killed("web-2");
    let ran = publish(&stage, ["--image-name", "web-2", "--parent", &first]).run();
    assert!(ran.stderr.contains(", which an earlier publish has begun\n"), "{}", ran.stderr);
    assert_eq!((ran.code, stage.aws.requests(START)), (Some(0), Vec::new()), "{}", ran.stderr);
    stage.assert_arrived();

    another_disk(&stage);
    killed("web-3");
    let ran = publish(&stage, ["--image-name", "web-3", "--parent", "none"]).run();
    assert!(ran.stderr.contains("deleting snap-"), "{}", ran.stderr);
    assert_eq!((ran.code, parent(&stage)), (Some(0), Value::Null), "{}", ran.stderr);
    assert_eq!(taken(&stage).len() as u64, blocks_of_data(&stage));
    stage.assert_arrived();
}

#[test]
fn each_region_has_its_own() {
    let stage = Stage::small("regions = [\"us-east-1\", \"eu-west-1\"]\n");
    // Without --fail-fast, the region that nothing is wrong with is published to.
    let ebs = ["--via", "ebs", "--fail-fast"];
    publish(&stage, ebs).run().succeeded();
    let published = stage.remembered();
    let snapshot = |region: &str| {
        let images = published.as_array().unwrap().iter();
        images.filter(|one| one["region"] == region).map(|one| one["snapshot_id"].as_str().unwrap()).next().unwrap()
    };
    let (east, west) = (snapshot("us-east-1"), snapshot("eu-west-1"));
    another_disk(&stage);
    let named = |parent: &str| publish(&stage, ebs).args(["--image-name", "web-2", "--parent", parent]);
    let said = refused(&stage, named(east), 2);
    assert!(said.contains(": a snapshot is in one region, and the disk is written to 2\n"), "{said}");
    let said = refused(&stage, named(&format!("us-west-1={east}")), 2);
    assert!(said.contains("nothing is published to `us-west-1`\n"), "{said}");
    let said = refused(&stage, named(&format!("eu-west-1={east}")), 7);
    assert!(said.contains(&format!("there is no snapshot {east} in eu-west-1 to build on")), "{said}");
    // By default the disk is sent to one of them, and its image copied.
    let copied = ["--fail-fast", "--image-name", "web-2", "--parent", &format!("eu-west-1={west}")];
    let said = refused(&stage, publish(&stage, copied), 3);
    assert!(
        said.contains(&format!("nothing is built on {west}: eu-west-1 gets a copy of us-east-1's image")),
        "{said}"
    );

    stage.aws.reset();
    named(&format!("us-east-1={east}")).args(["--parent", "eu-west-1=none"]).run().succeeded();
    let begun = |region: &str| {
        let calls = stage.aws.requests(START);
        calls.iter().find(|call| call["region"] == region).unwrap()["parameters"]["ParentSnapshotId"].clone()
    };
    assert_eq!((begun("us-east-1"), begun("eu-west-1")), (Value::from(east), Value::Null));
    stage.assert_arrived();
}

#[test]
fn an_import_builds_on_nothing() {
    let stage = Stage::small("bucket = \"images\"\n");
    for option in [["--parent", "none"], ["--parent-blocks", "out/web/blocks"]] {
        let said = refused(&stage, publish(&stage, ["--via", "s3"]).args(option), 2);
        assert!(said.contains(&format!("so that {} does nothing\n", option[0])), "{said}");
    }
}
