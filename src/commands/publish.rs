//! `kiln publish`.

use std::fmt::Write as _;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use kiln::build;
use kiln::build::manifest::{BLOCKS, DISK, Manifest};
use kiln::cli::{self, Publish};
use kiln::error::{Error, Exit};
use kiln::event::Events;
use kiln::publish::{self, Architecture, BootMode, Checked, Ended, How, Published, Request, Verdict};
use kiln::recipe::{self, DEFAULT_ROOT_DEVICE, Protection, Release, Via, aws};
use kiln::store::Store;
use kiln::units::GIB;
use serde_json::{Value, json};

use super::encryption::encryption;
use super::texts::{self, Texts};
use super::{Context, direct, duration, object, planned};

/// How often a running import is looked at. AWS takes minutes for one.
const POLL: Duration = Duration::from_secs(15);
/// In the output folder: the images that were made of its disk.
const PUBLISHED: &str = "published.json";

/// Uploads, imports, registers; prints `REGION AMI-ID` for each region.
pub(super) fn run(context: &Context<'_>, arguments: Publish) -> Result<(), Error> {
    let manifest = Manifest::read(&arguments.outdir)?;
    let events = context.ui.events();
    // Without a cache nothing is known of the disk, and it is read once more.
    let store = context.store().ok();
    let mut request = request(&manifest, &arguments, store.clone(), &events)?;
    if arguments.iam_policy {
        let policy = publish::policy(&request)?;
        context.ui.result(&serde_json::to_string_pretty(&policy).unwrap_or_default(), &policy);
        return Ok(());
    }
    if arguments.check {
        drop(events);
        return check(context, &request);
    }
    let compared = build::check_disk(&arguments.outdir, &manifest, store.as_ref(), &events, context.cancel)?;
    request.compared = Some(compared);
    if arguments.object.upload_only {
        return object::upload(context, &request, &events);
    }
    drop(events);
    let ended = everywhere(context, &request, arguments.fail_fast)?;
    let published: Vec<&Published> = ended.iter().filter_map(|one| one.image.as_ref()).collect();
    if !arguments.dry_run {
        for image in &published {
            if let Err(error) = remember(&arguments.outdir, &json!(image)) {
                // The image exists and its id is printed: that its note could not be kept is no failure.
                let file = arguments.outdir.join(PUBLISHED);
                context.ui.events().warn(format!("cannot add the image to `{}`: {error}", file.display()));
            }
        }
        tell_github(context, &published);
    }
    let plans: Vec<_> =
        published.iter().filter_map(|image| Some((image.region.as_str(), image.plan.as_ref()?))).collect();
    let lines = published.iter().map(|image| format!("{} {}\n", image.region, image.image_id));
    let human = if arguments.dry_run { planned::tables(&plans) } else { lines.collect() };
    if !published.is_empty() || ended.len() > 1 {
        context.ui.result(&human, &json!(published));
    }
    outcome(context, ended)
}

/// Publishes to every region, each shown beside the others if there are several.
fn everywhere(context: &Context<'_>, request: &Request, fail_fast: bool) -> Result<Vec<Ended>, Error> {
    if request.regions.len() < 2 {
        let events = context.ui.events();
        let how = How { fail_fast, events: &|_| events.clone(), failed: &|_, _| () };
        return publish::publish(request, &how, context.cancel);
    }
    let board = context.ui.board("region");
    let how =
        How { fail_fast, events: &|region| board.events(region), failed: &|region, error| board.error(region, error) };
    publish::publish(request, &how, context.cancel)
}

/// How kiln ends: with the failure of the only region, or with how many have failed.
fn outcome(context: &Context<'_>, mut ended: Vec<Ended>) -> Result<(), Error> {
    let regions = ended.len();
    if regions == 1 {
        return ended.remove(0).error.map_or(Ok(()), Err);
    }
    let failed: Vec<(&str, &Error)> =
        ended.iter().filter_map(|one| Some((one.region.as_str(), one.error.as_ref()?))).collect();
    context.cancel.check()?;
    let Some((_, first)) = failed.first() else { return Ok(()) };
    let names: Vec<&str> = failed.iter().map(|(region, _)| *region).collect();
    let message = format!("{} of {regions} regions failed: {}", failed.len(), names.join(", "));
    Err(Error::new(first.exit, message)
        .help("publish again: what is there already is found, and only the rest is made"))
}

