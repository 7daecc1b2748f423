//! Taking back what was made.
//!
//! A thing is noted before it is asked for. When it is certain that it was not made, the note goes; when its id is
//! known, the note gets it; and when no answer ever came, the thing is looked for before it is deleted.

use std::time::Duration;

use aws_sdk_ec2::types::Tag;
use tokio::time::{sleep, timeout};

use super::failure::{Failure, Kind};
use super::import::{RUN_TAG, State, look};
use super::lock::Lock;
use super::{Job, ebs, image, import, multipart, object};
use crate::error::{Error, Exit};
use crate::event::Event;

/// How long the undoing of one thing may take.
pub(super) const EACH: Duration = Duration::from_secs(30);
/// The pause before another try.
pub(super) const PAUSE: Duration = Duration::from_secs(1);
/// How often something is looked for whose making was never confirmed.
pub(super) const LOOKS: u32 = 8;
/// How often a thing with a known id must be unknown to AWS before it is believed to be gone.
const GONE: u32 = 3;

/// Something that was made, or that may have been. Without an id, the request's answer is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Made {
    /// A multipart upload; while it is `completing`, there may be the object instead.
    Upload { key: String, id: Option<String>, completing: bool },
    /// An object of this disk: the target's, or one beside it that parts are copied from. Unless it is `sure`, no answer told
    /// that it was made, or which version of it.
    Object { key: String, version: Option<String>, sure: bool },
    /// An import task, tagged with the target's run.
    Task { id: Option<String> },
    /// A snapshot; without an id one that is tagged with the target's run.
    Snapshot { id: Option<String> },
    /// An image of this name, made from `snapshot`.
    Image { id: Option<String>, name: String, snapshot: String },
}

impl Made {
    /// An upload to this key that is not completed.
    pub(super) fn upload(key: &str, id: Option<String>) -> Self {
        Self::Upload { key: key.to_owned(), id, completing: false }
    }

    /// An object that is there.
    pub(super) fn object(key: &str, version: Option<String>) -> Self {
        Self::Object { key: key.to_owned(), version, sure: true }
    }
}

/// Everything made so far, or taken over from a run that was killed, in order.
#[derive(Debug, Default)]
pub(super) struct Undo {
    made: Vec<Option<Made>>,
    /// Held until all is done or taken back.
    lock: Option<Lock>,
}

impl Undo {
    /// Keeps other kilns away until all is done or taken back.
    pub(super) fn hold(&mut self, lock: Option<Lock>) {
        self.lock = lock;
    }

    /// Whether it does.
    pub(super) fn holds_lock(&self) -> bool {
        self.lock.is_some()
    }

    /// Notes what another run has made and this one goes on with, once.
    pub(super) fn take_over(&mut self, made: Made) -> usize {
        let known = self.made.iter().position(|known| known.as_ref() == Some(&made));
        known.unwrap_or_else(|| self.will_make(made))
    }

    /// Notes that something is about to be asked for.
    pub(super) fn will_make(&mut self, made: Made) -> usize {
        self.made.push(Some(made));
        self.made.len() - 1
    }

    /// Notes what came of it.
    pub(super) fn made(&mut self, entry: usize, made: Made) {
        self.made[entry] = Some(made);
    }

    /// Forgets it: it is gone, or was not made.
    pub(super) fn forget(&mut self, entry: usize) {
        self.made[entry] = None;
    }

    /// What was made so far stays, whatever comes.
    pub(super) fn settle(&mut self) {
        self.made.fill(None);
    }

    /// Forgets the object with this key: it stays.
    pub(super) fn keep_object(&mut self, kept: &str) {
        for entry in &mut self.made {
            entry.take_if(|made| matches!(made, Made::Object { key, .. } if key == kept));
        }
    }

    /// Deletes the objects with these keys; what is left is returned in words, and stays noted.
    pub(super) async fn objects(&mut self, job: &Job<'_>, which: impl Fn(&str) -> bool) -> Vec<String> {
        self.some(job, |made| matches!(made, Made::Object { key, .. } if which(key))).await
    }

