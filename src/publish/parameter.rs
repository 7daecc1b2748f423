//! The SSM parameter that names the newest image in a region: what launch templates and `resolve:ssm:` read.
//!
//! Its type is `aws:ec2:image`, so that AWS itself looks whether the image is there. It does so after it has answered; a
//! value that it doesn't take is not written. So the parameter is read back.
//!
//! Source: "Native parameter support for Amazon Machine Image IDs", AWS Systems Manager User Guide.

use aws_sdk_ec2::types::Tag;
use aws_sdk_ssm::types::ParameterType;
use tokio::time::Instant;

use super::action::Action::{CreateTags, GetParameter, PutParameter};
use super::client::Clients;
use super::failure::Failure;
use super::place::Place;
use super::plan::Steps;
use super::{Job, import};
use crate::error::{Error, Exit};

/// The tag with the name of the parameter that names an image.
pub(super) const TAG: &str = "kiln:ssm";
/// The data type that only ids of images have.
const IMAGE: &str = "aws:ec2:image";

/// Points the parameter at the image, unless it does already.
pub(super) async fn set(job: &Job<'_>, name: &str, image: &str) -> Result<(), Error> {
    if value(job, name).await?.as_deref() == Some(image) {
        job.events.detail(format!("the parameter {name} names {image} already"));
        return Ok(());
    }
    // Before, so that no parameter names an image that doesn't tell.
    tag(job, name, image).await?;
    let put = async {
        let call = job.clients.ssm.put_parameter().name(name).value(image);
        let call = call.r#type(ParameterType::String).data_type(IMAGE).overwrite(true);
        call.send().await.map(|_| ()).map_err(job.clients.failed("ssm:PutParameter"))
    };
    job.call("the parameter", Box::pin(put)).await?;
    let until = Instant::now() + import::settling(job.request.poll);
    while value(job, name).await?.as_deref() != Some(image) {
        if Instant::now() >= until {
            let message = format!("AWS did not let the parameter {name} of {} name {image}", job.target.region);
            return Err(Error::new(Exit::Publish, message).help(format!(
                "a parameter that is not of the data type `{IMAGE}` has to be deleted first: \
                 `aws ssm delete-parameter --region {} --name {name}`",
                job.target.region
            )));
        }
        job.stop.pause("the parameter", job.request.poll.min(std::time::Duration::from_secs(3))).await?;
    }
    Ok(())
}

/// What [`set`] would do for an image that is there; none: for a new one.
pub(super) async fn plan(job: &Job<'_>, name: &str, image: Option<&str>, steps: &mut Steps) -> Result<(), Error> {
    let named = image.is_some() && value(job, name).await?.as_deref() == image;
    let _ = job.clients.asked();
    let requests = steps.step(format!("name the image in the SSM parameter {name} of {}", job.target.region));
    if named {
        requests.exactly(GetParameter, 1);
    } else {
        requests.exactly(CreateTags, 1).exactly(PutParameter, 1).at_least(GetParameter, 2);
    }
    Ok(())
}

/// Deletes the parameter if it names this image, which is gone; why not, if it can't.
pub(super) async fn forget(place: &Place, name: &str, image: &str) -> Option<String> {
    match look(&place.clients, name).await {
        Ok(Some(value)) if value == image => {}
        Ok(_) => return None,
        Err(failure) => return Some(failure.reason()),
    }
    let deleted = place.clients.ssm.delete_parameter().name(name).send().await;
    match deleted.map_err(place.clients.failed("ssm:DeleteParameter")) {
        Err(failure) if !failure.is_not_found() => Some(failure.reason()),
        _ => None,
    }
}

async fn value(job: &Job<'_>, name: &str) -> Result<Option<String>, Error> {
    job.call("the parameter", Box::pin(look(&job.clients, name))).await
}

/// What the parameter is; none if there is none.
async fn look(clients: &Clients, name: &str) -> Result<Option<String>, Failure> {
    let answer = clients.ssm.get_parameter().name(name).send().await;
    match answer.map_err(clients.failed("ssm:GetParameter")) {
        Ok(answer) => Ok(answer.parameter.and_then(|parameter| parameter.value)),
        Err(failure) if failure.is_not_found() => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// Has the image say which parameter names it, for those who retire it.
async fn tag(job: &Job<'_>, name: &str, image: &str) -> Result<(), Error> {
    let tag = Tag::builder().key(TAG).value(name).build();
    let call = job.clients.ec2.create_tags().resources(image).tags(tag).send();
    let answer = job.stop.or("the image's tag", call).await?;
    if let Err(failure) = answer.map_err(job.clients.failed("ec2:CreateTags")) {
        let why = failure.reason();
        job.events
            .warn(format!("{image} doesn't say that {name} names it, so that `kiln retire` will leave that: {why}"));
    }
    Ok(())
}
