//! What interrupted publishes have left: snapshots without an image, imports that still run, objects and unfinished
//! uploads.
//!
//! A publish that runs at this moment has such things too. What is young stays therefore, and what has no age: AWS tells
//! none of an import, which is taken for as old as its object.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, SystemTime};

use aws_sdk_ec2::primitives::DateTime;
use aws_sdk_ec2::types::{ImportSnapshotTask, Snapshot, SnapshotState};
use serde::Serialize;
use tokio::time::timeout;

use super::super::failure::Failure;
use super::super::found;
use super::super::import::{self, State};
use super::super::place::Place;
use super::super::undo::{EACH, until_deleted};
use super::super::{image, rules, scratch};
use super::{list, retire};
use crate::error::{Error, Exit};

/// Something that nothing needs any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Leftover {
    /// The region it is in.
    pub region: String,
    /// What it is.
    #[serde(flatten)]
    pub thing: Thing,
    /// The name of the recipe it was made for, where that is known.
    pub name: Option<String>,
    /// How many seconds ago it was begun.
    pub age: u64,
    /// How large it is in bytes, where that is known.
    pub bytes: Option<u64>,
}

/// What there is to be left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Thing {
    /// A snapshot that no image uses.
    Snapshot {
        /// Its id.
        id: String,
        /// It was never completed.
        pending: bool,
    },
    /// An import that runs.
    Import {
        /// Its task's id.
        id: String,
    },
    /// An object with a disk, or one that parts of a disk are copied from.
    Object {
        /// Its bucket.
        bucket: String,
        /// Its key.
        key: String,
    },
    /// An upload that was not finished. Its parts cost what an object would.
    Upload {
        /// Its bucket.
        bucket: String,
        /// Its key.
        key: String,
        /// Its id.
        id: String,
    },
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot { id, pending: false } => write!(f, "snapshot {id}"),
            Self::Snapshot { id, pending: true } => write!(f, "unfinished snapshot {id}"),
            Self::Import { id } => write!(f, "import task {id}"),
            Self::Object { bucket, key } => write!(f, "object s3://{bucket}/{key}"),
            Self::Upload { bucket, key, .. } => write!(f, "unfinished upload of s3://{bucket}/{key}"),
        }
    }
}

fn age(at: Option<&DateTime>) -> Option<Duration> {
    let seconds = DateTime::from(SystemTime::now()).secs() - at?.secs();
    Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}

/// Snapshots and imports.
pub(super) async fn in_region(place: &Place, older: Duration) -> Result<Vec<Leftover>, Error> {
    let mut all = snapshots(place, older).await?;
    all.extend(Box::pin(imports(place, older)).await?);
    Ok(all)
}

async fn snapshots(place: &Place, older: Duration) -> Result<Vec<Leftover>, Error> {
    // In this order: a snapshot that becomes an image's in between is seen in use.
    let snapshots = place.call("the snapshots", Box::pin(retire::own_snapshots(place))).await?;
    let images = place.call("the images", Box::pin(list::own(place, None))).await?;
    let used: BTreeSet<&str> = images.iter().flat_map(image::snapshots).collect();
    let leftover = |snapshot: &Snapshot| {
        let (id, age) = (snapshot.snapshot_id()?, age(snapshot.start_time())?);
        if used.contains(id) || age < older {
            return None;
        }
        let gib = snapshot.volume_size().and_then(|gib| u64::try_from(gib).ok());
        Some(Leftover {
            region: place.region().to_owned(),
            thing: Thing::Snapshot { id: id.to_owned(), pending: snapshot.state() == Some(&SnapshotState::Pending) },
            name: found::tag(snapshot.tags(), rules::NAME_TAG).map(str::to_owned),
            age: age.as_secs(),
            bytes: gib.map(|gib| gib << 30),
        })
    };
    Ok(snapshots.iter().filter_map(leftover).collect())
}

async fn imports(place: &Place, older: Duration) -> Result<Vec<Leftover>, Error> {
    let tasks = place.call("the imports", import::all(&place.clients)).await?;
    let mut all = Vec::new();
    for task in &tasks {
        let kilns = found::tag(task.tags(), rules::DIGEST_TAG).is_some();
        let running = matches!(import::judge_task(task), State::Working { .. });
        let Some(id) = task.import_task_id().filter(|_| kilns && running) else { continue };
        match place.stop.or("the imports' objects", object_age(place, task)).await? {
            Some(age) if age >= older => all.push(Leftover {
                region: place.region().to_owned(),
                thing: Thing::Import { id: id.to_owned() },
                name: found::tag(task.tags(), rules::NAME_TAG).map(str::to_owned),
                age: age.as_secs(),
                bytes: None,
            }),
            Some(_) => {}
            None => place.events.note(format!(
                "import task {id} in {} runs, and stays: its age is not known, because its object can't be seen",
                place.region()
            )),
        }
    }
    Ok(all)
}

