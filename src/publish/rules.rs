//! AWS's rules about what a request may say, checked before the first byte is sent. Pure.

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::share::Sharing;
use super::{Architecture, BootMode, DEFAULT_ROLE, ObjectEncryption, Parents, Request, Target, Undated, Via};
use crate::error::{Error, Exit};
use crate::recipe::Sse;
use crate::recipe::aws::{self, Refusal};
use crate::recipe::volume::{self, VolumeKind};
use crate::recipe::{Ebs, Encryption, encryption};
use crate::units::hex;

/// The tag with the disk's digest.
pub(super) const DIGEST_TAG: &str = "kiln:digest";
/// The tag with the recipe's name.
pub(super) const NAME_TAG: &str = "kiln:name";
/// The tag that images have alike which are alike but for their names.
pub(super) const SETTINGS_TAG: &str = "kiln:settings";
/// The tag that encrypted snapshots have, and the tasks that import them: [`encryption`].
pub(super) const ENCRYPTION_TAG: &str = "kiln:encryption";
/// The tag of images and snapshots whose holes may be noise, because they were made with --omit-holes: it tells which blocks
/// those are.
pub(super) const HOLES_TAG: &str = "kiln:holes";
/// In GiB. S3 takes 10,000 parts of 5 GiB in an object. At worst kiln cuts into parts of at least half that (`cut`), which comes
/// to less than the largest volume.
const LARGEST_OBJECT: u64 = 25_000;
/// In GiB.
const LARGEST_SNAPSHOT: u64 = 65_536;

/// Whether the request can be carried out at all, as far as that shows without a connection.
pub(super) fn check(request: &Request) -> Result<(), Error> {
    image_name(&request.image_name)?;
    aws::description(&request.description).map_err(refused)?;
    if let Some(bucket) = bucket(request) {
        aws::bucket(bucket).map_err(refused)?;
    }
    let (largest, why) = match request.via {
        // What is too large for S3 has only the other way.
        Via::Auto if request.size > LARGEST_OBJECT && bucket(request).is_some() => {
            return Err(input(format!("a disk of {} GiB can't go through a bucket", request.size))
                .help("publish it with --via ebs"));
        }
        Via::S3 => (LARGEST_OBJECT, "S3 takes no larger object"),
        Via::Ebs | Via::Auto => (LARGEST_SNAPSHOT, "there are no larger snapshots"),
    };
    if request.size == 0 || request.size > largest {
        return Err(input(format!("a disk of {} GiB can't be published", request.size))
            .help(format!("it must have 1 to {largest} GiB: {why}")));
    }
    if request.arch == Architecture::Arm64 && request.boot_mode == BootMode::LegacyBios {
        return Err(input("arm64 instances don't boot by `legacy-bios`").help("set boot_mode = \"uefi\" in [publish]"));
    }
    if request.via == Via::S3 {
        imports(request)?;
    }
    firmware(request)?;
    volumes(request)?;
    keys(request)?;
    tags(request).map_err(refused)
}

/// What an import can't do.
fn imports(request: &Request) -> Result<(), Error> {
    let what = if request.parents != Parents::default() {
        "an import builds on no other snapshot"
    } else if request.omit_holes.is_some() {
        "an import leaves no holes out"
    } else {
        return Ok(());
    };
    Err(input(what).help("publish it with --via ebs"))
}

/// What depends on how instances boot.
fn firmware(request: &Request) -> Result<(), Error> {
    let mode = boot_mode(request);
    if request.tpm {
        aws::tpm(mode).map_err(refused)?;
    }
    match request.uefi_data {
        Some(_) => aws::uefi_data(mode).map_err(refused),
        None => Ok(()),
    }
}

