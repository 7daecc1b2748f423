//! Everything that can go wrong: what kiln says, how it ends, and that it leaves nothing behind.

mod guests;
mod host;
mod inputs;

use serde_json::Value;

use crate::support::Bench;

/// Builds `web.toml`, which must fail with `code`, over an output of an earlier build, which must stay as it is.
/// `left` is what is new in the out folder. What kiln says.
#[track_caller]
fn fails(bench: &Bench, scenario: &Value, code: i32, left: &[&str]) -> String {
    fails_with(bench, bench.build(scenario), code, left)
}

#[track_caller]
fn fails_with(bench: &Bench, kiln: crate::support::Kiln, code: i32, left: &[&str]) -> String {
    bench.earlier_output();
    let said = kiln.run().failed(code);
    bench.assert_earlier_output();
    bench.assert_tidy(&[&["web"], left].concat());
    for name in left {
        let kept = bench.names(&format!("out/{name}"));
        assert!(!kept.contains(&"disk.raw".to_owned()), "a failed build keeps no disk: {kept:?}");
        assert!(kept.contains(&"build.log".to_owned()), "{kept:?}");
    }
    if let Some(log) = said.lines().find_map(|line| line.trim_start().strip_prefix("= log: ")) {
        assert!(bench.path(log).is_file(), "the log that is named is there: {log}");
    }
    said
}
