//! A bench whose cache lives on from round to round, and what a round asserts.

#![expect(clippy::print_stderr, reason = "the seed and the history are told for a failure")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln::disk::{BlockMap, Work};
use serde_json::{Value, json};

use super::dice::Dice;
use super::events;
use super::recipe::{self, Action, Recipe, SCRIPTS, TAKES};
use crate::support::{Bench, Kiln, Ran, guest, wait_until};

/// Kinds of events and of recipes' parts that are left out: names in `KILN_MODEL_WITHOUT`, with commas between them.
#[derive(Debug, Clone)]
pub(crate) struct Switches(BTreeSet<String>);

impl Switches {
    pub(crate) fn from_environment() -> Self {
        let off = std::env::var("KILN_MODEL_WITHOUT").unwrap_or_default();
        Self(off.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        !self.0.contains(name)
    }
}

/// Which of the two builds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Side {
    /// With all that earlier rounds have left.
    Warm,
    /// With nothing but the imported base.
    Cold,
}

pub(super) struct World {
    pub(super) bench: Bench,
    pub(super) dice: Dice,
    pub(super) on: Switches,
    pub(super) recipe: Recipe,
    /// The cache's folder.
    pub(super) cache: String,
    pub(super) caches: usize,
    /// The version of QEMU.
    pub(super) qemu: &'static str,
    /// The folder that kiln is called in.
    pub(super) folder: &'static str,
    pub(super) epoch: Option<&'static str>,
    pub(super) cpus: Option<u32>,
    /// What steps find outside of the guest, which no key can have.
    pub(super) outside: usize,
    /// What is known of cold builds, by their inputs.
    colds: BTreeMap<String, Cold>,
    history: History,
}

/// A cold build's outcome.
#[derive(Debug, Clone)]
struct Cold {
    code: Option<i32>,
    stderr: String,
    state: Value,
}

/// What happened, told when the test fails.
struct History {
    seed: u64,
    lines: Vec<String>,
    /// The recipe as it was last noted.
    recipe: String,
}

impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("KILN_MODEL_SEED={} replays this:\n{}", self.seed, self.lines.join("\n"));
        }
    }
}

