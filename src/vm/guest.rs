//! The agent in the guest, from kiln's side. The other side is `agent.sh`, which describes the protocol.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Error;
use super::checkpoint::Saved;
use super::keyboard;
use super::output::Sink;
use super::process::{Machine, Mirror, Signal};
use crate::units::hex;

/// The agent's script.
pub const AGENT: &str = include_str!("agent.sh");
/// The agent's answer to being started: its protocol's version.
const READY: &str = "ready 1 ";
/// The longest list of what a guest has besides its disk, in characters. A guest may say anything.
const MOST_WORDS: usize = 200;

/// A guest whose agent is ready.
pub struct Guest {
    machine: Machine,
    /// Whether its memory may be saved: it can draw new random numbers when it is restored.
    pub savable: bool,
    folders: u32,
}

/// How far a booted disk came.
pub enum Reached {
    /// The agent runs: the boot is over.
    Agent(Guest),
    /// Only the console asks for a login.
    Login(Machine),
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its exit status; 128+n after signal n.
    pub status: i32,
    /// Space left on the guest's root filesystem, in KiB.
    pub free_kib: u64,
    /// The kernel ended a process for lack of memory meanwhile.
    pub out_of_memory: bool,
}

/// A tar archive on its way into the guest.
pub struct Archive {
    file: File,
    length: u64,
}

impl Archive {
    /// An archive in a file that needs no name, made by `fill`, in `folder`.
    ///
    /// # Errors
    /// When `fill` fails or the file can't be written.
    pub fn build(folder: &Path, fill: impl FnOnce(&mut tar::Builder<&mut File>) -> io::Result<()>) -> io::Result<Self> {
        let mut file = tempfile::tempfile_in(folder)?;
        let mut builder = tar::Builder::new(&mut file);
        builder.mode(tar::HeaderMode::Complete);
        fill(&mut builder)?;
        builder.into_inner()?;
        let length = file.stream_position()?;
        // Readers take whole records of 20 blocks.
        let padded = length.next_multiple_of(10_240);
        file.set_len(padded)?;
        file.rewind()?;
        Ok(Self { file, length: padded })
    }
}

/// How a guest's root filesystem was found when it was to rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Nothing is written any more.
    Quiet,
    /// Something has files open for writing, or files that have no name any more. The guest goes on.
    Busy,
}

/// Whose files a copy makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// User, by name or number.
    pub user: String,
    /// Group, by name or number.
    pub group: String,
}

