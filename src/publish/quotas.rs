//! How much of the account's quotas is used that a publish meets, for `kiln publish --check`.
//!
//! A publish makes one image and one snapshot in each region; a quota that is reached would be told only after the upload.
//! What is in the Recycle Bin counts to AWS as well and isn't seen here. To look is no part of a publish: where it is not
//! permitted, or nobody answers, nothing is known, and nothing fails.
//!
//! Sources: "Amazon EC2 endpoints and quotas" and "Amazon EBS endpoints and quotas" in the AWS General Reference, for the
//! codes and what counts; the Service Quotas API Reference.

use std::future::Future;

use aws_config::retry::RetryConfig;
use aws_sdk_ec2::types::Filter;

use super::check::{Checked, Verdict};
use super::failure::{Failure, Kind};
use super::found::Found;
use super::{Job, Request};
use crate::error::Error;
use crate::recipe::Grantee;

/// How many of a kind there may be in a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Quota {
    kind: Things,
    what: &'static str,
    service: &'static str,
    code: &'static str,
    /// What makes room.
    remedy: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Things {
    Images,
    PublicImages,
    Snapshots,
}

const IMAGES: Quota = Quota {
    kind: Things::Images,
    what: "quota: images",
    service: "ec2",
    code: "L-B665C33B",
    remedy: "deregister old images with `kiln retire`",
};
const PUBLIC_IMAGES: Quota = Quota {
    kind: Things::PublicImages,
    what: "quota: public images",
    service: "ec2",
    code: "L-0E3CBAB9",
    remedy: "deregister old public images with `kiln retire`, or take `all` off them with `kiln share --remove`",
};
const SNAPSHOTS: Quota = Quota {
    kind: Things::Snapshots,
    what: "quota: snapshots",
    service: "ebs",
    code: "L-309BACF6",
    remedy: "delete old snapshots with `kiln retire` and `kiln sweep`",
};

/// How many there are on a page, which is the most that AWS takes.
const PAGE: i32 = 1000;
/// How many pages are looked at.
const PAGES: usize = 100;

/// Looks at each quota that the request meets, where this is there already.
pub(super) async fn check(job: &Job<'_>, found: &Found) -> Result<Vec<Checked>, Error> {
    let mut all = Vec::new();
    let mut silent: Option<Failure> = None;
    for quota in met(job.request, found) {
        let answer = match &silent {
            // Where nobody answers once, nobody would for each of them, and each time after a long wait.
            Some(failure) => Err(failure.clone()),
            None => job.stop.or("a quota", Box::pin(look(job, quota))).await?,
        };
        let verdict = match answer {
            Ok((used, most)) => judge(quota, &job.target.region, used, most),
            Err(failure) => {
                let verdict = Verdict::Unknown { detail: failure.reason() };
                if matches!(failure.kind, Kind::Unreachable | Kind::TimedOut) {
                    silent = Some(failure);
                }
                verdict
            }
        };
        all.push(Checked { what: quota.what.to_owned(), verdict });
    }
    Ok(all)
}

fn met(request: &Request, found: &Found) -> Vec<Quota> {
    // A public image that is replaced makes room for the new one, which is shared later.
    let public = request.release.share.contains(&Grantee::Everyone) && !request.force;
    let met = match found {
        Found::Image(_) => return Vec::new(),
        Found::Snapshot { .. } => vec![IMAGES],
        Found::Task { .. } | Found::Nothing => vec![IMAGES, SNAPSHOTS],
    };
    met.into_iter().chain(public.then_some(PUBLIC_IMAGES)).collect()
}

/// How many there are, and how many there may be.
async fn look(job: &Job<'_>, quota: Quota) -> Result<(Count, u64), Failure> {
    let most = Box::pin(value(job, quota)).await?;
    Ok((Box::pin(count(most, |token| page(job, quota.kind, token))).await?, most))
}

fn judge(quota: Quota, region: &str, used: Count, most: u64) -> Verdict {
    let Quota { service, code, remedy, .. } = quota;
    match used {
        Count::All(used) if used < most => Verdict::Good { detail: format!("{used} of {most}") },
        Count::All(used) | Count::AtLeast(used) if used >= most => Verdict::Bad {
            detail: format!("all {most} are used"),
            help: Some(format!(
                "{remedy}; or ask AWS for more: `aws service-quotas request-service-quota-increase --region {region} \
                 --service-code {service} --quota-code {code} --desired-value N`"
            )),
        },
        Count::All(used) | Count::AtLeast(used) => {
            Verdict::Unknown { detail: format!("{used} of {most} were counted, and there are more") }
        }
    }
}

