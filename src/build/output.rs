//! The output folder: half-made under a hidden name, whole under its own; after a failure the logs alone.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::Artifact;
use super::manifest::{self, Manifest};
use crate::disk;
use crate::error::{Error, Exit};
use crate::publish;
use crate::store::{self, Scratch};

/// The build's log in the output folder.
pub(super) const BUILD_LOG: &str = "build.log";
/// A failed guest's disk among its logs.
pub(super) const FAILED_DISK: &str = "failed-disk.raw";
/// What was published from the output folder.
const PUBLISHED: &str = "published.json";

/// An output folder in the making. Dropped before [`Pending::commit`], nothing of it stays.
pub(super) struct Pending {
    scratch: Scratch,
    folder: PathBuf,
    failed: PathBuf,
}

impl Pending {
    /// Begins `parent/name`. What is there under that name must be an earlier build's: it will be replaced.
    pub(super) fn begin(parent: &Path, name: &str) -> Result<Self, Error> {
        let fail = |error: io::Error| Error::io(format!("cannot write to `{}`", parent.display()), &error);
        std::fs::create_dir_all(parent).map_err(fail)?;
        refuse_foreign(&parent.join(name), manifest::FILE)?;
        refuse_foreign(&parent.join(format!("{name}.failed")), BUILD_LOG)?;
        let prefix = format!(".{name}.kiln-");
        store::sweep(parent, &prefix);
        let scratch = store::locked_folder(parent, &prefix).map_err(fail)?;
        std::fs::create_dir(scratch.path().join("new")).map_err(fail)?;
        std::fs::create_dir(scratch.path().join("new/steps")).map_err(fail)?;
        let failed = parent.join(format!("{name}.failed"));
        Ok(Self { scratch, folder: parent.join(name), failed })
    }

    /// Where files of the output are written.
    pub(super) fn path(&self) -> PathBuf {
        self.scratch.path().join("new")
    }

    /// Where files of the output will be found if the build fails.
    pub(super) fn after_failure(&self) -> PathBuf {
        self.failed.clone()
    }

    /// Gives the folder its name, in place of one that was there before.
    pub(super) fn commit(self) -> Result<PathBuf, Error> {
        let fail = |error: io::Error| Error::io(format!("cannot put `{}` in its place", self.folder.display()), &error);
        // Not for a power cut: after one, a build or a publish compares the disk with its block map.
        for file in std::fs::read_dir(self.path()).map_err(fail)?.flatten() {
            File::open(file.path()).and_then(|file| disk::confirm(&file)).map_err(fail)?;
        }
        // What was published from here before stays known: its entries name the disk's digest. It can't be made again.
        let published = self.folder.join(PUBLISHED);
        if published.is_file() {
            let copy = self.path().join(PUBLISHED);
            std::fs::copy(&published, &copy).and_then(|_| File::open(&copy)?.sync_all()).map_err(fail)?;
        }
        self.keep_journals().map_err(fail)?;
        replace(&self.path(), &self.folder).map_err(fail)?;
        let _ = std::fs::remove_dir_all(&self.failed);
        Ok(self.folder.clone())
    }

    /// What a killed publish has begun stays known. Linked, so that it stays locked where it is in use.
    fn keep_journals(&self) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if publish::is_journal(&name) {
                std::fs::hard_link(entry.path(), self.path().join(name))?;
            }
        }
        Ok(())
    }

    /// Keeps the logs under `NAME.failed`.
    pub(super) fn fail(self) -> io::Result<PathBuf> {
        let new = self.path();
        let _ = std::fs::remove_file(new.join("disk.raw"));
        match std::fs::remove_dir_all(&self.failed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs_err::rename(&new, &self.failed)?;
        Ok(self.failed.clone())
    }
}

/// Changes the manifest of an output folder of `parent`. `change` gets the folder and its manifest, and returns `None` if
/// the folder is no longer what it was.
///
/// All of it goes through a handle of the folder: if a concurrent build puts a new folder in its place, the manifest of
/// that one stays as it is. Then the result is `None`.
pub(super) fn amend(
    artifact: Artifact,
    parent: &Path,
    change: impl FnOnce(&Path, Manifest) -> Result<Option<Manifest>, Error>,
) -> Result<Option<Artifact>, Error> {
    let Artifact { folder, manifest: seen } = artifact;
    let handle =
        File::open(&folder).map_err(|error| Error::io(format!("cannot read `{}`", folder.display()), &error))?;
    let here = PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()));
    let (manifest, edited) = Manifest::read_verified(&here)?;
    if edited.is_some() || (&manifest.artifact, &manifest.digest) != (&seen.artifact, &seen.digest) {
        return Ok(None);
    }
    let Some(manifest) = change(&here, manifest)? else { return Ok(None) };
    rewrite_manifest(parent, &here, &manifest)?;
    Ok(store::same_file(&folder, &handle).then_some(Artifact { folder, manifest }))
}

/// Writes the manifest of an output folder of `parent` anew: at no moment is there none, or half of one.
fn rewrite_manifest(parent: &Path, folder: &Path, manifest: &Manifest) -> Result<(), Error> {
    let fail = |error: io::Error| Error::io("cannot write the manifest", &error);
    let prefix = format!(".{}.kiln-", manifest.name);
    store::sweep(parent, &prefix);
    let scratch = store::locked_folder(parent, &prefix).map_err(fail)?;
    manifest.write(scratch.path())?;
    let fresh = scratch.path().join(manifest::FILE);
    File::open(&fresh).and_then(|file| file.sync_all()).map_err(fail)?;
    std::fs::rename(fresh, folder.join(manifest::FILE)).map_err(fail)?;
    let _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}

