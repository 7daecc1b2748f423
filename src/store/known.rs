//! Digests of files that were hashed before: a file that has not changed since is not read again.
//!
//! A file is taken for unchanged while device, inode, size, mtime and ctime are the same; nobody can write to a file
//! without its ctime changing. A file that was changed within the last moments before it was hashed is not noted,
//! because the clock that stamps files is coarse.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Store;
use crate::exec;
use crate::units::hex;

/// How old a file's last change must be for its digest to be noted.
const SETTLED: Duration = Duration::from_secs(2);

/// What tells that a file is still the one that was looked at. Not its volume's device number, which may be another after
/// the host has started again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    /// Of an open file.
    ///
    /// # Errors
    /// When it can't be looked at.
    pub fn of(file: &File) -> io::Result<Self> {
        Ok(Self::from(&file.metadata()?))
    }

    /// Whether that is what the file is now, and would not be if it had been changed meanwhile.
    fn is_still(&self, file: &File) -> bool {
        self.is_settled() && Self::of(file).is_ok_and(|now| now == *self)
    }

    /// Whether its last change is so long ago that a further one would show.
    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let changed = self.changed.0.max(self.modified.0);
        u64::try_from(changed).is_ok_and(|changed| changed + SETTLED.as_secs() <= now.as_secs())
    }
}

impl From<&std::fs::Metadata> for Identity {
    fn from(metadata: &std::fs::Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Known {
    identity: Identity,
    sha256: String,
    sha512: Option<String>,
}

/// A disk that kiln wrote. Nobody waited until the host's disk had it: only in the same boot of the host is it sure to be
/// what was written.
#[derive(Serialize, Deserialize)]
struct KnownDisk {
    identity: Identity,
    /// Of its block map.
    digest: String,
    boot: Option<String>,
}

/// A file's digests in lowercase hex.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Digests {
    /// SHA-256.
    pub(super) sha256: String,
    /// SHA-512, if it was ever asked for.
    pub(super) sha512: Option<String>,
}

impl Store {
    /// The digests of `file`, if it is known and unchanged.
    pub(super) fn known(&self, file: &File) -> Option<Digests> {
        let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let identity = Identity::from(&metadata);
        let known: Known = serde_json::from_slice(&std::fs::read(self.known_path(&metadata)).ok()?).ok()?;
        (known.identity == identity).then_some(Digests { sha256: known.sha256, sha512: known.sha512 })
    }

    /// Notes digests; `before` is what the file was when its reading began. A note that can't be kept is no failure.
    pub(super) fn note(&self, file: &File, before: &Identity, digests: &Digests) {
        // A block device's size and times say nothing of what is in it.
        let metadata = file.metadata().ok().filter(std::fs::Metadata::is_file);
        let Some(metadata) = metadata.filter(|_| before.is_still(file)) else { return };
        let known = Known { identity: before.clone(), sha256: digests.sha256.clone(), sha512: digests.sha512.clone() };
        let _ = self.write_json(&self.known_path(&metadata), &known);
    }

    /// Notes the digest of a disk that kiln itself has just written whole.
    pub fn know_disk(&self, disk: &Path, digest: &str) {
        if let Ok(metadata) = std::fs::metadata(disk) {
            self.note_disk(&metadata, digest);
        }
    }

    /// Notes the digest of a disk that was read whole; `before` is what it was when that began.
    pub fn know_read_disk(&self, disk: &File, before: &Identity, digest: &str) {
        if let Ok(metadata) = disk.metadata()
            && before.is_still(disk)
        {
            self.note_disk(&metadata, digest);
        }
    }

    /// A note that can't be kept is no failure.
    fn note_disk(&self, disk: &std::fs::Metadata, digest: &str) {
        let known = KnownDisk { digest: digest.to_owned(), boot: exec::boot_id(), identity: Identity::from(disk) };
        let _ = self.write_json(&self.known_disk_path(disk), &known);
    }

    /// Whether the disk is the one whose digest was noted. If not it must be read to know: another kiln made it, or it was
    /// copied, or changed, or the host was started again since. If that was after a power cut, some of it may never have
    /// reached the host's disk.
    #[must_use]
    pub fn knows_disk(&self, disk: &Path, digest: &str) -> bool {
        let known = || -> io::Result<bool> {
            let metadata = std::fs::metadata(disk)?;
            let known: KnownDisk = serde_json::from_slice(&std::fs::read(self.known_disk_path(&metadata))?)?;
            let same = known.identity == Identity::from(&metadata) && known.digest == digest;
            Ok(same && known.boot.is_some() && known.boot == exec::boot_id())
        };
        known().unwrap_or(false)
    }

    /// Where the block map of the disk in this snapshot is, if it was kept. Not by the disk's digest, which is the same
    /// for a disk with other holes.
    #[must_use]
    pub fn map_path(&self, snapshot: &str) -> PathBuf {
        self.root.join("known").join(snapshot).with_extension("blocks")
    }

