//! The provisioners that kiln brings along: scripts with declared inputs, compiled into the program.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::LazyLock;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::units::parse_duration;

/// A script with declared inputs, shipped inside the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provisioner {
    /// Its name, for `uses`.
    pub name: &'static str,
    /// What it does, in one line.
    pub description: String,
    /// What it takes, by name.
    pub inputs: BTreeMap<String, Input>,
    /// How long what it left may be taken from the cache, unless the recipe says otherwise; none: for ever.
    pub max_age: Option<Duration>,
    /// What runs in the guest, with [`LIBRARY`] beside it as `lib.sh`.
    pub script: &'static str,
}

/// Something that a provisioner takes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// What values it takes.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// What it is when not given; none: it must be given.
    pub default: Option<Value>,
    /// What it means, in one line.
    pub description: String,
    /// The only values it takes; empty: any.
    #[serde(default)]
    pub choices: Vec<String>,
    /// The smallest integer it takes.
    pub minimum: Option<i64>,
    /// The largest integer it takes.
    pub maximum: Option<i64>,
}

/// The type of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Text.
    String,
    /// A whole number.
    Integer,
    /// True or false.
    Boolean,
    /// Texts, none with a line break.
    List,
}

/// The value of an input.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// Text.
    String(String),
    /// A whole number.
    Integer(i64),
    /// True or false.
    Boolean(bool),
    /// Texts, none with a line break.
    List(Vec<String>),
}

/// As it stands in the environment: a list has one element per line.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::String(text) => f.write_str(text),
            Self::Integer(number) => number.fmt(f),
            Self::Boolean(value) => value.fmt(f),
            Self::List(items) => f.write_str(&items.join("\n")),
        }
    }
}

/// A value that an input doesn't take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// Why; fits after the input's name.
    pub message: String,
    /// The value, or the element of the list.
    pub value: String,
}

impl Input {
    /// Whether it takes this value.
    ///
    /// # Errors
    /// Why it doesn't.
    pub fn check(&self, value: &Value) -> Result<(), Refused> {
        let refused = |message: String, value: &str| Err(Refused { message, value: value.to_owned() });
        let wanted = match (self.kind, value) {
            (Kind::String, Value::String(_))
            | (Kind::Integer, Value::Integer(_))
            | (Kind::Boolean, Value::Boolean(_))
            | (Kind::List, Value::List(_)) => None,
            (Kind::String, _) => Some("a string"),
            (Kind::Integer, _) => Some("an integer"),
            (Kind::Boolean, _) => Some("true or false"),
            (Kind::List, _) => Some("a list of strings"),
        };
        if let Some(wanted) = wanted {
            return refused(format!("wants {wanted}"), &value.to_string());
        }
        if let Value::Integer(number) = value {
            let (low, high) = (self.minimum, self.maximum);
            if low.is_some_and(|low| *number < low) || high.is_some_and(|high| *number > high) {
                let message = match (low, high) {
                    (Some(low), Some(high)) => format!("must be between {low} and {high}, not {number}"),
                    (Some(low), None) => format!("must be {low} or more, not {number}"),
                    (None, _) => format!("must be {} or less, not {number}", high.unwrap_or_default()),
                };
                return refused(message, &number.to_string());
            }
        }
        let text = value.to_string();
        let parts: Vec<&str> = match value {
            Value::List(items) => items.iter().map(String::as_str).collect(),
            _ => vec![&text],
        };
        match parts.into_iter().find(|part| !self.choices.is_empty() && !self.choices.iter().any(|c| c == part)) {
            Some(part) => refused(format!("can't be `{part}`"), part),
            None => Ok(()),
        }
    }
}

/// The environment variable that carries an input.
#[must_use]
pub fn variable(input: &str) -> String {
    format!("KILN_INPUT_{}", input.to_ascii_uppercase().replace('-', "_"))
}

/// Shell functions that every provisioner reads: `lib.sh` beside its script.
pub const LIBRARY: &str = include_str!("../provisioners/lib.sh");

/// Name, header and script of each, from `provisioners/NAME`.
macro_rules! shipped {
    ($($name:literal),* $(,)?) => {
        &[$((
            $name,
            include_str!(concat!("../provisioners/", $name, "/provisioner.toml")),
            include_str!(concat!("../provisioners/", $name, "/run.sh")),
        )),*]
    };
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    description: String,
    #[serde(default)]
    inputs: BTreeMap<String, Input>,
    #[serde(default, deserialize_with = "duration")]
    max_age: Option<Duration>,
}

fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    let age = parse_duration(&text).map_err(D::Error::custom)?;
    if age.is_zero() { Err(D::Error::custom("`max_age` must be longer than 0")) } else { Ok(Some(age)) }
}

fn read(name: &'static str, header: &str, script: &'static str) -> Result<Provisioner, toml::de::Error> {
    let Header { description, inputs, max_age } = toml::from_str(header)?;
    Ok(Provisioner { name, description, inputs, max_age, script })
}

/// By name.
const SHIPPED: &[(&str, &str, &str)] =
    shipped!["environment", "firewall", "nginx", "nodejs", "permissions", "updates", "users"];