async fn object_age(place: &Place, task: &ImportSnapshotTask) -> Option<Duration> {
    let source = task.snapshot_task_detail()?.user_bucket()?;
    let call = place.clients.s3.head_object().bucket(source.s3_bucket()?).key(source.s3_key()?);
    age(call.send().await.ok()?.last_modified())
}

/// Objects and unfinished uploads, wherever the bucket is.
pub(super) async fn in_bucket(place: &Place, bucket: &str, older: Duration) -> Result<Vec<Leftover>, Error> {
    let region = region_of(place, bucket).await?;
    let place = if region == place.region() { place.clone() } else { place.elsewhere(&region) };
    let error = |failure: Failure| failure.in_bucket(place.region(), bucket);
    let mut all = place.stop.or("the unfinished uploads", uploads(&place, bucket, older)).await?.map_err(error)?;
    all.extend(place.stop.or("the objects", Box::pin(objects(&place, bucket, older))).await?.map_err(error)?);
    Ok(all)
}

/// S3 tells in its answer, also in one that refuses because the region is another.
async fn region_of(place: &Place, bucket: &str) -> Result<String, Error> {
    let answer = place.stop.or("the bucket", place.clients.s3.head_bucket().bucket(bucket).send()).await?;
    match answer.map_err(place.clients.failed("s3:HeadBucket")) {
        Ok(head) => Ok(head.bucket_region().unwrap_or(place.region()).to_owned()),
        Err(failure) if failure.status == 404 => Err(Error::new(Exit::Input, format!("there is no bucket `{bucket}`"))
            .help("name the one that kiln publishes through")),
        Err(Failure { bucket_region: Some(region), .. }) if region != place.region() => Ok(region),
        Err(failure) => Err(failure.in_bucket(place.region(), bucket)),
    }
}

async fn uploads(place: &Place, bucket: &str, older: Duration) -> Result<Vec<Leftover>, Failure> {
    let (mut all, mut after) = (Vec::new(), (None, None));
    loop {
        let call = place.clients.s3.list_multipart_uploads().bucket(bucket);
        let call = call.set_key_marker(after.0).set_upload_id_marker(after.1);
        let answer = call.send().await.map_err(place.clients.failed("s3:ListMultipartUploads"))?;
        for upload in answer.uploads() {
            // An upload's metadata can't be read: only its key tells whose it is.
            if let (Some(key), Some(id), Some(age)) = (upload.key(), upload.upload_id(), age(upload.initiated()))
                && let Some(disk) = Key::read(key)
                && age >= older
            {
                all.push(Leftover {
                    region: place.region().to_owned(),
                    thing: Thing::Upload { bucket: bucket.to_owned(), key: key.to_owned(), id: id.to_owned() },
                    name: Some(disk.name.to_owned()),
                    age: age.as_secs(),
                    bytes: None,
                });
            }
        }
        after = (answer.next_key_marker().map(str::to_owned), answer.next_upload_id_marker().map(str::to_owned));
        if answer.is_truncated() != Some(true) || after.0.is_none() {
            return Ok(all);
        }
    }
}

async fn objects(place: &Place, bucket: &str, older: Duration) -> Result<Vec<Leftover>, Failure> {
    let (mut all, mut next) = (Vec::new(), None);
    loop {
        let call = place.clients.s3.list_objects_v2().bucket(bucket).set_continuation_token(next);
        let answer = call.send().await.map_err(place.clients.failed("s3:ListObjectsV2"))?;
        for object in answer.contents() {
            if let (Some(key), Some(age)) = (object.key(), age(object.last_modified()))
                && let Some(disk) = Key::read(key)
                && age >= older
                && is_kilns(place, bucket, key, &disk).await?
            {
                all.push(Leftover {
                    region: place.region().to_owned(),
                    thing: Thing::Object { bucket: bucket.to_owned(), key: key.to_owned() },
                    name: Some(disk.name.to_owned()),
                    age: age.as_secs(),
                    bytes: object.size().and_then(|size| u64::try_from(size).ok()),
                });
            }
        }
        next = answer.next_continuation_token().map(str::to_owned);
        if answer.is_truncated() != Some(true) || next.is_none() {
            return Ok(all);
        }
    }
}

/// Whether the object's metadata says that it has the disk that its key names. Zeros have had none.
async fn is_kilns(place: &Place, bucket: &str, key: &str, disk: &Key<'_>) -> Result<bool, Failure> {
    let head = place.clients.s3.head_object().bucket(bucket).key(key).send().await;
    match head.map_err(place.clients.failed("s3:HeadObject")) {
        Ok(head) => Ok(match head.metadata().and_then(|metadata| metadata.get("kiln-digest")) {
            Some(digest) => digest.starts_with(disk.digest),
            None => disk.zeros,
        }),
        Err(failure) if failure.is_not_found() => Ok(false),
        Err(failure) => Err(failure),
    }
}