impl Guest {
    /// Writes the agent's script as a drive: padded to whole sectors with line ends, which sh reads over. The functions
    /// of `library` are there for [`Self::own`]: the agent has read them when it is ready, also in a guest that is taken up.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write_agent_drive(path: &Path, library: &str) -> io::Result<()> {
        let mut text = format!("#!/bin/sh\n{library}{AGENT}").into_bytes();
        text.resize(text.len().next_multiple_of(4096), b'\n');
        fs_err::write(path, text)
    }

    /// Waits for the agent.
    ///
    /// # Errors
    /// When it doesn't come.
    pub fn connect(machine: Machine, limit: Duration) -> Result<Self, Error> {
        match Self::reach(machine, limit, true)? {
            Reached::Agent(guest) => Ok(guest),
            Reached::Login(_) => Err(Error::Protocol("a login".to_owned())),
        }
    }

    /// Waits for the agent, or where `needs_agent` doesn't ask for it for the login on the console, whichever is first.
    ///
    /// # Errors
    /// When neither comes.
    pub fn reach(mut machine: Machine, limit: Duration, needs_agent: bool) -> Result<Reached, Error> {
        let awaited = if needs_agent { "the guest's agent" } else { "the system to come up" };
        let answer = machine.wait_for(awaited, limit, |signal| match signal {
            Signal::Answer(line) => Some(Some(line.clone())),
            Signal::Seen if !needs_agent => Some(None),
            _ => None,
        })?;
        match answer {
            None => Ok(Reached::Login(machine)),
            Some(line) => match line.strip_prefix(READY) {
                Some(facts) => Ok(Reached::Agent(Self { savable: facts.ends_with(" savable"), folders: 0, machine })),
                None => Err(Error::Protocol(line)),
            },
        }
    }

    /// Takes up a guest whose memory was restored: its clock is set, and it draws new random numbers.
    ///
    /// # Errors
    /// When it doesn't answer, or can't.
    pub fn wake(machine: Machine, limit: Duration) -> Result<Self, Error> {
        let mut guest = Self { machine, savable: true, folders: 0 };
        let (nonce, seed) = (random()?, random()?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        guest.command(&format!("wake {nonce} {}.{:09} {seed}", now.as_secs(), now.subsec_nanos()))?;
        guest.answer("the restored guest", &nonce, limit, Prints::Nothing)?;
        Ok(guest)
    }

    /// Has the guest write out what it holds in memory for its disk. Returned is what it has besides its disk that a boot
    /// of the disk would not bring back, as text for people; empty if there is nothing.
    ///
    /// # Errors
    /// When it doesn't.
    pub fn sync(&mut self, limit: Duration) -> Result<String, Error> {
        let nonce = random()?;
        self.command(&format!("sync {nonce}"))?;
        let (_, words) = self.answer("the guest to write out its disk", &nonce, limit, Prints::Nothing)?;
        Ok(words.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MOST_WORDS).collect())
    }

    /// See [`Machine::checkpoint`].
    ///
    /// # Errors
    /// As there.
    pub fn checkpoint(
        &mut self,
        nodes: (String, String),
        fresh: &Path,
        memory: Option<&Path>,
        folder: &Path,
    ) -> Result<Saved, Error> {
        self.machine.checkpoint(nodes, fresh, memory, folder)
    }

    /// Runs `.kiln/step` of the archive, which is all in `folder`, there: by `sh -eu`, or by itself if it has a shebang.
    /// `what` is named when it takes too long, `name` in the console's log.
    ///
    /// # Errors
    /// When the guest fails; a step that fails is not an error here.
    pub fn run(
        &mut self,
        what: &str,
        archive: Archive,
        (folder, name): (&str, &str),
        shebang: bool,
        sink: Box<dyn Sink>,
        limit: Duration,
    ) -> Result<Ended, Error> {
        let rest = format!("{} {folder} {name}", if shebang { "exec" } else { "sh" });
        self.stream("run", what, archive, &rest, sink, limit)
    }

    /// Runs `words`, a line for sh that calls functions of the library, as by `sh -eu` in the agent's place.
    ///
    /// # Errors
    /// When the guest fails; words that fail are not an error here.
    pub fn own(&mut self, what: &str, words: &str, sink: Box<dyn Sink>, limit: Duration) -> Result<Ended, Error> {
        let nonce = random()?;
        self.listen(&nonce, sink)?;
        self.command(&format!("own {nonce} {words}"))?;
        self.printed(what, &nonce, limit)
    }

    /// Gives the console to a person, who sees it by `mirror` and types into `keyboard`. The end key ends what
    /// [`Self::run`] waits for, as if it had ended well.
    pub fn hand_over(&mut self, mirror: Mirror, keyboard: impl Read + Send + 'static) {
        self.machine.hand_over(mirror);
        let enough = self.machine.ender();
        if let Some(console) = self.machine.console_input() {
            std::thread::spawn(move || {
                if keyboard::forward(keyboard, console) == keyboard::Input::EndKey {
                    enough();
                }
            });
        }
    }

    /// See [`Machine::end`].
    pub fn end(self) {
        self.machine.end();
    }

    /// The name of a folder that no archive had yet.
    pub fn fresh_folder(&mut self) -> String {
        self.folders += 1;
        format!("run-{}", self.folders)
    }

    /// Unpacks the archive into `folder` of the guest (made if missing).
    ///
    /// # Errors
    /// When the guest has no such owner, or fails.
    pub fn put(
        &mut self,
        what: &str,
        archive: Archive,
        owner: &Owner,
        folder: &str,
        sink: Box<dyn Sink>,
        limit: Duration,
    ) -> Result<Ended, Error> {
        let rest = format!("{} {} {}/", owner.user, owner.group, folder.trim_end_matches('/'));
        self.stream("put", what, archive, &rest, sink, limit)
    }

    /// Brings all filesystems to rest. With `whatever` a busy root is frozen, else it is [`Rest::Busy`].
    ///
    /// # Errors
    /// When something keeps another filesystem in use.
    pub fn freeze(&mut self, whatever: bool, limit: Duration) -> Result<Rest, Error> {
        let nonce = random()?;
        self.command(&format!("freeze {nonce} {}", if whatever { "whatever" } else { "once" }))?;
        match self.answer("the guest to freeze its disk", &nonce, limit, Prints::Nothing) {
            Ok(_) => Ok(Rest::Quiet),
            Err(Error::Refused(why)) if why == "busy" && !whatever => Ok(Rest::Busy),
            Err(error) => Err(error),
        }
    }

    /// Ends QEMU. The overlay is whole when this returns.
    ///
    /// # Errors
    /// When QEMU fails at that.
    pub fn quit(self) -> Result<(), Error> {
        self.machine.quit()
    }

    /// Shuts the guest down in order and waits until it is off.
    ///
    /// # Errors
    /// When it doesn't.
    pub fn halt(mut self, limit: Duration) -> Result<(), Error> {
        let nonce = random()?;
        self.command(&format!("halt {nonce}"))?;
        self.machine.wait_for_power_off(limit)
    }

    fn stream(
        &mut self,
        command: &str,
        what: &str,
        archive: Archive,
        rest: &str,
        sink: Box<dyn Sink>,
        limit: Duration,
    ) -> Result<Ended, Error> {
        let nonce = random()?;
        let mut inputs = self.listen(&nonce, sink)?;
        self.command(&format!("{command} {nonce} {} {rest}", archive.length))?;
        // On a thread, so that the wait below sees what happens to the guest meanwhile. If the guest dies the write
        // fails; the wait has the reason.
        let writer = std::thread::spawn(move || io::copy(&mut archive.file.take(archive.length), &mut inputs));
        let ended = self.printed(what, &nonce, limit)?;
        drop(writer);
        Ok(ended)
    }

    /// From now on what the guest prints goes to `sink`. The stream for a command's input.
    fn listen(&mut self, nonce: &str, sink: Box<dyn Sink>) -> Result<UnixStream, Error> {
        let agent = self.machine.agent.as_ref().ok_or_else(|| Error::Protocol("nothing".to_owned()))?;
        agent.output.begin(nonce, sink);
        let inputs = agent.inputs.try_clone().map_err(Error::io("cannot talk to the guest"));
        let _ = self.machine.out_of_memory();
        inputs
    }

    /// The end of a command that prints.
    fn printed(&mut self, what: &str, nonce: &str, limit: Duration) -> Result<Ended, Error> {
        let ended = self.answer(what, nonce, limit, Prints::Output);
        let _ = self.machine.agent.as_ref().map(|agent| agent.output.end());
        let (mut ended, _) = ended?;
        ended.out_of_memory = self.machine.out_of_memory();
        Ok(ended)
    }

    fn command(&mut self, line: &str) -> Result<(), Error> {
        let sent = match &mut self.machine.agent {
            Some(agent) => agent.commands.write_all(format!("{line}\n").as_bytes()),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        sent.or_else(|error| {
            self.machine.wait_for("QEMU", Duration::from_secs(5), |_| None::<()>)?;
            Err(Error::io("cannot talk to the guest")(error))
        })
    }

    /// The agent's answer and the words at its end, once the output that belongs to it has arrived as well.
    fn answer(&mut self, what: &str, nonce: &str, limit: Duration, prints: Prints) -> Result<(Ended, String), Error> {
        let mut ended = None;
        let mut output_ended = false;
        self.machine.wait_for(what, limit, |signal| {
            match signal {
                Signal::Answer(line) => match parse(line, nonce) {
                    Some(Ok(result)) => ended = Some(Ok(result)),
                    Some(Err(error)) => return Some(Err(error)),
                    None => {}
                },
                Signal::OutputEnd(end) => output_ended |= end == nonce,
                Signal::Enough => {
                    return Some(Ok((Ended { status: 0, free_kib: 0, out_of_memory: false }, String::new())));
                }
                _ => {}
            }
            if output_ended || prints == Prints::Nothing { ended.take() } else { None }
        })?
    }
}

