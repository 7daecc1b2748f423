//! The permissions that a publish needs, as an IAM policy. Pure.
//!
//! Sources: "Actions, resources, and condition keys" of Amazon EC2, Amazon S3, Amazon Elastic Block Store and AWS
//! Systems Manager in the Service Authorization Reference; "Required permissions" in the VM Import/Export User Guide.

use serde_json::{Value, json};

use super::{Request, Via, rules};
use crate::error::Error;
use crate::recipe::{Grantee, Protection};

/// The policy for whoever publishes; not that of the role that AWS imports with. It has what a publish needs and uses, not
/// what `--check` looks at besides: without `servicequotas:GetServiceQuota` that only says less.
pub(super) fn policy(request: &Request) -> Result<Value, Error> {
    rules::check(request)?;
    rules::one_partition(request.regions.first().map_or("", String::as_str), &request.regions)?;
    let mut statements = vec![statement("Images", &images(request), json!("*"))];
    if request.via != Via::Ebs {
        statements.extend(bucket(request));
    }
    if request.via != Via::S3 {
        let calls = ["ebs:StartSnapshot", "ebs:PutSnapshotBlock", "ebs:CompleteSnapshot"];
        statements.push(statement(
            "Blocks",
            &calls,
            resources(request, |partition, region| format!("arn:{partition}:ec2:{region}::snapshot/*")),
        ));
    }
    if let Some(name) = &request.release.parameter {
        let name = name.trim_start_matches('/');
        statements.push(statement(
            "Parameters",
            &["ssm:GetParameter", "ssm:PutParameter"],
            resources(request, |partition, region| format!("arn:{partition}:ssm:{region}:*:parameter/{name}")),
        ));
    }
    statements.extend(keys(request));
    Ok(json!({ "Version": "2012-10-17", "Statement": statements }))
}

fn statement(sid: &str, actions: &[&str], resource: Value) -> Value {
    let mut actions = actions.to_vec();
    actions.sort_unstable();
    json!({ "Sid": sid, "Effect": "Allow", "Action": actions, "Resource": resource })
}

fn images(request: &Request) -> Vec<&'static str> {
    let mut calls = vec![
        "ec2:CreateTags",
        "ec2:DeleteSnapshot",
        "ec2:DeregisterImage",
        "ec2:DescribeImages",
        "ec2:DescribeSnapshots",
        "ec2:RegisterImage",
    ];
    if request.via != Via::Ebs {
        calls.extend(["ec2:CancelImportTask", "ec2:DescribeImportSnapshotTasks", "ec2:ImportSnapshot"]);
    }
    if request.via != Via::S3 {
        calls.push("ec2:GetEbsEncryptionByDefault");
    }
    if request.regions.len() > 1 && request.via != Via::Ebs {
        calls.push("ec2:CopyImage");
    }
    let release = &request.release;
    if release.deprecate_after.is_some() {
        calls.push("ec2:EnableImageDeprecation");
    }
    if release.protection != Protection::Off {
        calls.push("ec2:EnableImageDeregistrationProtection");
    }
    if !release.share.is_empty() {
        calls.push("ec2:ModifyImageAttribute");
    }
    if release.share_snapshots {
        calls.push("ec2:ModifySnapshotAttribute");
    }
    if release.share.contains(&Grantee::Everyone) {
        calls.extend(["ec2:GetImageBlockPublicAccessState", "ec2:GetSnapshotBlockPublicAccessState"]);
    }
    calls
}

fn bucket(request: &Request) -> [Value; 2] {
    let partition = request.regions.first().map_or("aws", |region| rules::partition(region));
    let bucket = format!("arn:{partition}:s3:::{}", rules::bucket(request).unwrap_or("*"));
    let keys = format!("{bucket}/{}*", rules::key_stem_of_all(request));
    let of_bucket = ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"];
    let of_objects = [
        "s3:AbortMultipartUpload",
        "s3:DeleteObject",
        // Where the bucket keeps versions.
        "s3:DeleteObjectVersion",
        "s3:GetObject",
        "s3:ListMultipartUploadParts",
        "s3:PutObject",
    ];
    [statement("Bucket", &of_bucket, json!(bucket)), statement("Objects", &of_objects, json!(keys))]
}

/// What whoever publishes needs of the keys that snapshots are encrypted with. Aliases and ids are no resources of a policy.
fn keys(request: &Request) -> Option<Value> {
    let keys: Vec<&str> = request.encryption.as_ref()?.keys().collect();
    let calls = ["kms:CreateGrant", "kms:Decrypt", "kms:DescribeKey", "kms:GenerateDataKey*", "kms:ReEncrypt*"];
    let named = !keys.is_empty() && keys.iter().all(|key| key.starts_with("arn:"));
    Some(statement("Keys", &calls, if named { json!(keys) } else { json!("*") }))
}

/// One for each region; one for all where the regions aren't known here.
fn resources(request: &Request, name: impl Fn(&str, &str) -> String) -> Value {
    match request.regions.as_slice() {
        [] => json!(name("aws", "*")),
        [region] => json!(name(rules::partition(region), region)),
        regions => regions.iter().map(|region| json!(name(rules::partition(region), region))).collect(),
    }
}
