//! A running guest is kept: its disk goes on in a new overlay, its memory goes into a file, and later another QEMU takes
//! both up where they were.
//!
//! QEMU's migration stream passes through kiln on a UNIX socket, so that it is compressed on its way, and no program is
//! needed in between. While the stream is written the guest stands still, so it is written once and is consistent with
//! the disk that was left behind.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lz4_flex::frame::{FrameDecoder, FrameEncoder, FrameInfo};
use serde_json::json;

use super::Error;
use super::process::{Machine, Signal};
use super::spec::MEMORY_SOCKET;

/// How long a guest's memory may take to be written or read.
const LIMIT: Duration = Duration::from_secs(300);
/// Where the memory of a guest that is saved comes out.
const SAVE_SOCKET: &str = "memory-out";

/// What saving a guest cost.
#[derive(Debug, Clone, Copy)]
pub struct Saved {
    /// How long the guest stood still.
    pub took: Duration,
    /// Bytes of the stream before it was compressed.
    pub stream: u64,
}

impl Machine {
    /// Lets the guest go on in the overlay `fresh`, which must be empty and have the guest's present disk behind it.
    /// That disk is not written any more. With `memory` the guest's memory at that moment is written there.
    ///
    /// `node` names the block node that is written now, `next` the new one. `folder` is where QEMU runs.
    ///
    /// # Errors
    /// When QEMU refuses or dies, or the file can't be written. The guest may stand still then.
    pub fn checkpoint(
        &mut self,
        (node, next): (String, String),
        fresh: &Path,
        memory: Option<&Path>,
        folder: &Path,
    ) -> Result<Saved, Error> {
        let started = Instant::now();
        self.monitor("stop", &json!({}))?;
        let overlay = json!({
            "driver": "qcow2", "node-name": next, "discard": "unmap", "backing": null,
            "file": { "driver": "file", "filename": fresh, "discard": "unmap" },
            "cache": { "no-flush": true },
        });
        self.monitor("blockdev-add", &overlay)?;
        self.monitor("blockdev-snapshot", &json!({ "node": node, "overlay": next }))?;
        let stream = match memory {
            Some(path) => self.save(path, folder)?,
            None => 0,
        };
        self.monitor("cont", &json!({}))?;
        Ok(Saved { took: started.elapsed(), stream })
    }

    fn save(&mut self, path: &Path, folder: &Path) -> Result<u64, Error> {
        let (listener, socket) = listen(folder).map_err(Error::io("cannot make sockets"))?;
        // It may hold what nobody else shall read.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(Error::io("cannot write the guest's memory"))?;
        let writer = std::thread::spawn(move || {
            let (stream, _) = listener.accept()?;
            compress(stream, file)
        });
        self.announce_migration()?;
        self.monitor("migrate", &json!({ "uri": format!("unix:{SAVE_SOCKET}") }))?;
        let saved = self.wait_for_migration("the guest's memory to be written");
        let _ = std::fs::remove_file(socket);
        if saved.is_err() {
            // The writer waits for a QEMU that may never connect: it is left to end with the process.
            saved?;
        }
        let written = writer.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")));
        written.map_err(Error::io("cannot write the guest's memory"))
    }