/// The account's own value; AWS's, where it has none.
async fn value(job: &Job<'_>, Quota { service, code, .. }: Quota) -> Result<u64, Failure> {
    let client = &job.clients.quotas;
    let once_more = || {
        let retries = RetryConfig::standard().with_max_attempts(2);
        aws_sdk_servicequotas::config::Builder::new().retry_config(retries)
    };
    let call = "servicequotas:GetServiceQuota";
    let own = client.get_service_quota().service_code(service).quota_code(code).customize();
    let quota = match own.config_override(once_more()).send().await.map_err(job.clients.failed(call)) {
        Err(failure) if failure.code == "NoSuchResourceException" => {
            let call = "servicequotas:GetAWSDefaultServiceQuota";
            let general = client.get_aws_default_service_quota().service_code(service).quota_code(code).customize();
            let answer = general.config_override(once_more()).send().await;
            answer.map_err(job.clients.failed(call))?.quota
        }
        answer => answer?.quota,
    };
    let value = quota.and_then(|quota| quota.value).filter(|value| value.is_finite() && *value >= 0.0);
    let value = value.ok_or_else(|| Failure::found(call, "the answer has no value".to_owned()))?;
    // Whole, and far from where they couldn't be told apart.
    Ok(format!("{value:.0}").parse().unwrap_or(u64::MAX))
}

/// How many things were counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Count {
    All(u64),
    AtLeast(u64),
}

/// Counts the things on all pages, no further than to `most`, and no more pages than are worth the time.
async fn count<F>(most: u64, mut page: impl FnMut(Option<String>) -> F) -> Result<Count, Failure>
where
    F: Future<Output = Result<(usize, Option<String>), Failure>>,
{
    let (mut sum, mut token) = (0, None);
    for _ in 0..PAGES {
        let (found, next) = page(token).await?;
        sum += found as u64;
        match next.filter(|next| !next.is_empty()) {
            None => return Ok(Count::All(sum)),
            Some(_) if sum >= most => break,
            next => token = next,
        }
    }
    Ok(Count::AtLeast(sum))
}

/// How many things are on a page, and where the next one begins.
async fn page(job: &Job<'_>, kind: Things, token: Option<String>) -> Result<(usize, Option<String>), Failure> {
    let ec2 = &job.clients.ec2;
    if kind == Things::Snapshots {
        let call = ec2.describe_snapshots().owner_ids("self").max_results(PAGE).set_next_token(token);
        let answer = call.send().await.map_err(job.clients.failed("ec2:DescribeSnapshots"))?;
        return Ok((answer.snapshots().len(), answer.next_token));
    }
    let public = Filter::builder().name("is-public").values("true").build();
    let call = ec2
        .describe_images()
        .owners("self")
        .include_disabled(true)
        .set_filters((kind == Things::PublicImages).then(|| vec![public]))
        .max_results(PAGE)
        .set_next_token(token);
    let answer = call.send().await.map_err(job.clients.failed("ec2:DescribeImages"))?;
    Ok((answer.images().len(), answer.next_token))
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    fn counted(most: u64, pages: usize) -> (Count, usize) {
        let mut asked = 0;
        let page = |token: Option<String>| {
            let number: usize = token.map_or(0, |token| token.parse().unwrap());
            assert_eq!(number, asked, "each page once, in order");
            asked += 1;
            ready(Ok((7, (number + 1 < pages).then(|| (number + 1).to_string()))))
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let count = runtime.block_on(count(most, page)).unwrap();
        (count, asked)
    }

    #[test]
    fn all_pages_are_counted_and_none_too_many() {
        assert_eq!(counted(1000, 1), (Count::All(7), 1));
        assert_eq!(counted(1000, 3), (Count::All(21), 3));
        assert_eq!(counted(14, 3), (Count::AtLeast(14), 2));
        assert_eq!(counted(1_000_000, 5000), (Count::AtLeast(700), PAGES));
    }

    #[test]
    fn a_quota_that_is_reached_is_bad_and_what_was_not_counted_is_unknown() {
        let verdict = |used, most| judge(SNAPSHOTS, "eu-west-1", used, most);
        assert_eq!(verdict(Count::All(12), 50), Verdict::Good { detail: "12 of 50".to_owned() });
        for used in [Count::All(50), Count::All(51), Count::AtLeast(50)] {
            let Verdict::Bad { detail, help: Some(help) } = verdict(used, 50) else { panic!("{used:?}") };
            assert_eq!(detail, "all 50 are used");
            assert!(help.contains("--region eu-west-1 --service-code ebs --quota-code L-309BACF6 "), "{help}");
        }
        let unknown = verdict(Count::AtLeast(100), 500);
        assert_eq!(unknown, Verdict::Unknown { detail: "100 of 500 were counted, and there are more".to_owned() });
    }
}
