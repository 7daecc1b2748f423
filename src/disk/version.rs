//! The order in which GRUB's menu generator, through `sort -V`, puts kernels.
//!
//! Follows the rules that the coreutils manual gives under "Version sort ordering": names are compared without
//! their file extensions first, in alternating runs of non-digits and digits; digits compare as numbers; in a run of
//! non-digits `~` comes before the end, the end before letters, and letters before everything else.

use std::cmp::Ordering;

/// Compares two file names as `sort -V` does.
pub(super) fn compare(a: &str, b: &str) -> Ordering {
    let special = |name: &str| match name {
        "" => 0,
        "." => 1,
        ".." => 2,
        name if name.starts_with('.') => 3,
        _ => 4,
    };
    let (a_class, b_class) = (special(a), special(b));
    if a_class != b_class || a_class < 3 {
        return a_class.cmp(&b_class);
    }
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let (a_stem, b_stem) = (&a[..stem_len(a)], &b[..stem_len(b)]);
    // The last resort of sort(1) itself: byte by byte.
    runs(a_stem, b_stem).then_with(|| runs(a, b)).then_with(|| a.cmp(b))
}

/// The length without extensions: without the longest tail of `.` + letter or `~` + letters, digits or `~`, repeated.
/// A name's first byte is never part of an extension.
fn stem_len(name: &[u8]) -> usize {
    let mut stem = name.len();
    let mut end = name.len();
    while let Some(dot) = name[..end].iter().rposition(|byte| *byte == b'.').filter(|dot| *dot > 0) {
        let extension = &name[dot + 1..end];
        let starts = extension.first().is_some_and(|byte| byte.is_ascii_alphabetic() || *byte == b'~');
        if !starts || !extension.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'~') {
            break;
        }
        (stem, end) = (dot, dot);
    }
    stem
}

/// Compares alternating runs of non-digits and digits.
fn runs(mut a: &[u8], mut b: &[u8]) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let ((a_text, a_rest), (b_text, b_rest)) = (split(a, false), split(b, false));
        let ((a_number, a_after), (b_number, b_after)) = (split(a_rest, true), split(b_rest, true));
        let order = texts(a_text, b_text).then_with(|| numbers(a_number, b_number));
        if order.is_ne() {
            return order;
        }
        (a, b) = (a_after, b_after);
    }
    Ordering::Equal
}

/// The leading run of digits, or of non-digits, and the rest.
fn split(bytes: &[u8], digits: bool) -> (&[u8], &[u8]) {
    bytes.split_at(bytes.iter().position(|byte| byte.is_ascii_digit() != digits).unwrap_or(bytes.len()))
}

fn texts(a: &[u8], b: &[u8]) -> Ordering {
    let rank = |byte: Option<&u8>| match byte {
        Some(b'~') => 0,
        None => 1,
        Some(letter) if letter.is_ascii_alphabetic() => 2 + i32::from(*letter),
        Some(other) => 300 + i32::from(*other),
    };
    let ranks = (0..a.len().max(b.len())).map(|at| rank(a.get(at)).cmp(&rank(b.get(at))));
    ranks.into_iter().find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
}

fn numbers(a: &[u8], b: &[u8]) -> Ordering {
    let significant = |number: &[u8]| number.iter().position(|digit| *digit != b'0').unwrap_or(number.len());
    let (a, b) = (&a[significant(a)..], &b[significant(b)..]);
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{cases, tool_with_input};
    use proptest::prelude::*;

    #[test]
    fn kernels() {
        let rising = [
            "vmlinuz-0-rescue-0123456789abcdef",
            "vmlinuz-5.9.0-1-amd64",
            "vmlinuz-5.14.0-70.13.1.el9_0.x86_64",
            "vmlinuz-5.14.0-427.13.1.el9_4.x86_64",
            "vmlinuz-6.1.0~rc1-cloud-amd64",
            "vmlinuz-6.1.0-9-cloud-amd64",
            "vmlinuz-6.1.0-18-cloud-amd64",
            "vmlinuz-6.10.3-amd64",
            "vmlinuz-linux",
        ];
        for pair in rising.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
    }

    // Names that begin with a dot are left out: coreutils 9.1 and 9.2 disagree about those.
    proptest! {
        #![proptest_config(cases(48))]
        #[test]
        fn like_sort_v(names in proptest::collection::vec("[a-c019~_+-][a-c019.~_+-]{0,9}", 2..24)) {
            let mut ours = names.clone();
            ours.sort_by(|a, b| compare(a, b));
            let theirs = tool_with_input("sort", &["-V"], names.join("\n").as_bytes());
            let ours = ours.join("\n") + "\n";
            prop_assert_eq!(ours, String::from_utf8(theirs).unwrap());
        }
    }
}
