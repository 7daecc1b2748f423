//! Writing a fresh overlay.

use super::copy::confirm;
use super::overlay::Overlay;
use super::qcow2::{BACKING_NAME_LIMIT, COPIED, L1_LIMIT, NewHeader};
use super::table::Patch;
use super::{Error, SECTOR};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

const CLUSTER_BITS: u32 = 16;
/// 64 KiB.
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of an L1, L2 or reference count table per cluster.
const ENTRIES: u64 = CLUSTER / 8;
/// 16-bit reference counts per cluster.
const REFCOUNTS: u64 = CLUSTER / 2;

/// What is behind an overlay.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// A raw file.
    Raw(&'a Path),
    /// Another overlay, which need not be there yet.
    Overlay(&'a Path),
}

impl<'a> Backing<'a> {
    fn path(self) -> &'a Path {
        match self {
            Self::Raw(path) | Self::Overlay(path) => path,
        }
    }

    fn format(self) -> &'static str {
        match self {
            Self::Raw(_) => "raw",
            Self::Overlay(_) => "qcow2",
        }
    }
}

impl Overlay {
    /// Writes a new qcow2 overlay of `size` bytes over `backing`, with the patches applied in their order, and syncs
    /// it. A backing file shorter than `size` is followed by zeros.
    ///
    /// The header names the backing file as it is named here: a relative name is looked for from the overlay's folder.
    /// Only a raw file can be patched. `path` must not exist; if anything fails, it does not exist afterwards either.
    ///
    /// # Errors
    /// [`Error::Create`], [`Error::Write`], [`Error::NoSpace`]; [`Error::Open`] and [`Error::Read`] for the backing
    /// file; [`Error::OddSize`]; [`Error::Overlay`] if a patch lies outside the disk or the size or name is too large.
    pub fn create(path: &Path, size: u64, backing: Backing<'_>, patches: &[Patch]) -> Result<(), Error> {
        let refused = |what: String| Error::Overlay { path: path.to_owned(), what };
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::OddSize { size });
        }
        let name = backing.path().as_os_str().as_bytes();
        if name.len() > BACKING_NAME_LIMIT {
            return Err(refused(format!("its backing file's path is longer than {BACKING_NAME_LIMIT} bytes")));
        }
        if size.div_ceil(CLUSTER * ENTRIES) * 8 > L1_LIMIT {
            return Err(refused(format!("{size} bytes are more than QEMU's limit")));
        }
        let outside = |patch: &&Patch| patch.offset > size || patch.bytes.len() as u64 > size - patch.offset;
        if let Some(patch) = patches.iter().find(outside) {
            return Err(refused(format!("a patch at byte {} lies outside its {size} bytes", patch.offset)));
        }
        let layout = Layout::of(size, &clusters_of(patches));
        let clusters = match backing {
            Backing::Raw(name) => {
                let base = path.parent().unwrap_or(Path::new("")).join(name);
                let file = File::open(&base).map_err(|source| Error::open(&base, source))?;
                fill(&file, &base, patches)?
            }
            Backing::Overlay(_) if patches.is_empty() => BTreeMap::new(),
            Backing::Overlay(_) => return Err(refused("an overlay can't be patched over another".to_owned())),
        };
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|source| Error::create(path, source))?;
        layout.write(&file, backing, &clusters).map_err(|source| {
            // What is left is of no use to anybody; the error that matters is the first.
            let _ = std::fs::remove_file(path);
            Error::write(path, source)
        })
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
fn fill(base: &File, path: &Path, patches: &[Patch]) -> Result<BTreeMap<u64, Vec<u8>>, Error> {
    let mut clusters = BTreeMap::new();
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
        clusters.insert(index, bytes);
    }
    Ok(clusters)
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

/// Where everything goes, in clusters: the header; then the reference count table and its blocks; the L1 table; the
/// L2 tables; the data.
#[derive(Debug)]
struct Layout {
    size: u64,
    table_clusters: u64,
    block_clusters: u64,
    l1_entries: u64,
    l1_clusters: u64,
    /// The indices of the L1 entries in use, in order.
    l2: Vec<u64>,
    total: u64,
}