fn volumes(request: &Request) -> Result<(), Error> {
    volume::root_device(&request.root_device).map_err(refused)?;
    let size = root_size(request);
    if size < request.size {
        let message = format!("the root volume's {size} GiB are fewer than the disk's {}", request.size);
        return Err(input(message).help("make `volume_size` in the recipe's [publish] larger, or leave it out"));
    }
    request.root.check_root(Some(size)).map_err(|bad| refused(bad.refusal))?;
    for (position, added) in request.volumes.iter().enumerate() {
        let before = &request.volumes[..position];
        let ebs = |ebs: &Ebs| ebs.check(ebs.size).map_err(|bad| bad.refusal);
        let of_kind = match &added.kind {
            VolumeKind::Empty { ebs: Ebs { size: None, .. }, .. } => {
                return Err(input(format!("the volume at `{}` has no size", added.device)).help("give it a `size`"));
            }
            VolumeKind::Empty { ebs: made, .. } => ebs(made),
            VolumeKind::Snapshot { snapshot, ebs: made } => volume::snapshot_id(snapshot).and_then(|()| ebs(made)),
            VolumeKind::InstanceStore { name } => volume::instance_store(name, before),
        };
        let device = volume::device(&added.device)
            .and_then(|()| volume::device_is_free(&added.device, &request.root_device, before));
        device.and(of_kind).map_err(refused)?;
    }
    Ok(())
}

/// How KMS keys are named; whether they fit a region is for [`key_fits`].
fn keys(request: &Request) -> Result<(), Error> {
    for key in request.encryption.iter().flat_map(Encryption::keys) {
        encryption::kms_key(key).map_err(refused)?;
        if request.via != Via::S3 {
            encryption::kms_key_for_ebs_direct(key).map_err(refused)?;
        }
    }
    Ok(())
}

fn tags(request: &Request) -> Result<(), Refusal> {
    let of_choice = usize::from(request.encryption.is_some()) + usize::from(request.omit_holes.is_some());
    let mut of_snapshot = request.tags.clone();
    of_snapshot.extend(request.snapshot_tags.clone());
    aws::tag_count(of_snapshot.len(), of_choice)?;
    request.tags.iter().chain(&request.snapshot_tags).try_for_each(|(key, value)| aws::tag(key, value))
}

/// Whether the KMS key for `region`, if one is named, is one of that region.
pub(super) fn key_fits(request: &Request, region: &str) -> Result<(), Error> {
    kms_key(request, region).map_or(Ok(()), |key| encryption::kms_key_in(key, region).map_err(refused))
}

/// The KMS key that snapshots in `region` are encrypted with; none: the account's default key for EBS, if they are
/// encrypted at all.
pub(super) fn kms_key<'a>(request: &'a Request, region: &str) -> Option<&'a str> {
    request.encryption.as_ref()?.key(region)
}

/// What a snapshot in `region` is encrypted with, as its tag has it; none: encryption is not asked for. Only what was asked
/// for can be compared: an alias names now this key, now that one.
pub(super) fn encryption(request: &Request, region: &str) -> Option<String> {
    request.encryption.as_ref()?;
    Some(match kms_key(request, region) {
        None => "default".to_owned(),
        // No tag has more.
        Some(key) if key.len() > 255 => hex(&Sha256::digest(key)),
        Some(key) => key.to_owned(),
    })
}

/// The encryption that is asked for, as the end of a sentence about a snapshot in `region`; may be empty.
pub(super) fn encryption_in_words(request: &Request, region: &str) -> String {
    match (&request.encryption, kms_key(request, region)) {
        (None, _) => String::new(),
        (Some(_), None) => ", encrypted with the account's default key".to_owned(),
        (Some(_), Some(key)) => format!(", encrypted with {key}"),
    }
}

/// The size of the root volume in GiB.
pub(super) fn root_size(request: &Request) -> u64 {
    request.root.size.unwrap_or(request.size)
}

/// Settles where everything goes; `run` is of this run only, and a region that copies another's image sends nothing.
pub(super) fn target(request: &Request, region: &str, run: String, sends: bool) -> Result<Target, Error> {
    let bucket = match (bucket(request), request.via) {
        (Some(bucket), _) => bucket,
        (None, Via::Ebs | Via::Auto) => "",
        (None, Via::S3) if !sends => "",
        (None, Via::S3) => {
            return Err(input("no bucket to upload the disk to").help(format!(
                "name one that is in {region}, with --bucket or as `bucket` in the recipe's [publish]; --via ebs needs none"
            )));
        }
    };
    Ok(Target {
        region: region.to_owned(),
        // The same for every run of this disk, which goes on with what another has left there.
        key: object_key(request),
        bucket: bucket.to_owned(),
        role: request.role.clone().unwrap_or_else(|| DEFAULT_ROLE.to_owned()),
        image_name: request.image_name.clone(),
        run,
    })
}

