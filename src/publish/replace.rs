//! An image takes the name of an older one (`--force`).
//!
//! AWS knows no renaming, and `RegisterImage` takes no name twice. So the new image is registered under an interim name
//! first, which shows that AWS takes it; once it is available the old one goes, and the name is given to a second image of
//! the same snapshot, which takes seconds. Whoever is killed in between finds the interim image and goes on.
//! `CopyImage` takes a name twice: there the old image goes when its successor is available.

use aws_sdk_ec2::types::{Image, Snapshot};

use super::action::Action::{DeleteSnapshot, DeregisterImage, DescribeSnapshots};
use super::failure::Failure;
use super::plan::Steps;
use super::undo::Undo;
use super::{Job, found, image, rules};
use crate::error::{Error, Exit};

/// An image that has the name now, or the interim one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Old {
    pub(super) id: String,
    snapshots: Vec<String>,
}

impl Old {
    pub(super) fn of(image: &Image) -> Option<Self> {
        let snapshots = image::snapshots(image).map(str::to_owned).collect();
        Some(Self { id: image.image_id()?.to_owned(), snapshots })
    }
}

/// The name that a new image has while the old one has its own.
pub(super) fn interim_name(name: &str) -> String {
    const LONGEST: usize = 128;
    const ENDING: &str = ".new";
    // Names are ASCII.
    format!("{}{ENDING}", &name[..name.len().min(LONGEST - ENDING.len())])
}

/// Registers the snapshot under the name that `old` has, and takes the old image away.
pub(super) async fn register(job: &Job<'_>, snapshot: &str, old: &[Old], undo: &mut Undo) -> Result<String, Error> {
    let (name, interim) = (&job.target.image_name, interim_name(&job.target.image_name));
    let first = Box::pin(image::register(job, &interim, snapshot, undo)).await?;
    for one in old {
        job.events.note(format!("image {first} is available: deregistering {} of the name `{name}`", one.id));
        deregister(job, &one.id).await?;
        // From here on the new image is all there is.
        undo.settle();
    }
    let words = || format!("the new image is {first}, named `{interim}`; publish again to give it its name");
    let id = Box::pin(image::register(job, name, snapshot, undo)).await.map_err(|error| error.with_note(words()))?;
    remove_interim(job, &first).await;
    for one in old {
        delete_snapshots(job, one, snapshot).await;
    }
    Ok(id)
}

/// What [`register`] would do, and before it [`image::register`] if no image has the name.
pub(super) async fn plan(job: &Job<'_>, keep: Option<&str>, old: &[Old], steps: &mut Steps) -> Result<(), Error> {
    if old.is_empty() {
        image::plan(job, steps);
        return Ok(());
    }
    let interim = interim_name(&job.target.image_name);
    image::plan_register(steps.step(format!("register the new image as `{interim}` at first")));
    let snapshots = plan_remove(job, keep, old, steps).await?;
    image::plan(job, steps);
    steps.step(format!("deregister the image `{interim}`")).exactly(DeregisterImage, 1);
    steps.extend(snapshots);
    Ok(())
}

/// What [`remove`] would do; what comes after all images are gone is returned.
pub(super) async fn plan_remove(
    job: &Job<'_>,
    keep: Option<&str>,
    old: &[Old],
    steps: &mut Steps,
) -> Result<Steps, Error> {
    let mut after = Steps::default();
    for one in old {
        let words = format!("deregister {} of the same name, once the new image is available", one.id);
        steps.step(words).exactly(DeregisterImage, 1);
        for id in one.snapshots.iter().filter(|id| Some(id.as_str()) != keep) {
            let found = job.stop.or("the old snapshot", found::snapshot(job, id)).await?;
            let own = found.is_ok_and(|snapshot| is_own(&snapshot));
            let words = if own { format!("delete its snapshot {id}") } else { format!("keep its snapshot {id}") };
            after.step(words).exactly(DescribeSnapshots, 1).exactly(DeleteSnapshot, own.into());
        }
    }
    let _ = job.clients.asked();
    Ok(after)
}

