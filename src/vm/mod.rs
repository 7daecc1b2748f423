//! Virtual machines: what to start ([`spec`]), a running one ([`process`]), the agent in it ([`guest`]), and what the
//! host offers for it ([`host`], [`accelerator`]). Knows nothing of disks' contents, recipes or builds.

pub mod accelerator;
pub mod checkpoint;
mod console;
pub mod filter;
pub mod guest;
pub mod host;
pub(crate) mod keyboard;
pub mod memory;
mod output;
pub mod process;
pub mod seed;
pub mod spec;

use std::io;
use std::time::Duration;

pub use output::Sink;
use spec::{Accelerator, Processor};

use crate::cancel::Cancelled;
use crate::error::Exit;
use crate::exec;
use crate::units::show_duration;

/// Why a guest didn't do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A host program failed.
    #[error(transparent)]
    Exec(#[from] exec::Error),
    /// The user stopped it.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// The host's files or sockets failed.
    #[error("{doing}: {error}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// QEMU ended, and nobody told it to.
    #[error("QEMU {how} while the guest was running{}", after(.stderr, .last_words.as_deref()))]
    Died {
        /// `was killed by signal 9`.
        how: String,
        /// The end of its error output.
        stderr: String,
        /// What it said on the monitor before.
        last_words: Option<String>,
    },
    /// QEMU can't give the guest its processor.
    #[error("QEMU can't give the guest an {} processor: {lacks}", .processor.as_str())]
    Processor {
        /// What the guest should see.
        processor: Processor,
        /// What should run it.
        accelerator: Accelerator,
        /// QEMU's words for the first feature that is missing.
        lacks: String,
    },
    /// QEMU refused a command.
    #[error("QEMU refused `{command}`: {answer}")]
    Monitor {
        /// The QMP command.
        command: String,
        /// QEMU's words.
        answer: String,
    },
    /// The console shows that the guest can't go on.
    #[error("the guest can't go on: {line}")]
    GuestLost {
        /// The console's line.
        line: String,
    },
    /// The guest rebooted or powered itself off.
    #[error("the guest {} by itself", if *.reset { "rebooted" } else { "powered off" })]
    GuestStopped {
        /// A reset, not a power-off.
        reset: bool,
        /// The console's last lines.
        console: String,
    },
    /// The overlay could not be written: the host's disk is full.
    #[error("the host's disk is full: the guest's writes have nowhere to go")]
    HostDiskFull,
    /// The overlay or the base could not be read or written.
    #[error("the guest's disk failed on the host: {reason}")]
    DiskFault {
        /// QEMU's words.
        reason: String,
    },
    /// It took too long.
    #[error("waited {} for {awaited}", show_duration(*.limit))]
    TimedOut {
        /// What didn't come.
        awaited: String,
        /// How long it was given.
        limit: Duration,
        /// The console's last lines.
        console: String,
    },
    /// The agent could not try what it was asked.
    #[error("{0}")]
    Refused(String),
    /// The agent's answer makes no sense.
    #[error("the guest's agent answered `{0}`, which kiln doesn't understand")]
    Protocol(String),
}

fn after(stderr: &str, last_words: Option<&str>) -> String {
    match (stderr.lines().last(), last_words) {
        (Some(line), _) => format!(": {line}"),
        (None, Some(words)) => format!(": {words}"),
        (None, None) => String::new(),
    }
}

impl Error {
    pub(crate) fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { doing, error }
    }

    /// The exit code that this ends kiln with.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Cancelled(cancelled) | Self::Exec(exec::Error::Cancelled(cancelled)) => Exit::Signal(cancelled.0),
            Self::TimedOut { .. } | Self::Exec(exec::Error::TimedOut { .. }) => Exit::TimedOut,
            Self::Exec(_)
            | Self::Io { .. }
            | Self::Died { .. }
            | Self::Processor { .. }
            | Self::Monitor { .. }
            | Self::HostDiskFull
            | Self::DiskFault { .. } => Exit::Host,
            Self::GuestLost { .. } | Self::GuestStopped { .. } => Exit::Input,
            Self::Refused(_) => Exit::Step,
            Self::Protocol(_) => Exit::Bug,
        }
    }

    /// The console's end, where it tells more than the message does.
    #[must_use]
    pub fn console(&self) -> Option<&str> {
        match self {
            Self::TimedOut { console, .. } | Self::GuestStopped { console, .. } if !console.is_empty() => Some(console),
            _ => None,
        }
    }
}
