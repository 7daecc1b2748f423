//! Lines that break, stall or lie, and an endpoint in trouble: the disk is published exactly once, or nothing is left that
//! the error doesn't name.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use super::{NOTHING, Stage};
use crate::support::{Deed, Harm, Kiln, Proxy, Way, wait_until};

/// Longer than any test.
const FOR_EVER: Duration = Duration::from_secs(600);
const MIB: usize = 1 << 20;

/// The requests that make something by S3, or that say what became of it, each by a piece of it that no other has.
const BY_S3: [&str; 10] = [
    "x-id=PutObject",
    ".raw?uploads",
    "x-id=UploadPart&",
    "x-id=UploadPartCopy",
    "<CompleteMultipartUpload",
    "Action=ImportSnapshot",
    "Action=DescribeImportSnapshotTasks",
    "Action=CreateTags",
    "Action=RegisterImage",
    "Action=DescribeImages",
];
/// The same by EBS direct.
const BY_EBS: [&str; 7] = [
    "POST /snapshots HTTP",
    "/blocks/",
    "/snapshots/completion/",
    "Action=DescribeSnapshots",
    "Action=GetEbsEncryptionByDefault",
    "Action=RegisterImage",
    "Action=DescribeImages",
];

fn stages() -> [(Stage, &'static [&'static str]); 2] {
    [(Stage::new(), &BY_S3), (Stage::of("[publish]\nimage_name = \"web-1\"\nvia = \"ebs\"\n"), &BY_EBS)]
}

/// A kiln whose requests go through the proxy.
fn through(stage: &Stage, proxy: &Proxy) -> Kiln {
    stage.publish().env("AWS_ENDPOINT_URL", proxy.url())
}

fn begin(stage: &Stage, proxy: &Proxy) {
    stage.aws.clean();
    proxy.reset();
    let _ = std::fs::remove_file(stage.bench.path("out/web/published.json"));
}

/// Each kind of request meets it once.
fn harm(proxy: &Proxy, requests: &[&str], way: Way, after: usize, deed: Deed) {
    for request in requests {
        proxy.harm(Harm { request: (*request).to_owned(), way, after, deed, times: 1 });
    }
}

/// Publishing comes to one image, whatever happens to each kind of request once.
#[track_caller]
fn assert_survives(way: Way, after: usize, deed: Deed) {
    for (stage, requests) in stages() {
        let proxy = Proxy::before(stage.aws.url());
        harm(&proxy, requests, way, after, deed);
        let ran = through(&stage, &proxy).run();
        stage.published(ran);
        assert_eq!(proxy.met().len(), requests.len(), "{:?}", proxy.met());
        stage.assert_arrived();
    }
}

#[test]
fn requests_that_are_cut_are_sent_again() {
    // In the middle of the head, which all have.
    assert_survives(Way::Request, 100, Deed::Cut);
}

#[test]
fn bodies_that_are_cut_are_sent_again() {
    for (stage, requests) in
        [(Stage::new(), ["x-id=UploadPart&", "x-id=PutObject"]), (ebs(), ["/blocks/1", "/blocks/2"])]
    {
        let proxy = Proxy::before(stage.aws.url());
        for after in [MIB / 8, MIB / 4, MIB / 3] {
            harm(&proxy, &requests, Way::Request, after, Deed::Cut);
        }
        stage.published(through(&stage, &proxy).run());
        assert_eq!(proxy.met().len(), 3 * requests.len(), "{:?}", proxy.met());
        stage.assert_arrived();
    }
}

fn ebs() -> Stage {
    Stage::of("[publish]\nimage_name = \"web-1\"\nvia = \"ebs\"\n")
}

/// The request is carried out, and of its answer nothing comes.
#[test]
fn answers_that_never_come_are_asked_for_again() {
    assert_survives(Way::Answer, 0, Deed::Cut);
}

/// The request is carried out, and of its answer the first half comes.
#[test]
fn answers_that_are_cut_are_asked_for_again() {
    assert_survives(Way::Answer, 60, Deed::Cut);
}

/// Requests that are not sent again by kiln itself. The SDK sends them again, but not if what comes back is no answer.
const ONCE: [&str; 4] = ["=Describe", "=Get", "=CreateTags", "<Complete"];

/// Something on the way answers in the endpoint's place. The publish goes on, or nothing is left.
#[track_caller]
fn assert_not_believed(way: Way, answer: &'static [u8]) {
    for (stage, requests) in stages() {
        let proxy = Proxy::before(stage.aws.url());
        let is_once = |request: &&str| ONCE.iter().any(|word| request.contains(word));
        let (once, again): (Vec<_>, Vec<_>) = requests.iter().copied().partition(is_once);
        harm(&proxy, &again, way, 0, Deed::Replace(answer));
        stage.published(through(&stage, &proxy).run());
        assert_eq!(proxy.met().len(), again.len(), "{:?}", proxy.met());
        stage.assert_arrived();
        for request in once {
            begin(&stage, &proxy);
            harm(&proxy, &[request], way, 0, Deed::Replace(answer));
            let ran = through(&stage, &proxy).run();
            assert_eq!(proxy.met(), [request]);
            if ran.code == Some(0) {
                stage.published(ran);
            } else {
                assert!(!ran.failed(7).contains("left behind"));
                stage.assert_left(NOTHING);
            }
        }
    }
}

#[test]
fn answers_that_are_no_answers_are_not_believed() {
    assert_not_believed(Way::Answer, b"\x16\x03\x01\x02\0 not HTTP at all \xff\xfe\r\n\r\n");
}

