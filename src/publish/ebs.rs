//! The disk straight into a snapshot, by the EBS direct APIs: no bucket, no role, no import to wait for.
//!
//! A snapshot is begun (`StartSnapshot`), given its blocks of 512 KiB (`PutSnapshotBlock`), and sealed
//! (`CompleteSnapshot`). The disk's block map has each block's SHA-256, which AWS wants and checks, so that the disk is
//! read once and not hashed. Holes are not sent, unless the snapshot is encrypted: there what was not written doesn't read
//! as zeros. On a snapshot of an earlier disk of the same recipe, whose block map is at hand, only what differs is sent.
//!
//! Source: "EBS direct APIs" in the Amazon EBS User Guide and API Reference.

use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_ebs::primitives::ByteStream;
use aws_sdk_ebs::types::{ChecksumAggregationMethod, ChecksumAlgorithm, Tag};
use aws_sdk_ec2::primitives::DateTime;
use aws_sdk_ec2::types::{Filter, Snapshot, SnapshotState};
use sha2::{Digest as _, Sha256};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep};

use super::client::Clients;
use super::failure::Failure;
use super::journal::{Begun, Journal};
use super::parts::base64;
use super::retry::{backoff, ebs_once};
use super::undo::{Made, Undo};
use super::{Job, found, import, rules};
use crate::disk::{BLOCK, BlockMap, Digest};
use crate::error::{Error, Exit};
use crate::event::{Event, Events};
use crate::store::Identity;
use crate::units::{GIB, Size};

/// How many blocks are in flight for each part that S3 would be sent at once.
const BESIDE: usize = 8;
/// Below this, no throttling makes it slower.
const FEWEST: usize = 2;
/// How often a block is sent before the upload fails.
const ATTEMPTS: u32 = 8;
/// How long a snapshot that was begun may be unknown to those who take its blocks.
const SETTLING: Duration = Duration::from_mins(2);
/// Sealed, a snapshot is there within seconds.
const LOOK: Duration = Duration::from_secs(5);

/// The snapshot, and what was sent for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) snapshot: String,
    sent: usize,
    kept: usize,
    parent: Option<String>,
}

pub(super) fn in_words(written: &Written) -> String {
    let Written { snapshot, sent, kept, parent } = written;
    let sent = format!("{snapshot}: {} sent in {sent} blocks", Size(*sent as u64 * BLOCK));
    let kept = if *kept > 0 { format!(", {kept} were there") } else { String::new() };
    let rest = parent.as_ref().map(|parent| format!(", the rest is {parent}'s")).unwrap_or_default();
    sent + &kept + &rest
}

pub(super) fn begins(job: &Job<'_>) -> String {
    format!("{} into a snapshot in {}", Size(job.request.size * GIB), job.target.region)
}

pub(super) async fn plan_in_words(job: &Job<'_>) -> Result<String, Error> {
    let map = block_map(job)?;
    let parent = Box::pin(parent(job, &map)).await?;
    let count = blocks(&map, parent.as_ref().map(|parent| &parent.map), false).len();
    let bytes = Size(count as u64 * BLOCK);
    let rest = match parent {
        Some(parent) => format!("the rest is that of {}", parent.snapshot),
        None => "the rest are holes".to_owned(),
    };
    Ok(format!("write {}: {bytes} in {count} blocks; {rest}", begins(job)))
}

