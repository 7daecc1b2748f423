//! Which filesystem, or what else, lies in a partition: told by magic numbers, as libblkid does.
//!
//! Sources: Linux `Documentation/filesystems/ext4/super.rst`, "XFS Filesystem Structure" (superblock), btrfs
//! on-disk format (superblock), Microsoft's FAT specification (boot sector), `linux/swap.h`, the LVM2 label, the
//! LUKS1 and LUKS2 on-disk formats, ECMA-119.

use super::guid::{dashed, hex};
use super::{Error, Image};
use serde::Serialize;
use std::fmt;

/// The kind of a filesystem or container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FilesystemKind {
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// FAT12, FAT16 or FAT32.
    Vfat,
    /// Swap space.
    Swap,
    /// An LVM2 physical volume.
    Lvm,
    /// A LUKS container: encrypted.
    Luks,
    /// A CD image.
    Iso9660,
    /// Nothing that kiln knows, or nothing at all.
    Unknown,
}

impl fmt::Display for FilesystemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Vfat => "vfat",
            Self::Swap => "swap",
            Self::Lvm => "LVM",
            Self::Luks => "LUKS",
            Self::Iso9660 => "iso9660",
            Self::Unknown => "no known filesystem",
        })
    }
}

/// A filesystem with the names it can be mounted by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Filesystem {
    /// What it is.
    pub kind: FilesystemKind,
    /// As `blkid` spells it: `UUID=` takes it.
    pub uuid: Option<String>,
    /// As `LABEL=` takes it; `None` if empty.
    pub label: Option<String>,
}

impl Filesystem {
    pub(super) fn unknown() -> Self {
        Self { kind: FilesystemKind::Unknown, uuid: None, label: None }
    }
}

/// The first bytes of a partition, in which all magics lie.
struct Head(Vec<u8>);

impl Head {
    const LEN: u64 = 68 << 10;

    fn at(&self, offset: usize, len: usize) -> &[u8] {
        self.0.get(offset..offset + len).unwrap_or_default()
    }

    fn has(&self, offset: usize, magic: &[u8]) -> bool {
        self.at(offset, magic.len()) == magic
    }

    fn found(&self, kind: FilesystemKind, uuid: Option<usize>, label: Option<(usize, usize)>) -> Filesystem {
        let uuid = uuid.and_then(|at| <&[u8; 16]>::try_from(self.at(at, 16)).ok()).filter(|uuid| **uuid != [0; 16]);
        let label = label.and_then(|(at, len)| self.text(at, len));
        Filesystem { kind, uuid: uuid.map(dashed), label }
    }

