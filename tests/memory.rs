//! kiln's own memory does not grow with what passes through it.

use serde_json::json;

use crate::support::{Base, Bench, append_data, write_base};

const MIB: u64 = 1 << 20;
/// Of data in the base, and of the guest's memory.
const PASSED: u64 = 160 * MIB;
/// What kiln may take, in KiB.
const LIMIT: u64 = 100 << 10;

#[test]
fn a_build_of_hundreds_of_megabytes_takes_less_than_a_hundred() {
    let bench = Bench::empty();
    write_base(&bench.path("base.raw"), Base::LargeInitrd);
    bench.one_step();
    append_data(&bench.path("base.raw"), PASSED);
    let saves = json!([["memory", PASSED]]);
    // Unpacks the base, boots it and keeps the guest; then there is no need to go on.
    let fails = bench.build(&json!({ "qmp stop": saves, "step hello": [["status", 1]] }));
    let (ran, first) = fails.start().end_with_peak();
    assert_eq!(ran.code, Some(5), "{}", ran.stderr);
    // Takes the guest up, keeps it again, writes the disk and sums it.
    bench.write("web.toml", bench.read("web.toml") + "checkpoint = true\n");
    let (ran, second) = bench.build(&json!({ "qmp stop": saves })).arg("--sha256").start().end_with_peak();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let restored = bench.read(&format!("traces/{}", bench.traces("restored-")[0]));
    assert!(restored.split(' ').next().unwrap().parse::<u64>().unwrap() == PASSED, "{restored}");
    let manifest: serde_json::Value = serde_json::from_str(&bench.read("out/web/manifest.json")).unwrap();
    assert!(manifest["data_bytes"].as_u64().unwrap() > PASSED && manifest["sha256"].is_string());
    assert!(first < LIMIT && second < LIMIT, "kiln took {first} and {second} KiB");
    bench.assert_tidy(&["web"]);
}
