//! The architecture's rules, held against the sources.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A source file without its unit tests.
struct Source {
    path: String,
    lines: Vec<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, extension, found);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found.sort();
}

fn read(folder: &str) -> Vec<Source> {
    let mut paths = Vec::new();
    files(&root().join(folder), "rs", &mut paths);
    let source = |path: &PathBuf| Source {
        path: path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned(),
        lines: std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect(),
    };
    paths.iter().map(source).collect()
}

/// `src` without unit tests: they are in `mod tests` at a file's end, in `tests/` folders and in `testing.rs` of disk.
fn sources() -> Vec<Source> {
    let mut sources = read("src");
    let is_test = |path: &str| path.contains("/tests/") || path.ends_with("/tests.rs") || path == "src/disk/testing.rs";
    sources.retain(|source| !is_test(&source.path));
    for source in &mut sources {
        let end = source.lines.windows(2).position(|two| two[0] == "#[cfg(test)]" && two[1].starts_with("mod tests {"));
        source.lines.truncate(end.unwrap_or(source.lines.len()));
    }
    sources
}

fn code(line: &str) -> &str {
    if line.trim_start().starts_with("//") { "" } else { line }
}

/// No line of code in files that `applies` says has one of the words.
#[track_caller]
fn forbid(words: &[&str], applies: impl Fn(&str) -> bool) {
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| applies(&source.path)) {
        for (number, line) in (1..).zip(&source.lines) {
            if words.iter().any(|word| code(line).contains(word)) {
                found.push(format!("{}:{number}: {}", source.path, line.trim()));
            }
        }
    }
    assert!(found.is_empty(), "{words:?} is not for these:\n{}", found.join("\n"));
}

#[test]
fn recipe_and_plan_are_pure() {
    let impure = [
        "std::fs",
        "fs_err",
        "File::",
        "std::env",
        "env::var",
        "std::time::Instant",
        "SystemTime",
        "jiff",
        "std::process",
        "Command",
        "std::net",
        "std::thread",
        "std::io",
        "crate::exec",
        "crate::vm",
        "crate::store",
    ];
    forbid(&impure, |path| path.starts_with("src/recipe/") || path == "src/plan.rs");
}

#[test]
fn vm_and_disk_do_not_know_each_other() {
    forbid(&["crate::disk"], |path| path.starts_with("src/vm/"));
    forbid(&["crate::vm"], |path| path.starts_with("src/disk/"));
    let joined = ["crate::recipe", "crate::build", "crate::plan", "crate::store", "crate::publish", "crate::rehearse"];
    forbid(&joined, |path| path.starts_with("src/vm/") || path.starts_with("src/disk/"));
}

#[test]
fn only_publishing_is_async() {
    forbid(&["async ", ".await", "tokio", "aws_"], |path| !path.starts_with("src/publish/"));
}

#[test]
fn only_ui_prints() {
    let words = ["println!", "print!(", "eprint!(", "dbg!", "io::stdout", "io::stderr", "stdout()", "stderr()"];
    // What exec says when a go-between can't become its program is for kiln to read, not for the user; completions
    // are no text for people.
    let exempt = ["src/exec.rs", "src/commands/mod.rs"];
    forbid(&words, |path| !path.starts_with("src/ui/") && !exempt.contains(&path));
    forbid(&words[..4], |path| exempt.contains(&path));
}

#[test]
fn only_exec_starts_processes() {
    forbid(&["Command::new", "process::Command"], |path| path != "src/exec.rs");
}

#[test]
fn the_library_knows_neither_the_command_line_nor_how_things_are_shown() {
    let words = ["crate::cli", "crate::ui", "clap", "indicatif", "annotate_snippets"];
    let above = ["src/cli.rs", "src/main.rs"];
    forbid(&words, |path| !path.starts_with("src/ui/") && !path.starts_with("src/commands/") && !above.contains(&path));
}

#[test]
fn lints_are_expected_not_allowed_and_nothing_is_left_to_do() {
    let marks = ["TO", "FIX", "XX"].map(|start| format!("{start}{}", if start == "TO" { "DO" } else { "ME" }));
    for source in read("src").iter().chain(&read("tests")) {
        for (number, line) in (1..).zip(&source.lines) {
            let at = format!("{}:{number}: {line}", source.path);
            assert!(!line.contains(concat!("#[al", "low(")) && !line.contains(concat!("#![al", "low(")), "{at}");
            assert!(marks.iter().all(|mark| !line.contains(mark.as_str())), "{at}");
        }
    }
}

#[test]
fn files_fit_a_head() {
    for source in read("src").iter().chain(&read("tests")) {
        assert!(source.lines.len() <= 600, "{} has {} lines", source.path, source.lines.len());
    }
}

/// By rustfmt's layout: a function ends with the brace that stands where its line began.
#[test]
fn functions_fit_a_page() {
    let starts =
        ["fn ", "pub fn ", "pub(crate) fn ", "pub(super) fn ", "async fn ", "pub async fn ", "pub(super) async fn "];
    let mut long = Vec::new();
    for source in sources() {
        let mut open: Option<(usize, usize, String)> = None;
        for (number, line) in (1..).zip(&source.lines) {
            let indent = line.len() - line.trim_start().len();
            if starts.iter().any(|start| line.trim_start().starts_with(start)) && !line.ends_with(['}', ';']) {
                open = Some((number, indent, line.trim().to_owned()));
            } else if let Some((start, at, name)) = &open
                && indent == *at
                && line.trim() == "}"
            {
                if number - start + 1 > 60 {
                    long.push(format!("{}:{start}: {} lines: {name}", source.path, number - start + 1));
                }
                open = None;
            }
        }
    }
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn every_provisioner_has_its_inputs_and_its_script() {
    let mut count = 0;
    for entry in std::fs::read_dir(root().join("provisioners")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            count += 1;
            for file in ["provisioner.toml", "run.sh"] {
                assert!(path.join(file).is_file(), "{} has no {file}", path.display());
            }
        }
    }
    assert!(count >= 7, "{count} provisioners");
}

/// The repository works wherever it is cloned to.
#[test]
fn no_file_names_a_place_on_a_developers_machine() {
    let list = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().unwrap();
    assert!(list.status.success(), "these tests run in a clone");
    // Put together here, so that this file doesn't name them itself.
    let places = [["/work", "/"], ["/home", "/runner"]].map(|parts| parts.concat());
    for name in String::from_utf8(list.stdout).unwrap().split_terminator('\0') {
        let Ok(text) = std::fs::read_to_string(root().join(name)) else { continue };
        for (number, line) in (1..).zip(text.lines()) {
            // A guest's folders are not a machine's: /home/USER in scripts for the guest.
            let guest = name.starts_with("provisioners/") || name.starts_with("src/build/guest/");
            let cut = line.replace("cache/work/", "").replace("CACHE/work/", "");
            let named = cut.contains(&places[0]) || (!guest && cut.contains(&places[1]));
            assert!(!named, "{name}:{number}: {line}");
        }
    }
}
