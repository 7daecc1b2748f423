//! A built disk is booted as an instance would boot it: by its own boot loader, from `NVMe`, on an overlay, so that the
//! disk itself never changes.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::build::manifest::{DISK, Manifest, TestFacts};
use crate::build::{guest_failure, session, testing};
use crate::cancel::Cancel;
use crate::disk::{Backing, Overlay};
use crate::error::{Error, Exit};
use crate::event::Events;
use crate::store::{Scratch, Store};
use crate::units::{GIB, Size, show_duration};
use crate::vm::guest::{Guest, Reached};
use crate::vm::host::Host;
use crate::vm::keyboard::{self, Input};
use crate::vm::process::{Launch, Machine, Mirror};
use crate::vm::seed::{self, Login};
use crate::vm::spec::{Accelerator, Boot, DiskBus, MemoryState, Network, Spec};

/// Firmware to start the disk with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// `SeaBIOS`.
    Bios,
    /// OVMF.
    Uefi,
}

impl Firmware {
    fn name(self) -> &'static str {
        match self {
            Self::Bios => "BIOS",
            Self::Uefi => "UEFI",
        }
    }

    fn mode(self) -> &'static str {
        match self {
            Self::Bios => "legacy-bios",
            Self::Uefi => "uefi",
        }
    }
}

/// What a rehearsal takes.
pub struct Rehearsal<'a> {
    /// The output folder of a build.
    pub folder: &'a Path,
    /// QEMU and its parts.
    pub host: &'a Host,
    /// How instructions are run.
    pub accelerator: Accelerator,
    /// How long the system may take to come up.
    pub limit: Duration,
    /// For scratch files.
    pub store: &'a Store,
    /// Who hears of it.
    pub events: &'a Events,
    /// Who may stop it.
    pub cancel: &'a Cancel,
}

/// How a rehearsal went.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// What started the disk.
    pub firmware: Firmware,
    /// Seconds until the system was up.
    pub seconds: f64,
    /// What systemd says of itself: `running`, or `degraded` if units failed. `login` where only the console was
    /// asked, which shows a login.
    pub system: String,
    /// Units that failed.
    pub failed_units: Vec<String>,
    /// Tests that passed.
    pub passed: Vec<String>,
}

/// Everything that a booted disk needs besides itself.
struct Stage {
    scratch: Scratch,
    manifest: Manifest,
    console_log: PathBuf,
}

