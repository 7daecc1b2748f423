//! A warm build gives what a cold one gives: a test for each way in which that did not hold, with the fake guest.

mod inputs;
mod layers;
mod long;
mod store;

use std::path::PathBuf;

use serde_json::Value;

use crate::support::{Bench, Kiln, guest};

/// A step that runs a script, and after which the guest's memory is kept.
fn step(name: &str, script: &str) -> String {
    format!("[[provision]]\nname = \"{name}\"\ncheckpoint = true\ninline = '''\n{script}\n'''\n")
}

fn build(bench: &Bench, more: &Value) -> Kiln {
    bench.build(&guest(more))
}

/// Builds, and returns what ran: the boot, the resume, steps and copies.
#[track_caller]
fn built(bench: &Bench, kiln: Kiln) -> Vec<String> {
    bench.forget();
    kiln.run().succeeded();
    bench.assert_no_qemu();
    let moments = bench.commands().into_iter().map(|command| command["moment"].as_str().unwrap().to_owned());
    let ran = moments.filter(|moment| moment.starts_with("step ") || ["wake", "put"].contains(&moment.as_str()));
    let booted = bench.any_trace("at-boot").then(|| "boot".to_owned());
    booted.into_iter().chain(ran).collect()
}

fn remove_output(bench: &Bench) {
    std::fs::remove_dir_all(bench.path("out")).unwrap();
}

/// The digest of the disk in `out/web`.
fn digest(bench: &Bench) -> Value {
    let manifest: Value = serde_json::from_str(&bench.read("out/web/manifest.json")).unwrap();
    manifest["digest"].clone()
}

/// The content of a file on the disk in `out/web`.
#[track_caller]
fn content(bench: &Bench, path: &str) -> String {
    let state = bench.guest_state("out/web");
    state["files"][path]["content"].as_str().unwrap_or_else(|| panic!("{path}: {state}")).to_owned()
}

/// Files in the folders of a cache's layers with a name that begins like this.
fn in_layers(bench: &Bench, cache: &str, prefix: &str) -> Vec<PathBuf> {
    let folders = bench.names(&format!("{cache}/layers")).into_iter().map(|layer| format!("{cache}/layers/{layer}"));
    let files = folders.flat_map(|folder| bench.names(&folder).into_iter().map(move |name| (folder.clone(), name)));
    files.filter(|(_, name)| name.starts_with(prefix)).map(|(folder, name)| bench.path(&folder).join(name)).collect()
}

/// Removes every memory of a cache's layers; there is at least one.
#[track_caller]
fn remove_memories(bench: &Bench, cache: &str) {
    let memories = in_layers(bench, cache, "memory.");
    assert!(!memories.is_empty());
    for memory in memories {
        std::fs::remove_file(memory).unwrap();
    }
}

/// Changes the record of every layer.
fn edit_records(bench: &Bench, edit: impl Fn(&mut Value)) {
    for path in in_layers(bench, "cache", "layer.json") {
        let mut record = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        edit(&mut record);
        std::fs::write(path, record.to_string()).unwrap();
    }
}
