//! Recipe and facts become a plan: what will be done, decided before anything runs. Pure.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::disk::WhyNot;
use crate::error::{Error, Exit};
use crate::recipe::{Arch, Boot, Network, Recipe};
use crate::units::{GIB, Size, hex};

/// The version of what layers hold and of how their keys are made. It is part of every key.
const LAYERS: &str = "3";

/// Which keys a part is in. A step's key has its parent's key, and so depends on all that is in the base's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// The key of the booted base.
    Base,
    /// The key of the state after a step.
    Step,
}

impl KeyKind {
    /// The word that the manual uses.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Step => "step",
        }
    }
}

/// One row for each part: its key, its name, and why it is in the key.
macro_rules! parts {
    (
        $(#[$meta:meta])*
        pub enum $enum:ident<$life:lifetime> {
            $($variant:ident $(($field:ty = $sample:literal))? => $key:ident, $name:literal, $why:literal;)+
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $enum<$life> {
            $(#[doc = $why] $variant $(($field))?),+
        }

        impl $enum<'static> {
            /// All of them, in the manual's order. Variables and files stand there as `NAME`.
            pub const ALL: &'static [Self] = &[$(Self::$variant $(($sample))?),+];
        }

        impl<$life> $enum<$life> {
            /// Which keys it is in.
            #[must_use]
            pub fn key(self) -> KeyKind {
                match self { $(Self::$variant { .. } => KeyKind::$key),+ }
            }

            /// Why it is in the key, in one sentence.
            #[must_use]
            pub fn why(self) -> &'static str {
                match self { $(Self::$variant { .. } => $why),+ }
            }

            /// Its name among [`Parts`]. A file's name is escaped: it need not be UTF-8, and no two become the same.
            #[must_use]
            pub fn name(self) -> Cow<$life, str> {
                let word = match self { $(Self::$variant { .. } => $name),+ };
                match self {
                    Self::Env(name) => format!("{word} {name}").into(),
                    Self::File(name) => format!("{word} {}", name.escape_ascii()).into(),
                    _ => word.into(),
                }
            }
        }
    };
}

parts! {
    /// Something that a layer's content depends on. What is not named here is in no key.
    pub enum Part<'a> {
        Layers => Base, "layers", "The format of layers and of their keys may change with kiln.";
        Guest => Base, "guest", "kiln's own scripts and devices act on the guest: their SHA-256.";
        Base => Base, "base", "The disk begins as the base image: the SHA-256 of its file.";
        Disk => Base, "disk", "The partition table and the root filesystem grow to this size.";
        Arch => Base, "arch", "Another architecture runs other programs.";
        Boot => Base, "boot", "A boot by firmware runs the boot loader and cloud-init, a direct boot doesn't.";
        Network => Base, "network", "The guest has a network card and an address, or neither.";
        Cpus => Base, "cpus", "Programs count the processors and configure themselves by the number.";
        Memory => Base, "memory", "Programs read the size of the memory and configure themselves by it.";
        Processor => Base, "processor", "Compilers and installers look at the processor's instruction sets.";
        Accelerator => Base, "accelerator", "KVM shows the guest the vendor of the host's processor, TCG its own.";
        Parent => Step, "parent", "A step changes what the layer before it holds: the key of that layer.";
        Action => Step, "action", "The kind of the step: a script, a copy, or a provisioner's name.";
        Script => Step, "script", "The script is what runs: its SHA-256.";
        Library => Step, "library", "Provisioners call the functions in kiln's lib.sh: its SHA-256.";
        Env(&'a str = "NAME") => Step, "env", "A script may read any variable that it is given.";
        SourceDateEpoch => Step, "SOURCE_DATE_EPOCH", "Tools write this time into what they make.";
        File(&'a [u8] = b"NAME") => Step, "file", "Each file that a step takes in: its kind, mode, content or link target.";
        From => Step, "from", "A file or folder that is copied as a whole keeps its name.";
        To => Step, "to", "The copy goes to this place.";
        Owner => Step, "owner", "The copied files get this owner.";
        Mode => Step, "mode", "The copied files get these permissions.";
        Follow => Step, "follow", "A link is copied as a link, or as the file that it names.";
        Reboot => Step, "reboot", "The layer holds the guest as it is after a reboot, or without one.";
    }
}

/// The parts of a key by name, each with its value. It reads as a plain map; [`Parts::add`] is the only way in.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
#[serde(transparent)]
pub struct Parts(BTreeMap<String, String>);

impl Parts {
    /// Adds a part. One that is there already gets the new value.
    pub fn add(&mut self, part: Part<'_>, value: impl Into<String>) {
        self.0.insert(part.name().into_owned(), value.into());
    }

    /// The value of a part.
    #[must_use]
    pub fn value(&self, part: Part<'_>) -> Option<&str> {
        self.0.get(part.name().as_ref()).map(String::as_str)
    }
}

impl Deref for Parts {
    type Target = BTreeMap<String, String>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// SHA-256 over named values, in hex. Each name and value follows its length, so that no two maps give the same bytes.
#[must_use]
pub fn digest(parts: &BTreeMap<String, String>) -> String {
    let mut hasher = Sha256::new();
    for text in parts.iter().flat_map(|(name, value)| [name, value]) {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    }
    hex(&hasher.finalize())
}

/// What runs the guest's instructions, as far as the guest can tell.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Acceleration {
    /// `kvm` or `tcg`.
    #[serde(rename = "accelerator")]
    pub name: String,
    /// Under KVM the vendor of the host's processor, for example `GenuineIntel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor: Option<String>,
}

impl fmt::Display for Acceleration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.vendor {
            Some(vendor) => write!(f, "{} {vendor}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// What a plan needs to know of the base and the host. `build` gathers it.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The base's size in bytes.
    pub base_size: u64,
    /// Whether the disk can be booted directly, or why not.
    pub direct: Result<(), WhyNot>,
    /// The base's architecture, where the disk shows it.
    pub base_arch: Option<Arch>,
    /// SHA-256 of the base image.
    pub base_sha256: String,
    /// SHA-256 of kiln's own guest code.
    pub guest_code: &'static str,
    /// What runs the guest's instructions.
    pub acceleration: Acceleration,
    /// What each step depends on, in order.
    pub inputs: Vec<Parts>,
}

/// How the build guest is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootPath {
    /// With the disk's own kernel, given to QEMU.
    Direct,
    /// By firmware and boot loader, for this reason.
    Firmware {
        /// Why, in words.
        reason: String,
    },
}

impl BootPath {
    /// The name that events and the manifest use.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Firmware { .. } => "firmware",
        }
    }
}

