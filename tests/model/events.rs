//! What may happen between two builds. A new kind is a line in [`EVENTS`] and its function.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::world::{EPOCHS, QEMUS, Side, World, touch};
use crate::support::{Running, wait_until};

/// A kind of event.
struct Event {
    /// By which it can be left out: see [`super::world::Switches`].
    name: &'static str,
    /// How often it happens, compared with the others.
    weight: usize,
    /// Makes it happen, and says what happened.
    happen: fn(&mut World) -> String,
}

#[rustfmt::skip]
const EVENTS: &[Event] = &[
    // The recipe and what it takes in.
    Event { name: "edit-step", weight: 6, happen: edit_step },
    Event { name: "insert-step", weight: 4, happen: insert_step },
    Event { name: "delete-step", weight: 3, happen: delete_step },
    Event { name: "move-step", weight: 2, happen: move_step },
    Event { name: "turn-step", weight: 3, happen: turn_step },
    Event { name: "edit-file", weight: 5, happen: edit_file },
    Event { name: "edit-script", weight: 2, happen: edit_script },
    Event { name: "rename-file", weight: 2, happen: rename_file },
    Event { name: "relink", weight: 4, happen: relink },
    Event { name: "chmod", weight: 2, happen: chmod },
    Event { name: "times", weight: 2, happen: touch_file },
    Event { name: "names", weight: 2, happen: rename_recipe },
    Event { name: "folder", weight: 1, happen: another_folder },
    Event { name: "processors", weight: 4, happen: other_processors },
    Event { name: "epoch", weight: 2, happen: another_epoch },
    // The host.
    Event { name: "memories-gone", weight: 4, happen: memories_gone },
    Event { name: "other-qemu", weight: 3, happen: other_qemu },
    Event { name: "output-gone", weight: 3, happen: output_gone },
    Event { name: "gc", weight: 2, happen: gc },
    Event { name: "transfer", weight: 2, happen: transfer },
    Event { name: "clock", weight: 2, happen: clock_jumps },
    Event { name: "blocks-gone", weight: 1, happen: blocks_gone },
    Event { name: "manifest", weight: 1, happen: manifest_edited },
    Event { name: "disk", weight: 1, happen: disk_edited },
    // Builds that end early, or meet a change.
    Event { name: "fresh", weight: 1, happen: fresh },
    Event { name: "fresh-fails", weight: 3, happen: fresh_fails },
    Event { name: "fails", weight: 2, happen: fails },
    Event { name: "killed", weight: 3, happen: killed },
    Event { name: "fresh-killed", weight: 2, happen: fresh_killed },
    Event { name: "edit-while-building", weight: 3, happen: edit_while_building },
];

/// Makes one happen.
pub(super) fn one(world: &mut World) {
    let on = world.on.clone();
    let event = world.dice.weighted(EVENTS, |event| if on.has(event.name) { event.weight } else { 0 });
    // First, so that an event that fails is told.
    world.note(format!("{}:", event.name));
    let what = (event.happen)(world);
    world.note(format!("  {what}"));
}

fn edit_step(world: &mut World) -> String {
    world.recipe.edit(&mut world.dice, &world.on);
    String::new()
}

fn insert_step(world: &mut World) -> String {
    world.recipe.insert(&mut world.dice, &world.on);
    String::new()
}

fn delete_step(world: &mut World) -> String {
    let index = world.dice.below(world.recipe.steps.len());
    if world.recipe.steps.len() > 1 {
        world.recipe.steps.remove(index);
    }
    index.to_string()
}

fn move_step(world: &mut World) -> String {
    let count = world.recipe.steps.len();
    let (from, to) = (world.dice.below(count), world.dice.below(count));
    let step = world.recipe.steps.remove(from);
    world.recipe.steps.insert(to, step);
    format!("{from} to {to}")
}

fn turn_step(world: &mut World) -> String {
    world.recipe.turn(&mut world.dice, &world.on);
    String::new()
}

fn edit_file(world: &mut World) -> String {
    let files: Vec<_> = world.files().into_iter().filter(|file| !is_script(file)).collect();
    let (file, text) = (world.dice.pick(&files), world.dice.pick(&["one", "two"]));
    let text = if file.ends_with("big") { text.repeat(20_000) } else { text.to_owned() };
    write_in_place(&world.bench.path("recipe").join(&file), text.as_bytes());
    format!("{file}, {} bytes", text.len())
}

