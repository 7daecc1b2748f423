//! What can be found out by requests that only read, before the upload.

use std::path::Path;

use super::action::Action::{GetBucketLocation, HeadBucket, ImportSnapshot};
use super::client::Clients;
use super::failure::{self, Failure, Kind};
use super::found::{self, Found};
use super::plan::{Count, Plan, Step, Steps, Transfer, Way};
use super::regions::Source;
use super::replace::{self, Old};
use super::share;
use super::{Job, Via, copy, ebs, finish, image, import, parameter, parent, rules, upload};
use crate::error::{Error, Exit};
use crate::units::GIB;

/// What is there before anything is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Before {
    pub(super) found: Found,
    /// Images that have the name, and are to be replaced.
    pub(super) old: Vec<Old>,
    /// The interim image of a replacement that was killed.
    pub(super) interim: Option<String>,
}

pub(super) fn begins(job: &Job<'_>) -> String {
    let target = &job.target;
    let bucket = if goes_through_bucket(job) { format!(" and the bucket `{}`", target.bucket) } else { String::new() };
    format!("credentials, the name `{}`{bucket} in {}", target.image_name, target.region)
}

fn goes_through_bucket(job: &Job<'_>) -> bool {
    matches!(job.source, Source::Disk(_)) && job.request.via == Via::S3
}

/// The disk is as announced, the credentials work, and unless an earlier publish has made it already, the image's name is
/// free, what was asked for to build on can be, and by S3 the bucket is in the region, and the caller may import from it.
pub(super) async fn check(job: &Job<'_>) -> Result<Before, Error> {
    disk(&job.request.disk, job.request.size)?;
    if !job.request.release.share.is_empty() {
        share::permitted(&job.place(), &finish::sharing(job)).await?;
    }
    rules::key_fits(job.request, &job.target.region)?;
    let found = Box::pin(found::look(job)).await?;
    let mut before = Before { found, old: Vec::new(), interim: None };
    if !matches!(before.found, Found::Image(_)) {
        Box::pin(name_is_free(job, &mut before)).await?;
    }
    if before.found == Found::Nothing {
        Box::pin(parent::check(job)).await?;
        if goes_through_bucket(job) {
            bucket(job).await?;
        }
    }
    Ok(before)
}

/// The bucket is in the region, and the caller may import from it.
pub(super) async fn bucket(job: &Job<'_>) -> Result<(), Error> {
    bucket_is_near(job).await?;
    import::permitted(job).await
}

/// The disk is as announced, and the bucket is in the region.
pub(super) async fn check_bucket(job: &Job<'_>) -> Result<(), Error> {
    disk(&job.request.disk, job.request.size)?;
    bucket_is_near(job).await
}

/// What would be done after this; it is told as well.
pub(super) async fn plan(job: &Job<'_>, before: &Before) -> Result<Plan, Error> {
    let mut way = Way::default();
    way.steps.step(format!("look at {}", begins(job))).extend(&job.clients.asked());
    let (mut otherwise, mut snapshot) = (None, None);
    match (&before.found, &job.source) {
        (Found::Nothing, Source::Copy(home)) => {
            copy::plan(way.steps.step(format!("copy the image of {} to {}", home.region, job.target.region)));
            let bytes = ebs::data(job);
            way.cost.snapshot_bytes = bytes;
            way.cost.transfer = Some(Transfer { region: home.region.clone(), bytes });
        }
        (Found::Nothing, Source::Disk(_)) => otherwise = Box::pin(plan_snapshot(job, &mut way)).await?,
        (found, _) => {
            snapshot = found.snapshot();
            Box::pin(found::plan(job, found, &mut way.steps)).await?;
        }
    }
    let rest = Box::pin(plan_image(job, before, snapshot)).await?;
    tell(job, way.steps.each().skip(1));
    if let Some(otherwise) = &mut otherwise {
        job.events.note("would do this instead, if EBS direct is not permitted:");
        tell(job, otherwise.steps.each().skip(1));
        otherwise.steps.extend(rest.clone());
    }
    tell(job, rest.each());
    way.steps.extend(rest);
    Ok(Plan { way, otherwise })
}

/// Says what would be done.
pub(super) fn tell<'a>(job: &Job<'_>, steps: impl Iterator<Item = &'a Step>) {
    steps.for_each(|step| job.events.note(format!("would {}", step.what)));
}

/// From the disk to the snapshot; returned is the other way there, if there is one.
async fn plan_snapshot(job: &Job<'_>, way: &mut Way) -> Result<Option<Way>, Error> {
    let looks = way.clone();
    if job.request.via == Via::S3 {
        Box::pin(plan_through_bucket(job, way)).await?;
        return Ok(None);
    }
    let refused = Box::pin(ebs::plan(job, way)).await?;
    match refused.filter(|_| job.request.via == Via::Auto && !job.target.bucket.is_empty()) {
        None => Ok(None),
        Some(refused) => {
            let mut other = looks;
            let requests = other.steps.step(format!("look at the bucket `{}`", job.target.bucket));
            requests.extend(&refused).exactly(HeadBucket, 1).add(GetBucketLocation, Count::at_most(1));
            requests.exactly(ImportSnapshot, 1);
            match Box::pin(plan_through_bucket(job, &mut other)).await {
                Ok(()) => Ok(Some(other)),
                // As long as EBS direct is permitted nothing is asked of the bucket.
                Err(error) => {
                    job.stop.check("the other way")?;
                    job.events
                        .note(format!("there is no other way, should EBS direct not be permitted: {}", error.message));
                    Ok(None)
                }
            }
        }
    }
}

