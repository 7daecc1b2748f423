//! Images that have had their time: deprecated, then deregistered with their snapshots.
//!
//! Of what a retirement has planned, each image goes by itself: first it is deprecated, so that from then on nobody finds
//! it any more, then it is deregistered, then its snapshots are deleted. A run that ends in between has left snapshots
//! that `kiln sweep` finds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use aws_sdk_ec2::primitives::{DateTime, DateTimeFormat};
use aws_sdk_ec2::types::{Filter, Image as Found, ImageState};
use serde::Serialize;
use tokio::time::timeout;

use super::super::failure::Failure;
use super::super::place::Place;
use super::super::undo::{EACH, until_deleted};
use super::super::{image, parameter, rules};
use super::list::{self, Image, Which};
use crate::error::{Error, Exit};

/// AWS takes no date in the past, and rounds to minutes.
const SOON: Duration = Duration::from_mins(2);

/// Which images of a name go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// So many of the newest that can be launched stay, of each recipe and architecture; where it isn't said, one of a
    /// recipe that is named, and none of images that are named themselves.
    pub keep: Option<usize>,
    /// What is younger stays.
    pub older: Duration,
    /// They are deprecated, and stay.
    pub deprecate_only: bool,
}

/// What would be retired in a region.
#[derive(Debug, Clone, Serialize)]
pub struct Retirement {
    /// What goes.
    pub images: Vec<Retiring>,
    /// What stays of that name.
    pub kept: Vec<Kept>,
    /// The images are deprecated only.
    pub deprecate_only: bool,
}

/// An image that would be retired.
#[derive(Debug, Clone, Serialize)]
pub struct Retiring {
    /// The image.
    pub image: Image,
    /// The snapshots that go with it: kiln's, and no other image's.
    pub snapshots: Vec<String>,
    /// The SSM parameter that is recorded on it.
    pub parameter: Option<String>,
}

/// An image that stays.
#[derive(Debug, Clone, Serialize)]
pub struct Kept {
    /// The image.
    pub image: Image,
    /// Why it stays, in words.
    pub why: String,
}

/// An image that was retired.
#[derive(Debug, Clone, Serialize)]
pub struct Retired {
    /// The region it is in, or was.
    pub region: String,
    /// Its id.
    pub image_id: String,
    /// Its name.
    pub image_name: String,
    /// It is gone; else it is deprecated.
    pub deregistered: bool,
    /// The snapshots that are gone with it.
    pub snapshots: Vec<String>,
}

/// Looks at the images of this name, and at what else uses their snapshots.
pub(super) async fn plan(place: &Place, which: &Which, rule: Rule) -> Result<Retirement, Error> {
    let own = place.call("the images", Box::pin(list::own(place, None))).await?;
    let now = SystemTime::now();
    let named = own.iter().filter_map(|found| Image::of(place.region(), found, now)).filter(|image| which.is(image));
    let (going, kept) = decide(named.collect(), which, rule);
    let snapshots =
        if going.is_empty() || rule.deprecate_only { BTreeSet::new() } else { Box::pin(kilns(place)).await? };
    let ids: BTreeSet<&str> = going.iter().map(|image| image.image_id.as_str()).collect();
    let used = users(&own, &ids);
    let retiring = |image: Image| Retiring {
        snapshots: image
            .snapshots
            .iter()
            .filter(|id| snapshots.contains(id.as_str()) && !used.contains(id.as_str()))
            .cloned()
            .collect(),
        parameter: image.tags.get(parameter::TAG).cloned(),
        image,
    };
    Ok(Retirement { images: going.into_iter().map(retiring).collect(), kept, deprecate_only: rule.deprecate_only })
}

/// Which images go, oldest first, and which stay, newest first.
fn decide(mut images: Vec<Image>, which: &Which, rule: Rule) -> (Vec<Image>, Vec<Kept>) {
    images.sort_by(|one, other| other.created.cmp(&one.created).then_with(|| one.image_id.cmp(&other.image_id)));
    let (mut going, mut kept) = (Vec::new(), Vec::new());
    let mut newer: BTreeMap<(String, Option<String>), usize> = BTreeMap::new();
    for image in images {
        let newer = newer.entry((image.name.clone(), image.architecture.clone())).or_default();
        let of_recipe = matches!(which, Which::Name(name) if *name == image.name);
        let keep = rule.keep.unwrap_or(usize::from(of_recipe));
        let first = image.is_available() && *newer < keep;
        *newer += usize::from(image.is_available());
        let young = image.age.is_none_or(|age| age < rule.older.as_secs());
        let why = if image.state == ImageState::Pending.as_str() {
            "it is being made"
        } else if first {
            if keep == 1 { "it is the newest" } else { "it is one of the newest" }
        } else if young && !rule.older.is_zero() {
            "it is younger"
        } else if image.protected && !rule.deprecate_only {
            "it is protected from being deregistered"
        } else {
            going.push(image);
            continue;
        };
        kept.push(Kept { image, why: why.to_owned() });
    }
    going.reverse();
    (going, kept)
}

