//! Encryption as the recipe and the command line ask for it together.

use kiln::cli::Publish;
use kiln::recipe::Encryption;

/// The command line's keys win: one without a region over all of the recipe's, one for a region over that region's.
pub(super) fn encryption(recipe: Option<&Encryption>, arguments: &Publish) -> Option<Encryption> {
    if recipe.is_none() && !arguments.encrypted && arguments.kms_key.is_empty() {
        return None;
    }
    let (of_regions, everywhere): (Vec<_>, Vec<_>) = arguments.kms_key.iter().partition(|key| key.contains('='));
    let mut encryption = match everywhere.last() {
        Some(key) => Encryption { kms_key: Some((*key).clone()), ..Encryption::default() },
        None => recipe.cloned().unwrap_or_default(),
    };
    let of_regions = of_regions.into_iter().filter_map(|key| key.split_once('='));
    encryption.kms_keys.extend(of_regions.map(|(region, key)| (region.to_owned(), key.to_owned())));
    Some(encryption)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use kiln::cli::{Cli, Command};

    use super::*;

    fn arguments(more: &[&str]) -> Publish {
        let line = ["kiln", "publish", "out/web"].iter().chain(more);
        match Cli::try_parse_from(line).unwrap().command {
            Command::Publish(arguments) => arguments,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_wins() {
        let asked = |recipe: Option<&Encryption>, more: &[&str]| encryption(recipe, &arguments(more));
        assert_eq!(asked(None, &[]), None);
        assert_eq!(asked(None, &["--encrypted"]), Some(Encryption::default()));
        let keys = |key: Option<&str>, regions: &[(&str, &str)]| Encryption {
            kms_key: key.map(str::to_owned),
            kms_keys: regions.iter().map(|(region, key)| ((*region).to_owned(), (*key).to_owned())).collect(),
        };
        let recipe = keys(Some("alias/a"), &[("eu-west-1", "alias/b")]);
        assert_eq!(asked(Some(&recipe), &["--encrypted"]), Some(recipe.clone()));
        assert_eq!(asked(Some(&recipe), &["--kms-key", "alias/c"]), Some(keys(Some("alias/c"), &[])));
        let own = asked(Some(&recipe), &["--kms-key", "eu-west-1=alias/c", "--kms-key", "us-east-1=alias/d"]);
        let expected = keys(Some("alias/a"), &[("eu-west-1", "alias/c"), ("us-east-1", "alias/d")]);
        assert_eq!(own, Some(expected));
    }
}
