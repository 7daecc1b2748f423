//! How a disk is cut for the upload, and what each part's digest is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::units::MIB;

/// S3 takes no more.
const MOST: u64 = 10_000;
/// Below this, a request costs more than the bytes it carries.
const SMALLEST: u64 = 8 * MIB;
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
    /// Nothing of it is stored on the host: all zeros.
    pub(super) hole: bool,
}

/// The parts of a disk.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) all: Vec<Part>,
    size: u64,
    hole_digest: OnceLock<Digest>,
}

impl Parts {
    /// Cuts a disk of `size` bytes, asking the filesystem which parts are holes.
    pub(super) fn of(file: &File, size: u64) -> io::Result<Self> {
        Ok(Self {
            all: cut(size, |offset| next_data(file, offset))?,
            size: part_size(size),
            hole_digest: OnceLock::new(),
        })
    }

    /// The bytes in parts that are not holes.
    pub(super) fn data(&self) -> u64 {
        self.all.iter().filter(|part| !part.hole).map(|part| part.length).sum()
    }

    /// The holes that are as long as all parts but the last, which may be shorter: copies of one another.
    pub(super) fn holes(&self) -> impl Iterator<Item = Part> {
        self.all.iter().copied().filter(|part| self.is_copyable(*part))
    }

    /// Whether `part` is one of [`holes`](Self::holes).
    pub(super) fn is_copyable(&self, part: Part) -> bool {
        part.hole && part.length == self.size
    }

    /// The digest of `part`. A hole is not read.
    pub(super) fn digest(&self, file: &File, part: Part) -> io::Result<Digest> {
        if part.hole { Ok(self.hole_digest(part)) } else { hash(file, part.offset, part.length) }
    }

    /// Whether `part`, which has this digest, is as long as all parts but the last and all zeros, written or not.
    pub(super) fn is_zeros(&self, part: Part, digest: &Digest) -> bool {
        part.length == self.size && self.hole_digest(part) == *digest
    }

    /// The digest of `part` if it is a hole.
    pub(super) fn hole_digest(&self, part: Part) -> Digest {
        if part.length == self.size { *self.hole_digest.get_or_init(|| zeros(self.size)) } else { zeros(part.length) }
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

fn part_size(size: u64) -> u64 {
    size.div_ceil(MOST).next_multiple_of(MIB).max(SMALLEST)
}

/// Cuts `size` bytes; `next_data` tells where, at or after an offset, the next data is (`None`: nowhere).
fn cut(size: u64, mut next_data: impl FnMut(u64) -> io::Result<Option<u64>>) -> io::Result<Vec<Part>> {
    let step = part_size(size);
    let mut parts = Vec::new();
    let mut data = next_data(0)?;
    for (number, offset) in (1..).zip((0..size).step_by(usize::try_from(step).unwrap_or(usize::MAX))) {
        let length = step.min(size - offset);
        if data.is_some_and(|data| data < offset) {
            data = next_data(offset)?;
        }
        parts.push(Part { number, offset, length, hole: data.is_none_or(|data| data >= offset + length) });
    }
    Ok(parts)
}

fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // A filesystem without holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(offset)),
        Err(error) => Err(error.into()),
    }
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

fn zeros(length: u64) -> Digest {
    let buffer = [0; 8 << 10];
    let mut hash = Sha256::new();
    let mut left = length;
    while left > 0 {
        let some = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        hash.update(&buffer[..some]);
        left -= some as u64;
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::units::GIB;

    #[test]
    fn parts_are_large_enough_to_be_few_and_whole_mib() {
        assert_eq!(part_size(GIB), 8 * MIB);
        assert_eq!(part_size(64 * GIB), 8 * MIB);
        assert_eq!(part_size(80 * GIB), 9 * MIB);
        assert_eq!(part_size(16 << 40), 1678 * MIB);
        assert_eq!(part_size(50_000 * GIB), 5 * GIB);
    }

    proptest! {
        #[test]
        fn parts_cover_the_disk_once_within_s3s_limits(gib in 1u64..=50_000) {
            let size = gib * GIB;
            let parts = cut(size, |offset| Ok(Some(offset))).unwrap();
            prop_assert!(parts.len() as u64 <= MOST);
            let mut end = 0;
            for (index, part) in parts.iter().enumerate() {
                prop_assert_eq!(usize::try_from(part.number).unwrap(), index + 1);
                prop_assert_eq!(part.offset, end);
                prop_assert!(part.length > 0 && part.length <= 5 * GIB);
                prop_assert!(part.length >= 5 * MIB || index + 1 == parts.len());
                end += part.length;
            }
            prop_assert_eq!(end, size);
        }

        #[test]
        fn a_part_is_a_hole_if_and_only_if_it_has_no_data(starts in proptest::collection::btree_set(0u64..GIB, 0..6)) {
            let next = |offset: u64| Ok(starts.range(offset..).next().copied());
            for part in cut(GIB, next).unwrap() {
                let data = starts.range(part.offset..part.offset + part.length).next().is_some();
                prop_assert_eq!(part.hole, !data);
            }
        }
    }

    #[test]
    fn a_hole_has_the_digest_of_zeros_without_being_read() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(20 * MIB).unwrap();
        file.write_all(b"kiln").unwrap();
        let parts = Parts::of(&file, 20 * MIB).unwrap();
        let holes: Vec<bool> = parts.all.iter().map(|part| part.hole).collect();
        assert_eq!(holes, [false, true, true]);
        assert_eq!(parts.data(), 8 * MIB);
        for part in parts.all.clone() {
            assert_eq!(parts.digest(&file, part).unwrap(), hash(&file, part.offset, part.length).unwrap());
        }
    }

    #[test]
    fn digests_are_written_as_s3_writes_them() {
        let empty: Digest = Sha256::digest(b"").into();
        assert_eq!(base64(&empty), "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
        let two: Digest = Sha256::digest([empty, empty].concat()).into();
        assert_eq!(composite(&[empty, empty]), format!("{}-2", base64(&two)));
    }
}
