//! The connections: region, credentials, endpoints and retries, from the places where the SDK looks.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::identity::IdentityCache;
use aws_config::imds::{self, region::ImdsRegionProvider};
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_s3::config::endpoint::{DefaultResolver, EndpointFuture, Params, ResolveEndpoint};
use aws_sdk_s3::config::interceptors::{BeforeSerializationInterceptorContextRef, BeforeTransmitInterceptorContextRef};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents, SharedHttpClient};
use aws_sdk_s3::error::{BoxError, ProvideErrorMetadata, SdkError};
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::{Builder, Connector, tls};
use aws_smithy_runtime_api::client::orchestrator::Metadata;

use tokio::runtime::Runtime;

use super::action::Action;
use super::failure::Failure;
use super::plan::Requests;
use crate::error::{Error, Exit};

/// One request of a call, from its first byte to its answer.
const ATTEMPT: Duration = Duration::from_secs(30);
/// How long not a byte may move. The SDK's own 5 s are too few for a crowded uplink: each part would start over.
const STALLED: Duration = Duration::from_secs(20);
/// A call with all its retries.
const CALL: Duration = Duration::from_mins(3);
/// How often a request is sent, unless `AWS_MAX_ATTEMPTS` says otherwise.
const ATTEMPTS: u32 = 5;

/// Everything that talks to AWS.
#[derive(Debug)]
pub(super) struct Clients {
    pub(super) s3: aws_sdk_s3::Client,
    pub(super) ec2: aws_sdk_ec2::Client,
    pub(super) ebs: aws_sdk_ebs::Client,
    pub(super) ssm: aws_sdk_ssm::Client,
    pub(super) quotas: aws_sdk_servicequotas::Client,
    region: String,
    config: SdkConfig,
    attempts: u32,
    asked: Asked,
    s3_url: LastUrl,
    ec2_url: LastUrl,
    ebs_url: LastUrl,
    ssm_url: LastUrl,
    quotas_url: LastUrl,
}

impl Clients {
    /// Reads environment and profile, and connects to nothing yet, except that an instance's metadata service is asked
    /// for the region if nothing else names one.
    pub(super) async fn load(region: Option<&str>) -> Result<Self, Error> {
        let attempts = attempts(std::env::var("AWS_MAX_ATTEMPTS").ok().as_deref())?;
        let https = https();
        let metadata = metadata_service(&https);
        let region = match region.filter(|region| !region.is_empty()) {
            Some(region) => Region::new(region.to_owned()),
            None => usual_region(&metadata).await.ok_or_else(no_region)?,
        };
        Ok(Self::new(load_config(region, https, metadata, attempts).await, attempts))
    }

    /// Clients of the same account in another region. Who signs the requests is found out once for all of them.
    pub(super) fn elsewhere(&self, region: &str) -> Self {
        let config = self.config.to_builder().region(Region::new(region.to_owned())).build();
        Self::new(config, self.attempts)
    }

    fn new(config: SdkConfig, attempts: u32) -> Self {
        let asked = Asked::default();
        let [s3_url, ec2_url, ebs_url, ssm_url, quotas_url] = [(); 5].map(|()| LastUrl::default());
        let s3 = aws_sdk_s3::config::Builder::from(&config)
            .endpoint_resolver(PathStyle(DefaultResolver::new()))
            .interceptor(s3_url.clone())
            .interceptor(asked.clone())
            .build();
        let ec2 =
            aws_sdk_ec2::config::Builder::from(&config).interceptor(ec2_url.clone()).interceptor(asked.clone()).build();
        let ebs =
            aws_sdk_ebs::config::Builder::from(&config).interceptor(ebs_url.clone()).interceptor(asked.clone()).build();
        let ssm =
            aws_sdk_ssm::config::Builder::from(&config).interceptor(ssm_url.clone()).interceptor(asked.clone()).build();
        let quotas = aws_sdk_servicequotas::config::Builder::from(&config).interceptor(quotas_url.clone()).build();
        Self {
            s3: aws_sdk_s3::Client::from_conf(s3),
            ec2: aws_sdk_ec2::Client::from_conf(ec2),
            ebs: aws_sdk_ebs::Client::from_conf(ebs),
            ssm: aws_sdk_ssm::Client::from_conf(ssm),
            quotas: aws_sdk_servicequotas::Client::from_conf(quotas),
            region: config.region().map(ToString::to_string).unwrap_or_default(),
            config,
            attempts,
            asked,
            s3_url,
            ec2_url,
            ebs_url,
            ssm_url,
            quotas_url,
        }
    }

