//! What a disk is sent as: its parts and those of its scratch object, where each is in the disk, and its digest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use sha2::{Digest as _, Sha256};

use super::cut::{Cut, DiskPart, Run, SEED, ScratchPart, Span, cut};
use crate::disk::{self, BLOCK, BlockMap};

const BUFFER: usize = 256 << 10;
/// How long the seed is, in bytes.
pub(super) const SEED_LENGTH: u64 = SEED * BLOCK;

/// A SHA-256.
pub(super) type Digest = [u8; 32];

/// A piece of an object, made by one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// From 1, as S3 counts.
    pub(super) number: i32,
    /// In bytes.
    pub(super) length: u64,
}

/// Bytes of the disk beside each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// What a part is of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) part: Part,
    /// Where its bytes are, in order. Empty: it can only be copied.
    pub(super) extents: Vec<Extent>,
    /// It reads as zeros, whether they were written or not.
    pub(super) zeros: bool,
    /// At which byte it begins in the object that it can be copied from.
    pub(super) source: Option<u64>,
}

/// The parts of a disk.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) disk: Vec<Piece>,
    /// Those of its scratch object; empty if it needs none.
    pub(super) scratch: Vec<Piece>,
    /// The digests of zeros, by their length.
    digests: OnceLock<BTreeMap<u64, Digest>>,
}

impl Parts {
    /// Cuts the disk of this block map, which has whole blocks only.
    pub(super) fn of(map: &BlockMap) -> Self {
        let zeros = disk::Digest::of_zeros();
        let blocks = map.blocks().iter().map(|block| block.is_none_or(|digest| digest == zeros));
        let Cut { disk, scratch } = cut(&Run::all(blocks));
        let extent = |Span { first, blocks }: Span| Extent { offset: first * BLOCK, length: blocks * BLOCK };
        let of_disk = |(number, DiskPart { span, zeros, source }): (i32, DiskPart)| {
            let extent = extent(span);
            let part = Part { number, length: extent.length };
            Piece { part, extents: vec![extent], zeros, source: source.map(|block| block * BLOCK) }
        };
        let of_scratch = |(number, part): (i32, ScratchPart)| match part {
            ScratchPart::Zeros => {
                let part = Part { number, length: SEED_LENGTH };
                Piece { part, extents: Vec::new(), zeros: true, source: Some(0) }
            }
            ScratchPart::Joint(spans) => {
                let extents: Vec<Extent> = spans.into_iter().map(extent).collect();
                let part = Part { number, length: extents.iter().map(|extent| extent.length).sum() };
                Piece { part, extents, zeros: false, source: None }
            }
        };
        Self {
            disk: (1..).zip(disk).map(of_disk).collect(),
            scratch: (1..).zip(scratch).map(of_scratch).collect(),
            digests: OnceLock::new(),
        }
    }

    /// The bytes that are sent if all is copied that can be: in parts of the disk, and in those of the scratch object.
    pub(super) fn data(&self) -> u64 {
        let sent = self.disk.iter().chain(&self.scratch).filter(|piece| piece.source.is_none());
        sent.map(|piece| piece.part.length).sum()
    }

    /// The length of the scratch object, in bytes.
    pub(super) fn scratch_length(&self) -> u64 {
        self.scratch.iter().map(|piece| piece.part.length).sum()
    }

    /// Where the seed's zeros are, and their digest; none: nothing is copied.
    pub(super) fn seed(&self) -> Option<(Extent, Digest)> {
        if self.scratch.is_empty() {
            return None;
        }
        let is_long = |piece: &&Piece| piece.zeros && piece.part.length >= SEED_LENGTH;
        let Extent { offset, .. } = *self.disk.iter().find(is_long)?.extents.first()?;
        let digest = self.zeros().get(&SEED_LENGTH).copied()?;
        Some((Extent { offset, length: SEED_LENGTH }, digest))
    }

    /// The digest of `piece`. Zeros are not read.
    pub(super) fn digest(&self, file: &File, piece: &Piece) -> io::Result<Digest> {
        let known = piece.zeros.then(|| self.zeros().get(&piece.part.length).copied()).flatten();
        known.map_or_else(|| hash(file, &piece.extents), Ok)
    }

    fn zeros(&self) -> &BTreeMap<u64, Digest> {
        self.digests.get_or_init(|| {
            let all = self.disk.iter().chain(&self.scratch).filter(|piece| piece.zeros);
            of_zeros(&all.map(|piece| piece.part.length).collect())
        })
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

fn hash(file: &File, extents: &[Extent]) -> io::Result<Digest> {
    let mut buffer = vec![0; BUFFER];
    let mut hash = Sha256::new();
    for Extent { offset, length } in extents {
        let mut done = 0;
        while done < *length {
            let wanted = usize::try_from(length - done).map_or(BUFFER, |left| left.min(BUFFER));
            file.read_exact_at(&mut buffer[..wanted], offset + done)?;
            hash.update(&buffer[..wanted]);
            done += wanted as u64;
        }
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
    use std::io::Write as _;

    use super::*;
    use crate::units::{GIB, MIB};

    #[test]
    fn zeros_have_their_digest_without_being_read() {
        let mut file = tempfile::tempfile().unwrap();
        let size = 2 * GIB;
        file.set_len(size).unwrap();
        file.write_all(b"kiln").unwrap();
        let data = [(0, disk::Digest::of(b"kiln")), (40, disk::Digest::of(&vec![0; 512 << 10]))];
        let parts = Parts::of(&BlockMap::from_data(size, data));
        assert_eq!(parts.data(), 5 * MIB, "{parts:?}");
        let mut lengths = BTreeSet::new();
        let some: Vec<&Piece> = parts.disk.iter().filter(|piece| lengths.insert(piece.part.length)).collect();
        assert!(some.len() > 1);
        for piece in some {
            assert_eq!(parts.digest(&file, piece).unwrap(), hash(&file, &piece.extents).unwrap());
        }
        // Not even where there is something else by now.
        let zeros = parts.disk.iter().find(|piece| piece.zeros).unwrap();
        let before = parts.digest(&file, zeros).unwrap();
        file.write_all_at(b"kiln", zeros.extents[0].offset).unwrap();
        assert_eq!(parts.digest(&file, zeros).unwrap(), before);
        let (extent, digest) = parts.seed().unwrap();
        assert_eq!(extent.length, 5 * MIB);
        assert_eq!(digest, Digest::from(Sha256::digest(vec![0; 5 << 20])));
    }

    #[test]
    fn a_written_zero_is_a_zero() {
        let written = BlockMap::from_data(GIB, (0..2048).map(|index| (index, disk::Digest::of(&vec![0; 512 << 10]))));
        assert_eq!(Parts::of(&written).disk, Parts::of(&BlockMap::hole(GIB)).disk);
        assert_eq!(Parts::of(&written).data(), 0);
    }

    #[test]
    fn a_joint_is_read_in_its_order() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let extents = [(7, 2), (0, 3), (5, 1)].map(|(offset, length)| Extent { offset, length });
        assert_eq!(hash(&file, &extents).unwrap(), Digest::from(Sha256::digest(b"780125")));
    }

    #[test]
    fn digests_are_written_as_s3_writes_them() {
        let empty: Digest = Sha256::digest(b"").into();
        assert_eq!(base64(&empty), "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
        let two: Digest = Sha256::digest([empty, empty].concat()).into();
        assert_eq!(composite(&[empty, empty]), format!("{}-2", base64(&two)));
    }
}
