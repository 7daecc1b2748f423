//! `kiln publish`.

use std::time::{Duration, SystemTime};

use kiln::build::manifest::{DISK, Manifest};
use kiln::cli::Publish;
use kiln::error::{Error, Exit};
use kiln::publish::{self, Architecture, BootMode, Request};
use kiln::recipe::{NamePart, name_parts};
use kiln::units::GIB;
use serde_json::json;

use super::{Context, duration};

/// How often a running import is looked at. AWS takes minutes for one.
const POLL: Duration = Duration::from_secs(15);

/// Uploads, imports, registers; prints `REGION AMI-ID`.
pub(super) fn run(context: &Context<'_>, arguments: Publish) -> Result<(), Error> {
    let manifest = Manifest::read(&arguments.outdir)?;
    let request = request(&manifest, &arguments)?;
    let published = publish::publish(&request, &context.ui.events(), context.cancel)?;
    if arguments.dry_run {
        context.ui.result("", &json!(published));
        return Ok(());
    }
    let file = arguments.outdir.join("published.json");
    let value = json!([published]);
    let written =
        serde_json::to_vec_pretty(&value).map_err(std::io::Error::other).and_then(|text| std::fs::write(&file, text));
    if let Err(error) = written {
        // The image exists and its id is printed: that its note could not be kept is no failure.
        context.ui.events().warn(format!("cannot write `{}`: {error}", file.display()));
    }
    context.ui.result(&format!("{} {}", published.region, published.image_id), &value);
    Ok(())
}

fn request(manifest: &Manifest, arguments: &Publish) -> Result<Request, Error> {
    let facts = &manifest.publish;
    let region = match (&arguments.region, facts.regions.as_slice()) {
        (Some(region), _) | (None, [region]) => Some(region.clone()),
        (None, []) => None,
        (None, regions) => {
            let message =
                format!("the recipe names {} regions, and kiln publishes to one at a time yet", regions.len());
            return Err(Error::new(Exit::Usage, message).help(format!("name one: --region {}", regions[0])));
        }
    };
    let template =
        arguments.image_name.as_deref().or(facts.image_name.as_deref()).unwrap_or("{name}-{date}-{digest:8}");
    Ok(Request {
        disk: arguments.outdir.join(DISK),
        size: manifest.size / GIB,
        digest: manifest.digest.clone(),
        name: manifest.name.clone(),
        image_name: image_name(template, manifest)?,
        description: facts.description.clone().unwrap_or_else(|| manifest.description.clone()),
        arch: if manifest.arch == "aarch64" { Architecture::Arm64 } else { Architecture::X86_64 },
        region,
        bucket: arguments.bucket.clone().or_else(|| facts.bucket.clone()),
        prefix: facts.prefix.clone().unwrap_or_default(),
        boot_mode: boot_mode(manifest),
        imds_v2: facts.imds != "v1.0",
        root_device: facts.root_device.clone().unwrap_or_else(|| "/dev/xvda".to_owned()),
        tags: facts.tags.clone(),
        role: facts.role.clone(),
        parallel: arguments.parallel.into(),
        poll: poll()?,
        dry_run: arguments.dry_run,
        timeout: duration("--timeout", &arguments.timeout)?,
    })
}

/// Tests look more often than AWS could bear.
fn poll() -> Result<Duration, Error> {
    std::env::var("KILN_POLL_INTERVAL").map_or(Ok(POLL), |text| duration("KILN_POLL_INTERVAL", &text))
}

fn boot_mode(manifest: &Manifest) -> BootMode {
    let has = |mode: &str| manifest.boot_modes.iter().any(|has| has == mode);
    match manifest.publish.boot_mode.as_deref() {
        Some("legacy-bios") => BootMode::LegacyBios,
        Some("uefi") => BootMode::Uefi,
        Some("uefi-preferred") => BootMode::UefiPreferred,
        _ if has("uefi") && has("legacy-bios") => BootMode::UefiPreferred,
        _ if has("uefi") => BootMode::Uefi,
        _ => BootMode::LegacyBios,
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
