//! A running guest is kept: its disk goes on in a new overlay, its memory goes into a file, and later another QEMU takes
//! both up where they were.
//!
//! The guest stands still meanwhile, so that memory and disk belong together. kiln reads the memory itself
//! ([`GuestMemory`]); QEMU's migration stream, which passes through kiln on a UNIX socket, has only the devices, because
//! memory that is shared with another process can be left out (`x-ignore-shared`, QEMU 4.0 and newer).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Error;
use super::memory::{GuestMemory, Loading};
use super::process::{Machine, Signal};
use super::spec::MEMORY_SOCKET;

/// How long a guest's memory may take to be written or read.
const LIMIT: Duration = Duration::from_secs(300);
/// How soon it is seen that a thread has ended.
const LOOK: Duration = Duration::from_millis(5);
/// Where the devices of a guest that is saved come out.
const SAVE_SOCKET: &str = "memory-out";

/// What saving a guest cost.
#[derive(Debug)]
pub struct Saved {
    /// How long the guest stood still.
    pub took: Duration,
    /// Bytes of memory and devices before they were compressed, 0 without memory; or why the file could not be written.
    pub memory: io::Result<u64>,
}

impl Machine {
    /// Lets the guest go on in the overlay `fresh`, which must be empty and have the guest's present disk behind it.
    /// That disk is not written any more. With `memory` the guest's memory at that moment is written there.
    ///
    /// `node` names the block node that is written now, `next` the new one. `folder` is where QEMU runs.
    ///
    /// # Errors
    /// When QEMU refuses or dies. The guest may stand still then.
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
        let memory = match (memory, self.memory.clone()) {
            (Some(path), Some(memory)) => self.save(&memory, path, folder)?,
            _ => Ok(0),
        };
        self.monitor("cont", &json!({}))?;
        Ok(Saved { took: started.elapsed(), memory })
    }

    fn save(&mut self, memory: &GuestMemory, path: &Path, folder: &Path) -> Result<io::Result<u64>, Error> {
        let (devices, keeping) = std::thread::scope(|scope| {
            let keeping = scope.spawn(|| memory.keep(path));
            let devices = self.devices(folder).and_then(|devices| {
                self.wait_until("the guest's memory to be written", || keeping.is_finished())?;
                Ok(devices)
            });
            if devices.is_err() {
                memory.give_up();
            }
            let keeping = keeping.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")));
            (devices, keeping)
        });
        // Whatever ended the wait is the reason why the memory was given up.
        let devices = devices?;
        Ok(keeping.and_then(|keeping| keeping.end(&devices)))
    }

    /// Waits for a thread, and hears of all that may happen to the guest meanwhile.
    fn wait_until(&mut self, awaited: &str, is_over: impl Fn() -> bool) -> Result<(), Error> {
        let deadline = Instant::now() + LIMIT;
        while !is_over() {
            match self.wait_for(awaited, LOOK, |_| None::<()>) {
                Err(Error::TimedOut { console, .. }) if Instant::now() >= deadline => {
                    return Err(Error::TimedOut { awaited: awaited.to_owned(), limit: LIMIT, console });
                }
                Ok(()) | Err(Error::TimedOut { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// QEMU's stream of a guest that stands still.
    fn devices(&mut self, folder: &Path) -> Result<Vec<u8>, Error> {
        let failed = "cannot read the guest's devices from QEMU";
        let (listener, socket) = listen(folder).map_err(Error::io(failed))?;
        let reader = std::thread::spawn(move || {
            let mut stream = Vec::new();
            listener.accept()?.0.read_to_end(&mut stream).map(|_| stream)
        });
        let saved = self.announce_migration().and_then(|()| {
            self.monitor("migrate", &json!({ "uri": format!("unix:{SAVE_SOCKET}") }))?;
            self.wait_for_migration("the guest's devices to be written")
        });
        if saved.is_err() {
            // The reader may wait for a QEMU that will never connect.
            let _ = connect(folder, SAVE_SOCKET);
        }
        let _ = std::fs::remove_file(socket);
        saved?;
        reader.join().unwrap_or_else(|_| Err(io::Error::other("the reader panicked"))).map_err(Error::io(failed))
    }

    /// Gives a QEMU that waits for it a saved guest, whose memory `loading` has brought back, and lets the guest go on.
    ///
    /// # Errors
    /// When the file is damaged, or QEMU doesn't take it.
    pub fn restore(&mut self, loading: Loading, folder: &Path) -> Result<(), Error> {
        self.announce_migration()?;
        self.monitor("migrate-incoming", &json!({ "uri": format!("unix:{MEMORY_SOCKET}") }))?;
        let mut stream = connect(folder, MEMORY_SOCKET).map_err(Error::io("cannot reach QEMU"))?;
        self.wait_until("the guest's memory to be read", || loading.is_over())?;
        let devices = loading.wait().map_err(Error::io("cannot read the guest's memory"))?;
        // QEMU ends the connection when it has had enough, and says why on its own.
        let writer = std::thread::spawn(move || stream.write_all(&devices));
        let restored = self.wait_for_migration("the guest's devices to be read");
        drop(writer);
        restored?;
        self.monitor("cont", &json!({}))?;
        Ok(())
    }

    /// Gives the machine the memory that it was started with, so that it can be kept.
    #[must_use]
    pub fn with_memory(mut self, memory: Arc<GuestMemory>) -> Self {
        self.memory = Some(memory);
        self
    }

    fn announce_migration(&mut self) -> Result<(), Error> {
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities = json!({ "capabilities": [on("events"), on("x-ignore-shared")] });
        self.monitor("migrate-set-capabilities", &capabilities)?;
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

fn connect(folder: &Path, name: &str) -> io::Result<UnixStream> {
    let handle = File::open(folder)?;
    let stream = UnixStream::connect(format!("/proc/self/fd/{}/{name}", handle.as_raw_fd()))?;
    let _ = std::fs::remove_file(folder.join(name));
    Ok(stream)
}
