//! A build that has nothing to do, because its output is there.

use std::collections::BTreeMap;

use super::found::counts;
use super::manifest::{DISK, Manifest, PublishFacts, TestFacts};
use super::{Artifact, Fresh, Inputs, Request, acceleration, from_home, guest_code, make_plan, verify};
use crate::cancel::Cancel;
use crate::error::Error;
use crate::event::Events;
use crate::plan::{self, Plan};
use crate::recipe::{self, Recipe};
use crate::store::Store;
use crate::vm::accelerator::Wanted;
use crate::vm::spec::Accelerator;

/// The output of an earlier build, if it is what this build would make: then there is nothing to do.
pub(super) fn finished(
    recipe: &Recipe,
    inputs: &[Inputs],
    publish: &PublishFacts,
    request: &Request,
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<Option<Artifact>, Error> {
    let recipe::Image::Path(path) = &recipe.base.image else { return Ok(None) };
    if request.fresh != Fresh::Nothing {
        return Ok(None);
    }
    let folder = request.out.join(&recipe.name);
    let Ok(manifest) = Manifest::read(&folder) else { return Ok(None) };
    let Some(base) = store.imported(&from_home(path), recipe.base.digest.as_ref(), cancel)? else { return Ok(None) };
    // A probe would start QEMU. Where the user leaves the choice, what made the output is as good as any.
    let acceleration = match request.accelerator {
        Wanted::Auto => manifest.guest.acceleration.clone(),
        Wanted::Kvm => acceleration(Accelerator::Kvm),
        Wanted::Tcg => acceleration(Accelerator::Tcg),
    };
    let (plan, ..) = make_plan(recipe, &base, inputs, &acceleration)?;
    let same = plan.layers.iter().all(|layer| layer.cached)
        && manifest.artifact == artifact_key(recipe, &plan, publish)
        && counts(store, &plan, &manifest.lineage)
        && folder.join(DISK).is_file();
    if !same {
        return Ok(None);
    }
    let artifact = Artifact { folder, manifest };
    let artifact = verify::look_over(artifact, recipe, request, store, events, cancel)?;
    if let Some(artifact) = &artifact {
        events.note(format!("nothing changed since `{}` was built", artifact.folder.display()));
    }
    Ok(artifact)
}

/// What an output folder depends on. Sums of its disk are not among it: they are added to a folder that lacks them.
pub(super) fn artifact_key(recipe: &Recipe, plan: &Plan, publish: &PublishFacts) -> String {
    let part = |name: &str, value: String| (name.to_owned(), value);
    let keep: Vec<_> = recipe.seal.keep.iter().map(|keep| keep.as_str()).collect();
    let tests = serde_json::to_string(&TestFacts::of(recipe)).unwrap_or_default();
    let publish = serde_json::to_string(publish).unwrap_or_default();
    plan::digest(&BTreeMap::from([
        part("layer", plan.layers.last().map(|layer| layer.key.clone()).unwrap_or_default()),
        part("name", recipe.name.clone()),
        part("description", recipe.description.clone()),
        part("seal", format!("{} {}", recipe.seal.enabled, keep.join(" "))),
        part("guest", guest_code().to_owned()),
        part("kiln", env!("CARGO_PKG_VERSION").to_owned()),
        part("tests", tests),
        part("publish", publish),
    ]))
}
