//! What an earlier publish of the same disk has left, so that nothing is made twice.
//!
//! Everything that kiln makes at AWS has the disk's digest as a tag, an image also one that stands for all that it was
//! registered with. An image that is alike ends a publish at once; a snapshot, or an import that still runs because its
//! kiln was killed, saves upload and import. What was found was not made by this run, and is not taken back by it.

use aws_sdk_ec2::types::{Filter, Image, ImageState, ImportSnapshotTask, Snapshot, SnapshotState, Tag};

use super::failure::Failure;
use super::import::{self, State};
use super::plan::Steps;
use super::regions::Source;
use super::{Job, Request, Via, image, rules, upload};
use crate::error::Error;

/// What is there already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// An image like the one that is asked for; it may still be pending.
    Image(super::Image),
    /// A snapshot of the disk.
    Snapshot { id: String },
    /// An import of the disk that has come to an end, or will, from the object with this key in the target's bucket.
    Task { id: String, key: Option<String> },
    /// Nothing.
    Nothing,
}

/// Looks for what is there of the disk. Where the caller may not look, nothing is found.
pub(super) async fn look(job: &Job<'_>) -> Result<Found, Error> {
    let images = job.call("the images of this disk", images(job)).await?;
    if let Some(found) = images.iter().find_map(|image| alike(job, image)) {
        return Ok(found);
    }
    let same = snapshots(job, rules::DIGEST_TAG, &job.request.digest);
    let snapshots = may_look(job, "snapshots", job.stop.or("the snapshots of this disk", same).await?)?;
    let (request, region) = (job.request, &job.target.region);
    let fits = |snapshot: &&Snapshot| {
        is_whole(job, snapshot)
            && is_encrypted_as_asked(request, region, snapshot)
            // Of a disk that reads the same, other blocks may have been left out.
            && left_out(snapshot).is_none_or(|left_out| request.omit_holes.as_deref() == Some(left_out))
    };
    if let Some(id) = snapshots.iter().find(fits).and_then(Snapshot::snapshot_id) {
        return Ok(Found::Snapshot { id: id.to_owned() });
    }
    if job.request.via == Via::Ebs || matches!(job.source, Source::Copy(_)) {
        return Ok(Found::Nothing);
    }
    let task = may_look(job, "imports", job.stop.or("the imports of this disk", Box::pin(task(job))).await?)?;
    Ok(task.unwrap_or(Found::Nothing))
}

impl Found {
    /// The snapshot with the disk, if it is there.
    pub(super) fn snapshot(&self) -> Option<&str> {
        match self {
            Self::Image(super::Image { snapshot, .. }) => Some(snapshot),
            Self::Snapshot { id } => Some(id),
            Self::Task { .. } | Self::Nothing => None,
        }
    }
}

/// What would be done with what was found, until its snapshot is there.
pub(super) async fn plan(job: &Job<'_>, found: &Found, steps: &mut Steps) -> Result<(), Error> {
    match found {
        Found::Nothing => {}
        Found::Image(super::Image { id, name, .. }) => {
            image::plan_wait(steps.step(format!("make nothing: image {id} (`{name}`) is the same")));
        }
        Found::Snapshot { id } => {
            steps.step(format!("use snapshot {id}, which has the disk"));
        }
        Found::Task { id, key } => {
            import::plan_adopt(steps.step(format!("wait for import task {id}, which imports the disk")));
            if let Some(key) = key {
                upload::plan_delete_imported(job, key, steps).await?;
            }
        }
    }
    Ok(())
}

fn tagged(key: &str, value: &str) -> Filter {
    Filter::builder().name(format!("tag:{key}")).values(value).build()
}

async fn images(job: &Job<'_>) -> Result<Vec<Image>, Failure> {
    let same = tagged(rules::SETTINGS_TAG, &rules::settings(job.request, &job.target.region));
    let answer = job.clients.ec2.describe_images().owners("self").filters(same).send().await;
    Ok(answer.map_err(job.clients.failed("ec2:DescribeImages"))?.images.unwrap_or_default())
}

/// An image of the same settings that is the one asked for: by its name too, unless that has a date in it.
fn alike(job: &Job<'_>, image: &Image) -> Option<Found> {
    let named = job.request.name_varies || image.name() == Some(&job.request.image_name);
    let alive = matches!(image.state(), Some(ImageState::Available | ImageState::Pending));
    if !named || !alive {
        return None;
    }
    Some(Found::Image(super::Image {
        id: image.image_id()?.to_owned(),
        name: image.name()?.to_owned(),
        snapshot: image::root_snapshot(image)?.to_owned(),
    }))
}