    /// The region that all requests go to.
    pub(super) fn region(&self) -> &str {
        &self.region
    }

    /// How often a request is sent before it fails.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// What was asked of AWS since this was last called, of what a publish asks.
    pub(super) fn asked(&self) -> Requests {
        std::mem::take(&mut *self.asked.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Turns the SDK's error of the call named, e.g. `ec2:RegisterImage`, into a [`Failure`].
    pub(super) fn failed<E>(&self, call: &'static str) -> impl Fn(SdkError<E>) -> Failure + use<E>
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let url = match call.split(':').next() {
            Some("s3") => &self.s3_url,
            Some("ebs") => &self.ebs_url,
            Some("ssm") => &self.ssm_url,
            Some("servicequotas") => &self.quotas_url,
            _ => &self.ec2_url,
        };
        let url = url.clone();
        move |error| Failure::new(call, &url.get(), &error)
    }
}

/// Does `work` on network threads that end with it, and on at most so many, within bounds, for what blocks.
pub(super) fn with_runtime<T>(blocking: usize, work: impl FnOnce(&Runtime) -> Result<T, Error>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(blocking.clamp(4, 64))
        .thread_name("aws")
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start the network threads", &error))?;
    let done = work(&runtime);
    // A name lookup or a credential helper that hangs must not hold kiln up.
    runtime.shutdown_background();
    done
}

/// HTTPS as the SDK's default client has it, with proxies from the environment and the system's certificates, but by
/// `ring`: the default's AWS-LC needs minutes and a tool more to be built, and the SDK's crates would wait for it.
fn https() -> SharedHttpClient {
    Builder::new().build_with_connector_fn(|settings, components| {
        let provider = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
        let mut connector = Connector::builder().tls_provider(provider).proxy_config(ProxyConfig::from_env());
        connector.set_connector_settings(settings.cloned());
        connector.set_sleep_impl(components.and_then(RuntimeComponents::sleep_impl));
        connector.build()
    })
}

async fn load_config(region: Region, https: SharedHttpClient, metadata: imds::Client, attempts: u32) -> SdkConfig {
    let credentials = DefaultCredentialsChain::builder()
        .configure(ProviderConfig::default().with_http_client(https.clone()))
        .region(region.clone())
        .imds_client(metadata)
        .build()
        .await;
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(10))
        .operation_attempt_timeout(ATTEMPT)
        .operation_timeout(CALL)
        .build();
    aws_config::defaults(BehaviorVersion::latest())
        .http_client(https)
        .region(region)
        .credentials_provider(credentials)
        // A credential helper may ask its user for a token; the default of 5 s is too short for that.
        .identity_cache(IdentityCache::lazy().load_timeout(Duration::from_mins(1)).build())
        .retry_config(RetryConfig::standard().with_max_attempts(attempts))
        .timeout_config(timeouts)
        .stalled_stream_protection(StalledStreamProtectionConfig::enabled().grace_period(STALLED).build())
        .load()
        .await
}

/// The number of tries, from the variable that all AWS tools know. The SDK would read it too, but panics at a wrong one.
fn attempts(variable: Option<&str>) -> Result<u32, Error> {
    let wrong = |text: &str| {
        Error::new(Exit::Input, format!("AWS_MAX_ATTEMPTS is `{text}`"))
            .help("set it to a whole number from 1, or unset it")
    };
    match variable.map(str::trim).filter(|text| !text.is_empty()) {
        None => Ok(ATTEMPTS),
        Some(text) => text.parse().ok().filter(|number| *number > 0).ok_or_else(|| wrong(text)),
    }
}

/// The metadata service of an EC2 instance, as the last place to look in. A laptop has none, and packets to its
/// address may vanish: the SDK's own bounds add up to half a minute.
fn metadata_service(https: &SharedHttpClient) -> imds::Client {
    imds::Client::builder()
        .configure(&ProviderConfig::default().with_http_client(https.clone()))
        .max_attempts(2)
        .connect_timeout(Duration::from_secs(1))
        .read_timeout(Duration::from_secs(1))
        .operation_attempt_timeout(Duration::from_secs(1))
        .operation_timeout(Duration::from_secs(3))
        .build()
}

async fn usual_region(metadata: &imds::Client) -> Option<Region> {
    RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::new())
        .or_else(ImdsRegionProvider::builder().imds_client(metadata.clone()).build())
        .region()
        .await
}

