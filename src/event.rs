//! What happened. Work emits events and never prints; `ui` decides how they look.

use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;

use crate::units::show_duration;

/// One thing that happened, in the order it happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A named part of the work begins, e.g. `boot`.
    PhaseStarted {
        /// Stable name of the phase.
        phase: &'static str,
        /// What it waits for or works on, in words.
        detail: String,
    },
    /// That part ended well.
    PhaseDone {
        /// Stable name of the phase.
        phase: &'static str,
        /// What came of it, in words; may be empty.
        detail: String,
        /// How long it took.
        #[serde(rename = "seconds", serialize_with = "seconds")]
        took: Duration,
    },
    /// Step `index` (from 1) of `total` begins.
    StepStarted {
        /// Position in the recipe, from 1.
        index: usize,
        /// How many there are.
        total: usize,
        /// The step's name.
        name: String,
    },
    /// A line that a step printed.
    Output {
        /// The line without its end; not UTF-8 is replaced.
        line: String,
    },
    /// A step need not run: its result was kept.
    StepCached {
        /// Position in the recipe, from 1.
        index: usize,
        /// The step's name.
        name: String,
    },
    /// A step ended with status 0.
    StepDone {
        /// Position in the recipe, from 1.
        index: usize,
        /// The step's name.
        name: String,
        /// How long it took.
        #[serde(rename = "seconds", serialize_with = "seconds")]
        took: Duration,
    },
    /// How far a long phase has come.
    Progress {
        /// Stable name of the phase.
        phase: &'static str,
        /// Units done.
        done: u64,
        /// Units in all; 0 when unknown.
        total: u64,
    },
    /// Something that the user should know, and that doesn't stop the work.
    Warning {
        /// The fact, in words.
        message: String,
        /// What to do about it.
        help: Option<String>,
    },
    /// A fact worth a line.
    Note {
        /// The fact, in words.
        message: String,
    },
    /// A fact for those who asked for detail.
    Detail {
        /// The fact, in words.
        message: String,
    },
}

impl Event {
    /// The event as a line of a log; `None` if it isn't kept there.
    #[must_use]
    pub fn log_line(&self) -> Option<String> {
        match self {
            Self::PhaseStarted { phase, detail } => Some(format!("{phase}: {detail}")),
            Self::PhaseDone { phase, detail, took } => {
                Some(format!("{phase}: done in {} {detail}", show_duration(*took)))
            }
            Self::StepStarted { index, total, name } => Some(format!("step {index}/{total}: {name}")),
            Self::StepDone { index, name, took } => {
                Some(format!("step {index}: done in {}: {name}", show_duration(*took)))
            }
            Self::StepCached { index, name } => Some(format!("step {index}: kept from before: {name}")),
            Self::Warning { message, help: Some(help) } => Some(format!("warning: {message}; {help}")),
            Self::Warning { message, help: None } => Some(format!("warning: {message}")),
            Self::Note { message } | Self::Detail { message } => Some(message.clone()),
            Self::Output { .. } | Self::Progress { .. } => None,
        }
    }
}

fn seconds<S: serde::Serializer>(took: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((took.as_secs_f64() * 1000.0).round() / 1000.0)
}

/// Where events go. Cheap to clone, callable from any thread.
#[derive(Clone)]
pub struct Events(Arc<dyn Fn(Event) + Send + Sync>);

impl Events {
    /// Events go to `sink`.
    pub fn new(sink: impl Fn(Event) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// Events go nowhere.
    #[must_use]
    pub fn none() -> Self {
        Self::new(|_| {})
    }

    /// Emits one event.
    pub fn emit(&self, event: Event) {
        (self.0)(event);
    }

    /// A warning without a remedy.
    pub fn warn(&self, message: impl Into<String>) {
        self.emit(Event::Warning { message: message.into(), help: None });
    }

    /// A fact worth a line.
    pub fn note(&self, message: impl Into<String>) {
        self.emit(Event::Note { message: message.into() });
    }

    /// A fact for those who asked for detail.
    pub fn detail(&self, message: impl Into<String>) {
        self.emit(Event::Detail { message: message.into() });
    }

    /// Runs `work` as a phase: says that it began, and on success that it ended, with what `outcome` says of it.
    ///
    /// # Errors
    /// What `work` fails with.
    pub fn phase<T, E>(
        &self,
        phase: &'static str,
        detail: impl Into<String>,
        outcome: impl FnOnce(&T) -> String,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let started = std::time::Instant::now();
        self.emit(Event::PhaseStarted { phase, detail: detail.into() });
        let value = work()?;
        self.emit(Event::PhaseDone { phase, detail: outcome(&value), took: started.elapsed() });
        Ok(value)
    }
}
