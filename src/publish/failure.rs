//! What AWS or the network said, in words that name cause and remedy.

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::codes::{DENIED, ELSEWHERE, EXPIRED, FAULTS, THROTTLED, UNKNOWN_CREDENTIALS};
use super::{Target, rules};
use crate::error::{Error, Exit};

/// How much of AWS's own words is shown.
const LONGEST: usize = 600;

/// How a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// AWS said no.
    Refused,
    /// No connection, or it broke before an answer came.
    Unreachable,
    /// No answer in time.
    TimedOut,
    /// There was nothing to sign the request with.
    NoCredentials,
    /// An answer that makes no sense, or a request that could not be built.
    Garbled,
}

/// A request that failed.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    /// Service and operation, e.g. `ec2:RegisterImage`.
    pub(super) call: &'static str,
    pub(super) kind: Kind,
    /// AWS's code, e.g. `InvalidAMIName.Duplicate`; empty if there is none.
    pub(super) code: String,
    /// AWS's words, or the cause of a failed connection.
    pub(super) message: String,
    /// The answer's HTTP status; 0 without one.
    pub(super) status: u16,
    /// The region that the bucket is in, where S3 says so.
    pub(super) bucket_region: Option<String>,
    url: String,
    sent: bool,
}

impl Failure {
    /// From the SDK's error of a request to `url`.
    pub(super) fn new<E>(call: &'static str, url: &str, error: &SdkError<E>) -> Self
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let response = error.raw_response();
        let service = error.as_service_error();
        let kind = match error {
            // A page to sign in at, e.g., says that all is well.
            SdkError::ServiceError(error) if error.raw().status().is_success() && error.err().code().is_none() => {
                Kind::Garbled
            }
            SdkError::ServiceError(_) => Kind::Refused,
            SdkError::TimeoutError(_) => Kind::TimedOut,
            SdkError::DispatchFailure(failure) if failure.is_timeout() => Kind::TimedOut,
            _ if lacks_credentials(error) => Kind::NoCredentials,
            // Without an URL the request never got as far as the network.
            SdkError::DispatchFailure(failure) if !failure.is_user() && !url.is_empty() => Kind::Unreachable,
            _ => Kind::Garbled,
        };
        let message = match service.and_then(ProvideErrorMetadata::message) {
            Some(message) => message.to_owned(),
            None if kind == Kind::Refused => String::new(),
            None => root_cause(error),
        };
        Self {
            call,
            kind,
            code: service.and_then(ProvideErrorMetadata::code).unwrap_or_default().to_owned(),
            message,
            status: response.map_or(0, |response| response.status().as_u16()),
            bucket_region: response
                .and_then(|response| response.headers().get("x-amz-bucket-region"))
                .map(str::to_owned),
            url: url.to_owned(),
            sent: !(kind == Kind::NoCredentials || never_connected(error)),
        }
    }

    /// A failure that is kiln's own finding about an answer.
    pub(super) fn found(call: &'static str, message: String) -> Self {
        Self {
            call,
            kind: Kind::Garbled,
            code: String::new(),
            message,
            status: 0,
            bucket_region: None,
            url: String::new(),
            sent: true,
        }
    }

    /// An answer that is of no use, and would be none another time.
    pub(super) fn useless(call: &'static str, message: &str) -> Self {
        Self { kind: Kind::Refused, ..Self::found(call, message.to_owned()) }
    }

    /// An answer that doesn't have the thing that was asked about.
    pub(super) fn absent(call: &'static str) -> Self {
        Self { kind: Kind::Refused, code: "NotFound".to_owned(), ..Self::found(call, "AWS doesn't know it".to_owned()) }
    }

    /// Whether the same request may succeed later.
    pub(super) fn is_passing(&self) -> bool {
        match self.kind {
            Kind::Refused => {
                matches!(self.status, 429 | 500 | 502..=504) || self.is_one_of(THROTTLED) || self.is_one_of(FAULTS)
            }
            Kind::Unreachable | Kind::TimedOut | Kind::Garbled => true,
            Kind::NoCredentials => false,
        }
    }

    /// Whether AWS asks for patience.
    pub(super) fn is_throttling(&self) -> bool {
        self.kind == Kind::Refused && (self.status == 429 || self.is_one_of(THROTTLED))
    }

