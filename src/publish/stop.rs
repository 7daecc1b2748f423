//! Waiting that ends early: on a signal, or when the time for the whole work is up.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::cancel::{Cancel, Subscription};
use crate::error::{Error, Exit};
use crate::units::show_duration;

/// How long a request that makes something is still waited for after a stop: its answer says what to take back.
const GRACE: Duration = Duration::from_secs(5);

/// Ends every wait of one publish, or of other work.
pub(super) struct Stop {
    cancel: Cancel,
    asked: watch::Receiver<bool>,
    deadline: Instant,
    limit: Duration,
    work: Work,
    _subscription: Subscription,
}

/// What a message about the time being up says of the work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    /// E.g. `publishing`.
    pub(super) name: &'static str,
    /// What to do about it.
    pub(super) help: &'static str,
}

const PUBLISHING: Work =
    Work { name: "publishing", help: "publish again with a longer --timeout; the disk is unchanged" };

impl Stop {
    /// Stops publishing when `cancel` is requested, or after `limit`.
    pub(super) fn new(cancel: &Cancel, limit: Duration) -> Self {
        Self::of(PUBLISHING, cancel, limit)
    }

    /// The same for other work.
    pub(super) fn of(work: Work, cancel: &Cancel, limit: Duration) -> Self {
        let (ask, asked) = watch::channel(false);
        let subscription = cancel.subscribe(move || {
            let _ = ask.send(true);
        });
        Self {
            cancel: cancel.clone(),
            asked,
            deadline: Instant::now() + limit,
            limit,
            work,
            _subscription: subscription,
        }
    }

    /// Whether to go on; `what` is what comes next.
    pub(super) fn check(&self, what: &str) -> Result<(), Error> {
        self.cancel.check()?;
        if Instant::now() < self.deadline { Ok(()) } else { Err(self.timed_out(what)) }
    }

    /// Waits for `work`; `what` is what the message about a timeout names.
    pub(super) async fn or<T>(&self, what: &str, work: impl Future<Output = T>) -> Result<T, Error> {
        tokio::select! {
            biased;
            error = self.stopped(what) => Err(error),
            value = work => Ok(value),
        }
    }

    /// Waits for a request that makes something. After a stop its answer is still awaited for a moment, and returned
    /// as if nothing had happened: the caller notes what was made, and the next wait ends at once.
    pub(super) async fn creating<T>(&self, what: &str, call: impl Future<Output = T>) -> Result<T, Error> {
        let mut call = pin!(call);
        let error = tokio::select! {
            biased;
            value = &mut call => return Ok(value),
            error = self.stopped(what) => error,
        };
        timeout(GRACE, call).await.map_err(|_| error)
    }

    /// Does nothing for `time`.
    pub(super) async fn pause(&self, what: &str, time: Duration) -> Result<(), Error> {
        self.or(what, tokio::time::sleep(time)).await
    }

    async fn stopped(&self, what: &str) -> Error {
        let mut asked = self.asked.clone();
        tokio::select! {
            biased;
            Ok(_) = asked.wait_for(|asked| *asked) => match self.cancel.check() {
                Err(cancelled) => cancelled.into(),
                Ok(()) => Error::new(Exit::Bug, "stopped without a reason"),
            },
            () = sleep_until(self.deadline) => self.timed_out(what),
        }
    }

    fn timed_out(&self, what: &str) -> Error {
        let (Work { name, help }, limit) = (self.work, show_duration(self.limit));
        Error::new(Exit::TimedOut, format!("{name} did not end within {limit}; it waited for {what}")).help(help)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    #[test]
    fn a_signal_ends_a_wait_and_says_which() {
        run(async {
            let cancel = Cancel::default();
            let stop = Stop::new(&cancel, Duration::from_mins(1));
            assert_eq!(stop.or("x", async { 1 }).await.unwrap(), 1);
            cancel.request(2);
            let error = stop.pause("x", Duration::from_mins(1)).await.unwrap_err();
            assert_eq!((error.exit, error.to_string().as_str()), (Exit::Signal(2), "stopped by Ctrl-C"));
        });
    }

    #[test]
    fn the_time_for_everything_ends_a_wait_and_names_it() {
        run(async {
            let stop = Stop::new(&Cancel::default(), Duration::from_millis(5));
            let error = stop.pause("import task import-snap-1", Duration::from_mins(1)).await.unwrap_err();
            assert_eq!(error.exit, Exit::TimedOut);
            assert!(error.to_string().ends_with("it waited for import task import-snap-1"));
        });
    }

    #[test]
    fn the_answer_of_a_request_that_makes_something_survives_a_signal() {
        run(async {
            let cancel = Cancel::default();
            let stop = Stop::new(&cancel, Duration::from_mins(1));
            let call = async {
                cancel.request(15);
                tokio::time::sleep(Duration::from_millis(20)).await;
                "ami-1"
            };
            assert_eq!(stop.creating("x", call).await.unwrap(), "ami-1");
            assert_eq!(stop.or("x", async {}).await.unwrap_err().exit, Exit::Signal(15));
            assert_eq!(stop.check("x").unwrap_err().exit, Exit::Signal(15));
        });
    }
}
