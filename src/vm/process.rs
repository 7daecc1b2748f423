//! A running QEMU: started, listened to, ended.
//!
//! Everything that can happen to a guest arrives on one channel, so that every wait sees a dying QEMU, a panicking
//! kernel, a full host disk and the user's Ctrl-C, whatever it waits for.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use serde_json::{Value, json};

use super::console::Console;
pub use super::console::Mirror;
use super::memory::GuestMemory;
use super::output::Output;
use super::spec::{
    Accelerator, CTL_SOCKET, FRAMES_FROM_GUEST, FRAMES_TO_NETWORK, IN_SOCKET, OUT_SOCKET, Processor, QMP_SOCKET, Spec,
};
use super::{Error, filter};
use crate::cancel::{Cancel, Subscription};
use crate::exec;

/// Something that happened to the machine.
#[derive(Debug, Clone)]
pub(super) enum Signal {
    /// A line from the agent.
    Answer(String),
    /// All output up to the mark with this nonce has arrived.
    OutputEnd(String),
    /// An answer to a QMP command.
    Monitor(Value),
    /// A QMP event.
    Event(Value),
    /// A line of the console says that the guest is lost.
    Lost(String),
    /// The console shows the text that was asked for.
    Seen,
    /// The person at the console has had enough.
    Enough,
    /// QEMU ended.
    Exited,
    /// The work was cancelled.
    Cancelled,
}

/// How to start QEMU.
#[derive(Clone)]
pub struct Launch<'a> {
    /// The program.
    pub qemu: &'a Path,
    /// The folder for sockets, where QEMU runs; private to this machine.
    pub folder: &'a Path,
    /// Where the console is kept, appended to.
    pub console_log: &'a Path,
    /// A console text to wait for, apart from failures.
    pub expect: Option<&'static str>,
    /// For a person: takes the console's bytes as they come.
    pub mirror: Option<Mirror>,
    /// Whether [`Machine::console_input`] is to be had.
    pub keyboard: bool,
}

/// A running QEMU. Dropping it ends it.
pub struct Machine {
    child: Child,
    signals: Receiver<Signal>,
    sender: Sender<Signal>,
    monitor: UnixStream,
    pub(super) agent: Option<AgentStreams>,
    pub(super) memory: Option<Arc<GuestMemory>>,
    stderr: Stderr,
    console: Console,
    console_input: Option<ChildStdin>,
    cancel: Cancel,
    last_words: Option<String>,
    processor: Processor,
    _subscription: Subscription,
}

/// Why QEMU ended. If it refused the processor, the error names the first feature that is missing.
fn died(processor: Processor, how: String, stderr: String, last_words: Option<String>) -> Error {
    let mut lines = stderr.lines();
    let Some(line) = lines.find(|line| line.contains(" doesn't support requested feature: ")) else {
        return Error::Died { how, stderr, last_words };
    };
    // The words follow the program's name, and `warning:`.
    let words = line.rsplit_once("qemu-system-x86_64: ").map_or(line, |(_, words)| words);
    let lacks = words.trim_start_matches("warning: ").to_owned();
    // QEMU says `TCG` or `host` (mark_unavailable_features in its target/i386/cpu.c).
    let accelerator = if lacks.starts_with("TCG") { Accelerator::Tcg } else { Accelerator::Kvm };
    Error::Processor { processor, accelerator, lacks }
}

/// The two streams to the agent that kiln writes to.
pub(super) struct AgentStreams {
    pub(super) commands: UnixStream,
    pub(super) inputs: UnixStream,
    pub(super) output: Output,
}

