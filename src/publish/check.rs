//! `kiln publish --check`: whether a publish would be permitted, before there is a disk to lose an hour with.
//!
//! Only requests that read, and dry runs, of which AWS does nothing but look whether they are permitted. The APIs of S3
//! and EBS direct have no dry runs: what can't be asked is said.
//!
//! Source: "Dry run" in "Common query parameters", Amazon EC2 API Reference.

use std::time::SystemTime;

use aws_sdk_ec2::primitives::DateTime;
use aws_sdk_ec2::types::{
    BlockDeviceMapping, CreateVolumePermission, CreateVolumePermissionModifications, EbsBlockDevice, LaunchPermission,
    LaunchPermissionModifications, Tag,
};
use serde::Serialize;

use super::failure::Failure;
use super::found::{self, Found};
use super::regions::Source;
use super::{Job, Via, finish, image, import, parent, preflight, quotas, rules, share};
use crate::error::Error;
use crate::recipe::Protection;

/// How one check ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "lowercase")]
pub enum Verdict {
    /// It is as it must be.
    Good {
        /// A fact about it; may be empty.
        detail: String,
    },
    /// A publish would fail.
    Bad {
        /// The cause.
        detail: String,
        /// What helps.
        help: Option<String>,
    },
    /// It can't be found out without making something, or the answer says nothing.
    Unknown {
        /// Why.
        detail: String,
    },
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// What, e.g. `bucket`.
    pub what: String,
    /// How that ended.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// An image that is nowhere, for dry runs that name one.
const NO_IMAGE: &str = "ami-00000000000000000";
/// An account that is nobody's.
const NOBODY: &str = "000000000000";
/// A snapshot that is nowhere.
const NO_SNAPSHOT: &str = "snap-00000000000000000";

/// Looks at all that a publish to this region needs.
pub(super) async fn check(job: &Job<'_>) -> Result<Vec<Checked>, Error> {
    let mut all = Vec::new();
    let mut note = |what: &str, verdict: Verdict| all.push(Checked { what: what.to_owned(), verdict });
    note("name", good(job, Box::pin(name(job))).await?);
    if let Err(error) = rules::key_fits(job.request, &job.target.region) {
        note("key", Verdict::Bad { detail: error.message, help: error.help });
    }
    if !job.request.release.share.is_empty() {
        note("sharing", good(job, Box::pin(sharing(job))).await?);
    }
    let sends = matches!(job.source, Source::Disk(_));
    if sends && job.request.via != Via::Ebs && !job.target.bucket.is_empty() {
        note("bucket", good(job, Box::pin(bucket(job))).await?);
        note("import role", good(job, Box::pin(role(job))).await?);
        let detail = "s3:PutObject and the like can't be asked for without an object".to_owned();
        note("upload", Verdict::Unknown { detail });
    }
    if sends && job.request.via != Via::S3 {
        let detail = "EBS direct has no dry run; --iam-policy prints what it needs".to_owned();
        note("blocks", Verdict::Unknown { detail });
        note("encryption", encryption(job).await?);
    }
    if let Some(verdict) = Box::pin(parent_verdict(job)).await? {
        note("parent", verdict);
    }
    for (call, answer) in dry_runs(job, sends).await? {
        note(call, permitted(job, answer));
    }
    // What can't be found is made.
    let found = Box::pin(found::look(job)).await.unwrap_or(Found::Nothing);
    job.stop.check("the checks")?;
    all.extend(Box::pin(quotas::check(job, &found)).await?);
    Ok(all)
}

/// A look that ends as a publish would: its error is the verdict, unless it is a stop.
async fn good(job: &Job<'_>, look: impl Future<Output = Result<String, Error>>) -> Result<Verdict, Error> {
    match look.await {
        Ok(detail) => Ok(Verdict::Good { detail }),
        Err(error) => {
            job.stop.check("the checks")?;
            Ok(Verdict::Bad { detail: error.message, help: error.help })
        }
    }
}

async fn name(job: &Job<'_>) -> Result<String, Error> {
    let name = &job.target.image_name;
    let images = job.call("the images of this name", image::of_names(&job.clients, &[name])).await?;
    match images.first().and_then(|image| image.image_id()) {
        None => Ok(format!("`{name}` is free")),
        Some(id) if job.request.force => Ok(format!("`{name}` is {id}'s, which would be replaced")),
        Some(id) => Ok(format!("`{name}` is {id}'s: another disk would need another name, or --force")),
    }
}

async fn sharing(job: &Job<'_>) -> Result<String, Error> {
    share::permitted(&job.place(), &finish::sharing(job)).await?;
    Ok("the account's settings allow it".to_owned())
}

async fn bucket(job: &Job<'_>) -> Result<String, Error> {
    preflight::bucket_is_near(job).await?;
    Ok(format!("`{}` is in {}", job.target.bucket, job.target.region))
}

async fn role(job: &Job<'_>) -> Result<String, Error> {
    import::permitted(job).await?;
    Ok(format!("AWS takes the role `{}`", job.target.role))
}

/// Of the snapshot that was asked for to build on; none if none was.
async fn parent_verdict(job: &Job<'_>) -> Result<Option<Verdict>, Error> {
    let mut snapshot = None;
    let look = async {
        snapshot = parent::check(job).await?.map(|parent| parent.snapshot);
        Ok(snapshot.as_ref().map(|id| format!("{id} can be built on")).unwrap_or_default())
    };
    let verdict = good(job, look).await?;
    Ok((snapshot.is_some() || matches!(verdict, Verdict::Bad { .. })).then_some(verdict))
}

async fn encryption(job: &Job<'_>) -> Result<Verdict, Error> {
    let holes = if job.request.omit_holes.is_some() { "holes are left out all the same" } else { "holes are sent too" };
    let encrypted = Verdict::Good { detail: format!("new snapshots are encrypted: {holes}") };
    if job.request.encryption.is_some() {
        return Ok(encrypted);
    }
    let call = job.clients.ec2.get_ebs_encryption_by_default().send();
    let answer = job.stop.or("whether snapshots are encrypted", call).await?;
    Ok(match answer.map_err(job.clients.failed("ec2:GetEbsEncryptionByDefault")) {
        Ok(answer) if answer.ebs_encryption_by_default() == Some(true) => encrypted,
        Ok(_) => Verdict::Good { detail: "new snapshots are not encrypted: holes are left out".to_owned() },
        Err(failure) => Verdict::Unknown { detail: failure.reason() },
    })
}

type Answers = Vec<(&'static str, Result<(), Failure>)>;

/// The requests of EC2 that make, change or take back something.
async fn dry_runs(job: &Job<'_>, sends: bool) -> Result<Answers, Error> {
    let (ec2, clients, name) = (&job.clients.ec2, &job.clients, &job.target.image_name);
    let mut answers: Answers = Vec::new();
    macro_rules! ask {
        ($call:literal, $request:expr) => {{
            let answer = job.stop.or($call, $request.dry_run(true).send()).await?;
            answers.push(($call, answer.map(|_| ()).map_err(clients.failed($call))));
        }};
    }
    if sends {
        let device = &job.request.root_device;
        let volume = EbsBlockDevice::builder().snapshot_id(NO_SNAPSHOT).build();
        let mapping = BlockDeviceMapping::builder().device_name(device).ebs(volume).build();
        let register = ec2.register_image().name(name).root_device_name(device).block_device_mappings(mapping);
        ask!("ec2:RegisterImage", register.architecture(image::architecture(job.request.arch)));
    } else {
        let source = if let Source::Copy(home) = &job.source { home.region.as_str() } else { "" };
        ask!("ec2:CopyImage", ec2.copy_image().name(name).source_region(source).source_image_id(NO_IMAGE));
    }
    let tag = Tag::builder().key(rules::NAME_TAG).value(&job.request.name).build();
    ask!("ec2:CreateTags", ec2.create_tags().resources(NO_SNAPSHOT).tags(tag));
    let release = &job.request.release;
    if !release.share.is_empty() {
        let account = LaunchPermission::builder().user_id(NOBODY).build();
        let add = LaunchPermissionModifications::builder().add(account).build();
        ask!("ec2:ModifyImageAttribute", ec2.modify_image_attribute().image_id(NO_IMAGE).launch_permission(add));
    }
    if release.share_snapshots {
        let account = CreateVolumePermission::builder().user_id(NOBODY).build();
        let add = CreateVolumePermissionModifications::builder().add(account).build();
        let modify = ec2.modify_snapshot_attribute().snapshot_id(NO_SNAPSHOT);
        ask!("ec2:ModifySnapshotAttribute", modify.create_volume_permission(add));
    }
    if let Some(after) = release.deprecate_after {
        let at = DateTime::from(SystemTime::now() + after);
        ask!("ec2:EnableImageDeprecation", ec2.enable_image_deprecation().image_id(NO_IMAGE).deprecate_at(at));
    }
    if release.protection != Protection::Off {
        let protect = ec2.enable_image_deregistration_protection().image_id(NO_IMAGE);
        ask!("ec2:EnableImageDeregistrationProtection", protect);
    }
    ask!("ec2:DeregisterImage", ec2.deregister_image().image_id(NO_IMAGE));
    ask!("ec2:DeleteSnapshot", ec2.delete_snapshot().snapshot_id(NO_SNAPSHOT));
    Ok(answers)
}

/// What the answer to a dry run says: that the request would have been carried out is an error as well.
fn permitted(job: &Job<'_>, answer: Result<(), Failure>) -> Verdict {
    match answer {
        Err(failure) if failure.code == "DryRunOperation" => Verdict::Good { detail: "permitted".to_owned() },
        // Whoever isn't permitted isn't told what exists.
        Err(failure) if failure.is_not_found() => Verdict::Good { detail: "permitted".to_owned() },
        Err(failure) if failure.is_denied() => {
            let error = job.error(failure);
            Verdict::Bad { detail: error.message, help: error.help }
        }
        Err(failure) => Verdict::Unknown { detail: failure.reason() },
        Ok(()) => Verdict::Unknown { detail: "the endpoint knows no dry runs".to_owned() },
    }
}
