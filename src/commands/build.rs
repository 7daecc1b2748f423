//! `kiln build`.

use std::fmt::Write as _;
use std::path::PathBuf;

use kiln::build::many::{self, Built, How, Outcome};
use kiln::build::{self, Fresh, Request};
use kiln::cli::Build;
use kiln::error::{Error, Exit};
use kiln::ui::error_value;
use serde_json::{Value, json};

use super::{Context, path_of, source_date_epoch, wanted};

/// Builds one recipe, or several side by side.
pub(super) fn run(context: &Context<'_>, arguments: Build) -> Result<(), Error> {
    let source_date_epoch = source_date_epoch()?;
    let how = (arguments.jobs.map(usize::from), arguments.fail_fast);
    let request = |recipe: PathBuf| Request {
        recipe,
        set: arguments.set.clone(),
        out: arguments.out.clone(),
        accelerator: wanted(arguments.accel),
        qemu: path_of("KILN_QEMU"),
        qemu_img: path_of("KILN_QEMU_IMG"),
        source_date_epoch,
        keep_on_error: arguments.keep_on_error,
        fresh: match &arguments.no_cache {
            None => Fresh::Nothing,
            Some(None) => Fresh::All,
            Some(Some(step)) => Fresh::From(step.clone()),
        },
        sha256: arguments.sha256,
        verify: arguments.verify,
    };
    match arguments.recipes.as_slice() {
        [recipe] if !recipe.is_dir() => one(context, &request(recipe.clone())),
        recipes => {
            let mut requests = Vec::new();
            for named in recipes {
                let found = if named.is_dir() { many::recipes_in(named)? } else { vec![named.clone()] };
                requests.extend(found.into_iter().map(request));
            }
            several(context, requests, how)
        }
    }
}

fn one(context: &Context<'_>, request: &Request) -> Result<(), Error> {
    let artifact = build::build(request, &context.store()?, &context.ui.events(), context.cancel)?;
    let json = json!({ "folder": artifact.folder, "manifest": artifact.manifest });
    context.ui.result(&artifact.folder.display().to_string(), &json);
    Ok(())
}

fn several(
    context: &Context<'_>,
    requests: Vec<Request>,
    (jobs, fail_fast): (Option<usize>, bool),
) -> Result<(), Error> {
    let (store, ui, recipes) = (context.store()?, context.ui, requests.len());
    // These events end before the builds begin, whose live lines are on a board of their own.
    let prepared = many::prepare(requests, &store, &ui.events(), context.cancel);
    let ready = prepared.map_err(|errors| refused(context, errors, recipes))?;
    let board = ui.board("recipe");
    let how =
        How { jobs, fail_fast, events: &|name| board.events(name), failed: &|name, error| board.error(name, error) };
    let built = ready.run(&how, &store, context.cancel);
    ui.summary(&table(&built));
    let folders = built.iter().filter_map(|built| match &built.outcome {
        Outcome::Done(artifact) => Some(format!("{}\n", artifact.folder.display())),
        Outcome::Failed(_) | Outcome::Cancelled(_) => None,
    });
    ui.result(&folders.collect::<String>(), &json!({ "builds": built.iter().map(entry).collect::<Vec<_>>() }));
    context.cancel.check()?;
    let exit = built.iter().find_map(|built| match &built.outcome {
        Outcome::Failed(error) => Some(error.exit),
        Outcome::Done(_) | Outcome::Cancelled(_) => None,
    });
    let missing = built.iter().filter(|built| built.error().is_some()).count();
    match exit {
        Some(exit) => Err(Error::new(exit, format!("{missing} of {recipes} recipes were not built"))),
        None => Ok(()),
    }
}

/// What ends kiln: the one mistake, or how many there are, once all are shown.
fn refused(context: &Context<'_>, mut errors: Vec<Error>, recipes: usize) -> Error {
    if errors.len() == 1 {
        return errors.remove(0);
    }
    for error in &errors {
        context.ui.error(error);
    }
    let exit = errors.first().map_or(Exit::Bug, |error| error.exit);
    Error::new(exit, format!("{} mistakes in {recipes} recipes: nothing was built", errors.len()))
}

fn entry(built: &Built) -> Value {
    match &built.outcome {
        Outcome::Done(artifact) => {
            json!({ "recipe": built.name, "folder": artifact.folder, "manifest": artifact.manifest })
        }
        Outcome::Failed(error) => json!({ "recipe": built.name, "error": error_value(error) }),
        Outcome::Cancelled(error) => {
            json!({ "recipe": built.name, "error": error_value(error), "cancelled": true })
        }
    }
}

/// Name, outcome, seconds, and the folder or what went wrong; a line for each.
fn table(built: &[Built]) -> String {
    let width = built.iter().map(|built| built.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for built in built {
        let (outcome, more) = match &built.outcome {
            Outcome::Done(artifact) => ("built", artifact.folder.display().to_string()),
            Outcome::Failed(error) => ("failed", first_line(error)),
            Outcome::Cancelled(error) => ("cancelled", first_line(error)),
        };
        let _ = writeln!(text, "{:width$}  {outcome:9}  {:7.1} s  {more}", built.name, built.took.as_secs_f64());
    }
    text
}

fn first_line(error: &Error) -> String {
    error.message.lines().next().unwrap_or_default().to_owned()
}
