//! Where a disk is cut into parts, so that little is sent but data.
//!
//! S3 takes parts of 5 MiB and more, 10,000 of them at most, and copies parts from another object without anything being
//! sent. The disk is cut where its zeros begin and end. What can be copied comes from a *scratch object*: zeros, made in
//! there from 5 MiB of them, the *seed*; and between two stretches of zeros a *joint* each:
//!
//! ```text
//! scratch   0 0 0 0 0 0 0 0 0 0 0 0 0 0 a D D D D D D D b 0 0 0 0 0 c E E E E E E E d 0 0 0 0 0
//!           `----- zeros ---------'   |               |           |
//!           parts of zeros    `-------'`-------------'`-----------'
//!                             lone data,  other data,   lone data,
//!                             filled up   a part        filled up
//! ```
//!
//! Data that is too short for a part, with zeros around it, would have to be filled up with zeros that are sent. As the end
//! of a joint it has its zeros beside it for nothing, and a joint is long enough to be sent because of other data of the
//! disk, which is sent once as well. What is sent is data, then, and the seed, and zeros too short for a part of their own.
//!
//! The cut follows from what the disk reads as, and from nothing else: every host that publishes this disk makes the same
//! parts. All lengths here are in blocks.
//!
//! Sources: "Amazon S3 multipart upload limits" in the Amazon S3 User Guide; `UploadPartCopy` in its API reference.

use crate::disk::BLOCK;
use crate::units::MIB;

/// S3 takes no more parts.
const MOST: u64 = 10_000;
/// S3 takes no shorter part but as the last one.
const SHORTEST: u64 = 5 * MIB / BLOCK;
/// How long the seed is.
pub(super) const SEED: u64 = SHORTEST;
/// Below this, a request costs more than the bytes it carries: data that is longer is cut into parts of at least this
/// length, and less than twice it.
const USUAL: u64 = 8 * MIB / BLOCK;
/// Fewer zeros than so many seeds are sent: the scratch object takes requests of its own.
const FEW: u64 = 4;
/// How many seeds the longest part of zeros has at most: S3 takes no part over 5 GiB.
const SEEDS: u64 = 1024;
/// And how many as long as there are parts enough: a part that has to be sent after all, and fails, is sent again whole.
const USUAL_SEEDS: u64 = 12;
/// How many joints there are at most: the scratch object has parts for the seeds, too.
const JOINTS: usize = 4000;

/// Blocks beside each other that are zeros, or are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) blocks: u64,
    pub(super) zeros: bool,
}

impl Run {
    /// All runs of a disk, in order; `blocks` tells of each whether it is zeros.
    pub(super) fn all(blocks: impl Iterator<Item = bool>) -> Vec<Self> {
        let mut runs: Vec<Self> = Vec::new();
        for zeros in blocks {
            match runs.last_mut() {
                Some(run) if run.zeros == zeros => run.blocks += 1,
                _ => runs.push(Self { blocks: 1, zeros }),
            }
        }
        runs
    }
}

/// Blocks of the disk beside each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) blocks: u64,
}

impl Span {
    /// In `pieces` that differ by a block at most.
    fn divided(self, pieces: u64) -> impl Iterator<Item = Self> {
        let Self { mut first, blocks } = self;
        (0..pieces).map(move |piece| {
            let span = Self { first, blocks: blocks / pieces + u64::from(piece < blocks % pieces) };
            first += span.blocks;
            span
        })
    }
}

/// A part of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskPart {
    pub(super) span: Span,
    pub(super) zeros: bool,
    /// Where in the scratch object it begins, if it is there.
    pub(super) source: Option<u64>,
}

/// A part of the scratch object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ScratchPart {
    /// Copied from the seed, and as long.
    Zeros,
    /// These of the disk, in this order.
    Joint(Vec<Span>),
}

/// The parts of a disk, and those of its scratch object, in order.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) disk: Vec<DiskPart>,
    /// Empty: nothing is copied.
    pub(super) scratch: Vec<ScratchPart>,
}

/// Cuts the disk of these runs.
pub(super) fn cut(runs: &[Run]) -> Cut {
    let all: u64 = runs.iter().map(|run| run.blocks).sum();
    // With no part shorter than this, there are never too many.
    let limit = SHORTEST.max(all.div_ceil(MOST));
    let mut shortest = SHORTEST;
    loop {
        let cut = cut_no_shorter(runs, shortest);
        if cut.disk.len() as u64 <= MOST || shortest == limit {
            return cut;
        }
        shortest = limit.min(shortest * 2);
    }
}

