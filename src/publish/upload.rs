//! The disk into the bucket, from wherever an earlier run has come to.
//!
//! The object's key is the disk's digest. An object that is there and whole is used; an unfinished upload is gone on with.
//! Kilns on different hosts that publish the same disk at once send the same parts of the same upload. One of them
//! completes it, and the others find it gone, look, and use its object.

use std::fs::File;
use std::sync::Arc;

use tokio::task::JoinError;

use super::Job;
use super::action::Action::{
    AbortMultipartUpload, CompleteMultipartUpload, CreateMultipartUpload, DeleteObject, DescribeImportSnapshotTasks,
    HeadObject, ListParts, UploadPart, UploadPartCopy,
};
use super::failure::Failure;
use super::lock::{Busy, Lock};
use super::multipart::{self, Completed, take_up};
use super::object::{self, Object};
use super::parts::Parts;
use super::plan::{self, Count, Requests, Steps, Way};
use super::scratch;
use super::send::{Line, Sending, Tally};
use super::undo::{Made, Undo};
use super::{ebs, raw, vmdk};
use crate::error::{Error, Exit};
use crate::recipe::DiskFormat;
use crate::store::Identity;
use crate::units::{GIB, Size};

/// What came of it: how many parts of the disk and of its scratch object.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Uploaded {
    /// Were sent.
    pub(super) sent: usize,
    /// Were copied inside S3 instead.
    pub(super) copied: usize,
    /// Were there already.
    pub(super) kept: usize,
}

pub(super) fn in_words(uploaded: Option<&Uploaded>) -> String {
    let Some(Uploaded { sent, copied, kept }) = uploaded else {
        return "another kiln has ended this upload".to_owned();
    };
    if sent + copied + kept == 0 {
        return "the object was there".to_owned();
    }
    let sent = format!("{sent} parts, each with its SHA-256");
    let copied = if *copied > 0 { format!(", and {copied} copied inside S3 instead") } else { String::new() };
    let kept = if *kept > 0 { format!("; {kept} were there") } else { String::new() };
    sent + &copied + &kept
}

pub(super) fn begins(job: &Job<'_>) -> String {
    let size = Size(job.request.size * GIB);
    format!("{size} to s3://{}/{}", job.target.bucket, job.target.key)
}

/// What [`upload`] would do, from what it would look at. Returned is how many objects [`delete`] would find.
pub(super) async fn plan(job: &Job<'_>, way: &mut Way) -> Result<u64, Error> {
    let disk = Disk::open(job)?;
    let existing = Box::pin(existing(job, &disk)).await?;
    let left = Box::pin(object::left(job)).await?;
    if let Existing::Whole(object) = existing {
        let tools = if matches!(disk.form, Form::Raw(_)) { Box::pin(scratch::are_left(job)).await? } else { 0 };
        let requests = way.steps.step(format!("use s3://{}/{}, which is the disk", job.target.bucket, job.target.key));
        requests.extend(&job.clients.asked()).exactly(DeleteObject, tools);
        plan_aborts(requests, left.count());
        let stays = object.is_kept || job.request.object.keep;
        way.cost.object = Some(plan::Object { bytes: Count::exactly(object.size()), stays });
        return Ok((!stays).into());
    }
    let size = job.request.size * GIB;
    let stored = left.disk.begun.as_ref().map(|(_, stored)| stored);
    let there = stored.map(|stored| format!("; {} parts were there", stored.len())).unwrap_or_default();
    let (scratch, [sent, copied], words, bytes) = match &disk.form {
        Form::Raw(disk) => {
            let scratch = Box::pin(scratch::plan(job, disk, stored, &left.scratch)).await?;
            let amounts = disk.plan(job, |parts| &parts.disk, stored, scratch.copies).await?;
            let amounts = amounts.map(|(count, bytes)| [count, bytes].map(Count::exactly));
            let from = format!(", zeros and short data from s3://{}/{}", job.target.bucket, scratch::key(job));
            let from = if scratch.copies { from + ", which is deleted then" } else { String::new() };
            let data = Size(disk.parts.data());
            let words = format!("in {} parts ({data} in parts with data{there}){from}", disk.parts.disk.len());
            (scratch, amounts, words, Count::exactly(size))
        }
        Form::Vmdk => {
            let (parts, bytes) = Box::pin(vmdk::most(job, &disk.file)).await?;
            let sent = [parts, bytes].map(Count::at_most);
            (scratch::Plan::default(), [sent, Default::default()], format!("compressed (VMDK{there})"), sent[1])
        }
    };
    let requests = way.steps.step(match disk.form {
        Form::Raw(_) => format!("upload {} {words}", begins(job)),
        Form::Vmdk => format!("upload {}, {words}", begins(job)),
    });
    requests.extend(&job.clients.asked()).exactly(CreateMultipartUpload, stored.is_none().into());
    requests.add(UploadPart, sent[0]).add(UploadPartCopy, copied[0]).exactly(CompleteMultipartUpload, 1);
    plan_aborts(requests, left.disk.others.len() as u64 + scratch.aborted);
    way.cost.bytes_sent += sent[1];
    way.cost.bytes_copied_in_s3 += copied[1];
    scratch.tell(way);
    let stays = job.request.object.keep;
    way.cost.object = Some(plan::Object { bytes, stays });
    // What is overwritten where versions are kept is below the new one.
    let below = matches!(existing, Existing::Stale(object) if object.version.is_some());
    Ok(if stays { 0 } else { 1 + u64::from(below) })
}

