//! A shell in the build guest as it is after a step that is kept: as the next step meets it. Where only the disk was kept,
//! and that is not all, the steps since an earlier layer run once more. The guest writes to an overlay that is thrown away.

use std::any::Any;
use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::archive::{Look, Script};
use super::inputs::Inputs;
use super::layers::{Layers, Start, machine_key};
use super::log::Answer;
use super::session::Session;
use super::steps::{self, Logs};
use super::{
    acceleration, begin_at_base, find_host, guest_failure, import_base, inputs, make_plan, now, read_recipe, reboot,
};
use crate::cancel::Cancel;
use crate::error::{Error, Exit};
use crate::event::Events;
use crate::plan::Plan;
use crate::recipe::Recipe;
use crate::store::Store;
use crate::vm;
use crate::vm::Sink;
use crate::vm::accelerator::Wanted;
use crate::vm::guest::{Ended, Guest};
use crate::vm::process::Mirror;

const SHELL: &str = include_str!("guest/shell.sh");
/// Whoever opens a shell decides how long it stays open.
const A_MONTH: Duration = Duration::from_secs(30 * 86_400);
/// What a terminal has that doesn't say.
const USUAL_SIZE: (u16, u16) = (24, 80);

/// Which guest a shell is opened in.
#[derive(Debug, Clone)]
pub struct ShellRequest {
    /// The recipe's file.
    pub recipe: PathBuf,
    /// `--set KEY=VALUE`, in order.
    pub set: Vec<String>,
    /// After which step; none: the last that is kept.
    pub at: Option<String>,
    /// Which accelerator to use.
    pub accelerator: Wanted,
    /// `KILN_QEMU`.
    pub qemu: Option<PathBuf>,
    /// `KILN_QEMU_IMG`.
    pub qemu_img: Option<PathBuf>,
    /// `SOURCE_DATE_EPOCH`.
    pub source_date_epoch: Option<u64>,
}

/// Who comes into the guest.
pub enum Visitor {
    /// A person at a terminal.
    Person {
        /// The terminal's rows and columns.
        size: Option<(u16, u16)>,
        /// What kind of terminal it is, as `TERM` says it.
        terminal: Option<String>,
        /// What the person types.
        keyboard: Box<dyn Read + Send>,
        /// Called before the shell begins; what it returns is dropped after its end.
        at_the_keyboard: Box<dyn FnOnce() -> Box<dyn Any>>,
    },
    /// Commands, run as a step's script is.
    Script(Vec<u8>),
}

/// Lets a visitor into the guest as it is after a step. What the shell or the commands show goes to `mirror`. A person's
/// shell may end with any status.
///
/// # Errors
/// When the state is not kept, the guest fails, or the commands do. Nothing that is kept has changed.
pub fn shell(
    request: &ShellRequest,
    visitor: Visitor,
    mirror: Mirror,
    store: &Store,
    events: &Events,
    cancel: &Cancel,
) -> Result<(), Error> {
    let recipe = read_recipe(&request.recipe, &request.set)?;
    let inputs = inputs::read(&recipe, request.source_date_epoch, cancel)?;
    let programs = (&request.qemu, &request.qemu_img);
    let (host, accelerator) = find_host(request.accelerator, programs, store, events, cancel)?;
    let base = import_base(&recipe, &host, store, events, cancel)?;
    let (plan, root, growth) = make_plan(&recipe, &base, &inputs, &acceleration(accelerator))?;
    let wanted = request.at.as_deref().map(|at| layer_at(at, &plan)).transpose()?;
    let scratch = store.scratch()?;
    let mut session = Session {
        recipe: &recipe,
        plan: &plan,
        root: &root,
        host: &host,
        accelerator,
        scratch: scratch.path(),
        console_log: scratch.path().join("console.log"),
        events,
        cancel,
        boots: 0,
        overlays: 0,
        first_overlay: 0,
        network_up: false,
        keyboard: matches!(visitor, Visitor::Person { .. }),
    };
    let machine = machine_key(&recipe, &plan, &root, accelerator, &host);
    // Held until the end, so that nothing removes what the guest reads.
    let mut layers = Layers::new(store, &session, &base.sha256, machine);
    let index = wanted.or_else(|| layers.deepest());
    let not_kept = || not_kept(wanted, &plan, request);
    let index = index.ok_or_else(not_kept)?;
    let (mut guest, start) = loop {
        let start = layers.visit(index, &session).ok_or_else(not_kept)?;
        let guest = match &start {
            Start::Layer { index, memory } => layers.take_up(*index, memory.as_deref(), &mut session)?,
            Start::Base => Some(begin_at_base(&mut session, &base.sha256, &growth)?),
        };
        if let Some(guest) = guest {
            break (guest, start);
        }
    };
    session.give_network(&mut guest)?;
    let rest = start.done().saturating_sub(1)..index;
    guest = run_steps(rest, &inputs, &mut session, guest, request.source_date_epoch)?;
    let env = environment(&recipe, request.source_date_epoch);
    welcome(visitor, &place_in_words(index, &recipe, &plan), &mut session, guest, env, mirror)
}

