//! Parts on their way: several at once, each with its SHA-256, streamed from the file, or copied inside S3. Those that S3
//! has already, from a run before, are not sent.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::ChecksumAlgorithm;
use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::client::Clients;
use super::failure::{Failure, Kind};
use super::multipart::Upload;
use super::object::StoredParts;
use super::parts::{self, Digest, Extent, Part, Parts, Piece};
use super::retry::{backoff, patient, s3_once};
use super::scratch::Source;
use super::upload::{Lost, Uploaded};
use super::{Job, body};
use crate::error::Error;
use crate::event::{Event, Events};

/// How often a part is sent, or copied, before that has failed.
const ATTEMPTS: u32 = 6;
/// The slowest line that the first attempt allows for, in bytes per second and part; each further one allows for half.
const SLOWEST: u64 = 128 << 10;
/// How many copies are in flight for each part that may be sent at once.
const COPIES_BESIDE: usize = 4;
/// What S3 says if the upload isn't there, or what is copied from.
pub(super) const UPLOAD_GONE: &str = "NoSuchUpload";
const SOURCE_GONE: &str = "NoSuchKey";
/// The slowest copy that is waited for, in bytes per second; S3 is many times faster.
const SLOWEST_COPY: u64 = 8 << 20;

/// A part that S3 has.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) part: Part,
    pub(super) digest: Digest,
    pub(super) etag: String,
    pub(super) how: How,
}

/// How it came there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Over the line; whether S3 told the SHA-256 of what arrived.
    Sent { confirmed: bool },
    /// Inside S3.
    Copied,
    /// An earlier run, or another one, has sent it.
    Kept,
}

/// What came of sending all parts.
pub(super) enum Sending {
    /// S3 has them all, in order.
    Done(Vec<Sent>),
    /// One of them could be neither sent nor copied.
    Failed(Lost),
    /// The upload isn't there any more: another run has completed or aborted it.
    Gone,
}

/// What is copied from isn't there any more: another run has deleted it.
pub(super) struct SourceGone;

/// Where parts go; shared by all that are in flight.
pub(super) struct Line {
    pub(super) clients: Arc<Clients>,
    pub(super) events: Events,
    pub(super) bucket: String,
    pub(super) key: String,
    pub(super) id: String,
    /// What S3 had of this upload when that was last listed.
    pub(super) stored: StoredParts,
}

/// What a part is read from.
pub(super) enum Body<'a> {
    /// These bytes of this file.
    File(&'a Arc<File>, &'a [Extent]),
    /// Its bytes.
    Memory(Bytes),
}

/// Sends parts of a raw disk; shared by all that are in flight.
pub(super) struct Sender {
    pub(super) line: Line,
    pub(super) file: Arc<File>,
    /// Which know their digests.
    pub(super) parts: Arc<Parts>,
    /// Which of them are sent: the disk's, or the scratch object's.
    pub(super) of: fn(&Parts) -> &[Piece],
    /// What they are copied from.
    pub(super) source: Option<Source>,
    /// A permit for each part that is on the line.
    pub(super) room: Semaphore,
    /// What was done for the upload before, and is now.
    pub(super) tally: Arc<Tally>,
    /// How many bytes will be sent after these.
    pub(super) later: u64,
}

/// Sends what S3 doesn't have of a raw disk.
pub(super) async fn all(job: &Job<'_>, sender: &Arc<Sender>) -> Result<Result<Sending, SourceGone>, Error> {
    let pieces = sender.pieces();
    let mut sent = Vec::with_capacity(pieces.len());
    let (copies, data): (Vec<Piece>, Vec<Piece>) = pieces.iter().cloned().partition(|piece| piece.source.is_some());
    let (mut data, mut copies) = (data.into_iter().peekable(), copies.into_iter().peekable());
    let mut running: JoinSet<Result<(Sent, bool), Lost>> = JoinSet::new();
    // How many are on their way of those that have to be sent, and of those that can be copied.
    let (mut sending, mut copying) = (0, 0);
    let parallel = job.request.parallel.max(1);
    let mut progress = Progress::of(sender);
    progress.tell(sender);
    let mut source_gone = false;
    loop {
        while let Some(piece) = data.next_if(|_| !source_gone && sending < parallel) {
            sending += 1;
            running.spawn(Arc::clone(sender).send(piece));
        }
        // A copy costs the line nothing; what is sent after all waits for room on it.
        while let Some(piece) = copies.next_if(|_| !source_gone && copying < parallel * COPIES_BESIDE) {
            copying += 1;
            running.spawn(Arc::clone(sender).send(piece));
        }
        // What still runs is ended with the set, when this returns.
        let Some(ended) = job.stop.or("the upload", running.join_next()).await? else { break };
        match ended.unwrap_or_else(|error| Err(Lost::Bug(error))) {
            Ok((one, copyable)) => {
                *(if copyable { &mut copying } else { &mut sending }) -= 1;
                progress.ended(sender, &one, copyable);
                sent.push(one);
                progress.tell(sender);
            }
            Err(Lost::Refused(failure)) if failure.code == UPLOAD_GONE => return Ok(Ok(Sending::Gone)),
            // What is on the line may arrive.
            Err(Lost::Refused(failure)) if failure.code == SOURCE_GONE => source_gone = true,
            Err(lost) => return Ok(Ok(Sending::Failed(lost))),
        }
    }
    if source_gone {
        return Ok(Err(SourceGone));
    }
    sent.sort_unstable_by_key(|one| one.part.number);
    if sent.iter().any(|one| one.how == How::Sent { confirmed: false }) {
        job.events.detail("the endpoint doesn't confirm SHA-256 checksums; it was asked to check them");
    }
    Ok(Ok(Sending::Done(sent)))
}

