//! Which layers count: those whose steps left nothing outside the disk, or whose memory is there; the newest ones; and
//! those that are young enough.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{build, built, content, digest, edit_records, in_layers, remove_memories, remove_output, step};
use crate::support::{Bench, Kiln, guest, wait_until};

#[test]
fn what_a_step_leaves_outside_the_disk_is_there_for_the_next_one() {
    for (leaves, looks, seen) in [
        ("start web", "services /seen", "web\n"),
        ("tmp note hello", "from-tmp note /seen", "hello\n"),
        ("mount /mnt", "mounts /seen", "/mnt\n"),
    ] {
        let bench = Bench::new();
        // The comment makes it another last step, which leaves the same on the disk.
        let build = |comment: &str| {
            bench.recipe(&(step("one", leaves) + &step("two", &format!("{looks}\n# {comment}"))));
            let ran = built(&bench, build(&bench, &json!({})));
            assert_eq!(content(&bench, "/seen"), seen, "{comment}: {ran:?}");
            (ran, bench.guest_state("out/web"), digest(&bench))
        };
        let (ran, state, digest) = build("cold");
        assert_eq!(ran, ["boot", "step one", "step two"]);
        let same = |ran: &[&str]| (ran.iter().map(|ran| (*ran).to_owned()).collect(), state.clone(), digest.clone());
        assert_eq!(build("from the memory"), same(&["wake", "step two"]));
        remove_memories(&bench, "cache");
        assert_eq!(build("without a memory"), same(&["boot", "step one", "step two"]));
    }
}

#[test]
fn a_build_says_why_a_long_step_runs_again() {
    let bench = Bench::new();
    let said = |comment: &str| {
        bench.recipe(
            &(step("one", "start web\ntmp note hello") + &step("two", &format!("services /seen\n# {comment}"))),
        );
        let scenario = guest(&json!({ "step one": [["sleep", 1.1]] }));
        let ran = bench.kiln(["build", "web.toml", "--accel", "tcg"]).scenario(&scenario).run();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let told: Vec<_> = ran.stderr.lines().filter(|line| line.contains("going back")).map(str::trim).collect();
        told.join("\n")
    };
    assert_eq!(said("cold"), "");
    assert_eq!(said("warm"), "");
    remove_memories(&bench, "cache");
    insta::assert_snapshot!(said("without a memory"), @"note going back to `the booted base`: what `one` left outside the disk (services: web; files: /tmp/note) is in no memory that this machine can take");
}

/// A build whose last two steps print `world` and write it to the disk. It is in no key.
fn in_world(bench: &Bench, world: &str, more: &Value) -> Kiln {
    let prints = json!([["print", format!("{world}\n")]]);
    let mut scenario = json!({ "outside": world, "step two": prints, "step three": prints });
    scenario.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    build(bench, &scenario)
}

fn three_steps() -> Bench {
    let bench = Bench::new();
    bench.recipe(&(step("one", "write /one x") + &step("two", "outside /two") + &step("three", "outside /three")));
    assert_eq!(built(&bench, in_world(&bench, "old", &json!({}))), ["boot", "step one", "step two", "step three"]);
    bench
}

/// Makes step two anew in a new world by a build that fails or is killed in step three.
fn make_anew(bench: &Bench, killed: bool) {
    bench.forget();
    let end = if killed { json!([["hang"]]) } else { json!([["status", 1]]) };
    let running = in_world(bench, "new", &json!({ "step three": end })).arg("--no-cache=two").start();
    if killed {
        bench.wait_for("at-step-three");
        running.signal(Signal::KILL);
        assert_eq!(running.end().code, None);
    } else {
        running.end().failed(5);
    }
    wait_until("the end of every QEMU", || !bench.any_qemu());
}

/// The next build makes step three on the new step two. Disk and logs are of the same runs.
#[track_caller]
fn assert_anew(bench: &Bench) {
    assert_eq!(built(bench, in_world(bench, "newest", &json!({}))), ["wake", "step three"]);
    assert_eq!((content(bench, "/two").as_str(), content(bench, "/three").as_str()), ("new\n", "newest\n"));
    assert_eq!(bench.read("out/web/steps/02-two.log"), "new\n");
    assert_eq!(bench.read("out/web/steps/03-three.log"), "newest\n");
    assert_eq!(built(bench, in_world(bench, "any", &json!({}))), [""; 0]);
}

#[test]
fn what_was_kept_on_a_step_that_was_made_anew_does_not_count() {
    for (killed, removed) in [(false, false), (false, true), (true, false), (true, true)] {
        let bench = three_steps();
        make_anew(&bench, killed);
        if removed {
            remove_output(&bench);
        }
        let plan = bench.kiln(["-q", "plan", "web.toml"]).run().succeeded();
        let steps: Vec<_> = plan.lines().filter(|line| line.starts_with("step")).collect();
        insta::allow_duplicates! {
            insta::assert_snapshot!(steps.join("\n"), @r"
            step    1 one (run): kept
            step    2 two (run): kept
            step    3 three (run): runs, `two` was made anew since
            ");
        }
        assert_anew(&bench);
    }
}

fn set_time(path: &Path, time: SystemTime) {
    std::fs::File::open(path).unwrap().set_modified(time).unwrap();
}

#[test]
fn the_newer_making_counts_whatever_the_times_of_files_are() {
    const DAY: Duration = Duration::from_hours(24);
    let bench = three_steps();
    let old: Vec<_> = ["layer.json", "used"].iter().flat_map(|name| in_layers(&bench, "cache", name)).collect();
    make_anew(&bench, false);
    let new: Vec<_> = in_layers(&bench, "cache", "layer.json").into_iter().filter(|path| !old.contains(path)).collect();
    assert_eq!((old.len(), new.len()), (8, 1));
    for path in &old {
        set_time(path, SystemTime::now() + DAY);
    }
    for path in &new {
        set_time(path, SystemTime::now() - DAY);
    }
    assert_anew(&bench);
}

/// The records of the layers say how old step two is, and the manifest of a build from these layers says the same.
#[test]
fn what_is_older_than_its_max_age_is_made_again() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    for (made, counts) in [(now - 23 * 3600, true), (now - 25 * 3600, false), (now + 3600, false)] {
        let bench = three_steps();
        edit_records(&bench, |record| {
            if let Some(making) = record["lineage"].get_mut(2) {
                making["made"] = json!(made);
            }
        });
        // Without a limit a build takes these layers, and its manifest has their age.
        remove_output(&bench);
        assert_eq!(built(&bench, in_world(&bench, "new", &json!({}))), ["wake"]);
        let text = bench.read("web.toml").replace("name = \"two\"", "name = \"two\"\nmax_age = \"1d\"");
        bench.write("web.toml", text);
        if counts {
            assert_eq!(built(&bench, in_world(&bench, "new", &json!({}))), [""; 0], "the output");
            remove_output(&bench);
            assert_eq!(built(&bench, in_world(&bench, "new", &json!({}))), ["wake"], "the layers");
            assert_eq!(content(&bench, "/two"), "old\n");
        } else {
            let again = ["wake", "step two", "step three"];
            assert_eq!(built(&bench, in_world(&bench, "new", &json!({}))), again, "{made}");
            assert_eq!((content(&bench, "/two"), content(&bench, "/three")), ("new\n".to_owned(), "new\n".to_owned()));
            assert_eq!(built(&bench, in_world(&bench, "any", &json!({}))), [""; 0]);
        }
    }
}
