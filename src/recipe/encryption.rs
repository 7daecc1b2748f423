//! How an image's snapshots are encrypted, and how KMS keys are named.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::aws::Refusal;

/// Encryption that is asked for, whatever the account does by itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Encryption {
    /// The KMS key for regions that have none of their own; none: the account's default key for EBS there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kms_key: Option<String>,
    /// KMS keys by region.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kms_keys: BTreeMap<String, String>,
}

impl Encryption {
    /// The KMS key for a region; none: the account's default key for EBS there.
    #[must_use]
    pub fn key(&self, region: &str) -> Option<&str> {
        self.kms_keys.get(region).or(self.kms_key.as_ref()).map(String::as_str)
    }

    /// All keys that are named.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.kms_key.iter().chain(self.kms_keys.values()).map(String::as_str)
    }
}

/// The parts of a key's name that matter.
#[derive(Debug, PartialEq, Eq)]
enum Key<'a> {
    /// An id or an alias: each region has its own.
    Local,
    /// An ARN.
    Arn { region: &'a str, is_alias: bool },
}

fn read(text: &str) -> Option<Key<'_>> {
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    if let ["arn", partition, "kms", region, account, resource] = parts[..] {
        let is_account = account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit());
        let id = resource.strip_prefix("key/").is_some_and(is_id);
        let fits = partition.starts_with("aws") && !region.is_empty() && is_account && (id || is_alias(resource));
        return fits.then_some(Key::Arn { region, is_alias: !id });
    }
    (is_id(text) || is_alias(text)).then_some(Key::Local)
}

/// `alias/NAME`.
fn is_alias(text: &str) -> bool {
    let named = |c: char| c.is_ascii_alphanumeric() || "/_-".contains(c);
    text.len() <= 256 && text.strip_prefix("alias/").is_some_and(|name| !name.is_empty() && name.chars().all(named))
}

/// A UUID, or `mrk-` and 32 digits for a key of many regions.
fn is_id(text: &str) -> bool {
    let hex = |text: &str, length| text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let groups: Vec<&str> = text.split('-').collect();
    match groups[..] {
        ["mrk", digits] => hex(digits, 32),
        [first, ref middle @ .., last] if middle.len() == 3 => {
            hex(first, 8) && middle.iter().all(|group| hex(group, 4)) && hex(last, 12)
        }
        _ => false,
    }
}

/// Whether `text` can name a KMS key. AWS itself looks at it only while it imports.
///
/// # Errors
/// When it can't.
pub fn kms_key(text: &str) -> Result<(), Refusal> {
    if read(text).is_some() {
        return Ok(());
    }
    let alias = format!("alias/{text}");
    let help = if !text.starts_with("arn:") && !text.starts_with("alias/") && is_alias(&alias) {
        format!("an alias is written `{alias}`, a key as its id or ARN")
    } else {
        "write `alias/NAME`, the key's id, or its ARN".to_owned()
    };
    Err(Refusal { message: format!("`{text}` is not a KMS key"), help })
}

/// Whether the key `text` can be used in `region`.
///
/// # Errors
/// When it is another region's.
pub fn kms_key_in(text: &str, region: &str) -> Result<(), Refusal> {
    match read(text) {
        Some(Key::Arn { region: other, .. }) if other != region => Err(Refusal {
            message: format!("the KMS key `{text}` is in {other} and can't encrypt in {region}"),
            help: format!("name a key of {region}: `kms_keys = {{ \"{region}\" = \"…\" }}`, or --kms-key {region}=KEY"),
        }),
        _ => Ok(()),
    }
}

/// Whether EBS direct takes the key `text`: it wants a key's ARN, and neither its id nor an alias.
///
/// # Errors
/// When it doesn't.
pub fn kms_key_for_ebs_direct(text: &str) -> Result<(), Refusal> {
    if matches!(read(text), Some(Key::Arn { is_alias: false, .. })) {
        return Ok(());
    }
    Err(Refusal {
        message: format!("EBS direct takes a KMS key only by its ARN, and `{text}` is none"),
        help: format!("`aws kms describe-key --key-id {text} --query KeyMetadata.Arn --output text` prints it"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "1234abcd-12ab-34cd-56ef-1234567890ab";

    #[test]
    fn a_key_is_named_in_every_way_that_aws_knows() {
        let [arn, alias] =
            [format!("key/{ID}"), "alias/x".to_owned()].map(|key| format!("arn:aws:kms:eu-west-1:123456789012:{key}"));
        let many = "mrk-1234abcd12ab34cd56ef1234567890ab";
        for good in [ID, many, "alias/aws/ebs", "alias/my_key-1", &arn, &alias] {
            kms_key(good).unwrap();
        }
        for wrong in ["", "alias/", "alias/a b", "arn:aws:kms:eu-west-1:1:key/x", "arn:aws:s3:::bucket"] {
            assert_eq!(kms_key(wrong).unwrap_err().message, format!("`{wrong}` is not a KMS key"));
        }
        let help = kms_key("my-key").unwrap_err().help;
        assert_eq!(help, "an alias is written `alias/my-key`, a key as its id or ARN");

        kms_key_in(&arn, "eu-west-1").unwrap();
        kms_key_in("alias/x", "us-east-1").unwrap();
        for key in [&arn, &alias] {
            let message = kms_key_in(key, "us-east-1").unwrap_err().message;
            assert_eq!(message, format!("the KMS key `{key}` is in eu-west-1 and can't encrypt in us-east-1"));
        }
        kms_key_for_ebs_direct(&arn).unwrap();
        for key in [ID, "alias/x", &alias] {
            let message = kms_key_for_ebs_direct(key).unwrap_err().message;
            assert_eq!(message, format!("EBS direct takes a KMS key only by its ARN, and `{key}` is none"));
        }
    }

    #[test]
    fn a_regions_own_key_comes_first() {
        let keys = [("eu-west-1".to_owned(), "alias/b".to_owned())].into();
        let encryption = Encryption { kms_key: Some("alias/a".to_owned()), kms_keys: keys };
        assert_eq!(encryption.key("eu-west-1"), Some("alias/b"));
        assert_eq!(encryption.key("us-east-1"), Some("alias/a"));
        assert_eq!(Encryption::default().key("us-east-1"), None);
    }
}