/// Makes the snapshot, or goes on with one that an earlier run of this disk has begun.
pub(super) async fn upload(job: &Job<'_>, undo: &mut Undo) -> Result<Written, Error> {
    let about = |error| Error::io(format!("cannot read the disk {}", job.request.disk.display()), &error);
    let file = File::open(&job.request.disk).map_err(about)?;
    let before = Identity::of(&file).map_err(about)?;
    let map = block_map(job)?;
    let mut journal = match Box::pin(take_up(job, undo)).await? {
        Some(taken_up) => taken_up,
        None => Box::pin(start(job, undo, &map)).await?,
    };
    let begun = journal.begun().clone();
    let parent = begun.parent.as_ref().and_then(|parent| known_map(job, &parent.digest));
    if begun.parent.is_some() && parent.is_none() {
        return Err(Error::new(Exit::Publish, format!("the block map that {} was begun with is gone", begun.snapshot))
            .help("publish again: the snapshot is begun anew"));
    }
    let blocks = blocks(&map, parent.as_ref(), begun.encrypted);
    let kept = blocks.iter().filter(|(index, _)| journal.has(*index)).count();
    let sender = Sender {
        clients: Arc::clone(&job.clients),
        events: job.events.clone(),
        snapshot: begun.snapshot.clone(),
        file,
        begun: Instant::now(),
    };
    let sender = Arc::new(sender);
    send_all(job, &sender, &blocks, &mut journal).await?;
    if Identity::of(&sender.file).map_err(about)? != before {
        let message = format!("the disk {} was changed while it was uploaded", job.request.disk.display());
        return Err(Error::new(Exit::Input, message).help("publish it again when nothing writes to it"));
    }
    if !journal.is_sealed() {
        complete(job, &begun.snapshot, &blocks).await?;
        journal.seal();
    }
    until_completed(job, &begun.snapshot).await?;
    Ok(Written {
        snapshot: begun.snapshot,
        sent: blocks.len() - kept,
        kept,
        parent: begun.parent.map(|parent| parent.snapshot),
    })
}

/// Which blocks are sent, in order, with what they have. Zeros that were written are data, also where the parent has a hole.
fn blocks(map: &BlockMap, parent: Option<&BlockMap>, encrypted: bool) -> Vec<(u64, Digest)> {
    let zeros = Digest::of(&vec![0; usize::try_from(BLOCK).unwrap_or_default()]);
    let is_sent = |(index, own): &(u64, Option<Digest>)| match (own, parent.map(|parent| parent.block(*index))) {
        (None, None) => encrypted,
        (None, Some(theirs)) => theirs.is_some_and(|theirs| theirs != zeros),
        (Some(own), theirs) => theirs.flatten() != Some(*own),
    };
    let all = (0..).zip(map.blocks().iter().copied()).filter(is_sent);
    all.map(|(index, digest)| (index, digest.unwrap_or(zeros))).collect()
}

fn block_map(job: &Job<'_>) -> Result<BlockMap, Error> {
    let path = &job.request.block_map;
    let about = |words: String| {
        Error::new(Exit::Input, format!("cannot read the block map {}: {words}", path.display()))
            .help("build the disk again")
    };
    let file = File::open(path).map_err(|error| about(error.to_string()))?;
    let map = BlockMap::read_from(&mut BufReader::new(file)).map_err(|error| about(error.to_string()))?;
    if map.digest().to_string() == job.request.digest && map.size() == job.request.size * GIB {
        Ok(map)
    } else {
        Err(about("it is another disk's".to_owned()))
    }
}

/// The block map of the disk with this digest, if it was kept.
fn known_map(job: &Job<'_>, digest: &str) -> Option<BlockMap> {
    let file = File::open((job.request.known_map)(digest)?).ok()?;
    // One that is damaged has another digest.
    BlockMap::read_from(&mut BufReader::new(file)).ok().filter(|map| map.digest().to_string() == digest)
}

struct Parent {
    snapshot: String,
    digest: String,
    map: BlockMap,
}

/// The newest snapshot of an earlier disk of this recipe, if it is as large and its block map is at hand.
async fn parent(job: &Job<'_>, map: &BlockMap) -> Result<Option<Parent>, Error> {
    let answer = job.stop.or("earlier snapshots", earlier(job)).await?;
    let mut snapshots = found::may_look(job, "snapshots", answer)?;
    snapshots.retain(|snapshot| snapshot.state() == Some(&SnapshotState::Completed));
    snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.start_time().map(DateTime::secs)));
    for snapshot in snapshots {
        let digest =
            snapshot.tags().iter().find(|tag| tag.key() == Some(rules::DIGEST_TAG)).and_then(|tag| tag.value());
        if let (Some(id), Some(digest)) = (snapshot.snapshot_id(), digest)
            && let Some(known) = known_map(job, digest)
            && known.size() == map.size()
        {
            return Ok(Some(Parent { snapshot: id.to_owned(), digest: digest.to_owned(), map: known }));
        }
    }
    Ok(None)
}

