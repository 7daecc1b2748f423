//! The disk into the bucket, from wherever an earlier run has come to.
//!
//! The object's key is the disk's digest. An object that is there and whole is used; an unfinished upload is gone on with.
//! Kilns on different hosts that publish the same disk at once send the same parts of the same upload. One of them
//! completes it, and the others find it gone, look, and use its object.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart};
use tokio::task::JoinError;

use super::Job;
use super::action::Action::{
    AbortMultipartUpload, CompleteMultipartUpload, CreateMultipartUpload, DeleteObject, DescribeImportSnapshotTasks,
    HeadObject, ListParts, PutObject, UploadPart, UploadPartCopy,
};
use super::failure::Failure;
use super::lock::{Busy, Lock};
use super::object::{self, Object, StoredParts};
use super::parts::{self, Digest, Parts};
use super::plan::{self, Count, Requests, Steps, Way};
use super::retry::{Try, s3_once};
use super::send::{self, How, Line, Sender, Sending, Sent};
use super::undo::{Made, Undo};
use super::{ebs, vmdk, zeros};
use crate::error::{Error, Exit};
use crate::recipe::DiskFormat;
use crate::store::Identity;
use crate::units::{GIB, Size};

/// S3 puts the parts together before it answers.
const COMPLETE: Duration = Duration::from_mins(5);

/// What came of it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Uploaded {
    /// How many parts there are; none if the object was there.
    parts: usize,
    /// How many of them were copied from zeros instead of sent.
    copied: usize,
    /// How many of them were there already.
    kept: usize,
}

pub(super) fn in_words(uploaded: Option<&Uploaded>) -> String {
    let Some(Uploaded { parts, copied, kept }) = uploaded else {
        return "another kiln has ended this upload".to_owned();
    };
    if *parts == 0 {
        return "the object was there".to_owned();
    }
    let sent = format!("{} parts, each with its SHA-256", parts - copied - kept);
    let copied = if *copied > 0 { format!(", and {copied} of zeros that were not sent") } else { String::new() };
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
        let aborted = left.ids().count() as u64;
        let zeros = matches!(disk.form, Form::Raw(_)) && Box::pin(zeros::are_left(job)).await?;
        let requests = way.steps.step(format!("use s3://{}/{}, which is the disk", job.target.bucket, job.target.key));
        requests.extend(&job.clients.asked()).exactly(DeleteObject, zeros.into());
        plan_aborts(requests, aborted);
        let stays = object.is_kept || job.request.object.keep;
        way.cost.object = Some(plan::Object { bytes: Count::exactly(object.size()), stays });
        return Ok((!stays).into());
    }
    let others = left.others.len() as u64;
    let (begun, stored) = left.begun.unzip();
    let size = job.request.size * GIB;
    let there = stored.as_ref().map(|stored| format!("; {} parts were there", stored.len())).unwrap_or_default();
    let (zeros, [sent, copied], words, bytes) = match &disk.form {
        Form::Raw(parts) => {
            let zeros = Box::pin(zeros::plan(job, parts, stored.as_ref())).await?;
            let amounts = disk.amounts(job, parts, stored.unwrap_or_default(), zeros.copies).await?;
            let data = Size(parts.data());
            let from = format!(", zeros from s3://{}, which is deleted then", zeros::place(job));
            let from = if zeros.copies { from.as_str() } else { "" };
            let words = format!("in {} parts ({data} in parts with data{there}){from}", parts.all.len());
            (zeros, amounts.map(|(count, bytes)| [count, bytes].map(Count::exactly)), words, Count::exactly(size))
        }
        Form::Vmdk => {
            let (parts, bytes) = Box::pin(vmdk::most(job)).await?;
            let sent = [parts, bytes].map(Count::at_most);
            (zeros::Plan::default(), [sent, Default::default()], format!("compressed (VMDK{there})"), sent[1])
        }
    };
    let requests = way.steps.step(match disk.form {
        Form::Raw(_) => format!("upload {} {words}", begins(job)),
        Form::Vmdk => format!("upload {}, {words}", begins(job)),
    });
    requests.extend(&job.clients.asked()).exactly(PutObject, zeros.put.is_some().into());
    requests.exactly(CreateMultipartUpload, begun.is_none().into());
    requests.add(UploadPart, sent[0]).add(UploadPartCopy, copied[0]).exactly(CompleteMultipartUpload, 1);
    plan_aborts(requests.exactly(DeleteObject, zeros.deleted), others);
    way.cost.bytes_sent += sent[1];
    way.cost.bytes_sent += Count::exactly(zeros.put.unwrap_or_default());
    way.cost.bytes_copied_in_s3 += copied[1];
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
    Raw(Arc<Parts>),
    Vmdk,
}