    /// Text that a NUL or the field's end closes; `None` if nothing is left.
    fn text(&self, at: usize, len: usize) -> Option<String> {
        let bytes = self.at(at, len).split(|byte| *byte == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(bytes).trim_end().to_owned();
        (!text.is_empty()).then_some(text)
    }

    fn vfat(&self) -> Option<Filesystem> {
        if !self.has(510, b"\x55\xaa") {
            return None;
        }
        let (serial, label) = if self.has(82, b"FAT32   ") {
            (67, 71)
        } else if self.has(54, b"FAT12   ") || self.has(54, b"FAT16   ") || self.has(54, b"FAT     ") {
            (39, 43)
        } else {
            return None;
        };
        let mut id = self.at(serial, 4).to_vec();
        id.reverse();
        let id = hex(&id).to_uppercase();
        let label = self.text(label, 11).filter(|label| label != "NO NAME");
        Some(Filesystem { kind: FilesystemKind::Vfat, uuid: Some(format!("{}-{}", &id[..4], &id[4..])), label })
    }

    fn luks(&self) -> Option<Filesystem> {
        self.has(0, b"LUKS\xba\xbe").then(|| Filesystem {
            kind: FilesystemKind::Luks,
            uuid: self.text(168, 40),
            label: None,
        })
    }

    fn filesystem(&self) -> Filesystem {
        use FilesystemKind::{Btrfs, Ext, Iso9660, Lvm, Swap, Xfs};
        const SUPER: usize = 64 << 10;
        if let Some(found) = self.luks().or_else(|| self.vfat()) {
            return found;
        }
        if self.has(0, b"XFSB") {
            return self.found(Xfs, Some(32), Some((108, 12)));
        }
        if self.has(SUPER + 64, b"_BHRfS_M") {
            return self.found(Btrfs, Some(SUPER + 32), Some((SUPER + 299, 256)));
        }
        if self.has(1024 + 56, b"\x53\xef") {
            return self.found(Ext, Some(1024 + 104), Some((1024 + 120, 16)));
        }
        // Swap's magic ends the first page; ARM guests may have pages of 16 or 64 KiB.
        let swap = |page: usize| self.has(page - 10, b"SWAPSPACE2");
        if [4 << 10, 16 << 10, 64 << 10].into_iter().any(swap) {
            return self.found(Swap, Some(1024 + 12), Some((1024 + 28, 16)));
        }
        if (0..4).any(|sector| self.has(sector * 512, b"LABELONE") && self.has(sector * 512 + 24, b"LVM2 001")) {
            return self.found(Lvm, None, None);
        }
        if self.has((32 << 10) + 1, b"CD001") {
            return self.found(Iso9660, None, Some(((32 << 10) + 40, 32)));
        }
        Filesystem::unknown()
    }
}

/// Looks at the `len` bytes from `start` on.
pub(super) fn probe(image: &Image, start: u64, len: u64) -> Result<Filesystem, Error> {
    let len = len.min(image.size().saturating_sub(start)).min(Head::LEN);
    let mut head = vec![0; usize::try_from(len).unwrap_or_default()];
    image.read(start, &mut head)?;
    Ok(Head(head).filesystem())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{memory, tool};

    fn made_by(command: &[&str]) -> Filesystem {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        let mut arguments = command[1..].to_vec();
        let path = file.path().to_str().unwrap();
        arguments.push(path);
        tool(command[0], &arguments);
        let image = Image::raw(file.path()).unwrap();
        probe(&image, 0, image.size()).unwrap()
    }

    const UUID: &str = "0a1b2c3d-1111-2222-3333-44445555aaaa";

    #[test]
    fn ext() {
        let found = made_by(&["mke2fs", "-q", "-t", "ext4", "-U", UUID, "-L", "cloudimg-rootfs"]);
        let label = Some("cloudimg-rootfs".to_owned());
        assert_eq!(found, Filesystem { kind: FilesystemKind::Ext, uuid: Some(UUID.to_owned()), label });
    }

    #[test]
    fn vfat() {
        let found = made_by(&["mkfs.vfat", "-i", "1234ABCD", "-n", "UEFI"]);
        let label = Some("UEFI".to_owned());
        assert_eq!(found, Filesystem { kind: FilesystemKind::Vfat, uuid: Some("1234-ABCD".to_owned()), label });
        assert_eq!(made_by(&["mkfs.vfat", "-F", "32", "-i", "1"]).label, None);
    }

    #[test]
    fn swap() {
        let found = made_by(&["mkswap", "-U", UUID, "-L", "sw"]);
        let label = Some("sw".to_owned());
        assert_eq!(found, Filesystem { kind: FilesystemKind::Swap, uuid: Some(UUID.to_owned()), label });
    }

    #[test]
    fn the_rest_by_their_magic() {
        let at = |offset: usize, magic: &[u8]| {
            let mut bytes = vec![0; 1 << 20];
            bytes[offset..offset + magic.len()].copy_from_slice(magic);
            probe(&memory(bytes), 0, 1 << 20).unwrap().kind
        };
        assert_eq!(at(0, b"XFSB"), FilesystemKind::Xfs);
        assert_eq!(at(0x10040, b"_BHRfS_M"), FilesystemKind::Btrfs);
        assert_eq!(at(0, b"LUKS\xba\xbe"), FilesystemKind::Luks);
        assert_eq!(at(0x8001, b"CD001"), FilesystemKind::Iso9660);
        assert_eq!(at(7, b"nothing"), FilesystemKind::Unknown);
        let mut lvm = vec![0; 4096];
        lvm[512..520].copy_from_slice(b"LABELONE");
        lvm[536..544].copy_from_slice(b"LVM2 001");
        assert_eq!(probe(&memory(lvm), 0, 4096).unwrap().kind, FilesystemKind::Lvm);
        assert_eq!(probe(&memory(vec![0x53; 3]), 0, 3).unwrap().kind, FilesystemKind::Unknown);
    }
}