/// What will be done.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The disk's size: whole GiB.
    pub disk_size: Size,
    /// How the guest is started.
    pub boot: BootPath,
    /// The states that the guest goes through: first the booted base, then one after each step.
    pub layers: Vec<Layer>,
}

/// A state of the guest that can be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The step's name, or words for the booted base.
    pub name: String,
    /// What it is kept under: the digest of its parts.
    pub key: String,
    /// Everything that its content depends on. Its parent's key is among them.
    pub parts: Parts,
    /// Whether it may be taken from the store and kept there.
    pub cached: bool,
    /// How long it may be taken after it was made; none: for ever. It is not part of the key.
    pub max_age: Option<Duration>,
}

/// How two collections of parts differ, in words: what changed, from what, to what.
#[must_use]
pub fn differences(before: &BTreeMap<String, String>, now: &Parts) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = before.keys().chain(now.keys()).collect();
    let words = |name: &String| match (before.get(name), now.get(name)) {
        (Some(before), Some(now)) if before == now => None,
        (Some(before), Some(now)) => Some(format!("{name}: {} became {}", short(before), short(now))),
        (Some(before), None) => Some(format!("{name} is gone, it was {}", short(before))),
        (None, Some(now)) => Some(format!("{name} is new: {}", short(now))),
        (None, None) => None,
    };
    names.into_iter().filter_map(words).collect()
}

