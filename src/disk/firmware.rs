//! Which firmware can start a disk, and which processor it is for.

use super::ext::Unread;
use super::guid::{BIOS_BOOT, ESP, ROOT_AARCH64, ROOT_X86_64};
use super::table::{Partition, PartitionKind, Scheme, Table};
use super::{Error, FilesystemKind, Image, boot};
use serde::Serialize;
use std::fmt;
use std::io::{self, Read, Seek, SeekFrom, Write};

/// A processor architecture, by the name Linux gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// 64-bit x86.
    #[serde(rename = "x86_64")]
    X86_64,
    /// 64-bit ARM.
    Aarch64,
}

impl Arch {
    /// The name: `x86_64` or `aarch64`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// Where UEFI looks on a disk that it has no boot entry for (UEFI 2.10, 3.5.1.1).
    fn loader(self) -> &'static str {
        match self {
            Self::X86_64 => "EFI/BOOT/BOOTX64.EFI",
            Self::Aarch64 => "EFI/BOOT/BOOTAA64.EFI",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a disk can be started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BootModes {
    /// By a BIOS: boot code in the MBR, and a place it continues at.
    pub legacy_bios: bool,
    /// By UEFI: the architectures for which the EFI system partition has a fallback loader.
    pub uefi: Vec<Arch>,
}

impl Table {
    /// Which firmware can start the disk, as far as the disk shows it.
    ///
    /// # Errors
    /// [`Error::Read`]. A damaged EFI system partition is no error: it has no loader.
    pub fn boot_modes(&self, image: &Image) -> Result<BootModes, Error> {
        let mut modes = BootModes { legacy_bios: self.legacy_bios(image)?, uefi: Vec::new() };
        for partition in self.partitions.iter().filter(|partition| is_esp(partition)) {
            for arch in [Arch::X86_64, Arch::Aarch64] {
                if !modes.uefi.contains(&arch) && has_file(image, partition, arch.loader())? {
                    modes.uefi.push(arch);
                }
            }
        }
        Ok(modes)
    }

    /// Which architecture the disk is for: by the root partition's type GUID, else by the only fallback loader on the
    /// EFI system partition, else by the header of the kernel or of systemd. `None` if nothing tells.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn arch(&self, image: &Image) -> Result<Option<Arch>, Error> {
        for (guid, arch) in [(ROOT_X86_64, Arch::X86_64), (ROOT_AARCH64, Arch::Aarch64)] {
            if self.partitions.iter().any(|partition| partition.is(guid)) {
                return Ok(Some(arch));
            }
        }
        if let [arch] = self.boot_modes(image)?.uefi[..] {
            return Ok(Some(arch));
        }
        boot::arch(self, image)
    }

    /// Boot code in the MBR, which goes on with: GRUB in a BIOS boot partition (GPT); GRUB in the gap behind the MBR;
    /// or the boot sector of the active partition.
    fn legacy_bios(&self, image: &Image) -> Result<bool, Error> {
        let mut sector = [0; 512];
        image.read(0, &mut sector)?;
        let code = &sector[..440];
        if self.scheme == Scheme::None || sector[510..] != [0x55, 0xAA] || code.iter().all(|byte| *byte == 0) {
            return Ok(false);
        }
        let grub = code.windows(4).any(|window| window == b"GRUB");
        for partition in &self.partitions {
            let mut first = [0; 512];
            image.read(partition.start, &mut first)?;
            let loaded = partition.is(BIOS_BOOT) && first.iter().any(|byte| *byte != 0);
            if loaded || (partition.active && first[510..] == [0x55, 0xAA]) {
                return Ok(true);
            }
        }
        Ok(grub && self.scheme == Scheme::Mbr)
    }
}

fn is_esp(partition: &Partition) -> bool {
    partition.filesystem.kind == FilesystemKind::Vfat
        && (partition.is(ESP) || partition.kind == PartitionKind::Mbr(0xEF))
}

/// Whether a FAT filesystem has the file. What cannot be read as FAT has no files.
fn has_file(image: &Image, partition: &Partition, path: &str) -> Result<bool, Error> {
    let window = Window { image: image.clone(), start: partition.start, len: partition.len, at: 0, budget: 64 << 20 };
    let opened = fatfs::FileSystem::new(window, fatfs::FsOptions::new())
        .and_then(|fs| fs.root_dir().open_file(path).map(|_| ()));
    match opened {
        Ok(()) => Ok(true),
        Err(error) => match error.downcast::<Error>() {
            Ok(fault) => Err(fault),
            Err(_) => Ok(false),
        },
    }
}

/// A read-only view of a partition with a limit to what may be read in all: on a damaged filesystem a chain of
/// clusters can be a circle.
struct Window {
    image: Image,
    start: u64,
    len: u64,
    at: u64,
    budget: usize,
}

impl Read for Window {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let len = buf.len().min(left);
        if len == 0 {
            return Ok(0);
        }
        self.budget =
            self.budget.checked_sub(len).ok_or_else(|| io::Error::other("the chain of clusters is a circle"))?;
        self.image.read(self.start + self.at, &mut buf[..len]).map_err(io::Error::other)?;
        self.at += len as u64;
        Ok(len)
    }
}

