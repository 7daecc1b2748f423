//! Several processes build on one store, while others collect, export and import, builds are killed, times jump and the
//! filesystem fills up. No build fails but those that were killed or had no room, and every output is a cold build's.

#![expect(clippy::print_stderr, reason = "the seed and the round are told for a failure")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kiln::disk::{BlockMap, Work};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::model::dice::Dice;
use crate::model::recipe::{Recipe, SCRIPTS};
use crate::model::world::{Switches, differences, script, touch, write_inputs};
use crate::support::{Bench, Kiln, Ran, SmallFilesystem, guest, guest_state, wait_until};

const SEED: u64 = 0x6b69_6c6e;
/// No round begins after this.
const LAST_ROUND: Duration = Duration::from_secs(75);
const BUILDERS: u64 = 3;
/// How much each of them does in a round.
const BUILDS: usize = 4;
const DISTURBANCES: usize = 6;
const NAMES: [&str; 6] = ["r0", "r1", "r2", "r3", "r4", "r5"];
/// Room for all of it.
const ROOMY: &str = "4g";
/// What kiln may say where there is no room.
const NO_ROOM: [&str; 4] =
    ["o space left", "free, and this build needs", "the host's disk is full", "free, and unpacking"];

struct Stress {
    bench: Bench,
    /// Documents of the recipes' cold disks.
    cold: Vec<Value>,
    /// Where the store is; none if the host doesn't permit one to this user.
    small: Option<SmallFilesystem>,
    /// How often it was filled, and whether it is full.
    fills: AtomicUsize,
    full: AtomicBool,
    /// Builds that were killed, and runs of kiln that had no room, that ended well, and that removed something.
    tally: [AtomicUsize; 4],
}

/// What [`Stress::tally`] counts.
enum Told {
    Killed,
    NoRoom,
    Well,
    Removed,
}

impl Stress {
    /// A pool of recipes that share their first steps, each with the document of its cold disk.
    fn new(dice: &mut Dice) -> Self {
        let (bench, on) = (Bench::new(), Switches::from_environment());
        let mut first = Recipe::random(dice, &on);
        first.name = NAMES[0];
        let scripts = SCRIPTS.map(|path| (path, script(path, dice, &on)));
        for name in NAMES {
            let recipe = if name == NAMES[0] { first.clone() } else { first.varied(name, dice, &on) };
            write_inputs(&bench, name);
            for (path, text) in &scripts {
                bench.write(&format!("{name}/{path}"), text);
            }
            bench.write(&format!("{name}/web.toml"), recipe.text());
            settle(&bench.path(name));
        }
        std::fs::create_dir(bench.path("small")).unwrap();
        let small = SmallFilesystem::mount(&bench.path("small"), ROOMY);
        let small = small
            .inspect_err(|why| {
                eprintln!("no small filesystem, so guests report a full disk instead: {why}");
            })
            .ok();
        let (fills, full) = (AtomicUsize::new(0), AtomicBool::new(false));
        let mut stress = Self { bench, cold: Vec::new(), small, fills, full, tally: Default::default() };
        for name in NAMES {
            let kiln = stress.kiln(&["build", "--accel", "tcg", "--out"]).arg(stress.bench.path("cold-out"));
            let kiln = kiln.arg(stress.recipe(name)).scenario(&guest(&json!({})));
            kiln.env("KILN_CACHE_DIR", stress.bench.path("cold").join(name)).run().succeeded();
            stress.cold.push(guest_state(&stress.bench.path("cold-out").join(name).join("disk.raw")));
        }
        stress
    }

    fn recipe(&self, name: &str) -> PathBuf {
        self.bench.path(name).join("web.toml")
    }

    /// kiln where the store is.
    fn kiln(&self, arguments: &[&str]) -> Kiln {
        let kiln = env!("CARGO_BIN_EXE_kiln").to_owned();
        let enter = self.small.as_ref().map_or(&[][..], SmallFilesystem::enter);
        let words: Vec<_> = enter.iter().cloned().chain([kiln, "-q".to_owned()]).collect();
        let kiln = self.bench.program(words[0].as_ref(), words[1..].iter()).args(arguments);
        kiln.env("KILN_CACHE_DIR", self.bench.path("small/cache")).env("SOURCE_DATE_EPOCH", "1700000000")
    }

