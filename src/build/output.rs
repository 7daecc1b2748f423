//! The output folder: half-made under a hidden name, whole under its own; after a failure the logs alone.

use std::io;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::store::{self, Scratch};

/// An output folder in the making. Dropped before [`Pending::commit`], nothing of it stays.
pub(super) struct Pending {
    scratch: Scratch,
    folder: PathBuf,
    failed: PathBuf,
    parent: PathBuf,
}

impl Pending {
    /// Begins `parent/name`.
    pub(super) fn begin(parent: &Path, name: &str) -> Result<Self, Error> {
        let fail = |error: io::Error| Error::io(format!("cannot write to `{}`", parent.display()), &error);
        std::fs::create_dir_all(parent).map_err(fail)?;
        let prefix = format!(".{name}.kiln-");
        store::sweep(parent, &prefix);
        let scratch = store::locked_folder(parent, &prefix).map_err(fail)?;
        std::fs::create_dir(scratch.path().join("new")).map_err(fail)?;
        std::fs::create_dir(scratch.path().join("new/steps")).map_err(fail)?;
        let failed = parent.join(format!("{name}.failed"));
        Ok(Self { scratch, folder: parent.join(name), failed, parent: parent.to_owned() })
    }

    /// Where files of the output are written.
    pub(super) fn path(&self) -> PathBuf {
        self.scratch.path().join("new")
    }

    /// Where a file of the output will be found if the build fails.
    pub(super) fn after_failure(&self, file: &str) -> PathBuf {
        self.failed.join(file)
    }

    /// Gives the folder its name, in place of one that was there before.
    pub(super) fn commit(self) -> Result<PathBuf, Error> {
        let fail = |error: io::Error| Error::io(format!("cannot put `{}` in its place", self.folder.display()), &error);
        for file in std::fs::read_dir(self.path()).map_err(fail)?.flatten() {
            std::fs::File::open(file.path()).and_then(|file| file.sync_all()).map_err(fail)?;
        }
        let old = self.scratch.path().join("old");
        match std::fs::rename(&self.folder, &old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
        if let Err(error) = std::fs::rename(self.path(), &self.folder) {
            let _ = std::fs::rename(&old, &self.folder);
            return Err(fail(error));
        }
        let _ = std::fs::File::open(&self.parent).and_then(|parent| parent.sync_all());
        let _ = std::fs::remove_dir_all(&self.failed);
        Ok(self.folder.clone())
    }

    /// Keeps the logs, and `overlay` if there is one to keep, under `NAME.failed`.
    pub(super) fn fail(self, overlay: Option<&Path>) -> io::Result<PathBuf> {
        let new = self.path();
        let _ = std::fs::remove_file(new.join("disk.raw"));
        match std::fs::remove_dir_all(&self.failed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if let Some(overlay) = overlay {
            let kept = new.join("overlay.qcow2");
            // Another filesystem than the cache's can only be copied to.
            if std::fs::rename(overlay, &kept).is_err() {
                fs_err::copy(overlay, &kept)?;
            }
        }
        fs_err::rename(&new, &self.failed)?;
        Ok(self.failed.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_exists_is_complete() {
        let parent = tempfile::tempdir().unwrap();
        drop(Pending::begin(parent.path(), "web").unwrap());
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);

        for text in ["first", "second"] {
            let pending = Pending::begin(parent.path(), "web").unwrap();
            std::fs::write(pending.path().join("build.log"), text).unwrap();
            pending.commit().unwrap();
            assert_eq!(std::fs::read_to_string(parent.path().join("web/build.log")).unwrap(), text);
        }
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_keeps_logs_and_leaves_the_last_good_folder() {
        let parent = tempfile::tempdir().unwrap();
        Pending::begin(parent.path(), "web").unwrap().commit().unwrap();
        let pending = Pending::begin(parent.path(), "web").unwrap();
        std::fs::write(pending.path().join("disk.raw"), "half").unwrap();
        std::fs::write(pending.path().join("console.log"), "words").unwrap();
        let failed = pending.fail(None).unwrap();
        assert!(failed.join("console.log").is_file() && !failed.join("disk.raw").exists());
        assert!(parent.path().join("web").is_dir());
        Pending::begin(parent.path(), "web").unwrap().commit().unwrap();
        assert!(!failed.exists());
    }
}
