//! Sums on request: `--sha256`, and `--verify`, which reads again what is otherwise known by its size and times.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::manifest::{BLOCKS, DISK, Manifest};
use super::{Artifact, Request, at_base, disk_failure, from_home, output};
use crate::cancel::Cancel;
use crate::disk::{self, Image};
use crate::error::{Error, Exit};
use crate::event::Events;
use crate::recipe::{self, Recipe};
use crate::store::{self, Identity, Store};

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
    if (request.verify || !store.knows_disk(&folder.join(DISK), &manifest.digest))
        && let Some(why) = damage(folder, manifest, Some(store), events, cancel)?
    {
        events.warn(format!("`{}` is not what was built and is built again: {why}", folder.display()));
        return Ok(None);
    }
    if wants_sum(recipe, request) && (manifest.sha256.is_none() || request.verify) {
        return add_sum(artifact, request, events, cancel);
    }
    Ok(Some(artifact))
}

/// Compares the disk of an output folder with its block map, unless this host has built it since it was last started and
/// nobody has changed it, which `store` knows; and waits until the host's disk has it. What is made of the disk carries
/// its digest. Returned is what the disk was when it was looked at.
///
/// # Errors
/// When it is not what was built, or can't be read.
pub fn check_disk(
    folder: &Path,
    manifest: &Manifest,
    store: Option<&Store>,
    events: &Events,
    cancel: &Cancel,
) -> Result<Identity, Error> {
    let disk = folder.join(DISK);
    let shown = disk.display();
    // What could not be written is told to whoever asks first, and reads as something else from then on.
    let opened = File::open(&disk).and_then(|file| file.sync_all().and_then(|()| Identity::of(&file)));
    let before = opened.map_err(|error| {
        Error::new(Exit::Input, format!("cannot rely on `{shown}`: {error}")).help("build it again")
    })?;
    if store.is_some_and(|store| store.knows_disk(&disk, &manifest.digest)) {
        return Ok(before);
    }
    let Some(why) = damage(folder, manifest, store, events, cancel)? else { return Ok(before) };
    Err(Error::new(Exit::Input, format!("`{shown}` is not known to be what was built: {why}")).help("build it again"))
}

/// How the disk differs from its block map, or why that can't be told; none: it doesn't, and that is noted.
fn damage(
    folder: &Path,
    manifest: &Manifest,
    store: Option<&Store>,
    events: &Events,
    cancel: &Cancel,
) -> Result<Option<String>, Error> {
    let outcome = |damage: &Option<String>| match damage {
        None => format!("{DISK} is what was built"),
        Some(_) => format!("{DISK} is damaged"),
    };
    let disk = folder.join(DISK);
    let before = File::open(&disk).and_then(|file| Ok((Identity::of(&file)?, file))).ok();
    let read = || -> Result<Option<String>, Error> {
        let compared = store::pass("verify", events, cancel, |work| {
            store::differences(&disk, &folder.join(BLOCKS), Some(manifest.digest.as_str()), work)
        })?;
        Ok(compared.unwrap_or_else(|error| Some(disk_failure(error).message)))
    };
    let damage = events.phase("verify", format!("reading {} again", disk.display()), outcome, read)?;
    if let (None, Some(store), Some((before, file))) = (&damage, store, before) {
        store.know_read_disk(&file, &before, &manifest.digest);
    }
    Ok(damage)
}

/// Computes the sum of the disk that is there and adds it to its manifest.
///
/// All of it goes through a handle of the folder: if another kiln puts a new one in its place meanwhile, that gets no
/// sum of another disk.
fn add_sum(artifact: Artifact, request: &Request, events: &Events, cancel: &Cancel) -> Result<Option<Artifact>, Error> {
    let Artifact { folder, manifest: seen } = artifact;
    let failed = |error: std::io::Error| Error::io(format!("cannot read `{}`", folder.display()), &error);
    let handle = File::open(&folder).map_err(failed)?;
    let here = PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()));
    let manifest = Manifest::read(&here)?;
    let disk = Arc::new(File::open(here.join(DISK)).map_err(failed)?);
    let before = Identity::of(&disk).map_err(failed)?;
    let image = Image::new(Arc::<File>::clone(&disk), &folder.join(DISK)).map_err(disk_failure)?;
    let sha256 = sum(&image, events, cancel)?;
    if manifest.digest != seen.digest || Identity::of(&disk).map_err(failed)? != before {
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
