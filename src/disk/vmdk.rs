//! A disk as a stream-optimised VMDK: compressed, without zeros, and written from front to back.
//!
//! The disk is cut into grains of 64 KiB. One of nothing but zeros is left out, written or not. The others follow on each
//! other, each behind a marker that says where it belongs; after those of each 32 MiB comes the table of where they are,
//! and at the end the directory of the tables, and the footer that says where that is. The same bytes always make the
//! same stream, whatever they are stored in, as long as kiln's compression is the same.
//!
//! Source: "Virtual Disk Format 5.0" (`VMware`, 2011), sections "Hosted Sparse Extent" and "Stream-Optimized Compressed
//! Sparse Extent".

use std::io::{self, Write};

use flate2::write::ZlibEncoder;
use flate2::{Compress, Compression};

use super::{Error, Image, SECTOR, Work};

/// In bytes; what the format's readers take, and nothing else.
const GRAIN: u64 = 64 << 10;
/// How many grains a table has.
const TABLE: u64 = 512;
/// What comes before the first grain, in bytes: header, descriptor, and zeros.
const OVERHEAD: u64 = 64 << 10;
/// How many grains a thread compresses at once.
const BATCH: usize = 16;
/// Of zlib: beyond this, time grows faster than the stream gets smaller.
const LEVEL: u32 = 6;
/// The directory is at the end; only the footer says where.
const AT_END: u64 = u64::MAX;

/// What stands before something that isn't a grain.
#[derive(Clone, Copy)]
enum Marker {
    End = 0,
    Table = 1,
    Directory = 2,
    Footer = 3,
}

/// Writes the image to `out`, compressed by as many threads as `work` allows. The progress counts the image's data.
///
/// # Errors
/// [`Error::Read`], [`Error::Cancelled`]; [`Error::Write`] with the image's path if `out` fails, or if the stream grows to
/// 2 TiB, where the format ends.
pub fn write_vmdk(image: &Image, out: &mut dyn Write, work: &Work) -> Result<(), Error> {
    let total = data_bytes(image)?;
    let mut stream = Stream::begin(image, out)?;
    let grains = image.size().div_ceil(GRAIN);
    let (mut next, mut done) = (0, 0);
    while next < grains {
        if (work.cancelled)() {
            return Err(Error::Cancelled);
        }
        (work.progress)(done, total);
        let batch = batch(image, &mut next, work.threads.max(1) * BATCH)?;
        done += batch.len() as u64 * GRAIN;
        for (index, grain) in compress(image, &batch, work.threads)? {
            stream.grain(index, &grain)?;
        }
    }
    stream.end()?;
    (work.progress)(total, total);
    Ok(())
}

/// How long the stream of the image can be, in bytes: as if nothing of it could be compressed, and no zeros were written.
///
/// # Errors
/// [`Error::Read`].
pub fn longest_vmdk(image: &Image) -> Result<u64, Error> {
    let grains = data_bytes(image)? / GRAIN;
    let tables = image.size().div_ceil(GRAIN * TABLE);
    // What can't be compressed gets longer by less than what is left of a sector beside the grain's marker.
    let of_grains = grains * (GRAIN + SECTOR);
    let of_tables = tables.min(grains) * (SECTOR + TABLE * 4);
    let end = SECTOR + (tables * 4).next_multiple_of(SECTOR) + 3 * SECTOR;
    Ok(OVERHEAD + of_grains + of_tables + end)
}

/// How many bytes the grains have together that aren't holes.
fn data_bytes(image: &Image) -> Result<u64, Error> {
    let (mut next, mut all) = (0, 0);
    while next < image.size().div_ceil(GRAIN) {
        all += batch(image, &mut next, 1 << 16)?.len() as u64 * GRAIN;
    }
    Ok(all)
}

/// The next grains with data from `next` on, at most so many; `next` becomes what comes after them.
fn batch(image: &Image, next: &mut u64, most: usize) -> Result<Vec<u64>, Error> {
    let mut found = Vec::new();
    let end = image.size().div_ceil(GRAIN);
    while found.len() < most && *next < end {
        let Some(data) = image.next_data(*next * GRAIN)? else {
            *next = end;
            break;
        };
        let first = (data.start / GRAIN).max(*next);
        let last = data.end.min(image.size()).div_ceil(GRAIN);
        let count = usize::try_from(last - first).unwrap_or(usize::MAX).min(most - found.len());
        *next = first + count as u64;
        found.extend(first..*next);
    }
    Ok(found)
}

