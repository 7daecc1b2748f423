//! The guest's serial console: kept whole in a file, its end in memory, and read for signs of trouble.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use super::process::{Follower, Signal};

const KEPT_LINES: usize = 12;
/// A line longer than this is judged by its beginning.
const LONGEST_LINE: usize = 1000;

/// Lines after which the guest can't come back, and who says so.
const LOST: [&str; 9] = [
    "Kernel panic - not syncing", // Linux
    "No bootable device",         // SeaBIOS
    "No bootable option",         // OVMF
    "failed to load Boot",        // OVMF
    "Dropping to a shell!",       // initramfs-tools: the root wasn't found
    "Entering emergency mode",    // dracut
    "You are in emergency mode",  // systemd
    "grub rescue>",               // GRUB without its modules
    "error: no such device",      // GRUB without its root
];

/// Shows the console's bytes to a person.
pub type Mirror = Arc<dyn Fn(&[u8]) + Send + Sync>;

#[derive(Default)]
struct State {
    lines: VecDeque<String>,
    out_of_memory: bool,
    mirror: Option<Mirror>,
    /// A person talks to it: what it shows is theirs, and says nothing of the guest's health.
    a_persons: bool,
}

/// See the module.
#[derive(Clone)]
pub(super) struct Console {
    state: Arc<Mutex<State>>,
    file: Arc<File>,
    expect: Option<&'static str>,
    sender: Sender<Signal>,
}

impl Console {
    pub(super) fn create(
        path: &Path,
        expect: Option<&'static str>,
        mirror: Option<Mirror>,
        sender: Sender<Signal>,
    ) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let state = State { mirror, ..State::default() };
        Ok(Self { state: Arc::new(Mutex::new(state)), file: Arc::new(file), expect, sender })
    }

    /// From now on it is a person's, who sees it by `mirror`.
    pub(super) fn hand_over(&self, mirror: Mirror) {
        let mut state = self.state();
        state.mirror = Some(mirror);
        state.a_persons = true;
    }

    /// Reads the console from `from` until it ends, on a thread of its own.
    pub(super) fn follow(&self, mut from: impl Read + Send + 'static, follower: Follower) {
        let console = self.clone();
        std::thread::spawn(move || {
            let _follower = follower;
            let mut buffer = [0; 4096];
            let mut line = Vec::new();
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                // A host disk that is full loses the log, not the build: the overlay's own error comes soon enough.
                let _ = (&*console.file).write_all(&buffer[..n]);
                let mirror = console.state().mirror.clone();
                if let Some(mirror) = mirror {
                    mirror(&buffer[..n]);
                }
                for &byte in &buffer[..n] {
                    console.byte(byte, &mut line);
                }
            }
        });
    }

    fn byte(&self, byte: u8, line: &mut Vec<u8>) {
        if byte != b'\n' {
            if line.len() < LONGEST_LINE {
                line.push(byte);
                // A prompt ends without a line end, so it is looked for as it grows.
                if byte == b'>' || byte == b' ' {
                    self.judge(&String::from_utf8_lossy(line), line.ends_with(b"grub rescue> "));
                }
            }
            return;
        }
        let text = without_controls(&String::from_utf8_lossy(line));
        line.clear();
        self.judge(&text, true);
        if !text.trim().is_empty() {
            let mut state = self.state();
            state.lines.push_back(text.trim_end().to_owned());
            if state.lines.len() > KEPT_LINES {
                state.lines.pop_front();
            }
        }
    }

    fn judge(&self, line: &str, whole: bool) {
        if self.expect.is_some_and(|text| line.ends_with(text) || (whole && line.contains(text))) {
            let _ = self.sender.send(Signal::Seen);
        }
        if !whole {
            return;
        }
        if self.state().a_persons {
            return;
        }
        // The agent's own lines have names of steps.
        if !line.starts_with("kiln: ") && LOST.iter().any(|text| line.contains(text)) {
            let _ = self.sender.send(Signal::Lost(line.trim().to_owned()));
        }
        if line.contains("Out of memory: Kill") || line.contains("oom-kill:") {
            self.state().out_of_memory = true;
        }
    }

    pub(super) fn tail(&self) -> String {
        self.state().lines.iter().cloned().collect::<Vec<_>>().join("\n")
    }

    pub(super) fn take_out_of_memory(&self) -> bool {
        std::mem::take(&mut self.state().out_of_memory)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without terminal control sequences: firmware clears screens, and a person reads these lines in an error.
pub(super) fn without_controls(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            if chars.next_if_eq(&'[').is_some() {
                while chars.next().is_some_and(|c| !c.is_ascii_alphabetic()) {}
            } else {
                chars.next();
            }
        } else if !c.is_control() || c == '\t' {
            clean.push(c);
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn control_sequences_are_taken_out() {
        assert_eq!(without_controls("\u{1b}[2J\u{1b}[01;01HBooting\u{1b}c now\r"), "Booting now");
    }

    #[test]
    fn trouble_is_seen_and_the_end_is_kept() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let (sender, signals) = channel();
        let console = Console::create(log.path(), Some("login: "), None, sender).unwrap();
        let mut line = Vec::new();
        let text = b"one\r\n[ 1.0] Kernel panic - not syncing: VFS\nOut of memory: Killed process 7\nhost login: ";
        for &byte in text {
            console.byte(byte, &mut line);
        }
        assert!(matches!(signals.try_recv(), Ok(Signal::Lost(line)) if line.ends_with("VFS")));
        assert!(matches!(signals.try_recv(), Ok(Signal::Seen)));
        assert!(console.take_out_of_memory());
        assert!(!console.take_out_of_memory());
        assert!(console.tail().starts_with("one\n"));
    }
}