pub(super) fn bucket(request: &Request) -> Option<&str> {
    request.bucket.as_deref().filter(|bucket| !bucket.is_empty())
}

/// The part of AWS that a region is in, as ARNs name it.
pub(super) fn partition(region: &str) -> &'static str {
    match region {
        _ if region.starts_with("cn-") => "aws-cn",
        _ if region.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
}

/// The boot mode to register. Graviton has UEFI only, so there the preferred one is the only one.
pub(super) fn boot_mode(request: &Request) -> BootMode {
    match (request.arch, request.boot_mode) {
        (Architecture::Arm64, BootMode::UefiPreferred) => BootMode::Uefi,
        (_, mode) => mode,
    }
}

/// What image and snapshot are tagged with: kiln's own over the user's, except for `Name`.
pub(super) fn tag_pairs(request: &Request) -> Vec<(String, String)> {
    let mut pairs = request.tags.clone();
    pairs.entry("Name".to_owned()).or_insert_with(|| request.image_name.clone());
    pairs.insert(DIGEST_TAG.to_owned(), request.digest.clone());
    pairs.insert(NAME_TAG.to_owned(), request.name.clone());
    // The image has it too, because the snapshots of its copies get the image's tags.
    pairs.extend(request.omit_holes.clone().map(|holes| (HOLES_TAG.to_owned(), holes)));
    pairs.into_iter().collect()
}

/// What a snapshot in `region` is tagged with, and the task that imports it.
pub(super) fn snapshot_tag_pairs(request: &Request, region: &str) -> Vec<(String, String)> {
    let mut pairs = request.snapshot_tags.clone();
    for (key, value) in tag_pairs(request) {
        pairs.entry(key).or_insert(value);
    }
    pairs.extend(encryption(request, region).map(|encryption| (ENCRYPTION_TAG.to_owned(), encryption)));
    pairs.into_iter().collect()
}

/// Everything that an image in `region` is registered with but its name, in 16 hexadecimal digits.
pub(super) fn settings(request: &Request, region: &str) -> String {
    let Request { digest, name, arch, size, imds_v2, root_device, root, undated, .. } = request;
    let Undated { description, tags, snapshot_tags } = undated;
    let (mode, volume_type) = (boot_mode(request), root.volume_type);
    let mut all = vec![json!([digest, name, description, arch, size, mode, imds_v2, root_device, volume_type, tags])];
    // What an image doesn't have says nothing: images of earlier kilns have none of it.
    let mut add = |name: &str, value: Option<Value>| all.extend(value.map(|value| json!([name, value])));
    let root = Ebs { size: root.size.filter(|own| own != size), ..root.clone() };
    let plain_root = Ebs { volume_type, ..Ebs::default() };
    add("root", (root != plain_root).then(|| json!(root)));
    add("volumes", (!request.volumes.is_empty()).then(|| json!(request.volumes)));
    add("tpm", request.tpm.then_some(Value::Bool(true)));
    add("uefi_data", request.uefi_data.as_ref().map(|data| json!(data)));
    add("sriov", request.sriov.then_some(Value::Bool(true)));
    add("ena", (!request.ena).then_some(Value::Bool(false)));
    add("encryption", encryption(request, region).map(|encryption| json!(encryption)));
    add("omit_holes", request.omit_holes.as_ref().map(|holes| json!(holes)));
    add("snapshot_tags", (!snapshot_tags.is_empty()).then(|| json!(snapshot_tags)));
    let text = if let [only] = &all[..] { only.to_string() } else { json!(all).to_string() };
    hex(&Sha256::digest(text))[..16].to_owned()
}

