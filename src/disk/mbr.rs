//! The master boot record: four primary partitions, the chain of logical ones, and the protective record of a GPT.
//!
//! Sources: UEFI specification 2.10, chapter 5.2 (records, protective MBR); Linux `block/partitions/msdos.c` (what a
//! valid record is, the extended chain) and `efi.c` (what makes a record protective).

use super::table::{Partition, PartitionKind, Patch};
use super::{ALIGN, Error, Filesystem, Image, SECTOR, probe};

/// Where the four entries begin.
const ENTRIES: usize = 446;
/// Type of the entry that covers a GPT disk.
const PROTECTIVE: u8 = 0xEE;
/// The most logical partitions that are followed; a longer chain is a loop.
const LOGICAL_LIMIT: u32 = 128;
/// What 32 bits of sectors can count, in bytes: 2 TiB.
const LIMIT: u64 = SECTOR << 32;

/// One 16-byte entry; lengths in sectors.
#[derive(Clone, Copy)]
struct Entry {
    status: u8,
    kind: u8,
    first: u32,
    sectors: u32,
}

impl Entry {
    fn of(bytes: &[u8]) -> Self {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { status: bytes[0], kind: bytes[4], first: number(8), sectors: number(12) }
    }

    fn used(self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    fn extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0F | 0x85)
    }
}

fn entries(sector: &[u8]) -> [Entry; 4] {
    [0, 1, 2, 3].map(|index| Entry::of(&sector[ENTRIES + index * 16..ENTRIES + index * 16 + 16]))
}

fn signed(sector: &[u8]) -> bool {
    sector.len() == 512 && sector[510..] == [0x55, 0xAA]
}

/// Whether Linux would look for a GPT behind this record.
pub(super) fn is_protective(sector: &[u8]) -> bool {
    signed(sector) && entries(sector).iter().any(|entry| entry.kind == PROTECTIVE && entry.first == 1)
}

/// The protective record for a disk whose last sector is `last`. A hybrid record, which has other entries too, says
/// more than we know about and is kept as it is.
pub(super) fn protective(sector: &[u8], last: u64) -> Vec<u8> {
    let mut sector = sector.to_vec();
    let size = u32::try_from(last).unwrap_or(u32::MAX);
    let all = entries(&sector);
    let mut used = all.iter().enumerate().filter(|(_, entry)| entry.used());
    if let (Some((index, entry)), None) = (used.next(), used.next())
        && entry.sectors != size
    {
        let at = ENTRIES + index * 16;
        sector[at + 5..at + 8].copy_from_slice(&[0xFF; 3]);
        sector[at + 12..at + 16].copy_from_slice(&size.to_le_bytes());
    }
    sector
}

/// The disk's signature, as `ID_PART_TABLE_UUID` shows it.
pub(super) fn disk_id(sector: &[u8]) -> String {
    format!("{:08x}", u32::from_le_bytes([sector[440], sector[441], sector[442], sector[443]]))
}

/// The partitions of `sector`, or `None` if it is no partition table.
///
/// # Errors
/// [`Error::CutShort`], [`Error::DamagedTable`] for a broken chain of logical partitions, [`Error::Read`].
pub(super) fn read(image: &Image, sector: &[u8]) -> Result<Option<Vec<Partition>>, Error> {
    let sectors = image.size() / SECTOR;
    let sane = |entry: &Entry| matches!(entry.status, 0 | 0x80) && (!entry.used() || u64::from(entry.first) < sectors);
    if !signed(sector) {
        return Ok(None);
    }
    let all = entries(sector);
    if !all.iter().all(sane) || !all.iter().any(|entry| entry.used()) {
        return Ok(None);
    }
    let id = disk_id(sector);
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(all).filter(|(_, entry)| entry.used()) {
        partitions.push(partition(image, &id, number, entry, 0)?);
    }
    if let Some(container) = all.iter().find(|entry| entry.used() && entry.extended()) {
        partitions.extend(logical(image, &id, u64::from(container.first))?);
    }
    Ok(Some(partitions))
}