/// A folder of the user's own must not be taken for a build's output.
fn refuse_foreign(folder: &Path, mark: &str) -> Result<(), Error> {
    let ours = folder.join(mark).is_file();
    let empty = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    if ours || empty || std::fs::symlink_metadata(folder).is_err() {
        return Ok(());
    }
    let message = format!("`{}` is in the way: no build made it (it has no {mark})", folder.display());
    Err(Error::new(Exit::Input, message).help("choose another place with --out, or move it away"))
}

/// Gives `new` the name of `folder`, in one step where there is a folder already: at no moment is there none.
fn replace(new: &Path, folder: &Path) -> io::Result<()> {
    match renameat_with(CWD, new, CWD, folder, RenameFlags::EXCHANGE) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::NOENT) => return std::fs::rename(new, folder),
        // A filesystem that can't exchange, such as some network ones.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error.into()),
    }
    let old = new.with_extension("old");
    std::fs::rename(folder, &old)?;
    std::fs::rename(new, folder).inspect_err(|_| drop(std::fs::rename(&old, folder)))
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
            finished(parent.path(), text).commit().unwrap();
            assert_eq!(std::fs::read_to_string(parent.path().join("web/manifest.json")).unwrap(), text);
            std::fs::write(parent.path().join("web/published.json"), "[]").unwrap();
        }
        finished(parent.path(), "third").commit().unwrap();
        assert!(parent.path().join("web/published.json").is_file(), "what was published stays known");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
    }

    fn finished(parent: &Path, text: &str) -> Pending {
        let pending = Pending::begin(parent, "web").unwrap();
        std::fs::write(pending.path().join("manifest.json"), text).unwrap();
        pending
    }

    #[test]
    fn what_no_build_made_is_left_alone() {
        for name in ["web", "web.failed"] {
            let parent = tempfile::tempdir().unwrap();
            let folder = parent.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            drop(Pending::begin(parent.path(), "web").unwrap());
            std::fs::write(folder.join("index.html"), "mine").unwrap();
            let error = Pending::begin(parent.path(), "web").err().unwrap();
            assert!(error.message.contains("no build made it"), "{error}");
            assert!(folder.join("index.html").is_file());
        }
    }

    #[test]
    fn a_failure_keeps_logs_and_leaves_the_last_good_folder() {
        let parent = tempfile::tempdir().unwrap();
        finished(parent.path(), "good").commit().unwrap();
        let pending = Pending::begin(parent.path(), "web").unwrap();
        std::fs::write(pending.path().join("build.log"), "words").unwrap();
        std::fs::write(pending.path().join("disk.raw"), "half").unwrap();
        std::fs::write(pending.path().join("console.log"), "words").unwrap();
        let failed = pending.fail().unwrap();
        assert!(failed.join("console.log").is_file() && !failed.join("disk.raw").exists());
        assert!(parent.path().join("web").is_dir());
        Pending::begin(parent.path(), "web").unwrap().commit().unwrap();
        assert!(!failed.exists());
    }

    /// An output `web` in `parent` that is known to `amend`.
    fn output(parent: &Path) -> Artifact {
        let (folder, manifest) = (parent.join("web"), Manifest::sample());
        std::fs::create_dir(&folder).unwrap();
        manifest.write(&folder).unwrap();
        Artifact { folder, manifest }
    }

    fn described(manifest: Manifest) -> Manifest {
        Manifest { description: "new".to_owned(), ..manifest }
    }

    #[test]
    fn only_the_manifest_that_was_seen_is_changed() {
        let parent = tempfile::tempdir().unwrap();
        let artifact = output(parent.path());
        let folder = artifact.folder.clone();
        let text = || std::fs::read_to_string(folder.join(manifest::FILE)).unwrap();
        let before = text();
        let amended = |artifact: &Artifact| {
            amend(artifact.clone(), parent.path(), |_, manifest| Ok(Some(described(manifest)))).unwrap()
        };
        // A concurrent build has replaced the output since.
        let digest = "1".repeat(64);
        let other = Artifact { manifest: Manifest { digest, ..Manifest::sample() }, ..artifact.clone() };
        assert!(amended(&other).is_none() && text() == before);
        std::fs::write(folder.join(manifest::FILE), before.replace("tcg", "kvm")).unwrap();
        assert!(amended(&artifact).is_none(), "it was edited since");
        std::fs::write(folder.join(manifest::FILE), before).unwrap();
        assert_eq!(amended(&artifact).unwrap().manifest.description, "new");
        assert_eq!(Manifest::read_verified(&folder).unwrap().0.description, "new");
    }

    #[test]
    fn a_folder_that_takes_the_place_meanwhile_keeps_its_manifest() {
        let parent = tempfile::tempdir().unwrap();
        let artifact = output(parent.path());
        let old = parent.path().join("old");
        let amended = amend(artifact.clone(), parent.path(), |_, manifest| {
            std::fs::rename(&artifact.folder, &old).unwrap();
            output(parent.path());
            Ok(Some(described(manifest)))
        });
        assert!(amended.unwrap().is_none());
        let description = |folder: &Path| Manifest::read(folder).unwrap().description;
        assert_eq!((description(&artifact.folder), description(&old)), (String::new(), "new".to_owned()));
    }
}
