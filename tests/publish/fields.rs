//! Everything that an image is registered with, as EC2 tells it afterwards; encryption; and what is refused of both.

use serde_json::{Value, json};

use super::{NOTHING, Stage, word};
use crate::support::append_data;

/// What an element has, each time that it is there.
fn inside<'a>(xml: &'a str, element: &str) -> Vec<&'a str> {
    let (start, end) = (format!("<{element}>"), format!("</{element}>"));
    xml.split(&start).skip(1).map(|rest| rest.split(&end).next().unwrap()).collect()
}

/// The only such element.
#[track_caller]
fn only<'a>(xml: &'a str, element: &str) -> &'a str {
    match inside(xml, element)[..] {
        [found] => found,
        _ => panic!("not one {element} in {xml}"),
    }
}

/// Its text; empty if it isn't there.
fn text<'a>(xml: &'a str, element: &str) -> &'a str {
    inside(xml, element).first().copied().unwrap_or_default()
}

/// The tags of an answer about one thing, sorted.
fn tags(xml: &str) -> Vec<String> {
    let tags = inside(only(xml, "tagSet"), "item");
    let mut tags: Vec<_> = tags.iter().map(|tag| format!("{}={}", text(tag, "key"), text(tag, "value"))).collect();
    tags.sort();
    tags
}

/// The parameters of the call of an action that was carried out.
#[track_caller]
fn parameters(stage: &Stage, action: &str) -> Value {
    let calls = stage.aws.requests(action);
    let well: Vec<_> = calls.iter().filter(|call| call["status"].as_u64().unwrap() < 300).collect();
    assert_eq!(well.len(), 1, "{action}: {calls:?}");
    well[0]["parameters"].clone()
}

#[track_caller]
fn last(stage: &Stage, key: &str) -> String {
    stage.remembered().as_array().unwrap().last().unwrap()[key].as_str().unwrap().to_owned()
}

/// Another disk, of the recipe with this `[publish]`. It starts by UEFI, as far as the manifest knows.
#[track_caller]
fn rebuild(stage: &Stage, publish: &str) {
    append_data(&stage.bench.path("base.raw"), 300 << 10);
    stage.bench.recipe(publish);
    stage.bench.build(&json!({})).run().succeeded();
    stage.bench.manifest(|manifest| manifest["boot_modes"] = json!(["uefi"]));
}

