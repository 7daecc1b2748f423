//! Rebuilds: what is taken from the store, what runs again, and that nothing wrong is ever taken.

use serde_json::{Value, json};

use crate::support::{Bench, Kiln};

/// Three steps; a second each, so that the guest's memory is worth keeping after all of them.
const STEPS: [&str; 3] = ["one", "two", "three"];

fn recipe(bench: &Bench, scripts: [&str; 3]) {
    let step = |(name, script): (&str, &str)| {
        format!("[[provision]]\nname = \"{name}\"\ninline = \"{script}\"\ncheckpoint = true\n")
    };
    let steps: String = STEPS.into_iter().zip(scripts).map(step).collect();
    bench.recipe(&steps);
}

fn bench() -> Bench {
    let bench = Bench::new();
    recipe(&bench, ["a", "b", "c"]);
    bench
}

fn build(bench: &Bench) -> Kiln {
    bench.build(&json!({}))
}

/// What ran since the traces were last forgotten: boots, resumes and steps, in order.
fn ran(bench: &Bench) -> Vec<String> {
    let commands = bench.commands();
    let moments = commands.iter().map(|command| command["moment"].as_str().unwrap().to_owned());
    let told = moments.filter(|moment| moment.starts_with("step ") || moment == "wake").collect::<Vec<_>>();
    let boots = bench.names("traces").iter().filter(|name| name.as_str() == "at-boot").count();
    [vec!["boot".to_owned(); boots], told].concat()
}

fn forget(bench: &Bench) {
    for name in bench.names("traces") {
        std::fs::remove_file(bench.path("traces").join(name)).unwrap();
    }
}

/// Builds, and says what ran.
#[track_caller]
fn built(bench: &Bench, kiln: Kiln) -> Vec<String> {
    forget(bench);
    assert_eq!(kiln.run().succeeded(), "out/web\n");
    bench.assert_tidy(&["web"]);
    ran(bench)
}

fn cached(bench: &Bench) -> Vec<bool> {
    let manifest: Value = serde_json::from_str(&bench.read("out/web/manifest.json")).unwrap();
    manifest["steps"].as_array().unwrap().iter().map(|step| step["cached"].as_bool().unwrap()).collect()
}

#[test]
fn a_changed_step_runs_again_with_all_that_follow() {
    let bench = bench();
    assert_eq!(built(&bench, build(&bench)), ["boot", "step one", "step two", "step three"]);
    assert_eq!(cached(&bench), [false; 3]);
    recipe(&bench, ["a", "b", "changed"]);
    assert_eq!(built(&bench, build(&bench)), ["wake", "step three"]);
    assert_eq!(cached(&bench), [true, true, false]);
    recipe(&bench, ["changed", "b", "c"]);
    assert_eq!(built(&bench, build(&bench)), ["wake", "step one", "step two", "step three"]);
    recipe(&bench, ["a", "b", "c"]);
    assert_eq!(built(&bench, build(&bench)), ["wake"], "the first one's layers are still there");
}

#[test]
fn a_kept_steps_log_is_in_the_output_as_well() {
    let bench = bench();
    let prints = |text: &str| json!({ "step one": [["print", text]] });
    built(&bench, bench.build(&prints("from the first build\n")));
    recipe(&bench, ["a", "b", "changed"]);
    assert_eq!(built(&bench, bench.build(&prints("never seen\n"))), ["wake", "step three"]);
    assert_eq!(bench.read("out/web/steps/01-one.log"), "from the first build\n");
    assert_eq!(bench.names("out/web/steps"), ["01-one.log", "02-two.log", "03-three.log"]);
}

#[test]
fn nothing_changed_is_nothing_to_do() {
    let bench = bench();
    built(&bench, build(&bench));
    assert_eq!(built(&bench, build(&bench)), [""; 0]);
    assert_eq!(bench.qemus(), [0; 0], "not even started");
    // Whatever was done to the disk, it is made anew.
    std::fs::File::options().write(true).open(bench.path("out/web/disk.raw")).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(built(&bench, build(&bench)), ["wake"]);
    // What is only said about the image changes no layer.
    let text = bench.read("web.toml").replacen("name = \"web\"", "name = \"web\"\ndescription = \"new\"", 1);
    bench.write("web.toml", text);
    assert_eq!(built(&bench, build(&bench)), ["wake"]);
    assert_eq!(built(&bench, build(&bench)), [""; 0]);
}