/// Digests by their first digits, and nothing longer than a line.
fn short(value: &str) -> String {
    let is_digest = |word: &str| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let words: Vec<_> = value.split(' ').map(|word| if is_digest(word) { &word[..8] } else { word }).collect();
    let line: String = words.join(" ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match line.char_indices().nth(60) {
        Some((end, _)) => format!("`{}…`", &line[..end]),
        None => format!("`{line}`"),
    }
}

impl Plan {
    /// Decides.
    ///
    /// # Errors
    /// When the recipe asks for what can't be, at its place.
    pub fn new(recipe: &Recipe, facts: &Facts) -> Result<Self, Error> {
        refuse_arch(recipe, facts)?;
        if recipe.machine.network == Network::Locked {
            let error =
                Error::new(Exit::Input, "network = \"locked\" can't be built yet: kiln has no lock for packages");
            return Err(at(recipe, error, recipe.machine.network_span.as_ref())
                .help("use network = \"open\", or network = \"none\" with everything copied in"));
        }
        let (disk_size, boot) = (disk_size(recipe, facts)?, boot_path(recipe, facts)?);
        refuse_root_volume(recipe, disk_size)?;
        let layers = layers(recipe, facts, disk_size, &boot);
        Ok(Self { disk_size, boot, layers })
    }
}

impl Plan {
    /// SHA-256 of the base image.
    #[must_use]
    pub fn base(&self) -> &str {
        self.layers.first().and_then(|layer| layer.parts.value(Part::Base)).unwrap_or_default()
    }
}

/// The keys are a chain: a changed step changes its own key and all that follow.
fn layers(recipe: &Recipe, facts: &Facts, disk_size: Size, boot: &BootPath) -> Vec<Layer> {
    let mut parts = Parts::default();
    parts.add(Part::Layers, LAYERS);
    parts.add(Part::Guest, facts.guest_code);
    parts.add(Part::Base, &facts.base_sha256);
    parts.add(Part::Disk, disk_size.bytes().to_string());
    parts.add(Part::Arch, recipe.base.arch.as_str());
    parts.add(Part::Boot, boot.as_str());
    parts.add(Part::Network, recipe.machine.network.as_str());
    parts.add(Part::Cpus, recipe.machine.cpus.to_string());
    parts.add(Part::Memory, recipe.machine.memory.bytes().to_string());
    parts.add(Part::Processor, recipe.machine.cpu.as_str());
    parts.add(Part::Accelerator, facts.acceleration.to_string());
    let name = "the booted base".to_owned();
    let mut layers = vec![Layer { name, key: digest(&parts), parts, cached: true, max_age: None }];
    for (step, inputs) in recipe.steps.iter().zip(&facts.inputs) {
        let (parent, cached) = layers.last().map(|layer| (layer.key.clone(), layer.cached)).unwrap_or_default();
        let mut parts = inputs.clone();
        parts.add(Part::Parent, parent);
        parts.add(Part::Reboot, step.reboot.to_string());
        // What follows a step that always runs depends on what it did this time.
        let (name, cached) = (step.name.clone(), cached && step.cache);
        layers.push(Layer { name, key: digest(&parts), parts, cached, max_age: step.max_age });
    }
    layers
}

fn at(recipe: &Recipe, error: Error, span: Option<&std::ops::Range<usize>>) -> Error {
    match span {
        Some(span) => error.at(recipe.place(span)),
        None => error,
    }
}

