//! Reading an overlay that kiln made and QEMU wrote to.

use super::image::{ReadAt, Stored};
use super::qcow2::{Cluster, Header, l2_offset};
use super::{Error, Image};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// An overlay on an overlay on …: more is a circle.
const CHAIN_LIMIT: usize = 64;

/// How far [`ReadAt::next_data`] looks for the end of a run at once, in bytes: each call costs this much at most, even
/// where the backing file is a patchwork of holes.
const LOOK: u64 = 16 << 20;

/// Where the bytes of an [`Extent`] come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// From the overlay's own file, from this offset (in bytes) on. Past the file's end, zeros.
    Data {
        /// Offset in the overlay's file, in bytes.
        host_offset: u64,
    },
    /// Zeros that the overlay only notes. Not `allocated`: QEMU gave the space back, as it does for a discard.
    /// `allocated`: zeros were written over data, and the space is kept.
    Zero {
        /// Whether the file keeps space for them.
        allocated: bool,
    },
    /// Never written here: from the backing file; past its end, zeros.
    Backing,
}

/// A run of bytes of one kind; offsets and lengths in bytes of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub start: u64,
    /// How long it is.
    pub len: u64,
    /// Where its bytes come from.
    pub kind: ExtentKind,
}

/// An open qcow2 overlay with what backs it: a raw file, or another overlay.
///
/// All tables are read when it is opened, which takes 1/8192 of the written size in memory. Nobody may write to the
/// files meanwhile.
pub struct Overlay {
    path: PathBuf,
    file: File,
    file_len: u64,
    header: Header,
    /// One L2 table per L1 entry, if there is one.
    tables: Vec<Option<Box<[u64]>>>,
    backing: Option<Image>,
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay").field("path", &self.path).field("header", &self.header).finish_non_exhaustive()
    }
}

