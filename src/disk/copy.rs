//! The parallel pass over a disk's data: copy it, hash it, or both at once.
//!
//! Threads take windows of a few MiB from a queue that knows only what the image says about its holes. A thread
//! handles one block at a time: read it, hash it while it is in the processor's cache, write it. Memory is one block
//! per thread and 33 bytes per block of the disk, whatever the disk holds.

use super::blocks::{BLOCK, BlockMap, Digest};
use super::{Error, Image};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// What a thread takes at once, in bytes; a multiple of [`BLOCK`].
const WINDOW: u64 = 8 * BLOCK;

/// How a long pass is done: with how many threads, who hears of it, who may stop it.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// How many threads; 0 counts as 1. Twice the processors is best: threads wait for each other's writes.
    pub threads: usize,
    /// Called now and then, from any thread, with the bytes of data done and the bytes in all.
    pub progress: &'a (dyn Fn(u64, u64) + Sync),
    /// Asked before each block; `true` ends the pass with [`Error::Cancelled`].
    pub cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl Work<'_> {
    /// Tells nobody and cannot be stopped.
    #[must_use]
    pub fn quiet(threads: usize) -> Self {
        Self { threads, progress: &|_, _| (), cancelled: &|| false }
    }
}

/// What [`export`] or [`Draft::finish`](super::Draft::finish) wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The raw disk's block map.
    pub block_map: BlockMap,
    /// How many bytes of data were written; [`BlockMap::data_bytes`] counts whole blocks instead.
    pub data_bytes: u64,
}

/// Writes the image as a sparse raw disk to the new file `out`, and hashes it in the same pass.
///
/// The file has a hole exactly where [`Image::next_data`] says so: where an overlay was discarded or never written
/// and its base has a hole or has ended. Zeros that were written are written again. See [`confirm`] for what is promised
/// of it.
///
/// # Errors
/// [`Error::NoSpace`], [`Error::Create`] (also if `out` exists), [`Error::Write`], [`Error::Read`],
/// [`Error::Cancelled`]. A partial file is left for the caller to remove with its folder.
pub fn export(image: &Image, out: &Path, work: &Work) -> Result<Exported, Error> {
    let file = create(out, image.size())?;
    let exported = pass(image, Some((&file, out)), None, work)?;
    confirm(&file).map_err(|source| Error::write(out, source))?;
    Ok(exported)
}

/// Sees to it that what was written has room where it was written to.
///
/// Linux's own disk filesystems find that room when they take the bytes, and say so; others, such as network ones, tell
/// of it only when they are asked to write them out. It is no promise that the bytes reach the disk: a publish waits for
/// that, and whoever relies on them after a power cut reads them again. Waiting for the disk would take longer than everything else of a small build.
///
/// # Errors
/// What the filesystem says only now.
pub(crate) fn confirm(file: &File) -> io::Result<()> {
    // linux/magic.h: ext2 to ext4, XFS, Btrfs, tmpfs, and overlayfs, whose upper layer is hardly ever another.
    const FIND_ROOM_AT_ONCE: [u64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630];
    let kind = rustix::fs::fstatfs(file)?.f_type;
    if u64::try_from(kind).is_ok_and(|kind| FIND_ROOM_AT_ONCE.contains(&kind)) { Ok(()) } else { file.sync_all() }
}

/// A new file that is one hole.
pub(super) fn create(out: &Path, size: u64) -> Result<File, Error> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(out);
    let file = file.map_err(|source| Error::create(out, source))?;
    file.set_len(size).map_err(|source| Error::write(out, source))?;
    Ok(file)
}

impl BlockMap {
    /// The map of an existing disk. What its filesystem calls a hole is one.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Cancelled`].
    pub fn of_image(image: &Image, work: &Work) -> Result<Self, Error> {
        Ok(pass(image, None, None, work)?.block_map)
    }

    /// The map of a raw disk in a file.
    ///
    /// # Errors
    /// As [`of_image`](Self::of_image), and those of [`Image::raw`].
    pub fn of_raw(path: &Path, work: &Work) -> Result<Self, Error> {
        Self::of_image(&Image::raw(path)?, work)
    }

