//! A recipe: TOML text becomes a [`Recipe`], with the place of everything that can turn out to be wrong later.
//!
//! Pure: nothing here touches a file, the clock, the environment or a process. Paths are only joined and looked at as
//! text; whether they exist is for `build` to find out.

pub mod aws;
pub mod encryption;
mod grantee;
mod publish;
mod read;
mod reader;
mod release;
mod set;
mod step;
mod template;
#[cfg(test)]
mod tests;
mod tree;
pub mod volume;
mod with;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Place};
use crate::provisioners::Provisioner;
use crate::units::Size;

pub use encryption::Encryption;
pub use grantee::Grantee;
pub use publish::{BootMode, DEFAULT_ROOT_DEVICE, DiskFormat, Imds, Publish, Refusal, Sse, Tpm, Via};
pub use read::parse;
pub use reader::nearest;
pub use release::{Protection, Release, days, parameter};
pub use template::{Meanings, TemplateError, TextPart, name_parts, text_parts};
pub use volume::{Ebs, Volume, VolumeKind, VolumeType};

/// What the user asked for, checked as far as that goes without looking at files.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// The recipe as the user named it.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// The image's name: lowercase letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// What it is for; may be empty.
    pub description: String,
    /// What it starts from.
    pub base: Base,
    /// The build guest.
    pub machine: Machine,
    /// The disk that is built.
    pub disk: Disk,
    /// Environment for every step.
    pub env: BTreeMap<String, String>,
    /// What changes the guest, in order.
    pub steps: Vec<Step>,
    /// What is removed at the end.
    pub seal: Seal,
    /// What is run inside the rehearsed instance.
    pub tests: Vec<TestStep>,
    /// How it is published.
    pub publish: Publish,
    /// What is accepted but should be written otherwise, in the recipe's order.
    pub warnings: Vec<Warning>,
    overrides: Vec<Override>,
}

/// A value that comes from `--set`: whoever points at its place should say so. Values that a table didn't have share
/// the place after its header.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Override {
    span: Range<usize>,
    setting: String,
}

impl Recipe {
    /// A place in this recipe. If the value there comes from `--set`, the mark says so.
    #[must_use]
    pub fn place(&self, span: &Range<usize>) -> Place {
        let mut settings = self.overrides.iter().filter(|over| over.span == *span && *span != (0..0));
        let label = match (settings.next(), settings.next()) {
            (None, _) => String::new(),
            (Some(only), None) => format!("set by `--set {}`", only.setting),
            (Some(_), Some(_)) => "set by `--set`".to_owned(),
        };
        Place { path: self.path.clone(), text: self.text.clone(), span: span.clone(), label }
    }

    /// The folder that the recipe's relative paths start from.
    #[must_use]
    pub fn dir(&self) -> &Path {
        dir_of(&self.path)
    }
}

fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// Something accepted that should be written otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// What is odd: lowercase, no full stop.
    pub message: String,
    /// What to write instead.
    pub help: String,
    /// Where; see [`Recipe::place`].
    pub span: Range<usize>,
}

/// The disk that a build starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Where it comes from.
    pub image: Image,
    /// What its bytes must hash to.
    pub digest: Option<Digest>,
    /// The architecture it is for; `x86_64` when not said.
    pub arch: Arch,
    /// Of the value of `image`.
    pub span: Range<usize>,
    /// Of the value of `sha256` or `sha512`.
    pub digest_span: Option<Range<usize>>,
    /// Of the value of `arch`.
    pub arch_span: Option<Range<usize>>,
}

/// Where a base image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// A file, already joined to the recipe's folder. A leading `~/` is left as it is.
    Path(PathBuf),
    /// An `http://` or `https://` address; the base then has a digest.
    Url(String),
}

/// A digest as the user wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    /// The hash function.
    pub algorithm: Algorithm,
    /// Lowercase hexadecimal of the right length.
    pub hex: String,
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.as_str(), self.hex)
    }
}

/// Gives an enum its spelling in the recipe.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$doc])* $variant),+ }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// As it is written in a recipe.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl crate::recipe::reader::Word for $name {
            const ALL: &[Self] = Self::ALL;
            fn word(self) -> &'static str {
                self.as_str()
            }
        }
    };
}
use words;

words! {
    /// A hash function for a base's digest.
    Algorithm {
        /// SHA-256.
        Sha256 = "sha256",
        /// SHA-512.
        Sha512 = "sha512",
    }
}

words! {
    /// A processor architecture.
    Arch {
        /// 64-bit x86.
        X86_64 = "x86_64",
        /// 64-bit ARM.
        Aarch64 = "aarch64",
    }
}

/// The build guest. It has no influence on the instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Virtual processors, 1 to 64.
    pub cpus: u32,
    /// Memory, whole MiB, 256 MiB or more.
    pub memory: Size,
    /// The processor that the guest sees.
    pub cpu: CpuLevel,
    /// How it is started.
    pub boot: Boot,
    /// What it reaches.
    pub network: Network,
    /// Of the value of `network`.
    pub network_span: Option<Range<usize>>,
    /// How long the guest may take to boot, and a step that doesn't say so itself; none: 10 and 30 minutes.
    pub timeout: Option<Duration>,
}

