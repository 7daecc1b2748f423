//! Many recipes, side by side. What they have in common is made once: whoever comes first makes a layer, the others
//! wait for it, without a turn, and go on from it.
//!
//! All recipes are read and planned before anything is built, so that a mistake in the last one is not found out after
//! an hour, and so that it is known which layers several builds go on from: those get the guest's memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::inputs::{self, Inputs};
use super::turns::{Turn, Turns};
use super::{
    Artifact, Request, acceleration, build_recipe, find_host, fresh_from, import_base, make_plan, read_recipe, tidy,
    warn,
};
use crate::cancel::Cancel;
use crate::error::{Error, Exit};
use crate::event::Events;
use crate::plan::Plan;
use crate::recipe::Recipe;
use crate::store::Store;
use crate::units::MIB;
use crate::vm::host::Host;
use crate::vm::spec::Accelerator;

/// What QEMU takes beside its guest's memory.
const QEMU: u64 = 256 * MIB;
/// What stops the other builds with `--fail-fast`.
const SIGTERM: i32 = 15;

/// What a build has of those beside it.
pub(super) struct Beside<'a> {
    pub(super) host: &'a Host,
    pub(super) accelerator: Accelerator,
    pub(super) turn: Turn<'a>,
    parted: &'a BTreeSet<String>,
}

impl Beside<'_> {
    /// Whether other builds go on from the layer with this key.
    pub(super) fn go_on_from(&self, key: &str) -> bool {
        self.parted.contains(key)
    }
}

/// How the builds are run.
pub struct How<'a> {
    /// How many work at once; none: as many as the host has processors and memory for.
    pub jobs: Option<usize>,
    /// Whether the first failure stops the others.
    pub fail_fast: bool,
    /// Where the events of the build with this name go.
    pub events: &'a (dyn Fn(&str) -> Events + Sync),
    /// Called when a build has failed, with its name.
    pub failed: &'a (dyn Fn(&str, &Error) + Sync),
}

/// What came of one recipe.
#[derive(Debug)]
pub struct Built {
    /// The recipe's name.
    pub name: String,
    /// How long it took, waiting included.
    pub took: Duration,
    /// The output folder, or what went wrong.
    pub outcome: Outcome,
}

/// See [`Built`].
#[derive(Debug)]
pub enum Outcome {
    /// It was built.
    Done(Box<Artifact>),
    /// It failed.
    Failed(Error),
    /// It was stopped, or not begun, because another failed.
    Cancelled(Error),
}

impl Built {
    /// What kept it from being built.
    #[must_use]
    pub fn error(&self) -> Option<&Error> {
        match &self.outcome {
            Outcome::Done(_) => None,
            Outcome::Failed(error) | Outcome::Cancelled(error) => Some(error),
        }
    }
}

/// The recipes in a folder: every `*.toml` directly in it, in the order of their names.
///
/// # Errors
/// When there is none, or the folder can't be read.
pub fn recipes_in(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let shown = folder.display();
    let unreadable =
        |error: std::io::Error| Error::new(Exit::Input, format!("cannot read the folder `{shown}`: {error}"));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|extension| extension == "toml") && path.is_file() {
            found.push(path);
        }
    }
    if found.is_empty() {
        return Err(Error::new(Exit::Input, format!("the folder `{shown}` has no recipe in it"))
            .help("recipes are the *.toml directly in it; `kiln init` writes one to start from"));
    }
    found.sort();
    Ok(found)
}

/// A recipe that can be built.
struct Job {
    request: Request,
    recipe: Recipe,
    inputs: Vec<Inputs>,
    /// The keys of the layers that can be kept.
    keys: Vec<String>,
}

/// Recipes that can be built.
pub struct Ready {
    jobs: Vec<Job>,
    host: Host,
    accelerator: Accelerator,
    parted: BTreeSet<String>,
}

