//! Parses the command line, listens for signals, runs the command, and turns its end into an exit code.

mod commands;

use std::process::ExitCode;

use clap::Parser;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use kiln::cancel::Cancel;
use kiln::cli::{Cli, Format};
use kiln::exec;
use kiln::ui::{self, Ui, Verbosity};

fn main() -> ExitCode {
    if let Some(failed) = exec::become_tethered() {
        return failed;
    }
    let cli = Cli::parse();
    let ui = Ui::new(
        match cli.global.format {
            Format::Human => ui::Format::Human,
            Format::Json => ui::Format::Json,
        },
        match (cli.global.quiet, cli.global.verbose) {
            (true, _) => Verbosity::Quiet,
            (_, true) => Verbosity::Verbose,
            _ => Verbosity::Normal,
        },
        std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
    );
    let cancel = Cancel::default();
    listen(&cancel);
    match commands::run(cli, ui, &cancel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ui.error(&error);
            ExitCode::from(error.exit.code())
        }
    }
}

/// The first signal asks the work to stop and clean up; the second ends kiln at once, and the kernel its children.
fn listen(cancel: &Cancel) {
    // What was ignored when kiln was started stays ignored: `nohup kiln build` survives its terminal.
    let ignored = exec::ignored_signals();
    let heard = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !ignored.contains(signal));
    let Ok(mut signals) = Signals::new(heard) else { return };
    let cancel = cancel.clone();
    std::thread::spawn(move || {
        for signal in &mut signals {
            if cancel.check().is_err() {
                std::process::exit(128 + signal);
            }
            cancel.request(signal);
        }
    });
}
