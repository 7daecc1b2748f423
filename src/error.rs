//! Every failure as one type: what it says, where it happened, what to do, and the exit code it ends kiln with.

use std::path::PathBuf;

use crate::cancel::Cancelled;

/// The documented exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The command line is wrong.
    Usage,
    /// The recipe or another input is wrong.
    Input,
    /// The host lacks something.
    Host,
    /// A provisioner or a test failed.
    Step,
    /// Something took too long.
    TimedOut,
    /// Publishing failed.
    Publish,
    /// Not reproducible or not bootable.
    Differs,
    /// A bug in kiln.
    Bug,
    /// A signal ended it.
    Signal(i32),
}

impl Exit {
    /// The number for the shell.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::Input => 3,
            Self::Host => 4,
            Self::Step => 5,
            Self::TimedOut => 6,
            Self::Publish => 7,
            Self::Differs => 8,
            Self::Bug => 70,
            Self::Signal(number) => u8::try_from(128 + number).unwrap_or(255),
        }
    }
}

/// A place in a recipe. The text is kept so that the line can be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The recipe as the user named it.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// The bytes that are meant.
    pub span: std::ops::Range<usize>,
    /// Words for the mark under the line; may be empty.
    pub label: String,
}

impl Place {
    /// Line and column, from 1; the column counts characters.
    #[must_use]
    pub fn line_column(&self) -> (usize, usize) {
        let start = self.span.start.min(self.text.len());
        let before = self.text.get(..start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }
}

/// A failure, ready to be shown: cause once, then what helps. Modules have typed errors of their own and turn them
/// into this at their boundary, where the exit code, the place and the remedy are known.
#[derive(Debug)]
pub struct Error {
    /// How kiln ends.
    pub exit: Exit,
    /// The cause: lowercase, no full stop.
    pub message: String,
    /// Where in the recipe.
    pub place: Option<Place>,
    /// Facts that belong to the cause, such as the last line a step printed.
    pub notes: Vec<String>,
    /// The log that has more.
    pub log: Option<PathBuf>,
    /// What to do.
    pub help: Option<String>,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl Error {
    /// A failure with a cause and nothing else yet.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), place: None, notes: Vec::new(), log: None, help: None }
    }

    /// With a remedy.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// With a fact that belongs to the cause.
    #[must_use]
    pub fn with_note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// With the log that has more.
    #[must_use]
    pub fn log(mut self, log: impl Into<PathBuf>) -> Self {
        self.log = Some(log.into());
        self
    }

    /// With a place in the recipe.
    #[must_use]
    pub fn at(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }

    /// A file that could not be read or written; a full disk gets its own remedy.
    pub fn io(doing: impl std::fmt::Display, error: &std::io::Error) -> Self {
        let failure = Self::new(Exit::Host, format!("{doing}: {error}"));
        match error.kind() {
            std::io::ErrorKind::StorageFull => {
                failure.help("free space on that filesystem, or choose another with --out, --cache-dir or TMPDIR")
            }
            std::io::ErrorKind::PermissionDenied => failure.help("kiln never needs root: use a folder that you own"),
            _ => failure,
        }
    }
}

impl From<Cancelled> for Error {
    fn from(cancelled: Cancelled) -> Self {
        Self::new(Exit::Signal(cancelled.0), cancelled.to_string())
    }
}

impl From<crate::exec::Error> for Error {
    fn from(error: crate::exec::Error) -> Self {
        use crate::exec::Error as Exec;
        match error {
            Exec::Cancelled(cancelled) => cancelled.into(),
            Exec::TimedOut { .. } => Self::new(Exit::TimedOut, error.to_string()),
            Exec::NotFound(_) | Exec::Start { .. } | Exec::Failed { .. } => Self::new(Exit::Host, error.to_string()),
        }
    }
}
