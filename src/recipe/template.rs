//! Texts with placeholders: an image's name and description, and the values of tags.

use super::reader::suggest;

/// A part of a text with placeholders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextPart<'a> {
    /// Literal text.
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

/// What is wrong with such a text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct TemplateError {
    /// The cause.
    pub message: String,
    /// What helps.
    pub help: String,
}

impl TemplateError {
    fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into() }
    }
}

/// What placeholders stand for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meanings {
    /// Of `{name}`.
    pub name: String,
    /// Of `{date}`.
    pub date: String,
    /// Of `{time}`.
    pub time: String,
    /// Of `{digest:64}`.
    pub digest: String,
    /// Of `{version}`.
    pub version: String,
}

impl Meanings {
    /// The text.
    #[must_use]
    pub fn fill(&self, parts: &[TextPart<'_>]) -> String {
        let word = |part: &TextPart<'_>| match part {
            TextPart::Text(text) => (*text).to_owned(),
            TextPart::Name => self.name.clone(),
            TextPart::Date => self.date.clone(),
            TextPart::Time => self.time.clone(),
            TextPart::Digest(digits) => self.digest.chars().take(*digits).collect(),
            TextPart::Version => self.version.clone(),
        };
        parts.iter().map(word).collect()
    }

    /// What stands for them before the disk is there: a text that is wrong with these is wrong. What isn't known then has
    /// three characters at least.
    pub(super) fn shortest(name: &str) -> Self {
        let three = || "xxx".to_owned();
        Self { name: name.to_owned(), date: three(), time: three(), digest: "0".repeat(64), version: three() }
    }
}

const LENGTHS: std::ops::RangeInclusive<usize> = 3..=128;
const DIGEST_HELP: &str = "write for example `{digest:8}`; there are 64 digits";

/// Splits any text into its parts; `{{` stands for a `{`.
///
/// # Errors
/// A placeholder that doesn't exist.
pub fn text_parts(template: &str) -> Result<Vec<TextPart<'_>>, TemplateError> {
    let mut parts = Vec::new();
    let mut rest = template;
    while !rest.is_empty() {
        let literal = &rest[..rest.find('{').unwrap_or(rest.len())];
        if !literal.is_empty() {
            parts.push(TextPart::Text(literal));
        }
        rest = &rest[literal.len()..];
        if let Some(after) = rest.strip_prefix("{{") {
            parts.push(TextPart::Text(&rest[..1]));
            rest = after;
            continue;
        }
        let Some(opened) = rest.strip_prefix('{') else { break };
        let (inside, after) = opened
            .split_once('}')
            .ok_or_else(|| TemplateError::new("a `{` is not closed", "write for example `{date}`"))?;
        parts.push(placeholder(inside)?);
        rest = after;
    }
    Ok(parts)
}

/// Splits the template of an image's name into its parts; all text is of characters that AWS takes there.
///
/// # Errors
/// A placeholder that doesn't exist, or a character that AWS doesn't take.
pub fn name_parts(template: &str) -> Result<Vec<TextPart<'_>>, TemplateError> {
    let parts = text_parts(template)?;
    for part in &parts {
        if let TextPart::Text(text) = part {
            check_name(text)?;
        }
    }
    Ok(parts)
}

/// Splits a template and checks what is known of the name's length.
pub(super) fn check_image_name(template: &str, recipe_name: &str) -> Result<(), TemplateError> {
    let parts = name_parts(template)?;
    let shortest = Meanings::shortest(recipe_name).fill(&parts).len();
    if LENGTHS.contains(&shortest) {
        return Ok(());
    }
    Err(TemplateError::new(
        format!("an image's name has {} to {} characters", LENGTHS.start(), LENGTHS.end()),
        format!("this one would have {shortest}"),
    ))
}

fn placeholder(inside: &str) -> Result<TextPart<'static>, TemplateError> {
    Ok(match inside.split_once(':') {
        None => match inside {
            "name" => TextPart::Name,
            "date" => TextPart::Date,
            "time" => TextPart::Time,
            "version" => TextPart::Version,
            "digest" => return Err(TemplateError::new("`{digest}` doesn't say how many digits", DIGEST_HELP)),
            _ => return Err(unknown(inside)),
        },
        Some(("digest", digits)) => match digits.parse() {
            Ok(digits @ 1..=64) => TextPart::Digest(digits),
            _ => return Err(TemplateError::new(format!("`{digits}` is not a number of digits"), DIGEST_HELP)),
        },
        Some((name @ ("name" | "date" | "time" | "version"), _)) => {
            return Err(TemplateError::new(format!("`{name}` takes no `:`"), format!("write `{{{name}}}`")));
        }
        Some(_) => return Err(unknown(inside)),
    })
}

fn unknown(inside: &str) -> TemplateError {
    let known = ["{name}", "{date}", "{time}", "{digest:8}", "{version}"];
    let written = format!("{{{inside}}}");
    TemplateError::new(format!("unknown placeholder `{written}`"), suggest(&written, &known))
}

fn check_name(text: &str) -> Result<(), TemplateError> {
    let taken = |c: char| c.is_ascii_alphanumeric() || "()[] ./-'@_".contains(c);
    match text.chars().find(|c| !taken(*c)) {
        None => Ok(()),
        Some('}') => Err(TemplateError::new("a `}` without `{`", "write for example `{date}`")),
        Some(wrong) => Err(TemplateError::new(
            format!("an image's name can't contain {}", shown(wrong)),
            "AWS takes letters, digits, spaces and `()[]./-'@_`",
        )),
    }
}

fn shown(c: char) -> String {
    if c.is_control() { format!("the character U+{:04X}", u32::from(c)) } else { format!("`{c}`") }
}
