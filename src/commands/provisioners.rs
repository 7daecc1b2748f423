//! `kiln provisioners`.

use std::fmt::Write as _;

use kiln::provisioners::{self, Input, Kind};
use kiln::units::show_duration;
use serde_json::{Value, json};

use super::Context;

/// Lists the provisioners with their inputs.
pub(super) fn run(context: &Context<'_>) {
    let mut text = String::new();
    let mut values = Vec::new();
    for provisioner in provisioners::all() {
        let _ = writeln!(text, "{} - {}", provisioner.name, provisioner.description);
        let mut inputs = serde_json::Map::new();
        for (name, input) in &provisioner.inputs {
            let _ = writeln!(text, "    {name} = {}\n        {}", brief(input), input.description);
            inputs.insert(name.clone(), describe(input));
        }
        if let Some(age) = provisioner.max_age {
            let age = show_duration(age);
            let _ = writeln!(
                text,
                "    max_age\n        what the step left is taken from the cache for {age}, unless the step says otherwise"
            );
        }
        text.push('\n');
        values.push(json!({
            "name": provisioner.name, "description": provisioner.description, "inputs": inputs,
            "max_age": provisioner.max_age.map(|age| age.as_secs()),
        }));
    }
    context.ui.result(&text, &Value::Array(values));
}

fn kind(input: &Input) -> &'static str {
    match input.kind {
        Kind::String => "string",
        Kind::Integer => "integer",
        Kind::Boolean => "boolean",
        Kind::List => "list of strings",
    }
}

fn brief(input: &Input) -> String {
    let mut text = kind(input).to_owned();
    if !input.choices.is_empty() {
        let _ = write!(text, ", one of {}", input.choices.join(", "));
    }
    if let (Some(minimum), Some(maximum)) = (input.minimum, input.maximum) {
        let _ = write!(text, ", {minimum} to {maximum}");
    }
    match &input.default {
        None => text.push_str(" (required)"),
        Some(value) if value.to_string().is_empty() => text.push_str(" (default: empty)"),
        Some(value) => {
            let _ = write!(text, " (default: {})", value.to_string().replace('\n', ", "));
        }
    }
    text
}

fn describe(input: &Input) -> Value {
    json!({
        "type": input.kind, "description": input.description, "choices": input.choices,
        "minimum": input.minimum, "maximum": input.maximum,
        "required": input.default.is_none(), "default": input.default,
    })
}