    /// Whether AWS may have done what was asked although no good answer came.
    pub(super) fn may_be_done(&self) -> bool {
        match self.kind {
            Kind::Refused => self.status >= 500 && !self.is_one_of(THROTTLED),
            _ => self.sent,
        }
    }

    /// Whether AWS knows nothing of that thing (any more, or yet).
    pub(super) fn is_not_found(&self) -> bool {
        self.kind == Kind::Refused
            && (self.status == 404
                || self.code.ends_with("NotFound")
                || self.code.ends_with(".Unavailable")
                || self.code.starts_with("InvalidConversionTaskId")
                || self.code.starts_with("NoSuch"))
    }

    /// Whether a permission is missing.
    pub(super) fn is_denied(&self) -> bool {
        self.kind == Kind::Refused && (self.is_one_of(DENIED) || self.status == 403)
    }

    /// Whether AWS can't take the role that reads the bucket. Only the words tell.
    pub(super) fn lacks_role(&self) -> bool {
        self.call == "ec2:ImportSnapshot" && !self.is_denied() && self.message.contains("service role")
    }

    fn is_one_of(&self, codes: &[&str]) -> bool {
        codes.contains(&self.code.as_str())
    }

    /// `AccessDenied: words`, or whichever of the two there is.
    fn words(&self) -> String {
        let message = tidy(&self.message);
        match (self.code.as_str(), message.as_str()) {
            ("", "") if self.status > 0 => format!("HTTP status {}", self.status),
            ("", "") => "no reason given".to_owned(),
            ("", message) => message.to_owned(),
            (code, "") => code.to_owned(),
            (code, message) => format!("{code}: {message}"),
        }
    }

    /// Why, in a few words.
    pub(super) fn reason(&self) -> String {
        match self.kind {
            Kind::Unreachable if self.sent => format!("the connection broke: {}", self.message),
            Kind::Unreachable => format!("AWS can't be reached: {}", self.message),
            Kind::TimedOut => "AWS doesn't answer".to_owned(),
            Kind::NoCredentials => "no usable AWS credentials".to_owned(),
            Kind::Refused | Kind::Garbled => self.words(),
        }
    }

    /// What the user reads of a publish that failed.
    pub(super) fn into_error(self, target: &Target) -> Error {
        self.explain(target, "publish again; the disk is unchanged")
    }

    /// What the user reads of other work in a region.
    pub(super) fn in_region(self, region: &str) -> Error {
        self.in_bucket(region, "")
    }

    /// What the user reads of other work in a bucket.
    pub(super) fn in_bucket(self, region: &str, bucket: &str) -> Error {
        let target = Target { region: region.to_owned(), bucket: bucket.to_owned(), ..Target::default() };
        self.explain(&target, "try again")
    }

    fn explain(self, target: &Target, again: &str) -> Error {
        let short = self.call.split_once(':').map_or(self.call, |(_, name)| name);
        match self.kind {
            Kind::NoCredentials => self.no_credentials(),
            Kind::Unreachable if self.sent => {
                publish(format!("the connection to {} broke during {short}: {}", self.place(), self.message))
                    .help(format!("check the network, then {again}"))
            }
            Kind::Unreachable => publish(format!("cannot reach {}: {}", self.place(), self.message)).help(format!(
                "check the network and that the region `{}` exists; AWS_ENDPOINT_URL and the AWS profile can name another endpoint",
                target.region
            )),
            Kind::TimedOut => publish(format!("{} did not answer {short} in time", self.place()))
                .help(format!("check the network, then {again}")),
            Kind::Garbled => publish(format!("{short} failed: {}", self.words())).help(format!(
                "check the region `{}`, and AWS_ENDPOINT_URL and the AWS profile if they name an endpoint",
                target.region
            )),
            Kind::Refused => self.refused(short, target, again),
        }
    }

    fn place(&self) -> &str {
        if self.url.is_empty() { "AWS" } else { &self.url }
    }

