//! What a build must know before it decides, gathered from base, host and inputs; and the plan that follows from it.

use super::inputs::{self, Inputs};
use super::layers::machine_key;
use super::{disk_failure, guest_code, import_base};
use crate::cancel::Cancel;
use crate::disk::{self, Image, Table};
use crate::error::{Error, Exit};
use crate::event::Events;
use crate::plan::{Acceleration, Facts, Plan};
use crate::recipe::{Arch, CpuLevel, Recipe};
use crate::store::{Imported, Store};
use crate::vm::accelerator;
use crate::vm::host::Host;
use crate::vm::spec::{Accelerator, Processor};

/// What a build of a recipe would do on this host.
pub struct Planned {
    /// What it would do.
    pub plan: Plan,
    /// Its base.
    pub base: Imported,
    /// The key of memory states that it could take.
    pub machine: String,
}

/// What a build of `recipe` would do with this accelerator and `SOURCE_DATE_EPOCH`; the base is imported for it.
///
/// # Errors
/// What a build would fail with before it starts anything.
pub fn plan(
    recipe: &Recipe,
    accelerator: Accelerator,
    epoch: Option<u64>,
    host: &Host,
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<Planned, Error> {
    let inputs = inputs::read(recipe, epoch, cancel)?;
    let base = import_base(recipe, host, store, events, cancel)?;
    let (plan, root, _) = make_plan(recipe, &base, &inputs, &acceleration(accelerator))?;
    let machine = machine_key(recipe, &plan, &root, accelerator, host);
    Ok(Planned { plan, base, machine })
}

/// What is to be done, the kernel's `root=`, and the sectors that make the partition table right for the new size.
pub(super) fn make_plan(
    recipe: &Recipe,
    base: &Imported,
    inputs: &[Inputs],
    acceleration: &Acceleration,
) -> Result<(Plan, String, Growth), Error> {
    let at_base = |error: disk::Error| disk_failure(error).at(recipe.place(&recipe.base.span));
    let image = Image::raw(&base.disk).map_err(at_base)?;
    let table = Table::read(&image).map_err(at_base)?;
    let root = table.find_root(&image).map_err(at_base)?;
    let files = match disk::boot_files(&table, &image).map_err(at_base)? {
        Ok(files) => files.check().map_err(at_base)?.map(|()| files),
        why => why,
    };
    let arch = match &files {
        Ok(files) => Some(files.arch),
        Err(_) => table.arch(&image).map_err(at_base)?,
    };
    let facts = Facts {
        base_size: table.size,
        base_arch: arch.map(|arch| match arch {
            disk::Arch::X86_64 => Arch::X86_64,
            disk::Arch::Aarch64 => Arch::Aarch64,
        }),
        base_sha256: base.sha256.clone(),
        guest_code: guest_code(),
        acceleration: acceleration.clone(),
        inputs: inputs.iter().map(|inputs| inputs.parts.clone()).collect(),
        direct: files.as_ref().map(drop).map_err(Clone::clone),
    };
    let kernel_root = files.map_or_else(|_| String::new(), |files| files.root);
    let plan = Plan::new(recipe, &facts)?;
    let size = plan.disk_size.bytes();
    let patches = match root {
        // Also a base that is as large already may have room behind its root: one that qemu-img resized.
        Some(root) if size == table.size => table.grow(size, root.number).unwrap_or_default(),
        None if size == table.size => Vec::new(),
        Some(root) => table.grow(size, root.number).map_err(|error| {
            let error = disk_failure(error);
            let span = recipe.disk.span.as_ref().unwrap_or(&recipe.base.span);
            error.at(recipe.place(span))
        })?,
        None => {
            return Err(Error::new(Exit::Input, "the base has no root partition that kiln could grow")
                .at(recipe.place(&recipe.base.span)));
        }
    };
    Ok((plan, kernel_root, Growth { grows: size != table.size || !patches.is_empty(), patches }))
}

/// What the guest can tell of the accelerator on this host.
pub(super) fn acceleration(accelerator: Accelerator) -> Acceleration {
    let vendor = match accelerator {
        Accelerator::Kvm => Some(accelerator::host_vendor()),
        Accelerator::Tcg => None,
    };
    Acceleration { name: accelerator.as_str().to_owned(), vendor }
}

/// The processor that the recipe asks for.
pub(super) fn processor(recipe: &Recipe) -> Processor {
    match recipe.machine.cpu {
        CpuLevel::V2 => Processor::V2,
        CpuLevel::V3 => Processor::V3,
    }
}

/// How the base's partition table changes.
pub(super) struct Growth {
    pub(super) grows: bool,
    pub(super) patches: Vec<disk::Patch>,
}
