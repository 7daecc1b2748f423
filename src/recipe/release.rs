//! What `[publish]` says of an image that is there: who may use it, for how long, and under which name it is found.

use std::time::Duration;

use super::publish::{Refusal, refusal};
use super::reader::Fields;
use super::{Grantee, words};

/// What is done with an image once it is available.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Release {
    /// Who may launch it.
    pub share: Vec<Grantee>,
    /// The accounts may make volumes of its snapshots too.
    pub share_snapshots: bool,
    /// How long after it was published it counts as old.
    pub deprecate_after: Option<Duration>,
    /// Whether it can be deregistered.
    pub protection: Protection,
    /// The SSM parameter that names the image, a template like the image's name.
    pub parameter: Option<String>,
}

words! {
    /// Whether an image can be deregistered.
    #[derive(Default)]
    Protection {
        /// It can.
        #[default]
        Off = "off",
        /// Not before that is turned off.
        On = "on",
        /// Not before that is turned off, nor in the day after.
        Cooldown = "cooldown",
    }
}

/// In days. AWS takes ten years for an image that is not public.
const LONGEST: u64 = 3650;

pub(super) fn read(fields: &Fields<'_>) -> Release {
    let mut release = Release::default();
    for found in fields.texts("share").unwrap_or_default() {
        match found.value.parse::<Grantee>() {
            Err(refusal) => fields.reader.refuse(&found.origin, refusal.message, Some(refusal.help)),
            Ok(grantee) if release.share.contains(&grantee) => {
                fields.reader.refuse(&found.origin, format!("`{grantee}` is there twice"), None);
            }
            Ok(grantee) => release.share.push(grantee),
        }
    }
    if let Some(found) = fields.boolean("share_snapshots") {
        release.share_snapshots = found.value;
        if found.value && release.share.is_empty() && fields.node("share").is_none() {
            let help = Some("write for example `share = [\"123456789012\"]`".to_owned());
            fields.reader.refuse(&found.origin, "`share_snapshots` without `share`", help);
        }
    }
    if let Some(found) = fields.filled("deprecate_after") {
        match days(&found.value) {
            Ok(after) => release.deprecate_after = Some(after),
            Err((message, help)) => fields.reader.refuse(&found.origin, message, help),
        }
    }
    release.protection = fields.word("protection").map(|found| found.value).unwrap_or_default();
    if let Some(found) = fields.filled("parameter") {
        match parameter(&found.value) {
            Ok(()) => release.parameter = Some(found.value),
            Err((message, help)) => fields.reader.refuse(&found.origin, message, help),
        }
    }
    release
}

/// A time in days (`90d`), weeks (`12w`) or years of 365 days (`2y`).
///
/// # Errors
/// In words: what is wrong, and what helps.
pub fn days(text: &str) -> Result<Duration, Refusal> {
    let wrong = || {
        let help = format!("write days, weeks or years, like `90d`, `12w` or `2y`, up to {LONGEST} days");
        refusal(format!("`{text}` is no time after which an image is old"), &help)
    };
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let days = match unit {
        "d" => Some(number),
        "w" => number.checked_mul(7),
        "y" => number.checked_mul(365),
        _ => None,
    };
    match days {
        Some(days @ 1..=LONGEST) => Ok(Duration::from_secs(days * 86_400)),
        _ => Err(wrong()),
    }
}

/// The name of an SSM parameter, with placeholders as in the image's name.
///
/// Source: "Creating Parameter Store parameters", AWS Systems Manager User Guide.
///
/// # Errors
/// In words: what is wrong, and what helps.
pub fn parameter(text: &str) -> Result<(), Refusal> {
    let parts = super::name_parts(text).map_err(|error| (error.message, Some(error.help)))?;
    let taken = |c: char| c.is_ascii_alphanumeric() || "_.-/".contains(c);
    let wrong = parts.iter().find_map(|part| match part {
        super::TextPart::Text(text) => text.chars().find(|c| !taken(*c)),
        _ => None,
    });
    if let Some(wrong) = wrong {
        let help = "parameters have letters, digits and `_.-/`";
        return Err(refusal(format!("a parameter's name can't contain `{wrong}`"), help));
    }
    let first = text.trim_start_matches('/').to_ascii_lowercase();
    if first.starts_with("aws") || first.starts_with("ssm") {
        return Err(refusal(
            format!("`{text}` can't be a parameter"),
            "names that start with `aws` or `ssm` are AWS's own",
        ));
    }
    if text.contains('/') && !text.starts_with('/') {
        return Err(refusal(format!("`{text}` can't be a parameter"), &format!("a path starts with a `/`: `/{text}`")));
    }
    if text.ends_with('/') || text.contains("//") || text.matches('/').count() > 15 || text.len() > 900 {
        let help = "a path has 1 to 15 names, none of them empty";
        return Err(refusal(format!("`{text}` can't be a parameter"), help));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_grows_old_in_days_weeks_or_years() {
        assert_eq!(days("90d").unwrap(), Duration::from_secs(90 * 86_400));
        assert_eq!(days("2w").unwrap(), Duration::from_secs(14 * 86_400));
        assert_eq!(days("10y").unwrap(), Duration::from_secs(3650 * 86_400));
        for wrong in ["", "d", "0d", "11y", "3651d", "90", "3h", "-1d", "99999999999999999999y", "é"] {
            assert!(days(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn parameters_have_awss_names() {
        for right in ["/images/{name}/latest", "latest", "/a_b/c.d-e"] {
            parameter(right).unwrap();
        }
        for wrong in ["/aws/x", "ssmx", "a/b", "/a/", "/a//b", "/a b", "{digest}", "{x}"] {
            assert!(parameter(wrong).is_err(), "{wrong}");
        }
    }
}