words! {
    /// A level of the x86-64 psABI: which instruction sets a processor has at least.
    CpuLevel {
        /// Up to SSE4.2.
        V2 = "x86-64-v2",
        /// Up to AVX2, as distributions of the EL10 family need it.
        V3 = "x86-64-v3",
    }
}

words! {
    /// How the build guest is started.
    Boot {
        /// Directly if its filesystem can be read, else through firmware.
        Auto = "auto",
        /// The disk's own kernel is handed to QEMU.
        Direct = "direct",
        /// Firmware and boot loader, as on a real machine.
        Firmware = "firmware",
    }
}

words! {
    /// What the build guest reaches.
    Network {
        /// Nothing.
        None = "none",
        /// Whatever the host reaches.
        Open = "open",
        /// Only what the lock holds.
        Locked = "locked",
    }
}

/// The disk that is built.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Disk {
    /// Whole GiB; none: the base's size, rounded up to whole GiB.
    pub size: Option<Size>,
    /// Of the value of `size`.
    pub span: Option<Range<usize>>,
    /// Whether the manifest shall have the disk's plain SHA-256.
    pub sha256: bool,
}

/// One `[[provision]]`.
#[derive(Debug, Clone)]
pub struct Step {
    /// As the user named it, or what it does in two words.
    pub name: String,
    /// What it does.
    pub action: Action,
    /// Environment for this step only; it wins over the recipe's.
    pub env: BTreeMap<String, String>,
    /// How long it may take; none: as long as the machine's `timeout` says.
    pub timeout: Option<Duration>,
    /// Whether the guest is rebooted after it.
    pub reboot: bool,
    /// Whether a later build may take its result from the store; otherwise it always runs, and so do all after it.
    pub cache: bool,
    /// How long its result may be taken from the store; none: for ever. A step with `cache = false` has none.
    pub max_age: Option<Duration>,
    /// Whether the guest's memory is kept after it; none: where that saves more than it costs.
    pub checkpoint: Option<bool>,
    /// Of the `[[provision]]` header.
    pub span: Range<usize>,
    /// Of the value that says what it does: the script's path, for example.
    pub value_span: Range<usize>,
}

/// What a step does. Paths are as written: relative to [`Recipe::dir`] unless absolute.
#[derive(Debug, Clone)]
pub enum Action {
    /// Runs a script.
    File {
        /// The script.
        path: PathBuf,
        /// Files that lie next to it while it runs, relative to the script's folder; see [`Action::files`].
        files: Vec<PathBuf>,
    },
    /// Runs a script that stands in the recipe.
    Inline {
        /// Its text.
        script: String,
        /// Files that lie in its working directory, relative to the recipe's folder; see [`Action::files`].
        files: Vec<PathBuf>,
    },
    /// Copies a file or a folder into the guest.
    Copy {
        /// The file or folder.
        from: PathBuf,
        /// An absolute path in the guest, as written.
        to: String,
        /// `from` ended in `/`: what is in the folder is copied, not the folder itself.
        contents: bool,
        /// `user` or `user:group`; none: root.
        owner: Option<String>,
        /// Permission bits of the files; none: as they are.
        mode: Option<u32>,
        /// Whether a link that `from` names is followed; otherwise it is copied as a link.
        follow: bool,
    },
    /// Runs a provisioner that kiln brings along.
    Uses {
        /// Which one.
        provisioner: &'static Provisioner,
        /// Its inputs as environment: all of them, defaults included.
        inputs: BTreeMap<String, String>,
    },
}

impl Action {
    /// The extra files of a script: the folder they are relative to (itself relative to [`Recipe::dir`]), and their
    /// paths in that folder, which are their paths in the working directory too. None is absolute or contains `..`.
    #[must_use]
    pub fn files(&self) -> (&Path, &[PathBuf]) {
        match self {
            Self::File { path, files } => (path.parent().unwrap_or(Path::new("")), files),
            Self::Inline { files, .. } => (Path::new(""), files),
            Self::Copy { .. } | Self::Uses { .. } => (Path::new(""), &[]),
        }
    }
}

/// What is removed at the end so that instances don't share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// Whether anything is.
    pub enabled: bool,
    /// What is kept nevertheless; sorted, each once.
    pub keep: Vec<Keep>,
}

words! {
    /// Something that the seal removes unless told to keep it.
    Keep {
        /// Logs and the journal.
        Logs = "logs",
        /// The SSH server's keys.
        HostKeys = "host-keys",
        /// `/etc/machine-id`.
        MachineId = "machine-id",
        /// Shell histories.
        ShellHistory = "shell-history",
        /// Package lists and downloaded packages.
        PackageCache = "package-cache",
        /// DHCP leases.
        Leases = "leases",
        /// `/tmp` and `/var/tmp`.
        Tmp = "tmp",
    }
}

/// One `[[test]]`: a command that must succeed inside the rehearsed instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestStep {
    /// As the user named it, or the command's first line.
    pub name: String,
    /// The command, for `sh`.
    pub run: String,
    /// How long it may take.
    pub timeout: Option<Duration>,
    /// Of the `[[test]]` header.
    pub span: Range<usize>,
    /// Of the value of `run`.
    pub run_span: Range<usize>,
}

/// The one way an error of this module becomes the crate's.
fn input(message: impl Into<String>) -> Error {
    Error::new(crate::error::Exit::Input, message)
}