/// What the keys of all objects begin with that are made of disks of this recipe.
pub(super) fn key_stem_of_all(request: &Request) -> String {
    match request.prefix.trim_matches('/') {
        "" => format!("{}-", request.name),
        prefix => format!("{prefix}/{}-", request.name),
    }
}

/// The key of the disk's object. Encrypted in another way it is another object, and so is another format.
fn object_key(request: &Request) -> String {
    let how = match &request.object.encryption {
        None => String::new(),
        Some(encryption) => {
            let (sse, key) = match encryption {
                ObjectEncryption::S3 => (Sse::Aes256, None),
                ObjectEncryption::Kms { key } => (Sse::Kms, key.as_deref()),
            };
            let all = serde_json::json!([sse.as_str(), key]);
            format!("-{}", &hex(&Sha256::digest(all.to_string()))[..8])
        }
    };
    format!("{}{how}.{}", key_stem(request), request.object.format)
}

/// What the keys of all objects begin with that are made of this disk.
pub(super) fn key_stem(request: &Request) -> String {
    let short: String = request.digest.chars().take(32).collect();
    format!("{}{short}", key_stem_of_all(request))
}

/// Whoever the image is shared with can be told so in these regions.
pub(super) fn shareable(request: &Request, first: &str) -> Result<(), Error> {
    let release = &request.release;
    let sharing = Sharing { with: release.share.clone(), remove: false, snapshots: release.share_snapshots };
    sharing.check(std::iter::once(first).chain(request.regions.iter().map(String::as_str)))
}

/// Nothing is copied from one partition into another.
pub(super) fn one_partition(first: &str, regions: &[String]) -> Result<(), Error> {
    match regions.iter().find(|region| partition(region) != partition(first)) {
        None => Ok(()),
        Some(other) => Err(input(format!("{first} and {other} are in different partitions of AWS"))
            .help("publish to each partition by itself, with credentials of its own")),
    }
}