/// Of so many uploads. Parts that arrive after the end are looked for.
fn plan_aborts(requests: &mut Requests, uploads: u64) {
    if uploads > 0 {
        requests.at_least(AbortMultipartUpload, uploads).at_least(ListParts, uploads);
    }
}

/// What [`delete`] would do of so many objects.
pub(super) fn plan_delete(job: &Job<'_>, objects: u64, steps: &mut Steps) {
    if objects > 0 {
        let requests = steps.step(format!("delete s3://{}/{}", job.target.bucket, job.target.key));
        requests.at_least(DescribeImportSnapshotTasks, objects).exactly(DeleteObject, objects);
    }
}

/// What [`delete_imported`] would do.
pub(super) async fn plan_delete_imported(job: &Job<'_>, key: &str, steps: &mut Steps) -> Result<(), Error> {
    let found = job.stop.or("the imported object", Box::pin(object::look(job, key))).await?;
    let _ = job.clients.asked();
    let is_kept = matches!(&found, Ok(Some(object)) if object.is_kept);
    if is_kept || job.request.object.keep {
        steps.step(format!("keep s3://{}/{key}", job.target.bucket)).exactly(HeadObject, 1);
        return Ok(());
    }
    // One that is not there is looked for several times.
    let looks = if matches!(found, Ok(None)) { Count::at_least(2) } else { Count::exactly(2) };
    let requests = steps.step(format!("delete s3://{}/{key}", job.target.bucket));
    requests.add(HeadObject, looks).exactly(DeleteObject, (!matches!(found, Ok(None))).into());
    requests.at_least(DescribeImportSnapshotTasks, (*key == job.target.key).into());
    Ok(())
}

/// What is uploaded.
struct Disk {
    file: Arc<File>,
    form: Form,
    before: Identity,
}

/// As what.
enum Form {
    Raw(raw::Disk),
    Vmdk,
}

impl Disk {
    fn open(job: &Job<'_>) -> Result<Self, Error> {
        let (file, before) = open_disk(job)?;
        let form = match job.request.object.format {
            DiskFormat::Raw => {
                let parts = Arc::new(Parts::of(&ebs::block_map(job)?));
                Form::Raw(raw::Disk { file: Arc::clone(&file), parts })
            }
            DiskFormat::Vmdk => Form::Vmdk,
        };
        Ok(Self { file, form, before })
    }

    /// How long an object of the disk is, and what S3 says of its parts' SHA-256.
    async fn checksum(&self, job: &Job<'_>) -> Result<(u64, String), Error> {
        let Form::Raw(disk) = &self.form else { return vmdk::checksum(job, &self.file).await };
        Ok((job.request.size * GIB, disk.checksum(job, |parts| &parts.disk).await?))
    }
}

