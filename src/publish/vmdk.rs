//! The disk as a VMDK that is made while it is uploaded: parts in order, none kept longer than it takes to send it.
//!
//! The stream is the same each time, so that what an earlier run has sent of it is known by the digests of its parts.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::Job;
use super::parts::{self, Digest, Part};
use super::send::{Body, How, Line, Sending, Sent, Tally, UPLOAD_GONE};
use super::upload::Lost;
use crate::disk::{self, Image, Work, write_vmdk};
use crate::error::{Error, Exit};
use crate::event::Event;
use crate::units::MIB;

/// How long parts are, in MiB, and up to which number. Nobody knows how long the stream will be: they begin short, and grow
/// so that the 10,000 that S3 takes are enough for [`LARGEST`].
const LENGTHS: [(i32, u64); 3] = [(3000, 8), (6000, 16), (10_000, 32)];
/// How long the stream can be, in bytes.
const LARGEST: u64 = (3000 * 8 + 3000 * 16 + 4000 * 32) * MIB;
/// How much of the stream is in memory, in MiB: parts that are made, wait, or are on their way.
const BESIDE: usize = 64;

/// A part of the stream.
struct Piece {
    part: Part,
    digest: Digest,
    bytes: Vec<u8>,
    /// How much of the disk's data it has, in bytes.
    data: u64,
    /// And how much data there is in all.
    total: u64,
    /// The room in memory that it takes.
    _room: Option<OwnedSemaphorePermit>,
}

/// What S3 says of an object that is made of the stream, and how long it is.
pub(super) async fn checksum(job: &Job<'_>, disk: &Arc<File>) -> Result<(u64, String), Error> {
    let image = opened(job, disk)?;
    let all = move || {
        let (mut size, mut digests) = (0, Vec::new());
        make(&image, None, |piece| {
            size += piece.part.length;
            digests.push(piece.digest);
            true
        })?;
        Ok((size, parts::composite(&digests)))
    };
    let made = job.stop.or("the digests of the VMDK", tokio::task::spawn_blocking(all)).await?;
    made.map_err(|error| Lost::Bug(error).into_error(job))?.map_err(|error| failed(&error))
}

/// How many parts the stream can have, and how many bytes. How many it has, only making it tells.
pub(super) async fn most(job: &Job<'_>, disk: &Arc<File>) -> Result<(u64, u64), Error> {
    let image = opened(job, disk)?;
    let most = move || disk::longest_vmdk(&image);
    let most = job.stop.or("the length of the VMDK", tokio::task::spawn_blocking(most)).await?;
    let most = most.map_err(|error| Lost::Bug(error).into_error(job))?.map_err(|error| failed(&error))?;
    Ok((parts_of(most), most))
}

/// How many parts so many bytes are.
fn parts_of(bytes: u64) -> u64 {
    let (mut parts, mut left, mut before) = (0, bytes, 0);
    for (last, mib) in LENGTHS {
        let some = left.div_ceil(mib * MIB).min(u64::from((last - before).unsigned_abs()));
        (parts, left, before) = (parts + some, left.saturating_sub(some * mib * MIB), last);
    }
    parts
}

