//! `kiln share`.

use kiln::cli::Share;
use kiln::error::{Error, Exit};
use kiln::publish::life::{Image, Regions, Which, no_image, outcome};
use kiln::recipe::Grantee;
use serde_json::json;

use super::images::shared;
use super::{Context, account};

/// Shares the newest image of the name in each region; prints `REGION AMI-ID`.
pub(super) fn run(context: &Context<'_>, arguments: &Share) -> Result<(), Error> {
    let which = account::which(&arguments.name);
    let with = grantees(&arguments.with)?;
    let regions = account::regions(&arguments.regions);
    let shared_in = account::with_account(context, &regions, None, |account| {
        account.share(&which, &with, arguments.remove, arguments.snapshots)
    })?;
    let mut failed = shared_in.failed;
    let mut images: Vec<Image> = Vec::new();
    let mut missing = Vec::new();
    for (region, image) in shared_in.done {
        match image {
            Some(image) => images.push(image),
            None => missing.push(region),
        }
    }
    tell(context, &images, arguments.remove);
    // An id is of one region, and with all regions nobody expects an image in each.
    let anywhere = regions == Regions::All || matches!(which, Which::Id(_));
    if !anywhere || (images.is_empty() && failed.is_empty()) {
        failed.extend(missing.into_iter().take(if anywhere { 1 } else { usize::MAX }).map(|region| {
            let place = if regions == Regions::All { "any region".to_owned() } else { region.clone() };
            (region, no_image(&which, &place))
        }));
    }
    outcome(failed)
}

fn tell(context: &Context<'_>, images: &[Image], removed: bool) {
    let events = context.ui.events();
    for image in images {
        let now = match shared(image).as_str() {
            "-" => "shared with nobody".to_owned(),
            words => format!("shared with {words}"),
        };
        events.note(format!("{} in {} is now {now}", image.image_name, image.region));
        if image.encrypted && !removed {
            events
                .note("it is encrypted: they can launch it only if the key's policy lets them use the key".to_owned());
        }
    }
    let lines: Vec<String> = images.iter().map(|image| format!("{} {}", image.region, image.image_id)).collect();
    context.ui.result(&lines.join("\n"), &json!(images));
}

fn grantees(texts: &[String]) -> Result<Vec<Grantee>, Error> {
    let read = |text: &String| {
        text.parse().map_err(|refusal: kiln::recipe::aws::Refusal| {
            Error::new(Exit::Usage, format!("--with: {}", refusal.message)).help(refusal.help)
        })
    };
    let mut all: Vec<Grantee> = texts.iter().map(read).collect::<Result<_, _>>()?;
    all.sort();
    all.dedup();
    Ok(all)
}
