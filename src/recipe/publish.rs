//! The `[publish]` table.

mod encrypted;
mod volumes;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::PathBuf;

use serde::Serialize;

use super::encryption::Encryption;
use super::reader::{Fields, Found};
use super::release::{self, Release};
use super::template::{self, Meanings, TemplateError};
use super::volume::{self, Ebs, EbsSpans, Volume};
use super::{Arch, Base, Disk, aws, words};

/// How the image is published. Nothing is needed to build.
#[expect(clippy::struct_excessive_bools, reason = "each is a key of the table")]
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Publish {
    /// A template for the AMI's name; see [`super::name_parts`].
    pub image_name: Option<String>,
    /// Of the value of `image_name`.
    pub image_name_span: Option<Range<usize>>,
    /// A template for the AMI's description, which has at most 255 characters; see [`super::text_parts`].
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
    /// Whether instances have a TPM 2.0; then they boot by UEFI only.
    pub tpm: bool,
    /// A file with the UEFI variables that instances start with, relative to [`super::Recipe::dir`] unless absolute.
    pub uefi_data: Option<PathBuf>,
    /// Of the value of `uefi_data`.
    pub uefi_data_span: Option<Range<usize>>,
    /// Whether the image says that it has the driver of the Intel 82599 network card (SR-IOV).
    pub sriov: bool,
    /// Whether the image says that it has the driver of the ENA network card; none: it does.
    pub ena: Option<bool>,
    /// The root volume.
    pub root: Ebs,
    /// Where its settings are.
    pub root_spans: EbsSpans,
    /// The root device's name; none: [`DEFAULT_ROOT_DEVICE`].
    pub root_device: Option<String>,
    /// The other volumes of instances.
    pub volumes: Vec<Volume>,
    /// How snapshots are encrypted; none: as the account's settings want it.
    pub encryption: Option<Encryption>,
    /// Tags for image and snapshots: templates of their values.
    pub tags: BTreeMap<String, String>,
    /// More tags for snapshots; they win over `tags`.
    pub snapshot_tags: BTreeMap<String, String>,
    /// The name of the role that imports; none: `vmimport`.
    pub role: Option<String>,
    /// How the disk becomes a snapshot.
    pub via: Via,
    /// Holes are left out of encrypted snapshots too.
    pub omit_holes: bool,
    /// What is done with the image once it is there.
    pub release: Release,
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

/// The root device, unless another is named.
pub const DEFAULT_ROOT_DEVICE: &str = "/dev/xvda";

words! {
    /// How instances boot.
    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
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
    /// The trusted platform module of instances.
    Tpm {
        /// Version 2.0 (`NitroTPM`).
        V2 = "v2.0",
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
        /// Block by block where that is permitted, else through the bucket.
        Auto = "auto",
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

const KNOWN: [&str; 35] = [
    "image_name",
    "description",
    "regions",
    "bucket",
    "prefix",
    "boot_mode",
    "imds",
    "tpm",
    "uefi_data",
    "sriov",
    "ena",
    "volume_type",
    "volume_size",
    "iops",
    "throughput",
    "delete_on_termination",
    "root_device",
    "volume",
    "encrypted",
    "kms_key",
    "kms_keys",
    "tags",
    "snapshot_tags",
    "role",
    "via",
    "omit_holes",
    "share",
    "share_snapshots",
    "deprecate_after",
    "protection",
    "parameter",
    "disk_format",
    "sse",
    "sse_kms_key",
    "keep_object",
];

/// Reads `[publish]`; `name` is the recipe's.
pub(super) fn read(top: &Fields<'_>, name: &str, base: Option<&Base>, disk: &Disk) -> Publish {
    let mut publish = Publish::default();
    let Some(fields) = top.table("publish", "[publish]", &KNOWN) else { return publish };
    publish.span = Some(fields.origin.span.clone());
    (publish.image_name, publish.image_name_span) = split(image_name(&fields, name));
    publish.description = checked(&fields, "description", |text| aws::description(&filled(text, name)?).map_err(told))
        .map(|found| found.value);
    regions(&fields, &mut publish);
    (publish.bucket, publish.bucket_span) = split(checked(&fields, "bucket", |text| aws::bucket(text).map_err(told)));
    publish.prefix = checked(&fields, "prefix", prefix).map(|found| found.value);
    (publish.boot_mode, publish.boot_mode_span) = split(boot_mode(&fields, base));
    publish.imds = fields.word("imds").map(|found| found.value);
    firmware(&fields, base, &mut publish);
    publish.sriov = fields.boolean("sriov").is_some_and(|found| found.value);
    publish.ena = fields.boolean("ena").map(|found| found.value);
    (publish.root, publish.root_spans) = volumes::root(&fields, disk.size);
    let root_device = checked(&fields, "root_device", |text| volume::root_device(text).map_err(told));
    publish.root_device = root_device.map(|found| found.value);
    publish.volumes = volumes::others(&fields, publish.root_device.as_deref().unwrap_or(DEFAULT_ROOT_DEVICE));
    publish.role = checked(&fields, "role", role).map(|found| found.value);
    publish.via = fields.word("via").map(|found| found.value).unwrap_or_default();
    publish.omit_holes = omit_holes(&fields, publish.via);
    upload(&fields, &mut publish);
    publish.release = release::read(&fields);
    publish.encryption = encrypted::read(&fields, &publish.regions, publish.via);
    tags(&fields, name, &mut publish);
    publish
}

fn omit_holes(fields: &Fields<'_>, via: Via) -> bool {
    let Some(found) = fields.boolean("omit_holes").filter(|found| found.value) else { return false };
    if via == Via::S3 {
        let help = Some("write `via = \"ebs\"` or `via = \"auto\"` as well".to_owned());
        fields.reader.refuse(&found.origin, "`omit_holes` is of use only with EBS direct", help);
    }
    true
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

/// What is wrong, and what helps.
pub type Refusal = (String, Option<String>);

pub(super) fn refusal(message: impl Into<String>, help: &str) -> Refusal {
    (message.into(), Some(help.to_owned()))
}

fn wrong(error: TemplateError) -> Refusal {
    (error.message, Some(error.help))
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
    checked(fields, "image_name", |template| template::check_image_name(template, name).map_err(wrong))
}

/// The shortest text that a template can become.
fn filled(template: &str, name: &str) -> Result<String, Refusal> {
    let parts = template::text_parts(template).map_err(|mut error| {
        error.help.push_str(" (a `{` itself is written `{{`)");
        wrong(error)
    })?;
    Ok(Meanings::shortest(name).fill(&parts))
}

fn tags(fields: &Fields<'_>, name: &str, publish: &mut Publish) {
    let tag = |key: &str, value: &str| aws::tag(key, &filled(value, name)?).map_err(told);
    publish.tags = fields.map("tags", tag);
    publish.snapshot_tags = fields.map("snapshot_tags", tag);
    let of_choice = usize::from(publish.encryption.is_some()) + usize::from(publish.omit_holes);
    let snapshots = publish.tags.keys().chain(publish.snapshot_tags.keys()).collect::<BTreeSet<_>>().len();
    for (key, count) in [("tags", publish.tags.len()), ("snapshot_tags", snapshots)] {
        if let Err(refused) = aws::tag_count(count, of_choice)
            && let Some(entry) = fields.entry(key)
        {
            let (message, help) = told(refused);
            fields.reader.refuse(&entry.key_origin, message, help);
        }
    }
}

/// What works only with UEFI. Without a boot mode the disk decides: on x86 that may be both.
fn firmware(fields: &Fields<'_>, base: Option<&Base>, publish: &mut Publish) {
    let arm = base.is_some_and(|base| base.arch == Arch::Aarch64);
    if let Some(found) = fields.word::<Tpm>("tpm") {
        publish.tpm = true;
        let refusal = match publish.boot_mode {
            None if arm => None,
            None => Some(refusal("`tpm` needs a `boot_mode`", "AWS takes it only with boot_mode = \"uefi\"")),
            Some(mode) => aws::tpm(mode).err().map(told),
        };
        if let Some((message, help)) = refusal {
            fields.reader.refuse(&found.origin, message, help);
        }
    }
    if let Some(found) = fields.filled("uefi_data") {
        if let Some(Err(refused)) = publish.boot_mode.map(aws::uefi_data) {
            fields.reader.refuse(&found.origin, refused.message, Some(refused.help));
        }
        (publish.uefi_data, publish.uefi_data_span) = (Some(PathBuf::from(found.value)), Some(found.origin.span));
    }
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
