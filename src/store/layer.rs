//! Layers: what a guest was after a step. Each is a folder that appears whole and is never replaced: made again, a layer
//! gets another folder, because what was built on the first one stays on it. The newest of those with one key counts.
//!
//! ```text
//! layers/KEY-RANDOM/layer.json    what it is, and what its files must be
//! layers/KEY-RANDOM/disk.qcow2    an overlay over an earlier layer's disk, or over the base
//! layers/KEY-RANDOM/memory.MACHINE.lz4   the running guest, for machines with this key (not every layer has one)
//! layers/KEY-RANDOM/blocks        the disk's block map, once a build has made it
//! layers/KEY-RANDOM/step.log      what the step printed (the booted base has none)
//! layers/KEY-RANDOM/used          its mtime is when the layer was last used
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::known::Identity;
use super::{Store, allocated};
use crate::error::{Error, Exit};

/// The version of this format. Layers of another are misses.
const FORMAT: u32 = 3;
/// How often a claim that another holds is tried again.
pub const CLAIM_LOOK: std::time::Duration = std::time::Duration::from_millis(100);
const LOG: &str = "step.log";
pub(super) const RECORD: &str = "layer.json";
/// The name of a layer's disk in its folder.
pub const DISK: &str = "disk.qcow2";
pub(super) const USED: &str = "used";

/// What a layer is, as it says itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`FORMAT`].
    pub format: u32,
    /// Its key.
    pub key: String,
    /// Its parent's key; none for the booted base.
    pub parent: Option<String>,
    /// The folder of the layer that its disk is an overlay over: its parent, or one before; none: the base.
    pub backing: Option<String>,
    /// SHA-256 of the base image.
    pub base: String,
    /// The name of the step, or words for the booted base.
    pub name: String,
    /// The recipe that made it.
    pub recipe: String,
    /// Everything that its key is made of: name of the part, and what it was.
    pub parts: BTreeMap<String, String>,
    /// How long the step took, or the boot, in seconds.
    pub seconds: f64,
    /// Whether the guest's network was up.
    pub network_up: bool,
}

/// What the folder's files must be.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Sealed {
    #[serde(flatten)]
    record: Record,
    disk: Identity,
    /// By the machine's key.
    memory: BTreeMap<String, Identity>,
}

/// A layer in the store. While it lives nothing removes the layer.
#[derive(Debug)]
pub struct Layer {
    folder: PathBuf,
    sealed: Sealed,
    _in_use: File,
}

/// What was found under a key.
#[derive(Debug)]
pub enum Lookup {
    /// The layer.
    Hit(Box<Layer>),
    /// There is none.
    Miss,
    /// There is something, and it can't be used, for this reason.
    Damaged(String),
}

/// The right to make a layer, until it is dropped.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    _lock: File,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // While it is still held: whoever waits for it sees that the file is gone, and makes another.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A layer in the making; dropped before [`Pending::commit`], nothing of it stays.
#[derive(Debug)]
pub struct Pending {
    folder: tempfile::TempDir,
    id: String,
}

impl Layer {
    /// What it says of itself.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.sealed.record
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The name of its folder, by which other layers know it.
    #[must_use]
    pub fn id(&self) -> String {
        self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its disk.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    /// What the step printed.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.folder.join(LOG)
    }

    /// The guest's memory for a machine, if it is there and whole.
    #[must_use]
    pub fn memory(&self, machine: &str) -> Option<PathBuf> {
        let path = memory_path(&self.folder, machine);
        let found = Identity::from(&std::fs::metadata(&path).ok()?);
        (self.sealed.memory.get(machine) == Some(&found)).then_some(path)
    }

    /// Bytes on the host's disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let files = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        files.filter_map(|file| allocated(&file.path()).ok()).sum()
    }
}

fn memory_path(folder: &Path, machine: &str) -> PathBuf {
    folder.join(format!("memory.{machine}.lz4"))
}

impl Store {
    fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Looks a layer up and keeps it from being removed: of those with this key the newest that is whole. Never fails:
    /// if there are only such as can't be used it is [`Lookup::Damaged`].
    #[must_use]
    pub fn layer(&self, key: &str) -> Lookup {
        let entries = std::fs::read_dir(self.layers()).into_iter().flatten().flatten();
        let folders = entries.filter(|entry| key_of(&entry.file_name().to_string_lossy()) == key);
        let made =
            |entry: &std::fs::DirEntry| entry.path().join(RECORD).metadata().and_then(|record| record.modified());
        let mut folders: Vec<_> = folders.map(|entry| (made(&entry).ok(), entry.file_name())).collect();
        folders.sort_unstable();
        let mut found = Lookup::Miss;
        for (_, id) in folders.iter().rev() {
            match self.layer_in(&id.to_string_lossy()) {
                Lookup::Hit(layer) => return Lookup::Hit(layer),
                Lookup::Damaged(why) => found = Lookup::Damaged(why),
                Lookup::Miss => {}
            }
        }
        found
    }

