//! A disk becomes an image: S3, then `ImportSnapshot`, or EBS direct; then `RegisterImage`. The only async code of kiln.
//!
//! [`publish`] reads top to bottom: what is asked for is checked without a request (`rules`), then by requests that
//! only read (`preflight`), which also tell what an earlier publish has left (`found`), and only then is anything made.
//! What is made is written into `undo::Undo` *before* the request is sent, so that a failure, a signal or a lost answer
//! at any point finds it again and takes it back.

mod client;
mod ebs;
mod failure;
mod found;
mod image;
mod import;
mod journal;
mod parts;
mod preflight;
mod retry;
mod rules;
mod stop;
mod undo;
mod upload;
mod zeros;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cancel::Cancel;
use crate::error::Error;
use crate::event::{Event, Events};
pub use crate::recipe::BootMode;
use crate::recipe::{Ebs, Encryption, Via, Volume};
use crate::store::Store;
use client::Clients;
use failure::Failure;
use found::Found;
use journal::Journal;
pub(crate) use journal::is_journal;
use stop::Stop;
use undo::{Made, Undo};

/// The role that AWS assumes to read the disk from the bucket, unless another is named.
pub const DEFAULT_ROLE: &str = "vmimport";

/// What the image's instances run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Architecture {
    /// Intel and AMD, 64 bit.
    #[serde(rename = "x86_64")]
    X86_64,
    /// Graviton.
    #[serde(rename = "arm64")]
    Arm64,
}

/// What to publish, and where to.
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own")]
#[derive(Debug, Clone)]
pub struct Request {
    /// The raw disk. It is only read.
    pub disk: PathBuf,
    /// Its size in GiB.
    pub size: u64,
    /// Its digest in hex, as the manifest has it.
    pub digest: String,
    /// The recipe's name.
    pub name: String,
    /// The image's name, placeholders filled in.
    pub image_name: String,
    /// The name has the time in it, so that every publish would have another.
    pub name_varies: bool,
    /// Words about the image, placeholders filled in; may be empty.
    pub description: String,
    /// What its instances run on.
    pub arch: Architecture,
    /// The region; without one, the SDK's usual places are asked.
    pub region: Option<String>,
    /// The bucket that the disk goes through; it must be in that region.
    pub bucket: Option<String>,
    /// What the object's key starts with; may be empty.
    pub prefix: String,
    /// How its instances start.
    pub boot_mode: BootMode,
    /// Whether its instances' metadata service asks for a token.
    pub imds_v2: bool,
    /// Its root device, e.g. `/dev/xvda`.
    pub root_device: String,
    /// Its root volume; as large as the disk unless it says otherwise.
    pub root: Ebs,
    /// The other volumes of its instances.
    pub volumes: Vec<Volume>,
    /// Whether its instances have a TPM 2.0.
    pub tpm: bool,
    /// The UEFI variables that its instances start with, in base64.
    pub uefi_data: Option<String>,
    /// Whether it says that it has the driver of the Intel 82599 network card (SR-IOV).
    pub sriov: bool,
    /// Whether it says that it has the driver of the ENA network card.
    pub ena: bool,
    /// How its snapshots are encrypted; none: as the account's settings want it.
    pub encryption: Option<Encryption>,
    /// Tags for image and snapshot, placeholders filled in.
    pub tags: BTreeMap<String, String>,
    /// More tags for snapshots; they win over `tags`.
    pub snapshot_tags: BTreeMap<String, String>,
    /// The texts by which images are told apart.
    pub undated: Undated,
    /// The role that AWS reads the bucket with; [`DEFAULT_ROLE`] without one.
    pub role: Option<String>,
    /// How many parts are sent at once.
    pub parallel: usize,
    /// The pause between two looks at the import task.
    pub poll: Duration,
    /// Only read, and say what would be done.
    pub dry_run: bool,
    /// How long all of it may take.
    pub timeout: Duration,
    /// How the disk becomes a snapshot.
    pub via: Via,
    /// The disk's block map.
    pub block_map: PathBuf,
    /// Where block maps of published snapshots are kept.
    pub store: Option<Store>,
}

/// Texts whose `{date}` and `{time}` are not filled in: the same disk published again makes no other image for those.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Undated {
    /// Words about the image; may be empty.
    pub description: String,
    /// Tags for image and snapshot.
    pub tags: BTreeMap<String, String>,
    /// More tags for snapshots.
    pub snapshot_tags: BTreeMap<String, String>,
}

/// An image that can be launched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Published {
    /// The region it is in.
    pub region: String,
    /// Its id; empty after a dry run.
    pub image_id: String,
    /// Its snapshot's id; empty after a dry run.
    pub snapshot_id: String,
    /// Its name.
    pub image_name: String,
    /// The recipe's name.
    pub name: String,
    /// The digest of the disk it was made from.
    pub digest: String,
    /// What its instances run on.
    pub architecture: Architecture,
    /// How its instances start.
    pub boot_mode: BootMode,
    /// The size of its root volume in GiB.
    pub size_gib: u64,
    /// Nothing was made: the request only asked what would be. Left out where something was.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// Where it goes, once region, bucket and names are settled.
#[derive(Debug, Clone)]
struct Target {
    region: String,
    bucket: String,
    key: String,
    role: String,
    image_name: String,
    /// Tells this run from all others, also of the same disk: in the object's key, and on the import task.
    run: String,
}

/// What every part of the work needs.
struct Job<'a> {
    request: &'a Request,
    target: Target,
    clients: Arc<Clients>,
    events: &'a Events,
    stop: Stop,
}

