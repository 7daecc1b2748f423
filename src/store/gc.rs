//! What the store holds, and how it is kept from growing for ever: what was used longest ago goes first, and never what
//! something else is built on, or what a running kiln uses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;
use serde::Serialize;

use super::layer::{self, Record};
use super::{Store, allocated, base};
use crate::error::{Error, Exit};

/// How much stays unless somebody says otherwise: the layers of a dozen recipes.
const DEFAULT_KEEP: u64 = 20 << 30;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A base image, unpacked.
    Base,
    /// A guest's disk, and perhaps its memory, after a step.
    Layer,
}

/// Something in the store.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Its name in the store: a digest or a key.
    pub key: String,
    /// What it is in words.
    pub name: String,
    /// Bytes on the host's disk.
    pub bytes: u64,
    /// Seconds since it was made.
    pub age: u64,
    /// Seconds since it was last used.
    pub unused: u64,
    /// How many entries are built on it.
    pub dependents: usize,
    /// Whether nothing will take it: a newer one has its place, or it is damaged.
    pub superseded: bool,
    #[serde(skip)]
    made: SystemTime,
    #[serde(skip)]
    standing: Standing,
    #[serde(skip)]
    behind: Option<String>,
    #[serde(skip)]
    folder: PathBuf,
    #[serde(skip)]
    mark: PathBuf,
}

/// What a layer is among those with its key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Standing {
    /// It is none of this kiln's layers: a base, or a layer of another version.
    #[default]
    None,
    /// Without a record that can be read.
    Damaged,
    /// Its serial number, and whether it has a memory state.
    Layer(u64, bool),
}

/// What may stay.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Bytes in all.
    pub keep: Option<u64>,
    /// How long something may stay unused.
    pub older: Option<Duration>,
}

impl Store {
    /// Everything in the store, what was used last first.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries: Vec<_> = folders(&self.root.join("bases")).filter_map(base_entry).collect();
        entries.extend(folders(&self.root.join("layers")).filter_map(layer_entry));
        let mut dependents = BTreeMap::<String, usize>::new();
        for key in entries.iter().filter_map(|entry| entry.behind.clone()) {
            *dependents.entry(key).or_default() += 1;
        }
        // The newest making of a key counts, and of its layers the youngest and those with a memory state.
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.made));
        let mut newest = BTreeMap::<String, u64>::new();
        for entry in &entries {
            if let Standing::Layer(serial, _) = entry.standing {
                let known = newest.entry(layer::key_of(&entry.key).to_owned()).or_default();
                *known = serial.max(*known);
            }
        }
        let mut seen = BTreeSet::new();
        for entry in &mut entries {
            entry.dependents = dependents.get(&entry.key).copied().unwrap_or(0);
            let key = layer::key_of(&entry.key);
            entry.superseded = match entry.standing {
                Standing::None => false,
                Standing::Damaged => true,
                Standing::Layer(serial, _) if newest.get(key) != Some(&serial) => true,
                Standing::Layer(_, has_memory) => !seen.insert(key.to_owned()) && !has_memory,
            };
        }
        entries.sort_by_key(|entry| entry.unused);
        entries
    }

    /// What may stay unless somebody says otherwise.
    #[must_use]
    pub fn default_limits(&self) -> Limits {
        Limits { keep: Some(DEFAULT_KEEP), older: None }
    }

    /// Removes what nothing will take any more, and what is over the limits. What was removed.
    ///
    /// # Errors
    /// When something can't be removed.
    pub fn collect(&self, limits: Limits) -> Result<Vec<Entry>, Error> {
        let scratch = self.scratch()?;
        let mut removed = Vec::new();
        // No layer gets its record meanwhile: what nothing is built on now stays so until it is gone.
        let removing = self.removing().map_err(|error| Error::io("cannot lock the cache", &error))?;
        let mut entries = self.entries();
        let mut bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
        loop {
            // From the one that was used longest ago. Each time anew: what was in the way of another may be gone.
            let candidate = entries.iter().rposition(|entry| {
                let too_old = limits.older.is_some_and(|older| entry.unused >= older.as_secs());
                let too_much = limits.keep.is_some_and(|keep| bytes > keep);
                // What is built on a damaged layer can't be used either.
                let is_free = entry.dependents == 0 || entry.standing == Standing::Damaged;
                (too_old || too_much || entry.superseded) && is_free
            });
            let Some(index) = candidate else { break };
            let entry = entries.remove(index);
            if !set_aside(&entry, scratch.path())? {
                continue;
            }
            bytes -= entry.bytes;
            if let Some(behind) = entries.iter_mut().find(|other| Some(&other.key) == entry.behind.as_ref()) {
                behind.dependents = behind.dependents.saturating_sub(1);
            }
            removed.push(entry);
        }
        drop(removing);
        // That may take a while. Its folder removes what it can, should something be in the way here.
        drop(scratch);
        Ok(removed)
    }

    /// Held while a layer gets its record.
    pub(super) fn naming(&self) -> std::io::Result<File> {
        self.locked(FlockOperation::LockShared)
    }

    /// Held while what nothing is built on is removed.
    fn removing(&self) -> std::io::Result<File> {
        self.locked(FlockOperation::LockExclusive)
    }

    fn locked(&self, how: FlockOperation) -> std::io::Result<File> {
        let lock = File::create(self.root.join("gc.lock"))?;
        rustix::fs::flock(&lock, how)?;
        Ok(lock)
    }
}