/// For the next steps of a workflow, where GitHub Actions asks for it: the first region's image, and all of them.
fn tell_github(context: &Context<'_>, published: &[&Published]) {
    let Some(file) = std::env::var_os("GITHUB_OUTPUT").filter(|file| !file.is_empty()) else { return };
    let Some(first) = published.first() else { return };
    let images: serde_json::Map<String, Value> =
        published.iter().map(|image| (image.region.clone(), json!(image.image_id))).collect();
    let lines = [
        ("image-id", first.image_id.clone()),
        ("snapshot-id", first.snapshot_id.clone()),
        ("image-name", first.image_name.clone()),
        ("digest", first.digest.clone()),
        ("images", Value::Object(images).to_string()),
    ];
    let text = lines.map(|(key, value)| format!("{key}={value}\n")).concat();
    let written =
        File::options().append(true).create(true).open(&file).and_then(|mut file| file.write_all(text.as_bytes()));
    if let Err(error) = written {
        let file = Path::new(&file).display();
        context.ui.events().warn(format!("cannot add the image to GITHUB_OUTPUT (`{file}`): {error}"));
    }
}

/// Prints what a publish would meet in each region.
fn check(context: &Context<'_>, request: &Request) -> Result<(), Error> {
    let events = context.ui.events();
    let all = publish::check(request, &events, context.cancel)?;
    drop(events);
    let mut lines = String::new();
    for (region, checked) in &all {
        for Checked { what, verdict } in checked {
            let (word, detail, help) = match verdict {
                Verdict::Good { detail } => ("ok", detail, None),
                Verdict::Bad { detail, help } => ("fails", detail, help.as_ref()),
                Verdict::Unknown { detail } => ("unknown", detail, None),
            };
            let help = help.map(|help| format!("; {help}")).unwrap_or_default();
            let _ = writeln!(lines, "{region:<15} {what:<20} {word:<8} {detail}{help}");
        }
    }
    let json = all.iter().map(|(region, checked)| json!({ "region": region, "checks": checked }));
    context.ui.result(&lines, &json.collect());
    let bad = |one: &Checked| matches!(one.verdict, Verdict::Bad { .. });
    let failing: Vec<&str> =
        all.iter().filter(|(_, checked)| checked.iter().any(bad)).map(|(region, _)| region.as_str()).collect();
    if failing.is_empty() {
        return Ok(());
    }
    Err(Error::new(Exit::Publish, format!("a publish would fail in {}", failing.join(", "))))
}

/// Adds an image to those that were made of this disk. An earlier one of its region and name is gone: AWS lets nobody
/// take a name twice.
fn remember(folder: &Path, image: &Value) -> io::Result<()> {
    // Another kiln may publish the same disk to another region at this moment.
    let lock = File::open(folder)?;
    lock.lock()?;
    let file = folder.join(PUBLISHED);
    let mut images: Vec<Value> = match std::fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    images.retain(|earlier| ["region", "image_name"].iter().any(|key| earlier[*key] != image[*key]));
    images.push(image.clone());
    let mut new =
        tempfile::Builder::new().permissions(Permissions::from_mode(0o666)).prefix(".published").tempfile_in(folder)?;
    serde_json::to_writer_pretty(&mut new, &images)?;
    new.write_all(b"\n")?;
    new.persist(&file)?;
    Ok(())
}

