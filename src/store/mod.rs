//! What kiln keeps between builds: imported bases and a few small facts, in the user's cache.
//!
//! ```text
//! CACHE/bases/SHA256/disk.raw   a base as a sparse raw disk, named by its image's digest
//! CACHE/bases/SHA256/blocks     its block map as it was unpacked, for `--verify`
//! CACHE/layers/KEY-RANDOM/      the disk, and perhaps the guest's memory, after a step
//! CACHE/locks/KEY               held by the kiln that is making the layer
//! CACHE/gc.lock                 held while layers get their names, or are removed
//! CACHE/known/ID[.disk]         digests of files, and of disks that were built, that have not changed since
//! CACHE/work/RANDOM/            one running kiln's scratch, with a lock for as long as it runs
//! CACHE/accelerator.json        what the probe found, for this boot of the host
//! ```
//! Entries are written under a temporary name, synced and renamed, so that a crash at any point leaves a store that
//! works. A scratch folder whose lock nobody holds belongs to a kiln that was killed; the next one removes it.

mod base;
mod gc;
mod known;
mod layer;
mod transfer;
mod verify;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::FlockOperation;

use crate::error::Error;

pub use base::Imported;
pub use gc::{Entry, Kind, Limits};
pub use known::Identity;
pub(crate) use layer::same_file;
pub use layer::{CLAIM_LOOK, Claim, DISK as LAYER_DISK, Layer, Making, Pending, Placed, Record, Shelf};
pub use transfer::Transferred;
pub(crate) use verify::{BLOCKS, differences, pass};

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
/// No small file takes this long to be written.
const STALE: Duration = Duration::from_secs(3600);
/// How long a file's digest is known. Nothing tells that the file is gone, and it can always be read again.
const FORGOTTEN: Duration = Duration::from_secs(90 * 86_400);

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
        self.sweep_files();
        locked_folder(&work, "kiln-")
            .map_err(|error| Error::io(format!("cannot write to `{}`", work.display()), &error))
    }

    /// Removes locks that killed kilns held, small files that they were writing, and notes of files that are long gone.
    fn sweep_files(&self) {
        let files = |folder: &str| std::fs::read_dir(self.root.join(folder)).into_iter().flatten().flatten();
        for path in files("locks").map(|entry| entry.path()) {
            // Removed while it is held, as its holder does.
            if let Ok(lock) = File::open(&path)
                && rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
                && same_file(&path, &lock)
            {
                let _ = std::fs::remove_file(path);
            }
        }
        for entry in files("known") {
            let begun = entry.file_name().to_string_lossy().starts_with(".tmp");
            let limit = if begun { STALE } else { FORGOTTEN };
            let written = entry.metadata().and_then(|metadata| metadata.modified());
            if written.is_ok_and(|written| written.elapsed().is_ok_and(|age| age > limit)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// The raw disk of a base as the overlays in scratch folders and layers name it.
pub(crate) fn base_from_work(sha256: &str) -> PathBuf {
    Path::new("../../bases").join(sha256).join("disk.raw")
}

/// Makes a folder with a lock in it that is held for as long as the returned value lives.
pub(crate) fn locked_folder(parent: &Path, prefix: &str) -> io::Result<Scratch> {
    let _making = making(parent)?;
    let folder = tempfile::Builder::new().prefix(prefix).tempdir_in(parent)?;
    // Locked before it has its name: whoever sees a lock that nobody holds may remove the folder.
    let fresh = folder.path().join("lock.new");
    let lock = File::create(&fresh)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    std::fs::rename(fresh, folder.path().join(LOCK))?;
    Ok(Scratch { folder, _lock: lock })
}

/// Keeps others from taking a folder without a lock for one that was left behind. They look for a moment only: whoever
/// else has locked the folder, for reasons of their own, is not waited for.
fn making(parent: &Path) -> io::Result<File> {
    let parent = File::open(parent)?;
    for _ in 0..20 {
        if rustix::fs::flock(&parent, FlockOperation::NonBlockingLockShared).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(parent)
}

/// Removes folders of [`locked_folder`] whose owner is gone.
pub(crate) fn sweep(parent: &Path, prefix: &str) {
    for folder in left_behind(parent, prefix) {
        let _ = std::fs::remove_dir_all(folder);
    }
}

fn left_behind(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(making) = File::open(parent) else { return Vec::new() };
    let nobody_makes_one = rustix::fs::flock(&making, FlockOperation::NonBlockingLockExclusive).is_ok();
    let dead = |folder: &PathBuf| match File::open(folder.join(LOCK)) {
        Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
        // Its owner was killed while making it, or while removing it; or is removing it right now.
        Err(error) => error.kind() == io::ErrorKind::NotFound && nobody_makes_one,
    };
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    named.map(|entry| entry.path()).filter(dead).collect()
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
        let half = folder.path().join("work/kiln-half");
        std::fs::create_dir(&half).unwrap();
        let making = File::open(folder.path().join("work")).unwrap();
        rustix::fs::flock(&making, FlockOperation::LockShared).unwrap();
        drop(store.scratch().unwrap());
        assert!(half.exists() && !dead.exists(), "somebody may be making it");
        drop(making);
        let second = store.scratch().unwrap();
        assert!(!half.exists());
        assert!(living.path().exists() && second.path().exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }

    #[test]
    fn files_of_the_dead_are_swept_too() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let claim = store.try_claim("held").unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["locks/dead", "known/.tmpnew", "known/.tmpold", "known/old", "known/ancient"] {
            std::fs::write(path(name), "").unwrap();
        }
        for (name, age) in [("known/.tmpold", 2 * STALE), ("known/old", 2 * STALE), ("known/ancient", 2 * FORGOTTEN)] {
            let file = File::options().write(true).open(path(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
        }
        drop(store.scratch().unwrap());
        let names = ["locks/held", "locks/dead", "known/.tmpnew", "known/.tmpold", "known/old", "known/ancient"];
        assert_eq!(names.map(|name| path(name).exists()), [true, false, true, false, true, false]);
        drop(claim);
    }
}
