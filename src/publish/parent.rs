//! The snapshot that a new one is built on: the one that was asked for, or the last of the recipe's.
//!
//! Only blocks that the parent doesn't have are sent, so that kiln must know what it has: its block map was kept in the
//! store of the host that published it, or is given as a file. Which map is a snapshot's is told by the digest in the
//! snapshot's tag, so that no map of another disk is ever taken for it. One that was asked for and doesn't fit is an error
//! before anything is made; one that is only found is passed over.
//!
//! Sources: `StartSnapshot` in the EBS direct API reference, "Use encryption" of them in the Amazon EBS User Guide.

use std::collections::BTreeMap;

use aws_sdk_ec2::primitives::DateTime;
use aws_sdk_ec2::types::{Snapshot, SnapshotState, StorageTier};

use super::failure::Failure;
use super::regions::Source;
use super::{Job, Request, ebs, found, rules};
use crate::disk::BlockMap;
use crate::error::{Error, Exit};
use crate::units::GIB;

/// What new snapshots are built on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parents {
    /// In regions that have none of their own below; none: on the recipe's last snapshot, where that can be.
    pub everywhere: Option<Wanted>,
    /// By region.
    pub of_regions: BTreeMap<String, Wanted>,
    /// Block maps of earlier disks, besides those in the store.
    pub maps: Vec<BlockMap>,
}

/// What was asked for to build on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: all is sent.
    Nothing,
    /// The snapshot with this id.
    Snapshot(String),
}

impl Parents {
    /// What is wanted in this region; none: what is found.
    #[must_use]
    pub fn wanted(&self, region: &str) -> Option<&Wanted> {
        self.of_regions.get(region).or(self.everywhere.as_ref())
    }

    /// Whether a snapshot that was begun on `parent` is one that is asked for.
    pub(super) fn allow(&self, region: &str, parent: Option<&str>) -> bool {
        match (self.wanted(region), parent) {
            (None, _) | (Some(Wanted::Nothing), None) => true,
            (Some(Wanted::Snapshot(asked)), Some(parent)) => asked == parent,
            (Some(_), _) => false,
        }
    }
}

/// A snapshot to build on, and what it has.
pub(super) struct Parent {
    pub(super) snapshot: String,
    pub(super) map: BlockMap,
    /// It was asked for, and not only found.
    pub(super) asked: bool,
}

impl Parent {
    /// What to say if AWS doesn't build on it although it was asked for.
    pub(super) fn refused(&self, job: &Job<'_>, failure: Failure) -> Error {
        let is_refused = is_refused(&failure);
        let error = ebs::start_failed(job, failure).with_note(format!("it was to be built on {}", self.snapshot));
        if is_refused { error.help(OTHERWISE) } else { error }
    }
}

/// Whether it may be the parent that AWS refuses: its key may be gone, or it may be itself. A quota, or credentials that have
/// expired, would be in the way of any other too.
pub(super) fn is_refused(failure: &Failure) -> bool {
    matches!(failure.code.as_str(), "ConflictException" | "ResourceNotFoundException" | "ValidationException")
}

/// What helps against a parent that doesn't fit, whatever is wrong with it.
const OTHERWISE: &str = "name another snapshot, or send all with --parent none";

/// The snapshot to build on, if there is one. New snapshots are encrypted if `encrypts`.
pub(super) async fn choose(job: &Job<'_>, encrypts: bool) -> Result<Option<Parent>, Error> {
    match job.request.parents.wanted(&job.target.region) {
        Some(Wanted::Nothing) => Ok(None),
        Some(Wanted::Snapshot(id)) => Ok(Some(asked(job, id, encrypts).await?)),
        None => last(job, encrypts).await,
    }
}

/// Whether what was asked for can be built on, where blocks are sent at all. None if nothing was asked for.
pub(super) async fn check(job: &Job<'_>) -> Result<Option<Parent>, Error> {
    let (parents, region) = (&job.request.parents, &job.target.region);
    match (parents.wanted(region), &job.source) {
        (Some(Wanted::Snapshot(id)), Source::Disk(_)) => {
            let encrypts = Box::pin(ebs::encrypts(job)).await?;
            Ok(Some(Box::pin(asked(job, id, encrypts)).await?))
        }
        (Some(Wanted::Snapshot(id)), Source::Copy(home)) if parents.of_regions.contains_key(region) => {
            let message = format!("nothing is built on {id}: {region} gets a copy of {}'s image", home.region);
            Err(Error::new(Exit::Input, message)
                .help(format!("name a snapshot of {}, or write to each region with --via ebs", home.region)))
        }
        _ => Ok(None),
    }
}

