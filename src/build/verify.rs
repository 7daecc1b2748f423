//! Sums on request: `--sha256`, and `--verify`, which reads again what is otherwise known by its size and times.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::manifest::{BLOCKS, DISK, Manifest};
use super::{Request, at_base, disk_failure, from_home};
use crate::cancel::Cancel;
use crate::disk::{self, BlockMap, Image};
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

/// Why an output folder is not what was built; `None` if it is. The disk is read only if it is not known to be
/// unchanged, or if the user asks for that.
pub(super) fn output_damage(
    folder: &Path,
    manifest: &Manifest,
    request: &Request,
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<Option<String>, Error> {
    if let Some(why) = map_damage(folder, manifest) {
        return Ok(Some(why));
    }
    if !request.verify && store.knows_disk(&folder.join(DISK), &manifest.digest) {
        return Ok(None);
    }
    damage(folder, manifest, Some(store), events, cancel)
}

/// How the block map in an output folder differs from what the manifest says; `None` if it doesn't. Later commands read
/// it: a publish, and a publish of a later disk by `--parent-blocks`.
fn map_damage(folder: &Path, manifest: &Manifest) -> Option<String> {
    let map = match BlockMap::open(&folder.join(BLOCKS)) {
        Ok(map) => map,
        Err(error) => return Some(disk_failure(error).message),
    };
    let same = map.digest().to_string() == manifest.digest
        // A hole and a block of written zeros have the same digest.
        && (map.size(), map.data_bytes()) == (manifest.size, manifest.data_bytes);
    (!same).then(|| "its block map is another disk's".to_owned())
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

/// The manifest with the sum of the disk, which is in `folder` and shown as in `shown`; `None` if the disk changed
/// meanwhile.
pub(super) fn with_sum(
    manifest: Manifest,
    folder: &Path,
    shown: &Path,
    events: &Events,
    cancel: &Cancel,
) -> Result<Option<Manifest>, Error> {
    let failed = |error: std::io::Error| Error::io(format!("cannot read `{}`", shown.display()), &error);
    let disk = Arc::new(File::open(folder.join(DISK)).map_err(failed)?);
    let before = Identity::of(&disk).map_err(failed)?;
    let image = Image::new(Arc::<File>::clone(&disk), &shown.join(DISK)).map_err(disk_failure)?;
    let sha256 = sum(&image, events, cancel)?;
    if Identity::of(&disk).map_err(failed)? != before {
        return Ok(None);
    }
    if manifest.sha256.as_ref().is_some_and(|old| *old != sha256) {
        events.warn(format!("the manifest of `{}` had another SHA-256 than its disk", shown.display()));
    }
    Ok(Some(Manifest { sha256: Some(sha256), ..manifest }))
}