impl Store {
    /// Removes a damaged base, and the layers that were made on it.
    ///
    /// # Errors
    /// When something of it is in use, or can't be removed.
    pub(super) fn discard_base(&self, sha256: &str) -> Result<(), Error> {
        let _removing = self.removing().map_err(|error| Error::io("cannot lock the cache", &error))?;
        let (mut doomed, mut rest): (Vec<_>, Vec<_>) =
            self.entries().into_iter().partition(|entry| entry.kind == Kind::Base && entry.key == sha256);
        loop {
            let on_doomed = |entry: &Entry| doomed.iter().any(|below| entry.behind.as_ref() == Some(&below.key));
            let (more, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(on_doomed);
            rest = others;
            if more.is_empty() {
                break;
            }
            doomed.extend(more);
        }
        let scratch = self.scratch()?;
        // What nothing is built on comes last.
        for entry in doomed.iter().rev() {
            if !set_aside(entry, scratch.path())? {
                let message = format!("the damaged base can't be removed: another kiln is using {}", entry.name);
                return Err(
                    Error::new(Exit::Host, message).help("wait until that has ended, and build again with --verify")
                );
            }
        }
        Ok(())
    }
}

/// Takes an entry out of the store, into a scratch folder, which is removed next; `false` if it is in use. Half of it is
/// never found under its own name.
fn set_aside(entry: &Entry, scratch: &Path) -> Result<bool, Error> {
    let Ok(mark) = File::options().append(true).create(true).open(&entry.mark) else { return Ok(false) };
    if rustix::fs::flock(&mark, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(false);
    }
    fs_err::rename(&entry.folder, scratch.join(&entry.key))
        .map_err(|error| Error::io(format!("cannot remove `{}`", entry.folder.display()), &error))?;
    Ok(true)
}

fn folders(parent: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(parent).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_dir())
}

fn base_entry(folder: PathBuf) -> Option<Entry> {
    let mark = folder.join(base::FORMAT);
    let format = std::fs::read_to_string(&mark).ok()?;
    let name = format!("base image ({format})");
    entry(Kind::Base, folder, mark, name, None)
}

fn layer_entry(folder: PathBuf) -> Option<Entry> {
    let mark = folder.join(layer::USED);
    let text = std::fs::read(folder.join(layer::RECORD)).unwrap_or_default();
    let value: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    let text_of = |name: &str| value[name].as_str().map(str::to_owned);
    let foreign = layer::is_foreign(&value);
    let (standing, name, behind) = match serde_json::from_value::<Record>(value.clone()) {
        // Another version's, which may run on this store as well: it only counts, and ages.
        _ if foreign => {
            (Standing::None, "by another version of kiln".to_owned(), text_of("backing").or_else(|| text_of("base")))
        }
        Ok(record) => {
            let has_memory = value["memory"].as_object().is_some_and(|memory| !memory.is_empty());
            let name = format!("{}: {}", record.recipe, record.name);
            (Standing::Layer(record.serial, has_memory), name, record.backing.or(Some(record.base)))
        }
        Err(_) => (Standing::Damaged, "damaged".to_owned(), None),
    };
    let made = folder.join(layer::RECORD).metadata().and_then(|record| record.modified());
    let made = made.unwrap_or(SystemTime::UNIX_EPOCH);
    Some(Entry { made, standing, ..entry(Kind::Layer, folder, mark, name, behind)? })
}

fn entry(kind: Kind, folder: PathBuf, mark: PathBuf, name: String, behind: Option<String>) -> Option<Entry> {
    let seconds = |time: SystemTime| SystemTime::now().duration_since(time).map_or(0, |since| since.as_secs());
    let files: Vec<_> = std::fs::read_dir(&folder).ok()?.flatten().map(|file| file.path()).collect();
    let made = files.iter().filter_map(|file| file.metadata().ok()?.modified().ok()).min()?;
    let used = mark.metadata().ok().and_then(|mark| mark.modified().ok()).unwrap_or(made);
    Some(Entry {
        kind,
        key: folder.file_name()?.to_string_lossy().into_owned(),
        name,
        bytes: files.iter().filter_map(|file| allocated(file).ok()).sum(),
        age: seconds(made),
        made,
        unused: seconds(used),
        dependents: 0,
        superseded: false,
        standing: Standing::None,
        behind,
        folder,
        mark,
    })
}
