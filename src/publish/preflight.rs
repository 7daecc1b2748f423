//! What can be found out by requests that only read, before the upload.

use std::path::Path;

use super::failure::{self, Failure, Kind};
use super::found::{self, Found};
use super::{Job, Via, ebs, image, import, upload};
use crate::error::{Error, Exit};
use crate::event::Event;
use crate::units::GIB;

pub(super) fn begins(job: &Job<'_>) -> String {
    let target = &job.target;
    let bucket = match job.request.via {
        Via::S3 => format!(" and the bucket `{}`", target.bucket),
        Via::Ebs => String::new(),
    };
    format!("credentials, the name `{}`{bucket} in {}", target.image_name, target.region)
}

/// The disk is as announced, the credentials work, and unless an earlier publish has made it already, the image's name is
/// free, and by S3 the bucket is in the region, and the caller may import from it.
pub(super) async fn check(job: &Job<'_>) -> Result<Found, Error> {
    disk(&job.request.disk, job.request.size)?;
    let found = Box::pin(found::look(job)).await?;
    if !matches!(found, Found::Image { .. }) {
        name_is_free(job).await?;
    }
    if found == Found::Nothing && job.request.via == Via::S3 {
        bucket_is_near(job).await?;
        import::permitted(job).await?;
    }
    Ok(found)
}

/// The disk is as announced, and the bucket is in the region.
pub(super) async fn check_bucket(job: &Job<'_>) -> Result<(), Error> {
    disk(&job.request.disk, job.request.size)?;
    bucket_is_near(job).await
}

/// Says what would be done.
pub(super) async fn explain(job: &Job<'_>, found: &Found) -> Result<(), Error> {
    let would = |what: String| job.events.emit(Event::Note { message: format!("would {what}") });
    if let Some(words) = found::in_words(found) {
        would(words);
    } else if job.request.via == Via::Ebs {
        would(Box::pin(ebs::plan_in_words(job)).await?);
    } else {
        would(Box::pin(upload::plan_in_words(job)).await?);
        would(import::plan_in_words(job));
        if !job.request.object.keep {
            would(format!("delete s3://{0}/{1} and s3://{0}/{1}.zeros", job.target.bucket, job.target.key));
        }
    }
    if !matches!(found, Found::Image { .. }) {
        would(image::plan_in_words(job));
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

async fn name_is_free(job: &Job<'_>) -> Result<(), Error> {
    match job.call("the images of this name", image::of_name(job)).await?.first() {
        Some(image) => Err(failure::duplicate_name(&job.target, image.image_id())),
        None => Ok(()),
    }
}

async fn bucket_is_near(job: &Job<'_>) -> Result<(), Error> {
    let head = async {
        let clients = &job.clients;
        let head = clients.s3.head_bucket().bucket(&job.target.bucket).send().await;
        Ok(head.map_err(clients.failed("s3:HeadBucket")))
    };
    let actual = match job.call("the bucket", head).await? {
        Ok(bucket) => bucket.bucket_region().map(str::to_owned),
        Err(Failure { bucket_region: Some(region), kind: Kind::Refused, status, .. })
            if status != 404 && region != job.target.region =>
        {
            Some(region)
        }
        Err(failure) => return Err(job.error(failure)),
    };
    let actual = match actual {
        Some(region) => Some(region),
        None => location(job).await?,
    };
    match actual {
        Some(actual) if actual != job.target.region => Err(failure::bucket_elsewhere(&job.target, Some(&actual))),
        _ => Ok(()),
    }
}

/// The older way to ask, for endpoints that don't tell in `HeadBucket`. It needs a permission of its own, so that a
/// refusal says nothing.
async fn location(job: &Job<'_>) -> Result<Option<String>, Error> {
    let call = async {
        let answer = job.clients.s3.get_bucket_location().bucket(&job.target.bucket).send().await;
        Ok(answer.ok())
    };
    let answer = job.call("the bucket's location", call).await?;
    Ok(answer.map(|answer| match answer.location_constraint().map_or("", |region| region.as_str()) {
        "" | "null" => "us-east-1".to_owned(),
        "EU" => "eu-west-1".to_owned(),
        region => region.to_owned(),
    }))
}
