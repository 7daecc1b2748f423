//! `with`: the inputs of a provisioner.

use std::collections::BTreeMap;

use super::reader::{Fields, list, suggest};
use super::tree::{Node, Origin, Table};
use crate::provisioners::{Input, Kind, Provisioner, Value, variable};

/// Every input as environment, defaults included; those with a problem are left out.
pub(super) fn inputs(fields: &Fields<'_>, provisioner: &Provisioner, uses: &Origin) -> BTreeMap<String, String> {
    let empty = Table::default();
    let name = provisioner.name;
    let (table, origin) = match fields.node("with") {
        None => (&empty, uses),
        Some(node) => match fields.as_table("with", node) {
            None => return BTreeMap::new(),
            Some(table) => (table, &node.origin),
        },
    };
    let known: Vec<_> = provisioner.inputs.keys().map(String::as_str).collect();
    for entry in table.entries.iter().filter(|entry| !provisioner.inputs.contains_key(&entry.key)) {
        let help = if known.is_empty() { "it takes none".to_owned() } else { suggest(&entry.key, &known) };
        fields.reader.refuse(&entry.key_origin, format!("`{name}` has no input `{}`", entry.key), Some(help));
    }
    let mut environment = BTreeMap::new();
    for (key, input) in &provisioner.inputs {
        let value = match (table.entry(key), &input.default) {
            (Some(entry), _) => value(fields, key, input, &entry.node),
            (None, Some(default)) => Some(default.clone()),
            (None, None) => {
                let help = format!("add `with = {{ {key} = {} }}`: {}", example(input), input.description);
                fields.reader.lacks(origin, format!("`{name}` needs the input `{key}`"), Some(help));
                None
            }
        };
        if let Some(value) = value {
            environment.insert(variable(key), value.to_string());
        }
    }
    environment
}

fn example(input: &Input) -> String {
    match (input.kind, input.choices.first()) {
        (Kind::String, Some(choice)) => format!("\"{choice}\""),
        (Kind::List, Some(choice)) => format!("[\"{choice}\"]"),
        (Kind::Integer, Some(choice)) => choice.clone(),
        (Kind::String, None) => "\"…\"".to_owned(),
        (Kind::List, None) => "[\"…\"]".to_owned(),
        (Kind::Integer, None) => input.minimum.unwrap_or(1).to_string(),
        (Kind::Boolean, _) => "true".to_owned(),
    }
}

fn value(fields: &Fields<'_>, key: &str, input: &Input, node: &Node) -> Option<Value> {
    let reader = fields.reader;
    let what = format!("`{key}`");
    let value = match input.kind {
        Kind::String => Value::String(reader.text(node, &what)?.value),
        Kind::Integer => Value::Integer(reader.integer(node, &what)?.value),
        Kind::Boolean => Value::Boolean(reader.boolean(node, &what)?.value),
        Kind::List => {
            let texts = reader.texts(node, &what)?;
            if let Some(broken) = texts.iter().find(|text| text.value.contains('\n')) {
                reader.refuse(&broken.origin, format!("an element of {what} contains a line break"), None);
                return None;
            }
            Value::List(texts.into_iter().map(|text| text.value).collect())
        }
    };
    match input.check(&value) {
        Ok(()) => Some(value),
        Err(wrong) => {
            let words: Vec<_> = input.choices.iter().map(String::as_str).collect();
            let help = (!words.is_empty()).then(|| {
                let near = suggest(&wrong.value, &words);
                if near.ends_with('?') { format!("{near} it takes {}", list(&words)) } else { near }
            });
            reader.refuse(&node.origin, format!("{what} {}", wrong.message), help);
            None
        }
    }
}