/// Reads and plans every recipe. Nothing is built if any is wrong.
///
/// # Errors
/// What is wrong, in the order of the recipes; or the one thing that all fail with.
pub fn prepare(requests: Vec<Request>, store: &Store, events: &Events, cancel: &Cancel) -> Result<Ready, Vec<Error>> {
    let read = |request: Request| {
        let recipe = read_recipe(&request.recipe, &request.set)?;
        let inputs = inputs::read(&recipe, request.source_date_epoch, cancel)?;
        Ok((request, recipe, inputs))
    };
    let recipes = all(requests.into_iter().map(read))?;
    refuse_same_names(&recipes)?;
    let Some((first, ..)) = recipes.first() else { return Err(vec![Error::new(Exit::Usage, "no recipe to build")]) };
    let (host, accelerator) = find_host(first.accelerator, (&first.qemu, &first.qemu_img), store, events, cancel)
        .map_err(|error| vec![error])?;
    let plan = |(request, recipe, inputs): (Request, Recipe, Vec<Inputs>)| {
        let base = import_base(&recipe, &host, store, events, cancel)?;
        let (plan, ..) = make_plan(&recipe, &base, &inputs, &acceleration(accelerator))?;
        fresh_from(&request.fresh, &plan)?;
        Ok(Job { request, recipe, inputs, keys: keys(&plan) })
    };
    let jobs = all(recipes.into_iter().map(plan))?;
    let parted = parted(jobs.iter().map(|job| job.keys.as_slice()));
    Ok(Ready { jobs, host, accelerator, parted })
}

/// All values, or all errors; a stop is the only one.
fn all<T>(results: impl Iterator<Item = Result<T, Error>>) -> Result<Vec<T>, Vec<Error>> {
    let (mut values, mut errors) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(error) if matches!(error.exit, Exit::Signal(_)) => return Err(vec![error]),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(values) } else { Err(errors) }
}

