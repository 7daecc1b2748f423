//! Questions to a booted disk: is the system up, does a test pass.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::archive::{Look, Script};
use super::guest_failure;
use super::log::Answer;
use super::manifest::TestFacts;
use crate::cancel::Cancel;
use crate::error::{Error, Exit};
use crate::vm::guest::Guest;

/// What systemd says of itself once it has started everything, then the units that failed.
const STATE: &str = "timeout 60 systemctl is-system-running --wait || true\n\
                     systemctl list-units --plain --no-legend --failed | while read -r unit _; do echo \"$unit\"; done\n";

/// The state of the booted system and its failed units.
pub(crate) fn system_state(guest: &mut Guest, scratch: &Path) -> Result<(String, Vec<String>), Error> {
    let (_, output) = ask(guest, scratch, "the system's state", STATE, Duration::from_secs(120), &BTreeMap::new())?;
    let mut lines = output.lines().map(str::to_owned);
    Ok((lines.next().unwrap_or_else(|| "unknown".to_owned()), lines.collect()))
}

/// Runs a test; a status other than 0 is an error with the last it printed.
pub(crate) fn run_test(
    guest: &mut Guest,
    scratch: &Path,
    test: &TestFacts,
    limit: Duration,
    env: &BTreeMap<String, String>,
) -> Result<(), Error> {
    let (status, output) = ask(guest, scratch, &format!("test `{}`", test.name), &test.run, limit, env)?;
    if status == 0 {
        return Ok(());
    }
    let mut error = Error::new(Exit::Step, format!("test `{}` failed with exit code {status}", test.name));
    error.notes.push(format!("it ran: {}", test.run.lines().next().unwrap_or_default()));
    let last: Vec<_> = output.lines().filter(|line| !line.trim().is_empty()).collect();
    error.notes.extend(last.iter().skip(last.len().saturating_sub(5)).map(|line| format!("output: {line}")));
    Err(error)
}

fn ask(
    guest: &mut Guest,
    scratch: &Path,
    what: &str,
    text: &str,
    limit: Duration,
    env: &BTreeMap<String, String>,
) -> Result<(i32, String), Error> {
    let output = Arc::new(Mutex::new(Vec::new()));
    let script = Script { text: text.as_bytes(), env, files: &[], texts: &[] };
    let folder = guest.fresh_folder();
    let archive = script
        .archive(scratch, &folder, &Look::plain(&Cancel::default()))
        .map_err(|error| Error::io("cannot write the guest's drives", &error))?;
    let sink = Box::new(Answer(Arc::clone(&output)));
    let ended = guest.run(what, archive, (&folder, ""), script.has_shebang(), sink, limit).map_err(guest_failure)?;
    let output = output.lock().unwrap_or_else(PoisonError::into_inner);
    Ok((ended.status, String::from_utf8_lossy(&output).into_owned()))
}
