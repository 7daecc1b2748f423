//! Parts on their way: several at once, each with its SHA-256, streamed from the file, or copied from zeros inside S3.
//! Those that S3 has already, from a run before, are not sent.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::primitives::{ByteStream, Length};
use aws_sdk_s3::types::ChecksumAlgorithm;
use aws_smithy_types::body::SdkBody;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::Job;
use super::client::Clients;
use super::failure::Failure;
use super::object::StoredParts;
use super::parts::{self, Digest, Part, Parts};
use super::retry::{backoff, s3_once};
use super::upload::Lost;
use super::zeros::{self, Zeros};
use crate::error::Error;
use crate::event::{Event, Events};

/// How often a part is sent before the upload fails.
const ATTEMPTS: u32 = 6;
/// The slowest line that the first attempt allows for, in bytes per second and part; each further one allows for half.
const SLOWEST: u64 = 128 << 10;
/// How many copies are in flight for each part that may be sent at once.
const COPIES_BESIDE: usize = 4;
/// How much of the file a part in flight holds in memory.
const READ: usize = 256 << 10;

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
    /// From the zeros inside S3.
    Copied,
    /// An earlier run, or another one, has sent it.
    Kept,
}

/// What came of sending all parts.
pub(super) enum Sending {
    /// S3 has them all, in order.
    Done(Vec<Sent>),
    /// The upload isn't there any more: another run has completed or aborted it.
    Gone,
}

/// Where parts go; shared by all that are in flight.
pub(super) struct Line {
    pub(super) clients: Arc<Clients>,
    pub(super) events: Events,
    pub(super) bucket: String,
    pub(super) key: String,
    pub(super) id: String,
    /// What S3 had of this upload when it was taken up.
    pub(super) stored: StoredParts,
}

/// What a part is read from.
pub(super) enum Body<'a> {
    /// This file, at the part's offset.
    File(&'a Path),
    /// Its bytes.
    Memory(SdkBody),
}

/// Sends parts of a raw disk; shared by all that are in flight.
pub(super) struct Sender {
    pub(super) line: Line,
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    pub(super) parts: Arc<Parts>,
    pub(super) zeros: Option<Zeros>,
}

/// Sends what S3 doesn't have of a raw disk.
pub(super) async fn all(job: &Job<'_>, sender: &Arc<Sender>) -> Result<Sending, Error> {
    let mut sent = Vec::with_capacity(sender.parts.all.len());
    let of = |zeros: bool| sender.parts.all.clone().into_iter().filter(move |part| part.zeros == zeros).peekable();
    let (mut data, mut zeros) = (of(false), of(true));
    let mut running: JoinSet<Result<Sent, Lost>> = JoinSet::new();
    // How many of them are on their way: of data, and of zeros.
    let (mut sending, mut copying) = (0, 0);
    let parallel = job.request.parallel.max(1);
    let mut progress = Progress::of(sender);
    progress.tell(sender);
    loop {
        while let Some(part) = data.next_if(|_| sending < parallel) {
            sending += 1;
            running.spawn(Arc::clone(sender).send(part));
        }
        // A copy costs the line nothing: only zeros that are sent wait for data.
        let has_room = |part: &Part, copying| {
            if sender.is_copied(*part) { copying < parallel * COPIES_BESIDE } else { sending + copying < parallel }
        };
        while let Some(part) = zeros.next_if(|part| has_room(part, copying)) {
            copying += 1;
            running.spawn(Arc::clone(sender).send(part));
        }
        // What still runs is ended with the set, when this returns.
        let Some(ended) = job.stop.or("the upload", running.join_next()).await? else { break };
        match ended.unwrap_or_else(|error| Err(Lost::Bug(error))) {
            Ok(one) => {
                *(if one.part.zeros { &mut copying } else { &mut sending }) -= 1;
                progress.ended(sender, &one);
                sent.push(one);
                progress.tell(sender);
            }
            Err(Lost::Refused(failure)) if failure.code == "NoSuchUpload" => return Ok(Sending::Gone),
            Err(lost) => return Err(lost.into_error(job)),
        }
    }
    sent.sort_unstable_by_key(|one| one.part.number);
    if sent.iter().any(|one| one.how == How::Sent { confirmed: false }) {
        job.events.detail("the endpoint doesn't confirm SHA-256 checksums; it was asked to check them");
    }
    Ok(Sending::Done(sent))
}

/// How many of the parts would be sent, and how many copied from zeros, if that is possible; each with its bytes. Only what
/// S3 has `stored` is read.
pub(super) fn plan(parts: &Parts, file: &File, stored: &StoredParts, copies: bool) -> io::Result<[(u64, u64); 2]> {
    let [mut sent, mut copied] = [(0, 0); 2];
    for part in &parts.all {
        let there = stored.get(&part.number).filter(|stored| stored.size == part.length);
        if let Some(there) = there
            && there.is(*part, &parts.digest(file, *part)?)
        {
            continue;
        }
        let how = if copies && parts.is_copyable(*part) { &mut copied } else { &mut sent };
        *how = (how.0 + 1, how.1 + part.length);
    }
    Ok([sent, copied])
}

