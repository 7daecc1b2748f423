//! The disk into the bucket: parallel parts, each with its SHA-256, streamed from the file.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::primitives::{ByteStream, Length};
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumMode, ChecksumType, CompletedMultipartUpload, CompletedPart};
use tokio::task::{JoinError, JoinSet};
use tokio::time::sleep;

use super::Job;
use super::client::Clients;
use super::failure::Failure;
use super::parts::{self, Digest, Part, Parts};
use super::retry::{Try, backoff, s3_once};
use super::undo::{Made, Undo};
use super::zeros::{self, Zeros};
use crate::error::{Error, Exit};
use crate::event::{Event, Events};
use crate::store::Identity;
use crate::units::{GIB, Size};

/// How often a part is sent before the upload fails.
const ATTEMPTS: u32 = 6;
/// The slowest line that the first attempt allows for, in bytes per second and part; each further one allows for half.
const SLOWEST: u64 = 128 << 10;
/// How many copies are in flight for each part that may be sent at once.
const COPIES_BESIDE: usize = 4;
/// How much of the file a part in flight holds in memory.
const READ: usize = 256 << 10;
/// S3 puts the parts together before it answers.
const COMPLETE: Duration = Duration::from_mins(5);

/// What came of it: how many parts there are, and how many of them were copied from zeros instead of sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Uploaded {
    parts: usize,
    copied: usize,
}

pub(super) fn in_words(uploaded: &Uploaded) -> String {
    let Uploaded { parts, copied } = *uploaded;
    match copied {
        0 => format!("{parts} parts, each with its SHA-256"),
        _ => format!("{} parts, each with its SHA-256, and {copied} of zeros that were not sent", parts - copied),
    }
}

pub(super) fn begins(job: &Job<'_>) -> String {
    let size = Size(job.request.size * GIB);
    format!("{size} to s3://{}/{}", job.target.bucket, job.target.key)
}

pub(super) fn plan_in_words(job: &Job<'_>) -> Result<String, Error> {
    let (_, parts) = open(job)?;
    Ok(format!("upload {} in {} parts ({} in parts with data)", begins(job), parts.all.len(), Size(parts.data())))
}

/// Uploads the disk.
pub(super) async fn upload(job: &Job<'_>, undo: &mut Undo) -> Result<Uploaded, Error> {
    let (file, parts) = open(job)?;
    let before = identity(job, &file)?;
    let zeros = Box::pin(zeros::make(job, undo, &parts)).await?;
    let (entry, id) = create(job, undo).await?;
    let sender = Sender {
        clients: Arc::clone(&job.clients),
        events: job.events.clone(),
        bucket: job.target.bucket.clone(),
        key: job.target.key.clone(),
        id: id.clone(),
        path: job.request.disk.clone(),
        file,
        parts,
        zeros,
    };
    let sender = Arc::new(sender);
    let sent = send_all(job, &sender).await?;
    let uploaded = Uploaded { parts: sent.len(), copied: sent.iter().filter(|one| one.copied).count() };
    unchanged(job, &sender.file, &before)?;
    Box::pin(complete(job, undo, entry, &id, sent)).await?;
    // What can't be deleted now is tried again with the disk's own object.
    let zeros = job.stop.or("the zeros' deletion", undo.objects(job, |key| key != job.target.key));
    let _ = Box::pin(zeros).await?;
    Ok(uploaded)
}

/// Deletes what was uploaded. Nothing fails if that fails: the disk is imported already.
pub(super) async fn delete(job: &Job<'_>, undo: &mut Undo) {
    for left in undo.objects(job, |_| true).await {
        job.events.warn(format!("could not delete {left}"));
    }
}

