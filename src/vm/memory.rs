//! A guest's memory: a file without a name that QEMU maps, so that kiln can keep what is in it and fill it again, on all
//! processors and without QEMU in between. QEMU's own stream of a saved guest then has only its devices.
//!
//! What is kept is one file, in any order but for its end:
//!
//! ```text
//! "kilnmem1"
//! record...   a chunk of the memory: those of its pages that are not zero
//! record      the devices: QEMU's stream. Who finds it last has found everything.
//! ```
//!
//! A record is a head (`Head`, little-endian) and its bytes, compressed as one LZ4 block: memory shrinks two- to
//! fourfold, and that is faster than to have the host take twice as many bytes.

use std::fs::{File, OpenOptions};
use std::hash::Hasher as _;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, ScopedJoinHandle};

use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use twox_hash::XxHash64;

use crate::units::Size;

const MAGIC: [u8; 8] = *b"kilnmem1";
const PAGE: usize = 4096;
const PAGES: usize = 256;
/// What a record of memory stands for, in bytes.
const CHUNK: usize = PAGES * PAGE;
/// The number of the record that has the devices.
const DEVICES: u64 = u64::MAX;
/// More than the devices of any machine take.
const MOST_DEVICES: usize = 64 << 20;
/// More would wait for the file.
const MOST_THREADS: usize = 8;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// The memory of one guest. It is gone when neither this nor QEMU has it any more.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    size: u64,
    given_up: AtomicBool,
}

/// A guest's memory that is being read from a file. Dropped before it is read, it is given up.
pub struct Loading {
    memory: Arc<GuestMemory>,
    thread: Option<JoinHandle<io::Result<Vec<u8>>>>,
}

impl GuestMemory {
    /// An empty memory: it reads as zeros, and takes no room.
    ///
    /// # Errors
    /// When the host has no more files to give.
    pub fn create(size: Size) -> io::Result<Self> {
        let file = File::from(memfd_create("guest-memory", MemfdFlags::CLOEXEC)?);
        file.set_len(size.bytes())?;
        Ok(Self { file, size: size.bytes(), given_up: AtomicBool::new(false) })
    }

    /// Where QEMU finds it, as long as kiln has it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Ends what is being read or written, with an error.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    fn go_on(&self) -> io::Result<()> {
        if self.given_up.load(Ordering::Relaxed) { Err(io::Error::other("it was given up")) } else { Ok(()) }
    }

    /// Begins a file that keeps this memory: all but the devices. The guest must stand still meanwhile.
    ///
    /// # Errors
    /// When the file can't be written.
    pub(super) fn keep(&self, path: &Path) -> io::Result<Keeping> {
        // It may hold what nobody else shall read.
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(&MAGIC)?;
        let keeping = Keeping { file: Mutex::new(file), bytes: AtomicU64::new(0) };
        let next = AtomicU64::new(0);
        on_all_processors(|| {
            let (mut plain, mut packed) = (vec![0; CHUNK], Vec::new());
            loop {
                self.go_on()?;
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index * CHUNK as u64 >= self.size {
                    return Ok(());
                }
                let (pages, bytes) = self.chunk(index, &mut plain)?;
                if bytes > 0 {
                    keeping.write(index, pages, &plain[..bytes], &mut packed)?;
                }
            }
        })?;
        Ok(keeping)
    }

    /// Which pages of a chunk are not zero, and how many bytes they have, which are in `plain` then, one after the other.
    fn chunk(&self, index: u64, plain: &mut [u8]) -> io::Result<(Pages, usize)> {
        let start = index * CHUNK as u64;
        let end = self.size.min(start + CHUNK as u64);
        let (mut pages, mut bytes) = (Pages::default(), 0);
        // What no guest has touched is a hole: nothing is read there.
        match seek(&self.file, SeekFrom::Data(start)) {
            Ok(data) if data < end => {}
            Ok(_) | Err(rustix::io::Errno::NXIO) => return Ok((pages, bytes)),
            Err(error) => return Err(error.into()),
        }
        let len = usize::try_from(end - start).unwrap_or(CHUNK);
        self.file.read_exact_at(&mut plain[..len], start)?;
        for page in 0..len / PAGE {
            let range = page * PAGE..(page + 1) * PAGE;
            if plain[range.clone()] != ZEROS {
                pages[page / 8] |= 1 << (page % 8);
                plain.copy_within(range, bytes);
                bytes += PAGE;
            }
        }
        Ok((pages, bytes))
    }

    /// Fills this memory, which must be empty, with what `file` has kept, in the background.
    #[must_use]
    pub fn load(self: Arc<Self>, file: File) -> Loading {
        let memory = Arc::clone(&self);
        let thread = Some(std::thread::spawn(move || self.fill(file)));
        Loading { memory, thread }
    }

    fn fill(&self, mut file: File) -> io::Result<Vec<u8>> {
        let mut magic = [0; MAGIC.len()];
        file.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(damaged());
        }
        let (file, devices) = (Mutex::new(file), Mutex::new(None));
        on_all_processors(|| {
            let (mut plain, mut packed) = (vec![0; CHUNK], Vec::new());
            while let Some(head) = Head::read(&file, &mut packed)? {
                self.go_on()?;
                if head.index == DEVICES {
                    let mut stream = vec![0; head.plain];
                    unpack(&packed, &mut stream)?;
                    *lock(&devices) = Some(stream);
                } else {
                    let plain = plain.get_mut(..head.plain).ok_or_else(damaged)?;
                    unpack(&packed, plain)?;
                    self.put(&head, plain)?;
                }
            }
            Ok(())
        })?;
        devices.into_inner().unwrap_or_else(PoisonError::into_inner).ok_or_else(damaged)
    }

    /// Writes a chunk's pages where they belong.
    fn put(&self, head: &Head, mut plain: &[u8]) -> io::Result<()> {
        let start = head.index.checked_mul(CHUNK as u64).filter(|start| *start < self.size).ok_or_else(damaged)?;
        let present = |page: &usize| head.pages[page / 8] & 1 << (page % 8) != 0;
        let mut page = 0;
        while page < PAGES {
            let end = (page..PAGES).find(|page| !present(page)).unwrap_or(PAGES);
            let (run, rest) = plain.split_at_checked((end - page) * PAGE).ok_or_else(damaged)?;
            self.file.write_all_at(run, start + (page * PAGE) as u64)?;
            (plain, page) = (rest, end + 1);
        }
        Ok(())
    }
}