pub(super) const QEMUS: [&str; 2] = ["7.2.22", "9.2.0"];
pub(super) const EPOCHS: [&str; 2] = ["1700000000", "1500000000"];

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let on = Switches::from_environment();
        let recipe = Recipe::random(&mut dice, &on);
        let mut world = Self {
            bench: Bench::new(),
            recipe,
            cache: "cache".to_owned(),
            caches: 0,
            qemu: QEMUS[0],
            folder: "",
            epoch: None,
            cpus: None,
            outside: 0,
            colds: BTreeMap::new(),
            history: History { seed, lines: Vec::new(), recipe: String::new() },
            dice,
            on,
        };
        write_inputs(&world.bench, "recipe");
        for script in SCRIPTS {
            world.write_script(script);
        }
        std::fs::create_dir(world.bench.path("cold-traces")).unwrap();
        world
    }

    /// Gives a script other lines.
    pub(super) fn write_script(&mut self, script: &str) {
        let text = self::script(script, &mut self.dice, &self.on);
        self.bench.write(&format!("recipe/{script}"), text);
    }

    /// The regular files that steps may take in, by their paths in the recipe's folder, in order.
    pub(super) fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        list(&self.bench.path("recipe"), Path::new("inputs"), &mut files);
        list(&self.bench.path("recipe"), Path::new("scripts"), &mut files);
        files
    }

    pub(super) fn pick_file(&mut self) -> String {
        let files = self.files();
        self.dice.pick(&files)
    }

    pub(super) fn note(&mut self, line: String) {
        self.history.lines.push(line);
    }

    /// Events, and then a round of builds.
    pub(super) fn round(&mut self, number: usize) {
        self.note(format!("round {number}"));
        if number > 0 {
            for _ in 0..=self.dice.below(3) {
                events::one(self);
            }
        }
        self.write_recipe();
        let text = self.recipe.text();
        if self.history.recipe != text {
            self.note(text.clone());
            self.history.recipe = text;
        }
        let version = json!({ "says-version": self.qemu });
        let plan = self.kiln(Side::Warm, &["plan"]).args(["--accel", "tcg"]).scenario(&version).run();
        self.forget(Side::Warm);
        let warm = self.build(Side::Warm, &json!({})).run();
        self.note(format!("warm: {:?} {}", warm.code, warm.stderr));
        self.assert_planned(&plan, &warm);
        self.assert_cold(&warm);
    }

    /// The same built with nothing but the base gives the same, down to the failure.
    #[track_caller]
    pub(super) fn assert_cold(&mut self, warm: &Ran) {
        let cold = self.cold();
        assert_eq!(warm.code, cold.code, "exit codes of warm and cold: {}\n{}", warm.stderr, cold.stderr);
        if cold.code == Some(0) {
            let warm = self.bench.guest_state(&format!("out/{}", self.recipe.name));
            let differences = differences(self.epoch.is_some(), &warm, &cold.state);
            assert!(differences.is_empty(), "the warm disk differs from the cold one:\n{}", differences.join("\n"));
            self.assert_blocks();
        }
    }

    /// The cold build's outcome. It is built once for the same recipe and inputs.
    fn cold(&mut self) -> Cold {
        let inputs = self.inputs();
        if let Some(known) = self.colds.get(&inputs) {
            return known.clone();
        }
        for folder in ["cold/layers", "cold-out"].map(|name| self.bench.path(name)) {
            if folder.exists() {
                std::fs::remove_dir_all(folder).unwrap();
            }
        }
        self.forget(Side::Cold);
        let ran = self.build(Side::Cold, &json!({})).run();
        let state = match ran.code {
            Some(0) => self.bench.guest_state(&format!("cold-out/{}", self.recipe.name)),
            _ => Value::Null,
        };
        let cold = Cold { code: ran.code, stderr: ran.stderr, state };
        self.colds.insert(inputs, cold.clone());
        cold
    }

    /// Everything that a cold build depends on.
    fn inputs(&self) -> String {
        let mut inputs =
            format!("{} {} {:?} {:?} {}\n", self.outside, self.qemu, self.epoch, self.cpus, self.recipe.text());
        for link in ["inputs/link", "inputs/tree/link"] {
            let path = self.bench.path("recipe").join(link);
            let made = path.symlink_metadata().unwrap().modified().unwrap();
            let _ = writeln!(inputs, "{link} {:?} {made:?}", path.read_link().ok());
        }
        for file in self.files() {
            let path = self.bench.path("recipe").join(&file);
            let metadata = path.metadata().unwrap();
            let (mode, time) = (metadata.permissions().mode(), metadata.modified().unwrap());
            let _ = writeln!(inputs, "{file} {mode:o} {time:?} {:?}", std::fs::read(&path).unwrap());
        }
        inputs
    }

    /// The manifest's digest is that of the disk.
    #[track_caller]
    fn assert_blocks(&self) {
        let folder = format!("out/{}", self.recipe.name);
        let manifest: Value = serde_json::from_str(&self.bench.read(&format!("{folder}/manifest.json"))).unwrap();
        let disk = self.bench.path(&folder).join("disk.raw");
        let found = BlockMap::of_raw(&disk, &Work::quiet(1)).unwrap().digest().to_string();
        assert_eq!(manifest["digest"], found, "the digest in the manifest is not that of the disk");
        let blocks = BlockMap::open(&self.bench.path(&folder).join("blocks")).unwrap();
        assert_eq!(blocks.digest().to_string(), found, "the block map is not that of the disk");
    }

    /// The plan has told which steps run. A build that has nothing to do runs none, which a plan can't tell: it is not told
    /// where the output is.
    #[track_caller]
    fn assert_planned(&self, plan: &Ran, warm: &Ran) {
        if self.on.has("plan") && self.bench.any_trace("pid-") && warm.code == Some(0) {
            assert_eq!(plan.code, Some(0), "the plan fails where the build doesn't: {}", plan.stderr);
            let steps = plan.json()["steps"].as_array().unwrap().clone();
            let runs = |step: &Value| !step["cached"].as_bool().unwrap();
            let told: Vec<_> = (1..).zip(&steps).filter(|(_, step)| runs(step)).map(|(number, _)| number).collect();
            let ran: Vec<_> = (steps.len() + 1 - self.steps_that_ran()..=steps.len()).collect();
            assert_eq!(told, ran, "the steps that the plan says run, and those that ran\n{}", plan.stdout);
        } else if warm.code == Some(3) {
            assert_eq!(plan.code, Some(3), "the plan doesn't fail where the build does: {}", warm.stderr);
        }
    }

    /// How many steps the warm build ran: the last ones.
    fn steps_that_ran(&self) -> usize {
        let is_step = |command: &Value| {
            let moment = command["moment"].as_str().unwrap();
            moment == "put" || moment.starts_with("step ")
        };
        self.bench.commands().iter().filter(|command| is_step(command)).count()
    }

    pub(super) fn write_recipe(&self) {
        self.bench.write("recipe/web.toml", self.recipe.text());
    }

    pub(super) fn build(&self, side: Side, scenario: &Value) -> Kiln {
        let out = self.bench.path(if side == Side::Warm { "out" } else { "cold-out" });
        let mut scenario = guest(scenario);
        scenario["says-version"] = json!(self.qemu);
        scenario["outside"] = json!(self.outside.to_string());
        self.kiln(side, &["build"]).args(["--accel", "tcg", "--out"]).arg(out).scenario(&scenario)
    }

    /// kiln with a command that takes the recipe, in the folder where it is called now.
    pub(super) fn kiln(&self, side: Side, command: &[&str]) -> Kiln {
        let recipe = self.bench.path("recipe/web.toml");
        let recipe = match self.folder {
            "recipe" => Path::new("web.toml"),
            "home" => &recipe,
            _ => Path::new("recipe/web.toml"),
        };
        let (cache, traces) = match side {
            Side::Warm => (self.cache.as_str(), "traces"),
            Side::Cold => ("cold", "cold-traces"),
        };
        let json: &[&str] = if command == ["plan"] { &["-q", "--format", "json"] } else { &["-q"] };
        let mut kiln = self.bench.kiln(json.iter().chain(command)).arg(recipe).within(&self.bench.path(self.folder));
        kiln = kiln.env("KILN_CACHE_DIR", self.bench.path(cache)).env("FAKE_QEMU_DIR", self.bench.path(traces));
        if let Some(epoch) = self.epoch {
            kiln = kiln.env("SOURCE_DATE_EPOCH", epoch);
        }
        match self.cpus {
            Some(cpus) => kiln.args(["--set", &format!("machine.cpus={cpus}")]),
            None => kiln,
        }
    }

    /// Removes the traces of earlier builds, which have ended.
    pub(super) fn forget(&self, side: Side) {
        if side == Side::Warm {
            wait_until("the end of every QEMU", || !self.bench.any_qemu());
        }
        let folder = self.bench.path(if side == Side::Warm { "traces" } else { "cold-traces" });
        for entry in std::fs::read_dir(folder).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }

    /// A step of the recipe, by what the fake QEMU calls the moment when it runs.
    pub(super) fn moment(&mut self) -> String {
        let index = self.dice.below(self.recipe.steps.len());
        self.moment_of(index)
    }

    pub(super) fn moment_of(&self, index: usize) -> String {
        let step = &self.recipe.steps[index];
        match step.action {
            Action::Copy { .. } => "put".to_owned(),
            _ => format!("step {}", step.name),
        }
    }

    /// Files in the folders of layers with a name that begins like this.
    pub(super) fn in_layers(&self, prefix: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for layer in self.bench.names(&format!("{}/layers", self.cache)) {
            let folder = format!("{}/layers/{layer}", self.cache);
            let names = self.bench.names(&folder).into_iter().filter(|name| name.starts_with(prefix));
            found.extend(names.map(|name| self.bench.path(&folder).join(name)));
        }
        found
    }
}