/// What is there under the disk's key.
enum Existing {
    /// Nothing, or nothing that may be looked at.
    Nothing,
    /// The disk.
    Whole(Object),
    /// An object that kiln made of this disk, but not as it is made now: to be overwritten.
    Stale(Object),
}

async fn existing(job: &Job<'_>, disk: &Disk) -> Result<Existing, Error> {
    let found = match job.stop.or("the object", object::look(job, &job.target.key)).await? {
        Ok(found) => found,
        // If there is one, S3 says so instead of overwriting it.
        Err(failure) if failure.is_denied() => {
            job.events.detail(format!("cannot look for the object: {}", failure.reason()));
            None
        }
        Err(failure) => return Err(job.error(failure)),
    };
    let Some(object) = found else { return Ok(Existing::Nothing) };
    if !object.is_of_disk(job) {
        return Err(object::foreign(job));
    }
    let raw = matches!(disk.form, Form::Raw(_));
    let whole = (!raw || object.size() == job.request.size * GIB) && {
        let (size, checksum) = Box::pin(disk.checksum(job)).await?;
        object.is(size, &checksum)
    };
    Ok(if whole { Existing::Whole(object) } else { Existing::Stale(object) })
}

/// Uploads what of the disk isn't there. None if another run has ended the upload meanwhile: then what it has made of it is
/// to be looked for.
pub(super) async fn upload(job: &Job<'_>, undo: &mut Undo) -> Result<Option<Uploaded>, Error> {
    if !undo.holds_lock() {
        undo.hold(Lock::take(&job.request.disk, &job.target.region).map_err(|Busy| busy(job))?);
    }
    let disk = Disk::open(job)?;
    let uploaded = match Box::pin(existing(job, &disk)).await? {
        Existing::Whole(object) => {
            job.events.note(format!("s3://{}/{} is this disk already", job.target.bucket, job.target.key));
            // Who wanted it kept decides when it goes.
            if !object.is_kept {
                undo.take_over(Made::object(&job.target.key, object.version));
            }
            // And what has helped to make it.
            if let Form::Raw(_) = disk.form {
                Box::pin(scratch::take_over(job, undo)).await?;
            }
            let left = Box::pin(object::left(job)).await?;
            multipart::take_over(undo, &job.target.key, &left.disk);
            multipart::take_over(undo, &scratch::key(job), &left.scratch);
            Some(Uploaded::default())
        }
        Existing::Nothing => Box::pin(send_all(job, undo, &disk, true)).await?,
        Existing::Stale(object) => {
            // In a bucket that keeps versions it stays below the new one.
            if object.version.is_some() {
                undo.take_over(Made::object(&job.target.key, object.version));
            }
            Box::pin(send_all(job, undo, &disk, false)).await?
        }
    };
    if uploaded.is_some() {
        Box::pin(tidy(job, undo)).await?;
    }
    Ok(uploaded)
}

fn busy(job: &Job<'_>) -> Error {
    let message = format!("another kiln publishes this disk to {}", job.target.region);
    Error::new(Exit::Publish, message).help("wait until it has ended, then publish again")
}

/// Goes on with an upload, or begins one, and completes it. None if another run has ended it.
async fn send_all(job: &Job<'_>, undo: &mut Undo, disk: &Disk, if_absent: bool) -> Result<Option<Uploaded>, Error> {
    let left = Box::pin(object::left(job)).await?;
    // At first: what another host begins meanwhile, both would send.
    let upload = Box::pin(take_up(job, undo, &job.target.key, left.disk)).await?;
    let mut upload = upload.map_err(|failure| job.error(failure))?;
    if let Some(there) = &upload.stored {
        let there = there.len();
        job.events.note(format!("going on with an upload that was begun before: {there} parts are there"));
    }
    let tally = Arc::new(Tally::default());
    let sending = match &disk.form {
        Form::Raw(disk) => Box::pin(raw::send(job, undo, disk, &mut upload, left.scratch, &tally)).await?,
        Form::Vmdk => {
            let line = Arc::new(Line::of(job, &upload));
            Box::pin(vmdk::send(job, &disk.file, &line, &tally)).await?
        }
    };
    let sent = match sending {
        Sending::Done(sent) => sent,
        Sending::Failed(lost) => return Err(lost.into_error(job)),
        Sending::Gone => {
            upload.is_gone(undo);
            return Ok(None);
        }
    };
    unchanged(job, &disk.file, &disk.before)?;
    match Box::pin(upload.complete(job, undo, sent, if_absent)).await?.map_err(|failure| job.error(failure))? {
        Completed::Whole => Ok(Some(tally.uploaded())),
        Completed::Damaged => Err(damaged(job)),
        Completed::ByAnother => Ok(None),
    }
}