/// The snapshots of images that stay.
fn users<'a>(own: &'a [Found], going: &BTreeSet<&str>) -> BTreeSet<&'a str> {
    let stays = |found: &&Found| !found.image_id().is_some_and(|id| going.contains(id));
    own.iter().filter(stays).flat_map(image::snapshots).collect()
}

/// The ids of the snapshots that kiln has made.
async fn kilns(place: &Place) -> Result<BTreeSet<String>, Error> {
    let snapshots = place.call("the snapshots", Box::pin(own_snapshots(place))).await?;
    Ok(snapshots.iter().filter_map(|snapshot| snapshot.snapshot_id().map(str::to_owned)).collect())
}

/// This account's snapshots that kiln has made.
pub(super) async fn own_snapshots(place: &Place) -> Result<Vec<aws_sdk_ec2::types::Snapshot>, Failure> {
    let (mut all, mut next) = (Vec::new(), None);
    let kilns = Filter::builder().name("tag-key").values(rules::DIGEST_TAG).build();
    loop {
        let call = place.clients.ec2.describe_snapshots().owner_ids("self").filters(kilns.clone()).set_next_token(next);
        let answer = call.send().await.map_err(place.clients.failed("ec2:DescribeSnapshots"))?;
        next = answer.next_token().filter(|token| !token.is_empty()).map(str::to_owned);
        all.extend(answer.snapshots.unwrap_or_default());
        if next.is_none() {
            return Ok(all);
        }
    }
}

/// Retires them one after the other: what was done, and what went wrong first. An image that can't go doesn't hold up
/// the others, unless the caller may not do it at all.
pub(super) async fn carry_out(place: &Place, plan: Retirement) -> (Vec<Retired>, Option<Error>) {
    let (mut done, mut first) = (Vec::new(), None::<Error>);
    for retiring in plan.images {
        let mut retired = Retired {
            region: place.region().to_owned(),
            image_id: retiring.image.image_id.clone(),
            image_name: retiring.image.image_name.clone(),
            deregistered: false,
            snapshots: Vec::new(),
        };
        let ended = Box::pin(retire(place, &retiring, plan.deprecate_only, &mut retired)).await;
        if ended.is_ok() || retired.deregistered {
            done.push(retired);
        }
        let Err((error, goes_on)) = ended else { continue };
        match &mut first {
            Some(first) => first.notes.push(error.message),
            None => first = Some(error),
        }
        if !goes_on {
            break;
        }
    }
    (done, first)
}

/// One image. With an error comes whether the next one may be tried.
async fn retire(
    place: &Place,
    retiring: &Retiring,
    deprecate_only: bool,
    retired: &mut Retired,
) -> Result<(), (Error, bool)> {
    let Retiring { image, snapshots, parameter } = retiring;
    let id = &image.image_id;
    place.stop.check("the next image").map_err(|error| (error, false))?;
    let refused = |failure: Failure| {
        let goes_on = !failure.is_denied() && !failure.is_passing();
        let error = place.error(failure);
        (Error { message: format!("{id} in {}: {}", place.region(), error.message), ..error }, goes_on)
    };
    let stopped = |error: Error| (error, false);
    if deprecate_only || image.is_available() {
        let what = format!("the deprecation of {id}");
        place.stop.or(&what, deprecate(place, image)).await.map_err(stopped)?.map_err(refused)?;
    }
    if deprecate_only {
        return Ok(());
    }
    let ec2 = &place.clients.ec2;
    let deregistered = until_deleted(|| async {
        let answer = ec2.deregister_image().image_id(id).send().await;
        answer.map(|_| ()).map_err(place.clients.failed("ec2:DeregisterImage"))
    });
    let late = |what: &str| {
        (
            Error::new(Exit::Publish, format!("AWS did not delete {what} in {} in time", place.region()))
                .help("try again"),
            true,
        )
    };
    timeout(EACH, deregistered).await.map_err(|_| late(id))?.map_err(refused)?;
    retired.deregistered = true;
    if let Some(name) = parameter
        && let Some(why) = place.stop.or("the parameter", parameter::forget(place, name, id)).await.map_err(stopped)?
    {
        place.events.warn(format!("the SSM parameter {name} of {} still names {id}: {why}", place.region()));
    }
    for snapshot in snapshots {
        let deleted = until_deleted(|| async {
            let answer = ec2.delete_snapshot().snapshot_id(snapshot).send().await;
            answer.map(|_| ()).map_err(place.clients.failed("ec2:DeleteSnapshot"))
        });
        let left = |(error, goes_on): (Error, bool)| {
            let by_hand = format!("aws ec2 delete-snapshot --region {} --snapshot-id {snapshot}", place.region());
            (error.with_note(format!("left behind: snapshot {snapshot}; delete it with `{by_hand}`")), goes_on)
        };
        timeout(EACH, deleted).await.map_err(|_| left(late(snapshot)))?.map_err(|failure| left(refused(failure)))?;
        retired.snapshots.push(snapshot.clone());
    }
    Ok(())
}

