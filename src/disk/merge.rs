//! One overlay that holds what all overlays of a chain hold.

use super::layout::{Backing, CLUSTER_BITS, Content, NewOverlay, Piece};
use super::level::Level;
use super::overlay::Overlay;
use super::runs::{ExtentKind, Run};
use super::{Error, SECTOR, Work};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// How much is copied between two questions whether to stop, in bytes.
const CHUNK: u64 = 16 << 20;
/// How much is copied at once where the kernel can't do it, in bytes.
const BUFFER: usize = 1 << 20;

impl Overlay {
    /// Writes to the new file `to` one overlay over a raw disk that holds everything that the overlays from `top` down
    /// to that raw disk hold, and syncs it. It reads like `top`: the same bytes, and the same holes.
    ///
    /// The header names the raw disk as `base` does: a relative name is looked for from the folder of `to`. The caller
    /// sees to it that this is the raw disk at the end of the chain; it isn't opened by that name. The clusters are of
    /// 64 KiB, or as small as the smallest ones of the chain. `to` must not exist; if anything fails, it does not exist
    /// afterwards either.
    ///
    /// This is the work of one thread, whatever `work` allows; the progress counts the data that is copied.
    ///
    /// # Errors
    /// Those of [`open`](Self::open); [`Error::Create`], [`Error::Write`], [`Error::NoSpace`], [`Error::Read`],
    /// [`Error::Cancelled`]; [`Error::OddSize`]; [`Error::Overlay`] if there is no raw disk at the end of the chain, or
    /// if the name is too long.
    pub fn merge(top: &Path, to: &Path, base: &Path, work: &Work) -> Result<(), Error> {
        let chain = Self::open(top)?;
        if chain.raw().is_none() {
            let what = format!("{} is not over a raw disk", top.display());
            return Err(Error::Overlay { path: to.to_owned(), what });
        }
        let cluster_bits = cluster_bits(&chain)?;
        let pieces: Vec<_> = chain.runs().iter().map(|run| piece(*run, cluster_bits)).collect();
        let data = chain.runs().iter().filter(|run| matches!(run.kind, ExtentKind::Data { .. }));
        let total = data.map(|run| run.end - run.start).sum();
        let new =
            NewOverlay { path: to, size: chain.size(), cluster_bits, backing: Backing::Raw(base), pieces: &pieces };
        let mut copy = Copy { to, work, done: 0, total };
        (work.progress)(0, total);
        let put = |source: &Source, file: &File, at| copy.run(&chain.levels()[source.level], source, (file, at));
        new.write(put, File::sync_all)
    }
}

/// The size of the clusters in which all runs of the chain can be told apart.
fn cluster_bits(chain: &Overlay) -> Result<u32, Error> {
    let mut bits = CLUSTER_BITS;
    for level in chain.levels() {
        let size = level.size();
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::OddSize { size });
        }
        // Where a smaller overlay ends, other bytes begin.
        let end = if size < chain.size() { size.trailing_zeros() } else { CLUSTER_BITS };
        bits = bits.min(level.cluster_bits()).min(end);
    }
    Ok(bits)
}

/// Data in the file of an overlay.
struct Source {
    /// The index of the overlay in its chain.
    level: usize,
    host_offset: u64,
    len: u64,
}

/// A run begins on a cluster. It ends on one too, or where the disk or its raw disk ends; no other run follows there.
fn piece(run: Run, cluster_bits: u32) -> Piece<Source> {
    let content = match run.kind {
        ExtentKind::Data { host_offset } => {
            Content::Data(Source { level: run.level, host_offset, len: run.end - run.start })
        }
        ExtentKind::Zero { allocated } => Content::Zero { allocated },
    };
    Piece { clusters: run.start >> cluster_bits..run.end.div_ceil(1 << cluster_bits), content }
}

/// The copying of data into the new file.
struct Copy<'a> {
    to: &'a Path,
    work: &'a Work<'a>,
    done: u64,
    total: u64,
}

