//! Asks a table for what it should hold, and collects what is wrong with it, each at its exact place.
//!
//! A reader never stops at the first problem: a value that can't be used is `None`, and [`Reader::finish`] tells the
//! problem that comes first. Absent keys come last, because a misspelt key explains an absent one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::tree::{Entry, Node, Origin, Table, Value};
use super::{Warning, input};
use crate::error::{Error, Place};
use crate::units::{ParseError, Size, parse_duration};

/// No step waits longer; a moment this far away can still be computed with.
const LONGEST: Duration = Duration::from_hours(30 * 24);

/// Something that is wrong with a recipe.
#[derive(Debug)]
pub(super) struct Problem {
    origin: Origin,
    message: String,
    help: Option<String>,
    absence: bool,
}

impl Problem {
    pub(super) fn new(origin: &Origin, message: impl Into<String>, help: Option<String>) -> Self {
        Self { origin: origin.clone(), message: message.into(), help, absence: false }
    }

    pub(super) fn into_error(self, source: Source<'_>) -> Error {
        let setting = self.origin.set.and_then(|index| source.set.get(index));
        let error = match setting {
            Some(setting) => input(format!("`--set {setting}`: {}", self.message)),
            None => input(self.message).at(source.place(&self.origin)),
        };
        match self.help {
            Some(help) => error.help(help),
            None => error,
        }
    }
}

/// What a recipe is read from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) path: &'a Path,
    pub(super) text: &'a str,
    pub(super) set: &'a [String],
}

impl Source<'_> {
    fn place(&self, origin: &Origin) -> Place {
        let start = self.text.floor_char_boundary(origin.span.start);
        let end = self.text.ceil_char_boundary(origin.span.end).max(start);
        Place { path: self.path.to_owned(), text: self.text.to_owned(), span: start..end, label: String::new() }
    }
}

/// A value that was found, and where.
#[derive(Debug, Clone)]
pub(super) struct Found<T> {
    pub(super) value: T,
    pub(super) origin: Origin,
}

impl<T> Found<T> {
    fn new(node: &Node, value: T) -> Self {
        Self { value, origin: node.origin.clone() }
    }
}

/// An enum with fixed spellings.
pub(super) trait Word: Copy + 'static {
    /// All of them.
    const ALL: &'static [Self];
    /// The spelling.
    fn word(self) -> &'static str;
}

/// Collects problems and warnings.
#[derive(Debug, Default)]
pub(super) struct Reader {
    problems: RefCell<Vec<Problem>>,
    warnings: RefCell<Vec<Warning>>,
}

impl Reader {
    /// Something is wrong at `origin`.
    pub(super) fn refuse(&self, origin: &Origin, message: impl Into<String>, help: Option<String>) {
        self.problems.borrow_mut().push(Problem::new(origin, message, help));
    }

    /// Something is absent from the table at `origin`.
    pub(super) fn lacks(&self, origin: &Origin, message: impl Into<String>, help: Option<String>) {
        let problem = Problem { absence: true, ..Problem::new(origin, message, help) };
        self.problems.borrow_mut().push(problem);
    }

    /// Something should be written otherwise.
    pub(super) fn warn(&self, origin: &Origin, message: String, help: String) {
        let span = origin.span.clone();
        self.warnings.borrow_mut().push(Warning { message, help, span });
    }

    /// The warnings, or the first problem.
    pub(super) fn finish(self) -> Result<Vec<Warning>, Problem> {
        let first =
            self.problems.into_inner().into_iter().min_by_key(|problem| (problem.absence, problem.origin.span.start));
        match first {
            Some(problem) => Err(problem),
            None => Ok(self.warnings.into_inner()),
        }
    }

