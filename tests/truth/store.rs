//! What the store keeps: what is removed from it, what is brought to it, and what it has no room for.

use serde_json::{Value, json};

use super::{build, built, content, edit_records, in_layers, remove_memories, remove_output, step};
use crate::support::{Bench, Kiln, SmallFilesystem, guest, guest_state, wait_until};

fn recipe(bench: &Bench, last: &str) {
    let last = step("three", &format!("services /services\nwrite /three {last}"));
    bench.recipe(&(step("one", "write /one x") + &step("two", "start web") + &last));
}

fn in_cache(bench: &Bench, cache: &str, arguments: &[&str]) -> Kiln {
    bench.kiln(arguments).env("KILN_CACHE_DIR", bench.path(cache))
}

fn build_in(bench: &Bench, cache: &str) -> Vec<String> {
    built(bench, build(bench, &json!({})).env("KILN_CACHE_DIR", bench.path(cache)))
}

/// Brings what a build of the recipe could take from one cache to another; how many layers the other gets.
#[track_caller]
fn transfer(bench: &Bench, from: &str, to: &str) -> usize {
    let before = bench.names(&format!("{to}/layers")).len();
    in_cache(bench, from, &["-q", "cache", "export", "web.toml", "-o", "kept.kiln"]).run().succeeded();
    in_cache(bench, to, &["-q", "cache", "import", "kept.kiln"]).run().succeeded();
    bench.names(&format!("{to}/layers")).len() - before
}

#[track_caller]
fn collect(bench: &Bench, cache: &str, keep: &str) -> String {
    in_cache(bench, cache, &["cache", "gc", "--keep", keep]).run().succeeded()
}

#[test]
fn a_layer_in_use_is_not_removed() {
    let bench = Bench::new();
    recipe(&bench, "x");
    build_in(&bench, "cache");
    recipe(&bench, "y");
    bench.forget();
    let running = build(&bench, &json!({ "step three": [["wait-for", "go"]] })).start();
    bench.wait_for("at-step-three");
    collect(&bench, "cache", "0B");
    assert_eq!(in_layers(&bench, "cache", "layer.json").len(), 3, "the base, one and two");
    bench.write("traces/go", "");
    running.end().succeeded();
    assert_eq!([content(&bench, "/one"), content(&bench, "/three")], ["x\n", "y\n"]);
    remove_output(&bench);
    assert_eq!(build_in(&bench, "cache"), ["wake"]);
    collect(&bench, "cache", "0B");
    assert_eq!(in_layers(&bench, "cache", "layer.json").len(), 0, "nothing is in use any more");
}

/// Two versions of kiln may use one store.
#[test]
fn layers_of_another_format_stay() {
    let bench = Bench::new();
    recipe(&bench, "x");
    build_in(&bench, "cache");
    edit_records(&bench, |record| record["format"] = json!(999));
    let foreign = in_layers(&bench, "cache", "layer.json");
    remove_output(&bench);
    assert_eq!(build_in(&bench, "cache"), ["boot", "step one", "step two", "step three"]);
    assert_eq!(collect(&bench, "cache", "20GiB"), "removed 0 entries, 0 B\n");
    let kept = in_layers(&bench, "cache", "layer.json");
    assert_eq!((foreign.len(), kept.len()), (4, 8));
    assert!(foreign.iter().all(|path| kept.contains(path)), "{kept:?}");
}

/// Where layers with and without a memory are under one key, a build finds the memory.
#[test]
fn an_import_hides_no_memory() {
    for lacks in ["here", "there"] {
        let bench = Bench::new();
        recipe(&bench, "x");
        for cache in ["here", "there"] {
            assert_eq!(build_in(&bench, cache).len(), 4);
            remove_output(&bench);
        }
        remove_memories(&bench, lacks);
        assert_eq!(transfer(&bench, "there", "here"), 4, "both are kept");
        collect(&bench, "here", "20GiB");
        recipe(&bench, "y");
        assert_eq!(build_in(&bench, "here"), ["wake", "step three"], "{lacks} lacks the memory");
        assert_eq!([content(&bench, "/services"), content(&bench, "/three")], ["web\n", "y\n"]);
    }
}