    /// Gives a QEMU that waits for it a saved memory, and lets the guest go on.
    ///
    /// # Errors
    /// When the file is damaged, or QEMU doesn't take it.
    pub fn restore(&mut self, memory: &Path, folder: &Path) -> Result<(), Error> {
        let file = File::open(memory).map_err(Error::io("cannot read the guest's memory"))?;
        self.announce_migration()?;
        self.monitor("migrate-incoming", &json!({ "uri": format!("unix:{MEMORY_SOCKET}") }))?;
        let stream = connect(folder).map_err(Error::io("cannot reach QEMU"))?;
        let reader = std::thread::spawn(move || decompress(file, stream));
        let restored = self.wait_for_migration("the guest's memory to be read");
        let read = reader.join().unwrap_or_else(|_| Err(io::Error::other("the reader panicked")));
        // QEMU's word for a stream that ends early says less than the reader's.
        if let Err(error) = read
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            return Err(Error::io("cannot read the guest's memory")(error));
        }
        restored?;
        self.monitor("cont", &json!({}))?;
        Ok(())
    }

    fn announce_migration(&mut self) -> Result<(), Error> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.monitor("migrate-set-capabilities", &events)?;
        // The default would take seconds for what a socket carries in a moment.
        self.monitor("migrate-set-parameters", &json!({ "max-bandwidth": 1_u64 << 40 }))?;
        Ok(())
    }

    fn wait_for_migration(&mut self, awaited: &str) -> Result<(), Error> {
        let status = self.wait_for(awaited, LIMIT, |signal| match signal {
            Signal::Event(event) if event["event"] == "MIGRATION" => {
                let status = event["data"]["status"].as_str().unwrap_or_default();
                matches!(status, "completed" | "failed" | "cancelled").then(|| status.to_owned())
            }
            _ => None,
        })?;
        match status.as_str() {
            "completed" => Ok(()),
            status => Err(Error::Monitor { command: "migrate".to_owned(), answer: status.to_owned() }),
        }
    }
}

/// Through `/proc/self/fd`, so that a folder of any depth will do.
fn listen(folder: &Path) -> io::Result<(UnixListener, PathBuf)> {
    let handle = File::open(folder)?;
    let path = folder.join(SAVE_SOCKET);
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{SAVE_SOCKET}", handle.as_raw_fd()))?;
    Ok((listener, path))
}

fn connect(folder: &Path) -> io::Result<UnixStream> {
    let handle = File::open(folder)?;
    let stream = UnixStream::connect(format!("/proc/self/fd/{}/{MEMORY_SOCKET}", handle.as_raw_fd()))?;
    let _ = std::fs::remove_file(folder.join(MEMORY_SOCKET));
    Ok(stream)
}

/// Memory compresses two- to fourfold even by LZ4, which is as fast as the page cache takes it. The frame's checksum
/// tells a damaged file from a whole one.
fn compress(stream: impl Read, file: File) -> io::Result<u64> {
    let info = FrameInfo::new().content_checksum(true).block_checksums(true);
    let mut encoder = FrameEncoder::with_frame_info(info, BufWriter::with_capacity(1 << 20, file));
    let bytes = copy(stream, &mut encoder)?;
    encoder.finish().map_err(io::Error::other)?.flush()?;
    Ok(bytes)
}

fn decompress(file: File, mut stream: UnixStream) -> io::Result<u64> {
    let bytes = copy(FrameDecoder::new(BufReader::with_capacity(1 << 20, file)), &mut stream);
    // Without this QEMU would wait for more.
    let _ = stream.shutdown(std::net::Shutdown::Write);
    bytes
}

fn copy(mut from: impl Read, to: &mut impl Write) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 18];
    let mut bytes = 0;
    while let n @ 1.. = from.read(&mut buffer)? {
        to.write_all(&buffer[..n])?;
        bytes += n as u64;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_comes_back_and_damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let memory: Vec<u8> = (0..3_000_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let restored = || {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let file = File::open(&path).unwrap();
            let sender = std::thread::spawn(move || decompress(file, ours));
            let mut bytes = Vec::new();
            theirs.read_to_end(&mut bytes).unwrap();
            sender.join().unwrap().map(|_| bytes)
        };
        assert_eq!(compress(&memory[..], File::create(&path).unwrap()).unwrap(), memory.len() as u64);
        assert!(restored().unwrap() == memory);
        let whole = std::fs::read(&path).unwrap();
        assert!(whole.len() < memory.len() / 2);
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        std::fs::write(&path, damaged).unwrap();
        assert!(restored().is_err());
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(restored().is_err(), "cut short");
    }
}
