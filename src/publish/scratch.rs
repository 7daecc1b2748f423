//! The scratch object: what parts of a disk are copied from inside S3, instead of being sent.
//!
//! Its zeros are copied from an object of their own, the seed, which is sent once, and what else it has of the disk is sent
//! for the disk (see `cut`). Both objects are deleted when the disk is there. To copy takes a permission of its own
//! (`s3:GetObject`) and an endpoint that can; without them everything is sent.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::ChecksumAlgorithm;
use tokio::sync::Semaphore;

use super::action::Action::{
    CompleteMultipartUpload, CreateMultipartUpload, DeleteObject, PutObject, UploadPart, UploadPartCopy,
};
use super::failure::{Failure, Kind};
use super::multipart::{self, Completed, take_up};
use super::object::{self, Object, StoredParts, Unfinished};
use super::parts::{self, Digest, Extent, Parts, Piece};
use super::plan::{Count, Way};
use super::retry::{Try, s3_once};
use super::send::{self, Line, Sender, Sending};
use super::undo::{Made, Undo};
use super::upload::{Lost, Uploaded};
use super::{Job, body};
use crate::error::Error;

/// How many bytes making the scratch object must save on the line: it takes requests to make and to delete.
const FEW: u64 = 20 << 20;
/// How often it is begun anew if another run deletes what is needed for it.
const ROUNDS: usize = 3;

/// An object that parts are copied from.
#[derive(Debug)]
pub(super) struct Source {
    key: String,
    /// In bytes.
    length: u64,
    refused: AtomicBool,
}

impl Source {
    fn new(key: String, length: u64) -> Self {
        Self { key, length, refused: AtomicBool::new(false) }
    }

    /// Bucket and key, written for an URL.
    pub(super) fn place(&self, bucket: &str) -> String {
        format!("{bucket}/{}", escape(&self.key))
    }

    /// Which of its bytes a part of this length has that begins there; none: all of them. Less than all can be copied only of an
    /// object with more than 5 MB (S3 API reference, `UploadPartCopy`): of the seed, all is.
    pub(super) fn range(&self, offset: u64, length: u64) -> Option<String> {
        (length < self.length).then(|| format!("bytes={offset}-{}", offset + length - 1))
    }

    /// Whether parts are still copied.
    pub(super) fn serves(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// From now on they are sent. Whether that is news.
    pub(super) fn refuse(&self) -> bool {
        !self.refused.swap(true, Ordering::Relaxed)
    }
}

/// What a disk's parts are copied from, and what it took.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// None: nothing is copied.
    pub(super) source: Option<Source>,
    pub(super) uploaded: Uploaded,
    /// How many bytes of the disk were sent for it.
    pub(super) sent: u64,
}

/// The disk that it is made of.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) file: Arc<File>,
    pub(super) parts: Arc<Parts>,
}

impl Disk {
    /// Does some work on it for which it has to be read.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        job: &Job<'_>,
        work: impl FnOnce(&Parts, &File) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let Self { file, parts } = self.clone();
        let read = tokio::task::spawn_blocking(move || work(&parts, &file));
        let read = job.stop.or("the disk's digests", read).await?.map_err(|error| Lost::Bug(error).into_error(job))?;
        read.map_err(|error| Lost::Disk(error).into_error(job))
    }

    /// What S3 says of the whole object of which these are the parts.
    pub(super) async fn checksum(&self, job: &Job<'_>, of: fn(&Parts) -> &[Piece]) -> Result<String, Error> {
        let digests = move |parts: &Parts, file: &File| {
            of(parts).iter().map(|piece| parts.digest(file, piece)).collect::<io::Result<Vec<_>>>()
        };
        Ok(parts::composite(&self.read(job, digests).await?))
    }

    /// How many bytes of joints are missing in what is left of a scratch object.
    fn joints(&self, left: &Unfinished) -> u64 {
        send::missing(&self.parts.scratch, left.begun.as_ref().map(|(_, stored)| stored), false)
    }

    /// How many bytes can be copied of what is missing in what S3 has `stored` of the disk.
    async fn copyable(&self, job: &Job<'_>, stored: Option<&StoredParts>) -> Result<u64, Error> {
        let stored = stored.cloned().unwrap_or_default();
        let missing = move |parts: &Parts, file: &File| {
            let copyable = parts.disk.iter().filter(|piece| piece.source.is_some());
            let [_, (_, copied)] = send::plan(copyable, |piece| parts.digest(file, piece), &stored, true)?;
            Ok(copied)
        };
        self.read(job, missing).await
    }

    /// Whether this is a scratch object of it, whole.
    async fn is_scratch(&self, job: &Job<'_>, found: &Object) -> Result<bool, Error> {
        let length = self.parts.scratch_length();
        Ok(found.size() == length && found.is(length, &self.checksum(job, |parts| &parts.scratch).await?))
    }
}

