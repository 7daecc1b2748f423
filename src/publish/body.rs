//! Bytes of the disk as the body of a request: read while they are sent, from wherever in it they are.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::task::{JoinHandle, spawn_blocking};

use super::parts::Extent;

/// How much of the file is held in memory.
const READ: u64 = 256 << 10;

/// These bytes of the file, in this order.
pub(super) fn of(file: &Arc<File>, extents: &[Extent]) -> SdkBody {
    SdkBody::from_body_1_x(Reader { file: Arc::clone(file), left: extents.iter().copied().collect(), reading: None })
}

struct Reader {
    file: Arc<File>,
    left: VecDeque<Extent>,
    /// What is being read, and how many bytes that is.
    reading: Option<(JoinHandle<io::Result<Bytes>>, u64)>,
}

impl Reader {
    /// Cuts off what is read next.
    fn next(&mut self) -> Option<Extent> {
        let extent = self.left.front_mut()?;
        let next = Extent { offset: extent.offset, length: extent.length.min(READ) };
        *extent = Extent { offset: extent.offset + next.length, length: extent.length - next.length };
        if extent.length == 0 {
            self.left.pop_front();
        }
        Some(next)
    }

    fn begin(&mut self) -> Option<(JoinHandle<io::Result<Bytes>>, u64)> {
        let Extent { offset, length } = self.next()?;
        let file = Arc::clone(&self.file);
        let read = move || {
            let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(bytes.into())
        };
        Some((spawn_blocking(read), length))
    }
}

impl Body for Reader {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.reading.is_none() {
            self.reading = self.begin();
        }
        let Some((reading, _)) = &mut self.reading else { return Poll::Ready(None) };
        let read = ready!(Pin::new(reading).poll(context));
        self.reading = None;
        Poll::Ready(Some(read.map_err(io::Error::other).flatten().map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.reading.is_none() && self.left.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let reading = self.reading.as_ref().map(|(_, length)| *length);
        SizeHint::with_exact(self.left.iter().map(|extent| extent.length).chain(reading).sum())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use aws_smithy_types::byte_stream::ByteStream;

    use super::*;

    #[tokio::test]
    async fn extents_are_read_in_their_order() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..1_000_003_u32).map(|number| u8::try_from(number % 251).unwrap()).collect();
        file.write_all(&content).unwrap();
        let extents = [(900_000, 100_003), (0, 600_000), (7, 1)].map(|(offset, length)| Extent { offset, length });
        let body = of(&Arc::new(file), &extents);
        assert_eq!(body.content_length(), Some(700_004));
        let read = ByteStream::new(body).collect().await.unwrap().into_bytes();
        assert!(read == [&content[900_000..], &content[..600_000], &content[7..8]].concat());
    }

    #[tokio::test]
    async fn a_file_that_has_become_shorter_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let body = of(&Arc::new(file), &[Extent { offset: 0, length: 1 }]);
        assert!(ByteStream::new(body).collect().await.is_err());
    }
}
