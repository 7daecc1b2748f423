//! `kiln share`.

use serde_json::{Value, json};

use super::{AWAY, HOME, Stage};

const ORGANISATION: &str = "arn:aws:organizations::123456789012:organization/o-abcdefghij";

fn with(stage: &Stage) -> Value {
    let image = stage.images(HOME).into_iter().find(|image| image["image_id"] == stage.image.as_str());
    image.unwrap()["shared_with"].clone()
}

#[test]
fn an_image_is_shared_and_not_any_more() {
    let stage = Stage::new();
    let old = stage.another("web-0", 3);
    let arguments = ["share", "web", "--with", "111122223333", "--with", ORGANISATION, "--with", "111122223333"];
    let ran = stage.kiln(arguments).run();
    assert_eq!(ran.stderr, "     note web-1 in us-east-1 is now shared with 1 account, 1 organisation or unit\n");
    assert_eq!(ran.stdout, format!("us-east-1 {}\n", stage.image));
    assert_eq!(with(&stage), json!(["111122223333", ORGANISATION]));
    stage.kiln(arguments).run().succeeded();
    assert_eq!(with(&stage), json!(["111122223333", ORGANISATION]), "again is the same");
    assert_eq!(stage.images(HOME)[1]["shared_with"], json!([]), "{old} is not the newest");

    let text = stage.kiln(["-q", "share", "web-0", "--with", "111122223333", "--snapshots"]).run().succeeded();
    assert_eq!(text, format!("us-east-1 {old}\n"));
    let snapshot = stage.snapshot(&old);
    let asked = [("SnapshotId", snapshot.as_str()), ("Attribute", "createVolumePermission")];
    assert!(stage.aws.ec2(HOME, "DescribeSnapshotAttribute", &asked).contains("111122223333"));
    stage.kiln(["-q", "share", &old, "--with", "111122223333", "--snapshots", "--remove"]).run().succeeded();
    assert!(!stage.aws.ec2(HOME, "DescribeSnapshotAttribute", &asked).contains("111122223333"));
    assert_eq!(stage.images(HOME)[1]["shared_with"], json!([]));
}

#[test]
fn everyone_only_where_the_account_lets_it() {
    let stage = Stage::new();
    let everyone = || stage.kiln(["-q", "share", "web", "--with", "all"]);
    insta::assert_snapshot!(everyone().run().failed(7), @r"
    error: this account lets no images be public in us-east-1 (block public access)
     |
    help: if all the world shall have it: `aws ec2 disable-image-block-public-access --region us-east-1`, share it, then `aws ec2 enable-image-block-public-access --region us-east-1 --image-block-public-access-state block-new-sharing`
    ");
    assert_eq!(stage.aws.requests("ec2:ModifyImageAttribute"), [] as [Value; 0], "nothing was tried");
    // Who may not ask is told by AWS.
    stage.aws.fault(&json!({ "action": "ec2:GetImageBlockPublicAccessState", "error": "UnauthorizedOperation" }));
    let said = everyone().run().failed(7);
    assert!(
        said.starts_with("error: us-east-1: AWS refused ModifyImageAttribute: OperationNotPermitted: Block public"),
        "{said}"
    );
    stage.aws.reset();
    stage.aws.ec2(HOME, "DisableImageBlockPublicAccess", &[]);
    everyone().run().succeeded();
    assert_eq!((with(&stage), stage.images(HOME)[0]["public"].clone()), (json!(["all"]), json!(true)));
    assert!(stage.kiln(["-q", "images"]).run().succeeded().trim_end().ends_with("  everyone"));

    stage.aws.ec2(HOME, "EnableSnapshotBlockPublicAccess", &[("State", "block-all-sharing")]);
    let said = everyone().arg("--snapshots").run().failed(7);
    assert!(said.starts_with("error: this account lets no snapshots be public in us-east-1"), "{said}");
    everyone().arg("--remove").run().succeeded();
    assert_eq!(with(&stage), json!([]));
}

#[test]
fn what_cannot_be_shared_is_explained() {
    let stage = Stage::new();
    let share = |arguments: &[&str]| stage.kiln(["-q", "share"].into_iter().chain(arguments.iter().copied())).run();
    insta::assert_snapshot!(share(&["web", "--with", "1234-5678-9012"]).failed(2), @r"
    error: --with: an image can't be shared with `1234-5678-9012`
     |
    help: write `123456789012`
    ");
    insta::assert_snapshot!(share(&["web", "--with", ORGANISATION, "--snapshots"]).failed(3), @r"
    error: snapshots can't be shared with `arn:aws:organizations::123456789012:organization/o-abcdefghij`
     |
    help: AWS shares snapshots with accounts only; name those, or share the image alone: who may launch it needs no snapshot
    ");
    insta::assert_snapshot!(share(&["web", "--with", ORGANISATION, "--region", "cn-north-1"]).failed(3), @r"
    error: an image in cn-north-1 can't be shared with `arn:aws:organizations::123456789012:organization/o-abcdefghij`
     |
    help: there, ARNs begin with `arn:aws-cn:`
    ");
    insta::assert_snapshot!(share(&["other", "--with", "111122223333"]).failed(3), @r"
    error: kiln has made no image `other` that is available in us-east-1
     |
    help: `kiln images --all-regions` lists what kiln has made in this account
    ");
    assert_eq!(stage.aws.requests("ec2:ModifyImageAttribute"), [] as [Value; 0]);

    // In one of two regions there is none: the other's is shared, and it is said.
    let ran = share(&["web", "--with", "111122223333", "--region", HOME, "--region", AWAY]);
    assert_eq!((ran.code, ran.stdout), (Some(3), format!("us-east-1 {}\n", stage.image)));
    assert!(ran.stderr.starts_with("error: kiln has made no image `web` that is available in eu-west-1\n"));
    share(&[&stage.image, "--with", "111122223333", "--region", HOME, "--region", AWAY]).succeeded();
}

#[test]
fn an_image_with_the_default_key_cannot_be_shared() {
    let stage = Stage::without_image();
    stage.aws.encrypt_by_default();
    let stage = Stage { image: stage.publish("web-1"), ..stage };
    let said = stage.kiln(["-q", "share", "web", "--with", "111122223333"]).run().failed(7);
    insta::assert_snapshot!(said.replace(&stage.image, "AMI"), @r"
    error: AMI in us-east-1 can't be shared: it is encrypted with the account's default key (`alias/aws/ebs`)
     |
    help: copy the image with a key of your own, and let the other accounts use that: `kiln copy IMAGE --to us-east-1 --kms-key KEY --image-name NAME`
    ");
    stage.aws.ec2(HOME, "DisableImageBlockPublicAccess", &[]);
    let said = stage.kiln(["-q", "share", "web", "--with", "all"]).run().failed(7);
    insta::assert_snapshot!(said.replace(&stage.image, "AMI"), @r"
    error: AMI in us-east-1 can't be public: it is encrypted
     |
    help: share it with accounts, or publish the disk once more without encryption
    ");
}
