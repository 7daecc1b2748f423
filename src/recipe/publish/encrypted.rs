//! `encrypted`, `kms_key` and `kms_keys` of `[publish]`.

use super::super::encryption::{self, Encryption};
use super::super::reader::Fields;
use super::super::tree::Origin;
use super::{Via, checked, region, told};

/// Reads them; `regions` are those of `[publish]`.
pub(super) fn read(fields: &Fields<'_>, regions: &[String], via: Via) -> Option<Encryption> {
    let encrypted = fields.boolean("encrypted");
    let mut encryption = Encryption::default();
    let key = checked(fields, "kms_key", |text| key_fits(text, via));
    encryption.kms_keys = fields.map("kms_keys", |name, key| {
        region(name)?;
        key_fits(key, via)?;
        encryption::kms_key_in(key, name).map_err(told)
    });
    if let Some(key) = key {
        let others = regions.iter().filter(|region| !encryption.kms_keys.contains_key(*region));
        for region in others {
            if let Err(refusal) = encryption::kms_key_in(&key.value, region) {
                fields.reader.refuse(&key.origin, refusal.message, Some(refusal.help));
                break;
            }
        }
        encryption.kms_key = Some(key.value);
    }
    match encrypted {
        Some(found) if !found.value => {
            if let Some(name) = ["kms_key", "kms_keys"].iter().find(|key| fields.entry(key).is_some()) {
                refuse_unused(fields, &found.origin, name);
            }
            None
        }
        Some(_) => Some(encryption),
        None => (fields.entry("kms_key").is_some() || fields.entry("kms_keys").is_some()).then_some(encryption),
    }
}

fn refuse_unused(fields: &Fields<'_>, origin: &Origin, key: &str) {
    let message = format!("`encrypted` is false, and `{key}` is given");
    fields.reader.refuse(origin, message, Some(format!("write `encrypted = true`, or leave out `{key}`")));
}

fn key_fits(text: &str, via: Via) -> Result<(), super::Refusal> {
    encryption::kms_key(text).map_err(told)?;
    match via {
        Via::Ebs | Via::Auto => encryption::kms_key_for_ebs_direct(text).map_err(told),
        Via::S3 => Ok(()),
    }
}
