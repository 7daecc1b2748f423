//! What a step prints: whole in its log, line by line as events, and the last of it for the message if it fails.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::event::{Event, Events};
use crate::vm::Sink;

/// A line that is longer is shown in pieces, so that memory stays constant whatever a step prints.
const LONGEST_LINE: usize = 8192;
/// How many of the last lines are kept for the message.
const KEPT: usize = 50;

/// What is known of a step's output after it ended.
#[derive(Clone, Default)]
pub(super) struct Seen(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    last_lines: std::collections::VecDeque<String>,
    failed: Option<std::io::Error>,
}

/// See the module.
pub(super) struct StepLog {
    file: File,
    events: Option<Events>,
    line: Vec<u8>,
    seen: Seen,
}

impl StepLog {
    /// A log in the file `path`, added to. Without `events` nothing is shown.
    pub(super) fn open(path: &Path, events: Option<Events>) -> std::io::Result<(Box<Self>, Seen)> {
        let file = File::options().create(true).append(true).open(path)?;
        let seen = Seen::default();
        Ok((Box::new(Self { file, events, line: Vec::new(), seen: seen.clone() }), seen))
    }

    fn end_line(&mut self) {
        let text = String::from_utf8_lossy(&self.line);
        // A progress bar overwrites its line: what it left is what counts.
        let text = text.trim_end_matches(['\r', '\n']).rsplit('\r').next().unwrap_or_default().to_owned();
        self.line.clear();
        if !text.trim().is_empty() {
            let mut state = self.seen.state();
            state.last_lines.push_back(text.chars().take(400).collect());
            if state.last_lines.len() > KEPT {
                state.last_lines.pop_front();
            }
        }
        if let Some(events) = &self.events {
            events.emit(Event::Output { line: text });
        }
    }
}

impl Sink for StepLog {
    fn write(&mut self, bytes: &[u8]) {
        if let Err(error) = self.file.write_all(bytes) {
            self.seen.state().failed.get_or_insert(error);
        }
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let mut rest = part;
            while !rest.is_empty() {
                let take = rest.len().min(LONGEST_LINE - self.line.len());
                self.line.extend_from_slice(&rest[..take]);
                rest = &rest[take..];
                if self.line.len() >= LONGEST_LINE || (rest.is_empty() && part.ends_with(b"\n")) {
                    self.end_line();
                }
            }
        }
    }
}

impl Drop for StepLog {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.end_line();
        }
    }
}

impl Seen {
    /// The last line that says something.
    pub(super) fn last_line(&self) -> Option<String> {
        self.state().last_lines.back().cloned()
    }

    /// The last lines, the newest last.
    pub(super) fn last_lines(&self) -> Vec<String> {
        self.state().last_lines.iter().cloned().collect()
    }

    /// Why the log isn't whole.
    pub(super) fn failure(&self) -> Option<std::io::Error> {
        self.state().failed.take()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps everything, for kiln's own questions to the guest.
pub(super) struct Answer(pub(super) Arc<Mutex<Vec<u8>>>);

impl Sink for Answer {
    fn write(&mut self, bytes: &[u8]) {
        const LIMIT: usize = 4 << 20;
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = LIMIT.saturating_sub(kept.len()).min(bytes.len());
        kept.extend_from_slice(&bytes[..room]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_kept_and_lines_are_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&lines);
        let events = Events::new(move |event| {
            if let Event::Output { line } = event {
                into.lock().unwrap().push(line);
            }
        });
        let (mut log, seen) = StepLog::open(file.path(), Some(events)).unwrap();
        let bytes = b"one\ntw\xffo\r\n10%\r20%\nlast";
        for piece in bytes.chunks(3) {
            log.write(piece);
        }
        log.write(&[b'x'; 20_000]);
        drop(log);
        assert_eq!(std::fs::read(file.path()).unwrap()[..bytes.len()], bytes[..]);
        let lines = lines.lock().unwrap();
        assert_eq!(lines[..3], ["one", "tw\u{fffd}o", "20%"]);
        assert!(lines[3..].iter().all(|line| line.len() <= LONGEST_LINE));
        assert!(seen.last_line().unwrap().ends_with('x'));
        assert!(seen.failure().is_none());
    }
}
