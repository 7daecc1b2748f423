//! The snapshot becomes an image, and the image becomes available.

use std::time::Duration;

use aws_sdk_ec2::types::builders::EbsBlockDeviceBuilder;
use aws_sdk_ec2::types::{
    ArchitectureValues, BlockDeviceMapping, BootModeValues, EbsBlockDevice, Filter, Image, ImageState,
    ImdsSupportValues, ResourceType, Tag, TagSpecification, TpmSupportValues,
};
use tokio::time::Instant;

use super::action::Action::{DescribeImages, RegisterImage};
use super::client::Clients;
use super::failure::{Failure, duplicate_name, tidy};
use super::plan::{Requests, Steps};
use super::retry::{Try, ec2_once};
use super::undo::{Made, Undo};
use super::{Architecture, BootMode, Job, Request, import, rules};
use crate::error::{Error, Exit};
use crate::recipe::{Ebs, Volume, VolumeKind};

/// Images get ready in seconds: no need to wait as long as between two looks at an import.
const LOOK: Duration = Duration::from_secs(5);

pub(super) fn begins(job: &Job<'_>) -> String {
    format!("image `{}` in {}", job.target.image_name, job.target.region)
}

/// What [`register`] would do under the image's own name.
pub(super) fn plan(job: &Job<'_>, steps: &mut Steps) {
    plan_register(steps.step(in_words(job)));
}

/// What [`register`] would do.
pub(super) fn plan_register(requests: &mut Requests) {
    requests.exactly(RegisterImage, 1).at_least(DescribeImages, 1);
}

/// What [`until_available`] would do.
pub(super) fn plan_wait(requests: &mut Requests) {
    requests.at_least(DescribeImages, 1);
}

fn in_words(job: &Job<'_>) -> String {
    let request = job.request;
    let has = [
        (request.ena, "ENA"),
        (request.sriov, "SR-IOV"),
        (request.imds_v2, "IMDS v2.0"),
        (request.tpm, "TPM v2.0"),
        (request.uefi_data.is_some(), "UEFI variables"),
    ];
    let has = has.iter().filter(|(has, _)| *has).map(|(_, what)| *what);
    let has = std::iter::once("hvm").chain(has).collect::<Vec<_>>().join(", ");
    let root =
        format!("root {} on {}", request.root_device, ebs_in_words(&request.root, Some(rules::root_size(request))));
    let volumes =
        std::iter::once(root).chain(request.volumes.iter().map(added_in_words)).collect::<Vec<_>>().join("; ");
    format!(
        "register {}: {}, boot mode {}, {has}, {volumes}; tags {}",
        begins(job),
        architecture(request.arch),
        boot_mode(rules::boot_mode(request)),
        rules::tag_pairs(request).iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", "),
    )
}

fn ebs_in_words(ebs: &Ebs, size: Option<u64>) -> String {
    let size = size.map(|size| format!(" of {size} GiB")).unwrap_or_default();
    let iops = ebs.iops.map(|iops| format!(", {iops} IOPS")).unwrap_or_default();
    let throughput = ebs.throughput.map(|throughput| format!(", {throughput} MiB/s")).unwrap_or_default();
    let end = if ebs.delete_on_termination { "deleted with the instance" } else { "kept after the instance" };
    format!("{}{size}{iops}{throughput}, {end}", ebs.volume_type)
}

fn added_in_words(Volume { device, kind }: &Volume) -> String {
    match kind {
        VolumeKind::Empty { ebs, .. } => format!("{device} on {}", ebs_in_words(ebs, ebs.size)),
        VolumeKind::Snapshot { snapshot, ebs } => format!("{device} of {snapshot} on {}", ebs_in_words(ebs, ebs.size)),
        VolumeKind::InstanceStore { name } => format!("{device} is {name}"),
    }
}

/// Registers the image under `name` and waits until it can be launched.
pub(super) async fn register(job: &Job<'_>, name: &str, snapshot: &str, undo: &mut Undo) -> Result<String, Error> {
    let made = |id| Made::Image { id, name: name.to_owned(), snapshot: snapshot.to_owned() };
    let until = Instant::now() + import::settling(job.request.poll);
    let (entry, id) = loop {
        let (entry, answer) = job
            .make("the image's registration", undo, made(None), |attempt| send(job, name, snapshot, attempt))
            .await?;
        match answer {
            Ok(id) => break (entry, id),
            Err(failure) if failure.is_not_found() && Instant::now() < until => {
                job.stop.pause("the snapshot to be known everywhere", job.request.poll.min(LOOK)).await?;
            }
            Err(failure) if failure.code == "InvalidAMIName.Duplicate" => {
                let taken = job.call("the images of this name", of_names(&job.clients, &[name])).await?;
                if let Some(id) = own(&taken, snapshot) {
                    break (entry, id);
                }
                // One that was only just deregistered may still be in the way.
                if !(taken.is_empty() && job.request.force && Instant::now() < until) {
                    return Err(duplicate_name(&job.target, taken.first().and_then(Image::image_id)));
                }
                job.stop.pause("the name to be free", job.request.poll.min(LOOK)).await?;
            }
            Err(failure) => return Err(job.error(failure)),
        }
    };
    undo.made(entry, made(Some(id.clone())));
    until_available(job, &id).await?;
    Ok(id)
}