#[test]
fn the_cache_can_be_left_aside() {
    let bench = bench();
    built(&bench, build(&bench));
    let all = ["boot", "step one", "step two", "step three"];
    assert_eq!(built(&bench, build(&bench).arg("--no-cache")), all);
    assert_eq!(built(&bench, build(&bench).arg("--no-cache=two")), ["wake", "step two", "step three"]);
    assert_eq!(built(&bench, build(&bench).arg("--no-cache=3")), ["wake", "step three"]);
    // What was made anew has taken the place of what was kept.
    let prints = |text: &str| json!({ "step two": [["print", text]] });
    built(&bench, bench.build(&prints("anew\n")).arg("--no-cache=two"));
    std::fs::remove_dir_all(bench.path("out")).unwrap();
    assert_eq!(built(&bench, build(&bench)), ["wake"]);
    assert_eq!(bench.read("out/web/steps/02-two.log"), "anew\n");
    assert_eq!(bench.names("cache/layers").len(), 4, "and nothing of the old ones is left");
    let said = build(&bench).arg("--no-cache=four").run().failed(2);
    insta::assert_snapshot!(said, @r#"
    error: --no-cache: the recipe has no step `four`
     |
     = log: out/web.failed/build.log
    help: name a step, or give its number; `kiln plan` lists them
    "#);
}

#[test]
fn a_step_that_always_runs() {
    let bench = bench();
    let text = bench.read("web.toml").replacen("inline = \"b\"", "inline = \"b\"\ncache = false", 1);
    bench.write("web.toml", text);
    assert_eq!(built(&bench, build(&bench)), ["boot", "step one", "step two", "step three"]);
    assert_eq!(built(&bench, build(&bench)), ["wake", "step two", "step three"]);
}

#[test]
fn a_failed_step_leaves_the_state_before_it() {
    let bench = bench();
    forget(&bench);
    let fails = bench.build(&json!({ "step three": [["status", 1]] }));
    fails.run().failed(5);
    assert_eq!(built(&bench, build(&bench)), ["wake", "step three"]);
}

/// A stale or damaged entry is a miss with a warning: never a crash, never a wrong disk.
#[test]
fn damaged_layers_are_not_used() {
    let bench = bench();
    built(&bench, build(&bench));
    let digest = || {
        let manifest: Value = serde_json::from_str(&bench.read("out/web/manifest.json")).unwrap();
        manifest["digest"].clone()
    };
    let good = digest();
    let spoil = |spoil: &dyn Fn(&std::path::Path)| {
        for layer in bench.names("cache/layers") {
            spoil(&bench.path("cache/layers").join(layer));
        }
        std::fs::remove_dir_all(bench.path("out")).unwrap();
        forget(&bench);
        let ran = build(&bench).run();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert_eq!(digest(), good);
        ran.stderr
    };
    let cut = |path: &std::path::Path| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    };
    let said = spoil(&|layer| cut(&layer.join("disk.qcow2")));
    assert!(said.contains("can't be used: disk.qcow2 was changed"), "{said}");
    assert_eq!(ran(&bench)[0], "boot");
    let said = spoil(&|layer| std::fs::write(layer.join("layer.json"), "{ \"format\": 4").unwrap());
    assert!(said.contains("can't be used: layer.json: "), "{said}");
    // Another version's are not damaged: they are left alone.
    spoil(&|layer| {
        let text = std::fs::read_to_string(layer.join("layer.json")).unwrap();
        std::fs::write(layer.join("layer.json"), text.replace("\"format\":4", "\"format\":999")).unwrap();
    });
    assert_eq!(ran(&bench)[0], "boot");
    assert_eq!(bench.names("cache/layers").len(), 8);
    let list = bench.kiln(["cache", "list"]).run().succeeded();
    assert_eq!(list.matches("layer by another version of kiln\n").count(), 4, "{list}");
    // Without a usable memory the layer's disk is booted.
    spoil(&|layer| {
        for file in std::fs::read_dir(layer).unwrap().map(|file| file.unwrap().path()) {
            if file.file_name().unwrap().to_string_lossy().starts_with("memory.") {
                cut(&file);
            }
        }
    });
    assert_eq!(ran(&bench), ["boot"], "the last layer's disk is booted, and no step runs");
}

/// QEMU itself may refuse a memory that looked good.
#[test]
fn a_memory_that_qemu_does_not_take() {
    let bench = bench();
    built(&bench, build(&bench));
    recipe(&bench, ["a", "b", "changed"]);
    forget(&bench);
    let refuses = json!({ "qmp migrate-incoming": [["stderr", "error while loading state\n"], ["exit", 1]] });
    let ran_kiln = bench.build(&refuses).run();
    assert_eq!(ran_kiln.code, Some(0), "{}", ran_kiln.stderr);
    assert!(ran_kiln.stderr.contains("the kept memory after `two` can't be taken up: "), "{}", ran_kiln.stderr);
    assert_eq!(ran(&bench), ["boot", "step three"]);
}