/// Where the scratch object is.
pub(super) fn key(job: &Job<'_>) -> String {
    format!("{}.scratch", job.target.key)
}

fn key_of_seed(job: &Job<'_>) -> String {
    format!("{}.zeros", job.target.key)
}

/// Why there is no scratch object.
enum Missing {
    /// It isn't worth it.
    Few,
    /// It can't be made.
    Because(String),
    /// Another run has deleted what it is made in, or from.
    Deleted,
    /// That is the end.
    Error(Error),
}

impl From<Error> for Missing {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl Missing {
    /// What passes has lasted too long by now; to send everything instead would take far longer.
    fn of(job: &Job<'_>) -> impl Fn(Failure) -> Self {
        |failure| match failure.kind {
            Kind::Refused if !failure.is_passing() => Self::Because(failure.reason()),
            _ => Self::Error(job.error(failure)),
        }
    }
}

/// Makes the scratch object, if enough of what can be copied from it is missing in what S3 has `stored` of an upload that
/// was taken up. Where it can't be made everything is sent.
pub(super) async fn make(
    job: &Job<'_>,
    undo: &mut Undo,
    disk: &Disk,
    stored: Option<&StoredParts>,
    mut left: Unfinished,
) -> Result<Scratch, Error> {
    let mut scratch = Scratch::default();
    let mut may_be_left = stored.is_some();
    for _ in 0..ROUNDS {
        for id in left.ids() {
            undo.take_over(multipart::unfinished_of(&key(job), Some(id.clone())));
            may_be_left = true;
        }
        match Box::pin(find_or_make(job, undo, disk, (stored, left), &mut scratch)).await {
            Ok(source) => return Ok(Scratch { source: Some(source), ..scratch }),
            Err(Missing::Error(error)) => return Err(error),
            Err(Missing::Few) if !may_be_left => return Ok(scratch),
            Err(Missing::Few) => {}
            Err(Missing::Because(why)) => {
                job.events.detail(format!("nothing is copied inside S3, and zeros are sent: {why}"));
            }
            Err(Missing::Deleted) => {
                job.events.detail("another publish has deleted what parts are copied from: it is made anew");
                left = Box::pin(object::left(job)).await?.scratch;
                continue;
            }
        }
        break;
    }
    take_over(job, undo).await?;
    Ok(scratch)
}

async fn find_or_make(
    job: &Job<'_>,
    undo: &mut Undo,
    disk: &Disk,
    (stored, left): (Option<&StoredParts>, Unfinished),
    scratch: &mut Scratch,
) -> Result<Source, Missing> {
    let Some(seed) = disk.read(job, |parts, _| Ok(parts.seed())).await? else { return Err(Missing::Few) };
    let copyable = disk.copyable(job, stored).await?;
    if copyable < FEW {
        return Err(Missing::Few);
    }
    let (key, length) = (key(job), disk.parts.scratch_length());
    let there = || Source::new(key.clone(), length);
    let found = take_over_own(job, undo, &key).await?;
    // An earlier run has left it, or another one uses it at this moment.
    if let Some(found) = found
        && disk.is_scratch(job, &found).await?
    {
        take_over_own(job, undo, &key_of_seed(job)).await?;
        return Ok(there());
    }
    if copyable < FEW + disk.joints(&left) {
        return Err(Missing::Few);
    }
    let seed = Box::pin(find_or_send_seed(job, undo, disk, seed)).await?;
    let upload = Box::pin(take_up(job, undo, &key, left)).await?.map_err(Missing::of(job))?;
    let sender = Arc::new(Sender {
        line: Line::of(job, &upload),
        file: Arc::clone(&disk.file),
        parts: Arc::clone(&disk.parts),
        pieces: disk.parts.scratch.clone(),
        source: Some(seed),
        room: Semaphore::new(job.request.parallel),
        beside: (scratch.sent, send::missing(&disk.parts.disk, stored, false)),
    });
    let sent = match Box::pin(send::all(job, &sender)).await? {
        Sending::Done(sent) => sent,
        Sending::Failed(Lost::Refused(failure)) => return Err(Missing::of(job)(failure)),
        Sending::Failed(lost) => return Err(lost.into_error(job).into()),
        Sending::SourceGone => return Err(Missing::Deleted),
        Sending::Gone => {
            upload.is_gone(undo);
            return Err(Missing::Deleted);
        }
    };
    scratch.uploaded = scratch.uploaded.and(Uploaded::of(&sent));
    scratch.sent += send::bytes_of(&sent);
    match Box::pin(upload.complete(job, undo, sent, false)).await?.map_err(Missing::of(job))? {
        Completed::Whole(_) => Ok(there()),
        // It is found now, or is to be made once more.
        Completed::ByAnother => Err(Missing::Deleted),
    }
}

/// Finds the seed, or sends it.
async fn find_or_send_seed(
    job: &Job<'_>,
    undo: &mut Undo,
    disk: &Disk,
    seed: (Extent, Digest),
) -> Result<Source, Missing> {
    let source = Source::new(key_of_seed(job), seed.0.length);
    if take_over_own(job, undo, &source.key).await?.is_some_and(|found| is_seed(&found, seed)) {
        return Ok(source);
    }
    let made = |version, sure| Made::Object { key: source.key.clone(), version, sure };
    let put = |attempt| put(job, disk, &source.key, seed, attempt);
    let (entry, answer) = job.make("the zeros that parts are copied from", undo, made(None, false), put).await?;
    undo.made(entry, made(answer.map_err(Missing::of(job))?, true));
    Ok(source)
}

fn is_seed(found: &Object, (extent, digest): (Extent, Digest)) -> bool {
    found.is(extent.length, &parts::base64(&digest))
}

async fn put(
    job: &Job<'_>,
    disk: &Disk,
    key: &str,
    (extent, digest): (Extent, Digest),
    attempt: Try,
) -> Result<Option<String>, Failure> {
    // Sent twice, a bucket that keeps versions has two: an earlier request's is used.
    if attempt.doubtful
        && let Ok(Some(object)) = object::look(job, key).await
        && object.is_of_disk(job)
        && is_seed(&object, (extent, digest))
    {
        return Ok(object.version);
    }
    let call = job
        .clients
        .s3
        .put_object()
        .bucket(&job.target.bucket)
        .key(key)
        .checksum_algorithm(ChecksumAlgorithm::Sha256)
        .checksum_sha256(parts::base64(&digest))
        .set_metadata(Some(object::metadata(job)))
        .set_server_side_encryption(object::encryption(job))
        .set_ssekms_key_id(object::key_id(job))
        .content_length(i64::try_from(extent.length).unwrap_or(i64::MAX))
        .body(ByteStream::new(body::of(&disk.file, &[extent])))
        .customize()
        .config_override(s3_once().timeout_config(send::part_timeouts(extent.length, attempt.number)));
    let answer = call.send().await.map_err(job.clients.failed("s3:PutObject"))?;
    Ok(object::real_version(answer.version_id))
}

/// Looks for an object of this disk, which this run deletes then. Another disk's is in the way.
async fn take_over_own(job: &Job<'_>, undo: &mut Undo, key: &str) -> Result<Option<Object>, Missing> {
    let Some(found) = look_for_own(job, key).await? else { return Ok(None) };
    undo.take_over(Made::Object { key: key.to_owned(), version: found.version.clone(), sure: true });
    Ok(Some(found))
}

/// Looks for what an earlier run of this disk has left: this one deletes it.
pub(super) async fn take_over(job: &Job<'_>, undo: &mut Undo) -> Result<(), Error> {
    for key in [key(job), key_of_seed(job)] {
        if let Err(Missing::Error(error)) = take_over_own(job, undo, &key).await {
            return Err(error);
        }
    }
    Ok(())
}

/// What [`make`] would do.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Plan {
    /// Parts of the disk are copied.
    pub(super) copies: bool,
    /// The seed is sent.
    put: bool,
    /// What is sent and copied for the scratch object, each with its bytes; none: it is there.
    parts: Option<[(u64, u64); 2]>,
    begun: bool,
    /// How many objects there are to delete afterwards: what is there, and what is made.
    deleted: u64,
    /// How many unfinished uploads are aborted.
    pub(super) aborted: u64,
}

