//! `kiln images`.

use kiln::cli::Images;
use kiln::error::Error;
use kiln::publish::life::{Image, outcome};
use kiln::units::{GIB, Size};
use serde_json::json;

use super::cache::ago;
use super::table::table;
use super::{Context, account};

/// Lists them by name, then newest first.
pub(super) fn run(context: &Context<'_>, arguments: &Images) -> Result<(), Error> {
    let which = arguments.name.as_deref().map(account::which);
    let found = account::with_account(context, &account::regions(&arguments.regions), None, |account| {
        Ok(account.images(which.as_ref()))
    })?;
    let mut images: Vec<Image> = found.done.into_iter().flat_map(|(_, images)| images).collect();
    images.sort_by(|one, other| {
        let newest_first = other.created.cmp(&one.created);
        one.name.cmp(&other.name).then(newest_first).then_with(|| one.image_id.cmp(&other.image_id))
    });
    let rows: Vec<_> = images.iter().map(row).collect();
    let headings =
        ["NAME", "IMAGE NAME", "IMAGE", "DIGEST", "REGION", "AGE", "SIZE", "STATE", "DEPRECATED", "SHARED WITH"];
    let text = if images.is_empty() { String::new() } else { table(headings, &rows) };
    if images.is_empty() && found.failed.is_empty() {
        context.ui.summary("kiln has made no such image here\n");
    }
    context.ui.result(&text, &json!(images));
    outcome(found.failed)
}

fn row(image: &Image) -> [String; 10] {
    let protected = if image.protected { ", protected" } else { "" };
    [
        image.name.clone(),
        image.image_name.clone(),
        image.image_id.clone(),
        image.digest.as_deref().unwrap_or("?").chars().take(8).collect(),
        image.region.clone(),
        image.age.map_or_else(|| "?".to_owned(), ago),
        Size(image.size_gib * GIB).to_string(),
        format!("{}{protected}", image.state),
        image.deprecated.as_deref().map_or("-", |date| date.get(..10).unwrap_or(date)).to_owned(),
        shared(image),
    ]
}

/// Whom an image is shared with, in few words.
pub(super) fn shared(image: &Image) -> String {
    if image.public {
        return "everyone".to_owned();
    }
    let Some(with) = &image.shared_with else { return "?".to_owned() };
    let accounts = with.iter().filter(|one| !one.starts_with("arn:")).count();
    let counted = |count: usize, one: &str, many: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        count => Some(format!("{count} {many}")),
    };
    let all = [
        counted(accounts, "account", "accounts"),
        counted(with.len() - accounts, "organisation or unit", "organisations or units"),
    ];
    let words: Vec<String> = all.into_iter().flatten().collect();
    if words.is_empty() { "-".to_owned() } else { words.join(", ") }
}
