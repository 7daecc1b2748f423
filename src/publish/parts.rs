//! How a disk is cut for the upload, and what each part's digest is.
//!
//! S3 takes parts of 5 MiB and more, 10,000 of them at most, of whatever lengths. They are cut where the disk's zeros begin
//! and end, so that little is sent but data; zeros have parts of their own, which are copied inside S3 (`zeros`). Only
//! zeros too short for a part, and those that fill up a part with less than 5 MiB of data, are sent. The cut follows from
//! what the disk reads as, and from nothing else: every host that publishes this disk makes the same parts.
//!
//! Source: "Amazon S3 multipart upload limits" in the Amazon S3 User Guide.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use sha2::{Digest as _, Sha256};

use crate::disk::{self, BLOCK, BlockMap};
use crate::units::MIB;

/// S3 takes no more.
const MOST: u64 = 10_000;
/// S3 takes no shorter part but as the last one, in blocks.
const SHORTEST: u64 = 5 * MIB / BLOCK;
/// Below this, in blocks, a request costs more than the bytes it carries: data that is longer is cut into parts of at least this
/// length, and less than twice it.
const USUAL: u64 = 8 * MIB / BLOCK;
/// About how many copies take as long as to send a block: one in 50 ms and 16 at once, on a line of 100 Mbit/s.
const COPIES_A_BLOCK: u64 = 12;
const BUFFER: usize = 256 << 10;

/// A SHA-256.
pub(super) type Digest = [u8; 32];

/// A piece of the disk, sent by one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// From 1, as S3 counts.
    pub(super) number: i32,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// It reads as zeros, whether they were written or not.
    pub(super) zeros: bool,
}

/// The parts of a disk.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) all: Vec<Part>,
    /// How long the longest part of zeros is; 0 if there is none.
    longest: u64,
    /// The digests of zeros, by their length.
    digests: OnceLock<BTreeMap<u64, Digest>>,
}

impl Parts {
    /// Cuts the disk of this block map.
    pub(super) fn of(map: &BlockMap) -> Self {
        let zeros = disk::Digest::of_zeros();
        let blocks = map.blocks().iter().map(|block| block.is_none_or(|digest| digest == zeros));
        let mut end = 0;
        let part = |(number, Run { blocks, zeros }): (i32, Run)| {
            let offset = end;
            end = map.size().min(offset + blocks * BLOCK);
            Part { number, offset, length: end - offset, zeros }
        };
        let all: Vec<Part> = (1..).zip(cut(&Run::all(blocks))).map(part).collect();
        let longest = all.iter().filter(|part| part.zeros).map(|part| part.length).max().unwrap_or(0);
        Self { all, longest, digests: OnceLock::new() }
    }

    /// The bytes in parts that are not zeros.
    pub(super) fn data(&self) -> u64 {
        self.all.iter().filter(|part| !part.zeros).map(|part| part.length).sum()
    }

    /// The parts that are zeros.
    pub(super) fn zeros(&self) -> impl Iterator<Item = Part> {
        self.all.iter().copied().filter(|part| part.zeros)
    }

    /// The longest part of zeros: all others are its beginning.
    pub(super) fn longest_zeros(&self) -> Option<Part> {
        self.zeros().find(|part| part.length == self.longest)
    }

    /// Whether `part` can be copied from the longest zeros. Less than all of an object can be copied only if it has more than
    /// 5 MB (S3 API reference, `UploadPartCopy`): of the shortest that there are, only what is as long.
    pub(super) fn is_copyable(&self, part: Part) -> bool {
        part.zeros && (part.length == self.longest || self.longest > SHORTEST * BLOCK)
    }

    /// The digest of `part`. Zeros are not read.
    pub(super) fn digest(&self, file: &File, part: Part) -> io::Result<Digest> {
        self.digest_of_zeros(part).map_or_else(|| hash(file, part.offset, part.length), Ok)
    }

    /// The digest of `part` if it is zeros.
    pub(super) fn digest_of_zeros(&self, part: Part) -> Option<Digest> {
        let of_all = || of_zeros(&self.zeros().map(|part| part.length).collect());
        part.zeros.then(|| self.digests.get_or_init(of_all).get(&part.length).copied()).flatten()
    }
}

/// What S3 calls the SHA-256 of a whole object: the digest of its parts' digests, and their number.
pub(super) fn composite(digests: &[Digest]) -> String {
    let all = digests.iter().fold(Sha256::new(), Sha256::chain_update);
    format!("{}-{}", base64(&all.finalize().into()), digests.len())
}

/// As S3 writes digests.
pub(super) fn base64(digest: &Digest) -> String {
    aws_smithy_types::base64::encode(digest)
}

/// Blocks beside each other that are zeros, or are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    blocks: u64,
    zeros: bool,
}

