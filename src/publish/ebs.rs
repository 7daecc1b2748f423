//! The disk straight into a snapshot, by the EBS direct APIs: no bucket, no role, no import to wait for.
//!
//! A snapshot is begun (`StartSnapshot`), given its blocks of 512 KiB (`PutSnapshotBlock`), and sealed
//! (`CompleteSnapshot`). The disk's block map has each block's SHA-256, which AWS wants and checks, so that the disk is
//! read once and not hashed. Holes are not sent, unless the snapshot is encrypted: there what was not written doesn't read
//! as zeros, which is only left so if that is asked for. On a snapshot of an earlier disk, whose block map is at hand, only
//! what differs is sent (`parent`).
//!
//! Source: "EBS direct APIs" in the Amazon EBS User Guide and API Reference.

mod plan;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_ebs::primitives::ByteStream;
use aws_sdk_ebs::types::{ChecksumAggregationMethod, ChecksumAlgorithm, Tag};
use aws_sdk_ec2::types::{Snapshot, SnapshotState};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::client::Clients;
use super::failure::{Failure, Kind};
use super::journal::{self, Begun, Journal};
use super::parts::base64;
use super::retry::{backoff, ebs_once};
use super::undo::{Made, Undo};
use super::upload::{self, Lost};
use super::{Job, found, import, parent, rules};
use crate::disk::{BLOCK, BlockMap, Digest};
use crate::error::{Error, Exit};
use crate::event::{Event, Events};
use crate::units::{GIB, Size, hex};
pub(super) use plan::{data, plan};

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

/// Makes the snapshot, or goes on with one that an earlier run of this disk has begun. What was begun stays in `journal`.
/// The inner failure is a missing permission to begin, or that nobody is there to ask: nothing was made.
pub(super) async fn upload(
    job: &Job<'_>,
    undo: &mut Undo,
    journal: &mut Option<Journal>,
) -> Result<Result<Written, Failure>, Error> {
    let (file, before) = upload::open_disk(job)?;
    let map = block_map(job)?;
    let (journal, begun, blocks) = if let Some((left, begun, blocks)) = Box::pin(take_up(job, undo, &map)).await? {
        (journal.insert(left), begun, blocks)
    } else {
        let journal = journal.insert(Journal::ask(&job.request.disk, &job.target.region, &job.target.run));
        let (begun, blocks) = match Box::pin(start(job, undo, &map)).await? {
            Ok(started) => started,
            Err(refused) => return Ok(Err(refused)),
        };
        journal.begin(&begun);
        (journal, begun, blocks)
    };
    let kept = blocks.iter().filter(|(index, _)| journal.is_sealed() || journal.has(*index)).count();
    let snapshot = begun.snapshot;
    let sender = Sender {
        clients: Arc::clone(&job.clients),
        events: job.events.clone(),
        snapshot: snapshot.clone(),
        file,
        begun: Instant::now(),
    };
    let sender = Arc::new(sender);
    if !journal.is_sealed() {
        send_all(job, &sender, &blocks, journal).await?;
        upload::unchanged(job, &sender.file, &before)?;
        complete(job, &snapshot, &blocks, kept == blocks.len()).await?;
        journal.seal();
    }
    until_completed(job, &snapshot).await?;
    Ok(Ok(Written { snapshot, sent: blocks.len() - kept, kept, parent: begun.parent }))
}

/// Which blocks are sent, in order, with what they have. Zeros that were written are data, also where the parent has a hole;
/// a hole where the parent has data is sent, whatever `holes` says of the others: nothing of an earlier disk may be read.
fn blocks(map: &BlockMap, parent: Option<&BlockMap>, holes: bool) -> Blocks {
    let zeros = Digest::of_zeros();
    let is_sent = |(index, own): &(u64, Option<Digest>)| match (own, parent.map(|parent| parent.block(*index))) {
        (None, None) => holes,
        (None, Some(theirs)) => theirs.is_some_and(|theirs| theirs != zeros),
        (Some(own), theirs) => theirs.flatten() != Some(*own),
    };
    let all = (0..).zip(map.blocks().iter().copied()).filter(is_sent);
    all.map(|(index, digest)| (index, digest.unwrap_or(zeros))).collect()
}

