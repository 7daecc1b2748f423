//! Reading at a position: the one way this module looks at any disk.

use super::Error;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::Arc;

/// Something that can be read at any position, by several threads at once, and that knows where its data lies.
pub trait ReadAt: Send + Sync {
    /// Fills the whole of `buf` from byte `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if `buf` reaches past [`size`](Self::size); else whatever the system says.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The size in bytes.
    fn size(&self) -> io::Result<u64>;

    /// The first range of data, in bytes, that ends after `from` and begins before `until`, cut to begin no earlier than
    /// `from`; `None` if there is only a hole. The next range begins after a hole, or directly at the end of this one.
    /// Nothing is looked at from `until` on, so that overlays over overlays don't search the whole disk again and again.
    ///
    /// A hole was never written, or was given back (discarded); it reads as zeros. Zeros that were written are data.
    fn next_data(&self, from: u64, until: u64) -> io::Result<Option<Range<u64>>> {
        let size = self.size()?;
        Ok((from < size.min(until)).then_some(from..size))
    }

    /// The file where the bytes from `offset` on lie just as they read, where in it, and for how many bytes that is so,
    /// `len` at most; `None` where they are in no file.
    fn stored(&self, offset: u64, len: u64) -> Option<Stored<'_>> {
        let _ = (offset, len);
        None
    }
}

/// A stretch of a file.
pub struct Stored<'a> {
    pub(super) file: &'a File,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Stored<'_> {
    /// Has the kernel copy the stretch to `at` of `out` (`copy_file_range(2)`): where the filesystem can share blocks
    /// between files nothing is read or written. Returns how many bytes it copied, 0 if it can't.
    pub(super) fn copy_within_kernel(&self, out: &File, at: u64) -> u64 {
        let length = usize::try_from(self.len).unwrap_or(usize::MAX);
        let (mut from, mut to) = (self.offset, at);
        rustix::fs::copy_file_range(self.file, Some(&mut from), out, Some(&mut to), length)
            .map_or(0, |copied| copied as u64)
    }
}

impl ReadAt for File {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        let metadata = self.metadata()?;
        if metadata.file_type().is_block_device() {
            return Ok(rustix::fs::seek(self, rustix::fs::SeekFrom::End(0))?);
        }
        Ok(metadata.len())
    }

    /// Asks the filesystem through `lseek(2)` with `SEEK_DATA` and `SEEK_HOLE`. A filesystem or device that knows
    /// no holes says that all is data. The answer is never taken from the file's own position, so threads that
    /// share it don't disturb each other.
    fn next_data(&self, from: u64, until: u64) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::{SeekFrom, seek};
        use rustix::io::Errno;
        let size = ReadAt::size(self)?;
        if from >= size.min(until) {
            return Ok(None);
        }
        let start = match seek(self, SeekFrom::Data(from)) {
            Ok(start) if start >= until => return Ok(None),
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Some(from..size)),
            Err(error) => return Err(error.into()),
        };
        let end = seek(self, SeekFrom::Hole(start))?;
        Ok(Some(start..end))
    }

    fn stored(&self, offset: u64, len: u64) -> Option<Stored<'_>> {
        Some(Stored { file: self, offset, len })
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let found = usize::try_from(offset).ok().and_then(|start| self.get(start..start.checked_add(buf.len())?));
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// A disk to read: a reader, its size and the path that messages name. Cheap to clone.
#[derive(Clone)]
pub struct Image {
    reader: Arc<dyn ReadAt>,
    size: u64,
    path: Arc<Path>,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("path", &self.path).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Image {
    /// A disk behind any reader; `path` is only for messages.
    ///
    /// # Errors
    /// [`Error::Read`] if the reader cannot tell its size.
    pub fn new(reader: Arc<dyn ReadAt>, path: &Path) -> Result<Self, Error> {
        let size = reader.size().map_err(|source| Error::read(path, 0, source))?;
        Ok(Self { reader, size, path: path.into() })
    }

    /// Opens a raw disk, read-only.
    ///
    /// # Errors
    /// [`Error::Open`]; [`Error::NotRaw`] if the file begins like another image format or a compressed file.
    pub fn raw(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::open(path, source))?;
        let image = Self::new(Arc::new(file), path)?;
        match image.foreign_format()? {
            Some(format) => Err(Error::NotRaw { path: path.to_owned(), format }),
            None => Ok(image),
        }
    }

    /// Opens a qcow2 overlay together with what backs it, read-only.
    ///
    /// # Errors
    /// Those of [`Overlay::open`](super::Overlay::open).
    pub fn overlay(path: &Path) -> Result<Self, Error> {
        Self::new(Arc::new(super::Overlay::open(path)?), path)
    }

