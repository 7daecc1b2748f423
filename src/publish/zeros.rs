//! Zeros that are copied inside S3 instead of being sent.
//!
//! A raw disk is mostly holes. One piece of zeros is sent as an object of its own, and every part without data is copied
//! from that (`UploadPartCopy`), so that a disk costs the line what its data costs. To copy takes a permission of its own
//! (`s3:GetObject`) and an endpoint that can; without them the zeros are sent.

use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_s3::primitives::{ByteStream, Length};
use aws_sdk_s3::types::ChecksumAlgorithm;

use super::Job;
use super::failure::Failure;
use super::parts::{self, Digest, Part};
use super::retry::s3_once;
use super::undo::{Made, Undo};
use crate::error::Error;

/// Fewer holes than this are sent: the object takes a request to make and one to delete.
const FEW: usize = 4;

/// The object of zeros.
#[derive(Debug)]
pub(super) struct Zeros {
    key: String,
    refused: AtomicBool,
}

/// Makes the object of zeros, from one of the disk's holes, if there are enough of them.
pub(super) async fn make(job: &Job<'_>, undo: &mut Undo, parts: &parts::Parts) -> Result<Option<Zeros>, Error> {
    let Some(hole) = parts.holes().next().filter(|_| parts.holes().count() >= FEW) else { return Ok(None) };
    let key = format!("{}.zeros", job.target.key);
    let made = |version| Made::Object { key: key.clone(), version };
    let digest = parts.hole_digest(hole);
    let put = |_| put(job, &key, hole, digest);
    let (entry, answer) = job.make("the zeros that parts are copied from", undo, made(None), put).await?;
    let version = answer.map_err(|failure| job.error(failure))?;
    undo.made(entry, made(version));
    Ok(Some(Zeros { key, refused: AtomicBool::new(false) }))
}

async fn put(job: &Job<'_>, key: &str, hole: Part, digest: Digest) -> Result<Option<String>, Failure> {
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
        .config_override(s3_once().timeout_config(super::upload::part_timeouts(hole.length, 1)));
    let answer = call.send().await.map_err(job.clients.failed("s3:PutObject"))?;
    Ok(super::upload::real_version(answer.version_id))
}

impl Zeros {
    /// Where parts are copied from, as long as S3 lets them be: bucket and key, written for an URL.
    pub(super) fn source(&self, bucket: &str) -> Option<String> {
        (!self.refused.load(Ordering::Relaxed)).then(|| format!("{bucket}/{}", escape(&self.key)))
    }

    /// From now on zeros are sent. Whether that is news.
    pub(super) fn refuse(&self) -> bool {
        !self.refused.swap(true, Ordering::Relaxed)
    }
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
