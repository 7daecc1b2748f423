//! `kiln publish`.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use kiln::build;
use kiln::build::manifest::{BLOCKS, DISK, Manifest};
use kiln::cli::{self, Publish};
use kiln::error::{Error, Exit};
use kiln::event::{Event, Events};
use kiln::publish::{self, Architecture, BootMode, Request};
use kiln::recipe::{NamePart, Via, aws, name_parts};
use kiln::store::Store;
use kiln::units::GIB;
use serde_json::{Value, json};

use super::{Context, duration, object};

/// How often a running import is looked at. AWS takes minutes for one.
const POLL: Duration = Duration::from_secs(15);
/// In the output folder: the images that were made of its disk.
const PUBLISHED: &str = "published.json";

/// Uploads, imports, registers; prints `REGION AMI-ID`.
pub(super) fn run(context: &Context<'_>, arguments: Publish) -> Result<(), Error> {
    let manifest = Manifest::read(&arguments.outdir)?;
    let events = context.ui.events();
    // Without a cache nothing is known of the disk, and it is read once more.
    let store = context.store().ok();
    let request = request(&manifest, &arguments, store.clone(), &events)?;
    build::check_disk(&arguments.outdir, &manifest, store.as_ref(), &events, context.cancel)?;
    if arguments.object.upload_only {
        return object::upload(context, &request, &events);
    }
    let published = publish::publish(&request, &events, context.cancel)?;
    let result = json!([published]);
    if arguments.dry_run {
        context.ui.result("", &result);
        return Ok(());
    }
    if let Err(error) = remember(&arguments.outdir, &json!(published)) {
        // The image exists and its id is printed: that its note could not be kept is no failure.
        let file = arguments.outdir.join(PUBLISHED);
        events.warn(format!("cannot add the image to `{}`: {error}", file.display()));
    }
    context.ui.result(&format!("{} {}", published.region, published.image_id), &result);
    Ok(())
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
    let template =
        arguments.image_name.as_deref().or(facts.image_name.as_deref()).unwrap_or("{name}-{date}-{digest:8}");
    Ok(Request {
        disk: arguments.outdir.join(DISK),
        size: manifest.size / GIB,
        digest: manifest.digest.clone(),
        name: manifest.name.clone(),
        image_name: image_name(template, manifest)?,
        name_varies: name_parts(template)
            .is_ok_and(|parts| parts.iter().any(|part| matches!(part, NamePart::Date | NamePart::Time))),
        description: description(manifest, events),
        arch: if manifest.arch == "aarch64" { Architecture::Arm64 } else { Architecture::X86_64 },
        region: region(manifest, arguments)?,
        bucket: arguments.bucket.clone().or_else(|| facts.bucket.clone()),
        prefix: facts.prefix.clone().unwrap_or_default(),
        boot_mode: boot_mode(facts.boot_mode.as_deref(), &manifest.boot_modes)?,
        imds_v2: facts.imds != "v1.0",
        root_device: facts.root_device.clone().unwrap_or_else(|| "/dev/xvda".to_owned()),
        volume_type: facts.volume_type.clone(),
        tags: facts.tags.clone(),
        role: facts.role.clone(),
        parallel: arguments.parallel.into(),
        poll: poll()?,
        dry_run: arguments.dry_run,
        timeout: duration("--timeout", &arguments.timeout)?,
        via: via(manifest, arguments)?,
        block_map: arguments.outdir.join(BLOCKS),
        store,
        object: object::options(manifest, arguments)?,
    })
}

fn via(manifest: &Manifest, arguments: &Publish) -> Result<Via, Error> {
    match (arguments.via, manifest.publish.via.as_str()) {
        (Some(cli::Via::Ebs), _) | (None, "ebs") if arguments.bucket.is_some() => {
            Err(Error::new(Exit::Usage, "EBS direct needs no bucket").help("leave out --bucket, or use --via s3"))
        }
        (Some(cli::Via::Ebs), _) | (None, "ebs") => object::none_asked(&arguments.object).map(|()| Via::Ebs),
        _ => Ok(Via::S3),
    }
}

fn region(manifest: &Manifest, arguments: &Publish) -> Result<Option<String>, Error> {
    match (&arguments.region, manifest.publish.regions.as_slice()) {
        (Some(region), _) | (None, [region]) => Ok(Some(region.clone())),
        (None, []) => Ok(None),
        (None, regions) => {
            let message = format!("the recipe names {} regions, and kiln publishes to one at a time", regions.len());
            Err(Error::new(Exit::Usage, message).help(format!("name one: --region {}", regions[0])))
        }
    }
}

/// [publish]'s own, or what the recipe says of itself: that is free text, and AWS may not take it.
fn description(manifest: &Manifest, events: &Events) -> String {
    if let Some(words) = &manifest.publish.description {
        return words.clone();
    }
    match aws::description(&manifest.description) {
        Ok(()) => manifest.description.clone(),
        Err(refusal) => {
            events.emit(Event::Warning {
                message: format!("the image gets no description: {}", refusal.message),
                help: Some(format!("{}; set another as `description` in the recipe's [publish]", refusal.help)),
            });
            String::new()
        }
    }
}

/// Tests look more often than AWS could bear.
fn poll() -> Result<Duration, Error> {
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

fn image_name(template: &str, manifest: &Manifest) -> Result<String, Error> {
    let parts = name_parts(template).map_err(|error| {
        let failure = Error::new(Exit::Usage, error.message);
        match error.help {
            Some(help) => failure.help(help),
            None => failure,
        }
    })?;
    let now = jiff::Timestamp::try_from(SystemTime::now())
        .map_err(|error| Error::new(Exit::Host, format!("the host's clock is wrong: {error}")))?;
    let time = |format: &str| now.strftime(format).to_string();
    Ok(parts
        .iter()
        .map(|part| match part {
            NamePart::Text(text) => (*text).to_owned(),
            NamePart::Name => manifest.name.clone(),
            NamePart::Date => time("%Y-%m-%d"),
            NamePart::Time => time("%H%M%S"),
            NamePart::Digest(length) => manifest.digest.chars().take(*length).collect(),
            NamePart::Version => env!("CARGO_PKG_VERSION").to_owned(),
        })
        .collect())
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
