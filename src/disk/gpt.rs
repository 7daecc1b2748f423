//! The GUID partition table (UEFI specification 2.10, chapter 5.3).
//!
//! Not through the `gptman` crate: it asserts (panics) on entry sizes other than 128, resets the first usable
//! sector and takes the primary entries to lie in sector 2. Here every byte that needs no change is kept as it is.

use super::guid::Guid;
use super::table::{Partition, PartitionKind, Patch};
use super::{ALIGN, Error, Image, SECTOR, mbr, probe};

/// Length of a header's fields in bytes; the rest of its sector is reserved.
const HEADER: usize = 92;
/// No sane table has more bytes of entries; the usual 128 entries take 16 KiB.
const ENTRIES_LIMIT: u64 = 1 << 20;
/// In sectors.
const ALIGN_SECTORS: u64 = ALIGN / SECTOR;

/// A whole GPT, as read from one of its two copies.
#[derive(Clone, Debug)]
pub(super) struct Gpt {
    /// Sector 0: boot code and protective MBR.
    mbr: Vec<u8>,
    /// The header's sector.
    header: Vec<u8>,
    /// The entries, padded to whole sectors.
    entries: Vec<u8>,
    entry_size: usize,
    /// Where the header was found, in sectors.
    found_at: u64,
    /// Sectors that hold a backup copy, so that a move can clear them.
    backup: Option<std::ops::RangeInclusive<u64>>,
    /// The primary copy was unreadable, so it has to be written again.
    repair: bool,
    path: std::path::PathBuf,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// CRC-32 as the UEFI specification asks for it: ISO 3309, reflected polynomial 0xEDB88320.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// The header's checksum, which is taken with its own field as zero.
fn header_crc(header: &[u8]) -> u32 {
    let len = u32_at(header, 12) as usize;
    let mut copy = header[..len].to_vec();
    put(&mut copy, 16, &[0; 4]);
    crc32(&copy)
}

/// Header and entries, or what is wrong with them.
type Copy = Result<(Vec<u8>, Vec<u8>), String>;

/// Reads and checks the copy whose header is in sector `at`.
fn read_copy(image: &Image, at: u64) -> Result<Copy, Error> {
    let sectors = image.size() / SECTOR;
    let Some(header) = at.checked_mul(SECTOR).map(|start| image.slice(start, 512)).transpose()?.flatten() else {
        return Ok(Err("outside the disk".to_owned()));
    };
    if let Err(what) = check_header(&header, at, sectors) {
        return Ok(Err(what.to_owned()));
    }
    let bytes = u64::from(u32_at(&header, 80)) * u64::from(u32_at(&header, 84));
    let padded = usize::try_from(bytes.next_multiple_of(SECTOR)).unwrap_or_default();
    let start = u64_at(&header, 72).checked_mul(SECTOR);
    let Some(entries) = start.map(|start| image.slice(start, padded)).transpose()?.flatten() else {
        return Ok(Err("its entries lie outside the disk".to_owned()));
    };
    if crc32(&entries[..usize::try_from(bytes).unwrap_or_default()]) != u32_at(&header, 88) {
        return Ok(Err("the checksum of its entries does not match".to_owned()));
    }
    Ok(Ok((header, entries)))
}

fn check_header(header: &[u8], at: u64, sectors: u64) -> Result<(), &'static str> {
    let len = u32_at(header, 12) as usize;
    let (count, entry) = (u64::from(u32_at(header, 80)), u64::from(u32_at(header, 84)));
    if &header[..8] != b"EFI PART" {
        return Err("no signature");
    }
    if !(HEADER..=512).contains(&len) || header_crc(header) != u32_at(header, 16) {
        return Err("the checksum of its header does not match");
    }
    if u32_at(header, 8) != 0x0001_0000 {
        return Err("unknown revision");
    }
    if u64_at(header, 24) != at {
        return Err("its header belongs elsewhere");
    }
    // UEFI 5.3.2: 128 times a power of two.
    if entry < 128 || !entry.is_power_of_two() || count == 0 || count * entry > ENTRIES_LIMIT {
        return Err("its entries have an impossible size");
    }
    if u64_at(header, 40) >= sectors {
        return Err("it begins after the end of the disk");
    }
    Ok(())
}

