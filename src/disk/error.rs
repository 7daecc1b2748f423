//! What can go wrong with a disk.

use std::io;
use std::path::{Path, PathBuf};

/// Why a disk could not be read, changed or written.
///
/// Each message is a lowercase fragment with the path in it; the underlying cause, where there is one, is the
/// `source` and is not repeated in the message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened.
    #[error("failed to open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file could not be created, or it exists already.
    #[error("failed to create {}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file could not be read.
    #[error("failed to read {} at byte {offset}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file could not be written, for any reason but a full disk.
    #[error("failed to write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The filesystem that holds the file is full, or its owner's quota is used up.
    #[error("no space left for {}", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,

    /// Neither a partition table nor a filesystem was found.
    #[error("{} is not a disk image: no partition table or filesystem found", path.display())]
    NotADisk {
        /// The image.
        path: PathBuf,
    },
    /// The image is in another format than the raw one that was expected.
    #[error("{} is not a raw disk but {format}", path.display())]
    NotRaw {
        /// The image.
        path: PathBuf,
        /// What it is, with its article: "a qcow2 image".
        format: &'static str,
    },
    /// The partition table is laid out for sectors of 4096 bytes.
    #[error("{} is partitioned for 4096-byte sectors; EC2 and kiln use 512-byte sectors", path.display())]
    SectorSize {
        /// The image.
        path: PathBuf,
    },
    /// There is a GPT, but neither copy of it is whole.
    #[error("the GPT of {} is damaged: primary: {primary}; backup: {backup}", path.display())]
    DamagedGpt {
        /// The image.
        path: PathBuf,
        /// What is wrong with the copy at the start.
        primary: String,
        /// What is wrong with the copy at the end.
        backup: String,
    },
    /// The table contradicts itself.
    #[error("the partition table of {} is damaged: {what}", path.display())]
    DamagedTable {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A partition ends after the disk does: the image was cut short.
    #[error("partition {number} of {} ends at byte {end}, but the image has only {size} bytes", path.display())]
    CutShort {
        /// The image.
        path: PathBuf,
        /// The partition's number.
        number: u32,
        /// Where it ends, in bytes.
        end: u64,
        /// The image's size in bytes.
        size: u64,
    },

    /// The new size is smaller than the disk.
    #[error("{} cannot shrink from {from} to {to} bytes", path.display())]
    Shrink {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        from: u64,
        /// The size asked for, in bytes.
        to: u64,
    },
    /// A size that is no multiple of 512.
    #[error("a disk size of {size} bytes is not a whole number of 512-byte sectors")]
    OddSize {
        /// The size in bytes.
        size: u64,
    },
    /// An MBR counts sectors in 32 bits.
    #[error("the MBR partition table of {} cannot describe {size} bytes: its limit is 2 TiB", path.display())]
    MbrLimit {
        /// The image.
        path: PathBuf,
        /// The size asked for, in bytes.
        size: u64,
    },
    /// No partition has that number.
    #[error("{} has no partition {number}", path.display())]
    NoPartition {
        /// The image.
        path: PathBuf,
        /// The number asked for.
        number: u32,
    },
    /// The partition to grow has others behind it.
    #[error("partition {number} of {} cannot grow: behind it lies {behind}", path.display())]
    NotLast {
        /// The image.
        path: PathBuf,
        /// The partition to grow.
        number: u32,
        /// What is behind it: "partition 3 (swap, 536870912 bytes)".
        behind: String,
    },
    /// Logical partitions are read, never changed.
    #[error("partition {number} of {} is a logical partition, which kiln does not grow", path.display())]
    Logical {
        /// The image.
        path: PathBuf,
        /// The partition to grow.
        number: u32,
    },

    /// The overlay uses something of qcow2 that kiln does not read.
    #[error("{} uses {feature}, which kiln does not read", path.display())]
    Qcow2Unsupported {
        /// The overlay.
        path: PathBuf,
        /// The feature, as the qcow2 specification calls it.
        feature: String,
    },
    /// The overlay contradicts itself.
    #[error("{} is damaged: {what}", path.display())]
    Qcow2Damaged {
        /// The overlay.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// An overlay cannot be made like this.
    #[error("cannot create the overlay {}: {what}", path.display())]
    Overlay {
        /// The overlay.
        path: PathBuf,
        /// What is wrong with the request.
        what: String,
    },

    /// The text is not a block map.
    #[error("line {line} of the block map: {what}")]
    BlockMap {
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// The block map could not be read or written.
    #[error("failed to read or write a block map")]
    BlockMapIo(#[source] io::Error),
}

impl Error {
    pub(super) fn open(path: &Path, source: io::Error) -> Self {
        Self::Open { path: path.to_owned(), source }
    }

    pub(super) fn read(path: &Path, offset: u64, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), offset, source }
    }

    /// A failed write; a full disk is told apart from the rest.
    pub(super) fn write(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { path, source },
            _ => Self::Write { path, source },
        }
    }

    pub(super) fn create(path: &Path, source: io::Error) -> Self {
        match Self::write(path, source) {
            Self::Write { path, source } => Self::Create { path, source },
            full => full,
        }
    }

    pub(super) fn damaged_table(path: &Path, what: impl Into<String>) -> Self {
        Self::DamagedTable { path: path.to_owned(), what: what.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_its_own_error() {
        let full = Error::write(Path::new("/d"), io::Error::from_raw_os_error(28));
        assert!(matches!(full, Error::NoSpace { .. }), "{full}");
        let quota = Error::create(Path::new("/d"), io::Error::from_raw_os_error(122));
        assert!(matches!(quota, Error::NoSpace { .. }), "{quota}");
        let denied = Error::create(Path::new("/d"), io::Error::from_raw_os_error(13));
        assert!(matches!(denied, Error::Create { .. }), "{denied}");
    }

    #[test]
    fn messages_leave_the_cause_to_the_source() {
        let error = Error::read(Path::new("/x"), 7, io::Error::other("boom"));
        assert_eq!(error.to_string(), "failed to read /x at byte 7");
        assert_eq!(std::error::Error::source(&error).map(ToString::to_string).as_deref(), Some("boom"));
    }
}