/// All of them, by name.
///
/// # Panics
/// When a header can't be read, which a test rules out.
#[must_use]
pub fn all() -> &'static [Provisioner] {
    static ALL: LazyLock<Vec<Provisioner>> = LazyLock::new(|| {
        let read =
            |(name, header, script)| read(name, header, script).unwrap_or_else(|error| panic!("{name}: {error}"));
        SHIPPED.iter().copied().map(read).collect()
    });
    &ALL
}

/// The one with this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Provisioner> {
    all().iter().find(|provisioner| provisioner.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn input(header: &str) -> Input {
        toml::from_str(header).unwrap()
    }

    #[test]
    fn every_shipped_header_holds_together() {
        assert_eq!(all().len(), SHIPPED.len());
        assert!(all().is_sorted_by_key(|provisioner| provisioner.name));
        for provisioner in all() {
            let name = provisioner.name;
            assert!(provisioner.script.starts_with("#!/bin/sh"), "{name}: run.sh has no shebang");
            assert!(provisioner.script.contains(". ./lib.sh"), "{name}: run.sh doesn't read lib.sh");
            assert!(!provisioner.description.is_empty() && !provisioner.description.contains('\n'), "{name}");
            let variables: BTreeSet<_> = provisioner.inputs.keys().map(|key| variable(key)).collect();
            assert_eq!(variables.len(), provisioner.inputs.len(), "{name}: two inputs share a variable");
            for (key, input) in &provisioner.inputs {
                assert!(!input.description.is_empty() && !input.description.contains('\n'), "{name}.{key}");
                let shell_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
                assert!(key.chars().all(shell_name), "{name}.{key}");
                let default = input.default.as_ref().map(|default| input.check(default));
                assert_eq!(default.unwrap_or(Ok(())), Ok(()), "{name}.{key}: its own default is refused");
                assert!(provisioner.script.contains(&variable(key)), "{name}: run.sh never looks at {}", variable(key));
            }
        }
    }

    #[test]
    fn the_folder_has_no_others() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/provisioners");
        let mut folders: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        folders.sort();
        assert_eq!(folders, SHIPPED.iter().map(|(name, ..)| *name).collect::<Vec<_>>());
    }

    #[test]
    fn an_input_says_why_it_refuses() {
        let refusal = |input: &Input, value: Value| input.check(&value).unwrap_err().to_string();
        let port = input("type = 'integer'\ndescription = 'p'\nminimum = 1\nmaximum = 65535");
        assert_eq!(port.check(&Value::Integer(80)), Ok(()));
        assert_eq!(refusal(&port, Value::Integer(0)), "must be between 1 and 65535, not 0");
        assert_eq!(refusal(&port, Value::String("80".to_owned())), "wants an integer");
        let low = input("type = 'integer'\ndescription = 'p'\nminimum = 1");
        assert_eq!(refusal(&low, Value::Integer(0)), "must be 1 or more, not 0");
        let high = input("type = 'integer'\ndescription = 'p'\nmaximum = 9");
        assert_eq!(refusal(&high, Value::Integer(10)), "must be 9 or less, not 10");
        let list = input("type = 'list'\ndescription = 'l'\nchoices = ['a', 'b']");
        assert_eq!(list.check(&Value::List(vec!["b".to_owned()])), Ok(()));
        let wrong = list.check(&Value::List(vec!["a".to_owned(), "c".to_owned()])).unwrap_err();
        assert_eq!((wrong.message.as_str(), wrong.value.as_str()), ("can't be `c`", "c"));
    }

    #[test]
    fn values_stand_in_the_environment_as_documented() {
        assert_eq!(variable("server-name"), "KILN_INPUT_SERVER_NAME");
        assert_eq!(Value::List(vec!["a b".to_owned(), "c".to_owned()]).to_string(), "a b\nc");
        assert_eq!(Value::Boolean(true).to_string(), "true");
        assert_eq!(Value::Integer(-1).to_string(), "-1");
    }

    #[test]
    fn a_header_may_say_how_long_its_result_is_taken() {
        let read = |more: &str| read("x", &format!("description = 'x'\n{more}"), "");
        assert_eq!(read("").unwrap().max_age, None);
        assert_eq!(read("max_age = '36h'").unwrap().max_age, Some(Duration::from_hours(36)));
        let error = read("max_age = 'soon'").unwrap_err().to_string();
        assert!(error.contains("`soon` has no number"), "{error}");
        let error = read("max_age = '0s'").unwrap_err().to_string();
        assert!(error.contains("`max_age` must be longer than 0"), "{error}");
        let day = Some(Duration::from_hours(24));
        assert_eq!(find("updates").unwrap().max_age, day, "what is available changes every day");
    }

    #[test]
    fn a_header_with_an_unknown_key_is_refused() {
        let error = read("x", "description = 'x'\n[inputs.a]\ntype = 'string'\ndefualt = ''", "").unwrap_err();
        assert!(error.to_string().contains("unknown field `defualt`"), "{error}");
    }
}