    /// Reads the image and returns the indices of the blocks that read otherwise than this map says: none if it is
    /// the disk that the map describes.
    ///
    /// # Errors
    /// As [`of_image`](Self::of_image).
    pub fn verify(&self, image: &Image, work: &Work) -> Result<Vec<u64>, Error> {
        Ok(self.differences(&Self::of_image(image, work)?))
    }
}

/// A stretch of the disk that begins and ends on blocks, with the ranges of data in it.
struct Window {
    range: Range<u64>,
    data: Vec<Range<u64>>,
}

/// Hands out windows, in order: those that hold data, or all of some ranges.
struct Queue<'a> {
    image: &'a Image,
    /// The range of data that was found and not yet handed out whole.
    ahead: Option<Range<u64>>,
    /// The ranges of blocks that are left to hand out, the last first; none: whatever holds data.
    only: Option<Vec<Range<u64>>>,
}

impl<'a> Queue<'a> {
    fn new(image: &'a Image, only: Option<&[Range<u64>]>) -> Result<Self, Error> {
        let only = only.map(|ranges| ranges.iter().rev().cloned().collect());
        let ahead = if only.is_some() { None } else { image.next_data(0)? };
        Ok(Self { image, ahead, only })
    }

    fn next(&mut self) -> Result<Option<Window>, Error> {
        if let Some(only) = &mut self.only {
            let Some(range) = only.pop() else { return Ok(None) };
            let window = range.start..range.end.min(range.start + WINDOW);
            if window.end < range.end {
                only.push(window.end..range.end);
            }
            let data = data_within(self.image, &window)?;
            return Ok(Some(Window { range: window, data }));
        }
        let Some(first) = &self.ahead else { return Ok(None) };
        let start = first.start / BLOCK * BLOCK;
        let range = start..(start + WINDOW).min(self.image.size());
        let mut data = Vec::new();
        while let Some(next) = self.ahead.take() {
            if next.start >= range.end {
                self.ahead = Some(next);
                break;
            }
            if next.end > range.end {
                self.ahead = Some(range.end..next.end);
                data.push(next.start..range.end);
                break;
            }
            self.ahead = self.image.next_data(next.end)?;
            data.push(next);
        }
        Ok(Some(Window { range, data }))
    }
}

fn data_within(image: &Image, window: &Range<u64>) -> Result<Vec<Range<u64>>, Error> {
    let (mut data, mut at) = (Vec::new(), window.start);
    while at < window.end
        && let Some(found) = image.next_data_before(at, window.end)?
    {
        at = found.end.min(window.end);
        data.push(found.start..at);
    }
    Ok(data)
}

/// What the threads share.
struct Pass<'a> {
    image: &'a Image,
    out: Option<(&'a File, &'a Path)>,
    /// Whether blocks may be in `out` already, from an earlier pass.
    again: bool,
    /// The image's block map, as far as it is known already: what is in it is not hashed.
    known: Option<&'a BlockMap>,
    work: &'a Work<'a>,
    queue: Mutex<Queue<'a>>,
    done: AtomicU64,
    total: u64,
    stop: AtomicBool,
}

pub(super) fn pass(
    image: &Image,
    out: Option<(&File, &Path)>,
    known: Option<&BlockMap>,
    work: &Work,
) -> Result<Exported, Error> {
    let total = data_bytes(image)?;
    let blocks = Pass::new(image, out, None, known, total, work)?.all()?;
    let data = blocks.into_iter().filter_map(|(index, digest)| Some((index, digest?)));
    Ok(Exported { block_map: BlockMap::from_data(image.size(), data), data_bytes: total })
}

/// Writes these ranges of blocks again, which `out` may have with other content: what it has of them now, none for a
/// hole.
pub(super) fn rewrite(
    image: &Image,
    (file, path): (&File, &Path),
    ranges: &[Range<u64>],
    work: &Work,
) -> Result<Vec<(u64, Option<Digest>)>, Error> {
    let total = ranges.iter().map(|range| range.end - range.start).sum();
    Pass::new(image, Some((file, path)), Some(ranges), None, total, work)?.all()
}

/// How many bytes of data there are in all.
pub(super) fn data_bytes(image: &Image) -> Result<u64, Error> {
    let (mut total, mut at) = (0, 0);
    while let Some(data) = image.next_data(at)? {
        total += data.end - data.start;
        at = data.end;
    }
    Ok(total)
}

