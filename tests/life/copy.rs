//! `kiln copy`.

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{AWAY, HOME, Stage};
use crate::support::wait_until;

const FAR: &str = "eu-central-1";

fn copy(stage: &Stage, to: &[&str]) -> crate::support::Kiln {
    let to = to.iter().flat_map(|region| ["--to", region]);
    stage.kiln(["-q", "copy", "web"].into_iter().chain(to))
}

fn copies(stage: &Stage) -> usize {
    stage.aws.requests("ec2:CopyImage").len()
}

#[test]
fn a_copy_has_the_images_tags_and_is_made_once() {
    let stage = Stage::new();
    stage.aws.control("POST", "copies", Some(&json!({ "describes": 3 })));
    let lines = copy(&stage, &[AWAY, FAR]).run().succeeded();
    let regions: Vec<_> = lines.lines().map(|line| line.split_once(" ami-").unwrap().0).collect();
    assert_eq!(regions, [FAR, AWAY]);
    let original = &stage.images(HOME)[0];
    for region in [AWAY, FAR] {
        let [copied] = &stage.images(region)[..] else { panic!("one copy in {region}") };
        for same in ["image_name", "name", "digest", "tags", "state", "architecture", "size_gib"] {
            assert_eq!(copied[same], original[same], "{same}");
        }
        assert_eq!(copied["copy_of"], json!({ "region": HOME, "image_id": stage.image }));
        let snapshot = copied["snapshots"][0].as_str().unwrap();
        let tagged = stage.aws.ec2(region, "DescribeSnapshots", &[("SnapshotId.1", snapshot)]);
        for text in ["kiln:digest", "kiln:name", "kiln:settings", "<key>Name<", "web &amp; co"] {
            assert!(tagged.contains(text), "{text}: {tagged}");
        }
    }
    assert_eq!(copies(&stage), 2);
    assert_eq!(copy(&stage, &[AWAY, FAR]).run().succeeded(), lines);
    let ran = stage.kiln(["--format", "json", "-q", "copy", "web", "--to", AWAY]).run();
    assert_eq!(json!([ran.json()[0]["found"], ran.json()[0]["region"]]), json!([true, AWAY]));
    assert_eq!(copies(&stage), 2, "they are found");
}

#[test]
fn an_answer_that_is_lost_and_a_busy_region_make_no_second_copy() {
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "ec2:CopyImage", "close": true, "when": "after", "count": 1 }));
    copy(&stage, &[AWAY]).run().succeeded();
    assert_eq!((copies(&stage), stage.images(AWAY).len()), (2, 1), "AWS knows the token");

    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "ec2:CopyImage", "error": "ResourceLimitExceeded", "count": 3 }));
    let ran = stage.kiln(["copy", "web", "--to", FAR]).run();
    assert!(ran.stderr.contains("eu-central-1 copies as many snapshots as it can; waiting for it\n"), "{}", ran.stderr);
    ran.succeeded();
    assert_eq!((copies(&stage), stage.images(FAR).len()), (4, 1));
}

#[test]
fn a_copy_that_fails_is_taken_back_and_the_others_stay() {
    let stage = Stage::new();
    let before = stage.ids();
    stage.aws.control("POST", "copies", Some(&json!({ "result": "failed", "reason": "no room", "describes": 2 })));
    let said = copy(&stage, &[AWAY]).run().failed(7);
    assert!(said.contains(" in eu-west-1 is `failed`: no room\n"), "{said}");
    assert!(!said.contains("left behind"), "{said}");
    assert_eq!(stage.ids(), before, "nothing is left");

    // What can't be taken back is named.
    stage.aws.fault(&json!({ "action": "ec2:DeregisterImage", "error": "UnauthorizedOperation" }));
    let said = copy(&stage, &[AWAY]).run().failed(7);
    assert!(
        said.contains("left behind: image ami-") && said.contains("aws ec2 deregister-image --region eu-west-1"),
        "{said}"
    );

    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "ec2:CopyImage", "error": "UnauthorizedOperation", "count": 1 }));
    let ran = copy(&stage, &[AWAY, FAR]).run();
    assert_eq!(ran.code, Some(7));
    assert_eq!(ran.stdout.lines().count(), 1, "the other one: {}", ran.stdout);
    copy(&stage, &[AWAY, FAR]).run().succeeded();
    assert_eq!((stage.images(FAR).len(), stage.images(AWAY).len()), (1, 2), "the failed one is still there");
}

