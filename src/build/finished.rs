//! A build that has nothing to do, because its output is there.

use std::collections::BTreeMap;
use std::path::Path;

use super::found::counts;
use super::manifest::{self, DISK, Manifest, PublishFacts, StepFacts, TestFacts};
use super::{Artifact, Fresh, Inputs, Request, acceleration, from_home, guest_code, make_plan, output, verify};
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
    let Ok((manifest, edited)) = Manifest::read_verified(&folder) else { return Ok(None) };
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
    let damage = match edited {
        Some(why) => Some(why.to_owned()),
        None => verify::output_damage(&folder, &manifest, request, store, events, cancel)?,
    };
    if let Some(why) = damage {
        events.warn(format!("`{}` is not what was built and is built again: {why}", folder.display()));
        return Ok(None);
    }
    let inputs = manifest::Inputs::of(recipe, path, &base, &request.set);
    let artifact = up_to_date(Artifact { folder, manifest }, recipe, &inputs, request, events, cancel)?;
    if let Some(artifact) = &artifact {
        events.note(format!("nothing changed since `{}` was built", artifact.folder.display()));
    }
    Ok(artifact)
}

/// The artifact once its manifest says what this build would say, and has the disk's sum if that is asked for; `None` if
/// the folder was replaced or changed meanwhile.
fn up_to_date(
    artifact: Artifact,
    recipe: &Recipe,
    inputs: &manifest::Inputs,
    request: &Request,
    events: &Events,
    cancel: &Cancel,
) -> Result<Option<Artifact>, Error> {
    let Artifact { folder, manifest } = &artifact;
    let needs_sum = verify::wants_sum(recipe, request) && (manifest.sha256.is_none() || request.verify);
    if !needs_sum && (inputs, &steps(manifest, folder, recipe)) == (&manifest.inputs, &manifest.steps) {
        return Ok(Some(artifact));
    }
    let shown = folder.clone();
    output::amend(artifact, &request.out, |folder, manifest| {
        let steps = steps(&manifest, folder, recipe);
        let manifest = Manifest { inputs: inputs.clone(), steps, ..manifest };
        if needs_sum { verify::with_sum(manifest, folder, &shown, events, cancel) } else { Ok(Some(manifest)) }
    })
}

/// The steps of a manifest with the names that the recipe has now, which are in no key. A log keeps the name of its file,
/// and is left out if that is gone.
fn steps(manifest: &Manifest, folder: &Path, recipe: &Recipe) -> Vec<StepFacts> {
    let steps = manifest.steps.iter().cloned().zip(&recipe.steps);
    let renamed = |(facts, step): (StepFacts, &recipe::Step)| {
        let log = Some(facts.log).filter(|log| folder.join(log).is_file()).unwrap_or_default();
        StepFacts { name: step.name.clone(), log, ..facts }
    };
    steps.map(renamed).collect()
}

/// What an output folder depends on. What a manifest says besides must be known to [`up_to_date`], or be of the build that
/// made the disk. Sums of the disk are not among it: they are added to a folder that lacks them.
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
