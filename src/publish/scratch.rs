//! The scratch object: what parts of a disk are copied from inside S3, instead of being sent.
//!
//! Its zeros are copied from an object of their own, the seed, which is sent once, and what else it has of the disk is sent
//! for the disk (see `cut`). Both objects are deleted when the disk is there. To copy takes a permission of its own
//! (`s3:GetObject`) and an endpoint that can; without them everything is sent.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::ChecksumAlgorithm;

use super::action::Action::{
    CompleteMultipartUpload, CreateMultipartUpload, DeleteObject, PutObject, UploadPart, UploadPartCopy,
};
use super::failure::Failure;
use super::multipart::{self, Completed, take_up};
use super::object::{self, Object, StoredParts, Unfinished};
use super::parts::{self, Digest, Extent, Parts};
use super::plan::{Count, Way};
use super::raw::Disk;
use super::retry::{Try, s3_once};
use super::send::{self, Sending, SourceGone, Tally, may_be_copied_later};
use super::undo::{Made, Undo};
use super::upload::Lost;
use super::{Job, body};
use crate::error::Error;

/// How many bytes making the scratch object must save on the line: it takes requests to make and to delete.
const FEW: u64 = 20 << 20;

/// How the keys of the scratch object and of the seed end.
pub(super) const SCRATCH: &str = ".scratch";
pub(super) const SEED: &str = ".zeros";

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

/// Where the scratch object is: behind the disk's own key.
pub(super) fn key(job: &Job<'_>) -> String {
    job.target.key.clone() + SCRATCH
}

fn key_of_seed(job: &Job<'_>) -> String {
    job.target.key.clone() + SEED
}

/// Why there is no scratch object.
enum Missing {
    /// It isn't worth it.
    Few,
    /// It can't be made.
    Because(String),
    /// Another run has ended its upload, or deleted the seed.
    Ended,
    /// That is the end.
    Error(Error),
}

