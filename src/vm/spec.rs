//! What machine to start, as data, and the QEMU arguments that say so. Pure.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::units::{MIB, Size};

/// How the guest's instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The kernel's virtual machines.
    Kvm,
    /// Software emulation.
    Tcg,
}

impl Accelerator {
    /// The name that the command line and the manifest use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// The processor that the guest sees: a level of the x86-64 psABI. It is the same on every host with the same
/// accelerator, except that KVM's guests see the vendor of the host's processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Processor {
    /// Up to SSE4.2.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// Up to AVX2.
    #[serde(rename = "x86-64-v3")]
    V3,
}

/// Features that `qemu64` lacks for the level, for every accelerator.
const V2_FEATURES: &[&str] = &["cx16", "lahf-lm", "popcnt", "sse4.1", "sse4.2", "ssse3"];
/// Features of the level, and such as every processor of it has. With XSAVE but without XSAVEOPT, Linux 6.1 hangs under
/// QEMU 7.2's TCG.
const V3_FEATURES: &[&str] = &[
    "abm",
    "aes",
    "avx",
    "avx2",
    "bmi1",
    "bmi2",
    "f16c",
    "fma",
    "fsgsbase",
    "movbe",
    "pclmulqdq",
    "rdrand",
    "rdtscp",
    "xsave",
    "xsaveopt",
];
/// What KVM emulates on every host: timers and interrupts that need fewer exits.
const KVM_FEATURES: &[&str] = &["tsc-deadline", "x2apic"];

impl Processor {
    /// The name that recipes and the manifest use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
        }
    }

    /// QEMU's `-cpu`. With `enforce` a host that lacks a feature fails, instead of giving the guest less. `qemu64` has
    /// AMD's virtualisation, which would only load a module in the guest.
    fn model(self, accelerator: Accelerator) -> String {
        let level = match self {
            Self::V2 => [V2_FEATURES, &[]],
            Self::V3 => [V2_FEATURES, V3_FEATURES],
        };
        let more = match accelerator {
            Accelerator::Kvm => KVM_FEATURES,
            Accelerator::Tcg => &[],
        };
        let mut words = vec!["qemu64".to_owned(), "svm=off".to_owned()];
        words.extend(level.into_iter().chain([more]).flatten().map(|feature| format!("{feature}=on")));
        words.push("enforce".to_owned());
        words.join(",")
    }
}

/// What starts the guest's kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// QEMU loads the disk's own kernel itself.
    Direct {
        /// File with the kernel.
        kernel: PathBuf,
        /// File with the initrd.
        initrd: Option<PathBuf>,
        /// The kernel's command line.
        command_line: String,
    },
    /// `SeaBIOS` and the disk's boot loader.
    Bios,
    /// OVMF and the disk's boot loader.
    Uefi {
        /// Read-only firmware code.
        code: PathBuf,
        /// This guest's own copy of the variable store.
        variables: PathBuf,
    },
}

/// How the disk is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskBus {
    /// `virtio-blk`: fast, discards, known to every cloud kernel.
    Virtio,
    /// `NVMe`, as EC2's Nitro shows its volumes.
    Nvme,
}

/// What the guest can reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// No network card at all.
    None,
    /// QEMU's user networking, behind kiln's filter ([`super::filter`]).
    Filtered,
    /// User networking that reaches nothing, with a loopback port of the host forwarded to the guest's port 22.
    Isolated {
        /// Port on the host's 127.0.0.1 for the guest's port 22.
        ssh: Option<u16>,
    },
}

/// A machine to start. Sockets and the console are relative to the folder that QEMU runs in.
#[derive(Debug, Clone)]
pub struct Spec {
    /// How instructions are run.
    pub accelerator: Accelerator,
    /// Virtual processors.
    pub cpus: u32,
    /// Which processor the guest sees.
    pub processor: Processor,
    /// Guest memory.
    pub memory: Size,
    /// What starts the kernel.
    pub boot: Boot,
    /// The qcow2 overlay that the guest writes to.
    pub overlay: PathBuf,
    /// How it is attached.
    pub bus: DiskBus,
    /// Raw read-only drive with the agent's script; with it come the agent's three ports.
    pub agent: Option<PathBuf>,
    /// Raw read-only drive with `NoCloud` data.
    pub seed: Option<PathBuf>,
    /// What the guest can reach.
    pub network: Network,
    /// What the guest's memory holds when it starts.
    pub memory_state: MemoryState,
}

/// What a guest's memory holds when it starts, and whether it can be saved later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryState {
    /// It boots, and is never saved.
    Plain,
    /// It boots in this file, and may be saved.
    Savable(PathBuf),
    /// It waits for a saved guest, whose memory will be in this file.
    Restored(PathBuf),
}

