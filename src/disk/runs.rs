//! What the overlays of a chain hold, as runs of bytes: the upper overlay's run hides what lies below it.

use std::ops::Range;

/// Where the bytes of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// In the file of the overlay that holds them, from this offset (in bytes) on. Past the file's end, zeros.
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
}

impl ExtentKind {
    /// The kind of the bytes that lie `distance` further on in the same run.
    fn after(self, distance: u64) -> Self {
        match self {
            Self::Data { host_offset } => Self::Data { host_offset: host_offset + distance },
            zero @ Self::Zero { .. } => zero,
        }
    }
}

/// A run of bytes that one overlay of a chain holds. Offsets in bytes of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) end: u64,
    /// The index of the overlay in its chain; 0 is the topmost one.
    pub(super) level: usize,
    pub(super) kind: ExtentKind,
}

impl Run {
    /// The part of the run that lies in `range`, if there is one.
    pub(super) fn within(self, range: &Range<u64>) -> Option<Self> {
        let (start, end) = (self.start.max(range.start), self.end.min(range.end));
        (start < end).then(|| Self { start, end, kind: self.kind.after(start - self.start), ..self })
    }

    fn continues(&self, before: &Self) -> bool {
        before.end == self.start
            && before.level == self.level
            && before.kind.after(before.end - before.start) == self.kind
    }
}

/// Appends a run, or extends the last one if the new one continues it.
pub(super) fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if run.continues(last) => last.end = run.end,
        _ => runs.push(run),
    }
}

/// The runs of `upper`, and those of `lower` where `upper` has none. Both are in order and without overlap, and so is
/// the result.
pub(super) fn over(upper: &[Run], lower: &[Run]) -> Vec<Run> {
    let mut all = Vec::with_capacity(upper.len() + lower.len());
    let (mut at, mut rest) = (0, lower);
    for run in upper {
        rest = fill(&mut all, rest, &(at..run.start));
        push(&mut all, *run);
        at = run.end;
    }
    fill(&mut all, rest, &(at..u64::MAX));
    all
}

/// Appends what `lower` has in the gap; returns the runs that end after it.
fn fill<'a>(all: &mut Vec<Run>, lower: &'a [Run], gap: &Range<u64>) -> &'a [Run] {
    let mut rest = lower;
    while let [first, after @ ..] = rest
        && first.start < gap.end
    {
        if let Some(visible) = first.within(gap) {
            push(all, visible);
        }
        if first.end > gap.end {
            break;
        }
        rest = after;
    }
    rest
}

/// The runs of a whole chain, from those of each overlay, the topmost first. Neighbours are joined in pairs, then the
/// pairs, so that the time is proportional to the number of runs and to the logarithm of the chain's length.
pub(super) fn resolve(mut levels: Vec<Vec<Run>>) -> Vec<Run> {
    while levels.len() > 1 {
        let mut rest = levels.into_iter();
        let mut joined = Vec::with_capacity(rest.len().div_ceil(2));
        while let Some(upper) = rest.next() {
            joined.push(match rest.next() {
                Some(lower) => over(&upper, &lower),
                None => upper,
            });
        }
        levels = joined;
    }
    levels.pop().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::cases;
    use proptest::prelude::*;

    fn data(start: u64, end: u64, level: usize, host_offset: u64) -> Run {
        Run { start, end, level, kind: ExtentKind::Data { host_offset } }
    }

    #[test]
    fn an_upper_run_splits_a_lower_one() {
        let zero = Run { start: 30, end: 40, level: 0, kind: ExtentKind::Zero { allocated: false } };
        let found = over(&[data(0, 10, 0, 500), zero], &[data(5, 60, 1, 1000), data(70, 80, 1, 9)]);
        assert_eq!(
            found,
            [data(0, 10, 0, 500), data(10, 30, 1, 1005), zero, data(40, 60, 1, 1035), data(70, 80, 1, 9)]
        );
    }

    #[test]
    fn only_bytes_that_follow_in_the_file_are_joined() {
        let mut runs = Vec::new();
        for run in [data(0, 10, 0, 100), data(10, 20, 0, 110), data(20, 30, 0, 200), data(30, 40, 1, 210)] {
            push(&mut runs, run);
        }
        assert_eq!(runs, [data(0, 20, 0, 100), data(20, 30, 0, 200), data(30, 40, 1, 210)]);
    }

    proptest! {
        #![proptest_config(cases(256))]
        /// Each byte is the topmost overlay's that holds it.
        #[test]
        fn the_topmost_wins(
            levels in prop::collection::vec(prop::collection::vec((0_u64..20, 1_u64..9, 0_u64..3), 0..6), 0..9),
        ) {
            let place = |level: usize, gaps: &[(u64, u64, u64)]| {
                let mut at = 0;
                let run = |(gap, len, kind): &(u64, u64, u64)| {
                    let start = at + gap;
                    at = start + len;
                    let kind = match kind {
                        0 => ExtentKind::Data { host_offset: 1000 + start },
                        kind => ExtentKind::Zero { allocated: *kind == 1 },
                    };
                    Run { start, end: at, level, kind }
                };
                gaps.iter().map(run).collect::<Vec<_>>()
            };
            let levels: Vec<_> = levels.iter().enumerate().map(|(level, gaps)| place(level, gaps)).collect();
            let found = resolve(levels.clone());
            prop_assert!(found.windows(2).all(|two| two[0].end <= two[1].start));
            for at in 0..200 {
                let byte = |runs: &[Run]| runs.iter().find_map(|run| run.within(&(at..at + 1)));
                prop_assert_eq!(byte(&found), levels.iter().find_map(|runs| byte(runs)));
            }
        }
    }
}