/// How many of the parts would be sent, and how many copied, if that is possible; each with its bytes. Only what S3 has
/// `stored` is read.
pub(super) fn plan<'a>(
    pieces: impl IntoIterator<Item = &'a Piece>,
    digest: impl Fn(&Piece) -> io::Result<Digest>,
    stored: &StoredParts,
    copies: bool,
) -> io::Result<[(u64, u64); 2]> {
    let [mut sent, mut copied] = [(0, 0); 2];
    for piece in pieces {
        let part = piece.part;
        let there = stored.get(&part.number).filter(|stored| stored.size == part.length);
        if let Some(there) = there
            && there.is(part, &digest(piece)?)
        {
            continue;
        }
        let how = if copies && piece.source.is_some() { &mut copied } else { &mut sent };
        *how = (how.0 + 1, how.1 + part.length);
    }
    Ok([sent, copied])
}

/// How many bytes seem to be missing in what S3 has `stored`, in parts that can be copied, or in the others.
pub(super) fn missing(pieces: &[Piece], stored: Option<&StoredParts>, copyable: bool) -> u64 {
    let is_there = |part: &Part| stored.is_some_and(|stored| may_be_in(stored, *part));
    let some = pieces.iter().filter(|piece| piece.source.is_some() == copyable).map(|piece| piece.part);
    some.filter(|part| !is_there(part)).map(|part| part.length).sum()
}

/// Whether S3 has a part of this number and length; only its digest tells whether it is this one.
fn may_be_in(stored: &StoredParts, part: Part) -> bool {
    stored.get(&part.number).is_some_and(|stored| stored.size == part.length)
}

/// What was done so far for the upload of a disk, all its objects and rounds together.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// That were sent.
    bytes: AtomicU64,
    sent: AtomicUsize,
    copied: AtomicUsize,
    kept: AtomicUsize,
}

impl Tally {
    pub(super) fn add(&self, one: &Sent) {
        let parts = match one.how {
            How::Sent { .. } => {
                self.bytes.fetch_add(one.part.length, Ordering::Relaxed);
                &self.sent
            }
            How::Copied => &self.copied,
            How::Kept => &self.kept,
        };
        parts.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn uploaded(&self) -> Uploaded {
        let [sent, copied, kept] = [&self.sent, &self.copied, &self.kept].map(|parts| parts.load(Ordering::Relaxed));
        Uploaded { sent, copied, kept }
    }
}

/// How far the upload is, in bytes that are sent; what is copied or there already costs nothing.
struct Progress {
    /// What is left in parts that have to be sent.
    data: u64,
    /// What is left in parts that are copied as long as that is possible.
    copies: u64,
}

impl Progress {
    fn of(sender: &Sender) -> Self {
        let length = |copyable| missing(sender.pieces(), Some(&sender.line.stored), copyable);
        Self { data: length(false), copies: length(true) }
    }

    fn ended(&mut self, sender: &Sender, one: &Sent, copyable: bool) {
        let length = one.part.length;
        // What S3 seemed to have wasn't counted: if it was sent all the same, there was more to send.
        if !may_be_in(&sender.line.stored, one.part) {
            *(if copyable { &mut self.copies } else { &mut self.data }) -= length;
        }
        sender.tally.add(one);
    }

    fn tell(&self, sender: &Sender) {
        let copies = if sender.copies() { 0 } else { self.copies };
        let done = sender.tally.bytes.load(Ordering::Relaxed);
        let total = done + self.data + copies + sender.later;
        sender.line.events.emit(Event::Progress { phase: "upload", done, total });
    }
}

impl Sender {
    fn pieces(&self) -> &[Piece] {
        (self.of)(&self.parts)
    }

    /// Whether what can be copied is expected to be.
    fn copies(&self) -> bool {
        self.source.as_ref().is_some_and(Source::serves)
    }

    /// Brings one there. Returned is also whether it could have been copied.
    async fn send(self: Arc<Self>, piece: Piece) -> Result<(Sent, bool), Lost> {
        let copyable = piece.source.is_some();
        let (hasher, part) = (Arc::clone(&self), piece.part);
        let hash = move || hasher.parts.digest(&hasher.file, &piece).map(|digest| (piece, digest));
        let (piece, digest) = tokio::task::spawn_blocking(hash).await.map_err(Lost::Bug)?.map_err(Lost::Disk)?;
        if let Some(kept) = self.line.kept(part, digest) {
            return Ok((kept, copyable));
        }
        if let Some(copied) = self.copy(&piece, digest).await? {
            return Ok((copied, copyable));
        }
        let _room = self.room.acquire().await;
        let sent = self.line.deliver(part, digest, &Body::File(&self.file, &piece.extents)).await?;
        Ok((sent, copyable))
    }