    /// The size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The path that messages name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills `buf` from byte `offset`.
    ///
    /// # Errors
    /// [`Error::Read`], also if `buf` reaches past the end.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        self.reader.read_at(offset, buf).map_err(|source| Error::read(&self.path, offset, source))
    }

    /// Has the kernel copy a range into the same place of `out`; see [`Stored::copy_within_kernel`]. `false` if it can't
    /// be done, or only in part.
    pub(super) fn copy_within_kernel(&self, range: Range<u64>, out: &File) -> bool {
        let mut at = range.start;
        while at < range.end {
            match self.stored(at, range.end - at).map_or(0, |stored| stored.copy_within_kernel(out, at)) {
                0 => return false,
                copied => at += copied,
            }
        }
        true
    }

    /// See [`ReadAt::stored`].
    pub(super) fn stored(&self, offset: u64, len: u64) -> Option<Stored<'_>> {
        self.reader.stored(offset, len)
    }

    /// The first range of data that ends after `from`, up to a hole; see [`ReadAt::next_data`].
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn next_data(&self, from: u64) -> Result<Option<Range<u64>>, Error> {
        let Some(mut found) = self.next_data_before(from, self.size)? else { return Ok(None) };
        // Pieces that follow on each other are one.
        while let Some(next) = self.next_data_before(found.end, self.size)?
            && next.start == found.end
        {
            found.end = next.end;
        }
        Ok(Some(found))
    }

    /// The first range of data that ends after `from` and begins before `until`; see [`ReadAt::next_data`].
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn next_data_before(&self, from: u64, until: u64) -> Result<Option<Range<u64>>, Error> {
        self.reader.next_data(from, until).map_err(|source| Error::read(&self.path, from, source))
    }

    /// `len` bytes from `offset`, or `None` if the image ends before.
    pub(super) fn slice(&self, offset: u64, len: usize) -> Result<Option<Vec<u8>>, Error> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.size) {
            return Ok(None);
        }
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// What the file is, if its first bytes say that it is no raw disk. No raw disk begins like one of these: a boot
    /// sector begins with code (`EB`, `E9`, `FA`, `33 C0`), a data disk with zeros.
    fn foreign_format(&self) -> Result<Option<&'static str>, Error> {
        const MAGICS: [(&[u8], &str); 9] = [
            (b"QFI\xfb", "a qcow2 image"),
            (b"KDMV", "a VMDK image"),
            (b"# Disk DescriptorFile", "a VMDK descriptor"),
            (b"vhdxfile", "a VHDX image"),
            (b"conectix", "a VHD image"),
            (b"\x1f\x8b\x08", "a gzip file"),
            (b"\xfd7zXZ\0", "an xz file"),
            (b"\x28\xb5\x2f\xfd", "a zstd file"),
            (b"BZh", "a bzip2 file"),
        ];
        let head = self.slice(0, 32.min(usize::try_from(self.size).unwrap_or(32)))?.unwrap_or_default();
        Ok(MAGICS.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, format)| *format))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn holes_of_a_sparse_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(10 << 20).unwrap();
        assert_eq!(ReadAt::next_data(&file, 0, u64::MAX).unwrap(), None);
        file.write_all_at(&[0; 4096], 1 << 20).unwrap();
        file.write_all_at(b"x", 4 << 20).unwrap();
        file.flush().unwrap();
        assert_eq!(file.next_data(0, u64::MAX).unwrap(), Some(1 << 20..(1 << 20) + 4096));
        assert_eq!(file.next_data((1 << 20) + 5, u64::MAX).unwrap(), Some((1 << 20) + 5..(1 << 20) + 4096));
        assert_eq!(file.next_data((1 << 20) + 4096, u64::MAX).unwrap(), Some(4 << 20..(4 << 20) + 4096));
        assert_eq!(file.next_data(5 << 20, u64::MAX).unwrap(), None);
        assert_eq!(file.next_data(11 << 20, u64::MAX).unwrap(), None);
    }

    #[test]
    fn the_kernel_copies_what_is_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let bytes: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(path("from"), &bytes).unwrap();
        let out = File::options().read(true).write(true).create_new(true).open(path("to")).unwrap();
        let image = Image::raw(&path("from")).unwrap();
        assert!(image.copy_within_kernel(8192..3_000_000, &out));
        let mut copied = vec![0; 3_000_000 - 8192];
        out.read_exact_at(&mut copied, 8192).unwrap();
        assert!(copied == bytes[8192..3_000_000]);
        assert!(!image.copy_within_kernel(3_000_000..9_000_000, &out), "past the end");
        let in_memory = Image::new(Arc::new(bytes), Path::new("memory")).unwrap();
        assert!(!in_memory.copy_within_kernel(0..4096, &out));
    }

    #[test]
    fn another_format_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"QFI\xfb\0\0\0\x03").unwrap();
        let error = Image::raw(file.path()).unwrap_err().to_string();
        assert!(error.ends_with("is not a raw disk but a qcow2 image"), "{error}");
    }

    #[test]
    fn reading_past_the_end_is_an_error() {
        let image = Image::new(Arc::new(vec![1_u8; 8]), Path::new("/x")).unwrap();
        let mut buf = [0; 4];
        image.read(4, &mut buf).unwrap();
        assert!(matches!(image.read(5, &mut buf), Err(Error::Read { offset: 5, .. })));
        assert_eq!(image.slice(u64::MAX, 2).unwrap(), None);
    }
}