fn open(job: &Job<'_>) -> Result<(File, Parts), Error> {
    let file = open_disk(job)?;
    let parts = Parts::of(&file, job.request.size * GIB).map_err(unreadable(job))?;
    Ok((file, parts))
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

/// The unfinished upload of the target's key, which is no other run's.
pub(super) async fn find(job: &Job<'_>) -> Result<Option<String>, Failure> {
    let target = &job.target;
    let call = job.clients.s3.list_multipart_uploads().bucket(&target.bucket).prefix(&target.key);
    let answer = call.send().await.map_err(job.clients.failed("s3:ListMultipartUploads"))?;
    let own = answer.uploads().iter().find(|upload| upload.key() == Some(&target.key));
    Ok(own.and_then(|upload| upload.upload_id()).map(str::to_owned))
}

async fn begin(job: &Job<'_>, attempt: Try) -> Result<String, Failure> {
    // Asked twice, S3 begins two uploads: an earlier request's is used.
    if attempt.doubtful
        && let Some(id) = find(job).await?
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
        .metadata("kiln-digest", &job.request.digest)
        .customize()
        .config_override(s3_once());
    let answer = call.send().await.map_err(job.clients.failed("s3:CreateMultipartUpload"))?;
    answer.upload_id.ok_or_else(|| Failure::found("s3:CreateMultipartUpload", "the answer has no upload id".to_owned()))
}

/// What was sent of one part.
struct Sent {
    part: Part,
    digest: Digest,
    etag: String,
    /// Whether S3 told the SHA-256 of what arrived.
    confirmed: bool,
    /// Whether it was copied inside S3.
    copied: bool,
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

async fn send_all(job: &Job<'_>, sender: &Arc<Sender>) -> Result<Vec<Sent>, Error> {
    let mut sent = Vec::with_capacity(sender.parts.all.len());
    let mut waiting = sender.parts.all.clone().into_iter().peekable();
    let mut running: JoinSet<Result<Sent, Lost>> = JoinSet::new();
    let mut progress = Progress::of(sender);
    progress.tell(sender);
    loop {
        // A copy costs the line nothing.
        let most = |part: &Part| job.request.parallel.max(1) * if sender.is_copied(*part) { COPIES_BESIDE } else { 1 };
        while let Some(part) = waiting.next_if(|part| running.len() < most(part)) {
            running.spawn(Arc::clone(sender).send(part));
        }
        // What still runs is ended with the set, when this returns.
        let Some(ended) = job.stop.or("the upload", running.join_next()).await? else { break };
        match ended.unwrap_or_else(|error| Err(Lost::Bug(error))) {
            Ok(one) => {
                progress.ended(sender, &one);
                sent.push(one);
                progress.tell(sender);
            }
            Err(lost) => return Err(lost.into_error(job)),
        }
    }
    sent.sort_unstable_by_key(|one| one.part.number);
    if sent.iter().any(|one| !one.confirmed) {
        job.events.detail("the endpoint doesn't confirm SHA-256 checksums; it was asked to check them");
    }
    Ok(sent)
}

/// How far the upload is, in bytes that are sent; what is copied costs nothing.
struct Progress {
    done: u64,
    /// What is left in parts that have to be sent.
    data: u64,
    /// What is left in parts that are copied as long as that is possible.
    holes: u64,
}

impl Progress {
    fn of(sender: &Sender) -> Self {
        let length = |copyable: bool| {
            let parts = sender.parts.all.iter().filter(|part| sender.parts.is_copyable(**part) == copyable);
            parts.map(|part| part.length).sum()
        };
        Self { done: 0, data: length(false), holes: length(true) }
    }

    fn ended(&mut self, sender: &Sender, one: &Sent) {
        let left = if sender.parts.is_copyable(one.part) { &mut self.holes } else { &mut self.data };
        *left -= one.part.length;
        self.done += if one.copied { 0 } else { one.part.length };
    }

    fn tell(&self, sender: &Sender) {
        let holes = if sender.zeros.as_ref().is_some_and(Zeros::serve) { 0 } else { self.holes };
        let total = self.done + self.data + holes;
        sender.events.emit(Event::Progress { phase: "upload", done: self.done, total });
    }
}

/// Sends parts; shared by all that are in flight.
struct Sender {
    clients: Arc<Clients>,
    events: Events,
    bucket: String,
    key: String,
    id: String,
    path: PathBuf,
    file: File,
    parts: Parts,
    zeros: Option<Zeros>,
}

impl Sender {
    /// Whether the part is expected to be copied.
    fn is_copied(&self, part: Part) -> bool {
        self.parts.is_copyable(part) && self.zeros.as_ref().is_some_and(Zeros::serve)
    }

    async fn send(self: Arc<Self>, part: Part) -> Result<Sent, Lost> {
        let hasher = Arc::clone(&self);
        let digest = tokio::task::spawn_blocking(move || hasher.parts.digest(&hasher.file, part));
        let digest = digest.await.map_err(Lost::Bug)?.map_err(Lost::Disk)?;
        if self.parts.is_zeros(part, &digest)
            && let Some(copied) = self.copy(part, digest).await
        {
            return Ok(copied);
        }
        let mut attempt = 1;
        loop {
            match self.attempt(part, digest, attempt).await {
                Err(Lost::Refused(failure)) if attempt < ATTEMPTS && may_be_sent_again(&failure) => {
                    let why = failure.reason();
                    self.events
                        .detail(format!("part {} goes again ({attempt} of {ATTEMPTS} failed): {why}", part.number));
                    sleep(backoff(attempt)).await;
                    attempt += 1;
                }
                ended => return ended,
            }
        }
    }

    /// Copies a part of zeros inside S3; nothing if that can't be done: then sending it shows why, or works.
    async fn copy(&self, part: Part, digest: Digest) -> Option<Sent> {
        let zeros = self.zeros.as_ref()?;
        for attempt in 1..=zeros::COPIES {
            let why = match self.copy_once(part, digest, zeros.source(&self.bucket)?).await {
                Ok(sent) => return Some(sent),
                Err(failure) if failure.is_passing() && attempt < zeros::COPIES => failure.reason(),
                Err(failure) => {
                    if zeros.refuse() {
                        let why = failure.reason();
                        self.events.detail(format!("zeros can't be copied inside S3 and are sent: {why}"));
                    }
                    return None;
                }
            };
            let number = part.number;
            self.events.detail(format!("part {number} is copied again ({attempt} of {} failed): {why}", zeros::COPIES));
            sleep(backoff(attempt)).await;
        }
        None
    }

    async fn copy_once(&self, part: Part, digest: Digest, source: String) -> Result<Sent, Failure> {
        let call = self
            .clients
            .s3
            .upload_part_copy()
            .bucket(&self.bucket)
            .key(&self.key)
            .upload_id(&self.id)
            .part_number(part.number)
            .copy_source(source)
            .customize()
            .config_override(s3_once().timeout_config(zeros::timeouts()));
        let answer = call.send().await.map_err(self.clients.failed("s3:UploadPartCopy"))?;
        let etag = answer.copy_part_result().and_then(|result| result.e_tag()).unwrap_or_default().to_owned();
        let arrived = answer.copy_part_result().and_then(|result| result.checksum_sha256());
        // Without the SHA-256 of a part an object can't be completed that was begun with them.
        if etag.is_empty() || arrived != Some(&parts::base64(&digest)) {
            return Err(Failure::useless("s3:UploadPartCopy", "the copy's SHA-256 is not that of zeros, or not told"));
        }
        Ok(Sent { part, digest, etag, confirmed: true, copied: true })
    }

    async fn attempt(&self, part: Part, digest: Digest, attempt: u32) -> Result<Sent, Lost> {
        let body = ByteStream::read_from()
            .path(&self.path)
            .offset(part.offset)
            .length(Length::Exact(part.length))
            .buffer_size(READ)
            .build()
            .await
            .map_err(|error| Lost::Disk(std::io::Error::other(error)))?;
        let expected = parts::base64(&digest);
        let answer = self
            .clients
            .s3
            .upload_part()
            .bucket(&self.bucket)
            .key(&self.key)
            .upload_id(&self.id)
            .part_number(part.number)
            .checksum_algorithm(ChecksumAlgorithm::Sha256)
            .checksum_sha256(&expected)
            .content_length(i64::try_from(part.length).unwrap_or(i64::MAX))
            .body(body)
            .customize()
            .config_override(s3_once().timeout_config(part_timeouts(part.length, attempt)))
            .send()
            .await
            .map_err(|error| Lost::Refused(self.clients.failed("s3:UploadPart")(error)))?;
        let arrived = answer.checksum_sha256();
        if arrived.is_some_and(|arrived| arrived != expected) {
            let message = format!("part {} arrived damaged", part.number);
            return Err(Lost::Refused(Failure::found("s3:UploadPart", message)));
        }
        // A page to sign in at says that all is well, too.
        let Some(etag) = answer.e_tag().map(str::to_owned) else {
            let message = format!("the answer to part {} has no ETag", part.number);
            return Err(Lost::Refused(Failure::found("s3:UploadPart", message)));
        };
        Ok(Sent { part, digest, etag, confirmed: arrived.is_some(), copied: false })
    }
}

/// Damage on the way is found by S3, which then refuses the part; sent again it may arrive whole.
fn may_be_sent_again(failure: &Failure) -> bool {
    failure.is_passing()
        || matches!(failure.code.as_str(), "BadDigest" | "XAmzContentChecksumMismatch" | "IncompleteBody")
}

/// For an attempt at a part of `length` bytes.
pub(super) fn part_timeouts(length: u64, attempt: u32) -> TimeoutConfig {
    let limit = part_limit(length, attempt);
    TimeoutConfig::builder().operation_attempt_timeout(limit).operation_timeout(limit).build()
}

/// How long an attempt may take. A stalled line is noticed quickly, a slow one gets more time with each attempt.
fn part_limit(length: u64, attempt: u32) -> Duration {
    Duration::from_secs(30 + length / SLOWEST).saturating_mul(1 << attempt.saturating_sub(1).min(8))
}

/// Has S3 put the parts together. The undo entry of the upload becomes that of the object.
async fn complete(job: &Job<'_>, undo: &mut Undo, entry: usize, id: &str, sent: Vec<Sent>) -> Result<(), Error> {
    let digests: Vec<Digest> = sent.iter().map(|one| one.digest).collect();
    let whole = parts::composite(&digests);
    let parts = sent.into_iter().map(completed_part).collect();
    let timeouts = TimeoutConfig::builder().operation_attempt_timeout(COMPLETE).operation_timeout(COMPLETE * 2).build();
    let call = job
        .clients
        .s3
        .complete_multipart_upload()
        .bucket(&job.target.bucket)
        .key(&job.target.key)
        .upload_id(id)
        .checksum_type(ChecksumType::Composite)
        .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(parts)).build())
        .customize()
        .config_override(aws_sdk_s3::config::Builder::new().timeout_config(timeouts));
    let what = "S3 to put the parts together";
    job.stop.check(what)?;
    undo.made(entry, Made::Upload { id: Some(id.to_owned()), completing: true });
    let (version, checksum) = match job.stop.creating(what, call.send()).await? {
        Ok(answer) => (answer.version_id, answer.checksum_sha256),
        Err(error) => {
            let failure = job.clients.failed("s3:CompleteMultipartUpload")(error);
            // If the first answer was lost and the SDK asked again, the upload is gone because it became the object.
            if failure.code != "NoSuchUpload" {
                return Err(job.error(failure));
            }
            match job.stop.or("the uploaded object", Box::pin(object(job, &job.target.key))).await? {
                Ok(Some(object)) if object.checksum.as_deref() == Some(&whole) => (object.version, object.checksum),
                _ => return Err(job.error(failure)),
            }
        }
    };
    undo.made(entry, Made::Object { key: job.target.key.clone(), version: real_version(version), sure: true });
    match checksum {
        Some(arrived) if arrived != whole => Err(damaged(job)),
        _ => Ok(()),
    }
}

