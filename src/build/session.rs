//! The build guest: started by the way the plan chose, asked to run things, started again after a reboot.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::archive::environment;
use super::facts::processor;
use super::log::Answer;
use super::{guest_code, guest_failure};
use crate::cancel::Cancel;
use crate::disk::{self, Backing, Image, Overlay, Table};
use crate::error::{Error, Exit};
use crate::event::Events;
use crate::plan::{BootPath, Plan};
use crate::recipe::{Network, Recipe};
use crate::units::show_duration;
use crate::vm::guest::{Ended, Guest};
use crate::vm::memory::GuestMemory;
use crate::vm::process::{Launch, Machine};
use crate::vm::spec::{self, Accelerator, Boot, MemoryState, Spec};
use crate::vm::{self, Sink, filter, host::Host, seed};

/// How long a guest may take to boot, under software emulation of a slow host, unless the recipe says otherwise.
const BOOT_LIMIT: Duration = Duration::from_secs(600);
/// How often a guest is started that doesn't come to read its disk, and how long that may take at most: a fifth of the
/// boot's own limit, if that is less. Under software emulation one kernel in a hundred hangs before, with all processors
/// in their timers' interrupts.
const STARTS: u32 = 3;
const FIRST_READ: Duration = Duration::from_secs(60);
/// How long a restored guest may take to answer.
const RESUME_LIMIT: Duration = Duration::from_secs(60);
/// How long kiln's own scripts may take.
const OWN_LIMIT: Duration = Duration::from_secs(300);

const NETWORK_UP: &str = include_str!("guest/network-up.sh");
const NETWORK_DOWN: &str = include_str!("guest/network-down.sh");
const GROW: &str = include_str!("guest/grow.sh");
const SETTLE: &str = include_str!("guest/settle.sh");
const SEAL: &str = include_str!("guest/seal.sh");
const PACKAGES: &str = include_str!("guest/packages.sh");

/// What the agent's drive brings for [`Session::own`], each script as a function.
pub(super) fn library() -> String {
    let scripts = [
        ("network_up", NETWORK_UP),
        ("network_down", NETWORK_DOWN),
        ("grow", GROW),
        ("settle", SETTLE),
        ("packages", PACKAGES),
        ("seal", SEAL),
    ];
    scripts.map(|(name, text)| format!("kiln_{name}() {{\n{text}}}\n")).concat()
}

const PACKAGES_BEGIN: &str = "kiln: packages";
const PACKAGES_END: &str = "kiln: end of packages";

/// Everything that starting the guest takes.
pub(super) struct Session<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) plan: &'a Plan,
    /// The kernel's `root=` on the base.
    pub(super) root: &'a str,
    pub(super) host: &'a Host,
    pub(super) accelerator: Accelerator,
    pub(super) scratch: &'a Path,
    pub(super) console_log: PathBuf,
    pub(super) events: &'a Events,
    pub(super) cancel: &'a Cancel,
    pub(super) boots: u32,
    /// The number of the overlay that the guest writes to.
    pub(super) overlays: u32,
    /// The number of the overlay that the running QEMU was started with.
    pub(super) first_overlay: u32,
    /// Whether the guest has its network.
    pub(super) network_up: bool,
    /// Whether a person will type into its console.
    pub(super) keyboard: bool,
}

