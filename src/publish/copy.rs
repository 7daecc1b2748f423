//! An image into another region, by `CopyImage`.
//!
//! The copy has the image's tags, and so have its snapshots: it is found by them, shown and retired as what a publish
//! made. The request's token is the same whenever the same is asked for, and a copy that is there already is found by
//! its tags first: a repeated call makes nothing twice, whatever ended the one before.
//!
//! Source: `CopyImage` in the EC2 API reference, "Copy an Amazon EC2 AMI" in the user guide.

use aws_sdk_ec2::types::{Filter, Image, ImageState, ResourceType, Snapshot, Tag, TagSpecification};
use sha2::{Digest as _, Sha256};
use tokio::time::{sleep, timeout};

use super::action::Action::{CopyImage, DescribeImages, DescribeSnapshots};
use super::failure::Failure;
use super::place::Place;
use super::plan::Requests;
use super::retry::{Unmade, ec2_once, random};
use super::undo::{EACH, LOOKS, PAUSE, until_deleted};
use super::{image, rules};
use crate::error::{Error, Exit};
use crate::units::hex;

/// How often a copy is asked for while the region copies as many snapshots as it can: at 15 s, for two hours.
const CROWDED: u32 = 480;
/// How many looks at the copy in a row may fail for passing reasons, each after the SDK's own retries.
const BLIND: u32 = 10;

/// An image, as far as a copy needs to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) region: String,
    pub(super) id: String,
    pub(super) name: String,
    pub(super) description: Option<String>,
    /// All but AWS's own.
    pub(super) tags: Vec<(String, String)>,
    /// It has volumes of other snapshots than the disk's.
    pub(super) has_others: bool,
}

impl Source {
    /// None without an id or a name, which AWS never leaves out.
    pub(super) fn of(region: &str, image: &Image) -> Option<Self> {
        let pair = |tag: &Tag| Some((tag.key()?.to_owned(), tag.value().unwrap_or_default().to_owned()));
        Some(Self {
            region: region.to_owned(),
            id: image.image_id()?.to_owned(),
            name: image.name()?.to_owned(),
            description: image.description().filter(|words| !words.is_empty()).map(str::to_owned),
            tags: image.tags().iter().filter_map(pair).filter(|(key, _)| !key.starts_with("aws:")).collect(),
            has_others: snapshots(image).len() > 1,
        })
    }

    fn tag(&self, key: &str) -> Option<&str> {
        self.tags.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

/// The image with this id, which is in `place`.
pub(super) async fn source(place: &Place, id: &str) -> Result<Source, Error> {
    let what = format!("image {id} in {}", place.region());
    let image = place.known(&what, || image::describe(&place.clients, id)).await?;
    image.as_ref().and_then(|image| Source::of(place.region(), image)).ok_or_else(|| {
        Error::new(Exit::Publish, format!("there is no {what}")).help("name one that is there, or publish it again")
    })
}

/// What is asked for.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) source: Source,
    /// The copy's name.
    pub(super) name: String,
    /// The key that the copy is encrypted with, of its own region; without one it is as the source is.
    pub(super) kms_key: Option<String>,
    /// Images that may have that name, because they go when the copy is there.
    pub(super) replaces: Vec<String>,
}

/// A copy that can be launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) id: String,
    pub(super) snapshots: Vec<String>,
    /// It was there before.
    pub(super) found: bool,
}

/// Copies the image into `place` and waits until the copy is available; `tell` is told how far it is, in percent. What
/// can't be finished is taken back, or named in the error's notes.
pub(super) async fn copy(place: &Place, order: &Order, tell: impl Fn(u64)) -> Result<Copied, Error> {
    same_partition(order, place.region())?;
    if let Some(id) = Box::pin(existing(place, order)).await? {
        let image = Box::pin(until_available(place, &id, tell)).await?;
        return Ok(Copied { id, snapshots: snapshots(&image), found: true });
    }
    let mut begun = None;
    match Box::pin(make(place, order, &mut begun, tell)).await {
        Ok(copied) => Ok(copied),
        Err(error) => Err(match begun {
            Some(begun) => undo(place, order, begun, error).await,
            None => error,
        }),
    }
}

