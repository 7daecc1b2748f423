//! The object becomes a snapshot: the import task, followed to its end.

use std::time::Duration;

use aws_sdk_ec2::operation::import_snapshot::builders::ImportSnapshotFluentBuilder;
use aws_sdk_ec2::types::{
    ImportSnapshotTask, ResourceType, SnapshotDiskContainer, SnapshotTaskDetail, Tag, TagSpecification, UserBucket,
};
use tokio::time::Instant;

use super::action::Action::{CreateTags, DescribeImportSnapshotTasks, ImportSnapshot};
use super::client::Clients;
use super::failure::{Failure, no_role, tidy};
use super::found::{self, Found};
use super::plan::{Requests, Way};
use super::retry::{ec2_once, until_known};
use super::undo::{Made, Undo};
use super::{Job, ObjectEncryption, ebs, rules};
use crate::error::{Error, Exit};
use crate::event::Event;
use crate::recipe::DiskFormat;

/// The tag that tells this run's task from all others.
pub(super) const RUN_TAG: &str = "kiln:run";
/// AWS's words on imports that fail.
const TROUBLE: &str = "https://docs.aws.amazon.com/vm-import/latest/userguide/troubleshooting.html";
/// What the role needs on the key of an encrypted object (AWS: "VM Import/Export required role").
const KEY_ACTIONS: &str =
    "kms:CreateGrant, kms:Decrypt, kms:DescribeKey, kms:Encrypt, kms:GenerateDataKey* and kms:ReEncrypt*";
/// How many looks at the task in a row may fail for passing reasons, each after the SDK's own retries.
const BLIND: u32 = 10;

/// What a task has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    /// It is at work, or waits to be.
    Working {
        /// In percent.
        progress: u64,
        /// AWS's word for what it does.
        message: String,
    },
    /// The snapshot is there.
    Done {
        /// Its id.
        snapshot: String,
    },
    /// It failed or was cancelled.
    Failed {
        /// AWS's reason.
        message: String,
    },
}

pub(super) fn begins(job: &Job<'_>) -> String {
    format!(
        "s3://{}/{} into a snapshot in {}; AWS takes 7 to 18 minutes",
        job.target.bucket, job.target.key, job.target.region
    )
}

/// What [`import`] would do, and the tags of the snapshot.
pub(super) async fn plan(job: &Job<'_>, way: &mut Way) -> Result<(), Error> {
    let target = &job.target;
    let _ = job.stop.or("other imports of this disk", found::task(job)).await?;
    let requests = way.steps.step(format!(
        "import s3://{}/{} into a snapshot in {} by the role {}{}",
        target.bucket,
        target.key,
        target.region,
        target.role,
        rules::encryption_in_words(job.request, &target.region)
    ));
    requests.extend(&job.clients.asked()).exactly(ImportSnapshot, 1).at_least(DescribeImportSnapshotTasks, 1);
    requests.exactly(CreateTags, 1);
    // AWS doesn't say what it makes of the rest.
    way.cost.snapshot_bytes += ebs::data(job);
    Ok(())
}

/// What [`adopt`] would do.
pub(super) fn plan_adopt(requests: &mut Requests) {
    requests.at_least(DescribeImportSnapshotTasks, 1).exactly(CreateTags, 1);
}

/// Imports the object and waits for its snapshot, unless another host has begun to while it was uploaded.
pub(super) async fn import(job: &Job<'_>, undo: &mut Undo) -> Result<String, Error> {
    if let Ok(Some(Found::Task { id, .. })) = job.stop.or("other imports of this disk", found::task(job)).await? {
        job.events.note(format!("import task {id} imports this disk already"));
        return adopt(job, &id).await;
    }
    let made = Made::Task { id: None };
    let (entry, answer) = job.make("the start of the import", undo, made, |_| start(job)).await?;
    let task = answer.map_err(|failure| job.error(failure))?;
    undo.made(entry, Made::Task { id: Some(task.clone()) });
    job.events.detail(format!("import task {task}"));
    match follow(job, &task).await? {
        Ok(snapshot) => {
            undo.made(entry, Made::Snapshot { id: Some(snapshot.clone()) });
            Ok(snapshot)
        }
        Err(message) => {
            undo.forget(entry);
            Err(import_failed(job, &task, &message))
        }
    }
}

