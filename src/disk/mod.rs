//! Disks as bytes: partition tables, filesystems, boot files, overlays, holes and block maps.
//!
//! Everything here reads or writes files and starts no process, needs no root, no loop device and no mount.
//! It knows nothing of QEMU, of recipes or of how things are shown; `build` joins those.
//!
//! # Units
//! Every offset, length and size of the public interface is in **bytes**. Sectors are always 512 bytes: that is
//! what EC2's volumes and QEMU's drives show to a guest. A disk laid out for 4096-byte sectors is refused
//! ([`Error::SectorSize`]), never misread.
//!
//! # The parts
//! | file | holds |
//! |---|---|
//! | `image` | [`ReadAt`], the one way all code here reads, and [`Image`], a reader with its path |
//! | `table`, `gpt`, `mbr` | partition tables: reading, and growing one as a list of [`Patch`]es |
//! | `probe` | which filesystem lies in a partition, by its magic |
//! | `root`, `fstab` | which partition is the root, and where it wants `/boot` |
//! | `firmware` | which firmware can start the disk, and for which architecture it is |
//! | `boot`, `ext`, `version` | kernel and initrd, read out of an ext filesystem |
//! | `qcow2` | our own small qcow2: the header, and what the entries of its tables mean |
//! | `overlay`, `level`, `runs` | a chain of overlays as QEMU left it: the chain, one file of it, what they hold |
//! | `layout`, `create`, `merge` | writing an overlay: its file, a fresh one, all overlays of a chain as one |
//! | `blocks`, `blocks_text` | the block map, its digest and its file |
//! | `copy` | the parallel pass over data: export, map, verify |
//! | `draft` | an export that begins before the disk is done |
//! | `sum` | the plain SHA-256 of a whole disk |
//! | `vmdk` | a disk as a stream-optimised VMDK |
//!
//! Architecture invariant: nothing here looks at an image other than through [`ReadAt`], so a raw base and an
//! overlay that QEMU wrote are read by the same code.

mod blocks;
mod blocks_text;
mod boot;
mod copy;
mod create;
mod draft;
mod error;
mod ext;
mod firmware;
mod fstab;
mod gpt;
mod guid;
mod image;
mod layout;
mod level;
mod mbr;
mod merge;
mod overlay;
mod probe;
mod qcow2;
mod root;
mod runs;
mod sum;
mod table;
mod version;
mod vmdk;

#[cfg(test)]
mod testing;

pub use blocks::{BLOCK, BlockMap, Digest};
pub use boot::{BootFiles, WhyNot, boot_files, root_file};
pub(crate) use copy::confirm;
pub use copy::{Exported, Work, export};
pub use draft::{Draft, known_through};
pub use error::Error;
pub use ext::GuestFile;
pub use firmware::{Arch, BootModes};
pub use guid::Guid;
pub use image::{Image, ReadAt};
pub use layout::Backing;
pub use overlay::{Extent, Overlay};
pub use probe::{Filesystem, FilesystemKind};
pub use runs::ExtentKind;
pub use sum::sha256;
pub use table::{Partition, PartitionKind, Patch, Scheme, Table};
pub use vmdk::{longest_vmdk, write_vmdk};

/// The only sector size that kiln reads and writes, in bytes.
pub const SECTOR: u64 = 512;

/// Partitions that kiln grows end on a multiple of this many bytes (1 MiB), as every current partitioner does.
pub const ALIGN: u64 = 1 << 20;
