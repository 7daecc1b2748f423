//! `kiln cache`: what is kept between builds.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln::build::{self, Planned};
use kiln::cli::{Accel, Cache};
use kiln::error::{Error, Exit};
use kiln::store::{Kind, Limits};
use kiln::units::Size;
use serde_json::json;

use super::{Context, Planner, duration};

/// Lists or removes.
pub(super) fn run(context: &Context<'_>, command: Cache) -> Result<(), Error> {
    match command {
        Cache::List => {
            list(context)?;
        }
        Cache::Gc { keep, older } => gc(context, keep.as_deref(), older.as_deref())?,
        Cache::Export { recipes, out, set, accel } => export(context, &recipes, &out, &set, accel)?,
        Cache::Import { file } => import(context, &file)?,
    }
    Ok(())
}

fn list(context: &Context<'_>) -> Result<(), Error> {
    let entries = context.store()?.entries();
    let mut text = format!("{:>10}  {:>8}  {:>8}  {:>4}  {:16}  WHAT\n", "SIZE", "MADE", "USED", "DEPS", "KEY");
    for entry in &entries {
        let kind = if entry.kind == Kind::Base { "" } else { "layer " };
        let _ = writeln!(
            text,
            "{:>10}  {:>8}  {:>8}  {:>4}  {:16}  {kind}{}",
            Size(entry.bytes).to_string(),
            ago(entry.age),
            ago(entry.unused),
            entry.dependents,
            &entry.key[..entry.key.len().min(16)],
            entry.name,
        );
    }
    let bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
    let _ = write!(text, "{} in {} entries", Size(bytes), entries.len());
    context.ui.result(&text, &json!(entries));
    Ok(())
}

pub(super) fn ago(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

fn gc(context: &Context<'_>, keep: Option<&str>, older: Option<&str>) -> Result<(), Error> {
    let store = context.store()?;
    let wrong = |error| Error::new(Exit::Usage, format!("--keep: {error}"));
    let keep = keep.map(|text| text.parse::<Size>().map_err(wrong));
    let older: Option<Duration> = older.map(|text| duration("--older", text)).transpose()?;
    let keep = keep.transpose()?.map(Size::bytes);
    let limits = if keep.is_none() && older.is_none() { store.default_limits() } else { Limits { keep, older } };
    let removed = store.collect(limits)?;
    let bytes: u64 = removed.iter().map(|entry| entry.bytes).sum();
    let text = format!("removed {} entries, {}", removed.len(), Size(bytes));
    context.ui.result(&text, &json!(removed));
    Ok(())
}

fn export(context: &Context<'_>, recipes: &[PathBuf], out: &Path, set: &[String], accel: Accel) -> Result<(), Error> {
    let planner = Planner::new(context, accel)?;
    let (mut bases, mut layers) = (Vec::new(), Vec::new());
    for path in recipes {
        let recipe = build::read_recipe(path, set)?;
        let Planned { plan, base, .. } = planner.plan(&recipe)?;
        bases.push(base);
        layers.extend(build::kept(&plan, &planner.store));
    }
    let done = planner.store.export(&bases, layers, out, context.cancel)?;
    let text = format!("{}: {} bases, {} layers, {}", out.display(), done.bases, done.layers, Size(done.bytes));
    context.ui.result(&text, &json!({ "file": out, "content": done }));
    Ok(())
}

fn import(context: &Context<'_>, file: &Path) -> Result<(), Error> {
    let done = context.store()?.import(file, context.cancel)?;
    let text = format!("{} bases, {} layers, {} of them known already", done.bases, done.layers, done.known);
    context.ui.result(&text, &json!({ "file": file, "content": done }));
    Ok(())
}