fn refuse_same_names(recipes: &[(Request, Recipe, Vec<Inputs>)]) -> Result<(), Vec<Error>> {
    let mut names: BTreeMap<&str, &Path> = BTreeMap::new();
    let mut errors = Vec::new();
    for (request, recipe, _) in recipes {
        if let Some(other) = names.insert(&recipe.name, &request.recipe) {
            let (one, two) = (other.display(), request.recipe.display());
            let folder = request.out.join(&recipe.name);
            let message =
                format!("`{one}` and `{two}` have the same name: both would be built into `{}`", folder.display());
            errors.push(Error::new(Exit::Input, message).help("give each recipe a name of its own"));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn keys(plan: &Plan) -> Vec<String> {
    plan.layers.iter().take_while(|layer| layer.cached).map(|layer| layer.key.clone()).collect()
}

/// The last layers that builds have in common: at least two have them, and not all of those have the next.
fn parted<'a>(builds: impl Iterator<Item = &'a [String]>) -> BTreeSet<String> {
    let builds: Vec<_> = builds.collect();
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for key in builds.iter().copied().flatten() {
        *count.entry(key).or_default() += 1;
    }
    let parts = |build: &&'a [String], index: usize| {
        let next = build.get(index + 1).map_or(0, |next| count[next.as_str()]);
        let here = count[build[index].as_str()];
        here > 1 && next < here
    };
    let ends = builds.iter().flat_map(|build| (0..build.len()).filter(|i| parts(build, *i)).map(|i| build[i].clone()));
    ends.collect()
}

impl Ready {
    /// Builds them all. What came of each, in the order of the recipes.
    #[must_use]
    pub fn run(&self, how: &How<'_>, store: &Store, cancel: &Cancel) -> Vec<Built> {
        let jobs = how.jobs.unwrap_or_else(|| self.default_jobs());
        let turns = Turns::new(jobs, self.jobs.len());
        // What stops kiln stops the group as well.
        let (inner, _subscription) = cancel.within();
        let group = Group { cancel: inner, fail_fast: how.fail_fast, first: Mutex::new(None) };
        let built = std::thread::scope(|scope| {
            let build = |(number, job)| {
                let turn = turns.of(number);
                let group = &group;
                scope.spawn(move || self.build(job, turn, group, how, store))
            };
            let threads: Vec<_> = self.jobs.iter().enumerate().map(build).collect();
            let ends = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
            ends.map(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        tidy(store, &Events::none());
        built
    }

    fn build(&self, job: &Job, turn: Turn<'_>, group: &Group, how: &How<'_>, store: &Store) -> Built {
        let name = job.recipe.name.clone();
        let (started, events) = (Instant::now(), (how.events)(&name));
        warn(&job.recipe, &events);
        let beside = Beside { host: &self.host, accelerator: self.accelerator, turn, parted: &self.parted };
        let result = build_recipe(&job.recipe, &job.inputs, &job.request, Some(beside), store, &events, &group.cancel);
        let outcome = match result {
            Ok(artifact) => {
                events.note(format!("built `{}`", artifact.folder.display()));
                Outcome::Done(Box::new(artifact))
            }
            Err(error) => group.failed(&name, error),
        };
        drop(events);
        if let Outcome::Failed(error) = &outcome
            && !matches!(error.exit, Exit::Signal(_))
        {
            (how.failed)(&name, error);
        }
        Built { name, took: started.elapsed(), outcome }
    }

    fn default_jobs(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let memory = self.jobs.iter().map(|job| job.recipe.machine.memory.bytes()).max().unwrap_or(0);
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        default_jobs(self.jobs.len(), cores, available(&meminfo), memory)
    }
}

/// What stops the builds together.
struct Group {
    cancel: Cancel,
    fail_fast: bool,
    /// The name of the build that failed first, and how kiln ends because of it.
    first: Mutex<Option<(String, Exit)>>,
}

impl Group {
    fn failed(&self, name: &str, error: Error) -> Outcome {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*first, error.exit) {
            (Some((other, exit)), Exit::Signal(_)) if self.fail_fast => {
                Outcome::Cancelled(Error::new(*exit, format!("cancelled, because `{other}` failed")))
            }
            (None, exit) if self.fail_fast && !matches!(exit, Exit::Signal(_)) => {
                *first = Some((name.to_owned(), exit));
                self.cancel.request(SIGTERM);
                Outcome::Failed(error)
            }
            _ => Outcome::Failed(error),
        }
    }
}

/// As many as there are processors, and no more than there is memory for. A guest has two, but a build that takes up where
/// the common steps end uses little more than one: ten of those take 0.86 of the time with two at once instead of one.
fn default_jobs(recipes: usize, cores: usize, available: Option<u64>, memory: u64) -> usize {
    let fit = available.map_or(usize::MAX, |bytes| usize::try_from(bytes / (memory + QEMU)).unwrap_or(usize::MAX));
    recipes.min(cores).min(fit).max(1)
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GIB;

    #[test]
    fn as_many_as_the_host_has_room_for() {
        assert_eq!(default_jobs(10, 8, Some(64 * GIB), GIB), 8);
        assert_eq!(default_jobs(3, 8, Some(64 * GIB), GIB), 3);
        assert_eq!(default_jobs(10, 8, Some(3 * GIB), GIB), 2);
        assert_eq!(default_jobs(10, 8, Some(0), GIB), 1);
        assert_eq!(default_jobs(10, 1, None, GIB), 1);
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:   2048 kB\n"), Some(2 * MIB));
        assert_eq!(available("MemTotal:  9 kB\n"), None);
    }

    #[test]
    fn a_memory_state_is_kept_where_builds_part() {
        let build = |keys: &str| keys.chars().map(String::from).collect::<Vec<_>>();
        let parts = |builds: &[&str]| {
            let builds: Vec<_> = builds.iter().map(|keys| build(keys)).collect();
            parted(builds.iter().map(Vec::as_slice)).into_iter().collect::<String>()
        };
        assert_eq!(parts(&["abc", "abd", "abe"]), "b");
        assert_eq!(parts(&["abc", "abd", "axe"]), "ab");
        assert_eq!(parts(&["abc", "abc"]), "c", "the others only seal");
        assert_eq!(parts(&["ab", "abc"]), "b");
        assert_eq!(parts(&["abc", "xyz"]), "");
    }
}