impl Overlay {
    /// Opens an overlay for reading, as QEMU 7.2 to 10 leave it, also after a crash (dirty reference counts).
    ///
    /// A backing file is opened by the name in the header, relative to the overlay's folder; its format must be noted
    /// as `raw` or `qcow2`.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Read`]; [`Error::Qcow2Unsupported`] for anything the specification calls
    /// incompatible that is not known here, for compressed clusters and for extended L2 entries;
    /// [`Error::Qcow2Damaged`], also if the file was cut short.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_chained(path, CHAIN_LIMIT)
    }

    fn open_chained(path: &Path, limit: usize) -> Result<Self, Error> {
        let read_error = |source| Error::read(path, 0, source);
        let file = File::open(path).map_err(|source| Error::open(path, source))?;
        let file_len = ReadAt::size(&file).map_err(read_error)?;
        let mut first = vec![0; usize::try_from(file_len.min(64 << 10)).unwrap_or_default()];
        file.read_exact_at(&mut first, 0).map_err(read_error)?;
        let header = Header::parse(path, &first)?;
        let backing = match &header.backing {
            Some(name) => Some(open_backing(path, name, header.backing_format.as_deref(), limit)?),
            None => None,
        };
        let mut overlay = Self { path: path.to_owned(), file, file_len, header, tables: Vec::new(), backing };
        overlay.tables = overlay.read_tables()?;
        Ok(overlay)
    }

    /// The size of the guest's disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// The path of the file behind it, if there is one.
    #[must_use]
    pub fn backing(&self) -> Option<&Path> {
        self.backing.as_ref().map(Image::path)
    }

    /// The whole disk as runs, in order and without gaps, neighbours of one kind merged.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let extent = (at < self.size()).then(|| self.extent_at(at, self.size()))?;
            at += extent.len;
            Some(extent)
        })
    }

    fn cluster_size(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    fn damaged(&self, what: &str) -> Error {
        Error::Qcow2Damaged { path: self.path.clone(), what: what.to_owned() }
    }

    /// `count` big-endian numbers at `offset`.
    fn numbers(&self, offset: u64, count: u64) -> Result<Box<[u64]>, Error> {
        if !offset.is_multiple_of(self.cluster_size())
            || offset.checked_add(count * 8).is_none_or(|end| end > self.file_len)
        {
            return Err(self.damaged("a table lies outside the file"));
        }
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, offset).map_err(|source| Error::read(&self.path, offset, source))?;
        let number = |chunk: &[u8]| chunk.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
        Ok(bytes.chunks_exact(8).map(number).collect())
    }

    fn read_tables(&self) -> Result<Vec<Option<Box<[u64]>>>, Error> {
        let entries = self.cluster_size() / 8;
        let l1 = self.numbers(self.header.l1_offset, self.header.l1_entries)?;
        // Each table has a cluster of its own, so a sound file cannot ask for more memory than it is long.
        let used = l1.iter().filter(|entry| l2_offset(**entry) != 0).count() as u64;
        if used > self.file_len / self.cluster_size() {
            return Err(self.damaged("its L1 table names one L2 table twice"));
        }
        let mut tables = Vec::with_capacity(l1.len());
        for offset in l1.iter().map(|entry| l2_offset(*entry)) {
            let table = (offset != 0).then(|| self.numbers(offset, entries)).transpose()?;
            table.iter().flatten().try_for_each(|entry| self.check(*entry))?;
            tables.push(table);
        }
        Ok(tables)
    }

    fn check(&self, entry: u64) -> Result<(), Error> {
        match Cluster::of(entry) {
            Cluster::Compressed => {
                let feature = "compressed clusters".to_owned();
                Err(Error::Qcow2Unsupported { path: self.path.clone(), feature })
            }
            Cluster::Data(offset) if offset % self.cluster_size() != 0 => Err(self.damaged("a cluster is misplaced")),
            Cluster::Data(offset) if offset >= self.file_len => Err(self.damaged("it was cut short")),
            _ => Ok(()),
        }
    }

    /// The L2 table that describes byte `at`, and the index of `at`'s cluster in it.
    fn table_at(&self, at: u64) -> (Option<&[u64]>, usize) {
        let entries_bits = self.header.cluster_bits - 3;
        let cluster = at >> self.header.cluster_bits;
        let table = usize::try_from(cluster >> entries_bits).ok().and_then(|index| self.tables.get(index));
        let index = usize::try_from(cluster & ((1 << entries_bits) - 1)).unwrap_or_default();
        (table.and_then(|table| table.as_deref()), index)
    }

    /// What byte `at` is, and the end of what its L2 entry, or the missing table, speaks for.
    fn cluster_at(&self, at: u64) -> (Cluster, u64) {
        match self.table_at(at) {
            (Some(table), index) => (Cluster::of(table[index]), (at | (self.cluster_size() - 1)) + 1),
            (None, _) => (Cluster::Unallocated, (at | ((1 << (2 * self.header.cluster_bits - 3)) - 1)) + 1),
        }
    }

    /// The longest run of one kind from `from` on, looking no further than `limit`.
    fn extent_at(&self, from: u64, limit: u64) -> Extent {
        let mask = self.cluster_size() - 1;
        let (first, mut end) = self.cluster_at(from);
        while end < limit {
            let (next, next_end) = self.cluster_at(end);
            let follows = match (first, next) {
                (Cluster::Data(a), Cluster::Data(b)) => b.checked_sub(a) == Some(end - (from & !mask)),
                (a, b) => a == b,
            };
            if !follows {
                break;
            }
            end = next_end;
        }
        let kind = match first {
            Cluster::Data(offset) => ExtentKind::Data { host_offset: offset + (from & mask) },
            Cluster::Zero { allocated } => ExtentKind::Zero { allocated },
            Cluster::Unallocated | Cluster::Compressed => ExtentKind::Backing,
        };
        Extent { start: from, len: end.min(limit) - from, kind }
    }

    /// The part of a run that is data, if any: its first piece.
    fn data_in(&self, extent: Extent) -> io::Result<Option<Range<u64>>> {
        let end = extent.start + extent.len;
        let (backing, kind) = (self.backing.as_ref(), extent.kind);
        match (kind, backing) {
            (ExtentKind::Data { .. } | ExtentKind::Zero { allocated: true }, _) => Ok(Some(extent.start..end)),
            (ExtentKind::Backing, Some(backing)) if extent.start < backing.size() => {
                let data = backing.next_data_before(extent.start, end).map_err(io::Error::other)?;
                Ok(data.map(|data| data.start..data.end.min(end)))
            }
            _ => Ok(None),
        }
    }
}