/// What [`copy`] would do.
pub(super) fn plan(requests: &mut Requests) {
    // The name, and twice or more the copy; the source is looked at in its own region. How far the snapshots are is asked
    // only if they aren't there at once.
    requests.exactly(CopyImage, 1).at_least(DescribeImages, 3).at_least(DescribeSnapshots, 0);
}

/// That the image can get there at all.
///
/// # Errors
/// When the regions are in different partitions.
pub(super) fn same_partition(order: &Order, region: &str) -> Result<(), Error> {
    let [from, to] = [&order.source.region, region].map(rules::partition);
    if from == to {
        return Ok(());
    }
    let source = &order.source;
    let message =
        format!("{} can't be copied from {} to {region}: images don't leave `{from}`", source.id, source.region);
    let help = format!("publish the disk to {region}, with credentials of the partition `{to}`");
    Err(Error::new(Exit::Input, message).help(help))
}

/// What a run has begun.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Begun {
    /// No answer told an id: there may be a copy.
    Perhaps,
    /// An image.
    Image(String),
}

async fn make(place: &Place, order: &Order, begun: &mut Option<Begun>, tell: impl Fn(u64)) -> Result<Copied, Error> {
    let mut token = token(order, place.region());
    // A token's answer is remembered longer than an image may live: of one that is gone, another copy is made.
    for last in [false, true] {
        let id = start(place, order, &token, begun).await?;
        *begun = Some(Begun::Image(id.clone()));
        let what = format!("image {id} in {}", place.region());
        match place.known(&what, || image::describe(&place.clients, &id)).await? {
            Some(image) if image.state() != Some(&ImageState::Deregistered) => {
                place.events.detail(format!("{what} is a copy of {}", order.source.id));
                let image = until_available(place, &id, tell).await?;
                return Ok(Copied { id, snapshots: snapshots(&image), found: false });
            }
            _ if last => break,
            _ => token = format!("kiln-{:016x}", random()),
        }
    }
    Err(Error::new(
        Exit::Publish,
        format!("{} doesn't know the copy that it made of {}", place.region(), order.source.id),
    )
    .help("wait a few minutes, then try again"))
}

/// Asks for the copy, also while the region is busy with others.
async fn start(place: &Place, order: &Order, token: &str, begun: &mut Option<Begun>) -> Result<String, Error> {
    let what = format!("the copy in {}", place.region());
    let mut refused = 0;
    loop {
        place.stop.check(&what)?;
        *begun = Some(Begun::Perhaps);
        match place.make(&what, || send(place, order, token)).await? {
            Ok(id) => return Ok(id),
            // "Too many snapshot copies in progress. The limit is 20 for this destination region."
            Err(Unmade { failure, .. }) if failure.code == "ResourceLimitExceeded" && refused < CROWDED => {
                *begun = None;
                refused += 1;
                if refused == 1 {
                    place.events.note(format!("{} copies as many snapshots as it can; waiting for it", place.region()));
                }
                place.stop.pause(&what, place.poll).await?;
            }
            Err(Unmade { failure, doubtful }) => {
                if !doubtful {
                    *begun = None;
                }
                return Err(explain(place, order, failure));
            }
        }
    }
}

async fn send(place: &Place, order: &Order, token: &str) -> Result<String, Failure> {
    let tags: Vec<Tag> =
        tags(order).into_iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect();
    // All snapshots of the copy get the same tags: where not all are the disk's, none may say so, or another volume's would
    // be taken for the disk.
    let is_of_all = |tag: &&Tag| !(order.source.has_others && tag.key() == Some(rules::DIGEST_TAG));
    let of_snapshots = tags.iter().filter(is_of_all).cloned().collect();
    let tagged = |kind, tags| TagSpecification::builder().resource_type(kind).set_tags(Some(tags)).build();
    let specifications = vec![tagged(ResourceType::Image, tags.clone()), tagged(ResourceType::Snapshot, of_snapshots)];
    let call = place
        .clients
        .ec2
        .copy_image()
        .client_token(token)
        .source_region(&order.source.region)
        .source_image_id(&order.source.id)
        .name(&order.name)
        .set_description(order.source.description.clone())
        // AWS takes no empty list.
        .set_tag_specifications((!tags.is_empty()).then_some(specifications))
        .set_encrypted(order.kms_key.is_some().then_some(true))
        .set_kms_key_id(order.kms_key.clone())
        .customize()
        .config_override(ec2_once());
    let answer = call.send().await.map_err(place.clients.failed("ec2:CopyImage"))?;
    answer.image_id.ok_or_else(|| Failure::found("ec2:CopyImage", "the answer has no image id".to_owned()))
}

