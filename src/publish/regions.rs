//! Many regions side by side.
//!
//! Each region is published to by a thread of its own, as by a kiln of its own: with its own connections, its own undo and
//! its own end. What they share is the signal that stops them, and the first image where the others are copies of it.
//! Before anything is made in any of them, all have been looked at.

use std::sync::{Mutex, PoisonError};

use tokio::runtime::Runtime;
use tokio::sync::{Barrier, watch};

use super::SIGTERM;
use super::check::{self, Checked};
use super::client::{Clients, with_runtime};
use super::{Published, Request, Via, preflight, rules};
use crate::cancel::{Cancel, Subscription};
use crate::error::{Error, Exit};
use crate::event::Events;

/// How publishing is shown, and when it ends.
pub struct How<'a> {
    /// A region that fails stops the others.
    pub fail_fast: bool,
    /// Where the events of a region go.
    pub events: &'a (dyn Fn(&str) -> Events + Sync),
    /// Told of every region that fails, when it does.
    pub failed: &'a (dyn Fn(&str, &Error) + Sync),
}

/// What came of one region.
#[derive(Debug)]
pub struct Ended {
    /// Its name.
    pub region: String,
    /// The image, if there is one now.
    pub image: Option<Published>,
    /// What went wrong: there is no image, or it is there and its parameter doesn't name it.
    pub error: Option<Error>,
}

/// An image to copy from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Original {
    pub(super) region: String,
    pub(super) id: String,
    pub(super) name: String,
}

/// The region whose image the others copy.
#[derive(Debug, Clone)]
pub(super) struct Home {
    pub(super) region: String,
    /// Its image, once it is available. The region has failed when this is closed without one.
    pub(super) image: watch::Receiver<Option<Original>>,
}

/// Where a region's image comes from, if it has none yet.
pub(super) enum Source {
    /// The disk is sent there; those that copy are told what came of it.
    Disk(Option<watch::Sender<Option<Original>>>),
    /// The image of another region is copied.
    Copy(Home),
}

/// All regions of one publish.
pub(super) struct Regions<'a> {
    how: &'a How<'a>,
    /// Stops them; requested when the user does, and when one fails and that is to stop the others.
    pub(super) cancel: Cancel,
    /// The region that failed first, and how.
    first: Mutex<Option<(String, Exit)>>,
    /// All have been looked at.
    looked: Barrier,
    /// All have their image, or have failed.
    ended: Barrier,
    _subscription: Subscription,
}

impl<'a> Regions<'a> {
    fn new(how: &'a How<'a>, count: usize, outer: &Cancel) -> Self {
        let (cancel, subscription) = outer.within();
        Self {
            how,
            cancel,
            first: Mutex::new(None),
            looked: Barrier::new(count),
            ended: Barrier::new(count),
            _subscription: subscription,
        }
    }

    /// Waits until all regions were looked at; each comes here once, whatever it has seen.
    pub(super) async fn looked(&self) {
        self.looked.wait().await;
    }

    /// Waits until all regions have their image or have failed; each comes here once, however it has ended.
    pub(super) async fn ended(&self) {
        self.ended.wait().await;
    }

    /// Notes that a region fails, which may stop the others.
    pub(super) fn fails(&self, region: &str, error: &Error) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() && !matches!(error.exit, Exit::Signal(_)) {
            *first = Some((region.to_owned(), error.exit));
            if self.how.fail_fast {
                self.cancel.request(SIGTERM);
            }
        }
    }

    /// A region's failure; if another's has stopped it, that is the cause.
    fn failure(&self, region: &str, error: Error) -> Error {
        self.fails(region, &error);
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        match &*first {
            Some((other, exit)) if other != region && self.how.fail_fast && matches!(error.exit, Exit::Signal(_)) => {
                let stopped = Error::new(*exit, format!("not published to {region}, because {other} failed"));
                error.notes.into_iter().fold(stopped, Error::with_note)
            }
            _ => error,
        }
    }
}

/// Publishes to all regions that `request` names. The outer error is one that came before the first of them.
pub(super) fn publish(request: &Request, how: &How<'_>, cancel: &Cancel) -> Result<Vec<Ended>, Error> {
    with_runtime(request.parallel, |runtime| {
        let regions = runtime.block_on(Box::pin(connect(request, cancel)))?;
        side_by_side(request, how, cancel, regions, runtime)
    })
}

