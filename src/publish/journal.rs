//! What a publish by EBS direct has done so far, in a file beside the disk: whoever publishes the disk again after kiln
//! was killed goes on there, because AWS doesn't tell which blocks a snapshot has while it is pending.
//!
//! The file's first line says which run asks for a snapshot, the second what was begun, each further one is the index of a
//! block that AWS has, and `sealed` the end. It is only a help: without it, the snapshot is begun anew.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A snapshot that blocks go to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Begun {
    pub(super) snapshot: String,
    /// Of the disk.
    pub(super) digest: String,
    /// The snapshot that it differs from.
    pub(super) parent: Option<String>,
    pub(super) encrypted: bool,
    /// Holes are left out although it may be encrypted.
    #[serde(default)]
    pub(super) omit_holes: bool,
    /// The encryption that was asked for; see [`super::rules::encryption`].
    #[serde(default)]
    pub(super) encryption: Option<String>,
    /// A digest of all that is to be sent.
    pub(super) blocks: String,
}

/// Written before the snapshot is asked for, so that it is found again if kiln is killed before it hears of it.
#[derive(Debug, Serialize, Deserialize)]
struct Asked {
    run: String,
}

/// The file, held so that no other kiln goes on with the same snapshot.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    /// None where it can't be kept.
    file: Option<File>,
    /// Its last line is whole.
    ended: bool,
    /// How long ago an earlier run last wrote to it.
    age: Duration,
    blocks: BTreeSet<u64>,
    sealed: bool,
}

/// What was found beside a disk.
#[derive(Debug)]
pub(super) enum Found {
    /// No journal, or none that can be read.
    Nothing,
    /// Another kiln publishes from here to this region.
    Busy,
    /// An earlier run's, which ended before it heard whether there is a snapshot with its tag.
    Asked(Journal, String),
    /// An earlier run's, which has ended.
    Left(Journal, Begun),
}

/// How journals are named: the region is between these.
const START: &str = "publish.";
const END: &str = ".journal";
/// How the file ends that [`super::lock`] is held on.
pub(super) const LOCK: &str = ".lock";
/// The line that says that the snapshot takes no more blocks.
const SEALED: &str = "sealed";

