//! Kernel and initrd, read out of a disk: what QEMU needs to boot it directly.

use super::ext::{Ext, GuestFile, Unread};
use super::firmware::{elf_arch, faults_only, kernel_arch};
use super::guid::XBOOTLDR;
use super::table::{Partition, Table};
use super::{Arch, Error, FilesystemKind, Image, fstab, version};
use std::fmt;

/// No kernel is larger, in bytes.
const KERNEL_LIMIT: u64 = 256 << 20;
/// No initrd is larger, in bytes.
const INITRD_LIMIT: u64 = 1 << 30;
/// The fstab's share of our memory, in bytes.
const FSTAB_LIMIT: u64 = 1 << 20;

/// What a direct boot needs.
#[derive(Clone)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: GuestFile,
    /// The initrd that belongs to it, if the disk has one.
    pub initrd: Option<GuestFile>,
    /// The kernel's version, as its file's name says it; empty if the name says none.
    pub version: String,
    /// The value of the kernel's `root=`: `UUID=…`; without an initrd `PARTUUID=…`, as a kernel alone knows no UUIDs.
    pub root: String,
    /// The root filesystem, of which kiln read that it has systemd.
    pub filesystem: FilesystemKind,
    /// What the kernel runs on.
    pub arch: Arch,
    /// Where the kernel was found, as a path in the guest.
    pub kernel_path: String,
    /// Where the initrd was found, as a path in the guest.
    pub initrd_path: Option<String>,
    /// Of the filesystem that both are in.
    mount_point: &'static str,
}

impl fmt::Debug for BootFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BootFiles")
            .field("kernel_path", &self.kernel_path)
            .field("initrd_path", &self.initrd_path)
            .field("root", &self.root)
            .field("arch", &self.arch)
            .finish_non_exhaustive()
    }
}

impl BootFiles {
    /// Reads both files to see that this can be done.
    ///
    /// # Errors
    /// As [`boot_files`].
    pub fn check(&self) -> Result<Result<(), WhyNot>, Error> {
        let mount_point = self.mount_point;
        let mut files = [Some(&self.kernel), self.initrd.as_ref()].into_iter().flatten();
        match files.try_for_each(GuestFile::check) {
            Ok(()) => Ok(Ok(())),
            Err(Unread::Fault(error)) => Err(error),
            Err(Unread::Filesystem(reason)) => Ok(Err(WhyNot::Unreadable { mount_point, reason })),
        }
    }
}

/// Why a disk cannot be booted directly. No fault: such a disk is booted by its firmware.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WhyNot {
    /// No partition looks like a root.
    #[error("no root filesystem was found")]
    NoRoot,
    /// The root or `/boot` is encrypted.
    #[error("{mount_point} is encrypted (LUKS)")]
    Encrypted {
        /// `/` or `/boot`.
        mount_point: &'static str,
    },
    /// The root or `/boot` is on a filesystem that kiln does not read.
    #[error("{mount_point} is on {kind}, which kiln cannot read")]
    Filesystem {
        /// `/` or `/boot`.
        mount_point: &'static str,
        /// What it is on.
        kind: FilesystemKind,
    },
    /// The filesystem is damaged or uses a feature that kiln does not know.
    #[error("the filesystem of {mount_point} cannot be read: {reason}")]
    Unreadable {
        /// `/` or `/boot`.
        mount_point: &'static str,
        /// In words.
        reason: String,
    },
    /// `/boot` is not on this disk.
    #[error("/boot is on {device}, which is not on this disk")]
    BootElsewhere {
        /// As `/etc/fstab` has it.
        device: String,
    },
    /// There is no kernel where one is looked for.
    #[error("no kernel was found in /boot")]
    NoKernel,
    /// A kernel for another processor, or not a kernel.
    #[error("{path} is a kernel for neither x86_64 nor aarch64")]
    ForeignKernel {
        /// Its path in the guest.
        path: String,
    },
    /// The guest has no systemd, which would start kiln's agent.
    #[error("the disk has no systemd")]
    NoSystemd,
}

/// Ends the search: one of the two ways that [`boot_files`] can end without files.
enum Stop {
    Why(WhyNot),
    Fault(Error),
}