/// `fatfs` asks for a writer even to read; nothing is ever written.
impl Write for Window {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Window {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// The architecture of a Linux kernel, by its first bytes. Sources: Linux `Documentation/arch/x86/boot.rst` (magic at
/// 0x202, 64-bit flag at 0x236), `Documentation/arch/arm64/booting.rst` (magic at 0x38), and for kernels that are
/// also EFI programs, compressed ones among them, the machine field of the PE header.
pub(super) fn kernel_arch(head: &[u8]) -> Option<Arch> {
    let u16_at = |at: usize| Some(u16::from_le_bytes([*head.get(at)?, *head.get(at + 1)?]));
    if head.get(0x202..0x206) == Some(b"HdrS") {
        let wide = u16_at(0x206)? < 0x020C || u16_at(0x236)? & 1 != 0;
        return wide.then_some(Arch::X86_64);
    }
    if head.get(0x38..0x3C) == Some(b"ARM\x64") {
        return Some(Arch::Aarch64);
    }
    let pe = usize::from(u16_at(0x3C)?);
    if head.starts_with(b"MZ") && head.get(pe..pe + 4) == Some(b"PE\0\0") {
        return match u16_at(pe + 4)? {
            0x8664 => Some(Arch::X86_64),
            0xAA64 => Some(Arch::Aarch64),
            _ => None,
        };
    }
    elf_arch(head)
}

/// The architecture of an ELF program, by its machine field.
pub(super) fn elf_arch(head: &[u8]) -> Option<Arch> {
    match (head.get(..4)?, head.get(18..20)?) {
        (b"\x7fELF", [0x3E, 0]) => Some(Arch::X86_64),
        (b"\x7fELF", [0xB7, 0]) => Some(Arch::Aarch64),
        _ => None,
    }
}

/// Turns "the filesystem is unreadable" into "nothing found"; a fault of the disk stays one.
pub(super) fn faults_only<T>(result: Result<T, Unread>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Unread::Filesystem(_)) => Ok(None),
        Err(Unread::Fault(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{Workshop, fat, poke};
    use std::path::Path;

    const MIB: u64 = 1 << 20;

    fn modes(disk: &Path) -> (BootModes, Option<Arch>) {
        let image = Image::raw(disk).unwrap();
        let table = Table::read(&image).unwrap();
        (table.boot_modes(&image).unwrap(), table.arch(&image).unwrap())
    }

    fn bios_and_esp(shop: &Workshop) -> std::path::PathBuf {
        shop.gpt(64 * MIB, &["-n14:2048:+1M", "-t14:ef02", "-n15:0:+16M", "-t15:ef00", "-n1:0:0", "-t1:8300"])
    }

    #[test]
    fn uefi_by_its_fallback_loader() {
        let shop = Workshop::new();
        let disk = bios_and_esp(&shop);
        assert_eq!(modes(&disk), (BootModes::default(), None));
        fat(&disk, 2 * MIB, 16 * MIB, &["EFI/debian/grubx64.efi"]);
        assert_eq!(modes(&disk), (BootModes::default(), None));
        fat(&disk, 2 * MIB, 16 * MIB, &["EFI/boot/bootaa64.efi"]);
        assert_eq!(modes(&disk), (BootModes { legacy_bios: false, uefi: vec![Arch::Aarch64] }, Some(Arch::Aarch64)));
        fat(&disk, 2 * MIB, 16 * MIB, &["EFI/BOOT/BOOTX64.EFI", "EFI/BOOT/BOOTAA64.EFI"]);
        assert_eq!(modes(&disk).0.uefi, [Arch::X86_64, Arch::Aarch64]);
        assert_eq!(modes(&disk).1, None);
    }

    #[test]
    fn a_damaged_esp_has_no_loader() {
        let shop = Workshop::new();
        let disk = bios_and_esp(&shop);
        fat(&disk, 2 * MIB, 16 * MIB, &["EFI/BOOT/BOOTX64.EFI"]);
        for at in [11, 13, 14, 16, 17, 19, 22, 36] {
            fat(&disk, 2 * MIB, 16 * MIB, &["EFI/BOOT/BOOTX64.EFI"]);
            poke(&disk, 2 * MIB + at, &[0xFF, 0xFF]);
            modes(&disk);
            poke(&disk, 2 * MIB + at, &[0, 0]);
            modes(&disk);
        }
    }

    #[test]
    fn bios_needs_code_and_a_place_to_go_on() {
        let shop = Workshop::new();
        let disk = bios_and_esp(&shop);
        poke(&disk, 0, b"\xeb\x63\x90");
        assert!(!modes(&disk).0.legacy_bios);
        poke(&disk, MIB, b"\x52\xbf");
        assert!(modes(&disk).0.legacy_bios);
        poke(&disk, 0, &[0; 440]);
        assert!(!modes(&disk).0.legacy_bios);
    }

    #[test]
    fn bios_with_an_mbr() {
        let shop = Workshop::new();
        let disk = shop.path("disk.raw");
        let mut bytes = vec![0; 4 << 20];
        bytes[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0]);
        bytes[510..512].copy_from_slice(&[0x55, 0xAA]);
        bytes[..2].copy_from_slice(b"\xfa\x31");
        std::fs::write(&disk, &bytes).unwrap();
        assert!(!modes(&disk).0.legacy_bios);
        poke(&disk, 446, &[0x80]);
        assert!(!modes(&disk).0.legacy_bios);
        poke(&disk, MIB + 510, &[0x55, 0xAA]);
        assert!(modes(&disk).0.legacy_bios);
        poke(&disk, 446, &[0]);
        assert!(!modes(&disk).0.legacy_bios);
        poke(&disk, 0x180, b"GRUB ");
        assert!(modes(&disk).0.legacy_bios);
    }

    #[test]
    fn the_root_type_tells_the_architecture() {
        let shop = Workshop::new();
        assert_eq!(modes(&shop.gpt(8 * MIB, &["-n1:0:0", "-t1:8305"])).1, Some(Arch::Aarch64));
        std::fs::remove_file(shop.path("disk.raw")).unwrap();
        assert_eq!(modes(&shop.gpt(8 * MIB, &["-n1:0:0", "-t1:8304"])).1, Some(Arch::X86_64));
    }

    #[test]
    fn kernels_and_programs() {
        let with = |pieces: &[(usize, &[u8])]| {
            let mut head = vec![0; 4096];
            for (at, bytes) in pieces {
                head[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            kernel_arch(&head)
        };
        let pe = |machine| with(&[(0, b"MZ"), (0x3C, &[0x80, 0]), (0x80, b"PE\0\0"), (0x84, machine)]);
        assert_eq!(with(&[(0x202, b"HdrS\x0f\x02"), (0x236, &[0x3F, 0])]), Some(Arch::X86_64));
        assert_eq!(with(&[(0x202, b"HdrS\x0f\x02")]), None, "32 bits");
        assert_eq!(with(&[(0x202, b"HdrS\x0a\x02")]), Some(Arch::X86_64), "too old to say");
        assert_eq!(with(&[(0x38, b"ARM\x64")]), Some(Arch::Aarch64));
        assert_eq!(pe(&[0x64, 0xAA]), Some(Arch::Aarch64));
        assert_eq!(pe(&[0x64, 0x86]), Some(Arch::X86_64));
        assert_eq!(pe(&[0x64, 0x50]), None, "RISC-V");
        assert_eq!(with(&[(0, b"\x7fELF"), (18, &[0xB7, 0])]), Some(Arch::Aarch64));
        assert_eq!(kernel_arch(b""), None);
        assert_eq!(kernel_arch(b"MZ"), None);
    }
}
