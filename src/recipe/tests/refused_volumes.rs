//! Each way the volumes, the encryption and the firmware of an image can be wrong; as in `refusals`.

use super::refusals::check;
use super::{SMALL, read, refusal};
use crate::recipe::{Ebs, Encryption, Volume, VolumeKind, VolumeType};

const IMDS: &str = "imds = \"v2.0\"";

const FIRMWARE: &[(&str, &str, &str)] = &[
    (
        IMDS,
        "tpm = \"v2.0\"",
        "50:7 `\"v2.0\"`: an image that boots by `uefi-preferred` can't have a TPM; AWS takes `tpm` only with boot_mode = \"uefi\"",
    ),
    (
        "boot_mode = \"uefi-preferred\"",
        "tpm = \"v2.0\"",
        "49:7 `\"v2.0\"`: `tpm` needs a `boot_mode`; AWS takes it only with boot_mode = \"uefi\"",
    ),
    (IMDS, "tpm = \"v1.2\"", "50:7 `\"v1.2\"`: `tpm` can't be `v1.2`; use one of `v2.0`"),
    (
        "boot_mode = \"uefi-preferred\"",
        "boot_mode = \"legacy-bios\"\nuefi_data = \"vars\"",
        "50:13 `\"vars\"`: an image that boots by `legacy-bios` has no use for `uefi_data`; instances have UEFI variables only with boot_mode = \"uefi\" or \"uefi-preferred\"",
    ),
    (IMDS, "sriov = \"true\"", "50:9 `\"true\"`: `sriov` wants true or false, not a string; write true without quotes"),
    (
        IMDS,
        "description = \"{dat}\"",
        "50:15 `\"{dat}\"`: unknown placeholder `{dat}`; did you mean `{date}`? (a `{` itself is written `{{`)",
    ),
    (
        IMDS,
        "tags = { a = \"{\" }",
        "50:10 `a`: a `{` is not closed; write for example `{date}` (a `{` itself is written `{{`)",
    ),
    (
        IMDS,
        "snapshot_tags = { \"kiln:x\" = \"y\" }",
        "50:19 `\"kiln:x\"`: the tag `kiln:x` can't be set; keys that start with `kiln:` are kiln's own",
    ),
];

#[test]
fn refused_firmware_and_texts() {
    check(FIRMWARE);
}

const ROOTS: &[(&str, &str, &str)] = &[
    (IMDS, "iops = 2001", "50:8 `2001`: a volume of type gp3 can't have 2001 IOPS; EBS takes 3000 to 80000"),
    (
        IMDS,
        "iops = 3001",
        "50:8 `3001`: a volume of type gp3 with 4 GiB can't have 3001 IOPS; EBS takes up to 500 for each GiB: use 3000 or fewer, or 7 GiB",
    ),
    (IMDS, "volume_type = \"io1\"", "50:15 `\"io1\"`: a volume of type io1 needs `iops`; EBS takes 100 to 64000"),
    (
        IMDS,
        "volume_type = \"gp2\"\nthroughput = 125",
        "51:14 `125`: the throughput of a volume of type gp2 can't be chosen; leave `throughput` out, or use gp3",
    ),
    (
        IMDS,
        "volume_type = \"st1\"",
        "50:15 `\"st1\"`: instances don't boot from a volume of type st1; use gp3, gp2, io2, io1 or standard",
    ),
    (IMDS, "volume_size = \"4500MiB\"", "50:15 `\"4500MiB\"`: a volume has whole GiB; write `volume_size = \"5GiB\"`"),
    (IMDS, "throughput = -1", "50:14 `-1`: `throughput` can't be -1"),
];

#[test]
fn refused_root_volumes() {
    check(ROOTS);
}