impl Stop {
    fn at(mount_point: &'static str) -> impl Fn(Unread) -> Self {
        move |unread| match unread {
            Unread::Fault(error) => Self::Fault(error),
            Unread::Filesystem(reason) => Self::Why(WhyNot::Unreadable { mount_point, reason }),
        }
    }
}

impl From<WhyNot> for Stop {
    fn from(why: WhyNot) -> Self {
        Self::Why(why)
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Fault(error)
    }
}

/// Where everything lies, before the large files are read.
struct Found<'a> {
    root: &'a Partition,
    boot: Ext,
    /// Where `boot` is mounted: "" or "/boot".
    mounted: &'static str,
    kernel: String,
    initrd: Option<String>,
    version: String,
    arch: Arch,
}

/// Finds the kernel that the boot loader would start, and its initrd.
///
/// They come from the root filesystem, or from the partition that the root's `/etc/fstab` mounts on `/boot`. Of
/// several kernels, the newest by `sort -V`, as GRUB's menu generator orders them, but no rescue kernels and leftovers.
/// Symbolic links are followed inside their filesystem. Nothing is mounted; root is not needed.
///
/// # Errors
/// The outer result: [`Error::Read`]. The inner one says why the disk offers no direct boot.
pub fn boot_files(table: &Table, image: &Image) -> Result<Result<BootFiles, WhyNot>, Error> {
    match find(table, image).and_then(|found| load(&found)) {
        Ok(files) => Ok(Ok(files)),
        Err(Stop::Why(why)) => Ok(Err(why)),
        Err(Stop::Fault(error)) => Err(error),
    }
}

/// The architecture that the kernel, or else a program of the root filesystem, is for.
pub(super) fn arch(table: &Table, image: &Image) -> Result<Option<Arch>, Error> {
    match find(table, image) {
        Ok(found) => return Ok(Some(found.arch)),
        Err(Stop::Fault(error)) => return Err(error),
        Err(Stop::Why(_)) => {}
    }
    match table.find_root(image)? {
        Some(root) if root.filesystem.kind == FilesystemKind::Ext => {
            let arch = Ext::open(image, root).and_then(|ext| program_arch(&ext, PROGRAMS));
            Ok(faults_only(arch)?.flatten())
        }
        _ => Ok(None),
    }
}

/// A file of the root filesystem, of at most `limit` bytes, with symbolic links followed; `None` if there is none, or
/// kiln can't read that filesystem.
///
/// # Errors
/// [`Error::Read`].
pub fn root_file(table: &Table, image: &Image, path: &str, limit: u64) -> Result<Option<Vec<u8>>, Error> {
    match table.find_root(image)? {
        Some(root) if root.filesystem.kind == FilesystemKind::Ext => {
            let file = Ext::open(image, root).and_then(|ext| ext.read(path, limit));
            Ok(faults_only(file)?.flatten())
        }
        _ => Ok(None),
    }
}

const SYSTEMD: &[&str] = &["/lib/systemd/systemd", "/usr/lib/systemd/systemd"];
const PROGRAMS: &[&str] = &["/usr/lib/systemd/systemd", "/bin/sh", "/usr/bin/env", "/sbin/init"];

fn program_arch(ext: &Ext, paths: &[&str]) -> Result<Option<Arch>, Unread> {
    let path = ext.first_file(paths.iter().copied().map(str::to_owned))?;
    Ok(path.map(|path| ext.head(&path, 64)).transpose()?.and_then(|head| elf_arch(&head)))
}

