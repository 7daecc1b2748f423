//! A disk becomes an image: S3, then `ImportSnapshot`, or EBS direct; then `RegisterImage`. The only async code of kiln.
//!
//! [`publish`] reads top to bottom: what is asked for is checked without a request (`rules`), then by requests that
//! only read (`preflight`), which also tell what an earlier publish has left (`found`), and only then is anything made.
//! What is made is written into `undo::Undo` *before* the request is sent, so that a failure, a signal or a lost answer
//! at any point finds it again and takes it back.

mod action;
mod check;
mod client;
mod codes;
mod copy;
mod ebs;
mod failure;
mod finish;
mod found;
mod image;
mod import;
mod journal;
pub mod life;
mod lock;
mod object;
mod only;
mod parameter;
mod parts;
mod place;
mod plan;
mod policy;
mod preflight;
mod regions;
mod replace;
mod retry;
mod rules;
mod send;
mod share;
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
use crate::error::{Error, Exit};
use crate::event::{Event, Events};
pub use crate::recipe::BootMode;
use crate::recipe::{DiskFormat, Ebs, Encryption, Release, Via, Volume};
use crate::store::Store;
pub use check::{Checked, Verdict};
use client::Clients;
use failure::Failure;
use found::Found;
use journal::Journal;
pub(crate) use journal::is_journal;
pub use only::{UploadedObject, upload_only};
use place::Place;
pub use plan::{Action, Billed, Bound, Cost, Count, Object, Plan, Requests, Step, Steps, Transfer, Way};
use preflight::Before;
pub use regions::{Ended, How};
use regions::{Home, Original, Regions, Source};
use replace::Old;
use stop::Stop;
use undo::{Made, Undo};

const SIGTERM: i32 = 15;
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

/// How S3 encrypts an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectEncryption {
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
    pub encryption: Option<ObjectEncryption>,
    /// It stays when it is imported.
    pub keep: bool,
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
    /// The regions; without one, the SDK's usual places are asked.
    pub regions: Vec<String>,
    /// The bucket that the disk goes through; it must be in one of the regions.
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
    /// What is done with the image once it is there.
    pub release: Release,
    /// An image of that name is replaced.
    pub force: bool,
    /// The object that the disk goes through.
    pub object: ObjectOptions,
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
    /// What would be done, if that is all that was asked for.
    #[serde(flatten)]
    pub plan: Option<Plan>,
}

/// Where it goes, once region, bucket and names are settled.
#[derive(Debug, Clone, Default)]
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
    stop: Arc<Stop>,
    source: Source,
}

/// Makes an image of the disk in every region asked for, and waits until all can be launched.
///
/// # Errors
/// In each region the first thing that went wrong there, after everything made so far in it was taken back; what could
/// not be taken back is named in its notes. The outer error is one that came before anything was asked of a region.
pub fn publish(request: &Request, how: &How<'_>, cancel: &Cancel) -> Result<Vec<Ended>, Error> {
    rules::check(request)?;
    cancel.check()?;
    regions::publish(request, how, cancel)
}

/// The IAM policy that whoever makes this request needs. Nothing is asked of AWS.
///
/// # Errors
/// A request that AWS would refuse whoever makes it.
pub fn policy(request: &Request) -> Result<serde_json::Value, Error> {
    policy::policy(request)
}

/// Whether a publish would be permitted, as far as requests tell that make nothing: for each region what was looked at.
///
/// # Errors
/// A request that can't be carried out anywhere, no connection, or a stop.
pub fn check(request: &Request, events: &Events, cancel: &Cancel) -> Result<Vec<(String, Vec<Checked>)>, Error> {
    rules::check(request)?;
    cancel.check()?;
    regions::check(request, events, cancel)
}

