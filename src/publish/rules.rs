//! AWS's rules about what a request may say, checked before the first byte is sent. Pure.

use sha2::{Digest as _, Sha256};

use super::{Architecture, BootMode, DEFAULT_ROLE, Encryption, Request, Target, Via};
use crate::error::{Error, Exit};
use crate::recipe::Sse;
use crate::recipe::aws::{self, Refusal};
use crate::units::hex;

/// The tag with the disk's digest.
pub(super) const DIGEST_TAG: &str = "kiln:digest";
/// The tag with the recipe's name.
pub(super) const NAME_TAG: &str = "kiln:name";
/// The tag that images have alike which are alike but for their names.
pub(super) const SETTINGS_TAG: &str = "kiln:settings";
/// In GiB. S3 takes 10,000 parts of 5 GiB in an object, which is less than the largest volume.
const LARGEST_OBJECT: u64 = 50_000;
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
        Via::S3 => (LARGEST_OBJECT, "S3 takes no larger object"),
        Via::Ebs => (LARGEST_SNAPSHOT, "there are no larger snapshots"),
    };
    if request.size == 0 || request.size > largest {
        return Err(input(format!("a disk of {} GiB can't be published", request.size))
            .help(format!("it must have 1 to {largest} GiB: {why}")));
    }
    if request.arch == Architecture::Arm64 && request.boot_mode == BootMode::LegacyBios {
        return Err(input("arm64 instances don't boot by `legacy-bios`").help("set boot_mode = \"uefi\" in [publish]"));
    }
    if !request.root_device.starts_with("/dev/") {
        return Err(
            input(format!("`{}` is not a root device", request.root_device)).help("use `/dev/xvda` or `/dev/sda1`")
        );
    }
    aws::tag_count(&request.tags).map_err(refused)?;
    request.tags.iter().try_for_each(|(key, value)| aws::tag(key, value)).map_err(refused)
}

/// Settles where everything goes; `run` is of this run only.
pub(super) fn target(request: &Request, region: &str, run: String) -> Result<Target, Error> {
    let bucket = match (bucket(request), request.via) {
        (Some(bucket), _) => bucket,
        (None, Via::Ebs) => "",
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

fn bucket(request: &Request) -> Option<&str> {
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
    pairs.into_iter().collect()
}

/// Everything that an image is registered with but its name, in 16 hexadecimal digits.
pub(super) fn settings(request: &Request) -> String {
    let Request { digest, name, description, arch, size, imds_v2, root_device, volume_type, tags, .. } = request;
    let mode = boot_mode(request);
    let all = serde_json::json!([digest, name, description, arch, size, mode, imds_v2, root_device, volume_type, tags]);
    hex(&Sha256::digest(all.to_string()))[..16].to_owned()
}

/// The key of the disk's object. Encrypted in another way it is another object, and so is another format.
fn object_key(request: &Request) -> String {
    let how = match &request.object.encryption {
        None => String::new(),
        Some(encryption) => {
            let (sse, key) = match encryption {
                Encryption::S3 => (Sse::Aes256, None),
                Encryption::Kms { key } => (Sse::Kms, key.as_deref()),
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
    match request.prefix.trim_matches('/') {
        "" => format!("{}-{short}", request.name),
        prefix => format!("{prefix}/{}-{short}", request.name),
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
    use std::collections::BTreeMap;
    use std::path::PathBuf;
    use std::time::Duration;

    use super::super::ObjectOptions;
    use super::*;
    use crate::recipe::DiskFormat;

    fn request() -> Request {
        Request {
            disk: PathBuf::from("disk.raw"),
            size: 4,
            digest: "0123456789abcdef0123456789abcdef".to_owned(),
            name: "web".to_owned(),
            image_name: "web-2026".to_owned(),
            name_varies: false,
            description: String::new(),
            arch: Architecture::X86_64,
            region: None,
            bucket: Some("images".to_owned()),
            prefix: "kiln/".to_owned(),
            boot_mode: BootMode::UefiPreferred,
            imds_v2: true,
            root_device: "/dev/xvda".to_owned(),
            volume_type: "gp3".to_owned(),
            tags: BTreeMap::new(),
            role: None,
            parallel: 4,
            poll: Duration::from_secs(15),
            dry_run: false,
            timeout: Duration::from_hours(1),
            via: Via::S3,
            block_map: PathBuf::from("blocks"),
            store: None,
            object: ObjectOptions::default(),
        }
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
        assert_eq!(refused(|r| r.root_device = "xvda".to_owned()), "`xvda` is not a root device");
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

    #[test]
    fn images_that_differ_in_more_than_their_name_have_other_settings() {
        let settings = |change: &dyn Fn(&mut Request)| {
            let mut request = request();
            change(&mut request);
            settings(&request)
        };
        let same = settings(&|_| ());
        assert_eq!(same.len(), 16);
        assert_eq!(settings(&|r| (r.image_name, r.name_varies, r.parallel) = ("other".to_owned(), true, 9)), same);
        let changes: [&dyn Fn(&mut Request); 9] = [
            &|r| r.digest.push('0'),
            &|r| r.name.push('2'),
            &|r| r.description.push('x'),
            &|r| r.arch = Architecture::Arm64,
            &|r| r.boot_mode = BootMode::Uefi,
            &|r| r.imds_v2 = false,
            &|r| r.root_device.push('1'),
            &|r| "gp2".clone_into(&mut r.volume_type),
            &|r| drop(r.tags.insert("team".to_owned(), "web".to_owned())),
        ];
        let mut all: Vec<_> = changes.iter().map(|change| settings(change)).chain([same]).collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 10);
    }

    #[test]
    fn the_key_has_prefix_name_and_the_digests_start_and_is_the_same_for_every_run() {
        let digest = "0123456789abcdef0123456789abcdef";
        let request = Request { digest: digest.repeat(2), ..request() };
        let target = |run: &str| target(&request, "eu-west-1", run.to_owned()).unwrap();
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
            target(&Request { object, ..request() }, "eu-west-1", String::new()).unwrap().key
        };
        let kms = |key: Option<&str>| Some(Encryption::Kms { key: key.map(str::to_owned) });
        let ways = [None, Some(Encryption::S3), kms(None), kms(Some("alias/a")), kms(Some("alias/b"))];
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
        let error = target(&request, "eu-west-1", String::new()).unwrap_err();
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