fn cut_no_shorter(runs: &[Run], shortest: u64) -> Cut {
    let mut stretches = stretches(runs, shortest);
    let sum = |zeros| stretches.iter().filter(|one| one.is_zeros() == zeros).map(|one| one.span.blocks).sum::<u64>();
    let (data, zeros) = (sum(false), sum(true));
    // A part of data is shorter than twice this; in a joint, lone data is added at both ends.
    let usual = USUAL.max(data.div_ceil(MOST / 2).min(SEEDS * SEED / 2 - SHORTEST)).max(shortest);
    if zeros < FEW * SEED {
        let parts = |one: Stretch| one.parts(if one.is_zeros() { u64::MAX } else { usual });
        return Cut { disk: stretches.into_iter().flat_map(parts).collect(), scratch: Vec::new() };
    }
    let sides = if shortest == SHORTEST { sides(&mut stretches) } else { Sides::default() };
    let longest = stretches.iter().filter(|one| one.is_zeros()).map(|one| one.span.blocks).max().unwrap_or_default();
    // More seeds take more copies to make, but the disk's zeros then need fewer parts. Of a single seed only the whole can be
    // copied.
    let best = (zeros / SEED).isqrt().min(USUAL_SEEDS).max(zeros.div_ceil(SEED * MOST / 2));
    let seeds = best.max((2 * shortest).div_ceil(SEED)).min(longest.div_ceil(SEED)).clamp(2, SEEDS);
    let (mut disk, mut others) = (Vec::new(), Vec::new());
    for stretch in &stretches {
        let begin = disk.len();
        disk.extend(stretch.parts(if stretch.is_zeros() { seeds * SEED } else { usual }));
        others.extend((begin..disk.len()).filter(|_| stretch.what == What::Data));
    }
    let scratch = join(&mut disk, &sides, others, seeds);
    Cut { disk, scratch }
}

/// Blocks of the disk that are all zeros, or are sent.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    span: Span,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Zeros,
    /// Zeros too short for a part may be among it.
    Data,
    /// So much data, with zeros behind it, or before it, that fill it up to the shortest part.
    Lone {
        data: u64,
    },
}

impl Stretch {
    fn is_zeros(self) -> bool {
        self.what == What::Zeros
    }

    /// Zeros are cut into the fewest parts that aren't longer than `length`, data into the most that aren't shorter.
    fn parts(self, length: u64) -> impl Iterator<Item = DiskPart> {
        let zeros = self.is_zeros();
        let pieces = match self.what {
            What::Zeros => self.span.blocks.div_ceil(length),
            What::Data => (self.span.blocks / length).max(1),
            What::Lone { .. } => 1,
        };
        self.span.divided(pieces).map(move |span| DiskPart { span, zeros, source: None })
    }
}

/// Zeros that are too short for a part are joined to the data beside them, and as many as data needs that is too short itself.
/// Only at the end may anything be shorter.
fn stretches(runs: &[Run], shortest: u64) -> Vec<Stretch> {
    let mut stretches = Vec::new();
    let (mut first, mut data) = (0, 0);
    for (index, run) in runs.iter().enumerate() {
        let is_last = index + 1 == runs.len();
        let filling = if data == 0 { 0 } else { shortest.saturating_sub(data).min(run.blocks) };
        let rest = run.blocks - filling;
        if !run.zeros || rest == 0 || (rest < shortest && !is_last) {
            data += run.blocks;
            continue;
        }
        if data > 0 {
            let what = if filling == 0 { What::Data } else { What::Lone { data } };
            stretches.push(Stretch { span: Span { first, blocks: data + filling }, what });
            first += data + filling;
        }
        stretches.push(Stretch { span: Span { first, blocks: rest }, what: What::Zeros });
        first += rest;
        data = 0;
    }
    if data > 0 {
        stretches.push(Stretch { span: Span { first, blocks: data }, what: What::Data });
    }
    stretches
}

/// Lone data for both ends of joints, by its first block. There is something to the right for whatever is to the left.
#[derive(Debug, Default)]
struct Sides {
    left: Vec<Span>,
    right: Vec<Span>,
}

/// Gives lone data a side. What is at a joint's left has its zeros before it: it takes them from there, and leaves those
/// behind it.
fn sides(stretches: &mut [Stretch]) -> Sides {
    let mut sides = Sides::default();
    for at in 0..stretches.len() {
        let Stretch { span, what: What::Lone { data } } = stretches[at] else { continue };
        let filling = span.blocks - data;
        let has_before = at > 0 && stretches[at - 1].is_zeros() && stretches[at - 1].span.blocks >= SHORTEST + filling;
        // Zeros are behind lone data always.
        if sides.left.len() < sides.right.len() && has_before {
            stretches[at - 1].span.blocks -= filling;
            stretches[at].span.first -= filling;
            stretches[at + 1].span.first -= filling;
            stretches[at + 1].span.blocks += filling;
            sides.left.push(Span { first: span.first, blocks: data });
        } else {
            sides.right.push(Span { first: span.first, blocks: data });
        }
    }
    sides
}