/// Whether a command has output, with a mark at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prints {
    Output,
    Nothing,
}

/// What an answer says to the command with `nonce`, and the words at its end; `None` if it is not an answer to it.
fn parse(line: &str, nonce: &str) -> Option<Result<(Ended, String), Error>> {
    let (kind, rest) = line.split_once(' ')?;
    let rest = rest.strip_prefix(nonce)?;
    match kind {
        "fail" => Some(Err(Error::Refused(rest.trim().to_owned()))),
        "done" => {
            let mut fields = rest.trim_start().splitn(3, ' ');
            let status = fields.next().and_then(|status| status.trim().parse().ok());
            let free_kib = fields.next().and_then(|free| free.trim().parse().ok()).unwrap_or(0);
            let words = fields.next().unwrap_or_default().trim().to_owned();
            Some(match status {
                Some(status) => Ok((Ended { status, free_kib, out_of_memory: false }, words)),
                None => Err(Error::Protocol(line.to_owned())),
            })
        }
        _ => None,
    }
}

fn random() -> Result<String, Error> {
    nonce().map_err(Error::io("cannot read random numbers"))
}

/// A name that nothing else has.
///
/// # Errors
/// When the host has no random numbers.
pub fn random_id() -> Result<String, Error> {
    random()
}

/// 128 random bits that no guest can guess.
fn nonce() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(hex(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_from_forgeries() {
        let ended = Ended { status: 100, free_kib: 2048, out_of_memory: false };
        assert_eq!(parse("done abc 100 2048", "abc").unwrap().unwrap(), (ended, String::new()));
        let answer = parse("done abc 100 2048 web.service; mount /mnt\r", "abc").unwrap().unwrap();
        assert_eq!(answer, (ended, "web.service; mount /mnt".to_owned()));
        assert!(parse("done other 0 0", "abc").is_none());
        assert!(parse("done", "abc").is_none());
        assert!(matches!(parse("fail abc no user", "abc"), Some(Err(Error::Refused(why))) if why == "no user"));
        assert!(matches!(parse("done abc x", "abc"), Some(Err(Error::Protocol(_)))));
    }

    #[test]
    fn nonces_differ() {
        assert_ne!(nonce().unwrap(), nonce().unwrap());
    }

    #[test]
    fn an_archive_is_whole_records() {
        let folder = tempfile::tempdir().unwrap();
        let archive = Archive::build(folder.path(), |tar| {
            let mut header = tar::Header::new_gnu();
            header.set_size(3);
            tar.append_data(&mut header, "a", &b"abc"[..])
        });
        assert_eq!(archive.unwrap().length % 10_240, 0);
    }
}
