//! `[[provision]]`: what changes the guest.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::reader::{Fields, Found, list, suggest};
use super::tree::Origin;
use super::{Action, Step, read, with};
use crate::provisioners;

const KNOWN: [&str; 17] = [
    "name",
    "run",
    "inline",
    "copy",
    "uses",
    "with",
    "to",
    "owner",
    "mode",
    "follow",
    "files",
    "env",
    "timeout",
    "reboot",
    "cache",
    "max_age",
    "checkpoint",
];
const ACTIONS: [&str; 4] = ["run", "inline", "copy", "uses"];
/// Keys that mean something with some actions only.
const COMPANIONS: [(&str, &[&str]); 7] = [
    ("with", &["uses"]),
    ("to", &["copy"]),
    ("owner", &["copy"]),
    ("mode", &["copy"]),
    ("follow", &["copy"]),
    ("files", &["run", "inline"]),
    ("env", &["run", "inline", "uses"]),
];

/// All steps, in order. Those with a problem are left out.
pub(super) fn steps(top: &Fields<'_>) -> Vec<Step> {
    let tables = top.tables("provision");
    tables
        .into_iter()
        .filter_map(|(table, origin)| step(&top.reader.fields(table, origin, "[[provision]]", &KNOWN)))
        .collect()
}

fn step(fields: &Fields<'_>) -> Option<Step> {
    let name = given_name(fields);
    let timeout = fields.duration("timeout").map(|found| found.value);
    let reboot = fields.boolean("reboot").is_some_and(|found| found.value);
    let cache = fields.boolean("cache").is_none_or(|found| found.value);
    let max_age = max_age(fields, cache);
    let checkpoint = fields.boolean("checkpoint").map(|found| found.value);
    let env = fields.map("env", |key, _| read::variable(key));
    let kind = kind(fields)?;
    companions(fields, kind);
    let (action, origin) = match kind {
        "run" => file(fields)?,
        "inline" => inline(fields)?,
        "copy" => copy(fields)?,
        _ => uses(fields)?,
    };
    let text = |key: &str| fields.text(key).map(|found| found.value);
    let name = name.or_else(|| default_name(text)).unwrap_or_else(|| kind.to_owned());
    let max_age = match &action {
        Action::Uses { provisioner, .. } if cache => max_age.or(provisioner.max_age),
        _ => max_age,
    };
    let span = fields.origin.span.clone();
    Some(Step { name, action, env, timeout, reboot, cache, max_age, checkpoint, span, value_span: origin.span })
}

/// How long the step's result may be taken from the store.
fn max_age(fields: &Fields<'_>, cache: bool) -> Option<Duration> {
    let found = fields.age("max_age")?;
    if !cache {
        let help = "a step with `cache = false` always runs: keep one of the two".to_owned();
        fields.reader.refuse(&found.origin, "`max_age` has no effect with `cache = false`", Some(help));
    }
    Some(found.value)
}

