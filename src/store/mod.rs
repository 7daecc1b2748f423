//! What kiln keeps between builds: imported bases and a few small facts, in the user's cache.
//!
//! ```text
//! CACHE/bases/SHA256/disk.raw   a base as a sparse raw disk, named by its image's digest
//! CACHE/layers/KEY/             the disk, and perhaps the guest's memory, after a step
//! CACHE/locks/KEY               held by the kiln that is making the layer
//! CACHE/known/ID                digests of files that have not changed since
//! CACHE/work/RANDOM/            one running kiln's scratch, with a lock for as long as it runs
//! CACHE/accelerator.json        what the probe found, for this boot of the host
//! ```
//! Entries are written under a temporary name, synced and renamed, so that a crash at any point leaves a store that
//! works. A scratch folder whose lock nobody holds belongs to a kiln that was killed; the next one removes it.

mod base;
mod gc;
mod known;
mod layer;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::error::Error;

pub use base::Imported;
pub use gc::{Entry, Kind, Limits};
pub use layer::{CLAIM_LOOK, Claim, DISK as LAYER_DISK, Layer, Lookup, Pending, Record};

/// The store in one folder.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// A scratch folder, removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    folder: tempfile::TempDir,
    _lock: File,
}

impl Scratch {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

const LOCK: &str = "lock";

impl Store {
    /// The store in `folder`, made if it is missing.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let failed = |error| Error::io(format!("cannot make the cache folder `{}`", folder.display()), &error);
        for name in ["bases", "layers", "locks", "known", "work"] {
            std::fs::create_dir_all(folder.join(name)).map_err(failed)?;
        }
        // Absolute, because QEMU runs in a folder of its own and overlays name their base.
        let root = std::fs::canonicalize(folder).map_err(failed)?;
        Ok(Self { root })
    }

    /// Where the accelerator's verdict is kept.
    #[must_use]
    pub fn accelerator_memory(&self) -> PathBuf {
        self.root.join("accelerator.json")
    }

    /// Where the store is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// A fresh scratch folder; those that killed kilns left behind are removed first.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn scratch(&self) -> Result<Scratch, Error> {
        let work = self.root.join("work");
        sweep(&work, "kiln-");
        locked_folder(&work, "kiln-")
            .map_err(|error| Error::io(format!("cannot write to `{}`", work.display()), &error))
    }
}

/// Makes a folder with a lock in it that is held for as long as the returned value lives.
pub(crate) fn locked_folder(parent: &Path, prefix: &str) -> io::Result<Scratch> {
    let folder = tempfile::Builder::new().prefix(prefix).tempdir_in(parent)?;
    // Locked before it has its name: whoever sees a lock that nobody holds may remove the folder.
    let fresh = folder.path().join("lock.new");
    let lock = File::create(&fresh)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    std::fs::rename(fresh, folder.path().join(LOCK))?;
    Ok(Scratch { folder, _lock: lock })
}

/// Removes folders of [`locked_folder`] whose owner is gone.
pub(crate) fn sweep(parent: &Path, prefix: &str) {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)) {
        let lock = File::open(entry.path().join(LOCK));
        // A folder without a lock file may be one whose owner is just making it.
        if lock.is_ok_and(|lock| rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Bytes that a user may still write to the filesystem of `path`.
///
/// # Errors
/// When the system doesn't say.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let numbers = rustix::fs::statvfs(path)?;
    Ok(numbers.f_bavail.saturating_mul(numbers.f_frsize))
}

/// Bytes that a (sparse) file takes up.
///
/// # Errors
/// When it can't be looked at.
pub fn allocated(path: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs_err::metadata(path)?.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_of_the_dead_is_swept_and_of_the_living_kept() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let living = store.scratch().unwrap();
        let dead = folder.path().join("work/kiln-dead");
        std::fs::create_dir(&dead).unwrap();
        std::fs::write(dead.join(LOCK), "").unwrap();
        let second = store.scratch().unwrap();
        assert!(!dead.exists());
        assert!(living.path().exists() && second.path().exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }
}
