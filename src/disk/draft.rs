//! A raw disk that is begun before its last state is known.
//!
//! While a guest writes to overlays, what is behind them does not change: it can be written and hashed already. When
//! the guest is done, only the blocks that its overlays speak of are written again, so what is left to do then is
//! proportional to the change.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::blocks::{BLOCK, BlockMap};
use super::copy::{Exported, Work, confirm, create, data_bytes, rewrite};
use super::level::Identity;
use super::overlay::Overlay;
use super::{Error, Image, copy};

/// A raw disk with the content of what is behind some overlays.
#[derive(Debug)]
pub struct Draft {
    file: File,
    path: PathBuf,
    behind: PathBuf,
    size: u64,
    begun: BlockMap,
    /// Where blocks begin that must be written again in any case.
    uneven: Option<u64>,
}

impl Draft {
    /// Writes a disk of `size` bytes to the new file `out` with what the image `behind` has: a raw disk, or an overlay
    /// if `overlay`. Nobody may write to it meanwhile, or before [`finish`](Self::finish). What `known`, its block map,
    /// has is not hashed again.
    ///
    /// # Errors
    /// As [`export`](super::export).
    pub fn begin(
        (behind, overlay): (&Path, bool),
        known: Option<&BlockMap>,
        size: u64,
        out: &Path,
        work: &Work,
    ) -> Result<Self, Error> {
        let image = if overlay { Image::overlay(behind)? } else { Image::raw(behind)? };
        let file = create(out, size)?;
        let exported = copy::pass(&image, Some((&file, out)), known, work)?;
        // Where that takes time, most of it is spent now, while the guest works.
        confirm(&file).map_err(|source| Error::write(out, source))?;
        let uneven =
            (image.size() < size && !image.size().is_multiple_of(BLOCK)).then_some(image.size() / BLOCK * BLOCK);
        let (path, behind) = (out.to_owned(), behind.to_owned());
        Ok(Self { file, path, behind, size, begun: exported.block_map, uneven })
    }

    /// The block map of what it was made of.
    #[must_use]
    pub fn begun(&self) -> &BlockMap {
        &self.begun
    }

    /// Makes it the disk of the overlay `top`, which must be over what the draft was made of, or over the same raw disk.
    /// As [`export`](super::export) would have written it.
    ///
    /// # Errors
    /// As [`export`](super::export), and those of [`Overlay::open`].
    pub fn finish(self, top: &Path, work: &Work) -> Result<Exported, Error> {
        let overlay = Arc::new(Overlay::open(top)?);
        let mut changed = changes((&overlay, top), &self.behind)?;
        let image = Image::new(overlay, top)?;
        changed.extend(self.uneven.map(|start| start..start + 1));
        let ranges = whole_blocks(changed, self.size);
        let rewritten = rewrite(&image, (&self.file, &self.path), &ranges, work)?;
        confirm(&self.file).map_err(|source| Error::write(&self.path, source))?;
        let mut block_map = BlockMap::from_data(self.size, self.begun.data());
        for (index, digest) in rewritten {
            block_map.set(index, digest);
        }
        Ok(Exported { block_map, data_bytes: data_bytes(&image)? })
    }
}

/// What the block map of the disk `behind` says about the overlay `top`, which is over it or over the same raw disk: the
/// blocks in which they don't differ. The others are missing.
///
/// # Errors
/// [`Error::Qcow2Damaged`] if `top` is over another raw disk; those of [`Overlay::open`].
pub fn known_through(top: &Path, behind: &Path, map: &BlockMap) -> Result<BlockMap, Error> {
    let overlay = Overlay::open(top)?;
    let size = overlay.size();
    let mut known = BlockMap::from_data(size, map.data());
    let mut touched = changes((&overlay, top), behind)?;
    if map.size() < size && !map.size().is_multiple_of(BLOCK) {
        // Its last block is longer in a larger disk.
        touched.push(map.size() - 1..map.size());
    }
    for range in whole_blocks(touched, size) {
        for index in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            known.set(index, None);
        }
    }
    Ok(known)
}