fn image_name(name: &str) -> Result<(), Error> {
    const HELP: &str = "AWS takes 3 to 128 of letters, digits, spaces and ( ) [ ] . / - ' @ _";
    let length = name.chars().count();
    if !(3..=128).contains(&length) {
        return Err(input(format!("the image name `{name}` has {length} characters")).help(HELP));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || "()[] ./-'@_".contains(c);
    match name.chars().find(|c| !allowed(*c)) {
        Some(wrong) => Err(input(format!("the image name `{name}` has a `{}`", wrong.escape_default())).help(HELP)),
        None => Ok(()),
    }
}

fn refused(refusal: Refusal) -> Error {
    input(refusal.message).help(refusal.help)
}

fn input(message: impl Into<String>) -> Error {
    Error::new(Exit::Input, message)
}

#[cfg(test)]
mod tests {
    use super::super::request::example as request;
    use super::super::{ObjectOptions, Wanted};
    use super::*;
    use crate::recipe::{DiskFormat, Volume, VolumeType};

    fn holes() -> String {
        "0123456789abcdef".to_owned()
    }

    fn refused(change: impl FnOnce(&mut Request)) -> String {
        let mut request = request();
        change(&mut request);
        let error = check(&request).unwrap_err();
        assert_eq!(error.exit, Exit::Input);
        assert!(error.help.is_some());
        error.message
    }

    #[test]
    fn a_sound_request_passes() {
        check(&request()).unwrap();
        let mut every = request();
        every.image_name = "aZ0()[] ./-'@_".to_owned();
        every.description = "x".repeat(255);
        check(&every).unwrap();
    }

    #[test]
    fn what_aws_refuses_later_is_refused_now() {
        assert_eq!(refused(|r| r.image_name = "ab".to_owned()), "the image name `ab` has 2 characters");
        assert_eq!(refused(|r| r.image_name = "a:b c".to_owned()), "the image name `a:b c` has a `:`");
        assert_eq!(refused(|r| r.image_name = "wéb".to_owned()), "the image name `wéb` has a `\\u{e9}`");
        assert!(refused(|r| r.image_name = "x".repeat(129)).ends_with("has 129 characters"));
        assert_eq!(refused(|r| r.description = "naïve".to_owned()), "an image's description can't contain `ï`");
        let bucket = refused(|r| r.bucket = Some("s3://images/x".to_owned()));
        assert_eq!(bucket, "the bucket is wanted by its name, not by an address");
        assert_eq!(
            refused(|r| drop(r.tags.insert("kiln:x".to_owned(), String::new()))),
            "the tag `kiln:x` can't be set"
        );
        let many = |r: &mut Request| r.tags = (0..47).map(|n| (n.to_string(), String::new())).collect();
        assert_eq!(refused(many), "47 tags are too many");
        assert_eq!(refused(|r| r.size = 0), "a disk of 0 GiB can't be published");
        assert_eq!(refused(|r| r.size = 50_001), "a disk of 50001 GiB can't be published");
        assert_eq!(refused(|r| (r.size, r.via) = (65_537, Via::Ebs)), "a disk of 65537 GiB can't be published");
        assert_eq!(refused(|r| r.root_device = "xvda".to_owned()), "`xvda` can't be a root device");
        let arm = refused(|r| (r.arch, r.boot_mode) = (Architecture::Arm64, BootMode::LegacyBios));
        assert_eq!(arm, "arm64 instances don't boot by `legacy-bios`");
    }

    #[test]
    fn the_users_name_tag_wins_and_kilns_tags_are_there() {
        let mut request = request();
        assert!(tag_pairs(&request).contains(&("Name".to_owned(), "web-2026".to_owned())));
        request.tags.insert("Name".to_owned(), "mine".to_owned());
        let pairs = tag_pairs(&request);
        let keys: Vec<&str> = pairs.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["Name", "kiln:digest", "kiln:name"]);
        assert_eq!(pairs[0].1, "mine");
    }

    fn io2(iops: u32) -> Ebs {
        Ebs { volume_type: VolumeType::Io2, iops: Some(iops), ..Ebs::default() }
    }

    fn added(device: &str, ebs: Ebs) -> Volume {
        Volume { device: device.to_owned(), kind: VolumeKind::Empty { encrypted: None, ebs } }
    }

    fn keyed(key: &str) -> Encryption {
        Encryption { kms_key: Some(key.to_owned()), ..Encryption::default() }
    }

    #[test]
    fn what_is_impossible_together_is_refused() {
        let tpm = |r: &mut Request| r.tpm = true;
        assert_eq!(refused(tpm), "an image that boots by `uefi-preferred` can't have a TPM");
        check(&Request { tpm: true, boot_mode: BootMode::Uefi, ..request() }).unwrap();
        check(&Request { tpm: true, arch: Architecture::Arm64, ..request() }).unwrap();
        let data = |r: &mut Request| (r.uefi_data, r.boot_mode) = (Some("QQ==".to_owned()), BootMode::LegacyBios);
        assert_eq!(refused(data), "an image that boots by `legacy-bios` has no use for `uefi_data`");

        let smaller = |r: &mut Request| r.root.size = Some(3);
        assert_eq!(refused(smaller), "the root volume's 3 GiB are fewer than the disk's 4");
        let iops = "a volume of type io2 with 4 GiB can't have 5000 IOPS";
        assert_eq!(refused(|r| r.root = io2(5000)), iops);
        check(&Request { root: Ebs { size: Some(5), ..io2(5000) }, ..request() }).unwrap();

        let volumes = |devices: &[&str]| {
            let ebs = Ebs { size: Some(8), ..Ebs::default() };
            devices.iter().map(|device| added(device, ebs.clone())).collect::<Vec<_>>()
        };
        check(&Request { volumes: volumes(&["/dev/sdf", "/dev/sdg"]), ..request() }).unwrap();
        let twice = refused(|r| r.volumes = volumes(&["/dev/sdf", "/dev/sdf"]));
        assert_eq!(twice, "`/dev/sdf` is taken already");
        let root = |r: &mut Request| (r.volumes, r.root_device) = (volumes(&["/dev/sdb"]), "/dev/xvdb".to_owned());
        assert_eq!(refused(root), "`/dev/sdb` is the same device as `/dev/xvdb`, which is the root device already");
        let sizeless = refused(|r| r.volumes = vec![added("/dev/sdf", Ebs::default())]);
        assert_eq!(sizeless, "the volume at `/dev/sdf` has no size");
        let large = |r: &mut Request| r.volumes = vec![added("/dev/sdf", Ebs { size: Some(65_537), ..Ebs::default() })];
        assert_eq!(refused(large), "a volume of type gp3 can't have 65537 GiB");

        assert_eq!(refused(|r| r.encryption = Some(keyed("mine"))), "`mine` is not a KMS key");
        let direct = refused(|r| (r.encryption, r.via) = (Some(keyed("alias/mine")), Via::Ebs));
        assert_eq!(direct, "EBS direct takes a KMS key only by its ARN, and `alias/mine` is none");
        assert_eq!(refused(|r| r.omit_holes = Some(holes())), "an import leaves no holes out");
        let on_none = Parents { everywhere: Some(Wanted::Nothing), ..Parents::default() };
        assert_eq!(refused(|r| r.parents = on_none.clone()), "an import builds on no other snapshot");
        check(&Request { via: Via::Auto, omit_holes: Some(holes()), parents: on_none, ..request() }).unwrap();
        let many = |r: &mut Request| {
            r.tags = (0..40).map(|n| (format!("a{n}"), String::new())).collect();
            r.snapshot_tags = (0..7).map(|n| (format!("b{n}"), String::new())).collect();
        };
        assert_eq!(refused(many), "47 tags are too many");
    }

    #[test]
    fn a_key_is_one_of_its_region() {
        let arn = "arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab";
        let request = Request { encryption: Some(keyed(arn)), ..request() };
        assert_eq!(kms_key(&request, "eu-west-1"), Some(arn));
        key_fits(&request, "eu-west-1").unwrap();
        key_fits(&request, "us-east-1").unwrap_err();
        assert_eq!(encryption(&request, "eu-west-1").as_deref(), Some(arn));
        let default = Request { encryption: Some(Encryption::default()), ..request };
        assert_eq!((kms_key(&default, "x"), encryption(&default, "x").as_deref()), (None, Some("default")));
        let none = Request { encryption: None, ..default };
        assert_eq!((kms_key(&none, "x"), encryption(&none, "x")), (None, None));
    }

    #[test]
    fn a_snapshots_own_tags_win_and_tell_its_encryption() {
        let mut request = Request { encryption: Some(keyed("alias/mine")), ..request() };
        request.tags =
            [("team", "web"), ("use", "image")].map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        request.snapshot_tags.insert("use".to_owned(), "snapshot".to_owned());
        let pairs = snapshot_tag_pairs(&request, "eu-west-1");
        let value = |wanted: &str| pairs.iter().find(|(key, _)| key == wanted).map(|(_, value)| value.as_str());
        assert_eq!([value("team"), value("use")], [Some("web"), Some("snapshot")]);
        assert_eq!([value(NAME_TAG), value(ENCRYPTION_TAG)], [Some("web"), Some("alias/mine")]);
        assert!(tag_pairs(&request).contains(&("use".to_owned(), "image".to_owned())));
    }

    #[test]
    fn images_that_differ_in_more_than_their_name_have_other_settings() {
        let settings = |change: &dyn Fn(&mut Request)| {
            let mut request = request();
            change(&mut request);
            settings(&request, "eu-west-1")
        };
        let same = settings(&|_| ());
        // What earlier kilns have written, whose images are found by it.
        assert_eq!(same, "f47e41d9093cced8");
        assert_eq!(settings(&|r| (r.image_name, r.name_varies, r.parallel) = ("other".to_owned(), true, 9)), same);
        // The root volume is as large as the disk anyway; `{date}` is not filled in.
        assert_eq!(settings(&|r| (r.root.size, r.description) = (Some(4), "2026".to_owned())), same);
        let elsewhere =
            Encryption { kms_keys: [("us-east-1".to_owned(), "alias/a".to_owned())].into(), ..Encryption::default() };
        let changes: [&dyn Fn(&mut Request); 22] = [
            &|r| r.digest.push('0'),
            &|r| r.name.push('2'),
            &|r| r.undated.description.push('x'),
            &|r| r.arch = Architecture::Arm64,
            &|r| r.boot_mode = BootMode::Uefi,
            &|r| r.imds_v2 = false,
            &|r| r.root_device.push('1'),
            &|r| r.root.volume_type = VolumeType::Gp2,
            &|r| drop(r.undated.tags.insert("team".to_owned(), "web".to_owned())),
            &|r| drop(r.undated.snapshot_tags.insert("team".to_owned(), "web".to_owned())),
            &|r| r.root.size = Some(5),
            &|r| r.root.iops = Some(4000),
            &|r| r.root.throughput = Some(200),
            &|r| r.root.delete_on_termination = false,
            &|r| r.volumes = vec![added("/dev/sdf", io2(100))],
            &|r| r.tpm = true,
            &|r| r.uefi_data = Some("QQ==".to_owned()),
            &|r| r.sriov = true,
            &|r| r.ena = false,
            &|r| r.encryption = Some(elsewhere.clone()),
            &|r| r.encryption = Some(keyed("alias/a")),
            &|r| r.omit_holes = Some(holes()),
        ];
        let mut all: Vec<_> = changes.iter().map(|change| settings(change)).chain([same]).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), changes.len() + 1);
    }

    #[test]
    fn the_key_has_prefix_name_and_the_digests_start_and_is_the_same_for_every_run() {
        let digest = "0123456789abcdef0123456789abcdef";
        let request = Request { digest: digest.repeat(2), ..request() };
        let target = |run: &str| target(&request, "eu-west-1", run.to_owned(), true).unwrap();
        assert_eq!(target("r").key, format!("kiln/web-{digest}.raw"));
        assert_eq!(target("r").key, target("s").key);
        let stem = |prefix: &str| key_stem(&Request { prefix: prefix.to_owned(), ..request.clone() });
        assert_eq!(stem(""), format!("web-{digest}"));
        assert_eq!(stem("/a/b//"), format!("a/b/web-{digest}"));
    }

    #[test]
    fn another_encryption_or_format_is_another_object() {
        let key = |format, encryption| {
            let object = ObjectOptions { format, encryption, keep: false };
            target(&Request { object, ..request() }, "eu-west-1", String::new(), true).unwrap().key
        };
        let kms = |key: Option<&str>| Some(ObjectEncryption::Kms { key: key.map(str::to_owned) });
        let ways = [None, Some(ObjectEncryption::S3), kms(None), kms(Some("alias/a")), kms(Some("alias/b"))];
        let mut keys: Vec<_> = [DiskFormat::Raw, DiskFormat::Vmdk]
            .into_iter()
            .flat_map(|format| ways.clone().map(|encryption| key(format, encryption)))
            .collect();
        assert!(keys.iter().all(|key| key.starts_with(&key_stem(&request()))), "{keys:?}");
        let ends = [&keys[0], &keys[5]].map(|key| key.rsplit('.').next());
        assert_eq!(ends, [Some("raw"), Some("vmdk")]);
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 10);
    }

    #[test]
    fn a_regions_partition_is_told_by_its_name() {
        let regions = ["eu-west-1", "us-east-1", "cn-north-1", "us-gov-west-1"];
        assert_eq!(regions.map(partition), ["aws", "aws", "aws-cn", "aws-us-gov"]);
    }

    #[test]
    fn no_bucket_is_an_error_that_says_where_to_name_it() {
        let mut request = request();
        request.bucket = None;
        let error = target(&request, "eu-west-1", String::new(), true).unwrap_err();
        assert_eq!((error.exit, error.message.as_str()), (Exit::Input, "no bucket to upload the disk to"));
        assert!(error.help.unwrap().contains("eu-west-1"));
    }

    #[test]
    fn on_arm_the_preferred_uefi_is_the_only_one() {
        let mut request = request();
        assert_eq!(boot_mode(&request), BootMode::UefiPreferred);
        request.arch = Architecture::Arm64;
        assert_eq!(boot_mode(&request), BootMode::Uefi);
    }
}
