//! `--set KEY=VALUE`: a value put into the recipe before it is read.

use std::ops::Range;

use super::Override;
use super::reader::{Problem, nearest};
use super::step::default_name;
use super::tree::{Entry, Node, Origin, Table, Value, setting};

/// Puts every setting into `root`, in order; a later one wins.
pub(super) fn apply(root: &mut Table, set: &[String]) -> Result<Vec<Override>, Problem> {
    let mut overrides: Vec<(Vec<String>, Override)> = Vec::new();
    for (index, text) in set.iter().enumerate() {
        let origin = Origin { span: 0..0, set: Some(index) };
        let (path, raw) = split(text).map_err(|message| {
            let help = "write --set KEY=VALUE, for example --set disk.size=8GiB".to_owned();
            Problem::new(&origin, message, Some(help))
        })?;
        let span = Setting { set: index, raw }.put(root, 0, &path, 0)?;
        overrides.retain(|(other, _)| *other != path);
        overrides.push((path, Override { span, setting: text.clone() }));
    }
    Ok(overrides.into_iter().map(|(_, over)| over).collect())
}

struct Setting<'a> {
    set: usize,
    raw: &'a str,
}

impl Setting<'_> {
    fn origin(&self, span: Range<usize>) -> Origin {
        Origin { span, set: Some(self.set) }
    }

    fn problem(&self, message: String, help: Option<String>) -> Problem {
        Problem::new(&self.origin(0..0), message, help)
    }

    /// Puts the value at `path[depth..]` in `table`, whose header ends at `end`; gives the place it took.
    fn put(&self, table: &mut Table, end: usize, path: &[String], depth: usize) -> Result<Range<usize>, Problem> {
        let key = &path[depth];
        let last = depth + 1 == path.len();
        let position = match table.position(key) {
            Some(position) => position,
            None if depth == 0 && !last && ["provision", "test"].contains(&key.as_str()) => {
                return Err(self.problem(format!("the recipe has no [[{key}]]"), None));
            }
            None => {
                table.entries.push(Entry {
                    key: key.clone(),
                    key_origin: self.origin(end..end),
                    node: Node { origin: self.origin(end..end), value: Value::Table(Table::default()), raw: None },
                });
                table.entries.len() - 1
            }
        };
        let node = &mut table.entries[position].node;
        if last { Ok(self.replace(node)) } else { self.descend(node, path, depth + 1) }
    }

    fn replace(&self, node: &mut Node) -> Range<usize> {
        let span = node.origin.span.clone();
        *node = setting(self.raw, &span, self.set);
        span
    }

    fn descend(&self, node: &mut Node, path: &[String], depth: usize) -> Result<Range<usize>, Problem> {
        let end = node.origin.span.end;
        let parent = &path[depth - 1];
        match &mut node.value {
            Value::Table(table) => self.put(table, end, path, depth),
            Value::Array(items) => {
                let index = self.element(items, parent, &path[depth])?;
                let item = &mut items[index];
                if depth + 1 == path.len() { Ok(self.replace(item)) } else { self.descend(item, path, depth + 1) }
            }
            other => {
                Err(self
                    .problem(format!("`{parent}` is {} and has no `{}` in it", other.describe(), path[depth]), None))
            }
        }
    }

    /// The element that `which` means: its number from 0, or its name.
    fn element(&self, items: &[Node], list: &str, which: &str) -> Result<usize, Problem> {
        if !which.is_empty() && which.bytes().all(|byte| byte.is_ascii_digit()) {
            return match which.parse::<usize>() {
                Ok(index) if index < items.len() => Ok(index),
                _ => {
                    let count = items.len();
                    let help = format!("`{list}` has {count}, and they are counted from 0");
                    Err(self.problem(format!("`{list}` has no number {which}"), Some(help)))
                }
            };
        }
        let names: Vec<Option<String>> = items.iter().map(|item| name_of(item, list)).collect();
        let mut found = names.iter().enumerate().filter(|(_, name)| name.as_deref() == Some(which));
        match (found.next(), found.next()) {
            (Some((index, _)), None) => Ok(index),
            (Some((index, _)), Some(_)) => {
                let help = format!("use its number, the first is `{list}.{index}`");
                Err(self.problem(format!("several of `{list}` are called `{which}`"), Some(help)))
            }
            (None, _) => {
                let known: Vec<_> = names.iter().flatten().map(String::as_str).collect();
                let help = match nearest(which, &known) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("use a name or a number from 0, for example `{list}.0`"),
                };
                Err(self.problem(format!("none of `{list}` is called `{which}`"), Some(help)))
            }
        }
    }
}

fn name_of(item: &Node, list: &str) -> Option<String> {
    let Value::Table(table) = &item.value else { return None };
    let text = |key: &str| match table.entry(key).map(|entry| &entry.node) {
        Some(Node { raw: Some(text), .. } | Node { value: Value::String(text), .. }) => Some(text.clone()),
        _ => None,
    };
    let named = text("name");
    if list == "provision" { named.or_else(|| default_name(text)) } else { named }
}

/// Splits `a."b c".d=value`.
fn split(text: &str) -> Result<(Vec<String>, &str), String> {
    let mut path = Vec::new();
    let mut rest = text;
    loop {
        let start = rest.trim_start();
        let (key, after) = if let Some(quote @ ('"' | '\'')) = start.chars().next() {
            let closed = start[1..].split_once(quote);
            let (key, after) = closed.ok_or_else(|| format!("a {quote} is not closed in the key"))?;
            (key, after.trim_start())
        } else {
            let end = start.find(['.', '=']).unwrap_or(start.len());
            (start[..end].trim(), &start[end..])
        };
        if key.is_empty() {
            return Err("the key is empty".to_owned());
        }
        path.push(key.to_owned());
        if let Some(value) = after.strip_prefix('=') {
            return Ok((path, value));
        }
        match after.strip_prefix('.') {
            Some(more) => rest = more,
            None if after.is_empty() => return Err("there is no `=`".to_owned()),
            None => return Err("the key is not a dotted key".to_owned()),
        }
    }
}