/// The scratch object's parts: zeros, and joints of lone data and of the shortest parts with other data. Those of the disk
/// learn where they are in it.
fn join(disk: &mut [DiskPart], sides: &Sides, mut others: Vec<usize>, seeds: u64) -> Vec<ScratchPart> {
    let mut scratch = vec![ScratchPart::Zeros; usize::try_from(seeds).unwrap_or_default()];
    let mut end = seeds * SEED;
    for part in disk.iter_mut().filter(|part| part.zeros) {
        part.source = Some(0);
    }
    others.retain(|at| disk[*at].span.blocks >= SHORTEST);
    others.sort_by_key(|at| disk[*at].span.blocks);
    for ((number, right), other) in sides.right.iter().enumerate().zip(others).take(JOINTS) {
        let mut joint = Vec::new();
        if let Some(left) = sides.left.get(number) {
            let part = holding(disk, *left);
            part.source = Some(end - (left.first - part.span.first));
            joint.push(*left);
            end += left.blocks;
        }
        disk[other].source = Some(end);
        joint.push(disk[other].span);
        end += disk[other].span.blocks;
        holding(disk, *right).source = Some(end);
        joint.push(*right);
        end += right.blocks + SEED;
        scratch.extend([ScratchPart::Joint(joint), ScratchPart::Zeros]);
    }
    scratch
}