    /// Looks into a table that may hold the `known` keys only.
    pub(super) fn fields<'a>(
        &'a self,
        table: &'a Table,
        origin: &'a Origin,
        title: &str,
        known: &'a [&'a str],
    ) -> Fields<'a> {
        for entry in table.entries.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            let message = match title {
                "" => format!("unknown key `{}`", entry.key),
                _ => format!("unknown key `{}` in {title}", entry.key),
            };
            self.refuse(&entry.key_origin, message, Some(suggest_key(&entry.key, known)));
        }
        Fields { reader: self, table, origin, title: title.to_owned() }
    }

    fn wrong_type(&self, node: &Node, what: &str, wanted: &str, help: Option<String>) {
        let message = format!("{what} wants {wanted}, not {}", node.value.describe());
        self.refuse(&node.origin, message, help);
    }

    /// Text; `what` names it in the message.
    pub(super) fn text(&self, node: &Node, what: &str) -> Option<Found<String>> {
        let text = match (&node.value, &node.raw) {
            (Value::String(text), _) | (_, Some(text)) => text,
            (value, None) => {
                let written = match value {
                    Value::Integer(integer) if integer.radix == 10 => Some(integer.digits.clone()),
                    Value::Float(written) | Value::Datetime(written) => Some(written.clone()),
                    Value::Boolean(value) => Some(value.to_string()),
                    _ => None,
                };
                let help = written.map(|written| format!("write \"{written}\" in quotes"));
                self.wrong_type(node, what, "a string", help);
                return None;
            }
        };
        if text.contains('\0') {
            self.refuse(&node.origin, format!("{what} contains a NUL character"), None);
            return None;
        }
        Some(Found::new(node, text.clone()))
    }

    /// A whole number.
    pub(super) fn integer(&self, node: &Node, what: &str) -> Option<Found<i64>> {
        match &node.value {
            Value::Integer(integer) => {
                if integer.value.is_none() {
                    self.refuse(&node.origin, format!("{what} is too large"), None);
                }
                integer.value.map(|value| Found::new(node, value))
            }
            value => {
                let help = match value {
                    Value::String(text) if text.parse::<i64>().is_ok() => Some(format!("write {text} without quotes")),
                    _ => None,
                };
                self.wrong_type(node, what, "an integer", help);
                None
            }
        }
    }

    /// True or false.
    pub(super) fn boolean(&self, node: &Node, what: &str) -> Option<Found<bool>> {
        if let Value::Boolean(value) = node.value {
            return Some(Found::new(node, value));
        }
        let help = match &node.value {
            Value::String(text) if text == "true" || text == "false" => Some(format!("write {text} without quotes")),
            _ => None,
        };
        self.wrong_type(node, what, "true or false", help);
        None
    }

    /// A list of texts, each with its place.
    pub(super) fn texts(&self, node: &Node, what: &str) -> Option<Vec<Found<String>>> {
        let Value::Array(items) = &node.value else {
            let help = match &node.value {
                Value::String(text) => Some(format!("write [\"{text}\"]")),
                _ => None,
            };
            self.wrong_type(node, what, "a list of strings", help);
            return None;
        };
        let each = format!("an element of {what}");
        items.iter().map(|item| self.text(item, &each)).collect()
    }
}

/// A table that is being read.
pub(super) struct Fields<'a> {
    pub(super) reader: &'a Reader,
    pub(super) origin: &'a Origin,
    table: &'a Table,
    /// How messages call it: `[base]`; empty at the top.
    pub(super) title: String,
}