async fn earlier(job: &Job<'_>) -> Result<Vec<Snapshot>, Failure> {
    let same = Filter::builder().name(format!("tag:{}", rules::NAME_TAG)).values(&job.request.name).build();
    let answer = job.clients.ec2.describe_snapshots().owner_ids("self").filters(same).send().await;
    Ok(answer.map_err(job.clients.failed("ec2:DescribeSnapshots"))?.snapshots.unwrap_or_default())
}

/// The snapshot that an earlier run has begun and left, if it still takes blocks.
async fn take_up(job: &Job<'_>, undo: &mut Undo) -> Result<Option<Journal>, Error> {
    let Some(journal) = Journal::open(&job.request.disk, &job.target.region, &job.request.digest) else {
        return Ok(None);
    };
    let id = journal.begun().snapshot.clone();
    let answer = job.stop.or("the snapshot that was begun", snapshot(job, &id)).await?;
    match answer {
        Ok(found) if found.state() == Some(&SnapshotState::Pending) => {
            job.events.note(format!("going on with {id}, which an earlier publish has begun"));
            undo.will_make(Made::Snapshot { id: Some(id) });
            Ok(Some(journal))
        }
        Err(failure) if !failure.is_not_found() => Err(job.error(failure)),
        found => {
            // AWS gives one up that gets no blocks for an hour, and keeps it.
            if found.is_ok_and(|found| found.state() == Some(&SnapshotState::Error)) {
                undo.will_make(Made::Snapshot { id: Some(id) });
                undo.snapshots(job).await;
            }
            journal.remove();
            Ok(None)
        }
    }
}

async fn start(job: &Job<'_>, undo: &mut Undo, map: &BlockMap) -> Result<Journal, Error> {
    let parent = Box::pin(parent(job, map)).await?;
    let id = parent.as_ref().map(|parent| parent.snapshot.as_str());
    let made = Made::Snapshot { id: None };
    let (entry, answer) = job.make("the start of the snapshot", undo, made, |_| send_start(job, id)).await?;
    let (snapshot, encrypted) = answer.map_err(|failure| job.error(failure))?;
    undo.made(entry, Made::Snapshot { id: Some(snapshot.clone()) });
    job.events.detail(format!("snapshot {snapshot}"));
    let parent = parent.map(|Parent { snapshot, digest, .. }| super::journal::Parent { snapshot, digest });
    let begun = Begun { snapshot, digest: job.request.digest.clone(), parent, encrypted };
    Ok(Journal::begin(&job.request.disk, &job.target.region, begun))
}

/// The snapshot's id, and whether it is encrypted.
async fn send_start(job: &Job<'_>, parent: Option<&str>) -> Result<(String, bool), Failure> {
    let mut tags = rules::tag_pairs(job.request);
    tags.push((import::RUN_TAG.to_owned(), job.target.run.clone()));
    let tags = tags.into_iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect();
    let call = job
        .clients
        .ebs
        .start_snapshot()
        .volume_size(i64::try_from(job.request.size).unwrap_or(i64::MAX))
        .description(format!("{} {}", job.request.image_name, job.request.digest))
        .set_parent_snapshot_id(parent.map(str::to_owned))
        .set_tags(Some(tags))
        // The same for every try, so that AWS begins one snapshot however often it is asked.
        .client_token(format!("kiln-{}", job.target.run))
        .customize()
        .config_override(ebs_once());
    let answer = call.send().await.map_err(job.clients.failed("ebs:StartSnapshot"))?;
    let encrypted = answer.kms_key_arn().is_some();
    let id =
        answer.snapshot_id.ok_or_else(|| Failure::found("ebs:StartSnapshot", "the answer has no id".to_owned()))?;
    Ok((id, encrypted))
}

/// Why a block wasn't sent.
enum Lost {
    Disk(std::io::Error),
    Refused(Failure),
    Bug(JoinError),
}