    /// A path of the small filesystem, for this process.
    fn outside(&self, path: &str) -> PathBuf {
        let path = self.bench.path("small").join(path);
        self.small.as_ref().map_or(path.clone(), |small| small.outside(&path))
    }

    fn build(&self, builder: u64, name: &str, scenario: &Value) -> Kiln {
        let out = self.bench.path("small").join(format!("out-{builder}"));
        let kiln = self.kiln(&["build", "--accel", "tcg", "--out"]).arg(out).arg(self.recipe(name));
        kiln.scenario(&guest(scenario))
    }

    /// One of the processes that build.
    fn builder(&self, builder: u64, mut dice: Dice) {
        for _ in 0..BUILDS {
            let name = dice.pick(&NAMES);
            let fills = self.fills.load(Ordering::SeqCst);
            let was_full = self.full.load(Ordering::SeqCst);
            let told = self.small.is_none() && dice.once_in(6);
            let running = self.build(builder, name, &if told { full_disk() } else { json!({}) }).start();
            let kill = dice.once_in(4);
            if kill {
                // Any moment will do.
                std::thread::sleep(Duration::from_millis(dice.below(600) as u64));
                running.signal(Signal::KILL);
            }
            let ran = running.end();
            let lacked_room = told || was_full || self.fills.load(Ordering::SeqCst) != fills;
            self.assert_fair(&format!("build of {name}"), &ran, kill, lacked_room);
        }
    }

    /// It went well, was killed, or had no room and says so.
    #[track_caller]
    fn assert_fair(&self, what: &str, ran: &Ran, killed: bool, lacked_room: bool) {
        let fair = match ran.code {
            Some(0) => true,
            None => killed,
            Some(4) => lacked_room && NO_ROOM.iter().any(|words| ran.stderr.contains(words)),
            Some(_) => false,
        };
        self.count(match ran.code {
            None => Told::Killed,
            Some(0) if what == "gc" && !ran.stdout.starts_with("removed 0 ") => Told::Removed,
            Some(0) => Told::Well,
            Some(_) => Told::NoRoom,
        });
        assert!(fair, "{what}: killed {killed}, lacked room {lacked_room}: {:?}\n{}", ran.code, ran.stderr);
    }

    fn count(&self, told: Told) {
        self.tally[told as usize].fetch_add(1, Ordering::SeqCst);
    }

    /// The process that does other things with the store.
    fn disturber(&self, mut dice: Dice) {
        let file = self.bench.path("kept.kiln");
        for _ in 0..DISTURBANCES {
            let name = dice.pick(&NAMES);
            let fills = self.fills.load(Ordering::SeqCst);
            let was_full = self.full.load(Ordering::SeqCst);
            let (what, kiln) = match dice.below(6) {
                0..3 => {
                    let keep = dice.pick(&["0B", "10MiB", "20MiB", "30MiB"]);
                    ("gc", self.kiln(&["cache", "gc", "--keep", keep]))
                }
                3 => ("export", self.kiln(&["cache", "export", "-o"]).arg(&file).arg(self.recipe(name))),
                4 if file.exists() => ("import", self.kiln(&["cache", "import"]).arg(&file)),
                _ => {
                    self.jump(&mut dice);
                    continue;
                }
            };
            let ran = kiln.run();
            self.assert_fair(what, &ran, false, was_full || self.fills.load(Ordering::SeqCst) != fills);
        }
    }

    /// Times of layers jump, as after a change of the clock.
    fn jump(&self, dice: &mut Dice) {
        let layers = std::fs::read_dir(self.outside("cache/layers")).into_iter().flatten().flatten();
        for layer in layers.map(|entry| entry.path()) {
            if dice.once_in(2) {
                // Another process may have removed it.
                let _ = touch(&layer.join(dice.pick(&["layer.json", "used"])), dice);
            }
        }
    }

