//! `manifest.json`: what the output is, what it was made from, and what later commands need to know.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::uefi_data;
use crate::error::{Error, Exit};
use crate::plan::Acceleration;
use crate::recipe::{DiskFormat, Ebs, Encryption, Recipe, Tpm, Via, Volume};
use crate::store::{Imported, Making};
use crate::units::hex;
use crate::vm::spec::Processor;

/// The version of this format. A change that breaks readers raises it.
pub const SCHEMA: u32 = 1;
/// The manifest's name in the output folder.
pub const FILE: &str = "manifest.json";
/// The raw disk's name in the output folder.
pub const DISK: &str = "disk.raw";
/// The name of its block map there.
pub const BLOCKS: &str = "blocks";
/// The field of the file that has the manifest's own digest. It is not a field of [`Manifest`], so that no value in
/// memory has the digest of another one.
const OWN_DIGEST: &str = "manifest_sha256";

/// See the module.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The digest of everything that the output depends on.
    #[serde(default)]
    pub artifact: String,
    /// The recipe's name.
    pub name: String,
    /// The recipe's description.
    pub description: String,
    /// `x86_64` or `aarch64`.
    pub arch: String,
    /// SHA-256 over the disk's block map, in hex: the disk's identity.
    pub digest: String,
    /// SHA-256 of the whole disk, as `sha256sum` prints it; only if it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The disk's size in bytes.
    pub size: u64,
    /// Bytes in blocks that hold data.
    pub data_bytes: u64,
    /// Bytes in a block of the map.
    pub block_size: u64,
    /// Firmware that can start the disk: `legacy-bios`, `uefi`.
    pub boot_modes: Vec<String>,
    /// The partition table.
    pub partitions: serde_json::Value,
    /// What the disk was made from.
    pub inputs: Inputs,
    /// Programs that made it.
    pub tools: BTreeMap<String, String>,
    /// How the guest ran.
    pub guest: GuestFacts,
    /// The runs of the boot and of the steps that it was made of, up to the first that is never kept. Early manifests
    /// don't have it.
    #[serde(default)]
    pub lineage: Vec<Making>,
    /// The steps, in order.
    pub steps: Vec<StepFacts>,
    /// Seconds per phase, in order.
    pub phases: Vec<Phase>,
    /// Installed packages, one a line: name, version, architecture.
    pub packages: Vec<String>,
    /// Tests for the rehearsed instance.
    pub tests: Vec<TestFacts>,
    /// What the recipe says of publishing.
    pub publish: PublishFacts,
}

/// Digests of everything that went in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// The base image as the recipe names it.
    pub base: String,
    /// SHA-256 of the base image.
    pub base_sha256: String,
    /// Its format.
    pub base_format: String,
    /// SHA-256 of the recipe's text.
    pub recipe_sha256: String,
    /// What `--set` changed in it, in order.
    #[serde(default)]
    pub set: Vec<String>,
}

/// How the guest ran.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestFacts {
    /// What ran its instructions: `accelerator`, and under KVM `vendor`.
    #[serde(flatten)]
    pub acceleration: Acceleration,
    /// Its processor. Early manifests don't have it.
    #[serde(default = "default_processor")]
    pub processor: Processor,
    /// `direct` or `firmware`.
    pub boot: String,
    /// Processors.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// `none` or `open`.
    pub network: String,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepFacts {
    /// Its name.
    pub name: String,
    /// SHA-256 over what went into the guest for it.
    pub sha256: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Whether it came from the cache.
    pub cached: bool,
    /// Its log, relative to the output folder; empty if it came from the cache and its log is gone.
    pub log: String,
}

/// How long a part of the build took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Phase {
    /// Its stable name.
    pub phase: String,
    /// In seconds.
    pub seconds: f64,
}

/// A test.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TestFacts {
    /// Its name.
    pub name: String,
    /// The command.
    pub run: String,
    /// How long it may take, in seconds.
    pub timeout: Option<f64>,
}

