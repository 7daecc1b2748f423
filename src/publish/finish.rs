//! What an image gets once it can be launched: who may use it, when it counts as old, that it can't be removed by
//! mistake. Doing it again changes nothing.

use std::time::{Duration, SystemTime};

use aws_sdk_ec2::primitives::DateTime;
use aws_sdk_ec2::types::Image;

use super::action::Action::{DescribeImages, EnableImageDeprecation, EnableImageDeregistrationProtection};
use super::plan::Steps;
use super::share::{self, Sharing};
use super::{Job, image};
use crate::error::Error;
use crate::recipe::Protection;
use crate::units::show_duration;

pub(super) fn begins(job: &Job<'_>) -> String {
    let steps = steps(job, None);
    let words: Vec<&str> = steps.each().map(|step| step.what.as_str()).collect();
    format!("{} in {}", words.join(", "), job.target.region)
}

/// What [`finish`] would do with an image that is there; none: with a new one.
pub(super) async fn plan(job: &Job<'_>, id: Option<&str>) -> Result<Steps, Error> {
    let found = match id.filter(|_| !steps(job, None).is_empty()) {
        Some(id) => Some(image::get(job, id).await?),
        None => None,
    };
    let _ = job.clients.asked();
    Ok(steps(job, found.as_ref()))
}

/// What is to be done, a step for each thing that is wanted, whether the image has it already or not.
fn steps(job: &Job<'_>, found: Option<&Image>) -> Steps {
    let release = &job.request.release;
    let mut steps = Steps::default();
    if let Some(after) = release.deprecate_after {
        let missing = found.is_none_or(|image| image.deprecation_time().is_none());
        let requests = steps.step(format!("deprecate the image after {}", days(after)));
        requests.exactly(EnableImageDeprecation, missing.into());
    }
    if !release.share.is_empty() {
        let what = if release.share_snapshots { "it and its snapshots" } else { "it" };
        let with: Vec<String> = release.share.iter().map(ToString::to_string).collect();
        share::plan(&sharing(job), steps.step(format!("share {what} with {}", with.join(", "))));
    }
    let protect = match release.protection {
        Protection::Off => None,
        Protection::On => Some("protect it from being deregistered"),
        Protection::Cooldown => Some("protect it from being deregistered, and a day longer"),
    };
    if let Some(protect) = protect {
        let missing = found.is_none_or(|image| !is_protected(image));
        steps.step(protect).exactly(EnableImageDeregistrationProtection, missing.into());
    }
    // The image is looked at once for all of them.
    if let Some(first) = steps.first() {
        first.at_least(DescribeImages, 1);
    }
    steps
}

fn is_protected(image: &Image) -> bool {
    image.deregistration_protection().is_some_and(|word| word.starts_with("enabled"))
}

fn days(time: Duration) -> String {
    match time.as_secs() {
        seconds if seconds % 86_400 == 0 => format!("{} days", seconds / 86_400),
        _ => show_duration(time),
    }
}

/// Whom the image is shared with.
pub(super) fn sharing(job: &Job<'_>) -> Sharing {
    let release = &job.request.release;
    Sharing { with: release.share.clone(), remove: false, snapshots: release.share_snapshots }
}

/// Does all of it. Nothing if there is nothing to do.
pub(super) async fn finish(job: &Job<'_>, id: &str) -> Result<(), Error> {
    if steps(job, None).is_empty() {
        return Ok(());
    }
    let work = Box::pin(each(job, id));
    job.phase("finish", begins(job), |()| String::new(), work).await
}

async fn each(job: &Job<'_>, id: &str) -> Result<(), Error> {
    let release = &job.request.release;
    let found = image::get(job, id).await?;
    if let Some(after) = release.deprecate_after {
        deprecate(job, &found, after).await?;
    }
    if !release.share.is_empty() {
        // What the user's other volumes are made of is the user's.
        let snapshots: Vec<String> = image::root_snapshot(&found).map(str::to_owned).into_iter().collect();
        let (place, sharing) = (job.place(), sharing(job));
        share::possible(&place, &found, &sharing)?;
        share::apply(&place, id, &snapshots, &sharing).await?;
    }
    // Last, because it stands in the way of taking the image back.
    if release.protection != Protection::Off {
        protect(job, &found, id).await?;
    }
    Ok(())
}

/// An image that has such a date already keeps it: it counts from the first publish.
async fn deprecate(job: &Job<'_>, found: &Image, after: Duration) -> Result<(), Error> {
    let id = found.image_id().unwrap_or_default();
    if let Some(time) = found.deprecation_time() {
        job.events.detail(format!("{id} is deprecated at {time} already"));
        return Ok(());
    }
    let at = DateTime::from(SystemTime::now() + after);
    let call = async {
        let call = job.clients.ec2.enable_image_deprecation().image_id(id).deprecate_at(at);
        call.send().await.map(|_| ()).map_err(job.clients.failed("ec2:EnableImageDeprecation"))
    };
    job.call("the image's deprecation", call).await
}

async fn protect(job: &Job<'_>, found: &Image, id: &str) -> Result<(), Error> {
    if is_protected(found) {
        return Ok(());
    }
    let cooldown = job.request.release.protection == Protection::Cooldown;
    let call = async {
        let call = job.clients.ec2.enable_image_deregistration_protection().image_id(id).with_cooldown(cooldown);
        call.send().await.map(|_| ()).map_err(job.clients.failed("ec2:EnableImageDeregistrationProtection"))
    };
    job.call("the image's protection", call).await
}
