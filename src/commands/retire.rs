//! `kiln retire`.

use std::time::Duration;

use kiln::cli::Retire;
use kiln::error::Error;
use kiln::publish::life::{Retirement, Rule, no_image, outcome};
use kiln::units::{GIB, Size};
use serde_json::json;

use super::cache::ago;
use super::table::{counted, table};
use super::{Context, account, duration};

/// Shows what would go, asks, and retires it; prints `REGION AMI-ID` for each image that was.
pub(super) fn run(context: &Context<'_>, arguments: &Retire) -> Result<(), Error> {
    let which = account::which(&arguments.name);
    let older = arguments.older.as_deref().map_or(Ok(Duration::ZERO), |text| duration("--older", text))?;
    let rule = Rule { keep: arguments.keep, older, deprecate_only: arguments.deprecate_only };
    account::with_account(context, &account::regions(&arguments.regions), None, |account| {
        let planned = account.retirement(&which, rule);
        let (plans, mut failed) = (planned.done, planned.failed);
        let nothing = |plan: &Retirement| plan.images.is_empty() && plan.kept.is_empty();
        if failed.is_empty() && plans.iter().all(|(_, plan)| nothing(plan)) {
            return Err(no_image(&which, &account.regions().join(", ")));
        }
        let text = words(&plans);
        if arguments.dry_run {
            context.ui.result(&text, &json!(plans.iter().map(|(_, plan)| plan).collect::<Vec<_>>()));
            return outcome(failed);
        }
        let count: usize = plans.iter().map(|(_, plan)| plan.images.len()).sum();
        let verb = if rule.deprecate_only { "deprecate" } else { "deregister" };
        let question = format!("{verb} {}?", counted(count, "image"));
        if count == 0 || arguments.yes {
            context.ui.summary(&text);
        } else if !account::confirm(context, &text, &question)? {
            context.ui.summary("nothing was changed\n");
            return outcome(failed);
        }
        let mut done = Vec::new();
        for (region, retired, error) in account.retire(plans) {
            done.extend(retired);
            failed.extend(error.map(|error| (region, error)));
        }
        let lines: Vec<String> = done.iter().map(|one| format!("{} {}", one.region, one.image_id)).collect();
        context.ui.result(&lines.join("\n"), &json!(done));
        outcome(failed)
    })
}

/// What would go and what stays.
fn words(plans: &[(String, Retirement)]) -> String {
    let mut rows = Vec::new();
    for (region, plan) in plans {
        for retiring in &plan.images {
            let image = &retiring.image;
            let mut also: Vec<&str> = retiring.snapshots.iter().map(String::as_str).collect();
            also.extend(retiring.parameter.as_deref());
            let fate = if plan.deprecate_only { "deprecate" } else { "deregister" };
            rows.push(row(region, image, fate.to_owned(), &also.join(" ")));
        }
        for kept in &plan.kept {
            rows.push(row(region, &kept.image, format!("keep: {}", kept.why), ""));
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    table(["REGION", "IMAGE", "IMAGE NAME", "AGE", "SIZE", "WHAT", "WITH"], &rows)
}

fn row(region: &str, image: &kiln::publish::life::Image, fate: String, with: &str) -> [String; 7] {
    [
        region.to_owned(),
        image.image_id.clone(),
        image.image_name.clone(),
        image.age.map_or_else(|| "?".to_owned(), ago),
        Size(image.size_gib * GIB).to_string(),
        fate,
        with.to_owned(),
    ]
}
