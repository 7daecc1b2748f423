//! Refusals: each says what is wrong and what to do, is asked once if it can't succeed, and leaves nothing.

use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use super::{NOTHING, ONE_IMAGE, Stage, word};

#[test]
fn what_is_missing_is_told_before_anything_is_sent() {
    let stage = Stage::new();
    let fails = |kiln| stage.fails(kiln, 7, NOTHING);
    insta::assert_snapshot!(fails(stage.publish().args(["--bucket", "nowhere-to-be-found"])), @r"
    error: there is no bucket `nowhere-to-be-found`
     |
    help: make it with `aws s3 mb s3://nowhere-to-be-found --region us-east-1`, or name another with --bucket
    ");
    insta::assert_snapshot!(stage.fails(stage.publish().without("AWS_REGION").without("AWS_DEFAULT_REGION"), 3, NOTHING), @r"
    error: no region to publish to
     |
    help: name one with --region, as `regions` in the recipe's [publish], with AWS_REGION, or in the AWS profile
    ");
    let keyless =
        stage.publish().without("AWS_ACCESS_KEY_ID").without("AWS_SECRET_ACCESS_KEY").without("AWS_SESSION_TOKEN");
    insta::assert_snapshot!(fails(keyless), @r"
    error: no usable AWS credentials
     |
    help: the SDK looked in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the profile `default` (AWS_PROFILE) of ~/.aws/config and ~/.aws/credentials, and for a container's or an instance's role; sign in (`aws configure`, `aws sso login`) or set one of them
    ");
    insta::assert_snapshot!(fails(stage.publish().args(["--region", "eu-west-1"])), @r"
    error: the bucket `images` is in region us-east-1, and the image is to be in eu-west-1
     |
    help: name a bucket in eu-west-1 with --bucket, or publish to us-east-1 with --region
    ");
    let deaf = stage.publish().env("AWS_ENDPOINT_URL", "http://127.0.0.1:1").env("AWS_MAX_ATTEMPTS", "1");
    insta::assert_snapshot!(fails(deaf), @r"
    error: cannot reach http://127.0.0.1:1: Connection refused (os error 111)
     |
    help: check the network and that the region `us-east-1` exists; AWS_ENDPOINT_URL and the AWS profile can name another endpoint
    ");
    assert_eq!(stage.aws.requests("s3:CreateMultipartUpload"), [] as [Value; 0]);
}

#[test]
fn a_name_that_is_taken() {
    let stage = Stage::new();
    let first = stage.published(stage.publish().run());
    std::fs::remove_file(stage.bench.path("out/web/published.json")).unwrap();
    stage.aws.reset();
    // It is not the same image.
    stage.bench.manifest(|manifest| manifest["publish"]["description"] = "another".into());
    let said = stage.fails(stage.publish(), 7, ONE_IMAGE);
    insta::assert_snapshot!(said.replace(&first, "AMI"), @r"
    error: the image name `web-1` is already taken in us-east-1 by AMI
     |
    help: choose another with image_name in the recipe's [publish], e.g. with `{date}` or `{digest:8}`, or deregister that image
    ");
    assert_eq!(stage.aws.requests("s3:CreateMultipartUpload"), [] as [Value; 0], "told before the upload");

    // Taken by another between the check and the registration.
    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "ec2:RegisterImage", "error": "InvalidAMIName.Duplicate",
        "message": "AMI name web-2 is already in use by AMI ami-1" }));
    let said = stage.fails(stage.publish().args(["--image-name", "web-2"]), 7, ONE_IMAGE);
    assert!(said.starts_with("error: the image name `web-2` is already taken in us-east-1"), "{said}");
    assert_eq!(stage.aws.requests("ec2:RegisterImage").len(), 1);
}

#[test]
fn credentials_that_expire_on_the_way() {
    let stage = Stage::new();
    stage.aws.fault(
        &json!({ "action": "ec2:DescribeImportSnapshotTasks", "error": "RequestExpired", "skip": 2, "count": 1 }),
    );
    insta::assert_snapshot!(stage.fails(stage.publish(), 7, NOTHING), @r"
    error: the AWS credentials have expired
     |
     = AWS said: RequestExpired: injected by the test: RequestExpired
    help: sign in again (`aws sso login`, or new keys), then publish again; the disk is unchanged
    ");
    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "s3:UploadPart", "error": "ExpiredToken", "skip": 2 }));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(said.starts_with("error: the AWS credentials have expired\n"), "{said}");
}

#[test]
fn a_missing_import_role() {
    let stage = Stage::with("role = \"no-such-role\"\n");
    let said = stage.fails(stage.publish(), 7, NOTHING);
    insta::assert_snapshot!(said, @r#"
    error: AWS can't read the disk by the role `no-such-role`: it is missing, or lacks a permission
     |
     = AWS said: InvalidParameter: The service role no-such-role provided does not exist or does not have sufficient permissions
    help: make it once per account:
            aws iam create-role --role-name no-such-role --assume-role-policy-document '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Principal":{"Service":"vmie.amazonaws.com"},"Action":"sts:AssumeRole","Condition":{"StringEquals":{"sts:Externalid":"vmimport"}}}]}'
            aws iam put-role-policy --role-name no-such-role --policy-name no-such-role --policy-document '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["s3:GetBucketLocation","s3:GetObject","s3:ListBucket"],"Resource":["arn:aws:s3:::images","arn:aws:s3:::images/*"]},{"Effect":"Allow","Action":["ec2:ModifySnapshotAttribute","ec2:CopySnapshot","ec2:RegisterImage","ec2:Describe*"],"Resource":"*"}]}'
          see https://docs.aws.amazon.com/vm-import/latest/userguide/required-permissions.html
    "#);
    assert_eq!(stage.aws.requests("ec2:ImportSnapshot").len(), 1, "asked once");
    assert_eq!(stage.aws.requests("s3:CreateMultipartUpload"), [] as [Value; 0], "told before the upload");

    // AWS need not look at the role in a dry run.
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "ec2:ImportSnapshot", "error": "InvalidParameter", "skip": 1,
        "message": "The service role vmimport provided does not exist or does not have sufficient permissions" }));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(said.starts_with("error: AWS can't read the disk by the role `vmimport`: it is missing"), "{said}");
    assert_eq!(stage.aws.struck("ec2:ImportSnapshot"), 1, "asked once");
}

