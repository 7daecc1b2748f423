//! Sums on request: `--sha256`, and `--verify`, which reads again what is otherwise known by its size and times.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::manifest::{DISK, Manifest};
use super::{Artifact, Request, at_base, disk_failure, from_home, output};
use crate::cancel::Cancel;
use crate::disk::{self, Image};
use crate::error::{Error, Exit};
use crate::event::Events;
use crate::recipe::{self, Recipe};
use crate::store::{self, DiskState, Store};

/// Reads the base image and the base in the cache again. Steps' own inputs are read whole in every build.
pub(super) fn base(recipe: &Recipe, store: &Store, events: &Events, cancel: &Cancel) -> Result<(), Error> {
    let recipe::Image::Path(path) = &recipe.base.image else { return Ok(()) };
    let verified = store.verify_base(&from_home(path), recipe.base.digest.as_ref(), events, cancel);
    verified.map_err(|error| at_base(recipe, error))
}

/// Whether the manifest shall have the disk's plain SHA-256.
pub(super) fn wants_sum(recipe: &Recipe, request: &Request) -> bool {
    request.sha256 || recipe.disk.sha256
}

/// The plain SHA-256 of a raw disk.
pub(super) fn sum(image: &Image, events: &Events, cancel: &Cancel) -> Result<String, Error> {
    events.phase("sha256", format!("hashing {DISK}"), String::clone, || {
        let sum = store::pass("sha256", events, cancel, |work| disk::sha256(image, work))?;
        Ok(sum.map_err(disk_failure)?.to_string())
    })
}

/// An output that is there already, once it is verified and has its sum, as far as that is asked for; none if it must
/// be built again.
pub(super) fn look_over(
    artifact: Artifact,
    recipe: &Recipe,
    request: &Request,
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<Option<Artifact>, Error> {
    let Artifact { folder, manifest } = &artifact;
    let unsure = store.look_at_disk(&folder.join(DISK), &manifest.digest) != DiskState::Same;
    if request.verify || unsure {
        if let Some(why) = damage(folder, manifest, events, cancel)? {
            events.warn(format!("`{}` is not what was built and is built again: {why}", folder.display()));
            return Ok(None);
        }
        if unsure {
            store.know_disk(&folder.join(DISK), &manifest.digest);
        }
    }
    if wants_sum(recipe, request) && (artifact.manifest.sha256.is_none() || request.verify) {
        return add_sum(artifact, request, store, events, cancel);
    }
    Ok(Some(artifact))
}

/// Compares the disk of an output folder with its block map, unless this host has built it since it was last started and
/// nobody has changed it, which `store` knows: what is made of the disk carries its digest.
///
/// # Errors
/// When it is not what was built, or can't be read.
pub fn check_disk(
    folder: &Path,
    manifest: &Manifest,
    store: Option<&Store>,
    events: &Events,
    cancel: &Cancel,
) -> Result<(), Error> {
    if store.is_some_and(|store| store.look_at_disk(&folder.join(DISK), &manifest.digest) == DiskState::Same) {
        return Ok(());
    }
    let Some(why) = damage(folder, manifest, events, cancel)? else { return Ok(()) };
    Err(Error::new(Exit::Input, format!("the disk of `{}` is not what was built: {why}", folder.display()))
        .help("build it again"))
}

/// How the disk differs from its block map; none: it doesn't.
fn damage(folder: &Path, manifest: &Manifest, events: &Events, cancel: &Cancel) -> Result<Option<String>, Error> {
    let outcome = |damage: &Option<String>| match damage {
        None => format!("{DISK} is what was built"),
        Some(_) => format!("{DISK} is damaged"),
    };
    events.phase("verify", format!("reading {} again", folder.join(DISK).display()), outcome, || {
        let compared = store::pass("verify", events, cancel, |work| {
            let digest = Some(manifest.digest.as_str());
            store::differences(&folder.join(DISK), &folder.join(output::BLOCKS), digest, work)
        })?;
        Ok(compared.unwrap_or_else(|error| Some(disk_failure(error).message)))
    })
}

/// Computes the sum of the disk that is there and adds it to its manifest.
///
/// All of it goes through a handle of the folder: if another kiln puts a new one in its place meanwhile, that gets no
/// sum of another disk.
fn add_sum(
    artifact: Artifact,
    request: &Request,
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<Option<Artifact>, Error> {
    let Artifact { folder, manifest: seen } = artifact;
    let failed = |error: std::io::Error| Error::io(format!("cannot read `{}`", folder.display()), &error);
    let handle = File::open(&folder).map_err(failed)?;
    let here = PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()));
    let manifest = Manifest::read(&here)?;
    let disk = File::open(here.join(DISK)).map_err(failed)?;
    let image = Image::new(Arc::new(disk), &folder.join(DISK)).map_err(disk_failure)?;
    let sha256 = sum(&image, events, cancel)?;
    if store.look_at_disk(&here.join(DISK), &manifest.digest) != DiskState::Same {
        return Ok(None);
    }
    if manifest.sha256.as_ref().is_some_and(|old| *old != sha256) {
        events.warn(format!("the manifest of `{}` had another SHA-256 than its disk", folder.display()));
    }
    let manifest = Manifest { sha256: Some(sha256), ..manifest };
    output::rewrite_manifest(&request.out, &here, &manifest)?;
    let same =
        (&manifest.artifact, &manifest.digest) == (&seen.artifact, &seen.digest) && store::same_file(&folder, &handle);
    Ok(same.then_some(Artifact { folder, manifest }))
}
