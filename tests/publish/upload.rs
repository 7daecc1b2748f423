//! The upload to S3: gone on with where an earlier one has ended, whatever ended it; and what is there is used.

use std::collections::BTreeSet;

use rustix::process::Signal;
use serde_json::{Value, json};
use sha2::Digest as _;

use super::{JOINTS, NOTHING, ONE_IMAGE, PARTS, SCRATCH, Stage};
use crate::support::{Aws, Kiln, Running, tool, wait_until};

/// What a killed kiln leaves in the middle of its upload: the two objects that parts are copied from, and the upload.
const HALF: [u64; 5] = [2, 1, 0, 0, 0];
/// And at its end: those, and the disk's.
const WHOLE: [u64; 5] = [3, 0, 0, 0, 0];
/// How many of what they are copied from are copied themselves.
const SEEDS: u64 = SCRATCH - JOINTS;
/// How many parts of the disk are sent.
const SENT: u64 = 5;

/// The numbers of the parts of the disk that S3 took since the log was last forgotten, each time that it did.
fn taken(stage: &Stage) -> Vec<u64> {
    let calls = ["s3:UploadPart", "s3:UploadPartCopy"].map(|action| stage.for_disk(action)).concat();
    let well = calls.iter().filter(|call| call["status"] == 200);
    let mut numbers: Vec<_> =
        well.map(|call| call["parameters"]["partNumber"].as_str().unwrap().parse().unwrap()).collect();
    numbers.sort_unstable();
    numbers
}

fn sent(stage: &Stage) -> usize {
    stage.aws.requests("s3:UploadPart").len()
}

fn digest(stage: &Stage) -> String {
    let manifest: Value = serde_json::from_str(&stage.bench.read("out/web/manifest.json")).unwrap();
    manifest["digest"].as_str().unwrap().to_owned()
}

/// Where the disk goes.
fn key(stage: &Stage) -> String {
    format!("images/web-{}.raw", &digest(stage)[..32])
}

/// A publish that has sent some parts, and now waits for the answer to others, which never arrive.
fn half_sent(stage: &Stage) -> Running {
    half_sent_for(stage, 5)
}

/// So many seconds without an answer.
fn half_sent_for(stage: &Stage, seconds: u32) -> Running {
    let skip = 3 + JOINTS;
    let fault =
        json!({ "action": "s3:UploadPart", "skip": skip, "delay": seconds, "error": "InternalError", "count": 4 });
    stage.aws.fault(&fault);
    let kiln = stage.publish().start();
    wait_until("half an upload", || stage.aws.struck("s3:UploadPart") > 0 && taken(stage).len() as u64 > PARTS / 2);
    kiln
}

fn killed(stage: &Stage, kiln: Running) {
    kiln.signal(Signal::KILL);
    assert_eq!(kiln.end().code, None);
    stage.aws.control("DELETE", "faults", None);
}

#[test]
fn a_killed_kilns_upload_is_gone_on_with() {
    let stage = Stage::new();
    let kiln = half_sent(&stage);
    killed(&stage, kiln);
    assert_eq!(stage.aws.resources(), HALF);
    let before: BTreeSet<_> = taken(&stage).into_iter().collect();
    stage.aws.reset();

    let said = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--dry-run"])).run().stderr;
    assert!(said.contains(&format!("; {} parts were there)", before.len())), "{said}");

    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web"])).run();
    let words = format!("going on with an upload that was begun before: {} parts are there\n", before.len());
    assert!(ran.stderr.contains(&words), "{}", ran.stderr);
    stage.published(ran);
    let after = taken(&stage);
    assert!(after.iter().all(|number| !before.contains(number)), "{before:?} were there, {after:?} were sent");
    assert_eq!((before.len() + after.len()) as u64, PARTS, "each part once");
    assert_eq!(stage.aws.requests("s3:CreateMultipartUpload"), [] as [Value; 0]);
    stage.assert_arrived();
    assert!(!stage.bench.names("out/web").contains(&"publish.us-east-1.lock".to_owned()));
}

