//! What is in the bucket under the key of a disk: the object, unfinished uploads of it, and their parts.
//!
//! The key has the disk's digest in it, so that every run, on whatever host, finds what another has left there.

use std::collections::{BTreeMap, HashMap};

use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumMode, ServerSideEncryption};

use super::failure::{Failure, Kind};
use super::parts::{Digest, Part, base64};
use super::{Job, ObjectEncryption, scratch};
use crate::error::{Error, Exit};

/// The object's metadata that has the disk's digest.
const DIGEST: &str = "kiln-digest";

/// The metadata of an object that stays when it is imported.
const KEPT: &str = "kiln-keep";

/// What S3 says of an object.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) version: Option<String>,
    size: u64,
    /// Of the disk that kiln made it of.
    digest: Option<String>,
    /// The SHA-256 over its parts' SHA-256, as S3 writes it.
    checksum: Option<String>,
    /// It was made to stay.
    pub(super) is_kept: bool,
}

/// The metadata of an object of the disk.
pub(super) fn metadata(job: &Job<'_>) -> HashMap<String, String> {
    let digest = (DIGEST.to_owned(), job.request.digest.clone());
    let kept = job.request.object.keep.then(|| (KEPT.to_owned(), true.to_string()));
    std::iter::once(digest).chain(kept).collect()
}

/// How S3 is to encrypt it; none: as the bucket has it.
pub(super) fn encryption(job: &Job<'_>) -> Option<ServerSideEncryption> {
    job.request.object.encryption.as_ref().map(|encryption| match encryption {
        ObjectEncryption::S3 => ServerSideEncryption::Aes256,
        ObjectEncryption::Kms { .. } => ServerSideEncryption::AwsKms,
    })
}

/// And with which key.
pub(super) fn key_id(job: &Job<'_>) -> Option<String> {
    match &job.request.object.encryption {
        Some(ObjectEncryption::Kms { key }) => key.clone(),
        _ => None,
    }
}

impl Object {
    /// Whether kiln has made it of the disk that is published now.
    pub(super) fn is_of_disk(&self, job: &Job<'_>) -> bool {
        self.digest.as_deref() == Some(&job.request.digest)
    }

    /// Whether it is as long as that, and S3 says that it was made of parts with these SHA-256. An endpoint that says
    /// nothing is not believed.
    pub(super) fn is(&self, size: u64, checksum: &str) -> bool {
        self.size == size && self.checksum.as_deref() == Some(checksum)
    }

    /// How many bytes it has.
    pub(super) fn size(&self) -> u64 {
        self.size
    }
}

