//! Objects that S3 puts together of parts: begun, or gone on with, and completed.

use std::time::Duration;

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart};

use super::Job;
use super::failure::Failure;
use super::object::{self, StoredParts, Unfinished};
use super::parts::{self, Digest};
use super::retry::{Try, patient, s3_once};
use super::send::{Sent, UPLOAD_GONE};
use super::undo::{Made, Undo};
use crate::error::Error;

/// S3 puts the parts together before it answers.
const COMPLETE: Duration = Duration::from_mins(5);

/// An upload that parts are sent to.
pub(super) struct Upload {
    pub(super) key: String,
    pub(super) id: String,
    /// What S3 had of it when that was last listed; none: it has just been begun.
    pub(super) stored: Option<StoredParts>,
    /// In the list of what is undone.
    entry: usize,
}

/// What came of completing an upload.
pub(super) enum Completed {
    /// The object is there.
    Whole,
    /// It is there, and S3 says that it is made of other parts.
    Damaged,
    /// Another run has ended the upload, or made an object meanwhile.
    ByAnother,
}

/// Notes all of these, of this key, to be aborted.
pub(super) fn take_over(undo: &mut Undo, key: &str, unfinished: &Unfinished) {
    for id in unfinished.ids() {
        undo.take_over(Made::upload(key, Some(id.clone())));
    }
}

/// Goes on with an upload to this key, or begins one. Further ones are to be aborted.
pub(super) async fn take_up(
    job: &Job<'_>,
    undo: &mut Undo,
    key: &str,
    unfinished: Unfinished,
) -> Result<Result<Upload, Failure>, Error> {
    take_over(undo, key, &unfinished);
    if let Some((id, stored)) = unfinished.begun {
        let entry = undo.take_over(Made::upload(key, Some(id.clone())));
        return Ok(Ok(Upload { key: key.to_owned(), id, stored: Some(stored), entry }));
    }
    let begin = |attempt| begin(job, key, attempt);
    let (entry, answer) = job.make("the start of the upload", undo, Made::upload(key, None), begin).await?;
    Ok(answer.map(|id| {
        undo.made(entry, Made::upload(key, Some(id.clone())));
        Upload { key: key.to_owned(), id, stored: None, entry }
    }))
}

/// The oldest unfinished upload of this key.
pub(super) async fn unfinished(job: &Job<'_>, key: &str) -> Result<Option<String>, Failure> {
    let all = object::unfinished(job).await?;
    Ok(all.into_iter().find(|(other, _)| other == key).map(|(_, id)| id))
}

async fn begin(job: &Job<'_>, key: &str, attempt: Try) -> Result<String, Failure> {
    // Asked twice, S3 begins two uploads: an earlier request's is used.
    if attempt.doubtful
        && let Some(id) = unfinished(job, key).await?
    {
        return Ok(id);
    }
    let call = job
        .clients
        .s3
        .create_multipart_upload()
        .bucket(&job.target.bucket)
        .key(key)
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

impl Upload {
    /// Another run has ended it: there is nothing to undo.
    pub(super) fn is_gone(&self, undo: &mut Undo) {
        undo.forget(self.entry);
    }

    /// Has S3 put the parts together, `if_absent` only where no object is there. The undo entry of the upload becomes that of
    /// the object.
    pub(super) async fn complete(
        self,
        job: &Job<'_>,
        undo: &mut Undo,
        sent: Vec<Sent>,
        if_absent: bool,
    ) -> Result<Result<Completed, Failure>, Error> {
        let Self { key, id, entry, .. } = self;
        let whole = parts::composite(&sent.iter().map(|one| one.digest).collect::<Vec<Digest>>());
        let size = sent.iter().map(|one| one.part.length).sum();
        let parts = sent.into_iter().map(completed_part).collect();
        let timeouts =
            TimeoutConfig::builder().operation_attempt_timeout(COMPLETE).operation_timeout(COMPLETE * 2).build();
        let call = job
            .clients
            .s3
            .complete_multipart_upload()
            .bucket(&job.target.bucket)
            .key(&key)
            .upload_id(&id)
            .checksum_type(ChecksumType::Composite)
            .set_if_none_match(if_absent.then(|| "*".to_owned()))
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(parts)).build())
            .customize()
            .config_override(patient(aws_sdk_s3::config::Builder::new().timeout_config(timeouts)));
        let what = "S3 to put the parts together";
        job.stop.check(what)?;
        let unfinished = |completing| Made::Upload { key: key.clone(), id: Some(id.clone()), completing };
        undo.made(entry, unfinished(true));
        let failure = match job.stop.creating(what, call.send()).await? {
            Ok(answer) => {
                undo.made(entry, Made::object(&key, object::real_version(answer.version_id)));
                // An endpoint that says nothing is believed here.
                let damaged = answer.checksum_sha256.is_some_and(|arrived| arrived != whole);
                return Ok(Ok(if damaged { Completed::Damaged } else { Completed::Whole }));
            }
            Err(error) => job.clients.failed("s3:CompleteMultipartUpload")(error),
        };
        let gone = failure.code == UPLOAD_GONE;
        // There is an object, or there was while the parts were put together ("How to prevent object overwrites", S3 User Guide).
        if !gone && !matches!(failure.code.as_str(), "PreconditionFailed" | "ConditionalRequestConflict") {
            return Ok(Err(failure));
        }
        let found = job.stop.or("the uploaded object", Box::pin(object::look(job, &key))).await?;
        if !gone {
            undo.made(entry, unfinished(false));
        }
        let Ok(found) = found else { return Ok(Err(failure)) };
        if gone {
            undo.forget(entry);
        }
        // Perhaps it is this upload's: the first answer was lost, and the SDK has asked again.
        let Some(own) = found.filter(|found| found.is_of_disk(job) && found.is(size, &whole)) else {
            return Ok(Ok(Completed::ByAnother));
        };
        undo.take_over(Made::object(&key, own.version));
        Ok(Ok(Completed::Whole))
    }
}

fn completed_part(sent: Sent) -> CompletedPart {
    CompletedPart::builder()
        .part_number(sent.part.number)
        .e_tag(sent.etag)
        .checksum_sha256(parts::base64(&sent.digest))
        .build()
}
