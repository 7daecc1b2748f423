//! What `kiln publish` is told of writing a disk block by block (EBS direct).

use std::path::Path;

use kiln::build::manifest::BLOCKS;
use kiln::cli::Publish;
use kiln::disk::BlockMap;
use kiln::error::{Error, Exit};
use kiln::publish::{Parents, Wanted};
use kiln::recipe::{Via, volume};

/// What to build on in each of `regions`, which are empty if the SDK is to find the region.
pub(super) fn parents(arguments: &Publish, via: Via, regions: &[String]) -> Result<Parents, Error> {
    none_asked(arguments, via)?;
    let mut parents = Parents::default();
    for asked in &arguments.direct.parent {
        let before = match asked.split_once('=') {
            Some((region, _)) if !regions.iter().any(|one| one == region) => {
                return Err(usage(format!("--parent {asked}: nothing is published to `{region}`"))
                    .help(format!("publish to it with --region {region} too, or leave out this --parent")));
            }
            Some((region, parent)) => parents.of_regions.insert(region.to_owned(), wanted(parent)?),
            None => parents.everywhere.replace(wanted(asked)?),
        };
        if before.is_some() {
            return Err(
                usage(format!("--parent {asked}: that has its parent already")).help("name one for each region")
            );
        }
    }
    let others = regions.iter().filter(|region| !parents.of_regions.contains_key(*region)).count();
    if let Some(Wanted::Snapshot(id)) = &parents.everywhere
        && via == Via::Ebs
        && others > 1
    {
        let message = format!("--parent {id}: a snapshot is in one region, and the disk is written to {others}");
        return Err(usage(message).help(format!(
            "write --parent REGION={id}, once for each region that has such a snapshot; the others find theirs by \
             themselves"
        )));
    }
    // A region without a wish of its own finds its parent itself, unless no region is to.
    let all_nothing = match regions {
        [] => parents.everywhere == Some(Wanted::Nothing),
        regions => regions.iter().all(|region| parents.wanted(region) == Some(&Wanted::Nothing)),
    };
    if !arguments.direct.parent_blocks.is_empty() && all_nothing {
        return Err(usage("--parent-blocks is of no use with --parent none").help("leave out one of them"));
    }
    parents.maps = arguments.direct.parent_blocks.iter().map(|path| map(path)).collect::<Result<_, _>>()?;
    Ok(parents)
}

/// Refuses what only EBS direct can do, if the disk goes another way.
fn none_asked(arguments: &Publish, via: Via) -> Result<(), Error> {
    if via != Via::S3 && !arguments.object.upload_only {
        return Ok(());
    }
    let asked = &arguments.direct;
    let options = [
        (!asked.parent.is_empty(), "--parent"),
        (!asked.parent_blocks.is_empty(), "--parent-blocks"),
        (asked.omit_holes, "--omit-holes"),
    ];
    match options.into_iter().find(|(given, _)| *given) {
        Some((_, option)) => Err(usage(format!("nothing is written block by block, so that {option} does nothing"))
            .help(format!("leave out {option}, or publish with --via ebs and without --upload-only"))),
        None => Ok(()),
    }
}

/// Which blocks are left out of encrypted snapshots too; none: none are.
pub(super) fn omitted(arguments: &Publish, in_recipe: bool, via: Via) -> Result<Option<String>, Error> {
    let asked = via != Via::S3 && (arguments.direct.omit_holes || in_recipe);
    asked.then(|| map(&arguments.outdir.join(BLOCKS)).map(|map| map.holes())).transpose()
}

fn wanted(text: &str) -> Result<Wanted, Error> {
    if text == "none" {
        return Ok(Wanted::Nothing);
    }
    volume::snapshot_id(text).map_err(|refused| usage(refused.message).help(format!("{}; or `none`", refused.help)))?;
    Ok(Wanted::Snapshot(text.to_owned()))
}