impl Copy<'_> {
    /// Copies a run to this offset of the file. What lies past the end of the source is a hole of the new file.
    fn run(&mut self, level: &Level, source: &Source, (file, at): (&File, u64)) -> Result<(), Error> {
        let mut copied = 0;
        while copied < source.len {
            if (self.work.cancelled)() {
                return Err(Error::Cancelled);
            }
            let chunk = (source.len - copied).min(CHUNK);
            self.chunk(level, source.host_offset + copied, chunk, (file, at + copied))?;
            copied += chunk;
            self.done += chunk;
            (self.work.progress)(self.done, self.total);
        }
        Ok(())
    }

    fn chunk(&self, level: &Level, host_offset: u64, len: u64, (file, at): (&File, u64)) -> Result<(), Error> {
        let (mut done, mut buffer) = (0, Vec::new());
        while let Some(stored) = level.stored(host_offset + done, len - done) {
            let copied = stored.copy_within_kernel(file, at + done);
            done += copied;
            if copied == 0 {
                buffer.resize(usize::try_from(stored.len).unwrap_or(BUFFER).min(BUFFER), 0);
                let read = stored.file.read_exact_at(&mut buffer, stored.offset);
                read.map_err(|source| Error::read(level.path(), stored.offset, source))?;
                file.write_all_at(&buffer, at + done).map_err(|source| Error::write(self.to, source))?;
                done += buffer.len() as u64;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{Workshop, cases, layer, sparse, text, tool};
    use crate::disk::{Extent, Image};
    use proptest::prelude::*;
    use std::ops::Range;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU64, Ordering};

    const SIZE: u64 = 6 << 20;

    fn whole(disk: &Path) -> Vec<u8> {
        let image = Image::overlay(disk).unwrap();
        let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
        image.read(0, &mut bytes).unwrap();
        bytes
    }

    fn data(disk: &Path) -> Vec<Range<u64>> {
        let (image, mut at) = (Image::overlay(disk).unwrap(), 0);
        let next = || {
            let found = image.next_data(at).unwrap()?;
            at = found.end;
            Some(found)
        };
        std::iter::from_fn(next).collect()
    }

    /// The extents, with neighbours of one kind as one: `None` for the raw disk's. Past its end there is a hole.
    fn extents(disk: &Path) -> Vec<(Range<u64>, Option<ExtentKind>)> {
        let overlay = Overlay::open(disk).unwrap();
        let end = overlay.raw().unwrap().size();
        let mut all: Vec<(Range<u64>, Option<ExtentKind>)> = Vec::new();
        for Extent { start, len, kind } in overlay.extents() {
            let middle = if kind.is_none() { end.clamp(start, start + len) } else { start + len };
            let kind = kind.map(|kind| match kind {
                ExtentKind::Data { .. } => ExtentKind::Data { host_offset: 0 },
                zero @ ExtentKind::Zero { .. } => zero,
            });
            let hole = Some(ExtentKind::Zero { allocated: false });
            for (range, kind) in [(start..middle, kind), (middle..start + len, hole)] {
                match all.last_mut() {
                    _ if range.is_empty() => {}
                    Some((before, of)) if *of == kind => before.end = range.end,
                    _ => all.push((range, kind)),
                }
            }
        }
        all
    }

    fn converted(shop: &Workshop, disk: &Path) -> Vec<u8> {
        let raw = shop.path("converted.raw");
        tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(disk), text(&raw)]);
        std::fs::read(raw).unwrap()
    }

    /// A chain over a raw disk, by the files' sizes, the sizes of their clusters and what they hold; its top.
    fn chain(shop: &Workshop, levels: &[(u64, u32, Vec<(u64, u64, u8)>)]) -> PathBuf {
        let mut top = shop.path("base");
        for (number, (size, cluster_bits, clusters)) in levels.iter().enumerate() {
            let below = if number == 0 { Backing::Raw(&top) } else { Backing::Overlay(&top) };
            let path = shop.path(&format!("{number}.qcow2"));
            layer(&path, (*size, *cluster_bits), below, clusters);
            top = path;
        }
        top
    }

    #[test]
    fn what_the_overlays_hold_is_in_one_file() {
        let shop = Workshop::new();
        let (base, merged) = (shop.path("base"), shop.path("merged"));
        sparse(&base, 4 << 20, &[(0, 1 << 20, 5)]);
        let levels = [
            (SIZE, 16, vec![(0, 4, 6), (8, 2, 1), (20, 30, 7)]),
            (SIZE, 16, vec![(1, 1, 0), (2, 1, 1), (20, 1, 8), (90, 6, 9)]),
        ];
        let top = chain(&shop, &levels);
        Overlay::merge(&top, &merged, Path::new("base"), &Work::quiet(1)).unwrap();
        let info = tool("qemu-img", &["info", "--output=json", text(&merged)]);
        assert!(
            info.contains("\"backing-filename\": \"base\"") && info.contains("\"virtual-size\": 6291456"),
            "{info}"
        );
        tool("qemu-img", &["check", text(&merged)]);
        assert_eq!(Overlay::open(&merged).unwrap().levels().len(), 1);
        assert_eq!(extents(&merged), extents(&top));
        let kinds: Vec<_> = extents(&merged).into_iter().map(|(range, kind)| (range.start >> 16, kind)).collect();
        let data = Some(ExtentKind::Data { host_offset: 0 });
        let zero = |allocated| Some(ExtentKind::Zero { allocated });
        let wanted = [
            (0, data),
            (1, zero(false)),
            (2, zero(true)),
            (3, data),
            (4, None),
            (8, zero(true)),
            (10, None),
            (20, data),
            (50, None),
            (64, zero(false)),
            (90, data),
        ];
        assert_eq!(kinds, wanted);
        assert!(converted(&shop, &merged) == converted(&shop, &top));
    }

    /// More overlays than QEMU reads in a reasonable time.
    #[test]
    fn a_long_chain_becomes_short() {
        let shop = Workshop::new();
        let (base, merged) = (shop.path("base"), shop.path("merged"));
        sparse(&base, SIZE, &[(0, 6 << 20, 5)]);
        let levels: Vec<_> =
            (0..300).map(|n| (SIZE, 16, vec![(n * 5 % 96, 1, u8::try_from(n % 250).unwrap())])).collect();
        let top = chain(&shop, &levels);
        Overlay::merge(&top, &merged, &base, &Work::quiet(1)).unwrap();
        let mut wanted = vec![5; 6 << 20];
        for (_, _, clusters) in &levels {
            let (cluster, _, byte) = clusters[0];
            let start = usize::try_from(cluster << 16).unwrap();
            wanted[start..start + (64 << 10)].fill(if byte == 1 { 0 } else { byte });
        }
        assert!(converted(&shop, &merged) == wanted);
    }

    #[test]
    fn nothing_is_left_of_a_failure() {
        let shop = Workshop::new();
        let (base, merged) = (shop.path("base"), shop.path("merged"));
        sparse(&base, 1 << 20, &[]);
        let size = 80 << 20;
        let top = chain(&shop, &[(size, 16, vec![(0, 1280, 3)])]);
        let asked = AtomicU64::new(0);
        let last = AtomicU64::new(0);
        let work = Work {
            threads: 1,
            progress: &|done, total| {
                assert!(merged.exists() == (done > 0) && total == size);
                last.store(done, Ordering::Relaxed);
            },
            cancelled: &|| asked.fetch_add(1, Ordering::Relaxed) == 2,
        };
        let error = Overlay::merge(&top, &merged, &base, &work).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error:?}");
        assert_eq!(last.load(Ordering::Relaxed), 2 * CHUNK);
        assert!(!merged.exists());
        let long = "x".repeat(1024);
        let error = Overlay::merge(&top, &merged, Path::new(&long), &Work::quiet(1)).unwrap_err().to_string();
        assert!(error.ends_with("its backing file's path is longer than 1023 bytes"), "{error}");
        assert!(!merged.exists());
        let alone = shop.path("alone");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", text(&alone), "1M"]);
        let error = Overlay::merge(&alone, &merged, &base, &Work::quiet(1)).unwrap_err().to_string();
        assert!(error.ends_with("alone is not over a raw disk"), "{error}");
        std::fs::write(&merged, "precious").unwrap();
        let error = Overlay::merge(&top, &merged, &base, &Work::quiet(1)).unwrap_err();
        assert!(matches!(error, Error::Create { .. }), "{error:?}");
        assert_eq!(std::fs::read(&merged).unwrap(), b"precious");
    }

    #[test]
    fn a_name_that_does_not_fit_a_small_cluster() {
        let shop = Workshop::new();
        sparse(&shop.path("base"), 1 << 20, &[]);
        let top = chain(&shop, &[(SIZE, 9, vec![(3, 9, 3)])]);
        let name = |len: usize| PathBuf::from("x".repeat(len));
        let merge = |to: &str, len| Overlay::merge(&top, &shop.path(to), &name(len), &Work::quiet(1));
        let error = merge("merged", 377).unwrap_err().to_string();
        assert!(error.ends_with("its backing file's path is longer than 376 bytes"), "{error}");
        merge("merged", 376).unwrap();
        let check =
            ["check", "--image-opts", &format!("driver=qcow2,backing=,file.filename={}", text(&shop.path("merged")))];
        tool("qemu-img", &check);
    }

    /// Where the kernel can't copy (here because the file is opened for appending), the bytes go through a buffer.
    #[test]
    fn without_the_kernels_help() {
        let shop = Workshop::new();
        sparse(&shop.path("base"), 1 << 20, &[]);
        let top = chain(&shop, &[(SIZE, 16, vec![(0, 20, 3), (20, 20, 4)])]);
        let chain = Overlay::open(&top).unwrap();
        let ExtentKind::Data { host_offset } = chain.runs()[0].kind else { panic!("{:?}", chain.runs()) };
        let out = File::options().append(true).create_new(true).open(shop.path("out")).unwrap();
        let copy = Copy { to: &top, work: &Work::quiet(1), done: 0, total: 0 };
        copy.chunk(&chain.levels()[0], host_offset, 40 << 16, (&out, 0)).unwrap();
        assert!(std::fs::read(shop.path("out")).unwrap() == [vec![3; 20 << 16], vec![4; 20 << 16]].concat());
    }

    type Levels = Vec<(u64, u32, Vec<(u64, u64, u8)>)>;

    /// Overlays of different sizes with clusters of different sizes.
    fn levels() -> impl Strategy<Value = Levels> {
        let size = prop_oneof![3 => Just(SIZE), 1 => (1_u64..12_288).prop_map(|sectors| sectors * 512)];
        let level = (size, prop::sample::select(vec![9_u32, 12, 16, 16, 16, 21])).prop_flat_map(|(size, bits)| {
            let end = size.div_ceil(1 << bits);
            (Just(size), Just(bits), prop::collection::vec((0..end, 1..end.div_ceil(4) + 1, 0_u8..5), 0..6))
        });
        prop::collection::vec(level, 1..6)
    }

    proptest! {
        #![proptest_config(cases(48))]
        /// The merged overlay reads as the chain does, with the same holes.
        #[test]
        fn like_the_chain(
            levels in levels(), base_len in 0_u64..12_288,
            pieces in prop::collection::vec((0_u64..10_000, 1_usize..300_000), 0..4),
        ) {
            let shop = Workshop::new();
            let (base, merged) = (shop.path("base"), shop.path("merged"));
            let pieces: Vec<_> = pieces.into_iter().map(|(start, len)| (start * 512, len, 9)).collect();
            sparse(&base, base_len * 512, &pieces);
            let top = chain(&shop, &levels);
            Overlay::merge(&top, &merged, &base, &Work::quiet(1)).unwrap();
            prop_assert!(whole(&merged) == whole(&top));
            prop_assert_eq!(data(&merged), data(&top));
            prop_assert_eq!(extents(&merged), extents(&top));
        }
    }

    proptest! {
        #![proptest_config(cases(8))]
        /// QEMU reads the merged overlay as it reads the chain that it has written to itself.
        #[test]
        fn as_qemu_reads_it(
            levels in levels(), base_len in 0_u64..12_288,
            writes in prop::collection::vec((0_usize..6, 0_u64..12_000, 1_u64..2000, 0_usize..4), 1..24),
        ) {
            let shop = Workshop::new();
            let (base, merged) = (shop.path("base"), shop.path("merged"));
            sparse(&base, base_len * 512, &[(0, usize::try_from(base_len * 256).unwrap(), 9)]);
            let top = chain(&shop, &levels);
            for (number, (size, ..)) in levels.iter().enumerate() {
                let own = writes.iter().filter(|(level, at, ..)| level % levels.len() == number && at * 512 < *size);
                let commands: Vec<_> = own.map(|(_, at, len, how)| {
                    let how = ["write -P 5", "write -z", "write -z -u", "discard"][*how];
                    format!("{how} {} {}", at * 512, (len * 512).min(size - at * 512))
                }).collect();
                let path = shop.path(&format!("{number}.qcow2"));
                let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
                arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
                arguments.push(text(&path));
                if !commands.is_empty() {
                    tool("qemu-io", &arguments);
                }
            }
            Overlay::merge(&top, &merged, &base, &Work::quiet(1)).unwrap();
            tool("qemu-img", &["check", text(&merged)]);
            let wanted = converted(&shop, &top);
            prop_assert!(whole(&top) == wanted);
            prop_assert!(converted(&shop, &merged) == wanted);
            prop_assert_eq!(data(&merged), data(&top));
            prop_assert_eq!(extents(&merged), extents(&top));
        }
    }
}
