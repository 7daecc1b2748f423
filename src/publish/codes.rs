//! The codes that AWS's services answer with, by what they mean to a publish.
//!
//! Sources: "Error codes for the Amazon EC2 API", "Error responses" of Amazon S3, "Common errors" of the EBS direct APIs.

/// Codes that ask for patience: nothing was done.
pub(super) const THROTTLED: &[&str] = &[
    "BandwidthLimitExceeded",
    "ConcurrentLimitExceededException",
    "EC2ThrottledException",
    "PriorRequestNotComplete",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
];
/// Codes of faults on AWS's side, or on the way there.
pub(super) const FAULTS: &[&str] = &[
    "InternalError",
    "InternalFailure",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServerInternal",
    "ServiceUnavailable",
    "Unavailable",
];
pub(super) const DENIED: &[&str] =
    &["AccessDenied", "AccessDeniedException", "AllAccessDisabled", "UnauthorizedOperation", "Forbidden"];
pub(super) const EXPIRED: &[&str] =
    &["ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"];
pub(super) const UNKNOWN_CREDENTIALS: &[&str] = &[
    "AuthFailure",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidToken",
    "OptInRequired",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
];
pub(super) const ELSEWHERE: &[&str] =
    &["AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"];
