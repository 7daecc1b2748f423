//! What kiln takes of memory doesn't grow with the disk.

use super::Stage;

/// In KiB.
const LIMIT: u64 = 100 << 10;

#[test]
fn a_disk_of_64_gib_is_published_within_100_mib() {
    for publish in ["image_name = \"web-1\"\nbucket = \"images\"\n", "image_name = \"web-1\"\nvia = \"ebs\"\n"] {
        let stage = Stage::of(&format!("[disk]\nsize = \"64GiB\"\n[publish]\n{publish}"));
        let (ran, peak) = stage.publish().start().end_with_peak();
        stage.published(ran);
        assert!(peak < LIMIT, "kiln took {peak} KiB: {publish}");
    }
}