async fn asked(job: &Job<'_>, id: &str, encrypts: bool) -> Result<Parent, Error> {
    let region = &job.target.region;
    let snapshot = match job.stop.or("the snapshot to build on", found::snapshot(job, id)).await? {
        Ok(snapshot) => snapshot,
        Err(failure) if failure.is_not_found() => {
            let message = format!("there is no snapshot {id} in {region} to build on");
            return Err(Error::new(Exit::Publish, message).help(OTHERWISE));
        }
        Err(failure) => return Err(job.error(failure)),
    };
    if let Err((message, help)) = fits(job.request, region, &snapshot, encrypts) {
        return Err(Error::new(Exit::Publish, format!("can't build on {id} in {region}: {message}")).help(help));
    }
    let digest = found::tag(snapshot.tags(), rules::DIGEST_TAG).unwrap_or_default();
    match map_of(job, &snapshot) {
        Some(map) => Ok(Parent { snapshot: id.to_owned(), map, asked: true }),
        None => Err(no_map(job.request, id, digest)),
    }
}

/// The newest snapshot of the recipe's that can be built on.
async fn last(job: &Job<'_>, encrypts: bool) -> Result<Option<Parent>, Error> {
    let of_recipe = found::snapshots(job, rules::NAME_TAG, &job.request.name);
    let answer = job.stop.or("earlier snapshots", of_recipe).await?;
    let mut snapshots = found::may_look(job, "snapshots", answer)?;
    snapshots.retain(|snapshot| fits(job.request, &job.target.region, snapshot, encrypts).is_ok());
    snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.start_time().map(DateTime::secs)));
    let with_map = |snapshot: &Snapshot| {
        Some(Parent { snapshot: snapshot.snapshot_id()?.to_owned(), map: map_of(job, snapshot)?, asked: false })
    };
    Ok(snapshots.iter().find_map(with_map))
}

/// The snapshot's block map, as large as the new disk. A map that is damaged has another digest.
fn map_of(job: &Job<'_>, snapshot: &Snapshot) -> Option<BlockMap> {
    let (size, digest) = (job.request.size * GIB, found::tag(snapshot.tags(), rules::DIGEST_TAG)?);
    let fits = |map: &BlockMap| {
        map.size() == size
            && map.digest().to_string() == digest
            // Of a disk that reads the same, other blocks may have been left out.
            && found::left_out(snapshot).is_none_or(|left_out| map.holes() == left_out)
    };
    maps(job, snapshot.snapshot_id()?).find(fits)
}

/// All maps at hand that may be the snapshot's.
pub(super) fn maps<'a>(job: &'a Job<'_>, snapshot: &str) -> impl Iterator<Item = BlockMap> + 'a {
    let kept = job.request.store.as_ref().and_then(|store| BlockMap::open(&store.map_path(snapshot)).ok());
    kept.into_iter().chain(job.request.parents.maps.iter().cloned())
}

fn no_map(request: &Request, id: &str, digest: &str) -> Error {
    let short: String = digest.chars().take(12).collect();
    let message = if request.parents.maps.is_empty() {
        format!("can't build on {id}: the block map of its disk {short} is not kept on this host")
    } else {
        format!("can't build on {id}: the block map of its disk {short} is not the one given, nor kept on this host")
    };
    Error::new(Exit::Input, message).help(
        "give the file `blocks` of the output folder that it was published from with --parent-blocks FILE, or publish from \
         the host that published it, with the same cache",
    )
}

