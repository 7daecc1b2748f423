//! One publish of a disk to a region at a time on this host, as far as it goes through a bucket: two would send the same
//! parts, and one would delete what the other imports. On different hosts nobody can keep them apart, and they get along:
//! see `upload`.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use super::journal;
use crate::store::Identity;

/// The right to upload, for as long as this lives. The system gives it back, however kiln ends.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    /// Held open for its lock.
    file: File,
}

/// Another kiln has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Busy;

impl Lock {
    /// Takes the lock beside the disk; none where no file can be made there.
    pub(super) fn take(disk: &Path, region: &str) -> Result<Option<Self>, Busy> {
        let path = journal::beside(disk, region, journal::LOCK);
        loop {
            let Ok(file) = OpenOptions::new().append(true).create(true).open(&path) else { return Ok(None) };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(Busy),
                Err(TryLockError::Error(_)) => return Ok(None),
            }
            // Whoever had it before may have removed the file after it was opened here.
            if is_at(&file, &path) {
                return Ok(Some(Self { path, file }));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let there = std::fs::metadata(path).map(|metadata| Identity::from(&metadata));
    there.is_ok_and(|there| Identity::of(file).is_ok_and(|own| own == there))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_in_each_region_and_no_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.raw");
        let first = Lock::take(&disk, "eu-west-1").unwrap().unwrap();
        assert_eq!(Lock::take(&disk, "eu-west-1").unwrap_err(), Busy);
        let other = Lock::take(&disk, "us-east-1").unwrap();
        drop((first, other));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(Lock::take(&disk, "eu-west-1").unwrap().is_some());
        assert!(Lock::take(Path::new("/proc/none/disk.raw"), "eu-west-1").unwrap().is_none());
    }
}
