//! The block map as the file `blocks`.
//!
//! ```text
//! kiln-blocks 1 SIZE 524288
//! INDEX SHA256
//! …
//! digest SHA256
//! ```
//!
//! UTF-8, one LF after each line, numbers in decimal, digests in lower-case hexadecimal. First the version of the
//! format, the disk's size and the block size in bytes. Then one line per data block in rising order; what is not
//! listed is a hole. Last the disk's digest, which also shows that the file is whole. The same map always gives the
//! same bytes.

use super::blocks::{BLOCK, BlockMap, Digest};
use super::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

impl BlockMap {
    /// Writes the map as text, line by line.
    ///
    /// # Errors
    /// [`Error::BlockMapIo`].
    pub fn write_to(&self, out: &mut dyn Write) -> Result<(), Error> {
        let lines = |out: &mut dyn Write| {
            writeln!(out, "kiln-blocks 1 {} {BLOCK}", self.size())?;
            self.data().try_for_each(|(index, digest)| writeln!(out, "{index} {digest}"))?;
            writeln!(out, "digest {}", self.digest())?;
            out.flush()
        };
        lines(&mut std::io::BufWriter::new(out)).map_err(Error::BlockMapIo)
    }

    /// Writes the map to the new file `path`.
    ///
    /// # Errors
    /// [`Error::Create`], [`Error::Write`], [`Error::NoSpace`].
    pub fn create(&self, path: &Path) -> Result<(), Error> {
        let mut file = File::create(path).map_err(|source| Error::create(path, source))?;
        self.write_to(&mut file).map_err(|error| match error {
            Error::BlockMapIo(source) => Error::write(path, source),
            other => other,
        })
    }

    /// Reads the map in a file.
    ///
    /// # Errors
    /// As [`read_from`](Self::read_from); [`Error::BlockMapIo`] also if there is no such file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::read_from(&mut BufReader::new(File::open(path).map_err(Error::BlockMapIo)?))
    }

    /// Reads a map that [`write_to`](Self::write_to) wrote.
    ///
    /// # Errors
    /// [`Error::BlockMap`] with the line that is wrong, also if the file was cut short or changed;
    /// [`Error::BlockMapIo`].
    pub fn read_from(text: &mut dyn BufRead) -> Result<Self, Error> {
        let wrong = |line, what: &str| Error::BlockMap { line, what: what.to_owned() };
        let mut lines = (1..).zip(text.lines());
        let (_, header) = lines.next().ok_or_else(|| wrong(1, "it is empty"))?;
        let mut map = header_of(&header.map_err(Error::BlockMapIo)?)?;
        let mut last_line = 1;
        let mut expected = 0;
        for (number, line) in lines.by_ref() {
            let line = line.map_err(Error::BlockMapIo)?;
            let (key, digest) = line.split_once(' ').ok_or_else(|| wrong(number, "not `INDEX SHA256`"))?;
            let digest = Digest::parse(digest).ok_or_else(|| wrong(number, "not a SHA-256"))?;
            if key == "digest" {
                if digest != map.digest() {
                    return Err(wrong(number, "the digest does not fit the blocks before it"));
                }
                return match lines.next() {
                    Some(_) => Err(wrong(number + 1, "something follows the digest")),
                    None => Ok(map),
                };
            }
            let index = key.parse().map_err(|_| wrong(number, "not a block's index"))?;
            if index < expected || !map.set(index, digest) {
                return Err(wrong(number, "its index is out of order or past the end"));
            }
            expected = index + 1;
            last_line = number;
        }
        Err(wrong(last_line + 1, "the digest is missing: the file was cut short"))
    }
}

fn header_of(line: &str) -> Result<BlockMap, Error> {
    let wrong = |what: String| Error::BlockMap { line: 1, what };
    let fields: Vec<_> = line.split(' ').collect();
    let ["kiln-blocks", version, size, block] = fields[..] else {
        return Err(wrong("not a block map".to_owned()));
    };
    if version != "1" {
        return Err(wrong(format!("version {version} of the format is unknown")));
    }
    if block != BLOCK.to_string() {
        return Err(wrong(format!("blocks of {block} bytes instead of {BLOCK}")));
    }
    BlockMap::parsed(size.parse().map_err(|_| wrong("not a size in bytes".to_owned()))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::cases;
    use proptest::prelude::*;

    fn text(map: &BlockMap) -> String {
        let mut out = Vec::new();
        map.write_to(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn parse(text: &str) -> Result<BlockMap, Error> {
        BlockMap::read_from(&mut text.as_bytes())
    }

    fn example() -> BlockMap {
        BlockMap::from_data(3 * BLOCK, [(1, Digest::of(b"one"))])
    }

    #[test]
    fn as_documented() {
        let lines = text(&example());
        let digest = example().digest();
        let one = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed";
        assert_eq!(lines, format!("kiln-blocks 1 1572864 524288\n1 {one}\ndigest {digest}\n"));
        assert_eq!(parse(&lines).unwrap(), example());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = text(&example());
        let message = |text: &str| parse(text).unwrap_err().to_string();
        assert_eq!(message(""), "line 1 of the block map: it is empty");
        assert_eq!(message("hello"), "line 1 of the block map: not a block map");
        assert_eq!(
            message(&good.replace("blocks 1", "blocks 2")),
            "line 1 of the block map: version 2 of the format is unknown"
        );
        assert_eq!(
            message(&good.replace("524288", "4096")),
            "line 1 of the block map: blocks of 4096 bytes instead of 524288"
        );
        let cut = &good[..good.find("digest").unwrap()];
        assert_eq!(message(cut), "line 3 of the block map: the digest is missing: the file was cut short");
        assert!(message(&good.replace("1 7692", "1 8692")).contains("does not fit"));
        assert!(message(&good.replace("\n1 ", "\n3 ")).contains("out of order or past the end"));
        assert!(message(&(good.clone() + "more\n")).contains("something follows"));
        assert!(message("kiln-blocks 1 18446744073709551615 524288\n").contains("impossible"));
    }

    proptest! {
        #![proptest_config(cases(64))]
        #[test]
        fn there_and_back(
            sectors in 0_u64..20_000,
            blocks in proptest::collection::btree_map(0_u64..20, any::<u64>(), 0..20),
        ) {
            let size = sectors * 512;
            let inside = blocks.iter().filter(|(index, _)| **index < size.div_ceil(BLOCK));
            let map = BlockMap::from_data(size, inside.map(|(index, seed)| (*index, Digest::of(&seed.to_le_bytes()))));
            prop_assert_eq!(parse(&text(&map)).unwrap(), map);
        }
    }
}
