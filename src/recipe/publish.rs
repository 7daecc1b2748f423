//! The `[publish]` table.

use std::collections::BTreeMap;
use std::ops::Range;

use super::reader::{Fields, Found};
use super::{Arch, Base, aws, image_name, words};

/// How the image is published. Nothing is needed to build.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Publish {
    /// A template for the AMI's name; see [`super::name_parts`].
    pub image_name: Option<String>,
    /// Of the value of `image_name`.
    pub image_name_span: Option<Range<usize>>,
    /// The AMI's description, at most 255 characters.
    pub description: Option<String>,
    /// Where it is published, in order, each once.
    pub regions: Vec<String>,
    /// Of the value of `regions`.
    pub regions_span: Option<Range<usize>>,
    /// The bucket for the import.
    pub bucket: Option<String>,
    /// Of the value of `bucket`.
    pub bucket_span: Option<Range<usize>>,
    /// What keys in the bucket start with.
    pub prefix: Option<String>,
    /// How instances boot; none: as the disk can.
    pub boot_mode: Option<BootMode>,
    /// Of the value of `boot_mode`.
    pub boot_mode_span: Option<Range<usize>>,
    /// What instances may use of the metadata service; none: [`Imds::V2`].
    pub imds: Option<Imds>,
    /// The root volume's type.
    pub volume_type: VolumeType,
    /// The root device's name; none: `/dev/xvda`.
    pub root_device: Option<String>,
    /// Tags for everything that is created.
    pub tags: BTreeMap<String, String>,
    /// The name of the role that imports; none: `vmimport`.
    pub role: Option<String>,
    /// How the disk becomes a snapshot.
    pub via: Via,
    /// As which bytes the disk is uploaded.
    pub disk_format: DiskFormat,
    /// How S3 encrypts the upload; none: as the bucket has it.
    pub sse: Option<Sse>,
    /// The KMS key for that; none: the account's own for S3.
    pub sse_kms_key: Option<String>,
    /// The uploaded object stays when it is imported.
    pub keep_object: bool,
    /// Of the table's header.
    pub span: Option<Range<usize>>,
}

words! {
    /// How instances boot.
    BootMode {
        /// BIOS.
        LegacyBios = "legacy-bios",
        /// UEFI.
        Uefi = "uefi",
        /// UEFI where the instance type has it, else BIOS.
        UefiPreferred = "uefi-preferred",
    }
}

words! {
    /// What of the metadata service instances may use.
    #[derive(Default)]
    Imds {
        /// Only sessions with a token. Cannot be undone on a published image.
        #[default]
        V2 = "v2.0",
        /// Requests without a token too.
        V1 = "v1.0",
    }
}

words! {
    /// The type of the root volume.
    #[derive(Default)]
    VolumeType {
        /// General purpose, third generation.
        #[default]
        Gp3 = "gp3",
        /// General purpose, second generation.
        Gp2 = "gp2",
        /// Magnetic.
        Standard = "standard",
    }
}

words! {
    /// How the disk becomes a snapshot.
    #[derive(Default)]
    Via {
        /// Uploaded to a bucket, and imported from there.
        #[default]
        S3 = "s3",
        /// Written block by block (EBS direct).
        Ebs = "ebs",
    }
}

words! {
    /// As which bytes a disk is uploaded.
    #[derive(Default)]
    DiskFormat {
        /// As it is.
        #[default]
        Raw = "raw",
        /// Compressed, as a stream-optimised VMDK.
        Vmdk = "vmdk",
    }
}

words! {
    /// How S3 encrypts an object, in S3's own words.
    Sse {
        /// With a key of S3's own.
        Aes256 = "AES256",
        /// With a key of KMS.
        Kms = "aws:kms",
    }
}

const KNOWN: [&str; 16] = [
    "image_name",
    "description",
    "regions",
    "bucket",
    "prefix",
    "boot_mode",
    "imds",
    "volume_type",
    "root_device",
    "tags",
    "role",
    "via",
    "disk_format",
    "sse",
    "sse_kms_key",
    "keep_object",
];

/// Reads `[publish]`; `name` is the recipe's.
pub(super) fn read(top: &Fields<'_>, name: &str, base: Option<&Base>) -> Publish {
    let mut publish = Publish::default();
    let Some(fields) = top.table("publish", "[publish]", &KNOWN) else { return publish };
    publish.span = Some(fields.origin.span.clone());
    (publish.image_name, publish.image_name_span) = split(image_name(&fields, name));
    publish.description =
        checked(&fields, "description", |text| aws::description(text).map_err(told)).map(|found| found.value);
    regions(&fields, &mut publish);
    (publish.bucket, publish.bucket_span) = split(checked(&fields, "bucket", |text| aws::bucket(text).map_err(told)));
    publish.prefix = checked(&fields, "prefix", prefix).map(|found| found.value);
    (publish.boot_mode, publish.boot_mode_span) = split(boot_mode(&fields, base));
    publish.imds = fields.word("imds").map(|found| found.value);
    publish.volume_type = fields.word("volume_type").map(|found| found.value).unwrap_or_default();
    publish.root_device = checked(&fields, "root_device", root_device).map(|found| found.value);
    publish.role = checked(&fields, "role", role).map(|found| found.value);
    publish.via = fields.word("via").map(|found| found.value).unwrap_or_default();
    upload(&fields, &mut publish);
    publish.tags = fields.map("tags", |key, value| aws::tag(key, value).map_err(told));
    if let Err(refused) = aws::tag_count(&publish.tags)
        && let Some(entry) = fields.entry("tags")
    {
        let (message, help) = told(refused);
        fields.reader.refuse(&entry.key_origin, message, help);
    }
    publish
}

