//! The qcow2 format, version 3: the header, and what the table entries mean.
//!
//! Source: QEMU `docs/interop/qcow2.txt`; its names are used here. All numbers are big-endian. kiln writes clusters
//! of 64 KiB with 16-bit reference counts, QEMU's own defaults, and reads any cluster size.

use super::Error;
use std::path::{Path, PathBuf};

/// "QFI\xfb".
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Header of version 3 with the compression type's field and its padding, in bytes.
const HEADER_LENGTH: u32 = 112;
/// Header extension: the backing file's format.
const EXTENSION_BACKING_FORMAT: u32 = 0xE279_2ACA;
/// Header extension: the end.
const EXTENSION_END: u32 = 0;
/// Bits 9-55 of a table entry: an offset in the file.
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
/// Bit 63: the cluster's reference count is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry: reads as zeros, whatever else it says.
pub(super) const ZERO: u64 = 1;
/// QEMU reads no longer backing file name, in bytes.
pub(super) const BACKING_NAME_LIMIT: usize = 1023;
/// QEMU accepts no larger L1 table, in bytes.
pub(super) const L1_LIMIT: u64 = 32 << 20;

/// The incompatible feature bits: refused unless listed as readable below.
const INCOMPATIBLE: [(u32, &str); 5] = [
    (0, "dirty reference counts"),
    (1, "a structure marked corrupt"),
    (2, "an external data file"),
    (3, "a compression type other than zlib"),
    (4, "extended L2 entries (subclusters)"),
];
/// A crash under `lazy_refcounts` leaves bit 0 set. Only the reference counts are in doubt then, which matter to a
/// writer; reading needs L1 and L2 alone, which are right.
const DIRTY: u64 = 1;
/// Bit 3 matters only to compressed clusters, which are refused one by one.
const COMPRESSION_TYPE: u64 = 1 << 3;

/// What an L2 entry says about its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// In the backing file, if that reaches so far.
    Unallocated,
    /// At this offset of the file, in bytes.
    Data(u64),
    /// Reads as zeros; `allocated`: space is kept for it in the file.
    Zero { allocated: bool },
    /// Packed.
    Compressed,
}

impl Cluster {
    pub(super) fn of(entry: u64) -> Self {
        let offset = entry & OFFSET;
        if entry & COMPRESSED != 0 {
            Self::Compressed
        } else if entry & ZERO != 0 {
            Self::Zero { allocated: offset != 0 }
        } else if offset == 0 {
            Self::Unallocated
        } else {
            Self::Data(offset)
        }
    }
}

/// The offset of an L2 table in an L1 entry; 0 for none.
pub(super) fn l2_offset(l1_entry: u64) -> u64 {
    l1_entry & OFFSET
}

/// The parts of a header that reading needs.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) l1_entries: u64,
    pub(super) l1_offset: u64,
    pub(super) backing: Option<PathBuf>,
    pub(super) backing_format: Option<String>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).unwrap_or(&[0; 4]).iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

impl Header {
    /// Reads a header from `first`, the file's first 64 KiB or all of it if it is shorter.
    ///
    /// # Errors
    /// [`Error::Qcow2Unsupported`], [`Error::Qcow2Damaged`].
    pub(super) fn parse(path: &Path, first: &[u8]) -> Result<Self, Error> {
        let damaged = |what: &str| Error::Qcow2Damaged { path: path.to_owned(), what: what.to_owned() };
        if first.len() < 104 || first[..4] != MAGIC {
            return Err(damaged("it has no qcow2 header"));
        }
        refuse_features(path, first)?;
        let cluster_bits = u32_at(first, 20);
        let (size, l1_entries) = (u64_at(first, 24), u64::from(u32_at(first, 36)));
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged("impossible cluster size"));
        }
        let covered = u128::from(l1_entries) << (2 * cluster_bits - 3);
        if l1_entries * 8 > L1_LIMIT || covered < u128::from(size) {
            return Err(damaged("its L1 table does not fit its size"));
        }
        let backing = backing_name(first).ok_or_else(|| damaged("its backing file's name is out of place"))?;
        Ok(Self {
            cluster_bits,
            size,
            l1_entries,
            l1_offset: u64_at(first, 40),
            backing: (!backing.as_os_str().is_empty()).then_some(backing),
            backing_format: backing_format(first),
        })
    }
}