    /// As [`Self::layer`]; of a layer that several machines have kept one over the other, the one with the memory of
    /// `machine`, if there is one.
    #[must_use]
    pub fn layer_for(&self, key: &str, machine: &str) -> Lookup {
        let mut found = self.layer(key);
        let mut first = None;
        while let Lookup::Hit(layer) = found {
            if layer.memory(machine).is_some() {
                return Lookup::Hit(layer);
            }
            let behind = layer.record().backing.clone().filter(|id| key_of(id) == key);
            first.get_or_insert(layer);
            found = behind.map_or(Lookup::Miss, |id| self.layer_in(&id));
        }
        first.map_or(found, Lookup::Hit)
    }

    /// The layer with this key and those that it is over, itself last; none if it, or one of them, isn't there. With a
    /// machine as [`Self::layer_for`].
    ///
    /// # Errors
    /// Why one of them can't be used.
    pub fn chain(&self, key: &str, machine: Option<&str>) -> Result<Option<Vec<Layer>>, String> {
        let mut layers = Vec::new();
        let mut next = Some(machine.map_or_else(|| self.layer(key), |machine| self.layer_for(key, machine)));
        while let Some(found) = next.take() {
            match found {
                Lookup::Hit(layer) => {
                    next = layer.record().backing.as_deref().map(|id| self.layer_in(id));
                    layers.insert(0, *layer);
                }
                Lookup::Miss => return Ok(None),
                Lookup::Damaged(why) => return Err(why),
            }
        }
        Ok(Some(layers))
    }

    /// As [`Self::layer`], the one in this folder.
    #[must_use]
    pub fn layer_in(&self, id: &str) -> Lookup {
        let folder = self.layers().join(id);
        let Ok(in_use) = File::open(folder.join(USED)) else {
            return if folder.exists() { Lookup::Damaged("it is not whole".to_owned()) } else { Lookup::Miss };
        };
        if rustix::fs::flock(&in_use, FlockOperation::LockShared).is_err() || !folder.join(RECORD).exists() {
            return Lookup::Miss;
        }
        match read(&folder) {
            Ok(sealed) => {
                let _ = in_use.set_modified(std::time::SystemTime::now());
                Lookup::Hit(Box::new(Layer { folder, sealed, _in_use: in_use }))
            }
            Err(why) => Lookup::Damaged(why),
        }
    }

    /// The layers that have this parent, the newest first: what a missing layer can be compared with.
    #[must_use]
    pub fn children(&self, parent: Option<&str>, base: &str) -> Vec<Record> {
        let entries = std::fs::read_dir(self.layers()).into_iter().flatten().flatten();
        let mut found: Vec<_> = entries
            .filter_map(|entry| {
                let made = std::fs::metadata(entry.path().join(RECORD)).ok()?.modified().ok()?;
                let sealed = read(&entry.path()).ok()?;
                let sibling = sealed.record.parent.as_deref() == parent && sealed.record.base == base;
                sibling.then_some((made, sealed.record))
            })
            .collect();
        found.sort_by_key(|(made, _)| std::cmp::Reverse(*made));
        found.into_iter().map(|(_, record)| record).collect()
    }

    /// Claims the making of a layer, unless another is making it.
    ///
    /// # Errors
    /// When the store can't be written.
    pub fn try_claim(&self, key: &str) -> Result<Option<Claim>, Error> {
        let path = self.root.join("locks").join(key);
        let failed = |error: io::Error| Error::io(format!("cannot write to `{}`", path.display()), &error);
        loop {
            let lock = File::create(&path).map_err(failed)?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // Its holder removes the file: a lock on one that is gone is no lock.
                Ok(()) if same_file(&path, &lock) => return Ok(Some(Claim { path, _lock: lock })),
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => return Ok(None),
                Err(error) => return Err(failed(error.into())),
            }
        }
    }
}

