//! `kiln retire`.

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{HOME, Stage, redacted};
use crate::support::{Terminal, wait_until};

fn retire(stage: &Stage, arguments: &[&str]) -> crate::support::Kiln {
    stage.kiln(["-q", "retire"].into_iter().chain(arguments.iter().copied()))
}

#[test]
fn all_but_the_newest_go_with_their_snapshots() {
    let stage = Stage::new();
    let (older, oldest) = (stage.another("web-0", 3), stage.another("web-00", 40));
    let foreign = stage.foreign("web-0 of others");
    let [_, before] = stage.ids();
    let gone = [stage.snapshot(&older), stage.snapshot(&oldest)];

    stage.age(&stage.image, 1);
    let said = retire(&stage, &["web"]).run().failed(2);
    insta::assert_snapshot!(redacted(&said), @r"
    REGION     IMAGE                  IMAGE NAME  AGE   SIZE   WHAT                    WITH
    us-east-1  ami-00000000000000000  web-00      40 d  1 GiB  deregister              snap-00000000000000000
    us-east-1  ami-00000000000000000  web-0       3 d   1 GiB  deregister              snap-00000000000000000
    us-east-1  ami-00000000000000000  web-1       1 d   1 GiB  keep: it is the newest
    error: standard input is not a terminal, and so nobody can be asked
     |
    help: look at it with --dry-run, then run it with --yes
    ");
    assert_eq!(stage.aws.requests("ec2:DeregisterImage"), [] as [Value; 0]);
    let plan = stage.kiln(["--format", "json", "-q", "retire", "web", "--dry-run"]).run().json();
    assert_eq!(plan[0]["images"][0]["image"]["image_id"], oldest.as_str());
    assert_eq!(plan[0]["images"][0]["snapshots"], json!([gone[1]]));
    assert_eq!(plan[0]["kept"][0]["image"]["image_id"], stage.image.as_str());

    let lines = retire(&stage, &["web", "--older", "30d", "--yes"]).run().succeeded();
    assert_eq!(lines, format!("us-east-1 {oldest}\n"));
    let lines = retire(&stage, &["web", "--yes"]).run().succeeded();
    assert_eq!(lines, format!("us-east-1 {older}\n"));
    let [images, snapshots] = stage.ids();
    let mut stay = vec![stage.image.clone(), foreign];
    stay.sort();
    assert_eq!(images, stay);
    let expected: Vec<_> = before.into_iter().filter(|id| !gone.contains(id)).collect();
    assert_eq!(snapshots, expected);
    let deprecated: Vec<_> =
        stage.aws.requests("ec2:EnableImageDeprecation").iter().map(|call| call["resource"].clone()).collect();
    assert_eq!(deprecated, [json!(oldest), json!(older)], "before they went");

    let ran = stage.kiln(["retire", "web", "--yes"]).run();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""));
    assert!(ran.stderr.contains("keep: it is the newest"), "{}", ran.stderr);
}

#[test]
fn a_snapshot_that_another_image_uses_stays() {
    let stage = Stage::new();
    // Of the same disk, and so of the same snapshot.
    let second = stage.publish("web-2");
    assert_eq!(stage.snapshot(&second), stage.snapshot(&stage.image));
    let [_, snapshots] = stage.ids();
    retire(&stage, &["web-1", "--yes"]).run().succeeded();
    assert_eq!(stage.ids(), [vec![second.clone()], snapshots]);
    retire(&stage, &[&second, "--yes"]).run().succeeded();
    assert_eq!(stage.ids(), [[""; 0], [""; 0]]);
    let said = retire(&stage, &["web", "--yes"]).run().failed(3);
    assert!(said.starts_with("error: kiln has made no image `web` that is available in us-east-1\n"), "{said}");
}

