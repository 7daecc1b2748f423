//! `kiln sweep`.

use kiln::cli::Sweep;
use kiln::error::Error;
use kiln::publish::life::{Leftover, outcome};
use kiln::units::Size;
use serde_json::json;

use super::cache::ago;
use super::table::{counted, table};
use super::{Context, account, duration};

/// Shows what is left, asks, and deletes it; prints what is gone.
pub(super) fn run(context: &Context<'_>, arguments: &Sweep) -> Result<(), Error> {
    let older = duration("--older", &arguments.older)?;
    let bucket = arguments.bucket.as_deref();
    account::with_account(context, &account::regions(&arguments.regions), None, |account| {
        let found = account.leftovers(bucket, older);
        let mut failed = found.failed;
        let leftovers: Vec<Leftover> = found.done.into_iter().flat_map(|(_, some)| some).collect();
        let text = words(&leftovers);
        if arguments.dry_run {
            context.ui.result(&text, &json!(leftovers));
            return outcome(failed);
        }
        if leftovers.is_empty() {
            let hint = if bucket.is_some() { "" } else { "; with --bucket kiln looks in a bucket too" };
            context.ui.summary(&format!("nothing older than {} is left{hint}\n", arguments.older));
        } else if arguments.yes {
            context.ui.summary(&text);
        } else if !account::confirm(context, &text, &format!("delete {}?", counted(leftovers.len(), "thing")))? {
            context.ui.summary("nothing was changed\n");
            return outcome(failed);
        }
        let (gone, stay) = account.sweep(leftovers);
        let lines: Vec<String> = gone.iter().map(|one| format!("{} {}", one.region, one.thing)).collect();
        context.ui.result(&lines.join("\n"), &json!(gone));
        failed.extend(stay);
        outcome(failed)
    })
}

fn words(leftovers: &[Leftover]) -> String {
    if leftovers.is_empty() {
        return String::new();
    }
    let row = |one: &Leftover| {
        [
            one.region.clone(),
            ago(one.age),
            one.bytes.map_or_else(|| "?".to_owned(), |bytes| Size(bytes).to_string()),
            one.name.clone().unwrap_or_else(|| "?".to_owned()),
            one.thing.to_string(),
        ]
    };
    let rows: Vec<_> = leftovers.iter().map(row).collect();
    table(["REGION", "AGE", "SIZE", "OF", "WHAT"], &rows)
}
