//! Ctrl-C, at every stage: kiln takes back what it made, and says what it could not.

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{NOTHING, Stage, without_key, word};

/// Stops publishing while a call of `action` is met by `fault`.
#[track_caller]
fn stop_at(stage: &Stage, action: &str, mut fault: Value, signal: Signal) -> String {
    stage.aws.reset();
    fault["action"] = json!(action);
    fault["count"] = json!(1);
    if matches!(action, "ec2:ImportSnapshot" | "ec2:DescribeImportSnapshotTasks") {
        fault["skip"] = json!(1); // the dry run, and the look for earlier imports
    }
    stage.aws.fault(&fault);
    let kiln = stage.publish().start();
    stage.aws.wait_until_struck(action);
    kiln.signal(signal);
    let said = kiln.end().failed(128 + signal.as_raw());
    stage.assert_left(NOTHING);
    said
}

/// What kiln says at a Ctrl-C when there is something to take back.
#[track_caller]
fn assert_taken_back(said: &str) {
    assert!(said.starts_with("warning: taking back "), "{said}");
    let end = "\n  help: wait for it; a second signal leaves it there\nerror: stopped by Ctrl-C\n";
    assert!(said.ends_with(end), "{said}");
}

const MAKING: [&str; 5] = [
    "s3:PutObject",
    "s3:CreateMultipartUpload",
    "s3:CompleteMultipartUpload",
    "ec2:ImportSnapshot",
    "ec2:RegisterImage",
];

#[test]
fn ctrl_c_while_something_is_made() {
    let stage = Stage::new();
    for action in MAKING {
        assert_taken_back(&stop_at(&stage, action, json!({ "delay": 1.5 }), Signal::INT));
    }
}

/// The answer comes too late to be waited for: what was made must be looked for.
#[test]
fn ctrl_c_while_something_is_made_slowly() {
    let stage = Stage::new();
    for action in ["s3:PutObject", "s3:CreateMultipartUpload", "ec2:ImportSnapshot", "ec2:RegisterImage"] {
        assert_taken_back(&stop_at(&stage, action, json!({ "delay": 6.5 }), Signal::INT));
    }
}

/// The answer never comes: what was made must be looked for.
#[test]
fn ctrl_c_while_something_is_made_and_the_answer_is_lost() {
    let stage = Stage::new();
    for action in MAKING {
        let lost = json!({ "delay": 1.5, "close": true, "when": "after" });
        assert_taken_back(&stop_at(&stage, action, lost, Signal::INT));
    }
}

#[test]
fn ctrl_c_while_something_is_awaited() {
    let stage = Stage::new();
    let delay = || json!({ "delay": 1.5 });
    assert_eq!(stop_at(&stage, "s3:HeadBucket", delay(), Signal::INT), "error: stopped by Ctrl-C\n");
    for action in ["s3:UploadPart", "s3:UploadPartCopy", "ec2:DescribeImportSnapshotTasks", "ec2:CreateTags"] {
        assert_taken_back(&stop_at(&stage, action, delay(), Signal::INT));
    }
    let said = stop_at(&stage, "s3:UploadPart", delay(), Signal::TERM);
    assert!(said.ends_with("\nerror: stopped by SIGTERM\n"), "{said}");
}

#[test]
fn ctrl_c_while_the_import_runs_cancels_it() {
    let stage = Stage::new();
    let kiln = stage.importing();
    kiln.signal(Signal::INT);
    let said = without_key(&kiln.end().failed(130));
    insta::assert_snapshot!(said.replace(&word(&said, "import-snap-"), "TASK"), @r"
    warning: taking back import task TASK in us-east-1, object s3://images/web-KEY.raw
      help: wait for it; a second signal leaves it there
    error: stopped by Ctrl-C
    ");
    stage.assert_left(NOTHING);
    assert_eq!(stage.aws.requests("ec2:CancelImportTask").len(), 1);
}

#[test]
fn ctrl_c_while_the_image_is_pending() {
    let stage = Stage::new();
    stage.aws.control("POST", "images", Some(&json!({ "seconds": 600 })));
    let kiln = stage.publish().start();
    stage.aws.wait_for("ec2:RegisterImage");
    kiln.signal(Signal::INT);
    assert_taken_back(&kiln.end().failed(130));
    stage.assert_left(NOTHING);
}

/// The second Ctrl-C ends kiln at once, whatever it still had to take back; what that is has been said.
#[test]
fn a_second_ctrl_c_does_not_wait() {
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "ec2:CancelImportTask", "delay": 20 }));
    let kiln = stage.importing();
    kiln.signal(Signal::INT);
    stage.aws.wait_for("ec2:CancelImportTask");
    let pressed = std::time::Instant::now();
    kiln.signal(Signal::INT);
    let said = kiln.end().failed(130);
    assert!(said.starts_with("warning: taking back import task import-snap-"), "{said}");
    assert!(pressed.elapsed().as_secs() < 15, "it did not wait for the endpoint, which takes 20 s");
}

#[test]
fn a_publish_that_takes_too_long_is_taken_back() {
    let stage = Stage::new();
    stage.aws.control("POST", "import", Some(&json!({ "hold": true })));
    // Long enough to come to the import on a busy machine.
    let said = stage.fails(stage.publish().args(["--timeout", "20s"]), 6, NOTHING);
    insta::assert_snapshot!(said.replace(&word(&said, "import-snap-"), "TASK"), @r"
    error: publishing did not end within 20.0 s; it waited for import task TASK
     |
    help: publish again with a longer --timeout; the disk is unchanged
    ");
}