    /// Keeps the block map of a disk that is in a snapshot now, so that the next disk can be compared with it. That it
    /// can't be kept is no failure.
    pub fn keep_map(&self, snapshot: &str, map: &Path) {
        let keep = || -> io::Result<()> {
            let to = self.map_path(snapshot);
            let folder = to.parent().unwrap_or(&self.root);
            std::fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            io::copy(&mut File::open(map)?, &mut file)?;
            file.persist(&to)?;
            Ok(())
        };
        let _ = keep();
    }

    /// Makes `file` unknown.
    pub(super) fn forget(&self, file: &File) {
        if let Ok(metadata) = file.metadata() {
            let _ = std::fs::remove_file(self.known_path(&metadata));
        }
    }

    /// With the device: on another one a file may have the same number and the same times, as in two read-only images. A
    /// file whose device has another number now is read again.
    fn known_path(&self, file: &std::fs::Metadata) -> PathBuf {
        let name = Sha256::digest(format!("{} {}", file.dev(), file.ino()));
        self.root.join("known").join(&hex(&name)[..32])
    }

    fn known_disk_path(&self, disk: &std::fs::Metadata) -> PathBuf {
        self.known_path(disk).with_extension("disk")
    }

    /// Writes a small file whole or not at all.
    pub(super) fn write_json(&self, path: &Path, value: &impl Serialize) -> io::Result<()> {
        let folder = path.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer(&mut file, value)?;
        file.persist(path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_until_it_changes() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "one").unwrap();
        let open = || File::open(&path).unwrap();
        let digests = Digests { sha256: "ab".to_owned(), sha512: None };
        let fresh = Identity::of(&open()).unwrap();
        store.note(&open(), &fresh, &digests);
        assert_eq!(store.known(&open()), None, "too fresh to tell a further change");

        let old = Identity { changed: (0, 0), modified: (0, 0), ..fresh.clone() };
        assert!(old.is_settled());
        store
            .write_json(
                &store.known_path(&open().metadata().unwrap()),
                &Known { identity: fresh.clone(), sha256: "ab".into(), sha512: None },
            )
            .unwrap();
        assert_eq!(store.known(&open()), Some(digests));
        File::options().write(true).open(&path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(store.known(&open()), None, "times count");
        std::fs::write(store.known_path(&open().metadata().unwrap()), "{ half").unwrap();
        assert_eq!(store.known(&open()), None, "a damaged note is none");
    }

    #[test]
    fn a_disk_is_what_was_written_until_the_host_starts_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, "one").unwrap();
        assert!(!store.knows_disk(&path, "ab"));
        store.know_disk(&path, "ab");
        assert!(store.knows_disk(&path, "ab") && !store.knows_disk(&path, "cd"));
        let file = File::open(&path).unwrap();
        assert_eq!(store.known(&file), None, "a disk's digest is no SHA-256 of its file");

        let identity = Identity::of(&file).unwrap();
        for boot in [None, Some("an earlier one".to_owned())] {
            let known = KnownDisk { identity: identity.clone(), digest: "ab".to_owned(), boot };
            store.write_json(&store.known_disk_path(&file.metadata().unwrap()), &known).unwrap();
            assert!(!store.knows_disk(&path, "ab"));
        }
        // One that was read is noted if it was left alone meanwhile, and long enough before.
        store.know_read_disk(&file, &identity, "ab");
        assert!(!store.knows_disk(&path, "ab"), "too fresh");
        store.know_disk(&path, "ab");
        std::fs::write(&path, "two").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert!(!store.knows_disk(&path, "ab"));
        store.know_read_disk(&file, &Identity { changed: (0, 0), modified: (0, 0), ..identity }, "ab");
        assert!(!store.knows_disk(&path, "ab"), "it was changed meanwhile");
    }

    /// A block device's times say nothing of what is in it.
    #[test]
    fn what_is_no_regular_file_is_never_known() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let device = File::open("/dev/null").unwrap();
        let identity = Identity::of(&device).unwrap();
        assert!(identity.is_still(&device), "its times are old");
        let path = store.known_path(&device.metadata().unwrap());
        store.note(&device, &identity, &Digests { sha256: "ab".to_owned(), sha512: None });
        assert!(!path.exists(), "no note is written");
        store.write_json(&path, &Known { identity, sha256: "ab".to_owned(), sha512: None }).unwrap();
        assert_eq!(store.known(&device), None, "a note is not taken");
    }

    #[test]
    fn an_identity_has_all_that_a_change_changes_and_no_device_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "one").unwrap();
        let identity = Identity::from(&std::fs::metadata(&path).unwrap());
        let json = serde_json::to_value(&identity).unwrap();
        let names: Vec<_> = json.as_object().unwrap().keys().collect();
        assert_eq!(names, ["changed", "inode", "modified", "size"]);
        let one = identity.clone();
        let others = [
            Identity { inode: one.inode + 1, ..one.clone() },
            Identity { size: one.size + 1, ..one.clone() },
            Identity { modified: (one.modified.0, one.modified.1 + 1), ..one.clone() },
            Identity { changed: (one.changed.0 + 1, one.changed.1), ..one.clone() },
        ];
        for other in others {
            assert_ne!(other, identity);
            let kept: Identity = serde_json::from_value(serde_json::to_value(&other).unwrap()).unwrap();
            assert_eq!(kept, other, "and all of it is kept");
        }
    }
}
