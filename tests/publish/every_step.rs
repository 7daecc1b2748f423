//! Whatever ends a publish, at whichever request: the disk is published exactly once by the next one, or nothing is left
//! that the error doesn't name.

use std::collections::HashMap;

use rustix::process::Signal;
use serde_json::json;

use super::{ONE_IMAGE, Stage, stamp};

/// Actions that are called more often than this are looked at twice only: the first and the last time.
const MANY: usize = 2;

/// One request of a publish that nothing disturbs.
struct Step {
    action: String,
    /// Which call of its action, from 0.
    nth: usize,
    /// Which call of all, from 0.
    index: usize,
}

/// When a request is met.
#[derive(Clone, Copy, PartialEq)]
enum When {
    /// It has arrived, and is not carried out yet.
    Before,
    /// It is carried out, and kiln has not heard of it.
    After,
}

impl Step {
    /// The moments of it that differ: what only reads is not carried out.
    fn moments(&self) -> &'static [When] {
        let name = self.action.split(':').nth(1).unwrap();
        let reads = ["Describe", "Get", "Head", "List"].iter().any(|word| name.starts_with(word));
        if reads { &[When::Before] } else { &[When::Before, When::After] }
    }

    fn at(&self, what: &str, when: When) -> String {
        let when = if when == When::Before { "before" } else { "after" };
        format!("{what} {when} {} {}", self.action, self.nth)
    }

    /// Has the endpoint keep this request of the next publish.
    fn hold(&self, stage: &Stage, when: When, close: bool) {
        let when = if when == When::Before { "before" } else { "after" };
        let mut fault = json!({ "action": self.action, "skip": self.nth, "count": 1, "hold": true, "when": when });
        if close {
            fault["close"] = json!(true);
        }
        stage.aws.fault(&fault);
    }
}

fn s3() -> Stage {
    Stage::new()
}

fn ebs() -> Stage {
    Stage::of("[publish]\nimage_name = \"web-1\"\nvia = \"ebs\"\n")
}

/// As if the disk had never been published; each time it is, it takes the same requests.
fn begin(stage: &Stage) {
    stage.aws.clean();
    stage.aws.control("POST", "import", Some(&json!({ "describes": 3 })));
    for kind in ["images", "snapshots"] {
        stage.aws.control("POST", kind, Some(&json!({ "describes": 2 })));
    }
    for name in stage.bench.names("out/web").iter().filter(|name| name.starts_with("publish")) {
        std::fs::remove_file(stage.bench.path("out/web").join(name)).unwrap();
    }
}

/// The requests of a publish that nothing disturbs, in order.
fn steps(stage: &Stage) -> Vec<Step> {
    begin(stage);
    stage.published(stage.publish().run());
    let mut counts = HashMap::<String, usize>::new();
    let mut steps = Vec::new();
    for (index, call) in stage.aws.requests("").iter().enumerate() {
        let action = call["action"].as_str().unwrap().to_owned();
        let count = counts.entry(action.clone()).or_default();
        steps.push(Step { action, nth: *count, index });
        *count += 1;
    }
    steps.retain(|step| {
        let count = counts[&step.action];
        count <= MANY || [0, count - 1].contains(&step.nth)
    });
    // Of what only reads, the first after something was made: at the next one nothing has changed.
    let mut made = true;
    steps.retain(|step| {
        let reads = step.moments().len() == 1;
        std::mem::replace(&mut made, !reads) || !reads
    });
    steps
}

/// Publishing comes to one image of one snapshot, and nothing else is left.
#[track_caller]
fn assert_published_once(stage: &Stage, at: &str) {
    let ran = stage.publish().run();
    assert_eq!(ran.code, Some(0), "{at}: {}", ran.stderr);
    assert_eq!(stage.aws.resources(), ONE_IMAGE, "{at}: {:?}", stage.aws.names());
    assert_as_built(stage, at);
    let journals = stage.bench.names("out/web").into_iter().filter(|name| name.ends_with(".journal"));
    assert_eq!(journals.count(), 0, "{at}");
}

#[track_caller]
fn assert_as_built(stage: &Stage, at: &str) {
    assert_eq!(stamp(&stage.bench), stage.disk, "{at}: the disk is as it was");
}

/// Whatever is at the endpoint is named by what kiln said.
#[track_caller]
fn assert_named(stage: &Stage, said: &str, at: &str) {
    for name in stage.aws.names() {
        assert!(said.contains(&name), "{at}: {name} is left, and not named by: {said}");
    }
    assert_as_built(stage, at);
    assert!(!stage.bench.path("out/web/published.json").exists(), "{at}: nothing was published");
}

fn killed(stage: &Stage) {
    for step in steps(stage) {
        for when in step.moments() {
            let at = step.at("killed", *when);
            begin(stage);
            step.hold(stage, *when, true);
            let kiln = stage.publish().start();
            stage.aws.wait_until_held(&at);
            kiln.signal(Signal::KILL);
            assert_eq!(kiln.end().code, None, "{at}");
            stage.aws.release();
            assert_published_once(stage, &at);
        }
    }
    stage.assert_arrived();
}

fn interrupted(stage: &Stage) {
    for step in steps(stage) {
        for when in step.moments() {
            let at = step.at("Ctrl-C", *when);
            begin(stage);
            step.hold(stage, *when, false);
            let kiln = stage.publish().start();
            stage.aws.wait_until_held(&at);
            kiln.signal(Signal::INT);
            // What only reads is given up at once: its answer could come before kiln has heard of the signal, and be the last
            // that it needs. What makes something is waited for.
            if step.moments().contains(&When::After) {
                stage.aws.release();
            }
            let ran = kiln.end();
            stage.aws.release();
            assert_eq!((ran.code, ran.stdout.as_str()), (Some(130), ""), "{at}: {}", ran.stderr);
            assert!(ran.stderr.contains("error: stopped by Ctrl-C\n"), "{at}: {}", ran.stderr);
            assert_named(stage, &ran.stderr, &at);
        }
    }
    assert_published_once(stage, "after the last Ctrl-C");
    stage.assert_arrived();
}

/// From some request on none is answered but with that the credentials have expired, those that would take something
/// back neither. With new ones, the next publish goes on.
fn expired(stage: &Stage) {
    for step in steps(stage) {
        let at = step.at("expired", When::Before);
        begin(stage);
        stage.aws.fault(&json!({ "action": "*", "skip": step.index, "error": "ExpiredToken" }));
        let ran = stage.publish().run();
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(7), ""), "{at}: {}", ran.stderr);
        assert_named(stage, &ran.stderr, &at);
        stage.aws.release();
        let ran = stage.publish().run();
        assert_eq!(ran.code, Some(0), "{at}: {}", ran.stderr);
        let [_, _, snapshots, images, tasks] = stage.aws.resources();
        assert_eq!([snapshots, images, tasks], [1, 1, 0], "{at}");
        assert_as_built(stage, &at);
    }
    stage.assert_arrived();
}

#[test]
fn killed_at_every_step_by_s3() {
    killed(&s3());
}

#[test]
fn killed_at_every_step_by_ebs() {
    killed(&ebs());
}

#[test]
fn ctrl_c_at_every_step_by_s3() {
    interrupted(&s3());
}

#[test]
fn ctrl_c_at_every_step_by_ebs() {
    interrupted(&ebs());
}

#[test]
fn credentials_that_expire_at_every_step_by_s3() {
    expired(&s3());
}

#[test]
fn credentials_that_expire_at_every_step_by_ebs() {
    expired(&ebs());
}
