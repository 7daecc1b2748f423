//! `kiln plan`.

use std::fmt::Write as _;
use std::path::Path;

use kiln::build;
use kiln::error::Error;
use kiln::recipe::Action;
use serde_json::json;

use super::Context;

/// Says what a build of the recipe would do.
pub(super) fn run(context: &Context<'_>, recipe: &Path, set: &[String]) -> Result<(), Error> {
    let recipe = build::read_recipe(recipe, set)?;
    let (plan, base) = build::plan(&recipe, &context.host()?, &context.store()?, &context.ui.events(), context.cancel)?;
    let kind = |action: &Action| match action {
        Action::File { .. } | Action::Inline { .. } => "run",
        Action::Copy { .. } => "copy",
        Action::Uses { .. } => "uses",
    };
    let steps: Vec<_> = recipe
        .steps
        .iter()
        .map(|step| json!({ "name": step.name, "kind": kind(&step.action), "reboot": step.reboot }))
        .collect();
    let mut text = format!(
        "base    {} ({})\ndisk    {}\nboot    {}\n",
        base.sha256,
        base.format,
        plan.disk_size,
        plan.boot.as_str()
    );
    for (number, step) in (1..).zip(&recipe.steps) {
        let reboot = if step.reboot { ", then reboot" } else { "" };
        let _ = writeln!(text, "step    {number} {} ({}{reboot})", step.name, kind(&step.action));
    }
    let _ = writeln!(text, "seal    {}", if recipe.seal.enabled { "yes" } else { "no" });
    let value = json!({
        "name": recipe.name, "base_sha256": base.sha256, "disk_bytes": plan.disk_size.bytes(),
        "boot": plan.boot.as_str(), "steps": steps, "seal": recipe.seal.enabled,
    });
    context.ui.result(&text, &value);
    Ok(())
}
