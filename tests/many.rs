//! Many recipes in one build: what they share, what is said of each, and how one that fails or is stopped ends them.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Bench, Kiln, wait_until};

/// `NAME.toml` with steps of these names; steps with the same name do the same.
fn recipe(bench: &Bench, name: &str, steps: &[&str]) {
    let step = |step: &&str| format!("[[provision]]\nname = \"{step}\"\ninline = \"{step}\"\n");
    let steps: String = steps.iter().map(step).collect();
    let head = format!("name = \"{name}\"\n[base]\nimage = \"base.raw\"\n[machine]\nnetwork = \"none\"\n");
    bench.write(&format!("{name}.toml"), head + &steps);
}

fn build(bench: &Bench, recipes: &[&str], scenario: &Value) -> Kiln {
    bench.kiln([&["build", "--accel", "tcg"], recipes].concat()).scenario(scenario)
}

/// `a` to `c`, with a first step in common.
fn three() -> Bench {
    let bench = Bench::new();
    for name in ["a", "b", "c"] {
        recipe(&bench, name, &["common", name]);
    }
    bench
}

const THREE: [&str; 3] = ["a.toml", "b.toml", "c.toml"];

fn steps(bench: &Bench) -> Vec<String> {
    let moments = bench.commands().into_iter().map(|command| command["moment"].as_str().unwrap().to_owned());
    moments.filter_map(|moment| Some(moment.strip_prefix("step ")?.to_owned())).collect()
}

/// How many guests were taken up from a kept memory, and how many booted.
fn taken_up_and_booted(bench: &Bench) -> (usize, usize) {
    let pids = bench.traces("pid-");
    let taken_up = pids.iter().filter(|pid| bench.read(&format!("traces/{pid}")).contains("-incoming")).count();
    (taken_up, pids.len() - taken_up)
}

/// The lines of the summary, without the seconds.
fn summary(stderr: &str, names: &[&str]) -> Vec<String> {
    let of = |line: &&str| names.iter().any(|name| line.starts_with(&format!("{name} ")));
    let word = |word: &&str| *word != "s" && word.parse::<f64>().is_err();
    let line = |line: &str| line.split_whitespace().filter(word).collect::<Vec<_>>().join(" ");
    stderr.lines().filter(of).map(line).collect()
}

#[test]
fn ten_recipes_make_what_they_share_once() {
    let bench = Bench::new();
    let names: Vec<_> = (0..10).map(|number| format!("r{number}")).collect();
    for name in &names {
        recipe(&bench, name, &["common", name]);
    }
    let files: Vec<_> = names.iter().map(|name| format!("{name}.toml")).collect();
    let files: Vec<_> = files.iter().map(String::as_str).collect();
    let ran = build(&bench, &files, &json!({})).args(["--jobs", "3"]).run();
    let folders: Vec<_> = names.iter().map(|name| format!("out/{name}")).collect();
    assert_eq!(ran.succeeded().lines().collect::<Vec<_>>(), folders, "in the order of the recipes");
    let mut ran = steps(&bench);
    assert_eq!(ran.remove(0), "common");
    ran.sort();
    assert_eq!(ran, names);
    assert_eq!(taken_up_and_booted(&bench), (9, 1), "where builds part the guest's memory is kept");
    bench.assert_tidy(&names.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(bench.names("cache/locks"), [""; 0]);
}

#[test]
fn one_at_a_time_is_in_order() {
    let bench = three();
    assert_eq!(build(&bench, &THREE, &json!({})).args(["--jobs", "1"]).run().succeeded(), "out/a\nout/b\nout/c\n");
    assert_eq!(steps(&bench), ["common", "a", "b", "c"]);
}

/// Whoever waits for a layer leaves its turn: a build that shares nothing is not held up.
#[test]
fn who_waits_for_a_layer_takes_no_turn() {
    let bench = three();
    recipe(&bench, "other", &["alone"]);
    bench.write("other.toml", bench.read("other.toml") + "[disk]\nsize = \"2GiB\"\n");
    let scenario = json!({ "step common": [["wait-for", "at-step-alone"]] });
    let kiln = build(&bench, &["a.toml", "b.toml", "c.toml", "other.toml"], &scenario).args(["--jobs", "2"]);
    assert_eq!(kiln.run().succeeded(), "out/a\nout/b\nout/c\nout/other\n");
}

#[test]
fn one_failure_does_not_stop_the_others() {
    let bench = three();
    let fails = json!({ "step b": [["print", "no such package\n"], ["status", 3]] });
    let ran = build(&bench, &THREE, &fails).run();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(5), "out/a\nout/c\n"), "{}", ran.stderr);
    let said = summary(&ran.stderr, &["a", "b", "c"]);
    assert_eq!(said, ["a built out/a", "b failed step `b` failed with exit code", "c built out/c"]);
    for part in [
        "[b] error: step `b` failed with exit code 3\n[b]  --> b.toml:9:1\n",
        "[b]   = last output: no such package\n",
        "[b]         | no such package\n",
        "error: 1 of 3 recipes were not built\n",
    ] {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
    bench.assert_tidy(&["a", "b.failed", "c"]);
}