/// Makes the stream and sends what S3 doesn't have of it.
pub(super) async fn send(job: &Job<'_>, disk: &Arc<File>, line: &Arc<Line>, tally: &Tally) -> Result<Sending, Error> {
    let (give, mut pieces) = mpsc::channel(1);
    let (image, room) = (opened(job, disk)?, (Handle::current(), Arc::new(Semaphore::new(BESIDE))));
    let maker =
        tokio::task::spawn_blocking(move || make(&image, Some(room), |piece| give.blocking_send(piece).is_ok()));
    let mut running: JoinSet<Result<(Sent, u64), Lost>> = JoinSet::new();
    let (mut sent, mut more, mut done, mut kept) = (Vec::new(), true, 0, 0);
    let mut total = 0;
    while more || !running.is_empty() {
        let next = async {
            tokio::select! {
                piece = pieces.recv(), if more && running.len() < job.request.parallel.max(1) => Ok(piece),
                Some(ended) = running.join_next() => Err(ended),
            }
        };
        match job.stop.or("the upload", next).await? {
            Ok(Some(piece)) => {
                total = piece.total;
                running.spawn(piece.send(Arc::clone(line)));
            }
            Ok(None) => more = false,
            Err(ended) => match ended.unwrap_or_else(|error| Err(Lost::Bug(error))) {
                Ok((one, data)) => {
                    *(if one.how == How::Kept { &mut kept } else { &mut done }) += data;
                    tally.add(&one);
                    sent.push(one);
                    job.events.emit(Event::Progress { phase: "upload", done, total: total - kept });
                }
                Err(Lost::Refused(failure)) if failure.code == UPLOAD_GONE => return Ok(Sending::Gone),
                Err(lost) => return Ok(Sending::Failed(lost)),
            },
        }
    }
    let made = job.stop.or("the end of the VMDK", maker).await?;
    made.map_err(|error| Lost::Bug(error).into_error(job))?.map_err(|error| failed(&error))?;
    sent.sort_unstable_by_key(|one| one.part.number);
    Ok(Sending::Done(sent))
}

impl Piece {
    async fn send(self, line: Arc<Line>) -> Result<(Sent, u64), Lost> {
        let Self { part, digest, bytes, data, _room, .. } = self;
        if let Some(kept) = line.kept(part, digest) {
            return Ok((kept, data));
        }
        let sent = line.deliver(part, digest, &Body::Memory(bytes.into())).await?;
        Ok((sent, data))
    }
}

fn failed(error: &disk::Error) -> Error {
    use std::error::Error as _;
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    let failure = Error::new(Exit::Input, format!("cannot make a VMDK of the disk: {error}{cause}"));
    match error {
        disk::Error::Write { .. } => failure.help(format!(
            "it would have more than {} GiB, which S3 doesn't take in parts that kiln can keep in memory; use --disk-format raw",
            LARGEST >> 30
        )),
        _ => failure,
    }
}

/// Where the stream waits until there is room for its next part.
type Room = (Handle, Arc<Semaphore>);

/// The disk that is open already: at its path there may be another one by now.
fn opened(job: &Job<'_>, disk: &Arc<File>) -> Result<Image, Error> {
    Image::new(Arc::<File>::clone(disk), &job.request.disk).map_err(|error| failed(&error))
}

/// Makes the stream; ends early once `take` says that it takes no more.
fn make(image: &Image, room: Option<Room>, take: impl FnMut(Piece) -> bool) -> Result<(), disk::Error> {
    let (done, total) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |so_far, all| {
        done.store(so_far, Ordering::Relaxed);
        total.store(all, Ordering::Relaxed);
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    let mut cutter = Cutter { take, room, next: None, number: 0, told: 0, done: &done, total: &total, gone: false };
    let made = write_vmdk(image, &mut cutter, &Work { threads, progress: &progress, cancelled: &|| false });
    // Whoever takes no more knows why.
    if cutter.gone { Ok(()) } else { made.map(|()| cutter.finish()) }
}

/// Cuts the stream into parts.
struct Cutter<'a, T> {
    take: T,
    room: Option<Room>,
    /// The part that is being filled, how long it will be, and the room for it.
    next: Option<(Vec<u8>, usize, Option<OwnedSemaphorePermit>)>,
    number: i32,
    /// How much of the data is in parts.
    told: u64,
    done: &'a AtomicU64,
    total: &'a AtomicU64,
    gone: bool,
}