/// Makes an image of the disk and waits until it can be launched.
///
/// # Errors
/// The first thing that went wrong, after everything made so far was taken back; what could not be taken back is named
/// in its notes.
pub fn publish(request: &Request, events: &Events, cancel: &Cancel) -> Result<Published, Error> {
    rules::check(request)?;
    cancel.check()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(request.parallel.clamp(4, 64))
        .thread_name("publish")
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start the network threads", &error))?;
    let published = runtime.block_on(publish_or_undo(request, events, cancel));
    // A name lookup or a credential helper that hangs must not hold kiln up.
    runtime.shutdown_background();
    published
}

async fn publish_or_undo(request: &Request, events: &Events, cancel: &Cancel) -> Result<Published, Error> {
    let stop = Stop::new(cancel, request.timeout);
    let clients = stop.or("the AWS configuration", Box::pin(Clients::load(request.region.as_deref()))).await??;
    let target = rules::target(request, clients.region(), format!("{:016x}", retry::random()))?;
    let job = Job { request, target, clients: Arc::new(clients), events, stop };
    let check = Box::pin(preflight::check(&job));
    let found = job.phase("check", preflight::begins(&job), |_| String::new(), check).await?;
    if request.dry_run {
        preflight::explain(&job, &found).await?;
        return Ok(job.published(String::new(), String::new()));
    }
    // The journal is held until all is done or taken back, so that no other kiln goes on with what this one deletes.
    let (mut undo, mut journal) = (Undo::default(), None);
    let (published, left) = match steps(&job, found, &mut undo, &mut journal).await {
        Ok(published) => (Ok(published), 0),
        Err(error) => {
            let (error, left) = undo.run(&job, error).await;
            (Err(error), left)
        }
    };
    // A snapshot that could not be deleted is one to go on with.
    if let Some(journal) = journal
        && left == 0
    {
        journal.remove();
    }
    published
}

async fn steps(
    job: &Job<'_>,
    found: Found,
    undo: &mut Undo,
    journal: &mut Option<Journal>,
) -> Result<Published, Error> {
    let snapshot = match found {
        Found::Image { id, name, snapshot } => {
            job.events.note(format!("image {id} has this disk already"));
            image::until_available(job, &id).await?;
            return Ok(Published { image_name: name, ..job.published(id, snapshot) });
        }
        Found::Snapshot { id } => {
            job.events.note(format!("snapshot {id} has this disk already"));
            // An earlier run may have sealed it, and been killed.
            if let journal::Found::Left(left) = Journal::find(&job.request.disk, &job.target.region)
                && left.begun().snapshot == id
            {
                left.remove();
            }
            id
        }
        Found::Task { id, key } => {
            job.events.note(format!("import task {id} imports this disk already"));
            let work = Box::pin(import::adopt(job, &id));
            let snapshot = job.phase("import", format!("import task {id}"), String::clone, work).await?;
            if let Some(key) = key {
                undo.will_make(Made::Object { key, version: None, sure: false });
                upload::delete(job, undo).await;
            }
            snapshot
        }
        Found::Nothing if job.request.via == Via::Ebs => {
            let work = Box::pin(ebs::upload(job, undo, journal));
            let written = job.phase("upload", ebs::begins(job), ebs::in_words, work).await?;
            job.keep_map(&written.snapshot);
            written.snapshot
        }
        Found::Nothing => {
            let work = Box::pin(upload::upload(job, undo));
            job.phase("upload", upload::begins(job), upload::in_words, work).await?;
            let work = Box::pin(import::import(job, undo));
            let snapshot = job.phase("import", import::begins(job), String::clone, work).await?;
            upload::delete(job, undo).await;
            import::tag_snapshot(job, &snapshot).await?;
            job.keep_map(&snapshot);
            snapshot
        }
    };
    let work = Box::pin(image::register(job, &snapshot, undo));
    let image = job.phase("register", image::begins(job), String::clone, work).await?;
    Ok(job.published(image, snapshot))
}

impl Job<'_> {
    fn published(&self, image_id: String, snapshot_id: String) -> Published {
        let request = self.request;
        Published {
            region: self.target.region.clone(),
            image_id,
            snapshot_id,
            image_name: request.image_name.clone(),
            name: request.name.clone(),
            digest: request.digest.clone(),
            architecture: request.arch,
            boot_mode: rules::boot_mode(request),
            size_gib: request.size,
            dry_run: request.dry_run,
        }
    }

    /// Keeps what is in the snapshot that this run has made: the next disk of this recipe is compared with it.
    fn keep_map(&self, snapshot: &str) {
        if let Some(store) = &self.request.store {
            store.keep_map(snapshot, &self.request.block_map);
        }
    }

    /// Waits for a request's answer, unless the work is stopped first.
    async fn call<T>(&self, what: &str, call: impl Future<Output = Result<T, Failure>>) -> Result<T, Error> {
        self.stop.or(what, call).await?.map_err(|failure| self.error(failure))
    }

    fn error(&self, failure: Failure) -> Error {
        failure.into_error(&self.target)
    }

    /// Runs `work` as a phase: says that it began, and on success that it ended, with what `outcome` says of it.
    async fn phase<T>(
        &self,
        phase: &'static str,
        detail: String,
        outcome: impl FnOnce(&T) -> String,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.stop.check(phase)?;
        let started = Instant::now();
        self.events.emit(Event::PhaseStarted { phase, detail });
        let value = work.await?;
        self.events.emit(Event::PhaseDone { phase, detail: outcome(&value), took: started.elapsed() });
        Ok(value)
    }
}
