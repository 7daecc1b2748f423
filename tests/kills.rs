//! `kill -9` at any moment of a build: what is in the store afterwards is whole, nothing runs on, and nothing half-made
//! has a name of its own.

use std::time::{Duration, Instant};

use kiln::disk::{BlockMap, Work};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Bench, Running};

const ROUNDS: u32 = 10;
const KILLS: u32 = 5;
/// Where the moments come from. Another seed gives other moments; which code they meet depends on the host as well.
const SEED: u64 = 0x6b69_6c6e;

/// Marsaglia's xorshift64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u32) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        u32::try_from(self.0 % u64::from(end)).unwrap()
    }
}

/// Four steps of which some have changed since the last time: what is before them comes out of the store.
struct Changing<'a> {
    bench: &'a Bench,
    scripts: [u64; 4],
    changes: u64,
}

impl Changing<'_> {
    fn change(&mut self, step: usize) {
        self.changes += 1;
        self.scripts[step] = self.changes;
        let step = |(number, script): (usize, &u64)| {
            // Memory is kept after some and left to the layer's disk after others.
            format!("[[provision]]\nname = \"s{number}\"\ninline = \"{script}\"\ncheckpoint = {}\n", number % 2 == 0)
        };
        self.bench.recipe(&self.scripts.iter().enumerate().map(step).collect::<String>());
    }

    /// A build that nobody kills, after a change: how long it took.
    #[track_caller]
    fn timed(&mut self, step: usize) -> Duration {
        self.change(step);
        let started = Instant::now();
        let ran = self.start().end();
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "nothing is amiss");
        started.elapsed()
    }

    fn start(&self) -> Running {
        // A step that takes a moment, so that there is one to be killed in.
        self.bench.build(&json!({ "step s2": [["sleep", 0.02]], "qmp stop": [["memory", 1 << 20]] })).start()
    }
}

fn manifest(bench: &Bench) -> Option<Value> {
    let text = std::fs::read(bench.path("out/web/manifest.json")).ok()?;
    Some(serde_json::from_slice(&text).expect("a manifest is whole"))
}

/// The output, if there is one, is whole and right.
#[track_caller]
fn assert_output(bench: &Bench, digest: &Value, at: &str) {
    let Some(manifest) = manifest(bench) else {
        assert!(!bench.path("out/web").exists(), "{at}: a folder without a manifest");
        return;
    };
    assert_eq!(manifest["digest"], *digest, "{at}: what the manifest says");
    let found = BlockMap::of_raw(&bench.path("out/web/disk.raw"), &Work::quiet(2)).unwrap();
    assert_eq!(found.digest().to_string(), digest.as_str().unwrap(), "{at}: what the disk is");
}

/// Fifty kills at moments spread over the whole build, five in a row each time before one is let through.
#[test]
fn fifty_kills_leave_a_store_that_works() {
    let bench = Bench::new();
    let mut work = Changing { bench: &bench, scripts: [0; 4], changes: 0 };
    work.change(0);
    work.start().end().succeeded();
    // How long a build takes where this step is the first that has changed.
    let mut whole = [0, 1, 2, 3].map(|step| work.timed(step));
    let digest = manifest(&bench).unwrap()["digest"].clone();
    let mut dice = Dice(SEED);
    let mut killed = 0;
    for round in 0..ROUNDS {
        for kill in 0..KILLS {
            let step = dice.below(4) as usize;
            work.change(step);
            // A fiftieth of the build for each, in an order that no build repeats, and anywhere in it.
            let moment = whole[step] * ((round + kill * ROUNDS) * 1000 + dice.below(1000)) / (ROUNDS * KILLS * 1000);
            let at = format!("round {round}, kill {kill}, after {moment:?}");
            let kiln = work.start();
            std::thread::sleep(moment);
            kiln.signal(Signal::KILL);
            let ran = kiln.end();
            killed += u32::from(ran.code.is_none());
            assert!(matches!(ran.code, None | Some(0)), "{at}: {}", ran.stderr);
            crate::support::wait_until("the end of every QEMU", || !bench.any_qemu());
            assert_output(&bench, &digest, &at);
        }
        let step = dice.below(4) as usize;
        whole[step] = work.timed(step);
        bench.assert_tidy(&["web"]);
        assert_output(&bench, &digest, &format!("round {round}"));
        assert_eq!(bench.names("cache/locks"), [""; 0]);
        let qemus = bench.qemus().len();
        assert_eq!(work.start().end().succeeded(), "out/web\n");
        assert_eq!(bench.qemus().len(), qemus, "nothing is left to do");
        bench.forget();
    }
    assert!(killed * 10 > ROUNDS * KILLS * 7, "only {killed} were still running");
}