fn is_script(file: &str) -> bool {
    super::recipe::SCRIPTS.contains(&file)
}

/// Keeps the mode.
fn write_in_place(path: &Path, content: &[u8]) {
    std::fs::write(path, content).unwrap();
}

fn edit_script(world: &mut World) -> String {
    let script = world.dice.pick(&super::recipe::SCRIPTS);
    world.write_script(script);
    world.bench.read(&format!("recipe/{script}"))
}

/// There and back. A step that names the file fails meanwhile, warm and cold.
fn rename_file(world: &mut World) -> String {
    let (one, other) =
        world.dice.pick(&[("inputs/tree/x", "inputs/tree/z"), ("inputs/tree/sub/y", "inputs/tree/sub/w")]);
    let path = |name: &str| world.bench.path("recipe").join(name);
    let (from, to) = if path(one).exists() { (one, other) } else { (other, one) };
    std::fs::rename(path(from), path(to)).unwrap();
    format!("{from} to {to}")
}

/// A link leads elsewhere, or is replaced by a copy of what it leads to.
fn relink(world: &mut World) -> String {
    let (link, targets) = world.dice.pick(&[("inputs/link", ["a", "b"]), ("inputs/tree/link", ["x", "sub/y"])]);
    let path = world.bench.path("recipe").join(link);
    let content = std::fs::read(&path).unwrap_or_default();
    std::fs::remove_file(&path).unwrap();
    if world.dice.once_in(3) {
        std::fs::write(&path, content).unwrap();
        return format!("{link} is a file");
    }
    let target = world.dice.pick(&targets);
    std::os::unix::fs::symlink(target, &path).unwrap();
    format!("{link} to {target}")
}

fn chmod(world: &mut World) -> String {
    let file = world.pick_file();
    let mode = world.dice.pick(&[0o644, 0o600, 0o755]);
    let permissions = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(world.bench.path("recipe").join(&file), permissions).unwrap();
    format!("{file} {mode:o}")
}

fn touch_file(world: &mut World) -> String {
    let file = world.pick_file();
    let moved = touch(&world.bench.path("recipe").join(&file), &mut world.dice).unwrap();
    format!("{file} {moved}")
}

fn rename_recipe(world: &mut World) -> String {
    world.recipe.name = if world.recipe.name == "web" { "shop" } else { "web" };
    world.recipe.name.to_owned()
}

fn another_folder(world: &mut World) -> String {
    world.folder = world.dice.pick(&["", "recipe", "home"]);
    world.folder.to_owned()
}

fn other_processors(world: &mut World) -> String {
    world.cpus = world.dice.pick(&[None, Some(1), Some(4)]);
    format!("{:?}", world.cpus)
}

fn another_epoch(world: &mut World) -> String {
    world.epoch = world.dice.pick(&[None, Some(EPOCHS[0]), Some(EPOCHS[1])]);
    format!("{:?}", world.epoch)
}

fn memories_gone(world: &mut World) -> String {
    world.recipe.edit_last(&mut world.dice, &world.on);
    let mut memories = world.in_layers("memory.");
    if world.dice.once_in(2) {
        memories.retain(|_| world.dice.once_in(2));
    }
    for memory in &memories {
        std::fs::remove_file(memory).unwrap();
    }
    format!("{} of them", memories.len())
}

/// Which takes no memory of the other.
fn other_qemu(world: &mut World) -> String {
    world.recipe.edit_last(&mut world.dice, &world.on);
    world.qemu = world.dice.pick(&QEMUS);
    world.qemu.to_owned()
}

fn output_gone(world: &mut World) -> String {
    let _ = std::fs::remove_dir_all(world.bench.path("out"));
    String::new()
}

fn gc(world: &mut World) -> String {
    let keep = world.dice.pick(&["0B", "20MiB", "24MiB", "30MiB"]);
    let kiln = world.bench.kiln(["-q", "cache", "gc", "--keep", keep]);
    let removed = kiln.env("KILN_CACHE_DIR", world.bench.path(&world.cache)).run().succeeded();
    format!("--keep {keep}: {removed}")
}

