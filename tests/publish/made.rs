//! What is made, from which requests, and that passing trouble changes nothing about it.

use serde_json::{Value, json};

use super::{JOINTS, NOTHING, ONE_IMAGE, PARTS, SCRATCH, Stage};

/// The parameters of the only call of an action, next to dry runs.
#[track_caller]
fn only(stage: &Stage, action: &str) -> Value {
    let mut calls = stage.aws.requests(action);
    calls.retain(|call| call["status"] == 200);
    assert_eq!(calls.len(), 1, "{action}: {calls:?}");
    calls[0]["parameters"].clone()
}

#[test]
fn an_image_with_all_that_it_needs() {
    let stage = Stage::new();
    stage.aws.control("POST", "images", Some(&json!({ "describes": 3 })));
    let image = stage.published(stage.publish().run());

    let register = only(&stage, "ec2:RegisterImage");
    for (key, value) in [
        ("Name", "web-1"),
        ("Description", "a page"),
        ("Architecture", "x86_64"),
        ("VirtualizationType", "hvm"),
        ("RootDeviceName", "/dev/xvda"),
        ("BootMode", "legacy-bios"),
        ("EnaSupport", "true"),
        ("ImdsSupport", "v2.0"),
        ("BlockDeviceMapping.1.DeviceName", "/dev/xvda"),
        ("BlockDeviceMapping.1.Ebs.VolumeType", "gp3"),
        ("BlockDeviceMapping.1.Ebs.VolumeSize", "1"),
        ("BlockDeviceMapping.1.Ebs.DeleteOnTermination", "true"),
        ("TagSpecification.1.ResourceType", "image"),
    ] {
        assert_eq!(register[key], value, "{key}");
    }
    let tags = |parameters: &Value, prefix: &str| -> Vec<(String, String)> {
        let text = |key: String| parameters[key].as_str().map(str::to_owned);
        let pair = |n| Some((text(format!("{prefix}Tag.{n}.Key"))?, text(format!("{prefix}Tag.{n}.Value"))?));
        (1..).map_while(pair).collect()
    };
    let published = stage.remembered();
    let digest = published[0]["digest"].as_str().unwrap();
    let expected: Vec<_> = [("Name", "web-1"), ("kiln:digest", digest), ("kiln:name", "web"), ("team", "web & co")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
    let of_image = tags(&register, "TagSpecification.1.");
    let (settings, others): (Vec<_>, Vec<_>) = of_image.into_iter().partition(|(key, _)| key == "kiln:settings");
    assert_eq!((settings.len(), others), (1, expected.clone()));
    let create_tags = only(&stage, "ec2:CreateTags");
    assert_eq!(tags(&create_tags, ""), expected);
    assert_eq!(create_tags["ResourceId.1"], published[0]["snapshot_id"], "the snapshot is tagged");

    let import = only(&stage, "ec2:ImportSnapshot");
    assert_eq!(import["DiskContainer.Format"], "RAW");
    assert_eq!(import["RoleName"], "vmimport");
    assert!(import["ClientToken"].as_str().unwrap().starts_with("kiln-"));

    assert_eq!(published[0]["image_id"], image.as_str());
    assert_eq!(published[0]["region"], "us-east-1");
    assert_eq!(published[0]["boot_mode"], "legacy-bios");
    assert!(stage.aws.requests("ec2:DescribeImages").len() >= 4, "it waited until the image was available");
    stage.assert_arrived();
}

#[test]
fn parts_are_sent_side_by_side_and_the_object_goes_when_it_is_imported() {
    let stage = Stage::new();
    // As many as are sent at once have no answer for a while.
    stage.aws.fault(&json!({ "action": "s3:UploadPart", "delay": 2, "skip": JOINTS, "count": 4 }));
    stage.published(stage.publish().run());
    let parts = stage.for_disk("s3:UploadPart");
    let begin = |part: usize| parts[part]["time"].as_f64().unwrap();
    assert!(begin(3) - begin(0) < 2.0, "the first four are on their way before the first has arrived");
    assert!(begin(4) - begin(0) >= 2.0, "and no fifth");
    let all = [parts, stage.for_disk("s3:UploadPartCopy")].concat();
    let mut numbers: Vec<u64> =
        all.iter().map(|part| part["parameters"]["partNumber"].as_str().unwrap().parse().unwrap()).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=PARTS).collect::<Vec<_>>(), "each part once");
    let mut actions = stage.aws.actions();
    actions.retain(|action| action != "s3:UploadPartCopy");
    actions.dedup();
    insta::assert_snapshot!(actions.join("\n"), @r"
    ec2:DescribeImages
    ec2:DescribeSnapshots
    ec2:DescribeImportSnapshotTasks
    ec2:DescribeImages
    s3:HeadBucket
    ec2:ImportSnapshot
    s3:HeadObject
    s3:ListMultipartUploads
    s3:CreateMultipartUpload
    s3:HeadObject
    s3:PutObject
    s3:CreateMultipartUpload
    s3:UploadPart
    s3:CompleteMultipartUpload
    s3:UploadPart
    s3:CompleteMultipartUpload
    s3:DeleteObject
    ec2:DescribeImportSnapshotTasks
    ec2:ImportSnapshot
    ec2:DescribeImportSnapshotTasks
    s3:DeleteObject
    ec2:CreateTags
    ec2:RegisterImage
    ec2:DescribeImages
    ");
}