const VOLUMES: &[(&str, &str, &str)] = &[
    (
        IMDS,
        "[publish.volume]\ndevice = \"/dev/sdf\"",
        "50:1 `[publish.volume]`: `volume` wants a list of tables, not a table; there can be several: write [[publish.volume]] with two brackets",
    ),
    (
        IMDS,
        "[[publish.volume]]\nsize = \"8GiB\"",
        "50:1 `[[publish.volume]]`: [[publish.volume]] has no `device`; add for example `device = \"/dev/sdf\"`",
    ),
    (
        IMDS,
        "[[publish.volume]]\ndevice = \"/dev/sdf\"",
        "50:1 `[[publish.volume]]`: [[publish.volume]] has no `size`; add for example `size = \"8GiB\"`, or `snapshot`, or `virtual`",
    ),
    (
        IMDS,
        "[[publish.volume]]\ndevice = \"sdf\"\nsize = \"8GiB\"",
        "51:10 `\"sdf\"`: `sdf` can't be the device of a volume; AWS takes `/dev/sdb` to `/dev/sdz` and names like `/dev/xvdb` and `/dev/xvdba`; it recommends `/dev/sdf` to `/dev/sdp`",
    ),
    (
        IMDS,
        "root_device = \"/dev/sdb\"\n[[publish.volume]]\ndevice = \"/dev/xvdb\"\nsize = \"8GiB\"",
        "52:10 `\"/dev/xvdb\"`: `/dev/xvdb` is the same device as `/dev/sdb`, which is the root device already; give each volume a device of its own",
    ),
    (
        IMDS,
        "[[publish.volume]]\ndevice = \"/dev/sdf\"\nsize = \"8GiB\"\n[[publish.volume]]\ndevice = \"/dev/sdf\"\nsize = \"9GiB\"",
        "54:10 `\"/dev/sdf\"`: `/dev/sdf` is taken already; give each volume a device of its own",
    ),
    (
        IMDS,
        "[[publish.volume]]\ndevice = \"/dev/sdf\"\nsize = \"64GiB\"\ntype = \"sc1\"",
        "52:8 `\"64GiB\"`: a volume of type sc1 can't have 64 GiB; EBS takes 125 to 16384 GiB",
    ),
    (
        IMDS,
        "[[publish.volume]]\ndevice = \"/dev/sdf\"\nsize = \"8GiB\"\nkms_key = \"alias/x\"",
        "53:1 `kms_key`: the KMS key of a volume of an image can't be chosen; AWS takes no key there: a new volume is encrypted with the account's default key for EBS, one of a snapshot has the snapshot's",
    ),
    (
        IMDS,
        "[[publish.volume]]\ndevice = \"/dev/sdf\"\nsnapshot = \"snap-12345678\"\nencrypted = true",
        "53:13 `true`: the encryption of a volume of a snapshot can't be chosen; leave `encrypted` out: AWS refuses it next to a snapshot, whose own encryption the volume has",
    ),
    (
        IMDS,
        "[[publish.volume]]\ndevice = \"/dev/sdf\"\nsnapshot = \"vol-12345678\"",
        "52:12 `\"vol-12345678\"`: `vol-12345678` is not the id of a snapshot; ids are written like `snap-0123456789abcdef0`",
    ),
    (
        IMDS,
        "[[publish.volume]]\ndevice = \"/dev/sdf\"\nvirtual = \"ephemeral0\"\nsize = \"8GiB\"",
        "53:1 `size`: a volume with `virtual` can't have `size`; it is one of the instance's own disks, not one of EBS",
    ),
    (
        IMDS,
        "[[publish.volume]]\ndevice = \"/dev/sdf\"\nvirtual = \"disk0\"",
        "52:11 `\"disk0\"`: `disk0` can't be the name of an instance store volume; they are called `ephemeral0` to `ephemeral23`",
    ),
];

#[test]
fn refused_volumes() {
    check(VOLUMES);
}

const KEYS: &[(&str, &str, &str)] = &[
    (
        IMDS,
        "kms_key = \"mine\"",
        "50:11 `\"mine\"`: `mine` is not a KMS key; an alias is written `alias/mine`, a key as its id or ARN",
    ),
    (
        IMDS,
        "encrypted = false\nkms_key = \"alias/x\"",
        "50:13 `false`: `encrypted` is false, and `kms_key` is given; write `encrypted = true`, or leave out `kms_key`",
    ),
    (
        IMDS,
        "kms_keys = { eu = \"alias/x\" }",
        "50:14 `eu`: `eu` is not a region; regions are written like `eu-central-1`",
    ),
    (
        IMDS,
        "via = \"ebs\"\nkms_key = \"alias/x\"",
        "51:11 `\"alias/x\"`: EBS direct takes a KMS key only by its ARN, and `alias/x` is none; `aws kms describe-key --key-id alias/x --query KeyMetadata.Arn --output text` prints it",
    ),
    (
        IMDS,
        "kms_key = \"arn:aws:kms:eu-central-1:123456789012:alias/x\"",
        "50:11 `\"arn:aws:kms:eu-central-1:123456789012:alias/x\"`: the KMS key `arn:aws:kms:eu-central-1:123456789012:alias/x` is in eu-central-1 and can't encrypt in us-east-1; name a key of us-east-1: `kms_keys = { \"us-east-1\" = \"…\" }`, or --kms-key us-east-1=KEY",
    ),
];