/// The guest network card's address; the agent's scripts know the card by it.
pub const MAC: &str = "52:54:00:6b:69:6c";
/// Names of the sockets that QEMU connects to: kiln listens on them before QEMU starts.
pub const QMP_SOCKET: &str = "qmp";
/// The agent's commands and answers.
pub const CTL_SOCKET: &str = "ctl";
/// Tar streams to the agent.
pub const IN_SOCKET: &str = "in";
/// Output of steps.
pub const OUT_SOCKET: &str = "out";
/// The socket that a restored guest's QEMU listens on for its memory.
pub const MEMORY_SOCKET: &str = "memory-in";
/// QEMU's name for the guest's memory.
const MEMORY: &str = "memory";
/// The name of the block node that the guest's disk is attached to when QEMU starts.
pub const ROOT_NODE: &str = "root";
/// Frames that the guest sent.
pub const FRAMES_FROM_GUEST: &str = "net-from";
/// Frames that the filter lets pass.
pub const FRAMES_TO_NETWORK: &str = "net-to";

struct Arguments(Vec<OsString>);

impl Arguments {
    fn pair(&mut self, option: &str, value: impl Into<OsString>) {
        self.0.push(option.into());
        self.0.push(value.into());
    }

    /// As JSON, so that no file name needs escaping (in option strings a comma would).
    fn json(&mut self, option: &str, value: &Value) {
        self.pair(option, value.to_string());
    }

    fn socket(&mut self, name: &str) {
        self.pair("-chardev", format!("socket,id={name},path={name}"));
    }
}