/// Killed before and after each request that makes something of the parts.
#[test]
fn killed_between_parts_and_import() {
    let mut stage = Stage::new();
    for (action, skip, done, left) in [
        ("s3:CreateMultipartUpload", 0, false, NOTHING),
        ("s3:CreateMultipartUpload", 0, true, [0, 1, 0, 0, 0]),
        ("s3:PutObject", 0, false, [0, 1, 0, 0, 0]),
        ("s3:CreateMultipartUpload", 1, true, [1, 2, 0, 0, 0]),
        ("s3:CompleteMultipartUpload", 0, false, [1, 2, 0, 0, 0]),
        ("s3:CompleteMultipartUpload", 0, true, HALF),
        ("s3:CompleteMultipartUpload", 1, false, HALF),
        ("s3:CompleteMultipartUpload", 1, true, WHOLE),
        ("s3:DeleteObject", 0, false, WHOLE),
    ] {
        let mut fault = json!({ "action": action, "skip": skip, "delay": 1.5, "count": 1, "close": true });
        fault["when"] = json!(if done { "after" } else { "before" });
        stage.aws.fault(&fault);
        let kiln = stage.publish().start();
        stage.aws.wait_until_struck(action);
        kiln.signal(Signal::KILL);
        assert_eq!(kiln.end().code, None, "{action}");
        wait_until(action, || stage.aws.resources() == left);
        stage.aws.reset();
        stage.published(stage.publish().run());
        // What was sent is not sent again.
        let completing = action.contains("Complete");
        let disk = if left == WHOLE || completing && skip == 1 { 0 } else { SENT };
        let scratch = if left[0] > 1 || completing { 0 } else { JOINTS };
        assert_eq!(sent(&stage) as u64, disk + scratch, "{action} {skip} {done}");
        stage.assert_arrived();
        stage.aws = Aws::start();
    }
}

/// What can't be taken back is named, and the next publish goes on with it.
#[test]
fn an_upload_that_could_not_be_taken_back_is_gone_on_with() {
    let stage = Stage::new();
    // Refused late enough for the first three to be there.
    stage.aws.fault(&json!({ "action": "s3:UploadPart", "error": "ExpiredToken", "skip": 3 + JOINTS, "delay": 5 }));
    for action in ["s3:AbortMultipartUpload", "s3:DeleteObject"] {
        stage.aws.fault(&json!({ "action": action, "error": "ExpiredToken" }));
    }
    let said = stage.fails(stage.publish(), 7, HALF);
    assert!(said.contains(" = left behind: unfinished upload of s3://images/web-"), "{said}");
    let before: BTreeSet<_> = taken(&stage).into_iter().collect();
    assert!(before.len() >= 3);
    stage.aws.reset();
    stage.published(stage.publish().run());
    let after = taken(&stage);
    assert!(after.iter().all(|number| !before.contains(number)), "{before:?} were there, {after:?} were sent");
    stage.assert_arrived();
}

#[test]
fn parts_that_differ_are_sent_again_and_further_uploads_are_aborted() {
    let stage = Stage::new();
    let kiln = half_sent(&stage);
    killed(&stage, kiln);
    let first = stage.for_disk("s3:UploadPart")[0].clone();
    let length = usize::try_from(first["bytes"].as_u64().unwrap()).unwrap();
    let first = &first["parameters"];
    let [number, id] = ["partNumber", "uploadId"].map(|name| first[name].as_str().unwrap().to_owned());
    let key = key(&stage);
    let sum = |bytes: &[u8]| aws_smithy_types::base64::encode(sha2::Sha256::digest(bytes));
    let put = |number: &str, bytes: &[u8]| {
        let checksum = format!("x-amz-checksum-sha256: {}", sum(bytes));
        stage.aws.s3("PUT", &format!("{key}?partNumber={number}&uploadId={id}"), &[&checksum], bytes);
    };
    let zeros = stage.for_disk("s3:UploadPartCopy").iter().rfind(|call| call["status"] == 200).unwrap()["parameters"]
        ["partNumber"]
        .as_str()
        .unwrap()
        .to_owned();
    put(&number, &vec![7; length]);
    put(&zeros, &vec![0; length / 2]);
    // Two more, which nobody goes on with, so that the list has two pages.
    for _ in 0..2 {
        stage.aws.s3("POST", &format!("{key}?uploads"), &["x-amz-checksum-algorithm: SHA256"], b"");
    }
    assert_eq!(stage.aws.resources()[1], 3);
    stage.aws.reset();
    stage.published(stage.publish().run());
    let after = taken(&stage);
    for number in [number, zeros] {
        assert!(after.contains(&number.parse().unwrap()), "{number}: {after:?}");
    }
    assert_eq!(stage.aws.requests("s3:CreateMultipartUpload"), [] as [Value; 0]);
    stage.assert_arrived();
}

/// Who may not look for it sends all parts anew, and an upload that was begun stays: nobody can know of it.
#[test]
fn an_upload_that_may_not_be_looked_for() {
    let stage = Stage::new();
    let kiln = half_sent(&stage);
    killed(&stage, kiln);
    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "s3:ListParts", "error": "AccessDenied" }));
    stage.published(stage.publish().run());
    assert_eq!(taken(&stage).len() as u64, PARTS, "into the same upload");

    let stage = Stage::new();
    for action in ["s3:ListMultipartUploads", "s3:HeadObject"] {
        stage.aws.fault(&json!({ "action": action, "error": "AccessDenied" }));
    }
    stage.published(stage.publish().run());
    assert_eq!(sent(&stage) as u64, PARTS, "zeros too");
}

