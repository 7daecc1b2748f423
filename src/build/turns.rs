//! Builds that run side by side take turns: only so many work at once, and those that come first in order go first.
//!
//! Whoever holds the claim of a layer has a turn. A build that waits for a layer before it has a guest leaves its turn to
//! others. One with a guest waits in its turn, for a layer deeper than its own: so nobody waits in a circle.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::cancel::{Cancel, Cancelled};

/// How soon a stop is seen by who waits for a turn.
const LOOK: Duration = Duration::from_millis(100);

/// The turns that there are.
pub(super) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    free: usize,
    /// Who wants a turn, or will: the first goes first.
    waiting: BTreeSet<usize>,
}

/// One build's right to a turn; it may have it now or not. Dropped, it lets the others go on.
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    number: usize,
    taken: bool,
}

impl Turns {
    /// `jobs` turns for builds with the numbers below `builds`.
    pub(super) fn new(jobs: usize, builds: usize) -> Self {
        let state = State { free: jobs.max(1), waiting: (0..builds).collect() };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// For the build with this number.
    pub(super) fn of(&self, number: usize) -> Turn<'_> {
        Turn { turns: self, number, taken: false }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn<'_> {
    /// Waits for the turn.
    pub(super) fn take(&mut self, cancel: &Cancel) -> Result<(), Cancelled> {
        let mut state = self.turns.state();
        state.waiting.insert(self.number);
        while !self.taken {
            cancel.check()?;
            if state.free > 0 && state.waiting.first() == Some(&self.number) {
                state.waiting.remove(&self.number);
                state.free -= 1;
                self.taken = true;
                self.turns.changed.notify_all();
            } else {
                let waited = self.turns.changed.wait_timeout(state, LOOK);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        Ok(())
    }

    /// Leaves the turn to others.
    pub(super) fn leave(&mut self) {
        let mut state = self.turns.state();
        state.waiting.remove(&self.number);
        state.free += usize::from(std::mem::take(&mut self.taken));
        self.turns.changed.notify_all();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_goes_first_and_who_leaves_lets_others_in() {
        let (turns, cancel) = (Turns::new(1, 3), Cancel::default());
        let [mut first, mut second, third] = [0, 1, 2].map(|number| turns.of(number));
        drop(third);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                second.take(&cancel).unwrap();
                turns.state().waiting.contains(&0)
            });
            first.take(&cancel).unwrap();
            first.leave();
            assert!(!waits.join().unwrap(), "the second came only after the first");
        });
        cancel.request(2);
        assert_eq!(first.take(&cancel), Err(Cancelled(2)), "nobody waits once a stop was asked for");
        drop(second);
        assert_eq!(turns.state().free, 1);
    }
}
