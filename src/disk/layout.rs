//! The file of a new overlay: where its tables and clusters go, and writing them.

use super::qcow2::{BACKING_NAME_LIMIT, COPIED, L1_LIMIT, NewHeader, ZERO};
use super::{Error, SECTOR};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Clusters of 64 KiB, QEMU's default.
pub(super) const CLUSTER_BITS: u32 = 16;

/// The backing file of a new overlay.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// A raw file.
    Raw(&'a Path),
    /// Another overlay, which need not be there yet.
    Overlay(&'a Path),
}

impl<'a> Backing<'a> {
    pub(super) fn path(self) -> &'a Path {
        match self {
            Self::Raw(path) | Self::Overlay(path) => path,
        }
    }

    fn format(self) -> &'static str {
        match self {
            Self::Raw(_) => "raw",
            Self::Overlay(_) => "qcow2",
        }
    }
}

/// What neighbouring clusters of a new overlay hold.
#[derive(Clone, Debug)]
pub(super) enum Content<T> {
    /// Data from `T`.
    Data(T),
    /// Zeros; `allocated`: with space in the file, as QEMU leaves zeros that were written over data.
    Zero { allocated: bool },
}

/// Neighbouring clusters of a new overlay, by their indices.
#[derive(Clone, Debug)]
pub(super) struct Piece<T> {
    pub(super) clusters: Range<u64>,
    pub(super) content: Content<T>,
}

impl<T> Piece<T> {
    fn count(&self) -> u64 {
        self.clusters.end - self.clusters.start
    }

    /// How many clusters of the file it takes.
    fn space(&self) -> u64 {
        if matches!(self.content, Content::Zero { allocated: false }) { 0 } else { self.count() }
    }
}

/// A qcow2 overlay that is to be written.
pub(super) struct NewOverlay<'a, T> {
    pub(super) path: &'a Path,
    pub(super) size: u64,
    pub(super) cluster_bits: u32,
    pub(super) backing: Backing<'a>,
    /// What it holds, in order and without overlap.
    pub(super) pieces: &'a [Piece<T>],
}

impl<T> NewOverlay<'_, T> {
    /// Writes the new file: `put` writes the data of a piece at an offset of the file, and `sync` is called last. If
    /// anything fails, the file is removed.
    ///
    /// # Errors
    /// [`Error::OddSize`]; [`Error::Overlay`] if the size or the backing file's name is too large; [`Error::Create`],
    /// [`Error::Write`], [`Error::NoSpace`], and those of `put`.
    pub(super) fn write(
        &self,
        put: impl FnMut(&T, &File, u64) -> Result<(), Error>,
        sync: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<(), Error> {
        let layout = Layout::of(self.size, self.cluster_bits, self.pieces);
        self.check(&layout)?;
        let file = OpenOptions::new().write(true).create_new(true).open(self.path);
        let file = file.map_err(|source| Error::create(self.path, source))?;
        let write_error = |source| Error::write(self.path, source);
        self.data(&layout, &file, put)
            .and_then(|()| layout.write_tables(&file, self.pieces).map_err(write_error))
            // The header is the last: without it, a file that was left half written is no overlay.
            .and_then(|()| file.write_all_at(&self.header(&layout).bytes(), 0).map_err(write_error))
            .and_then(|()| sync(&file).map_err(write_error))
            .inspect_err(|_| {
                // The error that matters is the first one.
                let _ = std::fs::remove_file(self.path);
            })
    }

    fn check(&self, layout: &Layout) -> Result<(), Error> {
        let refused = |what: String| Err(Error::Overlay { path: self.path.to_owned(), what });
        let header = self.header(layout);
        // The header's cluster holds the name too.
        let limit =
            BACKING_NAME_LIMIT.min(layout.cluster_len().saturating_sub(header.bytes().len() - header.backing.len()));
        match self.size {
            size if !size.is_multiple_of(SECTOR) => Err(Error::OddSize { size }),
            _ if header.backing.len() > limit => {
                refused(format!("its backing file's path is longer than {limit} bytes"))
            }
            size if layout.l1_entries * 8 > L1_LIMIT => refused(format!("{size} bytes are more than QEMU's limit")),
            _ => Ok(()),
        }
    }

    fn data(
        &self,
        layout: &Layout,
        file: &File,
        mut put: impl FnMut(&T, &File, u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        file.set_len(layout.total << self.cluster_bits).map_err(|source| Error::write(self.path, source))?;
        let mut at = layout.data_at();
        for piece in self.pieces {
            if let Content::Data(source) = &piece.content {
                put(source, file, at)?;
            }
            at += piece.space() << self.cluster_bits;
        }
        Ok(())
    }

    fn header(&self, layout: &Layout) -> NewHeader<'_> {
        NewHeader {
            size: self.size,
            cluster_bits: self.cluster_bits,
            // Both are small: the L1 table has at most 32 MiB, and each of its entries describes little of the file.
            l1_entries: u32::try_from(layout.l1_entries).unwrap_or(u32::MAX),
            l1_offset: layout.l1_at(),
            refcount_table_offset: layout.cluster(),
            refcount_table_clusters: u32::try_from(layout.table_clusters).unwrap_or(u32::MAX),
            backing: self.backing.path().as_os_str().as_bytes(),
            backing_format: self.backing.format(),
        }
    }
}