/// The one key that says what the step does.
fn kind(fields: &Fields<'_>) -> Option<&'static str> {
    let mut present: Vec<_> =
        ACTIONS.into_iter().filter_map(|kind| fields.entry(kind).map(|entry| (kind, &entry.key_origin))).collect();
    // What `--set` added is the one too many.
    present.sort_by_key(|(_, origin)| (origin.set.is_some(), origin.span.start));
    match present[..] {
        [] => {
            let help = format!("give it one of {}", list(&ACTIONS));
            fields.reader.lacks(fields.origin, "this [[provision]] does nothing", Some(help));
            None
        }
        [(kind, _)] => Some(kind),
        [(first, _), (second, origin), ..] => {
            let message = format!("one [[provision]] can't have both `{first}` and `{second}`");
            let help = "make two steps of it, each with its own [[provision]]".to_owned();
            fields.reader.refuse(origin, message, Some(help));
            None
        }
    }
}

fn companions(fields: &Fields<'_>, kind: &str) {
    for (key, kinds) in COMPANIONS.iter().filter(|(_, kinds)| !kinds.contains(&kind)) {
        if let Some(entry) = fields.entry(key) {
            let message = format!("`{key}` has no effect with `{kind}`");
            let help = format!("it belongs to {}", list(kinds));
            fields.reader.refuse(&entry.key_origin, message, Some(help));
        }
    }
}

/// `name`, if the user gave one.
pub(super) fn given_name(fields: &Fields<'_>) -> Option<String> {
    let name = fields.filled("name")?;
    if name.value.chars().any(char::is_control) {
        fields.reader.refuse(&name.origin, "a name stands on one line", None);
    } else if name.value.chars().count() > 100 {
        fields.reader.refuse(&name.origin, "a name has 100 characters at most", None);
    }
    Some(name.value)
}

/// The name of a step without one, from the text of its keys.
pub(super) fn default_name(text: impl Fn(&str) -> Option<String>) -> Option<String> {
    text("run")
        .map(|path| format!("run {path}"))
        .or_else(|| text("copy").map(|path| format!("copy {path}")))
        .or_else(|| text("uses"))
        .or_else(|| text("inline").map(|script| first_line(&script)))
}

/// The first line that does something, shortened.
pub(super) fn first_line(script: &str) -> String {
    let boring = |line: &&str| line.is_empty() || line.starts_with('#') || line.starts_with("set -");
    let line = script.lines().map(str::trim).find(|line| !boring(line)).unwrap_or("script");
    let clean: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match clean.char_indices().nth(48) {
        Some((end, _)) => format!("{}…", clean[..end].trim_end()),
        None => clean,
    }
}

fn file(fields: &Fields<'_>) -> Option<(Action, Origin)> {
    let files = files(fields);
    let run = fields.filled("run")?;
    if run.value.ends_with('/') || is_command(&run.value) {
        let help = "a command goes into `inline`".to_owned();
        fields.reader.refuse(&run.origin, "`run` wants the path of a script", Some(help));
        return None;
    }
    Some((Action::File { path: PathBuf::from(run.value), files: files? }, run.origin))
}

/// Whether this can't be meant as a path: `apt-get update`, but not `my scripts/app` or `my app.sh`.
fn is_command(text: &str) -> bool {
    let operator = ["\n", "&&", "||", " | ", "; ", " > "].iter().any(|operator| text.contains(operator));
    operator || (text.contains(' ') && !text.contains(['/', '.']))
}

fn inline(fields: &Fields<'_>) -> Option<(Action, Origin)> {
    let files = files(fields);
    let script = fields.filled("inline")?;
    Some((Action::Inline { script: script.value, files: files? }, script.origin))
}

/// The files that lie next to a script.
fn files(fields: &Fields<'_>) -> Option<Vec<PathBuf>> {
    if fields.node("files").is_none() {
        return Some(Vec::new());
    }
    let mut files = Vec::new();
    for found in fields.texts("files")? {
        let path = Path::new(&found.value);
        let inside = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if found.value.trim().is_empty() {
            fields.reader.refuse(&found.origin, "an element of `files` is empty", None);
        } else if !inside {
            let help = "name files in the script's folder or below; use `copy` for others".to_owned();
            fields.reader.refuse(&found.origin, "`files` lie next to the script", Some(help));
        } else {
            files.push(path.components().filter(|part| matches!(part, Component::Normal(_))).collect());
        }
    }
    Some(files)
}

fn copy(fields: &Fields<'_>) -> Option<(Action, Origin)> {
    let owner = fields.filled("owner").and_then(|found| owner(fields, found));
    let mode = mode(fields);
    let follow = fields.boolean("follow").is_some_and(|found| found.value);
    let to =
        fields.require("to", "to = \"/srv/\"").and_then(|_| fields.filled("to")).and_then(|found| to(fields, found));
    let from = fields.filled("copy")?;
    // As for `cp -r`: `site/`, `site/.`, `.` and `..` name what is in a folder.
    let contents = matches!(from.value.rsplit('/').next(), Some("" | "." | ".."));
    let action = Action::Copy { from: PathBuf::from(from.value), to: to?, contents, owner, mode, follow };
    Some((action, from.origin))
}

fn to(fields: &Fields<'_>, found: Found<String>) -> Option<String> {
    let parents = Path::new(&found.value).components().any(|part| part == Component::ParentDir);
    if !found.value.starts_with('/') {
        let help = match found.value.strip_prefix("~/") {
            Some(rest) => format!("write for example `to = \"/root/{rest}\"`"),
            None => format!("write for example `to = \"/{}\"`", found.value.trim_start_matches("./")),
        };
        fields.reader.refuse(&found.origin, "`to` wants an absolute path in the guest", Some(help));
        None
    } else if found.value.chars().any(char::is_control) {
        fields.reader.refuse(&found.origin, "`to` can't contain control characters", None);
        None
    } else if parents {
        fields.reader.refuse(&found.origin, "`to` can't contain `..`", None);
        None
    } else {
        Some(found.value)
    }
}

fn owner(fields: &Fields<'_>, found: Found<String>) -> Option<String> {
    let first = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let valid = |name: &str| {
        let name = name.strip_suffix('$').unwrap_or(name);
        name.starts_with(first) && name.len() <= 32 && name.chars().all(|c| first(c) || c == '-' || c == '.')
    };
    let mut names = found.value.split(':');
    let fits = match (names.next(), names.next(), names.next()) {
        (Some(user), group, None) => valid(user) && group.is_none_or(valid),
        _ => false,
    };
    if !fits {
        let help = "write for example `owner = \"root\"` or `owner = \"root:www-data\"`".to_owned();
        fields.reader.refuse(&found.origin, "`owner` wants a user, or a user and a group", Some(help));
        return None;
    }
    Some(found.value)
}

fn mode(fields: &Fields<'_>) -> Option<u32> {
    use super::tree::Value;
    let node = fields.node("mode")?;
    if let (Value::Integer(integer), None) = (&node.value, &node.raw) {
        let digits = match integer.radix {
            8 | 10 if octal(&integer.digits).is_some() => integer.digits.as_str(),
            _ => "644",
        };
        let help = format!("write `mode = \"{digits:0>4}\"` in quotes");
        fields.reader.refuse(&node.origin, "`mode` wants octal digits in a string, not an integer", Some(help));
        return None;
    }
    let found = fields.text("mode")?;
    let mode = octal(&found.value);
    if mode.is_none() {
        let help = "write three or four octal digits, for example `mode = \"0644\"`".to_owned();
        fields.reader.refuse(&found.origin, format!("`{}` is not a mode", found.value), Some(help));
    }
    mode
}

fn octal(digits: &str) -> Option<u32> {
    let octal = digits.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    (octal && (3..=4).contains(&digits.len())).then(|| u32::from_str_radix(digits, 8).ok()).flatten()
}

fn uses(fields: &Fields<'_>) -> Option<(Action, Origin)> {
    let found = fields.filled("uses")?;
    let Some(provisioner) = provisioners::find(&found.value) else {
        let names: Vec<_> = provisioners::all().iter().map(|provisioner| provisioner.name).collect();
        let near = suggest(&found.value, &names);
        let all = list(&names);
        let help = if near.ends_with('?') { format!("{near} there are {all}") } else { near };
        fields.reader.refuse(&found.origin, format!("no provisioner is called `{}`", found.value), Some(help));
        return None;
    };
    let inputs = with::inputs(fields, provisioner, &found.origin);
    Some((Action::Uses { provisioner, inputs }, found.origin))
}