/// What came of a region: the image that is there now, and what went wrong.
async fn publish_in(
    request: &Request,
    clients: Clients,
    source: Source,
    events: &Events,
    regions: &Regions<'_>,
) -> (Option<Published>, Option<Error>) {
    let job = match Job::new(request, clients, source, events, Stop::new(&regions.cancel, request.timeout)) {
        Ok(job) => job,
        Err(error) => {
            // The others would wait for this one.
            regions.cancel.request(SIGTERM);
            return (None, Some(error));
        }
    };
    let published = match Box::pin(image_in(&job, regions)).await {
        Ok(published) => published,
        Err(error) => {
            regions.fails(&job.target.region, &error);
            drop(job.source);
            let _ = job.stop.or("the other regions", regions.ended()).await;
            return (None, Some(error));
        }
    };
    let named = Box::pin(name_in(&job, &published, regions)).await;
    (Some(published), named.err())
}

/// The image, or the first thing that went wrong, after everything made so far was taken back.
async fn image_in(job: &Job<'_>, regions: &Regions<'_>) -> Result<Published, Error> {
    let check = Box::pin(preflight::check(job));
    let before = job.phase("check", preflight::begins(job), |_| String::new(), check).await;
    if let Err(error) = &before {
        regions.fails(&job.target.region, error);
    }
    let looked = job.stop.or("the other regions' checks", regions.looked()).await;
    let before = before?;
    looked?;
    if job.request.dry_run {
        let plan = Some(Box::pin(preflight::plan(job, &before)).await?);
        return Ok(Published { plan, ..job.published(Image::default()) });
    }
    // The journal is held until all is done or taken back, so that no other kiln goes on with what this one deletes.
    let (mut undo, mut journal) = (Undo::default(), None);
    let (published, left) = match steps(job, before, &mut undo, &mut journal).await {
        Ok(published) => (Ok(published), 0),
        Err(error) => {
            let (error, left) = undo.run(job, error).await;
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

/// Points the region's parameter at the image, last of all: when every region has its image, or has failed.
async fn name_in(job: &Job<'_>, published: &Published, regions: &Regions<'_>) -> Result<(), Error> {
    let there = |error: Error| error.with_note(format!("the image {} is there", published.image_id));
    let Some(name) = job.request.release.parameter.as_ref().filter(|_| !job.request.dry_run) else {
        // The image is there: whoever stops kiln now stops nothing.
        let _ = job.stop.or("the other regions", regions.ended()).await;
        return Ok(());
    };
    job.stop.or("the other regions", regions.ended()).await.map_err(there)?;
    let work = Box::pin(parameter::set(job, name, &published.image_id));
    let detail = format!("{name} in {} names {}", job.target.region, published.image_id);
    job.phase("parameter", detail, |()| name.clone(), work).await.map_err(there)
}

/// An image that is there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Image {
    id: String,
    name: String,
    snapshot: String,
}

async fn steps(
    job: &Job<'_>,
    before: Before,
    undo: &mut Undo,
    journal: &mut Option<Journal>,
) -> Result<Published, Error> {
    let image = match (before.found, &job.source) {
        (Found::Image(image), _) => {
            job.events.note(format!("image {} has this disk already", image.id));
            job.forget_journal(&image.snapshot);
            image::until_available(job, &image.id).await?;
            image
        }
        (Found::Nothing, Source::Copy(home)) => {
            let image = Box::pin(copied(job, home.clone(), &before.old, undo)).await?;
            replace::remove(job, &before.old, &image.snapshot).await?;
            image
        }
        (found, _) => {
            let snapshot = Box::pin(snapshot(job, found, undo, journal)).await?;
            let work = Box::pin(registered(job, &snapshot, &before.old, undo));
            let id = job.phase("register", image::begins(job), String::clone, work).await?;
            Image { id, name: job.target.image_name.clone(), snapshot }
        }
    };
    Box::pin(finish::finish(job, &image.id)).await?;
    if let Some(interim) = before.interim.filter(|interim| *interim != image.id) {
        replace::remove_interim(job, &interim).await;
    }
    if let Source::Disk(Some(tell)) = &job.source {
        let Image { id, name, .. } = image.clone();
        tell.send_replace(Some(Original { region: job.target.region.clone(), id, name }));
    }
    Ok(job.published(image))
}

async fn registered(job: &Job<'_>, snapshot: &str, old: &[Old], undo: &mut Undo) -> Result<String, Error> {
    match old {
        [] => Box::pin(image::register(job, &job.target.image_name, snapshot, undo)).await,
        old => Box::pin(replace::register(job, snapshot, old, undo)).await,
    }
}

/// The image of another region, copied to this one when it is available.
async fn copied(job: &Job<'_>, mut home: Home, old: &[Old], undo: &mut Undo) -> Result<Image, Error> {
    let what = format!("{}'s image", home.region);
    let detail = format!("{what}, to copy it to {}", job.target.region);
    let wait = async {
        match job.stop.or(&what, home.image.wait_for(Option::is_some)).await? {
            Ok(found) => Ok(found.clone()),
            Err(_) => Ok(None),
        }
    };
    let original = job.phase("wait", detail, |_| String::new(), wait).await?.ok_or_else(|| {
        let message = format!("there is no image to copy to {}: {} failed", job.target.region, home.region);
        Error::new(Exit::Publish, message)
    })?;
    let detail = format!("{} of {} to {}", original.id, original.region, job.target.region);
    let work = Box::pin(copy_of(job, &original, old, undo));
    job.phase("copy", detail, |image: &Image| image.id.clone(), work).await
}

async fn copy_of(job: &Job<'_>, original: &Original, old: &[Old], undo: &mut Undo) -> Result<Image, Error> {
    let place = job.place();
    let source = copy::source(&place.elsewhere(&original.region), &original.id).await?;
    let order = copy::Order {
        source,
        name: original.name.clone(),
        kms_key: rules::kms_key(job.request, &job.target.region).map(str::to_owned),
        replaces: old.iter().map(|old| old.id.clone()).collect(),
    };
    let tell = |percent| job.events.emit(Event::Progress { phase: "copy", done: percent, total: 100 });
    let copied = Box::pin(copy::copy(&place, &order, tell)).await?;
    let snapshot = copied.snapshots.first().cloned().unwrap_or_default();
    if !copied.found {
        for snapshot in &copied.snapshots {
            undo.will_make(Made::Snapshot { id: Some(snapshot.clone()) });
        }
        let (id, name) = (Some(copied.id.clone()), order.name.clone());
        undo.will_make(Made::Image { id, name, snapshot: snapshot.clone() });
    }
    Ok(Image { id: copied.id, name: order.name, snapshot })
}

/// A snapshot with the disk: one that is there, or a new one.
async fn snapshot(
    job: &Job<'_>,
    found: Found,
    undo: &mut Undo,
    journal: &mut Option<Journal>,
) -> Result<String, Error> {
    match found {
        Found::Snapshot { id } => {
            job.events.note(format!("snapshot {id} has this disk already"));
            job.forget_journal(&id);
            Ok(id)
        }
        Found::Task { id, key } => {
            job.events.note(format!("import task {id} imports this disk already"));
            let work = Box::pin(import::adopt(job, &id));
            let snapshot = job.phase("import", format!("import task {id}"), String::clone, work).await?;
            if let Some(key) = key {
                upload::delete_imported(job, undo, &key).await;
            }
            Ok(snapshot)
        }
        Found::Image(Image { snapshot, .. }) => Ok(snapshot),
        Found::Nothing => match job.request.via {
            Via::S3 => through_bucket(job, undo, journal).await,
            Via::Ebs => block_by_block(job, undo, journal).await?.map_err(|refused| ebs::start_failed(job, refused)),
            Via::Auto => match block_by_block(job, undo, journal).await? {
                Ok(snapshot) => Ok(snapshot),
                Err(refused) if job.target.bucket.is_empty() => Err(ebs::start_failed(job, refused)),
                Err(refused) => {
                    let bucket = &job.target.bucket;
                    job.events
                        .note(format!("no EBS direct ({}): going through the bucket `{bucket}`", refused.reason()));
                    Box::pin(preflight::bucket(job)).await?;
                    through_bucket(job, undo, journal).await
                }
            },
        },
    }
}

async fn through_bucket(job: &Job<'_>, undo: &mut Undo, journal: &mut Option<Journal>) -> Result<String, Error> {
    let work = Box::pin(upload::upload(job, undo));
    let outcome = |uploaded: &Option<upload::Uploaded>| upload::in_words(uploaded.as_ref());
    if job.phase("upload", upload::begins(job), outcome, work).await?.is_none() {
        // Another run has ended it, and has gone on.
        let found = Box::pin(found::look(job)).await?;
        if found != Found::Nothing {
            upload::tidy(job, undo).await?;
        }
        return Box::pin(snapshot(job, found, undo, journal)).await;
    }
    let work = Box::pin(import::import(job, undo));
    let snapshot = job.phase("import", import::begins(job), String::clone, work).await?;
    upload::delete(job, undo).await;
    import::tag_snapshot(job, &snapshot).await?;
    job.keep_map(&snapshot);
    Ok(snapshot)
}

/// The inner failure is AWS's refusal to begin: nothing was made.
async fn block_by_block(
    job: &Job<'_>,
    undo: &mut Undo,
    journal: &mut Option<Journal>,
) -> Result<Result<String, Failure>, Error> {
    let work = Box::pin(ebs::upload(job, undo, journal));
    let outcome = |written: &Result<ebs::Written, Failure>| match written {
        Ok(written) => ebs::in_words(written),
        Err(_) => "not begun".to_owned(),
    };
    match job.phase("upload", ebs::begins(job), outcome, work).await? {
        Ok(written) => {
            job.keep_map(&written.snapshot);
            Ok(Ok(written.snapshot))
        }
        Err(refused) => Ok(Err(refused)),
    }
}

impl<'a> Job<'a> {
    fn new(
        request: &'a Request,
        clients: Clients,
        source: Source,
        events: &'a Events,
        stop: Stop,
    ) -> Result<Self, Error> {
        let sends = matches!(source, Source::Disk(_));
        let target = rules::target(request, clients.region(), format!("{:016x}", retry::random()), sends)?;
        Ok(Self { request, target, clients: Arc::new(clients), events, stop: Arc::new(stop), source })
    }

    fn published(&self, image: Image) -> Published {
        let request = self.request;
        Published {
            region: self.target.region.clone(),
            image_id: image.id,
            snapshot_id: image.snapshot,
            image_name: if image.name.is_empty() { request.image_name.clone() } else { image.name },
            name: request.name.clone(),
            digest: request.digest.clone(),
            architecture: request.arch,
            boot_mode: rules::boot_mode(request),
            size_gib: request.size,
            plan: None,
        }
    }

    /// The region, for work that is the same outside of a publish.
    fn place(&self) -> Place {
        Place {
            clients: Arc::clone(&self.clients),
            events: self.events.clone(),
            stop: Arc::clone(&self.stop),
            poll: self.request.poll,
        }
    }

    /// Keeps what is in the snapshot that this run has made: the next disk of this recipe is compared with it.
    fn keep_map(&self, snapshot: &str) {
        if let Some(store) = &self.request.store {
            store.keep_map(snapshot, &self.request.block_map);
        }
    }

    /// An earlier run may have sealed the snapshot, and been killed: nothing is left to go on with.
    fn forget_journal(&self, snapshot: &str) {
        if let journal::Found::Left(left, begun) = Journal::find(&self.request.disk, &self.target.region)
            && begun.snapshot == snapshot
        {
            left.remove();
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