impl Disk {
    fn open(job: &Job<'_>) -> Result<Self, Error> {
        let file = open_disk(job)?;
        let before = identity(job, &file)?;
        let form = match job.request.object.format {
            DiskFormat::Raw => Form::Raw(Arc::new(Parts::of(&ebs::block_map(job)?))),
            DiskFormat::Vmdk => Form::Vmdk,
        };
        Ok(Self { file: Arc::new(file), form, before })
    }

    /// How many parts would be sent, and how many copied, each with its bytes.
    async fn amounts(
        &self,
        job: &Job<'_>,
        parts: &Arc<Parts>,
        stored: StoredParts,
        copies: bool,
    ) -> Result<[(u64, u64); 2], Error> {
        let (file, parts) = (Arc::clone(&self.file), Arc::clone(parts));
        let all = move || send::plan(&parts, &file, &stored, copies);
        let amounts = job.stop.or("what is to be sent", tokio::task::spawn_blocking(all)).await?;
        amounts.map_err(|error| Lost::Bug(error).into_error(job))?.map_err(unreadable(job))
    }

    /// How long an object of the disk is, and what S3 says of its parts' SHA-256.
    async fn checksum(&self, job: &Job<'_>) -> Result<(u64, String), Error> {
        let Form::Raw(parts) = &self.form else { return vmdk::checksum(job).await };
        let (file, parts) = (Arc::clone(&self.file), Arc::clone(parts));
        let all = move || parts.all.iter().map(|part| parts.digest(&file, *part)).collect::<std::io::Result<Vec<_>>>();
        let digests = job.stop.or("the disk's digests", tokio::task::spawn_blocking(all)).await?;
        let digests = digests.map_err(|error| Lost::Bug(error).into_error(job))?.map_err(unreadable(job))?;
        Ok((job.request.size * GIB, parts::composite(&digests)))
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
                undo.take_over(of_version(job, object.version));
            }
            // And what has helped to make it.
            if let Form::Raw(_) = disk.form {
                let _ = Box::pin(zeros::take_over(job, undo)).await?;
            }
            for id in Box::pin(object::left(job)).await?.ids() {
                undo.take_over(Made::Upload { id: Some(id), completing: false });
            }
            Some(Uploaded::default())
        }
        Existing::Nothing => Box::pin(send_all(job, undo, &disk, true)).await?,
        Existing::Stale(object) => {
            // In a bucket that keeps versions it stays below the new one.
            if object.version.is_some() {
                undo.take_over(of_version(job, object.version));
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

fn of_version(job: &Job<'_>, version: Option<String>) -> Made {
    Made::Object { key: job.target.key.clone(), version, sure: true }
}

/// Goes on with an upload, or begins one, and completes it. None if another run has ended it.
async fn send_all(job: &Job<'_>, undo: &mut Undo, disk: &Disk, if_absent: bool) -> Result<Option<Uploaded>, Error> {
    let left = Box::pin(object::left(job)).await?;
    for id in left.others {
        undo.take_over(Made::Upload { id: Some(id), completing: false });
    }
    let (begun, stored) = left.begun.unzip();
    let zeros = match &disk.form {
        Form::Raw(parts) => Box::pin(zeros::make(job, undo, parts, stored.as_ref())).await?,
        Form::Vmdk => None,
    };
    let stored = stored.unwrap_or_default();
    let (entry, id) = match begun {
        Some(id) => {
            job.events.note(format!("going on with an upload that was begun before: {} parts are there", stored.len()));
            (undo.take_over(Made::Upload { id: Some(id.clone()), completing: false }), id)
        }
        None => create(job, undo).await?,
    };
    let line = Line {
        clients: Arc::clone(&job.clients),
        events: job.events.clone(),
        bucket: job.target.bucket.clone(),
        key: job.target.key.clone(),
        id: id.clone(),
        stored,
    };
    let sending = match &disk.form {
        Form::Raw(parts) => {
            let (path, file, parts) = (job.request.disk.clone(), Arc::clone(&disk.file), Arc::clone(parts));
            let sender = Arc::new(Sender { line, path, file, parts, zeros });
            Box::pin(send::all(job, &sender)).await?
        }
        Form::Vmdk => Box::pin(vmdk::send(job, &Arc::new(line))).await?,
    };
    let Sending::Done(sent) = sending else {
        undo.forget(entry);
        return Ok(None);
    };
    let count = |how| sent.iter().filter(|one| one.how == how).count();
    let uploaded = Uploaded { parts: sent.len(), copied: count(How::Copied), kept: count(How::Kept) };
    unchanged(job, &disk.file, &disk.before)?;
    let completed = Box::pin(complete(job, undo, entry, Completing { id, sent, if_absent })).await?;
    Ok(completed.then_some(uploaded))
}

/// Deletes what is of no use once the object is there: the zeros, and unfinished uploads of it.
pub(super) async fn tidy(job: &Job<'_>, undo: &mut Undo) -> Result<(), Error> {
    // What can't be deleted now is tried again with the disk's own object.
    let zeros = job.stop.or("the zeros' deletion", undo.objects(job, |key| key != job.target.key));
    let _ = Box::pin(zeros).await?;
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

pub(super) fn open_disk(job: &Job<'_>) -> Result<File, Error> {
    File::open(&job.request.disk).map_err(unreadable(job))
}

/// What the disk is now.
pub(super) fn identity(job: &Job<'_>, file: &File) -> Result<Identity, Error> {
    Identity::of(file).map_err(unreadable(job))
}

/// That the disk is what it was `before`.
pub(super) fn unchanged(job: &Job<'_>, file: &File, before: &Identity) -> Result<(), Error> {
    if identity(job, file)? == *before {
        return Ok(());
    }
    let message = format!("the disk {} was changed while it was uploaded", job.request.disk.display());
    Err(Error::new(Exit::Input, message).help("publish it again when nothing writes to it"))
}

fn unreadable(job: &Job<'_>) -> impl FnOnce(std::io::Error) -> Error {
    let words = format!("cannot read the disk {}", job.request.disk.display());
    move |error| Error::io(words, &error)
}

async fn create(job: &Job<'_>, undo: &mut Undo) -> Result<(usize, String), Error> {
    let made = |id| Made::Upload { id, completing: false };
    let (entry, answer) = job.make("the start of the upload", undo, made(None), |attempt| begin(job, attempt)).await?;
    let id = answer.map_err(|failure| job.error(failure))?;
    undo.made(entry, made(Some(id.clone())));
    Ok((entry, id))
}

async fn begin(job: &Job<'_>, attempt: Try) -> Result<String, Failure> {
    // Asked twice, S3 begins two uploads: an earlier request's is used.
    if attempt.doubtful
        && let Some(id) = object::unfinished(job).await?.into_iter().next()
    {
        return Ok(id);
    }
    let call = job
        .clients
        .s3
        .create_multipart_upload()
        .bucket(&job.target.bucket)
        .key(&job.target.key)
        .content_type("application/octet-stream")
        .checksum_algorithm(ChecksumAlgorithm::Sha256)
        .checksum_type(ChecksumType::Composite)
        .set_metadata(Some(object::metadata(job)))
        .set_server_side_encryption(object::encryption(job))
        .set_ssekms_key_id(object::key_id(job))
        .customize()
        .config_override(s3_once());
    let answer = call.send().await.map_err(job.clients.failed("s3:CreateMultipartUpload"))?;
    answer.upload_id.ok_or_else(|| Failure::found("s3:CreateMultipartUpload", "the answer has no upload id".to_owned()))
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

/// What is put together.
struct Completing {
    id: String,
    sent: Vec<Sent>,
    /// Only where no object is there: what is there is not this run's.
    if_absent: bool,
}

/// Has S3 put the parts together. The undo entry of the upload becomes that of the object. `false` if another run has ended
/// the upload, or made an object meanwhile.
async fn complete(job: &Job<'_>, undo: &mut Undo, entry: usize, all: Completing) -> Result<bool, Error> {
    let Completing { id, sent, if_absent } = all;
    let digests: Vec<Digest> = sent.iter().map(|one| one.digest).collect();
    let whole = parts::composite(&digests);
    let size = sent.iter().map(|one| one.part.length).sum();
    let parts = sent.into_iter().map(completed_part).collect();
    let timeouts = TimeoutConfig::builder().operation_attempt_timeout(COMPLETE).operation_timeout(COMPLETE * 2).build();
    let call = job
        .clients
        .s3
        .complete_multipart_upload()
        .bucket(&job.target.bucket)
        .key(&job.target.key)
        .upload_id(&id)
        .checksum_type(ChecksumType::Composite)
        .set_if_none_match(if_absent.then(|| "*".to_owned()))
        .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(parts)).build())
        .customize()
        .config_override(aws_sdk_s3::config::Builder::new().timeout_config(timeouts));
    let what = "S3 to put the parts together";
    job.stop.check(what)?;
    let unfinished = |completing| Made::Upload { id: Some(id.clone()), completing };
    undo.made(entry, unfinished(true));
    let failure = match job.stop.creating(what, call.send()).await? {
        Ok(answer) => {
            undo.made(entry, of_version(job, object::real_version(answer.version_id)));
            return match answer.checksum_sha256 {
                Some(arrived) if arrived != whole => Err(damaged(job)),
                _ => Ok(true),
            };
        }
        Err(error) => job.clients.failed("s3:CompleteMultipartUpload")(error),
    };
    let gone = failure.code == "NoSuchUpload";
    // There is an object, or there was while the parts were put together ("How to prevent object overwrites", S3 User Guide).
    if !gone && !matches!(failure.code.as_str(), "PreconditionFailed" | "ConditionalRequestConflict") {
        return Err(job.error(failure));
    }
    let found = job.stop.or("the uploaded object", Box::pin(object::look(job, &job.target.key))).await?;
    if !gone {
        undo.made(entry, unfinished(false));
    }
    match found {
        // Perhaps it is this upload's: the first answer was lost, and the SDK has asked again.
        Ok(Some(object)) if object.is_of_disk(job) && object.is(size, &whole) => {
            if gone {
                undo.forget(entry);
            }
            undo.take_over(of_version(job, object.version));
            Ok(true)
        }
        Ok(_) => {
            if gone {
                undo.forget(entry);
            }
            Ok(false)
        }
        Err(_) => Err(job.error(failure)),
    }
}

fn completed_part(sent: Sent) -> CompletedPart {
    CompletedPart::builder()
        .part_number(sent.part.number)
        .e_tag(sent.etag)
        .checksum_sha256(parts::base64(&sent.digest))
        .build()
}

fn damaged(job: &Job<'_>) -> Error {
    Error::new(Exit::Publish, format!("s3://{}/{} differs from what was sent", job.target.bucket, job.target.key))
        .help("publish again; the disk is unchanged")
}
