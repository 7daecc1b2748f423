//! The guest that the fake QEMU plays: tests of builds rely on its disk and its memory, which these show.

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::support::{Bench, guest, guest_state, tool};

fn step(name: &str, script: &str) -> String {
    format!("[[provision]]\nname = \"{name}\"\ncheckpoint = true\ninline = '''\n{script}\n'''\n")
}

/// Builds, and returns the document on the disk. Nothing is amiss with any layer.
#[track_caller]
fn built(bench: &Bench, steps: &str) -> Value {
    bench.recipe(steps);
    let ran = bench.build(&guest(&json!({}))).run();
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    for layer in bench.names("cache/layers") {
        let disk = bench.path("cache/layers").join(layer).join("disk.qcow2");
        tool(std::process::Command::new("qemu-img").arg("check").arg(disk), "");
    }
    bench.guest_state("out/web")
}

/// The content of a file of the document.
#[track_caller]
fn content<'a>(state: &'a Value, path: &str) -> &'a str {
    state["files"][path]["content"].as_str().unwrap_or_else(|| panic!("{path}: {state}"))
}

#[test]
fn a_steps_file_is_on_the_disk_after_a_cold_build() {
    let bench = Bench::new();
    let state = built(&bench, &step("one", "# a file\nwrite /etc/motd hello there\nenable ssh"));
    let file = json!({ "type": "file", "mode": "0644", "owner": "root:root", "content": "hello there\n" });
    assert_eq!(state, json!({ "files": { "/etc/motd": file }, "enabled": ["ssh"] }));
}

#[test]
fn a_long_document_spans_clusters_and_layers() {
    let bench = Bench::new();
    let long = |letter: &str| letter.repeat(100_000);
    let first = step("one", &format!("write /a {}\nwrite /z {}", long("a"), long("z")));
    let state = built(&bench, &format!("{first}{}", step("two", "write /m short")));
    assert_eq!(content(&state, "/z").len(), 100_001);
    // The second layer has the clusters that changed, and no others.
    let state = built(&bench, &format!("{first}{}", step("two", &format!("write /m {}", long("m")))));
    assert_eq!((content(&state, "/a").len(), content(&state, "/m").len()), (100_001, 100_001));
    let state = built(&bench, &step("one", "write /a short"));
    assert_eq!(content(&state, "/a"), "short\n");
}