/// Writes what steps may take in, but for the scripts.
pub(crate) fn write_inputs(bench: &Bench, folder: &str) {
    for (name, content) in [("a", "one"), ("b", "two"), ("tree/x", "one"), ("tree/sub/y", "two")] {
        bench.write(&format!("{folder}/inputs/{name}"), content);
    }
    bench.write(&format!("{folder}/inputs/big"), "b".repeat(70_000));
    for (name, target) in [("tree/link", "x"), ("link", "a"), ("folder-link", "tree")] {
        std::os::unix::fs::symlink(target, bench.path(folder).join("inputs").join(name)).unwrap();
    }
    bench.write(&format!("{folder}/scripts/data"), "one");
}

/// A script's text.
pub(crate) fn script(path: &str, dice: &mut Dice, on: &Switches) -> String {
    let mut lines = recipe::script(dice, on);
    if path == TAKES {
        lines.push("take data /taken-data".to_owned());
    }
    lines.join("\n")
}

/// Regular files, not those that a link leads to.
fn list(root: &Path, folder: &Path, files: &mut Vec<String>) {
    let entries = std::fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.collect();
    names.sort();
    for path in names.iter().map(|name| folder.join(name)) {
        let kind = std::fs::symlink_metadata(root.join(&path)).unwrap().file_type();
        if kind.is_dir() {
            list(root, &path, files);
        } else if kind.is_file() {
            files.push(path.to_str().unwrap().to_owned());
        }
    }
}