impl Pending {
    /// Begins a layer with this key in a scratch folder of the store.
    ///
    /// # Errors
    /// When the store can't be written.
    pub fn begin(scratch: &Path, key: &str) -> Result<Self, Error> {
        let folder = tempfile::Builder::new().prefix("layer-").rand_bytes(12).tempdir_in(scratch);
        let folder = folder.map_err(|error| Error::io(format!("cannot write to `{}`", scratch.display()), &error))?;
        let name = folder.path().file_name().unwrap_or_default().to_string_lossy();
        let id = format!("{key}-{}", name.trim_start_matches("layer-"));
        Ok(Self { folder, id })
    }

    /// The name that its folder will have.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where its disk goes.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.folder.path().join(DISK)
    }

    /// Where what the step printed goes.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.folder.path().join(LOG)
    }

    /// Where the memory of a machine goes.
    #[must_use]
    pub fn memory(&self, machine: &str) -> PathBuf {
        memory_path(self.folder.path(), machine)
    }

    /// Puts the layer into the store. `machines` are the keys of the memory states that were written.
    ///
    /// # Errors
    /// When the store can't be written.
    pub fn commit(self, store: &Store, record: Record, machines: &[String]) -> Result<Box<Layer>, Error> {
        let place = store.layers().join(&self.id);
        let failed = |error: io::Error| Error::io(format!("cannot keep the layer `{}`", place.display()), &error);
        let write = || -> io::Result<()> {
            let disk = identity(&self.disk())?;
            let memory = machines.iter().map(|machine| Ok((machine.clone(), identity(&self.memory(machine))?)));
            let memory = memory.collect::<io::Result<_>>()?;
            let record = Record { format: FORMAT, ..record };
            std::fs::write(self.folder.path().join(USED), "")?;
            store.write_json(&self.folder.path().join(RECORD), &Sealed { record, disk, memory })?;
            std::fs::rename(self.folder.path(), &place)?;
            File::open(store.layers())?.sync_all()
        };
        write().map_err(failed)?;
        // It has another name now: there is nothing left to remove under the old one.
        let _ = self.folder.keep();
        match store.layer_in(&self.id) {
            Lookup::Hit(layer) => Ok(layer),
            Lookup::Miss => Err(Error::new(Exit::Host, format!("the layer `{}` vanished at once", place.display()))),
            Lookup::Damaged(why) => {
                Err(Error::new(Exit::Host, format!("the layer `{}` can't be read back: {why}", place.display())))
            }
        }
    }
}

/// Whether the open file, or folder, is what the path leads to.
pub(crate) fn same_file(path: &Path, file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (path.metadata(), file.metadata()) {
        (Ok(there), Ok(here)) => (there.dev(), there.ino()) == (here.dev(), here.ino()),
        _ => false,
    }
}

/// The key in the name of a layer's folder.
pub(super) fn key_of(id: &str) -> &str {
    id.split('-').next().unwrap_or_default()
}

/// Makes the record of a layer that was brought here say what its files are here.
pub(super) fn adopt(store: &Store, folder: &Path) -> io::Result<()> {
    let mut sealed: Sealed = serde_json::from_slice(&std::fs::read(folder.join(RECORD))?)?;
    if sealed.record.format != FORMAT {
        let format = sealed.record.format;
        return Err(io::Error::other(format!("a layer in it has format {format}, and this kiln writes {FORMAT}")));
    }
    sealed.disk = identity(&folder.join(DISK))?;
    for (machine, memory) in &mut sealed.memory {
        *memory = identity(&memory_path(folder, machine))?;
    }
    std::fs::write(folder.join(USED), "")?;
    store.write_json(&folder.join(RECORD), &sealed)
}

/// Of a file that is on the disk now.
fn identity(path: &Path) -> io::Result<Identity> {
    let file = File::open(path)?;
    file.sync_all()?;
    Identity::of(&file)
}

fn read(folder: &Path) -> Result<Sealed, String> {
    let text = std::fs::read(folder.join(RECORD)).map_err(|error| format!("{RECORD}: {error}"))?;
    let sealed: Sealed = serde_json::from_slice(&text).map_err(|error| format!("{RECORD}: {error}"))?;
    if sealed.record.format != FORMAT {
        return Err(format!("it has format {}, and this kiln writes {FORMAT}", sealed.record.format));
    }
    if sealed.record.key != key_of(&folder.file_name().unwrap_or_default().to_string_lossy()) {
        return Err("it says that it is another one".to_owned());
    }
    let disk = std::fs::metadata(folder.join(DISK)).map_err(|error| format!("{DISK}: {error}"))?;
    if Identity::from(&disk) != sealed.disk {
        return Err(format!("{DISK} was changed"));
    }
    Ok(sealed)
}