/// Where everything goes, in clusters: the header; then the reference count table and its blocks; the L1 table; the
/// L2 tables; the data.
#[derive(Debug)]
struct Layout {
    cluster_bits: u32,
    table_clusters: u64,
    block_clusters: u64,
    l1_entries: u64,
    l1_clusters: u64,
    /// The indices of the L1 entries in use, in order.
    l2: Vec<u64>,
    total: u64,
}

impl Layout {
    fn of<T>(size: u64, cluster_bits: u32, pieces: &[Piece<T>]) -> Self {
        // Entries of an L1, L2 or reference count table per cluster; 16-bit reference counts per cluster.
        let (entries, refcounts) = (1 << (cluster_bits - 3), 1 << (cluster_bits - 1));
        // QEMU keeps at least one L1 entry.
        let l1_entries = size.div_ceil(entries << cluster_bits).max(1);
        let l1_clusters = l1_entries.div_ceil(entries);
        let tables = |piece: &Piece<T>| piece.clusters.start / entries..piece.clusters.end.div_ceil(entries);
        let mut l2: Vec<u64> = pieces.iter().flat_map(tables).collect();
        l2.dedup();
        let fixed = 1 + l1_clusters + l2.len() as u64 + pieces.iter().map(Piece::space).sum::<u64>();
        let (mut table_clusters, mut block_clusters) = (1, 1);
        loop {
            let total = fixed + table_clusters + block_clusters;
            let blocks = u64::div_ceil(total, refcounts);
            let tables = blocks.div_ceil(entries);
            if (tables, blocks) == (table_clusters, block_clusters) {
                return Self { cluster_bits, table_clusters, block_clusters, l1_entries, l1_clusters, l2, total };
            }
            (table_clusters, block_clusters) = (tables, blocks);
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The length of a cluster in memory.
    fn cluster_len(&self) -> usize {
        1 << self.cluster_bits
    }

    fn blocks_at(&self) -> u64 {
        (1 + self.table_clusters) * self.cluster()
    }

    fn l1_at(&self) -> u64 {
        self.blocks_at() + self.block_clusters * self.cluster()
    }

    fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1_clusters * self.cluster()
    }

    fn data_at(&self) -> u64 {
        self.l2_at() + self.l2.len() as u64 * self.cluster()
    }

    /// Writes the reference counts, the L1 table and the L2 tables.
    fn write_tables<T>(&self, file: &File, pieces: &[Piece<T>]) -> io::Result<()> {
        let cluster = self.cluster();
        let blocks = (0..self.block_clusters).map(|index| self.blocks_at() + index * cluster);
        file.write_all_at(&numbers(blocks), cluster)?;
        let (ones, mut left) = (1_u16.to_be_bytes().repeat(self.cluster_len() / 2), self.total * 2);
        for index in 0..self.block_clusters {
            let len = left.min(cluster);
            file.write_all_at(&ones[..usize::try_from(len).unwrap_or(ones.len())], self.blocks_at() + index * cluster)?;
            left -= len;
        }

        let mut l1 = vec![0; usize::try_from(self.l1_entries).unwrap_or_default()];
        let mut entries = self.l2_entries(pieces).peekable();
        let per_table = cluster / 8;
        for (position, index) in (0_u64..).zip(&self.l2) {
            let at = self.l2_at() + position * cluster;
            l1[usize::try_from(*index).unwrap_or_default()] = at | COPIED;
            let mut l2 = vec![0; self.cluster_len() / 8];
            while let Some((cluster, entry)) = entries.next_if(|(cluster, _)| cluster / per_table == *index) {
                l2[usize::try_from(cluster % per_table).unwrap_or_default()] = entry;
            }
            file.write_all_at(&numbers(l2), at)?;
        }
        file.write_all_at(&numbers(l1), self.l1_at())
    }

    /// The L2 entries of the clusters that have one, in order.
    fn l2_entries<T>(&self, pieces: &[Piece<T>]) -> impl Iterator<Item = (u64, u64)> {
        let (cluster, mut at) = (self.cluster(), self.data_at());
        pieces.iter().flat_map(move |piece| {
            let first = at;
            at += piece.space() * cluster;
            let flags = match piece.content {
                Content::Data(_) => COPIED,
                Content::Zero { allocated: true } => COPIED | ZERO,
                Content::Zero { allocated: false } => ZERO,
            };
            let has_space = piece.space() > 0;
            let offset = move |index: u64| if has_space { first + index * cluster } else { 0 };
            (0..piece.count()).map({
                let start = piece.clusters.start;
                move |index| (start + index, offset(index) | flags)
            })
        })
    }
}

fn numbers(values: impl IntoIterator<Item = u64>) -> Vec<u8> {
    values.into_iter().flat_map(u64::to_be_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_cover_themselves() {
        for count in [0, 1, 100, 32_000, 32_763, 32_764, 32_768, 100_000] {
            for cluster_bits in [9, 12, 16] {
                let pieces = [Piece { clusters: 0..count, content: Content::Data(()) }];
                let layout = Layout::of(1 << 36, cluster_bits, &pieces);
                let refcounts = layout.cluster() / 2;
                assert!(layout.block_clusters * refcounts >= layout.total, "{count} of 2^{cluster_bits}");
                assert!(layout.table_clusters * layout.cluster() / 8 >= layout.block_clusters);
                assert_eq!(layout.data_at() / layout.cluster() + count, layout.total);
            }
        }
    }
}
