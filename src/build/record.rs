//! `build.log`: what happened, on its way to the user.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::manifest::Phase;
use super::output::{self, Pending};
use crate::error::Error;
use crate::event::{Event, Events};

/// Writes every event to `build.log` on its way to the user, and remembers how long phases took.
pub(super) struct Recorder {
    pub(super) events: Events,
    phases: Arc<Mutex<Vec<Phase>>>,
}

impl Recorder {
    pub(super) fn begin(events: &Events, pending: &Pending) -> Result<Self, Error> {
        let path = pending.path().join(output::BUILD_LOG);
        let file = fs_err::File::create(&path).map_err(|error| Error::io("cannot write the build's log", &error))?;
        let (file, started, outer) = (Mutex::new(file), Instant::now(), events.clone());
        let phases = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&phases);
        let events = Events::new(move |event| {
            if let Some(line) = event.log_line() {
                use std::io::Write;
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = writeln!(file, "{:9.3} {line}", started.elapsed().as_secs_f64());
            }
            if let Event::PhaseDone { phase, took, .. } = &event {
                let seconds = (took.as_secs_f64() * 1000.0).round() / 1000.0;
                let phase = Phase { phase: (*phase).to_owned(), seconds };
                into.lock().unwrap_or_else(PoisonError::into_inner).push(phase);
            }
            outer.emit(event);
        });
        Ok(Self { events, phases })
    }

    pub(super) fn phases(&self) -> Vec<Phase> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
