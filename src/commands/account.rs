//! What the commands about images have in common: the account, its regions, and a question before anything goes.

use std::io::{self, IsTerminal};
use std::time::Duration;

use kiln::cli::InRegions;
use kiln::error::{Error, Exit};
use kiln::publish::life::{self, Account, Manner, Regions, Which};
use kiln::ui::Format;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Context, publish};

/// How long a piece of work may take that is not a copy.
const LIMIT: Duration = Duration::from_mins(30);
/// How often it is looked whether a signal came while a question waits for its answer.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Does `work` with the account in these regions.
pub(super) fn with_account<T>(
    context: &Context<'_>,
    regions: &Regions,
    limit: Option<Duration>,
    work: impl FnOnce(&Account<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let events = context.ui.events();
    let limit = limit.unwrap_or(LIMIT);
    let manner = Manner { events: &events, cancel: context.cancel, poll: publish::poll()?, limit };
    life::with_account(regions, manner, work)
}

/// The image that is meant.
pub(super) fn which(text: &str) -> Which {
    let Ok(which) = text.parse();
    which
}

/// As the command line names them.
pub(super) fn regions(asked: &InRegions) -> Regions {
    match (asked.all_regions, asked.region.as_slice()) {
        (true, _) => Regions::All,
        (false, []) => Regions::Usual,
        (false, these) => Regions::These(these.to_vec()),
    }
}

/// Shows what would go and asks whether it shall.
pub(super) fn confirm(context: &Context<'_>, table: &str, question: &str) -> Result<bool, Error> {
    let nobody = |why: &str| {
        Err(Error::new(Exit::Usage, format!("{why}, and so nobody can be asked"))
            .help("look at it with --dry-run, then run it with --yes"))
    };
    if context.ui.format == Format::Json {
        return nobody("--format json is for programs");
    }
    context.ui.ask(table);
    if !io::stdin().is_terminal() {
        return nobody("standard input is not a terminal");
    }
    context.ui.ask(&format!("{question} [y/N] "));
    loop {
        let input = io::stdin();
        let ready = poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&LOOK));
        if let Err(stopped) = context.cancel.check() {
            context.ui.ask("\n");
            return Err(stopped.into());
        }
        if matches!(ready, Ok(1..)) {
            let mut line = String::new();
            input.read_line(&mut line).map_err(|error| Error::io("cannot read the answer", &error))?;
            return Ok(matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes"));
        }
    }
}
