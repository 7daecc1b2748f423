//! An endpoint by other people, so that kiln and our own don't agree on the same mistake. `ministack` has what a publish
//! takes of S3, and `RegisterImage`; it has neither `ImportSnapshot` nor the EBS direct APIs.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::json;

use super::{Stage, word};
use crate::support::{fixtures, tool, wait_until};

/// Ends with the test.
struct Ministack {
    server: Child,
    url: String,
    _folder: tempfile::TempDir,
}

impl Ministack {
    /// With the bucket `images`.
    fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/aws-local");
        let requirements = fixtures().join("ministack/requirements.txt");
        let venv = Command::new(script).args(["venv", "--requirements"]).arg(requirements).output().unwrap();
        assert!(venv.status.success(), "{}", String::from_utf8_lossy(&venv.stderr));
        let venv = String::from_utf8(venv.stdout).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        // It ends with this test, also if that is killed.
        let server = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", &format!("{}/bin/python", venv.trim()), "-m", "ministack"])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .envs([("HOME", folder.path()), ("TMPDIR", folder.path())])
            .envs([("BIND_HOST", "127.0.0.1"), ("GATEWAY_PORT", &port.to_string())])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let ministack = Self { server, url: format!("http://127.0.0.1:{port}"), _folder: folder };
        wait_until("ministack", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        ask(&["-X", "PUT", &format!("{}/images", ministack.url)]);
        ministack
    }

    /// A call of EC2, written as for an URL.
    #[track_caller]
    fn ec2(&self, call: &str) -> String {
        ask(&["-d", &format!("{call}&Version=2016-11-15"), &self.url])
    }

    /// The keys in the bucket.
    fn keys(&self) -> Vec<String> {
        let list = ask(&[&format!("{}/images?list-type=2", self.url)]);
        list.split("<Key>").skip(1).map(|rest| rest.split('<').next().unwrap().to_owned()).collect()
    }
}

#[track_caller]
fn ask(arguments: &[&str]) -> String {
    let credential = "Credential=test/20260101/us-east-1/ec2/aws4_request";
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--fail-with-body", "--max-time", "30"]);
    if arguments.contains(&"-d") {
        curl.args(["-H", &format!("Authorization: AWS4-HMAC-SHA256 {credential}, SignedHeaders=host, Signature=0")]);
    }
    let output = curl.args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

impl Drop for Ministack {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// What is between this element's tags.
#[track_caller]
fn element<'a>(answer: &'a str, name: &str) -> &'a str {
    let (_, rest) = answer.split_once(&format!("<{name}>")).unwrap_or_else(|| panic!("no {name} in {answer}"));
    rest.split('<').next().unwrap()
}

/// S3 is there, EC2 is ours: its import is never done, so that the object can be looked at.
#[test]
fn the_object_arrives_at_a_second_endpoint_and_is_taken_back() {
    let stage = Stage::new();
    let ministack = Ministack::start();
    stage.aws.control("POST", "import", Some(&json!({ "hold": true, "seconds": 3600 })));
    let kiln = stage.publish().env("AWS_ENDPOINT_URL_S3", &ministack.url).start();
    wait_until("the import", || stage.aws.resources()[4] == 1);
    let keys = ministack.keys();
    assert_eq!(keys.len(), 1, "{keys:?}");
    let [arrived, disk] = ["arrived", "out/web/disk.raw"].map(|name| stage.bench.path(name));
    let url = format!("{}/images/{}", ministack.url, keys[0]);
    tool(Command::new("curl").args(["-fsS", &url, "-o"]).arg(&arrived), "");
    tool(Command::new("cmp").args([arrived, disk]), "");

    kiln.signal(Signal::INT);
    let said = kiln.end().failed(130);
    assert!(!said.contains("left behind"), "{said}");
    assert_eq!(ministack.keys(), [""; 0]);
    let uploads = ask(&[&format!("{}/images?uploads", ministack.url)]);
    assert!(!uploads.contains("<UploadId>"), "{uploads}");
}

#[test]
fn an_image_is_registered_at_a_second_endpoint() {
    let stage = Stage::new();
    let ministack = Ministack::start();
    let manifest: serde_json::Value = serde_json::from_str(&stage.bench.read("out/web/manifest.json")).unwrap();
    let volume = ministack.ec2("Action=CreateVolume&AvailabilityZone=us-east-1a&Size=1");
    let tags = format!(
        "TagSpecification.1.ResourceType=snapshot&TagSpecification.1.Tag.1.Key=kiln:digest&TagSpecification.1.Tag.1.Value={}",
        manifest["digest"].as_str().unwrap()
    );
    let made = ministack.ec2(&format!("Action=CreateSnapshot&VolumeId={}&{tags}", element(&volume, "volumeId")));
    let snapshot = element(&made, "snapshotId");

    let publish = || stage.publish().env("AWS_ENDPOINT_URL", &ministack.url);
    let line = publish().run().succeeded();
    let id = word(&line, "ami-");
    let image = ministack.ec2(&format!("Action=DescribeImages&ImageId.1={id}"));
    for (name, value) in [
        ("name", "web-1"),
        ("imageState", "available"),
        ("architecture", "x86_64"),
        ("virtualizationType", "hvm"),
        ("rootDeviceName", "/dev/xvda"),
        ("snapshotId", snapshot),
    ] {
        assert_eq!(element(&image, name), value, "{image}");
    }
    assert_eq!(publish().run().succeeded(), line, "the same again is found");
}