/// Whether the snapshot can be built on; if not, what is in the way and what helps.
///
/// AWS takes a new snapshot that is larger than its parent, and kiln doesn't: what lies past the parent's end was never
/// written, and doesn't read as zeros in an encrypted one.
fn fits(request: &Request, region: &str, snapshot: &Snapshot, encrypts: bool) -> Result<(), (String, String)> {
    let otherwise = |message: String| Err((message, OTHERWISE.to_owned()));
    match snapshot.state() {
        Some(SnapshotState::Completed) => {}
        Some(SnapshotState::Pending) => {
            let help = format!("wait until it is, then publish again; or {OTHERWISE}");
            return Err(("it is not completed yet".to_owned(), help));
        }
        state => return otherwise(format!("its state is `{}`", state.map_or("unknown", SnapshotState::as_str))),
    }
    if snapshot.storage_tier() == Some(&StorageTier::Archive) {
        let id = snapshot.snapshot_id().unwrap_or_default();
        let help =
            format!("`aws ec2 restore-snapshot-tier --region {region} --snapshot-id {id}` takes it out of there");
        return Err(("it is in the archive".to_owned(), format!("{help}; or {OTHERWISE}")));
    }
    if found::tag(snapshot.tags(), rules::DIGEST_TAG).is_none() {
        let tag = rules::DIGEST_TAG;
        return otherwise(format!("it has no tag {tag}, so that kiln can't know which disk is in it"));
    }
    let size = snapshot.volume_size().and_then(|size| u64::try_from(size).ok()).unwrap_or_default();
    if size != request.size {
        return otherwise(format!("it has {size} GiB and the disk {}, and they must be as large", request.size));
    }
    if found::left_out(snapshot).is_some() && request.omit_holes.is_none() {
        let help = format!("publish with --omit-holes too; or {OTHERWISE}");
        return Err(("it was published with --omit-holes, so that its holes don't read as zeros".to_owned(), help));
    }
    if encrypts && snapshot.encrypted() != Some(true) {
        return otherwise("it isn't encrypted, and the new snapshot is to be".to_owned());
    }
    if !found::is_encrypted_as_asked(request, region, snapshot) {
        let words = |how: Option<&str>| match how {
            None => "what the account does by itself".to_owned(),
            Some("default") => "the account's default key".to_owned(),
            Some(key) => key.to_owned(),
        };
        let made = words(found::tag(snapshot.tags(), rules::ENCRYPTION_TAG));
        let asked = words(rules::encryption(request, region).as_deref());
        return otherwise(format!("it hands on its encryption, which is {made}, and asked for is {asked}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use aws_sdk_ec2::types::Tag;

    use super::super::request::example;
    use super::*;
    use crate::recipe::{Encryption, Via};

    fn snapshot(
        tags: &[(&str, &str)],
        change: impl FnOnce(aws_sdk_ec2::types::builders::SnapshotBuilder) -> aws_sdk_ec2::types::builders::SnapshotBuilder,
    ) -> Snapshot {
        let tags = tags.iter().map(|(key, value)| Tag::builder().key(*key).value(*value).build()).collect();
        let sound = Snapshot::builder()
            .snapshot_id("snap-1")
            .state(SnapshotState::Completed)
            .volume_size(4)
            .encrypted(false)
            .set_tags(Some(tags));
        change(sound).build()
    }

    #[test]
    fn what_can_not_be_built_on_is_told_with_the_reason() {
        let request = Request { via: Via::Ebs, ..example() };
        let keyed = Request { encryption: Some(Encryption::default()), ..request.clone() };
        let disk = (rules::DIGEST_TAG, "ab");
        let why = |request: &Request, snapshot: &Snapshot, encrypts| {
            fits(request, "eu-west-1", snapshot, encrypts).err().map(|(message, _)| message).unwrap_or_default()
        };
        let plain = |snapshot: &Snapshot| why(&request, snapshot, false);
        assert_eq!(plain(&snapshot(&[disk], |one| one)), "");
        assert_eq!(plain(&snapshot(&[disk], |one| one.state(SnapshotState::Pending))), "it is not completed yet");
        assert_eq!(plain(&snapshot(&[disk], |one| one.state(SnapshotState::Error))), "its state is `error`");
        assert_eq!(plain(&snapshot(&[disk], |one| one.storage_tier(StorageTier::Archive))), "it is in the archive");
        assert_eq!(plain(&snapshot(&[disk], |one| one.storage_tier(StorageTier::Standard))), "");
        assert!(plain(&snapshot(&[], |one| one)).starts_with("it has no tag kiln:digest, "));
        for size in [3, 5] {
            let said = plain(&snapshot(&[disk], |one| one.volume_size(size)));
            assert_eq!(said, format!("it has {size} GiB and the disk 4, and they must be as large"));
        }

        let noisy = snapshot(&[disk, (rules::HOLES_TAG, "0f")], |one| one.encrypted(true));
        assert!(plain(&noisy).starts_with("it was published with --omit-holes, "));
        assert_eq!(why(&Request { omit_holes: Some("0f".to_owned()), ..request.clone() }, &noisy, false), "");
        let not_encrypted = snapshot(&[disk, (rules::HOLES_TAG, "0f")], |one| one);
        assert_eq!(plain(&not_encrypted), "", "its holes read as zeros");

        let of_default = snapshot(&[disk, (rules::ENCRYPTION_TAG, "default")], |one| one.encrypted(true));
        let of_account = snapshot(&[disk], |one| one.encrypted(true));
        assert_eq!(
            why(&request, &snapshot(&[disk], |one| one), true),
            "it isn't encrypted, and the new snapshot is to be"
        );
        assert_eq!(why(&request, &of_account, true), "");
        assert_eq!(why(&keyed, &of_default, true), "");
        assert_eq!(
            why(&keyed, &of_account, true),
            "it hands on its encryption, which is what the account does by itself, and asked for is the account's default key"
        );
        assert!(plain(&of_default).starts_with("it hands on its encryption, which is the account's default key, and "));
    }

    #[test]
    fn what_was_begun_on_another_parent_is_not_what_is_asked_for() {
        let only = |wanted: Option<Wanted>| Parents { everywhere: wanted, ..Parents::default() };
        let named = |id: &str| Some(Wanted::Snapshot(id.to_owned()));
        let allow =
            |parents: &Parents| [None, Some("snap-1"), Some("snap-2")].map(|one| parents.allow("eu-west-1", one));
        assert_eq!(allow(&only(None)), [true, true, true]);
        assert_eq!(allow(&only(Some(Wanted::Nothing))), [true, false, false]);
        assert_eq!(allow(&only(named("snap-1"))), [false, true, false]);
        let mut parents = only(named("snap-1"));
        parents.of_regions.insert("eu-west-1".to_owned(), Wanted::Snapshot("snap-2".to_owned()));
        assert_eq!(allow(&parents), [false, false, true]);
        assert!(parents.allow("us-east-1", Some("snap-1")));
    }
}
