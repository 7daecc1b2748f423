//! What AWS takes of a bucket's name, a description, tags and how instances boot; [`super::Ebs`] and [`super::Encryption`]
//! know it of volumes and keys. One rule for the recipe, which shows a mistake at its line, and for publishing, where a
//! value may come from the command line or from an older kiln's manifest.

use super::BootMode;

/// How many tags AWS takes on one thing.
const TAGS: usize = 50;
/// Tags that kiln sets itself: `Name`, `kiln:digest`, `kiln:name`, and `kiln:settings` on the image, `kiln:run` on
/// the import task and on the snapshot.
const OWN_TAGS: usize = 4;

/// What AWS would not take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The cause.
    pub message: String,
    /// What helps.
    pub help: String,
}

impl Refusal {
    fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into() }
    }
}

/// Whether `text` can be the name of a bucket.
///
/// # Errors
/// When it can't.
pub fn bucket(text: &str) -> Result<(), Refusal> {
    if let Some(rest) = text.strip_prefix("s3://") {
        let (name, key) = rest.split_once('/').unwrap_or((rest, ""));
        let help = match key {
            "" => format!("write `{name}`"),
            _ => format!("write `{name}`, and `prefix = \"{key}\"` in the recipe's [publish]"),
        };
        return Err(Refusal::new("the bucket is wanted by its name, not by an address", help));
    }
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let fits = (3..=63).contains(&text.len())
        && text.starts_with(edge)
        && text.ends_with(edge)
        && text.chars().all(|c| edge(c) || c == '-' || c == '.')
        && !text.contains("..");
    if fits {
        return Ok(());
    }
    Err(Refusal::new(
        format!("`{text}` can't be a bucket"),
        "buckets have 3 to 63 lowercase letters, digits, `-` and `.`, and begin and end with a letter or digit",
    ))
}

/// Whether `text` can be an image's description. AWS itself says so only in `RegisterImage`, after the import.
///
/// # Errors
/// When it can't.
pub fn description(text: &str) -> Result<(), Refusal> {
    let length = text.chars().count();
    if length > 255 {
        return Err(Refusal::new(
            format!("an image's description can't have {length} characters"),
            "AWS takes up to 255",
        ));
    }
    match text.chars().find(|c| !c.is_ascii() || c.is_ascii_control()) {
        Some(wrong) => Err(Refusal::new(
            format!("an image's description can't contain `{}`", wrong.escape_debug()),
            "AWS takes only printable ASCII characters there",
        )),
        None => Ok(()),
    }
}

/// Whether image and snapshot can have this tag.
///
/// # Errors
/// When they can't.
pub fn tag(key: &str, value: &str) -> Result<(), Refusal> {
    let (keys, values) = (key.chars().count(), value.chars().count());
    let help = if !(1..=128).contains(&keys) {
        format!("AWS takes 1 to 128 characters in a tag's key, not {keys}")
    } else if values > 256 {
        format!("AWS takes up to 256 characters in a tag's value, not {values}")
    } else if key.to_ascii_lowercase().starts_with("aws:") {
        "keys that start with `aws:` are AWS's own".to_owned()
    } else if key.starts_with("kiln:") {
        "keys that start with `kiln:` are kiln's own".to_owned()
    } else {
        return Ok(());
    };
    Err(Refusal::new(format!("the tag `{key}` can't be set"), help))
}

/// Whether AWS takes so many tags, next to kiln's own. `more` are those that kiln sets by choice: `kiln:encryption`,
/// `kiln:holes`.
///
/// # Errors
/// When it doesn't.
pub fn tag_count(tags: usize, more: usize) -> Result<(), Refusal> {
    let own = OWN_TAGS + more;
    let most = TAGS - own;
    if tags <= most {
        return Ok(());
    }
    let help = format!("AWS takes {TAGS}, of which kiln sets {own} itself: {most} are left");
    Err(Refusal::new(format!("{tags} tags are too many"), help))
}

/// Whether instances that boot by `mode` can have a TPM 2.0 (`NitroTPM`).
///
/// # Errors
/// When they can't.
pub fn tpm(mode: BootMode) -> Result<(), Refusal> {
    match mode {
        BootMode::Uefi => Ok(()),
        mode => Err(Refusal::new(
            format!("an image that boots by `{mode}` can't have a TPM"),
            "AWS takes `tpm` only with boot_mode = \"uefi\"",
        )),
    }
}

/// Whether instances that boot by `mode` can have UEFI variables.
///
/// # Errors
/// When they can't.
pub fn uefi_data(mode: BootMode) -> Result<(), Refusal> {
    match mode {
        BootMode::Uefi | BootMode::UefiPreferred => Ok(()),
        BootMode::LegacyBios => Err(Refusal::new(
            format!("an image that boots by `{mode}` has no use for `uefi_data`"),
            "instances have UEFI variables only with boot_mode = \"uefi\" or \"uefi-preferred\"",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(result: Result<(), Refusal>) -> String {
        let Refusal { message, help } = result.unwrap_err();
        format!("{message}; {help}")
    }

    #[test]
    fn a_bucket_has_a_name() {
        bucket("my-import.bucket").unwrap();
        assert_eq!(said(bucket("s3://b")), "the bucket is wanted by its name, not by an address; write `b`");
        assert!(said(bucket("s3://b/x")).ends_with("write `b`, and `prefix = \"x\"` in the recipe's [publish]"));
        for wrong in ["", "ab", "-abc", "a_b", "a..b", "Abc"] {
            assert!(said(bucket(wrong)).starts_with(&format!("`{wrong}` can't be a bucket; ")));
        }
    }

    #[test]
    fn a_description_is_short_and_printable_ascii() {
        description(&"x".repeat(255)).unwrap();
        let long = said(description(&"x".repeat(256)));
        assert_eq!(long, "an image's description can't have 256 characters; AWS takes up to 255");
        assert!(said(description("naïve")).starts_with("an image's description can't contain `ï`; "));
        assert!(said(description("a\nb")).starts_with("an image's description can't contain `\\n`; "));
    }

    #[test]
    fn tags_keep_awss_rules_and_kilns_names() {
        tag("team", "").unwrap();
        assert_eq!(said(tag("aws:x", "")), "the tag `aws:x` can't be set; keys that start with `aws:` are AWS's own");
        assert_eq!(
            said(tag("kiln:x", "")),
            "the tag `kiln:x` can't be set; keys that start with `kiln:` are kiln's own"
        );
        assert!(said(tag("", "")).starts_with("the tag `` can't be set; "));
        assert!(said(tag("k", &"v".repeat(257))).ends_with("in a tag's value, not 257"));
        tag_count(46, 0).unwrap();
        assert_eq!(
            said(tag_count(47, 0)),
            "47 tags are too many; AWS takes 50, of which kiln sets 4 itself: 46 are left"
        );
        assert_eq!(
            said(tag_count(46, 1)),
            "46 tags are too many; AWS takes 50, of which kiln sets 5 itself: 45 are left"
        );
    }

    #[test]
    fn a_tpm_needs_uefi_and_variables_some_of_it() {
        let all = [BootMode::LegacyBios, BootMode::Uefi, BootMode::UefiPreferred];
        assert_eq!(all.map(|mode| tpm(mode).is_ok()), [false, true, false]);
        assert_eq!(all.map(|mode| uefi_data(mode).is_ok()), [false, true, true]);
    }
}