fn find<'a>(table: &'a Table, image: &Image) -> Result<Found<'a>, Stop> {
    let root = table.find_root(image)?.ok_or(WhyNot::NoRoot)?;
    let ext = open(image, root, "/")?;
    let at_root = Stop::at("/");
    if ext.first_file(SYSTEMD.iter().copied().map(str::to_owned)).map_err(&at_root)?.is_none() {
        return Err(WhyNot::NoSystemd.into());
    }
    let (boot, mounted, mount_point) = match boot_partition(table, &ext)? {
        Some(partition) => (open(image, partition, "/boot")?, "/boot", "/boot"),
        None => (ext.clone(), "", "/"),
    };
    let directory = if mounted.is_empty() { "/boot" } else { "" };
    let unread = Stop::at(mount_point);
    let kernel = kernel(&boot, directory).map_err(&unread)?.ok_or(WhyNot::NoKernel)?;
    let version = kernel_version(&boot.real(&kernel).map_err(&unread)?);
    let initrd = initrd(&boot, &kernel, &version).map_err(&unread)?;
    let head = boot.head(&kernel, 4096).map_err(&unread)?;
    // A compressed ARM kernel hides its header; the guest's own programs tell.
    let arch = match kernel_arch(&head) {
        None if head.starts_with(b"\x1f\x8b") => program_arch(&ext, SYSTEMD).map_err(&at_root)?,
        arch => arch,
    };
    let arch = arch.ok_or_else(|| WhyNot::ForeignKernel { path: format!("{mounted}{kernel}") })?;
    Ok(Found { root, boot, mounted, kernel, initrd, version, arch })
}

fn open(image: &Image, partition: &Partition, mount_point: &'static str) -> Result<Ext, Stop> {
    match partition.filesystem.kind {
        FilesystemKind::Ext => Ext::open(image, partition).map_err(Stop::at(mount_point)),
        FilesystemKind::Luks => Err(WhyNot::Encrypted { mount_point }.into()),
        kind => Err(WhyNot::Filesystem { mount_point, kind }.into()),
    }
}

/// The partition that the guest mounts on `/boot`: as its fstab says; else, if the root has no kernel, the extended
/// boot loader partition, as systemd does. `None`: `/boot` is a directory of the root.
fn boot_partition<'a>(table: &'a Table, root: &Ext) -> Result<Option<&'a Partition>, Stop> {
    let text = root.read("/etc/fstab", FSTAB_LIMIT).map_err(Stop::at("/"))?.unwrap_or_default();
    match fstab::source_of(&String::from_utf8_lossy(&text), "/boot") {
        Some(device) => match fstab::resolve(table, &device) {
            Some(partition) => Ok(Some(partition)),
            None => Err(WhyNot::BootElsewhere { device }.into()),
        },
        None if kernel(root, "/boot").map_err(Stop::at("/"))?.is_some() => Ok(None),
        None => Ok(table.partitions.iter().find(|partition| partition.is(XBOOTLDR))),
    }
}

/// The kernel's path inside the filesystem that holds `/boot`, which is `directory` there.
fn kernel(boot: &Ext, directory: &str) -> Result<Option<String>, Unread> {
    let mut names = boot.names(&format!("{directory}/"))?;
    names.retain(|name| is_kernel(name));
    names.sort_by(|a, b| version::compare(b, a));
    let versioned = names.into_iter().map(|name| format!("{directory}/{name}"));
    boot.first_file(versioned.chain([format!("{directory}/vmlinuz"), "/vmlinuz".to_owned()]))
}

/// As GRUB's menu generator tells kernels from what package managers leave behind.
fn is_kernel(name: &str) -> bool {
    let leftover = [".old", ".bak", ".sig", ".hmac", ".rpmsave", ".rpmnew"].iter().any(|end| name.ends_with(end));
    name.strip_prefix("vmlinuz-").is_some_and(|version| !version.is_empty() && !version.contains("-rescue"))
        && !leftover
        && !name.contains(".dpkg-")
}

/// The version in the real path of a kernel: `/boot/vmlinuz-V` or `/usr/lib/modules/V/vmlinuz`.
fn kernel_version(real: &str) -> String {
    let mut parts = real.rsplit('/');
    let name = parts.next().unwrap_or_default();
    let modules = parts.next().zip(parts.next()).filter(|(_, parent)| *parent == "modules");
    let version = name.strip_prefix("vmlinuz-").or(modules.map(|(version, _)| version));
    version.unwrap_or_default().to_owned()
}