/// The disk's block map.
pub(super) fn block_map(job: &Job<'_>) -> Result<BlockMap, Error> {
    let path = &job.request.block_map;
    let about = |words: String| {
        Error::new(Exit::Input, format!("cannot read the block map {}: {words}", path.display()))
            .help("build the disk again")
    };
    let map = BlockMap::open(path).map_err(|error| about(error.to_string()))?;
    if map.digest().to_string() == job.request.digest && map.size() == job.request.size * GIB {
        Ok(map)
    } else {
        Err(about("it is another disk's".to_owned()))
    }
}

/// Whether new snapshots are encrypted, because that is asked for or because this account does so; who may not look is told
/// by the snapshot itself.
pub(super) async fn encrypts(job: &Job<'_>) -> Result<bool, Error> {
    if job.request.encryption.is_some() {
        return Ok(true);
    }
    let call = job.clients.ec2.get_ebs_encryption_by_default();
    let answer = job.stop.or("whether snapshots are encrypted", call.send()).await?;
    Ok(answer.is_ok_and(|answer| answer.ebs_encryption_by_default() == Some(true)))
}

type Blocks = Vec<(u64, Digest)>;

/// What an earlier run has begun and left.
enum Left {
    Nothing,
    /// It can be gone on with; `sealed` says that it takes no more blocks.
    Useful {
        journal: Journal,
        begun: Begun,
        blocks: Blocks,
        sealed: bool,
    },
    /// It can't, and this snapshot is to be deleted.
    Useless(Journal, Option<String>),
}

/// The snapshot that an earlier run has begun and left, and its blocks, if it can be gone on with. If not it is deleted.
async fn take_up(job: &Job<'_>, undo: &mut Undo, map: &BlockMap) -> Result<Option<(Journal, Begun, Blocks)>, Error> {
    match Box::pin(left_behind(job, map)).await? {
        Left::Nothing => Ok(None),
        Left::Useful { mut journal, begun, blocks, sealed } => {
            job.events.note(format!("going on with {}, which an earlier publish has begun", begun.snapshot));
            undo.will_make(Made::Snapshot { id: Some(begun.snapshot.clone()) });
            if sealed && !journal.is_sealed() {
                journal.seal();
            }
            Ok(Some((journal, begun, blocks)))
        }
        Left::Useless(journal, snapshot) => {
            if let Some(snapshot) = snapshot {
                delete(job, undo, &snapshot).await;
            }
            journal.remove();
            Ok(None)
        }
    }
}

/// Looks for that.
async fn left_behind(job: &Job<'_>, map: &BlockMap) -> Result<Left, Error> {
    let (journal, begun) = match Journal::find(&job.request.disk, &job.target.region) {
        journal::Found::Nothing => return Ok(Left::Nothing),
        journal::Found::Left(journal, begun) => (journal, begun),
        journal::Found::Asked(journal, run) => {
            // It has no block yet.
            let snapshot = asked_for(job, &journal, &run).await?;
            return Ok(Left::Useless(journal, snapshot));
        }
        journal::Found::Busy => {
            let message = format!("another kiln publishes this disk to {}", job.target.region);
            return Err(Error::new(Exit::Publish, message).help("wait until it has ended, then publish again"));
        }
    };
    let state = state_of_begun(job, &journal, &begun).await?;
    if matches!(state, Some(SnapshotState::Pending | SnapshotState::Completed))
        && let Some(blocks) = blocks_of_begun(job, map, &begun)
    {
        let sealed = journal.is_sealed() || state == Some(SnapshotState::Completed);
        return Ok(Left::Useful { journal, begun, blocks, sealed });
    }
    // One that is complete is whole, though of another disk perhaps. AWS gives the others up only after an hour, and keeps
    // them.
    let deleted = !matches!(state, None | Some(SnapshotState::Completed));
    Ok(Left::Useless(journal, deleted.then_some(begun.snapshot)))
}

