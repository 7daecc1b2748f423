//! The local AWS endpoint: a real server with real state, which can be told to fail.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Kiln;

/// Ended with the test.
pub(crate) struct Aws {
    state: tempfile::TempDir,
    exports: Vec<(String, String)>,
}

fn script() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/aws-local"))
}

impl Aws {
    /// With the bucket `images` and the role `vmimport`.
    pub(crate) fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        let started = script()
            .args(["start", "--bucket", "images", "--watch", &std::process::id().to_string(), "--state"])
            .arg(state.path())
            .env("KILN_AWS_IMPORT_SECONDS", "0.5")
            .output()
            .unwrap();
        assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
        let exports = String::from_utf8(started.stdout).unwrap();
        let pair = |line: &str| {
            let (key, value) = line.strip_prefix("export ")?.split_once('=')?;
            Some((key.to_owned(), value.trim_matches(['\'', '"']).to_owned()))
        };
        let exports = exports.lines().flat_map(|line| line.split(';')).map(str::trim).filter_map(pair).collect();
        Self { state, exports }
    }

    /// What points AWS's tools at the endpoint.
    pub(crate) fn environment(&self) -> impl Iterator<Item = (&str, &str)> {
        let more = [("AWS_EC2_METADATA_DISABLED", "true"), ("KILN_POLL_INTERVAL", "50ms")];
        self.exports.iter().map(|(key, value)| (key.as_str(), value.as_str())).chain(more)
    }

    /// A kiln that publishes to the endpoint.
    pub(crate) fn with(&self, kiln: Kiln) -> Kiln {
        self.environment().fold(kiln, |kiln, (key, value)| kiln.env(key, value))
    }

    pub(crate) fn url(&self) -> &str {
        self.environment().find(|(key, _)| *key == "AWS_ENDPOINT_URL").unwrap().1
    }

    /// A control of the endpoint (fixtures/aws/README.md).
    #[track_caller]
    pub(crate) fn control(&self, method: &str, path: &str, body: Option<&Value>) -> Value {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail-with-body", "--max-time", "90", "-X", method]);
        if let Some(body) = body {
            curl.args(["-H", "Content-Type: application/json", "-d", &body.to_string()]);
        }
        let output = curl.arg(format!("{}/kiln-test/{path}", self.url())).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{method} {path}: {text}{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text).unwrap()
    }

    /// Makes calls fail.
    #[track_caller]
    pub(crate) fn fault(&self, fault: &Value) {
        self.control("POST", "faults", Some(fault));
    }

    /// Makes a bucket.
    #[track_caller]
    pub(crate) fn bucket(&self, bucket: &str, region: &str) {
        self.control("POST", "setup", Some(&json!({ "bucket": bucket, "region": region })));
    }

    /// Forgets faults, scripts and the log of calls.
    pub(crate) fn reset(&self) {
        self.control("DELETE", "faults", None);
        self.control("DELETE", "requests", None);
        self.control("POST", "import", Some(&json!({})));
        self.control("POST", "images", Some(&json!({})));
        self.control("POST", "snapshots", Some(&json!({})));
        self.control("POST", "copies", Some(&json!({})));
        self.control("POST", "quotas", Some(&json!({})));
    }

    /// Forgets everything that was ever made, faults, scripts and the log too; buckets and roles stay.
    pub(crate) fn clean(&self) {
        self.reset();
        self.control("DELETE", "resources", None);
    }

    /// Waits until a fault with `hold` keeps a call.
    #[track_caller]
    pub(crate) fn wait_until_held(&self, what: &str) {
        let held = self.control("GET", "requests?held=True&wait=60", None);
        assert_ne!(held["requests"], json!([]), "waited for {what}; so far: {:?}", self.actions());
    }

    /// Forgets all faults; a call that one of them kept goes on.
    pub(crate) fn release(&self) {
        self.control("DELETE", "faults", None);
    }

    /// What is there, as kiln names it: objects and unfinished uploads by their URL, the rest by id.
    pub(crate) fn names(&self) -> Vec<String> {
        let names = &self.control("GET", "resources", None)["names"];
        let list = |names: &Value| names.as_array().into_iter().flatten().cloned().collect::<Vec<_>>();
        let text = |name: &Value| name.as_str().unwrap().to_owned();
        let stored = ["objects", "multipart_uploads"].map(|kind| list(&names[kind])).concat();
        let tasks = ["pending", "active"].map(|state| list(&names["import_tasks"][state])).concat();
        let others = [list(&names["snapshots"]), list(&names["images"]), tasks].concat();
        stored.iter().map(|name| format!("s3://{}", text(name))).chain(others.iter().map(text)).collect()
    }

    /// A call of S3 by another program: method, path with query, further headers, and a body.
    #[track_caller]
    pub(crate) fn s3(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> String {
        let file = self.state.path().join("body");
        std::fs::write(&file, body).unwrap();
        let credential = "Credential=test/20260101/us-east-1/s3/aws4_request";
        let signed = format!("Authorization: AWS4-HMAC-SHA256 {credential}, SignedHeaders=host, Signature=0");
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail-with-body", "--max-time", "30", "-X", method, "-H", &signed]);
        curl.args(["-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]);
        curl.args(headers.iter().flat_map(|header| ["-H", header]));
        curl.arg("--data-binary").arg(format!("@{}", file.display()));
        let output = curl.arg(format!("{}/{path}", self.url())).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{method} {path}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    /// What S3 says of an object.
    #[track_caller]
    pub(crate) fn head(&self, path: &str) -> String {
        self.get(path, "-I", Path::new("-"))
    }

    /// Fetches an object.
    #[track_caller]
    pub(crate) fn download(&self, path: &str, to: &Path) {
        self.get(path, "-f", to);
    }

    #[track_caller]
    fn get(&self, path: &str, option: &str, to: &Path) -> String {
        let credential = "Credential=test/20260101/us-east-1/s3/aws4_request";
        let signed = format!("Authorization: AWS4-HMAC-SHA256 {credential}, SignedHeaders=host, Signature=0");
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "60", option, "-H", &signed, "-o"]).arg(to);
        let output = curl.arg(format!("{}/{path}", self.url())).output().unwrap();
        assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// From now on new snapshots are encrypted, as an account's owner may choose.
    #[track_caller]
    pub(crate) fn encrypt_by_default(&self) {
        self.ec2("us-east-1", "EnableEbsEncryptionByDefault", &[]);
    }

    /// A call of EC2 that isn't kiln's: its answer, which is XML.
    #[track_caller]
    pub(crate) fn ec2(&self, region: &str, action: &str, parameters: &[(&str, &str)]) -> String {
        let mut arguments = vec!["--data-urlencode".to_owned(), format!("Action={action}")];
        for (name, value) in [&[("Version", "2016-11-15")], parameters].concat() {
            arguments.extend(["--data-urlencode".to_owned(), format!("{name}={value}")]);
        }
        self.signed("ec2", region, "", &arguments)
    }

    /// A snapshot without a block in us-east-1 that kiln hasn't made; it stays pending unless it is completed.
    #[track_caller]
    pub(crate) fn snapshot(&self, size: u64, tags: &[(&str, &str)], completed: bool) -> String {
        let tags: Vec<_> = tags.iter().map(|(key, value)| json!({ "Key": key, "Value": value })).collect();
        let body = json!({ "VolumeSize": size, "Tags": tags }).to_string();
        let body = ["-H", "Content-Type: application/json", "-d", &body].map(str::to_owned);
        let started = self.signed("ebs", "us-east-1", "snapshots", &body);
        let started: Value = serde_json::from_str(&started).unwrap();
        let id = started["SnapshotId"].as_str().unwrap().to_owned();
        if completed {
            let empty = ["-X", "POST", "-H", "x-amz-ChangedBlocksCount: 0"].map(str::to_owned);
            self.signed("ebs", "us-east-1", &format!("snapshots/completion/{id}"), &empty);
        }
        id
    }

    /// Makes a KMS key with this alias, and returns its ARN.
    #[track_caller]
    pub(crate) fn kms_key(&self, alias: &str) -> String {
        let call = |action: &str, body: Value| {
            let target = format!("X-Amz-Target: TrentService.{action}");
            let headers = ["-H", "Content-Type: application/x-amz-json-1.1", "-H", &target, "-d", &body.to_string()];
            self.signed("kms", "us-east-1", "", &headers.map(str::to_owned))
        };
        let made: Value = serde_json::from_str(&call("CreateKey", json!({}))).unwrap();
        call("CreateAlias", json!({ "AliasName": alias, "TargetKeyId": made["KeyMetadata"]["KeyId"] }));
        made["KeyMetadata"]["Arn"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    fn signed(&self, service: &str, region: &str, path: &str, arguments: &[String]) -> String {
        let credential = format!("Credential=test/20260101/{region}/{service}/aws4_request");
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail-with-body", "--max-time", "30"]).args(arguments);
        curl.args(["-H", &format!("Authorization: AWS4-HMAC-SHA256 {credential}, SignedHeaders=host, Signature=0")]);
        let output = curl.arg(format!("{}/{path}", self.url())).output().unwrap();
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{service} {arguments:?}: {answer}");
        answer
    }

    /// The calls so far of this action, e.g. `ec2:RegisterImage`; all of them for an empty one.
    pub(crate) fn requests(&self, action: &str) -> Vec<Value> {
        let filter = if action.is_empty() { String::new() } else { format!("?action={action}") };
        self.control("GET", &format!("requests{filter}"), None)["requests"].as_array().unwrap().clone()
    }

    /// How many calls of this action were met by a fault.
    pub(crate) fn struck(&self, action: &str) -> usize {
        self.requests(action).iter().filter(|call| !call["fault"].is_null()).count()
    }

    /// Waits until a call of this action has arrived.
    #[track_caller]
    pub(crate) fn wait_for(&self, action: &str) {
        let arrived = self.control("GET", &format!("requests?action={action}&wait=60"), None);
        assert_ne!(arrived["requests"], json!([]), "waited for {action}; so far: {:?}", self.actions());
    }

    /// Waits until a call of this action has been met by a fault.
    #[track_caller]
    pub(crate) fn wait_until_struck(&self, action: &str) {
        self.wait_until(action, || self.struck(action) > 0);
    }

    #[track_caller]
    fn wait_until(&self, action: &str, arrived: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !arrived() {
            assert!(Instant::now() < deadline, "waited for {action}; so far: {:?}", self.actions());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The actions so far, in order, each once in a row.
    pub(crate) fn actions(&self) -> Vec<String> {
        let mut actions: Vec<_> =
            self.requests("").iter().map(|call| call["action"].as_str().unwrap().to_owned()).collect();
        actions.dedup();
        actions
    }

    /// Objects, unfinished uploads, snapshots, images, and import tasks that still run.
    pub(crate) fn resources(&self) -> [u64; 5] {
        let found = self.control("GET", "resources", None);
        let count = |kind: &str| found[kind].as_u64().unwrap();
        let running = ["pending", "active"].map(|state| found["import_tasks"][state].as_u64().unwrap_or(0));
        [count("objects"), count("multipart_uploads"), count("snapshots"), count("images"), running.iter().sum()]
    }
}

impl Drop for Aws {
    fn drop(&mut self) {
        let _ = script().args(["stop", "--state"]).arg(self.state.path()).status();
    }
}
