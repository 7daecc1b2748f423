//! The block map: what a raw disk holds, block by block, and the digest that names it.

use super::Error;
use super::guid::hex;
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::sync::LazyLock;

/// The length of a block in bytes: 512 KiB, the unit in which EBS direct takes a snapshot.
pub const BLOCK: u64 = 512 << 10;

/// A SHA-256.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Of a whole block of zeros.
    #[must_use]
    pub fn of_zeros() -> Self {
        static ZEROS: LazyLock<Digest> =
            LazyLock::new(|| Digest::of(&vec![0; usize::try_from(BLOCK).unwrap_or_default()]));
        *ZEROS
    }

    /// From 64 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text.chars().map_while(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
        if text.len() != 64 || digits.len() != 64 {
            return None;
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Some(Self(bytes))
    }
}

/// 64 lower-case hexadecimal digits.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A disk's blocks of [`BLOCK`] bytes, each with the SHA-256 of its content, or a hole.
///
/// A block is a hole only if nothing in it was ever written; a block of written zeros is data, because a block that
/// is left out of a snapshot reads as random bytes on an encrypted volume. The last block of a disk that is no
/// multiple of a block long is shorter, and its SHA-256 is that of the bytes it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockMap {
    size: u64,
    blocks: Vec<Option<Digest>>,
}

impl BlockMap {
    /// The map of a disk of `size` bytes that is one hole.
    #[must_use]
    pub fn hole(size: u64) -> Self {
        Self { size, blocks: vec![None; usize::try_from(size.div_ceil(BLOCK)).unwrap_or(usize::MAX)] }
    }

    /// The disk's size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// One entry per block, in order; `None` is a hole.
    #[must_use]
    pub fn blocks(&self) -> &[Option<Digest>] {
        &self.blocks
    }

    /// A block's digest; `None` if it is a hole, or past the end.
    #[must_use]
    pub fn block(&self, index: u64) -> Option<Digest> {
        usize::try_from(index).ok().and_then(|index| self.blocks.get(index).copied()).flatten()
    }

    /// The blocks that hold data, with their indices.
    pub fn data(&self) -> impl Iterator<Item = (u64, Digest)> + '_ {
        (0..).zip(&self.blocks).filter_map(|(index, digest)| digest.map(|digest| (index, digest)))
    }

    /// The length of a block in bytes: [`BLOCK`], less for the last one of an uneven disk, 0 past the end.
    #[must_use]
    pub fn block_len(&self, index: u64) -> u64 {
        self.size.saturating_sub(index.saturating_mul(BLOCK)).min(BLOCK)
    }

    /// How many bytes the data blocks have together.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.data().map(|(index, _)| self.block_len(index)).sum()
    }

    /// Notes the digest of a block, or that it is a hole; `false` if there is no such block.
    pub(super) fn set(&mut self, index: u64, digest: impl Into<Option<Digest>>) -> bool {
        let slot = usize::try_from(index).ok().and_then(|index| self.blocks.get_mut(index));
        slot.map(|slot| *slot = digest.into()).is_some()
    }

    /// The disk's digest: SHA-256 over `kiln block map v1\0`, the disk's size and the block size (both 64-bit
    /// little-endian), and every block's SHA-256. A hole counts as the zeros it reads as, so the digest depends on
    /// what can be read and not on how it is stored.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let zeros = Zeros::of(self.size);
        let mut hasher = Sha256::new();
        hasher.update(b"kiln block map v1\0");
        hasher.update(self.size.to_le_bytes());
        hasher.update(BLOCK.to_le_bytes());
        for (index, digest) in (0..).zip(&self.blocks) {
            hasher.update(digest.unwrap_or(zeros.block(self.block_len(index))).0);
        }
        Digest(hasher.finalize().into())
    }

    /// Which blocks are data and which are holes, in 16 hexadecimal digits: SHA-256 over the indices of those with data
    /// (64-bit little-endian). Disks of one [`digest`](Self::digest) may differ in that.
    #[must_use]
    pub fn holes(&self) -> String {
        let indices = self.data().fold(Sha256::new(), |hasher, (index, _)| hasher.chain_update(index.to_le_bytes()));
        hex(&indices.finalize())[..16].to_owned()
    }

    /// The indices of the blocks that read differently on the two disks; a block that only one of them has differs.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<u64> {
        let reads_as = |map: &Self, zeros: &Zeros, index: u64| {
            let entry = usize::try_from(index).ok().and_then(|index| map.blocks.get(index));
            entry.map(|digest| digest.unwrap_or(zeros.block(map.block_len(index))))
        };
        let (ours, theirs) = (Zeros::of(self.size), Zeros::of(other.size));
        let count = self.blocks.len().max(other.blocks.len()) as u64;
        (0..count).filter(|index| reads_as(self, &ours, *index) != reads_as(other, &theirs, *index)).collect()
    }

    /// Blocks that were read, put together to a map.
    pub(crate) fn from_data(size: u64, data: impl IntoIterator<Item = (u64, Digest)>) -> Self {
        let mut map = Self::hole(size);
        for (index, digest) in data {
            map.set(index, digest);
        }
        map
    }

    /// A map that may be parsed: its size must be one that a file can have.
    pub(super) fn parsed(size: u64) -> Result<Self, Error> {
        if size > i64::MAX as u64 >> 10 {
            return Err(Error::BlockMap { line: 1, what: format!("a disk of {size} bytes is impossible") });
        }
        Ok(Self::hole(size))
    }
}

