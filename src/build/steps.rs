//! One step: what goes into the guest for it, and what its end means.

#[cfg(test)]
use std::path::Path;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::archive::{Copy, Look, Script};
use super::inputs::Inputs;
use super::log::{Seen, StepLog};
use super::manifest::StepFacts;
use super::session::Session;
use crate::error::{Error, Exit};
use crate::event::Event;
use crate::recipe::{Action, Network, Recipe, Step};
use crate::vm::guest::{Ended, Guest, Owner};
use crate::{provisioners, units, vm};

/// How long a step may take unless the recipe says otherwise.
const LIMIT: Duration = Duration::from_mins(30);

/// Where steps' logs go.
pub(super) struct Logs {
    /// Where they are written.
    pub(super) folder: PathBuf,
    /// Where they will be found if the build fails; none: they are gone then.
    pub(super) after_failure: Option<PathBuf>,
}

/// Runs step `index` (from 0). What it takes in was changed at `time`, in seconds since 1970.
pub(super) fn run(
    session: &Session<'_>,
    guest: &mut Guest,
    index: usize,
    inputs: &Inputs,
    logs: &Logs,
    time: u64,
) -> Result<StepFacts, Error> {
    let recipe = session.recipe;
    let step = &recipe.steps[index];
    let (number, total) = (index + 1, recipe.steps.len());
    session.events.emit(Event::StepStarted { index: number, total, name: step.name.clone() });
    let log = log_name(index, step);
    let started = Instant::now();
    let io_failed = |error: std::io::Error| Error::io("cannot write the step's log", &error);
    let (sink, seen) = StepLog::open(&logs.folder.join(&log), Some(session.events.clone())).map_err(io_failed)?;
    // A step sees the name of its folder, so that is the same in every build. No two steps have one.
    let folder = format!("step-{}", &session.plan.layers[index + 1].key[..12]);
    let limit = step.timeout.or(recipe.machine.timeout).unwrap_or(LIMIT);
    let result = send(session, guest, (step, &folder), inputs, time, sink, limit)?;
    if let Some(error) = seen.failure() {
        return Err(Error::io("cannot write the step's log", &error));
    }
    judge(recipe, step, result, limit, &seen).map_err(|error| match error.exit {
        Exit::Step | Exit::TimedOut => match &logs.after_failure {
            Some(folder) => error.log(folder.join(&log)),
            None => error,
        },
        _ => error,
    })?;
    let took = started.elapsed();
    session.events.emit(Event::StepDone { index: number, name: step.name.clone(), took });
    Ok(StepFacts {
        name: step.name.clone(),
        sha256: crate::plan::digest(&inputs.parts),
        seconds: took.as_secs_f64(),
        cached: false,
        log,
    })
}

/// Sends what the step takes in, and waits for its end. A script runs in `folder`.
fn send(
    session: &Session<'_>,
    guest: &mut Guest,
    (step, folder): (&Step, &str),
    inputs: &Inputs,
    time: u64,
    sink: Box<StepLog>,
    limit: Duration,
) -> Result<Result<Ended, vm::Error>, Error> {
    let recipe = session.recipe;
    let what = format!("step `{}`", step.name);
    let cannot_send = |error: std::io::Error| {
        if let Err(cancelled) = session.cancel.check() {
            return cancelled.into();
        }
        let failed = Error::io(format!("cannot send what {what} takes in"), &error);
        if failed.help.is_some() {
            return failed;
        }
        let failed = Error { exit: Exit::Input, ..failed };
        failed.at(recipe.place(&step.value_span)).help("build again, and leave alone what the recipe names meanwhile")
    };
    let Inputs { script, files, .. } = inputs;
    let look = Look { owner: None, mode: None, time, cancel: session.cancel };
    match (&step.action, script) {
        (Action::Copy { from, to, contents, owner, mode, .. }, _) => {
            let owner = split_owner(owner.as_deref());
            let look = Look { owner: Some(&owner), mode: *mode, ..look };
            let copy = Copy { name: from, files, to, contents: *contents };
            let (archive, folder) = copy.archive(session.scratch, &look).map_err(cannot_send)?;
            Ok(guest.put(&what, archive, &owner, &folder, sink, limit))
        }
        (_, Some(script)) => {
            let texts: &[(&str, &[u8])] = match &step.action {
                Action::Uses { .. } => &[("lib.sh", provisioners::LIBRARY.as_bytes())],
                _ => &[],
            };
            // Scripts can see this time as well: it is the one in their key.
            let time = script.epoch();
            let script = Script { text: &script.text, env: &script.env, files, texts };
            let look = Look { time, ..look };
            let archive = script.archive(session.scratch, folder, &look).map_err(cannot_send)?;
            Ok(guest.run(&what, archive, (folder, &step.name), script.has_shebang(), sink, limit))
        }
        (_, None) => Err(Error::new(Exit::Bug, format!("{what} has no script"))),
    }
}

