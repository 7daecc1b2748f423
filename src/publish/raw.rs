//! The disk as it is: in parts, of which as many as possible are copied inside S3.

use std::fs::File;
use std::io;
use std::sync::Arc;

use tokio::sync::Semaphore;

use super::Job;
use super::multipart::Upload;
use super::object::{self, StoredParts, Unfinished};
use super::parts::{self, Parts, Piece};
use super::scratch::{self, Source};
use super::send::{self, Line, Sender, Sending, SourceGone, Tally};
use super::undo::Undo;
use super::upload::Lost;
use crate::error::{Error, Exit};

/// How often what parts are copied from is made, if other runs delete it.
const ROUNDS: usize = 3;

/// A disk that is uploaded.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) file: Arc<File>,
    pub(super) parts: Arc<Parts>,
}

impl Disk {
    /// Does some work for which it has to be read.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        job: &Job<'_>,
        work: impl FnOnce(&Parts, &File) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let Self { file, parts } = self.clone();
        let read = tokio::task::spawn_blocking(move || work(&parts, &file));
        let read = job.stop.or("the disk's digests", read).await?.map_err(|error| Lost::Bug(error).into_error(job))?;
        read.map_err(|error| Lost::Disk(error).into_error(job))
    }

    /// What S3 says of the whole object of which these are the parts.
    pub(super) async fn checksum(&self, job: &Job<'_>, of: fn(&Parts) -> &[Piece]) -> Result<String, Error> {
        let digests = move |parts: &Parts, file: &File| {
            of(parts).iter().map(|piece| parts.digest(file, piece)).collect::<io::Result<Vec<_>>>()
        };
        Ok(parts::composite(&self.read(job, digests).await?))
    }

    /// How many of these parts would be sent, and how many copied, if that is possible; each with its bytes.
    pub(super) async fn plan(
        &self,
        job: &Job<'_>,
        of: fn(&Parts) -> &[Piece],
        stored: Option<&StoredParts>,
        copies: bool,
    ) -> Result<[(u64, u64); 2], Error> {
        let stored = stored.cloned().unwrap_or_default();
        let plan =
            move |parts: &Parts, file: &File| send::plan(of(parts), |piece| parts.digest(file, piece), &stored, copies);
        self.read(job, plan).await
    }

    /// Sends these of its parts; `later` more bytes come after them.
    pub(super) async fn send(
        &self,
        job: &Job<'_>,
        upload: &Upload,
        of: fn(&Parts) -> &[Piece],
        source: Option<Source>,
        (tally, later): (&Arc<Tally>, u64),
    ) -> Result<Result<Sending, SourceGone>, Error> {
        let sender = Sender {
            line: Line::of(job, upload),
            file: Arc::clone(&self.file),
            parts: Arc::clone(&self.parts),
            of,
            source,
            room: Semaphore::new(job.request.parallel.max(1)),
            tally: Arc::clone(tally),
            later,
        };
        send::all(job, &Arc::new(sender)).await
    }
}

/// Sends what S3 doesn't have of the disk, and has the rest copied.
pub(super) async fn send(
    job: &Job<'_>,
    undo: &mut Undo,
    disk: &Disk,
    upload: &mut Upload,
    mut left: Unfinished,
    tally: &Arc<Tally>,
) -> Result<Sending, Error> {
    for _ in 0..ROUNDS {
        let made = Box::pin(scratch::make(job, undo, disk, upload.stored.as_ref(), left, tally)).await?;
        let sending = match made {
            Ok(source) => Box::pin(disk.send(job, upload, |parts| &parts.disk, source, (tally, 0))).await?,
            Err(SourceGone) => Err(SourceGone),
        };
        if let Ok(sending) = sending {
            return Ok(sending);
        }
        job.events.detail("another publish has ended or deleted what parts are copied from: looking again");
        match Box::pin(object::parts_of(job, &upload.key, &upload.id)).await? {
            Some(stored) => upload.stored = Some(stored),
            None => return Ok(Sending::Gone),
        }
        left = Box::pin(object::left(job)).await?.scratch;
    }
    let why = "other publishes have ended or deleted what parts are copied from, again and again";
    job.events.detail(format!("nothing is copied inside S3, and zeros are sent: {why}"));
    let sending = Box::pin(disk.send(job, upload, |parts| &parts.disk, None, (tally, 0))).await?;
    sending.map_err(|SourceGone| Error::new(Exit::Bug, "a part was copied from nowhere"))
}