impl Run {
    /// All runs of a disk, in order; `blocks` tells of each whether it is zeros.
    fn all(blocks: impl Iterator<Item = bool>) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for zeros in blocks {
            match runs.last_mut() {
                Some(run) if run.zeros == zeros => run.blocks += 1,
                _ => runs.push(Self { blocks: 1, zeros }),
            }
        }
        runs
    }

    /// In `pieces` that differ by a block at most.
    fn divided(self, pieces: u64) -> impl Iterator<Item = Self> {
        let Self { blocks, zeros } = self;
        (0..pieces).map(move |piece| Self { blocks: blocks / pieces + u64::from(piece < blocks % pieces), zeros })
    }
}

/// Cuts a disk into parts.
fn cut(runs: &[Run]) -> Vec<Run> {
    let all: u64 = runs.iter().map(|run| run.blocks).sum();
    let shortest = SHORTEST.max(all.div_ceil(MOST));
    let usual = USUAL.max(shortest);
    // The longest zeros are sent once, as what the others are copied from. The longer they may be, the fewer copies there
    // are, and the fewer blocks are left over where a run is cut into such pieces; at almost twice the shortest, none.
    let candidates = (shortest + 1..2 * shortest).step_by(usize::try_from(shortest / SHORTEST).unwrap_or(1));
    let cost = |longest: &u64| {
        let joined = joined(runs, shortest, *longest);
        let data: u64 = joined.iter().filter(|run| !run.zeros).map(|run| run.blocks).sum();
        let copies: u64 = joined.iter().filter(|run| run.zeros).map(|run| run.blocks.div_ceil(*longest)).sum();
        (data + longest) * COPIES_A_BLOCK + copies
    };
    let longest = candidates.min_by_key(cost).unwrap_or(shortest);
    let pieces = |run: Run| if run.zeros { run.blocks.div_ceil(longest) } else { (run.blocks / usual).max(1) };
    joined(runs, shortest, longest).into_iter().flat_map(|run| run.divided(pieces(run))).collect()
}

/// Joins zeros that can't be cut into pieces of `shortest` to `longest` blocks to the data beside them, and as many as data
/// needs that is too short for a part. Only at the end may anything be shorter.
fn joined(runs: &[Run], shortest: u64, longest: u64) -> Vec<Run> {
    let mut joined = Vec::new();
    let mut data = 0;
    for (index, run) in runs.iter().enumerate() {
        if !run.zeros {
            data += run.blocks;
            continue;
        }
        let filling = if data == 0 { 0 } else { shortest.saturating_sub(data).min(run.blocks) };
        let rest = run.blocks - filling;
        let zeros = rest.min(rest / shortest * longest);
        let is_last = index + 1 == runs.len();
        if zeros == 0 && !(is_last && rest > 0) {
            data += run.blocks;
            continue;
        }
        let before = std::mem::replace(&mut data, if is_last { 0 } else { rest - zeros });
        joined.extend((before > 0).then_some(Run { blocks: before + filling, zeros: false }));
        joined.extend((zeros > 0).then_some(Run { blocks: zeros, zeros: true }));
        joined.extend((is_last && rest > zeros).then_some(Run { blocks: rest - zeros, zeros: true }));
    }
    joined.extend((data > 0).then_some(Run { blocks: data, zeros: false }));
    joined
}

fn hash(file: &File, offset: u64, length: u64) -> io::Result<Digest> {
    let mut buffer = vec![0; BUFFER];
    let mut hash = Sha256::new();
    let mut done = 0;
    while done < length {
        let wanted = usize::try_from(length - done).map_or(BUFFER, |left| left.min(BUFFER));
        file.read_exact_at(&mut buffer[..wanted], offset + done)?;
        hash.update(&buffer[..wanted]);
        done += wanted as u64;
    }
    Ok(hash.finalize().into())
}