impl Session<'_> {
    /// Where the guest's overlay is.
    pub(super) fn overlay(&self) -> PathBuf {
        self.scratch.join(format!("overlay-{}.qcow2", self.overlays))
    }

    /// Makes the overlay that the guest will write to.
    pub(super) fn create_overlay(&self, backing: Backing<'_>, patches: &[disk::Patch]) -> Result<(), Error> {
        let _ = std::fs::remove_file(self.overlay());
        let size = self.plan.disk_size.bytes();
        Overlay::create(&self.overlay(), size, backing, patches).map_err(super::disk_failure)
    }

    /// Where the overlay after the present one will be.
    pub(super) fn following_overlay(&self) -> PathBuf {
        self.scratch.join(format!("overlay-{}.qcow2", self.overlays + 1))
    }

    /// The overlay that the guest writes to now, and the one that it will go on in.
    pub(super) fn next_overlay(&mut self) -> (PathBuf, PathBuf) {
        let old = self.overlay();
        self.overlays += 1;
        (old, self.overlay())
    }

    /// QEMU's names for the last two overlays.
    pub(super) fn nodes(&self) -> (String, String) {
        let name = |number: u32| match number {
            number if number == self.first_overlay => spec::ROOT_NODE.to_owned(),
            number => format!("{}-{number}", spec::ROOT_NODE),
        };
        (name(self.overlays.saturating_sub(1)), name(self.overlays))
    }

    /// Starts the guest and waits for its agent.
    pub(super) fn boot(&mut self) -> Result<Guest, Error> {
        self.boots += 1;
        let limit = self.recipe.machine.timeout.unwrap_or(BOOT_LIMIT);
        let (mut left, patience) = (limit, FIRST_READ.min(limit / 5));
        let mut machine = self.machine(self.memory()?, MemoryState::Savable)?;
        // A boot loader reads before the kernel does, so that nothing could be told of that.
        let may_hang = self.accelerator == Accelerator::Tcg && matches!(self.plan.boot, BootPath::Direct);
        let starts = if may_hang { STARTS } else { 1 };
        for _ in 1..starts {
            if machine.reads_its_disk(patience).map_err(|error| self.boot_failure(error))? {
                break;
            }
            let waited = show_duration(patience);
            self.events.warn(format!("the guest has not read its disk for {waited}: starting it again"));
            machine.end();
            machine = self.machine(self.memory()?, MemoryState::Savable)?;
            left -= patience;
        }
        self.network_up = false;
        Guest::connect(machine, left).map_err(|error| self.boot_failure(error))
    }

    /// Takes up a guest whose memory was kept. An error is the guest's or the file's; a boot may still do.
    pub(super) fn resume(&mut self, memory: &Path, network_up: bool) -> Result<Guest, Error> {
        let reading = |error| Error::io("cannot read the guest's memory", &error);
        let file = File::open(memory).map_err(reading)?;
        let memory = self.memory()?;
        // While QEMU starts.
        let loading = Arc::clone(&memory).load(file);
        let mut machine = self.machine(memory, MemoryState::Restored)?;
        machine.restore(loading, self.scratch).map_err(guest_failure)?;
        self.network_up = network_up;
        Guest::wake(machine, RESUME_LIMIT).map_err(guest_failure)
    }

    fn memory(&self) -> Result<Arc<GuestMemory>, Error> {
        let memory = GuestMemory::create(self.recipe.machine.memory);
        Ok(Arc::new(memory.map_err(|error| Error::io("cannot make the guest's memory", &error))?))
    }

    fn machine(&mut self, memory: Arc<GuestMemory>, state: fn(PathBuf) -> MemoryState) -> Result<Machine, Error> {
        self.first_overlay = self.overlays;
        let spec = self.spec(state(memory.path()))?;
        let launch = Launch {
            qemu: &self.host.qemu,
            folder: self.scratch,
            console_log: &self.console_log,
            expect: None,
            mirror: None,
            keyboard: self.keyboard,
        };
        let machine = Machine::start(&spec, &launch, self.cancel).map_err(|error| self.boot_failure(error))?;
        Ok(machine.with_memory(memory))
    }

    /// Gives the guest its network, if it is to have one and hasn't yet.
    pub(super) fn give_network(&mut self, guest: &mut Guest) -> Result<(), Error> {
        if self.recipe.machine.network != Network::None && !self.network_up {
            self.own(guest, "the guest's network", &["kiln_network_up"], &network_environment())?;
            self.network_up = true;
        }
        Ok(())
    }

    fn spec(&self, memory_state: MemoryState) -> Result<Spec, Error> {
        let file = |name: &str| self.scratch.join(name);
        let failed = |error: std::io::Error| Error::io("cannot write the guest's drives", &error);
        Guest::write_agent_drive(&file("agent"), &library()).map_err(failed)?;
        let boot = match &self.plan.boot {
            BootPath::Direct if matches!(memory_state, MemoryState::Restored(_)) => self.unbooted().map_err(failed)?,
            BootPath::Direct => self.direct()?,
            BootPath::Firmware { .. } => {
                seed::write(&file("seed"), self.boots).map_err(failed)?;
                self.firmware()?
            }
        };
        let spec = spec(self.recipe, self.accelerator, boot, memory_state, self.scratch);
        Ok(Spec { overlay: self.overlay(), ..spec })
    }

    /// Kernel and initrd as they are on the disk now: after a step that installed another kernel, the new one.
    fn direct(&self) -> Result<Boot, Error> {
        let image = Image::overlay(&self.overlay()).map_err(super::disk_failure)?;
        let table = Table::read(&image).map_err(super::disk_failure)?;
        let files = disk::boot_files(&table, &image).map_err(super::disk_failure)?.map_err(|why| {
            Error::new(Exit::Input, format!("the disk can't be booted directly any more: {why}"))
                .help("set [machine] boot = \"firmware\"")
        })?;
        let kernel = self.scratch.join("kernel");
        files.kernel.copy_to(&kernel).map_err(super::disk_failure)?;
        let initrd = files.initrd.as_ref().map(|_| self.scratch.join("initrd"));
        if let (Some(path), Some(file)) = (&initrd, &files.initrd) {
            file.copy_to(path).map_err(super::disk_failure)?;
        }
        self.events.detail(format!("kernel {} with {}", files.kernel_path, files.root));
        Ok(Boot::Direct { kernel, initrd, command_line: command_line(&files.root) })
    }

    /// Whether this disk of a layer can be booted by the way that the plan has chosen.
    pub(super) fn has_kernel(&self, disk: &Path) -> bool {
        let files = || disk::boot_files(&Table::read(&Image::overlay(disk)?)?, &Image::overlay(disk)?);
        !matches!(self.plan.boot, BootPath::Direct) || matches!(files(), Ok(Ok(_)))
    }

    /// For a guest whose kernel runs already. Its QEMU must have one to load all the same, or it would have other devices,
    /// and it loads anything as one of the oldest format: a header of zeros and as many sectors as that announces (`x86_load_linux`
    /// in QEMU's hw/i386/x86-common.c). The disk may have none any more.
    fn unbooted(&self) -> std::io::Result<Boot> {
        let kernel = self.scratch.join("no-kernel");
        fs_err::write(&kernel, [0; 8192])?;
        Ok(Boot::Direct { kernel, initrd: None, command_line: command_line(self.root) })
    }

    /// BIOS if the disk has a boot sector for it, else UEFI.
    fn firmware(&self) -> Result<Boot, Error> {
        let image = Image::overlay(&self.overlay()).map_err(super::disk_failure)?;
        let table = Table::read(&image).map_err(super::disk_failure)?;
        let modes = table.boot_modes(&image).map_err(super::disk_failure)?;
        if modes.legacy_bios || modes.uefi.is_empty() {
            return Ok(Boot::Bios);
        }
        uefi(self.host, self.scratch)
    }

    /// Ends what runs in the guest, takes away what it must not leave, and lists its packages: in one script, because
    /// each costs a tenth of a second under software emulation. `again` because the disk was found busy after that: then
    /// nothing is spared, and the packages are known already.
    pub(super) fn end(&mut self, guest: &mut Guest, again: bool) -> Result<Vec<String>, Error> {
        let seal = &self.recipe.seal;
        let mut env = network_environment();
        let mut keep: Vec<_> = seal.keep.iter().map(|keep| keep.as_str()).collect();
        if !seal.enabled {
            keep.push("logs");
        }
        env.insert("KILN_KEEP".to_owned(), keep.join(" "));
        env.insert("KILN_AGAIN".to_owned(), if again { "yes" } else { "" }.to_owned());
        // The list comes when nothing of the steps' runs any more that could print into it.
        let list = format!("echo '{PACKAGES_BEGIN}'; kiln_packages; echo '{PACKAGES_END}'");
        let mut calls = vec!["kiln_settle"];
        if !again {
            calls.push(&list);
        }
        if self.network_up {
            calls.push("kiln_network_down");
        }
        if seal.enabled {
            calls.push("kiln_seal");
        }
        let output = self.own(guest, "the seal", &calls, &env)?;
        self.network_up = false;
        let text = String::from_utf8_lossy(&output);
        let packages = text.split(PACKAGES_BEGIN).nth(1).and_then(|rest| rest.split(PACKAGES_END).next());
        Ok(packages.unwrap_or_default().trim().lines().map(str::to_owned).collect())
    }

    /// Takes the guest's network away, and what it left on the disk.
    pub(super) fn network_down(&mut self, guest: &mut Guest) -> Result<(), Error> {
        if self.network_up {
            self.own(guest, "the network's end", &["kiln_network_down"], &network_environment())?;
            self.network_up = false;
        }
        Ok(())
    }

    /// Runs functions of the [`library`] in the guest; their output goes to the build's log only if they fail.
    pub(super) fn own(
        &self,
        guest: &mut Guest,
        what: &str,
        calls: &[&str],
        env: &BTreeMap<String, String>,
    ) -> Result<Vec<u8>, Error> {
        let output = Arc::new(Mutex::new(Vec::new()));
        let sink: Box<dyn Sink> = Box::new(Answer(Arc::clone(&output)));
        let words = format!("{}{}", environment(env), calls.join("; ")).replace('\n', "; ");
        let started = Instant::now();
        let ended = guest.own(what, &words, sink, OWN_LIMIT).map_err(guest_failure)?;
        self.events.detail(format!("{what}: {}", show_duration(started.elapsed())));
        let output = std::mem::take(&mut *output.lock().unwrap_or_else(PoisonError::into_inner));
        let Ended { status, .. } = ended;
        if status == 0 {
            return Ok(output);
        }
        let words = String::from_utf8_lossy(&output);
        for line in words.lines() {
            self.events.detail(format!("{what}: {}", line.escape_debug()));
        }
        let last = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        let last = last.trim_start_matches("kiln: ");
        Err(Error::new(Exit::Input, format!("{what} could not be set up (status {status}): {last}"))
            .help("the build's log has all that it said; does the base lack something?"))
    }

    fn boot_failure(&self, error: vm::Error) -> Error {
        let kernel = matches!(error, vm::Error::GuestLost { .. } | vm::Error::GuestStopped { .. });
        let timed_out = matches!(error, vm::Error::TimedOut { .. });
        let mut failure = guest_failure(error);
        if failure.exit == Exit::Input && kernel && failure.help.is_none() {
            failure.help = Some(match self.plan.boot {
                BootPath::Direct => {
                    "read the console's log; [machine] boot = \"firmware\" starts the disk by its own boot loader"
                        .to_owned()
                }
                BootPath::Firmware { .. } => {
                    "read the console's log; is the base a bootable cloud image for this architecture?".to_owned()
                }
            });
        }
        if timed_out {
            failure.help = Some(match self.plan.boot {
                BootPath::Direct => {
                    "read the console's log; a slow host may need a longer [machine] timeout".to_owned()
                }
                BootPath::Firmware { .. } => {
                    "read the console's log; the agent is started by cloud-init, which the base must have".to_owned()
                }
            });
        }
        failure
    }
}

