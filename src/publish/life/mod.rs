//! Images after they were published: listed, shared, copied, retired; and what interrupted publishes have left, swept.
//!
//! Only what has kiln's tags is seen here, and so nothing else can be touched. Every command looks first and says what it
//! would do; what it does then is what it has said.

mod list;
mod retire;
mod sweep;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::Runtime;

use super::client::{Clients, with_runtime};
use super::copy::{self, Order};
use super::image;
use super::place::{Place, side_by_side};
use super::share::{self, Sharing};
use super::stop::{Stop, Work};
use crate::cancel::Cancel;
use crate::error::{Error, Exit};
use crate::event::{Event, Events};
use crate::recipe::Grantee;

pub use list::{Image, Origin, Which};
pub use retire::{Kept, Retired, Retirement, Retiring, Rule};
pub use sweep::{Leftover, Thing};

/// Which regions are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Regions {
    /// The one that the SDK finds in its usual places.
    Usual,
    /// These.
    These(Vec<String>),
    /// All that are enabled for the account.
    All,
}

/// What came of work in several regions.
#[derive(Debug)]
pub struct InRegions<T> {
    /// The results, in the regions' order.
    pub done: Vec<(String, T)>,
    /// What went wrong, in the regions' order.
    pub failed: Vec<(String, Error)>,
}

impl<T> InRegions<T> {
    fn of(all: Vec<(String, Result<T, Error>)>) -> Self {
        let (mut done, mut failed) = (Vec::new(), Vec::new());
        for (region, result) in all {
            match result {
                Ok(value) => done.push((region, value)),
                Err(error) => failed.push((region, error)),
            }
        }
        Self { done, failed }
    }
}

/// The failures of some regions as one; the results of the others are told before.
///
/// # Errors
/// When there are failures.
pub fn outcome(mut failed: Vec<(String, Error)>) -> Result<(), Error> {
    if let Some(at) = failed.iter().position(|(_, error)| matches!(error.exit, Exit::Signal(_))) {
        let notes = failed.iter_mut().flat_map(|(_, error)| std::mem::take(&mut error.notes)).collect();
        return Err(Error { notes, ..failed.swap_remove(at).1 });
    }
    match failed.len() {
        0 => Ok(()),
        1 => {
            let (region, error) = failed.swap_remove(0);
            let message =
                if error.message.contains(&region) { error.message } else { format!("{region}: {}", error.message) };
            Err(Error { message, ..error })
        }
        count => {
            let mut all = Error::new(failed[0].1.exit, format!("{count} regions failed"));
            all.help = failed.iter().find_map(|(_, error)| error.help.clone());
            for (region, error) in failed {
                all.notes.push(format!("{region}: {}", error.message));
                all.notes.extend(error.notes);
            }
            Err(all)
        }
    }
}

/// How the account is reached, and how patiently.
#[derive(Clone, Copy)]
pub struct Manner<'a> {
    /// Where events go.
    pub events: &'a Events,
    /// What stops the work.
    pub cancel: &'a Cancel,
    /// The pause between two looks at a copy.
    pub poll: Duration,
    /// How long each piece of work may take.
    pub limit: Duration,
}

/// The account, in some regions.
pub struct Account<'a> {
    runtime: &'a Runtime,
    clients: Vec<Arc<Clients>>,
    manner: Manner<'a>,
}

/// How many regions' names are looked up at once: more than there are.
const REGIONS_AT_ONCE: usize = 64;
const LIFE: Work = Work { name: "the work", help: "check the network and AWS's health, then try again" };
const COPYING: Work = Work { name: "copying", help: "run it again with a longer --timeout: what is copied is found" };

