//! Events for people: a line for each thing done, and on a terminal one live line for what is being waited for.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::board::prefixed;
use super::rate::Rate;
use super::{Ui, Verbosity};
use crate::event::Event;
use crate::units::{Size, show_duration};

/// See the module.
pub(super) struct Shower {
    ui: Ui,
    began: Instant,
    live: Mutex<Option<Live>>,
    beside: Option<Beside>,
}

/// The live line.
struct Live {
    bar: ProgressBar,
    rate: Rate,
}

/// One of several builds on a terminal.
pub(super) struct Beside {
    pub(super) name: String,
    pub(super) lives: MultiProgress,
}

/// While bytes are uploaded.
const UPLOAD: &str = "{spinner} uploading {prefix} {bar:24}";

#[derive(Clone, Copy)]
enum Colour {
    Green,
    Yellow,
    Cyan,
    Dim,
}

impl Shower {
    pub(super) fn new(ui: Ui) -> Self {
        Self { ui, began: Instant::now(), live: Mutex::new(None), beside: None }
    }

    pub(super) fn beside(ui: Ui, beside: Beside) -> Self {
        Self { ui, began: Instant::now(), live: Mutex::new(None), beside: Some(beside) }
    }

    pub(super) fn show(&self, event: &Event) {
        match event {
            Event::PhaseStarted { detail, .. } => self.begin(detail),
            Event::PhaseDone { phase, detail, took } => {
                self.end();
                self.line(Colour::Green, phase, &with_time(detail, *took));
            }
            Event::StepStarted { index, total, name } => {
                self.line(Colour::Cyan, "step", &format!("{index}/{total} {name}"));
                self.begin(&format!("running {name}"));
            }
            Event::StepCached { index, name } => {
                self.line(Colour::Green, "kept", &format!("{index} {name}: unchanged since an earlier build"));
            }
            Event::StepDone { took, name, .. } => {
                self.end();
                self.line(Colour::Green, "done", &with_time(name, *took));
            }
            Event::Output { line } => {
                self.print(Verbosity::Normal, &format!("{} {}", self.paint(Colour::Dim, "        |"), printable(line)));
            }
            Event::Progress { phase, done, total } => self.progress(phase, *done, *total),
            Event::Warning { message, help } => {
                let mut text = format!("{} {message}", self.paint(Colour::Yellow, "warning:"));
                if let Some(help) = help {
                    let _ = write!(text, "\n  {} {help}", self.paint(Colour::Dim, "help:"));
                }
                self.print(Verbosity::Quiet, &text);
            }
            Event::Note { message } => self.line(Colour::Cyan, "note", message),
            Event::Detail { message } => {
                self.print(Verbosity::Verbose, &self.paint(Colour::Dim, &format!("          {message}")));
            }
        }
    }

    fn line(&self, colour: Colour, word: &str, text: &str) {
        self.print(Verbosity::Normal, &format!("{} {text}", self.paint(colour, &format!("{word:>9}"))));
    }

    fn print(&self, from: Verbosity, text: &str) {
        if self.ui.verbosity < from {
            return;
        }
        if let Some(Beside { name, lives }) = &self.beside {
            let text = prefixed(name, text);
            let write = || drop(io::stderr().lock().write_all(text.as_bytes()));
            return if self.ui.live { lives.suspend(write) } else { write() };
        }
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let write = || drop(writeln!(io::stderr().lock(), "{text}"));
        match &*live {
            Some(live) => live.bar.suspend(write),
            None => write(),
        }
    }

    fn begin(&self, what: &str) {
        if !self.ui.live || self.ui.verbosity == Verbosity::Quiet {
            return;
        }
        let (bar, what) = match &self.beside {
            Some(Beside { name, lives }) => (lives.add(ProgressBar::no_length()), format!("[{name}] {what}")),
            None => (ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8)), what.to_owned()),
        };
        bar.set_style(style("{spinner} {msg} {elapsed}"));
        bar.set_message(what);
        bar.enable_steady_tick(Duration::from_millis(125));
        let before =
            self.live.lock().unwrap_or_else(PoisonError::into_inner).replace(Live { bar, rate: Rate::default() });
        if let Some(before) = before {
            before.bar.finish_and_clear();
        }
    }

    fn progress(&self, phase: &str, done: u64, total: u64) {
        if let Some(live) = &mut *self.live.lock().unwrap_or_else(PoisonError::into_inner)
            && total > 0
        {
            let Live { bar, rate } = live;
            let uploads = phase == "upload";
            if bar.length() != Some(total) {
                bar.set_length(total);
                bar.set_style(style(if uploads {
                    UPLOAD
                } else {
                    "{spinner} {msg} {bar:24} {percent}% {prefix} {eta} left"
                }));
            }
            bar.set_prefix(if uploads {
                rate.note(self.began.elapsed().as_secs_f64(), done);
                rate.in_words(done, total)
            } else if total > 1 << 20 {
                format!("{} of {}", Size(done), Size(total))
            } else {
                String::new()
            });
            bar.set_position(done);
        }
    }

    fn end(&self) {
        if let Some(live) = self.live.lock().unwrap_or_else(PoisonError::into_inner).take() {
            live.bar.finish_and_clear();
        }
    }

    fn paint(&self, colour: Colour, text: &str) -> String {
        let code = match colour {
            Colour::Green => "32;1",
            Colour::Yellow => "33;1",
            Colour::Cyan => "36;1",
            Colour::Dim => "2",
        };
        if self.ui.colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

impl Drop for Shower {
    fn drop(&mut self) {
        self.end();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn with_time(text: &str, took: Duration) -> String {
    if text.is_empty() { show_duration(took) } else { format!("{text} ({})", show_duration(took)) }
}

/// What a guest printed, without what would steer the terminal.
fn printable(line: &str) -> String {
    line.chars().map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}
