//! The main job, end to end: a disk is built, published, and what arrived at the other end is the disk, and boots.

use std::process::Command;

use super::{Bench, base, root, run};

/// The local AWS endpoint; ended with the test.
struct Aws {
    state: tempfile::TempDir,
    exports: Vec<(String, String)>,
}

impl Aws {
    fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        let started = Command::new(root().join("scripts/aws-local"))
            .args(["start", "--bucket", "images", "--watch", &std::process::id().to_string(), "--state"])
            .arg(state.path())
            .output()
            .unwrap();
        assert!(started.status.success(), "{}", super::said(&started));
        let exports = String::from_utf8(started.stdout).unwrap();
        let pair = |line: &str| {
            let (key, value) = line.strip_prefix("export ")?.split_once('=')?;
            Some((key.to_owned(), value.trim_matches(['\'', '"']).to_owned()))
        };
        let exports = exports.lines().flat_map(|line| line.split(';')).map(str::trim).filter_map(pair).collect();
        Self { state, exports }
    }

    fn url(&self) -> &str {
        &self.exports.iter().find(|(key, _)| key == "AWS_ENDPOINT_URL").unwrap().1
    }
}

impl Drop for Aws {
    fn drop(&mut self) {
        let _ =
            Command::new(root().join("scripts/aws-local")).args(["stop", "--state"]).arg(self.state.path()).status();
    }
}

#[test]
fn a_disk_becomes_an_image_and_its_snapshot_boots() {
    let bench = Bench::new();
    let aws = Aws::start();
    let recipe = format!(
        "name = \"web\"\n[base]\nimage = \"{}\"\n[machine]\nnetwork = \"none\"\n\
         [[provision]]\ninline = \"echo published > /etc/kiln-was-here\"\n\
         [[test]]\nname = \"mark\"\nrun = \"grep -q published /etc/kiln-was-here\"\n\
         [publish]\nimage_name = \"web-{{digest:8}}\"\nbucket = \"images\"\n",
        base("bookworm").display()
    );
    bench.write("web.toml", recipe);
    bench.ok(&["build", "web.toml"]);
    let published = bench
        .kiln()
        .args(["publish", "out/web"])
        .envs(aws.exports.iter().map(|(key, value)| (key, value)))
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("KILN_POLL_INTERVAL", "200ms")
        .output()
        .unwrap();
    assert!(published.status.success(), "{}", super::said(&published));
    let line = String::from_utf8(published.stdout).unwrap();
    let (region, image) = line.trim().split_once(' ').unwrap();
    assert_eq!(region, "us-east-1");
    assert!(image.starts_with("ami-"), "{line}");

    let facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(bench.path("out/web/published.json")).unwrap()).unwrap();
    let snapshot = facts[0]["snapshot_id"].as_str().unwrap();
    std::fs::create_dir(bench.path("out/arrived")).unwrap();
    let arrived = bench.path("out/arrived/disk.raw");
    run(Command::new("curl")
        .args(["-fsS", "-o"])
        .arg(&arrived)
        .arg(format!("{}/kiln-test/snapshots/{snapshot}", aws.url())));
    run(Command::new("cmp").arg(&arrived).arg(bench.path("out/web/disk.raw")));
    std::fs::copy(bench.path("out/web/manifest.json"), bench.path("out/arrived/manifest.json")).unwrap();
    bench.ok(&["test", "out/arrived", "--firmware", "uefi"]);
}
