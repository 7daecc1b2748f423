//! Permissions that are missing: named, asked for once, and whatever they keep kiln from deleting is told.

use serde_json::{Value, json};

use super::{JOINTS, NOTHING, Stage, without_key, word};

/// Every call that can be denied: named with the permission, asked once, and what was made before is taken back.
#[test]
fn denied_permissions() {
    let stage = Stage::new();
    for (action, skip, error, permission) in [
        ("s3:HeadBucket", 0, "AccessDenied", "s3:ListBucket"),
        ("s3:CreateMultipartUpload", 0, "AccessDenied", "s3:PutObject"),
        // Without what some are copied from it would go on.
        ("s3:UploadPart", JOINTS, "AccessDenied", "s3:PutObject"),
        ("s3:CompleteMultipartUpload", 1, "AccessDenied", "s3:PutObject"),
        ("ec2:DescribeImages", 0, "UnauthorizedOperation", "ec2:DescribeImages"),
        ("ec2:ImportSnapshot", 0, "UnauthorizedOperation", "ec2:ImportSnapshot"),
        // The one after the dry run.
        ("ec2:ImportSnapshot", 1, "UnauthorizedOperation", "ec2:ImportSnapshot"),
        // The one after the looks for other imports, before the upload and after it.
        ("ec2:DescribeImportSnapshotTasks", 2, "UnauthorizedOperation", "ec2:DescribeImportSnapshotTasks"),
        ("ec2:CreateTags", 0, "UnauthorizedOperation", "ec2:CreateTags"),
        ("ec2:RegisterImage", 0, "UnauthorizedOperation", "ec2:RegisterImage"),
    ] {
        stage.aws.reset();
        // No more than that: the undo may need the same permission.
        let parallel = if action == "s3:UploadPart" { 4 } else { 1 };
        stage.aws.fault(&json!({ "action": action, "error": error, "skip": skip, "count": parallel }));
        let said = stage.fails(stage.publish(), 7, NOTHING);
        let call = action.split(':').nth(1).unwrap();
        assert!(said.starts_with(&format!("error: not permitted to call {call}\n")), "{said}");
        assert!(said.contains(&format!("help: allow `{permission}`")), "{said}");
        assert!(stage.aws.struck(action) <= parallel, "{action} was asked again");
    }
}

#[test]
fn a_denied_import_is_found_before_anything_is_sent() {
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "ec2:ImportSnapshot", "error": "UnauthorizedOperation" }));
    insta::assert_snapshot!(stage.fails(stage.publish(), 7, NOTHING), @r"
    error: not permitted to call ImportSnapshot
     |
     = AWS said: UnauthorizedOperation: injected by the test: UnauthorizedOperation
    help: allow `ec2:ImportSnapshot` (and `ec2:CreateTags`) on * to the user or role that publishes
    ");
    assert_eq!(stage.aws.requests("s3:CreateMultipartUpload"), [] as [Value; 0]);
}

/// The image is there by then: that its way there is not tidied up is no failure.
#[test]
fn an_object_that_may_not_be_deleted_is_a_warning() {
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "s3:DeleteObject", "error": "AccessDenied" }));
    let ran = stage.publish().run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.starts_with("us-east-1 ami-"), "{}", ran.stdout);
    assert_eq!(stage.aws.resources(), [3, 0, 1, 1, 0]);
    insta::assert_snapshot!(without_key(&ran.stderr), @r"
    warning: could not delete object s3://images/web-KEY.raw (AccessDenied: injected by the test: AccessDenied); delete it with `aws s3 rm s3://images/web-KEY.raw`
    warning: could not delete object s3://images/web-KEY.raw.zeros (AccessDenied: injected by the test: AccessDenied); delete it with `aws s3 rm s3://images/web-KEY.raw.zeros`
    warning: could not delete object s3://images/web-KEY.raw.scratch (AccessDenied: injected by the test: AccessDenied); delete it with `aws s3 rm s3://images/web-KEY.raw.scratch`
    ");
}

/// S3 puts the parts together, the answer is lost, the next one says that there is no such upload (any more), and kiln
/// may not look at the object.
#[test]
fn an_object_that_may_not_be_looked_at_is_deleted() {
    let stage = Stage::new();
    let lose = |denied: &[&str]| {
        stage.aws.reset();
        let action = "s3:CompleteMultipartUpload";
        stage.aws.fault(&json!({ "action": action, "close": true, "when": "after", "count": 1 }));
        stage.aws.fault(&json!({ "action": action, "error": "NoSuchUpload", "status": 404 }));
        for action in denied {
            stage.aws.fault(&json!({ "action": action, "error": "AccessDenied" }));
        }
    };
    lose(&["s3:HeadObject"]);
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(said.starts_with("error: AWS refused CompleteMultipartUpload: NoSuchUpload: "), "{said}");
    assert!(!said.contains("left behind"), "{said}");

    lose(&["s3:HeadObject", "s3:DeleteObject"]);
    let said = stage.fails(stage.publish(), 7, [1, 0, 0, 0, 0]);
    assert_eq!(said.matches("left behind: object s3://images/web-").count(), 1, "{said}");
}

