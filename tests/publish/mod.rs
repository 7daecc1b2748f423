//! Publishing, against a real endpoint: what it makes there, what it says of every refusal, and that nothing stays
//! behind. The disk comes from a build with the fake QEMU.

mod again;
mod denied;
mod ebs;
mod every_step;
mod fields;
mod holes;
mod made;
mod memory;
mod object;
mod parent;
mod places;
mod plan;
mod quotas;
mod refused;
mod regions;
mod release;
mod second;
mod stopped;
mod upload;
mod wire;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Aws, Base, Bench, Kiln, Ran, Running, append_data, append_hole, tool, wait_until, write_base};

/// A built disk of 1 GiB, and an endpoint to publish it to.
struct Stage {
    bench: Bench,
    aws: Aws,
    disk: (u64, i64, i64),
}

/// How many parts S3 is given of a stage's disk.
const PARTS: u64 = 26;
/// How many it is given of the scratch object, which most of those are copied from.
const SCRATCH: u64 = 14;
/// How many of the scratch object's are sent, before the first of the disk.
const JOINTS: u64 = 1;
/// Nothing at the endpoint: no objects, no unfinished uploads, no snapshots, no images, no running imports.
const NOTHING: [u64; 5] = [0; 5];
/// What a published image leaves there.
const ONE_IMAGE: [u64; 5] = [0, 0, 1, 1, 0];

impl Stage {
    fn new() -> Self {
        Self::with("")
    }

    /// With more lines in the recipe's `[publish]`.
    fn with(more: &str) -> Self {
        let recipe = "[publish]\nimage_name = \"web-1\"\nbucket = \"images\"\ndescription = \"a page\"\n\
                      tags = { team = \"web & co\" }\n";
        Self::of(&format!("{recipe}{more}"))
    }

    /// Of little data, that goes by EBS direct, to be quick; with more lines in the recipe's `[publish]`.
    fn small(more: &str) -> Self {
        let bench = Bench::empty();
        write_base(&bench.path("base.raw"), Base::Mbr);
        bench.recipe(&format!("[publish]\nimage_name = \"web-1\"\nvia = \"auto\"\n{more}"));
        bench.build(&json!({})).run().succeeded();
        let disk = stamp(&bench);
        Self { bench, aws: Aws::start(), disk }
    }

    /// Of a recipe with these tables.
    fn of(recipe: &str) -> Self {
        Self::on(recipe, |base| {
            // Enough for several parts, and then some that is too short for one.
            append_data(base, 40 << 20);
            for _ in 0..2 {
                append_hole(base, 60 << 20);
                append_data(base, 300 << 10);
            }
        })
    }

    /// On a base that was changed so.
    fn on(recipe: &str, change: impl FnOnce(&Path)) -> Self {
        let bench = Bench::empty();
        write_base(&bench.path("base.raw"), Base::Mbr);
        change(&bench.path("base.raw"));
        bench.recipe(recipe);
        bench.build(&json!({})).run().succeeded();
        let disk = stamp(&bench);
        Self { bench, aws: Aws::start(), disk }
    }

    fn publish(&self) -> Kiln {
        self.aws.with(self.bench.kiln(["-q", "publish", "out/web"]))
    }

    /// A publish that waits for its import, which goes on for ever.
    fn importing(&self) -> Running {
        self.aws.control("POST", "import", Some(&json!({ "hold": true })));
        let kiln = self.publish().start();
        wait_until("the import", || self.aws.resources()[4] == 1);
        kiln
    }

    /// Publishing fails with `code`; nothing of it is left at the endpoint but `left`, and the disk is as it was.
    #[track_caller]
    fn fails(&self, kiln: Kiln, code: i32, left: [u64; 5]) -> String {
        let said = kiln.run().failed(code);
        self.assert_left(left);
        said
    }

    #[track_caller]
    fn assert_left(&self, left: [u64; 5]) {
        assert_eq!(self.aws.resources(), left, "objects, uploads, snapshots, images, imports that are left");
        assert_eq!(stamp(&self.bench), self.disk, "the disk is as it was");
        assert!(!self.bench.path("out/web/published.json").exists(), "nothing was published");
    }

    /// The image's id, after publishing went well.
    #[track_caller]
    fn published(&self, ran: Ran) -> String {
        let line = ran.succeeded();
        let (region, image) = line.trim_end().split_once(' ').unwrap();
        assert_eq!(region, "us-east-1");
        assert!(image.starts_with("ami-"), "{line}");
        assert_eq!(self.aws.resources(), ONE_IMAGE, "one snapshot and one image");
        image.to_owned()
    }

    /// The snapshot that was published last has the disk's bytes.
    #[track_caller]
    fn assert_arrived(&self) {
        let published = self.remembered();
        let last = published.as_array().unwrap().last().unwrap();
        let url = format!("{}/kiln-test/snapshots/{}", self.aws.url(), last["snapshot_id"].as_str().unwrap());
        // Written to a file first, a gibibyte of zeros would take longer than all the rest.
        let compare = "curl -fsS --max-time 120 \"$0\" | cmp - \"$1\"";
        tool(Command::new("sh").args(["-c", compare, &url]).arg(self.bench.path("out/web/disk.raw")), "");
    }

    /// The requests of an action for the disk's own object.
    fn for_disk(&self, action: &str) -> Vec<Value> {
        let mut requests = self.aws.requests(action);
        requests.retain(|call| call["resource"].as_str().unwrap().rsplit('.').next() == Some("raw"));
        requests
    }

    /// What `published.json` says.
    #[track_caller]
    fn remembered(&self) -> Value {
        serde_json::from_str(&self.bench.read("out/web/published.json")).unwrap()
    }
}

/// Size and time of the last change of the built disk.
fn stamp(bench: &Bench) -> (u64, i64, i64) {
    let metadata = std::fs::metadata(bench.path("out/web/disk.raw")).unwrap();
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

/// The word in `said` that starts with `prefix`: an id that only the endpoint knew.
#[track_caller]
fn word(said: &str, prefix: &str) -> String {
    let words = said.split(|c: char| c.is_whitespace() || c == ',' || c == '`');
    let found = words.filter(|word| word.starts_with(prefix)).max_by_key(|word| word.len());
    found.unwrap_or_else(|| panic!("no {prefix} in: {said}")).to_owned()
}

/// The object's key has the disk's digest: it is left out.
fn without_key(said: &str) -> String {
    let start = "s3://images/web-";
    match said.split_once(start) {
        Some((before, after)) => {
            let rest = &after[after.find(".raw").unwrap()..];
            format!("{before}{start}KEY{}", without_key(rest))
        }
        None => said.to_owned(),
    }
}
