//! Publishing what was published already: nothing is made twice, whatever ended the run before.

use std::time::SystemTime;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::Stage;
use crate::support::{Running, wait_until};

/// The bodies that arrived since the log was last forgotten.
fn bodies(stage: &Stage) -> usize {
    ["s3:PutObject", "s3:UploadPart"].map(|action| stage.aws.requests(action).len()).iter().sum()
}

/// The clock that names are made of.
fn seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

#[test]
fn the_same_disk_again_ends_at_once() {
    let stage = Stage::new();
    let first = stage.published(stage.publish().run());
    let remembered = stage.remembered();
    stage.aws.reset();
    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web"])).run();
    assert!(ran.stderr.contains(&format!("image {first} has this disk already\n")), "{}", ran.stderr);
    assert_eq!(stage.published(ran), first);
    assert_eq!(stage.remembered(), remembered);
    assert!(stage.aws.requests("").iter().all(|call| call["action"].as_str().unwrap().starts_with("ec2:Describe")));

    let said = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--dry-run"])).run().stderr;
    assert!(said.contains(&format!("would make nothing: image {first} (`web-1`) is the same\n")), "{said}");
    assert!(!said.contains("would upload") && !said.contains("would register"), "{said}");

    // A name with the time in it would be another each time.
    let dated = "[publish]\nimage_name = \"{name}-{date}-{time}\"\nbucket = \"images\"\n";
    let stage = Stage::of(dated);
    let first = stage.published(stage.publish().run());
    let name = stage.remembered()[0]["image_name"].clone();
    let published = seconds();
    wait_until("the next second", || seconds() > published);
    assert_eq!(stage.published(stage.publish().run()), first);
    assert_eq!(stage.remembered()[0]["image_name"], name);
}

#[test]
fn another_image_of_the_same_disk_needs_no_upload() {
    let stage = Stage::new();
    let first = stage.published(stage.publish().run());
    stage.aws.reset();
    let line = stage.publish().args(["--image-name", "web-2"]).run().succeeded();
    assert!(!line.contains(&first), "{line}");
    assert_eq!(stage.aws.resources(), [0, 0, 1, 2, 0], "of the same snapshot");
    assert_eq!(bodies(&stage), 0);

    // What was there before is not taken back.
    stage.aws.fault(&json!({ "action": "ec2:RegisterImage", "error": "UnauthorizedOperation" }));
    stage.publish().args(["--image-name", "web-3"]).run().failed(7);
    assert_eq!(stage.aws.resources(), [0, 0, 1, 2, 0]);

    // Who may not look sends it again.
    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "ec2:DescribeSnapshots", "error": "UnauthorizedOperation" }));
    stage.publish().args(["--image-name", "web-3"]).run().succeeded();
    assert_eq!(stage.aws.resources(), [0, 0, 2, 3, 0]);
    assert!(bodies(&stage) > 0);
}

#[test]
fn a_killed_kilns_import_is_taken_up() {
    let stage = Stage::new();
    let kiln = stage.importing();
    kiln.signal(Signal::KILL);
    assert_eq!(kiln.end().code, None);
    assert_eq!(stage.aws.resources(), [1, 0, 0, 0, 1], "an object, and a running import");

    // Who stops the next one leaves it as well.
    let kiln = stage.publish().start();
    let describes = || stage.aws.requests("ec2:DescribeImportSnapshotTasks").len();
    let before = describes();
    wait_until("a look at it", || describes() > before + 2);
    kiln.signal(Signal::INT);
    let said = kiln.end().failed(130);
    assert!(
        said.contains("error: stopped by Ctrl-C\n") && said.contains(" was there before, and is left as it is"),
        "{said}"
    );
    assert_eq!(stage.aws.resources(), [1, 0, 0, 0, 1]);

    stage.aws.reset();
    stage.aws.control("POST", "import", Some(&json!({ "task": "*", "hold": false })));
    stage.published(stage.publish().run());
    assert_eq!(bodies(&stage), 0, "nothing was sent again");
    assert_eq!(stage.aws.requests("ec2:ImportSnapshot"), [] as [Value; 0]);
    let snapshot = stage.remembered()[0]["snapshot_id"].clone();
    assert_eq!(stage.aws.requests("ec2:CreateTags")[0]["parameters"]["ResourceId.1"], snapshot);
    let image = stage.remembered()[0]["image_id"].clone();
    stage.aws.reset();
    assert_eq!(stage.published(stage.publish().run()), image.as_str().unwrap());
}

/// Killed before and after each request that makes something of the snapshot: the next run comes to one image, sends
/// nothing again, and nothing else is left.
#[test]
fn killed_while_the_image_is_made() {
    let goes_on = |stage: &Stage, kiln: Running, at: &str| {
        kiln.signal(Signal::KILL);
        assert_eq!(kiln.end().code, None, "{at}");
        stage.aws.reset();
        stage.published(stage.publish().run());
        assert_eq!(bodies(stage), 0, "{at}");
    };
    // Refused after a while, so that a killed kiln's request is never carried out.
    for action in ["ec2:CreateTags", "ec2:RegisterImage"] {
        let stage = Stage::new();
        stage.aws.fault(&json!({ "action": action, "delay": 3, "error": "InternalError", "count": 1 }));
        let kiln = stage.publish().start();
        stage.aws.wait_until_struck(action);
        goes_on(&stage, kiln, action);
    }
    let stage = Stage::new();
    stage.aws.control("POST", "images", Some(&json!({ "describes": 40 })));
    let kiln = stage.publish().start();
    wait_until("the image", || stage.aws.resources()[3] == 1);
    goes_on(&stage, kiln, "a pending image");
    assert_eq!(stage.aws.requests("ec2:RegisterImage"), [] as [Value; 0]);
}