fn refuse_features(path: &Path, first: &[u8]) -> Result<(), Error> {
    let unsupported = |feature: String| Err(Error::Qcow2Unsupported { path: path.to_owned(), feature });
    let version = u32_at(first, 4);
    if version != 3 {
        return unsupported(format!("qcow2 version {version}"));
    }
    if u32_at(first, 32) != 0 {
        return unsupported("encryption".to_owned());
    }
    let refused = u64_at(first, 72) & !(DIRTY | COMPRESSION_TYPE);
    if let Some((_, name)) = INCOMPATIBLE.iter().find(|(bit, _)| refused >> bit & 1 != 0) {
        return unsupported((*name).to_owned());
    }
    if refused != 0 {
        return unsupported(format!("unknown incompatible features {refused:#x}"));
    }
    Ok(())
}

/// The backing format extension, which begins the area between header and backing file name.
fn backing_format(first: &[u8]) -> Option<String> {
    let mut at = u32_at(first, 100) as usize;
    while let Some(head) = first.get(at..at.checked_add(8)?) {
        let (kind, len) = (u32_at(head, 0), u32_at(head, 4) as usize);
        if kind == EXTENSION_END {
            return None;
        }
        let data = first.get(at + 8..(at + 8).checked_add(len)?)?;
        if kind == EXTENSION_BACKING_FORMAT {
            return Some(String::from_utf8_lossy(data).into_owned());
        }
        at += 8 + len.next_multiple_of(8);
    }
    None
}

/// The backing file's name, empty if there is no backing file; `None` if it lies outside `first`.
fn backing_name(first: &[u8]) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let (at, len) = (usize::try_from(u64_at(first, 8)).ok()?, u32_at(first, 16) as usize);
    let name = if at == 0 { &[] } else { first.get(at..at.checked_add(len)?)? };
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(name)))
}

/// What a fresh overlay's header says. Sizes and offsets (in the file) in bytes.
pub(super) struct NewHeader<'a> {
    pub(super) size: u64,
    pub(super) cluster_bits: u32,
    pub(super) l1_entries: u32,
    pub(super) l1_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) backing: &'a [u8],
    pub(super) backing_format: &'a str,
}

impl NewHeader<'_> {
    pub(super) fn bytes(&self) -> Vec<u8> {
        // What lies between header and name: the format's extension with its data, and the end's.
        let format = self.backing_format.as_bytes();
        let format_len = u32::try_from(format.len()).unwrap_or(u32::MAX);
        // An extension's data is padded to 8 bytes.
        let name_at = u64::from(HEADER_LENGTH) + 8 + u64::from(format_len.next_multiple_of(8)) + 8;
        let name_len = u32::try_from(self.backing.len()).unwrap_or(u32::MAX);
        let mut out = MAGIC.to_vec();
        put32(&mut out, &[3]);
        put64(&mut out, &[name_at]);
        put32(&mut out, &[name_len, self.cluster_bits]);
        put64(&mut out, &[self.size]);
        let no_encryption = 0;
        put32(&mut out, &[no_encryption, self.l1_entries]);
        put64(&mut out, &[self.l1_offset, self.refcount_table_offset]);
        let (no_snapshots, no_snapshot_table) = (0, 0);
        put32(&mut out, &[self.refcount_table_clusters, no_snapshots]);
        // The features: incompatible, compatible (so lazy_refcounts is off), autoclear.
        put64(&mut out, &[no_snapshot_table, 0, 0, 0]);
        let refcount_order = 4;
        put32(&mut out, &[refcount_order, HEADER_LENGTH]);
        let zlib_and_padding = 0;
        put64(&mut out, &[zlib_and_padding]);
        put32(&mut out, &[EXTENSION_BACKING_FORMAT, format_len]);
        out.extend(format);
        out.resize(out.len().next_multiple_of(8), 0);
        put32(&mut out, &[EXTENSION_END, 0]);
        out.extend(self.backing);
        out
    }
}

fn put32(out: &mut Vec<u8>, values: &[u32]) {
    out.extend(values.iter().flat_map(|value| value.to_be_bytes()));
}

fn put64(out: &mut Vec<u8>, values: &[u64]) {
    out.extend(values.iter().flat_map(|value| value.to_be_bytes()));
}
