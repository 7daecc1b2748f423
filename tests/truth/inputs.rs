//! What a step takes in: files that change during a build, variables, and links.

use serde_json::{Value, json};

use super::{build, built, content, digest, remove_output, step};
use crate::support::{Bench, Kiln, guest};

const ORIGINAL: &str = "write /page original";
/// Of the same length, shorter and longer.
const CHANGED: [&str; 3] = ["write /page altered!", "write /page x", "write /page longer than that"];

/// Starts a build that holds between the look at its inputs and the first step, changes the file `page` there, and
/// lets the build go on.
fn changed_during_a_build(bench: &Bench, changed: &str) -> crate::support::Ran {
    bench.write("page", ORIGINAL);
    bench.forget();
    let running = build(bench, &json!({ "boot": [["wait-for", "go"]] })).arg("--no-cache").start();
    bench.wait_for("at-boot");
    bench.write("page", changed);
    bench.write("traces/go", "");
    let ran = running.end();
    bench.write("page", ORIGINAL);
    ran
}

/// What kiln says when `page` changes, which is the same for every change. The next build has the original as `/page`.
#[track_caller]
fn refused(steps: &str) -> String {
    let bench = Bench::new();
    bench.recipe(steps);
    let mut said = Vec::new();
    for changed in CHANGED {
        said.push(changed_during_a_build(&bench, changed).failed(3));
        built(&bench, build(&bench, &json!({})));
        assert_eq!(content(&bench, "/page"), ORIGINAL, "{changed}");
        remove_output(&bench);
    }
    said.dedup();
    assert_eq!(said.len(), 1, "{said:?}");
    said.concat()
}

