//! Starting processes: the only module that does.
//!
//! Every child is *tethered*: when kiln dies, however it dies, the kernel kills the child. That is done without
//! unsafe code by starting kiln itself as a go-between, which sets its parent-death signal and becomes the program
//! ([`become_tethered`]). The signal fires when the *thread* that started the child ends (prctl(2), `PR_SET_PDEATHSIG`),
//! so children are started from threads that outlive them. Every child leads a process group of its own: a terminal's
//! Ctrl-C reaches kiln alone, which then ends its children in order.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::cancel::{Cancel, Cancelled};

const TETHER: &str = "__tether";
/// How much of a program's error output is kept for the message.
const TAIL: usize = 2000;

/// Why a program didn't do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such program.
    #[error("`{}` not found", .0.display())]
    NotFound(PathBuf),
    /// It could not be started.
    #[error("cannot start `{}`: {error}", .program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It ended with a failure.
    #[error("`{}` {how}{}", .program.display(), after_colon(.stderr))]
    Failed {
        /// The program.
        program: PathBuf,
        /// `failed with exit code 1`, `was killed by signal 9`.
        how: String,
        /// The end of its error output.
        stderr: String,
    },
    /// It took too long and was killed.
    #[error("`{}` did not end within {}", .program.display(), crate::units::show_duration(*.limit))]
    TimedOut {
        /// The program.
        program: PathBuf,
        /// How long it was given.
        limit: Duration,
    },
    /// The user stopped it.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

fn after_colon(text: &str) -> String {
    let text = text.trim();
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// How a status reads: `failed with exit code 1` or `was killed by signal 9`.
#[must_use]
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "ended".to_owned(),
        (Some(code), _) => format!("failed with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended in an unknown way".to_owned(),
    }
}

/// What a program printed.
#[derive(Debug)]
pub struct Output {
    /// Standard output, whole.
    pub stdout: Vec<u8>,
    /// The end of the error output.
    pub stderr: String,
    /// How it ended.
    pub status: ExitStatus,
}

/// A program to run to its end.
#[derive(Debug, Clone)]
pub struct Tool {
    program: PathBuf,
    arguments: Vec<OsString>,
    limit: Duration,
}

impl Tool {
    /// `program` (looked up on PATH unless it has a slash), to be ended after `limit`.
    pub fn new(program: impl Into<PathBuf>, limit: Duration) -> Self {
        Self { program: program.into(), arguments: Vec::new(), limit }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Runs it; a status other than 0 is an error.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn run(&self, cancel: &Cancel) -> Result<Output, Error> {
        let output = self.run_any_status(cancel)?;
        if output.status.success() {
            return Ok(output);
        }
        Err(Error::Failed { program: self.program.clone(), how: describe(output.status), stderr: output.stderr })
    }

    /// Runs it; its status is for the caller to judge.
    ///
    /// # Errors
    /// See [`Error`]; never [`Error::Failed`].
    pub fn run_any_status(&self, cancel: &Cancel) -> Result<Output, Error> {
        cancel.check()?;
        let start = |error| Error::Start { program: self.program.clone(), error };
        let mut command = tethered(&self.program)?;
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(start)?;
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let reader = std::thread::spawn(move || drain(stdout, usize::MAX));
        let error_reader = std::thread::spawn(move || drain(stderr, TAIL));
        let ended = wait(&mut child, Some(Instant::now() + self.limit), cancel);
        if !matches!(ended, Ok(Some(_))) {
            let _ = child.kill();
            let _ = child.wait();
        }
        let stdout = reader.join().unwrap_or_default();
        let stderr = error_reader.join().unwrap_or_default();
        match ended? {
            Some(status) => Ok(Output { stdout, stderr: String::from_utf8_lossy(&stderr).into_owned(), status }),
            None => Err(Error::TimedOut { program: self.program.clone(), limit: self.limit }),
        }
    }
}

fn drain(pipe: Option<impl Read>, keep: usize) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else { return kept };
    let mut buffer = [0; 65536];
    while let Ok(n @ 1..) = pipe.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..n]);
        if kept.len() > keep {
            kept.drain(..kept.len() - keep);
        }
    }
    kept
}

