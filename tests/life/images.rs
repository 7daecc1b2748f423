//! `kiln images`.

use serde_json::{Value, json};

use super::{AWAY, HOME, Stage, redacted};

#[test]
fn images_are_listed_by_name_then_newest_first() {
    let stage = Stage::new();
    stage.another("web-0", 40);
    stage.foreign("not kiln's");
    stage.age(&stage.image, 1);
    let digest = stage.images(HOME)[0]["digest"].as_str().unwrap()[..8].to_owned();
    let text = stage.kiln(["-q", "images"]).run().succeeded();
    insta::assert_snapshot!(redacted(&text).replace(&digest, "DIGEST.."), @r"
    NAME  IMAGE NAME  IMAGE                  DIGEST    REGION     AGE   SIZE   STATE      DEPRECATED  SHARED WITH
    web   web-1       ami-00000000000000000  DIGEST..  us-east-1  1 d   1 GiB  available  -           -
    web   web-0       ami-00000000000000000  web-0     us-east-1  40 d  1 GiB  available  -           -
    ");

    let found = stage.images(HOME);
    assert_eq!(found.len(), 2);
    let facts = |key: &str| found.iter().map(|image| image[key].clone()).collect::<Vec<_>>();
    assert_eq!(facts("image_name"), ["web-1", "web-0"]);
    assert_eq!(facts("state"), ["available", "available"]);
    assert_eq!(facts("size_gib"), [1, 1]);
    assert_eq!(facts("shared_with"), [json!([]), json!([])]);
    assert_eq!(found[0]["tags"]["team"], "web & co");
    assert_eq!(found[1]["copy_of"]["image_id"], stage.image.as_str());
    assert!(found[1]["age"].as_u64().unwrap() >= 40 * 86_400);

    for (name, count) in [("web", 2), ("web-0", 1), (stage.image.as_str(), 1), ("not kiln's", 0)] {
        let ran = stage.kiln(["--format", "json", "-q", "images", name]).run();
        assert_eq!(ran.json().as_array().unwrap().len(), count, "{name}");
    }
    let ran = stage.kiln(["images", "none"]).run();
    assert_eq!((ran.stderr.as_str(), ran.stdout.as_str()), ("kiln has made no such image here\n", ""));
}

#[test]
fn regions_are_side_by_side_and_one_that_fails_does_not_hide_the_others() {
    let stage = Stage::new();
    stage.kiln(["-q", "copy", "web", "--to", AWAY]).run().succeeded();
    let all: Vec<Value> = {
        let ran = stage.kiln(["--format", "json", "-q", "images", "--all-regions"]).run();
        ran.json().as_array().unwrap().clone()
    };
    let regions: Vec<_> = all.iter().map(|image| image["region"].clone()).collect();
    assert!(regions.contains(&json!(HOME)) && regions.contains(&json!(AWAY)) && all.len() == 2, "{regions:?}");
    assert!(stage.aws.requests("ec2:DescribeImages").iter().any(|call| call["region"] == "ap-northeast-1"));

    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "ec2:DescribeImages", "error": "UnauthorizedOperation", "count": 1 }));
    let ran = stage.kiln(["-q", "images", "--region", HOME, "--region", AWAY, "--region", HOME]).run();
    assert_eq!(ran.code, Some(7), "{}", ran.stderr);
    assert_eq!(ran.stdout.lines().count(), 2, "headings, and the image of the other region: {}", ran.stdout);
    let (failed, other) = if ran.stdout.contains(AWAY) { (HOME, AWAY) } else { (AWAY, HOME) };
    assert!(ran.stdout.contains(other), "{}", ran.stdout);
    assert!(
        ran.stderr.starts_with(&format!("error: {failed}: not permitted to call DescribeImages\n")),
        "{}",
        ran.stderr
    );
}

#[test]
fn who_may_not_ask_whom_images_are_shared_with_sees_the_rest() {
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "ec2:DescribeImageAttribute", "error": "UnauthorizedOperation" }));
    assert_eq!(stage.images(HOME)[0]["shared_with"], Value::Null);
    let text = stage.kiln(["-q", "images"]).run().succeeded();
    assert!(text.trim_end().ends_with('?'), "{text}");
}