impl Loading {
    /// The stream of the devices, once the memory is filled.
    ///
    /// # Errors
    /// When the file can't be read, or is not whole.
    pub fn wait(mut self) -> io::Result<Vec<u8>> {
        let Some(thread) = self.thread.take() else { return Err(io::Error::other("it was read before")) };
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the reader panicked")))
    }

    /// Whether [`wait`](Self::wait) would not wait.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Another guest may be about to need the room.
            self.memory.give_up();
            let _ = thread.join();
        }
    }
}

/// A file that keeps a memory, and lacks the devices.
pub(super) struct Keeping {
    file: Mutex<File>,
    bytes: AtomicU64,
}

impl Keeping {
    /// Ends the file. How many bytes it keeps, before they were compressed.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn end(self, devices: &[u8]) -> io::Result<u64> {
        self.write(DEVICES, Pages::default(), devices, &mut Vec::new())?;
        Ok(self.bytes.into_inner())
    }

    fn write(&self, index: u64, pages: Pages, plain: &[u8], packed: &mut Vec<u8>) -> io::Result<()> {
        packed.resize(get_maximum_output_size(plain.len()), 0);
        let length = compress_into(plain, packed).map_err(io::Error::other)?;
        let head = Head { index, pages, plain: plain.len(), packed: length };
        self.bytes.fetch_add(plain.len() as u64, Ordering::Relaxed);
        let head = head.bytes(&packed[..length])?;
        let mut file = lock(&self.file);
        file.write_all(&head)?;
        file.write_all(&packed[..length])
    }
}

/// Which pages of a chunk a record has: a bit for each.
type Pages = [u8; PAGES / 8];

/// What stands before a record's bytes.
struct Head {
    index: u64,
    pages: Pages,
    /// Lengths in bytes, before and after compression.
    plain: usize,
    packed: usize,
}

impl Head {
    /// Number, pages, two lengths, and a checksum over all that and the record's bytes.
    const BYTES: usize = 8 + PAGES / 8 + 4 + 4 + 8;

    fn bytes(&self, packed: &[u8]) -> io::Result<Vec<u8>> {
        let length = |length: usize| u32::try_from(length).map(u32::to_le_bytes).map_err(io::Error::other);
        let mut bytes = [&self.index.to_le_bytes()[..], &self.pages].concat();
        bytes.extend(length(self.plain)?);
        bytes.extend(length(self.packed)?);
        bytes.extend(checksum(&bytes, packed).to_le_bytes());
        Ok(bytes)
    }

