//! The SSM parameter that names the newest image in a region: what launch templates and `resolve:ssm:` read.
//!
//! Its type is `aws:ec2:image`, so that AWS itself looks whether the image is there. It does so after it has answered; a
//! value that it doesn't take is not written. So the parameter is read back.
//!
//! Source: "Native parameter support for Amazon Machine Image IDs", AWS Systems Manager User Guide.

use aws_sdk_ssm::types::ParameterType;
use tokio::time::Instant;

use super::failure::Failure;
use super::{Job, import};
use crate::error::{Error, Exit};

/// The data type that only ids of images have.
const IMAGE: &str = "aws:ec2:image";

/// Points the parameter at the image, unless it does already.
pub(super) async fn set(job: &Job<'_>, name: &str, image: &str) -> Result<(), Error> {
    if value(job, name).await?.as_deref() == Some(image) {
        job.events.detail(format!("the parameter {name} names {image} already"));
        return Ok(());
    }
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

/// What the parameter is; none if there is none.
async fn value(job: &Job<'_>, name: &str) -> Result<Option<String>, Error> {
    let call = async {
        let answer = job.clients.ssm.get_parameter().name(name).send().await;
        Ok::<_, Failure>(answer.map_err(job.clients.failed("ssm:GetParameter")))
    };
    match job.call("the parameter", call).await? {
        Ok(answer) => Ok(answer.parameter.and_then(|parameter| parameter.value)),
        Err(failure) if failure.is_not_found() => Ok(None),
        Err(failure) => Err(job.error(failure)),
    }
}
