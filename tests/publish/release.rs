//! What an image gets once it is there: permissions, a date, protection, a parameter that names it, an old name; and
//! what is said before that: permissions that are needed, and whether they are there.

use serde_json::{Value, json};

use super::{NOTHING, ONE_IMAGE, Stage};
use crate::support::{Kiln, append_data};

const ALL: &str = "share = [\"123456789012\", \"arn:aws:organizations::123456789012:organization/o-abcdefghij\"]\n\
                   deprecate_after = \"90d\"\nprotection = \"on\"\nparameter = \"/images/{name}/latest\"\n";

fn publish<const N: usize>(stage: &Stage, more: [&str; N]) -> Kiln {
    let all = ["-q", "publish", "out/web"].into_iter().chain(more).collect::<Vec<_>>();
    stage.aws.with(stage.bench.kiln(all))
}

/// Builds the recipe with another base.
fn another_disk(stage: &Stage) {
    append_data(&stage.bench.path("base.raw"), 300 << 10);
    stage.bench.build(&json!({})).run().succeeded();
}

#[test]
fn an_image_is_shared_dated_protected_and_named() {
    let stage = Stage::small(ALL);
    let image = stage.published(stage.publish().run());
    let done = |action: &str| {
        let calls = stage.aws.requests(action);
        assert_eq!(calls.len(), 1, "{action}: {calls:?}");
        calls[0]["parameters"].clone()
    };
    let shared = done("ec2:ModifyImageAttribute").to_string();
    assert!(shared.contains("123456789012") && shared.contains("o-abcdefghij"), "{shared}");
    assert_eq!(done("ec2:EnableImageDeprecation")["ImageId"], image.as_str());
    done("ec2:EnableImageDeregistrationProtection");
    let actions = stage.aws.actions();
    let place = |action: &str| actions.iter().rposition(|one| one == action).unwrap();
    let put = place("ssm:PutParameter");
    for earlier in ["ec2:RegisterImage", "ec2:ModifyImageAttribute", "ec2:EnableImageDeregistrationProtection"] {
        assert!(place(earlier) < put, "the parameter comes last: {actions:?}");
    }

    // Again nothing is made, and the date and the parameter stay as they are.
    stage.aws.reset();
    assert_eq!(stage.published(stage.publish().run()), image);
    for action in ["ec2:RegisterImage", "ec2:EnableImageDeprecation", "ssm:PutParameter"] {
        assert!(stage.aws.requests(action).is_empty(), "{action}");
    }
}

#[test]
fn an_image_that_can_not_be_shared_is_taken_back() {
    let stage = Stage::small(ALL);
    stage.aws.fault(&json!({ "action": "ec2:ModifyImageAttribute", "error": "UnauthorizedOperation" }));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(said.contains("not permitted to call ModifyImageAttribute"), "{said}");
    assert!(stage.aws.requests("ssm:PutParameter").is_empty());
}

#[test]
fn an_image_without_its_parameter_is_there_all_the_same() {
    let stage = Stage::small(ALL);
    stage.aws.fault(&json!({ "action": "ssm:PutParameter", "error": "AccessDeniedException" }));
    let ran = stage.publish().run();
    assert_eq!(ran.code, Some(7), "{}", ran.stderr);
    assert!(ran.stderr.contains("not permitted to call PutParameter"), "{}", ran.stderr);
    let id = ran.stdout.trim_end().strip_prefix("us-east-1 ").unwrap();
    assert!(ran.stderr.contains(&format!("the image {id} is there")), "{}", ran.stderr);
    assert_eq!(stage.aws.resources(), ONE_IMAGE);
    assert_eq!(stage.remembered()[0]["image_id"], id);
    stage.aws.reset();
    assert_eq!(stage.published(stage.publish().run()), id);
    assert_eq!(stage.aws.requests("ssm:PutParameter").len(), 1);
}

#[test]
fn a_parameter_goes_with_the_image_that_it_names() {
    let stage = Stage::small("parameter = \"/images/{name}/latest\"\n");
    let first = stage.published(stage.publish().run());
    let retire = |image: &str| {
        let kiln = stage.aws.with(stage.bench.kiln(["-q", "retire", image, "--yes"]));
        kiln.run().succeeded();
        stage.aws.requests("ssm:DeleteParameter").len()
    };
    stage.publish().args(["--image-name", "web-2"]).run().succeeded();
    assert_eq!(retire(&first), 0, "it names a newer image");
    assert_eq!(retire("web-2"), 1);
    assert_eq!(stage.aws.resources(), NOTHING);
}

#[test]
fn everyone_only_where_the_account_lets_them() {
    let stage = Stage::small("");
    let said = stage.fails(publish(&stage, ["--share", "all"]), 7, NOTHING);
    assert!(said.contains("this account lets no images be public in us-east-1 (block public access)"), "{said}");
    assert!(stage.aws.requests("ebs:StartSnapshot").is_empty(), "before anything is sent");
}

#[test]
fn a_new_disk_takes_the_name_when_its_image_is_available() {
    let stage = Stage::small("");
    let first = stage.published(stage.publish().run());
    another_disk(&stage);
    let said = publish(&stage, []).run().failed(7);
    assert!(said.contains(&format!("the image name `web-1` is already taken in us-east-1 by {first}")), "{said}");

    stage.aws.reset();
    let second = stage.published(publish(&stage, ["--force"]).run());
    assert_ne!(first, second);
    let calls = stage.aws.requests("");
    let gone = calls.iter().position(|call| call["action"] == "ec2:DeregisterImage").unwrap();
    let available = calls[..gone].iter().filter(|call| call["action"] == "ec2:RegisterImage").count();
    assert_eq!(available, 1, "the new image was there before the old one went");
    let names: Vec<&Value> = calls
        .iter()
        .filter(|call| call["action"] == "ec2:RegisterImage")
        .map(|call| &call["parameters"]["Name"])
        .collect();
    assert_eq!(names, ["web-1.new", "web-1"]);
}