impl<T: FnMut(Piece) -> bool> Cutter<'_, T> {
    fn begin(&mut self) -> io::Result<(Vec<u8>, usize, Option<OwnedSemaphorePermit>)> {
        let full = || io::Error::other("S3 takes no further part");
        let (_, mib) = LENGTHS.into_iter().find(|(last, _)| self.number < *last).ok_or_else(full)?;
        let room = self.room.as_ref().map(|(runtime, room)| {
            let wanted = u32::try_from(mib).unwrap_or(u32::MAX);
            runtime.block_on(Arc::clone(room).acquire_many_owned(wanted)).map_err(io::Error::other)
        });
        self.number += 1;
        let length = usize::try_from(mib * MIB).unwrap_or(usize::MAX);
        Ok((Vec::with_capacity(length), length, room.transpose()?))
    }

    fn hand_over(&mut self, bytes: Vec<u8>, room: Option<OwnedSemaphorePermit>) -> bool {
        let part = Part { number: self.number, length: bytes.len() as u64 };
        let (done, total) = (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        let piece =
            Piece { part, digest: Sha256::digest(&bytes).into(), bytes, data: done - self.told, total, _room: room };
        self.told = done;
        self.gone |= !(self.take)(piece);
        !self.gone
    }

    /// The last part is as long as it is.
    fn finish(mut self) {
        if let Some((bytes, _, room)) = self.next.take().filter(|(bytes, ..)| !bytes.is_empty()) {
            self.hand_over(bytes, room);
        }
    }
}

impl<T: FnMut(Piece) -> bool> Write for Cutter<'_, T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (mut part, length, room) = match self.next.take() {
            Some(next) => next,
            None => self.begin()?,
        };
        let some = bytes.len().min(length - part.len());
        part.extend_from_slice(&bytes[..some]);
        if part.len() < length {
            self.next = Some((part, length, room));
        } else if !self.hand_over(part, room) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(some)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_the_stream_and_the_same_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.raw");
        // Bytes that don't get smaller, for two parts and a bit.
        let mut state = 1_u64;
        let noise = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            u8::try_from(state >> 56).unwrap()
        });
        std::fs::write(&disk, noise.take(18 << 20).collect::<Vec<_>>()).unwrap();
        let image = Image::new(Arc::new(File::open(&disk).unwrap()), &disk).unwrap();
        let mut stream = Vec::new();
        write_vmdk(&image, &mut stream, &Work::quiet(2)).unwrap();

        let (mut joined, mut data, mut numbers) = (Vec::<u8>::new(), 0, Vec::new());
        make(&image, None, |piece| {
            assert_eq!(piece.digest, Digest::from(Sha256::digest(&piece.bytes)));
            numbers.push((piece.part.number, piece.part.length));
            joined.extend(&piece.bytes);
            data += piece.data;
            true
        })
        .unwrap();
        assert!(joined == stream);
        assert_eq!(data, 18 << 20);
        assert_eq!(numbers[..2], [(1, 8 * MIB), (2, 8 * MIB)]);
        assert_eq!(numbers.len(), 3);

        let mut taken = 0;
        make(&image, None, |_| {
            taken += 1;
            false
        })
        .unwrap();
        assert_eq!(taken, 1, "nobody wants more");
    }

    #[test]
    fn parts_grow_within_what_s3_takes() {
        let mut lengths = Vec::new();
        let zero = AtomicU64::new(0);
        let mut cutter = Cutter {
            take: |_: Piece| true,
            room: None,
            next: None,
            number: 0,
            told: 0,
            done: &zero,
            total: &zero,
            gone: false,
        };
        while let Ok((_, length, _)) = cutter.begin() {
            lengths.push(length as u64);
        }
        assert_eq!(lengths.len(), 10_000);
        assert_eq!(lengths.iter().sum::<u64>(), LARGEST);
        assert!(lengths.is_sorted());
        let bytes = |parts| lengths[..parts].iter().sum::<u64>();
        for parts in [1, 2999, 3000, 3001, 6000, 6001, 10_000] {
            assert_eq!([bytes(parts) - 1, bytes(parts)].map(parts_of), [parts as u64; 2]);
        }
    }
}