/// A page to sign in at: it is well-formed, and says that all is well.
#[test]
fn a_page_is_no_answer() {
    let page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 26\r\n\r\n<html>please sign in</html>";
    assert_not_believed(Way::Request, page);
}

#[test]
fn lines_that_stall_and_crawl_are_waited_for() {
    for (way, after) in [(Way::Request, 90), (Way::Answer, 20)] {
        for deed in [Deed::Stall(Duration::from_secs(1)), Deed::Crawl(Duration::from_millis(5))] {
            assert_survives(way, after, deed);
        }
    }
}

/// Nothing is said and nothing ends: kiln gives the line up and takes another.
fn assert_given_up(stage: &Stage, request: &str, way: Way, after: usize) {
    let proxy = Proxy::before(stage.aws.url());
    harm(&proxy, &[request], way, after, Deed::Stall(FOR_EVER));
    let ran = through(stage, &proxy).run();
    stage.published(ran);
    assert_eq!(proxy.met(), [request]);
    stage.assert_arrived();
}

#[test]
fn a_part_that_stalls_for_ever_is_sent_again() {
    assert_given_up(&Stage::new(), "x-id=UploadPart&", Way::Request, MIB);
}

/// S3 says that all is well before it begins to copy, or to put parts together, and then nothing until that is done.
#[test]
fn what_s3_does_slowly_is_waited_for() {
    let stage = Stage::new();
    let proxy = Proxy::before(stage.aws.url());
    let requests = ["x-id=UploadPartCopy", "<CompleteMultipartUpload"];
    // Longer than no byte may move elsewhere, and behind the head.
    harm(&proxy, &requests, Way::Answer, 450, Deed::Stall(Duration::from_secs(24)));
    let kiln = stage.aws.with(stage.bench.kiln(["-v", "publish", "out/web"])).env("AWS_ENDPOINT_URL", proxy.url());
    let ran = kiln.run();
    assert!(!ran.stderr.contains("again"), "{}", ran.stderr);
    stage.published(ran);
    assert_eq!(proxy.met().len(), requests.len());
}

#[test]
fn a_block_that_stalls_for_ever_is_sent_again() {
    assert_given_up(&ebs(), "/blocks/", Way::Request, MIB / 4);
}

#[test]
fn a_registration_that_stalls_for_ever_is_looked_for() {
    assert_given_up(&ebs(), "Action=RegisterImage", Way::Answer, 0);
}

/// Ctrl-C while the line stands still.
#[test]
fn ctrl_c_on_a_dead_line() {
    for (stage, requests) in stages() {
        let proxy = Proxy::before(stage.aws.url());
        for request in requests {
            begin(&stage, &proxy);
            harm(&proxy, &[request], Way::Answer, 0, Deed::Stall(FOR_EVER));
            let kiln = through(&stage, &proxy).start();
            wait_until(request, || !proxy.met().is_empty());
            kiln.signal(Signal::INT);
            let said = kiln.end().failed(130);
            assert!(said.ends_with("error: stopped by Ctrl-C\n"), "{request}: {said}");
            stage.assert_left(NOTHING);
        }
    }
}

/// Every kind of request is met by trouble that passes.
#[test]
fn an_endpoint_in_trouble_is_asked_again() {
    for (stage, _) in stages() {
        stage.published(stage.publish().run());
        let mut actions: Vec<_> =
            stage.aws.requests("").iter().map(|call| call["action"].as_str().unwrap().to_owned()).collect();
        actions.sort();
        actions.dedup();
        let trouble = |action: &str| match action.split(':').next().unwrap() {
            "s3" => ["SlowDown", "InternalError"],
            "ec2" => ["RequestLimitExceeded", "InternalError"],
            _ => ["RequestThrottledException", "InternalServerException"],
        };
        for (code, when) in [(0, "before"), (1, "before"), (1, "after")] {
            stage.aws.clean();
            std::fs::remove_file(stage.bench.path("out/web/published.json")).unwrap();
            for action in &actions {
                let error = trouble(action)[code];
                stage.aws.fault(&json!({ "action": action, "error": error, "when": when, "count": 2 }));
            }
            stage.published(stage.publish().run());
            for fault in stage.aws.control("GET", "faults", None)["faults"].as_array().unwrap() {
                assert!(fault["hits"].as_u64() > Some(0), "{fault}");
            }
            stage.assert_arrived();
        }
    }
}

/// What was only just made may be unknown for a while wherever it is asked about.
#[test]
fn what_appears_late_is_waited_for() {
    for (stage, _) in stages() {
        for (action, code, skip) in [
            ("ec2:DescribeImportSnapshotTasks", "InvalidConversionTaskId", 1),
            ("ec2:CreateTags", "InvalidSnapshot.NotFound", 0),
            ("ec2:RegisterImage", "InvalidSnapshot.NotFound", 0),
            ("ec2:DescribeImages", "InvalidAMIID.NotFound", 2),
            ("ebs:PutSnapshotBlock", "ResourceNotFoundException", 0),
        ] {
            stage.aws.fault(&json!({ "action": action, "error": code, "skip": skip, "count": 3 }));
        }
        stage.published(stage.publish().run());
        let struck = stage.aws.requests("").iter().filter(|call| !call["fault"].is_null()).count();
        assert!(struck >= 9, "{struck}");
        stage.assert_arrived();
    }
}
