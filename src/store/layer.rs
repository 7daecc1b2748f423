//! Layers: what a guest was after a step. Each is a folder that is never changed once it has its record.
//!
//! ```text
//! layers/KEY-RANDOM/layer.json    what it is, and what its files must be; a folder without it is no layer
//! layers/KEY-RANDOM/disk.qcow2    an overlay over an earlier layer's disk, or over the base
//! layers/KEY-RANDOM/memory.MACHINE.lz4   the running guest, for machines with this key (not every layer has one)
//! layers/KEY-RANDOM/blocks        the disk's block map, once a build has made it
//! layers/KEY-RANDOM/step.log      what the step printed (the booted base has none)
//! layers/KEY-RANDOM/used          its mtime is when the layer was last used; locked while it is
//! ```
//!
//! A step that runs again under the same key is another [`Making`]: what was made on the earlier one belongs to that, and
//! so does its log. Makings have serial numbers, by which the newest is known whatever the host's clock says; only it
//! counts. Several layers may have the same serial number: kept again with another machine's memory, or imported.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use super::known::Identity;
use super::{Store, allocated};
use crate::error::Error;

/// The version of this format. Layers of another are another kiln's.
pub(super) const FORMAT: u32 = 4;
/// How often a claim that another holds is tried again.
pub const CLAIM_LOOK: std::time::Duration = std::time::Duration::from_millis(100);
const LOG: &str = "step.log";
pub(super) const RECORD: &str = "layer.json";
/// The name of a layer's disk in its folder.
pub const DISK: &str = "disk.qcow2";
pub(super) const USED: &str = "used";

/// One run of a step, or of the boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Making {
    /// Random.
    pub id: String,
    /// When it ended, in seconds since 1970.
    pub made: u64,
}

/// What a layer is, as it says itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`FORMAT`].
    pub format: u32,
    /// Its key.
    pub key: String,
    /// Its parent's key; none for the booted base.
    pub parent: Option<String>,
    /// Which of the makings of this key it is, from 1; 0 in one that is not in the store yet: a new one.
    pub serial: u64,
    /// What it is made of: the runs of the boot and of each step, its own last.
    pub lineage: Vec<Making>,
    /// What the guest had besides its disk and a boot would not bring back, as text for people; empty: nothing, so that
    /// the disk may be booted instead of taking up the memory.
    pub volatile: String,
    /// The folder of the layer that its disk is an overlay over; none: the base.
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

/// What the store has under a key.
#[derive(Debug, Default)]
pub struct Shelf {
    /// The layers of the newest making that are whole.
    pub layers: Vec<Layer>,
    /// Why others can't be used.
    pub damaged: Option<String>,
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

/// A layer in the making; dropped before [`Pending::place`], nothing of it stays.
#[derive(Debug)]
pub struct Pending {
    folder: tempfile::TempDir,
    id: String,
    in_use: File,
}

/// A layer's folder that has its name in the store, and not yet its record. An overlay may be over its disk already.
#[derive(Debug)]
pub struct Placed {
    folder: PathBuf,
    in_use: File,
}

impl Layer {
    /// What it says of itself.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.sealed.record
    }