#[test]
fn a_copied_tree_keeps_its_names_modes_and_links() {
    let bench = Bench::new();
    let long = format!("site/{}/{}", "d".repeat(80), "f".repeat(80));
    bench.write("site/index.html", "hello");
    bench.write(&long, "deep");
    std::fs::set_permissions(bench.path("site/index.html"), PermissionsExt::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink("x".repeat(120), bench.path("site/link")).unwrap();
    let copy = "[[provision]]\ncopy = \"site\"\nto = \"/srv/\"\nowner = \"web:33\"\n";
    let state = built(&bench, copy);
    let index = &state["files"]["/srv/site/index.html"];
    assert_eq!(
        (&index["mode"], &index["owner"], &index["content"]),
        (&json!("0640"), &json!("web:33"), &json!("hello"))
    );
    assert_eq!(state["files"]["/srv/site/link"]["target"], "x".repeat(120));
    assert_eq!(state["files"]["/srv/site"]["type"], "folder");
    assert_eq!(content(&state, &format!("/srv/{long}")), "deep");
}

#[test]
fn a_steps_words() {
    let bench = Bench::new();
    bench.write("conf/a", "taken");
    let steps = [
        step("one", "start web\nenable db\ntmp note hello\nmount /mnt\nappend /log 1\nwrite /old x\nwrite /old/y z"),
        step("two", "services /services\nfrom-tmp note /note\nfrom-tmp none /none\nmounts /mounts\nappend /log 2"),
        step(
            "three",
            "remove /old\nvar COLOUR /colour\nvar SHAPE /shape\ntake conf /etc/conf\nenv /env\nprocessors /cpu\noutside /outside",
        ) + "files = [\"conf\"]\nenv = { COLOUR = \"it's\\nred\" }\n",
    ];
    let state = built(&bench, &steps.concat());
    let found = ["/services", "/note", "/none", "/mounts", "/log", "/colour", "/shape", "/etc/conf/a"];
    let found = found.map(|path| content(&state, path));
    assert_eq!(found, ["web\n", "hello\n", "missing\n", "/mnt\n", "1\n2\n", "it's\nred\n", "unset\n", "taken"]);
    assert!(content(&state, "/env").contains("KILN_STEP=three\n"), "{state}");
    assert!(content(&state, "/cpu").contains("-smp 2 -m "), "{state}");
    assert_eq!(content(&state, "/outside"), "nothing\n");
    assert_eq!((&state["files"]["/old"], &state["files"]["/old/y"]), (&Value::Null, &Value::Null));
    bench.recipe(&step("one", "write /a b\ndance"));
    let said = bench.build(&guest(&json!({}))).run().failed(5);
    assert!(said.contains("failed with exit code 127") && said.contains("dance: not found"), "{said}");
    bench.recipe(&step("one", "print some words\nfail 3"));
    let said = bench.build(&guest(&json!({}))).run().failed(5);
    assert!(said.contains("failed with exit code 3") && said.contains("some words"), "{said}");
}

/// A kept memory has what a boot of the disk loses; and what it has of the disk is not read again.
#[test]
fn a_memory_is_more_than_a_disk() {
    let looks = "services /services\nfrom-tmp note /note\nmounts /mounts";
    let first = step("one", "write /a b\nstart web\ntmp note hello\nmount /mnt\nenable db");
    let found = |bench: &Bench, last: &str| {
        let state = built(bench, &format!("{first}{}", step("two", &format!("{looks}\n{last}"))));
        assert_eq!(content(&state, "/a"), "b\n");
        ["/services", "/note", "/mounts"].map(|path| content(&state, path).to_owned())
    };
    let bench = Bench::new();
    assert_eq!(found(&bench, "# cold"), ["web\n", "hello\n", "/mnt\n"]);
    assert_eq!(found(&bench, "# warm"), ["web\n", "hello\n", "/mnt\n"]);
    let rebooted = |last: &str| {
        first.replace("checkpoint", "reboot = true\ncheckpoint") + &step("two", &format!("{looks}\n{last}"))
    };
    let state = built(&bench, &rebooted(""));
    assert_eq!(["/services", "/note", "/mounts"].map(|path| content(&state, path)), ["db\n", "missing\n", "\n"]);
}

/// A guest tells what it has outside its disk when it writes that out.
#[test]
fn what_a_boot_would_not_bring_back_is_told() {
    let bench = Bench::new();
    let told = |script: &str, more: &Value| {
        bench.recipe(&step("one", script));
        bench.forget();
        bench.build(&guest(more)).run().succeeded();
        // The last one that was told: of the layer after the step.
        bench.traces("left-").last().map(|name| bench.read(&format!("traces/{name}")))
    };
    let words = "services: web; stopped: db; files: /tmp/note; mounts: /mnt";
    assert_eq!(told("start web\nenable db\ntmp note x\nmount /mnt", &json!({})).as_deref(), Some(words));
    assert_eq!(told("write /a b", &json!({})).as_deref(), None);
    let given = json!({ "sync": [["left", "services: web"]] });
    assert_eq!(told("write /a c", &given).as_deref(), Some("services: web"));
}

/// The page cache reaches the disk when kiln asks for that, here for the disk of a failed guest.
#[test]
fn a_sync_writes_the_page_cache_out() {
    let bench = Bench::new();
    bench.recipe(&(step("one", "write /a b") + &step("two", "write /c d\nfail 1")));
    bench.build(&guest(&json!({}))).arg("--keep-on-error").run().failed(5);
    let state = guest_state(&bench.path("out/web.failed/failed-disk.raw"));
    assert_eq!([content(&state, "/a"), content(&state, "/c")], ["b\n", "d\n"]);
}