/// Where the disk of the overlay `top` may differ from the disk `behind`: what the overlays of either chain have written
/// or discarded, down to the first file that is in both. That is `behind` itself, unless a merged overlay has taken its
/// place: then it is a deeper overlay, or the raw disk.
fn changes((top, path): (&Overlay, &Path), behind: &Path) -> Result<Vec<Range<u64>>, Error> {
    let elsewhere = || {
        let what = format!("it is not over {}", behind.display());
        Error::Qcow2Damaged { path: path.to_owned(), what }
    };
    let metadata = std::fs::metadata(behind).map_err(|source| Error::open(behind, source))?;
    let end = Identity::of(&metadata);
    if let Some(depth) = top.files().position(|file| file == end) {
        return Ok(top.written_above(depth).collect());
    }
    let other = match Overlay::open(behind) {
        // A raw disk, and not the one at the end of the chain.
        Err(Error::Qcow2Damaged { .. }) => return Err(elsewhere()),
        other => other?,
    };
    let files: Vec<_> = other.files().collect();
    let common = |(depth, file)| Some((depth, files.iter().position(|other| *other == file)?));
    let (depth, other_depth) = top.files().enumerate().find_map(common).ok_or_else(elsewhere)?;
    let mut changed: Vec<_> = top.written_above(depth).chain(other.written_above(other_depth)).collect();
    // `behind` may be smaller than what both are over.
    changed.push(other.size()..top.size());
    changed.retain(|range| range.start < range.end.min(top.size()));
    Ok(changed)
}