/// Runs the steps with these indices, as a build does.
fn run_steps(
    steps: Range<usize>,
    inputs: &[Inputs],
    session: &mut Session<'_>,
    mut guest: Guest,
    epoch: Option<u64>,
) -> Result<Guest, Error> {
    let time = epoch.unwrap_or_else(now);
    let logs = Logs { folder: session.scratch.to_owned(), after_failure: None };
    fs_err::create_dir(logs.folder.join("steps")).map_err(|error| Error::io("cannot write to the cache", &error))?;
    for step in steps {
        steps::run(session, &mut guest, step, &inputs[step], &logs, time)?;
        if session.recipe.steps[step].reboot {
            guest = reboot(session, guest)?;
            session.give_network(&mut guest)?;
        }
    }
    Ok(guest)
}

/// Lets the visitor in. `at` says where the guest stands.
fn welcome(
    visitor: Visitor,
    at: &str,
    session: &mut Session<'_>,
    mut guest: Guest,
    env: BTreeMap<String, String>,
    mirror: Mirror,
) -> Result<(), Error> {
    let events = session.events;
    match visitor {
        Visitor::Script(text) => {
            events.detail(format!("the guest {at}"));
            run_script(session, &mut guest, &text, &env, mirror)
        }
        Visitor::Person { size, terminal, keyboard, at_the_keyboard } => {
            events.note(format!("the guest {at}; nothing that you do is kept; exit or Ctrl-] ends it"));
            let env = on_terminal(env, size, terminal);
            let _seated = at_the_keyboard();
            guest.hand_over(mirror, keyboard);
            let talked = talk(session, &mut guest, &env);
            guest.end();
            talked
        }
    }
}

/// What a step would have, as far as it isn't the step's own.
fn environment(recipe: &Recipe, epoch: Option<u64>) -> BTreeMap<String, String> {
    let mut env = recipe.env.clone();
    env.insert("KILN_NAME".to_owned(), recipe.name.clone());
    env.insert("KILN_STEP".to_owned(), "shell".to_owned());
    inputs::with_facts(env, recipe, epoch)
}

/// With what a person's terminal is like.
fn on_terminal(
    mut env: BTreeMap<String, String>,
    size: Option<(u16, u16)>,
    terminal: Option<String>,
) -> BTreeMap<String, String> {
    let (rows, columns) = size.unwrap_or(USUAL_SIZE);
    env.insert("TERM".to_owned(), terminal.unwrap_or_else(|| "linux".to_owned()));
    env.insert("KILN_ROWS".to_owned(), rows.to_string());
    env.insert("KILN_COLUMNS".to_owned(), columns.to_string());
    env
}

/// The index of the layer after the step with this name or number.
fn layer_at(at: &str, plan: &Plan) -> Result<usize, Error> {
    let named = plan.layers.iter().skip(1).position(|layer| layer.name == at).map(|index| index + 1);
    let base = (at == "base").then_some(0);
    let numbered = at.parse().ok().filter(|number| *number < plan.layers.len());
    named.or(base).or(numbered).ok_or_else(|| {
        Error::new(Exit::Usage, format!("--at: the recipe has no step `{at}`"))
            .help("name a step, or give its number, or 0 for the booted base; `kiln plan` lists them")
    })
}

