//! One overlay of a chain: its file, its header and its tables.

use super::Error;
use super::image::{ReadAt, Stored};
use super::qcow2::{Cluster, Header, l2_offset};
use super::runs::{ExtentKind, Run, push};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What distinguishes a file from all others: its device and its inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity(u64, u64);

impl Identity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self(metadata.dev(), metadata.ino())
    }
}

/// The backing file that a header names.
pub(super) enum BackingFile {
    /// A raw disk.
    Raw(PathBuf),
    /// Another overlay.
    Overlay(PathBuf),
}

/// An open overlay without its backing file.
pub(super) struct Level {
    path: PathBuf,
    file: File,
    file_len: u64,
    header: Header,
    identity: Identity,
}

impl Level {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let read_error = |source| Error::read(path, 0, source);
        let file = File::open(path).map_err(|source| Error::open(path, source))?;
        let metadata = file.metadata().map_err(read_error)?;
        let file_len = ReadAt::size(&file).map_err(read_error)?;
        let mut first = vec![0; usize::try_from(file_len.min(64 << 10)).unwrap_or_default()];
        file.read_exact_at(&mut first, 0).map_err(read_error)?;
        let header = Header::parse(path, &first)?;
        Ok(Self { path: path.to_owned(), file, file_len, header, identity: Identity::of(&metadata) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// The size of the guest's disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.header.size
    }

    pub(super) fn cluster_bits(&self) -> u32 {
        self.header.cluster_bits
    }

    fn cluster_size(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    fn damaged(&self, what: &str) -> Error {
        Error::Qcow2Damaged { path: self.path.clone(), what: what.to_owned() }
    }

    /// An error that names this overlay and a feature that kiln does not read.
    pub(super) fn unsupported(&self, feature: impl Into<String>) -> Error {
        Error::Qcow2Unsupported { path: self.path.clone(), feature: feature.into() }
    }

    /// The backing file, if there is one. A relative name is looked for from the overlay's folder, as QEMU does.
    pub(super) fn backing_file(&self) -> Result<Option<BackingFile>, Error> {
        let Some(name) = &self.header.backing else { return Ok(None) };
        let path = in_real_folder(&self.path.parent().unwrap_or(Path::new("")).join(name))?;
        match self.header.backing_format.as_deref() {
            Some("raw") => Ok(Some(BackingFile::Raw(path))),
            Some("qcow2") => Ok(Some(BackingFile::Overlay(path))),
            Some(format) => Err(self.unsupported(format!("a backing file of format {format}"))),
            None => Err(self.unsupported("a backing file of no stated format")),
        }
    }

    /// What the overlay itself holds, in order; `level` is its index in the chain.
    pub(super) fn runs(&self, level: usize) -> Result<Vec<Run>, Error> {
        let entries = self.cluster_size() / 8;
        let l1 = self.numbers(self.header.l1_offset, self.header.l1_entries)?;
        let mut used: Vec<u64> = l1.iter().map(|entry| l2_offset(*entry)).filter(|offset| *offset != 0).collect();
        used.sort_unstable();
        // Each table has a cluster of its own, so a sound file cannot ask for more memory than it is long.
        if used.windows(2).any(|two| two[0] == two[1]) {
            return Err(self.damaged("its L1 table names one L2 table twice"));
        }
        let mut runs = Vec::new();
        for (table, offset) in (0..).zip(l1.iter().map(|entry| l2_offset(*entry))).filter(|(_, offset)| *offset != 0) {
            for (index, entry) in (table * entries..).zip(self.numbers(offset, entries)?) {
                let start = index << self.cluster_bits();
                let end = (start + self.cluster_size()).min(self.size());
                if let Some(kind) = self.kind(entry)?
                    && start < end
                {
                    push(&mut runs, Run { start, end, level, kind });
                }
            }
        }
        Ok(runs)
    }

    /// What an L2 entry says about its cluster; `None` if the cluster is the backing file's.
    fn kind(&self, entry: u64) -> Result<Option<ExtentKind>, Error> {
        match Cluster::of(entry) {
            Cluster::Compressed => Err(self.unsupported("compressed clusters")),
            Cluster::Data(offset) if offset % self.cluster_size() != 0 => Err(self.damaged("a cluster is misplaced")),
            Cluster::Data(offset) if offset >= self.file_len => Err(self.damaged("it was cut short")),
            Cluster::Data(host_offset) => Ok(Some(ExtentKind::Data { host_offset })),
            Cluster::Zero { allocated } => Ok(Some(ExtentKind::Zero { allocated })),
            Cluster::Unallocated => Ok(None),
        }
    }

    /// `count` big-endian numbers at `offset`.
    fn numbers(&self, offset: u64, count: u64) -> Result<Vec<u64>, Error> {
        if !offset.is_multiple_of(self.cluster_size())
            || offset.checked_add(count * 8).is_none_or(|end| end > self.file_len)
        {
            return Err(self.damaged("a table lies outside the file"));
        }
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, offset).map_err(|source| Error::read(&self.path, offset, source))?;
        let (numbers, _) = bytes.as_chunks();
        Ok(numbers.iter().map(|number| u64::from_be_bytes(*number)).collect())
    }

    /// Reads from the overlay's own file. QEMU leaves out the zeros at the end of the last cluster.
    pub(super) fn read(&self, host_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let left = usize::try_from(self.file_len.saturating_sub(host_offset)).unwrap_or(usize::MAX);
        let (there, beyond) = buf.split_at_mut(left.min(buf.len()));
        self.file.read_exact_at(there, host_offset)?;
        beyond.fill(0);
        Ok(())
    }

    /// At most `len` bytes of the overlay's own file; `None` past its end.
    pub(super) fn stored(&self, host_offset: u64, len: u64) -> Option<Stored<'_>> {
        let len = len.min(self.file_len.saturating_sub(host_offset));
        (len > 0).then_some(Stored { file: &self.file, offset: host_offset, len })
    }
}

/// The same file, named by the real path of its folder: along a chain of relative names, joined paths would grow beyond
/// the system's limit. A symbolic link as the last component is kept, because QEMU looks for a relative name from the
/// link's folder and not from its target's.
fn in_real_folder(path: &Path) -> Result<PathBuf, Error> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(path.to_owned()) };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let real = folder.canonicalize().map_err(|source| Error::open(path, source))?;
    Ok(real.join(name))
}