impl Gpt {
    /// Reads the primary copy, or the backup in the disk's last sector if the primary is damaged.
    ///
    /// # Errors
    /// [`Error::DamagedGpt`], [`Error::SectorSize`], [`Error::Read`].
    pub(super) fn read(image: &Image, mbr: Vec<u8>) -> Result<Self, Error> {
        let last = (image.size() / SECTOR).saturating_sub(1);
        let primary = match read_copy(image, 1)? {
            Ok(copy) => return Self::of(image, mbr, copy, 1)?.with_backup(image),
            Err(what) => what,
        };
        if image.slice(4096, 8)?.as_deref() == Some(b"EFI PART") {
            return Err(Error::SectorSize { path: image.path().to_owned() });
        }
        match read_copy(image, last)? {
            Ok(copy) => Self::of(image, mbr, copy, last),
            Err(backup) => Err(Error::DamagedGpt { path: image.path().to_owned(), primary, backup }),
        }
    }

    fn of(image: &Image, mbr: Vec<u8>, copy: (Vec<u8>, Vec<u8>), found_at: u64) -> Result<Self, Error> {
        let (header, entries) = copy;
        let entry_size = u32_at(&header, 84) as usize;
        let backup = (found_at != 1).then(|| u64_at(&header, 72).min(found_at)..=found_at);
        let repair = found_at != 1;
        let path = image.path().to_owned();
        let gpt = Self { mbr, header, entries, entry_size, found_at, backup, repair, path };
        gpt.check_partitions(image.size())?;
        Ok(gpt)
    }

    /// Remembers where a whole backup copy lies.
    fn with_backup(mut self, image: &Image) -> Result<Self, Error> {
        let at = u64_at(&self.header, 32);
        if let Ok((header, _)) = read_copy(image, at)? {
            let entries = u64_at(&header, 72);
            let near = entries < at && at - entries <= self.entry_sectors();
            self.backup = Some(if near { entries } else { at }..=at);
        }
        Ok(self)
    }

    /// Every partition must have a length, and end inside the disk.
    fn check_partitions(&self, size: u64) -> Result<(), Error> {
        for (number, entry) in self.used() {
            let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
            if first > last || first < 2 || last > u64::MAX / SECTOR - 1 {
                let what = format!("partition {number} reaches from sector {first} to {last}");
                return Err(Error::damaged_table(&self.path, what));
            }
            let end = (last + 1) * SECTOR;
            if end > size {
                return Err(Error::CutShort { path: self.path.clone(), number, end, size });
            }
        }
        Ok(())
    }

    /// The used entries with their numbers, from 1.
    fn used(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let count = u32_at(&self.header, 80);
        (1..=count).zip(self.entries.chunks_exact(self.entry_size)).filter(|(_, entry)| entry[..16] != [0; 16])
    }

    fn entry_sectors(&self) -> u64 {
        self.entries.len() as u64 / SECTOR
    }

    /// The disk's own GUID, which `ID_PART_TABLE_UUID` shows.
    pub(super) fn disk_id(&self) -> String {
        guid(&self.header, 56).to_string()
    }

    pub(super) fn partitions(&self, image: &Image) -> Result<Vec<Partition>, Error> {
        let one = |(number, entry): (u32, &[u8])| {
            let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
            let (start, len) = (first * SECTOR, (last - first + 1) * SECTOR);
            let name: Vec<u16> = entry[56..128].chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
            let name = String::from_utf16_lossy(name.split(|unit| *unit == 0).next().unwrap_or_default());
            Ok(Partition {
                number,
                start,
                len,
                kind: PartitionKind::Gpt(guid(entry, 0)),
                uuid: Some(guid(entry, 16).to_string()),
                name: (!name.is_empty()).then_some(name),
                // Attribute bit 2: "legacy BIOS bootable".
                active: entry[48] & 4 != 0,
                filesystem: probe::probe(image, start, len)?,
            })
        };
        self.used().map(one).collect()
    }

