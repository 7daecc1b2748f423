//! AWS's rules about what a request may say, checked before the first byte is sent. Pure.

use super::{Architecture, BootMode, DEFAULT_ROLE, Request, Target};
use crate::error::{Error, Exit};

/// The largest volume that EBS has, in GiB.
const LARGEST: u64 = 64 << 10;
const TAGS: usize = 50;
/// Tags that kiln itself sets.
const OWN_TAGS: usize = 4;

/// Whether the request can be carried out at all, as far as that shows without a connection.
pub(super) fn check(request: &Request) -> Result<(), Error> {
    image_name(&request.image_name)?;
    description(&request.description)?;
    if request.size == 0 || request.size > LARGEST {
        return Err(input(format!("a disk of {} GiB can't be published", request.size))
            .help("EBS volumes have 1 GiB to 64 TiB"));
    }
    if request.arch == Architecture::Arm64 && request.boot_mode == BootMode::LegacyBios {
        return Err(input("arm64 instances don't boot by `legacy-bios`").help("set boot_mode = \"uefi\" in [publish]"));
    }
    if !request.root_device.starts_with("/dev/") {
        return Err(
            input(format!("`{}` is not a root device", request.root_device)).help("use `/dev/xvda` or `/dev/sda1`")
        );
    }
    tags(request)
}

/// Settles where everything goes.
pub(super) fn target(request: &Request, region: &str) -> Result<Target, Error> {
    let bucket = request.bucket.clone().filter(|bucket| !bucket.is_empty()).ok_or_else(|| {
        input("no bucket to upload the disk to")
            .help(format!("name one that is in {region}, with --bucket or as `bucket` in the recipe's [publish]"))
    })?;
    Ok(Target {
        region: region.to_owned(),
        key: key(&request.prefix, &request.name, &request.digest),
        bucket,
        role: request.role.clone().unwrap_or_else(|| DEFAULT_ROLE.to_owned()),
        image_name: request.image_name.clone(),
    })
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
    pairs.insert("kiln:digest".to_owned(), request.digest.clone());
    pairs.insert("kiln:name".to_owned(), request.name.clone());
    pairs.into_iter().collect()
}

fn key(prefix: &str, name: &str, digest: &str) -> String {
    let short: String = digest.chars().take(16).collect();
    match prefix.trim_matches('/') {
        "" => format!("{name}-{short}.raw"),
        prefix => format!("{prefix}/{name}-{short}.raw"),
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

fn description(text: &str) -> Result<(), Error> {
    let length = text.chars().count();
    if length > 255 {
        return Err(input(format!("the image's description has {length} characters")).help("AWS takes up to 255"));
    }
    // AWS refuses anything else in RegisterImage, and says so only after the import.
    match text.chars().find(|c| !c.is_ascii() || c.is_ascii_control()) {
        Some(wrong) => Err(input(format!("the image's description has a `{}`", wrong.escape_default()))
            .help("AWS takes only printable ASCII characters there")),
        None => Ok(()),
    }
}

fn tags(request: &Request) -> Result<(), Error> {
    if request.tags.len() + OWN_TAGS > TAGS {
        return Err(input(format!("{} tags are too many", request.tags.len()))
            .help(format!("AWS takes {TAGS}, and kiln sets {OWN_TAGS} itself")));
    }
    for (key, value) in &request.tags {
        let wrong = if key.is_empty() || key.chars().count() > 128 {
            "AWS takes 1 to 128 characters in a tag's key"
        } else if value.chars().count() > 256 {
            "AWS takes up to 256 characters in a tag's value"
        } else if key.to_ascii_lowercase().starts_with("aws:") {
            "keys that start with `aws:` are AWS's own"
        } else if key.starts_with("kiln:") {
            "keys that start with `kiln:` are kiln's own"
        } else {
            continue;
        };
        return Err(input(format!("the tag `{key}` can't be set")).help(wrong));
    }
    Ok(())
}

fn input(message: impl Into<String>) -> Error {
    Error::new(Exit::Input, message)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;

    fn request() -> Request {
        Request {
            disk: PathBuf::from("disk.raw"),
            size: 4,
            digest: "0123456789abcdef0123456789abcdef".to_owned(),
            name: "web".to_owned(),
            image_name: "web-2026".to_owned(),
            description: String::new(),
            arch: Architecture::X86_64,
            region: None,
            bucket: Some("images".to_owned()),
            prefix: "kiln/".to_owned(),
            boot_mode: BootMode::UefiPreferred,
            imds_v2: true,
            root_device: "/dev/xvda".to_owned(),
            tags: BTreeMap::new(),
            role: None,
            parallel: 4,
            poll: Duration::from_secs(15),
            dry_run: false,
            timeout: Duration::from_hours(1),
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
        assert_eq!(refused(|r| r.description = "x".repeat(256)), "the image's description has 256 characters");
        assert_eq!(refused(|r| r.description = "naïve".to_owned()), "the image's description has a `\\u{ef}`");
        assert_eq!(refused(|r| r.size = 0), "a disk of 0 GiB can't be published");
        assert_eq!(refused(|r| r.root_device = "xvda".to_owned()), "`xvda` is not a root device");
        let arm = refused(|r| (r.arch, r.boot_mode) = (Architecture::Arm64, BootMode::LegacyBios));
        assert_eq!(arm, "arm64 instances don't boot by `legacy-bios`");
    }

    #[test]
    fn tags_keep_aws_rules_and_kilns_names() {
        let with = |key: &str, value: String| {
            refused(|r| {
                r.tags.insert(key.to_owned(), value);
            })
        };
        assert_eq!(with("aws:x", String::new()), "the tag `aws:x` can't be set");
        assert_eq!(with("kiln:digest", String::new()), "the tag `kiln:digest` can't be set");
        assert_eq!(with("", String::new()), "the tag `` can't be set");
        assert_eq!(with("k", "v".repeat(257)), "the tag `k` can't be set");
        assert_eq!(
            refused(|r| r.tags = (0..47).map(|n| (n.to_string(), String::new())).collect()),
            "47 tags are too many"
        );
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
    fn the_key_has_prefix_name_and_the_digests_start() {
        assert_eq!(target(&request(), "eu-west-1").unwrap().key, "kiln/web-0123456789abcdef.raw");
        assert_eq!(key("", "web", "ab"), "web-ab.raw");
        assert_eq!(key("/a/b//", "web", "ab"), "a/b/web-ab.raw");
    }

    #[test]
    fn no_bucket_is_an_error_that_says_where_to_name_it() {
        let mut request = request();
        request.bucket = None;
        let error = target(&request, "eu-west-1").unwrap_err();
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