    /// Aborts the uploads; what is left is returned in words, and stays noted.
    pub(super) async fn uploads(&mut self, job: &Job<'_>) -> Vec<String> {
        self.some(job, |made| matches!(made, Made::Upload { .. })).await
    }

    /// Deletes the snapshots; what is left is returned in words, and stays noted.
    pub(super) async fn snapshots(&mut self, job: &Job<'_>) -> Vec<String> {
        self.some(job, |made| matches!(made, Made::Snapshot { .. })).await
    }

    async fn some(&mut self, job: &Job<'_>, which: impl Fn(&Made) -> bool) -> Vec<String> {
        let mut left = Vec::new();
        for entry in &mut self.made {
            let Some(made) = entry.as_ref().filter(|made| which(made)) else { continue };
            match take_back(job, made).await {
                Ok(()) => *entry = None,
                Err(words) => left.push(words),
            }
        }
        left
    }

    /// Takes everything back, last made first. Returns `error` with what is left in its notes, and how much that is.
    pub(super) async fn run(self, job: &Job<'_>, mut error: Error) -> (Error, usize) {
        let Self { made, lock: _held } = self;
        let made: Vec<Made> = made.into_iter().rev().flatten().collect();
        if made.is_empty() {
            return (error, 0);
        }
        let started = std::time::Instant::now();
        job.events.emit(Event::PhaseStarted { phase: "undo", detail: "taking back what was made".to_owned() });
        announce(job, &made, &error);
        let before = error.notes.len();
        let mut held = None;
        for made in &made {
            let ended = match made {
                Made::Snapshot { id: Some(id) } if held == Some(id) => {
                    Err(Left::because("the image uses it").describe(job, made))
                }
                made => take_back(job, made).await,
            };
            if let Err(left) = ended {
                error.notes.push(format!("left behind: {left}"));
                if let Made::Image { id: Some(_), snapshot, .. } = made {
                    held = Some(snapshot);
                }
            }
        }
        let left = error.notes.len() - before;
        let detail = if left == 0 { "nothing is left".to_owned() } else { format!("{left} left behind") };
        job.events.emit(Event::PhaseDone { phase: "undo", detail, took: started.elapsed() });
        (error, left)
    }
}

/// Names what is about to be taken back: whoever ends kiln meanwhile knows what to look for. After a signal that is likely,
/// and then it is said to those too who want to see only warnings.
fn announce(job: &Job<'_>, made: &[Made], error: &Error) {
    let list: Vec<String> = made.iter().map(|made| in_words(job, made)).collect();
    let message = format!("taking back {}", list.join(", "));
    job.events.emit(match error.exit {
        Exit::Signal(_) => {
            Event::Warning { message, help: Some("wait for it; a second signal leaves it there".to_owned()) }
        }
        _ => Event::Note { message },
    });
}

/// Deletes one thing, which may turn out to be another, or nothing. An error says what is left, why, and how to delete it by hand.
async fn take_back(job: &Job<'_>, made: &Made) -> Result<(), String> {
    let ended = timeout(EACH, async {
        match made {
            Made::Image { id, name, snapshot } => undo_image(job, id.as_deref(), name, snapshot).await,
            Made::Snapshot { id } => undo_snapshot(job, id.as_deref()).await,
            Made::Task { id } => undo_task(job, id.as_deref()).await,
            Made::Object { key, version, sure: true } => undo_object(job, key, version.as_deref(), None).await,
            Made::Object { key, .. } => undo_object(job, key, None, Some(GONE)).await,
            Made::Upload { key, id, completing } => undo_upload(job, key, id.as_deref(), *completing).await,
        }
    });
    match ended.await {
        Ok(Ok(deleted)) => {
            if let Some(deleted) = deleted {
                job.events.detail(format!("deleted {}", in_words(job, &deleted)));
            }
            Ok(())
        }
        Ok(Err(left)) => Err(left.describe(job, made)),
        Err(_) => Err(Left::because("AWS did not do it in time").describe(job, made)),
    }
}

/// Something that could not be deleted.
struct Left {
    /// What it turned out to be, when that differs from what was noted.
    found: Option<Made>,
    why: String,
}

impl Left {
    fn because(why: impl Into<String>) -> Self {
        Self { found: None, why: why.into() }
    }

