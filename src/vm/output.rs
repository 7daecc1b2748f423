//! What steps print: one stream for all, cut into steps by marks that only kiln and the agent know.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use super::process::{Follower, Signal};

/// Takes what a step prints, as it comes. Bytes may be anything and cut anywhere.
pub trait Sink: Send {
    /// The next bytes.
    fn write(&mut self, bytes: &[u8]);
}

#[derive(Default)]
struct State {
    sink: Option<Box<dyn Sink>>,
    mark: Vec<u8>,
}

/// The reading end of the agent's output port.
#[derive(Clone, Default)]
pub(super) struct Output(Arc<Mutex<State>>);

impl Output {
    /// Reads `stream` until it ends, on a thread of its own.
    pub(super) fn follow(mut stream: UnixStream, sender: Sender<Signal>, follower: Follower) -> Self {
        let output = Self::default();
        let reader = output.clone();
        std::thread::spawn(move || {
            let _follower = follower;
            let mut cutter = Cutter::default();
            let mut buffer = [0; 65536];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                if let Some(nonce) = reader.take(&mut cutter, &buffer[..n])
                    && sender.send(Signal::OutputEnd(nonce)).is_err()
                {
                    return;
                }
            }
        });
        output
    }

    /// From now on output goes to `sink`, until the mark with `nonce`.
    pub(super) fn begin(&self, nonce: &str, sink: Box<dyn Sink>) {
        let mut state = self.state();
        state.mark = format!("\0kiln-end {nonce}\n").into_bytes();
        state.sink = Some(sink);
    }

    /// The sink of a step that has ended, so that it is dropped where its owner waits.
    pub(super) fn end(&self) -> Option<Box<dyn Sink>> {
        self.state().sink.take()
    }

    fn take(&self, cutter: &mut Cutter, bytes: &[u8]) -> Option<String> {
        let mut state = self.state();
        let State { sink, mark } = &mut *state;
        let found = cutter.feed(bytes, mark, |part| {
            if let Some(sink) = sink {
                sink.write(part);
            }
        });
        found.then(|| String::from_utf8_lossy(&mark[10..mark.len() - 1]).into_owned())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Finds a mark in a stream that comes in pieces, and passes everything else on, holding back only what could be the
/// mark's beginning.
#[derive(Default)]
struct Cutter {
    held: Vec<u8>,
}

impl Cutter {
    fn feed(&mut self, bytes: &[u8], mark: &[u8], mut pass: impl FnMut(&[u8])) -> bool {
        self.held.extend_from_slice(bytes);
        let mut found = false;
        if !mark.is_empty()
            && let Some(at) = find(&self.held, mark)
        {
            pass(&self.held[..at]);
            self.held.drain(..at + mark.len());
            found = true;
        }
        let keep = if found { 0 } else { beginning_of(&self.held, mark) };
        let ready = self.held.len() - keep;
        pass(&self.held[..ready]);
        self.held.drain(..ready);
        found
    }
}

/// How many bytes at the end of `bytes` are a beginning of `mark`.
fn beginning_of(bytes: &[u8], mark: &[u8]) -> usize {
    let longest = mark.len().saturating_sub(1).min(bytes.len());
    (1..=longest).rev().find(|&n| bytes.ends_with(&mark[..n])).unwrap_or(0)
}

fn find(bytes: &[u8], mark: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|&byte| byte == mark[0]) {
        if bytes[from + at..].starts_with(mark) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_the_pieces_the_parts_are_the_same(
            before in proptest::collection::vec(0u8..4, 0..60),
            after in proptest::collection::vec(0u8..4, 0..20),
            piece in 1usize..9,
        ) {
            let mark = [0u8, 1, 0, 1, 2, 9];
            let stream = [&before[..], &mark, &after].concat();
            let (mut cutter, mut parts, mut cut) = (Cutter::default(), Vec::new(), None);
            for bytes in stream.chunks(piece) {
                let before_piece = parts.len();
                if cutter.feed(bytes, &mark, |part| parts.extend_from_slice(part)) {
                    cut = Some(before_piece);
                }
            }
            parts.extend_from_slice(&cutter.held);
            prop_assert_eq!(parts, [before, after].concat());
            prop_assert!(cut.is_some());
        }
    }
}
