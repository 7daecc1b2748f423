//! The partition table of a disk, whatever its scheme.

use super::gpt::Gpt;
use super::{Error, Filesystem, FilesystemKind, Guid, Image, SECTOR, mbr, probe};
use serde::{Serialize, Serializer};
use std::fmt;
use std::path::PathBuf;

/// How a disk is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// GUID partition table.
    Gpt,
    /// Master boot record.
    Mbr,
    /// Not at all: one filesystem fills the disk.
    None,
}

/// What a partition is for, as its table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PartitionKind {
    /// A GPT's type GUID.
    Gpt(Guid),
    /// An MBR's type byte.
    Mbr(u8),
    /// The whole disk, which has no table.
    Whole,
}

impl fmt::Display for PartitionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gpt(guid) => guid.fmt(f),
            Self::Mbr(kind) => write!(f, "{kind:#04x}"),
            Self::Whole => f.write_str("whole disk"),
        }
    }
}

impl Serialize for PartitionKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A partition; offsets and lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// As Linux numbers it: GPT entries and primary partitions from 1, logical ones from 5; 0 is the whole disk.
    pub number: u32,
    /// Where it begins on the disk.
    pub start: u64,
    /// How long it is.
    pub len: u64,
    /// What it is for.
    pub kind: PartitionKind,
    /// What `PARTUUID=` takes.
    pub uuid: Option<String>,
    /// What `PARTLABEL=` takes (GPT only).
    pub name: Option<String>,
    /// MBR: the active flag. GPT: "legacy BIOS bootable".
    pub active: bool,
    /// What lies in it.
    pub filesystem: Filesystem,
}

impl Partition {
    /// Where it ends on the disk: the first byte after it.
    #[cfg(test)]
    pub(super) fn end(&self) -> u64 {
        self.start + self.len
    }

    pub(super) fn is(&self, kind: Guid) -> bool {
        self.kind == PartitionKind::Gpt(kind)
    }
}

/// Bytes to write at an offset of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Where, in bytes.
    pub offset: u64,
    /// What.
    pub bytes: Vec<u8>,
}

/// A disk's partition table, read once. It holds all that is needed to grow it.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// How the disk is divided.
    pub scheme: Scheme,
    /// The disk's size in bytes.
    pub size: u64,
    /// The GPT's disk GUID or the MBR's signature, as `ID_PART_TABLE_UUID` shows it.
    pub id: Option<String>,
    /// In the order of their numbers. Without a table, one partition with number 0 is the whole disk.
    pub partitions: Vec<Partition>,
    #[serde(skip)]
    raw: Raw,
    #[serde(skip)]
    path: PathBuf,
}

#[derive(Clone, Debug)]
enum Raw {
    Gpt(Gpt),
    Mbr(Vec<u8>),
    None,
}

impl Table {
    /// Reads the table and probes every partition.
    ///
    /// A GPT is taken from its backup if the primary copy is damaged. A disk without a table that is one filesystem
    /// is [`Scheme::None`].
    ///
    /// # Errors
    /// [`Error::NotADisk`] if there is neither; [`Error::SectorSize`], [`Error::DamagedGpt`],
    /// [`Error::DamagedTable`], [`Error::CutShort`], [`Error::Read`].
    pub fn read(image: &Image) -> Result<Self, Error> {
        let sector = image.slice(0, 512)?.ok_or_else(|| Error::NotADisk { path: image.path().to_owned() })?;
        if mbr::is_protective(&sector) {
            let gpt = Gpt::read(image, sector)?;
            let (id, partitions) = (Some(gpt.disk_id()), gpt.partitions(image)?);
            return Ok(Self::of(image, Scheme::Gpt, id, partitions, Raw::Gpt(gpt)));
        }
        let whole = probe::probe(image, 0, image.size())?;
        // A FAT's boot sector ends like an MBR.
        if whole.kind != FilesystemKind::Vfat
            && let Some(partitions) = mbr::read(image, &sector)?
        {
            return Ok(Self::of(image, Scheme::Mbr, Some(mbr::disk_id(&sector)), partitions, Raw::Mbr(sector)));
        }
        if whole.kind == FilesystemKind::Unknown {
            return Err(Error::NotADisk { path: image.path().to_owned() });
        }
        let partition = Partition {
            number: 0,
            start: 0,
            len: image.size(),
            kind: PartitionKind::Whole,
            uuid: None,
            name: None,
            active: false,
            filesystem: whole,
        };
        Ok(Self::of(image, Scheme::None, None, vec![partition], Raw::None))
    }

    fn of(image: &Image, scheme: Scheme, id: Option<String>, partitions: Vec<Partition>, raw: Raw) -> Self {
        Self { scheme, size: image.size(), id, partitions, raw, path: image.path().to_owned() }
    }

    /// The partition with that number.
    #[must_use]
    pub fn partition(&self, number: u32) -> Option<&Partition> {
        self.partitions.iter().find(|partition| partition.number == number)
    }

