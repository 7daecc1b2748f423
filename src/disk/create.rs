//! Writing a fresh overlay.

use super::Error;
use super::copy::confirm;
use super::layout::{Backing, CLUSTER_BITS, Content, NewOverlay, Piece};
use super::overlay::Overlay;
use super::table::Patch;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// 64 KiB.
const CLUSTER: u64 = 1 << CLUSTER_BITS;

impl Overlay {
    /// Writes a new qcow2 overlay of `size` bytes over `backing`, with the patches applied in their order. A backing
    /// file shorter than `size` is followed by zeros.
    ///
    /// The header names the backing file as it is named here: a relative name is looked for from the overlay's folder.
    /// Only a raw file can be patched. `path` must not exist; if anything fails, it does not exist afterwards either.
    ///
    /// # Errors
    /// [`Error::Create`], [`Error::Write`], [`Error::NoSpace`]; [`Error::Open`] and [`Error::Read`] for the backing
    /// file; [`Error::OddSize`]; [`Error::Overlay`] if a patch lies outside the disk or the size or name is too large.
    pub fn create(path: &Path, size: u64, backing: Backing<'_>, patches: &[Patch]) -> Result<(), Error> {
        let refused = |what: String| Error::Overlay { path: path.to_owned(), what };
        let outside = |patch: &&Patch| patch.offset > size || patch.bytes.len() as u64 > size - patch.offset;
        if let Some(patch) = patches.iter().find(outside) {
            return Err(refused(format!("a patch at byte {} lies outside its {size} bytes", patch.offset)));
        }
        let pieces = match backing {
            Backing::Raw(name) => {
                let base = path.parent().unwrap_or(Path::new("")).join(name);
                let file = File::open(&base).map_err(|source| Error::open(&base, source))?;
                fill(&file, &base, patches)?
            }
            Backing::Overlay(_) if patches.is_empty() => Vec::new(),
            Backing::Overlay(_) => return Err(refused("an overlay can't be patched over another".to_owned())),
        };
        let new = NewOverlay { path, size, cluster_bits: CLUSTER_BITS, backing, pieces: &pieces };
        new.write(|bytes, file, at| file.write_all_at(bytes, at).map_err(|source| Error::write(path, source)), confirm)
    }
}