/// Waits for an import that another run has begun, and ended before it could use the snapshot.
pub(super) async fn adopt(job: &Job<'_>, task: &str) -> Result<String, Error> {
    let goes_on = |error: Error| error.with_note(format!("import task {task} was there before, and is left as it is"));
    match follow(job, task).await.map_err(goes_on)? {
        Ok(snapshot) => {
            tag_snapshot(job, &snapshot).await.map_err(goes_on)?;
            Ok(snapshot)
        }
        Err(message) => Err(import_failed(job, task, &message)),
    }
}

/// Tags the snapshot; the import could tag only its task.
pub(super) async fn tag_snapshot(job: &Job<'_>, snapshot: &str) -> Result<(), Error> {
    let tags = snapshot_tags(job);
    retry_not_found(job, "the snapshot's tags", || async {
        let call = job.clients.ec2.create_tags().resources(snapshot).set_tags(Some(tags.clone()));
        call.send().await.map(|_| ()).map_err(job.clients.failed("ec2:CreateTags"))
    })
    .await
}

/// What the image is tagged with.
pub(super) fn tags(job: &Job<'_>) -> Vec<Tag> {
    to_tags(rules::tag_pairs(job.request))
}

/// What the snapshot is tagged with, and the task that imports it.
pub(super) fn snapshot_tags(job: &Job<'_>) -> Vec<Tag> {
    to_tags(rules::snapshot_tag_pairs(job.request, &job.target.region))
}

fn to_tags(pairs: Vec<(String, String)>) -> Vec<Tag> {
    pairs.into_iter().map(|(key, value)| Tag::builder().key(key).value(value).build()).collect()
}

