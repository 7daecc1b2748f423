//! Who may launch an image, and who may make volumes of its snapshots.
//!
//! What AWS would refuse is found out first, by requests that only read; then nothing is changed. Sharing is a setting,
//! not a thing: made twice it is the same, and a run that failed in the middle is repeated.
//!
//! Source: `ModifyImageAttribute`, `ModifySnapshotAttribute`, `GetImageBlockPublicAccessState` in the EC2 API reference,
//! "Share an AMI with specific AWS accounts" in the user guide.

use aws_sdk_ec2::types::{
    CreateVolumePermission, CreateVolumePermissionModifications, Image, LaunchPermission,
    LaunchPermissionModifications, ManagedBy, PermissionGroup, SnapshotAttributeName, SnapshotBlockPublicAccessState,
};

use super::action::Action::{ModifyImageAttribute, ModifySnapshotAttribute};
use super::failure::Failure;
use super::place::Place;
use super::plan::Requests;
use super::rules;
use crate::error::{Error, Exit};
use crate::recipe::Grantee;

/// How many accounts a snapshot takes in one request.
const AT_ONCE: usize = 500;

/// What is to be allowed, or not any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sharing {
    pub(super) with: Vec<Grantee>,
    /// Take the permissions away.
    pub(super) remove: bool,
    /// The image's snapshots as well: who has them can copy the image.
    pub(super) snapshots: bool,
}

impl Sharing {
    fn public(&self) -> bool {
        !self.remove && self.with.contains(&Grantee::Everyone)
    }

    /// That it makes sense in these regions, as far as that shows without a connection.
    pub(super) fn check<'a>(&self, regions: impl IntoIterator<Item = &'a str>) -> Result<(), Error> {
        let units = |one: &&Grantee| matches!(one, Grantee::Organisation(_) | Grantee::Unit(_));
        if let Some(one) = self.with.iter().find(units).filter(|_| self.snapshots) {
            return Err(Error::new(Exit::Input, format!("snapshots can't be shared with `{one}`")).help(
                "AWS shares snapshots with accounts only; name those, or share the image alone: who may launch it needs no \
                 snapshot",
            ));
        }
        for region in regions {
            let partition = rules::partition(region);
            let foreign = |one: &&Grantee| one.partition().is_some_and(|its| its != partition);
            if let Some(one) = self.with.iter().find(foreign) {
                return Err(Error::new(Exit::Input, format!("an image in {region} can't be shared with `{one}`"))
                    .help(format!("there, ARNs begin with `arn:{partition}:`")));
            }
        }
        Ok(())
    }
}

/// Whether the account lets anything be shared so in this region. Where the caller may not ask, AWS tells when it is done.
pub(super) async fn permitted(place: &Place, sharing: &Sharing) -> Result<(), Error> {
    if !sharing.public() {
        return Ok(());
    }
    let (region, ec2) = (place.region(), &place.clients.ec2);
    let answer =
        place.stop.or("whether images may be public", ec2.get_image_block_public_access_state().send()).await?;
    if let Ok(answer) = answer
        && answer.image_block_public_access_state().is_some_and(|state| state != "unblocked")
    {
        return Err(blocked(region, "images", "image", answer.managed_by()));
    }
    if !sharing.snapshots {
        return Ok(());
    }
    let call = ec2.get_snapshot_block_public_access_state().send();
    let answer = place.stop.or("whether snapshots may be public", call).await?;
    if let Ok(answer) = answer
        && answer.state().is_some_and(|state| *state != SnapshotBlockPublicAccessState::Unblocked)
    {
        return Err(blocked(region, "snapshots", "snapshot", answer.managed_by()));
    }
    Ok(())
}

fn blocked(region: &str, things: &str, thing: &str, by: Option<&ManagedBy>) -> Error {
    let message = format!("this account lets no {things} be public in {region} (block public access)");
    Error::new(Exit::Publish, message).help(match by {
        Some(ManagedBy::DeclarativePolicy) => {
            "a policy of the organisation says so; only who manages that can change it".to_owned()
        }
        _ => format!(
            "if all the world shall have it: `aws ec2 disable-{thing}-block-public-access --region {region}`, share it, then \
             `aws ec2 enable-{thing}-block-public-access --region {region} --{thing}-block-public-access-state block-new-sharing`"
        ),
    })
}

/// Whether this image can be shared so, as far as it shows.
pub(super) fn possible(place: &Place, image: &Image, sharing: &Sharing) -> Result<(), Error> {
    let encrypted = image
        .block_device_mappings()
        .iter()
        .any(|mapping| mapping.ebs().is_some_and(|volume| volume.encrypted() == Some(true)));
    let id = image.image_id().unwrap_or_default();
    if sharing.public() && encrypted {
        return Err(Error::new(Exit::Publish, format!("{id} in {} can't be public: it is encrypted", place.region()))
            .help("share it with accounts, or publish the disk once more without encryption"));
    }
    Ok(())
}

/// Lets them launch the image, or not any more; and, where asked for, have its snapshots.
pub(super) async fn apply(place: &Place, id: &str, snapshots: &[String], sharing: &Sharing) -> Result<(), Error> {
    let launch: Vec<_> = sharing.with.iter().map(launch_permission).collect();
    let permissions = LaunchPermissionModifications::builder();
    let permissions =
        if sharing.remove { permissions.set_remove(Some(launch)) } else { permissions.set_add(Some(launch)) };
    let call = place.clients.ec2.modify_image_attribute().image_id(id).launch_permission(permissions.build());
    let answer = place.stop.or("the image's permissions", call.send()).await?;
    answer.map_err(place.clients.failed("ec2:ModifyImageAttribute")).map_err(|failure| explain(place, id, failure))?;
    let snapshots = if sharing.snapshots { snapshots } else { &[] };
    for snapshot in snapshots {
        for some in sharing.with.chunks(AT_ONCE) {
            let answer =
                place.stop.or("the snapshot's permissions", share_snapshot(place, snapshot, some, sharing)).await?;
            answer.map_err(|failure| {
                let done = if sharing.remove { "is not shared with them any more" } else { "is shared with them" };
                explain(place, snapshot, failure).with_note(format!("the image {id} {done}"))
            })?;
        }
    }
    Ok(())
}

