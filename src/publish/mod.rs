//! A disk becomes an image: S3, then `ImportSnapshot`, or EBS direct; then `RegisterImage`. The only async code of kiln.
//!
//! [`publish`] reads top to bottom: what is asked for is checked without a request (`rules`), then by requests that
//! only read (`preflight`), which also tell what an earlier publish has left (`found`), and only then is anything made.
//! What is made is written into `undo::Undo` *before* the request is sent, so that a failure, a signal or a lost answer
//! at any point finds it again and takes it back.

mod action;
mod body;
mod check;
mod client;
mod codes;
mod copy;
mod cut;
mod ebs;
mod failure;
mod finish;
mod found;
mod image;
mod import;
mod journal;
pub mod life;
mod lock;
mod multipart;
mod object;
mod only;
mod parameter;
mod parent;
mod parts;
mod place;
mod plan;
mod policy;
mod preflight;
mod quotas;
mod raw;
mod regions;
mod replace;
mod request;
mod retry;
mod rules;
mod scratch;
mod send;
mod share;
mod stop;
mod undo;
mod upload;
mod vmdk;

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::cancel::Cancel;
use crate::error::{Error, Exit};
use crate::event::{Event, Events};
pub use crate::recipe::BootMode;
use crate::recipe::Via;
pub use check::{Checked, Verdict};
use client::Clients;
use failure::Failure;
use found::Found;
use journal::Journal;
pub(crate) use journal::is_journal;
pub use only::{UploadedObject, upload_only};
pub use parent::{Parents, Wanted};
use place::Place;
pub use plan::{Action, Billed, Bound, Cost, Count, Object, Plan, Requests, Step, Steps, Transfer, Way};
use preflight::Before;
pub use regions::{Ended, How};
use regions::{Home, Original, Regions, Source};
use replace::Old;
pub use request::{Architecture, ObjectEncryption, ObjectOptions, Request, Undated};
use stop::Stop;
use undo::{Made, Undo};

const SIGTERM: i32 = 15;
/// The role that AWS assumes to read the disk from the bucket, unless another is named.
pub const DEFAULT_ROLE: &str = "vmimport";

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