fn completed_part(sent: Sent) -> CompletedPart {
    CompletedPart::builder()
        .part_number(sent.part.number)
        .e_tag(sent.etag)
        .checksum_sha256(parts::base64(&sent.digest))
        .build()
}

/// What S3 says of an object.
pub(super) struct Object {
    pub(super) version: Option<String>,
    checksum: Option<String>,
}

/// The object with this key in the target's bucket, if it is there.
pub(super) async fn object(job: &Job<'_>, key: &str) -> Result<Option<Object>, Failure> {
    let bucket = &job.target.bucket;
    let head = job.clients.s3.head_object().bucket(bucket).key(key).checksum_mode(ChecksumMode::Enabled);
    match head.send().await.map_err(job.clients.failed("s3:HeadObject")) {
        Ok(head) => Ok(Some(Object { version: real_version(head.version_id), checksum: head.checksum_sha256 })),
        Err(failure) if failure.is_not_found() => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// A bucket that keeps no versions has none, or one named `null`.
pub(super) fn real_version(version: Option<String>) -> Option<String> {
    version.filter(|version| version != "null")
}

fn damaged(job: &Job<'_>) -> Error {
    Error::new(Exit::Publish, format!("s3://{}/{} differs from what was sent", job.target.bucket, job.target.key))
        .help("publish again; the disk is unchanged")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::MIB;

    #[test]
    fn a_part_gets_more_time_with_each_attempt() {
        assert_eq!(part_limit(8 * MIB, 1), Duration::from_secs(94));
        assert_eq!(part_limit(8 * MIB, 2), Duration::from_secs(188));
        assert_eq!(part_limit(8 * MIB, 6), Duration::from_secs(94 * 32));
    }
}