#[test]
fn refused_keys() {
    check(KEYS);
}

#[test]
fn volumes_keys_and_tags_are_read() {
    let publish = "[publish]\nregions = ['eu-west-1', 'us-east-1']\nboot_mode = 'uefi'\ntpm = 'v2.0'\nuefi_data = 'v'\nsriov = true
        ena = false\nvolume_type = 'io2'\nvolume_size = '20GiB'\niops = 1000\ndelete_on_termination = false
        kms_key = 'arn:aws:kms:eu-west-1:123456789012:alias/x'\nkms_keys = { us-east-1 = 'alias/y' }
        description = '{name} {{'\nsnapshot_tags = { a = '{date}' }
        [[publish.volume]]\ndevice = '/dev/sdf'\nsize = '8GiB'\nencrypted = false
        [[publish.volume]]\ndevice = '/dev/sdg'\nsnapshot = 'snap-12345678'\nthroughput = 130
        [[publish.volume]]\ndevice = '/dev/sdh'\nvirtual = 'ephemeral1'\n";
    let publish = read(&format!("{SMALL}{publish}")).publish;
    assert_eq!((publish.tpm, publish.sriov, publish.ena), (true, true, Some(false)));
    assert_eq!(publish.uefi_data.as_deref(), Some(std::path::Path::new("v")));
    let root = Ebs {
        volume_type: VolumeType::Io2,
        size: Some(20),
        iops: Some(1000),
        throughput: None,
        delete_on_termination: false,
    };
    assert_eq!(publish.root, root);
    let volume = |device: &str, kind| Volume { device: device.to_owned(), kind };
    let expected = [
        volume("/dev/sdf", VolumeKind::Empty { encrypted: Some(false), ebs: Ebs { size: Some(8), ..Ebs::default() } }),
        volume(
            "/dev/sdg",
            VolumeKind::Snapshot {
                snapshot: "snap-12345678".to_owned(),
                ebs: Ebs { throughput: Some(130), ..Ebs::default() },
            },
        ),
        volume("/dev/sdh", VolumeKind::InstanceStore { name: "ephemeral1".to_owned() }),
    ];
    assert_eq!(publish.volumes, expected);
    let encryption = publish.encryption.unwrap();
    assert_eq!(encryption.key("us-east-1"), Some("alias/y"));
    assert_eq!(encryption.key("eu-west-1"), Some("arn:aws:kms:eu-west-1:123456789012:alias/x"));
    assert_eq!(publish.snapshot_tags["a"], "{date}");

    let encrypted = |lines: &str| read(&format!("{SMALL}[publish]\n{lines}")).publish.encryption;
    assert_eq!(encrypted(""), None);
    assert_eq!(encrypted("encrypted = false"), None);
    assert_eq!(encrypted("encrypted = true"), Some(Encryption::default()));
    let arm = "name = 'a'\n[base]\nimage = 'b.raw'\narch = 'aarch64'\n[publish]\ntpm = 'v2.0'\n";
    assert!(read(arm).publish.tpm, "Graviton boots by UEFI only");
}

#[test]
fn tags_of_snapshots_count_with_the_others() {
    let tags =
        |letter: char, count: u32| (0..count).map(|n| format!("{letter}{n} = ''")).collect::<Vec<_>>().join(", ");
    let told = |encrypted: bool| {
        let (tags, own) = (tags('a', 40), tags('b', 6));
        let text =
            format!("{SMALL}[publish]\nencrypted = {encrypted}\ntags = {{ {tags} }}\nsnapshot_tags = {{ {own} }}\n");
        refusal(&text, &[])
    };
    assert_eq!(told(false), "accepted");
    let refused = "7:1 `snapshot_tags`: 46 tags are too many; AWS takes 50, of which kiln sets 5 itself: 45 are left";
    assert_eq!(told(true), refused);
}