impl<'a> Fields<'a> {
    pub(super) fn entry(&self, key: &str) -> Option<&'a Entry> {
        self.table.entry(key)
    }

    pub(super) fn node(&self, key: &str) -> Option<&'a Node> {
        self.entry(key).map(|entry| &entry.node)
    }

    /// Refuses the table if `key` is absent; `example` is what could stand there.
    pub(super) fn require(&self, key: &str, example: &str) -> Option<&'a Node> {
        let node = self.node(key);
        if node.is_none() {
            let message = match self.title.as_str() {
                "" => format!("the recipe has no `{key}`"),
                title => format!("{title} has no `{key}`"),
            };
            self.reader.lacks(self.origin, message, Some(format!("add for example `{example}`")));
        }
        node
    }

    /// Text, possibly empty.
    pub(super) fn text(&self, key: &str) -> Option<Found<String>> {
        self.reader.text(self.node(key)?, &format!("`{key}`"))
    }

    /// Text with something in it.
    pub(super) fn filled(&self, key: &str) -> Option<Found<String>> {
        let found = self.text(key)?;
        if found.value.trim().is_empty() {
            self.reader.refuse(&found.origin, format!("`{key}` is empty"), None);
            return None;
        }
        Some(found)
    }

    pub(super) fn integer(&self, key: &str) -> Option<Found<i64>> {
        self.reader.integer(self.node(key)?, &format!("`{key}`"))
    }

    pub(super) fn boolean(&self, key: &str) -> Option<Found<bool>> {
        self.reader.boolean(self.node(key)?, &format!("`{key}`"))
    }

    pub(super) fn texts(&self, key: &str) -> Option<Vec<Found<String>>> {
        self.reader.texts(self.node(key)?, &format!("`{key}`"))
    }

    /// A size such as `4GiB`.
    pub(super) fn size(&self, key: &str) -> Option<Found<Size>> {
        self.measure(key, "a size such as \"4GiB\"", str::parse)
    }

    /// A duration such as `30m` that something may take: neither nothing nor longer than any step waits.
    pub(super) fn duration(&self, key: &str) -> Option<Found<Duration>> {
        let found = self.age(key)?;
        if found.value > LONGEST {
            self.reader.refuse(&found.origin, format!("`{key}` must be at most 30d"), None);
            return None;
        }
        Some(found)
    }

    /// A duration such as `90d` that is not nothing.
    pub(super) fn age(&self, key: &str) -> Option<Found<Duration>> {
        let found = self.measure(key, "a duration such as \"30m\"", parse_duration)?;
        if found.value.is_zero() {
            self.reader.refuse(&found.origin, format!("`{key}` must be longer than 0"), None);
            return None;
        }
        Some(found)
    }

    fn measure<T>(&self, key: &str, wanted: &str, parse: impl Fn(&str) -> Result<T, ParseError>) -> Option<Found<T>> {
        let node = self.node(key)?;
        if !matches!(node.value, Value::String(_)) && node.raw.is_none() {
            self.reader.wrong_type(node, &format!("`{key}`"), wanted, None);
            return None;
        }
        let found = self.text(key)?;
        match parse(&found.value) {
            Ok(value) => Some(Found::new(node, value)),
            Err(error) => {
                let said = error.to_string();
                let (message, help) = match said.split_once("; ") {
                    Some((message, help)) => (message, Some(help.to_owned())),
                    None => (said.as_str(), None),
                };
                self.reader.refuse(&found.origin, message, help);
                None
            }
        }
    }

    /// One of an enum's words.
    pub(super) fn word<W: Word>(&self, key: &str) -> Option<Found<W>> {
        let found = self.text(key)?;
        self.choose(key, &found)
    }

    /// The enum's word that `found` is.
    pub(super) fn choose<W: Word>(&self, key: &str, found: &Found<String>) -> Option<Found<W>> {
        if let Some(word) = W::ALL.iter().find(|word| word.word() == found.value) {
            return Some(Found { value: *word, origin: found.origin.clone() });
        }
        let words: Vec<_> = W::ALL.iter().map(|word| word.word()).collect();
        let message = format!("`{key}` can't be `{}`", found.value);
        self.reader.refuse(&found.origin, message, Some(suggest(&found.value, &words)));
        None
    }

    /// A table inside this one, with the keys it may hold.
    pub(super) fn table(&self, key: &str, title: &str, known: &'a [&'a str]) -> Option<Fields<'a>> {
        let node = self.node(key)?;
        Some(self.reader.fields(self.as_table(key, node)?, &node.origin, title, known))
    }

    /// The value of `key` as a table.
    pub(super) fn as_table(&self, key: &str, node: &'a Node) -> Option<&'a Table> {
        if let Value::Table(table) = &node.value {
            return Some(table);
        }
        let several = matches!(&node.value, Value::Array(items) if matches!(items.first(), Some(Node { value: Value::Table(_), .. })));
        let help = several.then(|| format!("there is only one: write [{key}] with one bracket"));
        self.reader.wrong_type(node, &format!("`{key}`"), "a table", help);
        None
    }

    /// The tables of an array of tables such as `[[provision]]`, each with its place.
    pub(super) fn tables(&self, key: &str) -> Vec<(&'a Table, &'a Origin)> {
        let Some(node) = self.node(key) else { return Vec::new() };
        let Value::Array(items) = &node.value else {
            let path = match self.title.trim_matches(['[', ']']) {
                "" => key.to_owned(),
                title => format!("{title}.{key}"),
            };
            let help = format!("there can be several: write [[{path}]] with two brackets");
            self.reader.wrong_type(node, &format!("`{key}`"), "a list of tables", Some(help));
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in items {
            match &item.value {
                Value::Table(table) => tables.push((table, &item.origin)),
                _ => self.reader.wrong_type(item, &format!("an element of `{key}`"), "a table", None),
            }
        }
        tables
    }

    /// A table of texts under keys that `check` lets pass.
    pub(super) fn map(
        &self,
        key: &str,
        check: impl Fn(&str, &str) -> Result<(), (String, Option<String>)>,
    ) -> BTreeMap<String, String> {
        let Some(node) = self.node(key) else { return BTreeMap::new() };
        let Some(table) = self.as_table(key, node) else { return BTreeMap::new() };
        let mut map = BTreeMap::new();
        for entry in &table.entries {
            let Some(text) = self.reader.text(&entry.node, &format!("`{}`", entry.key)) else { continue };
            match check(&entry.key, &text.value) {
                Ok(()) => drop(map.insert(entry.key.clone(), text.value)),
                Err((message, help)) => self.reader.refuse(&entry.key_origin, message, help),
            }
        }
        map
    }
}

/// The nearest of `words`, or all of them.
pub(super) fn suggest(word: &str, words: &[&str]) -> String {
    match nearest(word, words) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("use one of {}", list(words)),
    }
}

