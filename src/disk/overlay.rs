//! Reading a chain of overlays that kiln made and QEMU wrote to.
//!
//! The tables of all overlays are joined into one list of runs when the chain is opened, so that no read depends on the
//! chain's length.

use super::image::{ReadAt, Stored};
use super::level::{BackingFile, Identity, Level};
use super::runs::{ExtentKind, Run, over, resolve};
use super::{Error, Image};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// The most overlays in a chain. Each keeps one file open, of which a process may usually have 1024. A circle of
/// overlays ends here too.
const CHAIN_LIMIT: usize = 320;

/// A run of bytes of one kind; offsets and lengths in bytes of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub start: u64,
    /// How long it is.
    pub len: u64,
    /// Where its bytes come from; `None` if no overlay holds them: from the raw disk, and zeros past its end.
    pub kind: Option<ExtentKind>,
}

/// An open chain of qcow2 overlays: one overlay, its backing file, and so on down to a raw disk.
///
/// All tables are read when it is opened. That takes at most 40 bytes of memory for each cluster that an overlay
/// of the chain holds, and far less where neighbouring clusters follow each other in a file. The files must not be
/// written to meanwhile.
pub struct Overlay {
    size: u64,
    /// The overlays, the topmost first.
    levels: Vec<Level>,
    /// What the overlays hold together, in order.
    runs: Vec<Run>,
    raw: Option<RawDisk>,
}

/// The raw disk at the end of a chain.
struct RawDisk {
    image: Image,
    identity: Identity,
}

impl RawDisk {
    fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::open(path, source))?;
        let identity = Identity::of(&file.metadata().map_err(|source| Error::read(path, 0, source))?);
        Ok(Self { image: Image::new(Arc::new(file), path)?, identity })
    }
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths: Vec<_> = self.levels.iter().map(Level::path).collect();
        f.debug_struct("Overlay").field("size", &self.size).field("levels", &paths).finish_non_exhaustive()
    }
}

/// What is found at a position.
enum Found {
    /// An overlay holds it.
    Held(Run),
    /// No overlay holds it.
    Below(Range<u64>),
}

impl Overlay {
    /// Opens an overlay for reading, as QEMU 7.2 to 10 leave it, also after a crash (dirty reference counts), together
    /// with its chain of backing files.
    ///
    /// A backing file is opened by the name in the header, relative to the overlay's folder; its format must be noted
    /// as `raw` or `qcow2`.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Read`]; [`Error::Qcow2Unsupported`] for anything the specification calls
    /// incompatible that is not known here, for compressed clusters, for extended L2 entries and for a chain of more
    /// than 320 overlays; [`Error::Qcow2Damaged`], also if the file was cut short.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let top = Level::open(path)?;
        let size = top.size();
        let (mut levels, mut raw) = (Vec::new(), None);
        let mut next = Some(top);
        while let Some(level) = next.take() {
            match level.backing_file()? {
                Some(BackingFile::Raw(path)) => raw = Some(RawDisk::open(&path)?),
                Some(BackingFile::Overlay(path)) => next = Some(Level::open(&path)?),
                None => {}
            }
            levels.push(level);
            if levels.len() == CHAIN_LIMIT && next.is_some() {
                return Err(levels[0].unsupported(format!("a chain of more than {CHAIN_LIMIT} overlays")));
            }
        }
        let mut runs = resolve(held(&levels, raw.as_ref().map_or(0, |raw| raw.image.size()))?);
        runs.retain_mut(|run| {
            run.end = run.end.min(size);
            run.start < run.end
        });
        Ok(Self { size, levels, runs, raw })
    }

    /// The size of the guest's disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The whole disk as runs, in order and without gaps. Neighbours differ in kind, or lie apart in the files.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let (range, kind) = match (at < self.size).then(|| self.find(at, self.size))? {
                Found::Held(run) => (run.start..run.end, Some(run.kind)),
                Found::Below(range) => (range, None),
            };
            at = range.end;
            Some(Extent { start: range.start, len: range.end - range.start, kind })
        })
    }

    /// The overlays, the topmost first.
    pub(super) fn levels(&self) -> &[Level] {
        &self.levels
    }

    /// What the overlays hold together, in order.
    pub(super) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The raw disk at the end of the chain, if there is one.
    pub(super) fn raw(&self) -> Option<&Image> {
        self.raw.as_ref().map(|raw| &raw.image)
    }

    /// The files of the chain: the overlays, the topmost first, and the raw disk.
    pub(super) fn files(&self) -> impl Iterator<Item = Identity> + '_ {
        self.levels.iter().map(Level::identity).chain(self.raw.as_ref().map(|raw| raw.identity))
    }

    /// What the topmost `count` overlays have written or discarded.
    pub(super) fn written_above(&self, count: usize) -> impl Iterator<Item = Range<u64>> + '_ {
        self.runs.iter().filter(move |run| run.level < count).map(|run| run.start..run.end)
    }

    /// What there is from `at` on, up to `limit`.
    fn find(&self, at: u64, limit: u64) -> Found {
        let next = self.runs.get(self.runs.partition_point(|run| run.end <= at));
        match next.and_then(|run| run.within(&(at..limit))) {
            Some(run) if run.start == at => Found::Held(run),
            later => Found::Below(at..later.map_or(limit, |run| run.start)),
        }
    }

    fn read_raw(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let left = self.raw().map_or(0, |raw| raw.size().saturating_sub(at));
        let (there, beyond) = buf.split_at_mut(usize::try_from(left).unwrap_or(usize::MAX).min(buf.len()));
        beyond.fill(0);
        match self.raw() {
            Some(raw) if !there.is_empty() => raw.read(at, there).map_err(io::Error::other),
            _ => Ok(()),
        }
    }
}