fn partition(image: &Image, id: &str, number: u32, entry: Entry, base: u64) -> Result<Partition, Error> {
    let start = (base + u64::from(entry.first)) * SECTOR;
    let len = u64::from(entry.sectors) * SECTOR;
    if start + len > image.size() {
        let path = image.path().to_owned();
        return Err(Error::CutShort { path, number, end: start + len, size: image.size() });
    }
    let filesystem = if entry.extended() { Filesystem::unknown() } else { probe::probe(image, start, len)? };
    Ok(Partition {
        number,
        start,
        len,
        kind: PartitionKind::Mbr(entry.kind),
        uuid: Some(format!("{id}-{number:02x}")),
        name: None,
        active: entry.status == 0x80,
        filesystem,
    })
}

/// The chain that begins in sector `container`: each record holds one partition and, maybe, a link to the next.
fn logical(image: &Image, id: &str, container: u64) -> Result<Vec<Partition>, Error> {
    let damaged = || Error::damaged_table(image.path(), "the chain of logical partitions is broken");
    let mut partitions = Vec::new();
    let mut at = container;
    for number in 5..5 + LOGICAL_LIMIT {
        let sector = image.slice(at * SECTOR, 512)?.filter(|sector| signed(sector)).ok_or_else(damaged)?;
        let [own, link, ..] = entries(&sector);
        if own.used() && !own.extended() {
            partitions.push(partition(image, id, number, own, at)?);
        }
        if !link.used() || !link.extended() {
            return Ok(partitions);
        }
        at = container + u64::from(link.first);
    }
    Err(damaged())
}