impl Rehearsal<'_> {
    /// The firmware that the disk can be started by, of `wanted` (all if none).
    ///
    /// # Errors
    /// When it is none.
    pub fn choose(&self, wanted: Option<Firmware>) -> Result<Vec<Firmware>, Error> {
        let manifest = Manifest::read(self.folder)?;
        let can = |firmware: &Firmware| manifest.boot_modes.iter().any(|mode| mode == firmware.mode());
        match wanted {
            Some(firmware) if !can(&firmware) => {
                let message = format!("the disk can't be started by {}: it has no boot loader for it", firmware.name());
                Err(Error::new(Exit::Differs, message).help("take a base that has one"))
            }
            Some(firmware) => Ok(vec![firmware]),
            None => {
                let all: Vec<_> = [Firmware::Bios, Firmware::Uefi].into_iter().filter(can).collect();
                if all.is_empty() {
                    return Err(Error::new(Exit::Differs, "the disk has no boot loader for BIOS or UEFI"));
                }
                Ok(all)
            }
        }
    }

    /// Boots the disk by `firmware`, waits until it is up, and runs the recipe's tests in it.
    ///
    /// # Errors
    /// When it doesn't come up, or a test fails.
    pub fn test(&self, firmware: Firmware) -> Result<Outcome, Error> {
        let stage = self.stage(firmware)?;
        let started = Instant::now();
        let tests = stage.manifest.tests.clone();
        let reached = self.events.phase(
            "boot",
            format!("booting the disk by {} from NVMe", firmware.name()),
            |reached: &Reached| match reached {
                Reached::Agent(_) => format!("up by {}", firmware.name()),
                Reached::Login(_) => format!("up by {}: it asks for a login", firmware.name()),
            },
            || self.up(&stage, firmware, !tests.is_empty()),
        );
        let reached = reached.map_err(|error| self.with_console(error, &stage, firmware))?;
        let mut outcome = Outcome {
            firmware,
            seconds: started.elapsed().as_secs_f64(),
            system: "login".to_owned(),
            failed_units: Vec::new(),
            passed: Vec::new(),
        };
        if let Reached::Agent(mut guest) = reached {
            (outcome.system, outcome.failed_units) = testing::system_state(&mut guest, stage.scratch.path())?;
            if !outcome.failed_units.is_empty() {
                self.events.warn(format!("units that failed to start: {}", outcome.failed_units.join(", ")));
            }
            for test in &tests {
                self.run_test(&mut guest, &stage, test).map_err(|error| self.with_console(error, &stage, firmware))?;
                outcome.passed.push(test.name.clone());
            }
        }
        Ok(outcome)
    }

    fn run_test(&self, guest: &mut Guest, stage: &Stage, test: &TestFacts) -> Result<(), Error> {
        let limit = test.timeout.map_or(Duration::from_secs(120), Duration::from_secs_f64);
        let outcome = |()| format!("`{}` passed", test.name);
        self.events
            .phase(
                "test",
                format!("test `{}`", test.name),
                |()| outcome(()),
                || testing::run_test(guest, stage.scratch.path(), test, limit, &BTreeMap::new()),
            )
            .map_err(|error| match error.exit {
                Exit::Step => error.help(format!("boot it and look: kiln run {}", self.folder.display())),
                Exit::TimedOut => {
                    error.help("give the test a longer timeout = \"…\", or boot it and look with kiln run")
                }
                _ => error,
            })
    }

    /// With the console in the output folder, where it outlives the guest; after a signal nobody wants it.
    fn with_console(&self, mut error: Error, stage: &Stage, firmware: Firmware) -> Error {
        if !matches!(error.exit, Exit::Signal(_)) {
            let kept = self.folder.join(format!("test-{}-console.log", firmware.mode()));
            error.log = fs_err::copy(&stage.console_log, &kept).ok().map(|_| kept);
        }
        error
    }

    fn stage(&self, firmware: Firmware) -> Result<Stage, Error> {
        let manifest = Manifest::read(self.folder)?;
        let scratch = self.store.scratch()?;
        let console_log = scratch.path().join("console.log");
        self.events.detail(format!("{} of {}", firmware.name(), manifest.digest));
        let disk = self.folder.join(DISK);
        let disk = std::fs::canonicalize(&disk).map_err(|error| {
            Error::new(Exit::Input, format!("cannot read `{}`: {error}", disk.display())).help("build the image again")
        })?;
        Overlay::create(&scratch.path().join("overlay"), manifest.size, Backing::Raw(&disk), &[])
            .map_err(crate::build::disk_failure)?;
        Ok(Stage { scratch, manifest, console_log })
    }

    fn start(&self, stage: &Stage, firmware: Firmware, play: Play) -> Result<Machine, Error> {
        let folder = stage.scratch.path();
        let failed = |error: std::io::Error| Error::io("cannot write the guest's drives", &error);
        let agent = folder.join("agent");
        Guest::write_agent_drive(&agent, "").map_err(failed)?;
        seed::write_instance(&folder.join("seed"), &play.login).map_err(failed)?;
        let boot = match firmware {
            Firmware::Bios => Boot::Bios,
            Firmware::Uefi => session::uefi(self.host, folder)?,
        };
        let spec = Spec {
            accelerator: self.accelerator,
            cpus: 2,
            processor: stage.manifest.guest.processor,
            memory: Size(GIB),
            boot,
            overlay: folder.join("overlay"),
            bus: DiskBus::Nvme,
            agent: Some(agent),
            seed: Some(folder.join("seed")),
            network: Network::Isolated { ssh: play.ssh },
            memory_state: MemoryState::Plain,
        };
        let launch = Launch {
            qemu: &self.host.qemu,
            folder,
            console_log: &stage.console_log,
            expect: Some(" login: "),
            keyboard: play.mirror.is_some(),
            mirror: play.mirror,
        };
        Machine::start(&spec, &launch, self.cancel).map_err(guest_failure)
    }

    fn up(&self, stage: &Stage, firmware: Firmware, needs_agent: bool) -> Result<Reached, Error> {
        let play = Play { login: Login::default(), ssh: None, mirror: None };
        // A console may be quicker than QEMU's greeting.
        let machine = self.start(stage, firmware, play).map_err(|error| match error.exit {
            Exit::Input => explained(error, needs_agent),
            _ => error,
        })?;
        Guest::reach(machine, self.limit, needs_agent).map_err(|error| explained(guest_failure(error), needs_agent))
    }

    /// Boots the disk and connects its console to this terminal until the guest powers off or the end key is pressed.
    /// Where `input` ends without it, nobody is at the keyboard, and the guest runs on.
    ///
    /// # Errors
    /// When the guest is lost.
    pub fn talk(
        &self,
        firmware: Firmware,
        login: Login,
        ssh: Option<u16>,
        mirror: Mirror,
        input: impl Read + Send + 'static,
    ) -> Result<(), Error> {
        let stage = self.stage(firmware)?;
        let play = Play { login, ssh, mirror: Some(mirror) };
        let mut machine = self.start(&stage, firmware, play)?;
        let ended = machine.ender();
        if let Some(console) = machine.console_input() {
            std::thread::spawn(move || {
                if keyboard::forward(input, console) == Input::EndKey {
                    ended();
                }
            });
        }
        machine.wait_for_end().map_err(guest_failure)
    }
}