    /// The run that made it.
    #[must_use]
    pub fn making(&self) -> Option<&Making> {
        self.record().lineage.last()
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

    /// The files that are what they were when it was kept, and those that may change.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let memory = self.sealed.memory.keys().filter_map(|machine| self.memory(machine));
        let others = [RECORD, DISK, LOG, super::verify::BLOCKS].map(|name| self.folder.join(name));
        others.into_iter().filter(|path| path.exists()).chain(memory).collect()
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

    /// What the store has under each of these keys, kept from being removed.
    #[must_use]
    pub fn shelves(&self, keys: &[&str]) -> Vec<Shelf> {
        let index: BTreeMap<&str, usize> = keys.iter().enumerate().map(|(index, key)| (*key, index)).collect();
        let mut found: Vec<Vec<Read>> = keys.iter().map(|_| Vec::new()).collect();
        for entry in std::fs::read_dir(self.layers()).into_iter().flatten().flatten() {
            if let Some(index) = index.get(key_of(&entry.file_name().to_string_lossy())) {
                found[*index].extend(read_in(entry.path()));
            }
        }
        found.into_iter().map(shelf).collect()
    }

    /// The layers that `layer` is over, the one next to the base first.
    ///
    /// # Errors
    /// Why one of them can't be used.
    pub fn backing(&self, layer: &Layer) -> Result<Vec<Layer>, String> {
        let mut layers: Vec<Layer> = Vec::new();
        let mut next = layer.record().backing.clone();
        while let Some(id) = next.take() {
            let gone = || format!("`{id}`, which it is over, is not there");
            match read_in(self.layers().join(&id)).ok_or_else(gone)? {
                Read::Whole(layer) => {
                    next.clone_from(&layer.record().backing);
                    layers.insert(0, *layer);
                }
                Read::Damaged { why, .. } => return Err(why),
            }
        }
        Ok(layers)
    }

    /// The highest serial number among the layers with this key.
    fn newest_serial(&self, key: &str) -> u64 {
        self.records(key).iter().map(|record| record.serial).max().unwrap_or(0)
    }

    /// An imported layer counts beside those that are here. But where one was made anew here, a run that is none of the
    /// newest and ended before them may be what that has replaced: it counts no more.
    fn serial_of_import(&self, imported: &Record) -> u64 {
        let here = self.records(&imported.key);
        let newest = here.iter().map(|record| record.serial).max().unwrap_or(1);
        let own = imported.lineage.last();
        let made = |record: &Record| record.lineage.last().map(|making| making.made);
        let mut last = here.iter().filter(|record| record.serial == newest);
        let is_replaced = newest > 1
            && last.clone().all(|record| record.lineage.last() != own)
            && last.any(|record| made(record) >= made(imported));
        if is_replaced { newest - 1 } else { newest }
    }

    fn records(&self, key: &str) -> Vec<Record> {
        let entries = std::fs::read_dir(self.layers()).into_iter().flatten().flatten();
        let own = entries.filter(|entry| key_of(&entry.file_name().to_string_lossy()) == key);
        own.filter_map(|entry| Some(read(&entry.path()).ok()??.record)).collect()
    }

    /// The layers that have this parent, the newest first: what a missing layer can be compared with.
    #[must_use]
    pub fn children(&self, parent: Option<&str>, base: &str) -> Vec<Record> {
        let entries = std::fs::read_dir(self.layers()).into_iter().flatten().flatten();
        let mut found: Vec<_> = entries
            .filter_map(|entry| {
                let made = std::fs::metadata(entry.path().join(RECORD)).ok()?.modified().ok()?;
                let sealed = read(&entry.path()).ok()??;
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
    pub fn begin(scratch: &Path, key: &str) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("layer-").rand_bytes(12).tempdir_in(scratch)?;
        let name = folder.path().file_name().unwrap_or_default().to_string_lossy();
        let id = format!("{key}-{}", name.trim_start_matches("layer-"));
        // Locked before it has its name: nothing removes it before it is in use.
        let in_use = File::create(folder.path().join(USED))?;
        rustix::fs::flock(&in_use, FlockOperation::LockShared)?;
        Ok(Self { folder, id, in_use })
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

    /// Gives its folder its name in the store, so that an overlay that names its disk finds it. It is no layer yet.
    ///
    /// # Errors
    /// When the store can't be written.
    pub fn place(self, store: &Store) -> Result<Placed, Error> {
        let place = store.layers().join(&self.id);
        std::fs::rename(self.folder.path(), &place)
            .map_err(|error| Error::io(format!("cannot keep the layer `{}`", place.display()), &error))?;
        // It has another name now: there is nothing left to remove under the old one.
        let _ = self.folder.keep();
        Ok(Placed { folder: place, in_use: self.in_use })
    }
}

impl Placed {
    /// Makes it a layer, once the host's disk has all of it. `machines` are the keys of the memory states that were
    /// written. If that fails its folder stays, for what is over its disk, until the returned lock is dropped.
    ///
    /// # Errors
    /// When the store can't be written.
    pub fn commit(self, store: &Store, record: Record, machines: &[String]) -> Result<Layer, (Error, Self)> {
        let write = || -> io::Result<Sealed> {
            let disk = identity(&self.folder.join(DISK))?;
            let memory =
                machines.iter().map(|machine| Ok((machine.clone(), identity(&memory_path(&self.folder, machine))?)));
            let memory = memory.collect::<io::Result<_>>()?;
            let _naming = store.naming()?;
            let serial = if record.serial > 0 { record.serial } else { store.newest_serial(&record.key) + 1 };
            let sealed = Sealed { record: Record { format: FORMAT, serial, ..record }, disk, memory };
            // Confirmed before it is named: where a quota is met, some filesystems say so only now.
            store.write_json(&self.folder.join(RECORD), &sealed)?;
            File::open(store.layers())?.sync_all()?;
            Ok(sealed)
        };
        match write() {
            Ok(sealed) => Ok(Layer { folder: self.folder, sealed, _in_use: self.in_use }),
            Err(error) => {
                let message = format!("cannot keep the layer `{}`", self.folder.display());
                Err((Error::io(message, &error), self))
            }
        }
    }
}

/// The layer in this folder, kept from being removed; none if it is no layer.
fn read_in(folder: PathBuf) -> Option<Read> {
    if !folder.join(RECORD).exists() {
        return None;
    }
    let damaged = |serial, why| Some(Read::Damaged { serial, why });
    let Ok(in_use) = File::open(folder.join(USED)) else {
        // Perhaps it is being removed.
        return if folder.join(RECORD).exists() { damaged(None, format!("{USED} is missing")) } else { None };
    };
    // What was being removed is gone under this name once the lock is there.
    if rustix::fs::flock(&in_use, FlockOperation::LockShared).is_err() || !folder.join(RECORD).exists() {
        return None;
    }
    match read(&folder) {
        Ok(None) => None,
        Ok(Some(sealed)) => match check(&folder, &sealed) {
            Ok(()) => {
                let _ = in_use.set_modified(std::time::SystemTime::now());
                Some(Read::Whole(Box::new(Layer { folder, sealed, _in_use: in_use })))
            }
            Err(why) => damaged(Some(sealed.record.serial), why),
        },
        Err(why) => damaged(None, why),
    }
}

/// What was found in a layer's folder.
enum Read {
    Whole(Box<Layer>),
    /// It can't be used; none: not even its serial number is known.
    Damaged {
        serial: Option<u64>,
        why: String,
    },
}

/// Of what has one key, the newest making. One that can't be used is not replaced by an older one, which it may have been
/// made to replace.
fn shelf(found: Vec<Read>) -> Shelf {
    let serial = |read: &Read| match read {
        Read::Whole(layer) => layer.record().serial,
        Read::Damaged { serial, .. } => serial.unwrap_or(u64::MAX),
    };
    let newest = found.iter().map(serial).max();
    let mut shelf = Shelf::default();
    for read in found.into_iter().filter(|read| Some(serial(read)) == newest) {
        match read {
            Read::Whole(layer) => shelf.layers.push(*layer),
            Read::Damaged { why, .. } => shelf.damaged = Some(why),
        }
    }
    // Any will do; the youngest was kept because an earlier one would not.
    let kept = |layer: &Layer| std::fs::metadata(layer.folder.join(RECORD)).and_then(|record| record.modified()).ok();
    shelf.layers.sort_by_key(|layer| std::cmp::Reverse(kept(layer)));
    shelf
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

/// Makes the record of a layer that was brought here say what its files are here. It takes no layer's place that is here
/// already, and none takes its place.
pub(super) fn adopt(store: &Store, folder: &Path) -> io::Result<()> {
    let mut sealed: Sealed = serde_json::from_slice(&std::fs::read(folder.join(RECORD))?)?;
    sealed.disk = identity(&folder.join(DISK))?;
    // One that was damaged is not in the file.
    sealed.memory.retain(|machine, _| memory_path(folder, machine).exists());
    for (machine, memory) in &mut sealed.memory {
        *memory = identity(&memory_path(folder, machine))?;
    }
    sealed.record.serial = store.serial_of_import(&sealed.record);
    std::fs::write(folder.join(USED), "")?;
    store.write_json(&folder.join(RECORD), &sealed)
}

/// Why the layer in `folder`, which was brought here, can't be taken; none: it can.
pub(super) fn refuse_foreign(folder: &Path) -> Option<String> {
    let text = std::fs::read(folder.join(RECORD)).unwrap_or_default();
    match serde_json::from_slice::<serde_json::Value>(&text) {
        Ok(record) if is_foreign(&record) => {
            Some(format!("a layer in it has format {}, and this kiln reads {FORMAT}", record["format"]))
        }
        Ok(_) => None,
        Err(error) => Some(format!("{RECORD} of a layer in it: {error}")),
    }
}

/// Of a file that is on the disk now.
fn identity(path: &Path) -> io::Result<Identity> {
    let file = File::open(path)?;
    file.sync_all()?;
    Identity::of(&file)
}

/// The record of the layer in `folder`; none if it is another version's.
fn read(folder: &Path) -> Result<Option<Sealed>, String> {
    let text = std::fs::read(folder.join(RECORD)).map_err(|error| format!("{RECORD}: {error}"))?;
    let value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| format!("{RECORD}: {error}"))?;
    if is_foreign(&value) {
        return Ok(None);
    }
    let sealed: Sealed = serde_json::from_value(value).map_err(|error| format!("{RECORD}: {error}"))?;
    if sealed.record.key != key_of(&folder.file_name().unwrap_or_default().to_string_lossy()) {
        return Err("it says that it is another one".to_owned());
    }
    Ok(Some(sealed))
}

/// Whether a record is another version's.
pub(super) fn is_foreign(record: &serde_json::Value) -> bool {
    record["format"].as_u64().is_some_and(|format| format != u64::from(FORMAT))
}

/// Whether the disk is the one that was kept.
fn check(folder: &Path, sealed: &Sealed) -> Result<(), String> {
    let disk = std::fs::metadata(folder.join(DISK)).map_err(|error| format!("{DISK}: {error}"))?;
    if Identity::from(&disk) == sealed.disk { Ok(()) } else { Err(format!("{DISK} was changed")) }
}