fn map(path: &Path) -> Result<BlockMap, Error> {
    BlockMap::open(path).map_err(|error| {
        let message = format!("cannot read the block map `{}`: {error}", path.display());
        Error::new(Exit::Input, message).help(format!("give the file `{BLOCKS}` of the output folder of a build"))
    })
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(Exit::Usage, message)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use kiln::cli::{Cli, Command};

    use super::*;

    fn parents(more: &str, via: Via, regions: &[&str]) -> Result<Parents, Error> {
        let line = ["kiln", "publish", "out/web"].into_iter().chain(more.split_whitespace());
        let Command::Publish(arguments) = Cli::try_parse_from(line).unwrap().command else { panic!("{more}") };
        let regions: Vec<String> = regions.iter().map(|region| (*region).to_owned()).collect();
        super::parents(&arguments, via, &regions)
    }

    #[test]
    fn each_region_has_one_parent_at_most() {
        let one = Wanted::Snapshot("snap-0123456789abcdef0".to_owned());
        let asked = parents("--parent snap-0123456789abcdef0", Via::Ebs, &["eu-west-1"]).unwrap();
        assert_eq!(asked, Parents { everywhere: Some(one.clone()), ..Parents::default() });
        let line = "--parent none --parent us-east-1=snap-0123456789abcdef0";
        let asked = parents(line, Via::Ebs, &["eu-west-1", "us-east-1"]).unwrap();
        let of_regions = [("us-east-1".to_owned(), one)].into();
        assert_eq!(asked, Parents { everywhere: Some(Wanted::Nothing), of_regions, maps: Vec::new() });
        // The disk is written to one of them.
        parents("--parent snap-0123456789abcdef0", Via::Auto, &["eu-west-1", "us-east-1"]).unwrap();
    }

    #[test]
    fn what_can_not_be_meant_is_a_usage_error() {
        let two = ["eu-west-1", "us-east-1"];
        let said = |more: &str, via, regions: &[&str]| {
            let error = parents(more, via, regions).unwrap_err();
            assert_eq!(error.exit, Exit::Usage);
            assert!(error.help.is_some());
            error.message
        };
        let several = said("--parent snap-12345678", Via::Ebs, &two);
        assert_eq!(several, "--parent snap-12345678: a snapshot is in one region, and the disk is written to 2");
        let elsewhere = said("--parent eu-west-2=snap-12345678", Via::Ebs, &two);
        assert_eq!(elsewhere, "--parent eu-west-2=snap-12345678: nothing is published to `eu-west-2`");
        let twice = said("--parent eu-west-1=snap-12345678 --parent eu-west-1=none", Via::Ebs, &two);
        assert_eq!(twice, "--parent eu-west-1=none: that has its parent already");
        assert_eq!(said("--parent ami-12345678", Via::Ebs, &[]), "`ami-12345678` is not the id of a snapshot");
        let lines = ["--parent none", "--parent eu-west-1=none --parent us-east-1=none"];
        for line in lines {
            let useless = said(&format!("{line} --parent-blocks x"), Via::Ebs, &two);
            assert_eq!(useless, "--parent-blocks is of no use with --parent none");
        }
        // One of them may be built on what it finds.
        let one = parents("--parent us-east-1=none --parent-blocks x", Via::Ebs, &two).unwrap_err();
        assert!(one.message.starts_with("cannot read the block map `x`: "), "{}", one.message);
        let useless = said("--parent none --parent-blocks x", Via::Ebs, &[]);
        assert_eq!(useless, "--parent-blocks is of no use with --parent none");
        for option in ["--parent none", "--parent-blocks x", "--omit-holes"] {
            let name = option.split(' ').next().unwrap();
            let message = format!("nothing is written block by block, so that {name} does nothing");
            assert_eq!(said(option, Via::S3, &[]), message);
            assert_eq!(said(&format!("{option} --upload-only"), Via::Auto, &[]), message);
        }
    }
}