async fn plan_through_bucket(job: &Job<'_>, way: &mut Way) -> Result<(), Error> {
    let objects = Box::pin(upload::plan(job, way)).await?;
    Box::pin(import::plan(job, way)).await?;
    upload::plan_delete(job, objects, &mut way.steps);
    Ok(())
}

/// From the snapshot to the image, and what it gets then.
async fn plan_image(job: &Job<'_>, before: &Before, snapshot: Option<&str>) -> Result<Steps, Error> {
    let mut steps = Steps::default();
    let there = match (&before.found, &job.source) {
        (Found::Image(image), _) => Some(image.id.as_str()),
        (Found::Nothing, Source::Copy(_)) => {
            let after = Box::pin(replace::plan_remove(job, snapshot, &before.old, &mut steps)).await?;
            steps.extend(after);
            None
        }
        _ => {
            Box::pin(replace::plan(job, snapshot, &before.old, &mut steps)).await?;
            None
        }
    };
    steps.extend(Box::pin(finish::plan(job, there)).await?);
    if let Some(interim) = &before.interim {
        replace::plan_remove_interim(interim, &mut steps);
    }
    if let Some(name) = &job.request.release.parameter {
        Box::pin(parameter::plan(job, name, there, &mut steps)).await?;
    }
    Ok(steps)
}

fn disk(path: &Path, size: u64) -> Result<(), Error> {
    let about = |error| Error::io(format!("cannot read the disk {}", path.display()), &error);
    let bytes = std::fs::File::open(path).and_then(|file| file.metadata()).map_err(about)?.len();
    if bytes == size * GIB {
        return Ok(());
    }
    Err(Error::new(
        Exit::Input,
        format!("the disk {} has {bytes} bytes, and {size} GiB were announced", path.display()),
    )
    .help("it is cut short or changed; build it again"))
}

async fn name_is_free(job: &Job<'_>, before: &mut Before) -> Result<(), Error> {
    let name = &job.target.image_name;
    let interim = replace::interim_name(name);
    let images = job.call("the images of this name", image::of_names(&job.clients, &[name, &interim])).await?;
    let of_disk = |image: &&aws_sdk_ec2::types::Image| {
        image.name() == Some(&interim)
            && found::tag(image.tags(), rules::DIGEST_TAG) == Some(job.request.digest.as_str())
    };
    before.interim = images.iter().find(of_disk).and_then(|image| image.image_id()).map(str::to_owned);
    before.old = images.iter().filter(|image| image.name() == Some(name)).filter_map(Old::of).collect();
    match before.old.first() {
        Some(old) if !job.request.force => Err(failure::duplicate_name(&job.target, Some(&old.id))),
        _ => Ok(()),
    }
}

pub(super) async fn bucket_is_near(job: &Job<'_>) -> Result<(), Error> {
    let actual = job.stop.or("the bucket", bucket_region(&job.clients, &job.target.bucket)).await?;
    match actual.map_err(|failure| job.error(failure))? {
        Some(actual) if actual != job.target.region => Err(failure::bucket_elsewhere(&job.target, Some(&actual))),
        _ => Ok(()),
    }
}

/// The region that a bucket is in; none where the endpoint doesn't tell.
pub(super) async fn bucket_region(clients: &Clients, bucket: &str) -> Result<Option<String>, Failure> {
    let head = clients.s3.head_bucket().bucket(bucket).send().await.map_err(clients.failed("s3:HeadBucket"));
    let actual = match head {
        Ok(found) => found.bucket_region().map(str::to_owned),
        Err(Failure { bucket_region: Some(region), kind: Kind::Refused, status, .. })
            if status != 404 && region != clients.region() =>
        {
            Some(region)
        }
        Err(failure) => return Err(failure),
    };
    Ok(match actual {
        Some(region) => Some(region),
        None => location(clients, bucket).await,
    })
}

/// The older way to ask, for endpoints that don't tell in `HeadBucket`. It needs a permission of its own, so that a
/// refusal says nothing.
async fn location(clients: &Clients, bucket: &str) -> Option<String> {
    let answer = clients.s3.get_bucket_location().bucket(bucket).send().await.ok()?;
    Some(match answer.location_constraint().map_or("", |region| region.as_str()) {
        "" | "null" => "us-east-1".to_owned(),
        "EU" => "eu-west-1".to_owned(),
        region => region.to_owned(),
    })
}