/// The source's tags. They stand here and not in a flag of the request because the snapshots need them too.
fn tags(order: &Order) -> Vec<(String, String)> {
    let renamed = |(key, value): &(String, String)| match key.as_str() {
        "Name" if *value == order.source.name => (key.clone(), order.name.clone()),
        _ => (key.clone(), value.clone()),
    };
    order.source.tags.iter().map(renamed).collect()
}

/// The same for the same request: AWS refuses one that is used for another.
fn token(order: &Order, region: &str) -> String {
    let Order { source, name, kms_key, .. } = order;
    let mut tags = tags(order);
    tags.sort();
    let all = serde_json::json!([source.region, source.id, source.description, region, name, kms_key, tags]);
    format!("kiln-{}", &hex(&Sha256::digest(all.to_string()))[..32])
}

/// The copy that is there already, perhaps not finished. AWS would take its name again, so that another's image of that
/// name is looked for too.
async fn existing(place: &Place, order: &Order) -> Result<Option<String>, Error> {
    let named = place.call("the images of this name", image::of_names(&place.clients, &[&order.name])).await?;
    let mut alive: Vec<&Image> = named
        .iter()
        .filter(|image| !image.image_id().is_some_and(|id| order.replaces.iter().any(|old| old == id)))
        .filter(|image| {
            matches!(image.state(), Some(ImageState::Available | ImageState::Pending | ImageState::Disabled))
        })
        .collect();
    alive.sort_by_key(|image| (!is_copy(image, order), image.state() != Some(&ImageState::Available)));
    let Some(image) = alive.first() else { return Ok(None) };
    let id = image.image_id().unwrap_or_default();
    let taken = |why: &str| {
        Error::new(
            Exit::Publish,
            format!("the image name `{}` is already taken in {} by {id}{why}", order.name, place.region()),
        )
    };
    if !is_copy(image, order) {
        return Err(taken("").help("copy it under another name, or deregister that image"));
    }
    let encrypted = image.block_device_mappings().iter().filter_map(|mapping| mapping.ebs()?.encrypted()).all(|is| is);
    if order.kms_key.is_some() && !encrypted {
        return Err(taken(", which is not encrypted").help("copy it under another name, or deregister that image"));
    }
    Ok(Some(id.to_owned()))
}

/// Whether the image is the source, or made of it or of the same disk in the same way.
fn is_copy(image: &Image, order: &Order) -> bool {
    let source = &order.source;
    let tag = |key: &str| image.tags().iter().find(|tag| tag.key() == Some(key)).and_then(Tag::value);
    let alike = |key: &str| source.tag(key).is_some() && source.tag(key) == tag(key);
    image.image_id() == Some(&source.id)
        || (image.source_image_id() == Some(&source.id) && image.source_image_region() == Some(&source.region))
        || (alike(rules::DIGEST_TAG) && alike(rules::SETTINGS_TAG))
}

/// The image, when it is available.
async fn until_available(place: &Place, id: &str, tell: impl Fn(u64)) -> Result<Image, Error> {
    let what = format!("image {id} in {} to be available", place.region());
    let mut blind = 0;
    loop {
        match place.stop.or(&what, image::describe(&place.clients, id)).await? {
            Ok(image) => match image::judge(&image) {
                Ok(true) => return Ok(image),
                Ok(false) => {
                    blind = 0;
                    if let Some(percent) = place.stop.or(&what, progress(place, &image)).await? {
                        tell(percent);
                    }
                }
                Err(why) => {
                    return Err(Error::new(Exit::Publish, format!("the image {id} in {} is {why}", place.region()))
                        .help("look at that reason, then try again"));
                }
            },
            Err(failure) if (failure.is_passing() || failure.is_not_found()) && blind < BLIND => {
                blind += 1;
                place.events.detail(format!("cannot see {id} in {}: {}", place.region(), failure.reason()));
            }
            Err(failure) => return Err(place.error(failure)),
        }
        place.stop.pause(&what, place.poll).await?;
    }
}