    fn no_credentials(&self) -> Error {
        let profile = std::env::var("AWS_PROFILE").unwrap_or_else(|_| "default".to_owned());
        if self.message.contains("login_session") || self.message.contains("credentials-login") {
            return publish(format!("kiln can't use the `aws login` session of the profile `{profile}`"))
                .help("export its credentials: eval \"$(aws configure export-credentials --format env)\"");
        }
        let error = publish("no usable AWS credentials").help(format!(
            "the SDK looked in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the profile `{profile}` (AWS_PROFILE) of \
             ~/.aws/config and ~/.aws/credentials, and for a container's or an instance's role; sign in (`aws configure`, \
             `aws sso login`) or set one of them"
        ));
        if self.message.contains("no credentials found in chain") {
            error
        } else {
            error.with_note(tidy(&self.message))
        }
    }

    fn refused(self, short: &str, target: &Target, again: &str) -> Error {
        let said = format!("AWS said: {}", self.words());
        if self.is_one_of(EXPIRED) {
            return publish("the AWS credentials have expired")
                .with_note(said)
                .help(format!("sign in again (`aws sso login`, or new keys), then {again}"));
        }
        if self.is_one_of(UNKNOWN_CREDENTIALS) {
            let region = &target.region;
            return publish(format!("AWS doesn't accept these credentials in {region}")).with_note(said).help(format!(
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_PROFILE; if \
                 `aws sts get-caller-identity` says that they work, {region} may not be enabled for the account \
                 (`aws account enable-region --region-name {region}`)"
            ));
        }
        if self.code == "RequestTimeTooSkewed" {
            return publish("this machine's clock differs too much from AWS's").with_note(said).help("set the clock");
        }
        if self.code == "NoSuchBucket" || (self.call == "s3:HeadBucket" && self.status == 404) {
            return no_bucket(target);
        }
        if self.is_one_of(ELSEWHERE) || (self.call.starts_with("s3:") && self.status == 301) {
            return bucket_elsewhere(target, self.bucket_region.as_deref());
        }
        if self.message.contains("not local to the region") {
            return bucket_elsewhere(target, None);
        }
        if self.code == "InvalidAMIName.Duplicate" {
            return duplicate_name(target, None);
        }
        if self.is_denied() {
            return denied(&self, short, target);
        }
        if self.lacks_role() {
            return no_role(target).with_note(said);
        }
        if self.is_passing() {
            return publish(format!("{} could not do {short}, however often it was asked", self.place()))
                .with_note(said)
                .help(format!("wait a few minutes, then {again}"));
        }
        let error = publish(format!("AWS refused {short}: {}", self.words()));
        if self.code.contains("LimitExceeded") {
            return error.help("raise that quota in the Service Quotas console, or remove what is no longer needed");
        }
        error.help(format!("change what AWS doesn't take, then {again}"))
    }
}

fn denied(failure: &Failure, short: &str, target: &Target) -> Error {
    // What S3 does with a key it does in the caller's name.
    if failure.call.starts_with("s3:") && failure.message.contains("kms:") {
        return publish(format!("not permitted to use the key of the bucket `{}`", target.bucket))
            .with_note(format!("AWS said: {}", failure.words()))
            .help(
                "allow `kms:GenerateDataKey` and `kms:Decrypt` on the key to the user or role that publishes; parts are put \
                 together with both",
            );
    }
    let permission = permission(failure.call);
    let bucket = format!("arn:{}:s3:::{}", rules::partition(&target.region), target.bucket);
    let resource = match permission {
        "s3:ListBucket" | "s3:ListBucketMultipartUploads" | "s3:GetBucketLocation" => bucket,
        _ if permission.starts_with("s3:") => format!("{bucket}/*"),
        _ => "*".to_owned(),
    };
    let error = publish(format!("not permitted to call {short}"));
    let error =
        if failure.message.is_empty() { error } else { error.with_note(format!("AWS said: {}", failure.words())) };
    let tagging =
        matches!(failure.call, "ec2:CopyImage" | "ec2:ImportSnapshot" | "ec2:RegisterImage" | "ebs:StartSnapshot");
    let also = if tagging { " (and `ec2:CreateTags`)" } else { "" };
    let foreign = if failure.call == "s3:HeadBucket" { "; the bucket may also be another account's" } else { "" };
    error.help(format!("allow `{permission}`{also} on {resource} to the user or role that publishes{foreign}"))
}