fn refuse_arch(recipe: &Recipe, facts: &Facts) -> Result<(), Error> {
    let base = &recipe.base;
    if base.arch != Arch::X86_64 {
        let error = Error::new(Exit::Host, format!("{} can't be built yet", base.arch));
        return Err(at(recipe, error, base.arch_span.as_ref())
            .help("missing in kiln: machines for qemu-system-aarch64 and AAVMF firmware; x86_64 works"));
    }
    match facts.base_arch {
        Some(found) if found != base.arch => {
            let error =
                Error::new(Exit::Input, format!("the base image is for {found}, and the recipe says {}", base.arch));
            Err(error.at(recipe.place(&base.span)).help(format!("take the {} image of that release", base.arch)))
        }
        _ => Ok(()),
    }
}

fn disk_size(recipe: &Recipe, facts: &Facts) -> Result<Size, Error> {
    let base = Size(facts.base_size);
    let Some(size) = recipe.disk.size else { return Ok(base.ceil_gib()) };
    if size < base {
        let error = Error::new(Exit::Input, format!("the disk's size {size} is smaller than the base's {base}"));
        return Err(at(recipe, error, recipe.disk.span.as_ref())
            .help(format!("use size = \"{}GiB\" or more", base.ceil_gib().bytes() >> 30)));
    }
    Ok(size)
}

/// What EBS would not take of the root volume, now that the disk's size is known.
fn refuse_root_volume(recipe: &Recipe, disk: Size) -> Result<(), Error> {
    let (root, spans) = (&recipe.publish.root, &recipe.publish.root_spans);
    let disk = disk.bytes() / GIB;
    let size = root.size.unwrap_or(disk);
    if size < disk {
        let error = Error::new(Exit::Input, format!("the root volume's {size} GiB are fewer than the disk's {disk}"));
        return Err(at(recipe, error, spans.size.as_ref()).help(format!("use volume_size = \"{disk}GiB\" or more")));
    }
    root.check_root(Some(size)).map_err(|bad| {
        let span = spans.of(bad.setting).or(recipe.disk.span.as_ref());
        at(recipe, Error::new(Exit::Input, bad.refusal.message), span).help(bad.refusal.help)
    })
}