/// Repeats a call about something that was only just made, as long as AWS may not know it everywhere yet.
pub(super) async fn retry_not_found<T, F>(job: &Job<'_>, what: &str, call: impl FnMut() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Failure>>,
{
    until_known(&job.stop, job.request.poll, what, call).await?.map_err(|failure| job.error(failure))
}

/// How long something new may stay unknown.
pub(super) fn settling(poll: Duration) -> Duration {
    (poll * 20).clamp(Duration::from_secs(5), Duration::from_mins(1))
}

/// Whether the caller may import, and by that role. Nothing is imported; AWS answers as if it were, as far as it looks.
pub(super) async fn permitted(job: &Job<'_>) -> Result<(), Error> {
    let answer = job.stop.or("the permission to import", request(job).dry_run(true).send()).await?;
    match answer.map_err(job.clients.failed("ec2:ImportSnapshot")) {
        // Anything else may be otherwise when the object is there.
        Err(failure) if failure.is_denied() || failure.lacks_role() => Err(job.error(failure)),
        _ => Ok(()),
    }
}

async fn start(job: &Job<'_>) -> Result<String, Failure> {
    // The token is the same for every try, so that AWS starts one task however often it is asked.
    let call = request(job).client_token(format!("kiln-{}", job.target.run)).customize().config_override(ec2_once());
    let answer = call.send().await.map_err(job.clients.failed("ec2:ImportSnapshot"))?;
    answer.import_task_id.ok_or_else(|| Failure::found("ec2:ImportSnapshot", "the answer has no task id".to_owned()))
}

fn request(job: &Job<'_>) -> ImportSnapshotFluentBuilder {
    let target = &job.target;
    let words = format!("{} {}", job.request.image_name, job.request.digest);
    let place = UserBucket::builder().s3_bucket(&target.bucket).s3_key(&target.key).build();
    let format = match job.request.object.format {
        DiskFormat::Raw => "RAW",
        DiskFormat::Vmdk => "VMDK",
    };
    let mut tags = snapshot_tags(job);
    tags.push(Tag::builder().key(RUN_TAG).value(&target.run).build());
    let tags = TagSpecification::builder().resource_type(ResourceType::ImportSnapshotTask).set_tags(Some(tags)).build();
    job.clients
        .ec2
        .import_snapshot()
        .role_name(&target.role)
        .description(&words)
        .disk_container(SnapshotDiskContainer::builder().format(format).description(&words).user_bucket(place).build())
        .set_encrypted(job.request.encryption.is_some().then_some(true))
        .set_kms_key_id(rules::kms_key(job.request, &target.region).map(str::to_owned))
        .tag_specifications(tags)
}

/// Another import that reads the target's object at this moment. Where that can't be found out there is none.
pub(super) async fn another(job: &Job<'_>) -> Option<String> {
    let target = &job.target;
    let reads = |task: &&ImportSnapshotTask| {
        let place = task.snapshot_task_detail().and_then(SnapshotTaskDetail::user_bucket);
        let own = task.tags().iter().any(|tag| tag.key() == Some(RUN_TAG) && tag.value() == Some(&target.run));
        !own && matches!(judge_task(task), State::Working { .. })
            && place
                .is_some_and(|place| place.s3_bucket() == Some(&target.bucket) && place.s3_key() == Some(&target.key))
    };
    let tasks = all(&job.clients).await.ok()?;
    tasks.iter().find(reads)?.import_task_id().map(str::to_owned)
}

/// Follows the task to the snapshot's id, or to AWS's reason why there is none.
async fn follow(job: &Job<'_>, task: &str) -> Result<Result<String, String>, Error> {
    let what = format!("import task {task}");
    let unknown_until = Instant::now() + settling(job.request.poll);
    let (mut blind, mut shown) = (0, None);
    loop {
        match job.stop.or(&what, look(job, task)).await? {
            Ok(Some(State::Done { snapshot })) => return Ok(Ok(snapshot)),
            Ok(Some(State::Failed { message })) => return Ok(Err(message)),
            Ok(Some(state @ State::Working { .. })) => {
                blind = 0;
                show(job, &what, state, &mut shown);
            }
            Ok(None) if Instant::now() < unknown_until => {}
            Ok(None) => {
                return Err(Error::new(Exit::Publish, format!("AWS doesn't know the {what} that it started"))
                    .help("publish again; the disk is unchanged"));
            }
            Err(failure) if failure.is_passing() && blind < BLIND => {
                blind += 1;
                job.events.detail(format!("cannot see the {what}: {}", failure.reason()));
            }
            Err(failure) => return Err(job.error(failure)),
        }
        job.stop.pause(&what, job.request.poll).await?;
    }
}

fn show(job: &Job<'_>, what: &str, state: State, shown: &mut Option<State>) {
    if shown.as_ref() == Some(&state) {
        return;
    }
    if let State::Working { progress, message } = &state {
        job.events.emit(Event::Progress { phase: "import", done: *progress, total: 100 });
        let known = matches!(shown, Some(State::Working { message: before, .. }) if before == message);
        if !known && !message.is_empty() {
            job.events.detail(format!("{what}: {message}"));
        }
    }
    *shown = Some(state);
}

/// All import tasks of the account in the region.
pub(super) async fn all(clients: &Clients) -> Result<Vec<ImportSnapshotTask>, Failure> {
    let (mut all, mut next) = (Vec::new(), None);
    loop {
        let call = clients.ec2.describe_import_snapshot_tasks().set_next_token(next);
        let answer = call.send().await.map_err(clients.failed("ec2:DescribeImportSnapshotTasks"))?;
        next = answer.next_token().filter(|token| !token.is_empty()).map(str::to_owned);
        all.extend(answer.import_snapshot_tasks.unwrap_or_default());
        if next.is_none() {
            return Ok(all);
        }
    }
}

/// What the task has come to; `None` if AWS doesn't know it.
pub(super) async fn look(job: &Job<'_>, task: &str) -> Result<Option<State>, Failure> {
    let call = job.clients.ec2.describe_import_snapshot_tasks().import_task_ids(task);
    match call.send().await.map_err(job.clients.failed("ec2:DescribeImportSnapshotTasks")) {
        Ok(answer) => Ok(answer.import_snapshot_tasks().first().map(judge_task)),
        Err(failure) if failure.is_not_found() => Ok(None),
        Err(failure) => Err(failure),
    }
}

pub(super) fn judge_task(task: &ImportSnapshotTask) -> State {
    task.snapshot_task_detail().map_or_else(|| State::Working { progress: 0, message: String::new() }, judge)
}

fn judge(detail: &SnapshotTaskDetail) -> State {
    let message = tidy(detail.status_message().unwrap_or_default());
    let progress = detail.progress().and_then(|percent| percent.trim_end_matches('%').trim().parse().ok()).unwrap_or(0);
    match (
        detail.status().unwrap_or_default().to_ascii_lowercase().as_str(),
        detail.snapshot_id().filter(|id| !id.is_empty()),
    ) {
        ("completed", Some(snapshot)) => State::Done { snapshot: snapshot.to_owned() },
        (ended @ ("cancelling" | "cancelled" | "deleting" | "deleted" | "error" | "failed"), _) => State::Failed {
            message: if message.is_empty() {
                format!("the task is `{ended}`, and AWS gives no reason")
            } else {
                message
            },
        },
        _ => State::Working { progress: progress.min(100), message },
    }
}

fn import_failed(job: &Job<'_>, task: &str, message: &str) -> Error {
    if message.contains("service role") {
        return no_role(&job.target).with_note(format!("AWS said: {message}"));
    }
    let error = Error::new(Exit::Publish, format!("AWS could not import the disk: {message}"))
        .with_note(format!("import task {task}"));
    let lower = message.to_ascii_lowercase();
    if job.request.encryption.is_some() && lower.contains("key") {
        return key_failed(job, error);
    }
    if lower.contains("access") || lower.contains("permission") || lower.contains("kms") {
        let Job { target, request, .. } = job;
        let (of, what) = match &request.object.encryption {
            Some(ObjectEncryption::Kms { key: Some(key) }) => (format!("the KMS key {key}"), ""),
            Some(ObjectEncryption::Kms { key: None }) => ("the KMS key `alias/aws/s3`".to_owned(), ""),
            _ => ("its KMS key".to_owned(), " if it has one"),
        };
        return error.help(format!(
            "the role `{}` must be allowed s3:GetObject and s3:GetBucketLocation on the bucket `{}`, and {KEY_ACTIONS} on {of}{what}",
            target.role, target.bucket
        ));
    }
    if lower.contains("disk validation failed") || lower.contains("unsupported") {
        return error.help(format!("AWS doesn't take such a disk; {TROUBLE} says what it takes"));
    }
    error.help(format!("publish again; if it fails the same way, see {TROUBLE}"))
}

/// The key that the snapshot was to be encrypted with can't be used. AWS finds that out only when it imports.
fn key_failed(job: &Job<'_>, error: Error) -> Error {
    let Job { target, .. } = job;
    let key = rules::kms_key(job.request, &target.region)
        .map_or_else(|| "the account's default key for EBS".to_owned(), |key| format!("the KMS key `{key}`"));
    error.help(format!(
        "{key} must be a symmetric, enabled key in {}, and its policy must let the role `{}` use it: kms:CreateGrant, \
         kms:Decrypt, kms:DescribeKey, kms:Encrypt, kms:GenerateDataKey*, kms:ReEncrypt*; name another with --kms-key",
        target.region, target.role
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detail(status: &str) -> aws_sdk_ec2::types::builders::SnapshotTaskDetailBuilder {
        SnapshotTaskDetail::builder().status(status)
    }

    #[test]
    fn a_task_at_work_tells_progress_and_message() {
        let working = |progress, message: &str| State::Working { progress, message: message.to_owned() };
        assert_eq!(judge(&detail("pending").build()), working(0, ""));
        assert_eq!(
            judge(&detail("active").progress("42").status_message("converting").build()),
            working(42, "converting")
        );
        assert_eq!(judge(&detail("active").progress("19%").build()), working(19, ""));
        assert_eq!(judge(&detail("active").progress("?").build()), working(0, ""));
        assert_eq!(judge(&SnapshotTaskDetail::builder().build()), working(0, ""));
        assert_eq!(judge_task(&ImportSnapshotTask::builder().build()), working(0, ""));
    }

    #[test]
    fn a_task_is_done_only_with_a_snapshot() {
        let done = judge(&detail("completed").snapshot_id("snap-1").build());
        assert_eq!(done, State::Done { snapshot: "snap-1".to_owned() });
        assert!(matches!(judge(&detail("completed").build()), State::Working { .. }));
        assert!(matches!(judge(&detail("completed").snapshot_id("").build()), State::Working { .. }));
        assert!(matches!(judge(&detail("active").snapshot_id("snap-1").build()), State::Working { .. }));
    }

    #[test]
    fn every_state_on_the_way_to_deletion_is_a_failure_with_its_reason() {
        for status in ["cancelling", "cancelled", "deleting", "deleted"] {
            let failed = judge(&detail(status).status_message("ClientError: Disk validation failed.").build());
            assert_eq!(failed, State::Failed { message: "ClientError: Disk validation failed".to_owned() });
        }
        let silent = judge(&detail("deleted").build());
        assert_eq!(silent, State::Failed { message: "the task is `deleted`, and AWS gives no reason".to_owned() });
    }

    #[test]
    fn new_things_may_stay_unknown_for_seconds_not_minutes() {
        assert_eq!(settling(Duration::from_secs(15)), Duration::from_mins(1));
        assert_eq!(settling(Duration::from_millis(50)), Duration::from_secs(5));
    }
}