/// Waits until `child` ends, `deadline` passes (`None`) or the work is cancelled.
///
/// # Errors
/// [`Error::Cancelled`].
pub fn wait(child: &mut Child, deadline: Option<Instant>, cancel: &Cancel) -> Result<Option<ExitStatus>, Error> {
    let failed = |error: io::Error| Error::Start { program: PathBuf::from("wait"), error };
    let exit = exit_descriptor(child).map_err(failed)?;
    let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
    let waker = File::from(wake.try_clone().map_err(failed)?);
    let _subscription = cancel.subscribe(move || {
        let _ = (&waker).write_all(&1u64.to_ne_bytes());
    });
    loop {
        cancel.check()?;
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Ok(Some(status));
        }
        let left = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => return Ok(None),
            Some(left) => left.min(Duration::from_secs(3600)),
            None => Duration::from_secs(3600),
        };
        let timeout = rustix::event::Timespec::try_from(left).ok();
        let mut descriptors = [PollFd::new(&exit, PollFlags::IN), PollFd::new(&wake, PollFlags::IN)];
        match rustix::event::poll(&mut descriptors, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
}

/// A descriptor that becomes readable when `child` ends.
///
/// # Errors
/// When the kernel has no pidfd (before Linux 5.3).
pub fn exit_descriptor(child: &Child) -> io::Result<OwnedFd> {
    let pid = Pid::from_child(child);
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Blocks until the process behind `exit` has ended.
pub fn wait_readable(exit: &OwnedFd) {
    let mut descriptors = [PollFd::new(exit, PollFlags::IN)];
    while matches!(rustix::event::poll(&mut descriptors, None), Err(rustix::io::Errno::INTR)) {}
}

/// A command that starts `program` tethered to this process, in a process group of its own.
///
/// # Errors
/// [`Error::NotFound`] when there is no such program.
pub fn tethered(program: &Path) -> Result<Command, Error> {
    let found = find(program).ok_or_else(|| Error::NotFound(program.to_owned()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("kiln").arg(TETHER).arg(std::process::id().to_string()).arg(found).process_group(0);
    Ok(command)
}

/// The file that running `program` would start, as an absolute path: itself if it has a slash, else the first on PATH.
#[must_use]
pub fn find(program: &Path) -> Option<PathBuf> {
    let runnable = |path: &Path| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    let found = if program.components().count() > 1 {
        Some(program.to_owned()).filter(|path| runnable(path))
    } else {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|folder| folder.join(program)).find(|path| runnable(path))
    };
    // Children may be started in another folder.
    std::path::absolute(found?).ok()
}

/// If this process was started as a go-between, becomes the program it was started for and doesn't return, except
/// with the status of a failure. Called first thing in `main`.
#[must_use]
pub fn become_tethered() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != TETHER {
        return None;
    }
    let parent: Option<i32> = arguments.next().and_then(|pid| pid.to_str()?.parse().ok());
    let program = arguments.next()?;
    let tied = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).is_ok();
    let orphaned = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get()) != parent;
    if !tied || orphaned {
        return Some(ExitCode::from(126));
    }
    let error = Command::new(program).args(arguments).exec();
    let _ = writeln!(io::stderr().as_fd().try_clone_to_owned().map(File::from).ok()?, "{error}");
    Some(ExitCode::from(127))
}

/// What tells this boot of the host from every other (random(4)); none where the host doesn't say.
#[must_use]
pub fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

/// The signals that this process was started to ignore (proc(5), `SigIgn`).
#[must_use]
pub fn ignored_signals() -> Vec<i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    (1..=64).filter(|signal| mask >> (signal - 1) & 1 == 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_on_the_path_only_if_they_run() {
        assert!(find(Path::new("sh")).is_some());
        assert!(find(Path::new("/etc/passwd")).is_none());
        assert!(find(Path::new("kiln-no-such-program")).is_none());
    }

    #[test]
    fn a_missing_program_is_its_own_error() {
        let error = Tool::new("kiln-no-such-program", Duration::from_secs(1)).run(&Cancel::default()).unwrap_err();
        assert_eq!(error.to_string(), "`kiln-no-such-program` not found");
    }
}