    /// Takes the room away, for a moment each time.
    fn filler(&self, mut dice: Dice) {
        let Some(small) = &self.small else { return };
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(dice.below(1500) as u64));
            self.full.store(true, Ordering::SeqCst);
            self.fills.fetch_add(1, Ordering::SeqCst);
            small.fill(dice.pick(&[0, 100, 2000, 530_000]));
            std::thread::sleep(Duration::from_millis(dice.below(300) as u64));
            small.remount(ROOMY);
            self.full.store(false, Ordering::SeqCst);
        }
    }

    /// Every output is what a cold build gives, down to its block map.
    fn assert_outputs(&self) {
        for builder in 0..=BUILDERS {
            for (name, cold) in NAMES.iter().zip(&self.cold) {
                let folder = self.outside(&format!("out-{builder}")).join(name);
                if folder.exists() {
                    let warm = guest_state(&folder.join("disk.raw"));
                    let differences = differences(false, &warm, cold);
                    assert!(differences.is_empty(), "{name} differs from a cold build:\n{}", differences.join("\n"));
                    assert_blocks(&folder);
                }
            }
        }
    }
}

/// A scenario in which the guest is told that the host's disk is full.
fn full_disk() -> Value {
    let data = json!({
        "device": "", "node-name": "root", "operation": "write", "action": "stop", "nospace": true,
        "reason": "No space left on device",
    });
    json!({ "sync": [["event", "BLOCK_IO_ERROR", data], ["hang"]] })
}

/// All files of a recipe are of one time, so that what is copied doesn't tell when the test ran.
fn settle(folder: &Path) {
    let time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000);
    for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_symlink() {
            let seconds = rustix::fs::Timespec { tv_sec: 1_600_000_000, tv_nsec: 0 };
            let times = rustix::fs::Timestamps { last_access: seconds, last_modification: seconds };
            rustix::fs::utimensat(rustix::fs::CWD, &path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
            continue;
        }
        if path.is_dir() {
            settle(&path);
        }
        std::fs::File::open(&path).unwrap().set_modified(time).unwrap();
    }
}

#[track_caller]
fn assert_blocks(folder: &Path) {
    let manifest: Value = serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    let found = BlockMap::of_raw(&folder.join("disk.raw"), &Work::quiet(1)).unwrap().digest().to_string();
    let blocks = BlockMap::open(&folder.join("blocks")).unwrap().digest().to_string();
    assert_eq!((&manifest["digest"], blocks), (&json!(found), found.clone()), "{}", folder.display());
}

#[test]
fn concurrent_processes_share_a_store_whatever_happens_to_it() {
    let seed = std::env::var("KILN_MODEL_SEED").map_or(SEED, |text| text.parse().unwrap());
    let started = Instant::now();
    let mut dice = Dice::new(seed);
    let stress = Stress::new(&mut dice);
    let mut round = 0;
    while started.elapsed() < LAST_ROUND {
        eprintln!("KILN_MODEL_SEED={seed}, round {round}");
        let fork = |number: u64| Dice::new(seed ^ (round << 8) ^ (number << 32));
        std::thread::scope(|scope| {
            for builder in 0..BUILDERS {
                let stress = &stress;
                scope.spawn(move || stress.builder(builder, fork(builder)));
            }
            scope.spawn(|| stress.disturber(fork(BUILDERS)));
            scope.spawn(|| stress.filler(fork(BUILDERS + 1)));
        });
        stress.assert_outputs();
        // The store still works, with room and without concurrent processes.
        stress.build(BUILDERS, dice.pick(&NAMES), &json!({})).run().succeeded();
        stress.assert_outputs();
        wait_until("the end of every QEMU", || !stress.bench.any_qemu());
        stress.bench.forget();
        round += 1;
    }
    let tally = stress.tally.map(AtomicUsize::into_inner);
    eprintln!("killed, without room, well, removed something: {tally:?} in {round} rounds");
    assert!(tally.iter().all(|count| *count > 0), "everything happened at least once: {tally:?}");
}
