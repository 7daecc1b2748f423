//! The object that a disk goes through: uploaded alone, kept, encrypted, compressed.

use std::process::Command;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{NOTHING, Stage};
use crate::support::{append_noise, tool, wait_until};

/// An image, its snapshot, and the object that stayed.
const KEPT: [u64; 5] = [1, 0, 1, 1, 0];
/// The object alone.
const OBJECT: [u64; 5] = [1, 0, 0, 0, 0];
/// What kiln itself may take, in KiB.
const MEMORY: u64 = 100 << 10;

fn sent(stage: &Stage) -> u64 {
    let calls = [stage.aws.requests("s3:PutObject"), stage.aws.requests("s3:UploadPart")].concat();
    calls.iter().filter(|call| call["status"] == 200).map(|call| call["bytes"].as_u64().unwrap()).sum()
}

/// The key of the only object.
fn key(stage: &Stage) -> String {
    let names = stage.aws.control("GET", "resources", None)["names"]["objects"].clone();
    let [name] = names.as_array().unwrap().as_slice() else { panic!("{names}") };
    name.as_str().unwrap().to_owned()
}

#[test]
fn what_is_uploaded_alone_is_imported_later_and_stays() {
    let stage = Stage::new();
    let line = stage.publish().arg("--upload-only").run().succeeded();
    assert_eq!(stage.aws.resources(), OBJECT);
    assert_eq!(line, format!("s3://{}\n", key(&stage)));
    assert!(stage.aws.actions().iter().all(|action| action.starts_with("s3:")), "{:?}", stage.aws.actions());

    stage.aws.reset();
    let ran = stage.aws.with(stage.bench.kiln(["--format", "json", "publish", "out/web", "--upload-only"])).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let told = ran.json();
    let manifest: Value = serde_json::from_str(&stage.bench.read("out/web/manifest.json")).unwrap();
    assert_eq!(format!("{}/{}", told["bucket"].as_str().unwrap(), told["key"].as_str().unwrap()), key(&stage));
    assert_eq!(
        (&told["size"], &told["digest"], &told["format"]),
        (&json!(1 << 30), &manifest["digest"], &json!("raw"))
    );
    assert_eq!(sent(&stage), 0, "it was there");

    let said = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--upload-only", "--dry-run"])).run().stderr;
    assert!(said.contains(&format!("would use s3://{}, which is the disk\n", key(&stage))), "{said}");

    // An import that fails leaves it as well.
    let failed = json!({ "result": "deleted", "message": "ServerError: an internal error has occurred", "count": 1 });
    stage.aws.control("POST", "import", Some(&failed));
    stage.fails(stage.publish(), 7, OBJECT);
    stage.publish().run().succeeded();
    assert_eq!(stage.aws.resources(), KEPT);
    assert_eq!(sent(&stage), 0, "and still is");
    stage.assert_arrived();
}

#[test]
fn an_upload_alone_that_is_stopped_is_taken_back() {
    let stage = Stage::new();
    stage.aws.fault(&json!({ "action": "s3:UploadPart", "delay": 1.5 }));
    let kiln = stage.publish().arg("--upload-only").start();
    stage.aws.wait_until_struck("s3:UploadPart");
    kiln.signal(Signal::INT);
    kiln.end().failed(130);
    stage.assert_left(NOTHING);
}

#[test]
fn an_object_is_kept_if_the_recipe_or_the_command_line_says_so() {
    let stage = Stage::with("keep_object = true\n");
    let said = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--dry-run"])).run().stderr;
    assert!(said.contains("would import") && !said.contains("would delete"), "{said}");
    stage.publish().run().succeeded();
    assert_eq!(stage.aws.resources(), KEPT);
    let stage = Stage::new();
    stage.publish().arg("--keep-object").run().succeeded();
    assert_eq!(stage.aws.resources(), KEPT);
}