#[test]
fn every_field_is_registered_as_the_recipe_has_it() {
    let stage = Stage::new();
    stage.publish().run().succeeded();
    let earlier = last(&stage, "snapshot_id");
    stage.aws.reset();
    stage.bench.write("uefi/vars", b"AMZNUEFI\x01\x02\x03\x04\0\0\0\0variables");
    rebuild(
        &stage,
        &format!(
            r#"
[publish]
image_name = "web-2"
bucket = "images"
description = "{{name}} by kiln {{version}}, disk {{digest:8}}, {{{{x}}"
boot_mode = "uefi"
tpm = "v2.0"
uefi_data = "uefi/vars"
sriov = true
ena = false
volume_type = "io2"
volume_size = "20GiB"
iops = 1000
delete_on_termination = false
root_device = "/dev/sda1"
tags = {{ team = "web", disk = "{{digest:8}}" }}
snapshot_tags = {{ backup = "{{name}}", team = "storage" }}

[[publish.volume]]
device = "/dev/sdf"
size = "8GiB"
iops = 3500
throughput = 250
encrypted = true

[[publish.volume]]
device = "/dev/sdg"
snapshot = "{earlier}"
type = "gp2"
delete_on_termination = false

[[publish.volume]]
device = "/dev/sdh"
virtual = "ephemeral0"
"#
        ),
    );
    let planned = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--dry-run"])).run().stderr;
    let register = planned.lines().find(|line| line.contains("would register")).unwrap_or_else(|| panic!("{planned}"));
    assert!(register.contains("boot mode uefi, hvm, SR-IOV, IMDS v2.0, TPM v2.0, UEFI variables, root /dev/sda1 on io2 of 20 GiB, 1000 IOPS, kept after the instance; /dev/sdf on gp3 of 8 GiB, 3500 IOPS, 250 MiB/s, deleted with the instance; "), "{register}");

    stage.publish().run().succeeded();
    let (image, snapshot, digest) = (last(&stage, "image_id"), last(&stage, "snapshot_id"), last(&stage, "digest"));
    let xml = stage.aws.ec2("us-east-1", "DescribeImages", &[("ImageId.1", &image)]);
    let described: Vec<_> = [
        "description",
        "bootMode",
        "tpmSupport",
        "imdsSupport",
        "sriovNetSupport",
        "enaSupport",
        "virtualizationType",
        "rootDeviceName",
    ]
    .iter()
    .map(|field| format!("{field}: {}", text(&xml, field).replace(&digest[..8], "DIGEST")))
    .collect();
    insta::assert_snapshot!(described.join("\n"), @r"
    description: web by kiln 0.1.0, disk DIGEST, {x}
    bootMode: uefi
    tpmSupport: v2.0
    imdsSupport: v2.0
    sriovNetSupport: simple
    enaSupport: false
    virtualizationType: hvm
    rootDeviceName: /dev/sda1
    ");
    let mappings = inside(only(&xml, "blockDeviceMapping"), "item");
    let mappings = mappings.join("\n").replace(&snapshot, "SNAPSHOT").replace(&earlier, "EARLIER");
    insta::assert_snapshot!(mappings, @r"
    <ebs><deleteOnTermination>false</deleteOnTermination><iops>1000</iops><snapshotId>SNAPSHOT</snapshotId><volumeSize>20</volumeSize><volumeType>io2</volumeType><encrypted>false</encrypted></ebs><deviceName>/dev/sda1</deviceName>
    <ebs><deleteOnTermination>true</deleteOnTermination><iops>3500</iops><volumeSize>8</volumeSize><volumeType>gp3</volumeType><throughput>250</throughput><encrypted>true</encrypted></ebs><deviceName>/dev/sdf</deviceName>
    <ebs><deleteOnTermination>false</deleteOnTermination><snapshotId>EARLIER</snapshotId><volumeSize>1</volumeSize><volumeType>gp2</volumeType><encrypted>false</encrypted></ebs><deviceName>/dev/sdg</deviceName>
    <deviceName>/dev/sdh</deviceName><virtualName>ephemeral0</virtualName>
    ");
    let data = stage.aws.ec2("us-east-1", "DescribeImageAttribute", &[("ImageId", &image), ("Attribute", "uefiData")]);
    assert_eq!(text(only(&data, "uefiData"), "value"), "QU1aTlVFRkkBAgMEAAAAAHZhcmlhYmxlcw==");

    let own = |tags: Vec<String>| -> Vec<_> { tags.into_iter().filter(|tag| !tag.starts_with("kiln:")).collect() };
    let disk = format!("disk={}", &digest[..8]);
    assert_eq!(own(tags(&xml)), ["Name=web-2", &disk, "team=web"]);
    let snapshots = stage.aws.ec2("us-east-1", "DescribeSnapshots", &[("SnapshotId.1", &snapshot)]);
    assert_eq!(own(tags(&snapshots)), ["Name=web-2", "backup=web", &disk, "team=storage"]);

    // The same again is found, with one thing changed it is not.
    stage.aws.reset();
    assert_eq!(stage.publish().run().succeeded(), format!("us-east-1 {image}\n"));
    assert_eq!(stage.aws.requests("ec2:RegisterImage"), [] as [Value; 0]);
    stage.bench.manifest(|manifest| manifest["publish"]["iops"] = json!(1001));
    let said = stage.publish().run().failed(7);
    assert!(said.contains("the image name `web-2` is already taken"), "{said}");
}

/// Filled in, they would make another image each day, and each second.
#[test]
fn dates_in_texts_make_no_other_image() {
    let recipe = "[publish]\nimage_name = \"web-1\"\nbucket = \"images\"\ndescription = \"of {date} {time}\"\n\
                  tags = { built = \"{date}T{time}\" }\n";
    let stage = Stage::of(recipe);
    let image = stage.published(stage.publish().run());
    let xml = stage.aws.ec2("us-east-1", "DescribeImages", &[("ImageId.1", &image)]);
    let description = text(&xml, "description");
    assert!(description.starts_with("of 20") && description.len() == "of 2026-11-28 001122".len(), "{description}");
    assert!(tags(&xml).iter().any(|tag| tag.starts_with("built=20") && tag.contains('T')), "{xml}");
    // What an image of another moment would have been registered with.
    stage.aws.ec2(
        "us-east-1",
        "CreateTags",
        &[("ResourceId.1", &image), ("Tag.1.Key", "built"), ("Tag.1.Value", "earlier")],
    );
    assert_eq!(stage.published(stage.publish().run()), image);
    stage.bench.manifest(|manifest| manifest["publish"]["tags"]["built"] = json!("{dat}"));
    insta::assert_snapshot!(stage.publish().run().failed(3), @r"
    error: unknown placeholder `{dat}`
     |
    help: did you mean `{date}`? (a `{` itself is written `{{`)
    ");
}

#[test]
fn what_is_impossible_is_refused_before_the_first_request() {
    let stage = Stage::new();
    let refused = |change: &dyn Fn(&mut Value), arguments: &[&str]| {
        let before = stage.bench.read("out/web/manifest.json");
        stage.bench.manifest(|manifest| change(manifest));
        let said = stage.fails(stage.publish().args(arguments), 3, NOTHING);
        stage.bench.write("out/web/manifest.json", before);
        assert_eq!(stage.aws.requests(""), [] as [Value; 0], "nobody was asked");
        said
    };
    insta::assert_snapshot!(refused(&|manifest| manifest["publish"]["tpm"] = json!("v2.0"), &[]), @r#"
    error: an image that boots by `legacy-bios` can't have a TPM
     |
    help: AWS takes `tpm` only with boot_mode = "uefi"
    "#);
    insta::assert_snapshot!(refused(&|manifest| manifest["publish"]["volume_type"] = json!("io1"), &[]), @r"
    error: a volume of type io1 can't have 1 GiB
     |
    help: EBS takes 4 to 16384 GiB
    ");
    insta::assert_snapshot!(refused(&|_| (), &["--kms-key", "mine"]), @r"
    error: `mine` is not a KMS key
     |
    help: an alias is written `alias/mine`, a key as its id or ARN
    ");
    insta::assert_snapshot!(refused(&|_| (), &["--via", "ebs", "--kms-key", "alias/mine"]), @r"
    error: EBS direct takes a KMS key only by its ARN, and `alias/mine` is none
     |
    help: `aws kms describe-key --key-id alias/mine --query KeyMetadata.Arn --output text` prints it
    ");
    let arn = "us-east-1=arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab";
    insta::assert_snapshot!(refused(&|_| (), &["--kms-key", arn]), @r#"
    error: the KMS key `arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab` is in eu-west-1 and can't encrypt in us-east-1
     |
    help: name a key of us-east-1: `kms_keys = { "us-east-1" = "…" }`, or --kms-key us-east-1=KEY
    "#);
    let long = |manifest: &mut Value| manifest["publish"]["description"] = json!("{digest:64}".repeat(4));
    insta::assert_snapshot!(refused(&long, &[]), @r"
    error: an image's description can't have 256 characters
     |
    help: AWS takes up to 255
    ");
}

/// What shows only when the base is known is told at its place in the recipe, and before a guest starts.
#[test]
fn a_build_refuses_what_could_not_be_published() {
    let stage = Stage::new();
    let refused = |publish: &str| {
        stage.bench.recipe(publish);
        stage.bench.build(&json!({})).run().failed(3)
    };
    insta::assert_snapshot!(refused("[publish]\nvolume_type = \"io2\"\niops = 100\n"), @r#"
    error: a volume of type io2 can't have 1 GiB
     --> web.toml:7:15
      |
    7 | volume_type = "io2"
      |               ^^^^^
      |
    help: EBS takes 4 to 65536 GiB
    "#);
    insta::assert_snapshot!(refused("[disk]\nsize = \"2GiB\"\n[publish]\nvolume_size = \"1GiB\"\n"), @r#"
    error: the root volume's 1 GiB are fewer than the disk's 2
     --> web.toml:9:15
      |
    9 | volume_size = "1GiB"
      |               ^^^^^^
      |
    help: use volume_size = "2GiB" or more
    "#);
    insta::assert_snapshot!(refused("[publish]\nuefi_data = \"vars\"\n"), @r#"
    error: cannot read `./vars`: no such file or folder
     --> web.toml:7:13
      |
    7 | uefi_data = "vars"
      |             ^^^^^^
      |
    help: paths are relative to the recipe's folder
    "#);
    stage.bench.write("vars", "_FVH");
    insta::assert_snapshot!(refused("[publish]\nuefi_data = \"vars\"\n"), @r#"
    error: `./vars` has no UEFI variables as AWS has them
     --> web.toml:7:13
      |
    7 | uefi_data = "vars"
      |             ^^^^^^
      |
    help: python-uefivars converts them: uefivars -i edk2 -I OVMF_VARS.fd -o aws -O vars.aws
    "#);
}

#[test]
fn an_encrypted_import_has_the_key_and_no_other_is_taken_for_it() {
    let stage = Stage::new();
    let arn = stage.aws.kms_key("alias/mine");
    let mine = ["--kms-key", "us-east-1=alias/mine"];
    let encrypted = stage.published(stage.publish().args(mine).run());
    let import = parameters(&stage, "ec2:ImportSnapshot");
    assert_eq!((&import["Encrypted"], &import["KmsKeyId"]), (&json!("true"), &json!("alias/mine")));
    let register = parameters(&stage, "ec2:RegisterImage");
    assert!(register.get("BlockDeviceMapping.1.Ebs.Encrypted").is_none(), "{register}");
    let snapshot = last(&stage, "snapshot_id");
    let xml = stage.aws.ec2("us-east-1", "DescribeSnapshots", &[("SnapshotId.1", &snapshot)]);
    assert_eq!([text(&xml, "encrypted"), text(&xml, "kmsKeyId")], ["true", &arn]);
    assert!(tags(&xml).contains(&"kiln:encryption=alias/mine".to_owned()), "{xml}");
    stage.assert_arrived();

    let imports = || {
        let calls = stage.aws.requests("ec2:ImportSnapshot");
        calls.iter().filter(|call| call["status"] == 200).count()
    };
    stage.aws.reset();
    assert_eq!(stage.published(stage.publish().args(mine).run()), encrypted, "the same again");
    stage.publish().args(mine).args(["--image-name", "web-2"]).run().succeeded();
    assert_eq!((imports(), last(&stage, "snapshot_id")), (0, snapshot.clone()), "its snapshot has that key");
    stage.publish().args(["--image-name", "web-3"]).run().succeeded();
    let plain = last(&stage, "snapshot_id");
    assert_eq!(imports(), 1, "nobody asked for encryption");
    stage.publish().args(["--encrypted", "--image-name", "web-4"]).run().succeeded();
    assert_eq!(imports(), 2, "neither the plain one nor that of another key");
    let default = last(&stage, "snapshot_id");
    assert!(default != plain && default != snapshot);
    let xml = stage.aws.ec2("us-east-1", "DescribeSnapshots", &[("SnapshotId.1", &default)]);
    assert_eq!(text(&xml, "encrypted"), "true");
    stage.publish().args(["--encrypted", "--image-name", "web-5"]).run().succeeded();
    assert_eq!((imports(), last(&stage, "snapshot_id")), (2, default));
}

/// AWS finds it out only when it imports.
#[test]
fn a_key_that_can_not_be_used_is_named() {
    let stage = Stage::with("encrypted = true\nkms_keys = { us-east-1 = \"alias/gone\" }\n");
    let said = stage.fails(stage.publish(), 7, NOTHING);
    insta::assert_snapshot!(said.replace(&word(&said, "import-snap-"), "TASK"), @r"
    error: AWS could not import the disk: ClientError: The KMS key alias/gone does not exist or cannot be used
     |
     = import task TASK
    help: the KMS key `alias/gone` must be a symmetric, enabled key in us-east-1, and its policy must let the role `vmimport` use it: kms:CreateGrant, kms:Decrypt, kms:DescribeKey, kms:Encrypt, kms:GenerateDataKey*, kms:ReEncrypt*; name another with --kms-key
    ");

    let other = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab";
    let said = stage.fails(
        stage.aws.with(stage.bench.kiln(["-q", "publish", "out/web", "--via", "ebs", "--kms-key", other])),
        7,
        NOTHING,
    );
    insta::assert_snapshot!(said, @r"
    error: AWS refused StartSnapshot: ValidationException: The KMS key arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab does not exist or cannot be used
     |
     = the snapshot was to be encrypted with arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab
    help: the key must be a symmetric, enabled key in us-east-1, and its policy must let you use it: kms:CreateGrant, kms:Decrypt, kms:DescribeKey, kms:GenerateDataKey*, kms:ReEncrypt*; allow `ebs:StartSnapshot` and `ec2:CreateTags` as well
    ");
}

#[test]
fn blocks_are_encrypted_with_the_key_and_built_on_no_other() {
    let recipe = "[publish]\nimage_name = \"web-1\"\nvia = \"ebs\"\n";
    let stage = Stage::of(recipe);
    let [first, second] = ["alias/first", "alias/second"].map(|alias| stage.aws.kms_key(alias));
    let put = || stage.aws.requests("ebs:PutSnapshotBlock").len();
    let publish = |name: &str, key: &str| {
        stage.aws.reset();
        stage.publish().args(["--image-name", name, "--kms-key", key]).run().succeeded();
        stage.assert_arrived();
        let xml = stage.aws.ec2("us-east-1", "DescribeSnapshots", &[("SnapshotId.1", &last(&stage, "snapshot_id"))]);
        assert_eq!([text(&xml, "encrypted"), text(&xml, "kmsKeyId")], ["true", key]);
    };
    publish("web-1", &first);
    let start = parameters(&stage, "ebs:StartSnapshot");
    assert_eq!((&start["Encrypted"], &start["KmsKeyArn"]), (&json!(true), &json!(first)));
    assert_eq!(put(), 2048, "holes too");
    assert_eq!(stage.aws.requests("ec2:GetEbsEncryptionByDefault"), [] as [Value; 0], "it is asked for anyway");

    let earlier = last(&stage, "snapshot_id");
    rebuild(&stage, recipe);
    publish("web-2", &first);
    let start = parameters(&stage, "ebs:StartSnapshot");
    assert_eq!(start["ParentSnapshotId"], json!(earlier));
    assert!(start.get("Encrypted").is_none() && start.get("KmsKeyArn").is_none(), "{start}");
    assert!((1..10).contains(&put()), "{}", put());

    // With another key all is sent, of which the beginning is enough here.
    stage.aws.reset();
    stage.aws.fault(&json!({ "action": "ebs:PutSnapshotBlock", "error": "AccessDeniedException" }));
    stage.publish().args(["--image-name", "web-3", "--kms-key", &second]).run().failed(7);
    let start = parameters(&stage, "ebs:StartSnapshot");
    assert_eq!((start.get("ParentSnapshotId"), &start["KmsKeyArn"]), (None, &json!(second)));
}