/// How far the upload is, in bytes that are sent; what is copied or there already costs nothing.
struct Progress {
    done: u64,
    /// What is left in parts that have to be sent.
    data: u64,
    /// What is left in parts that are copied as long as that is possible.
    zeros: u64,
}

impl Progress {
    fn of(sender: &Sender) -> Self {
        let length = |zeros: bool| {
            let missing = sender.parts.all.iter().filter(|part| part.zeros == zeros && !sender.line.may_have(**part));
            missing.map(|part| part.length).sum()
        };
        Self { done: 0, data: length(false), zeros: length(true) }
    }

    fn ended(&mut self, sender: &Sender, one: &Sent) {
        let length = one.part.length;
        // What S3 seemed to have wasn't counted: if it was sent all the same, there was more to send.
        if !sender.line.may_have(one.part) {
            let left = if one.part.zeros { &mut self.zeros } else { &mut self.data };
            *left -= length;
        }
        self.done += if matches!(one.how, How::Sent { .. }) { length } else { 0 };
    }

    fn tell(&self, sender: &Sender) {
        let zeros = if sender.zeros.as_ref().is_some_and(Zeros::serve) { 0 } else { self.zeros };
        let total = self.done + self.data + zeros;
        sender.line.events.emit(Event::Progress { phase: "upload", done: self.done, total });
    }
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
        if let Some(kept) = self.line.kept(part, digest) {
            return Ok(kept);
        }
        if self.is_copied(part)
            && let Some(copied) = self.copy(part, digest).await
        {
            return Ok(copied);
        }
        self.line.deliver(part, digest, &Body::File(&self.path)).await
    }

    /// Copies a part of zeros inside S3; nothing if that can't be done: then sending it shows why, or works.
    async fn copy(&self, part: Part, digest: Digest) -> Option<Sent> {
        let zeros = self.zeros.as_ref()?;
        for attempt in 1..=zeros::COPIES {
            let why = match self
                .copy_once(part, digest, (zeros.source(&self.line.bucket)?, zeros.range(part.length)))
                .await
            {
                Ok(sent) => return Some(sent),
                Err(failure) if failure.is_passing() && attempt < zeros::COPIES => failure.reason(),
                Err(failure) => {
                    if zeros.refuse() {
                        let why = failure.reason();
                        self.line.events.detail(format!("zeros can't be copied inside S3 and are sent: {why}"));
                    }
                    return None;
                }
            };
            let number = part.number;
            self.line
                .events
                .detail(format!("part {number} is copied again ({attempt} of {} failed): {why}", zeros::COPIES));
            sleep(backoff(attempt)).await;
        }
        None
    }

    async fn copy_once(
        &self,
        part: Part,
        digest: Digest,
        (source, range): (String, Option<String>),
    ) -> Result<Sent, Failure> {
        let call = self
            .line
            .clients
            .s3
            .upload_part_copy()
            .bucket(&self.line.bucket)
            .key(&self.line.key)
            .upload_id(&self.line.id)
            .part_number(part.number)
            .copy_source(source)
            .set_copy_source_range(range)
            .customize()
            .config_override(s3_once().timeout_config(zeros::timeouts()));
        let answer = call.send().await.map_err(self.line.clients.failed("s3:UploadPartCopy"))?;
        let etag = answer.copy_part_result().and_then(|result| result.e_tag()).unwrap_or_default().to_owned();
        let arrived = answer.copy_part_result().and_then(|result| result.checksum_sha256());
        // Without the SHA-256 of a part an object can't be completed that was begun with them.
        if etag.is_empty() || arrived != Some(&parts::base64(&digest)) {
            return Err(Failure::useless("s3:UploadPartCopy", "the copy's SHA-256 is not that of zeros, or not told"));
        }
        Ok(Sent { part, digest, etag, how: How::Copied })
    }
}

impl Line {
    /// Whether S3 has a part of this number and length; only its digest tells whether it is this one.
    fn may_have(&self, part: Part) -> bool {
        self.stored.get(&part.number).is_some_and(|stored| stored.size == part.length)
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
            Body::Memory(bytes) => bytes.try_clone().map(ByteStream::new).unwrap_or_default(),
            Body::File(path) => ByteStream::read_from()
                .path(path)
                .offset(part.offset)
                .length(Length::Exact(part.length))
                .buffer_size(READ)
                .build()
                .await
                .map_err(|error| Lost::Disk(std::io::Error::other(error)))?,
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
        Ok(Sent { part, digest, etag, how: How::Sent { confirmed: arrived.is_some() } })
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
