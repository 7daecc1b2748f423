//! A dry run tells every request, held against what arrives at the endpoint when it is meant.

use std::collections::{BTreeMap, BTreeSet};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{JOINTS, PARTS, SCRATCH, Stage};
use crate::support::{Ran, append_data, wait_until};

const ALL: &str = "share = [\"123456789012\", \"999999999999\"]\nshare_snapshots = true\ndeprecate_after = \"90d\"\n\
                   protection = \"on\"\nparameter = \"/images/{name}/latest\"\n";
/// What has a body.
const SENT: [&str; 3] = ["s3:UploadPart", "s3:PutObject", "ebs:PutSnapshotBlock"];

fn publish(stage: &Stage, more: &[&str]) -> Ran {
    stage.aws.with(stage.bench.kiln(["--format", "json", "-q", "publish", "out/web"]).args(more)).run()
}

fn only_reads(call: &Value) -> bool {
    let action = call["action"].as_str().unwrap();
    let reads = ["Describe", "Head", "Get", "List"].iter().any(|read| action.contains(&format!(":{read}")));
    reads || call["parameters"]["DryRun"] == "true"
}

/// What a dry run tells of each region, after only reads.
#[track_caller]
fn dry_run(stage: &Stage, more: &[&str]) -> Vec<Value> {
    stage.aws.control("DELETE", "requests", None);
    let before = stage.aws.names();
    let ran = publish(stage, &[more, &["--dry-run"]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let calls = stage.aws.requests("");
    assert!(calls.iter().all(only_reads), "{calls:?}");
    assert!(stage.aws.names() == before, "nothing was made");
    let told = ran.json();
    let plans = told.as_array().cloned().unwrap_or_else(|| vec![told]);
    assert!(plans.iter().all(|plan| plan["dry_run"] == true), "{plans:?}");
    permitted(stage, more, &plans);
    plans
}

/// The policy that is printed for the same options permits all of it.
#[track_caller]
fn permitted(stage: &Stage, more: &[&str], plans: &[Value]) {
    stage.aws.control("DELETE", "requests", None);
    let policy = publish(stage, &[more, &["--dry-run", "--iam-policy"]].concat()).json();
    assert!(stage.aws.requests("").is_empty(), "AWS is asked nothing");
    let lists = policy["Statement"].as_array().unwrap().iter().map(|statement| statement["Action"].as_array().unwrap());
    let permitted: BTreeSet<_> = lists.flatten().map(|action| action.as_str().unwrap()).collect();
    let ways = plans.iter().flat_map(|plan| [Some(plan), plan.get("otherwise")]).flatten();
    let requests = ways.flat_map(|way| way["requests"].as_array().unwrap());
    let needed: BTreeSet<_> = requests
        .flat_map(|request| request["permissions"].as_array().unwrap())
        .map(|permission| permission.as_str().unwrap())
        .collect();
    let missing: Vec<_> = needed.difference(&permitted).collect();
    assert!(missing.is_empty(), "{missing:?} are not permitted by {policy:#}");
}

#[track_caller]
fn agrees(told: &Value, really: u64, what: &str) {
    let count = told["count"].as_u64().unwrap();
    let agrees = match told["bound"].as_str().unwrap() {
        "exact" => really == count,
        "least" => really >= count,
        "most" => really <= count,
        other => panic!("{other}"),
    };
    assert!(agrees, "{what}: {told}, and there were {really}");
}

/// What arrives at the endpoint when the same is meant is what was told, by this way of each region.
#[track_caller]
fn holds(stage: &Stage, more: &[&str], plans: &[Value], way: impl Fn(&Value) -> Value) {
    stage.aws.control("DELETE", "requests", None);
    let ran = publish(stage, more);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let calls = stage.aws.requests("");
    let regions: Vec<_> = plans.iter().map(|plan| &plan["region"]).collect();
    assert!(calls.iter().all(|call| regions.contains(&&call["region"])), "only in {regions:?}");
    for plan in plans {
        let (region, way) = (&plan["region"], way(plan));
        let here = || calls.iter().filter(|call| call["region"] == *region);
        let mut really = BTreeMap::<&str, u64>::new();
        here().for_each(|call| *really.entry(call["action"].as_str().unwrap()).or_default() += 1);
        let requests = way["requests"].as_array().unwrap();
        let told: BTreeSet<_> = requests.iter().map(|request| request["action"].as_str().unwrap()).collect();
        let untold: Vec<_> = really.keys().filter(|action| !told.contains(**action)).collect();
        assert!(untold.is_empty(), "{region}: {untold:?} were not told: {way:#}");
        for request in requests {
            let action = request["action"].as_str().unwrap();
            agrees(request, really.get(action).copied().unwrap_or(0), &format!("{region} {action}"));
        }
        let bodies = here().filter(|call| SENT.contains(&call["action"].as_str().unwrap()));
        agrees(&way["cost"]["bytes_sent"], bodies.map(|call| call["bytes"].as_u64().unwrap()).sum(), "bytes");
        let blocks = really.get("ebs:PutSnapshotBlock").copied().unwrap_or(0);
        agrees(&way["cost"]["blocks_written"], blocks, "blocks");
    }
}

/// A dry run, and the same without; the plan of the only region.
#[track_caller]
fn foretold(stage: &Stage, more: &[&str]) -> Value {
    let plans = dry_run(stage, more);
    holds(stage, more, &plans, Value::clone);
    plans.into_iter().next().unwrap()
}

/// How many requests of this action a plan tells of.
fn count(plan: &Value, action: &str) -> u64 {
    let requests = plan["requests"].as_array().unwrap();
    let found = requests.iter().find(|request| request["action"] == action);
    found.map_or(0, |request| request["count"].as_u64().unwrap())
}

/// What a plan does, from its words.
#[track_caller]
fn assert_says(plan: &Value, words: &str) {
    let steps = plan["steps"].as_array().unwrap();
    assert!(steps.iter().any(|step| step["what"].as_str().unwrap().contains(words)), "{words}: {steps:#?}");
}

fn another_disk(stage: &Stage) {
    append_data(&stage.bench.path("base.raw"), 300 << 10);
    stage.bench.build(&json!({})).run().succeeded();
}

#[test]
fn through_a_bucket() {
    let stage = Stage::new();
    let plan = foretold(&stage, &[]);
    assert_eq!(count(&plan, "s3:UploadPart") + count(&plan, "s3:UploadPartCopy"), PARTS + SCRATCH);
    let (cost, size) = (&plan["cost"], 1_u64 << 30);
    let known = |cost: &Value, what: &str| cost[what]["count"].as_u64().unwrap();
    assert_eq!(
        known(cost, "bytes_sent") + known(cost, "bytes_copied_in_s3"),
        size + (70 << 20) + (19 << 19),
        "and what is copied from"
    );
    assert_eq!(cost["object"], json!({ "bytes": { "count": size, "bound": "exact" }, "stays": false }));
    let manifest: Value = serde_json::from_str(&stage.bench.read("out/web/manifest.json")).unwrap();
    assert_eq!(cost["snapshot_bytes"], json!({ "count": manifest["data_bytes"], "bound": "least" }));

    assert_says(&foretold(&stage, &[]), "make nothing: image ami-");
    let plan = foretold(&stage, &["--image-name", "web-2"]);
    assert_says(&plan, "use snapshot snap-");
    assert_eq!(plan["cost"]["snapshot_bytes"], json!({ "count": 0, "bound": "exact" }));
    // Another image of the same snapshot takes the name.
    stage.bench.manifest(|manifest| manifest["publish"]["description"] = json!("another"));
    let plan = foretold(&stage, &["--force"]);
    assert_says(&plan, "register the new image as `web-1.new` at first");
    assert_eq!([count(&plan, "ec2:DeregisterImage"), count(&plan, "ec2:DeleteSnapshot")], [2, 0]);
}

#[test]
fn an_object_that_stays() {
    let stage = Stage::new();
    let plan = foretold(&stage, &["--upload-only"]);
    assert_eq!(count(&plan, "s3:CompleteMultipartUpload"), 2);
    let plan = foretold(&stage, &["--upload-only"]);
    assert_says(&plan, "which is the disk");
    assert_eq!(plan["cost"]["bytes_sent"]["count"], 0);
    let plan = foretold(&stage, &[]);
    assert_eq!(plan["cost"]["object"]["stays"], true);
    assert_eq!(count(&plan, "s3:DeleteObject"), 0);
    stage.aws.clean();
    let plan = foretold(&stage, &["--disk-format", "vmdk", "--keep-object"]);
    let [parts, bytes] = [&plan["requests"], &plan["cost"]["object"]["bytes"]];
    let parts = parts.as_array().unwrap().iter().find(|one| one["action"] == "s3:UploadPart").unwrap();
    assert_eq!([&parts["bound"], &bytes["bound"]], ["most", "most"]);
    stage.aws.clean();
    // Without kiln's mark that it is to stay, it goes.
    foretold(&stage, &["--disk-format", "vmdk"]);
}

#[test]
fn an_upload_and_an_import_that_are_gone_on_with() {
    let stage = Stage::new();
    let arrived = || stage.aws.requests("s3:UploadPart").iter().filter(|call| call["status"] == 200).count();
    let late =
        json!({ "action": "s3:UploadPart", "skip": 3 + JOINTS, "delay": 3, "error": "InternalError", "count": 4 });
    stage.aws.fault(&late);
    let kiln = stage.publish().start();
    wait_until("half an upload", || stage.aws.struck("s3:UploadPart") > 0 && arrived() as u64 > 2 + JOINTS);
    kiln.signal(Signal::KILL);
    kiln.end();
    stage.aws.reset();
    let plan = foretold(&stage, &[]);
    assert_says(&plan, "parts were there");
    assert_eq!(count(&plan, "s3:CreateMultipartUpload"), 0);

    // What the parts are copied from is in the making, or there.
    for (when, left, made) in [("before", [1, 2, 0, 0, 0], 1), ("after", [2, 1, 0, 0, 0], 0)] {
        stage.aws.clean();
        let fault = json!({ "action": "s3:CompleteMultipartUpload", "hold": true, "close": true, "when": when });
        stage.aws.fault(&fault);
        let kiln = stage.publish().start();
        stage.aws.wait_until_held(when);
        kiln.signal(Signal::KILL);
        kiln.end();
        stage.aws.release();
        wait_until(when, || stage.aws.resources() == left);
        stage.aws.reset();
        let plan = foretold(&stage, &[]);
        assert_eq!([count(&plan, "s3:CreateMultipartUpload"), count(&plan, "s3:PutObject")], [0, 0], "{when}");
        assert_eq!(count(&plan, "s3:CompleteMultipartUpload"), 1 + made, "{when}");
    }

    stage.aws.clean();
    stage.importing().signal(Signal::KILL);
    stage.aws.control("POST", "import", Some(&json!({ "task": "*", "hold": false })));
    wait_until("the import", || {
        // A task gets on when it is looked at.
        stage.aws.ec2("us-east-1", "DescribeImportSnapshotTasks", &[]);
        stage.aws.resources()[4] == 0
    });
    let plan = foretold(&stage, &[]);
    assert_says(&plan, "wait for import task import-snap-");
    assert_eq!(stage.aws.resources(), [0, 0, 1, 1, 0]);
}

#[test]
fn block_by_block() {
    let stage = Stage::small("");
    let plan = foretold(&stage, &[]);
    let blocks = count(&plan, "ebs:PutSnapshotBlock");
    assert_eq!(plan["cost"]["snapshot_bytes"], json!({ "count": blocks * (512 << 10), "bound": "exact" }));
    another_disk(&stage);
    let plan = foretold(&stage, &["--image-name", "web-2"]);
    assert_says(&plan, "; the rest is that of snap-");
    assert!(count(&plan, "ebs:PutSnapshotBlock") < blocks);
    another_disk(&stage);
    let plan = foretold(&stage, &["--force"]);
    assert_eq!([count(&plan, "ec2:DeregisterImage"), count(&plan, "ec2:DeleteSnapshot")], [2, 1]);

    // One that an earlier run has begun, and the same of another disk.
    another_disk(&stage);
    for again in [true, false] {
        stage.aws.clean();
        let late =
            json!({ "action": "ebs:PutSnapshotBlock", "skip": 4, "delay": 3, "error": "InternalServerException" });
        stage.aws.fault(&late);
        let kiln = stage.publish().start();
        let journal = || stage.bench.read("out/web/publish.us-east-1.journal").lines().count();
        wait_until("blocks", || stage.aws.struck("ebs:PutSnapshotBlock") > 0 && journal() > 3);
        kiln.signal(Signal::KILL);
        kiln.end();
        stage.aws.reset();
        if again {
            assert_says(&foretold(&stage, &[]), ", which an earlier publish has begun: ");
        } else {
            another_disk(&stage);
            assert_eq!(count(&foretold(&stage, &[]), "ec2:DeleteSnapshot"), 1);
        }
    }
}

#[test]
fn whichever_way_is_permitted() {
    let stage = Stage::with("via = \"auto\"\n");
    let plans = dry_run(&stage, &[]);
    stage.aws.fault(&json!({ "action": "ebs:StartSnapshot", "error": "AccessDeniedException" }));
    holds(&stage, &[], &plans, |plan| plan["otherwise"].clone());
    stage.aws.clean();
    holds(&stage, &[], &plans, Value::clone);
}

#[test]
fn in_several_regions_with_all_that_comes_after() {
    let stage = Stage::with(&format!("{ALL}regions = [\"eu-west-1\", \"us-east-1\"]\n"));
    let regions = |plans: &[Value]| plans.iter().map(|plan| plan["region"].clone()).collect::<Vec<_>>();
    let plans = dry_run(&stage, &[]);
    assert_eq!(regions(&plans), ["eu-west-1", "us-east-1"]);
    assert_says(&plans[0], "copy the image of us-east-1 to eu-west-1");
    assert_eq!(plans[0]["cost"]["transfer"]["region"], "us-east-1");
    holds(&stage, &[], &plans, Value::clone);

    // All of it is there, or some: the parameter names another image.
    foretold(&stage, &[]);
    let other = &["--image-name", "web-2", "--region", "us-east-1"];
    foretold(&stage, other);
    foretold(&stage, &[]);

    stage.aws.clean();
    let plans = dry_run(&stage, &["--via", "ebs"]);
    assert!(plans.iter().all(|plan| count(plan, "ebs:StartSnapshot") == 1 && plan.get("otherwise").is_none()));
    holds(&stage, &["--via", "ebs"], &plans, Value::clone);
    // In each region the old image is protected.
    another_disk(&stage);
    let plan = foretold(&stage, &["--via", "ebs", "--image-name", "web-3", "--protection", "off"]);
    assert_eq!(count(&plan, "ec2:EnableImageDeregistrationProtection"), 0);
}

/// For people, a table.
#[test]
fn what_it_looks_like() {
    let stage = Stage::small("regions = [\"us-east-1\"]\nbucket = \"images\"\n");
    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--dry-run"])).run();
    insta::assert_snapshot!(ran.succeeded(), @"
    REGION     COUNT  REQUEST                          PERMISSIONS
    us-east-1  1      ebs:CompleteSnapshot             ebs:CompleteSnapshot
    us-east-1  6      ebs:PutSnapshotBlock             ebs:PutSnapshotBlock
    us-east-1  1      ebs:StartSnapshot                ebs:StartSnapshot ec2:CreateTags
    us-east-1  ≥ 3    ec2:DescribeImages               ec2:DescribeImages
    us-east-1  1      ec2:DescribeImportSnapshotTasks  ec2:DescribeImportSnapshotTasks
    us-east-1  ≥ 3    ec2:DescribeSnapshots            ec2:DescribeSnapshots
    us-east-1  1      ec2:GetEbsEncryptionByDefault    ec2:GetEbsEncryptionByDefault
    us-east-1  1      ec2:RegisterImage                ec2:RegisterImage ec2:CreateTags

    REGION     AMOUNT  OF
    us-east-1  3 MiB   bytes sent
    us-east-1  3 MiB   data in the new snapshot
    us-east-1  6       blocks of 512 KiB by PutSnapshotBlock

    If EBS direct is not permitted:

    REGION     COUNT  REQUEST                          PERMISSIONS
    us-east-1  1      ebs:StartSnapshot                ebs:StartSnapshot ec2:CreateTags
    us-east-1  1      ec2:CreateTags                   ec2:CreateTags
    us-east-1  ≥ 3    ec2:DescribeImages               ec2:DescribeImages
    us-east-1  ≥ 4    ec2:DescribeImportSnapshotTasks  ec2:DescribeImportSnapshotTasks
    us-east-1  2      ec2:DescribeSnapshots            ec2:DescribeSnapshots
    us-east-1  1      ec2:GetEbsEncryptionByDefault    ec2:GetEbsEncryptionByDefault
    us-east-1  2      ec2:ImportSnapshot               ec2:ImportSnapshot ec2:CreateTags
    us-east-1  1      ec2:RegisterImage                ec2:RegisterImage ec2:CreateTags
    us-east-1  2      s3:CompleteMultipartUpload       s3:PutObject
    us-east-1  2      s3:CreateMultipartUpload         s3:PutObject
    us-east-1  3      s3:DeleteObject                  s3:DeleteObject s3:DeleteObjectVersion
    us-east-1  ≤ 1    s3:GetBucketLocation             s3:GetBucketLocation
    us-east-1  1      s3:HeadBucket                    s3:ListBucket
    us-east-1  3      s3:HeadObject                    s3:GetObject s3:ListBucket
    us-east-1  1      s3:ListMultipartUploads          s3:ListBucketMultipartUploads
    us-east-1  1      s3:PutObject                     s3:PutObject
    us-east-1  1      s3:UploadPart                    s3:PutObject
    us-east-1  29     s3:UploadPartCopy                s3:PutObject s3:GetObject

    REGION     AMOUNT    OF
    us-east-1  14.5 MiB  bytes sent
    us-east-1  1 GiB     bytes copied inside S3
    us-east-1  1 GiB     the object, until it is imported
    us-east-1  ≥ 3 MiB   data in the new snapshot
    us-east-1  36        S3 requests billed as PUT, COPY, POST, LIST
    us-east-1  ≤ 5       S3 requests billed as GET and all other
    ");
}