    /// `made`, if `deleted` says that it is gone.
    fn unless(deleted: Result<(), Failure>, made: Made) -> Result<Option<Made>, Self> {
        match deleted {
            Ok(()) => Ok(Some(made)),
            Err(failure) => Err(Self { found: Some(made), ..failure.into() }),
        }
    }

    fn describe(self, job: &Job<'_>, noted: &Made) -> String {
        let made = self.found.as_ref().unwrap_or(noted);
        format!("{} ({}); delete it with `{}`", in_words(job, made), self.why, by_hand(job, made))
    }
}

impl From<Failure> for Left {
    fn from(failure: Failure) -> Self {
        Self::because(failure.reason())
    }
}

fn in_words(job: &Job<'_>, made: &Made) -> String {
    let target = &job.target;
    match made {
        Made::Image { id: Some(id), .. } => format!("image {id} in {}", target.region),
        Made::Image { id: None, name, .. } => format!("perhaps an image `{name}` in {}", target.region),
        Made::Snapshot { id: Some(id) } => format!("snapshot {id} in {}", target.region),
        Made::Snapshot { id: None } => {
            format!("perhaps a snapshot with the tag {RUN_TAG}={} in {}", target.run, target.region)
        }
        Made::Task { id: Some(id) } => format!("import task {id} in {}", target.region),
        Made::Task { id: None } => {
            format!("perhaps an import task with the tag {RUN_TAG}={} in {}", target.run, target.region)
        }
        Made::Object { key, sure: false, .. } => format!("perhaps object s3://{}/{key}", target.bucket),
        Made::Object { key, .. } => format!("object s3://{}/{key}", target.bucket),
        Made::Upload { key, id: None, .. } => format!("perhaps an unfinished upload of s3://{}/{key}", target.bucket),
        Made::Upload { key, .. } => format!("unfinished upload of s3://{}/{key}", target.bucket),
    }
}

fn by_hand(job: &Job<'_>, made: &Made) -> String {
    let target = &job.target;
    let (region, bucket) = (&target.region, &target.bucket);
    match made {
        Made::Image { id: Some(id), .. } => format!("aws ec2 deregister-image --region {region} --image-id {id}"),
        Made::Image { id: None, name, .. } => format!(
            "aws ec2 deregister-image --region {region} --image-id ID`, its id being in `aws ec2 describe-images --region {region} \
             --owners self --filters 'Name=name,Values={name}'"
        ),
        Made::Snapshot { id } => {
            let id = id.as_deref().unwrap_or("ID");
            format!("aws ec2 delete-snapshot --region {region} --snapshot-id {id}")
        }
        Made::Task { id } => {
            let id = id.as_deref().unwrap_or("ID");
            format!("aws ec2 cancel-import-task --region {region} --import-task-id {id}")
        }
        Made::Object { key, version: None, .. } => format!("aws s3 rm s3://{bucket}/{key}"),
        Made::Object { key, version: Some(version), .. } => {
            format!("aws s3api delete-object --bucket {bucket} --key {key} --version-id {version}")
        }
        Made::Upload { key, id, .. } => {
            let id = id.as_deref().unwrap_or("ID");
            format!("aws s3api abort-multipart-upload --bucket {bucket} --key {key} --upload-id {id}")
        }
    }
}

/// Repeats a deletion while it fails for reasons that pass.
pub(super) async fn until_deleted<F>(mut delete: impl FnMut() -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let mut unknown = 0;
    loop {
        match delete().await {
            Ok(()) => return Ok(()),
            // What was only just made may not be known everywhere yet, and would be left behind.
            Err(failure) if failure.is_not_found() => {
                unknown += 1;
                if unknown == GONE {
                    return Ok(());
                }
            }
            // A snapshot is in use until its image is gone everywhere.
            Err(failure)
                if failure.is_passing() && failure.kind == Kind::Refused || failure.code.ends_with(".InUse") => {}
            Err(failure) => return Err(failure),
        }
        sleep(PAUSE).await;
    }
}