/// Deletes what is of no use once the object is there: what parts were copied from, and unfinished uploads.
pub(super) async fn tidy(job: &Job<'_>, undo: &mut Undo) -> Result<(), Error> {
    // What can't be deleted now is tried again with the disk's own object.
    let sources = undo.objects(job, |key| key != job.target.key);
    let _ = Box::pin(job.stop.or("the deletion of what parts were copied from", sources)).await?;
    for left in Box::pin(job.stop.or("the end of unfinished uploads", undo.uploads(job))).await? {
        job.events.warn(format!("could not abort {left}"));
    }
    Ok(())
}

/// Deletes what was uploaded, unless it is to be kept. Nothing fails if that fails: the disk is imported already.
pub(super) async fn delete(job: &Job<'_>, undo: &mut Undo) {
    if job.request.object.keep {
        undo.keep_object(&job.target.key);
        job.events.note(format!("s3://{}/{} is kept", job.target.bucket, job.target.key));
    }
    for left in undo.objects(job, |_| true).await {
        job.events.warn(format!("could not delete {left}"));
    }
}

/// Deletes the object that a task of another run has imported, unless it is to be kept.
pub(super) async fn delete_imported(job: &Job<'_>, undo: &mut Undo, key: &str) {
    let found = job.stop.or("the imported object", Box::pin(object::look(job, key))).await;
    let is_kept = matches!(found, Ok(Ok(Some(object))) if object.is_kept);
    if !is_kept && !job.request.object.keep {
        undo.take_over(Made::Object { key: key.to_owned(), version: None, sure: false });
        delete(job, undo).await;
    }
}

/// Opens the disk, and tells what it is: what it was when it was compared with its block map.
pub(super) fn open_disk(job: &Job<'_>) -> Result<(Arc<File>, Identity), Error> {
    let file = File::open(&job.request.disk).map_err(unreadable(job))?;
    let identity = Identity::of(&file).map_err(unreadable(job))?;
    unchanged(job, &file, job.request.compared.as_ref().unwrap_or(&identity))?;
    Ok((Arc::new(file), identity))
}

/// That the disk is what it was `before`.
pub(super) fn unchanged(job: &Job<'_>, file: &File, before: &Identity) -> Result<(), Error> {
    if Identity::of(file).map_err(unreadable(job))? == *before {
        return Ok(());
    }
    let message = format!("the disk {} was changed while it was published", job.request.disk.display());
    Err(Error::new(Exit::Input, message).help("publish it again when nothing writes to it"))
}

fn unreadable(job: &Job<'_>) -> impl FnOnce(std::io::Error) -> Error {
    let words = format!("cannot read the disk {}", job.request.disk.display());
    move |error| Error::io(words, &error)
}

/// Why a piece of the disk wasn't sent.
pub(super) enum Lost {
    Disk(std::io::Error),
    Refused(Failure),
    Bug(JoinError),
}

impl Lost {
    pub(super) fn into_error(self, job: &Job<'_>) -> Error {
        match self {
            Self::Disk(error) => unreadable(job)(error),
            Self::Refused(failure) => job.error(failure),
            Self::Bug(error) => Error::new(Exit::Bug, format!("an upload thread ended: {error}")),
        }
    }
}

fn damaged(job: &Job<'_>) -> Error {
    Error::new(Exit::Publish, format!("s3://{}/{} differs from what was sent", job.target.bucket, job.target.key))
        .help("publish again; the disk is unchanged")
}