/// What each overlay holds. Past the end of a smaller overlay below it there are zeros, which hide what lies deeper: in
/// other overlays, or in a raw disk of `raw_size` bytes.
fn held(levels: &[Level], raw_size: u64) -> Result<Vec<Vec<Run>>, Error> {
    let mut held = Vec::with_capacity(levels.len());
    let (mut below, mut deepest) = (None, raw_size);
    for (index, level) in levels.iter().enumerate().rev() {
        let own = level.runs(index)?;
        let (start, end) = (below.unwrap_or(u64::MAX), deepest.min(level.size()));
        let zeros = Run { start, end, level: index, kind: ExtentKind::Zero { allocated: false } };
        held.push(if start < end { over(&own, &[zeros]) } else { own });
        below = Some(level.size());
        deepest = deepest.max(level.size());
    }
    held.reverse();
    Ok(held)
}

impl ReadAt for Overlay {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.size);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut rest = buf;
        let mut at = offset;
        while at < end {
            let found = self.find(at, end);
            let until = match &found {
                Found::Held(run) => run.end,
                Found::Below(range) => range.end,
            };
            let (piece, after) = rest.split_at_mut(usize::try_from(until - at).unwrap_or(usize::MAX));
            match found {
                Found::Held(Run { kind: ExtentKind::Data { host_offset }, level, .. }) => {
                    self.levels[level].read(host_offset, piece)?;
                }
                Found::Held(_) => piece.fill(0),
                Found::Below(range) => self.read_raw(range.start, piece)?,
            }
            at = until;
            rest = after;
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    /// Data is what lies in a cluster of an overlay, zeros written over data, and the raw disk's data where no overlay
    /// has anything. Discarded clusters and what was never written are holes.
    fn next_data(&self, from: u64, until: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.size.min(until);
        let mut at = from;
        while at < end {
            match self.find(at, end) {
                Found::Held(Run { kind: ExtentKind::Zero { allocated: false }, end, .. }) => at = end,
                Found::Held(run) => return Ok(Some(run.start..run.end)),
                Found::Below(range) => {
                    if let Some(raw) = self.raw()
                        && let Some(data) = raw.next_data_before(range.start, range.end).map_err(io::Error::other)?
                    {
                        return Ok(Some(data.start..data.end.min(range.end)));
                    }
                    at = range.end;
                }
            }
        }
        Ok(None)
    }

    fn stored(&self, offset: u64, len: u64) -> Option<Stored<'_>> {
        let end = self.size.min(offset.checked_add(len)?);
        match (offset < end).then(|| self.find(offset, end))? {
            Found::Held(Run { kind: ExtentKind::Data { host_offset }, level, end, .. }) => {
                self.levels[level].stored(host_offset, end - offset)
            }
            Found::Held(_) => None,
            Found::Below(range) => {
                let raw = self.raw()?;
                let len = raw.size().saturating_sub(offset).min(range.end - offset);
                if len > 0 { raw.stored(offset, len) } else { None }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Backing;
    use crate::disk::testing::{Workshop, cases, layer, text, tool};
    use crate::disk::{Patch, qcow2};
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

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
            kind @ Some(ExtentKind::Data { .. }) => kind,
            other => panic!("{other:?}"),
        };
        let wanted = [
            (0, 64, data(0)),
            (64, 960, None),
            (1024, 64, Some(ExtentKind::Zero { allocated: true })),
            (1088, 64, Some(ExtentKind::Zero { allocated: false })),
            (1152, 128, data(4)),
            (1280, 768, None),
            (2048, 128, Some(ExtentKind::Zero { allocated: false })),
            (2176, 3968, None),
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
        assert_eq!(Overlay::open(&second).unwrap().levels()[1].path(), disk.canonicalize().unwrap());
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

    /// The overlays are named relative to each other, so that joined names would be longer than the system accepts.
    #[test]
    fn as_many_overlays_as_there_may_be() {
        let (shop, base, _) = shop();
        let folder = |n: usize| format!("a-folder-with-a-name-as-long-as-that-of-a-layer-{n}");
        let mut wanted = std::fs::read(&base).unwrap();
        wanted.resize(6 << 20, 0);
        for n in 0..=CHAIN_LIMIT {
            std::fs::create_dir(shop.path(&folder(n))).unwrap();
            let below = if n == 0 { "../base.raw".to_owned() } else { format!("../{}/disk", folder(n - 1)) };
            let below = if n == 0 { Backing::Raw(Path::new(&below)) } else { Backing::Overlay(Path::new(&below)) };
            let (cluster, byte) = (n * 7 % 96, u8::try_from(n % 200).unwrap() + 2);
            layer(&shop.path(&folder(n)).join("disk"), (SIZE, 16), below, &[(cluster as u64, 1, byte)]);
            if n < CHAIN_LIMIT {
                wanted[cluster << 16..(cluster + 1) << 16].fill(byte);
            }
        }
        let last = shop.path(&folder(CHAIN_LIMIT - 1)).join("disk");
        assert!(whole(&last) == wanted);
        assert_eq!(Image::overlay(&last).unwrap().next_data(0).unwrap(), Some(0..SIZE));
        let exported = shop.path("exported");
        crate::disk::export(&Image::overlay(&last).unwrap(), &exported, &crate::disk::Work::quiet(2)).unwrap();
        assert!(std::fs::read(exported).unwrap() == wanted);
        let one_more = shop.path(&folder(CHAIN_LIMIT)).join("disk");
        assert!(refused(&one_more).contains("a chain of more than 320 overlays"));
    }

    #[test]
    fn a_folder_that_is_a_symbolic_link() {
        let (shop, base, _) = shop();
        for folder in ["there", "there/deep", "here"] {
            std::fs::create_dir(shop.path(folder)).unwrap();
        }
        std::os::unix::fs::symlink("../there/deep", shop.path("here/link")).unwrap();
        std::fs::copy(&base, shop.path("there/base")).unwrap();
        // From `there/deep`, where the link leads, and not from `here`.
        Overlay::create(&shop.path("there/deep/one"), SIZE, Backing::Raw(Path::new("../base")), &[]).unwrap();
        let two = shop.path("here/two");
        Overlay::create(&two, SIZE, Backing::Overlay(Path::new("link/../deep/one")), &[]).unwrap();
        assert!(whole(&two) == converted(&shop, &two));
        let missing = shop.path("missing");
        Overlay::create(&missing, SIZE, Backing::Overlay(Path::new("none/one")), &[]).unwrap();
        let error = Overlay::open(&missing).unwrap_err();
        assert!(matches!(&error, Error::Open { path, .. } if path.ends_with("none/one")), "{error:?}");
    }

    /// An overlay that is smaller than what is over it and below it hides what is deeper.
    #[test]
    fn past_the_end_of_a_smaller_overlay() {
        let (shop, base, disk) = shop();
        let (short, top) = (shop.path("short"), shop.path("top"));
        layer(&disk, (SIZE, 16), Backing::Raw(&base), &[(80, 4, 7)]);
        layer(&short, ((1 << 20) + 512, 16), Backing::Overlay(&disk), &[]);
        layer(&top, (SIZE - 512, 16), Backing::Overlay(&short), &[(90, 6, 8)]);
        assert!(whole(&top) == converted(&shop, &top));
        let image = Image::overlay(&top).unwrap();
        assert_eq!(image.next_data(0).unwrap(), Some(0..(1 << 20) + 512));
        assert_eq!(image.next_data((1 << 20) + 512).unwrap(), Some(90 << 16..SIZE - 512));
    }
}
