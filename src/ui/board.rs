//! Builds, or regions, side by side on one terminal: a prefix tells their lines apart, and each has a live line.

use std::io::{self, Write};

use indicatif::{MultiProgress, ProgressDrawTarget};

use super::human::{Beside, Shower};
use super::{Format, Ui};
use crate::error::Error;
use crate::event::Events;

/// Where several things are shown.
#[derive(Clone)]
pub struct Board {
    ui: Ui,
    kind: &'static str,
    lives: MultiProgress,
}

impl Board {
    pub(super) fn new(ui: Ui, kind: &'static str) -> Self {
        Self { ui, kind, lives: MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(8)) }
    }

    /// Where the one with this name sends its events.
    #[must_use]
    pub fn events(&self, name: &str) -> Events {
        let (name, kind) = (name.to_owned(), self.kind);
        match self.ui.format {
            Format::Json => Events::new(move |event| {
                if let Ok(mut value) = serde_json::to_value(&event) {
                    value[kind] = name.as_str().into();
                    let _ = writeln!(io::stderr().lock(), "{value}");
                }
            }),
            Format::Human => {
                let shower = Shower::beside(self.ui, Beside { name, lives: self.lives.clone() });
                Events::new(move |event| shower.show(&event))
            }
        }
    }

    /// Shows the failure of the one with this name.
    pub fn error(&self, name: &str, error: &Error) {
        let text = match self.ui.format {
            Format::Human => prefixed(name, &super::render(error, self.ui.colour)),
            Format::Json => {
                let mut value = super::error_value(error);
                value["event"] = "error".into();
                value[self.kind] = name.into();
                format!("{value}\n")
            }
        };
        self.print(&text);
    }

    fn print(&self, text: &str) {
        let write = || drop(io::stderr().lock().write_all(text.as_bytes()));
        if self.ui.live { self.lives.suspend(write) } else { write() }
    }
}

/// Every line with the name before it.
pub(super) fn prefixed(name: &str, text: &str) -> String {
    let line = |line: &str| format!("[{name}] {line}").trim_end().to_owned() + "\n";
    text.lines().map(line).collect()
}
