//! Which partition holds the root filesystem.

use super::ext::{Ext, Unread};
use super::guid::{LINUX, LVM, ROOT_AARCH64, ROOT_X86_64};
use super::table::{Partition, PartitionKind, Table};
use super::{Error, FilesystemKind, Image};

impl Table {
    /// The partition that holds the root filesystem, by the first of these that finds one:
    ///
    /// 1. the type GUID of the discoverable partitions specification (of several, one that holds an `os-release`);
    /// 2. the ext filesystem that holds `/etc/os-release` or `/usr/lib/os-release`;
    /// 3. the largest XFS or Btrfs filesystem;
    /// 4. the largest partition for Linux whose content kiln does not know, LVM and LUKS among them.
    ///
    /// # Errors
    /// [`Error::Read`]. A damaged filesystem is no error: it holds no `os-release`.
    pub fn find_root(&self, image: &Image) -> Result<Option<&Partition>, Error> {
        let typed: Vec<_> = self.partitions.iter().filter(|p| p.is(ROOT_X86_64) || p.is(ROOT_AARCH64)).collect();
        if let [only] = typed[..] {
            return Ok(Some(only));
        }
        for partition in typed.iter().copied().chain(&self.partitions) {
            if partition.filesystem.kind == FilesystemKind::Ext && has_os_release(image, partition)? {
                return Ok(Some(partition));
            }
        }
        if let Some(first) = typed.first() {
            return Ok(Some(first));
        }
        let largest = |wanted: &dyn Fn(&Partition) -> bool| {
            self.partitions.iter().filter(|partition| wanted(partition)).max_by_key(|partition| partition.len)
        };
        let foreign = |p: &Partition| matches!(p.filesystem.kind, FilesystemKind::Xfs | FilesystemKind::Btrfs);
        Ok(largest(&foreign).or_else(|| largest(&is_opaque_linux)))
    }
}

fn has_os_release(image: &Image, partition: &Partition) -> Result<bool, Error> {
    let paths = ["/etc/os-release", "/usr/lib/os-release"].map(str::to_owned);
    match Ext::open(image, partition).and_then(|ext| ext.first_file(paths)) {
        Ok(path) => Ok(path.is_some()),
        Err(Unread::Filesystem(_)) => Ok(false),
        Err(Unread::Fault(error)) => Err(error),
    }
}

/// A partition that its table gives to Linux, and whose content kiln does not read.
fn is_opaque_linux(partition: &Partition) -> bool {
    let linux = match partition.kind {
        PartitionKind::Gpt(guid) => guid == LINUX || guid == LVM,
        PartitionKind::Mbr(kind) => matches!(kind, 0x83 | 0x8E),
        PartitionKind::Whole => true,
    };
    linux && matches!(partition.filesystem.kind, FilesystemKind::Unknown | FilesystemKind::Lvm | FilesystemKind::Luks)
}

#[cfg(test)]
mod tests {
    use crate::disk::testing::{Workshop, poke, text, tool};
    use crate::disk::{Image, Table};
    use std::path::Path;

    const MIB: u64 = 1 << 20;

    fn root(disk: &Path) -> Option<u32> {
        let image = Image::raw(disk).unwrap();
        Table::read(&image).unwrap().find_root(&image).unwrap().map(|partition| partition.number)
    }

    #[test]
    fn by_type_then_by_content_then_by_size() {
        let shop = Workshop::new();
        let disk = shop.gpt(64 * MIB, &["-n1:0:+8M", "-n2:0:+8M", "-n3:0:+16M", "-n4:0:0", "-t4:8200"]);
        assert_eq!(root(&disk), Some(3), "the largest for Linux; swap is not for Linux");
        poke(&disk, MIB, b"XFSB");
        assert_eq!(root(&disk), Some(1), "the only filesystem that can be a root");
        shop.ext4(&disk, 17 * MIB, 16 * MIB, &[], &[("data", b"x")]);
        assert_eq!(root(&disk), Some(1), "an ext filesystem without a system");
        shop.ext4(
            &disk,
            9 * MIB,
            8 * MIB,
            &[],
            &[("usr/lib/os-release", b"x"), ("etc/os-release", b"->../usr/lib/os-release")],
        );
        assert_eq!(root(&disk), Some(2), "an ext filesystem with a system");
        tool("sgdisk", &["-t3:8304", text(&disk)]);
        assert_eq!(root(&disk), Some(3), "the type goes first");
        tool("sgdisk", &["-t2:8304", text(&disk)]);
        assert_eq!(root(&disk), Some(2), "of two with the type, the one with a system");
    }

    #[test]
    fn no_root_at_all() {
        let shop = Workshop::new();
        assert_eq!(root(&shop.gpt(8 * MIB, &["-n1:0:0", "-t1:ef00"])), None);
    }

    #[test]
    fn a_whole_disk_is_its_own_root() {
        let shop = Workshop::new();
        let disk = shop.path("disk.raw");
        std::fs::File::create(&disk).unwrap().set_len(8 * MIB).unwrap();
        shop.ext4(&disk, 0, 8 * MIB, &[], &[("etc/os-release", b"x")]);
        assert_eq!(root(&disk), Some(0));
    }
}