#[test]
fn an_object_is_encrypted_as_asked() {
    let kms = "sse = \"aws:kms\"\nsse_kms_key = \"alias/images\"\n";
    let stage = Stage::with(kms);
    stage.publish().arg("--upload-only").run().succeeded();
    let first = key(&stage);
    let head = stage.aws.head(&first).to_lowercase();
    assert!(head.contains("x-amz-server-side-encryption: aws:kms\r\n"), "{head}");
    assert!(head.contains("x-amz-server-side-encryption-aws-kms-key-id: alias/images\r\n"), "{head}");

    let refused =
        "ClientError: Disk validation failed [We do not have access to the given resource. Reason 403 Forbidden]";
    stage.aws.control("POST", "import", Some(&json!({ "result": "deleted", "message": refused, "count": 1 })));
    let said = stage.fails(stage.publish(), 7, OBJECT);
    assert!(said.contains("kms:Decrypt") && said.contains(" on the KMS key alias/images\n"), "{said}");

    // Encrypted otherwise it is another object.
    stage.aws.s3("DELETE", &first, &[], b"");
    stage.publish().args(["--upload-only", "--sse", "AES256"]).run().succeeded();
    let second = key(&stage);
    assert_ne!(first, second);
    let head = stage.aws.head(&second).to_lowercase();
    assert!(head.contains("x-amz-server-side-encryption: aes256\r\n"), "{head}");
}

#[test]
fn options_that_do_not_fit() {
    let stage = Stage::new();
    let said = stage.fails(stage.publish().args(["--sse-kms-key", "alias/x"]), 2, NOTHING);
    insta::assert_snapshot!(said, @r"
    error: --sse-kms-key is of use only with KMS
     |
    help: add --sse aws:kms
    ");
    let ebs = Stage::of("[publish]\nvia = \"ebs\"\n");
    let said = ebs.fails(ebs.publish().arg("--keep-object"), 2, NOTHING);
    insta::assert_snapshot!(said, @r"
    error: EBS direct uploads no object, so that --keep-object does nothing
     |
    help: leave out --keep-object, or use --via s3
    ");
}

/// Of a disk whose data doesn't get smaller, for several parts.
fn noisy(more: &str) -> Stage {
    let recipe = format!("[publish]\nimage_name = \"web-1\"\nbucket = \"images\"\n{more}");
    Stage::on(&recipe, |base| append_noise(base, 40 << 20))
}

#[test]
fn a_vmdk_is_made_on_the_way() {
    let stage = noisy("disk_format = \"vmdk\"\n");
    let (ran, peak) = stage.publish().args(["--keep-object", "--parallel", "32"]).start().end_with_peak();
    ran.succeeded();
    assert!(peak < MEMORY, "{peak} KiB");
    assert_eq!(stage.aws.resources(), KEPT);
    stage.assert_arrived();
    let import = stage.aws.requests("ec2:ImportSnapshot").pop().unwrap();
    assert_eq!(import["parameters"]["DiskContainer.Format"], "VMDK");
    assert_eq!(stage.aws.requests("s3:UploadPartCopy"), [] as [Value; 0]);
    assert!((40 << 20..44 << 20).contains(&sent(&stage)), "{}", sent(&stage));

    let key = key(&stage);
    assert_eq!(key.rsplit('.').next(), Some("vmdk"));
    stage.aws.download(&key, &stage.bench.path("arrived.vmdk"));
    let compare = ["compare", "-f", "raw", "-F", "vmdk", "out/web/disk.raw", "arrived.vmdk"];
    tool(Command::new("qemu-img").args(compare).current_dir(stage.bench.path("")), "");

    // It is known again.
    stage.aws.reset();
    stage.publish().args(["--upload-only"]).run().succeeded();
    assert_eq!(sent(&stage), 0);
}

#[test]
fn a_killed_kilns_vmdk_is_gone_on_with() {
    let stage = noisy("");
    let fault = json!({ "action": "s3:UploadPart", "skip": 2, "delay": 5, "error": "InternalError" });
    stage.aws.fault(&fault);
    let publish = || stage.publish().args(["--disk-format", "vmdk"]);
    let kiln = publish().start();
    let arrived = || stage.aws.requests("s3:UploadPart").iter().filter(|call| call["status"] == 200).count();
    wait_until("two parts", || arrived() == 2 && stage.aws.struck("s3:UploadPart") > 0);
    kiln.signal(Signal::KILL);
    assert_eq!(kiln.end().code, None);
    let before = sent(&stage);
    stage.aws.reset();
    stage.published(publish().run());
    assert_eq!(before, 16 << 20);
    assert!((24 << 20..28 << 20).contains(&sent(&stage)), "{}", sent(&stage));
    assert_eq!(stage.aws.requests("s3:CreateMultipartUpload"), [] as [Value; 0]);
    stage.assert_arrived();
}