/// This account's images of these names.
pub(super) async fn of_names(clients: &Clients, names: &[&str]) -> Result<Vec<Image>, Failure> {
    let values = names.iter().map(|name| (*name).to_owned()).collect();
    let name = Filter::builder().name("name").set_values(Some(values)).build();
    let call = clients.ec2.describe_images().owners("self").filters(name).include_disabled(true);
    let answer = call.send().await.map_err(clients.failed("ec2:DescribeImages"))?;
    Ok(answer.images.unwrap_or_default())
}

/// The image with this id.
pub(super) async fn describe(clients: &Clients, id: &str) -> Result<Image, Failure> {
    let call = clients.ec2.describe_images().image_ids(id).include_disabled(true);
    let answer = call.send().await.map_err(clients.failed("ec2:DescribeImages"))?;
    answer.images.unwrap_or_default().into_iter().next().ok_or_else(|| Failure::absent("ec2:DescribeImages"))
}

/// The image with this id, which was there a moment ago, or was only just made.
pub(super) async fn get(job: &Job<'_>, id: &str) -> Result<Image, Error> {
    import::retry_not_found(job, &format!("image {id}"), || describe(&job.clients, id)).await
}

/// The image among `images` that was made from `snapshot`.
pub(super) fn own(images: &[Image], snapshot: &str) -> Option<String> {
    let from_it = |image: &&Image| snapshots(image).any(|id| id == snapshot);
    images.iter().find(from_it).and_then(Image::image_id).map(str::to_owned)
}

/// The snapshot that an image's root volume is made from.
pub(super) fn root_snapshot(image: &Image) -> Option<&str> {
    let root = |mapping: &&BlockDeviceMapping| mapping.device_name() == image.root_device_name();
    image.block_device_mappings().iter().find(root)?.ebs()?.snapshot_id()
}

/// The snapshots that an image's volumes are made from.
pub(super) fn snapshots(image: &Image) -> impl Iterator<Item = &str> {
    image.block_device_mappings().iter().filter_map(|mapping| mapping.ebs()?.snapshot_id())
}

async fn send(job: &Job<'_>, name: &str, snapshot: &str, attempt: Try) -> Result<String, Failure> {
    // The name is the only key that RegisterImage has: an earlier request's image would be in this one's way.
    if attempt.doubtful
        && let Some(id) = own(&of_names(&job.clients, &[name]).await?, snapshot)
    {
        return Ok(id);
    }
    let request = job.request;
    let settings = rules::settings(request, &job.target.region);
    let settings = Tag::builder().key(rules::SETTINGS_TAG).value(settings).build();
    let tags = TagSpecification::builder()
        .resource_type(ResourceType::Image)
        .set_tags(Some(import::tags(job)))
        .tags(settings)
        .build();
    let call = job
        .clients
        .ec2
        .register_image()
        .name(name)
        .set_description(Some(request.description.clone()).filter(|words| !words.is_empty()))
        .architecture(architecture(request.arch))
        .virtualization_type("hvm")
        .root_device_name(&request.root_device)
        .set_block_device_mappings(Some(mappings(request, snapshot)))
        .boot_mode(boot_mode(rules::boot_mode(request)))
        .ena_support(request.ena)
        .set_sriov_net_support(request.sriov.then(|| "simple".to_owned()))
        .set_imds_support(request.imds_v2.then_some(ImdsSupportValues::V20))
        .set_tpm_support(request.tpm.then_some(TpmSupportValues::V20))
        .set_uefi_data(request.uefi_data.clone())
        .tag_specifications(tags)
        .customize()
        .config_override(ec2_once());
    let answer = call.send().await.map_err(job.clients.failed("ec2:RegisterImage"))?;
    answer.image_id.ok_or_else(|| Failure::found("ec2:RegisterImage", "the answer has no image id".to_owned()))
}

/// The volumes of instances: the root volume, made from `snapshot`, and the others.
fn mappings(request: &Request, snapshot: &str) -> Vec<BlockDeviceMapping> {
    let root = ebs(&request.root, Some(rules::root_size(request))).snapshot_id(snapshot).build();
    let root = BlockDeviceMapping::builder().device_name(&request.root_device).ebs(root).build();
    std::iter::once(root).chain(request.volumes.iter().map(|volume| mapping(request, volume))).collect()
}