/// The initrd next to the kernel, under the names that GRUB's menu generator tries.
fn initrd(boot: &Ext, kernel: &str, version: &str) -> Result<Option<String>, Unread> {
    let directory = kernel.rsplit_once('/').map_or("", |(directory, _)| directory);
    let names = if kernel.ends_with("/vmlinuz") {
        ["initrd.img", "initrd", "initramfs.img"].map(str::to_owned).to_vec()
    } else {
        vec![]
    };
    let versioned = [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}.img"),
        format!("initrd-{version}"),
        format!("initramfs-{version}"),
    ];
    boot.first_file(versioned.into_iter().chain(names).map(|name| format!("{directory}/{name}")))
}

fn load(found: &Found) -> Result<BootFiles, Stop> {
    let mount_point = if found.mounted.is_empty() { "/" } else { "/boot" };
    let unread = Stop::at(mount_point);
    let kernel = found.boot.file(&found.kernel, KERNEL_LIMIT).map_err(&unread)?;
    let initrd = found.initrd.as_ref().map(|path| found.boot.file(path, INITRD_LIMIT));
    let initrd = initrd.transpose().map_err(&unread)?;
    let guest_path = |path: &String| format!("{}{path}", found.mounted);
    Ok(BootFiles {
        root: root_argument(found.root, initrd.is_some()),
        kernel,
        initrd,
        version: found.version.clone(),
        filesystem: found.root.filesystem.kind,
        arch: found.arch,
        kernel_path: guest_path(&found.kernel),
        initrd_path: found.initrd.as_ref().map(guest_path),
        mount_point,
    })
}