#[test]
fn a_copied_file_that_changes_fails_the_build() {
    let said = refused("[[provision]]\nname = \"one\"\ncopy = \"page\"\nto = \"/page\"\n");
    insta::assert_snapshot!(said, @r#"
    error: cannot send what step `one` takes in: `./page` has changed since the build began
     --> web.toml:8:8
      |
    8 | copy = "page"
      |        ^^^^^^
      |
      = log: out/web.failed/build.log
    help: build again, and leave alone what the recipe names meanwhile
    "#);
}

#[test]
fn a_file_with_a_script_that_changes_fails_the_build() {
    let said = refused(&format!("{}files = [\"page\"]\n", step("one", "take page /page")));
    insta::assert_snapshot!(said, @r#"
    error: cannot send what step `one` takes in: `./page` has changed since the build began
      --> web.toml:9:10
       |
     9 |   inline = '''
       |  __________^
    10 | | take page /page
    11 | | '''
       | |___^
       |
       = log: out/web.failed/build.log
    help: build again, and leave alone what the recipe names meanwhile
    "#);
}

#[test]
fn a_file_in_a_copied_folder_that_changes_fails_the_build() {
    let bench = Bench::new();
    bench.write("site/page", "original");
    bench.recipe("[[provision]]\nname = \"one\"\ncopy = \"site/\"\nto = \"/srv/\"\n");
    let running = build(&bench, &json!({ "boot": [["wait-for", "go"]] })).start();
    bench.wait_for("at-boot");
    bench.write("site/page", "altered!");
    bench.write("traces/go", "");
    insta::assert_snapshot!(running.end().failed(3), @r#"
    error: cannot send what step `one` takes in: `./site/page` has changed since the build began
     --> web.toml:8:8
      |
    8 | copy = "site/"
      |        ^^^^^^^
      |
      = log: out/web.failed/build.log
    help: build again, and leave alone what the recipe names meanwhile
    "#);
}

/// A script is read once, when the build begins.
#[test]
fn a_script_that_changes_runs_as_it_was() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nname = \"one\"\nrun = \"page\"\n");
    for changed in CHANGED {
        changed_during_a_build(&bench, changed).succeeded();
        assert_eq!(content(&bench, "/page"), "original\n", "{changed}");
        assert_eq!(built(&bench, build(&bench, &json!({}))), [""; 0], "it is the original again");
    }
}

/// Builds a recipe with these names in a cache: what ran, and the disk, where the step has written its variables.
fn variables(bench: &Bench, (recipe, step): (&str, &str), line: &str, cache: &str) -> (Vec<String>, Value) {
    let base = "[base]\nimage = \"base.raw\"\n[machine]\nnetwork = \"none\"\n";
    let steps = super::step(step, &format!("env /seen\n{line}"));
    bench.write("named.toml", format!("name = \"{recipe}\"\n{base}{steps}"));
    let kiln = bench.kiln(["-q", "build", "named.toml", "--accel", "tcg"]).scenario(&guest(&json!({})));
    let ran = built(bench, kiln.env("KILN_CACHE_DIR", bench.path(cache)));
    (ran, bench.guest_state(&format!("out/{recipe}")))
}

#[test]
fn names_are_on_no_disk_unless_a_step_asks_for_them() {
    const SEEN: [&str; 2] = ["KILN_ARCH=x86_64", "SOURCE_DATE_EPOCH=1767225600"];
    const NAMES: [(&str, &str); 2] = [("web", "first"), ("shop", "second")];
    let bench = Bench::new();
    for (line, expected) in [
        ("", [None; 2]),
        ("# $KILN_NAME", [Some("KILN_NAME=web"), Some("KILN_NAME=shop")]),
        ("# ${KILN_STEP}", [Some("KILN_STEP=first"), Some("KILN_STEP=second")]),
    ] {
        for (number, (names, name)) in NAMES.into_iter().zip(expected).enumerate() {
            let mut seen = SEEN.to_vec();
            seen.extend(name);
            seen.sort_unstable();
            let file =
                json!({ "type": "file", "mode": "0644", "owner": "root:root", "content": seen.join("\n") + "\n" });
            let (ran, disk) = variables(&bench, names, line, "cold");
            assert_eq!(ran, ["boot".to_owned(), format!("step {}", names.1)], "{line}");
            assert_eq!(disk, json!({ "files": { "/seen": file }, "enabled": [] }), "{line}");
            std::fs::remove_dir_all(bench.path("cold")).unwrap();
            let (ran, shared) = variables(&bench, names, line, "cache");
            assert_eq!(shared, disk, "{line}: with a cache that has the other recipe's layers");
            // Two steps that see the same variables have one key.
            let runs = number == 0 || name.is_some();
            assert_eq!(ran.iter().any(|ran| ran.starts_with("step ")), runs, "{line}: {ran:?}");
        }
    }
}

const LINK: &str = "[[provision]]\nname = \"one\"\ncheckpoint = true\ncopy = \"link\"\nto = \"/srv/\"\n";

fn with_a_link() -> Bench {
    let bench = Bench::new();
    bench.write("target", "one");
    std::os::unix::fs::symlink("target", bench.path("link")).unwrap();
    bench
}

#[test]
fn a_copied_link_is_a_link() {
    let bench = with_a_link();
    bench.recipe(LINK);
    assert_eq!(built(&bench, build(&bench, &json!({}))), ["boot", "put"]);
    let link = &bench.guest_state("out/web")["files"]["/srv/link"];
    assert_eq!((&link["type"], &link["target"]), (&json!("link"), &json!("target")));
    bench.write("target", "two");
    assert_eq!(built(&bench, build(&bench, &json!({}))), [""; 0], "what it leads to doesn't matter");
    std::fs::remove_file(bench.path("link")).unwrap();
    std::os::unix::fs::symlink("elsewhere", bench.path("link")).unwrap();
    assert_eq!(built(&bench, build(&bench, &json!({}))), ["wake", "put"], "where it leads to does");
    assert_eq!(bench.guest_state("out/web")["files"]["/srv/link"]["target"], "elsewhere");
}

#[test]
fn a_followed_link_is_the_file_that_it_leads_to() {
    let bench = with_a_link();
    bench.recipe(LINK);
    built(&bench, build(&bench, &json!({})));
    bench.recipe(&format!("{LINK}follow = true\n"));
    for text in ["one", "two"] {
        bench.write("target", text);
        assert_eq!(built(&bench, build(&bench, &json!({}))), ["wake", "put"], "{text}");
        let files = bench.guest_state("out/web")["files"].clone();
        assert_eq!((&files["/srv/link"]["type"], &files["/srv/link"]["content"]), (&json!("file"), &json!(text)));
        assert_eq!(files["/srv/target"], Value::Null);
    }
}

/// The recipe and what it copies are in one folder; kiln is called in that folder, in the one above, and in another.
#[test]
fn the_folder_that_kiln_is_called_in_changes_nothing() {
    for (copy, page) in [(".", "/srv/site/page"), ("./", "/srv/site/page"), ("site/.", "/srv/page")] {
        let bench = Bench::new();
        let text = "name = \"web\"\n[base]\nimage = \"../base.raw\"\n[machine]\nnetwork = \"none\"\n[[provision]]\n";
        let copies = format!("name = \"one\"\ncheckpoint = true\ncopy = \"{copy}\"\nto = \"/srv/\"\n");
        bench.write("recipe/web.toml", format!("{text}{copies}"));
        bench.write("recipe/site/page", "hello");
        let called = |(folder, recipe): (&str, &std::path::Path), cache: &str| -> Kiln {
            let kiln = bench.kiln(["-q", "build", "--accel", "tcg", "--out"]).arg(bench.path("out")).arg(recipe);
            let kiln = kiln.scenario(&guest(&json!({}))).within(&bench.path(folder));
            kiln.env("KILN_CACHE_DIR", bench.path(cache)).env("SOURCE_DATE_EPOCH", "1700000000")
        };
        let recipe = bench.path("recipe/web.toml");
        let places = [("", "recipe/web.toml".as_ref()), ("recipe", "web.toml".as_ref()), ("home", recipe.as_path())];
        built(&bench, called(places[0], "cache"));
        let first = (bench.guest_state("out/web"), digest(&bench));
        assert_eq!(first.0["files"][page]["content"], "hello", "{copy}");
        for place in places {
            assert_eq!(built(&bench, called(place, "cache")), [""; 0], "{copy} in {place:?}");
        }
        for place in &places[1..] {
            remove_output(&bench);
            assert_eq!(built(&bench, called(*place, "cold")), ["boot", "put"], "{copy} in {place:?}");
            assert_eq!((bench.guest_state("out/web"), digest(&bench)), first, "{copy} in {place:?}");
            std::fs::remove_dir_all(bench.path("cold")).unwrap();
        }
    }
}
