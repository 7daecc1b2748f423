//! TOML with places: what the text says, before anyone asks whether it makes sense.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::reader::Problem;

/// Where something comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    /// Bytes of the text. For what `--set` added, an empty range at the end of the table's header.
    pub(super) span: Range<usize>,
    /// Which `--set` it comes from.
    pub(super) set: Option<usize>,
}

impl Origin {
    fn text(span: Range<usize>) -> Self {
        Self { span, set: None }
    }
}

/// A value with its place.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) value: Value,
    /// What stood after the `=` of a `--set`: it is text if text is wanted, whatever else it could be.
    pub(super) raw: Option<String>,
}

/// A value.
#[derive(Debug, Clone)]
pub(super) enum Value {
    String(String),
    Integer(Integer),
    /// As it was written, without underscores.
    Float(String),
    Boolean(bool),
    Datetime(String),
    Array(Vec<Node>),
    Table(Table),
}

/// An integer, and how it was written.
#[derive(Debug, Clone)]
pub(super) struct Integer {
    /// None: it doesn't fit.
    pub(super) value: Option<i64>,
    pub(super) digits: String,
    pub(super) radix: u32,
}

/// Keys and values in the order of the text.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    pub(super) entries: Vec<Entry>,
}

/// A key and its value.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_origin: Origin,
    pub(super) node: Node,
}

impl Table {
    pub(super) fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    pub(super) fn position(&self, key: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.key == key)
    }
}

impl Value {
    /// What it is, with an article.
    pub(super) fn describe(&self) -> &'static str {
        match self {
            Self::String(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a number with a point",
            Self::Boolean(_) => "a boolean",
            Self::Datetime(_) => "a date or time",
            Self::Array(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

/// Reads the whole text; the parser bounds how deep it nests.
pub(super) fn parse(text: &str) -> Result<Table, Problem> {
    match DeTable::parse(text) {
        Ok(table) => Ok(convert_table(table.get_ref(), &Origin::text)),
        Err(error) => Err(syntax(text, &error)),
    }
}

/// The value of `--set` number `set`, which belongs at `span`.
pub(super) fn setting(raw: &str, span: &Range<usize>, set: usize) -> Node {
    let origin = |_| Origin { span: span.clone(), set: Some(set) };
    let value = match DeValue::parse(raw) {
        Ok(value) => convert(value.get_ref(), &origin),
        Err(_) => Value::String(raw.to_owned()),
    };
    Node { origin: origin(0..0), value, raw: Some(raw.to_owned()) }
}

type Locate<'a> = &'a dyn Fn(Range<usize>) -> Origin;

fn convert_table(table: &DeTable<'_>, locate: Locate<'_>) -> Table {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    let entries = entries
        .into_iter()
        .map(|(key, value)| Entry {
            key: key.get_ref().clone().into_owned(),
            key_origin: locate(key.span()),
            node: Node { origin: locate(value.span()), value: convert(value.get_ref(), locate), raw: None },
        })
        .collect();
    Table { entries }
}

fn convert(value: &DeValue<'_>, locate: Locate<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.clone().into_owned()),
        DeValue::Integer(integer) => Value::Integer(Integer {
            value: i64::from_str_radix(integer.as_str(), integer.radix()).ok(),
            digits: integer.as_str().to_owned(),
            radix: integer.radix(),
        }),
        DeValue::Float(float) => Value::Float(float.as_str().to_owned()),
        DeValue::Boolean(value) => Value::Boolean(*value),
        DeValue::Datetime(datetime) => Value::Datetime(datetime.to_string()),
        DeValue::Array(items) => Value::Array(
            items
                .iter()
                .map(|item| Node { origin: locate(item.span()), value: convert(item.get_ref(), locate), raw: None })
                .collect(),
        ),
        DeValue::Table(table) => Value::Table(convert_table(table, locate)),
    }
}

/// The parser's message in kiln's words, with a remedy for the usual slips.
fn syntax(text: &str, error: &toml::de::Error) -> Problem {
    let mut span = error.span().unwrap_or(text.len()..text.len());
    let said = error.message().trim();
    let said = said.strip_suffix(", expected nothing").unwrap_or(said);
    let range = value_at(text, span.start);
    let value = text.get(range.clone()).unwrap_or_default();
    let quoted = || Some(format!("text stands in quotes: write \"{}\"", value.replace('"', "")));
    let (message, help) = if said.starts_with("string values must be quoted") {
        span = range;
        match value {
            "" => ("a value is missing".to_owned(), None),
            _ => (format!("`{value}` is not a value"), quoted()),
        }
    } else if said.starts_with("unexpected leading zero") {
        span = range;
        ("a number must not start with 0".to_owned(), quoted())
    } else if said.starts_with("invalid mantissa") {
        span = range;
        (format!("`{value}` is not a value"), quoted())
    } else if said.starts_with("invalid boolean") {
        span = range;
        (format!("`{value}` is not a value"), Some("booleans are `true` and `false`".to_owned()))
    } else if said.contains(" string, expected") && (said.ends_with("`\"`") || said.ends_with("`'`")) {
        ("a string is not closed".to_owned(), None)
    } else if said == "duplicate key" {
        let key = text.get(span.clone()).unwrap_or_default();
        let help = ["provision", "test"]
            .contains(&key)
            .then(|| format!("there can be several: write [[{key}]] with two brackets"));
        (format!("`{key}` is there twice"), help)
    } else if said.contains("recur") {
        ("this is nested too deeply".to_owned(), None)
    } else {
        (said.to_owned(), None)
    };
    Problem::new(&Origin::text(span), message, help)
}

/// The word around the byte `at`: what the user meant as one value.
fn value_at(text: &str, at: usize) -> Range<usize> {
    let before = text.get(..at).unwrap_or_default();
    let begin = before.rfind(['\n', '=', ',', '[', '{']).map_or(0, |found| found + 1);
    let rest = text.get(begin..).unwrap_or_default();
    let rest = &rest[..rest.find(['\n', '\r', ',', ']', '}', '#']).unwrap_or(rest.len())];
    let word = rest.trim();
    let start = if word.is_empty() { begin } else { begin + rest.len() - rest.trim_start().len() };
    start..start + word.len()
}
