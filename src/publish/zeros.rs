//! Zeros that are copied inside S3 instead of being sent.
//!
//! A raw disk is mostly zeros. The longest part of them is sent as an object of its own, and every part of zeros is copied
//! from that (`UploadPartCopy`), so that a disk costs the line what its data costs. To copy takes a permission of its own
//! (`s3:GetObject`) and an endpoint that can; without them the zeros are sent.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::primitives::{ByteStream, Length};
use aws_sdk_s3::types::ChecksumAlgorithm;

use super::failure::Failure;
use super::object::{Object, StoredParts};
use super::parts::{self, Digest, Part, Parts};
use super::retry::{Try, s3_once};
use super::undo::{Made, Undo};
use super::{Job, object, send};
use crate::error::Error;

/// Fewer parts of zeros than this are sent: the object takes a request to make and one to delete.
const FEW: usize = 4;

/// How often a part is copied, and how long one copy may take: S3 does in seconds what it can.
pub(super) const COPIES: u32 = 3;
const COPY: Duration = Duration::from_secs(60);

/// The object of zeros.
#[derive(Debug)]
pub(super) struct Zeros {
    key: String,
    /// In bytes.
    length: u64,
    refused: AtomicBool,
}

/// Makes the object of zeros, from the disk's own, if enough of them are missing in what S3 has `stored` of an
/// upload that was taken up. Where that fails they are sent.
pub(super) async fn make(
    job: &Job<'_>,
    undo: &mut Undo,
    parts: &Parts,
    stored: Option<&StoredParts>,
) -> Result<Option<Zeros>, Error> {
    let Some((longest, digest)) = needed(parts, stored) else {
        if stored.is_some() {
            let _ = take_over(job, undo).await?;
        }
        return Ok(None);
    };
    let zeros = Zeros { key: key(job), length: longest.length, refused: AtomicBool::new(false) };
    let made = |version, sure| Made::Object { key: zeros.key.clone(), version, sure };
    let are_sent = |why: String| job.events.detail(format!("zeros can't be kept in S3 and are sent: {why}"));
    match take_over(job, undo).await? {
        Ok(Some(there)) if !there.is_of_disk(job) => {
            are_sent(format!("another object is there: s3://{}/{}", job.target.bucket, zeros.key));
            return Ok(None);
        }
        // An earlier run has left them, or another one uses them at this moment.
        Ok(Some(there)) if there.is(longest.length, &parts::base64(&digest)) => return Ok(Some(zeros)),
        Ok(_) => {}
        // Who may not look may not copy either.
        Err(failure) => {
            are_sent(failure.reason());
            return Ok(None);
        }
    }
    let put = |attempt| put(job, &zeros.key, longest, digest, attempt);
    let (entry, answer) = job.make("the zeros that parts are copied from", undo, made(None, false), put).await?;
    match answer {
        Ok(version) => undo.made(entry, made(version, true)),
        Err(failure) => {
            are_sent(failure.reason());
            return Ok(None);
        }
    }
    Ok(Some(zeros))
}

/// The zeros that are kept in S3, with their digest, if enough of their copies are missing in what S3 has `stored`.
fn needed(parts: &Parts, stored: Option<&StoredParts>) -> Option<(Part, Digest)> {
    let is_there = |part: &Part| {
        let stored = stored.and_then(|stored| stored.get(&part.number));
        stored.zip(parts.digest_of_zeros(*part)).is_some_and(|(stored, digest)| stored.is(*part, &digest))
    };
    let longest = parts.longest_zeros()?;
    let missing = parts.zeros().filter(|part| !is_there(part)).count();
    (missing >= FEW).then_some((longest, parts.digest_of_zeros(longest)?))
}

/// What [`make`] would do.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Plan {
    /// Parts are copied.
    pub(super) copies: bool,
    /// How many bytes are sent for that; none: nothing.
    pub(super) put: Option<u64>,
    /// How many objects there are to delete afterwards: what is there, and what is made.
    pub(super) deleted: u64,
}