/// Does `work` with the account, in these regions; finds them and the credentials where the SDK does.
///
/// # Errors
/// No region, or the account's regions can't be asked for; and what `work` fails with.
pub fn with_account<T>(
    regions: &Regions,
    manner: Manner<'_>,
    work: impl FnOnce(&Account<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    manner.cancel.check()?;
    with_runtime(REGIONS_AT_ONCE, |runtime| {
        let mut account = Account { runtime, clients: Vec::new(), manner };
        account.clients = account.run(account.connect(regions))?;
        work(&account)
    })
}

impl Account<'_> {
    async fn connect(&self, regions: &Regions) -> Result<Vec<Arc<Clients>>, Error> {
        let first = match regions {
            Regions::These(these) => these.first().map(String::as_str),
            Regions::Usual | Regions::All => None,
        };
        let stop = Arc::new(Stop::of(LIFE, self.manner.cancel, self.manner.limit));
        let clients = Arc::new(stop.or("the AWS configuration", Box::pin(Clients::load(first))).await??);
        let names = match regions {
            Regions::Usual => vec![clients.region().to_owned()],
            Regions::These(these) => these.clone(),
            Regions::All => {
                let place = self.place(&clients, &stop);
                place.call("the account's regions", Box::pin(list::regions(&place))).await?
            }
        };
        let mut all: Vec<Arc<Clients>> = Vec::new();
        for name in names {
            if !all.iter().any(|known| known.region() == name) {
                all.push(if name == clients.region() {
                    Arc::clone(&clients)
                } else {
                    Arc::new(clients.elsewhere(&name))
                });
            }
        }
        Ok(all)
    }

    /// The regions, in order, each once.
    #[must_use]
    pub fn regions(&self) -> Vec<&str> {
        self.clients.iter().map(|clients| clients.region()).collect()
    }

    /// The images that kiln has made, of this name if there is one.
    #[must_use]
    pub fn images(&self, which: Option<&Which>) -> InRegions<Vec<Image>> {
        let which = which.cloned();
        InRegions::of(self.everywhere(LIFE, |place| {
            let which = which.clone();
            async move {
                let mut images = list::images(&place, which.as_ref()).await?;
                Box::pin(list::add_sharing(&place, &mut images)).await?;
                Ok(images)
            }
        }))
    }

    /// Shares in each region the newest image of this name, or stops sharing it. The images that were shared; none where
    /// there is no such image.
    ///
    /// # Errors
    /// What can't be shared in these regions at all.
    pub fn share(
        &self,
        which: &Which,
        with: &[Grantee],
        remove: bool,
        snapshots: bool,
    ) -> Result<InRegions<Option<Image>>, Error> {
        let sharing = Arc::new(Sharing { with: with.to_vec(), remove, snapshots });
        sharing.check(self.regions())?;
        Ok(InRegions::of(self.everywhere(LIFE, |place| {
            let (sharing, which) = (Arc::clone(&sharing), which.clone());
            async move {
                let Some(mut image) = list::newest(list::images(&place, Some(&which)).await?) else { return Ok(None) };
                Box::pin(share::permitted(&place, &sharing)).await?;
                let found =
                    image::describe(&place.clients, &image.image_id).await.map_err(|failure| place.error(failure))?;
                share::possible(&place, &found, &sharing)?;
                Box::pin(share::apply(&place, &image.image_id, &image.snapshots, &sharing)).await?;
                Box::pin(list::add_sharing(&place, std::slice::from_mut(&mut image))).await?;
                Ok(Some(image))
            }
        })))
    }

    /// The newest available image of this name, in the first region.
    ///
    /// # Errors
    /// There is none.
    pub fn newest(&self, which: &Which) -> Result<Image, Error> {
        let Some(place) = self.places(LIFE).into_iter().next() else { return Err(no_image(which, "no region")) };
        let images = self.run(list::images(&place, Some(which)))?;
        list::newest(images).ok_or_else(|| no_image(which, place.region()))
    }

    /// Copies an image of the first region into others, side by side; `key` tells what a copy in a region is encrypted with.
    #[must_use]
    pub fn copy(
        &self,
        image: &Image,
        name: Option<&str>,
        to: &[String],
        key: impl Fn(&str) -> Option<String>,
    ) -> InRegions<Copied> {
        let nothing = || InRegions::of(Vec::new());
        let Some(from) = self.places(COPYING).into_iter().next() else { return nothing() };
        let source = match self.run(Box::pin(copy::source(&from, &image.image_id))) {
            Ok(source) => source,
            Err(error) => return InRegions { failed: vec![(from.region().to_owned(), error)], ..nothing() },
        };
        let phase = Event::PhaseStarted { phase: "copy", detail: format!("{} to {}", image.image_id, to.join(", ")) };
        from.events.emit(phase);
        let percents: Arc<Vec<AtomicU64>> = Arc::new(to.iter().map(|_| AtomicU64::new(0)).collect());
        let places = to.iter().map(|region| from.elsewhere(region));
        let started = std::time::Instant::now();
        let all = self.run(side_by_side(places, |place| {
            let name = name.map_or_else(|| source.name.clone(), str::to_owned);
            let order = Order { source: source.clone(), name, kms_key: key(place.region()), replaces: Vec::new() };
            let percents = Arc::clone(&percents);
            let index = to.iter().position(|region| region == place.region()).unwrap_or_default();
            let tell = move |events: &Events, percent| {
                percents[index].store(percent, Ordering::Relaxed);
                let done = percents.iter().map(|percent| percent.load(Ordering::Relaxed)).sum();
                events.emit(Event::Progress { phase: "copy", done, total: percents.len() as u64 * 100 });
            };
            async move {
                let copied = Box::pin(copy::copy(&place, &order, |percent| tell(&place.events, percent))).await?;
                tell(&place.events, 100);
                Ok(Copied {
                    image_id: copied.id,
                    snapshots: copied.snapshots,
                    image_name: order.name,
                    found: copied.found,
                })
            }
        }));
        let ended = InRegions::of(all);
        if ended.failed.is_empty() {
            from.events.emit(Event::PhaseDone { phase: "copy", detail: String::new(), took: started.elapsed() });
        }
        ended
    }

    /// What would be retired.
    #[must_use]
    pub fn retirement(&self, which: &Which, rule: Rule) -> InRegions<Retirement> {
        InRegions::of(self.everywhere(LIFE, |place| {
            let which = which.clone();
            async move { Box::pin(retire::plan(&place, &which, rule)).await }
        }))
    }

    /// Retires what was planned; what was done in each region, and what went wrong.
    #[must_use]
    pub fn retire(&self, plans: Vec<(String, Retirement)>) -> Vec<(String, Vec<Retired>, Option<Error>)> {
        let places = self.places(LIFE);
        let each = plans.into_iter().filter_map(|(region, plan)| {
            let place = places.iter().find(|place| place.region() == region)?;
            let (done, error) = self.run(retire::carry_out(place, plan));
            Some((region, done, error))
        });
        each.collect()
    }

    /// What interrupted publishes have left in these regions that is older than `older`, and in this bucket, wherever that is.
    #[must_use]
    pub fn leftovers(&self, bucket: Option<&str>, older: Duration) -> InRegions<Vec<Leftover>> {
        let mut all = self.everywhere(LIFE, |place| async move { Box::pin(sweep::in_region(&place, older)).await });
        if let (Some(bucket), Some(place)) = (bucket, self.places(LIFE).into_iter().next()) {
            let found = self.run(Box::pin(sweep::in_bucket(&place, bucket, older)));
            all.push((bucket.to_owned(), found));
        }
        InRegions::of(all)
    }

    /// Deletes them; which are gone, and why the others are not.
    #[must_use]
    pub fn sweep(&self, leftovers: Vec<Leftover>) -> (Vec<Leftover>, Vec<(String, Error)>) {
        let (mut gone, mut failed) = (Vec::new(), Vec::new());
        let Some(place) = self.places(LIFE).into_iter().next() else { return (gone, failed) };
        for leftover in leftovers {
            let place =
                if place.region() == leftover.region { place.clone() } else { place.elsewhere(&leftover.region) };
            match self.run(Box::pin(sweep::delete(&place, &leftover))) {
                Ok(()) => gone.push(leftover),
                Err(error) => failed.push((leftover.region, error)),
            }
        }
        (gone, failed)
    }

    fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    fn place(&self, clients: &Arc<Clients>, stop: &Arc<Stop>) -> Place {
        let Manner { events, poll, .. } = self.manner;
        Place { clients: Arc::clone(clients), events: events.clone(), stop: Arc::clone(stop), poll }
    }

    fn places(&self, work: Work) -> Vec<Place> {
        let stop = Arc::new(Stop::of(work, self.manner.cancel, self.manner.limit));
        self.clients.iter().map(|clients| self.place(clients, &stop)).collect()
    }

    fn everywhere<T, F>(&self, work: Work, each: impl Fn(Place) -> F) -> Vec<(String, Result<T, Error>)>
    where
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        self.run(side_by_side(self.places(work), each))
    }
}

