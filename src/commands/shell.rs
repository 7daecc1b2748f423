//! `kiln shell`.

use std::io::{self, IsTerminal, Read};

use kiln::build::{self, ShellRequest, Visitor};
use kiln::cli::Shell;
use kiln::error::Error;
use kiln::ui::Ui;
use rustix::termios;

use super::terminal::RawTerminal;
use super::{Context, path_of, source_date_epoch, wanted};

/// Opens a shell for whoever is at the terminal, or runs what comes from standard input.
pub(super) fn run(context: &Context<'_>, arguments: Shell) -> Result<(), Error> {
    let request = ShellRequest {
        recipe: arguments.recipe,
        set: arguments.set,
        at: arguments.at,
        accelerator: wanted(arguments.accel),
        qemu: path_of("KILN_QEMU"),
        qemu_img: path_of("KILN_QEMU_IMG"),
        source_date_epoch: source_date_epoch()?,
    };
    let visitor = if io::stdin().is_terminal() {
        let size = termios::tcgetwinsize(io::stdin()).ok();
        Visitor::Person {
            size: size.map(|size| (size.ws_row, size.ws_col)).filter(|(rows, columns)| *rows > 0 && *columns > 0),
            terminal: std::env::var("TERM").ok().filter(|name| !name.is_empty()),
            keyboard: Box::new(io::stdin()),
            at_the_keyboard: Box::new(|| Box::new(RawTerminal::begin())),
        }
    } else {
        let mut text = Vec::new();
        io::stdin().read_to_end(&mut text).map_err(|error| Error::io("cannot read standard input", &error))?;
        Visitor::Script(text)
    };
    build::shell(&request, visitor, Ui::mirror(), &context.store()?, &context.ui.events(), context.cancel)
}
