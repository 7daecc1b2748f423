//! The disk of the guest that the fake QEMU plays (`fixtures/fake-qemu/guest.py`), read from a raw disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use super::Bench;

/// Where the guest's document is on its disk.
const PLACE: u64 = 64 << 20;
const MAGIC: &[u8] = b"fakedisk";
/// Magic, length and checksum.
const HEADER: usize = 8 + 8 + 4;

/// The document of a guest's disk: `files` and `enabled` services; null if no guest has written one.
///
/// # Panics
/// If the disk can't be read, or the document is damaged.
#[track_caller]
pub(crate) fn guest_state(disk: &Path) -> Value {
    let file = File::open(disk).unwrap();
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, PLACE).unwrap();
    if header == [0; HEADER] {
        return Value::Null;
    }
    assert_eq!(&header[..8], MAGIC, "{}: not a guest's document", disk.display());
    let length = u64::from_be_bytes(header[8..16].try_into().unwrap());
    let mut document = vec![0; usize::try_from(length).unwrap()];
    file.read_exact_at(&mut document, PLACE + HEADER as u64).unwrap();
    let mut sum = flate2::Crc::new();
    sum.update(&document);
    assert_eq!(sum.sum().to_be_bytes(), header[16..], "{}: the document is damaged", disk.display());
    serde_json::from_slice(&document).unwrap()
}

/// A scenario with a guest that has a disk and a memory, and with `more` moments.
pub(crate) fn guest(more: &Value) -> Value {
    let mut scenario = json!({ "guest": true });
    scenario.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    scenario
}

impl Bench {
    /// The document on the disk in an output folder.
    #[track_caller]
    pub(crate) fn guest_state(&self, folder: &str) -> Value {
        guest_state(&self.path(folder).join("disk.raw"))
    }
}
