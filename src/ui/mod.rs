//! How things are shown: the only module that prints. Results go to stdout, everything else to stderr.

mod board;
mod human;
mod rate;

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};

pub use board::Board;

use crate::error::{Error, Place};
use crate::event::Events;

/// The two ways to show things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Human,
    /// One JSON document on stdout, JSON lines of events on stderr.
    Json,
}

/// How much is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Verbosity {
    /// Warnings and errors.
    Quiet,
    /// What happens.
    #[default]
    Normal,
    /// With details.
    Verbose,
}

/// The user's terminal, or what stands in for it.
#[derive(Debug, Clone, Copy)]
pub struct Ui {
    /// For people or programs.
    pub format: Format,
    /// How much is said.
    pub verbosity: Verbosity,
    /// Colours may be used on stderr.
    pub colour: bool,
    /// stderr is a terminal whose lines may be rewritten.
    pub live: bool,
}

impl Ui {
    /// Colours only on a terminal, and not where `NO_COLOR` (a non-empty value) forbids them.
    #[must_use]
    pub fn new(format: Format, verbosity: Verbosity, no_colour: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        let human = format == Format::Human;
        Self { format, verbosity, colour: terminal && human && !no_colour, live: terminal && human }
    }

    /// Where the work sends its events.
    #[must_use]
    pub fn events(self) -> Events {
        match self.format {
            Format::Json => Events::new(|event| {
                if let Ok(line) = serde_json::to_string(&event) {
                    let _ = writeln!(io::stderr().lock(), "{line}");
                }
            }),
            Format::Human => {
                let shower = human::Shower::new(self);
                Events::new(move |event| shower.show(&event))
            }
        }
    }

    /// Where several things that go on side by side are shown; `kind` is what programs read them as, e.g. `recipe`.
    #[must_use]
    pub fn board(self, kind: &'static str) -> Board {
        Board::new(self, kind)
    }

    /// Prints what is said at the end to people, on stderr.
    pub fn summary(self, text: &str) {
        if self.format == Format::Human && self.verbosity > Verbosity::Quiet {
            let _ = io::stderr().lock().write_all(clean(text).as_bytes());
        }
    }

    /// Shows a person at the terminal what a question is about, or the question, whose line stays open.
    pub fn ask(self, text: &str) {
        let _ = io::stderr().lock().write_all(clean(text).as_bytes());
    }

    /// Prints a result: `human` or, as one document, `json`.
    pub fn result(self, human: &str, json: &serde_json::Value) {
        let text = match self.format {
            Format::Human => human.to_owned(),
            Format::Json => serde_json::to_string_pretty(json).unwrap_or_default(),
        };
        if !text.is_empty() {
            // A closed pipe (`kiln … | head`) is the reader's choice.
            let _ = writeln!(io::stdout().lock(), "{}", text.trim_end_matches('\n'));
        }
    }

    /// Shows a failure.
    pub fn error(self, error: &Error) {
        let text = match self.format {
            Format::Human => render(error, self.colour),
            Format::Json => {
                let mut value = error_value(error);
                value["event"] = "error".into();
                format!("{value}\n")
            }
        };
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// Shows a guest's console on stdout, byte for byte.
    #[must_use]
    pub fn mirror() -> Arc<dyn Fn(&[u8]) + Send + Sync> {
        Arc::new(|bytes| {
            let mut out = io::stdout().lock();
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        })
    }
}

/// A failure as programs read it.
#[must_use]
pub fn error_value(error: &Error) -> serde_json::Value {
    let place = error.place.as_ref().map(|place| {
        let (line, column) = place.line_column();
        serde_json::json!({ "file": place.path, "line": line, "column": column })
    });
    serde_json::json!({
        "message": error.message, "exit_code": error.exit.code(), "place": place, "notes": error.notes,
        "log": error.log, "help": error.help,
    })
}

/// A failure as people read it.
#[must_use]
pub fn render(error: &Error, colour: bool) -> String {
    let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
    let log = error.log.as_ref().map(|log| format!("log: {}", log.display()));
    let notes: Vec<String> = error.notes.iter().map(|note| clean(note)).chain(log).collect();
    let message = clean(&error.message);
    let title = Level::ERROR.primary_title(message.as_str());
    let snippet = error.place.as_ref().map(|place| (place, place.path.display().to_string()));
    let mut group = match &snippet {
        Some((place, path)) => title.element(snippet_of(place, path)),
        None => annotate_snippets::Group::with_title(title),
    };
    for note in &notes {
        group = group.element(Level::NOTE.no_name().message(note.as_str()));
    }
    let mut report = vec![group];
    let help = error.help.as_deref().map(clean);
    if let Some(help) = &help {
        report.push(annotate_snippets::Group::with_title(Level::HELP.secondary_title(help.as_str())));
    }
    let mut text = renderer.render(&report);
    text.push('\n');
    text
}

fn snippet_of<'a>(place: &'a Place, path: &'a str) -> Snippet<'a, annotate_snippets::Annotation<'a>> {
    let end = place.text.len();
    let span = place.span.start.min(end)..place.span.end.min(end);
    let mark = AnnotationKind::Primary.span(span);
    let mark = if place.label.is_empty() { mark } else { mark.label(place.label.as_str()) };
    Snippet::source(place.text.as_str()).path(path).annotation(mark)
}

/// Without control characters: messages quote guests, files and servers.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Exit;

    #[test]
    fn a_failure_reads_top_down() {
        let text = "name = \"web\"\n\n[[provision]]\nuses = \"nginx\"\n";
        let place = Place { path: "web.toml".into(), text: text.into(), span: 14..27, label: String::new() };
        let error = Error::new(Exit::Step, "provisioner `web server` failed with exit code 100")
            .at(place)
            .with_note("last output: E: Unable to locate package ngnix")
            .log("out/web.failed/steps/01-web-server.log")
            .help("set network = \"open\"");
        insta::assert_snapshot!(render(&error, false), @r#"
        error: provisioner `web server` failed with exit code 100
         --> web.toml:3:1
          |
        3 | [[provision]]
          | ^^^^^^^^^^^^^
          |
          = last output: E: Unable to locate package ngnix
          = log: out/web.failed/steps/01-web-server.log
        help: set network = "open"
        "#);
    }

    #[test]
    fn what_guests_say_cannot_steer_the_terminal() {
        let error = Error::new(Exit::Step, "a\u{1b}[2Jb");
        assert_eq!(render(&error, false), "error: a\u{fffd}[2Jb\n");
    }
}