/// A key that `rules::key_stem` has begun.
#[derive(Debug, PartialEq, Eq)]
struct Key<'a> {
    name: &'a str,
    digest: &'a str,
    zeros: bool,
}

impl<'a> Key<'a> {
    /// `PREFIX/NAME-DIGEST.raw`, with the start of the disk's digest, perhaps `-RUN` after it, and perhaps `.zeros` or
    /// `.scratch`.
    fn read(key: &'a str) -> Option<Self> {
        let last = key.rsplit('/').next()?;
        let (last, zeros) = match last.strip_suffix(scratch::SEED) {
            Some(rest) => (rest, true),
            None => (last.strip_suffix(scratch::SCRATCH).unwrap_or(last), false),
        };
        let stem = last.strip_suffix(".raw").or_else(|| last.strip_suffix(".vmdk"))?;
        let is_hex = |text: &str| {
            (16..=64).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let (before, digest) = stem.rsplit_once('-').filter(|(_, digest)| is_hex(digest))?;
        let (name, digest) = match before.rsplit_once('-') {
            Some((name, first)) if is_hex(first) => (name, first),
            _ => (before, digest),
        };
        (!name.is_empty()).then_some(Self { name, digest, zeros })
    }
}

/// Deletes it. That it is gone already is as good.
pub(super) async fn delete(place: &Place, leftover: &Leftover) -> Result<(), Error> {
    let what = leftover.thing.to_string();
    place.stop.check(&what)?;
    let deleted = until_deleted(|| Box::pin(ask_to_delete(place, &leftover.thing)));
    let ended = match timeout(EACH, deleted).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(failure)) => match &leftover.thing {
            Thing::Object { bucket, .. } | Thing::Upload { bucket, .. } => failure.in_bucket(place.region(), bucket),
            Thing::Snapshot { .. } | Thing::Import { .. } => place.error(failure),
        },
        Err(_) => Error::new(Exit::Publish, "AWS did not do it in time").help("try again"),
    };
    Err(Error { message: format!("{what} stays: {}", ended.message), ..ended })
}

async fn ask_to_delete(place: &Place, thing: &Thing) -> Result<(), Failure> {
    let (ec2, s3) = (&place.clients.ec2, &place.clients.s3);
    match thing {
        Thing::Snapshot { id, .. } => {
            let answer = ec2.delete_snapshot().snapshot_id(id).send().await;
            answer.map(|_| ()).map_err(place.clients.failed("ec2:DeleteSnapshot"))
        }
        Thing::Import { id } => {
            let answer = ec2.cancel_import_task().import_task_id(id).cancel_reason("swept by kiln").send().await;
            answer.map(|_| ()).map_err(place.clients.failed("ec2:CancelImportTask"))
        }
        Thing::Object { bucket, key } => {
            let answer = s3.delete_object().bucket(bucket).key(key).send().await;
            answer.map(|_| ()).map_err(place.clients.failed("s3:DeleteObject"))
        }
        Thing::Upload { bucket, key, id } => {
            let answer = s3.abort_multipart_upload().bucket(bucket).key(key).upload_id(id).send().await;
            answer.map(|_| ()).map_err(place.clients.failed("s3:AbortMultipartUpload"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_that_kiln_makes_are_read() {
        let (digest, run) = ("0123456789abcdef", "fedcba9876543210");
        let read = |key: &str| Key::read(key).map(|key| (key.name.to_owned(), key.digest.to_owned(), key.zeros));
        let disk = |zeros| Some(("web-1".to_owned(), digest.to_owned(), zeros));
        assert_eq!(read(&format!("web-1-{digest}-{run}.raw")), disk(false));
        assert_eq!(read(&format!("a/b/web-1-{digest}-{run}.raw.zeros")), disk(true));
        assert_eq!(read(&format!("web-1-{digest}.raw.scratch")), disk(false));
        assert_eq!(read(&format!("web-1-{digest}.vmdk")), disk(false));
        let long = digest.repeat(2);
        assert_eq!(read(&format!("web-{long}.raw")), Some(("web".to_owned(), long, false)));
        for foreign in [
            "web.raw".to_owned(),
            format!("{digest}.raw"),
            format!("-{digest}.raw"),
            format!("web-{digest}.raw.gz"),
            format!("web-{}.raw", digest.to_uppercase()),
            "web-0123456789abcde.raw".to_owned(),
            format!("web-{digest}.raw/other"),
        ] {
            assert_eq!(read(&foreign), None, "{foreign}");
        }
    }
}
