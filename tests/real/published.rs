//! The main job, end to end: a disk is built and published, and what arrived at the other end is the disk, and boots.

use std::process::Command;

use super::{Bench, base, run};
use crate::support::Aws;

/// Through a bucket, and block by block. An endpoint for each: at one, the second would find the first's snapshot.
#[test]
fn a_disk_becomes_an_image_and_its_snapshot_boots() {
    let bench = Bench::new();
    let recipe = format!(
        "name = \"web\"\n[base]\nimage = \"{}\"\n[machine]\nnetwork = \"none\"\n\
         [[provision]]\ninline = \"echo published > /etc/kiln-was-here\"\n\
         [[test]]\nname = \"mark\"\nrun = \"grep -q published /etc/kiln-was-here\"\n\
         [publish]\nimage_name = \"web-{{digest:8}}\"\nbucket = \"images\"\n",
        base("bookworm").display()
    );
    bench.write("web.toml", recipe);
    bench.ok(&["build", "web.toml"]);
    for (via, firmware) in [("s3", "uefi"), ("ebs", "bios")] {
        let aws = Aws::start();
        let arrived = format!("out/arrived-{via}");
        publish(&bench, &aws, via);
        rebuild(&bench, &aws, &arrived);
        bench.ok(&["test", &arrived, "--firmware", firmware]);
    }
}

fn publish(bench: &Bench, aws: &Aws, via: &str) {
    let mut publish = bench.kiln();
    // Whoever runs this may have an account of their own.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_")) {
        publish.env_remove(name);
    }
    let nobody = bench.path("no-such-file");
    publish.env("AWS_CONFIG_FILE", &nobody).env("AWS_SHARED_CREDENTIALS_FILE", &nobody);
    let published = publish.args(["publish", "out/web", "--via", via]).envs(aws.environment()).output().unwrap();
    assert!(published.status.success(), "{}", super::said(&published));
    let line = String::from_utf8(published.stdout).unwrap();
    let (region, image) = line.trim().split_once(' ').unwrap();
    assert_eq!(region, "us-east-1");
    assert!(image.starts_with("ami-"), "{line}");
}

/// Makes an output folder of the bytes of the snapshot that was published last.
fn rebuild(bench: &Bench, aws: &Aws, folder: &str) {
    let facts: serde_json::Value =
        serde_json::from_slice(&std::fs::read(bench.path("out/web/published.json")).unwrap()).unwrap();
    let snapshot = facts.as_array().unwrap().last().unwrap()["snapshot_id"].as_str().unwrap().to_owned();
    std::fs::create_dir(bench.path(folder)).unwrap();
    let arrived = bench.path(&format!("{folder}/disk.raw"));
    run(Command::new("curl")
        .args(["-fsS", "-o"])
        .arg(&arrived)
        .arg(format!("{}/kiln-test/snapshots/{snapshot}", aws.url())));
    run(Command::new("cmp").arg(&arrived).arg(bench.path("out/web/disk.raw")));
    std::fs::copy(bench.path("out/web/manifest.json"), bench.path(&format!("{folder}/manifest.json"))).unwrap();
}