/// Another machine boots a layer's disk and keeps the layer again, with its own memory alone. Both come back here.
#[test]
fn another_machines_memory_hides_none() {
    let bench = Bench::new();
    let steps = |last: &str| step("one", "write /one x") + &step("two", &format!("write /two {last}"));
    let other = |bench: &Bench| {
        let kiln = build(bench, &json!({ "says-version": "8.2.0 (other)" }));
        built(bench, kiln.env("KILN_CACHE_DIR", bench.path("there")))
    };
    bench.recipe(&steps("x"));
    build_in(&bench, "here");
    assert_eq!(transfer(&bench, "here", "there"), 3);
    bench.recipe(&steps("y"));
    assert_eq!(other(&bench), ["boot", "step two"]);
    assert_eq!(transfer(&bench, "there", "here"), 2, "step one again, and step two");
    collect(&bench, "here", "20GiB");
    for (last, is_other) in [("z", false), ("a", true)] {
        bench.recipe(&steps(last));
        let ran = if is_other { other(&bench) } else { build_in(&bench, "here") };
        assert_eq!(ran, ["wake", "step two"], "{last}");
        assert_eq!([content(&bench, "/one"), content(&bench, "/two")], ["x\n".to_owned(), format!("{last}\n")]);
    }
}

/// The filesystem of the cache is full while the layer of step two is written, and has room again before step three.
#[test]
fn a_full_disk_costs_the_layer_and_not_the_build() {
    for (moment, leave) in [("sync", 147_456), ("qmp stop", 65_536)] {
        let bench = Bench::new();
        recipe(&bench, "x");
        std::fs::create_dir(bench.path("small")).unwrap();
        let small = SmallFilesystem::mount(&bench.path("small"), "700m").unwrap();
        let build = |scenario: &Value| {
            let words = [small.enter(), &[env!("CARGO_BIN_EXE_kiln").to_owned()]].concat();
            let kiln = bench.program(words[0].as_ref(), &words[1..]).args(["-q", "build", "--accel", "tcg", "--out"]);
            let kiln = kiln.arg(bench.path("out")).arg(bench.path("web.toml")).scenario(&guest(scenario));
            kiln.env("KILN_CACHE_DIR", bench.path("small/cache"))
        };
        built(&bench, build(&json!({})));
        bench.write("web.toml", bench.read("web.toml").replace("start web", "start web\n# anew"));
        bench.forget();
        // A memory that takes more than is left.
        let mut scenario = json!({ "qmp stop": [["memory", 32 << 20]], "step three": [["wait-for", "go"]] });
        let fill = json!(["fill", bench.path("small"), leave]);
        match moment {
            "sync" => scenario[moment] = json!([fill]),
            _ => scenario[moment].as_array_mut().unwrap().push(fill),
        }
        let mut running = build(&scenario).start();
        wait_until("step three, or the end", || bench.any_trace("at-step-three") || running.is_over());
        std::fs::remove_file(small.outside(&bench.path("small/filling"))).unwrap();
        bench.write("traces/go", "");
        let ran = running.end();
        assert_eq!(ran.code, Some(0), "{moment}: {}", ran.stderr);
        insta::allow_duplicates! {
            insta::assert_snapshot!(ran.stderr, @"warning: `two` and what follows is not kept: cannot write to the cache: No space left on device (os error 28)");
        }
        let state = guest_state(&bench.path("out/web/disk.raw"));
        assert_eq!(state["files"]["/services"]["content"], "web\n");
        remove_output(&bench);
        assert_eq!(built(&bench, build(&json!({}))), ["wake", "step two", "step three"], "{moment}");
        remove_output(&bench);
        assert_eq!(built(&bench, build(&json!({}))), ["wake"]);
        assert_eq!(guest_state(&bench.path("out/web/disk.raw")), state);
    }
}
