//! `disk.raw` and its block map. What does not change any more is written while the guest still works: see
//! [`Draft`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::manifest::{self, DISK};
use super::output::Pending;
use super::session::Session;
use super::{disk_failure, packages};
use crate::disk::{self, BlockMap, Draft, Exported, Image, Table, Work};
use crate::error::Error;
use crate::store::{self, BLOCKS};
use crate::units::Size;

/// The written disk.
pub(super) struct Export {
    pub(super) exported: Exported,
    pub(super) table: Table,
    pub(super) modes: disk::BootModes,
    /// What dpkg has installed, where the disk shows it.
    pub(super) packages: Option<Vec<String>>,
}

/// The disk as it was where the build began, on its way into `disk.raw`. Dropped before it is done, it is given up.
pub(super) struct Early {
    given_up: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Draft, disk::Error>>>,
}

impl Early {
    /// Begins with what the guest's overlay is over: the last of a raw disk and the overlays over it.
    pub(super) fn begin(behind: Vec<PathBuf>, size: u64, pending: &Pending) -> Self {
        let given_up = Arc::new(AtomicBool::new(false));
        let (stop, out) = (Arc::clone(&given_up), pending.path().join(DISK));
        let thread = std::thread::spawn(move || {
            // One thread: the guest has the processors first.
            let work = Work { threads: 1, progress: &|_, _| (), cancelled: &|| stop.load(Ordering::Relaxed) };
            let (known, own) = known(&behind);
            let [.., top] = &behind[..] else { return Err(disk::Error::Cancelled) };
            let overlay = behind.len() > 1;
            let draft = Draft::begin((top, overlay), known.as_ref(), size, &out, &work)?;
            let noted = top.with_file_name(BLOCKS);
            if overlay && !own {
                // For the next build that begins there. Who can't keep it hashes again.
                let _ = note(draft.begun(), &noted);
            }
            Ok(draft)
        });
        Self { given_up, thread: Some(thread) }
    }

    fn wait(mut self) -> Result<Draft, disk::Error> {
        let thread = self.thread.take();
        match thread.map(JoinHandle::join) {
            Some(Ok(draft)) => draft,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Err(disk::Error::Cancelled),
        }
    }
}

/// The digests of the last disk, as far as they are noted, and whether they are its own. Else they are those of the nearest
/// that has some, without what was written after that.
fn known(behind: &[PathBuf]) -> (Option<BlockMap>, bool) {
    let read = |disk: &PathBuf| BlockMap::open(&disk.with_file_name(BLOCKS)).ok();
    let Some((top, rest)) = behind.split_last() else { return (None, false) };
    if let Some(map) = read(top) {
        return (Some(map), true);
    }
    let inherited = rest.iter().rev().find_map(|disk| disk::known_through(top, disk, &read(disk)?).ok());
    (inherited, false)
}

fn note(map: &BlockMap, place: &Path) -> Result<(), disk::Error> {
    let folder = place.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(disk::Error::BlockMapIo)?;
    map.write_to(&mut file)?;
    file.persist(place).map_err(|error| disk::Error::BlockMapIo(error.error))?;
    Ok(())
}

impl Drop for Early {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Relaxed);
        // Its folder goes away next: nobody may write there any more.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Makes `disk.raw` the disk that the guest has left, and writes its block map.
pub(super) fn export(session: &Session<'_>, early: Early, pending: &Pending) -> Result<Export, Error> {
    let events = session.events;
    let describe = |export: &Export| {
        format!("{} of data in {}", Size(export.exported.block_map.data_bytes()), session.plan.disk_size)
    };
    events.phase("export", "writing disk.raw", describe, || {
        let exported = store::pass("export", events, session.cancel, |work| {
            early.wait().and_then(|draft| draft.finish(&session.overlay(), work))
        })?;
        let exported = exported.map_err(disk_failure)?;
        exported.block_map.create(&pending.path().join(manifest::BLOCKS)).map_err(disk_failure)?;
        let overlay = Image::overlay(&session.overlay()).map_err(disk_failure)?;
        let table = Table::read(&overlay).map_err(disk_failure)?;
        let modes = table.boot_modes(&overlay).map_err(disk_failure)?;
        let packages = packages::of_dpkg(&table, &overlay).map_err(disk_failure)?;
        Ok(Export { exported, table, modes, packages })
    })
}