/// This account's snapshots with this tag.
pub(super) async fn snapshots(job: &Job<'_>, key: &str, value: &str) -> Result<Vec<Snapshot>, Failure> {
    let answer = job.clients.ec2.describe_snapshots().owner_ids("self").filters(tagged(key, value)).send().await;
    Ok(answer.map_err(job.clients.failed("ec2:DescribeSnapshots"))?.snapshots.unwrap_or_default())
}

/// The snapshot with this id.
pub(super) async fn snapshot(job: &Job<'_>, id: &str) -> Result<Snapshot, Failure> {
    let answer = job.clients.ec2.describe_snapshots().snapshot_ids(id).send().await;
    let answer = answer.map_err(job.clients.failed("ec2:DescribeSnapshots"))?;
    answer.snapshots.unwrap_or_default().into_iter().next().ok_or_else(|| Failure::absent("ec2:DescribeSnapshots"))
}

fn is_whole(job: &Job<'_>, snapshot: &Snapshot) -> bool {
    let size = snapshot.volume_size().and_then(|size| u64::try_from(size).ok());
    snapshot.state() == Some(&SnapshotState::Completed) && size == Some(job.request.size)
}

/// Whether a snapshot of kiln's was made with the encryption that is asked for now: with that key, or without a word of it.
pub(super) fn is_encrypted_as_asked(request: &Request, region: &str, snapshot: &Snapshot) -> bool {
    let asked = rules::encryption(request, region);
    tag(snapshot.tags(), rules::ENCRYPTION_TAG) == asked.as_deref()
        && (asked.is_none() || snapshot.encrypted() == Some(true))
}

/// Which of an encrypted snapshot's blocks were left out and may read as anything, as [`crate::disk::BlockMap::holes`] tells
/// it; none: all of it reads as its disk.
pub(super) fn left_out(snapshot: &Snapshot) -> Option<&str> {
    tag(snapshot.tags(), rules::HOLES_TAG).filter(|_| snapshot.encrypted() != Some(false))
}

/// The value of a tag.
pub(super) fn tag<'a>(tags: &'a [Tag], key: &str) -> Option<&'a str> {
    tags.iter().find(|tag| tag.key() == Some(key))?.value()
}

/// An import of the disk that runs, or whose snapshot is there.
pub(super) async fn task(job: &Job<'_>) -> Result<Option<Found>, Failure> {
    let asked = rules::encryption(job.request, &job.target.region);
    let alike = |task: &&ImportSnapshotTask| {
        tag(task.tags(), rules::DIGEST_TAG) == Some(job.request.digest.as_str())
            && tag(task.tags(), rules::ENCRYPTION_TAG) == asked.as_deref()
    };
    for task in import::all(&job.clients).await?.iter().filter(alike) {
        if is_useful(job, task).await?
            && let Some(id) = task.import_task_id()
        {
            return Ok(Some(Found::Task { id: id.to_owned(), key: key(job, task) }));
        }
    }
    Ok(None)
}

/// The key of the object that the task reads, if it is one that kiln made of this disk in the bucket that is used now.
fn key(job: &Job<'_>, task: &ImportSnapshotTask) -> Option<String> {
    let place = task.snapshot_task_detail()?.user_bucket()?;
    let own = place.s3_bucket() == Some(&job.target.bucket);
    place.s3_key().filter(|key| own && key.starts_with(&rules::key_stem(job.request))).map(str::to_owned)
}

async fn is_useful(job: &Job<'_>, task: &ImportSnapshotTask) -> Result<bool, Failure> {
    match import::judge_task(task) {
        State::Working { .. } => Ok(true),
        State::Failed { .. } => Ok(false),
        // AWS remembers tasks longer than people keep snapshots.
        State::Done { snapshot: id } => match snapshot(job, &id).await {
            // Its own tags may not be there yet.
            Ok(snapshot) => Ok(is_whole(job, &snapshot)),
            Err(failure) if failure.is_not_found() => Ok(false),
            Err(failure) => Err(failure),
        },
    }
}

/// A permission to look that is missing costs an upload, not the publish.
pub(super) fn may_look<T: Default>(job: &Job<'_>, what: &str, answer: Result<T, Failure>) -> Result<T, Error> {
    match answer {
        Err(failure) if failure.is_denied() => {
            job.events.detail(format!("cannot look for earlier {what} of this disk: {}", failure.reason()));
            Ok(T::default())
        }
        answer => answer.map_err(|failure| job.error(failure)),
    }
}