/// The cache goes on as another one that has what this recipe needs.
fn transfer(world: &mut World) -> String {
    world.write_recipe();
    let file = world.bench.path("kept.kiln");
    let exported = world.kiln(Side::Warm, &["cache", "export"]).arg("-o").arg(&file).run();
    if exported.code == Some(3) {
        return "an input is missing".to_owned();
    }
    world.caches += 1;
    let fresh = format!("cache-{}", world.caches);
    let import = world.bench.kiln(["-q", "cache", "import"]).arg(file).env("KILN_CACHE_DIR", world.bench.path(&fresh));
    let imported = import.run().succeeded();
    std::fs::remove_dir_all(world.bench.path(&world.cache)).unwrap();
    world.cache = fresh;
    format!("{} {imported}", exported.succeeded())
}

fn clock_jumps(world: &mut World) -> String {
    let mut records = world.in_layers("layer.json");
    records.extend(world.in_layers("used"));
    let moved = records.iter().filter(|_| world.dice.once_in(2)).cloned().collect::<Vec<_>>();
    for path in &moved {
        touch(path, &mut world.dice).unwrap();
    }
    format!("for {} files", moved.len())
}

fn blocks_gone(world: &mut World) -> String {
    let _ = std::fs::remove_file(world.bench.path("out").join(world.recipe.name).join("blocks"));
    String::new()
}

fn manifest_edited(world: &mut World) -> String {
    let path = world.bench.path("out").join(world.recipe.name).join("manifest.json");
    let Ok(text) = std::fs::read_to_string(&path) else { return "there is none".to_owned() };
    let mut manifest: Value = serde_json::from_str(&text).unwrap();
    let what = world.dice.pick(&["digest", "artifact", "name", "half"]);
    let text = match what {
        "half" => text[..text.len() / 2].to_owned(),
        key => {
            manifest[key] = json!("0".repeat(64));
            manifest.to_string()
        }
    };
    std::fs::write(path, text).unwrap();
    what.to_owned()
}

/// Another document of the same length, or a cut.
fn disk_edited(world: &mut World) -> String {
    use std::os::unix::fs::FileExt;
    let path = world.bench.path("out").join(world.recipe.name).join("disk.raw");
    let Ok(disk) = std::fs::File::options().write(true).open(path) else { return "there is none".to_owned() };
    if world.dice.once_in(4) {
        disk.set_len(1 << 20).unwrap();
        return "cut".to_owned();
    }
    disk.write_all_at(b"xxxx", (64 << 20) + 30).unwrap();
    "overwritten".to_owned()
}

/// A step's number, as `--no-cache` takes it.
fn fresh_from(world: &mut World) -> String {
    match world.dice.below(world.recipe.steps.len() + 1) {
        0 => "--no-cache".to_owned(),
        number => format!("--no-cache={number}"),
    }
}

fn fresh(world: &mut World) -> String {
    let from = fresh_from(world);
    format!("{from}: {}", ended(world, &[&from], &json!({})))
}

/// `--no-cache=STEP` makes a step anew because the world has changed, and fails at the next one. What it made counts: the
/// next build must not take what was kept on top of the old one.
fn fresh_fails(world: &mut World) -> String {
    let Some((from, moment)) = built_before_the_world_changes(world) else { return "not built".to_owned() };
    format!("{from}, {moment} fails: {}", ended(world, &[&from], &json!({ &moment: [["status", 1]] })))
}

/// As `fresh_fails`, killed.
fn fresh_killed(world: &mut World) -> String {
    let Some((from, moment)) = built_before_the_world_changes(world) else { return "not built".to_owned() };
    kill_at(world, &moment, &[&from])
}

/// Builds with a step that depends on the world, then changes the world: how to make that step anew, and the moment of the
/// next one.
fn built_before_the_world_changes(world: &mut World) -> Option<(String, String)> {
    let index = world.recipe.outside(world.outside + 1, &mut world.dice);
    let ended = ended(world, &[], &json!({}));
    world.outside += 1;
    (ended == "Some(0)").then(|| (format!("--no-cache={}", index + 1), world.moment_of(index + 1)))
}

