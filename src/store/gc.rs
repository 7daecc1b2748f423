//! What the store holds, and how it is kept from growing for ever: what was used longest ago goes first, and never what
//! something else is built on, or what a running kiln uses.

use std::collections::BTreeMap;
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
    behind: Option<String>,
    #[serde(skip)]
    folder: PathBuf,
    #[serde(skip)]
    mark: PathBuf,
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
        // The youngest of those with one key counts, as it does for whoever looks one up.
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.made));
        let mut seen = std::collections::BTreeSet::new();
        for entry in &mut entries {
            entry.dependents = dependents.get(&entry.key).copied().unwrap_or(0);
            entry.superseded |= entry.kind == Kind::Layer && !seen.insert(layer::key_of(&entry.key).to_owned());
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
        let mut entries = self.entries();
        let mut bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let mut removed = Vec::new();
        loop {
            // From the one that was used longest ago. Each time anew: what was in the way of another may be gone.
            let candidate = entries.iter().rposition(|entry| {
                let too_old = limits.older.is_some_and(|older| entry.unused >= older.as_secs());
                let too_much = limits.keep.is_some_and(|keep| bytes > keep);
                (too_old || too_much || entry.superseded) && entry.dependents == 0
            });
            let Some(index) = candidate else { return Ok(removed) };
            let entry = entries.remove(index);
            if !remove(self, &entry)? {
                continue;
            }
            bytes -= entry.bytes;
            if let Some(behind) = entries.iter_mut().find(|other| Some(&other.key) == entry.behind.as_ref()) {
                behind.dependents -= 1;
            }
            removed.push(entry);
        }
    }
}

impl Store {
    /// Removes a damaged base, and the layers that were made on it.
    ///
    /// # Errors
    /// When something of it is in use, or can't be removed.
    pub(super) fn discard_base(&self, sha256: &str) -> Result<(), Error> {
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
        // What nothing is built on comes last.
        for entry in doomed.iter().rev() {
            if !remove(self, entry)? {
                let message = format!("the damaged base can't be removed: another kiln is using {}", entry.name);
                return Err(
                    Error::new(Exit::Host, message).help("wait until that has ended, and build again with --verify")
                );
            }
        }
        Ok(())
    }
}

/// `false` if somebody uses it.
fn remove(store: &Store, entry: &Entry) -> Result<bool, Error> {
    let Ok(mark) = File::open(&entry.mark) else { return Ok(false) };
    if rustix::fs::flock(&mark, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(false);
    }
    let failed = |error: std::io::Error| Error::io(format!("cannot remove `{}`", entry.folder.display()), &error);
    // Under another name first: no half of it is ever found under its own.
    let scratch = store.scratch()?;
    let gone = scratch.path().join("gone");
    fs_err::rename(&entry.folder, &gone).map_err(failed)?;
    fs_err::remove_dir_all(&gone).map_err(failed)?;
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
    let record: Option<Record> =
        std::fs::read(folder.join(layer::RECORD)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let superseded = record.is_none();
    let (name, behind) = match record {
        Some(record) => (format!("{}: {}", record.recipe, record.name), record.backing.or(Some(record.base))),
        None => ("damaged".to_owned(), None),
    };
    let made = folder.join(layer::RECORD).metadata().and_then(|record| record.modified());
    let made = made.unwrap_or(SystemTime::UNIX_EPOCH);
    Some(Entry { superseded, made, ..entry(Kind::Layer, folder, mark, name, behind)? })
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
        behind,
        folder,
        mark,
    })
}