    /// What to write so that the table is right on a disk of `sectors`, with partition `root` reaching to the end
    /// if `extend`. In the order given: a later patch may overwrite part of an earlier one.
    pub(super) fn grow(&self, sectors: u64, root: u32, extend: bool) -> Result<Vec<Patch>, Error> {
        let last = sectors - 1;
        let backup_entries = last.saturating_sub(self.entry_sectors());
        let last_usable = backup_entries.saturating_sub(1);
        let mut entries = self.entries.clone();
        if extend {
            let at = (root as usize - 1) * self.entry_size + 40;
            let aligned = ((last_usable + 1) / ALIGN_SECTORS * ALIGN_SECTORS).saturating_sub(1);
            let end = u64_at(&entries, at).max(aligned);
            put(&mut entries, at, &end.to_le_bytes());
        }
        if let Some(end) = self.used().map(|(_, entry)| u64_at(entry, 40)).max().filter(|end| *end > last_usable) {
            let what = format!("sectors up to {end} are in use, and the backup table needs those after {last_usable}");
            return Err(Error::damaged_table(&self.path, what));
        }
        let primary_entries = if self.found_at == 1 { u64_at(&self.header, 72) } else { 2 };
        if primary_entries + self.entry_sectors() > u64_at(&self.header, 40).max(2) {
            return Err(Error::damaged_table(&self.path, "no room for the primary table's entries"));
        }
        let primary = self.header_for([1, last, primary_entries, last_usable], &entries);
        let backup = self.header_for([last, 1, backup_entries, last_usable], &entries);
        Ok(self.patches(&primary, &backup, &entries, [primary_entries, backup_entries, last]))
    }

    /// A header sector for `[own sector, other copy's sector, entries' sector, last usable sector]`.
    fn header_for(&self, [own, other, entries_at, last_usable]: [u64; 4], entries: &[u8]) -> Vec<u8> {
        let mut header = self.header.clone();
        put(&mut header, 24, &own.to_le_bytes());
        put(&mut header, 32, &other.to_le_bytes());
        put(&mut header, 48, &last_usable.to_le_bytes());
        put(&mut header, 72, &entries_at.to_le_bytes());
        let used = u32_at(&header, 80) as usize * self.entry_size;
        put(&mut header, 88, &crc32(&entries[..used]).to_le_bytes());
        let sum = header_crc(&header);
        put(&mut header, 16, &sum.to_le_bytes());
        header
    }

    fn patches(&self, primary: &[u8], backup: &[u8], entries: &[u8], places: [u64; 3]) -> Vec<Patch> {
        let [primary_entries, backup_entries, last] = places;
        let mbr = mbr::protective(&self.mbr, last);
        let moved = self.backup.as_ref().is_none_or(|old| *old.end() != last);
        if !self.repair && !moved && primary == self.header && entries == self.entries && mbr == self.mbr {
            return Vec::new();
        }
        let patch = |sector: u64, bytes: Vec<u8>| Patch { offset: sector * SECTOR, bytes };
        let mut patches = vec![patch(0, mbr), patch(1, primary.to_vec()), patch(primary_entries, entries.to_vec())];
        patches.extend(self.stale_backup(last).map(|(at, len)| patch(at, vec![0; len])));
        patches.push(patch(backup_entries, [entries, backup].concat()));
        patches
    }

    /// The old backup copy, to be cleared: left where it was, it would lie inside the grown partition, where a
    /// repair tool could take it for the truth. Never touches what a partition holds.
    fn stale_backup(&self, last: u64) -> Option<(u64, usize)> {
        let old = self.backup.clone().filter(|old| *old.end() != last)?;
        let free = |(_, entry): (u32, &[u8])| u64_at(entry, 40) < *old.start() || u64_at(entry, 32) > *old.end();
        let len = (old.end() - old.start() + 1) * SECTOR;
        let beyond_primary = *old.start() > self.entry_sectors() + 2;
        (beyond_primary && self.used().all(free)).then(|| (*old.start(), usize::try_from(len).unwrap_or_default()))
    }
}

fn guid(bytes: &[u8], at: usize) -> Guid {
    let mut guid = [0; 16];
    guid.copy_from_slice(&bytes[at..at + 16]);
    Guid(guid)
}

#[cfg(test)]
mod tests {
    use crate::disk::testing::{Workshop, apply, cases, poke, text, tool};
    use crate::disk::{Error, Image, Patch, Scheme, Table};
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    const MIB: u64 = 1 << 20;