/// `[publish]`, as `kiln publish` needs it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PublishFacts {
    /// Template of the image's name.
    pub image_name: Option<String>,
    /// Template of words about the image.
    pub description: Option<String>,
    /// Regions.
    pub regions: Vec<String>,
    /// The bucket for the import.
    pub bucket: Option<String>,
    /// What keys start with.
    pub prefix: Option<String>,
    /// How instances boot.
    pub boot_mode: Option<String>,
    /// `v2.0` or `v1.0`.
    pub imds: String,
    /// The root device.
    pub root_device: Option<String>,
    /// The root volume. Early manifests don't have its type.
    #[serde(flatten)]
    pub root: Ebs,
    /// Tags: templates of their values.
    pub tags: BTreeMap<String, String>,
    /// The importing role.
    pub role: Option<String>,
    /// How the disk becomes a snapshot: `s3` or `ebs`. Early manifests don't have it.
    #[serde(default = "default_via")]
    pub via: String,
    /// What is done with the image once it is there. Early manifests don't have it.
    #[serde(default)]
    pub release: ReleaseFacts,
    /// `v2.0`, or none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<String>,
    /// The UEFI variables that instances start with, as AWS has them: base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uefi_data: Option<String>,
    /// Whether the image has the driver of the Intel 82599 network card.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sriov: bool,
    /// Whether the image has the driver of the ENA network card; none: it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ena: Option<bool>,
    /// The other volumes of instances.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Volume>,
    /// How snapshots are encrypted; none: as the account's settings want it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
    /// More tags for snapshots: templates of their values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub snapshot_tags: BTreeMap<String, String>,
    /// Holes are left out of encrypted snapshots too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub omit_holes: bool,
    /// How the disk is uploaded, if not in the usual way.
    #[serde(default, skip_serializing_if = "UploadFacts::are_usual")]
    pub upload: UploadFacts,
}

/// What `[publish]` says of an image that is there.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ReleaseFacts {
    /// Who may launch it.
    pub share: Vec<String>,
    /// They may make volumes of its snapshots too.
    pub share_snapshots: bool,
    /// In how many seconds it counts as old.
    pub deprecate_after: Option<u64>,
    /// `off`, `on` or `cooldown`.
    pub protection: String,
    /// The template of the SSM parameter's name.
    pub parameter: Option<String>,
}

/// How a disk is an object in a bucket.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UploadFacts {
    /// `raw` or `vmdk`; none: `raw`.
    pub disk_format: Option<String>,
    /// `AES256` or `aws:kms`; none: as the bucket has it.
    pub sse: Option<String>,
    /// The KMS key.
    pub sse_kms_key: Option<String>,
    /// The object stays when it is imported.
    pub keep_object: bool,
}

impl UploadFacts {
    fn are_usual(&self) -> bool {
        *self == Self::default()
    }
}

fn default_processor() -> Processor {
    Processor::V3
}

fn default_via() -> String {
    Via::default().as_str().to_owned()
}