fn fails(world: &mut World) -> String {
    let moment = world.moment();
    format!("{moment} fails: {}", ended(world, &[], &json!({ &moment: [["status", 1]] })))
}

/// A build that ends by itself, well or not: how.
fn ended(world: &mut World, arguments: &[&str], scenario: &Value) -> String {
    world.write_recipe();
    world.forget(Side::Warm);
    let ran = world.build(Side::Warm, scenario).args(arguments).run();
    assert!(matches!(ran.code, Some(0 | 3 | 5)), "{:?} {}", ran.code, ran.stderr);
    format!("{:?}", ran.code)
}

fn killed(world: &mut World) -> String {
    const MOMENTS: [&str; 13] = [
        "step",
        "step",
        "step",
        "sync",
        "qmp stop",
        "qmp blockdev-snapshot",
        "qmp migrate",
        "qmp cont",
        "own",
        "freeze",
        "halt",
        "qmp quit",
        "start",
    ];
    let moment = match world.dice.pick(&MOMENTS) {
        "step" => world.moment(),
        moment => moment.to_owned(),
    };
    kill_at(world, &moment, &[])
}

/// Kills a build at a moment, if it comes there.
fn kill_at(world: &mut World, moment: &str, arguments: &[&str]) -> String {
    world.write_recipe();
    world.forget(Side::Warm);
    let mut kiln = world.build(Side::Warm, &json!({ moment: [["hang"]] })).args(arguments).start();
    let reached = reaches(world, &mut kiln, &[moment]);
    if reached {
        kiln.signal(Signal::KILL);
    }
    let ran = kiln.end();
    assert!(matches!(ran.code, None | Some(0 | 3)), "{:?} {}", ran.code, ran.stderr);
    format!("{arguments:?}, at {moment}: {}", if reached { "killed" } else { "never reached" })
}

/// Waits until the fake QEMU comes to one of these moments; `false` if kiln has ended before.
fn reaches(world: &World, kiln: &mut Running, moments: &[&str]) -> bool {
    let trace = |moment: &&str| format!("at-{}", moment.replace(|letter: char| !letter.is_alphanumeric(), "-"));
    let traces: Vec<_> = moments.iter().map(trace).collect();
    let there = || traces.iter().any(|trace| world.bench.path("traces").join(trace).exists());
    wait_until(&format!("one of {traces:?}"), || there() || kiln.is_over());
    there()
}

/// A file is edited after kiln has looked at it, and changed back after the build. The build may fail and name the file,
/// or give what the original gives.
fn edit_while_building(world: &mut World) -> String {
    // So that there is something to build.
    world.recipe.edit(&mut world.dice, &world.on);
    world.write_recipe();
    world.forget(Side::Warm);
    let file = world.pick_file();
    let path = world.bench.path("recipe").join(&file);
    let (original, times) = (std::fs::read(&path).unwrap(), path.metadata().unwrap().modified().unwrap());
    let mut edited = original.clone();
    match world.dice.below(3) {
        0 => edited.truncate(original.len() / 2),
        1 => edited.extend(b"\nwrite /etc/a edited"),
        // A script whose last word is another, or a file of the same length.
        _ => match edited.last_mut() {
            Some(last) => *last = b'!',
            None => edited.push(b'!'),
        },
    }
    let wait = json!([["wait-for", "go"]]);
    let mut kiln = world.build(Side::Warm, &json!({ "boot": wait, "resume": wait })).start();
    let reached = reaches(world, &mut kiln, &["boot", "resume"]);
    if reached {
        write_in_place(&path, &edited);
    }
    world.bench.write("traces/go", "");
    let ran = kiln.end();
    write_in_place(&path, &original);
    std::fs::File::open(&path).unwrap().set_modified(times).unwrap();
    let told = format!("{file}, {reached}: {:?} {}", ran.code, ran.stderr);
    world.note(told.clone());
    match ran.code {
        Some(3) if reached => assert!(ran.stderr.contains(file.rsplit('/').next().unwrap()), "{told}"),
        Some(0) => world.assert_cold(&ran),
        code => assert!(matches!(code, Some(3 | 5)) && !reached, "{told}"),
    }
    told
}