/// The ranges widened to whole blocks, in order and apart, within the disk.
fn whole_blocks(mut ranges: Vec<Range<u64>>, size: u64) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut whole: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let (start, end) = (range.start / BLOCK * BLOCK, range.end.next_multiple_of(BLOCK).min(size));
        match whole.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => whole.push(start..end),
        }
    }
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{Workshop, cases, layer, sparse, text, tool};
    use crate::disk::{Backing, export};
    use proptest::prelude::*;

    #[test]
    fn ranges_become_blocks() {
        let whole = |ranges: &[Range<u64>]| -> Vec<(u64, u64)> {
            let whole = whole_blocks(ranges.to_vec(), 10 * BLOCK + 512);
            whole.into_iter().map(|range| (range.start, range.end)).collect()
        };
        assert_eq!(whole(&[5..6, BLOCK..BLOCK + 1, 3 * BLOCK - 1..3 * BLOCK]), [(0, 3 * BLOCK)]);
        assert_eq!(whole(&[10 * BLOCK..10 * BLOCK + 1, 1..2]), [(0, BLOCK), (10 * BLOCK, 10 * BLOCK + 512)]);
        assert_eq!(whole(&[]), []);
    }

    #[test]
    fn another_disk_is_refused() {
        let shop = Workshop::new();
        let (base, other, top) = (shop.path("base"), shop.path("other"), shop.path("top"));
        for path in [&base, &other] {
            std::fs::write(path, vec![1; 1 << 20]).unwrap();
        }
        Overlay::create(&top, 1 << 20, Backing::Raw(&other), &[]).unwrap();
        let draft = Draft::begin((&base, false), None, 1 << 20, &shop.path("out"), &Work::quiet(1)).unwrap();
        let error = draft.finish(&top, &Work::quiet(1)).unwrap_err().to_string();
        assert!(error.contains("it is not over"), "{error}");
    }

    /// How a state of a disk is made: how many states before the last one its parent is, how much larger it is in
    /// sectors, its clusters, and whether a merged overlay is made of it.
    type Step = (usize, u64, Vec<(u64, u64, u8)>, bool);

    /// States of a disk with their sizes. The first is the raw disk; overlays directly over it have `size` bytes or more.
    fn states(shop: &Workshop, size: u64, steps: &[Step]) -> Vec<(PathBuf, u64)> {
        let base = shop.path("base");
        let mut states = vec![(base.clone(), size)];
        for (number, (back, growth, clusters, merged)) in steps.iter().enumerate() {
            let parent = states.len() - 1 - back % states.len();
            let (below, size) = (&states[parent].0, states[parent].1 + growth * 512);
            let backing = if parent == 0 { Backing::Raw(below) } else { Backing::Overlay(below) };
            let path = shop.path(&format!("{number}.qcow2"));
            layer(&path, (size, 16), backing, clusters);
            states.push((path.clone(), size));
            if *merged {
                let to = shop.path(&format!("{number}.merged"));
                Overlay::merge(&path, &to, &base, &Work::quiet(1)).unwrap();
                states.push((to, size));
            }
        }
        states
    }

    /// An overlay that was made of a chain, and none of its files is in the new chain.
    #[test]
    fn a_merged_overlay_is_over_its_raw_disk() {
        const SIZE: u64 = 8 << 20;
        let shop = Workshop::new();
        sparse(&shop.path("base"), SIZE, &[(0, 8 << 20, 9)]);
        let steps = [(0, 0, vec![(0, 1, 2), (20, 1, 0)], false), (0, 0, vec![(40, 1, 3), (20, 1, 4)], true)];
        let states = states(&shop, SIZE, &steps);
        let [(base, _), (behind, _), _, (top, _)] = &states[..] else { panic!("{states:?}") };
        let work = Work::quiet(1);
        let map = BlockMap::of_image(&Image::overlay(behind).unwrap(), &work).unwrap();
        let known = known_through(top, behind, &map).unwrap();
        let missing: Vec<_> = (0..16).filter(|index| known.block(*index).is_none()).collect();
        assert_eq!(missing, [0, 2, 5], "what either overlay has written");
        let map = BlockMap::of_raw(base, &work).unwrap();
        let known = known_through(top, base, &map).unwrap();
        assert_eq!(missing, (0..16).filter(|index| known.block(*index).is_none()).collect::<Vec<_>>());
        let other = shop.path("other");
        std::fs::copy(base, &other).unwrap();
        let elsewhere = shop.path("elsewhere");
        layer(&elsewhere, (SIZE, 16), Backing::Raw(&other), &[]);
        for not_below in [&other, &elsewhere] {
            let error = known_through(top, not_below, &map).unwrap_err().to_string();
            assert!(error.contains("it is not over"), "{error}");
        }
    }

    /// The raw disk shows where the smaller overlay has ended.
    #[test]
    fn a_larger_disk_over_the_same_raw_disk() {
        const SIZE: u64 = 8 << 20;
        let (shop, work) = (Workshop::new(), Work::quiet(1));
        let [base, behind, top] = ["base", "behind", "top"].map(|name| shop.path(name));
        sparse(&base, SIZE, &[(0, 8 << 20, 9)]);
        layer(&behind, (SIZE / 2, 16), Backing::Raw(&base), &[(1, 1, 2)]);
        layer(&top, (SIZE, 16), Backing::Raw(&base), &[(20, 1, 3)]);
        let draft = Draft::begin((&behind, true), None, SIZE, &shop.path("draft"), &work).unwrap();
        let finished = draft.finish(&top, &work).unwrap();
        assert_eq!(finished, export(&Image::overlay(&top).unwrap(), &shop.path("export"), &work).unwrap());
        assert!(std::fs::read(shop.path("draft")).unwrap() == std::fs::read(shop.path("export")).unwrap());
    }

    proptest! {
        #![proptest_config(cases(24))]
        /// Whatever was merged since, a draft that was finished is what an export makes, and what is known of the disk
        /// is right.
        #[test]
        fn through_merged_overlays(
            steps in proptest::collection::vec(
                (
                    prop_oneof![4 => Just(0_usize), 1 => 0_usize..8],
                    prop_oneof![4 => Just(0_u64), 1 => 0_u64..4000],
                    proptest::collection::vec((0_u64..192, 1_u64..12, 0_u8..6), 0..4),
                    proptest::bool::weighted(0.4),
                ),
                1..7,
            ),
            behind: prop::sample::Index, data in 0_usize..9 << 20, cut in 0_u64..3000,
        ) {
            const SIZE: u64 = 10 << 20;
            let shop = Workshop::new();
            sparse(&shop.path("base"), SIZE, &[(5000, data, 9), (SIZE - 5000, 5000, 8)]);
            // The overlays may be smaller than the raw disk.
            let mut states = states(&shop, SIZE - cut * 512, &steps);
            states[0].1 = SIZE;
            let (top, size) = states.last().unwrap().clone();
            let smaller: Vec<_> = states.iter().filter(|state| state.1 <= size).collect();
            let (path, work) = (&smaller[behind.index(smaller.len())].0, Work::quiet(2));
            let overlay = path != &shop.path("base");
            let draft = Draft::begin((path, overlay), None, size, &shop.path("draft"), &work).unwrap();
            let known = known_through(&top, path, draft.begun()).unwrap();
            let finished = draft.finish(&top, &work).unwrap();
            let exported = export(&Image::overlay(&top).unwrap(), &shop.path("export"), &work).unwrap();
            prop_assert_eq!(&finished, &exported);
            prop_assert!(std::fs::read(shop.path("draft")).unwrap() == std::fs::read(shop.path("export")).unwrap());
            let map = |name: &str| BlockMap::of_raw(&shop.path(name), &work).unwrap();
            prop_assert_eq!(map("draft"), map("export"), "as holes the filesystem has the same");
            for (index, digest) in known.data() {
                prop_assert_eq!(exported.block_map.block(index), Some(digest));
            }
        }
    }

    proptest! {
        #![proptest_config(cases(16))]
        /// A draft that was finished is what an export makes: content, holes, block map, bytes of data.
        #[test]
        fn like_an_export(
            pieces in proptest::collection::vec((0_u64..20_000, 1_usize..900_000, 0_u8..4), 0..8),
            below in proptest::collection::vec((0_u64..24_000, 1_u64..3000, 0_u8..4), 0..6),
            above in proptest::collection::vec((0_u64..24_000, 1_u64..3000, 0_u8..4), 0..6),
            uneven in 0_u64..3, from_layer: bool, known in 0_u8..3,
        ) {
            const SIZE: u64 = 24 << 20;
            let shop = Workshop::new();
            let base = shop.path("base");
            let within = |start: u64, len: usize| len.min(usize::try_from((10 << 20) - start).unwrap());
            let pieces: Vec<_> = pieces
                .into_iter()
                .map(|(start, len, byte)| (start * 512, within(start * 512, len), byte))
                .collect();
            sparse(&base, (10 << 20) + uneven * 1024, &pieces);
            let (one, two) = (shop.path("one"), shop.path("two"));
            Overlay::create(&one, SIZE, Backing::Raw(&base), &[]).unwrap();
            Overlay::create(&two, SIZE, Backing::Overlay(&one), &[]).unwrap();
            let write = |disk: &Path, writes: Vec<(u64, u64, u8)>| {
                let command = |(start, len, byte): (u64, u64, u8)| {
                    // 0 is a discard, which makes a hole of whole clusters.
                    let (start, len) = (start * 1024, (len * 1024).min(SIZE - start * 1024));
                    if byte == 0 { format!("discard {start} {len}") } else { format!("write -P {byte} {start} {len}") }
                };
                let commands: Vec<_> = writes.into_iter().map(command).collect();
                let mut arguments = vec!["-d", "unmap", "-f", "qcow2"];
                arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
                arguments.push(text(disk));
                tool("qemu-io", &arguments);
            };
            write(&one, below);
            let work = Work::quiet(2);
            let (behind, overlay) = if from_layer { (&one, true) } else { (&base, false) };
            // As well as without it, and whoever knows only some blocks hashes the rest.
            let known = match known {
                0 => None,
                1 if overlay => {
                    let map = BlockMap::of_image(&Image::raw(&base).unwrap(), &work).unwrap();
                    Some(known_through(behind, &base, &map).unwrap())
                }
                _ => {
                    let image = if overlay { Image::overlay(behind) } else { Image::raw(behind) }.unwrap();
                    let mut map = BlockMap::of_image(&image, &work).unwrap();
                    map.set(3, None);
                    Some(map)
                }
            };
            let draft = Draft::begin((behind, overlay), known.as_ref(), SIZE, &shop.path("draft"), &work).unwrap();
            write(&two, above);
            let finished = draft.finish(&two, &work).unwrap();
            let exported = export(&Image::overlay(&two).unwrap(), &shop.path("export"), &work).unwrap();
            prop_assert_eq!(&finished, &exported);
            prop_assert!(std::fs::read(shop.path("draft")).unwrap() == std::fs::read(shop.path("export")).unwrap());
            let map = |name: &str| BlockMap::of_raw(&shop.path(name), &work).unwrap();
            prop_assert_eq!(map("draft"), map("export"), "as holes the filesystem has the same");
        }
    }
}