impl Machine {
    /// Starts QEMU and connects to it.
    ///
    /// # Errors
    /// When QEMU is missing or refuses its arguments.
    pub fn start(spec: &Spec, launch: &Launch<'_>, cancel: &Cancel) -> Result<Self, Error> {
        let (sender, signals) = channel();
        let listeners = Listeners::bind(launch.folder, &spec.sockets()).map_err(Error::io("cannot make sockets"))?;
        let console = Console::create(launch.console_log, launch.expect, launch.mirror.clone(), sender.clone())
            .map_err(Error::io("cannot write the console's log"))?;
        let mut command = exec::tethered(launch.qemu)?;
        command.args(spec.arguments()).current_dir(launch.folder);
        command.stdin(if launch.keyboard { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let start = |error| exec::Error::Start { program: launch.qemu.to_owned(), error };
        let mut child = command.spawn().map_err(start)?;
        let console_input = child.stdin.take();
        let (follower, ended) = channel();
        if let Some(out) = child.stdout.take() {
            console.follow(out, follower.clone());
        }
        let stderr = Stderr::follow(child.stderr.take());
        let exit = exec::exit_descriptor(&child).map_err(start)?;
        let streams = accept(listeners, &exit, cancel);
        watch_exit(exit, ended, sender.clone());
        let waker = sender.clone();
        let subscription = cancel.subscribe(move || drop(waker.send(Signal::Cancelled)));
        let streams = match streams {
            Ok(Some(streams)) => streams,
            Ok(None) => {
                let status = child.wait().map_err(start)?;
                cancel.check()?;
                return Err(died(spec.processor, exec::describe(status), stderr.tail(), None));
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Error::io("cannot reach QEMU")(error));
            }
        };
        let connected = connect(streams, &sender, follower).map_err(Error::io("cannot reach QEMU"));
        let (monitor, agent) = connected.inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let mut machine = Self {
            child,
            signals,
            sender,
            monitor,
            agent,
            memory: None,
            stderr,
            console,
            console_input,
            cancel: cancel.clone(),
            last_words: None,
            processor: spec.processor,
            _subscription: subscription,
        };
        machine.monitor("qmp_capabilities", &json!({}))?;
        Ok(machine)
    }

    /// What a person types goes here; `None` unless the machine was launched with a keyboard.
    pub fn console_input(&mut self) -> Option<ChildStdin> {
        self.console_input.take()
    }

    /// From now on the console is a person's: `mirror` takes its bytes, and nothing that it shows dooms a wait.
    pub fn hand_over(&self, mirror: Mirror) {
        self.console.hand_over(mirror);
    }

    /// Whether the console said since the last call that the kernel ended a process for lack of memory.
    #[must_use]
    pub fn out_of_memory(&self) -> bool {
        self.console.take_out_of_memory()
    }

    /// Runs one QMP command (QEMU's docs/interop/qmp-spec) and returns its result.
    ///
    /// # Errors
    /// When QEMU refuses it or dies.
    pub fn monitor(&mut self, command: &str, arguments: &Value) -> Result<Value, Error> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        if let Err(error) = self.monitor.write_all(line.as_bytes()) {
            // A broken pipe is QEMU's death seen early: wait for the death itself, which has the better story.
            self.wait_for("QEMU", Duration::from_secs(5), |_| None::<()>)?;
            return Err(Error::io("cannot talk to QEMU")(error));
        }
        let answer = self.wait_aside("QEMU's answer", Duration::from_secs(30), |signal| match signal {
            Signal::Monitor(value) => Some(value.clone()),
            _ => None,
        })?;
        match answer.get("error") {
            Some(error) => Err(Error::Monitor { command: command.to_owned(), answer: error["desc"].to_string() }),
            None => Ok(answer["return"].clone()),
        }
    }

