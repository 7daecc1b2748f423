//! `kiln plan`.

use std::fmt::Write as _;
use std::path::Path;

use kiln::build::{self, Outlook, Planned};
use kiln::cli::Accel;
use kiln::error::Error;
use kiln::recipe::Action;
use serde_json::json;

use super::{Context, Planner};

/// Says what a build of the recipe would do.
pub(super) fn run(context: &Context<'_>, recipe: &Path, set: &[String], accel: Accel) -> Result<(), Error> {
    let recipe = build::read_recipe(recipe, set)?;
    let planner = Planner::new(context, accel)?;
    let Planned { plan, base, machine } = planner.plan(&recipe)?;
    let outlooks = build::outlook(&plan, &planner.store, &machine);
    let kind = |action: &Action| match action {
        Action::File { .. } | Action::Inline { .. } => "run",
        Action::Copy { .. } => "copy",
        Action::Uses { .. } => "uses",
    };
    let steps: Vec<_> = recipe
        .steps
        .iter()
        .zip(&outlooks[1..])
        .map(|(step, outlook)| {
            json!({
                "name": step.name, "kind": kind(&step.action), "reboot": step.reboot,
                "cached": *outlook == Outlook::Kept, "why": reasons(outlook),
            })
        })
        .collect();
    let mut text = format!(
        "base    {} ({})\ndisk    {}\nboot    {}: {}\n",
        base.sha256,
        base.format,
        plan.disk_size,
        plan.boot.as_str(),
        in_words(&outlooks[0], "boots"),
    );
    for ((number, step), outlook) in (1..).zip(&recipe.steps).zip(&outlooks[1..]) {
        let reboot = if step.reboot { ", then reboot" } else { "" };
        let outlook = in_words(outlook, "runs");
        let _ = writeln!(text, "step    {number} {} ({}{reboot}): {outlook}", step.name, kind(&step.action));
    }
    let _ = writeln!(text, "seal    {}", if recipe.seal.enabled { "yes" } else { "no" });
    let value = json!({
        "name": recipe.name, "base_sha256": base.sha256, "disk_bytes": plan.disk_size.bytes(),
        "boot": plan.boot.as_str(), "booted": outlooks[0] == Outlook::Kept, "steps": steps, "seal": recipe.seal.enabled,
    });
    context.ui.result(&text, &value);
    Ok(())
}

fn reasons(outlook: &Outlook) -> &[String] {
    match outlook {
        Outlook::Kept => &[],
        Outlook::Made(reasons) => reasons,
    }
}

fn in_words(outlook: &Outlook, verb: &str) -> String {
    match outlook {
        Outlook::Kept => "kept".to_owned(),
        Outlook::Made(reasons) => format!("{verb}, {}", reasons.join("; ")),
    }
}