/// The blocks of a snapshot that was begun, if it is one that would be begun now.
fn blocks_of_begun(job: &Job<'_>, map: &BlockMap, begun: &Begun) -> Option<Blocks> {
    let request = job.request;
    let alike = begun.digest == request.digest
        && begun.encryption == asked_encryption(job)
        && begun.omit_holes == request.omit_holes.is_some()
        && request.parents.allow(&job.target.region, begun.parent.as_deref());
    if !alike {
        return None;
    }
    let on = |parent: Option<&BlockMap>| {
        let blocks = blocks(map, parent, begun.encrypted && !begun.omit_holes);
        (begun.blocks == digest_of(&blocks)).then_some(blocks)
    };
    match &begun.parent {
        None => on(None),
        Some(parent) => parent::maps(job, parent).find_map(|map| on(Some(&map))),
    }
}

async fn delete(job: &Job<'_>, undo: &mut Undo, snapshot: &str) {
    job.events.note(format!("deleting {snapshot}, which an earlier publish has begun"));
    undo.will_make(Made::Snapshot { id: Some(snapshot.to_owned()) });
    for left in undo.snapshots(job).await {
        job.events.warn(format!("could not delete {left}"));
    }
}

/// Until when what the journal tells of may not be known everywhere yet.
fn settled(job: &Job<'_>, journal: &Journal) -> Instant {
    let young = journal.age() < SETTLING;
    Instant::now() + if young { import::settling(job.request.poll) } else { Duration::ZERO }
}

/// The snapshot that the run of this journal has asked for, if there is one.
async fn asked_for(job: &Job<'_>, journal: &Journal, run: &str) -> Result<Option<String>, Error> {
    let what = "the snapshot that was asked for";
    let until = settled(job, journal);
    loop {
        let answer = job.stop.or(what, found::snapshots(job, import::RUN_TAG, run)).await?;
        let found = found::may_look(job, "snapshots", answer)?;
        if let Some(id) = found.first().and_then(Snapshot::snapshot_id) {
            return Ok(Some(id.to_owned()));
        }
        if Instant::now() >= until {
            return Ok(None);
        }
        job.stop.pause(what, job.request.poll.min(LOOK)).await?;
    }
}

/// None if there is no such snapshot. One that was begun only just now may not be known everywhere yet.
async fn state_of_begun(job: &Job<'_>, journal: &Journal, begun: &Begun) -> Result<Option<SnapshotState>, Error> {
    let until = settled(job, journal);
    loop {
        match job.stop.or("the snapshot that was begun", found::snapshot(job, &begun.snapshot)).await? {
            Ok(found) => return Ok(found.state().cloned()),
            Err(failure) if !failure.is_not_found() => return Err(job.error(failure)),
            Err(_) if Instant::now() >= until => return Ok(None),
            Err(_) => job.stop.pause("the snapshot that was begun", job.request.poll.min(LOOK)).await?,
        }
    }
}