fn mapping(request: &Request, volume: &Volume) -> BlockDeviceMapping {
    let mapping = BlockDeviceMapping::builder().device_name(&volume.device);
    match &volume.kind {
        VolumeKind::Empty { encrypted, ebs: made } => {
            let encrypted = encrypted.unwrap_or(request.encryption.is_some());
            // Without the flag the account's default holds, which may be to encrypt.
            mapping.ebs(ebs(made, made.size).set_encrypted(encrypted.then_some(true)).build()).build()
        }
        // Next to a snapshot AWS refuses the flag: the volume is encrypted if the snapshot is.
        VolumeKind::Snapshot { snapshot, ebs: made } => {
            mapping.ebs(ebs(made, made.size).snapshot_id(snapshot).build()).build()
        }
        VolumeKind::InstanceStore { name } => mapping.virtual_name(name).build(),
    }
}

fn ebs(ebs: &Ebs, size: Option<u64>) -> EbsBlockDeviceBuilder {
    let number = |number: u32| i32::try_from(number).unwrap_or(i32::MAX);
    EbsBlockDevice::builder()
        .volume_type(ebs.volume_type.as_str().into())
        .set_volume_size(size.map(|size| i32::try_from(size).unwrap_or(i32::MAX)))
        .set_iops(ebs.iops.map(number))
        .set_throughput(ebs.throughput.map(number))
        .delete_on_termination(ebs.delete_on_termination)
}

pub(super) fn architecture(arch: Architecture) -> ArchitectureValues {
    match arch {
        Architecture::X86_64 => ArchitectureValues::X8664,
        Architecture::Arm64 => ArchitectureValues::Arm64,
    }
}

fn boot_mode(mode: BootMode) -> BootModeValues {
    match mode {
        BootMode::LegacyBios => BootModeValues::LegacyBios,
        BootMode::Uefi => BootModeValues::Uefi,
        BootMode::UefiPreferred => BootModeValues::UefiPreferred,
    }
}

pub(super) async fn until_available(job: &Job<'_>, id: &str) -> Result<(), Error> {
    let what = format!("image {id} to be available");
    loop {
        match judge(&get(job, id).await?) {
            Ok(true) => return Ok(()),
            Ok(false) => job.stop.pause(&what, job.request.poll.min(LOOK)).await?,
            Err(why) => {
                return Err(Error::new(Exit::Publish, format!("the image {id} is {why}"))
                    .help("publish again; the disk is unchanged"));
            }
        }
    }
}

/// Whether the image is available; what it is instead if it never will be.
pub(super) fn judge(image: &Image) -> Result<bool, String> {
    match image.state() {
        Some(ImageState::Available) => Ok(true),
        None | Some(ImageState::Pending) => Ok(false),
        Some(state) => {
            let reason = image.state_reason();
            let words = reason.and_then(|reason| reason.message().or(reason.code())).map(tidy).unwrap_or_default();
            let words = if words.is_empty() { "AWS gives no reason".to_owned() } else { words };
            Err(format!("`{state}`: {words}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use aws_sdk_ec2::types::StateReason;

    use super::*;

    #[test]
    fn only_available_ends_the_wait_and_everything_but_pending_fails_it() {
        let judged = |state| judge(&Image::builder().state(state).build());
        assert_eq!(judged(ImageState::Available), Ok(true));
        assert_eq!(judged(ImageState::Pending), Ok(false));
        assert_eq!(judge(&Image::builder().build()), Ok(false));
        for state in ["failed", "invalid", "error", "deregistered", "disabled", "transient", "new"] {
            assert_eq!(judged(ImageState::from(state)), Err(format!("`{state}`: AWS gives no reason")));
        }
        let reason = StateReason::builder().code("Client.X").message("Snapshot\nis gone.").build();
        let failed = Image::builder().state(ImageState::Failed).state_reason(reason).build();
        assert_eq!(judge(&failed), Err("`failed`: Snapshot is gone".to_owned()));
    }

    #[test]
    fn an_image_is_ones_own_if_it_is_made_from_ones_snapshot() {
        let image = |id: &str, snapshot: &str| {
            let volume = EbsBlockDevice::builder().snapshot_id(snapshot).build();
            Image::builder()
                .image_id(id)
                .block_device_mappings(BlockDeviceMapping::builder().ebs(volume).build())
                .build()
        };
        let images = [image("ami-1", "snap-1"), image("ami-2", "snap-2")];
        assert_eq!(own(&images, "snap-2").as_deref(), Some("ami-2"));
        assert_eq!(own(&images, "snap-3"), None);
    }
}