/// Puts an object where the disk goes.
fn put(stage: &Stage, digest: &str, body: &[u8]) {
    stage.aws.s3("PUT", &key(stage), &[&format!("x-amz-meta-kiln-digest: {digest}")], body);
}

#[test]
fn an_object_that_is_not_the_disks_is_left_and_one_that_is_damaged_is_replaced() {
    let stage = Stage::new();
    put(&stage, "0123", b"another");
    let said = stage.fails(stage.publish(), 7, [1, 0, 0, 0, 0]).replace(&key(&stage), "images/KEY");
    insta::assert_snapshot!(said, @r"
    error: s3://images/KEY is there, and kiln didn't make it of this disk
     |
    help: move it away or delete it, or set another `prefix` in the recipe's [publish]
    ");
    assert_eq!(stage.aws.s3("GET", &key(&stage), &[], b""), "another");

    // Who may not look at it can't overwrite it either.
    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "s3:HeadObject", "error": "AccessDenied" }));
    let said = stage.fails(stage.publish(), 7, [1, 0, 0, 0, 0]);
    assert!(said.starts_with("error: AWS refused CompleteMultipartUpload: PreconditionFailed: "), "{said}");
    assert_eq!(stage.aws.s3("GET", &key(&stage), &[], b""), "another");

    stage.aws.reset();
    put(&stage, &digest(&stage), b"damaged");
    stage.published(stage.publish().run());
    stage.assert_arrived();
}

