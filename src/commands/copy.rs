//! `kiln copy`.

use std::collections::BTreeMap;

use kiln::cli::Copy;
use kiln::error::{Error, Exit};
use kiln::publish::life::{Regions, outcome};
use serde_json::{Value, json};

use super::{Context, account, duration};

/// Copies; prints `REGION AMI-ID` for each copy.
pub(super) fn run(context: &Context<'_>, arguments: &Copy) -> Result<(), Error> {
    let which = account::which(&arguments.name);
    let mut to = arguments.to.clone();
    to.sort();
    to.dedup();
    let keys = keys(&arguments.kms_key, &to)?;
    let limit = duration("--timeout", &arguments.timeout)?;
    let from = arguments.from.clone().map_or(Regions::Usual, |region| Regions::These(vec![region]));
    let copied = account::with_account(context, &from, Some(limit), |account| {
        let image = account.newest(&which)?;
        Ok(account.copy(&image, arguments.image_name.as_deref(), &to, |region| keys.get(region).cloned()))
    })?;
    let lines: Vec<String> = copied.done.iter().map(|(region, copy)| format!("{region} {}", copy.image_id)).collect();
    let values: Vec<Value> = copied
        .done
        .iter()
        .map(|(region, copy)| {
            let mut value = json!(copy);
            value["region"] = json!(region);
            value
        })
        .collect();
    context.ui.result(&lines.join("\n"), &json!(values));
    outcome(copied.failed)
}

/// The key for each region that has one.
fn keys(texts: &[String], to: &[String]) -> Result<BTreeMap<String, String>, Error> {
    let usage = |message: String, help: String| Err(Error::new(Exit::Usage, message).help(help));
    let (mut everywhere, mut each) = (None, BTreeMap::new());
    for text in texts {
        let (region, key) = match text.split_once('=') {
            Some((region, key)) => (Some(region), key),
            None => (None, text.as_str()),
        };
        if key.is_empty() {
            return usage(format!("--kms-key: `{text}` names no key"), "write KEY or REGION=KEY".to_owned());
        }
        match region {
            Some(region) if !to.iter().any(|known| known == region) => {
                return usage(
                    format!("--kms-key: nothing is copied to `{region}`"),
                    format!("name a region of --to: {}", to.join(", ")),
                );
            }
            Some(region) => drop(each.insert(region.to_owned(), key.to_owned())),
            None if everywhere.replace(key).is_some() => {
                return usage("--kms-key: two keys for the same regions".to_owned(), "write REGION=KEY".to_owned());
            }
            None => {}
        }
    }
    if let Some(key) = everywhere {
        for region in to {
            each.entry(region.clone()).or_insert_with(|| key.to_owned());
        }
    }
    let elsewhere = |(region, key): &(&String, &String)| region_of_arn(key).is_some_and(|its| its != region.as_str());
    if let Some((region, key)) = each.iter().find(elsewhere) {
        return usage(
            format!("--kms-key: `{key}` is no key of {region}"),
            format!("a copy is encrypted with a key of its own region: --kms-key {region}=KEY"),
        );
    }
    Ok(each)
}

/// The region that a key's or an alias's ARN names.
fn region_of_arn(key: &str) -> Option<&str> {
    match key.split(':').collect::<Vec<_>>()[..] {
        ["arn", _, "kms", region, ..] => Some(region),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(texts: &[&str]) -> Result<BTreeMap<String, String>, String> {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        keys(&owned(texts), &owned(&["eu-west-1", "us-east-1"])).map_err(|error| error.message)
    }

    #[test]
    fn a_key_is_for_one_region_or_for_all_that_have_no_other() {
        let pairs = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(region, key)| ((*region).to_owned(), (*key).to_owned())).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(read(&[]), Ok(BTreeMap::new()));
        assert_eq!(read(&["alias/a"]), Ok(pairs(&[("eu-west-1", "alias/a"), ("us-east-1", "alias/a")])));
        assert_eq!(read(&["eu-west-1=alias/a"]), Ok(pairs(&[("eu-west-1", "alias/a")])));
        let both = pairs(&[("eu-west-1", "alias/b"), ("us-east-1", "alias/a")]);
        assert_eq!(read(&["alias/a", "eu-west-1=alias/b"]), Ok(both));
    }

    #[test]
    fn keys_that_encrypt_nothing_are_refused() {
        assert_eq!(read(&["eu-west-2=k"]).unwrap_err(), "--kms-key: nothing is copied to `eu-west-2`");
        assert_eq!(read(&["a", "b"]).unwrap_err(), "--kms-key: two keys for the same regions");
        assert_eq!(read(&["eu-west-1="]).unwrap_err(), "--kms-key: `eu-west-1=` names no key");
        let arn = "arn:aws:kms:eu-west-1:123456789012:key/1234";
        assert_eq!(read(&[arn]).unwrap_err(), format!("--kms-key: `{arn}` is no key of us-east-1"));
        read(&[&format!("eu-west-1={arn}")]).unwrap();
    }
}