fn is_own(snapshot: &Snapshot) -> bool {
    found::tag(snapshot.tags(), rules::DIGEST_TAG).is_some()
}

/// What [`remove_interim`] would do.
pub(super) fn plan_remove_interim(id: &str, steps: &mut Steps) {
    steps.step(format!("deregister {id}, which an earlier publish has left")).exactly(DeregisterImage, 1);
}

/// Takes old images away that have a successor of their name.
pub(super) async fn remove(job: &Job<'_>, old: &[Old], snapshot: &str) -> Result<(), Error> {
    for one in old {
        job.events.note(format!("deregistering {} of the same name", one.id));
        deregister(job, &one.id).await?;
        delete_snapshots(job, one, snapshot).await;
    }
    Ok(())
}

/// Takes the interim image away once the name is given; only a warning if that fails.
pub(super) async fn remove_interim(job: &Job<'_>, id: &str) {
    if let Err(error) = deregister(job, id).await {
        job.events.warn(format!("cannot deregister the interim image {id}: {error}"));
    }
}

async fn deregister(job: &Job<'_>, id: &str) -> Result<(), Error> {
    let call = async {
        let answer = job.clients.ec2.deregister_image().image_id(id).send().await;
        Ok(answer.map(|_| ()).map_err(job.clients.failed("ec2:DeregisterImage")))
    };
    match job.call("the old image's end", call).await? {
        Ok(()) => Ok(()),
        Err(failure) if failure.is_not_found() => Ok(()),
        Err(failure) if failure.code == "OperationNotPermitted" => Err(Error::new(
            Exit::Publish,
            format!("image {id} is protected from being deregistered"),
        )
        .with_note(format!("AWS said: {}", failure.reason()))
        .help(format!(
            "if it may go, `aws ec2 disable-image-deregistration-protection --region {} --image-id {id}`; or publish \
                     under another name",
            job.target.region
        ))),
        Err(failure) => Err(job.error(failure)),
    }
}

/// Those that kiln has made, and that no image needs. What can't be deleted is named.
async fn delete_snapshots(job: &Job<'_>, old: &Old, keep: &str) {
    for id in old.snapshots.iter().filter(|id| *id != keep) {
        if let Err(why) = delete_snapshot(job, id).await {
            let region = &job.target.region;
            job.events.warn(format!(
                "snapshot {id} of the old image is left ({why}); delete it with `aws ec2 delete-snapshot --region {region} \
                 --snapshot-id {id}`"
            ));
        }
    }
}

async fn delete_snapshot(job: &Job<'_>, id: &str) -> Result<(), String> {
    let said = |failure: Failure| failure.reason();
    let stopped = |error: Error| error.message;
    let snapshot = match job.stop.or("the old snapshot", found::snapshot(job, id)).await.map_err(stopped)? {
        Err(failure) if failure.is_not_found() => return Ok(()),
        answer => answer.map_err(said)?,
    };
    if !is_own(&snapshot) {
        return Err("kiln has not made it".to_owned());
    }
    let call = job.clients.ec2.delete_snapshot().snapshot_id(id).send();
    let answer = job.stop.or("the old snapshot's end", call).await.map_err(stopped)?;
    match answer.map_err(job.clients.failed("ec2:DeleteSnapshot")) {
        Err(failure) if failure.is_not_found() => Ok(()),
        Err(failure) if failure.code == "InvalidSnapshot.InUse" => Err("another image uses it".to_owned()),
        answer => answer.map(|_| ()).map_err(said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interim_name_is_one_that_aws_takes() {
        assert_eq!(interim_name("web-1"), "web-1.new");
        assert_eq!(interim_name(&"x".repeat(128)).len(), 128);
        assert_ne!(interim_name(&"x".repeat(128)), "x".repeat(128));
    }
}
