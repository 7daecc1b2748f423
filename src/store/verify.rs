//! A base image, and what the store made of it, read again to the last byte: the rest of kiln takes a file for what it
//! was while its size and times say so.

use std::fs::File;
use std::io;
use std::path::Path;

use super::Store;
use super::base::Imported;
use crate::cancel::Cancel;
use crate::disk::{self, BlockMap, Image, Work};
use crate::error::{Error, Exit};
use crate::event::{Event, Events};
use crate::recipe::Digest;

const PHASE: &str = "verify";
/// The block map of a base or a layer, in its folder.
pub(crate) const BLOCKS: &str = "blocks";

impl Store {
    /// Hashes the image file again even if it is known, then compares the base that was unpacked from it with what was
    /// noted of it at the time. A base that differs is removed with all that was made on it: it will be unpacked again.
    ///
    /// # Errors
    /// When the image's digest is not what it should be, or a damaged base is in use.
    pub fn verify_base(
        &self,
        image: &Path,
        expected: Option<&Digest>,
        events: &Events,
        cancel: &Cancel,
    ) -> Result<(), Error> {
        let Ok(mut file) = File::open(image) else { return Ok(()) };
        if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Ok(());
        }
        let shown = image.display();
        let known = self.known(&file);
        self.forget(&file);
        let sha256 = events.phase(
            PHASE,
            format!("reading {shown} again"),
            |_| format!("{shown} was read again"),
            || self.check_digest(image, &mut file, expected, cancel),
        )?;
        if let Some(known) = known.filter(|known| known.sha256 != sha256) {
            events.emit(Event::Warning {
                message: format!("the base image `{shown}` has changed, though its times and size have not"),
                help: Some(format!("it was {} and is {sha256}: is the disk that it is on failing?", known.sha256)),
            });
        }
        let Some(base) = self.unpacked(sha256.clone()) else { return Ok(()) };
        let outcome = |damage: &Option<String>| match damage {
            None => "the base in the cache is what was unpacked".to_owned(),
            Some(_) => "the base in the cache is damaged".to_owned(),
        };
        let damage =
            events.phase(PHASE, "reading the base in the cache", outcome, || self.damage(&base, events, cancel))?;
        let Some(why) = damage else { return Ok(()) };
        events.emit(Event::Warning {
            message: format!("the base in the cache is damaged and is unpacked again: {why}"),
            help: Some("what was kept after steps on it is removed: guests may have read what was wrong".to_owned()),
        });
        drop(base);
        self.discard_base(&sha256)
    }

    /// What is wrong with a base in the store; none: nothing.
    fn damage(&self, base: &Imported, events: &Events, cancel: &Cancel) -> Result<Option<String>, Error> {
        let noted = base.disk.with_file_name(BLOCKS);
        if !noted.exists() {
            let scratch = self.scratch()?;
            sync_and_note(&base.disk, scratch.path(), PHASE, events, cancel)?;
            std::fs::rename(scratch.path().join(BLOCKS), noted)
                .map_err(|error| Error::io("cannot note what is in the base", &error))?;
            events.emit(Event::Warning {
                message: "the base in the cache can't be compared: an earlier kiln noted nothing of it".to_owned(),
                help: Some("it is noted as it is now; to unpack it anew: kiln cache gc --keep 0B".to_owned()),
            });
            return Ok(None);
        }
        let compared = pass(PHASE, events, cancel, |work| differences(&base.disk, &noted, None, work))?;
        Ok(compared.unwrap_or_else(|error| Some(in_words(&error))))
    }
}

/// Brings a raw disk and its block map, which goes into `folder`, to the host's disk. The one waits for the disk and the
/// other for the processor, so together they take hardly longer than the first alone.
pub(super) fn sync_and_note(
    raw: &Path,
    folder: &Path,
    phase: &'static str,
    events: &Events,
    cancel: &Cancel,
) -> Result<(), Error> {
    let unreadable = |error: disk::Error| Error::new(Exit::Host, in_words(&error));
    let io_failed = |error: io::Error| Error::io("cannot note what is in the base", &error);
    let disk = File::open(raw).map_err(io_failed)?;
    let (map, synced) = std::thread::scope(|scope| {
        let sync = scope.spawn(|| disk.sync_all());
        let map = pass(phase, events, cancel, |work| BlockMap::of_raw(raw, work));
        (map, sync.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked"))))
    });
    let map = map?.map_err(unreadable)?;
    synced.map_err(io_failed)?;
    let mut text = Vec::new();
    map.write_to(&mut text).map_err(unreadable)?;
    let write = || {
        let path = folder.join(BLOCKS);
        std::fs::write(&path, &text)?;
        File::open(path)?.sync_all()
    };
    write().map_err(io_failed)
}

/// How a raw disk differs from the block map in a file, which must have this digest; none: it doesn't.
pub(crate) fn differences(
    raw: &Path,
    map: &Path,
    digest: Option<&str>,
    work: &Work<'_>,
) -> Result<Option<String>, disk::Error> {
    let map = BlockMap::open(map)?;
    if digest.is_some_and(|digest| digest != map.digest().to_string()) {
        return Ok(Some("its block map is another disk's".to_owned()));
    }
    let differ = map.verify(&Image::raw(raw)?, work)?;
    Ok(differ.first().map(|first| {
        let (some, all) = (differ.len(), map.blocks().len());
        format!("{some} of its {all} blocks differ, the first at byte {}", first * disk::BLOCK)
    }))
}

/// A long pass over a disk, with all processors, told as the progress of `phase`. The outer error is the user's stop.
pub(crate) fn pass<T>(
    phase: &'static str,
    events: &Events,
    cancel: &Cancel,
    pass: impl FnOnce(&Work<'_>) -> Result<T, disk::Error>,
) -> Result<Result<T, disk::Error>, Error> {
    let result = pass(&Work {
        // Twice the processors: a thread that waits for the disk must not keep one idle.
        threads: std::thread::available_parallelism().map_or(4, |count| 2 * usize::from(count)),
        progress: &|done, total| events.emit(Event::Progress { phase, done, total }),
        cancelled: &|| cancel.check().is_err(),
    });
    cancel.check()?;
    Ok(result)
}

fn in_words(error: &disk::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