fn boot_path(recipe: &Recipe, facts: &Facts) -> Result<BootPath, Error> {
    match (recipe.machine.boot, &facts.direct) {
        (Boot::Firmware, _) => Ok(BootPath::Firmware { reason: "the recipe asks for it".to_owned() }),
        (Boot::Auto | Boot::Direct, Ok(())) => Ok(BootPath::Direct),
        (Boot::Auto, Err(why)) => Ok(BootPath::Firmware { reason: why.to_string() }),
        (Boot::Direct, Err(why)) => {
            let error = Error::new(Exit::Input, format!("the base can't be booted directly: {why}"));
            Err(error.at(recipe.place(&recipe.base.span)).help("set [machine] boot = \"auto\""))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn recipe(more: &str) -> Recipe {
        let text = format!("name = \"web\"\n[base]\nimage = \"b.qcow2\"\n{more}");
        crate::recipe::parse(Path::new("web.toml"), &text, &[]).unwrap()
    }

    fn parts(values: &[(Part<'_>, &str)]) -> Parts {
        let mut parts = Parts::default();
        for (part, value) in values {
            parts.add(*part, *value);
        }
        parts
    }

    fn acceleration(name: &str, vendor: Option<&str>) -> Acceleration {
        Acceleration { name: name.to_owned(), vendor: vendor.map(str::to_owned) }
    }

    fn facts() -> Facts {
        let inputs = vec![parts(&[(Part::Script, "ab")]); 3];
        let base_sha256 = "cd".repeat(32);
        Facts {
            base_size: 5 * GIB / 2,
            direct: Ok(()),
            base_arch: Some(Arch::X86_64),
            base_sha256,
            guest_code: "",
            acceleration: acceleration("tcg", None),
            inputs,
        }
    }

    #[test]
    fn a_disk_is_whole_gib_and_never_smaller_than_its_base() {
        assert_eq!(Plan::new(&recipe(""), &facts()).unwrap().disk_size, Size(3 * GIB));
        let error = Plan::new(&recipe("[disk]\nsize = \"2GiB\"\n"), &facts()).unwrap_err();
        assert_eq!(error.message, "the disk's size 2 GiB is smaller than the base's 2.5 GiB");
        assert_eq!(error.place.unwrap().line_column(), (5, 8));
        assert_eq!(error.help.unwrap(), "use size = \"3GiB\" or more");
    }

    #[test]
    fn what_cannot_be_booted_directly_boots_by_its_firmware() {
        let facts = Facts { direct: Err(WhyNot::NoSystemd), ..facts() };
        let plan = Plan::new(&recipe(""), &facts).unwrap();
        assert_eq!(plan.boot, BootPath::Firmware { reason: "the disk has no systemd".to_owned() });
        let error = Plan::new(&recipe("[machine]\nboot = \"direct\"\n"), &facts).unwrap_err();
        assert_eq!(error.message, "the base can't be booted directly: the disk has no systemd");
    }

    #[test]
    fn another_architecture_is_refused_with_what_is_missing() {
        let error = Plan::new(&recipe("arch = \"aarch64\"\n"), &facts()).unwrap_err();
        assert_eq!((error.exit, error.message.as_str()), (Exit::Host, "aarch64 can't be built yet"));
        let facts = Facts { base_arch: Some(Arch::Aarch64), ..facts() };
        let error = Plan::new(&recipe(""), &facts).unwrap_err();
        assert_eq!(error.message, "the base image is for aarch64, and the recipe says x86_64");
    }

    #[test]
    fn a_changed_step_changes_its_key_and_those_that_follow() {
        const STEPS: &str =
            "[[provision]]\ninline = \"a\"\n[[provision]]\ninline = \"b\"\n[[provision]]\ninline = \"c\"\n";
        let keys = |recipe: &Recipe, facts: &Facts| -> Vec<String> {
            Plan::new(recipe, facts).unwrap().layers.into_iter().map(|layer| layer.key).collect()
        };
        let first = keys(&recipe(STEPS), &facts());
        assert_eq!(first.len(), 4);
        let same = format!("# a comment\n[machine]\ntimeout = \"5m\"\nmemory = \"1GiB\"\ncpus = 2\n{STEPS}");
        assert_eq!(keys(&recipe(&same), &facts()), first, "defaults, and what only limits the build");
        let mut changed = facts();
        changed.inputs[1].add(Part::Env("A"), "1");
        let second = keys(&recipe(STEPS), &changed);
        assert_eq!(second[..2], first[..2]);
        assert!(second[2] != first[2] && second[3] != first[3]);
    }

    #[test]
    fn what_the_booted_base_depends_on_is_in_every_key() {
        const STEP: &str = "[[provision]]\ninline = \"a\"\n";
        let keys = |recipe: &Recipe, facts: &Facts| -> Vec<String> {
            Plan::new(recipe, facts).unwrap().layers.into_iter().map(|layer| layer.key).collect()
        };
        let first = keys(&recipe(STEP), &facts());
        let differs = |other: Vec<String>, what: &str| {
            assert!(other.iter().zip(&first).all(|(other, first)| other != first), "{what}");
        };
        differs(keys(&recipe(STEP), &Facts { guest_code: "other", ..facts() }), "kiln's guest code");
        differs(keys(&recipe(STEP), &Facts { base_sha256: "ef".repeat(32), ..facts() }), "the base");
        let mut seen = std::collections::BTreeSet::new();
        for vendor in ["GenuineIntel", "AuthenticAMD"] {
            let acceleration = acceleration("kvm", Some(vendor));
            let other = keys(&recipe(STEP), &Facts { acceleration, ..facts() });
            differs(other.clone(), "the accelerator");
            assert!(seen.insert(other), "the vendor");
        }
        for more in [
            "[disk]\nsize = \"4GiB\"",
            "[machine]\nboot = \"firmware\"",
            "[machine]\nnetwork = \"none\"",
            "[machine]\ncpus = 4",
            "[machine]\nmemory = \"2GiB\"",
            "[machine]\ncpu = \"x86-64-v2\"",
        ] {
            differs(keys(&recipe(&format!("{more}\n{STEP}")), &facts()), more);
        }
    }

    #[test]
    fn what_always_runs_is_not_kept_nor_what_follows_it() {
        let steps = "[[provision]]\ninline = \"a\"\n[[provision]]\ninline = \"b\"\ncache = false\n[[provision]]\ninline = \"c\"\n";
        let cached: Vec<_> =
            Plan::new(&recipe(steps), &facts()).unwrap().layers.iter().map(|layer| layer.cached).collect();
        assert_eq!(cached, [true, true, false, false]);
    }

    #[test]
    fn how_long_a_layer_may_be_taken_is_in_no_key() {
        let plan = |more: &str| {
            let steps = format!("[[provision]]\ninline = \"a\"\n{more}[[provision]]\nuses = \"updates\"\n");
            Plan::new(&recipe(&steps), &facts()).unwrap()
        };
        let (without, with) = (plan(""), plan("max_age = \"12h\"\n"));
        let ages = |plan: &Plan| plan.layers.iter().map(|layer| layer.max_age).collect::<Vec<_>>();
        let day = Some(Duration::from_hours(24));
        assert_eq!(ages(&without), [None, None, day]);
        assert_eq!(ages(&with), [None, Some(Duration::from_hours(12)), day]);
        let keys = |plan: &Plan| plan.layers.iter().map(|layer| layer.key.clone()).collect::<Vec<_>>();
        assert_eq!(keys(&without), keys(&with));
    }

    #[test]
    fn differences_are_told_with_before_and_after() {
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        let before = parts(&[(Part::Script, &a), (Part::Env("A"), "1"), (Part::To, "/srv/")]);
        let now = parts(&[(Part::Script, &b), (Part::To, "/srv/"), (Part::File(b"x"), &format!("644 {a}"))]);
        let expected =
            ["env A is gone, it was `1`", "file x is new: `644 aaaaaaaa`", "script: `aaaaaaaa` became `bbbbbbbb`"];
        assert_eq!(differences(&before, &now), expected);
        assert_eq!(differences(&now, &now), [""; 0]);
    }

    #[test]
    fn every_part_has_a_name_of_its_own_and_a_reason() {
        let names: std::collections::BTreeSet<_> = Part::ALL.iter().map(|part| part.name()).collect();
        assert_eq!(names.len(), Part::ALL.len());
        for part in Part::ALL {
            let why = part.why();
            assert!(why.ends_with('.') && !why.contains(['|', '\n']) && why.len() <= 80, "{part:?}: {why}");
        }
    }

    #[test]
    fn a_plan_has_the_parts_of_each_kind_of_key() {
        let recipe = recipe("[[provision]]\ninline = \"a\"\n");
        let every_step_part = Part::ALL.iter().filter(|part| part.key() == KeyKind::Step);
        let inputs = every_step_part.fold(Parts::default(), |mut parts, part| {
            parts.add(*part, "x");
            parts
        });
        let plan = Plan::new(&recipe, &Facts { inputs: vec![inputs], ..facts() }).unwrap();
        for (layer, kind) in plan.layers.iter().zip([KeyKind::Base, KeyKind::Step]) {
            let documented = Part::ALL.iter().filter(|part| part.key() == kind).map(|part| part.name().into_owned());
            let mut documented: Vec<_> = documented.collect();
            documented.sort();
            assert_eq!(layer.parts.keys().cloned().collect::<Vec<_>>(), documented);
        }
    }

    #[test]
    fn a_files_name_may_be_any_bytes() {
        assert_eq!(Part::File(b"a b").name(), "file a b");
        assert_ne!(Part::File(b"\xff").name(), Part::File("\u{fffd}".as_bytes()).name());
        assert_ne!(Part::File(b"\xff").name(), Part::File(b"\\xff").name());
    }
}