/// How the disk is an object.
fn upload(fields: &Fields<'_>, publish: &mut Publish) {
    publish.disk_format = fields.word("disk_format").map(|found| found.value).unwrap_or_default();
    publish.sse = fields.word("sse").map(|found| found.value);
    publish.sse_kms_key = fields.filled("sse_kms_key").map(|found| found.value);
    publish.keep_object = fields.boolean("keep_object").is_some_and(|found| found.value);
    if publish.sse_kms_key.is_some()
        && publish.sse != Some(Sse::Kms)
        && let Some(entry) = fields.entry("sse_kms_key")
    {
        let help = Some("write `sse = \"aws:kms\"` as well".to_owned());
        fields.reader.refuse(&entry.key_origin, "`sse_kms_key` is of use only with KMS", help);
    }
}

type Refusal = (String, Option<String>);

fn refusal(message: impl Into<String>, help: &str) -> Refusal {
    (message.into(), Some(help.to_owned()))
}

fn told(refused: aws::Refusal) -> Refusal {
    (refused.message, Some(refused.help))
}

fn split<T>(found: Option<Found<T>>) -> (Option<T>, Option<Range<usize>>) {
    found.map(|found| (found.value, found.origin.span)).unzip()
}

/// Text that `check` lets pass.
fn checked(fields: &Fields<'_>, key: &str, check: impl Fn(&str) -> Result<(), Refusal>) -> Option<Found<String>> {
    let found = fields.filled(key)?;
    match check(&found.value) {
        Ok(()) => Some(found),
        Err((message, help)) => {
            fields.reader.refuse(&found.origin, message, help);
            None
        }
    }
}

fn image_name(fields: &Fields<'_>, name: &str) -> Option<Found<String>> {
    checked(fields, "image_name", |template| {
        image_name::check(template, name).map_err(|error| (error.message, error.help))
    })
}

fn regions(fields: &Fields<'_>, publish: &mut Publish) {
    let Some(node) = fields.node("regions") else { return };
    publish.regions_span = Some(node.origin.span.clone());
    for found in fields.texts("regions").unwrap_or_default() {
        match region(&found.value) {
            Err((message, help)) => fields.reader.refuse(&found.origin, message, help),
            Ok(()) if publish.regions.contains(&found.value) => {
                fields.reader.refuse(&found.origin, format!("`{}` is there twice", found.value), None);
            }
            Ok(()) => publish.regions.push(found.value),
        }
    }
}

fn region(text: &str) -> Result<(), Refusal> {
    let parts: Vec<_> = text.split('-').collect();
    let letters = |part: &&str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_lowercase());
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let shaped = |parts: &[&str]| matches!(parts, [words @ .., number] if words.len() >= 2 && words.iter().all(letters) && digits(number));
    if shaped(&parts) {
        return Ok(());
    }
    let message = format!("`{text}` is not a region");
    let zone = text.trim_end_matches(|c: char| c.is_ascii_lowercase());
    if zone.len() + 1 == text.len() && shaped(&zone.split('-').collect::<Vec<_>>()) {
        return Err(refusal(message, &format!("it is a zone of `{zone}`")));
    }
    Err(refusal(message, "regions are written like `eu-central-1`"))
}

fn prefix(text: &str) -> Result<(), Refusal> {
    if text.starts_with('/') {
        let help = format!("write `prefix = \"{}\"`", text.trim_start_matches('/'));
        return Err(refusal("`prefix` can't start with `/`", &help));
    }
    if text.len() > 512 || text.chars().any(char::is_control) {
        return Err(refusal("`prefix` can't be used", "use at most 512 bytes, none of them control characters"));
    }
    Ok(())
}

fn boot_mode(fields: &Fields<'_>, base: Option<&Base>) -> Option<Found<BootMode>> {
    let found = fields.word("boot_mode")?;
    if found.value != BootMode::Uefi && base.is_some_and(|base| base.arch == Arch::Aarch64) {
        let message = format!("an aarch64 image can't boot as `{}`", found.value);
        fields.reader.refuse(&found.origin, message, Some("write `boot_mode = \"uefi\"`".to_owned()));
        return None;
    }
    Some(found)
}

fn root_device(text: &str) -> Result<(), Refusal> {
    let rest = text.strip_prefix("/dev/xvd").or_else(|| text.strip_prefix("/dev/sd")).unwrap_or_default();
    let fits = rest.starts_with(|c: char| c.is_ascii_lowercase())
        && rest.len() <= 3
        && rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    if fits {
        return Ok(());
    }
    Err(refusal(
        format!("`{text}` can't be a root device"),
        "AWS takes names like `/dev/xvda` and `/dev/sda1`, whatever the guest calls it",
    ))
}

fn role(text: &str) -> Result<(), Refusal> {
    if text.starts_with("arn:") {
        let name = text.rsplit('/').next().unwrap_or_default();
        return Err(refusal("`role` wants a name, not an ARN", &format!("write `role = \"{name}\"`")));
    }
    let taken = |c: char| c.is_ascii_alphanumeric() || "+=,.@_-".contains(c);
    if text.len() > 64 || !text.chars().all(taken) {
        return Err(refusal(
            format!("`{text}` can't be a role"),
            "roles have at most 64 letters, digits and `+=,.@_-`",
        ));
    }
    Ok(())
}
