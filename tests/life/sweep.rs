//! `kiln sweep`.

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{HOME, Stage, redacted};
use crate::support::wait_until;

const DIGEST: &str = "0123456789abcdef0123456789abcdef";

fn sweep(stage: &Stage, arguments: &[&str]) -> crate::support::Kiln {
    stage.kiln(["-q", "sweep"].into_iter().chain(arguments.iter().copied()))
}

#[test]
fn snapshots_without_an_image_go_when_they_are_old() {
    let stage = Stage::new();
    let (gone, young) = (stage.another("web-0", 0), stage.another("web-00", 0));
    let [snapshot, kept] = [&gone, &young].map(|image| stage.snapshot(image));
    let foreign = stage.foreign("not kiln's");
    for image in [&gone, &young, &foreign] {
        stage.aws.ec2(HOME, "DeregisterImage", &[("ImageId", image)]);
    }
    stage.age(&snapshot, 3);
    let before = stage.ids();
    let said = sweep(&stage, &[]).run().failed(2);
    insta::assert_snapshot!(redacted(&said), @r"
    REGION     AGE  SIZE   OF   WHAT
    us-east-1  3 d  1 GiB  web  snapshot snap-00000000000000000
    error: standard input is not a terminal, and so nobody can be asked
     |
    help: look at it with --dry-run, then run it with --yes
    ");
    let plan = stage.kiln(["--format", "json", "-q", "sweep", "--dry-run"]).run().json();
    assert_eq!(json!([plan[0]["kind"], plan[0]["id"], plan[0]["name"]]), json!(["snapshot", snapshot, "web"]));
    assert_eq!(stage.ids(), before);
    let lines = sweep(&stage, &["--yes"]).run().succeeded();
    assert_eq!(lines, format!("us-east-1 snapshot {snapshot}\n"));
    let ran = stage.kiln(["sweep", "--yes"]).run();
    assert_eq!(ran.stderr, "nothing older than 1d is left; with --bucket kiln looks in a bucket too\n");
    let lines = sweep(&stage, &["--older", "0s", "--yes"]).run().succeeded();
    assert_eq!(lines, format!("us-east-1 snapshot {kept}\n"));
    assert_eq!(stage.ids()[0], std::slice::from_ref(&stage.image));
    assert_eq!(stage.ids()[1].len(), 2, "the image's, and the one without kiln's tags");
}

#[test]
fn a_killed_publishs_import_and_object_are_found() {
    let stage = Stage::without_image();
    stage.aws.control("POST", "import", Some(&json!({ "hold": true })));
    let kiln = stage.kiln(["-q", "publish", "out/web", "--via", "s3"]).start();
    wait_until("the import", || stage.aws.resources()[4] == 1);
    kiln.signal(Signal::KILL);
    assert_eq!(kiln.end().code, None);
    assert_eq!(sweep(&stage, &["--bucket", "images", "--yes"]).run().succeeded(), "", "it may still run");
    let lines = sweep(&stage, &["--bucket", "images", "--older", "0s", "--yes"]).run().succeeded();
    let kinds: Vec<_> = lines.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
    assert_eq!(kinds, ["import", "object"], "{lines}");
    assert_eq!(stage.aws.resources(), [0; 5]);
}

#[test]
fn in_a_bucket_only_what_kiln_has_put_there_goes() {
    let stage = Stage::without_image();
    stage.aws.bucket("images-eu", "eu-west-1");
    let own = format!("x-amz-meta-kiln-digest: {DIGEST}");
    let other = format!("x-amz-meta-kiln-digest: {}", "f".repeat(32));
    let put = |key: &str, header: &str| stage.aws.s3("PUT", &format!("images/{key}"), &[header], b"x");
    let disk = format!("kiln/web-{DIGEST}.raw");
    put(&disk, &own);
    put(&format!("web-{DIGEST}.raw.zeros"), "x-none: x");
    put(&format!("web-{DIGEST}.raw.scratch"), &own);
    for (key, header) in [
        ("web.raw".to_owned(), own.as_str()),
        (format!("other-{DIGEST}.raw"), "x-none: x"),
        (format!("another-{DIGEST}.raw"), &other),
    ] {
        put(&key, header);
    }
    for key in [format!("web-{DIGEST}.raw"), format!("web-{DIGEST}.raw.scratch"), "theirs.raw".to_owned()] {
        stage.aws.s3("POST", &format!("images/{key}?uploads"), &[], b"");
    }
    assert_eq!(stage.aws.resources()[..2], [6, 3]);
    let ask = ["--bucket", "images", "--older", "0s", "--region", "eu-west-1", "--yes"];
    let lines = sweep(&stage, &ask).run().succeeded();
    let expected = [
        format!("us-east-1 unfinished upload of s3://images/web-{DIGEST}.raw"),
        format!("us-east-1 unfinished upload of s3://images/web-{DIGEST}.raw.scratch"),
        format!("us-east-1 object s3://images/{disk}"),
        format!("us-east-1 object s3://images/web-{DIGEST}.raw.scratch"),
        format!("us-east-1 object s3://images/web-{DIGEST}.raw.zeros"),
    ];
    assert_eq!(lines.lines().collect::<Vec<_>>(), expected, "in the bucket's region, whichever was asked for");
    assert_eq!(stage.aws.resources()[..2], [3, 1]);

    insta::assert_snapshot!(sweep(&stage, &["--bucket", "absent", "--yes"]).run().failed(3), @r"
    error: there is no bucket `absent`
     |
    help: name the one that kiln publishes through
    ");
    stage.aws.fault(&json!({ "action": "s3:ListObjectsV2", "error": "AccessDenied" }));
    let said = sweep(&stage, &["--bucket", "images", "--yes"]).run().failed(7);
    assert!(said.starts_with("error: images: not permitted to call ListObjectsV2\n"), "{said}");
    assert!(said.contains("allow `s3:ListBucket` on arn:aws:s3:::images to"), "{said}");
}

#[test]
fn what_can_not_be_deleted_is_named_and_the_rest_goes() {
    let stage = Stage::new();
    let images = [stage.another("web-0", 2), stage.another("web-00", 2)];
    let snapshots = [&images[0], &images[1]].map(|image| stage.snapshot(image));
    for image in &images {
        stage.aws.ec2(HOME, "DeregisterImage", &[("ImageId", image)]);
    }
    let fault = json!({ "action": "ec2:DeleteSnapshot", "resource": snapshots[0], "error": "UnauthorizedOperation" });
    stage.aws.fault(&fault);
    let ran = sweep(&stage, &["--older", "0s", "--yes"]).run();
    assert_eq!((ran.code, ran.stdout), (Some(7), format!("us-east-1 snapshot {}\n", snapshots[1])));
    let said = format!("error: us-east-1: snapshot {} stays: not permitted to call DeleteSnapshot\n", snapshots[0]);
    assert!(ran.stderr.starts_with(&said), "{}", ran.stderr);
    assert_eq!(stage.aws.requests("ec2:DeregisterImage").len(), 2);
    assert_eq!(stage.aws.requests("ec2:EnableImageDeprecation"), [] as [Value; 0]);
}