fn no_region() -> Error {
    Error::new(Exit::Input, "no region to publish to")
        .help("name one with --region, as `regions` in the recipe's [publish], with AWS_REGION, or in the AWS profile")
}

/// Puts the bucket into the path wherever the endpoint is the user's own: such endpoints seldom have a name per bucket.
/// Decided where the SDK resolves the endpoint, because only there every way to set one has been looked at
/// (`AWS_ENDPOINT_URL`, `AWS_ENDPOINT_URL_S3`, and both kinds in profiles).
#[derive(Debug)]
struct PathStyle(DefaultResolver);

impl ResolveEndpoint for PathStyle {
    fn resolve_endpoint<'a>(&'a self, params: &'a Params) -> EndpointFuture<'a> {
        if params.endpoint().is_none() {
            return ResolveEndpoint::resolve_endpoint(&self.0, params);
        }
        let path_style = Params::builder()
            .set_bucket(params.bucket().map(str::to_owned))
            .set_region(params.region().map(str::to_owned))
            .set_use_fips(params.use_fips())
            .set_use_dual_stack(params.use_dual_stack())
            .set_endpoint(params.endpoint().map(str::to_owned))
            .force_path_style(true)
            .set_key(params.key().map(str::to_owned))
            .set_prefix(params.prefix().map(str::to_owned))
            .set_copy_source(params.copy_source().map(str::to_owned))
            .build();
        EndpointFuture::new(async move {
            let params = path_style?;
            ResolveEndpoint::resolve_endpoint(&self.0, &params).await
        })
    }
}

/// Remembers where the last request went, for messages: the URL depends on region, environment and profile.
#[derive(Debug, Clone, Default)]
struct LastUrl(Arc<Mutex<String>>);

impl LastUrl {
    fn get(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Intercept for LastUrl {
    fn name(&self) -> &'static str {
        "LastUrl"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = origin(context.request().uri());
        Ok(())
    }
}

/// Counts requests, their repeats apart: what a dry run has asked a publish asks as well.
#[derive(Debug, Clone, Default)]
struct Asked(Arc<Mutex<Requests>>);

impl Intercept for Asked {
    fn name(&self) -> &'static str {
        "Asked"
    }

    fn read_before_serialization(
        &self,
        _: &BeforeSerializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let call = config.load::<Metadata>().map(|of| format!("{}:{}", of.service().to_ascii_lowercase(), of.name()));
        if let Some(action) = call.as_deref().and_then(Action::named) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).exactly(action, 1);
        }
        Ok(())
    }
}

/// Scheme and host of an URL.
fn origin(url: &str) -> String {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find('/').map_or(url.len(), |at| host + at);
    url[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_urls_origin_has_scheme_and_host() {
        assert_eq!(origin("https://ec2.eu-west-1.amazonaws.com/?Action=X"), "https://ec2.eu-west-1.amazonaws.com");
        assert_eq!(origin("http://127.0.0.1:5000"), "http://127.0.0.1:5000");
        assert_eq!(origin(""), "");
    }

    #[test]
    fn the_number_of_tries_is_checked() {
        assert_eq!(attempts(None).unwrap(), ATTEMPTS);
        assert_eq!(attempts(Some("")).unwrap(), ATTEMPTS);
        assert_eq!(attempts(Some("2")).unwrap(), 2);
        for wrong in ["0", "-1", "many"] {
            assert_eq!(attempts(Some(wrong)).unwrap_err().message, format!("AWS_MAX_ATTEMPTS is `{wrong}`"));
        }
    }

    #[test]
    fn only_endpoints_of_the_users_own_get_the_bucket_in_the_path() {
        let resolver = PathStyle(DefaultResolver::new());
        let url = |endpoint: Option<&str>| {
            let params = Params::builder()
                .bucket("images")
                .region("eu-west-1")
                .set_endpoint(endpoint.map(str::to_owned))
                .build()
                .unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(ResolveEndpoint::resolve_endpoint(&resolver, &params)).unwrap().url().to_owned()
        };
        assert_eq!(url(None), "https://images.s3.eu-west-1.amazonaws.com");
        assert_eq!(url(Some("http://localhost:5000")), "http://localhost:5000/images");
    }
}