#[test]
fn an_import_that_fails() {
    let stage = Stage::new();
    let failed =
        json!({ "result": "deleted", "message": "ClientError: Disk validation failed [Unsupported VMDK File Format]" });
    stage.aws.control("POST", "import", Some(&failed));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    insta::assert_snapshot!(said.replace(&word(&said, "import-snap-"), "TASK"), @r"
    error: AWS could not import the disk: ClientError: Disk validation failed [Unsupported VMDK File Format]
     |
     = import task TASK
    help: AWS doesn't take such a disk; https://docs.aws.amazon.com/vm-import/latest/userguide/troubleshooting.html says what it takes
    ");
}

#[test]
fn an_image_that_fails() {
    let stage = Stage::new();
    stage.aws.control(
        "POST",
        "images",
        Some(&json!({ "seconds": 0, "result": "failed", "reason": "snapshot is bad" })),
    );
    let said = stage.fails(stage.publish(), 7, NOTHING);
    insta::assert_snapshot!(said.replace(&word(&said, "ami-"), "AMI"), @r"
    error: the image AMI is `failed`: snapshot is bad
     |
    help: publish again; the disk is unchanged
    ");
}

#[test]
fn a_disk_that_is_cut_short_is_not_sent() {
    let stage = Stage::new();
    let file = std::fs::OpenOptions::new().write(true).open(stage.bench.path("out/web/disk.raw")).unwrap();
    file.set_len(1 << 29).unwrap();
    let said = stage.publish().run().failed(3);
    insta::assert_snapshot!(said, @r"
    error: `out/web/disk.raw` is not known to be what was built: 1024 of its 2048 blocks differ, the first at byte 536870912
     |
    help: build it again
    ");
    assert_eq!(stage.aws.resources(), NOTHING);
}

#[test]
fn a_disk_that_is_not_what_was_built_is_not_sent() {
    let stage = Stage::new();
    let out = stage.bench.path("out/web");
    let copied = std::process::Command::new("cp").arg("-a").arg(&out).arg(stage.bench.path("copy")).status();
    assert!(copied.unwrap().success());
    let disk = std::fs::OpenOptions::new().write(true).open(out.join("disk.raw")).unwrap();
    disk.write_all_at(b"X", 5 << 20).unwrap();
    let said = stage.publish().run().failed(3);
    insta::assert_snapshot!(said, @r"
    error: `out/web/disk.raw` is not known to be what was built: 1 of its 2048 blocks differ, the first at byte 5242880
     |
    help: build it again
    ");
    assert_eq!(stage.aws.requests("s3:CreateMultipartUpload"), [] as [Value; 0]);
    assert_eq!(stage.aws.resources(), NOTHING);

    // A copy is, even if nothing is known of it and there is no place to note it.
    let copy = stage.aws.with(stage.bench.kiln(["-q", "publish", "copy", "--cache-dir", "/proc/none"]));
    stage.published(copy.run());
}

/// Whoever writes to the disk after kiln has compared it would have something published that was never built.
#[test]
fn a_disk_that_changes_meanwhile_is_not_published() {
    let raw = ["--via", "s3", "--bucket", "images"];
    let ways: [(&[&str], &[&str]); 3] = [
        (&raw, &["s3:HeadBucket", "s3:UploadPart"]),
        (&[&raw[..], &["--disk-format", "vmdk"]].concat(), &["s3:HeadBucket", "s3:UploadPart"]),
        (&["--via", "ebs"], &["ec2:DescribeImages", "ebs:PutSnapshotBlock"]),
    ];
    for (way, moments) in ways {
        for action in moments {
            let stage = Stage::new();
            stage.aws.fault(&json!({ "action": action, "hold": true, "count": 1 }));
            let kiln = stage.publish().args(way).start();
            stage.aws.wait_until_held(action);
            let disk =
                std::fs::OpenOptions::new().read(true).write(true).open(stage.bench.path("out/web/disk.raw")).unwrap();
            // What stands there already, so that nothing but the file's times tells.
            let mut byte = [0];
            disk.read_exact_at(&mut byte, 5 << 20).unwrap();
            disk.write_all_at(&byte, 5 << 20).unwrap();
            stage.aws.release();
            let said = kiln.end().failed(3);
            let words = "error: the disk out/web/disk.raw was changed while it was published\n |\nhelp: publish it again when nothing writes to it\n";
            assert_eq!(said, words, "{way:?} {action}");
            assert_eq!(stage.aws.resources(), NOTHING, "{way:?} {action}");
        }
    }
}
