//! Recipe and facts become a plan: what will be done, decided before anything runs. Pure.

use crate::disk::{FilesystemKind, WhyNot};
use crate::error::{Error, Exit};
use crate::recipe::{Arch, Boot, Network, Recipe};
use crate::units::Size;

/// What a plan needs to know of the base and the host. `build` gathers it.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The base's size in bytes.
    pub base_size: u64,
    /// Whether the disk can be booted directly, or why not.
    pub direct: Result<(), WhyNot>,
    /// The base's architecture, where the disk shows it.
    pub base_arch: Option<Arch>,
    /// What the root partition holds.
    pub root_filesystem: Option<FilesystemKind>,
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
        Ok(Self { disk_size: disk_size(recipe, facts)?, boot: boot_path(recipe, facts)? })
    }
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
    use crate::units::GIB;
    use std::path::Path;

    fn recipe(more: &str) -> Recipe {
        let text = format!("name = \"web\"\n[base]\nimage = \"b.qcow2\"\n{more}");
        crate::recipe::parse(Path::new("web.toml"), &text, &[]).unwrap()
    }

    fn facts() -> Facts {
        let root_filesystem = Some(FilesystemKind::Ext);
        Facts { base_size: 5 * GIB / 2, direct: Ok(()), base_arch: Some(Arch::X86_64), root_filesystem }
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
}
