//! What a publish by EBS direct has done so far, in a file beside the disk: whoever publishes the disk again after kiln
//! was killed goes on there, because AWS doesn't tell which blocks a snapshot has while it is pending.
//!
//! The file's first line says what was begun, each further one is the index of a block that AWS has, and `sealed` the end.
//! It is only a help: without it, the snapshot is begun anew.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A snapshot that blocks go to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Begun {
    pub(super) snapshot: String,
    /// Of the disk.
    pub(super) digest: String,
    /// The snapshot that it differs from.
    pub(super) parent: Option<Parent>,
    pub(super) encrypted: bool,
}

/// A snapshot of an earlier disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Parent {
    pub(super) snapshot: String,
    /// Of that disk.
    pub(super) digest: String,
}

/// The file, held so that no other kiln goes on with the same snapshot.
#[derive(Debug)]
pub(super) struct Journal {
    begun: Begun,
    path: PathBuf,
    /// None where it can't be kept.
    file: Option<File>,
    blocks: BTreeSet<u64>,
    sealed: bool,
}

/// The line that says that the snapshot takes no more blocks.
const SEALED: &str = "sealed";

impl Journal {
    /// The journal of an earlier run that published this disk to this region, if it left one.
    pub(super) fn open(disk: &Path, region: &str, digest: &str) -> Option<Self> {
        let path = path(disk, region);
        let mut file = OpenOptions::new().read(true).append(true).open(&path).ok()?;
        file.try_lock().ok()?;
        let mut lines = BufReader::new(&file).lines().map_while(Result::ok);
        let begun: Option<Begun> = lines.next().and_then(|line| serde_json::from_str(&line).ok());
        // A line that was cut short is the start of another block's number: it must not be believed.
        let words: Vec<_> = lines.filter_map(|line| line.strip_suffix(';').map(str::to_owned)).collect();
        let blocks = words.iter().filter_map(|word| word.parse().ok()).collect();
        let sealed = words.iter().any(|word| word == SEALED);
        let Some(begun) = begun.filter(|begun| begun.digest == digest) else {
            let _ = std::fs::remove_file(&path);
            return None;
        };
        // What was cut short ends here.
        file.seek(SeekFrom::End(0)).and_then(|_| file.write_all(b"\n")).ok()?;
        Some(Self { begun, path, file: Some(file), blocks, sealed })
    }

    /// Begins a journal. Where it can't be written, or another kiln has it, there is none.
    pub(super) fn begin(disk: &Path, region: &str, begun: Begun) -> Self {
        let path = path(disk, region);
        let file = OpenOptions::new().append(true).create(true).open(&path).ok().filter(|file| {
            let header = || Some(format!("{}\n", serde_json::to_string(&begun).ok()?));
            file.try_lock().is_ok()
                && file.set_len(0).is_ok()
                && header().is_some_and(|header| (&*file).write_all(header.as_bytes()).is_ok())
        });
        Self { begun, path, file, blocks: BTreeSet::new(), sealed: false }
    }

    pub(super) fn begun(&self) -> &Begun {
        &self.begun
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
        if let Some(file) = &mut self.file {
            let _ = file.write_all(format!("{word};\n").as_bytes());
        }
    }

    /// Nothing is left to go on with.
    pub(super) fn remove(self) {
        if self.file.is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes the journal of this disk and region: the snapshot is complete, or gone.
pub(super) fn remove(disk: &Path, region: &str) {
    let _ = std::fs::remove_file(path(disk, region));
}

fn path(disk: &Path, region: &str) -> PathBuf {
    disk.with_file_name(format!("publish.{region}.journal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_known_to_the_next_run() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.raw");
        let parent = Some(Parent { snapshot: "snap-1".to_owned(), digest: "cd".to_owned() });
        let begun = Begun { snapshot: "snap-2".to_owned(), digest: "ab".to_owned(), parent, encrypted: false };
        let open = |region: &str, digest: &str| Journal::open(&disk, region, digest);
        let journal = folder.path().join("publish.eu-west-1.journal");
        assert!(open("eu-west-1", "ab").is_none());
        let mut first = Journal::begin(&disk, "eu-west-1", begun.clone());
        first.note(7);
        first.note(120);
        assert!(open("eu-west-1", "ab").is_none(), "another kiln has it");
        drop(first);
        assert!(open("us-east-1", "ab").is_none());
        // Killed in the middle of a line.
        let mut text = std::fs::read_to_string(&journal).unwrap();
        text.push_str("33");
        std::fs::write(&journal, &text).unwrap();
        let mut second = open("eu-west-1", "ab").unwrap();
        assert_eq!(second.begun(), &begun);
        assert_eq!([7, 120, 33, 3].map(|index| second.has(index)), [true, true, false, false]);
        second.note(33);
        second.seal();
        drop(second);
        let third = open("eu-west-1", "ab").unwrap();
        assert!(third.has(33) && third.is_sealed());
        drop(third);
        assert!(open("eu-west-1", "ef").is_none() && !journal.exists(), "of another disk");
        std::fs::write(&journal, "{ half").unwrap();
        assert!(open("eu-west-1", "ab").is_none() && !journal.exists());
    }
}