/// The part of the disk that this is in.
fn holding(disk: &mut [DiskPart], span: Span) -> &mut DiskPart {
    let at = disk.partition_point(|part| part.span.first + part.span.blocks <= span.first);
    &mut disk[at]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::GIB;

    fn runs(lengths: &[u64], zeros_first: bool) -> Vec<Run> {
        let run = |(index, blocks): (usize, &u64)| Run { blocks: *blocks, zeros: (index % 2 == 0) == zeros_first };
        lengths.iter().enumerate().map(run).collect()
    }

    /// How many blocks the parts of a disk have that begins with data; `z`: zeros, `<`: where in the scratch object they are.
    fn parts(lengths: &[u64]) -> String {
        let Cut { disk, scratch } = cut(&runs(lengths, false));
        let word = |part: DiskPart| {
            let source = part.source.map(|source| format!("<{source}")).unwrap_or_default();
            format!("{}{}{source}", part.span.blocks, if part.zeros { "z" } else { "" })
        };
        let words: Vec<String> = disk.into_iter().map(word).collect();
        let joints = scratch.iter().filter_map(|part| match part {
            ScratchPart::Zeros => None,
            ScratchPart::Joint(spans) => {
                Some(spans.iter().map(|span| format!("{}+{}", span.first, span.blocks)).collect::<Vec<_>>().join(" "))
            }
        });
        let joints: Vec<String> = joints.collect();
        let seeds = scratch.iter().filter(|part| **part == ScratchPart::Zeros).count();
        format!("{} | {seeds} seeds {}", words.join(" "), joints.join(", ")).trim_end().to_owned()
    }

    #[test]
    fn parts_are_cut_where_zeros_begin_and_end() {
        assert_eq!(parts(&[20]), "20 | 0 seeds");
        assert_eq!(parts(&[100]), "17 17 17 17 16 16 | 0 seeds");
        assert_eq!(parts(&[20, 39, 12]), "20 39z 12 | 0 seeds", "a few zeros are sent");
        assert_eq!(parts(&[20, 111, 12]), "20 28z<0 28z<0 28z<0 27z<0 12 | 3 seeds");
        assert_eq!(
            parts(&[20, 1000]),
            "20 100z<0 100z<0 100z<0 100z<0 100z<0 100z<0 100z<0 100z<0 100z<0 100z<0 | 10 seeds"
        );
        // Zeros that are too short for a part are sent.
        assert_eq!(parts(&[20, 9, 20]), "17 16 16 | 0 seeds");
        assert_eq!(parts(&[1, 12, 1]), "14 | 0 seeds");
        assert_eq!(parts(&[20, 9]), "20 9z | 0 seeds");
    }

    #[test]
    fn lone_data_is_beside_zeros_in_the_scratch_object() {
        // The data that begins a disk has zeros on one side only.
        assert_eq!(parts(&[1, 119, 30]), "10<60 28z<0 28z<0 27z<0 27z<0 30<30 | 4 seeds 120+30 0+1");
        // Two for one joint: the second one takes its zeros from before it.
        assert_eq!(
            parts(&[20, 50, 1, 50, 2, 50, 40]),
            "20<32 25z<0 25z<0 10<52 17z<0 16z<0 10<22 25z<0 25z<0 20 20 | 4 seeds 121+2 0+20 70+1"
        );
        // Without other data, and without zeros that are long enough, it is filled up.
        assert_eq!(parts(&[1, 99, 1]), "10 30z<0 30z<0 30z<0 1 | 3 seeds");
        // Data that ends a disk needs no zeros.
        assert_eq!(parts(&[20, 99, 1]), "20 25z<0 25z<0 25z<0 24z<0 1 | 3 seeds");
    }

    fn index(blocks: u64) -> usize {
        usize::try_from(blocks).unwrap()
    }

    #[test]
    fn no_part_is_too_long_however_much_data_there_is() {
        let all = 25_000 * GIB / BLOCK;
        for odd in [5121, 9999, 10_450, 13_111] {
            let Cut { disk, scratch } = cut(&runs(&[odd, 1000, 8, 1000, all - odd - 2008], false));
            assert!(disk.len() as u64 <= MOST);
            let joints = scratch.iter().map(|part| match part {
                ScratchPart::Zeros => SEED,
                ScratchPart::Joint(spans) => spans.iter().map(|span| span.blocks).sum(),
            });
            let longest = disk.iter().map(|part| part.span.blocks).chain(joints).max().unwrap();
            assert!(longest * BLOCK <= 5 * GIB, "{odd}: {longest}");
        }
    }

    #[test]
    fn there_are_no_more_seeds_than_a_part_needs() {
        assert!(parts(&[20, 30, 20, 30, 20, 30, 20, 30, 20, 30]).ends_with(" | 3 seeds"));
        assert!(parts(&[20, 100_000]).ends_with(" | 12 seeds"));
        // Of a single one no shorter zeros could be copied.
        assert!(parts(&[20, 10, 20, 10, 20, 10, 20, 10, 20, 5]).ends_with(" 5z<0 | 2 seeds"));
    }

    fn lengths(longest: u64) -> impl Strategy<Value = Vec<u64>> {
        proptest::collection::vec(prop_oneof![1u64..12, 1u64..40, 1u64..longest.min(4000), 1u64..longest], 1..60)
    }

    proptest! {
        #[test]
        fn parts_cover_the_disk_once_within_s3s_limits(lengths in lengths(900_000), zeros_first: bool) {
            let runs = runs(&lengths, zeros_first);
            let all: u64 = lengths.iter().sum();
            prop_assume!(all * BLOCK <= 25_000 * GIB);
            let Cut { disk, scratch } = cut(&runs);
            prop_assert!(disk.len() as u64 <= MOST);
            let mut end = 0;
            for part in &disk {
                prop_assert_eq!(part.span.first, end);
                end += part.span.blocks;
            }
            prop_assert_eq!(end, all);
            let (last, others) = disk.split_last().unwrap();
            prop_assert!(last.span.blocks > 0);
            for part in others {
                prop_assert!(part.span.blocks >= SHORTEST && part.span.blocks * BLOCK <= 5 * GIB, "{:?}", part);
            }
            prop_assert!(scratch.len() as u64 <= MOST && scratch.len() != 1);
        }

        #[test]
        fn what_is_copied_is_what_the_disk_has_there(lengths in lengths(4000), zeros_first: bool) {
            // Each block of data is known by its number, and zeros by 0.
            let content: Vec<usize> = runs(&lengths, zeros_first)
                .iter()
                .flat_map(|run| (0..run.blocks).map(|_| run.zeros))
                .enumerate()
                .map(|(number, zeros)| if zeros { 0 } else { number + 1 })
                .collect();
            let at = |span: Span| {
                let first = index(span.first);
                &content[first..first + index(span.blocks)]
            };
            let Cut { disk, scratch } = cut(&runs(&lengths, zeros_first));
            let (mut copied, mut sent) = (Vec::new(), vec![0; content.len() + 1]);
            for part in &scratch {
                let begin = copied.len();
                match part {
                    ScratchPart::Zeros => copied.extend(vec![0; index(SEED)]),
                    ScratchPart::Joint(spans) => copied.extend(spans.iter().flat_map(|span| at(*span))),
                }
                prop_assert!(copied.len() - begin >= index(SHORTEST));
                copied[begin..].iter().for_each(|block| sent[*block] += 1);
            }
            for part in &disk {
                prop_assert!(!part.zeros || at(part.span).iter().all(|block| *block == 0));
                match part.source {
                    None => at(part.span).iter().for_each(|block| sent[*block] += 1),
                    Some(source) => {
                        let there = copied.get(index(source)..index(source + part.span.blocks));
                        prop_assert_eq!(there, Some(at(part.span)));
                    }
                }
            }
            for block in content.into_iter().filter(|block| *block != 0) {
                prop_assert_eq!(sent[block], 1, "block {} is sent once", block);
            }
        }
    }
}