impl Plan {
    /// Adds its requests and what they cost to those of the last step.
    pub(super) fn tell(self, way: &mut Way) {
        let [sent, copied] = self.parts.unwrap_or_default();
        let makes = u64::from(self.parts.is_some());
        let seed = u64::from(self.put);
        if let Some(requests) = way.steps.last() {
            requests.exactly(PutObject, seed).exactly(CreateMultipartUpload, makes - u64::from(self.begun));
            requests
                .exactly(UploadPart, sent.0)
                .exactly(UploadPartCopy, copied.0)
                .exactly(CompleteMultipartUpload, makes);
            requests.exactly(DeleteObject, self.deleted);
        }
        way.cost.bytes_sent += Count::exactly(sent.1 + seed * parts::SEED_LENGTH);
        way.cost.bytes_copied_in_s3 += Count::exactly(copied.1);
    }
}

/// Looks as [`make`] does.
pub(super) async fn plan(
    job: &Job<'_>,
    disk: &Disk,
    stored: Option<&StoredParts>,
    left: &Unfinished,
) -> Result<Plan, Error> {
    let mut plan = Plan { aborted: left.ids().count() as u64, ..Plan::default() };
    match Box::pin(plan_finding(job, disk, stored, left, &mut plan)).await {
        Err(Missing::Error(error)) => Err(error),
        Err(Missing::Few) if stored.is_none() && plan.aborted == 0 => Ok(plan),
        Err(_) => Ok(Plan { deleted: are_left(job).await?, ..plan }),
        Ok(()) => Ok(Plan { copies: true, ..plan }),
    }
}