fn not_kept(wanted: Option<usize>, plan: &Plan, request: &ShellRequest) -> Error {
    let recipe = request.recipe.display();
    let build = format!("run `kiln build {recipe}` first; `kiln plan {recipe}` says what is kept");
    let Some(index) = wanted else {
        return Error::new(Exit::Input, "no state of this recipe's guest is kept").help(build);
    };
    let layer = &plan.layers[index];
    if layer.cached {
        let error = Error::new(Exit::Input, format!("the state after `{}` is not kept", layer.name));
        return error.help(build);
    }
    let message =
        format!("the state after `{}` is never kept: it always runs, or follows a step that does", layer.name);
    Error::new(Exit::Input, message).help("name a step before it with --at, or none for the last that is kept")
}

/// Where the guest stands.
fn place_in_words(index: usize, recipe: &Recipe, plan: &Plan) -> String {
    match index {
        0 => "is the booted base".to_owned(),
        index => format!("is as it was after step {index}/{} `{}`", recipe.steps.len(), plan.layers[index].name),
    }
}

/// Runs commands as a step's script would be, but in root's home.
fn run_script(
    session: &Session<'_>,
    guest: &mut Guest,
    text: &[u8],
    env: &BTreeMap<String, String>,
    output: Mirror,
) -> Result<(), Error> {
    let interpreter = if text.starts_with(b"#!") { "" } else { "sh -eu " };
    let wrapper = format!("script=$PWD/script\ncd /root\nexec {interpreter}\"$script\"\n");
    let script = Script { text: wrapper.as_bytes(), env, files: &[], texts: &[("script", text)] };
    let ended = send(session, guest, &script, Box::new(Shown(output)))?.map_err(guest_failure)?;
    match ended.status {
        0 => Ok(()),
        status @ 129..=192 => Err(format!("were killed by signal {}", status - 128)),
        status => Err(format!("failed with exit code {status}")),
    }
    .map_err(|how| Error::new(Exit::Step, format!("the commands from standard input {how}")))
}

/// Opens the shell on the console, and waits for its end.
fn talk(session: &Session<'_>, guest: &mut Guest, env: &BTreeMap<String, String>) -> Result<(), Error> {
    let said = Arc::new(Mutex::new(Vec::new()));
    let script = Script { text: SHELL.as_bytes(), env, files: &[], texts: &[] };
    match send(session, guest, &script, Box::new(Answer(Arc::clone(&said))))? {
        // The person has switched it off.
        Ok(_) | Err(vm::Error::GuestStopped { .. }) => {}
        Err(error) => return Err(guest_failure(error)),
    }
    // The shell itself prints on the console.
    let said = said.lock().unwrap_or_else(PoisonError::into_inner);
    match String::from_utf8_lossy(&said).lines().rfind(|line| !line.trim().is_empty()) {
        None => Ok(()),
        Some(why) => {
            let message = format!("the shell could not be opened: {}", why.trim_start_matches("kiln: "));
            Err(Error::new(Exit::Input, message)
                .help("commands can be run in it all the same: kiln shell RECIPE <COMMANDS"))
        }
    }
}

fn send(
    session: &Session<'_>,
    guest: &mut Guest,
    script: &Script<'_>,
    sink: Box<dyn Sink>,
) -> Result<Result<Ended, vm::Error>, Error> {
    let folder = guest.fresh_folder();
    let archive = script
        .archive(session.scratch, &folder, &Look::plain(session.cancel))
        .map_err(|error| Error::io("cannot write the guest's drives", &error))?;
    Ok(guest.run("the shell", archive, (&folder, ""), false, sink, A_MONTH))
}

/// Shows what the commands print as it comes.
struct Shown(Mirror);

impl Sink for Shown {
    fn write(&mut self, bytes: &[u8]) {
        (self.0)(bytes);
    }
}
