//! A region, with what every piece of work in it needs; and the same work in many of them, side by side.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client::Clients;
use super::failure::Failure;
use super::import::settling;
use super::retry::backoff;
use super::stop::Stop;
use crate::error::{Error, Exit};
use crate::event::Events;

/// A region of the account. Cheap to clone.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) clients: Arc<Clients>,
    pub(super) events: Events,
    pub(super) stop: Arc<Stop>,
    /// The pause between two looks at something that takes AWS minutes.
    pub(super) poll: Duration,
}

/// How a request that makes something ended without success.
pub(super) struct Unmade {
    pub(super) failure: Failure,
    /// A try of it may have been carried out.
    pub(super) doubtful: bool,
}

impl Place {
    pub(super) fn region(&self) -> &str {
        self.clients.region()
    }

    /// The same in another region.
    pub(super) fn elsewhere(&self, region: &str) -> Self {
        Self { clients: Arc::new(self.clients.elsewhere(region)), ..self.clone() }
    }

    pub(super) fn error(&self, failure: Failure) -> Error {
        failure.in_region(self.region())
    }

    /// Waits for a request's answer, unless the work is stopped first.
    pub(super) async fn call<T>(&self, what: &str, call: impl Future<Output = Result<T, Failure>>) -> Result<T, Error> {
        self.stop.or(what, call).await?.map_err(|failure| self.error(failure))
    }

    /// Sends a request that makes something and has a client token, so that AWS makes one thing however often it is
    /// asked: again while it fails for reasons that pass. The outer error is a stop before any answer came.
    pub(super) async fn make<T, F>(&self, what: &str, mut send: impl FnMut() -> F) -> Result<Result<T, Unmade>, Error>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let (mut number, mut doubtful) = (1, false);
        loop {
            let failure = match self.stop.creating(what, send()).await? {
                Ok(value) => return Ok(Ok(value)),
                Err(failure) => failure,
            };
            doubtful |= failure.may_be_done();
            if !failure.is_passing() || number >= self.clients.attempts() {
                return Ok(Err(Unmade { failure, doubtful }));
            }
            self.events.detail(format!("asking again for {what}: {}", failure.reason()));
            self.stop.pause(what, backoff(number)).await?;
            number += 1;
        }
    }

    /// Repeats a call about something that was only just made, as long as AWS may not know it everywhere yet. None if
    /// it stays unknown.
    pub(super) async fn known<T, F>(&self, what: &str, mut call: impl FnMut() -> F) -> Result<Option<T>, Error>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let until = Instant::now() + settling(self.poll);
        loop {
            match self.stop.or(what, call()).await? {
                Ok(value) => return Ok(Some(value)),
                Err(failure) if !failure.is_not_found() => return Err(self.error(failure)),
                Err(_) if Instant::now() >= until => return Ok(None),
                Err(_) => self.stop.pause(what, self.poll.min(Duration::from_secs(3))).await?,
            }
        }
    }
}

/// Does `work` in all places at once; what came of it, in their order.
pub(super) async fn side_by_side<T, F>(
    places: impl IntoIterator<Item = Place>,
    work: impl Fn(Place) -> F,
) -> Vec<(String, Result<T, Error>)>
where
    F: Future<Output = Result<T, Error>> + Send + 'static,
    T: Send + 'static,
{
    let mut running = JoinSet::new();
    let mut ended = Vec::new();
    for (index, place) in places.into_iter().enumerate() {
        let bug = || Err(Error::new(Exit::Bug, "the work in this region ended without a result"));
        ended.push((place.region().to_owned(), bug()));
        let work = work(place);
        running.spawn(async move { (index, work.await) });
    }
    while let Some(joined) = running.join_next().await {
        if let Ok((index, result)) = joined {
            ended[index].1 = result;
        }
    }
    ended
}
