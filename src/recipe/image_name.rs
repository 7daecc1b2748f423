//! The template for an AMI's name.

use super::reader::suggest;

/// A part of the template for an AMI's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NamePart<'a> {
    /// Literal text, of characters that AWS takes.
    Text(&'a str),
    /// `{name}`: the recipe's name.
    Name,
    /// `{date}`: the day, in UTC.
    Date,
    /// `{time}`: the time of day, in UTC.
    Time,
    /// `{digest:N}`: the first N (1 to 64) hexadecimal digits of the disk's digest.
    Digest(usize),
    /// `{version}`: kiln's version.
    Version,
}

/// What is wrong with a template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct NameError {
    /// The cause.
    pub message: String,
    /// What helps.
    pub help: Option<String>,
}

impl NameError {
    fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: Some(help.into()) }
    }
}

const LENGTHS: std::ops::RangeInclusive<usize> = 3..=128;
const DIGEST_HELP: &str = "write for example `{digest:8}`; there are 64 digits";

/// Splits a template into its parts.
///
/// # Errors
/// A placeholder that doesn't exist, or a character that AWS doesn't take.
pub fn name_parts(template: &str) -> Result<Vec<NamePart<'_>>, NameError> {
    let mut parts = Vec::new();
    let mut rest = template;
    while !rest.is_empty() {
        let literal = &rest[..rest.find('{').unwrap_or(rest.len())];
        if !literal.is_empty() {
            check_text(literal)?;
            parts.push(NamePart::Text(literal));
        }
        rest = &rest[literal.len()..];
        let Some(opened) = rest.strip_prefix('{') else { break };
        let (inside, after) = opened
            .split_once('}')
            .ok_or_else(|| NameError::new("a `{` is not closed", "write for example `{date}`"))?;
        parts.push(placeholder(inside)?);
        rest = after;
    }
    Ok(parts)
}

/// Splits a template and checks what is known of the name's length.
pub(super) fn check(template: &str, recipe_name: &str) -> Result<(), NameError> {
    let parts = name_parts(template)?;
    // What isn't known here has three characters at least.
    let shortest: usize = parts
        .iter()
        .map(|part| match part {
            NamePart::Text(text) => text.len(),
            NamePart::Name => recipe_name.len(),
            NamePart::Digest(digits) => *digits,
            NamePart::Date | NamePart::Time | NamePart::Version => 3,
        })
        .sum();
    if LENGTHS.contains(&shortest) {
        return Ok(());
    }
    Err(NameError::new(
        format!("an image's name has {} to {} characters", LENGTHS.start(), LENGTHS.end()),
        format!("this one would have {shortest}"),
    ))
}

fn placeholder(inside: &str) -> Result<NamePart<'static>, NameError> {
    Ok(match inside.split_once(':') {
        None => match inside {
            "name" => NamePart::Name,
            "date" => NamePart::Date,
            "time" => NamePart::Time,
            "version" => NamePart::Version,
            "digest" => return Err(NameError::new("`{digest}` doesn't say how many digits", DIGEST_HELP)),
            _ => return Err(unknown(inside)),
        },
        Some(("digest", digits)) => match digits.parse() {
            Ok(digits @ 1..=64) => NamePart::Digest(digits),
            _ => return Err(NameError::new(format!("`{digits}` is not a number of digits"), DIGEST_HELP)),
        },
        Some((name @ ("name" | "date" | "time" | "version"), _)) => {
            return Err(NameError::new(format!("`{name}` takes no `:`"), format!("write `{{{name}}}`")));
        }
        Some(_) => return Err(unknown(inside)),
    })
}

fn unknown(inside: &str) -> NameError {
    let known = ["{name}", "{date}", "{time}", "{digest:8}", "{version}"];
    let written = format!("{{{inside}}}");
    NameError::new(format!("unknown placeholder `{written}`"), suggest(&written, &known))
}

fn check_text(text: &str) -> Result<(), NameError> {
    let taken = |c: char| c.is_ascii_alphanumeric() || "()[] ./-'@_".contains(c);
    match text.chars().find(|c| !taken(*c)) {
        None => Ok(()),
        Some('}') => Err(NameError::new("a `}` without `{`", "write for example `{date}`")),
        Some(wrong) => Err(NameError::new(
            format!("an image's name can't contain {}", shown(wrong)),
            "AWS takes letters, digits, spaces and `()[]./-'@_`",
        )),
    }
}

fn shown(c: char) -> String {
    if c.is_control() { format!("the character U+{:04X}", u32::from(c)) } else { format!("`{c}`") }
}
