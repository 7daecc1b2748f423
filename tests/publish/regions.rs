//! Many regions: sent to once and copied, or written straight to each; what becomes of the others when one fails.

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{NOTHING, Stage};

const THREE: &str = "regions = [\"eu-west-1\", \"us-east-1\", \"ap-southeast-2\"]\n";

/// The regions in the lines that were printed, each with its image's id.
#[track_caller]
fn lines(said: &str) -> Vec<(String, String)> {
    let pair = |line: &str| line.split_once(' ').map(|(region, id)| (region.to_owned(), id.to_owned())).unwrap();
    said.lines().map(pair).collect()
}

fn regions(lines: &[(String, String)]) -> Vec<&str> {
    lines.iter().map(|(region, _)| region.as_str()).collect()
}

fn actions(stage: &Stage, action: &str) -> Vec<Value> {
    let mut calls = stage.aws.requests(action);
    calls.retain(|call| call["status"] == 200);
    calls
}

#[test]
fn the_disk_is_sent_once_and_its_image_copied() {
    // The bucket is in us-east-1: that region is where the others copy from.
    let stage = Stage::with(THREE);
    let said = stage.publish().run().succeeded();
    let all = lines(&said);
    assert_eq!(regions(&all), ["eu-west-1", "us-east-1", "ap-southeast-2"], "in the recipe's order");
    assert_eq!(stage.aws.resources(), [0, 0, 3, 3, 0], "an image with its snapshot in each, and nothing else");
    assert_eq!(actions(&stage, "ec2:RegisterImage").len(), 1);
    let copies = actions(&stage, "ec2:CopyImage");
    assert_eq!(copies.len(), 2);
    for copy in &copies {
        let parameters = &copy["parameters"];
        assert_eq!(parameters["SourceRegion"], "us-east-1");
        assert_eq!(parameters["SourceImageId"], all[1].1.as_str());
        assert_eq!(parameters["Name"], "web-1");
        assert!(parameters["ClientToken"].as_str().unwrap().starts_with("kiln-"));
    }
    let remembered = stage.remembered();
    let places: Vec<_> = remembered.as_array().unwrap().iter().map(|image| image["region"].as_str().unwrap()).collect();
    assert_eq!(places, ["eu-west-1", "us-east-1", "ap-southeast-2"]);
    stage.assert_arrived();

    stage.aws.reset();
    assert_eq!(lines(&stage.publish().run().succeeded()), all, "again it is the same");
    let made = ["s3:CreateMultipartUpload", "ec2:ImportSnapshot", "ec2:RegisterImage", "ec2:CopyImage"];
    assert!(made.iter().all(|action| stage.aws.requests(action).is_empty()), "and nothing was asked for");
}

#[test]
fn by_ebs_direct_each_region_gets_the_disk_itself() {
    let stage = Stage::small(THREE);
    let all = lines(&stage.publish().args(["--via", "ebs"]).run().succeeded());
    assert_eq!(all.len(), 3);
    assert_eq!(stage.aws.resources(), [0, 0, 3, 3, 0]);
    assert_eq!(actions(&stage, "ec2:RegisterImage").len(), 3);
    assert!(stage.aws.requests("ec2:CopyImage").is_empty());
    stage.assert_arrived();
}

#[test]
fn a_region_that_fails_stops_no_other_and_the_next_publish_makes_the_rest() {
    let stage = Stage::small(THREE);
    // Copies are asked for in two regions; the one that comes first is refused, for good.
    stage.aws.fault(&json!({ "action": "ec2:CopyImage", "error": "UnauthorizedOperation", "count": 1 }));
    let ran = stage.publish().run();
    assert_eq!(ran.code, Some(7), "{}", ran.stderr);
    let all = lines(&ran.stdout);
    assert_eq!(all.len(), 2, "{}", ran.stdout);
    let failed = ["us-east-1", "ap-southeast-2"].into_iter().find(|region| !regions(&all).contains(region)).unwrap();
    assert!(ran.stderr.contains(&format!("1 of 3 regions failed: {failed}")), "{}", ran.stderr);
    assert!(ran.stderr.contains(&format!("[{failed}] error: not permitted to call CopyImage")), "{}", ran.stderr);
    assert_eq!(stage.aws.resources(), [0, 0, 2, 2, 0]);
    assert_eq!(stage.remembered().as_array().unwrap().len(), 2);

    stage.aws.reset();
    assert_eq!(lines(&stage.publish().run().succeeded()).len(), 3);
    assert_eq!(stage.aws.resources(), [0, 0, 3, 3, 0]);
    assert_eq!(actions(&stage, "ec2:CopyImage").len(), 1);
    assert!(stage.aws.requests("ebs:StartSnapshot").is_empty());
}

#[test]
fn without_the_first_image_there_is_nothing_to_copy() {
    let stage = Stage::small(THREE);
    stage.aws.fault(&json!({ "action": "ec2:RegisterImage", "error": "UnauthorizedOperation" }));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(said.contains("[eu-west-1] error: not permitted to call RegisterImage"), "{said}");
    assert!(said.contains("[us-east-1] error: there is no image to copy to us-east-1"), "{said}");
    assert!(said.contains("3 of 3 regions failed: eu-west-1, us-east-1, ap-southeast-2"), "{said}");
}

#[test]
fn nothing_is_made_anywhere_if_one_region_is_wrong_and_that_is_to_stop_all() {
    let stage = Stage::small(THREE);
    // Each region asks for the images of the disk first; one of them may not.
    stage.aws.fault(&json!({ "action": "ec2:DescribeImages", "error": "UnauthorizedOperation", "count": 1 }));
    let kiln = stage.aws.with(stage.bench.kiln(["-q", "publish", "out/web", "--fail-fast"]));
    let said = stage.fails(kiln, 7, NOTHING);
    assert_eq!(said.matches("error: not permitted to call DescribeImages").count(), 1, "{said}");
    assert_eq!(said.matches(" failed\n").count(), 2, "the others say why they are not: {said}");
    assert!(stage.aws.requests("ebs:StartSnapshot").is_empty(), "nothing was sent");
}

#[test]
fn a_signal_ends_all_regions() {
    let stage = Stage::with(THREE);
    let kiln = stage.importing();
    kiln.signal(Signal::INT);
    let ran = kiln.end();
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    stage.assert_left(NOTHING);
}

#[test]
fn regions_of_other_partitions_and_named_twice_are_refused_without_a_request() {
    let stage = Stage::small("");
    let publish = |regions: &str| {
        let said = stage.aws.with(stage.bench.kiln(["-q", "publish", "out/web", "--region", regions])).run();
        (said.code, said.stderr)
    };
    let (code, said) = publish("eu-west-1,cn-north-1");
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("eu-west-1 and cn-north-1 are in different partitions of AWS"), "{said}");
    let (code, said) = publish("eu-west-1,eu-west-1");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("the region `eu-west-1` is there twice"), "{said}");
    assert!(stage.aws.requests("").is_empty());
}
