//! The user's terminal while a guest has it.

use std::io;

use rustix::termios::{self, OptionalActions, Termios};

/// The terminal passes every key on, until this is dropped.
pub(super) struct RawTerminal(Option<Termios>);

impl RawTerminal {
    pub(super) fn begin() -> Self {
        let before = termios::tcgetattr(io::stdin()).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            // Output keeps its line ends: kiln's own messages go there too.
            raw.output_modes = before.output_modes;
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &raw);
        }
        Self(before)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}