impl<'a> Pass<'a> {
    fn new(
        image: &'a Image,
        out: Option<(&'a File, &'a Path)>,
        only: Option<&[Range<u64>]>,
        known: Option<&'a BlockMap>,
        total: u64,
        work: &'a Work<'a>,
    ) -> Result<Self, Error> {
        Ok(Self {
            image,
            out,
            again: only.is_some(),
            known: known.filter(|known| known.size() == image.size()),
            work,
            queue: Mutex::new(Queue::new(image, only)?),
            done: AtomicU64::new(0),
            total,
            stop: AtomicBool::new(false),
        })
    }

    /// All of it: the blocks that were written, or only hashed; none for a hole.
    fn all(&self) -> Result<Vec<(u64, Option<Digest>)>, Error> {
        (self.work.progress)(0, self.total);
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.work.threads.max(1)).map(|_| scope.spawn(|| self.run())).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            threads.into_iter().map(join).collect()
        });
        // A thread that stopped because another one failed has an empty result, never an error of its own.
        Ok(results.into_iter().collect::<Result<Vec<_>, Error>>()?.into_iter().flatten().collect())
    }

    /// One thread: windows until there are none, or until somebody fails.
    fn run(&self) -> Result<Vec<(u64, Option<Digest>)>, Error> {
        let mut hashed = Vec::new();
        let mut buffer = vec![0; usize::try_from(BLOCK).unwrap_or_default()];
        loop {
            let outcome = match self.take() {
                Ok(None) => return Ok(hashed),
                Ok(Some(window)) => self.window(&window, &mut buffer, &mut hashed),
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                self.stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
    }

    fn take(&self) -> Result<Option<Window>, Error> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).next()
    }

    fn window(&self, window: &Window, buffer: &mut [u8], blocks: &mut Vec<(u64, Option<Digest>)>) -> Result<(), Error> {
        let mut pieces = &window.data[..];
        let mut start = window.range.start;
        while start < window.range.end {
            let block = start..(start + BLOCK).min(window.range.end);
            start = block.end;
            pieces = &pieces[pieces.partition_point(|piece| piece.end <= block.start)..];
            let inside = &pieces[..pieces.partition_point(|piece| piece.start < block.end)];
            if inside.is_empty() && !self.again {
                continue;
            }
            if (self.work.cancelled)() {
                return Err(Error::Cancelled);
            }
            if let (true, Some((file, path))) = (self.again, self.out) {
                clear(file, &block).map_err(|source| Error::write(path, source))?;
            }
            let len = usize::try_from(block.end - block.start).unwrap_or_default();
            let digest = if inside.is_empty() { None } else { Some(self.block(&block, inside, &mut buffer[..len])?) };
            blocks.push((block.start / BLOCK, digest));
        }
        let bytes: u64 = if self.again {
            window.range.end - window.range.start
        } else {
            window.data.iter().map(|piece| piece.end - piece.start).sum()
        };
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.work.progress)(done, self.total);
        Ok(())
    }

    /// Reads, hashes and writes one block; outside the pieces it is a hole. What need not be hashed, the kernel copies.
    fn block(&self, block: &Range<u64>, pieces: &[Range<u64>], buffer: &mut [u8]) -> Result<Digest, Error> {
        let known = self.known.and_then(|known| known.block(block.start / BLOCK));
        if let (Some(digest), Some((file, _))) = (known, self.out) {
            let inside = |piece: &Range<u64>| piece.start.max(block.start)..piece.end.min(block.end);
            if pieces.iter().all(|piece| self.image.copy_within_kernel(inside(piece), file)) {
                return Ok(digest);
            }
        }
        let whole = matches!(pieces, [only] if only.start <= block.start && only.end >= block.end);
        if !whole {
            buffer.fill(0);
        }
        let within = |at: u64| usize::try_from(at.clamp(block.start, block.end) - block.start).unwrap_or_default();
        for piece in pieces {
            let part = &mut buffer[within(piece.start)..within(piece.end)];
            self.image.read(piece.start.max(block.start), part)?;
        }
        let digest = known.unwrap_or_else(|| Digest::of(buffer));
        if let Some((file, path)) = self.out {
            for piece in pieces {
                let part = &buffer[within(piece.start)..within(piece.end)];
                let at = piece.start.max(block.start);
                file.write_all_at(part, at).map_err(|source| Error::write(path, source))?;
            }
        }
        Ok(digest)
    }
}