fn request(manifest: &Manifest, arguments: &Publish, store: Option<Store>, events: &Events) -> Result<Request, Error> {
    let facts = &manifest.publish;
    let texts = Texts::of(manifest, arguments.image_name.as_deref(), events)?;
    let (via, regions) = (via(manifest, arguments)?, regions(manifest, arguments)?);
    Ok(Request {
        disk: arguments.outdir.join(DISK),
        compared: None,
        size: manifest.size / GIB,
        digest: manifest.digest.clone(),
        name: manifest.name.clone(),
        image_name: texts.image_name,
        name_varies: texts.name_varies,
        description: texts.filled.description,
        arch: if manifest.arch == "aarch64" { Architecture::Arm64 } else { Architecture::X86_64 },
        bucket: arguments.bucket.clone().or_else(|| facts.bucket.clone()),
        prefix: facts.prefix.clone().unwrap_or_default(),
        boot_mode: boot_mode(facts.boot_mode.as_deref(), &manifest.boot_modes)?,
        imds_v2: facts.imds != "v1.0",
        root_device: facts.root_device.clone().unwrap_or_else(|| DEFAULT_ROOT_DEVICE.to_owned()),
        root: facts.root.clone(),
        volumes: facts.volumes.clone(),
        tpm: facts.tpm.is_some(),
        uefi_data: facts.uefi_data.clone(),
        sriov: facts.sriov,
        ena: facts.ena.unwrap_or(true),
        encryption: encryption(facts.encryption.as_ref(), arguments),
        tags: texts.filled.tags,
        snapshot_tags: texts.filled.snapshot_tags,
        undated: texts.undated,
        role: facts.role.clone(),
        parallel: arguments.parallel.into(),
        poll: poll()?,
        dry_run: arguments.dry_run,
        timeout: duration("--timeout", &arguments.timeout)?,
        parents: direct::parents(arguments, via, &regions)?,
        omit_holes: direct::omitted(arguments, facts.omit_holes, via)?,
        via,
        regions,
        release: release(manifest, arguments)?,
        force: arguments.force,
        block_map: arguments.outdir.join(BLOCKS),
        store,
        object: object::options(manifest, arguments)?,
    })
}

fn via(manifest: &Manifest, arguments: &Publish) -> Result<Via, Error> {
    match (arguments.via, manifest.publish.via.as_str()) {
        (Some(cli::Via::Ebs), _) | (None, "ebs") if arguments.bucket.is_some() => {
            Err(Error::new(Exit::Usage, "EBS direct needs no bucket")
                .help("leave out --bucket, or use --via s3 or auto"))
        }
        (Some(cli::Via::Ebs), _) | (None, "ebs") => object::none_asked(&arguments.object).map(|()| Via::Ebs),
        (Some(cli::Via::Auto), _) | (None, "auto") => Ok(Via::Auto),
        _ => Ok(Via::S3),
    }
}

fn regions(manifest: &Manifest, arguments: &Publish) -> Result<Vec<String>, Error> {
    let asked = if arguments.regions.is_empty() { &manifest.publish.regions } else { &arguments.regions };
    match asked.iter().enumerate().find(|(number, region)| asked[..*number].contains(region)) {
        Some((_, twice)) => Err(Error::new(Exit::Usage, format!("the region `{twice}` is there twice"))),
        None => Ok(asked.clone()),
    }
}

/// What is done with the image once it is there: the recipe's wishes, and the command line's over them.
fn release(manifest: &Manifest, arguments: &Publish) -> Result<Release, Error> {
    let facts = &manifest.publish.release;
    let usage = |(message, help): recipe::Refusal| {
        let error = Error::new(Exit::Usage, message);
        match help {
            Some(help) => error.help(help),
            None => error,
        }
    };
    let asked = if arguments.share.is_empty() { &facts.share } else { &arguments.share };
    let share = asked
        .iter()
        .map(|who| who.parse().map_err(|refused: aws::Refusal| usage((refused.message, Some(refused.help)))));
    let deprecate_after = match &arguments.deprecate_after {
        Some(text) => Some(recipe::days(text).map_err(usage)?),
        None => facts.deprecate_after.map(Duration::from_secs),
    };
    let parameter = match arguments.parameter.as_ref().or(facts.parameter.as_ref()) {
        Some(template) => {
            recipe::parameter(template).map_err(usage)?;
            Some(texts::filled(template, manifest)?)
        }
        None => None,
    };
    let protection = match (arguments.protection, facts.protection.as_str()) {
        (Some(cli::Protection::On), _) | (None, "on") => Protection::On,
        (Some(cli::Protection::Cooldown), _) | (None, "cooldown") => Protection::Cooldown,
        _ => Protection::Off,
    };
    Ok(Release {
        share: share.collect::<Result<_, _>>()?,
        share_snapshots: arguments.share_snapshots || facts.share_snapshots,
        deprecate_after,
        protection,
        parameter,
    })
}