/// The machine of a build guest, with its drives in `folder`.
fn spec(recipe: &Recipe, accelerator: Accelerator, boot: Boot, memory_state: MemoryState, folder: &Path) -> Spec {
    Spec {
        accelerator,
        cpus: recipe.machine.cpus,
        processor: processor(recipe),
        memory: recipe.machine.memory,
        network: match recipe.machine.network {
            Network::None => spec::Network::None,
            Network::Open | Network::Locked => spec::Network::Filtered,
        },
        ..guest_code::machine(boot, memory_state, folder)
    }
}

/// The machine's arguments without names of files: see [`Spec::shape`]. `root` is the kernel's `root=` on the base.
pub(super) fn shape(recipe: &Recipe, plan: &Plan, root: &str, accelerator: Accelerator) -> String {
    let boot = match &plan.boot {
        BootPath::Direct => Boot::Direct { kernel: PathBuf::new(), initrd: None, command_line: command_line(root) },
        BootPath::Firmware { .. } => Boot::Bios,
    };
    spec(recipe, accelerator, boot, MemoryState::Savable(PathBuf::new()), Path::new("")).shape()
}

/// UEFI firmware with a variable store of its own in `folder`.
///
/// # Errors
/// When the host has none.
pub(crate) fn uefi(host: &Host, folder: &Path) -> Result<Boot, Error> {
    let Some(uefi) = &host.uefi else {
        return Err(Error::new(Exit::Host, "UEFI firmware for QEMU not found")
            .help("install it: apt install ovmf (Debian, Ubuntu), dnf install edk2-ovmf (Fedora, EL)"));
    };
    let variables = folder.join("uefi-variables");
    let failed = |error: std::io::Error| Error::io("cannot copy the UEFI variables", &error);
    let bytes = fs_err::read(&uefi.variables).map_err(failed)?;
    fs_err::write(&variables, bytes).map_err(failed)?;
    Ok(Boot::Uefi { code: uefi.code.clone(), variables })
}