/// The digests of the zeros that holes read as.
struct Zeros {
    whole: Digest,
    last: Digest,
}

impl Zeros {
    fn of(size: u64) -> Self {
        let last = usize::try_from(size % BLOCK).unwrap_or_default();
        Self { whole: Digest::of_zeros(), last: Digest::of(&vec![0; last]) }
    }

    fn block(&self, len: u64) -> Digest {
        if len == BLOCK { self.whole } else { self.last }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_zeros_are_no_hole_and_read_the_same() {
        let zeros = Digest::of(&vec![0; 512 << 10]);
        let maps = [vec![], vec![(1, zeros)], vec![(2, zeros)]].map(|data| BlockMap::from_data(3 * BLOCK, data));
        assert!(maps.iter().all(|map| map.digest() == maps[0].digest()));
        let holes: std::collections::BTreeSet<_> = maps.iter().map(BlockMap::holes).collect();
        assert_eq!(holes.len(), 3);
        assert!(holes.iter().all(|holes| holes.len() == 16));
    }

    #[test]
    fn the_digest_is_what_it_says() {
        let mut map = BlockMap::hole(BLOCK + 512);
        let mut bytes = b"kiln block map v1\0".to_vec();
        bytes.extend((BLOCK + 512).to_le_bytes());
        bytes.extend(BLOCK.to_le_bytes());
        bytes.extend(Digest::of(&vec![0; 512 << 10]).0);
        bytes.extend(Digest::of(&[0; 512]).0);
        assert_eq!(map.digest(), Digest::of(&bytes));
        // Written zeros are data, and read the same.
        assert!(map.set(1, Digest::of(&[0; 512])));
        assert_eq!(map.digest(), Digest::of(&bytes));
        assert_eq!(map.data_bytes(), 512);
        assert!(map.set(0, Digest::of(b"x")));
        assert_ne!(map.digest(), Digest::of(&bytes));
        assert!(!map.set(2, Digest::of(b"x")));
    }

    #[test]
    fn differences() {
        let zero = Digest::of(&vec![0; 512 << 10]);
        let (mut a, mut b) = (BlockMap::hole(4 * BLOCK), BlockMap::hole(5 * BLOCK));
        a.set(0, zero);
        a.set(1, Digest::of(b"1"));
        b.set(1, Digest::of(b"2"));
        assert_eq!(a.differences(&b), [1, 4]);
        assert_eq!(b.differences(&a), [1, 4]);
        assert_eq!(a.differences(&a), [0_u64; 0]);
    }

    #[test]
    fn digests_as_text() {
        let digest = Digest::of(b"");
        assert_eq!(digest.to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
        assert_eq!(Digest::parse("e3b0"), None);
        assert_eq!(Digest::parse(&"é".repeat(32)), None);
        assert_eq!(Digest::parse(&"g".repeat(64)), None);
    }
}