/// The bytes of the bodies that arrived with this action.
fn bytes(stage: &Stage, action: &str) -> u64 {
    stage.aws.requests(action).iter().map(|call| call["bytes"].as_u64().unwrap_or(0)).sum()
}

#[test]
fn zeros_and_what_is_beside_them_are_copied() {
    let stage = Stage::new();
    let kiln = stage.aws.with(stage.bench.kiln(["--format", "json", "publish", "out/web"]));
    let ran = kiln.run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let copies = stage.aws.requests("s3:UploadPartCopy").len() as u64;
    assert_eq!(bytes(&stage, "s3:PutObject"), 5 << 20, "the zeros that all others are made of");
    let manifest: Value = serde_json::from_str(&stage.bench.read("out/web/manifest.json")).unwrap();
    let data = manifest["data_bytes"].as_u64().unwrap();
    let sent = bytes(&stage, "s3:UploadPart");
    // Thirteen blocks of zeros are too near to other data.
    assert_eq!(sent, data + (13 << 19), "of {data} bytes of data");
    let events = ran.events();
    let upload: Vec<_> = events.iter().filter(|event| event["phase"] == "upload").collect();
    let progress: Vec<_> = upload.iter().filter(|event| event["event"] == "progress").collect();
    assert!(progress.iter().all(|event| event["total"] == sent), "{progress:?}");
    assert_eq!(progress.last().unwrap()["done"], sent);
    let words =
        format!("{} parts, each with its SHA-256, and {copies} copied inside S3 instead", PARTS + SCRATCH - copies);
    assert_eq!(upload.last().unwrap()["detail"], words);
    assert_eq!(stage.aws.resources(), ONE_IMAGE, "what was copied from is gone as well");
    stage.assert_arrived();
}

/// An endpoint that can't copy, a permission that is missing, a line that fails: the disk is the same.
#[test]
fn where_zeros_can_not_be_copied_they_are_sent() {
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "s3:UploadPartCopy", "error": "SlowDown", "count": 3 }));
    stage.aws.fault(&json!({ "action": "s3:UploadPartCopy", "error": "AccessDenied", "skip": SCRATCH + 8 }));
    let kiln = stage.aws.with(stage.bench.kiln(["-v", "publish", "out/web"]));
    let ran = kiln.run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let told = ran.stderr.matches("parts can't be copied inside S3 and are sent: AccessDenied").count();
    assert_eq!(told, 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("is copied again (1 of 6 failed): SlowDown"), "{}", ran.stderr);
    let sent = bytes(&stage, "s3:UploadPart");
    assert!(sent > 500 << 20, "{sent}");
    assert_eq!(stage.aws.resources(), ONE_IMAGE);
    stage.assert_arrived();

    // Nor can anything of what they are copied from be made.
    for (action, skip) in [
        ("s3:PutObject", 0),
        ("s3:CreateMultipartUpload", 1),
        ("s3:UploadPartCopy", 0),
        ("s3:UploadPartCopy", SCRATCH - JOINTS - 1),
        ("s3:UploadPart", 0),
        ("s3:CompleteMultipartUpload", 0),
    ] {
        let stage = Stage::new();
        let count = if action == "s3:UploadPartCopy" { 50 } else { 1 };
        stage.aws.fault(&json!({ "action": action, "error": "AccessDenied", "skip": skip, "count": count }));
        let ran = stage.aws.with(stage.bench.kiln(["-v", "publish", "out/web"])).run();
        assert_eq!(ran.code, Some(0), "{action}: {}", ran.stderr);
        let words = "nothing is copied inside S3, and zeros are sent: AccessDenied";
        assert!(ran.stderr.contains(words), "{action}: {}", ran.stderr);
        assert_eq!(stage.for_disk("s3:UploadPart").len() as u64, PARTS, "{action}");
        assert_eq!(stage.aws.resources(), ONE_IMAGE, "{action}");
        stage.assert_arrived();
    }
}