/// A copy that can be launched.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Copied {
    /// Its id.
    pub image_id: String,
    /// Its name.
    pub image_name: String,
    /// The ids of its snapshots.
    pub snapshots: Vec<String>,
    /// It was there before.
    pub found: bool,
}

/// There is no image of this name.
#[must_use]
pub fn no_image(which: &Which, place: &str) -> Error {
    Error::new(Exit::Input, format!("kiln has made no image `{which}` that is available in {place}"))
        .help("`kiln images --all-regions` lists what kiln has made in this account")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(region: &str, exit: Exit, message: &str) -> (String, Error) {
        (region.to_owned(), Error::new(exit, message).with_note(format!("note of {region}")).help("do this"))
    }

    #[test]
    fn one_regions_failure_names_the_region_and_several_become_notes() {
        outcome(Vec::new()).unwrap();
        let one = outcome(vec![failed("eu-west-1", Exit::Publish, "not permitted")]).unwrap_err();
        assert_eq!((one.message.as_str(), one.help.as_deref()), ("eu-west-1: not permitted", Some("do this")));
        let named = outcome(vec![failed("eu-west-1", Exit::Publish, "no image in eu-west-1")]).unwrap_err();
        assert_eq!(named.message, "no image in eu-west-1");
        let two = outcome(vec![failed("a", Exit::Publish, "x"), failed("b", Exit::TimedOut, "y")]).unwrap_err();
        assert_eq!((two.exit, two.message.as_str()), (Exit::Publish, "2 regions failed"));
        assert_eq!(two.notes, ["a: x", "note of a", "b: y", "note of b"]);
    }

    #[test]
    fn a_signal_is_one_whatever_else_went_wrong_and_loses_no_note() {
        let all = vec![failed("a", Exit::Publish, "x"), failed("b", Exit::Signal(2), "stopped by Ctrl-C")];
        let error = outcome(all).unwrap_err();
        assert_eq!((error.exit, error.message.as_str()), (Exit::Signal(2), "stopped by Ctrl-C"));
        assert_eq!(error.notes, ["note of a", "note of b"]);
    }
}
