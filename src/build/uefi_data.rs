//! The UEFI variables that instances start with: a file that the recipe names, as AWS has it.
//!
//! `aws ec2 get-instance-uefi-data` and python-uefivars (`-O aws`) write it: the base64 of `AMZNUEFI`, a checksum, a
//! version and the compressed variables. What stands behind the base64 is taken as well.

use std::fs::File;
use std::io::Read;

use super::inputs::plain;
use crate::error::{Error, Exit};
use crate::recipe::Recipe;
use crate::units::base64;

/// How much base64 AWS takes: 64 KiB, which is the size of the store of an instance.
const LONGEST: usize = 64 << 10;
/// What the bytes begin with.
const MAGIC: &[u8] = b"AMZNUEFI";
/// What their base64 begins with, as far as these bytes determine it.
const MAGIC_BASE64: &str = "QU1aTlVFRk";

/// The variables as base64, if the recipe names some.
///
/// # Errors
/// When the file can't be read, or has something else.
pub(super) fn read(recipe: &Recipe) -> Result<Option<String>, Error> {
    let Some(path) = &recipe.publish.uefi_data else { return Ok(None) };
    let path = recipe.dir().join(path);
    let at_value = |message: String| {
        let error = Error::new(Exit::Input, message);
        match &recipe.publish.uefi_data_span {
            Some(span) => error.at(recipe.place(span)),
            None => error,
        }
    };
    let mut bytes = Vec::new();
    let longest = 2 * LONGEST as u64;
    let read = File::open(&path).and_then(|file| file.take(longest + 1).read_to_end(&mut bytes));
    if let Err(error) = read {
        let message = format!("cannot read `{}`: {}", path.display(), plain(&error));
        return Err(at_value(message).help("paths are relative to the recipe's folder"));
    }
    let too_long = || {
        let message = format!("the UEFI variables in `{}` are too many", path.display());
        at_value(message).help("AWS takes 64 KiB of base64")
    };
    if bytes.len() as u64 > longest {
        return Err(too_long());
    }
    let Some(text) = encoded(&bytes) else {
        let message = format!("`{}` has no UEFI variables as AWS has them", path.display());
        return Err(at_value(message)
            .help("python-uefivars converts them: uefivars -i edk2 -I OVMF_VARS.fd -o aws -O vars.aws"));
    };
    if text.len() > LONGEST { Err(too_long()) } else { Ok(Some(text)) }
}

/// The base64 in, or of, a file; none if it is something else.
fn encoded(bytes: &[u8]) -> Option<String> {
    if bytes.starts_with(MAGIC) {
        return Some(base64(bytes));
    }
    let text: String = std::str::from_utf8(bytes).ok()?.split_ascii_whitespace().collect();
    let digits = text.trim_end_matches('=');
    let is_base64 = digits.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/');
    let padded = text.len() - digits.len() <= 2 && text.len().is_multiple_of(4);
    (text.starts_with(MAGIC_BASE64) && is_base64 && padded).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_bytes_or_their_base64() {
        let bytes = b"AMZNUEFI\x01\x02\x03\x04\0\0\0\0x";
        let text = "QU1aTlVFRkkBAgMEAAAAAHg=";
        assert_eq!(encoded(bytes).as_deref(), Some(text));
        assert_eq!(encoded(format!("{text}\n").as_bytes()).as_deref(), Some(text));
        assert_eq!(encoded(b"QU1aTlVFRkkB\nAgMEAAAAAHg=").as_deref(), Some(text));
        for wrong in [&b""[..], b"_FVH", b"QU1aTlVFRkkBAgMEAAAAAHg", b"QU1aTlVFRkkBAgM$", b"QU1aTlVFRkkB====", b"\xff"]
        {
            assert_eq!(encoded(wrong), None, "{wrong:?}");
        }
    }
}