/// Nothing, if it is deprecated already, or about to be.
async fn deprecate(place: &Place, image: &Image) -> Result<(), Failure> {
    let at = |after| DateTime::from(SystemTime::now() + after);
    let date = image.deprecated.as_deref().map(|date| DateTime::from_str(date, DateTimeFormat::DateTime));
    if date.is_some_and(|date| date.is_ok_and(|date| date <= at(SOON + Duration::from_mins(1)))) {
        return Ok(());
    }
    let call = place.clients.ec2.enable_image_deprecation().image_id(&image.image_id).deprecate_at(at(SOON));
    call.send().await.map(|_| ()).map_err(place.clients.failed("ec2:EnableImageDeprecation"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: &str, age: u64) -> Image {
        Image {
            region: "eu-west-1".to_owned(),
            image_id: id.to_owned(),
            image_name: id.to_owned(),
            name: "web".to_owned(),
            description: None,
            digest: None,
            architecture: Some("x86_64".to_owned()),
            state: "available".to_owned(),
            reason: None,
            created: Some(format!("{:09}", 1_000_000 - age)),
            age: Some(age),
            size_gib: 4,
            encrypted: false,
            deprecated: None,
            protected: false,
            public: false,
            shared_with: None,
            snapshots: Vec::new(),
            copy_of: None,
            tags: BTreeMap::new(),
        }
    }

    const RULE: Rule = Rule { keep: None, older: Duration::ZERO, deprecate_only: false };

    fn web() -> Which {
        Which::Name("web".to_owned())
    }

    fn going(images: Vec<Image>, rule: Rule) -> Vec<String> {
        decide(images, &web(), rule).0.into_iter().map(|image| image.image_id).collect()
    }

    #[test]
    fn the_newest_stay_and_the_oldest_goes_first() {
        let all = || vec![image("b", 20), image("c", 30), image("a", 10)];
        assert_eq!(going(all(), RULE), ["c", "b"]);
        assert_eq!(going(all(), Rule { keep: Some(2), ..RULE }), ["c"]);
        assert_eq!(going(all(), Rule { keep: Some(0), ..RULE }), ["c", "b", "a"]);
        assert_eq!(going(all(), Rule { older: Duration::from_secs(25), ..RULE }), ["c"]);
        let arm = Image { architecture: Some("arm64".to_owned()), ..image("arm", 40) };
        assert_eq!(going([all(), vec![arm]].concat(), RULE), ["c", "b"], "the newest of another architecture");
    }

    #[test]
    fn an_image_that_is_named_itself_goes() {
        let (gone, _) = decide(vec![image("ami-0a", 10)], &Which::Id("ami-0a".to_owned()), RULE);
        assert_eq!(gone.len(), 1);
        let (gone, _) = decide(vec![image("web-2026", 10)], &Which::Name("web-2026".to_owned()), RULE);
        assert_eq!(gone.len(), 1);
        let (gone, _) = decide(vec![image("web", 10)], &web(), RULE);
        assert_eq!(gone, [], "one whose name is its recipe's is one of the recipe's");
    }

    #[test]
    fn what_cannot_be_launched_is_not_the_newest_and_what_is_being_made_stays() {
        let failed = Image { state: "failed".to_owned(), ..image("failed", 1) };
        assert_eq!(going(vec![failed.clone(), image("a", 10)], RULE), ["failed"]);
        let pending = Image { state: "pending".to_owned(), ..image("pending", 1) };
        assert_eq!(going(vec![pending, image("a", 10), image("b", 20)], RULE), ["b"]);
    }

    #[test]
    fn protected_images_stay_unless_they_are_deprecated_only() {
        let all = || vec![image("a", 10), Image { protected: true, ..image("b", 20) }];
        let (gone, kept) = decide(all(), &web(), RULE);
        assert_eq!(gone, []);
        let why: Vec<_> = kept.iter().map(|kept| kept.why.as_str()).collect();
        assert_eq!(why, ["it is the newest", "it is protected from being deregistered"]);
        assert_eq!(going(all(), Rule { deprecate_only: true, ..RULE }), ["b"]);
    }

    #[test]
    fn an_image_of_unknown_age_is_not_older_than_anything() {
        let unknown = || vec![image("a", 10), Image { age: None, ..image("b", 20) }];
        assert_eq!(going(unknown(), Rule { older: Duration::from_secs(1), ..RULE }), [""; 0]);
        assert_eq!(going(unknown(), RULE), ["b"]);
    }
}
