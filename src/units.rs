//! Sizes and durations in the units that people write.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// One GiB in bytes. AWS counts volumes in these.
pub const GIB: u64 = 1 << 30;
/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;

/// A moment that is further away could not be computed with everywhere.
const LONGEST: Duration = Duration::from_hours(365 * 24);

/// A text that isn't a size or a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// The number is missing or not a number.
    #[error("`{0}` has no number; write for example `{1}`")]
    Number(String, &'static str),
    /// The unit is missing or unknown.
    #[error("`{0}` has no known unit; use one of {1}")]
    Unit(String, &'static str),
    /// The value doesn't fit.
    #[error("`{0}` is too large")]
    TooLarge(String),
    /// Nothing waits so long.
    #[error("`{0}` is too long; use at most 365d")]
    TooLong(String),
}

/// A number of bytes, written as `4GiB`, `512MiB` or `4G` (all powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

impl Size {
    /// The number of bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// Rounded up to whole GiB, as AWS sizes its volumes.
    #[must_use]
    pub fn ceil_gib(self) -> Self {
        Self(self.0.div_ceil(GIB) * GIB)
    }

    /// Whether this is a whole number of GiB.
    #[must_use]
    pub fn is_whole_gib(self) -> bool {
        self.0.is_multiple_of(GIB)
    }
}

impl FromStr for Size {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        const UNITS: &str = "B, KiB, MiB, GiB, TiB";
        let (number, unit) = split(text, "4GiB")?;
        let factor: u64 = match unit.to_ascii_lowercase().as_str() {
            "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => MIB,
            "g" | "gib" => GIB,
            "t" | "tib" => 1 << 40,
            _ => return Err(ParseError::Unit(text.to_owned(), UNITS)),
        };
        number.checked_mul(factor).map(Self).ok_or_else(|| ParseError::TooLarge(text.to_owned()))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut unit = 0;
        while unit + 1 < UNITS.len() && self.0 >> (10 * (unit + 2)) > 0 {
            unit += 1;
        }
        let scale = 1u64 << (10 * (unit + 1));
        let (whole, tenth) = (self.0 / scale, self.0 % scale * 10 / scale);
        if tenth == 0 { write!(f, "{whole} {}", UNITS[unit]) } else { write!(f, "{whole}.{tenth} {}", UNITS[unit]) }
    }
}

/// Parses `90s`, `30m`, `1h30m`, `500ms`.
///
/// # Errors
/// When a number or a unit is missing or unknown, and above 365 days.
pub fn parse_duration(text: &str) -> Result<Duration, ParseError> {
    const UNITS: &str = "ms, s, m, h, d";
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(ParseError::Number(text.to_owned(), "30m"));
    }
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number: u64 = rest[..digits].parse().map_err(|_| ParseError::Number(text.to_owned(), "30m"))?;
        rest = rest[digits..].trim_start();
        let letters = rest.len() - rest.trim_start_matches(|c: char| c.is_alphabetic()).len();
        let part = match &rest[..letters] {
            "ms" => Some(Duration::from_millis(number)),
            "s" | "sec" => Some(Duration::from_secs(number)),
            "m" | "min" => number.checked_mul(60).map(Duration::from_secs),
            "h" => number.checked_mul(3600).map(Duration::from_secs),
            "d" => number.checked_mul(86_400).map(Duration::from_secs),
            _ => return Err(ParseError::Unit(text.to_owned(), UNITS)),
        };
        total = part
            .and_then(|part| total.checked_add(part))
            .filter(|total| *total <= LONGEST)
            .ok_or_else(|| ParseError::TooLong(text.to_owned()))?;
        rest = rest[letters..].trim_start();
    }
    Ok(total)
}

/// Bytes as lowercase hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Bytes as base64, with padding (RFC 4648).
#[must_use]
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |chunk: &[u8]| {
        let bits = (0..3).fold(0, |bits, at| bits << 8 | usize::from(chunk.get(at).copied().unwrap_or(0)));
        let digit = |at: usize| if at <= chunk.len() { char::from(DIGITS[bits >> (18 - 6 * at) & 63]) } else { '=' };
        [digit(0), digit(1), digit(2), digit(3)]
    };
    bytes.chunks(3).flat_map(group).collect()
}

/// A duration as people say it: `0.4 s`, `12.3 s`, `3 min 04 s`.
#[must_use]
pub fn show_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 60 {
        format!("{:.1} s", duration.as_secs_f64())
    } else if seconds < 3600 {
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    } else {
        format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60)
    }
}

fn split<'a>(text: &'a str, example: &'static str) -> Result<(u64, &'a str), ParseError> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number = text[..digits].parse().map_err(|_| ParseError::Number(text.to_owned(), example))?;
    Ok((number, text[digits..].trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        let texts = ["", "f", "fo", "foo", "foob", "fooba", "foobar"].map(|text| base64(text.as_bytes()));
        assert_eq!(texts, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"]);
        assert_eq!(base64(&[0xfb, 0xff, 0xfe]), "+//+");
    }

    #[test]
    fn sizes_parse_in_powers_of_1024() {
        assert_eq!("4GiB".parse(), Ok(Size(4 * GIB)));
        assert_eq!("512 M".parse(), Ok(Size(512 * MIB)));
        assert!(matches!("4".parse::<Size>(), Err(ParseError::Unit(..))));
        assert!(matches!("GiB".parse::<Size>(), Err(ParseError::Number(..))));
        assert!(matches!("99999999999TiB".parse::<Size>(), Err(ParseError::TooLarge(_))));
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(Size(512).to_string(), "512 B");
        assert_eq!(Size(4 * GIB).to_string(), "4 GiB");
        assert_eq!(Size(3 * GIB / 2).to_string(), "1.5 GiB");
    }

    #[test]
    fn durations_add_up() {
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert!(parse_duration("30").is_err());
        assert!(parse_duration("").is_err());
        assert_eq!(parse_duration("365d"), Ok(LONGEST));
        for long in ["366d", "364d48h", "999999999999999999d"] {
            assert_eq!(parse_duration(long), Err(ParseError::TooLong(long.to_owned())));
        }
    }
}
