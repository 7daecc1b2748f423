//! Stopping early: a flag that a signal sets, and whoever waits is woken.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The work was stopped by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stopped by {}", signal_name(*.0))]
pub struct Cancelled(pub i32);

fn signal_name(number: i32) -> &'static str {
    match number {
        1 => "SIGHUP",
        2 => "Ctrl-C",
        15 => "SIGTERM",
        _ => "a signal",
    }
}

type Waker = Box<dyn Fn() + Send>;

#[derive(Default)]
struct Inner {
    signal: AtomicI32,
    wakers: Mutex<Vec<(u64, Waker)>>,
}

/// Shared by everything that can take long; cheap to clone.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Inner>);

/// Keeps a waker registered; dropping it takes the waker back.
#[must_use]
pub struct Subscription {
    inner: Arc<Inner>,
    id: u64,
}

impl Cancel {
    /// Asks all work to stop, because signal `number` came.
    pub fn request(&self, number: i32) {
        self.0.signal.store(number, Ordering::SeqCst);
        for (_, wake) in self.wakers().iter() {
            wake();
        }
    }

    /// Whether it was asked to stop.
    ///
    /// # Errors
    /// [`Cancelled`] when it was.
    pub fn check(&self) -> Result<(), Cancelled> {
        match self.0.signal.load(Ordering::SeqCst) {
            0 => Ok(()),
            number => Err(Cancelled(number)),
        }
    }

    /// Calls `wake` (from the signal's thread) when the stop is asked for; at once if it already was.
    pub fn subscribe(&self, wake: impl Fn() + Send + 'static) -> Subscription {
        let mut wakers = self.wakers();
        let id = wakers.last().map_or(0, |(id, _)| id + 1);
        if self.check().is_err() {
            wake();
        }
        wakers.push((id, Box::new(wake)));
        Subscription { inner: Arc::clone(&self.0), id }
    }

    /// One that is asked to stop whenever this one is, and can be by itself too, for as long as the subscription is kept.
    pub fn within(&self) -> (Self, Subscription) {
        let (outer, inner) = (self.clone(), Self::default());
        let asked = inner.clone();
        let subscription = self.subscribe(move || {
            if let Err(stopped) = outer.check() {
                asked.request(stopped.0);
            }
        });
        (inner, subscription)
    }

    fn wakers(&self) -> std::sync::MutexGuard<'_, Vec<(u64, Waker)>> {
        self.0.wakers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner).retain(|(id, _)| *id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_request_wakes_subscribers_and_stays() {
        let cancel = Cancel::default();
        let (tx, rx) = mpsc::channel();
        let late = tx.clone();
        let subscription = cancel.subscribe(move || tx.send("early").unwrap());
        assert!(cancel.check().is_ok());
        cancel.request(2);
        assert_eq!(rx.try_recv(), Ok("early"));
        assert_eq!(cancel.check(), Err(Cancelled(2)));
        drop(subscription);
        let _second = cancel.subscribe(move || late.send("late").unwrap());
        assert_eq!(rx.try_recv(), Ok("late"));
    }
}