fn open_backing(overlay: &Path, name: &Path, format: Option<&str>, limit: usize) -> Result<Image, Error> {
    use std::sync::Arc;
    let path = overlay.parent().unwrap_or(Path::new("")).join(name);
    let unsupported = |feature| Err(Error::Qcow2Unsupported { path: overlay.to_owned(), feature });
    match (format, limit.checked_sub(1)) {
        (Some("raw"), _) => {
            let file = File::open(&path).map_err(|source| Error::open(&path, source))?;
            Image::new(Arc::new(file), &path)
        }
        (Some("qcow2"), Some(limit)) => Image::new(Arc::new(Overlay::open_chained(&path, limit)?), &path),
        (Some("qcow2"), None) => unsupported(format!("a chain of more than {CHAIN_LIMIT} overlays")),
        (Some(format), _) => unsupported(format!("a backing file of format {format}")),
        (None, _) => unsupported("a backing file of no stated format".to_owned()),
    }
}

impl ReadAt for Overlay {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.size());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let extent = self.extent_at(at, end);
            let (piece, after) = rest.split_at_mut(usize::try_from(extent.len).unwrap_or(usize::MAX));
            match (extent.kind, &self.backing) {
                (ExtentKind::Data { host_offset }, _) => {
                    read_or_zero(&self.file, self.file_len, host_offset, piece)?;
                }
                (ExtentKind::Backing, Some(backing)) if at < backing.size() => {
                    let left = usize::try_from(backing.size() - at).unwrap_or(usize::MAX);
                    let (there, beyond) = piece.split_at_mut(left.min(piece.len()));
                    backing.read(at, there).map_err(io::Error::other)?;
                    beyond.fill(0);
                }
                _ => piece.fill(0),
            }
            at += extent.len;
            rest = after;
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.header.size)
    }

    /// Data is what lies in a cluster of the overlay, zeros written over data, and the backing file's data where the
    /// overlay has nothing. Discarded clusters and what nobody wrote are holes.
    fn next_data(&self, from: u64, until: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.header.size.min(until);
        let mut at = from;
        while at < end {
            let extent = self.extent_at(at, end.min(at + LOOK));
            // The first piece is enough: whoever looked whether the next one follows on would, in a chain of overlays,
            // look twice at each level, and so two to the power of its length times in all.
            if let Some(data) = self.data_in(extent)? {
                return Ok(Some(data));
            }
            at += extent.len;
        }
        Ok(None)
    }

    fn stored(&self, offset: u64, len: u64) -> Option<Stored<'_>> {
        let extent = self.extent_at(offset, offset.checked_add(len)?);
        match (extent.kind, &self.backing) {
            (ExtentKind::Data { host_offset }, _) => {
                let len = extent.len.min(self.file_len.saturating_sub(host_offset));
                (len > 0).then_some(Stored { file: &self.file, offset: host_offset, len })
            }
            (ExtentKind::Backing, Some(backing)) if offset < backing.size() => {
                backing.stored(offset, extent.len.min(backing.size() - offset))
            }
            _ => None,
        }
    }
}

