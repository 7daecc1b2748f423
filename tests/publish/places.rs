//! Where it goes: regions, profiles and endpoints; and what the output folder remembers of it.

use serde_json::{Value, json};

use super::{NOTHING, Stage};

#[test]
fn images_of_two_regions_are_both_remembered() {
    let stage = Stage::with("volume_type = \"gp2\"\n");
    stage.aws.bucket("images-eu", "eu-west-1");
    let first = stage.published(stage.publish().run());
    stage.aws.reset();
    let away = ["--region", "eu-west-1", "--bucket", "images-eu", "--image-name", "web-eu"];
    let line = stage.publish().args(away).run().succeeded();
    assert!(line.starts_with("eu-west-1 ami-"), "{line}");
    let regions: Vec<_> = stage.aws.requests("").iter().map(|call| call["region"].clone()).collect();
    assert!(regions.iter().all(|region| region == "eu-west-1"), "{regions:?}");
    assert_eq!(stage.aws.requests("ec2:RegisterImage")[0]["parameters"]["BlockDeviceMapping.1.Ebs.VolumeType"], "gp2");

    let images = stage.remembered();
    let facts: Vec<_> =
        images.as_array().unwrap().iter().map(|image| (&image["region"], &image["image_name"])).collect();
    assert_eq!(facts, [(&json!("us-east-1"), &json!("web-1")), (&json!("eu-west-1"), &json!("web-eu"))]);
    assert_eq!(images[0]["image_id"], first.as_str());
    assert_eq!(images[1].get("dry_run"), None);
}

/// Everything from the profile, and nothing from the environment but its name.
#[test]
fn a_profile_tells_region_credentials_and_endpoint() {
    let stage = Stage::new();
    let key = |name: &str| stage.aws.environment().find(|(key, _)| *key == name).unwrap().1.to_owned();
    let config = format!(
        "[profile work]\nregion = us-east-1\nendpoint_url = {}\naws_access_key_id = {}\naws_secret_access_key = {}\n\
         [profile signed-in]\nregion = us-east-1\nlogin_session = arn:aws:iam::123456789012:user/me\n",
        stage.aws.url(),
        key("AWS_ACCESS_KEY_ID"),
        key("AWS_SECRET_ACCESS_KEY")
    );
    stage.bench.write("aws.conf", config);
    let bare = |profile: &str| {
        let kiln = stage.bench.kiln(["--format", "json", "-q", "publish", "out/web", "--dry-run"]);
        kiln.env("AWS_CONFIG_FILE", stage.bench.path("aws.conf"))
            .env("AWS_PROFILE", profile)
            .env("AWS_EC2_METADATA_DISABLED", "true")
    };
    let ran = bare("work").run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let expected = json!([true, "us-east-1", "web-1", ""]);
    let said = &ran.json()[0];
    assert_eq!(json!([said["dry_run"], said["region"], said["image_name"], said["image_id"]]), expected);
    assert_eq!(stage.aws.requests("s3:HeadBucket").len(), 1);

    let said = bare("signed-in").env("AWS_ENDPOINT_URL", stage.aws.url()).run().failed(7);
    let error: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    assert_eq!(error["message"], "kiln can't use the `aws login` session of the profile `signed-in`", "{said}");
    stage.assert_left(NOTHING);
}

#[test]
fn what_the_manifest_or_the_command_line_asks_for_is_checked() {
    let stage = Stage::new();
    let asks = |option: &str, value: &str, code| stage.fails(stage.publish().args([option, value]), code, NOTHING);
    insta::assert_snapshot!(asks("--bucket", "s3://images/x", 3), @r#"
    error: the bucket is wanted by its name, not by an address
     |
    help: write `images`, and `prefix = "x"` in the recipe's [publish]
    "#);
    insta::assert_snapshot!(asks("--image-name", "a:b", 2), @r"
    error: an image's name can't contain `:`
     |
    help: AWS takes letters, digits, spaces and `()[]./-'@_`
    ");
    insta::assert_snapshot!(asks("--timeout", "200000000000000d", 2), @"error: --timeout: `200000000000000d` is too long; use at most 365d");
    let said = stage.publish().env("KILN_POLL_INTERVAL", "999999d").run().failed(2);
    assert_eq!(said, "error: KILN_POLL_INTERVAL: `999999d` is too long; use at most 365d\n");

    stage.bench.manifest(|manifest| manifest["publish"]["boot_mode"] = json!("uefi"));
    insta::assert_snapshot!(stage.fails(stage.publish(), 3, NOTHING), @r"
    error: the recipe's boot_mode is `uefi`, and the disk can be started by `legacy-bios` only
     |
    help: leave boot_mode out of [publish], or take a base that has the boot loader for it; then build again
    ");
    stage.bench.manifest(|manifest| {
        manifest["publish"]["boot_mode"] = Value::Null;
        manifest["publish"]["regions"] = json!(["eu-west-1", "eu-west-1"]);
    });
    let said = stage.fails(stage.publish(), 2, NOTHING);
    assert_eq!(said, "error: the region `eu-west-1` is there twice\n");
    assert_eq!(stage.aws.requests(""), [] as [Value; 0], "nobody was asked");
}

/// The recipe's own description is free text; the image does without it if it must.
#[test]
fn an_older_manifest_and_words_that_aws_does_not_take() {
    let stage = Stage::new();
    stage.bench.manifest(|manifest| {
        manifest["description"] = json!("une page\nnaïve");
        manifest["publish"]["description"] = Value::Null;
        manifest["publish"].as_object_mut().unwrap().remove("volume_type");
    });
    let ran = stage.aws.with(stage.bench.kiln(["publish", "out/web", "--dry-run"])).run();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("root /dev/xvda on gp3 of 1 GiB"), "{}", ran.stderr);
    let warning: Vec<_> = ran.stderr.lines().skip_while(|line| !line.starts_with("warning")).take(2).collect();
    insta::assert_snapshot!(warning.join("\n"), @r"
    warning: the image gets no description: an image's description can't contain `\n`
      help: AWS takes only printable ASCII characters there; set another as `description` in the recipe's [publish]
    ");
}