/// What differs between two guests' documents, a line each.
pub(crate) fn differences(with_times: bool, warm: &Value, cold: &Value) -> Vec<String> {
    let empty = serde_json::Map::new();
    let files = |state: &Value| state["files"].as_object().unwrap_or(&empty).clone();
    let (left, right) = (files(warm), files(cold));
    let short = |file: Option<&Value>| {
        let mut file = file.cloned().unwrap_or_default();
        // Copied files have the time that SOURCE_DATE_EPOCH gives, or that of the build.
        if let (false, Some(fields)) = (with_times, file.as_object_mut()) {
            fields.remove("time");
        }
        file
    };
    let paths: BTreeSet<_> = left.keys().chain(right.keys()).collect();
    let differs = |path: &&&String| short(left.get(**path)) != short(right.get(**path));
    let line = |path: &String| {
        let cut = |value: Value| value.to_string().chars().take(200).collect::<String>();
        format!("{path}: warm {}, cold {}", cut(short(left.get(path))), cut(short(right.get(path))))
    };
    let mut lines: Vec<_> = paths.iter().filter(differs).map(|path| line(path)).collect();
    if warm["enabled"] != cold["enabled"] {
        lines.push(format!("enabled services: warm {}, cold {}", warm["enabled"], cold["enabled"]));
    }
    lines
}

/// Moves a file's time of modification, into the past or the future.
///
/// # Errors
/// When the file is not there any more.
pub(crate) fn touch(path: &Path, dice: &mut Dice) -> std::io::Result<String> {
    let offset = Duration::from_secs(86_400 * dice.below(1000) as u64);
    let back = dice.once_in(2);
    let time = if back { SystemTime::now() - offset } else { SystemTime::now() + offset };
    std::fs::File::open(path)?.set_modified(time)?;
    Ok(format!("{} days {}", offset.as_secs() / 86_400, if back { "back" } else { "ahead" }))
}
