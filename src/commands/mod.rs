//! One function for each command: from the command line's types to the library's, and back to a result.

mod account;
mod build;
mod cache;
mod copy;
mod direct;
mod doctor;
mod encryption;
mod help;
mod images;
mod init;
mod object;
mod plan;
mod planned;
mod provisioners;
mod publish;
mod rehearse;
mod retire;
mod share;
mod shell;
mod sweep;
mod table;
mod terminal;
mod texts;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::CommandFactory;
use etcetera::BaseStrategy;

use kiln::build::{Planned, choose_accelerator};
use kiln::cancel::Cancel;
use kiln::cli::{Accel, Cli, Command, Global};
use kiln::error::{Error, Exit};
use kiln::recipe::Recipe;
use kiln::store::Store;
use kiln::ui::Ui;
use kiln::units::parse_duration;
use kiln::vm::accelerator::Wanted;
use kiln::vm::host::Host;
use kiln::vm::spec::Accelerator;

/// Runs the command.
pub(crate) fn run(cli: Cli, ui: Ui, cancel: &Cancel) -> Result<(), Error> {
    let context = Context { global: cli.global, ui, cancel };
    match cli.command {
        Command::Init { dir } => init::run(&context, &dir),
        Command::Build(arguments) => build::run(&context, arguments),
        Command::Plan { recipe, set, accel } => plan::run(&context, &recipe, &set, accel),
        Command::Test { outdir, firmware, timeout, accel } => {
            rehearse::test(&context, &outdir, firmware, &timeout, accel)
        }
        Command::Cache(command) => cache::run(&context, command),
        Command::Run(arguments) => rehearse::run(&context, arguments),
        Command::Shell(arguments) => shell::run(&context, arguments),
        Command::Publish(arguments) => publish::run(&context, arguments),
        Command::Images(arguments) => images::run(&context, &arguments),
        Command::Share(arguments) => share::run(&context, &arguments),
        Command::Copy(arguments) => copy::run(&context, &arguments),
        Command::Retire(arguments) => retire::run(&context, &arguments),
        Command::Sweep(arguments) => sweep::run(&context, &arguments),
        Command::Provisioners => {
            provisioners::run(&context);
            Ok(())
        }
        Command::Help { words } => help::run(&context, &words),
        Command::Doctor => doctor::run(&context),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "kiln", &mut script);
            std::io::stdout().write_all(&script).map_err(|error| Error::io("cannot write to stdout", &error))
        }
    }
}

/// What every command has.
struct Context<'a> {
    global: Global,
    ui: Ui,
    cancel: &'a Cancel,
}

impl Context<'_> {
    fn store(&self) -> Result<Store, Error> {
        Store::open(&self.cache_dir()?)
    }

    fn cache_dir(&self) -> Result<PathBuf, Error> {
        if let Some(folder) = &self.global.cache_dir {
            return Ok(folder.clone());
        }
        let places = etcetera::choose_base_strategy().map_err(|_| {
            Error::new(Exit::Host, "no home folder to keep the cache in")
                .help("set HOME, or name a folder with --cache-dir")
        })?;
        Ok(places.cache_dir().join("kiln"))
    }

    fn host(&self) -> Result<Host, Error> {
        Host::find(path_of("KILN_QEMU"), path_of("KILN_QEMU_IMG"), self.cancel)
    }
}

/// What plans of recipes have in common: the host, and what of it is in every key.
struct Planner<'a> {
    context: &'a Context<'a>,
    store: Store,
    host: Host,
    accelerator: Accelerator,
    epoch: Option<u64>,
}

impl<'a> Planner<'a> {
    fn new(context: &'a Context<'a>, accel: Accel) -> Result<Self, Error> {
        let epoch = source_date_epoch()?;
        let (store, host) = (context.store()?, context.host()?);
        let events = context.ui.events();
        let accelerator = choose_accelerator(wanted(accel), &host, &store, &events, context.cancel)?;
        Ok(Self { context, store, host, accelerator, epoch })
    }

    /// What a build of the recipe would do.
    fn plan(&self, recipe: &Recipe) -> Result<Planned, Error> {
        let events = self.context.ui.events();
        kiln::build::plan(recipe, self.accelerator, self.epoch, &self.host, &self.store, &events, self.context.cancel)
    }
}

/// A path in an environment variable; an empty one counts as unset.
fn path_of(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn wanted(accel: Accel) -> Wanted {
    match accel {
        Accel::Auto => Wanted::Auto,
        Accel::Kvm => Wanted::Kvm,
        Accel::Tcg => Wanted::Tcg,
    }
}

fn duration(option: &str, text: &str) -> Result<Duration, Error> {
    parse_duration(text).map_err(|error| Error::new(Exit::Usage, format!("{option}: {error}")))
}

fn source_date_epoch() -> Result<Option<u64>, Error> {
    let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") else { return Ok(None) };
    text.trim().parse().map(Some).map_err(|_| {
        let message = format!("SOURCE_DATE_EPOCH is `{text}`, which is not a number of seconds since 1970");
        Error::new(Exit::Usage, message)
    })
}