#[test]
fn protected_images_are_named_and_left() {
    let stage = Stage::new();
    let (protected, cooling) = (stage.another("web-p", 3), stage.another("web-c", 4));
    let going = stage.another("web-0", 5);
    stage.aws.ec2(HOME, "EnableImageDeregistrationProtection", &[("ImageId", &protected)]);
    let cooldown = [("ImageId", cooling.as_str()), ("WithCooldown", "true")];
    stage.aws.ec2(HOME, "EnableImageDeregistrationProtection", &cooldown);
    stage.aws.ec2(HOME, "DisableImageDeregistrationProtection", &[("ImageId", &cooling)]);
    let plan = retire(&stage, &["web", "--dry-run"]).run().succeeded();
    assert!(plan.contains("keep: it is protected from being deregistered"), "{plan}");
    let ran = retire(&stage, &["web", "--yes"]).run();
    assert_eq!((ran.code, ran.stdout), (Some(7), format!("us-east-1 {going}\n")), "the others go");
    assert!(
        ran.stderr.starts_with(&format!("error: {cooling} in us-east-1: AWS refused DeregisterImage")),
        "{}",
        ran.stderr
    );
    assert!(stage.ids()[0].contains(&protected) && stage.ids()[0].contains(&cooling));
}

#[test]
fn deprecated_only() {
    let stage = Stage::new();
    let old = stage.another("web-0", 3);
    let lines = retire(&stage, &["web", "--deprecate-only", "--yes"]).run().succeeded();
    assert_eq!(lines, format!("us-east-1 {old}\n"));
    let images = stage.images(HOME);
    assert_eq!((images.len(), &images[0]["deprecated"]), (2, &Value::Null));
    assert!(images[1]["deprecated"].is_string());
    retire(&stage, &["web", "--deprecate-only", "--yes"]).run().succeeded();
    assert_eq!(stage.aws.requests("ec2:EnableImageDeprecation").len(), 1, "it is already");
}

#[test]
fn whoever_is_asked_can_say_no_and_ctrl_c() {
    let stage = Stage::new();
    let old = stage.another("web-0", 3);
    let asked = || {
        stage.aws.reset();
        let terminal = Terminal::new(24, 80);
        let kiln = stage.kiln(["retire", "web"]).start_at(&terminal);
        stage.aws.wait_for("ec2:DescribeSnapshots");
        (terminal, kiln)
    };
    let (terminal, kiln) = asked();
    terminal.type_in(b"\n");
    let ran = kiln.end();
    assert_eq!(ran.code, Some(0));
    assert!(ran.stderr.ends_with("deregister 1 image? [y/N] nothing was changed\n"), "{}", ran.stderr);
    let (_terminal, kiln) = asked();
    kiln.signal(Signal::INT);
    kiln.end().failed(130);
    assert_eq!(stage.ids()[0].len(), 2);
    let (terminal, kiln) = asked();
    terminal.type_in(b"y\n");
    assert_eq!(kiln.end().succeeded(), format!("us-east-1 {old}\n"));
    wait_until("its end", || stage.ids()[0].len() == 1);
}

#[test]
fn what_was_done_before_a_refusal_is_told() {
    let stage = Stage::new();
    let old = stage.another("web-0", 3);
    let snapshot = stage.snapshot(&old);
    stage.aws.fault(&json!({ "action": "ec2:DeleteSnapshot", "error": "UnauthorizedOperation" }));
    let ran = retire(&stage, &["web", "--yes"]).run();
    assert_eq!((ran.code, ran.stdout), (Some(7), format!("us-east-1 {old}\n")));
    let left = format!(
        "left behind: snapshot {snapshot}; delete it with `aws ec2 delete-snapshot --region us-east-1 --snapshot-id {snapshot}`"
    );
    assert!(ran.stderr.contains(&left), "{}", ran.stderr);
    stage.aws.reset();
    // A retirement that ended there is finished by a sweep.
    let lines = stage.kiln(["-q", "sweep", "--older", "0s", "--yes"]).run().succeeded();
    assert_eq!(lines, format!("us-east-1 snapshot {snapshot}\n"));

    stage.another("web-00", 3);
    stage.aws.fault(&json!({ "action": "ec2:EnableImageDeprecation", "error": "UnauthorizedOperation" }));
    let before = stage.ids();
    let said = retire(&stage, &["web", "--yes"]).run().failed(7);
    assert!(said.contains("not permitted to call EnableImageDeprecation"), "{said}");
    assert_eq!(stage.ids(), before);
}