/// A disk that didn't come up, with what to do.
fn explained(mut failure: Error, needs_agent: bool) -> Error {
    match failure.exit {
        Exit::Signal(_) => return failure,
        Exit::Input => failure.exit = Exit::Differs,
        _ => {}
    }
    failure.help.get_or_insert_with(|| {
        if failure.exit == Exit::Differs {
            "read the console's log: it ends where the boot did".to_owned()
        } else if needs_agent {
            "read the console's log; the tests need cloud-init in the image".to_owned()
        } else {
            "read the console's log; does the image have a login on its serial console (console=ttyS0)?".to_owned()
        }
    });
    failure
}

/// How the guest is started for a person or a test.
struct Play {
    login: Login,
    ssh: Option<u16>,
    mirror: Option<Mirror>,
}

/// What a rehearsal says in one line.
#[must_use]
pub fn summary(outcomes: &[Outcome]) -> String {
    let line = |outcome: &Outcome| {
        let took = show_duration(Duration::from_secs_f64(outcome.seconds));
        let tests = match outcome.passed.len() {
            0 => String::new(),
            1 => ", 1 test passed".to_owned(),
            count => format!(", {count} tests passed"),
        };
        format!("{}: {} after {took}{tests}", outcome.firmware.name(), outcome.system)
    };
    outcomes.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_each_firmware() {
        let outcome = |firmware, system: &str| Outcome {
            firmware,
            seconds: 31.25,
            system: system.to_owned(),
            failed_units: Vec::new(),
            passed: vec!["serves".to_owned()],
        };
        let said = summary(&[outcome(Firmware::Bios, "running"), outcome(Firmware::Uefi, "degraded")]);
        assert_eq!(said, "BIOS: running after 31.2 s, 1 test passed\nUEFI: degraded after 31.2 s, 1 test passed");
    }
}