/// The id of what was made by this call, looked for if no answer told it.
async fn id_of<F>(id: Option<&str>, call: &str, find: impl FnMut() -> F) -> Result<String, Left>
where
    F: Future<Output = Result<Option<String>, Failure>>,
{
    let id = match id {
        Some(id) => Some(id.to_owned()),
        None => search(find).await?,
    };
    id.ok_or_else(|| Left::because(format!("no answer to {call} came, and there is none so far")))
}

async fn undo_image(job: &Job<'_>, id: Option<&str>, name: &str, snapshot: &str) -> Result<Option<Made>, Left> {
    let find = || async { Ok(image::own(&image::of_names(&job.clients, &[name]).await?, snapshot)) };
    let id = id_of(id, "RegisterImage", find).await?;
    let deleted = until_deleted(|| async {
        let call = job.clients.ec2.deregister_image().image_id(&id);
        call.send().await.map(|_| ()).map_err(job.clients.failed("ec2:DeregisterImage"))
    });
    let image = Made::Image { id: Some(id.clone()), name: name.to_owned(), snapshot: snapshot.to_owned() };
    Left::unless(deleted.await, image)
}

async fn delete_snapshot(job: &Job<'_>, id: &str) -> Result<Option<Made>, Left> {
    let deleted = until_deleted(|| async {
        let call = job.clients.ec2.delete_snapshot().snapshot_id(id);
        call.send().await.map(|_| ()).map_err(job.clients.failed("ec2:DeleteSnapshot"))
    });
    Left::unless(deleted.await, Made::Snapshot { id: Some(id.to_owned()) })
}

async fn undo_snapshot(job: &Job<'_>, id: Option<&str>) -> Result<Option<Made>, Left> {
    let id = id_of(id, "StartSnapshot", || ebs::find(job)).await?;
    delete_snapshot(job, &id).await
}

async fn undo_task(job: &Job<'_>, id: Option<&str>) -> Result<Option<Made>, Left> {
    let id = id_of(id, "ImportSnapshot", || find_task(job)).await?;
    let task = || Some(Made::Task { id: Some(id.clone()) });
    match cancel_task(job, &id).await {
        Ok(deleted) => Ok(deleted.or_else(task)),
        Err(left) => Err(Left { found: left.found.or_else(task), ..left }),
    }
}

/// Cancels the task, or deletes its snapshot if it was quicker.
async fn cancel_task(job: &Job<'_>, id: &str) -> Result<Option<Made>, Left> {
    let mut unknown = 0;
    loop {
        match look(job, id).await? {
            Some(State::Done { snapshot }) => return delete_snapshot(job, &snapshot).await,
            Some(State::Failed { .. }) => return Ok(None),
            Some(State::Working { .. }) => {}
            None if unknown == GONE => return Ok(None),
            None => unknown += 1,
        }
        let call = job.clients.ec2.cancel_import_task().import_task_id(id).cancel_reason("kiln was stopped");
        let cancelled = call.send().await.map_err(job.clients.failed("ec2:CancelImportTask"));
        // Refused may also mean that it has just ended: the next look tells.
        if let Err(failure) = cancelled
            && !failure.is_passing()
            && !failure.is_not_found()
            && !matches!(look(job, id).await?, Some(State::Done { .. } | State::Failed { .. }))
        {
            return Err(failure.into());
        }
        sleep(PAUSE.min(job.request.poll)).await;
    }
}

async fn find_task(job: &Job<'_>) -> Result<Option<String>, Failure> {
    let run = Some(job.target.run.as_str());
    let is_own = |tag: &Tag| tag.key() == Some(RUN_TAG) && tag.value() == run;
    let tasks = import::all(&job.clients).await?;
    let own = tasks.iter().find(|task| task.tags().iter().any(is_own));
    Ok(own.and_then(|task| task.import_task_id()).map(str::to_owned))
}

/// Deletes an object; one that may not be there is looked for so often first.
async fn undo_object(
    job: &Job<'_>,
    key: &str,
    version: Option<&str>,
    looks: Option<u32>,
) -> Result<Option<Made>, Left> {
    // On another host the same disk may be published at this moment.
    if *key == job.target.key
        && let Some(task) = import::another(job).await
    {
        let why = format!("import task {task} of another publish reads it");
        let object = Made::Object { key: key.to_owned(), version: version.map(str::to_owned), sure: looks.is_none() };
        return Err(Left { found: Some(object), why });
    }
    match looks {
        None => delete_object(job, key, version).await,
        Some(looks) => find_and_delete_object(job, key, looks).await,
    }
}