/// Reads and compresses grains, in order, without those that are zeros.
fn compress(image: &Image, grains: &[u64], threads: usize) -> Result<Vec<(u64, Vec<u8>)>, Error> {
    let share = grains.len().div_ceil(threads.max(1)).max(1);
    let some = |grains: &[u64]| -> Result<Vec<(u64, Vec<u8>)>, Error> {
        let mut buffer = vec![0; usize::try_from(GRAIN).unwrap_or_default()];
        let mut compressed = Vec::with_capacity(grains.len());
        for index in grains {
            let offset = index * GRAIN;
            let length = usize::try_from((image.size() - offset).min(GRAIN)).unwrap_or_default();
            image.read(offset, &mut buffer[..length])?;
            buffer[length..].fill(0);
            if buffer.iter().any(|byte| *byte != 0) {
                let grain = zlib(&buffer).map_err(|source| Error::write(image.path(), source))?;
                compressed.push((*index, grain));
            }
        }
        Ok(compressed)
    };
    let mut all = Vec::with_capacity(grains.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = grains.chunks(share).map(|grains| scope.spawn(|| some(grains))).collect();
        for thread in threads {
            all.append(&mut thread.join().unwrap_or(Err(Error::Cancelled))?);
        }
        Ok(())
    })?;
    Ok(all)
}

fn zlib(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = ZlibEncoder::new_with_compress(Vec::new(), Compress::new(Compression::new(LEVEL), true));
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// What is being written.
struct Stream<'a> {
    image: &'a Image,
    out: &'a mut dyn Write,
    /// How much is written, in sectors: the format counts them in 32 bits.
    at: u32,
    /// The grain table of the grains that come now, by where they are in the stream; 0: left out.
    table: Vec<u32>,
    /// Which table that is.
    number: u64,
    /// Where the tables are.
    directory: Vec<u32>,
}

impl<'a> Stream<'a> {
    fn begin(image: &'a Image, out: &'a mut dyn Write) -> Result<Self, Error> {
        let mut stream = Self { image, out, at: 0, table: Vec::new(), number: 0, directory: Vec::new() };
        let mut start = header(image.size(), AT_END);
        start.extend(descriptor(image.size()).into_bytes());
        start.resize(usize::try_from(OVERHEAD).unwrap_or_default(), 0);
        stream.write(start)?;
        Ok(stream)
    }

    fn grain(&mut self, index: u64, compressed: &[u8]) -> Result<(), Error> {
        self.tables_until(index / TABLE)?;
        self.table.resize(usize::try_from(TABLE).unwrap_or_default(), 0);
        self.table[usize::try_from(index % TABLE).unwrap_or_default()] = self.at;
        let mut marked = (index * GRAIN / SECTOR).to_le_bytes().to_vec();
        marked.extend(u32::try_from(compressed.len()).unwrap_or_default().to_le_bytes());
        marked.extend(compressed);
        self.write(marked)
    }

    /// Ends the tables before that one.
    fn tables_until(&mut self, number: u64) -> Result<(), Error> {
        while self.number < number {
            self.number += 1;
            if self.table.is_empty() {
                self.directory.push(0);
                continue;
            }
            let table = std::mem::take(&mut self.table);
            self.marker(Marker::Table, bytes_of(&table).len())?;
            self.directory.push(self.at);
            self.write(bytes_of(&table))?;
        }
        Ok(())
    }

    fn end(mut self) -> Result<(), Error> {
        self.tables_until(self.image.size().div_ceil(GRAIN * TABLE))?;
        let directory = bytes_of(&self.directory);
        self.marker(Marker::Directory, directory.len())?;
        let at = self.at;
        self.write(directory)?;
        let footer = header(self.image.size(), at.into());
        self.marker(Marker::Footer, footer.len())?;
        self.write(footer)?;
        self.marker(Marker::End, 0)?;
        self.out.flush().map_err(|source| Error::write(self.image.path(), source))
    }

    /// Announces so many bytes that aren't a grain.
    fn marker(&mut self, kind: Marker, length: usize) -> Result<(), Error> {
        let mut marker = (length as u64).div_ceil(SECTOR).to_le_bytes().to_vec();
        marker.extend(0_u32.to_le_bytes());
        marker.extend((kind as u32).to_le_bytes());
        self.write(marker)
    }

    /// Writes whole sectors.
    fn write(&mut self, mut bytes: Vec<u8>) -> Result<(), Error> {
        let sectors = bytes.len().div_ceil(512);
        bytes.resize(sectors * 512, 0);
        let at = u32::try_from(sectors).ok().and_then(|sectors| self.at.checked_add(sectors));
        let written = at.ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge)).and_then(|at| {
            self.out.write_all(&bytes)?;
            Ok(at)
        });
        self.at = written.map_err(|source| Error::write(self.image.path(), source))?;
        Ok(())
    }
}

