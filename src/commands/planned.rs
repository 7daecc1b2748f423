//! What `kiln publish --dry-run` prints: the requests of each region, and what they cost by.

use kiln::publish::{Billed, Count, Plan, Way};
use kiln::units::Size;

use super::table::table;

/// The plans of these regions, as tables.
pub(super) fn tables(plans: &[(&str, &Plan)]) -> String {
    let ways: Vec<_> = plans.iter().map(|(region, plan)| (*region, &plan.way)).collect();
    let others: Vec<_> = plans.iter().filter_map(|(region, plan)| Some((*region, plan.otherwise.as_ref()?))).collect();
    let mut text = of_ways(&ways);
    if !others.is_empty() {
        text += "\nIf EBS direct is not permitted:\n\n";
        text += &of_ways(&others);
    }
    text
}

fn of_ways(ways: &[(&str, &Way)]) -> String {
    let requests = ways.iter().flat_map(|(region, way)| {
        let requests = way.steps.requests();
        let row = |(action, count): (kiln::publish::Action, Count)| {
            [(*region).to_owned(), count.to_string(), action.as_str().to_owned(), action.permissions().join(" ")]
        };
        requests.each().map(row).collect::<Vec<_>>()
    });
    let requests = table(["REGION", "COUNT", "REQUEST", "PERMISSIONS"], &requests.collect::<Vec<_>>());
    let costs: Vec<_> = ways.iter().flat_map(|(region, way)| costs(region, way)).collect();
    if costs.is_empty() { requests } else { format!("{requests}\n{}", table(["REGION", "AMOUNT", "OF"], &costs)) }
}

/// A row for each thing that there is something of.
fn costs(region: &str, way: &Way) -> Vec<[String; 3]> {
    let (cost, requests) = (&way.cost, way.steps.requests());
    let mut rows = Vec::new();
    let mut row = |count: Count, amount: String, of: &str| {
        if !count.is_none() {
            rows.push([region.to_owned(), amount, of.to_owned()]);
        }
    };
    row(cost.bytes_sent, bytes(cost.bytes_sent), "bytes sent");
    row(cost.bytes_copied_in_s3, bytes(cost.bytes_copied_in_s3), "bytes copied inside S3");
    if let Some(object) = &cost.object {
        let stays = if object.stays { "the object, which stays" } else { "the object, until it is imported" };
        row(object.bytes, bytes(object.bytes), stays);
    }
    if let Some(transfer) = &cost.transfer {
        row(transfer.bytes, bytes(transfer.bytes), &format!("data copied from {}", transfer.region));
    }
    row(cost.snapshot_bytes, bytes(cost.snapshot_bytes), "data in the new snapshot");
    for (way, of) in [
        (Billed::S3Put, "S3 requests billed as PUT, COPY, POST, LIST"),
        (Billed::S3Get, "S3 requests billed as GET and all other"),
        (Billed::Block, "blocks of 512 KiB by PutSnapshotBlock"),
    ] {
        row(requests.billed(way), requests.billed(way).to_string(), of);
    }
    rows
}

fn bytes(count: Count) -> String {
    let (bytes, bound) = count.known();
    format!("{bound}{}", Size(bytes))
}