impl Spec {
    /// QEMU's arguments for this machine.
    #[must_use]
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments = Arguments(Vec::new());
        self.machine(&mut arguments);
        self.memory(&mut arguments);
        self.drives(&mut arguments);
        self.ports(&mut arguments);
        self.network(&mut arguments);
        arguments.0
    }

    /// What a saved memory depends on besides QEMU itself: the arguments without the names of files.
    #[must_use]
    pub fn shape(&self) -> String {
        let nowhere = Path::new("");
        let boot = match &self.boot {
            Boot::Direct { command_line, .. } => {
                Boot::Direct { kernel: nowhere.into(), initrd: None, command_line: command_line.clone() }
            }
            Boot::Bios => Boot::Bios,
            Boot::Uefi { code, .. } => Boot::Uefi { code: code.clone(), variables: nowhere.into() },
        };
        let alike = Self {
            boot,
            overlay: nowhere.into(),
            agent: self.agent.as_ref().map(|_| nowhere.into()),
            seed: self.seed.as_ref().map(|_| nowhere.into()),
            memory_state: MemoryState::Savable(nowhere.into()),
            ..self.clone()
        };
        let words: Vec<_> = alike.arguments().iter().map(|word| word.to_string_lossy().into_owned()).collect();
        words.join("\n")
    }

    /// The sockets that this machine connects to.
    #[must_use]
    pub fn sockets(&self) -> Vec<&'static str> {
        let mut names = vec![QMP_SOCKET];
        if self.agent.is_some() {
            names.extend([CTL_SOCKET, IN_SOCKET, OUT_SOCKET]);
        }
        if self.network == Network::Filtered {
            names.extend([FRAMES_FROM_GUEST, FRAMES_TO_NETWORK]);
        }
        names
    }

    fn machine(&self, arguments: &mut Arguments) {
        for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
            arguments.0.push(flag.into());
        }
        // graphics=off makes SeaBIOS speak on the serial line: the only way to learn that a disk doesn't boot.
        let mut machine = "q35,graphics=off".to_owned();
        if let Boot::Uefi { .. } = self.boot {
            machine.push_str(",pflash0=code,pflash1=variables");
        }
        if self.memory_state != MemoryState::Plain {
            machine.push_str(",memory-backend=");
            machine.push_str(MEMORY);
        }
        arguments.pair("-machine", machine);
        let accelerator = match self.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg,thread=multi",
        };
        arguments.pair("-accel", accelerator);
        arguments.pair("-cpu", self.processor.model(self.accelerator));
        arguments.pair("-smp", self.cpus.to_string());
        arguments.pair("-display", "none");
        arguments.pair("-device", "virtio-rng-pci");
        if let Boot::Direct { kernel, initrd, command_line } = &self.boot {
            arguments.pair("-kernel", kernel);
            if let Some(initrd) = initrd {
                arguments.pair("-initrd", initrd);
            }
            arguments.pair("-append", command_line);
        }
        if self.seed.is_some() {
            // cloud-init takes this as `ds=nocloud`, also where the disk is configured for another datasource.
            arguments.pair("-smbios", "type=1,serial=ds=nocloud");
            if self.accelerator == Accelerator::Tcg {
                // All programs at the same addresses, for speed: see the library's root docs. systemd hands it to
                // systemd-sysctl(8) since version 252 (systemd.system-credentials(7)); nothing of it is on the disk.
                let credential = "io.systemd.credential:sysctl.extra=kernel.randomize_va_space=0";
                arguments.pair("-smbios", format!("type=11,value={credential}"));
            }
        }
    }

    fn memory(&self, arguments: &mut Arguments) {
        arguments.pair("-m", format!("{}M", self.memory.bytes() / MIB));
        let (MemoryState::Savable(file) | MemoryState::Restored(file)) = &self.memory_state else { return };
        let (size, file) = (self.memory.bytes() / MIB * MIB, file.display());
        arguments.pair("-object", format!("memory-backend-file,id={MEMORY},size={size},share=on,mem-path={file}"));
        // Each QEMU has another id: a kernel that sees it change draws new random numbers (Linux 5.18 and newer).
        arguments.pair("-device", "vmgenid,guid=auto");
        // Memory that the guest has given back reads as zeros, and zeros are not saved.
        arguments.pair("-device", "virtio-balloon-pci,free-page-reporting=on");
        if let MemoryState::Restored(_) = self.memory_state {
            arguments.pair("-incoming", "defer");
        }
    }

    fn drives(&self, arguments: &mut Arguments) {
        if let Boot::Uefi { code, variables } = &self.boot {
            raw_drive(arguments, "code", code, true);
            raw_drive(arguments, "variables", variables, false);
        }
        arguments.json(
            "-blockdev",
            &json!({
                "driver": "qcow2", "node-name": ROOT_NODE, "discard": "unmap",
                "file": { "driver": "file", "filename": self.overlay, "discard": "unmap" },
                // The overlay is worth nothing if the host dies, so the host need not be told to sync.
                "cache": { "no-flush": true },
            }),
        );
        // In an overlay a discard and a guest's WRITE ZEROES look the same. Without the latter zeros are written as data,
        // and what reads as a hole was discarded.
        let device = match self.bus {
            DiskBus::Virtio => "virtio-blk-pci,drive=root,serial=kiln-root,discard=on,write-zeroes=off",
            DiskBus::Nvme => "nvme,drive=root,serial=kiln-root",
        };
        // With -kernel QEMU's own loader has this place.
        let order = if matches!(self.boot, Boot::Direct { .. }) { "" } else { ",bootindex=0" };
        arguments.pair("-device", format!("{device}{order}"));
        for (name, file) in [("agent", &self.agent), ("seed", &self.seed)] {
            if let Some(file) = file {
                raw_drive(arguments, name, file, true);
                arguments.pair("-device", format!("virtio-blk-pci,drive={name},serial=kiln-{name}"));
            }
        }
    }

    fn ports(&self, arguments: &mut Arguments) {
        arguments.socket(QMP_SOCKET);
        arguments.pair("-mon", format!("chardev={QMP_SOCKET},mode=control"));
        arguments.pair("-chardev", "stdio,id=console,signal=off");
        arguments.pair("-serial", "chardev:console");
        if self.agent.is_some() {
            arguments.pair("-device", "virtio-serial-pci");
            for name in [CTL_SOCKET, IN_SOCKET, OUT_SOCKET] {
                arguments.socket(name);
                arguments.pair("-device", format!("virtserialport,chardev={name},name=kiln.{name}"));
            }
        }
    }

    fn network(&self, arguments: &mut Arguments) {
        let backend = match &self.network {
            Network::None => return,
            Network::Filtered => "user,id=net,ipv6=off".to_owned(),
            Network::Isolated { ssh } => {
                let forward = ssh.map(|port| format!(",hostfwd=tcp:127.0.0.1:{port}-:22")).unwrap_or_default();
                format!("user,id=net,ipv6=off,restrict=on{forward}")
            }
        };
        arguments.pair("-netdev", backend);
        arguments.pair("-device", format!("virtio-net-pci,netdev=net,mac={MAC},romfile="));
        if self.network == Network::Filtered {
            arguments.socket(FRAMES_FROM_GUEST);
            arguments.socket(FRAMES_TO_NETWORK);
            // `rx` is what the network end receives: the frames that the guest sends. On that queue filters work from
            // the last to the first (netfilter_next in QEMU's net/filter.c), so the way in stands behind the way out.
            let redirect = "filter-redirector,netdev=net,queue=rx";
            arguments.pair("-object", format!("{redirect},id=to-network,indev={FRAMES_TO_NETWORK}"));
            arguments.pair("-object", format!("{redirect},id=from-guest,outdev={FRAMES_FROM_GUEST}"));
        }
    }
}

fn raw_drive(arguments: &mut Arguments, name: &str, file: &Path, read_only: bool) {
    arguments.json(
        "-blockdev",
        &json!({
            "driver": "raw", "node-name": name, "read-only": read_only,
            "file": { "driver": "file", "filename": file },
        }),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_a_list_of_features_that_must_all_be_there() {
        let features = |processor: Processor, accelerator| -> Vec<String> {
            processor.model(accelerator).split(',').map(str::to_owned).collect()
        };
        for accelerator in [Accelerator::Kvm, Accelerator::Tcg] {
            let [v2, v3] = [Processor::V2, Processor::V3].map(|processor| features(processor, accelerator));
            for list in [&v2, &v3] {
                assert_eq!((list[0].as_str(), list[1].as_str()), ("qemu64", "svm=off"));
                assert_eq!(list.last().unwrap(), "enforce");
            }
            assert!(v2.iter().all(|feature| v3.contains(feature)));
            let level = ["avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"];
            assert!(level.iter().all(|feature| v3.contains(&format!("{feature}=on"))), "{v3:?}");
            assert!(v2.contains(&"sse4.2=on".to_owned()) && !v2.contains(&"avx=on".to_owned()), "{v2:?}");
        }
    }
}
