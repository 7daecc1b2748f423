//! The images that kiln has made.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use aws_sdk_ec2::primitives::{DateTime, DateTimeFormat};
use aws_sdk_ec2::types::{Filter, Image as Found, ImageState};
use serde::Serialize;
use tokio::task::JoinSet;

use super::super::failure::{Failure, tidy};
use super::super::place::Place;
use super::super::{image, rules, share};
use crate::error::Error;

/// How many images are asked at once for whom they are shared with.
const AT_ONCE: usize = 8;

/// How an image is named on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// By its id.
    Id(String),
    /// By its own name, or by that of its recipe.
    Name(String),
}

impl FromStr for Which {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_hex = |id: &str| id.len() >= 8 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        Ok(match text.strip_prefix("ami-") {
            Some(id) if is_hex(id) => Self::Id(text.to_owned()),
            _ => Self::Name(text.to_owned()),
        })
    }
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Id(text) | Self::Name(text)) = self;
        f.write_str(text)
    }
}

impl Which {
    pub(super) fn is(&self, image: &Image) -> bool {
        match self {
            Self::Id(id) => image.image_id == *id,
            Self::Name(name) => image.name == *name || image.image_name == *name,
        }
    }
}

/// Where a copy is from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Origin {
    /// The region, if AWS tells it.
    pub region: Option<String>,
    /// The id of the image that was copied.
    pub image_id: String,
}

/// An image that kiln has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Image {
    /// The region it is in.
    pub region: String,
    /// Its id.
    pub image_id: String,
    /// Its name.
    pub image_name: String,
    /// The recipe's name.
    pub name: String,
    /// Words about it.
    pub description: Option<String>,
    /// The digest of the disk it was made from.
    pub digest: Option<String>,
    /// What its instances run on, as AWS calls it.
    pub architecture: Option<String>,
    /// `available`, `pending`, `failed`, …
    pub state: String,
    /// Why it is in that state, if AWS says so.
    pub reason: Option<String>,
    /// When it was made, as AWS writes it.
    pub created: Option<String>,
    /// How many seconds ago that was.
    pub age: Option<u64>,
    /// The size of its volumes in GiB.
    pub size_gib: u64,
    /// Whether any of its volumes is encrypted.
    pub encrypted: bool,
    /// When it is deprecated, as AWS writes it.
    pub deprecated: Option<String>,
    /// It can't be deregistered.
    pub protected: bool,
    /// Everyone can launch it.
    pub public: bool,
    /// Who can launch it besides its owner: accounts, ARNs, `all`. None where the caller may not ask.
    pub shared_with: Option<Vec<String>>,
    /// The ids of its snapshots.
    pub snapshots: Vec<String>,
    /// The image that it is a copy of.
    pub copy_of: Option<Origin>,
    /// All its tags.
    pub tags: BTreeMap<String, String>,
}

impl Image {
    /// None if it isn't one of kiln's.
    pub(super) fn of(region: &str, found: &Found, now: SystemTime) -> Option<Self> {
        let tags: BTreeMap<String, String> = found
            .tags()
            .iter()
            .filter_map(|tag| Some((tag.key()?.to_owned(), tag.value().unwrap_or_default().to_owned())))
            .collect();
        let volumes = || found.block_device_mappings().iter().filter_map(|mapping| mapping.ebs());
        let sizes = volumes().filter_map(|volume| u64::try_from(volume.volume_size()?).ok());
        let reason = found.state_reason().and_then(|reason| reason.message().or(reason.code()));
        let text = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(str::to_owned);
        Some(Self {
            region: region.to_owned(),
            image_id: found.image_id()?.to_owned(),
            image_name: found.name().unwrap_or_default().to_owned(),
            name: tags.get(rules::NAME_TAG)?.clone(),
            description: text(found.description()),
            digest: tags.get(rules::DIGEST_TAG).cloned(),
            architecture: found.architecture().map(ToString::to_string),
            state: found.state().map_or_else(|| ImageState::Pending.to_string(), ToString::to_string),
            reason: reason.map(tidy),
            created: text(found.creation_date()),
            age: found.creation_date().and_then(|date| seconds_since(date, now)),
            size_gib: sizes.sum(),
            encrypted: volumes().any(|volume| volume.encrypted() == Some(true)),
            deprecated: text(found.deprecation_time()),
            protected: found.deregistration_protection().is_some_and(|state| state.starts_with("enabled")),
            public: found.public() == Some(true),
            shared_with: None,
            snapshots: image::snapshots(found).map(str::to_owned).collect(),
            copy_of: found
                .source_image_id()
                .map(|id| Origin { region: found.source_image_region().map(str::to_owned), image_id: id.to_owned() }),
            tags,
        })
    }