#[test]
fn another_machine_boots_the_layers_disk() {
    let bench = bench();
    built(&bench, bench.build(&json!({ "step two": [["print", "two says hello\n"]] })));
    recipe(&bench, ["a", "b", "changed"]);
    // Another QEMU: the layers' keys stay, the memory's changes.
    let other = |bench: &Bench| bench.build(&json!({ "says-version": "8.2.0 (other)" }));
    assert_eq!(built(&bench, other(&bench)), ["boot", "step three"]);
    recipe(&bench, ["a", "b", "changed again"]);
    assert_eq!(built(&bench, other(&bench)), ["wake", "step three"], "where it booted its memory was kept");
    assert_eq!(bench.read("out/web/steps/02-two.log"), "two says hello\n");
    recipe(&bench, ["a", "changed", "c"]);
    assert_eq!(built(&bench, other(&bench)), ["boot", "step two", "step three"], "each has a memory of its own");
    // Where both have booted each goes on from its own memory, and nothing is added any more.
    for (number, scripts) in [["a", "b", "x"], ["a", "b", "y"], ["a", "b", "z"]].into_iter().enumerate() {
        recipe(&bench, scripts);
        let kiln = if number == 1 { build(&bench) } else { other(&bench) };
        assert_eq!(built(&bench, kiln), ["wake", "step three"]);
    }
}

/// Killed at any moment: what is in the store afterwards is whole, and the next build goes on from there.
#[test]
fn kills_at_every_moment_leave_a_store_that_works() {
    let bench = bench();
    let moments = ["own", "sync", "qmp stop", "qmp blockdev-snapshot", "qmp migrate", "qmp cont", "step two", "freeze"];
    for moment in moments {
        forget(&bench);
        let kiln = bench.build(&json!({ moment: [["hang"]] })).start();
        bench.wait_for(&format!("at-{}", moment.replace(' ', "-")));
        kiln.signal(rustix::process::Signal::KILL);
        assert_eq!(kiln.end().code, None);
    }
    forget(&bench);
    build(&bench).run().succeeded();
    bench.assert_tidy(&["web"]);
    assert_eq!(bench.names("cache/locks"), [""; 0]);
    assert_eq!(built(&bench, build(&bench)), [""; 0]);
}

/// The second waits for the layer that the first is making, and then goes on from it.
#[test]
fn two_builds_at_once_share_the_work() {
    let bench = bench();
    let wait = json!({ "step one": [["wait-for", "go"]] });
    let first = bench.build(&wait).start();
    bench.wait_for("at-step-one");
    let second = bench.build(&wait).start();
    crate::support::wait_until("the second's scratch", || bench.names("cache/work").len() == 2);
    bench.write("traces/go", "");
    for build in [first, second] {
        assert_eq!(build.end().succeeded(), "out/web\n");
    }
    bench.assert_tidy(&["web"]);
    for step in STEPS {
        let moment = format!("step {step}");
        let times = ran(&bench).iter().filter(|ran| **ran == moment).count();
        assert_eq!(times, 1, "{moment}: {:?}", ran(&bench));
    }
    assert_eq!(ran(&bench).iter().filter(|ran| *ran == "boot").count(), 1);
}