impl PublishFacts {
    /// What `recipe` says of publishing, with the UEFI variables that it names.
    ///
    /// # Errors
    /// When those can't be read, or are none.
    pub fn read(recipe: &Recipe) -> Result<Self, Error> {
        let publish = &recipe.publish;
        Ok(Self {
            image_name: publish.image_name.clone(),
            description: publish.description.clone(),
            regions: publish.regions.clone(),
            bucket: publish.bucket.clone(),
            prefix: publish.prefix.clone(),
            boot_mode: publish.boot_mode.map(|mode| mode.as_str().to_owned()),
            imds: publish.imds.unwrap_or_default().as_str().to_owned(),
            root_device: publish.root_device.clone(),
            root: publish.root.clone(),
            tags: publish.tags.clone(),
            role: publish.role.clone(),
            via: publish.via.as_str().to_owned(),
            release: ReleaseFacts {
                share: publish.release.share.iter().map(ToString::to_string).collect(),
                share_snapshots: publish.release.share_snapshots,
                deprecate_after: publish.release.deprecate_after.map(|after| after.as_secs()),
                protection: publish.release.protection.as_str().to_owned(),
                parameter: publish.release.parameter.clone(),
            },
            tpm: publish.tpm.then(|| Tpm::V2.as_str().to_owned()),
            uefi_data: uefi_data::read(recipe)?,
            sriov: publish.sriov,
            ena: publish.ena,
            volumes: publish.volumes.clone(),
            encryption: publish.encryption.clone(),
            snapshot_tags: publish.snapshot_tags.clone(),
            omit_holes: publish.omit_holes,
            upload: UploadFacts {
                disk_format: (publish.disk_format != DiskFormat::default())
                    .then(|| publish.disk_format.as_str().to_owned()),
                sse: publish.sse.map(|sse| sse.as_str().to_owned()),
                sse_kms_key: publish.sse_kms_key.clone(),
                keep_object: publish.keep_object,
            },
        })
    }
}

impl Inputs {
    /// Of a build of `recipe` from the image file `image`, which was imported as `base`, with this `--set`.
    pub(super) fn of(recipe: &Recipe, image: &Path, base: &Imported, set: &[String]) -> Self {
        Self {
            base: image.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            base_sha256: base.sha256.clone(),
            base_format: base.format.clone(),
            recipe_sha256: hex(&Sha256::digest(recipe.text.as_bytes())),
            set: set.to_vec(),
        }
    }
}

impl TestFacts {
    /// The tests of `recipe`.
    #[must_use]
    pub fn of(recipe: &Recipe) -> Vec<Self> {
        let fact = |test: &crate::recipe::TestStep| Self {
            name: test.name.clone(),
            run: test.run.clone(),
            timeout: test.timeout.map(|timeout| timeout.as_secs_f64()),
        };
        recipe.tests.iter().map(fact).collect()
    }
}

/// A manifest as the file has it.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(flatten)]
    manifest: &'a Manifest,
    manifest_sha256: String,
}

impl Manifest {
    /// Reads the manifest of the output folder `folder`, as kiln wrote it or as it was edited since.
    ///
    /// # Errors
    /// When there is none, or one of another version.
    pub fn read(folder: &Path) -> Result<Self, Error> {
        Self::parse(folder, read_value(folder)?)
    }

    /// As [`read`](Self::read), with the reason why it can't be taken for what [`write`](Self::write) wrote; `None` if it
    /// can.
    pub(super) fn read_verified(folder: &Path) -> Result<(Self, Option<&'static str>), Error> {
        let value = read_value(folder)?;
        let why = match &value[OWN_DIGEST] {
            Value::Null => Some("its manifest has no digest of its own"),
            own => (*own != own_digest(value.clone())).then_some("its manifest was edited"),
        };
        Ok((Self::parse(folder, value)?, why))
    }

    fn parse(folder: &Path, value: Value) -> Result<Self, Error> {
        serde_json::from_value(value).map_err(|error| unusable(folder, &error.to_string()))
    }

    /// Writes it into `folder`, with its own digest.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let bug = |error: serde_json::Error| Error::new(Exit::Bug, format!("cannot write the manifest: {error}"));
        // The digest is that of the text as it is read: serde_json may parse a float as its neighbour.
        let value = serde_json::to_string(self).and_then(|text| serde_json::from_str(&text)).map_err(bug)?;
        let written = Written { manifest: self, manifest_sha256: own_digest(value) };
        let mut text = serde_json::to_string_pretty(&written).map_err(bug)?;
        text.push('\n');
        fs_err::write(folder.join(FILE), text).map_err(|error| Error::io("cannot write the manifest", &error))
    }
}

