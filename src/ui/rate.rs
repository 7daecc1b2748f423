//! How fast bytes move, and how long the rest takes: smoothed, so that the number can be read.

use std::time::Duration;

use crate::units::{MIB, Size};

/// Over about so many seconds. Parts end in bunches, some seconds apart.
const SMOOTH: f64 = 10.0;
/// Before so many seconds have passed nothing is said of the rate.
const YOUNG: f64 = 1.0;

/// An average that forgets.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rate {
    first: Option<Point>,
    last: Point,
    average: f64,
}

/// So much was done by then, in seconds from anywhere.
#[derive(Debug, Clone, Copy, Default)]
struct Point {
    time: f64,
    done: u64,
}

impl Rate {
    /// Notes how much is done.
    pub(super) fn note(&mut self, time: f64, done: u64) {
        let now = Point { time, done };
        if self.first.is_none() {
            self.first = Some(now);
        } else if time > self.last.time {
            let seconds = time - self.last.time;
            let rate = as_float(done.saturating_sub(self.last.done)) / seconds;
            self.average += (rate - self.average) * weight(seconds);
        } else {
            // At the same moment: counted with the next.
            return;
        }
        self.last = now;
    }

    /// In bytes per second; none as long as it would say little.
    fn per_second(&self) -> Option<f64> {
        let age = self.last.time - self.first?.time;
        // The average began at 0, which is taken out of it here.
        (age >= YOUNG && self.average > 0.0).then(|| self.average / weight(age))
    }

    /// `312 MiB of 538 MiB, 24 MiB/s, 9 s left`
    pub(super) fn in_words(&self, done: u64, total: u64) -> String {
        let so_far = format!("{} of {}", Size(done), Size(total));
        let Some(rate) = self.per_second().filter(|_| done < total) else { return so_far };
        let left = Duration::try_from_secs_f64(as_float(total - done) / rate).unwrap_or(Duration::MAX);
        format!("{so_far}, {}/s, {} left", Size(rounded(rate)), coarse(left))
    }
}

fn weight(seconds: f64) -> f64 {
    1.0 - (-seconds / SMOOTH).exp()
}

#[expect(clippy::cast_precision_loss, reason = "nobody reads the sixteenth digit")]
fn as_float(bytes: u64) -> f64 {
    bytes as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates are positive and finite")]
fn rounded(rate: f64) -> u64 {
    let bytes = rate as u64;
    if bytes < 10 * MIB { bytes } else { bytes / MIB * MIB }
}

/// Whole seconds, minutes, or hours and minutes.
fn coarse(left: Duration) -> String {
    let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_line_has_its_rate_from_the_first_second_on() {
        let mut rate = Rate::default();
        rate.note(100.0, 0);
        assert_eq!(rate.in_words(0, 538 * MIB), "0 B of 538 MiB");
        rate.note(100.5, 12 * MIB);
        assert_eq!(rate.in_words(12 * MIB, 538 * MIB), "12 MiB of 538 MiB", "too early");
        for half_second in 2..=26_u32 {
            rate.note(100.0 + f64::from(half_second) / 2.0, u64::from(half_second) * 12 * MIB + 1);
        }
        assert_eq!(rate.in_words(312 * MIB, 538 * MIB), "312 MiB of 538 MiB, 24 MiB/s, 10 s left");
        assert_eq!(rate.in_words(538 * MIB, 538 * MIB), "538 MiB of 538 MiB");
    }

    #[test]
    fn parts_that_end_together_make_no_peak_and_a_slower_line_shows() {
        let mut rate = Rate::default();
        let (mut time, mut done) = (0.0, 0);
        rate.note(time, done);
        let mut pass = |rate: &mut Rate, rounds: u32, bytes: u64| {
            for _ in 0..rounds {
                time += 2.0;
                for part in 0..4 {
                    done += bytes;
                    rate.note(time + f64::from(part) / 1000.0, done);
                }
            }
            rate.per_second().unwrap() / as_float(MIB)
        };
        let fast = pass(&mut rate, 20, 8 * MIB);
        assert!((14.0..20.0).contains(&fast), "{fast}");
        let slow = pass(&mut rate, 20, MIB);
        assert!((1.5..3.0).contains(&slow), "{slow}");
    }

    #[test]
    fn what_is_left_is_told_coarsely() {
        let told = [0, 59, 60, 61, 3599, 3600, 3660 * 2].map(|seconds| coarse(Duration::from_secs(seconds)));
        assert_eq!(told, ["0 s", "59 s", "1 min", "2 min", "60 min", "1 h 00 min", "2 h 02 min"]);
        assert_eq!(coarse(Duration::from_millis(8200)), "9 s");
    }
}
