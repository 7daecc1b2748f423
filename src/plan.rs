//! Recipe and facts become a plan: what will be done, decided before anything runs. Pure.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use crate::disk::WhyNot;
use crate::error::{Error, Exit};
use crate::recipe::{Arch, Boot, Network, Recipe};
use crate::units::{GIB, Size, hex};

/// The version of what layers hold and of how their keys are made. It is part of every key.
const LAYERS: &str = "2";

/// What something depends on: names of parts, and what they are.
pub type Parts = BTreeMap<String, String>;

/// SHA-256 over parts, in hex. Lengths go before names and values, so that no two collections give the same bytes.
#[must_use]
pub fn digest(parts: &Parts) -> String {
    let mut hasher = Sha256::new();
    for text in parts.iter().flat_map(|(name, value)| [name, value]) {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    }
    hex(&hasher.finalize())
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
    /// How long it may be taken.
    pub max_age: Option<std::time::Duration>,
}

/// The part that names the parent's key.
pub const PARENT: &str = "parent";
/// The part of the booted base that names the base image's digest.
const BASE: &str = "base";

/// How two collections of parts differ, in words: what changed, from what, to what.
#[must_use]
pub fn differences(before: &Parts, now: &Parts) -> Vec<String> {
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
        self.layers.first().and_then(|layer| layer.parts.get(BASE)).map_or("", String::as_str)
    }
}

/// The keys are a chain: a changed step changes its own key and all that follow. Names, comments, paths on the host and
/// the order of keys in the recipe are in none of them.
fn layers(recipe: &Recipe, facts: &Facts, disk_size: Size, boot: &BootPath) -> Vec<Layer> {
    let part = |name: &str, value: String| (name.to_owned(), value);
    let parts = Parts::from([
        part("layers", LAYERS.to_owned()),
        part(BASE, facts.base_sha256.clone()),
        part("disk", disk_size.bytes().to_string()),
        part("arch", recipe.base.arch.as_str().to_owned()),
        part("boot", boot.as_str().to_owned()),
        part("network", recipe.machine.network.as_str().to_owned()),
    ]);
    let mut layers =
        vec![Layer { name: "the booted base".to_owned(), key: digest(&parts), parts, cached: true, max_age: None }];
    for (step, inputs) in recipe.steps.iter().zip(&facts.inputs) {
        let (parent, cached) = layers.last().map(|layer| (layer.key.clone(), layer.cached)).unwrap_or_default();
        let mut parts = inputs.clone();
        parts.extend([part(PARENT, parent), part("reboot", step.reboot.to_string())]);
        // What follows a step that always runs depends on what it did this time.
        layers.push(Layer {
            name: step.name.clone(),
            key: digest(&parts),
            parts,
            cached: cached && step.cache,
            max_age: None,
        });
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

    fn facts() -> Facts {
        let inputs = vec![Parts::from([("script".to_owned(), "ab".to_owned())]); 3];
        let base_sha256 = "cd".repeat(32);
        Facts { base_size: 5 * GIB / 2, direct: Ok(()), base_arch: Some(Arch::X86_64), base_sha256, inputs }
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
        let same = format!("description = \"new words\"\n[machine]\ncpus = 4\nmemory = \"2GiB\"\n# words\n{STEPS}");
        assert_eq!(keys(&recipe(&same.replace("description = \"new words\"\n", "")), &facts()), first);
        let mut changed = facts();
        changed.inputs[1].insert("env A".to_owned(), "1".to_owned());
        let second = keys(&recipe(STEPS), &changed);
        assert_eq!(second[..2], first[..2]);
        assert!(second[2] != first[2] && second[3] != first[3]);
        for more in ["[disk]\nsize = \"4GiB\"\n", "[machine]\nboot = \"firmware\"\n"] {
            assert_ne!(keys(&recipe(&format!("{more}{STEPS}")), &facts())[0], first[0], "{more}");
        }
        let closed = keys(&recipe(&format!("[machine]\nnetwork = \"none\"\n{STEPS}")), &facts());
        assert_ne!(closed[0], first[0], "the booted base has its network");
        assert_ne!(closed[1], first[1]);
    }

    #[test]
    fn what_always_runs_is_not_kept_nor_what_follows_it() {
        let steps = "[[provision]]\ninline = \"a\"\n[[provision]]\ninline = \"b\"\ncache = false\n[[provision]]\ninline = \"c\"\n";
        let cached: Vec<_> =
            Plan::new(&recipe(steps), &facts()).unwrap().layers.iter().map(|layer| layer.cached).collect();
        assert_eq!(cached, [true, true, false, false]);
    }

    #[test]
    fn differences_are_told_with_before_and_after() {
        let parts = |pairs: &[(&str, &str)]| -> Parts {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let (a, b) = ("a".repeat(64), "b".repeat(64));
        let before = parts(&[("script", &a), ("env A", "1"), ("to", "/srv/")]);
        let now = parts(&[("script", &b), ("to", "/srv/"), ("file x", &format!("644 {a}"))]);
        let expected =
            ["env A is gone, it was `1`", "file x is new: `644 aaaaaaaa`", "script: `aaaaaaaa` became `bbbbbbbb`"];
        assert_eq!(differences(&before, &now), expected);
        assert_eq!(differences(&now, &now), [""; 0]);
    }
}