async fn start(job: &Job<'_>, undo: &mut Undo, map: &BlockMap) -> Result<Result<(Begun, Blocks), Failure>, Error> {
    let encrypts = Box::pin(encrypts(job)).await?;
    let mut parent = Box::pin(parent::choose(job, encrypts)).await?;
    let (snapshot, encrypted) = loop {
        let id = parent.as_ref().map(|parent| parent.snapshot.as_str());
        let made = Made::Snapshot { id: None };
        let (entry, answer) = job.make("the start of the snapshot", undo, made, |_| send_start(job, id)).await?;
        match (answer, &parent) {
            (Ok((snapshot, encrypted)), _) => {
                undo.made(entry, Made::Snapshot { id: Some(snapshot.clone()) });
                break (snapshot, encrypted);
            }
            (Err(failure), Some(refused)) if refused.asked => return Err(refused.refused(job, failure)),
            // Its key may be gone, or it may be itself since it was looked at.
            (Err(failure), Some(refused)) if parent::is_refused(&failure) => {
                let why = failure.reason();
                job.events.detail(format!("all is sent, because {} can't be built on: {why}", refused.snapshot));
                parent = None;
            }
            (Err(failure), _) if failure.is_denied() || failure.kind == Kind::Unreachable && !failure.may_be_done() => {
                return Ok(Err(failure));
            }
            (Err(failure), _) => return Err(start_failed(job, failure)),
        }
    };
    job.events.detail(format!("snapshot {snapshot}"));
    let omit_holes = job.request.omit_holes.is_some();
    let blocks = blocks(map, parent.as_ref().map(|parent| &parent.map), encrypted && !omit_holes);
    let begun = Begun {
        snapshot,
        digest: job.request.digest.clone(),
        parent: parent.map(|parent| parent.snapshot),
        encrypted,
        omit_holes,
        encryption: asked_encryption(job),
        blocks: digest_of(&blocks),
    };
    Ok(Ok((begun, blocks)))
}

fn asked_encryption(job: &Job<'_>) -> Option<String> {
    rules::encryption(job.request, &job.target.region)
}

/// AWS looks at the key at once, and may call one that it can't use by another name.
pub(super) fn start_failed(job: &Job<'_>, failure: Failure) -> Error {
    let Some(key) = rules::kms_key(job.request, &job.target.region) else { return job.error(failure) };
    if failure.is_passing() {
        return job.error(failure);
    }
    job.error(failure).with_note(format!("the snapshot was to be encrypted with {key}")).help(format!(
        "the key must be a symmetric, enabled key in {}, and its policy must let you use it: kms:CreateGrant, kms:Decrypt, \
         kms:DescribeKey, kms:GenerateDataKey*, kms:ReEncrypt*; allow `ebs:StartSnapshot` and `ec2:CreateTags` as well",
        job.target.region
    ))
}

/// A digest of what is sent, and where to.
fn digest_of(blocks: &[(u64, Digest)]) -> String {
    let all = blocks
        .iter()
        .fold(Sha256::new(), |all, (index, digest)| all.chain_update(index.to_le_bytes()).chain_update(digest.0));
    hex(&all.finalize())
}

/// The snapshot's id, and whether it is encrypted.
async fn send_start(job: &Job<'_>, parent: Option<&str>) -> Result<(String, bool), Failure> {
    let mut tags = rules::snapshot_tag_pairs(job.request, &job.target.region);
    tags.push((import::RUN_TAG.to_owned(), job.target.run.clone()));
    let tags = tags.into_iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect();
    // A parent's key is the snapshot's: AWS takes no word about encryption next to it.
    let asked = job.request.encryption.as_ref().filter(|_| parent.is_none());
    let call = job
        .clients
        .ebs
        .start_snapshot()
        .set_encrypted(asked.map(|_| true))
        .set_kms_key_arn(asked.and_then(|asked| asked.key(&job.target.region)).map(str::to_owned))
        .volume_size(i64::try_from(job.request.size).unwrap_or(i64::MAX))
        .description(format!("{} {}", job.request.image_name, job.request.digest))
        .set_parent_snapshot_id(parent.map(str::to_owned))
        .set_tags(Some(tags))
        // The same for every try, so that AWS begins one snapshot however often it is asked; another without the parent.
        .client_token(format!("kiln-{}{}", job.target.run, if parent.is_some() { "-on" } else { "" }))
        .customize()
        .config_override(ebs_once());
    let answer = call.send().await.map_err(job.clients.failed("ebs:StartSnapshot"))?;
    let encrypted = answer.kms_key_arn().is_some() || job.request.encryption.is_some();
    let id =
        answer.snapshot_id.ok_or_else(|| Failure::found("ebs:StartSnapshot", "the answer has no id".to_owned()))?;
    Ok((id, encrypted))
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
            Err(lost) => return Err(lost.into_error(job)),
        }
    }
}