fn bytes_of(entries: &[u32]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// `SparseExtentHeader`, of one sector.
fn header(size: u64, directory: u64) -> Vec<u8> {
    const VERSION: u32 = 3;
    /// Line ends can be checked; grains are compressed; there are markers.
    const FLAGS: u32 = 1 | 1 << 16 | 1 << 17;
    const DEFLATE: u16 = 1;
    let mut header = b"KDMV".to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend(FLAGS.to_le_bytes());
    header.extend(size.div_ceil(SECTOR).to_le_bytes());
    header.extend((GRAIN / SECTOR).to_le_bytes());
    // The descriptor's place and length.
    header.extend(1_u64.to_le_bytes());
    header.extend((OVERHEAD / SECTOR - 1).to_le_bytes());
    header.extend(u32::try_from(TABLE).unwrap_or_default().to_le_bytes());
    // No second directory.
    header.extend(0_u64.to_le_bytes());
    header.extend(directory.to_le_bytes());
    header.extend((OVERHEAD / SECTOR).to_le_bytes());
    // It is closed, and has not been through a transfer that changes line ends.
    header.extend(b"\0\n \r\n");
    header.extend(DEFLATE.to_le_bytes());
    header.resize(512, 0);
    header
}

/// The text in it that says what it is.
fn descriptor(size: u64) -> String {
    const HEADS: u64 = 255;
    const SECTORS: u64 = 63;
    let sectors = size.div_ceil(SECTOR);
    let cylinders = sectors.div_ceil(HEADS * SECTORS).min(65_535);
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n\
         # Extent description\nRW {sectors} SPARSE \"disk.vmdk\"\n\n\
         # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{HEADS}\"\nddb.geometry.sectors = \"{SECTORS}\"\nddb.adapterType = \"lsilogic\"\n"
    )
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::super::testing::{text, tool};
    use super::*;
    use crate::units::MIB;

    fn vmdk(disk: &Path, threads: usize) -> Vec<u8> {
        let mut stream = Vec::new();
        write_vmdk(
            &Image::new(std::sync::Arc::new(File::open(disk).unwrap()), disk).unwrap(),
            &mut stream,
            &Work::quiet(threads),
        )
        .unwrap();
        stream
    }

    fn longest(disk: &Path) -> u64 {
        longest_vmdk(&Image::raw(disk).unwrap()).unwrap()
    }

    /// Bytes that don't get smaller.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    #[test]
    fn qemu_reads_back_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let [raw, copy, back] = ["raw", "vmdk", "back"].map(|name| folder.path().join(name));
        let disk = File::options().read(true).write(true).create_new(true).open(&raw).unwrap();
        // Several tables, one of them without a grain, and an end that is no whole grain.
        disk.set_len(130 * MIB + 512).unwrap();
        let compressible = vec![7; 300_000];
        let at = [(0, &compressible), (31 * MIB + 5000, &noise(2 << 20)), (100 * MIB, &compressible)];
        for (offset, bytes) in at {
            disk.write_all_at(bytes, offset).unwrap();
        }
        disk.write_all_at(&vec![0; 200_000], 50 * MIB).unwrap();
        disk.write_all_at(b"end", 130 * MIB + 509).unwrap();
        let stream = vmdk(&raw, 3);
        assert_eq!(stream, vmdk(&raw, 1), "however many threads there are");
        assert!(stream.len() < 3 << 20, "{}", stream.len());
        assert!(stream.len() as u64 <= longest(&raw), "{} of {}", stream.len(), longest(&raw));
        std::fs::write(&copy, &stream).unwrap();
        tool("qemu-img", &["check", "-f", "vmdk", text(&copy)]);
        tool("qemu-img", &["compare", "-f", "raw", "-F", "vmdk", text(&raw), text(&copy)]);
        tool("qemu-img", &["convert", "-f", "vmdk", "-O", "raw", text(&copy), text(&back)]);
        assert!(std::fs::read(&raw).unwrap() == std::fs::read(&back).unwrap());
        let info = tool("qemu-img", &["info", "--output=json", text(&copy)]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["format-specific"]["data"]["create-type"], "streamOptimized");

        // Zeros that are written make no difference.
        let written = folder.path().join("written");
        std::fs::write(&written, std::fs::read(&raw).unwrap()).unwrap();
        assert!(vmdk(&written, 2) == stream);
    }

    #[test]
    fn a_disk_without_data_has_a_directory_of_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let [raw, copy] = ["raw", "vmdk"].map(|name| folder.path().join(name));
        File::create(&raw).unwrap().set_len(64 * MIB).unwrap();
        let stream = vmdk(&raw, 2);
        // Overhead; directory, footer and end, each with its marker.
        assert_eq!(stream.len() as u64, OVERHEAD + 5 * SECTOR);
        assert_eq!(stream.len() as u64, longest(&raw));
        std::fs::write(&copy, &stream).unwrap();
        tool("qemu-img", &["compare", "-f", "raw", "-F", "vmdk", text(&raw), text(&copy)]);
    }

    #[test]
    fn what_cannot_be_compressed_is_no_longer_than_foreseen() {
        let folder = tempfile::tempdir().unwrap();
        let raw = folder.path().join("raw");
        std::fs::write(&raw, noise(5 << 20)).unwrap();
        let (length, longest) = (vmdk(&raw, 2).len() as u64, longest(&raw));
        assert!((5 << 20..=longest).contains(&length) && longest - length < 64 << 10, "{length} of {longest}");
    }

    #[test]
    fn a_reader_that_goes_away_ends_it() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let image = super::super::testing::memory(vec![1; 1 << 20]);
        assert!(matches!(write_vmdk(&image, &mut Gone, &Work::quiet(1)), Err(Error::Write { .. })));
        let stopped = Work { cancelled: &|| true, ..Work::quiet(1) };
        assert!(matches!(write_vmdk(&image, &mut Vec::new(), &stopped), Err(Error::Cancelled)));
    }
}