/// Tests look more often than AWS could bear.
pub(super) fn poll() -> Result<Duration, Error> {
    std::env::var("KILN_POLL_INTERVAL").map_or(Ok(POLL), |text| duration("KILN_POLL_INTERVAL", &text))
}

/// How instances start: as the recipe wants it, if the disk can be started so; else in every way it can.
fn boot_mode(wanted: Option<&str>, disk: &[String]) -> Result<BootMode, Error> {
    let has = |mode: &str| disk.iter().any(|has| has == mode);
    let (bios, uefi) = (has("legacy-bios"), has("uefi"));
    match wanted {
        Some("uefi-preferred") | None if bios && uefi => Ok(BootMode::UefiPreferred),
        Some("uefi") | None if uefi => Ok(BootMode::Uefi),
        Some("legacy-bios") | None if bios => Ok(BootMode::LegacyBios),
        Some(wanted) => {
            let can = if disk.is_empty() { "no firmware".to_owned() } else { format!("`{}` only", disk.join(" and ")) };
            let message = format!("the recipe's boot_mode is `{wanted}`, and the disk can be started by {can}");
            Err(Error::new(Exit::Input, message).help(
                "leave boot_mode out of [publish], or take a base that has the boot loader for it; then build again",
            ))
        }
        None => {
            let message = "the disk has no boot loader that kiln knows: an instance would not start";
            let help = "take a base with an EFI system partition or a boot sector, and build again";
            Err(Error::new(Exit::Input, message).help(help))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_start_in_every_way_that_the_disk_can_unless_the_recipe_chooses() {
        let [none, bios, uefi, both] = [&[][..], &["legacy-bios"], &["uefi"], &["legacy-bios", "uefi"]]
            .map(|modes| modes.iter().map(|mode| (*mode).to_owned()).collect::<Vec<_>>());
        let mode = |wanted, disk: &[String]| boot_mode(wanted, disk).unwrap();
        assert_eq!(mode(None, &bios), BootMode::LegacyBios);
        assert_eq!(mode(None, &uefi), BootMode::Uefi);
        assert_eq!(mode(None, &both), BootMode::UefiPreferred);
        for (wanted, chosen) in [
            ("legacy-bios", BootMode::LegacyBios),
            ("uefi", BootMode::Uefi),
            ("uefi-preferred", BootMode::UefiPreferred),
        ] {
            assert_eq!(mode(Some(wanted), &both), chosen);
        }
        let lacking = [("legacy-bios", &uefi), ("uefi", &bios), ("uefi-preferred", &bios), ("uefi-preferred", &uefi)];
        for (wanted, disk) in lacking {
            let error = boot_mode(Some(wanted), disk).unwrap_err();
            let message =
                format!("the recipe's boot_mode is `{wanted}`, and the disk can be started by `{}` only", disk[0]);
            assert_eq!((error.exit, error.message), (Exit::Input, message));
        }
        let error = boot_mode(Some("uefi"), &none).unwrap_err();
        assert_eq!(error.message, "the recipe's boot_mode is `uefi`, and the disk can be started by no firmware");
        assert_eq!(boot_mode(None, &none).unwrap_err().exit, Exit::Input);
    }

    #[test]
    fn every_region_and_name_is_remembered_once() {
        let folder = tempfile::tempdir().unwrap();
        let image =
            |region: &str, name: &str, id: &str| json!({ "region": region, "image_name": name, "image_id": id });
        let [first, second, third] =
            [image("eu-west-1", "a", "ami-1"), image("us-east-1", "a", "ami-2"), image("eu-west-1", "a", "ami-3")];
        for image in [&first, &second, &third] {
            remember(folder.path(), image).unwrap();
        }
        let file = folder.path().join(PUBLISHED);
        let read = || serde_json::from_slice::<Value>(&std::fs::read(&file).unwrap()).unwrap();
        assert_eq!(read(), json!([second, third]));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no other file is left");
        std::fs::write(&file, "{").unwrap();
        remember(folder.path(), &first).unwrap_err();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "{", "what can't be read is not lost");
    }
}
