//! What can be found out by requests that only read, before the upload.

use std::path::Path;

use super::client::Clients;
use super::failure::{self, Failure, Kind};
use super::found::{self, Found};
use super::regions::Source;
use super::replace::{self, Old};
use super::share;
use super::{Job, Via, ebs, finish, image, import, parent, rules, upload};
use crate::error::{Error, Exit};
use crate::event::Event;
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

/// Says what would be done.
pub(super) async fn explain(job: &Job<'_>, before: &Before) -> Result<(), Error> {
    let would = |what: String| job.events.emit(Event::Note { message: format!("would {what}") });
    match (&before.found, &job.source) {
        (Found::Nothing, Source::Copy(home)) => {
            would(format!("copy the image of {} to {}", home.region, job.target.region));
        }
        (Found::Nothing, Source::Disk(_)) => upload_in_words(job, would).await?,
        (found, _) => found::in_words(found).into_iter().for_each(would),
    }
    for old in &before.old {
        would(format!("deregister {} of the same name, once the new image is available", old.id));
    }
    if !matches!(before.found, Found::Image(_))
        && !matches!((&before.found, &job.source), (Found::Nothing, Source::Copy(_)))
    {
        would(image::plan_in_words(job));
    }
    finish::plan_in_words(job).into_iter().for_each(would);
    if let Some(parameter) = &job.request.release.parameter {
        would(format!("name the image in the SSM parameter {parameter} of {}", job.target.region));
    }
    Ok(())
}

async fn upload_in_words(job: &Job<'_>, would: impl Fn(String)) -> Result<(), Error> {
    if job.request.via != Via::S3 {
        would(Box::pin(ebs::plan_in_words(job)).await?);
    }
    if job.request.via != Via::Ebs && !job.target.bucket.is_empty() {
        if job.request.via == Via::Auto {
            would("do this instead, if EBS direct is not permitted:".to_owned());
        }
        would(Box::pin(upload::plan_in_words(job)).await?);
        would(import::plan_in_words(job));
        if !job.request.object.keep {
            would(format!("delete s3://{0}/{1} and s3://{0}/{1}.zeros", job.target.bucket, job.target.key));
        }
    }
    Ok(())
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