/// The digests of zeros of these lengths. The longer ones go on from the shorter ones.
fn of_zeros(lengths: &BTreeSet<u64>) -> BTreeMap<u64, Digest> {
    let buffer = [0; 8 << 10];
    let (mut hash, mut done) = (Sha256::new(), 0);
    let digest = |length: &u64| {
        while done < *length {
            let some = usize::try_from(length - done).map_or(buffer.len(), |left| left.min(buffer.len()));
            hash.update(&buffer[..some]);
            done += some as u64;
        }
        (*length, hash.clone().finalize().into())
    };
    lengths.iter().map(digest).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::GIB;

    /// Parts of a disk of these runs, data and zeros in turn, and how many blocks each has.
    fn parts(runs: &[u64]) -> String {
        let runs: Vec<Run> =
            (0..).zip(runs).map(|(index, blocks)| Run { blocks: *blocks, zeros: index % 2 == 1 }).collect();
        let parts =
            cut(&runs).into_iter().map(|Run { blocks, zeros }| format!("{blocks}{}", if zeros { "z" } else { "" }));
        parts.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn parts_are_cut_where_zeros_begin_and_end() {
        assert_eq!(parts(&[20]), "20");
        assert_eq!(parts(&[100]), "17 17 17 17 16 16");
        assert_eq!(parts(&[20, 110]), "20 11z 11z 11z 11z 11z 11z 11z 11z 11z 11z");
        assert_eq!(parts(&[20, 110, 12]), "20 11z 11z 11z 11z 11z 11z 11z 11z 11z 11z 12");
        // The data that begins and ends a disk is filled up with zeros.
        assert_eq!(parts(&[1, 119, 1]), "10 11z 11z 11z 11z 11z 11z 11z 11z 11z 11z 1");
        // Zeros that are too short for a part are sent.
        assert_eq!(parts(&[20, 9, 20]), "17 16 16");
        assert_eq!(parts(&[1, 12, 1]), "14");
        assert_eq!(parts(&[20, 15]), "20 11z 4z");
        // Sent once, longer zeros are cheaper than what is left over of many runs.
        assert_eq!(parts(&[20, 14, 20, 14, 20, 14, 20]), "20 14z 20 14z 20 14z 20");
        assert_eq!(parts(&[20, 14, 20, 12, 20]), "20 12z 22 12z 20");
    }

    proptest! {
        #[test]
        fn parts_cover_the_disk_once_within_s3s_limits(
            runs in proptest::collection::vec(prop_oneof![1u64..40, 1u64..4000, 1u64..900_000], 1..60),
            zeros_first: bool,
        ) {
            let runs: Vec<Run> = (0..).zip(&runs)
                .map(|(index, blocks)| Run { blocks: *blocks, zeros: (index % 2 == 0) == zeros_first })
                .collect();
            let all: u64 = runs.iter().map(|run| run.blocks).sum();
            prop_assume!(all * BLOCK <= 25_000 * GIB);
            let parts = cut(&runs);
            prop_assert!(parts.len() as u64 <= MOST);
            prop_assert_eq!(parts.iter().map(|part| part.blocks).sum::<u64>(), all);
            let (last, others) = parts.split_last().unwrap();
            prop_assert!(last.blocks > 0);
            for part in others {
                prop_assert!(part.blocks >= SHORTEST && part.blocks * BLOCK <= 5 * GIB, "{part:?}");
            }
            // A part is zeros only where the disk is.
            let is_data = |from: u64, to: u64| {
                let mut end = 0;
                runs.iter().any(|run| { let start = end; end += run.blocks; !run.zeros && start < to && end > from })
            };
            let mut end = 0;
            for part in &parts {
                let start = end;
                end += part.blocks;
                prop_assert!(!part.zeros || !is_data(start, end), "{part:?}");
            }
        }
    }

    #[test]
    fn zeros_have_their_digest_without_being_read() {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        let size = 2 * GIB;
        file.set_len(size).unwrap();
        file.write_all(b"kiln").unwrap();
        let data = [(0, disk::Digest::of(b"kiln")), (40, disk::Digest::of(&vec![0; 512 << 10]))];
        let parts = Parts::of(&BlockMap::from_data(size, data));
        assert_eq!(parts.data(), 5 * MIB, "{parts:?}");
        let mut lengths = BTreeSet::new();
        let some: Vec<Part> = parts.all.iter().copied().filter(|part| lengths.insert(part.length)).collect();
        assert!(some.len() > 1);
        for part in some {
            assert_eq!(parts.digest(&file, part).unwrap(), hash(&file, part.offset, part.length).unwrap());
        }
        // Not even where there is something else by now.
        let zeros = parts.zeros().next().unwrap();
        let before = parts.digest(&file, zeros).unwrap();
        file.write_all_at(b"kiln", zeros.offset).unwrap();
        assert_eq!(parts.digest(&file, zeros).unwrap(), before);
    }

    #[test]
    fn of_zeros_of_5_mib_no_shorter_ones_are_copied() {
        let part = |length: u64, zeros| Part { number: 1, offset: 0, length, zeros };
        let copyable = |longest: u64, one: Part| {
            Parts { all: vec![part(longest, true), one], longest, digests: OnceLock::new() }.is_copyable(one)
        };
        assert!(copyable(5 * MIB, part(5 * MIB, true)));
        assert!(!copyable(5 * MIB, part(MIB, true)));
        assert!(copyable(6 * MIB, part(MIB, true)));
        assert!(!copyable(6 * MIB, part(6 * MIB, false)));
    }

    #[test]
    fn a_written_zero_is_a_zero() {
        let written = BlockMap::from_data(GIB, (0..2048).map(|index| (index, disk::Digest::of(&vec![0; 512 << 10]))));
        assert_eq!(Parts::of(&written).all, Parts::of(&BlockMap::hole(GIB)).all);
        assert_eq!(Parts::of(&written).data(), 0);
    }

    #[test]
    fn digests_are_written_as_s3_writes_them() {
        let empty: Digest = Sha256::digest(b"").into();
        assert_eq!(base64(&empty), "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
        let two: Digest = Sha256::digest([empty, empty].concat()).into();
        assert_eq!(composite(&[empty, empty]), format!("{}-2", base64(&two)));
    }
}
