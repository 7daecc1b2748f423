//! Quotas, as `--check` looks at them.

use serde_json::json;

use super::parent::another_disk;
use super::{NOTHING, Stage};

const GET: &str = "servicequotas:GetServiceQuota";

/// The lines about quotas, and kiln's exit code.
fn quotas<const N: usize>(stage: &Stage, more: [&str; N]) -> (String, Option<i32>) {
    let all = ["-q", "publish", "out/web", "--check"].into_iter().chain(more).collect::<Vec<_>>();
    let ran = stage.aws.with(stage.bench.kiln(all)).run();
    (ran.stdout.split_inclusive('\n').filter(|line| line.contains(" quota: ")).collect(), ran.code)
}

fn set(stage: &Stage, service: &str, code: &str, value: Option<u64>) {
    stage.aws.control("POST", "quotas", Some(&json!({ "service": service, "code": code, "value": value })));
}

#[test]
fn a_quota_that_is_reached_fails_the_check() {
    let stage = Stage::small("");
    stage.aws.ec2("us-east-1", "DisableImageBlockPublicAccess", &[]);
    let (said, code) = quotas(&stage, ["--share", "all"]);
    insta::assert_snapshot!(said, @"
    us-east-1       quota: images        ok       0 of 50000
    us-east-1       quota: snapshots     ok       0 of 100000
    us-east-1       quota: public images ok       0 of 5
    ");
    assert_eq!(code, Some(0));
    assert_eq!(stage.aws.resources(), NOTHING);
    stage.published(stage.publish().run());
    assert_eq!(quotas(&stage, []), (String::new(), Some(0)), "nothing would be made");
    let (said, _) = quotas(&stage, ["--image-name", "web-2"]);
    assert!(said.contains("images        ok       1 of 50000\n") && !said.contains("snapshots"), "{said}");
    another_disk(&stage);
    let (said, _) = quotas(&stage, []);
    assert!(said.contains("images        ok       1 of 50000\n"), "{said}");
    assert!(said.contains("snapshots     ok       1 of 100000\n") && !said.contains("public"), "{said}");

    set(&stage, "ec2", "L-B665C33B", Some(1));
    let (said, code) = quotas(&stage, []);
    assert!(said.contains("images        fails    all 1 are used; deregister old images with `kiln retire`"), "{said}");
    assert!(said.contains("--region us-east-1 --service-code ec2 --quota-code L-B665C33B "), "{said}");
    assert!(said.contains("snapshots     ok       1 of 100000\n"), "{said}");
    assert_eq!(code, Some(7));
    // An account without a value of its own has AWS's.
    set(&stage, "ec2", "L-B665C33B", None);
    set(&stage, "ebs", "L-309BACF6", Some(1));
    let (said, code) = quotas(&stage, []);
    assert!(said.contains("images        ok       1 of 50000\n"), "{said}");
    assert!(said.contains("snapshots     fails    all 1 are used; delete old snapshots"), "{said}");
    assert_eq!(code, Some(7));
}

#[test]
fn only_public_images_count_as_such() {
    let stage = Stage::small("");
    let image = stage.published(stage.publish().run());
    another_disk(&stage);
    stage.aws.ec2("us-east-1", "DisableImageBlockPublicAccess", &[]);
    set(&stage, "ec2", "L-0E3CBAB9", Some(1));
    let row = |stage: &Stage| quotas(stage, ["--share", "all"]);
    assert!(row(&stage).0.contains("public images ok       0 of 1\n"), "{}", row(&stage).0);
    let all = [("ImageId", image.as_str()), ("LaunchPermission.Add.1.Group", "all")];
    stage.aws.ec2("us-east-1", "ModifyImageAttribute", &all);
    let (said, code) = row(&stage);
    assert!(said.contains("public images fails    all 1 are used; deregister old public images"), "{said}");
    assert_eq!(code, Some(7));
    let (said, _) = quotas(&stage, ["--share", "all", "--force"]);
    assert!(!said.contains("public"), "the one that is replaced makes room: {said}");
}

#[test]
fn a_quota_that_can_not_be_looked_at_is_unknown() {
    let stage = Stage::small("");
    stage.aws.fault(&json!({ "action": GET, "error": "AccessDeniedException", "message": "no" }));
    let (said, code) = quotas(&stage, []);
    insta::assert_snapshot!(said, @"
    us-east-1       quota: images        unknown  AccessDeniedException: no
    us-east-1       quota: snapshots     unknown  AccessDeniedException: no
    ");
    assert_eq!(code, Some(0));
    stage.aws.reset();
    stage.aws.fault(&json!({ "action": GET, "close": true }));
    let (said, code) = quotas(&stage, []);
    assert_eq!(said.matches("unknown  the connection broke: ").count(), 2, "{said}");
    assert_eq!(code, Some(0));
    assert_eq!(stage.aws.requests(GET).len(), 2, "asked again once, and not for the other quota");
}