/// `a`, `b`, `c`.
pub(super) fn list(words: &[&str]) -> String {
    let words: Vec<_> = words.iter().map(|word| format!("`{word}`")).collect();
    words.join(", ")
}

/// The word of `words` that was probably meant by `word`.
#[must_use]
pub fn nearest<'a>(word: &str, words: &[&'a str]) -> Option<&'a str> {
    let word = word.to_lowercase();
    let allowed = (word.chars().count() / 3).max(1);
    let near = words
        .iter()
        .map(|known| (strsim::damerau_levenshtein(&word, known), *known))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, known)| *distance <= allowed && *distance < known.len());
    let begun = || words.iter().copied().find(|known| word.len() >= 2 && known.starts_with(&word));
    near.map(|(_, known)| known).or_else(begun)
}

/// Keys that stand in one table only.
const HOMES: [(&str, &[&str]); 6] = [
    ("[base]", &["image", "sha256", "sha512", "arch"]),
    ("[machine]", &["cpus", "memory", "cpu", "boot", "network", "timeout"]),
    ("[disk]", &["size"]),
    (
        "[[provision]]",
        &["inline", "copy", "uses", "with", "to", "owner", "mode", "follow", "files", "reboot", "max_age", "run"],
    ),
    ("[seal]", &["keep"]),
    (
        "[publish]",
        &[
            "image_name",
            "regions",
            "bucket",
            "prefix",
            "boot_mode",
            "imds",
            "tpm",
            "uefi_data",
            "sriov",
            "ena",
            "volume_type",
            "volume_size",
            "root_device",
            "kms_keys",
            "tags",
            "snapshot_tags",
            "role",
        ],
    ),
];

/// What other tools call it.
const ALIASES: [(&str, &str); 12] = [
    ("checksum", "sha256"),
    ("command", "run"),
    ("dest", "to"),
    ("destination", "to"),
    ("environment", "env"),
    ("ram", "memory"),
    ("script", "run"),
    ("shell", "inline"),
    ("source", "copy"),
    ("src", "copy"),
    ("url", "image"),
    ("vars", "env"),
];

fn suggest_key(key: &str, known: &[&str]) -> String {
    if let Some((home, _)) = HOMES.iter().find(|(_, keys)| keys.contains(&key)) {
        return format!("`{key}` belongs in {home}");
    }
    let alias = ALIASES.iter().find(|(other, right)| *other == key && known.contains(right));
    match alias.map(|(_, right)| *right).or_else(|| nearest(key, known)) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => "nothing can stand here".to_owned(),
        None => format!("known here: {}", list(known)),
    }
}