/// The object with this key in the target's bucket, if it is there.
pub(super) async fn look(job: &Job<'_>, key: &str) -> Result<Option<Object>, Failure> {
    let bucket = &job.target.bucket;
    let head = job.clients.s3.head_object().bucket(bucket).key(key).checksum_mode(ChecksumMode::Enabled);
    match head.send().await.map_err(job.clients.failed("s3:HeadObject")) {
        Ok(head) => Ok(Some(Object {
            size: head.content_length().and_then(|length| u64::try_from(length).ok()).unwrap_or_default(),
            is_kept: head.metadata().is_some_and(|metadata| metadata.contains_key(KEPT)),
            digest: head.metadata().and_then(|metadata| metadata.get(DIGEST)).cloned(),
            version: real_version(head.version_id),
            checksum: head.checksum_sha256,
        })),
        Err(failure) if failure.is_not_found() => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// A bucket that keeps no versions has none, or one named `null`.
pub(super) fn real_version(version: Option<String>) -> Option<String> {
    version.filter(|version| version != "null")
}

/// The object under the disk's key was not made of this disk, and is left as it is.
pub(super) fn foreign(job: &Job<'_>) -> Error {
    let place = format!("s3://{}/{}", job.target.bucket, job.target.key);
    Error::new(Exit::Publish, format!("{place} is there, and kiln didn't make it of this disk"))
        .help("move it away or delete it, or set another `prefix` in the recipe's [publish]")
}

/// A part that S3 has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) size: u64,
    /// As S3 writes it.
    pub(super) sha256: String,
    pub(super) etag: String,
}

impl Stored {
    /// Whether it is this part.
    pub(super) fn is(&self, part: Part, digest: &Digest) -> bool {
        self.size == part.length && self.sha256 == base64(digest)
    }
}

/// The parts of an unfinished upload, by their numbers.
pub(super) type StoredParts = BTreeMap<i32, Stored>;

/// The unfinished uploads of the disk and of its scratch object, each with its key, the oldest first.
pub(super) async fn unfinished(job: &Job<'_>) -> Result<Vec<(String, String)>, Failure> {
    let target = &job.target;
    let keys = [target.key.clone(), scratch::key(job)];
    let (mut found, mut markers) = (Vec::new(), (None, None));
    loop {
        let call = job.clients.s3.list_multipart_uploads().bucket(&target.bucket).prefix(&target.key);
        let call = call.set_key_marker(markers.0).set_upload_id_marker(markers.1);
        let answer = call.send().await.map_err(job.clients.failed("s3:ListMultipartUploads"))?;
        found.extend(answer.uploads().iter().filter_map(|upload| {
            let key = keys.iter().find(|key| upload.key() == Some(key))?;
            // Begun otherwise, it isn't kiln's, and couldn't be completed as kiln does.
            let fits = upload.checksum_algorithm().is_none_or(|algorithm| *algorithm == ChecksumAlgorithm::Sha256);
            Some((key.clone(), upload.upload_id()?.to_owned())).filter(|_| fits)
        }));
        markers = (answer.next_key_marker, answer.next_upload_id_marker);
        if answer.is_truncated != Some(true) || markers.0.is_none() {
            return Ok(found);
        }
    }
}

/// The parts with a known SHA-256 that S3 has of the upload.
async fn stored(job: &Job<'_>, key: &str, id: &str) -> Result<StoredParts, Failure> {
    let target = &job.target;
    let (mut found, mut marker) = (StoredParts::new(), None);
    loop {
        let call = job.clients.s3.list_parts().bucket(&target.bucket).key(key).upload_id(id);
        let answer = call.set_part_number_marker(marker).send().await;
        let answer = answer.map_err(job.clients.failed("s3:ListParts"))?;
        found.extend(answer.parts().iter().filter_map(|part| {
            let stored = Stored {
                size: u64::try_from(part.size()?).ok()?,
                sha256: part.checksum_sha256()?.to_owned(),
                etag: part.e_tag()?.to_owned(),
            };
            Some((part.part_number()?, stored))
        }));
        marker = answer.next_part_number_marker;
        if answer.is_truncated != Some(true) || marker.is_none() {
            return Ok(found);
        }
    }
}

/// What an earlier run, or another one, has begun to upload under one key.
#[derive(Debug, Default)]
pub(super) struct Unfinished {
    /// The upload to go on with, and what S3 has of it.
    pub(super) begun: Option<(String, StoredParts)>,
    /// Further ones, of no use.
    pub(super) others: Vec<String>,
}

impl Unfinished {
    /// All of them.
    pub(super) fn ids(&self) -> impl Iterator<Item = &String> {
        self.begun.iter().map(|(id, _)| id).chain(&self.others)
    }
}

/// And under all keys of the disk.
#[derive(Debug, Default)]
pub(super) struct Left {
    pub(super) disk: Unfinished,
    pub(super) scratch: Unfinished,
}

impl Left {
    /// How many they are.
    pub(super) fn count(&self) -> u64 {
        self.disk.ids().chain(self.scratch.ids()).count() as u64
    }
}

/// Looks for unfinished uploads. Where the caller may not look, nothing is found.
pub(super) async fn left(job: &Job<'_>) -> Result<Left, Error> {
    let answer = job.stop.or("unfinished uploads", unfinished(job)).await?;
    let all = where_possible(job, "unfinished uploads", answer)?;
    let (disk, scratch): (Vec<_>, Vec<_>) = all.into_iter().partition(|(key, _)| *key == job.target.key);
    Ok(Left { disk: Box::pin(with_parts(job, disk)).await?, scratch: Box::pin(with_parts(job, scratch)).await? })
}

/// The first of these is gone on with.
async fn with_parts(job: &Job<'_>, uploads: Vec<(String, String)>) -> Result<Unfinished, Error> {
    let mut uploads = uploads.into_iter();
    let Some((key, id)) = uploads.next() else { return Ok(Unfinished::default()) };
    let others = uploads.map(|(_, id)| id).collect();
    let parts = Box::pin(parts_of(job, &key, &id)).await?;
    Ok(Unfinished { begun: parts.map(|parts| (id, parts)), others })
}

/// The parts that S3 has of an upload; none: it has just become the object, or is aborted.
pub(super) async fn parts_of(job: &Job<'_>, key: &str, id: &str) -> Result<Option<StoredParts>, Error> {
    match job.stop.or("the parts of an unfinished upload", stored(job, key, id)).await? {
        Err(failure) if failure.is_not_found() => Ok(None),
        answer => where_possible(job, "the parts that are there", answer).map(Some),
    }
}

/// To look takes permissions of its own, and an endpoint that can. Without them all is sent.
fn where_possible<T: Default>(job: &Job<'_>, what: &str, answer: Result<T, Failure>) -> Result<T, Error> {
    match answer {
        Err(failure) if failure.kind == Kind::Refused && !failure.is_passing() => {
            job.events.detail(format!("cannot look for {what}: {}", failure.reason()));
            Ok(T::default())
        }
        answer => answer.map_err(|failure| job.error(failure)),
    }
}