    /// The next record, its bytes in `packed`; none after the last.
    fn read(file: &Mutex<File>, packed: &mut Vec<u8>) -> io::Result<Option<Self>> {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        let mut file = lock(file);
        (&*file).take(Self::BYTES as u64).read_to_end(&mut bytes)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let number = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        let length = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)?.try_into().ok();
        let head = || {
            let pages = bytes.get(8..8 + PAGES / 8)?.try_into().ok()?;
            Some((Self { index: number(0)?, pages, plain: length(40)?, packed: length(44)? }, number(48)?))
        };
        let (head, sum) = head().ok_or_else(damaged)?;
        let most = if head.index == DEVICES { MOST_DEVICES } else { CHUNK };
        if head.plain > most || head.packed > get_maximum_output_size(most) {
            return Err(damaged());
        }
        packed.resize(head.packed, 0);
        file.read_exact(packed)?;
        drop(file);
        if checksum(&bytes[..48], packed) == sum { Ok(Some(head)) } else { Err(damaged()) }
    }
}

fn unpack(packed: &[u8], plain: &mut [u8]) -> io::Result<()> {
    if decompress_into(packed, plain).is_ok_and(|length| length == plain.len()) { Ok(()) } else { Err(damaged()) }
}

fn checksum(head: &[u8], packed: &[u8]) -> u64 {
    let mut hasher = XxHash64::default();
    hasher.write(head);
    hasher.write(packed);
    hasher.finish()
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is damaged")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs it on as many threads as there are processors, and waits for all; the first error is the result.
fn on_all_processors(work: impl Fn() -> io::Result<()> + Sync) -> io::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(&work)).collect();
        let results = threads.into_iter().map(ScopedJoinHandle::join);
        let results = results.map(|result| result.unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))));
        results.fold(Ok(()), Result::and)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn filled(size: u64, pieces: &[(u64, Vec<u8>)]) -> GuestMemory {
        let memory = GuestMemory::create(Size(size)).unwrap();
        for (at, bytes) in pieces {
            memory.file.write_all_at(bytes, *at).unwrap();
        }
        memory
    }

    fn content(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(memory.size).unwrap()];
        memory.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn loaded(path: &Path, size: u64) -> io::Result<(GuestMemory, Vec<u8>)> {
        let memory = Arc::new(GuestMemory::create(Size(size)).unwrap());
        let devices = Arc::clone(&memory).load(File::open(path).unwrap()).wait()?;
        Ok((Arc::into_inner(memory).unwrap(), devices))
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let noise: Vec<u8> = (0..350_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let memory = filled(16 * MIB, &[(5 * MIB - 4096, noise)]);
        assert_eq!(memory.keep(&path).unwrap().end(b"the devices").unwrap(), 1_400_832 + 11);
        let whole = std::fs::read(&path).unwrap();
        assert!(whole.len() < 700_000);
        let (restored, devices) = loaded(&path, 16 * MIB).unwrap();
        assert!(content(&restored) == content(&memory));
        assert_eq!(devices, b"the devices");
        assert!(loaded(&path, 4 * MIB).is_err(), "of a larger guest");
        for at in (0..whole.len()).step_by(whole.len() / 150) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            assert!(loaded(&path, 16 * MIB).is_err(), "byte {at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(loaded(&path, 16 * MIB).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn what_nobody_waits_for_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        filled(16 * MIB, &[(0, vec![7; 9 << 20])]).keep(&path).unwrap().end(b"").unwrap();
        let memory = Arc::new(GuestMemory::create(Size(16 * MIB)).unwrap());
        drop(Arc::clone(&memory).load(File::open(&path).unwrap()));
        assert_eq!(Arc::strong_count(&memory), 1, "nobody fills it any more");
        assert!(memory.keep(&folder.path().join("again")).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]
        /// What was kept comes back, wherever it is, and what is zero is not kept.
        #[test]
        fn comes_back(
            pages in 1_u64..700,
            pieces in proptest::collection::vec((0_u64..700, 1_usize..90_000, 0_u8..3), 0..8),
            devices in proptest::collection::vec(any::<u8>(), 0..3000),
        ) {
            let size = pages * PAGE as u64;
            let pieces: Vec<_> = pieces.into_iter().map(|(page, len, byte)| {
                let at = page % pages * PAGE as u64;
                (at, vec![byte; len.min(usize::try_from(size - at).unwrap())])
            }).collect();
            let memory = filled(size, &pieces);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("memory");
            let kept = memory.keep(&path).unwrap().end(&devices).unwrap();
            let (restored, stream) = loaded(&path, size).unwrap();
            let content = content(&memory);
            prop_assert!(self::content(&restored) == content);
            prop_assert_eq!(stream, devices.clone());
            let full = content.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count();
            prop_assert_eq!(kept, (full * PAGE + devices.len()) as u64);
        }
    }
}