/// The indices of the clusters that the patches touch, in order.
fn clusters_of(patches: &[Patch]) -> Vec<u64> {
    let touched = |patch: &Patch| {
        let end = patch.offset + patch.bytes.len() as u64;
        patch.offset / CLUSTER..end.div_ceil(CLUSTER)
    };
    let mut all: Vec<u64> = patches.iter().filter(|patch| !patch.bytes.is_empty()).flat_map(touched).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The touched clusters with what they hold: the patches, and around them what the backing file has.
fn fill(base: &File, path: &Path, patches: &[Patch]) -> Result<Vec<Piece<Vec<u8>>>, Error> {
    let mut pieces = Vec::new();
    for index in clusters_of(patches) {
        let start = index * CLUSTER;
        let mut bytes = read_padded(base, start).map_err(|source| Error::read(path, start, source))?;
        for patch in patches {
            let from = patch.offset.max(start);
            let to = (patch.offset + patch.bytes.len() as u64).min(start + CLUSTER);
            if from < to {
                let within = |at: u64, base: u64| usize::try_from(at - base).unwrap_or_default();
                let source = &patch.bytes[within(from, patch.offset)..within(to, patch.offset)];
                bytes[within(from, start)..within(to, start)].copy_from_slice(source);
            }
        }
        pieces.push(Piece { clusters: index..index + 1, content: Content::Data(bytes) });
    }
    Ok(pieces)
}

/// A cluster of the backing file, with zeros past its end.
fn read_padded(base: &File, start: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; 1 << CLUSTER_BITS];
    let mut filled = 0;
    while filled < bytes.len() {
        match base.read_at(&mut bytes[filled..], start + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{Workshop, apply, cases, text, tool};
    use proptest::prelude::*;

    #[test]
    fn qemu_knows_it_as_its_own() {
        let shop = Workshop::new();
        let (base, disk) = (shop.path("base.raw"), shop.path("disk.qcow2"));
        std::fs::write(&base, [7; 1000]).unwrap();
        Overlay::create(&disk, 1 << 30, Backing::Raw(&base), &[]).unwrap();
        let info = tool("qemu-img", &["info", "--output=json", text(&disk)]);
        for fact in [
            "\"virtual-size\": 1073741824",
            "\"backing-filename-format\": \"raw\"",
            "\"compat\": \"1.1\"",
            "\"lazy-refcounts\": false",
            "\"refcount-bits\": 16",
            "\"cluster-size\": 65536",
            text(&base),
        ] {
            assert!(info.contains(fact), "{fact}: {info}");
        }
        tool("qemu-img", &["check", text(&disk)]);
    }

    #[test]
    fn what_cannot_be_made() {
        let shop = Workshop::new();
        let (base, disk) = (shop.path("base.raw"), shop.path("disk.qcow2"));
        std::fs::write(&base, [7; 1000]).unwrap();
        let create = |size, patches: &[Patch]| Overlay::create(&disk, size, Backing::Raw(&base), patches).unwrap_err();
        assert!(matches!(create(1000, &[]), Error::OddSize { size: 1000 }));
        let outside = create(1024, &[Patch { offset: 1020, bytes: vec![0; 5] }]).to_string();
        assert!(outside.ends_with("a patch at byte 1020 lies outside its 1024 bytes"), "{outside}");
        assert!(create(1024, &[Patch { offset: u64::MAX, bytes: vec![0; 5] }]).to_string().contains("outside"));
        assert!(create(1 << 62, &[]).to_string().contains("QEMU's limit"));
        assert!(!disk.exists());
        std::fs::write(&disk, "precious").unwrap();
        assert!(matches!(create(1024, &[]), Error::Create { .. }));
        let missing = Overlay::create(&shop.path("new"), 1024, Backing::Raw(&shop.path("none")), &[]).unwrap_err();
        assert!(matches!(missing, Error::Open { .. }));
    }

    #[test]
    fn large_disks_and_many_clusters() {
        let shop = Workshop::new();
        let (base, disk) = (shop.path("base.raw"), shop.path("disk.qcow2"));
        std::fs::write(&base, []).unwrap();
        let patch = |offset| Patch { offset, bytes: vec![1; 512] };
        let size = 16 << 40;
        Overlay::create(&disk, size, Backing::Raw(&base), &[patch(size - 512), patch(0), patch(5 << 40)]).unwrap();
        tool("qemu-img", &["check", text(&disk)]);
        tool("qemu-io", &["-r", "-f", "qcow2", "-c", &format!("read -P 1 {} 512", size - 512), text(&disk)]);
    }

    proptest! {
        #![proptest_config(cases(24))]
        #[test]
        fn patched_as_qemu_reads_it(
            base_len in 0_usize..400_000, size in 1_u64..1200,
            patches in proptest::collection::vec((0.0..1.0, 0_usize..200_000, any::<u8>()), 0..8),
        ) {
            let shop = Workshop::new();
            let [base, disk, wanted, found] = ["base", "disk", "wanted", "found"].map(|name| shop.path(name));
            let size = size * 512;
            let bytes: Vec<u8> = (0..base_len).map(|n| u8::try_from(n % 251).unwrap()).collect();
            std::fs::write(&base, &bytes).unwrap();
            std::fs::write(&wanted, &bytes).unwrap();
            let place = |(part, len, byte): &(f64, usize, u8)| {
                #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, clippy::cast_sign_loss)]
                let offset = (size as f64 * part) as u64;
                Patch { offset, bytes: vec![*byte; (*len).min(usize::try_from(size - offset).unwrap())] }
            };
            let patches: Vec<_> = patches.iter().map(place).collect();
            Overlay::create(&disk, size, Backing::Raw(&base), &patches).unwrap();
            apply(&wanted, size, &patches);
            tool("qemu-img", &["check", text(&disk)]);
            tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&disk), text(&found)]);
            prop_assert!(std::fs::read(&wanted).unwrap() == std::fs::read(&found).unwrap());
        }
    }
}
