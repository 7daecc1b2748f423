//! What a publish is asked for.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::parent::Parents;
use crate::recipe::{BootMode, DiskFormat, Ebs, Encryption, Release, Via, Volume};
use crate::store::{Identity, Store};

/// What the image's instances run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Architecture {
    /// Intel and AMD, 64 bit.
    #[serde(rename = "x86_64")]
    X86_64,
    /// Graviton.
    #[serde(rename = "arm64")]
    Arm64,
}

/// How S3 encrypts an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectEncryption {
    /// With a key of S3's own (SSE-S3).
    S3,
    /// With a key of KMS (SSE-KMS).
    Kms {
        /// Its id, ARN or alias; none: the account's own for S3, `alias/aws/s3`.
        key: Option<String>,
    },
}

/// How the disk is an object in a bucket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ObjectOptions {
    /// As which bytes.
    pub format: DiskFormat,
    /// How it is encrypted; none: as the bucket has it.
    pub encryption: Option<ObjectEncryption>,
    /// It stays when it is imported.
    pub keep: bool,
}

/// What to publish, and where to.
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
#[derive(Debug, Clone)]
pub struct Request {
    /// The raw disk. It is only read.
    pub disk: PathBuf,
    /// What it was when it was compared with its block map; none: only that it changes while it is published is noticed.
    pub compared: Option<Identity>,
    /// Its size in GiB.
    pub size: u64,
    /// Its digest in hex, as the manifest has it.
    pub digest: String,
    /// The recipe's name.
    pub name: String,
    /// The image's name, placeholders filled in.
    pub image_name: String,
    /// The name has the time in it, so that every publish would have another.
    pub name_varies: bool,
    /// Words about the image, placeholders filled in; may be empty.
    pub description: String,
    /// What its instances run on.
    pub arch: Architecture,
    /// The regions; without one, the SDK's usual places are asked.
    pub regions: Vec<String>,
    /// The bucket that the disk goes through; it must be in one of the regions.
    pub bucket: Option<String>,
    /// What the object's key starts with; may be empty.
    pub prefix: String,
    /// How its instances start.
    pub boot_mode: BootMode,
    /// Whether its instances' metadata service asks for a token.
    pub imds_v2: bool,
    /// Its root device, e.g. `/dev/xvda`.
    pub root_device: String,
    /// Its root volume; as large as the disk unless it says otherwise.
    pub root: Ebs,
    /// The other volumes of its instances.
    pub volumes: Vec<Volume>,
    /// Whether its instances have a TPM 2.0.
    pub tpm: bool,
    /// The UEFI variables that its instances start with, in base64.
    pub uefi_data: Option<String>,
    /// Whether it says that it has the driver of the Intel 82599 network card (SR-IOV).
    pub sriov: bool,
    /// Whether it says that it has the driver of the ENA network card.
    pub ena: bool,
    /// How its snapshots are encrypted; none: as the account's settings want it.
    pub encryption: Option<Encryption>,
    /// Tags for image and snapshot, placeholders filled in.
    pub tags: BTreeMap<String, String>,
    /// More tags for snapshots; they win over `tags`.
    pub snapshot_tags: BTreeMap<String, String>,
    /// The texts by which images are told apart.
    pub undated: Undated,
    /// The role that AWS reads the bucket with; [`DEFAULT_ROLE`] without one.
    pub role: Option<String>,
    /// How many parts are sent at once.
    pub parallel: usize,
    /// The pause between two looks at the import task.
    pub poll: Duration,
    /// Only read, and say what would be done.
    pub dry_run: bool,
    /// How long all of it may take.
    pub timeout: Duration,
    /// How the disk becomes a snapshot.
    pub via: Via,
    /// The disk's block map.
    pub block_map: PathBuf,
    /// Where block maps of published snapshots are kept.
    pub store: Option<Store>,
    /// What is done with the image once it is there.
    pub release: Release,
    /// An image of that name is replaced.
    pub force: bool,
    /// The object that the disk goes through.
    pub object: ObjectOptions,
    /// What snapshots are built on that are written block by block.
    pub parents: Parents,
    /// Holes are left out of those also where they are encrypted, and read as noise there: which blocks those are, as
    /// [`BlockMap::holes`](crate::disk::BlockMap::holes) tells it.
    pub omit_holes: Option<String>,
}

/// Texts whose `{date}` and `{time}` are not filled in: the same disk published again makes no other image for those.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Undated {
    /// Words about the image; may be empty.
    pub description: String,
    /// Tags for image and snapshot.
    pub tags: BTreeMap<String, String>,
    /// More tags for snapshots.
    pub snapshot_tags: BTreeMap<String, String>,
}

/// A sound one, for unit tests.
#[cfg(test)]
pub(super) fn example() -> Request {
    Request {
        disk: PathBuf::from("disk.raw"),
        compared: None,
        size: 4,
        digest: "0123456789abcdef0123456789abcdef".to_owned(),
        name: "web".to_owned(),
        image_name: "web-2026".to_owned(),
        name_varies: false,
        description: String::new(),
        arch: Architecture::X86_64,
        regions: Vec::new(),
        bucket: Some("images".to_owned()),
        prefix: "kiln/".to_owned(),
        boot_mode: BootMode::UefiPreferred,
        imds_v2: true,
        root_device: "/dev/xvda".to_owned(),
        root: Ebs::default(),
        volumes: Vec::new(),
        tpm: false,
        uefi_data: None,
        sriov: false,
        ena: true,
        encryption: None,
        tags: BTreeMap::new(),
        snapshot_tags: BTreeMap::new(),
        undated: Undated::default(),
        role: None,
        parallel: 4,
        poll: Duration::from_secs(15),
        dry_run: false,
        timeout: Duration::from_hours(1),
        via: Via::S3,
        block_map: PathBuf::from("blocks"),
        store: None,
        release: Release::default(),
        force: false,
        object: ObjectOptions::default(),
        parents: Parents::default(),
        omit_holes: None,
    }
}