#[test]
fn a_protected_image_keeps_its_name() {
    let stage = Stage::small("protection = \"on\"\n");
    let first = stage.published(stage.publish().run());
    another_disk(&stage);
    let said = publish(&stage, ["--force"]).run().failed(7);
    assert!(said.contains(&format!("image {first} is protected from being deregistered")), "{said}");
    assert_eq!(stage.aws.resources(), ONE_IMAGE, "the old image and its snapshot are all there is");
}

#[test]
fn by_whichever_way_is_permitted() {
    let stage = Stage::with("via = \"auto\"\n");
    stage.aws.fault(&json!({ "action": "ebs:StartSnapshot", "error": "AccessDeniedException" }));
    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web"])).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("no EBS direct (AccessDeniedException"), "{}", ran.stderr);
    assert!(ran.stderr.contains("going through the bucket `images`"), "{}", ran.stderr);
    assert_eq!(stage.aws.resources(), ONE_IMAGE);
    stage.assert_arrived();

    let stage = Stage::with("via = \"auto\"\n");
    stage.published(stage.publish().run());
    assert!(stage.aws.requests("s3:CreateMultipartUpload").is_empty(), "EBS direct is the first choice");
    stage.assert_arrived();
}

#[test]
fn the_permissions_that_a_publish_needs() {
    let stage = Stage::with(ALL);
    let said = publish(&stage, ["--iam-policy", "--region", "eu-west-1"]).run().succeeded();
    insta::assert_snapshot!(said, @r##"
    {
      "Statement": [
        {
          "Action": [
            "ec2:CancelImportTask",
            "ec2:CreateTags",
            "ec2:DeleteSnapshot",
            "ec2:DeregisterImage",
            "ec2:DescribeImages",
            "ec2:DescribeImportSnapshotTasks",
            "ec2:DescribeSnapshots",
            "ec2:EnableImageDeprecation",
            "ec2:EnableImageDeregistrationProtection",
            "ec2:ImportSnapshot",
            "ec2:ModifyImageAttribute",
            "ec2:RegisterImage"
          ],
          "Effect": "Allow",
          "Resource": "*",
          "Sid": "Images"
        },
        {
          "Action": [
            "s3:GetBucketLocation",
            "s3:ListBucket",
            "s3:ListBucketMultipartUploads"
          ],
          "Effect": "Allow",
          "Resource": "arn:aws:s3:::images",
          "Sid": "Bucket"
        },
        {
          "Action": [
            "s3:AbortMultipartUpload",
            "s3:DeleteObject",
            "s3:DeleteObjectVersion",
            "s3:GetObject",
            "s3:ListMultipartUploadParts",
            "s3:PutObject"
          ],
          "Effect": "Allow",
          "Resource": "arn:aws:s3:::images/web-*",
          "Sid": "Objects"
        },
        {
          "Action": [
            "ssm:GetParameter",
            "ssm:PutParameter"
          ],
          "Effect": "Allow",
          "Resource": "arn:aws:ssm:eu-west-1:*:parameter/images/web/latest",
          "Sid": "Parameters"
        }
      ],
      "Version": "2012-10-17"
    }
    "##);
    assert!(stage.aws.requests("").is_empty(), "nothing was asked");
}

#[test]
fn what_a_publish_would_meet_is_looked_at_without_making_anything() {
    let stage = Stage::new();
    let said = publish(&stage, ["--check"]).run().succeeded();
    insta::assert_snapshot!(said, @"
    us-east-1       name                 ok       `web-1` is free
    us-east-1       bucket               ok       `images` is in us-east-1
    us-east-1       import role          ok       AWS takes the role `vmimport`
    us-east-1       upload               unknown  s3:PutObject and the like can't be asked for without an object
    us-east-1       ec2:RegisterImage    ok       permitted
    us-east-1       ec2:CreateTags       ok       permitted
    us-east-1       ec2:DeregisterImage  ok       permitted
    us-east-1       ec2:DeleteSnapshot   ok       permitted
    us-east-1       quota: images        ok       0 of 50000
    us-east-1       quota: snapshots     ok       0 of 100000
    ");
    stage.aws.fault(&json!({ "action": "ec2:RegisterImage", "error": "UnauthorizedOperation" }));
    let ran = publish(&stage, ["--check"]).run();
    assert_eq!(ran.code, Some(7), "{}", ran.stderr);
    assert!(ran.stdout.contains("not permitted to call RegisterImage; allow `ec2:RegisterImage`"), "{}", ran.stdout);
    assert!(ran.stderr.contains("a publish would fail in us-east-1"), "{}", ran.stderr);
    let ran = publish(&stage, ["--check", "--bucket", "nowhere"]).run();
    assert_eq!(ran.code, Some(7), "{}", ran.stderr);
    assert!(
        ran.stdout.contains("bucket               fails    there is no bucket `nowhere`; make it"),
        "{}",
        ran.stdout
    );
    stage.assert_left(NOTHING);
}

#[test]
fn a_workflow_is_told_the_image() {
    let stage = Stage::new();
    let file = stage.bench.path("outputs");
    std::fs::write(&file, "earlier=1\n").unwrap();
    let image = stage.published(stage.publish().env("GITHUB_OUTPUT", file.to_str().unwrap()).run());
    let told = stage.bench.read("outputs");
    assert!(told.starts_with(&format!("earlier=1\nimage-id={image}\nsnapshot-id=snap-")), "{told}");
    assert!(told.ends_with(&format!("images={{\"us-east-1\":\"{image}\"}}\n")), "{told}");
}