/// To send all zeros instead would take far longer than to publish once more.
#[test]
fn a_copy_that_fails_for_a_while_is_no_reason_to_send_zeros() {
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "s3:UploadPartCopy", "error": "SlowDown" }));
    let said = stage.fails(stage.publish(), 7, NOTHING);
    assert!(said.contains(" could not do UploadPartCopy, however often it was asked\n"), "{said}");
    assert_eq!(stage.for_disk("s3:UploadPart"), [] as [Value; 0]);
}

#[test]
fn progress_and_states_are_told() {
    let stage = Stage::new();
    stage.aws.control("POST", "import", Some(&json!({ "describes": 20 })));
    let kiln = stage.aws.with(stage.bench.kiln(["--format", "json", "-v", "publish", "out/web"]));
    let ran = kiln.run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let events = ran.events();
    let phases: Vec<_> =
        events.iter().filter(|event| event["event"] == "phase_done").map(|event| event["phase"].clone()).collect();
    assert_eq!(phases, ["check", "upload", "import", "register"]);
    let progress: Vec<_> = events
        .iter()
        .filter(|event| event["event"] == "progress" && event["phase"] == "import")
        .map(|event| event["done"].as_u64().unwrap())
        .collect();
    assert!(progress.is_sorted() && progress.iter().any(|percent| (1..100).contains(percent)), "{progress:?}");
    let said = |text: &str| events.iter().any(|event| event["message"].as_str().is_some_and(|m| m.ends_with(text)));
    for state in ["pending", "downloading/converting", "preparing snapshot"] {
        assert!(said(state), "{state}: {}", ran.stderr);
    }
    assert_eq!(ran.json()[0]["region"], "us-east-1");
}

#[test]
fn what_passes_is_asked_again_and_nothing_is_made_twice() {
    let stage = Stage::new();
    for fault in [
        json!({ "action": "s3:UploadPart", "error": "SlowDown", "count": 1 }),
        json!({ "action": "s3:UploadPart", "close": true, "skip": 2, "count": 1 }),
        json!({ "action": "s3:UploadPart", "error": "InternalError", "skip": 3, "count": 1 }),
        json!({ "action": "s3:UploadPart", "error": "BadDigest", "skip": 4, "count": 1 }),
        json!({ "action": "ec2:ImportSnapshot", "error": "RequestLimitExceeded", "skip": 1, "count": 1 }),
        json!({ "action": "ec2:DescribeImportSnapshotTasks", "error": "Unavailable", "skip": 1, "count": 1 }),
        json!({ "action": "ec2:RegisterImage", "error": "RequestLimitExceeded", "count": 1 }),
        json!({ "action": "ec2:CreateTags", "error": "InvalidSnapshot.NotFound", "count": 1 }),
    ] {
        stage.aws.fault(&fault);
    }
    stage.published(stage.publish().run());
    let faults = stage.aws.control("GET", "faults", None);
    for fault in faults["faults"].as_array().unwrap() {
        assert_eq!(fault["hits"], 1, "{fault}");
    }
}

/// The worst kind: the request is carried out, and its answer is lost.
#[test]
fn lost_answers_make_nothing_twice() {
    let stage = Stage::new();
    for (action, skip) in [
        ("s3:PutObject", 0),
        ("s3:CreateMultipartUpload", 0),
        ("s3:CreateMultipartUpload", 1),
        ("s3:CompleteMultipartUpload", 0),
        ("s3:CompleteMultipartUpload", 1),
        ("ec2:ImportSnapshot", 1),
        ("ec2:RegisterImage", 0),
    ] {
        stage.aws.fault(&json!({ "action": action, "close": true, "when": "after", "skip": skip, "count": 1 }));
    }
    stage.published(stage.publish().run());
}

#[test]
fn a_dry_run_only_reads() {
    let stage = Stage::new();
    let kiln = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--dry-run"]));
    let ran = kiln.run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    for words in ["would upload 1 GiB", "would import s3://images/", "would register image `web-1`"] {
        assert!(ran.stderr.contains(words), "{words}: {}", ran.stderr);
    }
    stage.assert_left(NOTHING);
    for call in stage.aws.requests("") {
        let action = call["action"].as_str().unwrap();
        let reads = ["Describe", "Head", "Get", "List"].iter().any(|read| action.contains(&format!(":{read}")));
        assert!(reads || call["parameters"]["DryRun"] == "true", "{action}");
    }
}