    fn read(disk: &Path) -> Table {
        Table::read(&Image::raw(disk).unwrap()).unwrap()
    }

    fn verified(disk: &Path) {
        let said = tool("sgdisk", &["-v", text(disk)]);
        assert!(said.contains("No problems found"), "{said}");
    }

    /// As cloud images are: the root is number 1 and the last on the disk.
    fn cloud(shop: &Workshop) -> std::path::PathBuf {
        shop.gpt(
            64 * MIB,
            &["-n14:2048:+3M", "-t14:ef02", "-n15:0:+8M", "-t15:ef00", "-c15:boot ü", "-n1:0:0", "-t1:8304"],
        )
    }

    #[test]
    fn what_sgdisk_wrote() {
        let shop = Workshop::new();
        let disk = cloud(&shop);
        let table = read(&disk);
        assert_eq!((table.scheme, table.size), (Scheme::Gpt, 64 * MIB));
        let esp = table.partition(15).unwrap();
        assert_eq!((esp.start, esp.len, esp.name.as_deref()), (4 * MIB, 8 * MIB, Some("boot ü")));
        assert_eq!(table.partitions.iter().map(|p| p.number).collect::<Vec<_>>(), [1, 14, 15]);
        let info = tool("sgdisk", &["-i15", text(&disk)]).to_lowercase();
        assert!(info.contains(esp.uuid.as_deref().unwrap()) && info.contains(&esp.kind.to_string()), "{info}");
        let all = tool("sgdisk", &["-p", text(&disk)]).to_lowercase();
        assert!(all.contains(table.id.as_deref().unwrap()), "{all}");
    }

    #[test]
    fn nothing_to_grow_is_nothing_to_write() {
        let shop = Workshop::new();
        // sgdisk's own root ends 2 MiB before the end: on the last whole MiB that leaves room for the backup.
        assert_eq!(read(&cloud(&shop)).grow(64 * MIB, 1).unwrap(), Vec::<Patch>::new());
    }

    #[test]
    fn the_old_backup_is_cleared() {
        let shop = Workshop::new();
        let disk = cloud(&shop);
        apply(&disk, 1 << 30, &read(&disk).grow(1 << 30, 1).unwrap());
        verified(&disk);
        let mut tail = vec![1; 33 * 512];
        std::fs::File::open(&disk).unwrap().read_exact_at(&mut tail, 64 * MIB - 33 * 512).unwrap();
        assert!(tail.iter().all(|byte| *byte == 0));
        assert_eq!(read(&disk).partition(1).unwrap().end(), (1 << 30) - MIB);
        assert_eq!(read(&disk).grow(1 << 30, 1).unwrap(), Vec::<Patch>::new());
    }

    #[test]
    fn a_damaged_primary_is_read_from_the_backup_and_repaired() {
        let shop = Workshop::new();
        let disk = cloud(&shop);
        let whole = read(&disk);
        for damage in [512 + 40, 1024 + 60] {
            poke(&disk, damage, b"damage!!");
            assert_eq!(read(&disk).partitions, whole.partitions);
            apply(&disk, 64 * MIB, &read(&disk).grow(64 * MIB, 1).unwrap());
            verified(&disk);
        }
        poke(&disk, 512, &[0; 512]);
        apply(&disk, 80 * MIB, &read(&disk).grow(80 * MIB, 1).unwrap());
        verified(&disk);
    }

    #[test]
    fn both_copies_damaged() {
        let shop = Workshop::new();
        let disk = cloud(&shop);
        poke(&disk, 512, b"X");
        poke(&disk, 64 * MIB - 512 + 60, b"X");
        let error = Table::read(&Image::raw(&disk).unwrap()).unwrap_err().to_string();
        assert!(error.ends_with("primary: no signature; backup: the checksum of its header does not match"), "{error}");
    }