/// Linux `Documentation/admin-guide/kernel-parameters.txt`: without an initrd `root=` knows `PARTUUID=` and devices.
fn root_argument(root: &Partition, initrd: bool) -> String {
    match (&root.filesystem.uuid, &root.uuid) {
        (Some(uuid), _) if initrd => format!("UUID={uuid}"),
        (_, Some(partuuid)) => format!("PARTUUID={partuuid}"),
        _ => "/dev/vda".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{Workshop, poke};
    use std::path::PathBuf;

    const MIB: u64 = 1 << 20;
    const ROOT: &str = "828d7646-7bd8-4f82-8100-a14e73b3661c";
    const BOOT: &str = "0b0b0b0b-7bd8-4f82-8100-a14e73b3661c";

    /// A bzImage as far as its header goes, marked with a byte.
    fn bzimage(mark: u8) -> Vec<u8> {
        let mut kernel = vec![mark; 9000];
        kernel[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        kernel[0x236..0x238].copy_from_slice(&[0x3F, 0]);
        kernel
    }

    const SYSTEM: [(&str, &[u8]); 3] =
        [("usr/lib/systemd/systemd", b"\x7fELF"), ("lib", b"->usr/lib"), ("etc/os-release", b"ID=debian\n")];

    struct Guest {
        shop: Workshop,
        disk: PathBuf,
    }

    /// Two partitions of 20 MiB: 1 is the root with these files, 2 is for `/boot`.
    fn guest(root: &[(&str, &[u8])]) -> Guest {
        let shop = Workshop::new();
        let disk = shop.gpt(64 * MIB, &["-n1:0:+20M", "-t1:8304", "-n2:0:+20M", "-c2:bootpart", "-t2:8300"]);
        let files: Vec<_> = SYSTEM.iter().chain(root).copied().collect();
        shop.ext4(&disk, MIB, 20 * MIB, &["-U", ROOT, "-L", "root"], &files);
        Guest { shop, disk }
    }

    impl Guest {
        fn boot(&self) -> Result<BootFiles, WhyNot> {
            let image = Image::raw(&self.disk).unwrap();
            let files = boot_files(&Table::read(&image).unwrap(), &image).unwrap()?;
            files.check().unwrap().map(|()| files)
        }

        /// What a file that was found holds.
        fn content(&self, file: &GuestFile) -> Vec<u8> {
            let copy = self.shop.path("copy");
            file.copy_to(&copy).unwrap();
            std::fs::read(copy).unwrap()
        }

        fn with_boot(self, files: &[(&str, &[u8])]) -> Self {
            self.shop.ext4(&self.disk, 21 * MIB, 20 * MIB, &["-U", BOOT, "-L", "my boot"], files);
            self
        }
    }

    #[test]
    fn the_newest_of_many() {
        let (old, new) = (bzimage(1), bzimage(2));
        let guest = guest(&[
            ("boot/vmlinuz-6.1.0-9-cloud-amd64", &old),
            ("boot/vmlinuz-6.1.0-18-cloud-amd64", &new),
            ("boot/vmlinuz-6.1.0-19-cloud-amd64.old", &old),
            ("boot/vmlinuz-6.1.0-20-cloud-amd64.dpkg-tmp", &old),
            ("boot/vmlinuz-7-rescue-abc", &old),
            ("boot/vmlinuz-9.9-broken", b"->nowhere"),
            ("boot/vmlinuz-9.9-circle", b"->vmlinuz-9.9-circle"),
            ("boot/initrd.img-6.1.0-9-cloud-amd64", b"old"),
            ("boot/initrd.img-6.1.0-18-cloud-amd64", b"new"),
        ]);
        let files = guest.boot().unwrap();
        assert_eq!((guest.content(&files.kernel), guest.content(&files.initrd.unwrap())), (new, b"new".to_vec()));
        assert_eq!((files.version.as_str(), files.root), ("6.1.0-18-cloud-amd64", format!("UUID={ROOT}")));
        assert_eq!((files.filesystem, files.arch), (FilesystemKind::Ext, Arch::X86_64));
        assert_eq!(files.kernel_path, "/boot/vmlinuz-6.1.0-18-cloud-amd64");
        assert_eq!(files.initrd_path.as_deref(), Some("/boot/initrd.img-6.1.0-18-cloud-amd64"));
    }

    #[test]
    fn a_boot_partition_by_any_name() {
        let kernel = bzimage(3);
        let partuuid = |guest: &Guest| {
            let table = Table::read(&Image::raw(&guest.disk).unwrap()).unwrap();
            format!("PARTUUID={}", table.partition(2).unwrap().uuid.clone().unwrap().to_uppercase())
        };
        let stale = bzimage(9);
        let files: [(&str, &[u8]); 2] =
            [("vmlinuz-5.14.0-70.el9.x86_64", &kernel), ("initramfs-5.14.0-70.el9.x86_64.img", b"ramfs")];
        let names = [
            format!("UUID={BOOT}"),
            format!("UUID=\"{}\"", BOOT.to_uppercase()),
            "LABEL=my\\040boot".to_owned(),
            "PARTLABEL=bootpart".to_owned(),
            "/dev/nvme0n1p2".to_owned(),
            "/dev/xvda2".to_owned(),
            format!("/dev/disk/by-uuid/{BOOT}"),
            "PARTUUID".to_owned(),
        ];
        let found_by = |name: String| {
            let guest = guest(&[]);
            let name = if name == "PARTUUID" { partuuid(&guest) } else { name };
            let fstab = format!("UUID={ROOT} / ext4 rw 0 1\n{name} /boot ext4 rw 0 2\n");
            let tree: Vec<(&str, &[u8])> =
                SYSTEM.into_iter().chain([("etc/fstab", fstab.as_bytes()), ("boot/vmlinuz-9", &stale[..])]).collect();
            guest.shop.ext4(&guest.disk, MIB, 20 * MIB, &["-U", ROOT], &tree);
            let guest = guest.with_boot(&files);
            let found = guest.boot().unwrap_or_else(|why| panic!("{name}: {why}"));
            assert_eq!(guest.content(&found.kernel), kernel, "{name}");
            assert_eq!(guest.content(found.initrd.as_ref().unwrap()), b"ramfs", "{name}");
            assert_eq!(found.kernel_path, "/boot/vmlinuz-5.14.0-70.el9.x86_64");
            assert_eq!(found.root, format!("UUID={ROOT}"));
        };
        // sgdisk sleeps for a second whenever it writes.
        std::thread::scope(|scope| {
            for name in names {
                scope.spawn(|| found_by(name));
            }
        });
    }

    #[test]
    fn boot_on_another_disk() {
        let why = guest(&[("etc/fstab", b"LABEL=elsewhere /boot ext4")]).boot().unwrap_err();
        assert_eq!(why.to_string(), "/boot is on LABEL=elsewhere, which is not on this disk");
        let why = guest(&[("etc/fstab", b"/dev/vda2 /boot ext4")]).boot().unwrap_err();
        assert_eq!(why.to_string(), "/boot is on no known filesystem, which kiln cannot read");
    }

    #[test]
    fn symbolic_links_without_versions() {
        let kernel = bzimage(4);
        let guest = guest(&[
            ("vmlinuz", b"->usr/lib/modules/6.9.1-arch/vmlinuz"),
            ("usr/lib/modules/6.9.1-arch/vmlinuz", &kernel),
            ("initrd.img", b"->boot/ramdisk"),
            ("boot/ramdisk", b"ram"),
        ]);
        let files = guest.boot().unwrap();
        assert_eq!((files.version.as_str(), guest.content(&files.kernel)), ("6.9.1-arch", kernel));
        assert_eq!(guest.content(&files.initrd.unwrap()), b"ram");
    }

    #[test]
    fn without_an_initrd_the_root_is_a_partition() {
        let kernel = bzimage(5);
        let files = guest(&[("boot/vmlinuz-1", &kernel)]).boot().unwrap();
        assert!(files.root.starts_with("PARTUUID=") && files.initrd.is_none(), "{files:?}");
    }

    #[test]
    fn a_compressed_arm_kernel() {
        let mut elf = b"\x7fELF".to_vec();
        elf.resize(18, 0);
        elf.extend([0xB7, 0]);
        let kernel = b"\x1f\x8b\x08 compressed".as_slice();
        let guest = guest(&[]);
        let files: [(&str, &[u8]); 3] =
            [("usr/lib/systemd/systemd", &elf), ("etc/os-release", b""), ("boot/vmlinuz-6.8.0-1-aws", kernel)];
        guest.shop.ext4(&guest.disk, MIB, 20 * MIB, &["-U", ROOT], &files);
        assert_eq!(guest.boot().unwrap().arch, Arch::Aarch64);
    }

    #[test]
    fn why_not() {
        let kernel = bzimage(6);
        assert_eq!(guest(&[]).boot().unwrap_err(), WhyNot::NoKernel);
        let foreign = guest(&[("boot/vmlinuz-1", b"not a kernel")]).boot().unwrap_err();
        assert_eq!(foreign.to_string(), "/boot/vmlinuz-1 is a kernel for neither x86_64 nor aarch64");

        let guest = guest(&[]);
        let bare = [("boot/vmlinuz-1", &kernel[..])];
        guest.shop.ext4(&guest.disk, MIB, 20 * MIB, &["-L", "x"], &[]);
        assert_eq!(guest.boot().unwrap_err(), WhyNot::NoSystemd);
        guest.shop.ext4(&guest.disk, 21 * MIB, 20 * MIB, &["-L", "x"], &bare);
        assert_eq!(guest.boot().unwrap_err(), WhyNot::NoSystemd);
        poke(&guest.disk, MIB, b"LUKS\xba\xbe");
        assert_eq!(guest.boot().unwrap_err().to_string(), "/ is encrypted (LUKS)");
        poke(&guest.disk, MIB, b"XFSB\0\0");
        assert_eq!(guest.boot().unwrap_err().to_string(), "/ is on xfs, which kiln cannot read");
    }

    #[test]
    fn damaged_and_unknown_filesystems() {
        let kernel = bzimage(7);
        let files: [(&str, &[u8]); 1] = [("boot/vmlinuz-1", &kernel)];
        let unreadable = |guest: &Guest| match guest.boot().unwrap_err() {
            WhyNot::Unreadable { mount_point: "/", reason } => reason,
            other => panic!("{other:?}"),
        };
        let damaged = guest(&files);
        poke(&damaged.disk, MIB + 2048, &[0xFF; 512]);
        assert!(unreadable(&damaged).contains("corrupt"));
        let unknown = guest(&files);
        poke(&unknown.disk, MIB + 1024 + 0x60, &[0xFF; 4]);
        unreadable(&unknown);
    }
}