/// `panic=-1` turns a panic into a reset, which QEMU reports; cloud-init stays off, so that it leaves no traces;
/// `AppArmor` stays off because compiling its profiles at boot takes longer than the rest under software emulation, and
/// so do the kernel's tests of its ciphers and its zeroing of memory that is handed out, and page-table isolation, which
/// KVM's guests on Intel's processors would have. All programs are loaded at the same
/// addresses: QEMU finds what it has translated of a library by virtual address, so each program would be translated anew
/// (`tb_cmp` in QEMU's accel/tcg/cpu-exec.c; starting one takes 45 ms then, 13 ms so), and what a step makes must not
/// depend on addresses. The journal stays in memory (systemd-debug-generator(8) has the masks): nothing
/// holds a file of the disk open at the end, and no log of a build is in an image.
pub(super) fn command_line(root: &str) -> String {
    format!(
        "root={root} rw console=ttyS0 quiet panic=-1 apparmor=0 cryptomgr.notests norandmaps nopti \
         init_on_alloc=0 cloud-init=disabled \
         systemd.mask=systemd-journal-flush.service systemd.run=\"/bin/sh /dev/disk/by-id/virtio-kiln-agent\""
    )
}

pub(super) fn network_environment() -> BTreeMap<String, String> {
    let address = |[a, b, c, d]: [u8; 4]| format!("{a}.{b}.{c}.{d}");
    BTreeMap::from([
        ("KILN_MAC".to_owned(), spec::MAC.to_owned()),
        ("KILN_ADDRESS".to_owned(), filter::GUEST.to_owned()),
        ("KILN_GATEWAY".to_owned(), address(filter::GATEWAY)),
        ("KILN_NAME_SERVER".to_owned(), address(filter::NAME_SERVER)),
    ])
}