/// Sends blocks; shared by all that are in flight.
struct Sender {
    clients: Arc<Clients>,
    events: Events,
    snapshot: String,
    file: Arc<File>,
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
            // "Error retries for EBS direct APIs": this one of all that are called so is worth another try.
            let damaged =
                failure.code == "ValidationException" && failure.message.contains("Failed to read block data");
            let early = failure.is_not_found() && self.begun.elapsed() < SETTLING;
            if !early && (attempt == ATTEMPTS || !(failure.is_passing() || damaged)) {
                return Err(Lost::Refused(failure));
            }
            throttled += u32::from(failure.is_throttling());
            let why = failure.reason();
            self.events.detail(format!("block {index} goes again ({attempt} of {ATTEMPTS} failed): {why}"));
            sleep(backoff(attempt)).await;
            attempt += u32::from(!early);
        }
    }

    async fn put(&self, index: u64, digest: Digest, body: ByteStream) -> Result<(), Failure> {
        let checksum = base64(&digest.0);
        let call = self
            .clients
            .ebs
            .put_snapshot_block()
            .snapshot_id(&self.snapshot)
            .block_index(i32::try_from(index).unwrap_or(i32::MAX))
            .data_length(i32::try_from(BLOCK).unwrap_or(i32::MAX))
            .checksum(&checksum)
            .checksum_algorithm(ChecksumAlgorithm::ChecksumAlgorithmSha256)
            .block_data(body)
            .customize()
            .config_override(ebs_once());
        let answer = call.send().await.map_err(self.clients.failed("ebs:PutSnapshotBlock"))?;
        // A page to sign in at says that all is well, too.
        if answer.checksum() == Some(&checksum) {
            return Ok(());
        }
        Err(Failure::found("ebs:PutSnapshotBlock", "the answer doesn't tell the block's checksum".to_owned()))
    }
}

/// Seals the snapshot: AWS compares the number of blocks, and the digest over their digests.
///
/// `doubtful` says that an earlier run may have done so.
async fn complete(job: &Job<'_>, id: &str, blocks: &[(u64, Digest)], mut doubtful: bool) -> Result<(), Error> {
    let what = "the snapshot's completion";
    let all = blocks.iter().fold(Sha256::new(), |all, (_, digest)| all.chain_update(digest.0));
    let (count, checksum) = (i32::try_from(blocks.len()).unwrap_or(i32::MAX), base64(&all.finalize().into()));
    let mut attempt = 1;
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
        let answer = job.stop.or("the snapshot", found::snapshot(job, id)).await?;
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
        let found = import::retry_not_found(job, &what, || found::snapshot(job, id)).await?;
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

/// The snapshot of this run, if there is one.
pub(super) async fn find(job: &Job<'_>) -> Result<Option<String>, Failure> {
    let own = found::snapshots(job, import::RUN_TAG, &job.target.run).await?;
    Ok(own.first().and_then(Snapshot::snapshot_id).map(str::to_owned))
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
        let sent = |parent, holes| -> Vec<_> {
            blocks(&new, parent, holes).into_iter().map(|(index, digest)| (index, Some(digest))).collect()
        };
        let data = [(1, block(0)), (2, block(1)), (3, block(2)), (6, block(0)), (7, block(3))];
        assert_eq!(sent(None, false), data);
        assert_eq!(sent(None, true).len(), 8);
        assert_eq!(sent(Some(&old), false), [(1, block(0)), (3, block(2)), (4, block(0)), (7, block(3))]);
    }
}