impl From<Error> for Missing {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl Missing {
    fn of(job: &Job<'_>) -> impl Fn(Failure) -> Self {
        |failure| {
            if may_be_copied_later(&failure) {
                Self::Error(job.error(failure))
            } else {
                Self::Because(failure.reason())
            }
        }
    }
}

/// Makes the scratch object, if enough of what can be copied from it is missing in what S3 has `stored` of an upload that
/// was taken up. Without one everything is sent.
pub(super) async fn make(
    job: &Job<'_>,
    undo: &mut Undo,
    disk: &Disk,
    stored: Option<&StoredParts>,
    left: Unfinished,
    tally: &Arc<Tally>,
) -> Result<Result<Option<Source>, SourceGone>, Error> {
    multipart::take_over(undo, &key(job), &left);
    let may_be_left = stored.is_some() || left.ids().count() > 0;
    match Box::pin(find_or_make(job, undo, disk, stored, left, tally)).await {
        Ok(source) => return Ok(Ok(Some(source))),
        Err(Missing::Ended) => return Ok(Err(SourceGone)),
        Err(Missing::Error(error)) => return Err(error),
        Err(Missing::Few) if !may_be_left => return Ok(Ok(None)),
        Err(Missing::Few) => {}
        Err(Missing::Because(why)) => {
            job.events.detail(format!("nothing is copied inside S3, and zeros are sent: {why}"));
        }
    }
    take_over(job, undo).await?;
    Ok(Ok(None))
}

async fn find_or_make(
    job: &Job<'_>,
    undo: &mut Undo,
    disk: &Disk,
    stored: Option<&StoredParts>,
    left: Unfinished,
    tally: &Arc<Tally>,
) -> Result<Source, Missing> {
    let Found { objects, seed } = Box::pin(find(job, disk, stored, &left)).await?;
    delete_later(undo, objects);
    let there = Source::new(key(job), disk.parts.scratch_length());
    let Some(seed) = seed else { return Ok(there) };
    let source = Source::new(key_of_seed(job), seed.extent.length);
    if !seed.is_there {
        let made = |version, sure| Made::Object { key: source.key.clone(), version, sure };
        let put = |attempt| put(job, disk, &source.key, seed, attempt);
        let (entry, answer) = job.make("the zeros that parts are copied from", undo, made(None, false), put).await?;
        undo.made(entry, made(answer.map_err(Missing::of(job))?, true));
    }
    let upload = Box::pin(take_up(job, undo, &there.key, left)).await?.map_err(Missing::of(job))?;
    let later = send::missing(&disk.parts.disk, stored, false);
    let sending = Box::pin(disk.send(job, &upload, |parts| &parts.scratch, Some(source), (tally, later))).await?;
    let sent = match sending {
        Ok(Sending::Done(sent)) => sent,
        Ok(Sending::Failed(Lost::Refused(failure))) => return Err(Missing::of(job)(failure)),
        Ok(Sending::Failed(lost)) => return Err(lost.into_error(job).into()),
        Ok(Sending::Gone) => {
            upload.is_gone(undo);
            return Err(Missing::Ended);
        }
        Err(SourceGone) => return Err(Missing::Ended),
    };
    match Box::pin(upload.complete(job, undo, sent, false)).await?.map_err(Missing::of(job))? {
        // What is copied from it is looked at piece by piece.
        Completed::Whole | Completed::Damaged => Ok(there),
        Completed::ByAnother => Err(Missing::Ended),
    }
}

/// What there is of a scratch object that is worth making.
struct Found {
    /// Objects of this disk, whole or not, by their keys: an earlier run has left them, or another one uses them at this moment.
    objects: Vec<(String, Object)>,
    /// What the scratch object is to be made of; none: it is there.
    seed: Option<Seed>,
}

#[derive(Debug, Clone, Copy)]
struct Seed {
    extent: Extent,
    digest: Digest,
    is_there: bool,
}

async fn find(job: &Job<'_>, disk: &Disk, stored: Option<&StoredParts>, left: &Unfinished) -> Result<Found, Missing> {
    let Some((extent, digest)) = disk.read(job, |parts, _| Ok(parts.seed())).await? else { return Err(Missing::Few) };
    let copyable = copyable(job, disk, stored).await?;
    if copyable < FEW {
        return Err(Missing::Few);
    }
    let length = disk.parts.scratch_length();
    let scratch = look_for_own(job, key(job)).await?;
    let is_whole = match &scratch {
        // Hashed only if it may be.
        Some((_, object)) if object.size() == length => {
            object.is(length, &disk.checksum(job, |parts| &parts.scratch).await?)
        }
        _ => false,
    };
    let joints = send::missing(&disk.parts.scratch, left.begun.as_ref().map(|(_, stored)| stored), false);
    if !is_whole && copyable < FEW + joints {
        return Err(Missing::Few);
    }
    let seed = match look_for_own(job, key_of_seed(job)).await {
        // It isn't needed any more.
        Err(Missing::Because(_)) if is_whole => None,
        found => found?,
    };
    let is_there = seed.as_ref().is_some_and(|(_, object)| is_seed(object, extent, &digest));
    Ok(Found {
        objects: scratch.into_iter().chain(seed).collect(),
        seed: (!is_whole).then_some(Seed { extent, digest, is_there }),
    })
}

/// How many bytes can be copied of what is missing in what S3 has `stored` of the disk.
async fn copyable(job: &Job<'_>, disk: &Disk, stored: Option<&StoredParts>) -> Result<u64, Error> {
    let stored = stored.cloned().unwrap_or_default();
    let missing = move |parts: &Parts, file: &File| {
        let copyable = parts.disk.iter().filter(|piece| piece.source.is_some());
        let [_, (_, copied)] = send::plan(copyable, |piece| parts.digest(file, piece), &stored, true)?;
        Ok(copied)
    };
    disk.read(job, missing).await
}

fn is_seed(found: &Object, extent: Extent, digest: &Digest) -> bool {
    found.is(extent.length, &parts::base64(digest))
}

/// An object of this disk, with its key. Who may not look may not copy either, and another disk's object is in the way.
async fn look_for_own(job: &Job<'_>, key: String) -> Result<Option<(String, Object)>, Missing> {
    let found = job.stop.or("what parts are copied from", Box::pin(object::look(job, &key))).await?;
    match found.map_err(Missing::of(job))? {
        Some(found) if !found.is_of_disk(job) => {
            Err(Missing::Because(format!("another object is there: s3://{}/{key}", job.target.bucket)))
        }
        found => Ok(found.map(|found| (key, found))),
    }
}

async fn put(
    job: &Job<'_>,
    disk: &Disk,
    key: &str,
    Seed { extent, digest, .. }: Seed,
    attempt: Try,
) -> Result<Option<String>, Failure> {
    // Sent twice, a bucket that keeps versions has two: an earlier request's is used.
    if attempt.doubtful
        && let Ok(Some(object)) = object::look(job, key).await
        && object.is_of_disk(job)
        && is_seed(&object, extent, &digest)
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

/// Looks for what an earlier run of this disk has left: this one deletes it.
pub(super) async fn take_over(job: &Job<'_>, undo: &mut Undo) -> Result<(), Error> {
    delete_later(undo, left(job).await?);
    Ok(())
}

fn delete_later(undo: &mut Undo, objects: Vec<(String, Object)>) {
    for (key, object) in objects {
        undo.take_over(Made::object(&key, object.version));
    }
}

/// How many objects [`take_over`] would find.
pub(super) async fn are_left(job: &Job<'_>) -> Result<u64, Error> {
    Ok(left(job).await?.len() as u64)
}

async fn left(job: &Job<'_>) -> Result<Vec<(String, Object)>, Error> {
    let mut all = Vec::new();
    for key in [key(job), key_of_seed(job)] {
        match look_for_own(job, key).await {
            Err(Missing::Error(error)) => return Err(error),
            found => all.extend(found.ok().flatten()),
        }
    }
    Ok(all)
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
    let unfinished = left.ids().count() as u64;
    let nothing = Plan { aborted: unfinished, ..Plan::default() };
    let Found { objects, seed } = match Box::pin(find(job, disk, stored, left)).await {
        Ok(found) => found,
        Err(Missing::Error(error)) => return Err(error),
        Err(Missing::Few) if stored.is_none() && unfinished == 0 => return Ok(nothing),
        Err(_) => return Ok(Plan { deleted: are_left(job).await?, ..nothing }),
    };
    let deleted = objects.len() as u64;
    let Some(seed) = seed else { return Ok(Plan { copies: true, deleted, ..nothing }) };
    let stored = left.begun.as_ref().map(|(_, stored)| stored);
    Ok(Plan {
        copies: true,
        put: !seed.is_there,
        parts: Some(disk.plan(job, |parts| &parts.scratch, stored, true).await?),
        begun: stored.is_some(),
        deleted: deleted + 1 + u64::from(!seed.is_there),
        aborted: left.others.len() as u64,
    })
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
