//! `kiln help`.

use clap::CommandFactory;
use kiln::cli::Cli;
use kiln::error::{Error, Exit};
use kiln::manual::{self, TOPICS};
use kiln::recipe::nearest;
use serde_json::json;

use super::Context;

/// Shows a topic of the manual, the help of a command, or what there is of both.
pub(super) fn run(context: &Context<'_>, words: &[String]) -> Result<(), Error> {
    let topic = match words {
        [word] => manual::find(word),
        _ => None,
    };
    let text = match topic {
        Some(topic) if Cli::command().find_subcommand(topic.name).is_some() => {
            format!("{}\nThe commands: kiln {} --help\n", topic.text, topic.name)
        }
        Some(topic) => topic.text.to_owned(),
        None => of_command(words)?,
    };
    context.ui.result(&text, &json!({ "help": text }));
    Ok(())
}

/// What the command prints with `--help`.
fn of_command(words: &[String]) -> Result<String, Error> {
    let mut command = Cli::command();
    for (depth, word) in words.iter().enumerate() {
        let Some(found) = command.find_subcommand(word) else { return Err(unknown(&command, depth, word)) };
        command = found.clone();
    }
    let arguments = ["kiln"].into_iter().chain(words.iter().map(String::as_str)).chain(["--help"]);
    match Cli::command().try_get_matches_from(arguments) {
        Err(help) => Ok(help.render().to_string()),
        Ok(_) => Err(Error::new(Exit::Bug, "the command line has no help")),
    }
}

fn unknown(command: &clap::Command, depth: usize, word: &str) -> Error {
    let commands = command.get_subcommands().map(clap::Command::get_name);
    let topics = TOPICS.iter().map(|topic| topic.name).filter(|_| depth == 0);
    let known: Vec<_> = commands.chain(topics).collect();
    let message = match depth {
        0 => format!("no command or topic is called `{word}`"),
        _ => format!("`kiln {}` has no command `{word}`", command.get_name()),
    };
    let help = nearest(word, &known).map(|near| format!("did you mean `{near}`?"));
    Error::new(Exit::Usage, message).help(help.unwrap_or_else(|| "`kiln help` lists commands and topics".to_owned()))
}