/// What to write so that primary partition `number` reaches to the end of a disk of `size` bytes.
///
/// # Errors
/// [`Error::MbrLimit`], [`Error::Logical`].
pub(super) fn grow(image: &std::path::Path, sector: &[u8], number: u32, size: u64) -> Result<Vec<Patch>, Error> {
    if size > LIMIT {
        return Err(Error::MbrLimit { path: image.to_owned(), size });
    }
    if number > 4 {
        return Err(Error::Logical { path: image.to_owned(), number });
    }
    let at = ENTRIES + (number as usize - 1) * 16;
    let entry = Entry::of(&sector[at..at + 16]);
    let end = (size / ALIGN * ALIGN / SECTOR).max(u64::from(entry.first) + u64::from(entry.sectors));
    let sectors = u32::try_from(end - u64::from(entry.first)).unwrap_or(u32::MAX);
    if sectors == entry.sectors {
        return Ok(Vec::new());
    }
    let mut bytes = sector.to_vec();
    // The end in cylinders, heads and sectors: "too far to say it so".
    bytes[at + 5..at + 8].copy_from_slice(&[0xFE, 0xFF, 0xFF]);
    bytes[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
    Ok(vec![Patch { offset: 0, bytes }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::testing::{Workshop, apply, memory};
    use crate::disk::{FilesystemKind, Scheme, Table};

    const MIB: usize = 1 << 20;

    /// A record with entries `(status, kind, first, sectors)`.
    fn record(entries: &[(u8, u8, u32, u32)]) -> Vec<u8> {
        let mut sector = vec![0; 512];
        sector[440..444].copy_from_slice(&[0x78, 0x56, 0x34, 0x12]);
        for (index, (status, kind, first, sectors)) in entries.iter().enumerate() {
            let at = ENTRIES + index * 16;
            (sector[at], sector[at + 4]) = (*status, *kind);
            sector[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
            sector[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
        }
        sector[510..].copy_from_slice(&[0x55, 0xAA]);
        sector
    }

    fn disk(records: &[(usize, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0; 32 * MIB];
        for (at, record) in records {
            bytes[at * 512..at * 512 + 512].copy_from_slice(record);
        }
        bytes
    }

    #[test]
    fn primary_and_logical_partitions() {
        let bytes = disk(&[
            (0, record(&[(0x80, 0x83, 2048, 4096), (0, 0, 0, 0), (0, 0x0F, 8192, 20480)])),
            (8192, record(&[(0, 0x83, 2048, 4096), (0, 5, 8192, 8192)])),
            (16384, record(&[(0, 0x82, 2048, 1000)])),
        ]);
        let table = Table::read(&memory(bytes)).unwrap();
        let found: Vec<_> = table.partitions.iter().map(|p| (p.number, p.start / 512, p.len / 512, p.active)).collect();
        let wanted = [(1, 2048, 4096, true), (3, 8192, 20480, false), (5, 10240, 4096, false), (6, 18432, 1000, false)];
        assert_eq!(found, wanted);
        assert_eq!(table.id.as_deref(), Some("12345678"));
        assert_eq!(table.partition(5).unwrap().uuid.as_deref(), Some("12345678-05"));
        assert!(matches!(table.grow(64 << 20, 6), Err(Error::Logical { number: 6, .. })));
        assert!(matches!(table.grow(64 << 20, 1), Err(Error::NotLast { .. })));
    }

    #[test]
    fn a_chain_that_is_a_circle() {
        let bytes = disk(&[
            (0, record(&[(0, 5, 8192, 20480)])),
            (8192, record(&[(0, 0x83, 2048, 4096), (0, 5, 8192, 8192)])),
            (16384, record(&[(0, 0x83, 2048, 1000), (0, 5, 0, 8192)])),
        ]);
        let error = Table::read(&memory(bytes)).unwrap_err().to_string();
        assert!(error.ends_with("the chain of logical partitions is broken"), "{error}");
    }

    #[test]
    fn growing() {
        let shop = Workshop::new();
        let path = shop.path("disk.raw");
        std::fs::write(&path, disk(&[(0, record(&[(0, 0x82, 2048, 2048), (0x80, 0x83, 4096, 1000)]))])).unwrap();
        let image = Image::raw(&path).unwrap();
        let table = Table::read(&image).unwrap();
        assert_eq!(table.scheme, Scheme::Mbr);
        let size = (50 << 20) + 512;
        apply(&path, size, &table.grow(size, 2).unwrap());
        let grown = Table::read(&Image::raw(&path).unwrap()).unwrap();
        assert_eq!(grown.partition(2).unwrap().end(), 50 << 20);
        assert_eq!(grown.partition(1), table.partition(1));
        assert!(grown.grow(size, 2).unwrap().is_empty());
        assert!(matches!(grown.grow((2 << 40) + 512, 2), Err(Error::MbrLimit { .. })));
        let patches = grown.grow(2 << 40, 2).unwrap();
        assert_eq!(Entry::of(&patches[0].bytes[ENTRIES + 16..ENTRIES + 32]).sectors, u32::MAX - 4095);
    }

    #[test]
    fn what_is_no_table() {
        let nothing = |bytes: Vec<u8>| matches!(Table::read(&memory(bytes)), Err(Error::NotADisk { .. }));
        assert!(nothing(vec![0; MIB]));
        assert!(nothing(vec![0; 100]));
        assert!(nothing(Vec::new()));
        assert!(nothing(disk(&[(0, record(&[]))])));
        assert!(nothing(disk(&[(0, record(&[(7, 0x83, 2048, 2048)]))])));
        assert!(nothing(disk(&[(0, record(&[(0, 0x83, 1 << 30, 2048)]))])));
        let cut = Table::read(&memory(disk(&[(0, record(&[(0, 0x83, 2048, 1 << 20)]))])));
        assert!(matches!(cut, Err(Error::CutShort { number: 1, .. })));
    }

    #[test]
    fn one_filesystem_fills_the_disk() {
        let mut bytes = disk(&[]);
        bytes[1080..1082].copy_from_slice(b"\x53\xef");
        let table = Table::read(&memory(bytes)).unwrap();
        assert_eq!((table.scheme, table.partitions[0].number), (Scheme::None, 0));
        assert_eq!(table.partitions[0].filesystem.kind, FilesystemKind::Ext);
        assert!(table.grow(64 << 20, 0).unwrap().is_empty());
        // A FAT's first sector has an MBR's signature.
        let mut fat = disk(&[(0, record(&[]))]);
        fat[54..62].copy_from_slice(b"FAT16   ");
        assert_eq!(Table::read(&memory(fat)).unwrap().scheme, Scheme::None);
    }

    #[test]
    fn the_protective_record() {
        let plain = record(&[(0, PROTECTIVE, 1, 999)]);
        assert!(is_protective(&plain) && !is_protective(&record(&[(0, PROTECTIVE, 2, 999)])));
        assert_eq!(entries(&protective(&plain, 4999))[0].sectors, 4999);
        assert_eq!(entries(&protective(&plain, 1 << 40))[0].sectors, u32::MAX);
        assert_eq!(protective(&plain, 999), plain);
        let hybrid = record(&[(0, PROTECTIVE, 1, 999), (0, 0x83, 2048, 2048)]);
        assert_eq!(protective(&hybrid, 4999), hybrid);
    }
}