/// What the end of a step means for the build.
fn judge(
    recipe: &Recipe,
    step: &Step,
    result: Result<Ended, vm::Error>,
    limit: Duration,
    seen: &Seen,
) -> Result<(), Error> {
    let error = match result {
        Ok(ended) if ended.status == 0 => return Ok(()),
        Ok(ended) => failure(recipe, step, ended, seen),
        Err(vm::Error::TimedOut { .. }) => timed_out(step, limit, seen),
        Err(error) => {
            let stopped = matches!(error, vm::Error::GuestStopped { .. });
            let mut failed = super::guest_failure(error);
            if let Exit::Signal(_) = failed.exit {
                return Err(failed);
            }
            failed.message = format!("step `{}`: {}", step.name, failed.message);
            if stopped {
                failed.help =
                    Some("leave that to kiln: a step with `reboot = true` is followed by a reboot".to_owned());
            }
            failed
        }
    };
    Err(error.at(recipe.place(&step.span)))
}

fn split_owner(owner: Option<&str>) -> Owner {
    let owner = owner.unwrap_or("root");
    let (user, group) = owner.split_once(':').unwrap_or((owner, owner));
    Owner { user: user.to_owned(), group: group.to_owned() }
}

fn kind(step: &Step) -> &'static str {
    match step.action {
        Action::Uses { .. } => "provisioner",
        Action::Copy { .. } => "copy",
        Action::File { .. } | Action::Inline { .. } => "step",
    }
}

fn failure(recipe: &Recipe, step: &Step, ended: Ended, seen: &Seen) -> Error {
    let how = match ended.status {
        status @ 129..=192 => format!("was killed by signal {}", status - 128),
        status => format!("failed with exit code {status}"),
    };
    let mut error = Error::new(Exit::Step, format!("{} `{}` {how}", kind(step), step.name));
    if let Some(line) = seen.last_line() {
        error = error.with_note(format!("last output: {line}"));
    }
    let output = seen.last_lines().join("\n");
    match remedy(recipe, ended, &output) {
        Some(help) => error.help(help),
        None => error,
    }
}

/// What the end of a step's output gives away.
fn remedy(recipe: &Recipe, ended: Ended, output: &str) -> Option<String> {
    let says = |texts: &[&str]| texts.iter().any(|text| output.contains(text));
    if ended.out_of_memory || says(&["Cannot allocate memory", "virtual memory exhausted", "MemoryError"]) {
        let memory = recipe.machine.memory;
        return Some(format!("the guest ran out of memory ({memory}): raise [machine] memory"));
    }
    if ended.free_kib < 4096 || says(&["No space left on device"]) {
        return Some("the guest's disk is full: raise [disk] size".to_owned());
    }
    let no_network =
        ["Temporary failure resolving", "Could not resolve", "Network is unreachable", "Unable to locate package"];
    if recipe.machine.network == Network::None && says(&no_network) {
        return Some("the guest had no network (network = \"none\"): set [machine] network = \"open\", or copy in what is needed".to_owned());
    }
    if says(&["Unable to locate package"]) {
        return Some(
            "check the package's name; on Debian and Ubuntu the step must run `apt-get update` first".to_owned(),
        );
    }
    None
}

fn timed_out(step: &Step, limit: Duration, seen: &Seen) -> Error {
    let limit = units::show_duration(limit);
    let error = Error::new(Exit::TimedOut, format!("{} `{}` did not end within {limit}", kind(step), step.name))
        .help("give the step a longer timeout = \"…\", or find out in its log what it waits for");
    match seen.last_line() {
        Some(line) => error.with_note(format!("last output: {line}")),
        None => error.with_note("it printed nothing"),
    }
}

/// Where the log of step `index` (from 0) is in the output folder.
pub(super) fn log_name(index: usize, step: &Step) -> String {
    format!("steps/{:02}-{}.log", index + 1, slug(&step.name))
}

/// A name as part of a file's name.
fn slug(name: &str) -> String {
    let mut slug = String::new();
    for c in name.chars().flat_map(char::to_lowercase) {
        if c.is_ascii_alphanumeric() {
            slug.push(c);
        } else if !slug.ends_with('-') && !slug.is_empty() {
            slug.push('-');
        }
    }
    slug.truncate(40);
    slug.trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_file_names() {
        assert_eq!(slug("Web server (nginx)!"), "web-server-nginx");
        assert_eq!(slug("../../etc"), "etc");
        assert_eq!(slug("Überblick"), "berblick");
    }

    #[test]
    fn owners_default_to_root_and_groups_to_their_user() {
        let owner = |text| split_owner(text);
        assert_eq!(owner(None), Owner { user: "root".into(), group: "root".into() });
        assert_eq!(owner(Some("web")), Owner { user: "web".into(), group: "web".into() });
        assert_eq!(owner(Some("web:33")), Owner { user: "web".into(), group: "33".into() });
    }

    #[test]
    fn the_end_of_a_step_gives_its_remedy_away() {
        let recipe = crate::recipe::parse(Path::new("r.toml"), "name = \"r\"\n[base]\nimage = \"b\"\n", &[]).unwrap();
        let ended = Ended { status: 1, free_kib: 1 << 20, out_of_memory: false };
        let help = |ended, output| remedy(&recipe, ended, output);
        assert!(help(Ended { out_of_memory: true, ..ended }, "").unwrap().contains("raise [machine] memory"));
        assert!(help(Ended { free_kib: 0, ..ended }, "").unwrap().contains("raise [disk] size"));
        assert!(help(ended, "tar: No space left on device").unwrap().contains("raise [disk] size"));
        assert!(help(ended, "E: Unable to locate package ngnix").unwrap().contains("package's name"));
        assert_eq!(help(ended, "syntax error"), None);
    }
}
