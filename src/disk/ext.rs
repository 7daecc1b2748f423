//! Reading files out of an ext2, ext3 or ext4 filesystem, without mounting it and without root.
//!
//! The `ext4-view` crate does the reading, including what still lies in the journal; here are the partition's bounds
//! and the sorting of failures into those of the disk and those of the filesystem.

use super::table::Partition;
use super::{Error, Image};
use ext4_view::{Ext4, Ext4Error, Ext4Read};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Why a file was not read.
#[derive(Debug)]
pub(super) enum Unread {
    /// The image itself could not be read.
    Fault(Error),
    /// The filesystem is damaged, or uses what the reader does not know: in words.
    Filesystem(String),
}

/// An open filesystem. Cheap to clone.
#[derive(Clone)]
pub(super) struct Ext {
    fs: Ext4,
}

/// A file in a guest's filesystem. It may be large: it is never in memory whole.
#[derive(Clone)]
pub struct GuestFile {
    ext: Ext,
    path: String,
}

impl GuestFile {
    /// Writes it to the host's file `out`, which is made anew.
    ///
    /// # Errors
    /// [`Error::Read`], also if the filesystem is damaged; [`Error::Create`], [`Error::Write`], [`Error::NoSpace`].
    pub fn copy_to(&self, out: &Path) -> Result<(), Error> {
        let file = File::create(out).map_err(|source| Error::create(out, source))?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        let written = |result: io::Result<()>| result.map_err(|source| Error::write(out, source));
        self.ext.pieces(&self.path, |piece| written(writer.write_all(piece))).map_err(|unread| match unread {
            Unread::Fault(error) => error,
            Unread::Filesystem(why) => Error::read(Path::new(&self.path), 0, io::Error::other(why)),
        })?;
        written(writer.flush())
    }

    /// Reads it to see that this can be done.
    pub(super) fn check(&self) -> Result<(), Unread> {
        self.ext.pieces(&self.path, |_| Ok(()))
    }
}

/// The filesystem's view of the disk: its partition and no more.
struct Window {
    image: Image,
    start: u64,
    len: u64,
}

impl Ext4Read for Window {
    fn read(&mut self, start: u64, dst: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if start.checked_add(dst.len() as u64).is_none_or(|end| end > self.len) {
            return Err("it reaches past the end of its partition".into());
        }
        self.image.read(self.start + start, dst).map_err(Into::into)
    }
}

impl From<Ext4Error> for Unread {
    fn from(error: Ext4Error) -> Self {
        match error {
            Ext4Error::Io(boxed) => match boxed.downcast::<Error>() {
                Ok(fault) => Self::Fault(*fault),
                Err(other) => Self::Filesystem(other.to_string()),
            },
            other => Self::Filesystem(other.to_string()),
        }
    }
}

/// `None` for a path that leads nowhere.
fn found<T>(result: Result<T, Ext4Error>) -> Result<Option<T>, Unread> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory | Ext4Error::TooManySymlinks) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Refuses a filesystem that is larger than its partition, or that has more block groups than one of its size can
/// have: the reader would ask for memory for each of them. Source: Linux `Documentation/filesystems/ext4/super.rst`.
fn check_size(image: &Image, partition: &Partition) -> Result<(), Unread> {
    const GROUPS_LIMIT: u64 = 1 << 20;
    let mut block = [0; 1024];
    image.read(partition.start + 1024, &mut block).map_err(Unread::Fault)?;
    let field = |at: usize| u64::from(u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]));
    let (log_block_size, per_group, wide) = (field(0x18), field(0x20).max(1), field(0x60) & 0x80 != 0);
    let blocks = field(0x04) | if wide { field(0x150) << 32 } else { 0 };
    let fits = log_block_size <= 6 && blocks <= partition.len >> (10 + log_block_size);
    if !fits || blocks / per_group > GROUPS_LIMIT {
        return Err(Unread::Filesystem("its size makes no sense for its partition".to_owned()));
    }
    Ok(())
}

impl Ext {
    pub(super) fn open(image: &Image, partition: &Partition) -> Result<Self, Unread> {
        check_size(image, partition)?;
        let window = Window { image: image.clone(), start: partition.start, len: partition.len };
        Ok(Self { fs: Ext4::load(Box::new(window))? })
    }

    /// Whether the path, with all symbolic links followed, leads to a file.
    pub(super) fn is_file(&self, path: &str) -> Result<bool, Unread> {
        let metadata = found(self.fs.metadata(path))?;
        Ok(metadata.is_some_and(|metadata| metadata.file_type().is_regular_file()))
    }

    /// The first of the paths that leads to a file.
    pub(super) fn first_file(&self, paths: impl IntoIterator<Item = String>) -> Result<Option<String>, Unread> {
        for path in paths {
            if self.is_file(&path)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// The whole file, which must not be longer than `limit` bytes; `None` if there is none.
    pub(super) fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, Unread> {
        if !self.is_file(path)? {
            return Ok(None);
        }
        let len = self.fs.metadata(path)?.len();
        if len > limit {
            return Err(Unread::Filesystem(format!("{path} has {len} bytes, more than the {limit} expected")));
        }
        Ok(Some(self.fs.read(path)?))
    }

    /// Hands out the whole file piece by piece.
    fn pieces(&self, path: &str, mut take: impl FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Unread> {
        let mut file = self.fs.open(path)?;
        let mut buffer = vec![0; 64 << 10];
        while let read @ 1.. = file.read_bytes(&mut buffer)? {
            take(&buffer[..read]).map_err(Unread::Fault)?;
        }
        Ok(())
    }

    /// A file, which must not be longer than `limit` bytes, to be read later.
    pub(super) fn file(&self, path: &str, limit: u64) -> Result<GuestFile, Unread> {
        let len = self.fs.metadata(path)?.len();
        if len > limit {
            return Err(Unread::Filesystem(format!("{path} has {len} bytes, more than the {limit} expected")));
        }
        Ok(GuestFile { ext: self.clone(), path: path.to_owned() })
    }

    /// The first bytes of a file, at most `len`.
    pub(super) fn head(&self, path: &str, len: usize) -> Result<Vec<u8>, Unread> {
        let mut file = self.fs.open(path)?;
        let (mut head, mut filled) = (vec![0; len], 0);
        while filled < len {
            match file.read_bytes(&mut head[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        head.truncate(filled);
        Ok(head)
    }

    /// The names in a directory that are UTF-8; none if there is no such directory.
    pub(super) fn names(&self, directory: &str) -> Result<Vec<String>, Unread> {
        let Some(entries) = found(self.fs.read_dir(directory))? else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in entries {
            names.extend(entry?.file_name().as_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    /// The path with all symbolic links resolved.
    pub(super) fn real(&self, path: &str) -> Result<String, Unread> {
        let real = self.fs.canonicalize(path)?;
        Ok(real
            .to_str()
            .map_err(|_| Unread::Filesystem(format!("{path} leads to a name that is not UTF-8")))?
            .to_owned())
    }
}