    /// What to write, in this order, so that the table is right on a disk grown to `new_size` bytes and partition
    /// `root` reaches to its end, rounded down to 1 MiB (never below what it has). Empty if all is right already.
    ///
    /// GPT: the protective MBR, the primary header and entries, the backup at the new end, and zeros over the old
    /// backup. MBR: the entry. A disk without a table needs nothing. The filesystem is not touched: the guest grows it.
    ///
    /// If `new_size` is the disk's own, a root that is not the last partition is no error: only a misplaced backup
    /// is put right.
    ///
    /// # Errors
    /// [`Error::Shrink`], [`Error::OddSize`], [`Error::NoPartition`], [`Error::NotLast`], [`Error::Logical`],
    /// [`Error::MbrLimit`]; [`Error::DamagedTable`] if the backup table has no room.
    pub fn grow(&self, new_size: u64, root: u32) -> Result<Vec<Patch>, Error> {
        if new_size < self.size {
            return Err(Error::Shrink { path: self.path.clone(), from: self.size, to: new_size });
        }
        if !new_size.is_multiple_of(SECTOR) {
            return Err(Error::OddSize { size: new_size });
        }
        let partition = self.partition(root);
        let partition = partition.ok_or_else(|| Error::NoPartition { path: self.path.clone(), number: root })?;
        let behind = self.behind(partition);
        if !behind.is_empty() && new_size > self.size {
            let behind = behind.join(", ");
            return Err(Error::NotLast { path: self.path.clone(), number: root, behind });
        }
        match &self.raw {
            Raw::Gpt(gpt) => gpt.grow(new_size / SECTOR, root, behind.is_empty()),
            Raw::Mbr(sector) if behind.is_empty() => mbr::grow(&self.path, sector, root, new_size),
            Raw::Mbr(_) | Raw::None => Ok(Vec::new()),
        }
    }

    /// What begins after the partition, in words.
    fn behind(&self, partition: &Partition) -> Vec<String> {
        let mut others: Vec<_> = self.partitions.iter().filter(|other| other.start > partition.start).collect();
        others.sort_by_key(|other| other.start);
        let words =
            |other: &Partition| format!("partition {} ({}, {} bytes)", other.number, other.filesystem.kind, other.len);
        others.into_iter().map(words).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::ops::Range;
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::disk::testing::{Workshop, cases, fat};
    use crate::disk::{ReadAt, boot_files};
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    /// A disk with a table, an ESP and a root that boots.
    fn bootable() -> Vec<u8> {
        let shop = Workshop::new();
        let disk = shop.gpt(32 * MIB, &["-n15:2048:+8M", "-t15:ef00", "-n1:0:0", "-t1:8304"]);
        fat(&disk, MIB, 8 * MIB, &["EFI/BOOT/BOOTX64.EFI"]);
        let mut kernel = vec![0; 5000];
        kernel[0x202..0x208].copy_from_slice(b"HdrS\x0a\x02");
        let files: [(&str, &[u8]); 3] =
            [("usr/lib/systemd/systemd", b"x"), ("boot/vmlinuz-1", &kernel), ("boot/initrd-1", b"x")];
        shop.ext4(&disk, 9 * MIB, 22 * MIB, &[], &files);
        std::fs::read(disk).unwrap()
    }

    /// A disk of which a few bytes are others: copying all of it for each damage would take longer than looking at it.
    struct Damaged {
        whole: Arc<Vec<u8>>,
        wrong: Vec<(usize, [u8; 4])>,
    }

    impl ReadAt for Damaged {
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            self.whole.read_at(offset, buf)?;
            let offset = usize::try_from(offset).unwrap();
            for (at, byte) in self.wrong.iter().flat_map(|(at, bytes)| (*at..).zip(bytes)) {
                if let Some(read) = at.checked_sub(offset).and_then(|at| buf.get_mut(at)) {
                    *read = *byte;
                }
            }
            Ok(())
        }

        fn size(&self) -> io::Result<u64> {
            self.whole.size()
        }

        fn next_data(&self, from: u64, until: u64) -> io::Result<Option<Range<u64>>> {
            self.whole.next_data(from, until)
        }
    }

    /// One of five places, where in it, and what to write there.
    fn damage() -> impl Strategy<Value = (usize, prop::sample::Index, [u8; 4])> {
        (0_usize..5, any::<prop::sample::Index>(), any::<[u8; 4]>())
    }

    proptest! {
        #![proptest_config(cases(4))]
        /// Damage is an error or a reason, never a panic, an endless loop or a huge allocation.
        #[test]
        fn no_damage_panics(
            damages in proptest::collection::vec(proptest::collection::vec(damage(), 1..5), 64),
        ) {
            // The MBR, the ESP's first sectors, the superblock with its descriptors, the inodes, the backup table.
            let mib = 1 << 20;
            let root = 9 * mib;
            let (superblock, inodes) = (root + 1024..root + 4096, root..root + 400_000);
            let places = [0..1024, mib..mib + 2048, superblock, inodes, 32 * mib - 600..32 * mib - 4];
            let whole = Arc::new(bootable());
            let image = Image::new(Arc::clone(&whole) as Arc<dyn ReadAt>, Path::new("memory")).unwrap();
            let table = Table::read(&image).unwrap();
            prop_assert!(boot_files(&table, &image).unwrap().unwrap().check().unwrap().is_ok());
            for damage in damages {
                let wrong = damage
                    .into_iter()
                    .map(|(place, index, wrong)| (places[place].start + index.index(places[place].len()), wrong))
                    .collect();
                let damaged = Damaged { whole: Arc::clone(&whole), wrong };
                let image = Image::new(Arc::new(damaged), Path::new("memory")).unwrap();
                let Ok(table) = Table::read(&image) else { continue };
                table.find_root(&image).unwrap();
                table.boot_modes(&image).unwrap();
                let _ = boot_files(&table, &image).unwrap().map(|files| files.check().unwrap());
                for partition in &table.partitions {
                    let _ = table.grow(40 * MIB, partition.number);
                }
            }
        }
    }
}