#[test]
fn two_kilns_of_one_host() {
    let stage = Stage::new();
    let first = half_sent_for(&stage, 20);
    let said = stage.publish().run().failed(7);
    insta::assert_snapshot!(said, @r"
    error: another kiln publishes this disk to us-east-1
     |
    help: wait until it has ended, then publish again
    ");
    stage.aws.control("DELETE", "faults", None);
    stage.published(first.end());
}

/// The same disk in another folder, as on another host.
fn other_host(stage: &Stage) -> Kiln {
    let [from, to] = ["out", "elsewhere"].map(|name| stage.bench.path(name));
    tool(std::process::Command::new("cp").arg("-a").args([from, to]), "");
    stage.aws.with(stage.bench.kiln(["publish", "elsewhere/web"]))
}

/// How many requests the endpoint keeps at this moment.
fn held(stage: &Stage) -> usize {
    stage.aws.control("GET", "requests?held=True", None)["requests"].as_array().unwrap().len()
}

/// The second joins the upload and completes it; the first finds that out, and waits for the second's import.
#[test]
fn two_kilns_of_two_hosts() {
    let stage = Stage::new();
    stage.aws.control("POST", "import", Some(&json!({ "hold": true })));
    let answer = json!({ "action": "s3:CompleteMultipartUpload", "skip": 1, "delay": 10, "error": "NoSuchUpload", "status": 404, "count": 1 });
    stage.aws.fault(&answer);
    let first = stage.publish().start();
    stage.aws.wait_until_struck("s3:CompleteMultipartUpload");
    let second = other_host(&stage).start();
    wait_until("the second's import", || stage.aws.resources()[4] == 1);
    let looks = || stage.aws.requests("s3:HeadObject").len();
    let before = looks();
    wait_until("the first to look", || looks() > before);
    stage.aws.control("POST", "import", Some(&json!({ "task": "*", "hold": false })));
    let [first, second] = [first, second].map(Running::end);
    let words = format!("going on with an upload that was begun before: {PARTS} parts are there");
    assert!(second.stderr.contains(&words), "{}", second.stderr);
    assert_eq!(first.succeeded(), second.succeeded());
    assert_eq!(stage.aws.resources(), ONE_IMAGE);
    let imports = stage.aws.requests("ec2:ImportSnapshot");
    assert_eq!(imports.iter().filter(|call| call["status"] == 200).count(), 1);
}

/// The second is stopped while both make what parts are copied from, and takes all of that back: the first begins again.
#[test]
fn what_is_copied_from_is_made_again_if_another_host_deletes_it() {
    // And how many of them each has on the way then.
    for (action, skip, each) in [
        ("s3:UploadPart", 0, 1),
        ("s3:UploadPartCopy", SEEDS / 2, SEEDS - SEEDS / 2),
        ("s3:UploadPartCopy", SEEDS + 4, 16),
    ] {
        let stage = Stage::new();
        let hold = json!({ "action": action, "skip": skip, "hold": true });
        stage.aws.fault(&hold);
        let first = stage.publish().start();
        wait_until("the first's requests", || held(&stage) as u64 == each);
        let second = other_host(&stage).start();
        // By then it has found what the first has begun, and takes it for its own.
        wait_until("the second's requests", || held(&stage) as u64 >= 2 * each);
        second.signal(Signal::INT);
        assert_eq!(second.end().code, Some(130));
        assert_eq!(stage.aws.resources(), NOTHING, "{action} {skip}");
        stage.aws.release();
        let ran = first.end();
        assert!(sent(&stage) < 30, "zeros are not sent");
        stage.published(ran);
        stage.assert_arrived();
    }
}

/// What the first still copies from is gone by then, and so is the upload.
#[test]
fn what_another_host_has_completed_and_tidied_is_not_made_again() {
    let stage = Stage::new();
    // As many as are copied at once.
    stage.aws.fault(&json!({ "action": "s3:UploadPartCopy", "skip": SEEDS, "hold": true, "count": 16 }));
    let first = stage.publish().start();
    wait_until("the first's copies", || held(&stage) == 16);
    let second = other_host(&stage).run();
    stage.aws.release();
    let first = first.end();
    assert_eq!(stage.published(second), stage.published(first));
    assert_eq!(stage.aws.requests("s3:PutObject").len(), 1);
    assert_eq!(stage.aws.requests("s3:CreateMultipartUpload").len(), 2, "of the disk, and of what it is copied from");
}

/// An earlier upload is taken back as well, whenever the one that goes on with it is stopped.
#[test]
fn ctrl_c_on_the_way_to_an_upload_that_was_begun_before() {
    let stage = Stage::new();
    let kiln = half_sent(&stage);
    killed(&stage, kiln);
    for end in ["zeros", "scratch"] {
        stage.aws.s3("DELETE", &format!("{}.{end}", key(&stage)), &[], b"");
    }
    stage.aws.reset();
    // Another part of the disk's is missing, so that there is something to be copied.
    stage.aws.fault(&json!({ "action": "s3:ListParts", "error": "AccessDenied" }));
    stage.aws.fault(&json!({ "action": "s3:PutObject", "hold": true }));
    let kiln = stage.publish().start();
    stage.aws.wait_until_held("s3:PutObject");
    kiln.signal(Signal::INT);
    stage.aws.release();
    assert_eq!(kiln.end().code, Some(130));
    stage.assert_left(NOTHING);
}

/// The second is stopped, and takes back the upload that both send to: the first begins another.
#[test]
fn an_upload_that_another_host_aborts_is_begun_again() {
    let stage = Stage::new();
    // Both wait for the same two parts.
    stage.aws.fault(&json!({ "action": "s3:UploadPart", "skip": 3 + JOINTS, "hold": true, "count": 4 }));
    let first = stage.publish().start();
    wait_until("the first's parts", || held(&stage) == 2);
    let second = other_host(&stage).start();
    wait_until("the second's parts", || held(&stage) == 4);
    second.signal(Signal::INT);
    assert_eq!(second.end().code, Some(130));
    stage.aws.release();
    stage.published(first.end());
    stage.assert_arrived();
    assert_eq!(stage.for_disk("s3:CreateMultipartUpload").len(), 2);
}

/// What somebody else imports at this moment stays.
#[test]
fn an_object_that_another_import_reads_is_not_deleted() {
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "s3:DeleteObject", "delay": 1.5, "count": 1, "close": true }));
    let kiln = stage.publish().start();
    stage.aws.wait_until_struck("s3:DeleteObject");
    killed(&stage, kiln);
    stage.aws.control("POST", "import", Some(&json!({ "hold": true, "count": 1 })));
    let (bucket, object) = {
        let key = key(&stage);
        let (bucket, object) = key.split_once('/').unwrap();
        (bucket.to_owned(), object.to_owned())
    };
    let place = [
        ("DiskContainer.Format", "RAW"),
        ("DiskContainer.UserBucket.S3Bucket", &bucket),
        ("DiskContainer.UserBucket.S3Key", &object),
    ];
    stage.aws.ec2("us-east-1", "ImportSnapshot", &place);
    let ran = stage.publish().run();
    assert!(ran.stderr.contains("warning: could not delete object s3://images/web-"), "{}", ran.stderr);
    assert!(ran.stderr.contains(" of another publish reads it)"), "{}", ran.stderr);
    ran.succeeded();
    assert_eq!(stage.aws.resources(), [1, 0, 1, 1, 1]);
}