    /// Copies a part inside S3; nothing if it is to be sent.
    async fn copy(&self, piece: &Piece, digest: Digest) -> Result<Option<Sent>, Lost> {
        let Some((source, offset)) = self.source.as_ref().zip(piece.source).filter(|(source, _)| source.serves())
        else {
            return Ok(None);
        };
        let failure = match self.copy_until_done(source, offset, piece.part, digest).await {
            Ok(copied) => return Ok(Some(copied)),
            Err(failure) => failure,
        };
        let is_gone = [UPLOAD_GONE, SOURCE_GONE].contains(&failure.code.as_str());
        if is_gone || piece.extents.is_empty() || may_be_copied_later(&failure) {
            return Err(Lost::Refused(failure));
        }
        // Sending it shows why, or works.
        if source.refuse() {
            let why = failure.reason();
            self.line.events.detail(format!("parts can't be copied inside S3 and are sent: {why}"));
        }
        Ok(None)
    }

    /// Copies a part, again while that fails for reasons that pass.
    async fn copy_until_done(&self, source: &Source, offset: u64, part: Part, digest: Digest) -> Result<Sent, Failure> {
        let mut attempt = 1;
        loop {
            let failure = match self.copy_once(source, offset, part, digest).await {
                Err(failure) if failure.is_passing() && attempt < ATTEMPTS && source.serves() => failure,
                ended => return ended,
            };
            let (number, why) = (part.number, failure.reason());
            self.line.events.detail(format!("part {number} is copied again ({attempt} of {ATTEMPTS} failed): {why}"));
            sleep(backoff(attempt)).await;
            attempt += 1;
        }
    }

    async fn copy_once(&self, source: &Source, offset: u64, part: Part, digest: Digest) -> Result<Sent, Failure> {
        let limit = Duration::from_secs(60 + part.length / SLOWEST_COPY);
        let timeouts = TimeoutConfig::builder().operation_attempt_timeout(limit).operation_timeout(limit).build();
        let call = self
            .line
            .clients
            .s3
            .upload_part_copy()
            .bucket(&self.line.bucket)
            .key(&self.line.key)
            .upload_id(&self.line.id)
            .part_number(part.number)
            .copy_source(source.place(&self.line.bucket))
            .set_copy_source_range(source.range(offset, part.length))
            .customize()
            .config_override(patient(s3_once().timeout_config(timeouts)));
        let answer = call.send().await.map_err(self.line.clients.failed("s3:UploadPartCopy"))?;
        let etag = answer.copy_part_result().and_then(|result| result.e_tag()).unwrap_or_default().to_owned();
        let arrived = answer.copy_part_result().and_then(|result| result.checksum_sha256());
        // Without the SHA-256 of a part an object can't be completed that was begun with them.
        if etag.is_empty() || arrived != Some(&parts::base64(&digest)) {
            return Err(Failure::useless("s3:UploadPartCopy", "the copy's SHA-256 is another one, or is not told"));
        }
        Ok(Sent { part, digest, etag, how: How::Copied })
    }
}

impl Line {
    /// That to this upload.
    pub(super) fn of(job: &Job<'_>, upload: &Upload) -> Self {
        Self {
            clients: Arc::clone(&job.clients),
            events: job.events.clone(),
            bucket: job.target.bucket.clone(),
            key: upload.key.clone(),
            id: upload.id.clone(),
            stored: upload.stored.clone().unwrap_or_default(),
        }
    }

    /// The part, if S3 has it.
    pub(super) fn kept(&self, part: Part, digest: Digest) -> Option<Sent> {
        let stored = self.stored.get(&part.number).filter(|stored| stored.is(part, &digest))?;
        Some(Sent { part, digest, etag: stored.etag.clone(), how: How::Kept })
    }

    /// Sends a part, again while that fails for reasons that pass.
    pub(super) async fn deliver(&self, part: Part, digest: Digest, body: &Body<'_>) -> Result<Sent, Lost> {
        let mut attempt = 1;
        loop {
            match self.attempt(part, digest, body, attempt).await {
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

    async fn attempt(&self, part: Part, digest: Digest, body: &Body<'_>, attempt: u32) -> Result<Sent, Lost> {
        let body = match body {
            Body::Memory(bytes) => bytes.clone().into(),
            Body::File(file, extents) => body::of(file, extents),
        };
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
            .body(ByteStream::new(body))
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
        Ok(Sent { part, digest, etag, how: How::Sent { confirmed: arrived.is_some() } })
    }
}

/// Whether what couldn't be copied may be when AWS is less busy, or the line is back. Then to publish once more is quicker than
/// to send all zeros.
pub(super) fn may_be_copied_later(failure: &Failure) -> bool {
    failure.is_passing() && matches!(failure.kind, Kind::Refused | Kind::Unreachable)
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