/// QEMU leaves out the zeros at the end of the last cluster.
fn read_or_zero(file: &File, file_len: u64, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let left = usize::try_from(file_len.saturating_sub(offset)).unwrap_or(usize::MAX);
    let (there, beyond) = buf.split_at_mut(left.min(buf.len()));
    file.read_exact_at(there, offset)?;
    beyond.fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Backing;
    use crate::disk::testing::{Workshop, cases, text, tool};
    use crate::disk::{Patch, qcow2};
    use proptest::prelude::*;

    const SIZE: u64 = 6 << 20;

    /// A base of 4 MiB with a pattern, and the path of an overlay of 6 MiB to be made.
    fn shop() -> (Workshop, PathBuf, PathBuf) {
        let shop = Workshop::new();
        let (base, disk) = (shop.path("base.raw"), shop.path("disk.qcow2"));
        std::fs::write(&base, (0_u32..1 << 20).flat_map(|n| (n / 128).to_le_bytes()).collect::<Vec<_>>()).unwrap();
        (shop, base, disk)
    }

    fn whole(disk: &Path) -> Vec<u8> {
        let overlay = Overlay::open(disk).unwrap();
        let mut bytes = vec![0; usize::try_from(overlay.size()).unwrap()];
        overlay.read_at(0, &mut bytes).unwrap();
        bytes
    }

    fn converted(shop: &Workshop, disk: &Path) -> Vec<u8> {
        let raw = shop.path("converted.raw");
        tool("qemu-img", &["convert", "-O", "raw", text(disk), text(&raw)]);
        std::fs::read(raw).unwrap()
    }

    fn create(base: &Path, disk: &Path, options: &str) {
        tool(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(base), "-o", options, text(disk), "6M"],
        );
    }

    fn io(disk: &Path, commands: &[&str]) {
        let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
        arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
        arguments.push(text(disk));
        tool("qemu-io", &arguments);
    }

    fn refused(disk: &Path) -> String {
        let error = Overlay::open(disk).unwrap_err();
        assert!(matches!(error, Error::Qcow2Unsupported { .. }), "{error:?}");
        error.to_string()
    }

    #[test]
    fn runs_of_every_kind() {
        let (_shop, base, disk) = shop();
        Overlay::create(&disk, SIZE, Backing::Raw(&base), &[Patch { offset: 5, bytes: vec![9; 3] }]).unwrap();
        io(&disk, &["write -P 1 1M 256k", "write -z 1M 64k", "write -z -u 2M 128k", "discard 1088k 64k"]);
        let kinds: Vec<_> =
            Overlay::open(&disk).unwrap().extents().map(|e| (e.start >> 10, e.len >> 10, e.kind)).collect();
        let data = |index: usize| match kinds[index].2 {
            kind @ ExtentKind::Data { .. } => kind,
            other => panic!("{other:?}"),
        };
        let wanted = [
            (0, 64, data(0)),
            (64, 960, ExtentKind::Backing),
            (1024, 64, ExtentKind::Zero { allocated: true }),
            (1088, 64, ExtentKind::Zero { allocated: false }),
            (1152, 128, data(4)),
            (1280, 768, ExtentKind::Backing),
            (2048, 128, ExtentKind::Zero { allocated: false }),
            (2176, 3968, ExtentKind::Backing),
        ];
        assert_eq!(kinds, wanted);
        let image = Image::overlay(&disk).unwrap();
        // Written zeros are data, the discarded cluster is none, and the base ends at 4 MiB.
        assert_eq!(image.next_data(0).unwrap(), Some(0..1088 << 10));
        assert_eq!(image.next_data(1088 << 10).unwrap(), Some(1152 << 10..2 << 20));
        assert_eq!(image.next_data(2 << 20).unwrap(), Some(2176 << 10..4 << 20));
        assert_eq!(image.next_data(4 << 20).unwrap(), None);
    }

    #[test]
    fn what_is_refused_is_named() {
        let (_shop, base, disk) = shop();
        create(&base, &disk, "extended_l2=on");
        assert!(refused(&disk).ends_with("uses extended L2 entries (subclusters), which kiln does not read"));
        create(&base, &disk, "compat=0.10");
        assert!(refused(&disk).contains("qcow2 version 2"));
        create(&base, &disk, "cluster_size=64k");
        io(&disk, &["write -c 0 64k"]);
        assert!(refused(&disk).contains("compressed clusters"));
        let data = text(&disk).to_owned() + ".data";
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &format!("data_file={data}"), text(&disk), "6M"]);
        assert!(refused(&disk).contains("an external data file"));
        let error = Overlay::open(&base).unwrap_err().to_string();
        assert!(error.ends_with("is damaged: it has no qcow2 header"), "{error}");
    }

    #[test]
    fn feature_bits() {
        let (_shop, base, disk) = shop();
        create(&base, &disk, "cluster_size=64k");
        let set = |bits: u8| {
            let file = std::fs::OpenOptions::new().write(true).open(&disk).unwrap();
            file.write_all_at(&[bits], 79).unwrap();
        };
        set(1);
        // Its writer died: for reading that doesn't matter.
        Overlay::open(&disk).unwrap();
        set(2);
        assert!(refused(&disk).contains("marked corrupt"));
        set(0x40);
        assert!(refused(&disk).contains("unknown incompatible features 0x40"));
        set(0);
        Overlay::open(&disk).unwrap();
    }

    #[test]
    fn an_overlay_cut_short() {
        let (_shop, base, disk) = shop();
        Overlay::create(&disk, SIZE, Backing::Raw(&base), &[Patch { offset: 3 << 20, bytes: vec![1; 128 << 10] }])
            .unwrap();
        let len = std::fs::metadata(&disk).unwrap().len();
        let cut = |by| std::fs::OpenOptions::new().write(true).open(&disk).unwrap().set_len(len - by).unwrap();
        cut(512);
        assert_eq!(Overlay::open(&disk).unwrap().size(), SIZE);
        cut(64 << 10);
        assert!(Overlay::open(&disk).unwrap_err().to_string().ends_with("is damaged: it was cut short"));
        cut(200 << 10);
        assert!(Overlay::open(&disk).unwrap_err().to_string().ends_with("a table lies outside the file"));
    }

    #[test]
    fn an_overlay_on_an_overlay() {
        let (shop, base, disk) = shop();
        create(&base, &disk, "cluster_size=64k");
        io(&disk, &["write -P 1 0 1M", "write -z -u 5M 64k"]);
        let second = shop.path("second.qcow2");
        let options = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "disk.qcow2", text(&second), "8M"];
        tool("qemu-img", &options);
        io(&second, &["write -P 2 512k 64k", "write -P 3 7M 64k", "discard 0 64k"]);
        assert!(whole(&second) == converted(&shop, &second));
        let image = Image::overlay(&second).unwrap();
        assert_eq!(image.next_data(0).unwrap(), Some(64 << 10..4 << 20));
        assert_eq!(image.next_data(4 << 20).unwrap(), Some(7 << 20..(7 << 20) + (64 << 10)));
        assert_eq!(Overlay::open(&second).unwrap().backing(), Some(disk.as_path()));
        // A circle of overlays ends.
        tool("qemu-img", &["rebase", "-u", "-F", "qcow2", "-b", text(&second), text(&disk)]);
        assert!(refused(&second).contains("a chain of more than"));
    }

    #[test]
    fn no_table_entry_is_trusted() {
        let (_shop, base, disk) = shop();
        Overlay::create(&disk, SIZE, Backing::Raw(&base), &[Patch { offset: 0, bytes: vec![1] }]).unwrap();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&disk).unwrap();
        let mut l1 = [0; 8];
        file.read_exact_at(&mut l1, 3 << 16).unwrap();
        let l2 = qcow2::l2_offset(u64::from_be_bytes(l1));
        for (at, entry, says) in [
            (l2, 512_u64, "a cluster is misplaced"),
            (l2, 1 << 40, "it was cut short"),
            (3 << 16, 1 << 50, "a table lies outside the file"),
            (3 << 16, 512, "a table lies outside the file"),
            (24, u64::MAX, "its L1 table does not fit its size"),
        ] {
            file.write_all_at(&entry.to_be_bytes(), at).unwrap();
            let error = Overlay::open(&disk).unwrap_err().to_string();
            assert!(error.ends_with(says), "{error} / {says}");
        }
    }

    proptest! {
        #![proptest_config(cases(24))]
        /// What qemu-io wrote reads as QEMU reads it, at any position and with any cluster size.
        #[test]
        fn like_qemu(
            cluster in prop::sample::select(vec!["512", "4k", "64k", "2M"]),
            writes in proptest::collection::vec((0_u64..12_000, 1_u64..2000, 0_usize..4), 0..16),
            reads in proptest::collection::vec((0_usize..6 << 20, 0_usize..300_000), 1..8),
        ) {
            let (shop, base, disk) = shop();
            create(&base, &disk, &format!("cluster_size={cluster}"));
            let commands: Vec<_> = writes.iter().map(|(at, len, how)| {
                let how = ["write -P 5", "write -z", "write -z -u", "discard"][*how];
                format!("{how} {} {}", at * 512, (*len).min(12_288 - at) * 512)
            }).collect();
            io(&disk, &commands.iter().map(String::as_str).collect::<Vec<_>>());
            let wanted = converted(&shop, &disk);
            prop_assert!(whole(&disk) == wanted);
            let overlay = Overlay::open(&disk).unwrap();
            for (at, len) in reads {
                let end = (at + len).min(wanted.len());
                let mut bytes = vec![0xEE; end - at];
                overlay.read_at(at as u64, &mut bytes).unwrap();
                prop_assert!(bytes == wanted[at..end]);
                // What lies in a file as it reads, lies there.
                if let Some(stored) = overlay.stored(at as u64, (end - at) as u64) {
                    bytes.truncate(usize::try_from(stored.len).unwrap());
                    stored.file.read_exact_at(&mut bytes, stored.offset).unwrap();
                    prop_assert!(!bytes.is_empty() && bytes == wanted[at..at + bytes.len()]);
                }
            }
            let mut at = 0;
            for extent in overlay.extents() {
                prop_assert_eq!(extent.start, at);
                at += extent.len;
            }
            prop_assert_eq!(at, SIZE);
            prop_assert!(overlay.read_at(SIZE, &mut [0]).is_err());
            prop_assert!(overlay.read_at(u64::MAX, &mut [0, 0]).is_err());
        }
    }

    /// As many layers as a recipe may have steps: looking for data must not cost more with each.
    #[test]
    fn a_long_chain() {
        let (shop, base, _) = shop();
        let name = |n: usize| shop.path(&format!("{n}.qcow2"));
        Overlay::create(&name(0), SIZE, Backing::Raw(&base), &[]).unwrap();
        for n in 1..60 {
            Overlay::create(&name(n), SIZE, Backing::Overlay(&name(n - 1)), &[]).unwrap();
            let write = format!("write -P {n} {}k 64k", n * 100 / 64 * 64 % 6000 / 64 * 64);
            tool("qemu-io", &["-f", "qcow2", "-c", &write, text(&name(n))]);
        }
        let (image, flat) = (Image::overlay(&name(59)).unwrap(), shop.path("flat"));
        tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&name(59)), text(&flat)]);
        let exported = shop.path("exported");
        crate::disk::export(&image, &exported, &crate::disk::Work::quiet(2)).unwrap();
        assert!(std::fs::read(flat).unwrap() == std::fs::read(exported).unwrap());
    }
}
