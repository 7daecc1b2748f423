//! What a publish by EBS direct would do.

use super::super::Job;
use super::super::action::Action::{
    CompleteSnapshot, DeleteSnapshot, DescribeSnapshots, PutSnapshotBlock, StartSnapshot,
};
use super::super::plan::{Count, Requests, Way};
use super::super::{parent, rules};
use super::{Left, begins, block_map, blocks, encrypts, left_behind};
use crate::disk::BLOCK;
use crate::error::Error;
use crate::units::Size;

/// What [`upload`](super::upload) would do. Returned is what it would have asked for when AWS refuses to begin; none if it
/// wouldn't take another way then.
pub(in super::super) async fn plan(job: &Job<'_>, way: &mut Way) -> Result<Option<Requests>, Error> {
    let map = block_map(job)?;
    let deleted = match Box::pin(left_behind(job, &map)).await? {
        Left::Nothing => None,
        Left::Useless(_, snapshot) => snapshot,
        Left::Useful { journal, begun, blocks, sealed } => {
            let count = blocks.iter().filter(|(index, _)| !sealed && !journal.has(*index)).count() as u64;
            let (bytes, snapshot) = (Size(count * BLOCK), begun.snapshot);
            let words = format!("go on with {snapshot}, which an earlier publish has begun: {bytes} in {count} blocks");
            let requests = way.steps.step(words);
            requests.extend(&job.clients.asked()).exactly(PutSnapshotBlock, count);
            requests.exactly(CompleteSnapshot, (!sealed).into()).at_least(DescribeSnapshots, 1);
            way.cost.bytes_sent += Count::exactly(bytes.bytes());
            way.cost.snapshot_bytes += Count::exactly(blocks.len() as u64 * BLOCK);
            return Ok(None);
        }
    };
    let encrypts = Box::pin(encrypts(job)).await?;
    let parent = Box::pin(parent::choose(job, encrypts)).await?;
    let holes = encrypts && job.request.omit_holes.is_none();
    let count = blocks(&map, parent.as_ref().map(|parent| &parent.map), holes).len() as u64;
    let bytes = Size(count * BLOCK);
    let asked = parent.as_ref().is_some_and(|parent| parent.asked);
    let rest = match parent {
        Some(parent) => format!("the rest is that of {}", parent.snapshot),
        None if holes => "it is encrypted, so that holes are sent too".to_owned(),
        None => "the rest are holes".to_owned(),
    };
    let encryption = rules::encryption_in_words(job.request, &job.target.region);
    let mut begin = job.clients.asked();
    begin.exactly(DeleteSnapshot, deleted.is_some().into()).exactly(StartSnapshot, 1);
    let requests = way.steps.step(format!("write {}{encryption}: {bytes} in {count} blocks; {rest}", begins(job)));
    requests.extend(&begin).exactly(PutSnapshotBlock, count).exactly(CompleteSnapshot, 1);
    requests.at_least(DescribeSnapshots, 1);
    way.cost.bytes_sent += Count::exactly(bytes.bytes());
    way.cost.snapshot_bytes += Count::exactly(bytes.bytes());
    // Whoever names a parent wants no image that isn't built on it.
    Ok((!asked).then_some(begin))
}

/// How many bytes of data the disk has: so much a snapshot has at least that isn't made by EBS direct.
pub(in super::super) fn data(job: &Job<'_>) -> Count {
    Count::at_least(block_map(job).map_or(0, |map| map.data_bytes()))
}
