//! Recipes of many steps.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use super::{build, built, in_layers};
use crate::support::Bench;

/// A recipe in which each step writes a file with its number, and the last step adds `last` to it. The guest's memory is
/// kept after every fiftieth step, and before the last one.
fn recipe(bench: &Bench, steps: usize, last: &str) {
    let mut text = String::new();
    for number in 1..=steps {
        let more = if number == steps { last } else { "" };
        let memory = number % 50 == 0 || number == steps - 1;
        let _ = writeln!(text, "[[provision]]\nname = \"s{number}\"\ninline = \"write /s/{number} {number}{more}\"");
        let _ = writeln!(text, "checkpoint = {memory}");
    }
    bench.recipe(&text);
}

#[track_caller]
fn assert_files(bench: &Bench, steps: usize, last: &str) {
    let state = bench.guest_state("out/web");
    assert_eq!(state["files"].as_object().unwrap().len(), steps);
    for number in 1..=steps {
        let more = if number == steps { last } else { "" };
        assert_eq!(state["files"][format!("/s/{number}")]["content"], format!("{number}{more}\n"));
    }
}

/// The layer that a disk's header names as its backing file; none if that is the base.
fn backing(disk: &Path) -> Option<String> {
    let disk = std::fs::read(disk).unwrap();
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte));
    let (at, length) = (number(&disk[8..16]), number(&disk[16..20]));
    let name = std::str::from_utf8(&disk[at..at + length]).unwrap();
    Some(name.strip_prefix("../../layers/")?.strip_suffix("/disk.qcow2")?.to_owned())
}

/// The number of layers in the longest chain of backing files. The layers' records and the headers of their disks agree.
fn longest_chain(bench: &Bench) -> usize {
    let mut chains = BTreeMap::new();
    for path in in_layers(bench, "cache", "layer.json") {
        let record: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let folder = path.parent().unwrap();
        let backing = backing(&folder.join("disk.qcow2"));
        assert_eq!(record["backing"], json!(backing));
        chains.insert(folder.file_name().unwrap().to_str().unwrap().to_owned(), backing);
    }
    let chain = |id: &String| std::iter::successors(Some(id), |id| chains[*id].as_ref()).count();
    chains.keys().map(chain).max().unwrap()
}

#[test]
fn two_hundred_steps_have_short_chains_of_backing_files() {
    let bench = Bench::new();
    recipe(&bench, 200, "");
    assert_eq!(built(&bench, build(&bench, &json!({}))).len(), 201);
    assert_files(&bench, 200, "");
    assert!((8..=16).contains(&longest_chain(&bench)), "{}", longest_chain(&bench));
    recipe(&bench, 200, " changed");
    assert_eq!(built(&bench, build(&bench, &json!({}))), ["wake", "step s200"]);
    assert_files(&bench, 200, " changed");
    assert!((8..=16).contains(&longest_chain(&bench)), "{}", longest_chain(&bench));
}

#[test]
fn a_recipe_that_grows_has_short_chains_of_backing_files() {
    let bench = Bench::new();
    recipe(&bench, 100, "");
    assert_eq!(built(&bench, build(&bench, &json!({}))).len(), 101);
    recipe(&bench, 200, "");
    let ran = built(&bench, build(&bench, &json!({})));
    assert_eq!((ran[0].as_str(), ran[1].as_str(), ran.len()), ("wake", "step s101", 101));
    assert_files(&bench, 200, "");
    assert!((8..=16).contains(&longest_chain(&bench)), "{}", longest_chain(&bench));
}