#[test]
fn a_signal_takes_the_copy_back_and_a_killed_kilns_copy_is_gone_on_with() {
    let stage = Stage::new();
    let before = stage.ids();
    stage.aws.control("POST", "copies", Some(&json!({ "describes": 1000 })));
    let kiln = copy(&stage, &[AWAY]).start();
    wait_until("the copy", || stage.ids()[0].len() == 2);
    kiln.signal(Signal::INT);
    let said = kiln.end().failed(130);
    assert!(said.contains("error: stopped by Ctrl-C"), "{said}");
    assert_eq!(stage.ids(), before, "nothing is left");

    stage.aws.control("POST", "copies", Some(&json!({ "describes": 10 })));
    let kiln = copy(&stage, &[AWAY]).start();
    wait_until("the copy", || stage.ids()[0].len() == 2);
    kiln.signal(Signal::KILL);
    assert_eq!(kiln.end().code, None);
    let asked = copies(&stage);
    copy(&stage, &[AWAY]).run().succeeded();
    assert_eq!((copies(&stage), stage.images(AWAY).len()), (asked, 1), "it was waited for");
}

#[test]
fn a_token_of_a_copy_that_is_gone_does_not_stand_in_the_way() {
    let stage = Stage::new();
    copy(&stage, &[AWAY]).run().succeeded();
    let gone = stage.images(AWAY)[0]["image_id"].as_str().unwrap().to_owned();
    stage.aws.ec2(AWAY, "DeregisterImage", &[("ImageId", &gone)]);
    let line = copy(&stage, &[AWAY]).run().succeeded();
    assert!(!line.contains(&gone), "{line}");
    assert_eq!(stage.images(AWAY).len(), 1);
}

#[test]
fn a_key_and_another_name() {
    let stage = Stage::new();
    let key = "alias/aws/ebs";
    copy(&stage, &[AWAY]).args(["--kms-key", key]).run().succeeded();
    let copied = &stage.images(AWAY)[0];
    assert_eq!(copied["encrypted"], true);
    copy(&stage, &[FAR]).run().succeeded();
    let said = copy(&stage, &[FAR]).args(["--kms-key", key]).run().failed(7);
    assert!(said.contains("which is not encrypted\n"), "{said}");
    // Under another name in the image's own region, as the way out of a default key.
    copy(&stage, &[HOME]).args(["--kms-key", key, "--image-name", "web-1-own"]).run().succeeded();
    let images = stage.images(HOME);
    let own = images.iter().find(|image| image["image_name"] == "web-1-own").unwrap();
    assert_eq!(json!([own["encrypted"], own["tags"]["Name"]]), json!([true, "web-1-own"]));

    let said = copy(&stage, &["eu-west-2"]).args(["--kms-key", "alias/absent"]).run().failed(7);
    assert!(said.contains("is `failed`: The KMS key alias/absent does not exist"), "{said}");
    assert_eq!(stage.images("eu-west-2"), [] as [Value; 0]);
}

#[test]
fn names_that_are_taken_partitions_and_images_that_are_not_there() {
    let stage = Stage::new();
    let parameters = [("SourceRegion", HOME), ("SourceImageId", stage.image.as_str()), ("Name", "web-1")];
    stage.aws.ec2(AWAY, "CopyImage", &[&parameters[..], &[("Description", "another's")]].concat());
    // It is a copy of this image, though without tags: that is as good.
    copy(&stage, &[AWAY]).run().succeeded();
    let other = stage.another("other", 1);
    let parameters = [("SourceRegion", HOME), ("SourceImageId", other.as_str()), ("Name", "web-1")];
    stage.aws.ec2(FAR, "CopyImage", &parameters);
    stage.aws.reset();
    let said = copy(&stage, &[FAR]).run().failed(7);
    assert!(said.starts_with("error: the image name `web-1` is already taken in eu-central-1 by ami-"), "{said}");
    let said = copy(&stage, &["cn-north-1"]).run().failed(3);
    assert!(said.contains("can't be copied from us-east-1 to cn-north-1: images don't leave `aws`\n"), "{said}");
    let said = stage.kiln(["-q", "copy", "web", "--from", FAR, "--to", HOME]).run().failed(3);
    insta::assert_snapshot!(said, @r"
    error: kiln has made no image `web` that is available in eu-central-1
     |
    help: `kiln images --all-regions` lists what kiln has made in this account
    ");
    assert_eq!(copies(&stage), 0);
}