/// How much of the image's snapshots is there, in percent. None where that can't be told: nothing depends on it.
async fn progress(place: &Place, image: &Image) -> Option<u64> {
    let ids = snapshots(image);
    if ids.is_empty() {
        return None;
    }
    let answer = place.clients.ec2.describe_snapshots().set_snapshot_ids(Some(ids)).send().await.ok()?;
    let percent = |snapshot: &Snapshot| snapshot.progress()?.trim_end_matches('%').parse::<u64>().ok();
    let each: Vec<u64> = answer.snapshots().iter().filter_map(percent).collect();
    (!each.is_empty()).then(|| each.iter().sum::<u64>() / each.len() as u64)
}

fn snapshots(image: &Image) -> Vec<String> {
    image::snapshots(image).map(str::to_owned).collect()
}

fn explain(place: &Place, order: &Order, failure: Failure) -> Error {
    let key = order.kms_key.as_ref().filter(|_| failure.code.contains("KMS") || failure.code.contains("Key"));
    let error = place.error(failure);
    match key {
        Some(key) => error.help(format!("`{key}` must be a usable key of {}, that the caller may use", place.region())),
        None => error,
    }
}

async fn undo(place: &Place, order: &Order, begun: Begun, mut error: Error) -> Error {
    let region = place.region();
    let id = match begun {
        Begun::Image(id) => Some(id),
        Begun::Perhaps => find(place, order).await,
    };
    let Some(id) = id else {
        error.notes.push(format!(
            "left behind: perhaps an image `{}` in {region} (no answer to CopyImage came, and there is none so far)",
            order.name
        ));
        return error;
    };
    place.events.note(format!("taking back image {id} in {region}"));
    if let Err(left) = take_back(place, &id).await {
        error.notes.push(format!("left behind: {left}"));
    }
    error
}

/// The copy that an unanswered request has made, looked for until it is there, for some seconds.
async fn find(place: &Place, order: &Order) -> Option<String> {
    for _ in 0..LOOKS {
        let named = image::of_names(&place.clients, &[&order.name]).await.unwrap_or_default();
        if let Some(image) = named.iter().find(|image| is_copy(image, order)) {
            return image.image_id().map(str::to_owned);
        }
        sleep(PAUSE).await;
    }
    None
}

/// Deregisters a copy and deletes its snapshots, finished or not. An error says what is left, and how to delete it by hand.
pub(super) async fn take_back(place: &Place, id: &str) -> Result<(), String> {
    let (region, ec2) = (place.region(), &place.clients.ec2);
    let by_hand = format!("delete it with `aws ec2 deregister-image --region {region} --image-id {id}`");
    let left = |why: String| format!("image {id} in {region} ({why}); {by_hand}");
    let late = || left("AWS did not do it in time".to_owned());
    let snapshots = timeout(EACH, snapshots_of_copy(place, id)).await.map_err(|_| late())?;
    let deregistered = until_deleted(|| async {
        let answer = ec2.deregister_image().image_id(id).send().await;
        answer.map(|_| ()).map_err(place.clients.failed("ec2:DeregisterImage"))
    });
    timeout(EACH, deregistered).await.map_err(|_| late())?.map_err(|failure| left(failure.reason()))?;
    let mut all = Vec::new();
    for snapshot in snapshots {
        let deleted = until_deleted(|| async {
            let answer = ec2.delete_snapshot().snapshot_id(&snapshot).send().await;
            answer.map(|_| ()).map_err(place.clients.failed("ec2:DeleteSnapshot"))
        });
        let why = match timeout(EACH, deleted).await {
            Ok(Ok(())) => continue,
            Ok(Err(failure)) => failure.reason(),
            Err(_) => "AWS did not do it in time".to_owned(),
        };
        let by_hand = format!("aws ec2 delete-snapshot --region {region} --snapshot-id {snapshot}");
        all.push(format!("snapshot {snapshot} in {region} ({why}); delete it with `{by_hand}`"));
    }
    if all.is_empty() { Ok(()) } else { Err(all.join("; ")) }
}