/// Looks in one region after the other whether a publish would be permitted.
pub(super) fn check(request: &Request, events: &Events, cancel: &Cancel) -> Result<Vec<(String, Vec<Checked>)>, Error> {
    with_runtime(request.parallel, |runtime| {
        let mut all = Vec::new();
        let (_, image) = watch::channel(None);
        let regions = runtime.block_on(Box::pin(connect(request, cancel)))?;
        let home = Home { region: regions.first().map_or("", Clients::region).to_owned(), image };
        for (number, clients) in regions.into_iter().enumerate() {
            let region = clients.region().to_owned();
            let copies = number > 0 && request.via != Via::Ebs;
            let source = if copies { Source::Copy(home.clone()) } else { Source::Disk(None) };
            let stop = super::Stop::new(cancel, request.timeout);
            let job = super::Job::new(request, clients, source, events, stop)?;
            all.push((region, runtime.block_on(Box::pin(check::check(&job)))?));
        }
        Ok(all)
    })
}

/// The connections to each region, the one that the disk is sent to first.
pub(super) async fn connect(request: &Request, cancel: &Cancel) -> Result<Vec<Clients>, Error> {
    let stop = super::Stop::new(cancel, request.timeout);
    let first = request.regions.first().map(String::as_str);
    let first = stop.or("the AWS configuration", Box::pin(Clients::load(first))).await??;
    rules::one_partition(first.region(), &request.regions)?;
    rules::shareable(request, first.region())?;
    let mut all: Vec<Clients> = request.regions.iter().skip(1).map(|region| first.elsewhere(region)).collect();
    all.insert(0, first);
    // An import takes a bucket of its own region: that one is where the others copy from.
    if all.len() > 1
        && request.via != Via::Ebs
        && let Some(bucket) = rules::bucket(request)
        && let Ok(Some(region)) = stop.or("the bucket", preflight::bucket_region(&all[0], bucket)).await?
        && let Some(home) = all.iter().position(|clients| clients.region() == region)
    {
        let home = all.remove(home);
        all.insert(0, home);
    }
    Ok(all)
}

fn side_by_side(
    request: &Request,
    how: &How<'_>,
    cancel: &Cancel,
    all: Vec<Clients>,
    runtime: &Runtime,
) -> Result<Vec<Ended>, Error> {
    // What can be wrong with where the disk goes to is said before anything is asked.
    rules::target(request, all.first().map_or("", Clients::region), String::new(), true)?;
    let regions = Regions::new(how, all.len(), cancel);
    let (tell, image) = watch::channel(None);
    let home = Home { region: all.first().map_or("", Clients::region).to_owned(), image };
    let mut tell = (all.len() > 1 && request.via != Via::Ebs).then_some(tell);
    let copies = tell.is_some();
    let mut ended = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, clients) in all.into_iter().enumerate() {
            let region = clients.region().to_owned();
            let source = if number > 0 && copies { Source::Copy(home.clone()) } else { Source::Disk(tell.take()) };
            let (regions, runtime) = (&regions, runtime.handle());
            let work = move || {
                let events = (regions.how.events)(&region);
                let work = super::publish_in(request, clients, source, &events, regions);
                let (image, error) = runtime.block_on(Box::pin(work));
                let error = error.map(|error| regions.failure(&region, error));
                drop(events);
                if let Some(error) = &error {
                    (regions.how.failed)(&region, error);
                }
                Ended { region, image, error }
            };
            // As much stack as the main thread has: the SDK's futures are large.
            match std::thread::Builder::new().stack_size(8 << 20).spawn_scoped(scope, work) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    // Those that run would wait for this one.
                    regions.cancel.request(SIGTERM);
                    return Err(Error::io("cannot start a thread for each region", &error));
                }
            }
        }
        let join = |thread: std::thread::ScopedJoinHandle<'_, Ended>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        Ok(threads.into_iter().map(join).collect::<Vec<_>>())
    })?;
    // In the order that they were asked for.
    let place = |region: &str| request.regions.iter().position(|asked| asked == region).unwrap_or(0);
    ended.sort_by_key(|one| place(&one.region));
    Ok(ended)
}
