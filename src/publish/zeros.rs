//! Zeros that are copied inside S3 instead of being sent.
//!
//! A raw disk is mostly holes. One piece of zeros is sent as an object of its own, and every part without data is copied
//! from that (`UploadPartCopy`), so that a disk costs the line what its data costs. To copy takes a permission of its own
//! (`s3:GetObject`) and an endpoint that can; without them the zeros are sent.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::primitives::{ByteStream, Length};
use aws_sdk_s3::types::ChecksumAlgorithm;

use super::failure::Failure;
use super::parts::{self, Digest, Part, Parts};
use super::retry::{Try, s3_once};
use super::undo::{Made, Undo};
use super::{Job, upload};
use crate::error::Error;

/// Fewer holes than this are sent: the object takes a request to make and one to delete.
const FEW: usize = 4;

/// How often a part is copied, and how long one copy may take: S3 does in seconds what it can.
pub(super) const COPIES: u32 = 3;
const COPY: Duration = Duration::from_secs(60);

/// The object of zeros.
#[derive(Debug)]
pub(super) struct Zeros {
    key: String,
    refused: AtomicBool,
}

/// Makes the object of zeros, from one of the disk's holes, if there are enough of them. Where that fails they are sent.
pub(super) async fn make(job: &Job<'_>, undo: &mut Undo, parts: &Parts) -> Result<Option<Zeros>, Error> {
    // Any of them will do, if there are so many.
    let Some(hole) = parts.holes().nth(FEW - 1) else { return Ok(None) };
    let key = format!("{}.zeros", job.target.key);
    let made = |version, sure| Made::Object { key: key.clone(), version, sure };
    let digest = parts.hole_digest(hole);
    let put = |attempt| put(job, &key, hole, digest, attempt);
    let (entry, answer) = job.make("the zeros that parts are copied from", undo, made(None, false), put).await?;
    match answer {
        Ok(version) => undo.made(entry, made(version, true)),
        Err(failure) => {
            job.events.detail(format!("zeros can't be kept in S3 and are sent: {}", failure.reason()));
            return Ok(None);
        }
    }
    Ok(Some(Zeros { key, refused: AtomicBool::new(false) }))
}

async fn put(job: &Job<'_>, key: &str, hole: Part, digest: Digest, attempt: Try) -> Result<Option<String>, Failure> {
    // Sent twice, a bucket that keeps versions has two: an earlier request's is used.
    if attempt.doubtful
        && let Ok(Some(object)) = upload::object(job, key).await
    {
        return Ok(object.version);
    }
    let unreadable = |error: aws_sdk_s3::primitives::ByteStreamError| Failure::found("s3:PutObject", error.to_string());
    let body = ByteStream::read_from().path(&job.request.disk).offset(hole.offset).length(Length::Exact(hole.length));
    let call = job
        .clients
        .s3
        .put_object()
        .bucket(&job.target.bucket)
        .key(key)
        .checksum_algorithm(ChecksumAlgorithm::Sha256)
        .checksum_sha256(parts::base64(&digest))
        .content_length(i64::try_from(hole.length).unwrap_or(i64::MAX))
        .body(body.build().await.map_err(unreadable)?)
        .customize()
        .config_override(s3_once().timeout_config(upload::part_timeouts(hole.length, attempt.number)));
    let answer = call.send().await.map_err(job.clients.failed("s3:PutObject"))?;
    Ok(upload::real_version(answer.version_id))
}

impl Zeros {
    /// Where parts are copied from, as long as S3 lets them be: bucket and key, written for an URL.
    pub(super) fn source(&self, bucket: &str) -> Option<String> {
        self.serve().then(|| format!("{bucket}/{}", escape(&self.key)))
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
        let zeros = Zeros { key: "x y".to_owned(), refused: AtomicBool::new(false) };
        assert_eq!(zeros.source("b").unwrap(), "b/x%20y");
        assert!(zeros.refuse() && !zeros.refuse());
        assert_eq!(zeros.source("b"), None);
    }
}