async fn plan_finding(
    job: &Job<'_>,
    disk: &Disk,
    stored: Option<&StoredParts>,
    left: &Unfinished,
    plan: &mut Plan,
) -> Result<(), Missing> {
    let Some(seed) = disk.read(job, |parts, _| Ok(parts.seed())).await? else { return Err(Missing::Few) };
    let copyable = disk.copyable(job, stored).await?;
    if copyable < FEW {
        return Err(Missing::Few);
    }
    let found = look_for_own(job, &key(job)).await?;
    plan.deleted += u64::from(found.is_some());
    if let Some(found) = found
        && disk.is_scratch(job, &found).await?
    {
        plan.deleted += u64::from(look_for_own(job, &key_of_seed(job)).await?.is_some());
        return Ok(());
    }
    if copyable < FEW + disk.joints(left) {
        return Err(Missing::Few);
    }
    let found = look_for_own(job, &key_of_seed(job)).await?;
    plan.deleted += u64::from(found.is_some());
    let put = !found.is_some_and(|found| is_seed(&found, seed));
    let stored = left.begun.as_ref().map(|(_, stored)| stored.clone()).unwrap_or_default();
    let amounts =
        move |parts: &Parts, file: &File| send::plan(&parts.scratch, |piece| parts.digest(file, piece), &stored, true);
    plan.parts = Some(disk.read(job, amounts).await?);
    plan.put = put;
    plan.begun = left.begun.is_some();
    plan.aborted = left.others.len() as u64;
    plan.deleted += 1 + u64::from(put);
    Ok(())
}

/// An object of this disk. Who may not look may not copy either, and another disk's object is in the way.
async fn look_for_own(job: &Job<'_>, key: &str) -> Result<Option<Object>, Missing> {
    let found = job.stop.or("what parts are copied from", Box::pin(object::look(job, key))).await?;
    match found.map_err(Missing::of(job))? {
        Some(found) if !found.is_of_disk(job) => {
            Err(Missing::Because(format!("another object is there: s3://{}/{key}", job.target.bucket)))
        }
        found => Ok(found),
    }
}

/// How many objects [`take_over`] would find.
pub(super) async fn are_left(job: &Job<'_>) -> Result<u64, Error> {
    let mut count = 0;
    for key in [key(job), key_of_seed(job)] {
        match look_for_own(job, &key).await {
            Err(Missing::Error(error)) => return Err(error),
            found => count += u64::from(matches!(found, Ok(Some(_)))),
        }
    }
    Ok(count)
}

/// `x-amz-copy-source` is to be percent-encoded, its slashes apart (S3 API reference, `UploadPartCopy`).
fn escape(key: &str) -> String {
    use std::fmt::Write as _;
    key.bytes().fold(String::new(), |mut escaped, byte| {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_escaped_for_the_copys_source() {
        assert_eq!(escape("images/a b+c-ä.raw"), "images/a%20b%2Bc-%C3%A4.raw");
        let source = Source::new("x y".to_owned(), 7);
        assert_eq!(source.place("b"), "b/x%20y");
        assert_eq!(
            [(0, 6), (1, 6), (0, 7)].map(|(offset, length)| source.range(offset, length)),
            [Some("bytes=0-5".to_owned()), Some("bytes=1-6".to_owned()), None]
        );
        assert!(source.serves() && source.refuse() && !source.refuse() && !source.serves());
    }
}