/// The IAM permission that a call needs.
fn permission(call: &'static str) -> &'static str {
    match call {
        "s3:CreateMultipartUpload" | "s3:UploadPart" | "s3:CompleteMultipartUpload" => "s3:PutObject",
        "s3:HeadBucket" | "s3:ListObjectsV2" => "s3:ListBucket",
        "s3:HeadObject" => "s3:GetObject",
        "s3:ListParts" => "s3:ListMultipartUploadParts",
        "s3:ListMultipartUploads" => "s3:ListBucketMultipartUploads",
        call => call,
    }
}

/// The bucket isn't there.
pub(super) fn no_bucket(target: &Target) -> Error {
    let Target { bucket, region, .. } = target;
    publish(format!("there is no bucket `{bucket}`"))
        .help(format!("make it with `aws s3 mb s3://{bucket} --region {region}`, or name another with --bucket"))
}

/// The bucket is in another region, where `ImportSnapshot` can't read it.
pub(super) fn bucket_elsewhere(target: &Target, actual: Option<&str>) -> Error {
    let Target { bucket, region, .. } = target;
    let place = actual.map_or_else(|| "another region".to_owned(), |actual| format!("region {actual}"));
    publish(format!("the bucket `{bucket}` is in {place}, and the image is to be in {region}")).help(match actual {
        Some(actual) => format!("name a bucket in {region} with --bucket, or publish to {actual} with --region"),
        None => format!("name a bucket in {region} with --bucket"),
    })
}

/// The image's name is taken.
pub(super) fn duplicate_name(target: &Target, by: Option<&str>) -> Error {
    let Target { image_name, region, .. } = target;
    let by = by.map(|id| format!(" by {id}")).unwrap_or_default();
    publish(format!("the image name `{image_name}` is already taken in {region}{by}")).help(
        "choose another with image_name in the recipe's [publish], e.g. with `{date}` or `{digest:8}`, or deregister that image",
    )
}

/// AWS can't take the role that reads the bucket.
pub(super) fn no_role(target: &Target) -> Error {
    let Target { role, bucket, region, .. } = target;
    let partition = rules::partition(region);
    publish(format!("AWS can't read the disk by the role `{role}`: it is missing, or lacks a permission")).help(format!(
        "make it once per account:\n  \
         aws iam create-role --role-name {role} --assume-role-policy-document '{{\"Version\":\"2012-10-17\",\"Statement\":\
         [{{\"Effect\":\"Allow\",\"Principal\":{{\"Service\":\"vmie.amazonaws.com\"}},\"Action\":\"sts:AssumeRole\",\
         \"Condition\":{{\"StringEquals\":{{\"sts:Externalid\":\"vmimport\"}}}}}}]}}'\n  \
         aws iam put-role-policy --role-name {role} --policy-name {role} --policy-document '{{\"Version\":\"2012-10-17\",\
         \"Statement\":[{{\"Effect\":\"Allow\",\"Action\":[\"s3:GetBucketLocation\",\"s3:GetObject\",\"s3:ListBucket\"],\
         \"Resource\":[\"arn:{partition}:s3:::{bucket}\",\"arn:{partition}:s3:::{bucket}/*\"]}},{{\"Effect\":\"Allow\",\"Action\":\
         [\"ec2:ModifySnapshotAttribute\",\"ec2:CopySnapshot\",\"ec2:RegisterImage\",\"ec2:Describe*\"],\"Resource\":\"*\"}}]}}'\n\
         see https://docs.aws.amazon.com/vm-import/latest/userguide/required-permissions.html"
    ))
}

fn publish(message: impl Into<String>) -> Error {
    Error::new(Exit::Publish, message)
}

/// AWS's words on one line, without the encoded blob of a refusal, and without a full stop.
pub(super) fn tidy(words: &str) -> String {
    let words = words.split("Encoded authorization failure message:").next().unwrap_or_default();
    let line = words.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut line = line.trim_end_matches(['.', ' ']).to_owned();
    if let Some((end, _)) = line.char_indices().nth(LONGEST) {
        line.truncate(end);
        line.push('…');
    }
    line
}

fn lacks_credentials<E: std::error::Error + 'static>(error: &SdkError<E>) -> bool {
    matches!(error, SdkError::DispatchFailure(_) | SdkError::ConstructionFailure(_))
        && causes(error).any(|cause| {
            let text = cause.to_string();
            text.contains("credential") || text.contains("identity resolver")
        })
}

