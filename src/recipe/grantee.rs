//! Whom an image is shared with.

use std::fmt;
use std::str::FromStr;

use super::aws::Refusal;

/// An account, or several of them at once, as AWS names them in launch permissions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Grantee {
    /// An account, by its 12 digits.
    Account(String),
    /// All accounts of an organisation, by its ARN.
    Organisation(String),
    /// All accounts of an organisational unit, by its ARN.
    Unit(String),
    /// All accounts there are.
    Everyone,
}

impl Grantee {
    /// The partition that an ARN is of.
    #[must_use]
    pub fn partition(&self) -> Option<&str> {
        match self {
            Self::Organisation(arn) | Self::Unit(arn) => arn.split(':').nth(1),
            Self::Account(_) | Self::Everyone => None,
        }
    }
}

impl fmt::Display for Grantee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Account(name) | Self::Organisation(name) | Self::Unit(name) => name,
            Self::Everyone => "all",
        })
    }
}

impl FromStr for Grantee {
    type Err = Refusal;

    /// Source: `LaunchPermission` in the EC2 API reference; the ids' shapes from "Organization" and
    /// "`OrganizationalUnit`" in that of Organizations.
    fn from_str(text: &str) -> Result<Self, Refusal> {
        let refused =
            |help: &str| Refusal { message: format!("an image can't be shared with `{text}`"), help: help.to_owned() };
        if text == "all" {
            return Ok(Self::Everyone);
        }
        if is_account(text) {
            return Ok(Self::Account(text.to_owned()));
        }
        if text.replace('-', "").len() == 12 && is_account(&text.replace('-', "")) {
            return Err(refused(&format!("write `{}`", text.replace('-', ""))));
        }
        if text.starts_with("o-") || text.starts_with("ou-") {
            return Err(refused(
                "organisations and units are named by their ARN (`aws organizations describe-organization`)",
            ));
        }
        let parts: Vec<&str> = text.splitn(6, ':').collect();
        let ["arn", "aws" | "aws-cn" | "aws-us-gov", "organizations", "", account, resource] = parts[..] else {
            return Err(refused(
                "write an account's 12 digits, the ARN of an organisation or of a unit of it, or `all`",
            ));
        };
        let path: Vec<&str> = resource.split('/').collect();
        match path[..] {
            ["organization", id] if is_account(account) && has_id(id, "o-") => Ok(Self::Organisation(text.to_owned())),
            ["ou", organisation, id] if is_account(account) && has_id(organisation, "o-") && has_id(id, "ou-") => {
                Ok(Self::Unit(text.to_owned()))
            }
            _ => Err(refused(
                "such ARNs read `arn:aws:organizations::123456789012:organization/o-abcdefghij` and \
                 `arn:aws:organizations::123456789012:ou/o-abcdefghij/ou-abcd-12345678`",
            )),
        }
    }
}

fn is_account(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn has_id(text: &str, prefix: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    text.strip_prefix(prefix).is_some_and(|id| id.len() >= 10 && id.len() <= 65 && id.chars().all(allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORGANISATION: &str = "arn:aws:organizations::123456789012:organization/o-abcdefghij";
    const UNIT: &str = "arn:aws-us-gov:organizations::123456789012:ou/o-abcdefghij/ou-abcd-12345678";

    #[test]
    fn accounts_organisations_units_and_everyone_are_told_apart_and_written_as_they_were() {
        let read = |text: &str| text.parse::<Grantee>().unwrap();
        assert_eq!(read("123456789012"), Grantee::Account("123456789012".to_owned()));
        assert_eq!(read("all"), Grantee::Everyone);
        assert_eq!(read(ORGANISATION), Grantee::Organisation(ORGANISATION.to_owned()));
        assert_eq!(read(UNIT), Grantee::Unit(UNIT.to_owned()));
        for text in ["123456789012", "all", ORGANISATION, UNIT] {
            assert_eq!(read(text).to_string(), text);
        }
        assert_eq!(read(UNIT).partition(), Some("aws-us-gov"));
        assert_eq!(read("all").partition(), None);
    }

    #[test]
    fn anything_else_is_refused_with_what_would_do() {
        let help = |text: &str| text.parse::<Grantee>().unwrap_err().help;
        assert_eq!(help("1234-5678-9012"), "write `123456789012`");
        assert!(help("o-abcdefghij").contains("by their ARN"));
        for text in ["", "12345678901", "1234567890123", "everyone", "arn:aws:iam::123456789012:root"] {
            assert!(help(text).starts_with("write an account's 12 digits"), "{text}");
        }
        for text in [
            "arn:aws:organizations::123456789012:organization/abc",
            "arn:aws:organizations::1:organization/o-abcdefghij",
            "arn:aws:organizations::123456789012:account/o-abcdefghij/123456789012",
            "arn:aws:organizations::123456789012:ou/o-abcdefghij",
        ] {
            assert!(help(text).starts_with("such ARNs read"), "{text}");
        }
    }
}