    /// Whether it can be launched.
    #[must_use]
    pub fn is_available(&self) -> bool {
        self.state == ImageState::Available.as_str()
    }
}

/// How long ago a moment was that AWS tells; 0 for one in the future, which another clock has told.
fn seconds_since(date: &str, now: SystemTime) -> Option<u64> {
    let then = DateTime::from_str(date, DateTimeFormat::DateTime).ok()?;
    let now = DateTime::from(now).secs();
    Some(u64::try_from(now - then.secs()).unwrap_or(0))
}

/// The images of this name, or all that kiln has made, newest first.
pub(super) async fn images(place: &Place, which: Option<&Which>) -> Result<Vec<Image>, Error> {
    let kilns = Filter::builder().name("tag-key").values(rules::NAME_TAG).build();
    let found = place.call("the images", Box::pin(own(place, Some(kilns)))).await?;
    let now = SystemTime::now();
    let mut images: Vec<Image> = found
        .iter()
        .filter_map(|image| Image::of(place.region(), image, now))
        .filter(|image| which.is_none_or(|which| which.is(image)))
        .collect();
    images.sort_by(|one, other| other.created.cmp(&one.created).then_with(|| one.image_id.cmp(&other.image_id)));
    Ok(images)
}

/// This account's images that pass the filter.
pub(super) async fn own(place: &Place, filter: Option<Filter>) -> Result<Vec<Found>, Failure> {
    let (mut all, mut next) = (Vec::new(), None);
    loop {
        let call = place.clients.ec2.describe_images().owners("self").include_disabled(true).set_next_token(next);
        let answer = call.set_filters(filter.clone().map(|filter| vec![filter])).send().await;
        let answer = answer.map_err(place.clients.failed("ec2:DescribeImages"))?;
        next = answer.next_token().filter(|token| !token.is_empty()).map(str::to_owned);
        all.extend(answer.images.unwrap_or_default());
        if next.is_none() {
            return Ok(all);
        }
    }
}

/// The first that can be launched of images that are sorted newest first.
pub(super) fn newest(images: Vec<Image>) -> Option<Image> {
    images.into_iter().find(Image::is_available)
}

/// Finds out whom the images are shared with, where the caller may ask.
pub(super) async fn add_sharing(place: &Place, images: &mut [Image]) -> Result<(), Error> {
    for some in images.chunks_mut(AT_ONCE) {
        let mut asking = JoinSet::new();
        for (index, image) in some.iter().enumerate() {
            let (place, id) = (place.clone(), image.image_id.clone());
            asking.spawn(async move { (index, share::shared_with(&place, &id).await) });
        }
        while let Some(answer) = place.stop.or("whom the images are shared with", asking.join_next()).await? {
            match answer {
                Ok((index, Ok(with))) => {
                    some[index].shared_with = Some(with.iter().map(ToString::to_string).collect());
                }
                // It may have gone since it was listed.
                Ok((_, Err(failure))) if failure.is_denied() || failure.is_not_found() => {
                    place.events.detail(format!("whom images are shared with: {}", failure.reason()));
                }
                Ok((_, Err(failure))) => return Err(place.error(failure)),
                Err(_) => {}
            }
        }
    }
    Ok(())
}

/// The regions that are enabled for the account, in order.
pub(super) async fn regions(place: &Place) -> Result<Vec<String>, Failure> {
    let answer = place.clients.ec2.describe_regions().send().await;
    let answer = answer.map_err(place.clients.failed("ec2:DescribeRegions"))?;
    let mut names: Vec<String> =
        answer.regions().iter().filter_map(|region| region.region_name().map(str::to_owned)).collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_id_is_told_from_a_name() {
        let read = |text: &str| text.parse::<Which>().unwrap();
        assert_eq!(read("ami-0123456789abcdef0"), Which::Id("ami-0123456789abcdef0".to_owned()));
        for name in ["web", "ami-web", "ami-", "ami-tools-2026"] {
            assert_eq!(read(name), Which::Name(name.to_owned()));
        }
    }

    #[test]
    fn ages_are_of_awss_dates_and_never_negative() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        assert_eq!(seconds_since("2001-09-09T01:46:30.000Z", now), Some(10));
        assert_eq!(seconds_since("2001-09-09T01:46:50Z", now), Some(0));
        assert_eq!(seconds_since("yesterday", now), None);
    }
}
