//! A region, with what every piece of work in it needs; and the same work in many of them, side by side.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::client::Clients;
use super::failure::Failure;
use super::retry::{self, Unmade};
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
        retry::ask(&self.stop, &self.clients, &self.events, what, |_| send()).await
    }

    /// Repeats a call about something that was only just made, as long as AWS may not know it everywhere yet. None if
    /// it stays unknown.
    pub(super) async fn known<T, F>(&self, what: &str, call: impl FnMut() -> F) -> Result<Option<T>, Error>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        match retry::until_known(&self.stop, self.poll, what, call).await? {
            Ok(value) => Ok(Some(value)),
            Err(failure) if failure.is_not_found() => Ok(None),
            Err(failure) => Err(self.error(failure)),
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