async fn delete_object(job: &Job<'_>, key: &str, version: Option<&str>) -> Result<Option<Made>, Left> {
    let deleted = until_deleted(|| async {
        let call = job.clients.s3.delete_object().bucket(&job.target.bucket).key(key);
        let call = call.set_version_id(version.map(str::to_owned));
        call.send().await.map(|_| ()).map_err(job.clients.failed("s3:DeleteObject"))
    });
    Left::unless(deleted.await, Made::object(key, version.map(str::to_owned)))
}

/// Deletes an object that may be there, and whose version isn't known; it is not there if that many looks don't see it.
async fn find_and_delete_object(job: &Job<'_>, key: &str, looks: u32) -> Result<Option<Made>, Left> {
    for look in 0..looks {
        if look > 0 {
            sleep(PAUSE).await;
        }
        match object::look(job, key).await {
            Ok(Some(object)) => return delete_object(job, key, object.version.as_deref()).await,
            Ok(None) => {}
            // To look takes a permission of its own. What isn't there can be deleted too.
            Err(_) => return delete_object(job, key, None).await,
        }
    }
    Ok(None)
}

async fn undo_upload(job: &Job<'_>, key: &str, id: Option<&str>, completing: bool) -> Result<Option<Made>, Left> {
    let id = match id {
        Some(id) => Some(id.to_owned()),
        // It was begun because there was none: this is it, or one that another host has begun, which will begin again.
        None => search(|| multipart::unfinished(job, key)).await?,
    };
    let Some(id) = id else {
        return Err(Left::because("no answer to CreateMultipartUpload came, and there is none so far"));
    };
    let made = || Made::Upload { key: key.to_owned(), id: Some(id.clone()), completing };
    if let Err(failure) = abort(job, key, &id).await {
        return Left::unless(Err(failure), made());
    }
    // Only now: until it is aborted, S3 may still be putting the object together.
    if !completing {
        return Ok(Some(made()));
    }
    let object = undo_object(job, key, None, Some(1)).await?;
    Ok(object.or_else(|| Some(made())))
}

async fn abort(job: &Job<'_>, key: &str, id: &str) -> Result<(), Failure> {
    let (s3, bucket) = (&job.clients.s3, &job.target.bucket);
    loop {
        let call = s3.abort_multipart_upload().bucket(bucket).key(key).upload_id(id);
        match call.send().await.map_err(job.clients.failed("s3:AbortMultipartUpload")) {
            Ok(_) => {}
            Err(failure) if failure.is_not_found() => return Ok(()),
            Err(failure) if failure.is_passing() && failure.kind == Kind::Refused => {}
            Err(failure) => return Err(failure),
        }
        // A part that was still on its way when the upload was aborted may be stored after it.
        let call = s3.list_parts().bucket(bucket).key(key).upload_id(id).max_parts(1);
        if call.send().await.is_err() {
            return Ok(());
        }
        sleep(PAUSE).await;
    }
}

/// Looks for something until it is there, for some seconds: AWS may still be making it.
async fn search<F>(mut find: impl FnMut() -> F) -> Result<Option<String>, Failure>
where
    F: Future<Output = Result<Option<String>, Failure>>,
{
    for _ in 0..LOOKS {
        if let Some(id) = find().await? {
            return Ok(Some(id));
        }
        sleep(PAUSE).await;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_changes_with_what_is_known_and_goes_when_nothing_was_made() {
        let mut undo = Undo::default();
        let upload = undo.will_make(Made::upload("web.raw", None));
        let task = undo.will_make(Made::Task { id: None });
        let object = Made::object("web.raw", None);
        undo.made(upload, object.clone());
        undo.forget(task);
        undo.will_make(Made::Snapshot { id: Some("snap-1".to_owned()) });
        let snapshot = Some(Made::Snapshot { id: Some("snap-1".to_owned()) });
        assert_eq!(undo.made, [Some(object), None, snapshot]);
    }
}