#[test]
fn an_upload_that_may_not_be_aborted_is_named() {
    let stage = Stage::new();
    for action in ["s3:UploadPart", "s3:AbortMultipartUpload"] {
        stage.aws.fault(&json!({ "action": action, "error": "AccessDenied" }));
    }
    let said = without_key(&stage.fails(stage.publish(), 7, [0, 2, 0, 0, 0]));
    let left: Vec<_> = said.lines().filter(|line| line.contains("left behind")).collect();
    for (left, end) in left.iter().zip([".scratch", ""]) {
        assert!(left.contains(&format!("unfinished upload of s3://images/web-KEY.raw{end} (AccessDenied: ")), "{left}");
        assert!(left.contains("`aws s3api abort-multipart-upload --bucket images --key web-"), "{left}");
        assert!(left.contains(&format!(".raw{end} --upload-id ")), "{left}");
    }
    assert_eq!(left.len(), 2);
}

#[test]
fn an_import_that_may_not_be_cancelled_is_named() {
    let stage = Stage::new();
    stage.aws.control("POST", "import", Some(&json!({ "hold": true })));
    stage.aws.fault(&json!({ "action": "ec2:CancelImportTask", "error": "UnauthorizedOperation" }));
    stage.aws.fault(
        &json!({ "action": "ec2:DescribeImportSnapshotTasks", "error": "RequestExpired", "skip": 4, "count": 1 }),
    );
    let said = stage.fails(stage.publish(), 7, [0, 0, 0, 0, 1]);
    let task = word(&said, "import-snap-");
    let left = said.lines().find(|line| line.contains("left behind")).unwrap().replace(&task, "TASK");
    insta::assert_snapshot!(left, @" = left behind: import task TASK in us-east-1 (UnauthorizedOperation: injected by the test: UnauthorizedOperation); delete it with `aws ec2 cancel-import-task --region us-east-1 --import-task-id TASK`");
}

#[test]
fn an_image_that_may_not_be_deregistered_is_named_with_its_snapshot() {
    let stage = Stage::new();
    stage.aws.control(
        "POST",
        "images",
        Some(&json!({ "result": "failed", "reason": "snapshot is bad", "seconds": 0 })),
    );
    stage.aws.fault(&json!({ "action": "ec2:DeregisterImage", "error": "UnauthorizedOperation" }));
    let said = stage.fails(stage.publish(), 7, [0, 0, 1, 1, 0]);
    insta::assert_snapshot!(said.replace(&word(&said, "ami-"), "AMI").replace(&word(&said, "snap-"), "SNAP"), @r"
    error: the image AMI is `failed`: snapshot is bad
     |
     = left behind: image AMI in us-east-1 (UnauthorizedOperation: injected by the test: UnauthorizedOperation); delete it with `aws ec2 deregister-image --region us-east-1 --image-id AMI`
     = left behind: snapshot SNAP in us-east-1 (the image uses it); delete it with `aws ec2 delete-snapshot --region us-east-1 --snapshot-id SNAP`
    help: publish again; the disk is unchanged
    ");
}

#[test]
fn a_snapshot_that_may_not_be_deleted_is_named() {
    let stage = Stage::new();
    for action in ["ec2:RegisterImage", "ec2:DeleteSnapshot"] {
        stage.aws.fault(&json!({ "action": action, "error": "UnauthorizedOperation" }));
    }
    let said = stage.fails(stage.publish(), 7, [0, 0, 1, 0, 0]);
    insta::assert_snapshot!(said.replace(&word(&said, "snap-"), "SNAP"), @r"
    error: not permitted to call RegisterImage
     |
     = AWS said: UnauthorizedOperation: injected by the test: UnauthorizedOperation
     = left behind: snapshot SNAP in us-east-1 (UnauthorizedOperation: injected by the test: UnauthorizedOperation); delete it with `aws ec2 delete-snapshot --region us-east-1 --snapshot-id SNAP`
    help: allow `ec2:RegisterImage` (and `ec2:CreateTags`) on * to the user or role that publishes
    ");
}