#[test]
fn the_first_failure_ends_the_others_if_it_shall() {
    let bench = three();
    let fails =
        json!({ "step a": [["hang"]], "step c": [["hang"]], "step b": [["wait-for", "at-step-a"], ["status", 3]] });
    let ran = build(&bench, &THREE, &fails).args(["--jobs", "3", "--fail-fast"]).run();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(5), ""), "{}", ran.stderr);
    let cancelled = |name: &str| format!("{name} cancelled cancelled, because `b` failed");
    let failed = "b failed step `b` failed with exit code".to_owned();
    assert_eq!(summary(&ran.stderr, &["a", "b", "c"]), [cancelled("a"), failed, cancelled("c")]);
    bench.assert_tidy(&["b.failed"]);
}

#[test]
fn two_recipes_of_one_name_are_refused() {
    let bench = three();
    bench.write("again.toml", bench.read("a.toml"));
    let said = bench.kiln(["-q", "build", "a.toml", "b.toml", "again.toml"]).run().failed(3);
    insta::assert_snapshot!(said, @r#"
    error: `a.toml` and `again.toml` have the same name: both would be built into `out/a`
     |
    help: give each recipe a name of its own
    "#);
    assert_eq!(bench.qemus(), [0; 0]);
}

#[test]
fn every_mistake_is_shown_and_nothing_is_built() {
    let bench = three();
    bench.write("b.toml", "name = \"b\"\n");
    bench.write("c.toml", bench.read("c.toml").replace("inline = \"c\"", "run = \"gone.sh\""));
    bench.write("d.toml", "name = ");
    let said = bench.kiln(["-q", "build", "a.toml", "b.toml", "c.toml", "d.toml"]).run().failed(3);
    assert!(said.contains("--> b.toml:") && said.contains("--> d.toml:"), "{said}");
    assert!(said.contains("--> c.toml:11:7"), "{said}");
    assert!(said.ends_with("error: 3 mistakes in 4 recipes: nothing was built\n"), "{said}");
    assert_eq!((bench.qemus(), bench.names("out")), (vec![], vec![]));
}

#[test]
fn a_folder_is_its_recipes() {
    let bench = three();
    for name in ["b", "a"] {
        let text = bench.read(&format!("{name}.toml")).replace("base.raw", "../base.raw");
        bench.write(&format!("recipes/{name}.toml"), text);
    }
    bench.write("recipes/notes.txt", "no recipe");
    bench.write("recipes/deeper/x.toml", "no recipe of this folder");
    assert_eq!(build(&bench, &["recipes"], &json!({})).run().succeeded(), "out/a\nout/b\n");
    let said = bench.kiln(["-q", "build", "recipes/deeper/..", "home"]).run().failed(3);
    insta::assert_snapshot!(said, @r#"
    error: the folder `home` has no recipe in it
     |
    help: recipes are the *.toml directly in it; `kiln init` writes one to start from
    "#);
}

#[test]
fn programs_get_one_document_and_the_recipe_of_each_event() {
    let bench = three();
    let fails = json!({ "step b": [["status", 3]] });
    let ran = build(&bench, &THREE, &fails).args(["--format", "json"]).run();
    assert_eq!(ran.code, Some(5), "{}", ran.stderr);
    let builds = ran.json()["builds"].as_array().unwrap().clone();
    let part = |part: &str| builds.iter().map(|build| build[part].clone()).collect::<Vec<_>>();
    assert_eq!(part("recipe"), ["a", "b", "c"]);
    assert_eq!(part("folder"), [json!("out/a"), Value::Null, json!("out/c")]);
    assert_eq!(builds[0]["manifest"]["name"], "a");
    assert_eq!(builds[1]["error"]["exit_code"], 5);
    let events = ran.events();
    let of_b = |event: &&Value| event["recipe"] == "b" && event["event"] == "error";
    let error = events.iter().find(of_b).unwrap();
    assert_eq!((&error["message"], &error["place"]["file"]), (&builds[1]["error"]["message"], &json!("b.toml")));
    let done = events.iter().filter(|event| event["event"] == "step_done").map(|event| event["recipe"].clone());
    assert!(done.clone().any(|recipe| recipe == "a") && done.clone().any(|recipe| recipe == "c"));
}

/// Both who works and who waits for a layer end at once, and nothing of theirs is left.
#[test]
fn ctrl_c_ends_all() {
    let bench = three();
    let kiln = build(&bench, &THREE, &json!({ "step common": [["hang"]] })).args(["-q", "--jobs", "2"]).start();
    bench.wait_for("at-step-common");
    wait_until("the others' scratch", || bench.names("cache/work").len() == 3);
    kiln.signal(Signal::INT);
    assert_eq!(kiln.end().failed(130), "error: stopped by Ctrl-C\n");
    bench.assert_tidy(&[]);
    assert_eq!(bench.names("cache/locks"), [""; 0]);
}