#[test]
fn the_plan_says_what_is_kept_and_what_changed() {
    let bench = bench();
    let plan = || {
        let said = bench.kiln(["-q", "plan", "web.toml"]).run().succeeded();
        said.lines().filter(|line| !line.starts_with("base")).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!(plan(), @r#"
    disk    1 GiB
    boot    direct: boots, nothing was kept in its place
    step    1 one (run): runs, it follows a step that is made anew
    step    2 two (run): runs, it follows a step that is made anew
    step    3 three (run): runs, it follows a step that is made anew
    seal    yes
    "#);
    built(&bench, build(&bench));
    insta::assert_snapshot!(plan(), @r#"
    disk    1 GiB
    boot    direct: kept
    step    1 one (run): kept
    step    2 two (run): kept
    step    3 three (run): kept
    seal    yes
    "#);
    let changed = bench.read("web.toml").replacen("inline = \"b\"", "inline = \"b\"\nenv = { PORT = \"80\" }", 1);
    bench.write("web.toml", changed);
    insta::assert_snapshot!(plan(), @r#"
    disk    1 GiB
    boot    direct: kept
    step    1 one (run): kept
    step    2 two (run): runs, env PORT is new: `80`
    step    3 three (run): runs, it follows a step that is made anew
    seal    yes
    "#);
    bench.write("web.toml", bench.read("web.toml").replacen("checkpoint = true", "cache = false", 1));
    insta::assert_snapshot!(plan(), @r#"
    disk    1 GiB
    boot    direct: kept
    step    1 one (run): runs, it always runs, or follows a step that does
    step    2 two (run): runs, it always runs, or follows a step that does
    step    3 three (run): runs, it always runs, or follows a step that does
    seal    yes
    "#);
}

#[test]
fn the_cache_is_listed_and_bounded() {
    let bench = bench();
    built(&bench, build(&bench));
    let list = || -> Value {
        serde_json::from_str(&bench.kiln(["--format", "json", "cache", "list"]).run().succeeded()).unwrap()
    };
    let names = |list: &Value| -> Vec<String> {
        let mut names: Vec<_> =
            list.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&list()), ["base image (raw)", "web: one", "web: the booted base", "web: three", "web: two"]);
    assert!(list().as_array().unwrap().iter().all(|entry| entry["bytes"].as_u64().unwrap() > 0));
    let dependents: Vec<_> =
        list().as_array().unwrap().iter().map(|entry| entry["dependents"].as_u64().unwrap()).collect();
    assert_eq!(dependents.iter().sum::<u64>(), 4, "each but the base is built on another");
    let text = bench.kiln(["cache", "list"]).run().succeeded();
    assert!(text.ends_with(" in 5 entries\n"), "{text}");

    // Of a running build nothing is removed; what is built on others goes before them.
    recipe(&bench, ["a", "b", "changed"]);
    forget(&bench);
    let running = bench.build(&json!({ "step three": [["wait-for", "go"]] })).start();
    bench.wait_for("at-step-three");
    let gc = |arguments: &[&str]| bench.kiln([&["cache", "gc"], arguments].concat()).run().succeeded();
    assert!(gc(&["--keep", "0B"]).starts_with("removed 1 entries, "));
    assert_eq!(names(&list()), ["base image (raw)", "web: one", "web: the booted base", "web: two"]);
    bench.write("traces/go", "");
    running.end().succeeded();
    assert!(gc(&["--older", "1d"]).starts_with("removed 0 entries, "));
    assert!(gc(&["--keep", "0B"]).starts_with("removed 5 entries, "));
    assert_eq!(list(), json!([]));
    assert_eq!(built(&bench, build(&bench).arg("--no-cache")), ["boot", "step one", "step two", "step three"]);
}

/// CI keeps one file between runs, and its next machine goes on from it.
#[test]
fn the_cache_goes_to_another_machine_as_one_file() {
    let bench = bench();
    let prints = json!({ "step one": [["print", "one says hello\n"]] });
    built(&bench, bench.build(&prints));
    let exported = bench.kiln(["cache", "export", "web.toml", "-o", "kept.kiln"]).run().succeeded();
    assert!(exported.starts_with("kept.kiln: 1 bases, 4 layers, "), "{exported}");
    let elsewhere = |arguments: &[&str]| bench.kiln(arguments).env("KILN_CACHE_DIR", bench.path("elsewhere"));
    let imported = elsewhere(&["cache", "import", "kept.kiln"]).run().succeeded();
    assert_eq!(imported, "1 bases, 4 layers, 0 of them known already\n");
    let imported = elsewhere(&["cache", "import", "kept.kiln"]).run().succeeded();
    assert_eq!(imported, "1 bases, 4 layers, 5 of them known already\n");

    let digest = |bench: &Bench| {
        let manifest: Value = serde_json::from_str(&bench.read("out/web/manifest.json")).unwrap();
        manifest["digest"].clone()
    };
    let here = digest(&bench);
    std::fs::remove_dir_all(bench.path("out")).unwrap();
    let build = || build(&bench).env("KILN_CACHE_DIR", bench.path("elsewhere"));
    assert_eq!(built(&bench, build()), ["wake"], "from the memory after the last step");
    assert_eq!(digest(&bench), here);
    assert_eq!(bench.read("out/web/steps/01-one.log"), "one says hello\n");
    // Only what these recipes need: a recipe without steps needs only the base.
    bench.recipe("");
    let exported = bench.kiln(["cache", "export", "web.toml", "-o", "kept.kiln"]).run().succeeded();
    assert!(exported.starts_with("kept.kiln: 1 bases, 1 layers, "), "{exported}");
}

#[test]
fn a_cache_file_that_is_none_or_damaged() {
    let bench = bench();
    built(&bench, build(&bench));
    bench.kiln(["cache", "export", "web.toml", "-o", "kept.kiln"]).run().succeeded();
    let whole = std::fs::read(bench.path("kept.kiln")).unwrap();
    let import = |bytes: &[u8]| {
        bench.write("bad.kiln", bytes);
        let fresh = bench.path("fresh");
        let ran = bench.kiln(["cache", "import", "bad.kiln"]).env("KILN_CACHE_DIR", &fresh).run();
        assert!(bench.names("fresh/bases").is_empty() && bench.names("fresh/layers").is_empty());
        ran.failed(3)
    };
    assert!(import(&whole[..whole.len() / 2]).starts_with("error: `bad.kiln` can't be taken into the cache: "));
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    assert!(import(&flipped).starts_with("error: `bad.kiln` can't be taken into the cache: "));
    assert!(import(b"hello").starts_with("error: `bad.kiln` can't be taken into the cache: "));
    let said = bench.kiln(["cache", "import", "missing.kiln"]).run().failed(3);
    assert!(said.starts_with("error: cannot read `missing.kiln`: "), "{said}");
    let said = bench.kiln(["cache", "export", "web.toml", "--accel", "tcg", "-o", "no/such/folder"]).run().failed(4);
    assert!(said.starts_with("error: cannot write `no/such/folder`: "), "{said}");
}

/// Programs in the guest see these, and may leave another disk.
#[test]
fn another_machine_in_the_recipe_takes_no_layer() {
    let bench = bench();
    let all = ["boot", "step one", "step two", "step three"];
    assert_eq!(built(&bench, build(&bench)), all);
    for set in ["machine.cpus=4", "machine.memory=2GiB", "machine.cpu=x86-64-v2"] {
        assert_eq!(built(&bench, build(&bench).arg("--set").arg(set)), all, "{set}");
    }
    assert_eq!(built(&bench, build(&bench)), ["wake"]);
}

/// The layers of a build with a time are another's than those without it.
#[test]
fn a_plan_and_an_export_know_the_time_that_the_build_was_given() {
    let bench = bench();
    let timed = |kiln: Kiln| kiln.env("SOURCE_DATE_EPOCH", "1700000000");
    built(&bench, timed(build(&bench)));
    let plan = |kiln: Kiln| kiln.run().succeeded().lines().filter(|line| line.ends_with(": kept")).count();
    assert_eq!(plan(timed(bench.kiln(["plan", "web.toml", "--accel", "tcg"]))), 4);
    assert_eq!(plan(bench.kiln(["plan", "web.toml", "--accel", "tcg"])), 1, "only the booted base has no time");
    let export = || bench.kiln(["cache", "export", "web.toml", "-o", "kept.kiln", "--accel", "tcg"]);
    let said = timed(export()).run().succeeded();
    assert!(said.starts_with("kept.kiln: 1 bases, 4 layers, "), "{said}");
    let said = export().run().succeeded();
    assert!(said.starts_with("kept.kiln: 1 bases, 1 layers, "), "{said}");
    for command in [&["plan", "web.toml"][..], &["cache", "export", "web.toml", "-o", "kept.kiln"]] {
        let said = bench.kiln(command).env("SOURCE_DATE_EPOCH", "soon").run().failed(2);
        assert!(said.starts_with("error: SOURCE_DATE_EPOCH is `soon`, "), "{said}");
    }
}

#[test]
fn a_plan_and_an_export_are_made_for_an_accelerator() {
    let bench = bench();
    built(&bench, build(&bench));
    for command in [&["plan", "web.toml"][..], &["cache", "export", "web.toml", "-o", "kept.kiln"]] {
        let said = bench.kiln(command).args(["--accel", "kvm"]).run().failed(4);
        assert!(said.starts_with("error: --accel kvm: "), "{said}");
        bench.kiln(command).args(["--accel", "auto"]).run().succeeded();
    }
}

/// A probe would start QEMU to find out what the manifest says already.
#[test]
fn nothing_to_do_needs_no_accelerator() {
    let bench = bench();
    built(&bench, build(&bench));
    forget(&bench);
    let any = || bench.kiln(["-q", "build", "web.toml"]);
    assert_eq!(any().run().succeeded(), "out/web\n");
    assert_eq!(bench.qemus(), [0; 0], "not even probed");
    // Another accelerator that is asked for is another disk.
    let said = any().args(["--accel", "kvm"]).run().failed(4);
    assert!(said.starts_with("error: --accel kvm: "), "{said}");
    let change = |manifest: &mut Value| manifest["guest"]["vendor"] = json!("GenuineIntel");
    bench.signed_manifest(change);
    assert_eq!(built(&bench, any()), ["wake"], "the output of another accelerator is made anew");
}