async fn send_all(
    job: &Job<'_>,
    sender: &Arc<Sender>,
    blocks: &[(u64, Digest)],
    journal: &mut Journal,
) -> Result<(), Error> {
    let mut waiting = blocks.iter().copied().filter(|(index, _)| !journal.has(*index)).collect::<Vec<_>>().into_iter();
    let total = waiting.len() as u64 * BLOCK;
    let (mut done, most) = (0, job.request.parallel.max(1) * BESIDE);
    let mut limit = most;
    let mut running: JoinSet<Result<(u64, u32), Lost>> = JoinSet::new();
    loop {
        job.events.emit(Event::Progress { phase: "upload", done, total });
        while running.len() < limit
            && let Some((index, digest)) = waiting.next()
        {
            running.spawn(Arc::clone(sender).send(index, digest));
        }
        // What still runs is ended with the set, when this returns.
        let Some(ended) = job.stop.or("the upload", running.join_next()).await? else { return Ok(()) };
        match ended.unwrap_or_else(|error| Err(Lost::Bug(error))) {
            Ok((index, throttled)) => {
                journal.note(index);
                done += BLOCK;
                limit = if throttled > 0 { (limit * 3 / 4).max(FEWEST) } else { (limit + 1).min(most) };
            }
            Err(Lost::Disk(error)) => {
                return Err(Error::io(format!("cannot read the disk {}", job.request.disk.display()), &error));
            }
            Err(Lost::Refused(failure)) => return Err(job.error(failure)),
            Err(Lost::Bug(error)) => return Err(Error::new(Exit::Bug, format!("an upload thread ended: {error}"))),
        }
    }
}

/// Sends blocks; shared by all that are in flight.
struct Sender {
    clients: Arc<Clients>,
    events: Events,
    snapshot: String,
    file: File,
    begun: Instant,
}

impl Sender {
    /// The block's index, and how often AWS asked for patience.
    async fn send(self: Arc<Self>, index: u64, digest: Digest) -> Result<(u64, u32), Lost> {
        let reader = Arc::clone(&self);
        let read = tokio::task::spawn_blocking(move || {
            let mut block = vec![0; usize::try_from(BLOCK).unwrap_or_default()];
            reader.file.read_exact_at(&mut block, index * BLOCK).map(|()| block)
        });
        // Shared by all attempts, not copied for each.
        let block = aws_smithy_types::body::SdkBody::from(read.await.map_err(Lost::Bug)?.map_err(Lost::Disk)?);
        let (mut attempt, mut throttled) = (1, 0);
        loop {
            let body = block.try_clone().map(ByteStream::new).unwrap_or_default();
            let Err(failure) = self.put(index, digest, body).await else { return Ok((index, throttled)) };
            let early = failure.is_not_found() && self.begun.elapsed() < SETTLING;
            // "Error retries for EBS direct APIs": this one of all that are called so is worth another try.
            let damaged =
                failure.code == "ValidationException" && failure.message.contains("Failed to read block data");
            if attempt == ATTEMPTS || !(failure.is_passing() || early || damaged) {
                return Err(Lost::Refused(failure));
            }
            throttled += u32::from(failure.is_throttling());
            let why = failure.reason();
            self.events.detail(format!("block {index} goes again ({attempt} of {ATTEMPTS} failed): {why}"));
            sleep(backoff(attempt)).await;
            attempt += 1;
        }
    }

    async fn put(&self, index: u64, digest: Digest, body: ByteStream) -> Result<(), Failure> {
        let call = self
            .clients
            .ebs
            .put_snapshot_block()
            .snapshot_id(&self.snapshot)
            .block_index(i32::try_from(index).unwrap_or(i32::MAX))
            .data_length(i32::try_from(BLOCK).unwrap_or(i32::MAX))
            .checksum(base64(&digest.0))
            .checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256)
            .block_data(body)
            .customize()
            .config_override(ebs_once());
        call.send().await.map(|_| ()).map_err(self.clients.failed("ebs:PutSnapshotBlock"))
    }
}

/// Seals the snapshot: AWS compares the number of blocks, and the digest over their digests.
async fn complete(job: &Job<'_>, id: &str, blocks: &[(u64, Digest)]) -> Result<(), Error> {
    let what = "the snapshot's completion";
    let all = blocks.iter().fold(Sha256::new(), |all, (_, digest)| all.chain_update(digest.0));
    let (count, checksum) = (i32::try_from(blocks.len()).unwrap_or(i32::MAX), base64(&all.finalize().into()));
    let (mut attempt, mut doubtful) = (1, false);
    loop {
        let Err(failure) = job.stop.or(what, send_complete(job, id, count, &checksum)).await? else { return Ok(()) };
        doubtful |= failure.may_be_done();
        if !failure.is_passing() || attempt == job.clients.attempts() {
            // Sealed by an earlier try whose answer was lost, it can't be sealed again.
            let sealed = doubtful && is_soon_completed(job, id).await?;
            return if sealed { Ok(()) } else { Err(job.error(failure)) };
        }
        job.events.detail(format!("asking again for {what}: {}", failure.reason()));
        job.stop.pause(what, backoff(attempt)).await?;
        attempt += 1;
    }
}