    #[test]
    fn partitions_behind_the_root() {
        let shop = Workshop::new();
        let disk = shop.gpt(64 * MIB, &["-n1:0:+20M", "-t1:8304", "-n2:0:+8M", "-t2:8200"]);
        let error = read(&disk).grow(65 * MIB, 1).unwrap_err().to_string();
        assert!(error.ends_with("behind it lies partition 2 (no known filesystem, 8388608 bytes)"), "{error}");
        assert_eq!(read(&disk).grow(64 * MIB, 1).unwrap(), Vec::<Patch>::new());
        // A disk that was made longer: the backup moves, the root stays.
        apply(&disk, 70 * MIB, &[]);
        apply(&disk, 70 * MIB, &read(&disk).grow(70 * MIB, 1).unwrap());
        verified(&disk);
        assert_eq!(read(&disk).partition(1).unwrap().len, 20 * MIB);
    }

    #[test]
    fn sizes_and_numbers_that_cannot_be() {
        let shop = Workshop::new();
        let table = read(&cloud(&shop));
        assert!(matches!(table.grow(63 * MIB, 1), Err(Error::Shrink { .. })));
        assert!(matches!(table.grow(64 * MIB + 100, 1), Err(Error::OddSize { .. })));
        assert!(matches!(table.grow(65 * MIB, 7), Err(Error::NoPartition { number: 7, .. })));
    }

    #[test]
    fn an_image_cut_short() {
        let shop = Workshop::new();
        let disk = cloud(&shop);
        std::fs::OpenOptions::new().write(true).open(&disk).unwrap().set_len(40 * MIB).unwrap();
        let error = Table::read(&Image::raw(&disk).unwrap()).unwrap_err();
        assert!(matches!(error, Error::CutShort { number: 1, size: 41_943_040, .. }), "{error}");
    }

    #[test]
    fn sectors_of_4096_bytes() {
        let shop = Workshop::new();
        let disk = cloud(&shop);
        poke(&disk, 512, &[0; 512]);
        poke(&disk, 64 * MIB - 512, &[0; 512]);
        poke(&disk, 4096, b"EFI PART");
        let error = Table::read(&Image::raw(&disk).unwrap()).unwrap_err();
        assert!(matches!(error, Error::SectorSize { .. }), "{error}");
    }

    #[test]
    fn unusual_tables_keep_what_is_unusual() {
        let shop = Workshop::new();
        // 256 entries, and the main entries at sector 1000.
        let disk = shop.gpt(64 * MIB, &["-S256", "-j1000", "-n3:0:+4M", "-n200:0:0"]);
        assert_eq!(read(&disk).partitions.len(), 2);
        apply(&disk, 90 * MIB, &read(&disk).grow(90 * MIB, 200).unwrap());
        verified(&disk);
        let said = tool("sgdisk", &["-p", text(&disk)]);
        assert!(said.contains("up to 256") && said.contains("begins at sector 1000"), "{said}");
    }

    /// A disk's sectors and how many are added; how partitions are aligned, and how long those before the root are.
    type Layout = (u64, u64, u64, Vec<u64>);

    fn layout() -> impl Strategy<Value = Layout> {
        let align = prop::sample::select(vec![1, 8, 34, 2048]);
        (40_000_u64..200_000, 0_u64..100_000, align, proptest::collection::vec(1_u64..6000, 0..4))
    }

    fn grows(&(sectors, more, align, ref lengths): &Layout) {
        let shop = Workshop::new();
        let mut options = vec![format!("-a{align}")];
        options.extend((2..).zip(lengths).map(|(number, len)| format!("-n{number}:0:+{len}")));
        options.push("-n1:0:0".to_owned());
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let disk = shop.gpt(sectors * 512, &options);
        let before = read(&disk);
        let size = (sectors + more) * 512;
        apply(&disk, size, &before.grow(size, 1).unwrap());
        verified(&disk);
        let after = read(&disk);
        assert_eq!(&after.partitions[1..], &before.partitions[1..]);
        let (old, new) = (before.partition(1).unwrap(), after.partition(1).unwrap());
        assert!(new.end() == old.end() || new.end().is_multiple_of(MIB));
        assert!(new.end() >= old.end() && size - new.end() < MIB + 34 * 512);
    }

    proptest! {
        // sgdisk sleeps for a second whenever it writes: many at once.
        #![proptest_config(cases(4))]
        #[test]
        fn sgdisk_finds_no_problem(layouts in proptest::collection::vec(layout(), 8)) {
            std::thread::scope(|scope| {
                for layout in &layouts {
                    scope.spawn(|| grows(layout));
                }
            });
        }
    }
}