/// Makes a hole; where the filesystem can't, zeros.
fn clear(file: &File, range: &Range<u64>) -> std::io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, range.start, range.end - range.start) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
            let zeros = vec![0; usize::try_from(range.end - range.start).unwrap_or_default()];
            file.write_all_at(&zeros, range.start)
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Backing;
    use crate::disk::Overlay;
    use crate::disk::testing::{Workshop, cases, sparse, text, tool};
    use proptest::prelude::*;
    use std::sync::Arc;

    /// A raw file of `size` bytes with `pieces` of data in it: `(start, length, byte)`.
    fn ranges(image: &Image) -> Vec<Range<u64>> {
        let (mut found, mut at) = (Vec::new(), 0);
        while let Some(range) = image.next_data(at).unwrap() {
            at = range.end;
            found.push(range);
        }
        found
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_raw_disk_keeps_its_holes_and_its_written_zeros() {
        let shop = Workshop::new();
        let (base, out) = (shop.path("base"), shop.path("out"));
        sparse(&base, 40 * MIB, &[(0, 4096, 1), (MIB, 4096, 0), (9 * MIB - 4096, 8192, 7), (40 * MIB - 4096, 4096, 9)]);
        let image = Image::raw(&base).unwrap();
        let exported = export(&image, &out, &Work::quiet(3)).unwrap();
        assert_eq!(std::fs::read(&base).unwrap(), std::fs::read(&out).unwrap());
        let written = Image::raw(&out).unwrap();
        assert_eq!(ranges(&image), ranges(&written));
        assert_eq!(exported.data_bytes, 4 * 4096 + 4096);
        let data: Vec<u64> = exported.block_map.data().map(|(index, _)| index).collect();
        assert_eq!(data, [0, 2, 17, 18, 79]);
        assert_eq!(BlockMap::of_raw(&out, &Work::quiet(2)).unwrap(), exported.block_map);
        assert_eq!(exported.block_map.blocks()[2], Some(Digest::of(&vec![0; 512 << 10])));
    }

    #[test]
    fn an_uneven_end() {
        let shop = Workshop::new();
        let base = shop.path("base");
        sparse(&base, BLOCK + 1536, &[(BLOCK + 512, 1024, 5)]);
        let exported = export(&Image::raw(&base).unwrap(), &shop.path("out"), &Work::quiet(0)).unwrap();
        let last = [&[0; 512][..], &[5; 1024]].concat();
        assert_eq!(exported.block_map.blocks(), [None, Some(Digest::of(&last))]);
        assert_eq!(exported.block_map.data_bytes(), 1536);
    }

    #[test]
    fn an_empty_disk_is_one_hole() {
        let shop = Workshop::new();
        sparse(&shop.path("base"), 3 * MIB, &[]);
        let image = Image::raw(&shop.path("base")).unwrap();
        let exported = export(&image, &shop.path("out"), &Work::quiet(2)).unwrap();
        assert_eq!(exported, Exported { block_map: BlockMap::hole(3 * MIB), data_bytes: 0 });
        assert_eq!(std::fs::metadata(shop.path("out")).unwrap().len(), 3 * MIB);
    }

    #[test]
    fn verify_names_the_blocks_that_differ() {
        let shop = Workshop::new();
        let base = shop.path("base");
        sparse(&base, 8 * MIB, &[(0, 4096, 1), (5 * MIB, 4096, 2)]);
        let map = BlockMap::of_raw(&base, &Work::quiet(2)).unwrap();
        sparse(&base, 8 * MIB, &[(0, 4096, 1), (5 * MIB, 4096, 3), (7 * MIB, 4096, 0)]);
        let image = Image::raw(&base).unwrap();
        assert_eq!(map.verify(&image, &Work::quiet(2)).unwrap(), [10]);
    }

    #[test]
    fn progress_and_cancelling() {
        let shop = Workshop::new();
        sparse(&shop.path("base"), 64 * MIB, &[(0, 64 << 20, 3)]);
        let image = Image::raw(&shop.path("base")).unwrap();
        let last = Mutex::new((0, 0));
        let never = || false;
        let heard = Work {
            threads: 4,
            progress: &|done, total| {
                let mut last = last.lock().unwrap();
                *last = (*last).max((done, total));
            },
            cancelled: &never,
        };
        BlockMap::of_image(&image, &heard).unwrap();
        assert_eq!(*last.lock().unwrap(), (64 * MIB, 64 * MIB));
        let asked = AtomicU64::new(0);
        let after_some = || asked.fetch_add(1, Ordering::Relaxed) > 9;
        let work = Work { threads: 4, progress: &|_, _| (), cancelled: &after_some };
        assert!(matches!(BlockMap::of_image(&image, &work), Err(Error::Cancelled)));
        assert!(asked.load(Ordering::Relaxed) < 20);
    }

    #[test]
    fn a_full_disk_and_an_existing_file() {
        let shop = Workshop::new();
        let image = Image::new(Arc::new(vec![1; 4 << 20]), Path::new("memory")).unwrap();
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let result = pass(&image, Some((&full, Path::new("/out/disk.raw"))), None, &Work::quiet(2));
        assert_eq!(result.unwrap_err().to_string(), "no space left for /out/disk.raw");
        std::fs::write(shop.path("out"), "precious").unwrap();
        assert!(matches!(export(&image, &shop.path("out"), &Work::quiet(1)), Err(Error::Create { .. })));
        assert_eq!(std::fs::read(shop.path("out")).unwrap(), b"precious");
    }

    proptest! {
        #![proptest_config(cases(24))]
        /// An overlay that qemu-io wrote to exports to what qemu-img makes of it.
        #[test]
        fn like_qemu_img(
            pieces in proptest::collection::vec((0_u64..20_000, 1_usize..300_000, 0_u8..4), 0..12),
            writes in proptest::collection::vec((0_u64..24_000, 1_u64..3000, 0_u8..4), 0..16),
            threads in 1_usize..5,
        ) {
            let shop = Workshop::new();
            let (base, disk) = (shop.path("base.raw"), shop.path("disk.qcow2"));
            let pieces: Vec<_> = pieces.into_iter().map(|(at, len, byte)| (at * 512, len, byte)).collect();
            sparse(&base, 10 << 20, &pieces);
            Overlay::create(&disk, 14 << 20, Backing::Raw(&base), &[]).unwrap();
            let size = 14 << 20 >> 9;
            let commands: Vec<String> = writes.iter().map(|(at, len, how)| {
                let how = ["write -P 5", "write -z", "write -z -u", "discard"][usize::from(*how)];
                format!("{how} {} {}", at * 512, (*len).min(size - at) * 512)
            }).collect();
            let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
            arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
            arguments.push(text(&disk));
            tool("qemu-io", &arguments);
            let (ours, theirs) = (shop.path("ours.raw"), shop.path("theirs.raw"));
            let image = Image::overlay(&disk).unwrap();
            let exported = export(&image, &ours, &Work::quiet(threads)).unwrap();
            tool("qemu-img", &["convert", "-O", "raw", text(&disk), text(&theirs)]);
            let bytes = std::fs::read(&ours).unwrap();
            prop_assert!(bytes == std::fs::read(&theirs).unwrap());
            let in_memory = Image::new(Arc::new(bytes), Path::new("memory")).unwrap();
            let all_data = BlockMap::of_image(&in_memory, &Work::quiet(2)).unwrap();
            prop_assert_eq!(all_data.digest(), exported.block_map.digest());
            prop_assert_eq!(all_data.differences(&exported.block_map), Vec::<u64>::new());
            // Outside what either calls data, both files have holes; data is what the overlay says, in 4 KiB pages.
            let page = |range: Range<u64>| range.start / 4096 * 4096..range.end.next_multiple_of(4096).min(14 << 20);
            let wanted: Vec<_> = ranges(&image).into_iter().map(page).collect();
            for found in ranges(&Image::raw(&ours).unwrap()) {
                prop_assert!(wanted.iter().any(|range| range.start < found.end && found.start < range.end));
            }
            let total: u64 = wanted.iter().map(|range| range.end - range.start).sum();
            let found: u64 = ranges(&Image::raw(&ours).unwrap()).iter().map(|range| range.end - range.start).sum();
            prop_assert!(found <= total);
        }
    }
}
