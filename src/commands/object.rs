//! What `kiln publish` is told of the object that a disk goes through, and `--upload-only`.

use kiln::build::manifest::{Manifest, UploadFacts};
use kiln::cli::{self, Publish};
use kiln::error::{Error, Exit};
use kiln::event::Events;
use kiln::publish::{ObjectEncryption, ObjectOptions, Request, upload_only};
use kiln::recipe::DiskFormat;
use serde_json::json;

use super::{Context, planned};

/// The command line's choice, else the recipe's.
pub(super) fn options(manifest: &Manifest, arguments: &Publish) -> Result<ObjectOptions, Error> {
    let (facts, asked) = (&manifest.publish.upload, &arguments.object);
    Ok(ObjectOptions {
        format: match (asked.disk_format, facts.disk_format.as_deref()) {
            (Some(cli::DiskFormat::Vmdk), _) | (None, Some("vmdk")) => DiskFormat::Vmdk,
            _ => DiskFormat::Raw,
        },
        encryption: encryption(facts, asked)?,
        keep: asked.keep_object || facts.keep_object,
    })
}

fn encryption(facts: &UploadFacts, asked: &cli::Object) -> Result<Option<ObjectEncryption>, Error> {
    // A key of the recipe's is no use to another way that the command line asks for.
    let of_recipe = asked.sse.is_none();
    let kms = asked.sse == Some(cli::Sse::Kms) || of_recipe && facts.sse.as_deref() == Some("aws:kms");
    if kms {
        let key = asked.sse_kms_key.clone().or_else(|| facts.sse_kms_key.clone());
        return Ok(Some(ObjectEncryption::Kms { key }));
    }
    if asked.sse_kms_key.is_some() {
        return Err(Error::new(Exit::Usage, "--sse-kms-key is of use only with KMS").help("add --sse aws:kms"));
    }
    let own = asked.sse == Some(cli::Sse::Aes256) || of_recipe && facts.sse.as_deref() == Some("AES256");
    Ok(own.then_some(ObjectEncryption::S3))
}

/// Refuses what only a bucket can do.
pub(super) fn none_asked(asked: &cli::Object) -> Result<(), Error> {
    let cli::Object { disk_format, sse, sse_kms_key, keep_object, upload_only } = asked;
    let options = [
        (disk_format.is_some(), "--disk-format"),
        (sse.is_some(), "--sse"),
        (sse_kms_key.is_some(), "--sse-kms-key"),
        (*keep_object, "--keep-object"),
        (*upload_only, "--upload-only"),
    ];
    match options.into_iter().find(|(given, _)| *given) {
        Some((_, option)) => {
            Err(Error::new(Exit::Usage, format!("EBS direct uploads no object, so that {option} does nothing"))
                .help(format!("leave out {option}, or use --via s3")))
        }
        None => Ok(()),
    }
}

/// Uploads, and prints `s3://BUCKET/KEY`.
pub(super) fn upload(context: &Context<'_>, request: &Request, events: &Events) -> Result<(), Error> {
    let uploaded = upload_only(request, events, context.cancel)?;
    let human = match &uploaded.plan {
        Some(plan) => planned::tables(&[(&uploaded.region, plan)]),
        None => format!("s3://{}/{}", uploaded.bucket, uploaded.key),
    };
    context.ui.result(&human, &json!(uploaded));
    Ok(())
}
