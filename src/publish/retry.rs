//! Asking again. The SDK does that for requests that may be sent twice; those that make something are sent here, one
//! by one, because what an unanswered one has made must be known.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;

use tokio::time::Instant;

use super::Job;
use super::client::Clients;
use super::failure::Failure;
use super::import::settling;
use super::stop::Stop;
use super::undo::{Made, Undo};
use crate::error::Error;
use crate::event::Events;

/// Which try of a request this is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Try {
    /// From 1.
    pub(super) number: u32,
    /// An earlier one may have been carried out.
    pub(super) doubtful: bool,
}

impl Job<'_> {
    /// Sends a request that makes `made`, again while it fails for reasons that pass. The note of what may have been
    /// made is in `undo` from before the first try, and stays there unless it is certain that nothing was; with it,
    /// a final refusal comes back for the caller to judge.
    pub(super) async fn make<T, F>(
        &self,
        what: &str,
        undo: &mut Undo,
        made: Made,
        send: impl FnMut(Try) -> F,
    ) -> Result<(usize, Result<T, Failure>), Error>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        self.stop.check(what)?;
        let entry = undo.will_make(made);
        match ask(&self.stop, &self.clients, self.events, what, send).await? {
            Ok(value) => Ok((entry, Ok(value))),
            Err(Unmade { failure, doubtful }) => {
                if !doubtful {
                    undo.forget(entry);
                }
                Ok((entry, Err(failure)))
            }
        }
    }
}

/// How a request that makes something ended without success.
pub(super) struct Unmade {
    pub(super) failure: Failure,
    /// A try of it may have been carried out.
    pub(super) doubtful: bool,
}

/// Sends a request that makes something, again while it fails for reasons that pass. The outer error is a stop before any
/// answer came.
pub(super) async fn ask<T, F>(
    stop: &Stop,
    clients: &Clients,
    events: &Events,
    what: &str,
    mut send: impl FnMut(Try) -> F,
) -> Result<Result<T, Unmade>, Error>
where
    F: Future<Output = Result<T, Failure>>,
{
    let mut attempt = Try { number: 1, doubtful: false };
    loop {
        let failure = match stop.creating(what, send(attempt)).await? {
            Ok(value) => return Ok(Ok(value)),
            Err(failure) => failure,
        };
        attempt.doubtful |= failure.may_be_done();
        if !failure.is_passing() || attempt.number >= clients.attempts() {
            return Ok(Err(Unmade { failure, doubtful: attempt.doubtful }));
        }
        events.detail(format!("asking again for {what}: {}", failure.reason()));
        stop.pause(what, backoff(attempt.number)).await?;
        attempt.number += 1;
    }
}

/// Repeats a call about something that was only just made, as long as AWS may not know it everywhere yet. The inner failure
/// is the last.
pub(super) async fn until_known<T, F>(
    stop: &Stop,
    poll: Duration,
    what: &str,
    mut call: impl FnMut() -> F,
) -> Result<Result<T, Failure>, Error>
where
    F: Future<Output = Result<T, Failure>>,
{
    let until = Instant::now() + settling(poll);
    loop {
        match stop.or(what, call()).await? {
            Err(failure) if failure.is_not_found() && Instant::now() < until => {
                stop.pause(what, poll.min(Duration::from_secs(3))).await?;
            }
            answer => return Ok(answer),
        }
    }
}

/// An override for requests that the SDK must not repeat by itself.
pub(super) fn s3_once() -> aws_sdk_s3::config::Builder {
    aws_sdk_s3::config::Builder::new().retry_config(RetryConfig::disabled())
}

/// Makes `config` fit for a request whose answer S3 begins at once, and ends when the work is done: until then hardly a byte moves (S3 API
/// reference, `UploadPartCopy` and `CompleteMultipartUpload`). Its timeouts bound it.
pub(super) fn patient(config: aws_sdk_s3::config::Builder) -> aws_sdk_s3::config::Builder {
    config.stalled_stream_protection(StalledStreamProtectionConfig::disabled())
}

/// An override for requests of EC2 that the SDK must not repeat by itself.
pub(super) fn ec2_once() -> aws_sdk_ec2::config::Builder {
    aws_sdk_ec2::config::Builder::new().retry_config(RetryConfig::disabled())
}

/// The same for EBS.
pub(super) fn ebs_once() -> aws_sdk_ebs::config::Builder {
    aws_sdk_ebs::config::Builder::new().retry_config(RetryConfig::disabled())
}

/// A random pause below a bound that doubles from 1 s to 20 s, so that those who failed together don't come back
/// together.
pub(super) fn backoff(attempt: u32) -> Duration {
    let bound = Duration::from_secs(1 << attempt.saturating_sub(1).min(8)).min(Duration::from_secs(20));
    bound / 4 + bound * u32::try_from(random() % 1000).unwrap_or(0) * 3 / 4000
}

/// A number that nobody else has. The standard library takes its hashers' keys from the system's source of randomness.
pub(super) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_stay_bounded() {
        for attempt in 1..40 {
            let bound = Duration::from_secs(1 << (attempt - 1).min(5)).min(Duration::from_secs(20));
            let pause = backoff(attempt);
            assert!(pause >= bound / 4 && pause <= bound, "{attempt}: {pause:?}");
        }
    }
}