/// What [`apply`] would do with an image of one snapshot.
pub(super) fn plan(sharing: &Sharing, requests: &mut Requests) {
    let snapshots = if sharing.snapshots { sharing.with.len().div_ceil(AT_ONCE) as u64 } else { 0 };
    requests.exactly(ModifyImageAttribute, 1).exactly(ModifySnapshotAttribute, snapshots);
}

fn launch_permission(grantee: &Grantee) -> LaunchPermission {
    let permission = LaunchPermission::builder();
    match grantee {
        Grantee::Account(id) => permission.user_id(id),
        Grantee::Organisation(arn) => permission.organization_arn(arn),
        Grantee::Unit(arn) => permission.organizational_unit_arn(arn),
        Grantee::Everyone => permission.group(PermissionGroup::All),
    }
    .build()
}

async fn share_snapshot(place: &Place, id: &str, with: &[Grantee], sharing: &Sharing) -> Result<(), Failure> {
    let permission = |grantee: &Grantee| match grantee {
        Grantee::Account(id) => Some(CreateVolumePermission::builder().user_id(id).build()),
        Grantee::Everyone => Some(CreateVolumePermission::builder().group(PermissionGroup::All).build()),
        // Refused by `check`.
        Grantee::Organisation(_) | Grantee::Unit(_) => None,
    };
    let all: Vec<_> = with.iter().filter_map(permission).collect();
    let permissions = CreateVolumePermissionModifications::builder();
    let permissions = if sharing.remove { permissions.set_remove(Some(all)) } else { permissions.set_add(Some(all)) };
    let call = place
        .clients
        .ec2
        .modify_snapshot_attribute()
        .attribute(SnapshotAttributeName::CreateVolumePermission)
        .snapshot_id(id)
        .create_volume_permission(permissions.build());
    call.send().await.map(|_| ()).map_err(place.clients.failed("ec2:ModifySnapshotAttribute"))
}

/// Which key a snapshot is encrypted with, AWS tells by its ARN; that it is the default one, only when it is shared:
/// "Snapshots encrypted with the AWS Managed CMK can’t be shared", "Encrypted snapshots with EBS default key cannot be
/// shared".
fn explain(place: &Place, id: &str, failure: Failure) -> Error {
    let region = place.region();
    if failure.message.contains("AWS Managed CMK") || failure.message.contains("default key") {
        return Error::new(
            Exit::Publish,
            format!("{id} in {region} can't be shared: it is encrypted with the account's default key (`alias/aws/ebs`)"),
        )
        .help(format!(
            "copy the image with a key of your own, and let the other accounts use that: `kiln copy IMAGE --to {region} \
             --kms-key KEY --image-name NAME`"
        ));
    }
    place.error(failure)
}

/// With whom the image is shared, in AWS's order.
pub(super) async fn shared_with(place: &Place, id: &str) -> Result<Vec<Grantee>, Failure> {
    let call = place.clients.ec2.describe_image_attribute().image_id(id);
    let call = call.attribute(aws_sdk_ec2::types::ImageAttributeName::LaunchPermission);
    let answer = call.send().await.map_err(place.clients.failed("ec2:DescribeImageAttribute"))?;
    Ok(answer.launch_permissions().iter().filter_map(grantee).collect())
}

fn grantee(permission: &LaunchPermission) -> Option<Grantee> {
    let account = permission.user_id().map(|id| Grantee::Account(id.to_owned()));
    let organisation = permission.organization_arn().map(|arn| Grantee::Organisation(arn.to_owned()));
    let unit = permission.organizational_unit_arn().map(|arn| Grantee::Unit(arn.to_owned()));
    let everyone = (permission.group() == Some(&PermissionGroup::All)).then_some(Grantee::Everyone);
    account.or(organisation).or(unit).or(everyone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sharing(with: &[&str]) -> Sharing {
        Sharing { with: with.iter().map(|text| text.parse().unwrap()).collect(), remove: false, snapshots: false }
    }

    const ORGANISATION: &str = "arn:aws:organizations::123456789012:organization/o-abcdefghij";

    #[test]
    fn what_can_never_be_shared_is_refused_without_a_request() {
        sharing(&["all", "123456789012", ORGANISATION]).check(["eu-west-1"]).unwrap();
        let error = Sharing { snapshots: true, ..sharing(&[ORGANISATION]) }.check(["eu-west-1"]).unwrap_err();
        assert_eq!(error.message, format!("snapshots can't be shared with `{ORGANISATION}`"));
        let error = sharing(&[ORGANISATION]).check(["eu-west-1", "cn-north-1"]).unwrap_err();
        assert_eq!(error.message, format!("an image in cn-north-1 can't be shared with `{ORGANISATION}`"));
        assert_eq!(error.help.unwrap(), "there, ARNs begin with `arn:aws-cn:`");
    }

    #[test]
    fn permissions_are_read_as_they_are_written() {
        let all = sharing(&[
            "123456789012",
            ORGANISATION,
            "arn:aws:organizations::123456789012:ou/o-abcdefghij/ou-abcd-12345678",
            "all",
        ]);
        let back: Vec<_> = all.with.iter().map(launch_permission).filter_map(|one| grantee(&one)).collect();
        assert_eq!(back, all.with);
    }
}