    /// Whether the guest has read its disk, as every kernel does within seconds; looks until it has, or for `patience`.
    ///
    /// # Errors
    /// When QEMU refuses or dies, or the work is cancelled.
    pub fn reads_its_disk(&mut self, patience: Duration) -> Result<bool, Error> {
        let begun = Instant::now();
        loop {
            let devices = self.monitor("query-blockstats", &json!({}))?;
            let reads = devices.as_array().map(|devices| {
                let reads = devices.iter().filter_map(|device| device["stats"]["rd_operations"].as_u64());
                reads.sum::<u64>()
            });
            // The firmware may have looked at the first sectors.
            if reads.is_none_or(|reads| reads > 16) {
                return Ok(true);
            }
            if begun.elapsed() > patience {
                return Ok(false);
            }
            // QEMU has no event for it. Not asleep, so that what dooms the guest ends this at once.
            match self.wait_aside("the guest to read its disk", Duration::from_millis(200), |_| None) {
                Ok(()) | Err(Error::TimedOut { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// As [`Self::wait_for`]. What the guest says meanwhile is for whoever waits for that next.
    fn wait_aside<T>(
        &mut self,
        awaited: &str,
        limit: Duration,
        found: impl Fn(&Signal) -> Option<T>,
    ) -> Result<T, Error> {
        let mut early = Vec::new();
        let outcome = self.wait_for(awaited, limit, |signal| {
            if let Signal::Answer(_) | Signal::Seen | Signal::Lost(_) | Signal::Event(_) = signal {
                early.push(signal.clone());
            }
            found(signal)
        });
        for signal in early {
            let _ = self.sender.send(signal);
        }
        outcome
    }

    /// Waits until `found` makes something of a signal. Everything that dooms the wait ends it: see [`Error`].
    pub(super) fn wait_for<T>(
        &mut self,
        awaited: &str,
        limit: Duration,
        mut found: impl FnMut(&Signal) -> Option<T>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + limit;
        loop {
            self.cancel.check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            let signal = match self.signals.recv_timeout(left) {
                // A guest that never stops talking must not outlast the deadline.
                Ok(signal) if !left.is_zero() => signal,
                Ok(_) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let console = self.console.tail();
                    return Err(Error::TimedOut { awaited: awaited.to_owned(), limit, console });
                }
            };
            if let Some(value) = found(&signal) {
                return Ok(value);
            }
            self.doom(&signal)?;
        }
    }

    fn doom(&mut self, signal: &Signal) -> Result<(), Error> {
        match signal {
            Signal::Cancelled => Ok(self.cancel.check()?),
            Signal::Exited => {
                let how = self.child.wait().map_or_else(|error| error.to_string(), exec::describe);
                Err(died(self.processor, how, self.stderr.tail(), self.last_words.take()))
            }
            Signal::Lost(line) => Err(Error::GuestLost { line: line.clone() }),
            Signal::Event(event) => self.doom_of_event(event),
            _ => Ok(()),
        }
    }

    fn doom_of_event(&mut self, event: &Value) -> Result<(), Error> {
        match event["event"].as_str() {
            Some("BLOCK_IO_ERROR") if event["data"]["nospace"] == true => Err(Error::HostDiskFull),
            Some("BLOCK_IO_ERROR") => {
                Err(Error::DiskFault { reason: event["data"]["reason"].as_str().unwrap_or("unknown").to_owned() })
            }
            Some("GUEST_PANICKED") => Err(Error::GuestLost { line: "the guest reports a kernel panic".to_owned() }),
            Some("SHUTDOWN") => {
                let reason = event["data"]["reason"].as_str().unwrap_or("unknown");
                if reason.starts_with("guest") {
                    return Err(Error::GuestStopped { reset: reason == "guest-reset", console: self.console.tail() });
                }
                self.last_words = Some(format!("QEMU was told to stop ({reason})"));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Waits until the guest has powered itself off and QEMU has ended.
    ///
    /// # Errors
    /// When it doesn't within `limit`.
    pub fn wait_for_power_off(&mut self, limit: Duration) -> Result<(), Error> {
        // A QEMU that ends without the guest's word has died, and with it what the guest had not written.
        match self.wait_for("the guest to power off", limit, |_| None::<()>) {
            Ok(()) => Ok(()),
            Err(Error::GuestStopped { .. }) => {
                self.wait_for("QEMU to end", limit, |signal| matches!(signal, Signal::Exited).then_some(()))
            }
            Err(other) => Err(other),
        }
    }

    /// Something to call from another thread when the person at the console has had enough.
    pub fn ender(&self) -> impl Fn() + Send + 'static {
        let sender = self.sender.clone();
        move || drop(sender.send(Signal::Enough))
    }

    /// Waits until the guest powers off or reboots, QEMU ends, or [`Self::ender`]'s closure is called.
    ///
    /// # Errors
    /// When the work is cancelled.
    pub fn wait_for_end(&mut self) -> Result<(), Error> {
        const A_MONTH: Duration = Duration::from_secs(30 * 86_400);
        self.wait_for("the guest to power off", A_MONTH, |signal| {
            let stopped = matches!(signal, Signal::Event(event) if event["event"] == "SHUTDOWN");
            // What dooms a build is for the person at the console to see.
            (stopped || matches!(signal, Signal::Exited | Signal::Enough))
                .then_some(Some(()))
                .or_else(|| matches!(signal, Signal::Lost(_)).then_some(None))
        })
        .and_then(|ended| if ended.is_some() { Ok(()) } else { self.wait_for_end() })
    }

    /// Ends QEMU at once. What it has said before, on the console above all, has been heard when this returns.
    pub fn end(mut self) {
        let _ = self.child.kill();
        let _ = self
            .wait_for("QEMU to end", Duration::from_secs(5), |signal| matches!(signal, Signal::Exited).then_some(()));
    }

    /// Tells QEMU to write out its overlay and end. The guest must be quiet.
    ///
    /// # Errors
    /// When QEMU doesn't.
    pub fn quit(mut self) -> Result<(), Error> {
        self.monitor("quit", &json!({}))?;
        self.wait_for("QEMU to end", Duration::from_secs(60), |signal| matches!(signal, Signal::Exited).then_some(()))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Until QEMU has connected nobody reads its signals: when the work is cancelled it is killed, and that is seen.
fn accept(listeners: Listeners, exit: &OwnedFd, cancel: &Cancel) -> io::Result<Option<Streams>> {
    let unconnected = exit.try_clone()?;
    let _killer = cancel.subscribe(move || {
        let _ = rustix::process::pidfd_send_signal(&unconnected, rustix::process::Signal::KILL);
    });
    listeners.accept_all(exit)
}

/// The end of QEMU's error output.
struct Stderr {
    kept: Arc<Mutex<Vec<u8>>>,
    /// Closed when there is no more to come.
    open: Receiver<()>,
}

impl Stderr {
    fn follow(from: Option<impl Read + Send + 'static>) -> Self {
        const KEEP: usize = 4000;
        let (closer, open) = channel();
        let kept = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&kept);
        std::thread::spawn(move || {
            let _closer: Sender<()> = closer;
            let Some(mut from) = from else { return };
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend_from_slice(&buffer[..n]);
                let over = kept.len().saturating_sub(KEEP);
                kept.drain(..over);
            }
        });
        Self { kept, open }
    }

    /// What it holds after QEMU's end: all of it, unless a child of QEMU's keeps the pipe open.
    fn tail(&self) -> String {
        let _ = self.open.recv_timeout(Duration::from_secs(2));
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).trim().to_owned()
    }
}

/// Held by every thread that reads from QEMU.
pub(super) type Follower = Sender<std::convert::Infallible>;

/// Tells of QEMU's end once all that it said before has been heard: `ended` hears that its followers are gone.
fn watch_exit(exit: OwnedFd, ended: Receiver<std::convert::Infallible>, sender: Sender<Signal>) {
    std::thread::spawn(move || {
        exec::wait_readable(&exit);
        // Bounded, because a child of QEMU's may keep a socket open.
        let _ = ended.recv_timeout(Duration::from_secs(2));
        let _ = sender.send(Signal::Exited);
    });
}

/// Sockets that wait for QEMU. A UNIX socket's path is at most 108 bytes long; going through `/proc/self/fd` a folder
/// of any depth will do.
struct Listeners {
    sockets: Vec<(&'static str, UnixListener, PathBuf)>,
}

type Streams = Vec<(&'static str, UnixStream)>;

impl Listeners {
    fn bind(folder: &Path, names: &[&'static str]) -> io::Result<Self> {
        let handle = File::open(folder)?;
        let short = PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()));
        let mut sockets = Vec::new();
        for name in names {
            let path = folder.join(name);
            let _ = std::fs::remove_file(&path);
            sockets.push((*name, UnixListener::bind(short.join(name))?, path));
        }
        Ok(Self { sockets })
    }

    /// The streams once QEMU has connected to all; `None` when it ended before.
    fn accept_all(self, exit: &OwnedFd) -> io::Result<Option<Streams>> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut streams = Vec::new();
        for (name, listener, path) in self.sockets {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = rustix::event::Timespec::try_from(left).map_err(io::Error::other)?;
            let mut ready = [PollFd::new(&listener, PollFlags::IN), PollFd::new(exit, PollFlags::IN)];
            let count = rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, Some(&timeout)))?;
            if count == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if !ready[0].revents().contains(PollFlags::IN) {
                return Ok(None);
            }
            streams.push((name, listener.accept()?.0));
            let _ = std::fs::remove_file(path);
        }
        Ok(Some(streams))
    }
}

fn connect(
    streams: Streams,
    sender: &Sender<Signal>,
    follower: Follower,
) -> io::Result<(UnixStream, Option<AgentStreams>)> {
    let mut monitor = None;
    let mut commands = None;
    let mut inputs = None;
    let mut output = None;
    let mut frames = (None, None);
    for (name, stream) in streams {
        match name {
            QMP_SOCKET => {
                follow_lines(stream.try_clone()?, sender.clone(), follower.clone(), monitor_signal);
                monitor = Some(stream);
            }
            CTL_SOCKET => {
                let answer = |line: &str| Some(Signal::Answer(line.trim_end().to_owned()));
                follow_lines(stream.try_clone()?, sender.clone(), follower.clone(), answer);
                commands = Some(stream);
            }
            IN_SOCKET => inputs = Some(stream),
            OUT_SOCKET => output = Some(Output::follow(stream, sender.clone(), follower.clone())),
            FRAMES_FROM_GUEST => frames.0 = Some(stream),
            FRAMES_TO_NETWORK => frames.1 = Some(stream),
            _ => {}
        }
    }
    if let (Some(from), Some(to)) = frames {
        std::thread::spawn(move || filter::pass(from, to));
    }
    let agent = match (commands, inputs, output) {
        (Some(commands), Some(inputs), Some(output)) => Some(AgentStreams { commands, inputs, output }),
        _ => None,
    };
    Ok((monitor.ok_or(io::ErrorKind::NotConnected)?, agent))
}

fn monitor_signal(line: &str) -> Option<Signal> {
    let value: Value = serde_json::from_str(line).ok()?;
    if value.get("event").is_some() {
        Some(Signal::Event(value))
    } else if value.get("QMP").is_some() {
        None
    } else {
        Some(Signal::Monitor(value))
    }
}

fn follow_lines(stream: UnixStream, sender: Sender<Signal>, follower: Follower, make: fn(&str) -> Option<Signal>) {
    std::thread::spawn(move || {
        let _follower = follower;
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        // Bounded: a guest that sends no line end must not fill kiln's memory.
        while let Ok(1..) = reader.by_ref().take(65_536).read_until(b'\n', &mut line) {
            if make(&String::from_utf8_lossy(&line)).is_some_and(|signal| sender.send(signal).is_err()) {
                return;
            }
            line.clear();
        }
    });
}