/// The snapshots of a copy. As long as it is pending it may not name them yet; they name it: "Copied for `DestinationAmi`
/// ami-… from `SourceAmi` …".
async fn snapshots_of_copy(place: &Place, id: &str) -> Vec<String> {
    let mut ids = image::describe(&place.clients, id).await.map(|image| snapshots(&image)).unwrap_or_default();
    let kilns = Filter::builder().name("tag-key").values(rules::NAME_TAG).build();
    let call = place.clients.ec2.describe_snapshots().owner_ids("self").filters(kilns);
    if let Ok(answer) = call.send().await {
        let words = format!("DestinationAmi {id} ");
        let named = answer.snapshots().iter().filter(|one| one.description().is_some_and(|text| text.contains(&words)));
        ids.extend(named.filter_map(Snapshot::snapshot_id).map(str::to_owned));
    }
    ids.sort();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Order {
        let tags = [("Name", "web-1"), (rules::DIGEST_TAG, "d"), (rules::SETTINGS_TAG, "s"), ("team", "web")];
        let source = Source {
            region: "us-east-1".to_owned(),
            id: "ami-1".to_owned(),
            name: "web-1".to_owned(),
            description: None,
            tags: tags.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec(),
            has_others: false,
        };
        Order { name: source.name.clone(), source, kms_key: None, replaces: Vec::new() }
    }

    #[test]
    fn a_token_is_the_same_for_the_same_copy_only() {
        let first = token(&order(), "eu-west-1");
        assert_eq!(first, token(&order(), "eu-west-1"));
        assert!(first.len() <= 64 && first.is_ascii(), "AWS takes no longer one: {first}");
        let mut others = vec![token(&order(), "eu-west-2")];
        let changes: [fn(&mut Order); 4] = [
            |order| order.source.id = "ami-2".to_owned(),
            |order| order.name = "web-2".to_owned(),
            |order| order.kms_key = Some("alias/x".to_owned()),
            |order| order.source.tags.truncate(1),
        ];
        for change in changes {
            let mut order = order();
            change(&mut order);
            others.push(token(&order, "eu-west-1"));
        }
        others.sort();
        others.dedup();
        assert!(others.len() == 5 && !others.contains(&first));
    }

    #[test]
    fn a_copys_name_tag_is_its_own_name() {
        let named = |order: &Order| tags(order).into_iter().find(|(key, _)| key == "Name").unwrap().1;
        assert_eq!(named(&Order { name: "web-2".to_owned(), ..order() }), "web-2");
        let mut other = order();
        other.source.tags[0].1 = "the web server".to_owned();
        assert_eq!(named(&Order { name: "web-2".to_owned(), ..other }), "the web server");
    }

    #[test]
    fn images_stay_in_their_partition() {
        same_partition(&order(), "eu-west-1").unwrap();
        let error = same_partition(&order(), "cn-north-1").unwrap_err();
        assert_eq!(error.exit, Exit::Input);
        assert_eq!(error.message, "ami-1 can't be copied from us-east-1 to cn-north-1: images don't leave `aws`");
        assert!(error.help.unwrap().contains("`aws-cn`"));
    }

    #[test]
    fn a_copy_is_known_by_where_it_is_from_or_by_its_tags() {
        let tagged = |pairs: &[(&str, &str)]| {
            let tags = pairs.iter().map(|(key, value)| Tag::builder().key(*key).value(*value).build()).collect();
            Image::builder().image_id("ami-9").set_tags(Some(tags)).build()
        };
        assert!(is_copy(&tagged(&[(rules::DIGEST_TAG, "d"), (rules::SETTINGS_TAG, "s")]), &order()));
        assert!(!is_copy(&tagged(&[(rules::DIGEST_TAG, "d"), (rules::SETTINGS_TAG, "other")]), &order()));
        assert!(!is_copy(&tagged(&[]), &order()));
        let from = |region| Image::builder().source_image_id("ami-1").source_image_region(region).build();
        assert!(is_copy(&from("us-east-1"), &order()));
        assert!(!is_copy(&from("us-east-2"), &order()));
        let mut bare = order();
        bare.source.tags.clear();
        assert!(!is_copy(&tagged(&[]), &bare), "two images without tags are not alike");
    }
}