fn never_connected<E>(error: &SdkError<E>) -> bool {
    match error {
        SdkError::ConstructionFailure(_) => true,
        SdkError::DispatchFailure(failure) => causes_of(failure.as_connector_error()).any(|cause| {
            // The HTTP client says so, but its types are not public.
            matches!(cause.to_string().as_str(), "client error (Connect)" | "dns error" | "tcp connect error")
        }),
        _ => false,
    }
}

fn causes<E: std::error::Error + 'static>(
    error: &SdkError<E>,
) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(error), |cause| cause.source())
}

fn causes_of<'a, E: std::error::Error + 'static>(
    error: Option<&'a E>,
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(error.map(|error| error as &(dyn std::error::Error + 'static)), |cause| cause.source())
}

fn root_cause<E: std::error::Error + 'static>(error: &SdkError<E>) -> String {
    causes(error).last().map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(call: &'static str, status: u16, code: &str, message: &str) -> Failure {
        Failure {
            kind: Kind::Refused,
            code: code.to_owned(),
            status,
            url: "https://ec2.eu-west-1.amazonaws.com".to_owned(),
            ..Failure::found(call, message.to_owned())
        }
    }

    fn target() -> Target {
        Target {
            region: "eu-west-1".to_owned(),
            bucket: "images".to_owned(),
            key: "kiln/web.raw".to_owned(),
            role: "vmimport".to_owned(),
            image_name: "web-1".to_owned(),
            run: "0123456789abcdef".to_owned(),
        }
    }

    fn shown(failure: Failure) -> (String, String) {
        let error = failure.into_error(&target());
        assert_eq!(error.exit, Exit::Publish);
        (error.message, error.help.unwrap_or_default())
    }

    #[test]
    fn only_what_can_succeed_later_is_asked_again() {
        for (status, code) in
            [(503, "RequestLimitExceeded"), (400, "RequestLimitExceeded"), (503, "SlowDown"), (500, ""), (429, "")]
        {
            assert!(refusal("ec2:X", status, code, "").is_passing(), "{status} {code}");
        }
        for (status, code) in
            [(403, "AccessDenied"), (400, "ExpiredToken"), (400, "InvalidParameterValue"), (404, "NoSuchBucket")]
        {
            assert!(!refusal("ec2:X", status, code, "").is_passing(), "{status} {code}");
        }
    }

    #[test]
    fn what_was_refused_is_not_done_and_what_broke_may_be() {
        assert!(!refusal("ec2:X", 400, "InvalidParameter", "").may_be_done());
        assert!(!refusal("ec2:X", 503, "RequestLimitExceeded", "").may_be_done());
        assert!(refusal("ec2:X", 500, "InternalError", "").may_be_done());
        let broken = Failure { kind: Kind::Unreachable, ..refusal("ec2:X", 0, "", "connection reset") };
        assert!(broken.may_be_done());
        assert!(!Failure { sent: false, ..broken }.may_be_done());
    }

    #[test]
    fn a_denied_call_names_the_permission_and_what_it_is_needed_on() {
        let (message, help) = shown(refusal("s3:UploadPart", 403, "AccessDenied", "Access Denied"));
        assert_eq!(message, "not permitted to call UploadPart");
        assert_eq!(help, "allow `s3:PutObject` on arn:aws:s3:::images/* to the user or role that publishes");
        let (_, help) = shown(refusal("ec2:RegisterImage", 403, "UnauthorizedOperation", "no"));
        assert!(help.starts_with("allow `ec2:RegisterImage` (and `ec2:CreateTags`) on * to"));
        let (_, help) = shown(refusal("s3:HeadBucket", 403, "", ""));
        assert!(
            help.starts_with("allow `s3:ListBucket` on arn:aws:s3:::images to") && help.contains("another account")
        );
    }

    /// Denials quote the names of users, buckets and roles, whatever they are.
    #[test]
    fn a_denied_call_is_no_missing_role_though_it_names_one() {
        for (call, code, words) in [
            (
                "ec2:ImportSnapshot",
                "UnauthorizedOperation",
                "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/vmimport-ci is not \
                 authorized to perform: ec2:ImportSnapshot on resource: arn:aws:ec2:eu-west-1::snapshot/* because no \
                 identity-based policy allows the ec2:ImportSnapshot action",
            ),
            (
                "s3:CreateMultipartUpload",
                "AccessDenied",
                "User: arn:aws:sts::123456789012:assumed-role/service role/ci is not authorized to perform: s3:PutObject on \
                 resource: \"arn:aws:s3:::acme-vmimport/kiln/web.raw\" with an explicit deny in a resource-based policy",
            ),
        ] {
            let (message, help) = shown(refusal(call, 403, code, words));
            assert_eq!(message, format!("not permitted to call {}", call.split_once(':').unwrap().1));
            assert!(help.starts_with("allow `"), "{help}");
        }
        let (message, _) = shown(refusal("ec2:RegisterImage", 400, "InvalidParameter", "the service role of vmimport"));
        assert!(message.starts_with("AWS refused RegisterImage"), "{message}");
    }

    #[test]
    fn a_key_that_may_not_be_used_is_told_from_a_bucket() {
        let words = "User: arn:aws:iam::123456789012:user/ci is not authorized to perform: kms:GenerateDataKey on resource: \
                     arn:aws:kms:eu-west-1:123456789012:key/k because no identity-based policy allows it";
        let (message, help) = shown(refusal("s3:CreateMultipartUpload", 403, "AccessDenied", words));
        assert_eq!(message, "not permitted to use the key of the bucket `images`");
        assert!(help.starts_with("allow `kms:GenerateDataKey` and `kms:Decrypt` on the key"), "{help}");
    }

    #[test]
    fn arns_are_of_the_regions_partition() {
        let china = Target { region: "cn-north-1".to_owned(), ..target() };
        let denied = refusal("s3:UploadPart", 403, "AccessDenied", "").into_error(&china);
        assert!(denied.help.unwrap().contains(" on arn:aws-cn:s3:::images/* "));
        assert!(no_role(&china).help.unwrap().contains("arn:aws-cn:s3:::images/*"));
    }

    #[test]
    fn known_refusals_have_their_own_words() {
        let message = |call, status, code, words| shown(refusal(call, status, code, words)).0;
        assert_eq!(message("s3:HeadBucket", 404, "NotFound", ""), "there is no bucket `images`");
        assert_eq!(message("s3:PutObject", 404, "NoSuchBucket", ""), "there is no bucket `images`");
        assert_eq!(message("ec2:X", 400, "RequestExpired", "x"), "the AWS credentials have expired");
        let refused = message("ec2:X", 401, "AuthFailure", "x");
        assert_eq!(refused, "AWS doesn't accept these credentials in eu-west-1");
        assert_eq!(
            message("ec2:RegisterImage", 400, "InvalidAMIName.Duplicate", "x"),
            "the image name `web-1` is already taken in eu-west-1"
        );
        assert_eq!(
            message("s3:X", 301, "PermanentRedirect", ""),
            "the bucket `images` is in another region, and the image is to be in eu-west-1"
        );
        assert_eq!(
            message("ec2:X", 400, "InvalidParameterValue", "Bad.\n"),
            "AWS refused X: InvalidParameterValue: Bad"
        );
        assert_eq!(
            message("ec2:X", 503, "RequestLimitExceeded", ""),
            "https://ec2.eu-west-1.amazonaws.com could not do X, however often it was asked"
        );
    }

    #[test]
    fn a_missing_role_comes_with_the_commands_that_make_it() {
        let words = "The service role vmimport provided does not exist or does not have sufficient permissions";
        let (message, help) = shown(refusal("ec2:ImportSnapshot", 400, "InvalidParameter", words));
        assert_eq!(message, "AWS can't read the disk by the role `vmimport`: it is missing, or lacks a permission");
        assert!(help.contains("aws iam create-role --role-name vmimport") && help.contains("arn:aws:s3:::images/*"));
        for policy in help.split('\'').skip(1).step_by(2) {
            serde_json::from_str::<serde_json::Value>(policy).unwrap();
        }
    }

    #[test]
    fn awss_words_fit_into_a_line() {
        assert_eq!(
            tidy("You are not authorized. Encoded authorization failure message: abc"),
            "You are not authorized"
        );
        assert_eq!(tidy(" a\n  b. "), "a b");
        assert_eq!(tidy(&"x".repeat(700)).chars().count(), LONGEST + 1);
    }
}