impl Journal {
    /// Looks for the journal of an earlier publish from here to this region.
    pub(super) fn find(disk: &Path, region: &str) -> Found {
        let path = path(disk, region);
        let Ok(file) = OpenOptions::new().read(true).append(true).open(&path) else { return Found::Nothing };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Found::Busy,
            Err(TryLockError::Error(_)) => return Found::Nothing,
        }
        let mut lines = BufReader::new(&file).lines().map_while(Result::ok);
        let asked: Option<Asked> = lines.next().and_then(|line| serde_json::from_str(&line).ok());
        let begun: Option<Begun> = lines.next().and_then(|line| serde_json::from_str(&line).ok());
        // A line that was cut short is the start of another block's number: it must not be believed.
        let words: Vec<_> = lines.filter_map(|line| line.strip_suffix(';').map(str::to_owned)).collect();
        let blocks = words.iter().filter_map(|word| word.parse().ok()).collect();
        let sealed = words.iter().any(|word| word == SEALED);
        let modified = file.metadata().and_then(|metadata| metadata.modified());
        let age = modified.ok().and_then(|time| time.elapsed().ok()).unwrap_or(Duration::MAX);
        // A dry run looks too, and leaves it as it is.
        let journal = Self { path, file: Some(file), ended: false, age, blocks, sealed };
        match (asked, begun) {
            (Some(_), Some(begun)) => Found::Left(journal, begun),
            (Some(asked), None) => Found::Asked(journal, asked.run),
            _ => Found::Nothing,
        }
    }

    /// Begins a journal: this run is about to ask for a snapshot. Where it can't be written there is none.
    pub(super) fn ask(disk: &Path, region: &str, run: &str) -> Self {
        let path = path(disk, region);
        let file = OpenOptions::new().append(true).create(true).open(&path).ok();
        let file = file.filter(|file| file.try_lock().is_ok() && file.set_len(0).is_ok());
        let mut journal = Self { path, file, ended: true, age: Duration::ZERO, blocks: BTreeSet::new(), sealed: false };
        journal.write_header(&Asked { run: run.to_owned() });
        journal
    }

    /// Notes the snapshot that there is now.
    pub(super) fn begin(&mut self, begun: &Begun) {
        self.write_header(begun);
    }

    /// How long ago an earlier run last wrote to it.
    pub(super) fn age(&self) -> Duration {
        self.age
    }

    /// Whether AWS has the block.
    pub(super) fn has(&self, index: u64) -> bool {
        self.blocks.contains(&index)
    }

    /// Notes that AWS has the block.
    pub(super) fn note(&mut self, index: u64) {
        self.blocks.insert(index);
        self.write(&index.to_string());
    }

    /// Whether the snapshot takes no more blocks.
    pub(super) fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Notes that it takes no more.
    pub(super) fn seal(&mut self) {
        self.sealed = true;
        self.write(SEALED);
    }

    fn write(&mut self, word: &str) {
        self.write_line(&format!("{word};"));
    }

    fn write_header(&mut self, header: &impl Serialize) {
        if let Ok(header) = serde_json::to_string(header) {
            self.write_line(&header);
        }
    }

    fn write_line(&mut self, line: &str) {
        if let Some(file) = &mut self.file {
            let start = if self.ended { "" } else { "\n" };
            self.ended = file.write_all(format!("{start}{line}\n").as_bytes()).is_ok();
        }
    }

    /// Nothing is left to go on with.
    pub(super) fn remove(self) {
        if self.file.is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn path(disk: &Path, region: &str) -> PathBuf {
    beside(disk, region, END)
}

/// The file of a publish to this region beside a disk.
pub(super) fn beside(disk: &Path, region: &str, end: &str) -> PathBuf {
    disk.with_file_name(format!("{START}{region}{end}"))
}

/// Whether a file beside a disk is that of a publish that runs or was killed, by its name.
pub(crate) fn is_journal(name: &OsStr) -> bool {
    name.to_str().is_some_and(|name| name.starts_with(START) && (name.ends_with(END) || name.ends_with(LOCK)))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn what_was_done_is_known_to_the_next_run() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.raw");
        let begun = Begun {
            snapshot: "snap-2".to_owned(),
            digest: "ab".to_owned(),
            parent: Some("snap-1".to_owned()),
            encrypted: false,
            omit_holes: true,
            encryption: Some("default".to_owned()),
            blocks: "cd".to_owned(),
        };
        let left = |region: &str| match Journal::find(&disk, region) {
            Found::Left(journal, begun) => Some((journal, begun)),
            _ => None,
        };
        let path = folder.path().join("publish.eu-west-1.journal");
        assert!(left("eu-west-1").is_none());
        let mut first = Journal::ask(&disk, "eu-west-1", "r1");
        first.begin(&begun);
        first.note(7);
        first.note(120);
        assert!(matches!(Journal::find(&disk, "eu-west-1"), Found::Busy));
        drop(first);
        assert!(left("us-east-1").is_none());
        // Killed in the middle of a line.
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("33");
        std::fs::write(&path, &text).unwrap();
        let hour = SystemTime::now() - Duration::from_hours(1);
        File::options().append(true).open(&path).unwrap().set_modified(hour).unwrap();
        let (mut second, read) = left("eu-west-1").unwrap();
        assert!(read == begun && second.age() > Duration::from_mins(59));
        assert_eq!([7, 120, 33, 3].map(|index| second.has(index)), [true, true, false, false]);
        second.note(33);
        second.seal();
        drop(second);
        let (third, _) = left("eu-west-1").unwrap();
        assert!(third.has(33) && third.is_sealed());
        third.remove();
        assert!(left("eu-west-1").is_none() && !path.exists());
        std::fs::write(&path, "{ half").unwrap();
        assert!(matches!(Journal::find(&disk, "eu-west-1"), Found::Nothing));
        // Killed before it heard of the snapshot, and in the middle of noting it.
        drop(Journal::ask(&disk, "eu-west-1", "r2"));
        for cut in ["", "{\"snapshot\":\"snap-"] {
            std::fs::write(&path, format!("{{\"run\":\"r2\"}}\n{cut}")).unwrap();
            assert!(matches!(Journal::find(&disk, "eu-west-1"), Found::Asked(_, run) if run == "r2"));
        }
        let mut journal = Journal::ask(&disk, "eu-west-1", "r3");
        journal.begin(&begun);
        drop(journal);
        assert!(left("eu-west-1").is_some_and(|(journal, _)| !journal.has(7)));
    }
}