impl Layout {
    fn of(size: u64, clusters: &[u64]) -> Self {
        // QEMU keeps at least one L1 entry.
        let l1_entries = size.div_ceil(CLUSTER * ENTRIES).max(1);
        let l1_clusters = l1_entries.div_ceil(ENTRIES);
        let mut l2: Vec<u64> = clusters.iter().map(|index| index / ENTRIES).collect();
        l2.dedup();
        let fixed = 1 + l1_clusters + l2.len() as u64 + clusters.len() as u64;
        let (mut table_clusters, mut block_clusters) = (1, 1);
        loop {
            let total = fixed + table_clusters + block_clusters;
            let blocks = total.div_ceil(REFCOUNTS);
            let tables = blocks.div_ceil(ENTRIES);
            if (tables, blocks) == (table_clusters, block_clusters) {
                return Self { size, table_clusters, block_clusters, l1_entries, l1_clusters, l2, total };
            }
            (table_clusters, block_clusters) = (tables, blocks);
        }
    }

    fn blocks_at(&self) -> u64 {
        (1 + self.table_clusters) * CLUSTER
    }

    fn l1_at(&self) -> u64 {
        self.blocks_at() + self.block_clusters * CLUSTER
    }

    fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1_clusters * CLUSTER
    }

    fn data_at(&self) -> u64 {
        self.l2_at() + self.l2.len() as u64 * CLUSTER
    }

    /// Writes the file, its header last: what a killed kiln has half written is no overlay.
    fn write(&self, file: &File, backing: Backing<'_>, clusters: &BTreeMap<u64, Vec<u8>>) -> std::io::Result<()> {
        file.set_len(self.total * CLUSTER)?;
        file.write_all_at(&numbers((0..self.block_clusters).map(|i| self.blocks_at() + i * CLUSTER)), CLUSTER)?;
        let ones: Vec<u8> = (0..self.total).flat_map(|_| 1_u16.to_be_bytes()).collect();
        file.write_all_at(&ones, self.blocks_at())?;

        let mut l1 = vec![0; usize::try_from(self.l1_entries).unwrap_or_default()];
        let mut l2 = vec![0; self.l2.len() << (CLUSTER_BITS - 3)];
        for (position, index) in (0_u64..).zip(&self.l2) {
            l1[usize::try_from(*index).unwrap_or_default()] = (self.l2_at() + position * CLUSTER) | COPIED;
        }
        for (position, (index, bytes)) in (0_u64..).zip(clusters) {
            let at = self.data_at() + position * CLUSTER;
            let table = self.l2.partition_point(|used| *used < index / ENTRIES) as u64;
            l2[usize::try_from(table * ENTRIES + index % ENTRIES).unwrap_or_default()] = at | COPIED;
            file.write_all_at(bytes, at)?;
        }
        file.write_all_at(&numbers(l1), self.l1_at())?;
        file.write_all_at(&numbers(l2), self.l2_at())?;
        file.write_all_at(&self.header(backing).bytes(), 0)?;
        confirm(file)
    }

    fn header<'a>(&self, backing: Backing<'a>) -> NewHeader<'a> {
        NewHeader {
            size: self.size,
            cluster_bits: CLUSTER_BITS,
            // Both are small: the L1 table has at most 32 MiB, and each of its entries can use 16 GiB of file.
            l1_entries: u32::try_from(self.l1_entries).unwrap_or(u32::MAX),
            l1_offset: self.l1_at(),
            refcount_table_offset: CLUSTER,
            refcount_table_clusters: u32::try_from(self.table_clusters).unwrap_or(u32::MAX),
            backing: backing.path().as_os_str().as_bytes(),
            backing_format: backing.format(),
        }
    }
}

fn numbers(values: impl IntoIterator<Item = u64>) -> Vec<u8> {
    values.into_iter().flat_map(u64::to_be_bytes).collect()
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

    #[test]
    fn the_tables_cover_themselves() {
        for count in [0, 1, 32_000, 32_763, 32_764, 32_768, 100_000] {
            let layout = Layout::of(1 << 40, &(0..count).collect::<Vec<_>>());
            assert!(layout.block_clusters * REFCOUNTS >= layout.total, "{count}");
            assert_eq!(layout.data_at() / CLUSTER + count, layout.total);
        }
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
