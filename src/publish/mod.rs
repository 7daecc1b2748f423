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
mod lock;
mod object;
mod only;
mod parts;
mod preflight;
mod retry;
mod rules;
mod send;
mod stop;
mod undo;
mod upload;
mod vmdk;
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
use crate::recipe::{DiskFormat, Via};
use crate::store::Store;
use client::Clients;
use failure::Failure;
use found::Found;
use journal::Journal;
pub(crate) use journal::is_journal;
pub use only::{UploadedObject, upload_only};
use stop::Stop;
use undo::Undo;

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

/// How the image's instances start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootMode {
    /// By a boot sector.
    LegacyBios,
    /// By UEFI only.
    Uefi,
    /// By UEFI where the instance type has it, else by a boot sector.
    UefiPreferred,
}

/// How S3 encrypts an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encryption {
    /// With a key of S3's own (SSE-S3).
    S3,
    /// With a key of KMS (SSE-KMS).
    Kms {
        /// Its id, ARN or alias; none: the account's own for S3, `alias/aws/s3`.
        key: Option<String>,
    },
}

/// How the disk is an object in a bucket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ObjectOptions {
    /// As which bytes.
    pub format: DiskFormat,
    /// How it is encrypted; none: as the bucket has it.
    pub encryption: Option<Encryption>,
    /// It stays when it is imported.
    pub keep: bool,
}

/// What to publish, and where to.
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
    /// Words about the image; may be empty.
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
    /// The type of its root volume, e.g. `gp3`.
    pub volume_type: String,
    /// Tags for image and snapshot.
    pub tags: BTreeMap<String, String>,
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
    /// The object that the disk goes through.
    pub object: ObjectOptions,
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
    /// Tells this run from all others, also of the same disk: on the import task.
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
    run(request.parallel, publish_or_undo(request, events, cancel))
}

/// Does the work on threads that end with it.
fn run<T>(parallel: usize, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(parallel.clamp(4, 64))
        .thread_name("publish")
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start the network threads", &error))?;
    let done = runtime.block_on(work);
    // A name lookup or a credential helper that hangs must not hold kiln up.
    runtime.shutdown_background();
    done
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
                upload::delete_imported(job, undo, &key).await;
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
            let uploaded =
                job.phase("upload", upload::begins(job), |uploaded| upload::in_words(uploaded.as_ref()), work).await?;
            if uploaded.is_none() {
                let found = Box::pin(found::look(job)).await?;
                if found != Found::Nothing {
                    upload::tidy(job, undo).await?;
                }
                return Box::pin(steps(job, found, undo, journal)).await;
            }
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
