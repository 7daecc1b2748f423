//! The plain SHA-256 of a whole disk, as `sha256sum` prints it.

use sha2::{Digest as _, Sha256};

use super::{Digest, Error, Image, Work};

/// What is read and hashed at once, in bytes.
const PIECE: u64 = 1 << 20;
/// Progress is told each time this much is done, in bytes.
const TELL: u64 = 16 << 20;
/// What a hole reads as.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Hashes the image from its first byte to its last. A hole is hashed as zeros without being read.
///
/// A SHA-256 is made from front to back, so this is the work of one thread however many `work` allows; a hole takes as
/// long as data, so the progress counts both.
///
/// # Errors
/// [`Error::Read`], [`Error::Cancelled`].
pub fn sha256(image: &Image, work: &Work) -> Result<Digest, Error> {
    let mut sum = Sum { image, work, hasher: Sha256::new(), at: 0 };
    let mut buffer = vec![0; usize::try_from(PIECE).unwrap_or_default()];
    (work.progress)(0, image.size());
    while let Some(data) = image.next_data(sum.at)? {
        sum.zeros(data.start)?;
        sum.data(data.end.min(image.size()), &mut buffer)?;
    }
    sum.zeros(image.size())?;
    (work.progress)(image.size(), image.size());
    Ok(Digest(sum.hasher.finalize().into()))
}

struct Sum<'a> {
    image: &'a Image,
    work: &'a Work<'a>,
    hasher: Sha256,
    /// How many bytes are hashed.
    at: u64,
}

impl Sum<'_> {
    fn zeros(&mut self, end: u64) -> Result<(), Error> {
        while self.at < end {
            let len = (end - self.at).min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..usize::try_from(len).unwrap_or_default()]);
            self.advance(len)?;
        }
        Ok(())
    }

    fn data(&mut self, end: u64, buffer: &mut [u8]) -> Result<(), Error> {
        while self.at < end {
            let len = (end - self.at).min(PIECE);
            let piece = &mut buffer[..usize::try_from(len).unwrap_or_default()];
            self.image.read(self.at, piece)?;
            self.hasher.update(&*piece);
            self.advance(len)?;
        }
        Ok(())
    }

    fn advance(&mut self, len: u64) -> Result<(), Error> {
        let before = self.at / TELL;
        self.at += len;
        if self.at / TELL != before {
            (self.work.progress)(self.at, self.image.size());
        }
        if (self.work.cancelled)() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{Workshop, cases, sparse, text, tool};
    use proptest::prelude::*;
    use std::fs::File;
    use std::sync::atomic::{AtomicU64, Ordering};

    proptest! {
        #![proptest_config(cases(24))]
        #[test]
        fn as_sha256sum_prints_it(
            size in 0_u64..5_000_000,
            pieces in proptest::collection::vec((0_u64..5_000_000, 1_usize..1_500_000, any::<u8>()), 0..4),
        ) {
            let shop = Workshop::new();
            let disk = shop.path("disk");
            let within = |start: u64, len: usize| len.min(usize::try_from(size.saturating_sub(start)).unwrap());
            let pieces: Vec<_> =
                pieces.into_iter().map(|(start, len, byte)| (start, within(start, len), byte)).collect();
            sparse(&disk, size, &pieces);
            let printed = tool("sha256sum", &["--", text(&disk)]);
            let sum = sha256(&Image::raw(&disk).unwrap(), &Work::quiet(1)).unwrap();
            prop_assert_eq!(printed.split(' ').next().unwrap(), sum.to_string());
        }
    }

    #[test]
    fn it_tells_how_far_it_is_and_can_be_stopped() {
        let shop = Workshop::new();
        let disk = shop.path("disk");
        File::create(&disk).unwrap().set_len(100 << 20).unwrap();
        let image = Image::raw(&disk).unwrap();
        let (told, last) = (AtomicU64::new(0), AtomicU64::new(0));
        let progress = |done: u64, total: u64| {
            assert_eq!(total, 100 << 20);
            assert!(done >= last.swap(done, Ordering::Relaxed));
            told.fetch_add(1, Ordering::Relaxed);
        };
        sha256(&image, &Work { progress: &progress, ..Work::quiet(1) }).unwrap();
        assert_eq!((last.into_inner(), told.into_inner()), (100 << 20, 8));
        let stopped = sha256(&image, &Work { cancelled: &|| true, ..Work::quiet(1) });
        assert!(matches!(stopped, Err(Error::Cancelled)));
    }
}