/// Looks as [`make`] does.
pub(super) async fn plan(job: &Job<'_>, parts: &Parts, stored: Option<&StoredParts>) -> Result<Plan, Error> {
    let longest = needed(parts, stored);
    if longest.is_none() && stored.is_none() {
        return Ok(Plan::default());
    }
    let there = look(job).await?;
    Ok(match (longest, there) {
        (Some((longest, _)), Ok(None)) => Plan { copies: true, put: Some(longest.length), deleted: 1 },
        (Some((longest, digest)), Ok(Some(there))) if there.is_of_disk(job) => {
            let whole = there.is(longest.length, &parts::base64(&digest));
            Plan { copies: true, put: (!whole).then_some(longest.length), deleted: 1 + u64::from(!whole) }
        }
        (_, there) => Plan { deleted: u64::from(is_own(job, &there)), ..Plan::default() },
    })
}

/// Whether zeros are there that [`take_over`] would delete.
pub(super) async fn are_left(job: &Job<'_>) -> Result<bool, Error> {
    Ok(is_own(job, &look(job).await?))
}

async fn look(job: &Job<'_>) -> Result<Result<Option<Object>, Failure>, Error> {
    job.stop.or("the zeros", Box::pin(object::look(job, &key(job)))).await
}

fn is_own(job: &Job<'_>, found: &Result<Option<Object>, Failure>) -> bool {
    found.as_ref().is_ok_and(|there| there.as_ref().is_some_and(|there| there.is_of_disk(job)))
}

/// Where the zeros are, for words: bucket and key.
pub(super) fn place(job: &Job<'_>) -> String {
    format!("{}/{}", job.target.bucket, key(job))
}

fn key(job: &Job<'_>) -> String {
    format!("{}.zeros", job.target.key)
}

/// Looks for zeros that an earlier run of this disk has left: this one deletes them.
pub(super) async fn take_over(job: &Job<'_>, undo: &mut Undo) -> Result<Result<Option<Object>, Failure>, Error> {
    let found = look(job).await?;
    if let Ok(Some(there)) = &found
        && there.is_of_disk(job)
    {
        undo.take_over(Made::Object { key: key(job), version: there.version.clone(), sure: true });
    }
    Ok(found)
}

async fn put(job: &Job<'_>, key: &str, part: Part, digest: Digest, attempt: Try) -> Result<Option<String>, Failure> {
    // Sent twice, a bucket that keeps versions has two: an earlier request's is used.
    if attempt.doubtful
        && let Ok(Some(object)) = object::look(job, key).await
    {
        return Ok(object.version);
    }
    let unreadable = |error: aws_sdk_s3::primitives::ByteStreamError| Failure::found("s3:PutObject", error.to_string());
    let body = ByteStream::read_from().path(&job.request.disk).offset(part.offset).length(Length::Exact(part.length));
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
        .content_length(i64::try_from(part.length).unwrap_or(i64::MAX))
        .body(body.build().await.map_err(unreadable)?)
        .customize()
        .config_override(s3_once().timeout_config(send::part_timeouts(part.length, attempt.number)));
    let answer = call.send().await.map_err(job.clients.failed("s3:PutObject"))?;
    Ok(object::real_version(answer.version_id))
}

impl Zeros {
    /// Where parts are copied from, as long as S3 lets them be: bucket and key, written for an URL.
    pub(super) fn source(&self, bucket: &str) -> Option<String> {
        self.serve().then(|| format!("{bucket}/{}", escape(&self.key)))
    }

    /// Which of its bytes a part of this length has; none: all of them.
    pub(super) fn range(&self, length: u64) -> Option<String> {
        (length < self.length).then(|| format!("bytes=0-{}", length - 1))
    }

    /// Whether parts are still copied.
    pub(super) fn serve(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// From now on zeros are sent. Whether that is news.
    pub(super) fn refuse(&self) -> bool {
        !self.refused.swap(true, Ordering::Relaxed)
    }
}

/// For a copy.
pub(super) fn timeouts() -> TimeoutConfig {
    TimeoutConfig::builder().operation_attempt_timeout(COPY).operation_timeout(COPY).build()
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
        let zeros = Zeros { key: "x y".to_owned(), length: 7, refused: AtomicBool::new(false) };
        assert_eq!(zeros.source("b").unwrap(), "b/x%20y");
        assert_eq!([6, 7].map(|length| zeros.range(length)), [Some("bytes=0-5".to_owned()), None]);
        assert!(zeros.refuse() && !zeros.refuse());
        assert_eq!(zeros.source("b"), None);
    }
}
