//! The upload alone: the disk's object is there afterwards, and stays. A later publish imports it.

use serde::Serialize;

use super::action::Action::HeadObject;
use super::client::with_runtime;
use super::plan::{Plan, Way};
use super::regions::{self, Source};
use super::stop::Stop;
use super::undo::Undo;
use super::{Job, Request, object, preflight, rules, upload};
use crate::cancel::Cancel;
use crate::error::{Error, Exit};
use crate::event::Events;
use crate::recipe::Via;

/// How often the upload is begun again because another kiln has ended it.
const ROUNDS: u32 = 4;

/// A disk in a bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UploadedObject {
    /// The bucket's region.
    pub region: String,
    /// The bucket.
    pub bucket: String,
    /// The object's key.
    pub key: String,
    /// How long the object is, in bytes; 0 after a dry run.
    pub size: u64,
    /// The digest of the disk, as the manifest has it.
    pub digest: String,
    /// `raw` or `vmdk`.
    pub format: &'static str,
    /// What would be done, if that is all that was asked for.
    #[serde(flatten)]
    pub plan: Option<Plan>,
}

/// Uploads the disk, or finds it uploaded.
///
/// # Errors
/// The first thing that went wrong, after what was begun was taken back; what could not be taken back is named in its notes.
pub fn upload_only(request: &Request, events: &Events, cancel: &Cancel) -> Result<UploadedObject, Error> {
    let mut request = request.clone();
    (request.via, request.object.keep) = (Via::S3, true);
    // The recipe's wish for a publish that writes blocks.
    request.omit_holes = None;
    rules::check(&request)?;
    cancel.check()?;
    with_runtime(request.parallel, |runtime| {
        // The first is the bucket's region, if that is among those asked for.
        let clients = runtime.block_on(Box::pin(regions::connect(&request, cancel)))?;
        let first = clients.into_iter().next();
        let first = first.ok_or_else(|| Error::new(Exit::Bug, "there is no region to upload to"))?;
        let stop = Stop::new(cancel, request.timeout);
        let job = Job::new(&request, first, Source::Disk(None), events, stop)?;
        runtime.block_on(Box::pin(upload_or_undo(&job)))
    })
}

async fn upload_or_undo(job: &Job<'_>) -> Result<UploadedObject, Error> {
    let begins = format!("credentials and the bucket `{}` in {}", job.target.bucket, job.target.region);
    job.phase("check", begins.clone(), |()| String::new(), Box::pin(preflight::check_bucket(job))).await?;
    if job.request.dry_run {
        let plan = Some(Box::pin(plan(job, begins)).await?);
        return Ok(UploadedObject { plan, ..uploaded(job, 0) });
    }
    let mut undo = Undo::default();
    match Box::pin(until_there(job, &mut undo)).await {
        Ok(size) => Ok(uploaded(job, size)),
        Err(error) => Err(undo.run(job, error).await.0),
    }
}

/// What would be done, which is told as well.
async fn plan(job: &Job<'_>, begins: String) -> Result<Plan, Error> {
    let mut way = Way::default();
    way.steps.step(format!("look at {begins}")).extend(&job.clients.asked());
    Box::pin(upload::plan(job, &mut way)).await?;
    preflight::tell(job, way.steps.each().skip(1));
    way.steps.step("look how long the object is").exactly(HeadObject, 1);
    Ok(Plan { way, otherwise: None })
}

/// How long the object is.
async fn until_there(job: &Job<'_>, undo: &mut Undo) -> Result<u64, Error> {
    for _ in 0..ROUNDS {
        let work = Box::pin(upload::upload(job, undo));
        if job
            .phase("upload", upload::begins(job), |uploaded| upload::in_words(uploaded.as_ref()), work)
            .await?
            .is_some()
        {
            upload::delete(job, undo).await;
            let found = job.stop.or("the object", Box::pin(object::look(job, &job.target.key))).await?;
            return match found {
                Ok(Some(object)) => Ok(object.size()),
                // Not to be looked at; it is there all the same.
                _ => Ok(0),
            };
        }
    }
    Err(Error::new(Exit::Publish, "other kilns end this upload again and again")
        .help("publish again when they have ended"))
}

fn uploaded(job: &Job<'_>, size: u64) -> UploadedObject {
    UploadedObject {
        region: job.target.region.clone(),
        bucket: job.target.bucket.clone(),
        key: job.target.key.clone(),
        size,
        digest: job.request.digest.clone(),
        format: job.request.object.format.as_str(),
        plan: None,
    }
}