/// The JSON in the manifest of `folder`, which has this version.
fn read_value(folder: &Path) -> Result<Value, Error> {
    let text = std::fs::read(folder.join(FILE)).map_err(|error| {
        let message = format!("`{}` is not an output folder of kiln build: {FILE}: {error}", folder.display());
        Error::new(Exit::Input, message).help("give the folder that `kiln build` printed, for example out/NAME")
    })?;
    let value: Value = serde_json::from_slice(&text).map_err(|error| unusable(folder, &error.to_string()))?;
    if value["schema"] != SCHEMA {
        return Err(unusable(folder, &format!("it has version {} and this kiln reads {SCHEMA}", value["schema"]))
            .help("build the image again with this kiln"));
    }
    Ok(value)
}

fn unusable(folder: &Path, why: &str) -> Error {
    Error::new(Exit::Input, format!("cannot use `{}`: {why}", folder.join(FILE).display()))
}

/// SHA-256 over the compact JSON of a manifest without this digest, with the fields of each object in alphabetical
/// order: spaces and the order of fields don't change it.
fn own_digest(mut value: Value) -> String {
    if let Some(fields) = value.as_object_mut() {
        fields.remove(OWN_DIGEST);
    }
    hex(&Sha256::digest(value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Manifest {
        /// One of a disk that takes one step.
        pub(in crate::build) fn sample() -> Self {
            let hex = "0".repeat(64);
            let sample = serde_json::json!({
                "schema": SCHEMA, "artifact": hex, "name": "web", "description": "", "arch": "x86_64",
                "digest": hex, "size": 1 << 30, "data_bytes": 0, "block_size": 1 << 19, "boot_modes": [],
                "partitions": null,
                "inputs": { "base": "base.raw", "base_sha256": hex, "base_format": "raw", "recipe_sha256": hex },
                "tools": {},
                "guest": { "accelerator": "tcg", "boot": "direct", "cpus": 2, "memory": 1 << 30, "network": "none" },
                "steps": [{ "name": "one", "sha256": hex, "seconds": 1.0, "cached": false, "log": "steps/01-one.log" }],
                "phases": [], "packages": [], "tests": [],
                "publish": { "regions": [], "imds": "v2.0", "tags": {} },
            });
            serde_json::from_value(sample).unwrap()
        }
    }

    fn why(folder: &Path) -> Option<&'static str> {
        Manifest::read_verified(folder).unwrap().1
    }

    proptest! {
        /// Not every float is parsed as the one that was printed.
        #[test]
        fn a_manifest_is_read_as_it_was_written(seconds in 0_f64..1e9) {
            let folder = tempfile::tempdir().unwrap();
            let mut manifest = Manifest::sample();
            manifest.steps[0].seconds = seconds;
            for _ in 0..3 {
                manifest.write(folder.path()).unwrap();
                let (read, why) = Manifest::read_verified(folder.path()).unwrap();
                prop_assert_eq!(why, None);
                manifest = read;
            }
        }
    }

    #[test]
    fn an_edited_manifest_shows() {
        let folder = tempfile::tempdir().unwrap();
        Manifest::sample().write(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join(FILE)).unwrap();
        let last = text.lines().rev().nth(1).unwrap();
        assert!(text.starts_with("{\n  \"schema\": 1,\n") && last.starts_with("  \"manifest_sha256\": \""), "{text}");
        let write = |text: String| std::fs::write(folder.path().join(FILE), text).unwrap();
        write(text.replace('\n', "\n "));
        assert_eq!(why(folder.path()), None, "only spaces");
        write(text.replace("\"cpus\": 2", "\"cpus\": 3"));
        assert_eq!(why(folder.path()), Some("its manifest was edited"));
        write(text.replacen("{\n", "{\n  \"unknown\": 1,\n", 1));
        assert_eq!(why(folder.path()), Some("its manifest was edited"));
        write(text.replace(",\n  \"manifest_sha256\"", ",\n  \"renamed\""));
        assert_eq!(why(folder.path()), Some("its manifest has no digest of its own"));
        assert!(Manifest::read(folder.path()).is_ok());
    }
}