async fn send_complete(job: &Job<'_>, id: &str, count: i32, checksum: &str) -> Result<(), Failure> {
    let call = job
        .clients
        .ebs
        .complete_snapshot()
        .snapshot_id(id)
        .changed_blocks_count(count)
        .checksum(checksum)
        .checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256)
        .checksum_aggregation_method(ChecksumAggregationMethod::ChecksumAggregationLinear)
        .customize()
        .config_override(ebs_once());
    call.send().await.map(|_| ()).map_err(job.clients.failed("ebs:CompleteSnapshot"))
}

async fn is_soon_completed(job: &Job<'_>, id: &str) -> Result<bool, Error> {
    let until = Instant::now() + import::settling(job.request.poll);
    loop {
        let answer = job.stop.or("the snapshot", snapshot(job, id)).await?;
        if answer.is_ok_and(|snapshot| snapshot.state() == Some(&SnapshotState::Completed)) {
            return Ok(true);
        }
        if Instant::now() > until {
            return Ok(false);
        }
        job.stop.pause("the snapshot", job.request.poll.min(LOOK)).await?;
    }
}

async fn until_completed(job: &Job<'_>, id: &str) -> Result<(), Error> {
    let what = format!("snapshot {id} to be completed");
    loop {
        let found = import::retry_not_found(job, &what, || snapshot(job, id)).await?;
        match found.state() {
            Some(SnapshotState::Completed) => return Ok(()),
            Some(SnapshotState::Error) => {
                let why = found.state_message().unwrap_or("AWS gives no reason");
                return Err(Error::new(Exit::Publish, format!("AWS could not make snapshot {id}: {why}"))
                    .help("publish again; the disk is unchanged"));
            }
            _ => job.stop.pause(&what, job.request.poll.min(LOOK)).await?,
        }
    }
}

async fn snapshot(job: &Job<'_>, id: &str) -> Result<Snapshot, Failure> {
    let answer = job.clients.ec2.describe_snapshots().snapshot_ids(id).send().await;
    let answer = answer.map_err(job.clients.failed("ec2:DescribeSnapshots"))?;
    answer.snapshots.unwrap_or_default().into_iter().next().ok_or_else(|| Failure::absent("ec2:DescribeSnapshots"))
}

/// The snapshot of this run, if there is one.
pub(super) async fn find(job: &Job<'_>) -> Result<Option<String>, Failure> {
    let own = Filter::builder().name(format!("tag:{}", import::RUN_TAG)).values(&job.target.run).build();
    let answer = job.clients.ec2.describe_snapshots().owner_ids("self").filters(own).send().await;
    let answer = answer.map_err(job.clients.failed("ec2:DescribeSnapshots"))?;
    Ok(answer.snapshots().first().and_then(Snapshot::snapshot_id).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_sent_and_written_zeros_are_data() {
        let block = |byte: u8| Some(Digest::of(&vec![byte; usize::try_from(BLOCK).unwrap()]));
        let map = |blocks: &[Option<Digest>]| {
            let data = (0..).zip(blocks).filter_map(|(index, digest)| Some((index, (*digest)?)));
            BlockMap::from_data(blocks.len() as u64 * BLOCK, data)
        };
        let new = map(&[None, block(0), block(1), block(2), None, None, block(0), block(3)]);
        let old = map(&[None, None, block(1), block(1), block(4), block(0), block(0), None]);
        let sent = |parent, encrypted| -> Vec<_> {
            blocks(&new, parent, encrypted).into_iter().map(|(index, digest)| (index, Some(digest))).collect()
        };
        let data = [(1, block(0)), (2, block(1)), (3, block(2)), (6, block(0)), (7, block(3))];
        assert_eq!(sent(None, false), data);
        assert_eq!(sent(None, true).len(), 8);
        assert_eq!(sent(Some(&old), false), [(1, block(0)), (3, block(2)), (4, block(0)), (7, block(3))]);
    }
}
