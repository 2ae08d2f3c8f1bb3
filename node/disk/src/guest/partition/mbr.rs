//! Master boot record: four entries of 16 bytes at 446, and a chain of extended boot records.

use super::super::GuestError;
use super::super::bytes::{u8_at, u16_at, u32_at};
use super::super::window::Window;
use super::{Partition, PartitionType, Table, TableKind};
use crate::ByteRange;

/// Logical partitions that are followed: more than any tool makes.
const MAX_LOGICAL: u32 = 256;

/// One entry, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    id: u8,
    start: u64,
    count: u64,
}

/// What a first sector is.
pub(super) enum Found {
    /// The MBR that protects a GPT.
    Protective,
    /// A table of its own.
    Entries(Vec<(u32, Entry)>),
    /// No table, for instance the boot sector of a file system.
    Nothing,
}

/// Boot sectors of file systems carry the signature of an MBR, too. So a table is believed only if every entry is
/// well-formed, at least one is used, and used ones begin within the disk and do not overlap.
pub(super) fn entries(sector: &[u8], disk: &Window) -> Found {
    if u16_at(sector, 510) != 0xaa55 {
        return Found::Nothing;
    }
    let raw: Vec<(u32, u8, Entry)> = (0..4)
        .map(|i| {
            let at = 446 + 16 * i;
            let entry = Entry {
                id: u8_at(sector, at + 4),
                start: u32_at(sector, at + 8).into(),
                count: u32_at(sector, at + 12).into(),
            };
            (i as u32 + 1, u8_at(sector, at), entry)
        })
        .collect();
    let sectors = disk.len() / u64::from(disk.logical_sector());
    let mut used: Vec<(u32, Entry)> = Vec::new();
    for (number, flag, entry) in raw {
        if flag & 0x7f != 0 {
            return Found::Nothing;
        }
        if entry.id == 0 {
            continue;
        }
        if entry.start == 0 || entry.count == 0 || entry.start >= sectors {
            return Found::Nothing;
        }
        used.push((number, entry));
    }
    if used.iter().any(|(_, e)| e.id == 0xee) {
        return Found::Protective;
    }
    let mut sorted: Vec<Entry> = used.iter().map(|(_, e)| *e).collect();
    sorted.sort_by_key(|e| e.start);
    if used.is_empty() || sorted.windows(2).any(|w| w[0].start + w[0].count > w[1].start) {
        return Found::Nothing;
    }
    Found::Entries(used)
}

pub(super) fn read(disk: &Window, primary: Vec<(u32, Entry)>) -> Result<Table, GuestError> {
    let mut table = Table { kind: TableKind::Mbr, partitions: Vec::new(), doubts: Vec::new() };
    for (number, entry) in &primary {
        if !is_extended(entry.id) {
            push(&mut table, disk, *number, *entry);
        }
    }
    let mut number = 5;
    for (_, extended) in primary.iter().filter(|(_, e)| is_extended(e.id)) {
        logical(&mut table, disk, *extended, &mut number)?;
    }
    Ok(table)
}

fn is_extended(id: u8) -> bool {
    matches!(id, 0x05 | 0x0f | 0x85)
}

/// Follows the chain of extended boot records. Each has one partition, relative to itself, and the next record,
/// relative to the extended partition.
fn logical(
    table: &mut Table,
    disk: &Window,
    extended: Entry,
    number: &mut u32,
) -> Result<(), GuestError> {
    let size = u64::from(disk.logical_sector());
    let mut next = 0;
    let mut last = None;
    for _ in 0..MAX_LOGICAL {
        let at = extended.start + next;
        let offset = at * size;
        if offset + 512 > disk.len() {
            table.doubts.push("the chain of logical partitions leads out of the disk".into());
            return Ok(());
        }
        let sector = disk.bytes(offset, 512)?;
        if u16_at(&sector, 510) != 0xaa55 {
            table
                .doubts
                .push("the chain of logical partitions ends in a sector that is none".into());
            return Ok(());
        }
        let entry = |i: usize| Entry {
            id: u8_at(&sector, 446 + 16 * i + 4),
            start: u32_at(&sector, 446 + 16 * i + 8).into(),
            count: u32_at(&sector, 446 + 16 * i + 12).into(),
        };
        let (own, link) = (entry(0), entry(1));
        if own.id != 0 && own.count != 0 {
            push(table, disk, *number, Entry { start: at + own.start, ..own });
            *number += 1;
        }
        if link.id == 0 || link.start == 0 {
            return Ok(());
        }
        // A chain only goes forward; anything else is a loop sooner or later.
        if last.is_some_and(|l| link.start <= l) || link.start >= extended.count {
            table.doubts.push("the chain of logical partitions does not go forward".into());
            return Ok(());
        }
        last = Some(link.start);
        next = link.start;
    }
    table.doubts.push(format!("there are more than {MAX_LOGICAL} logical partitions"));
    Ok(())
}

fn push(table: &mut Table, disk: &Window, number: u32, entry: Entry) {
    let size = u64::from(disk.logical_sector());
    let (start, len) = (entry.start * size, entry.count * size);
    if start >= disk.len() {
        table.doubts.push(format!("partition {number} begins behind the end of the disk"));
        return;
    }
    if start + len > disk.len() {
        table.doubts.push(format!("partition {number} ends behind the end of the disk"));
    }
    let range = ByteRange::new(start, len.min(disk.len() - start));
    let kind = PartitionType::Mbr(entry.id);
    table.partitions.push(Partition { number, range, kind, name: String::new() });
}

pub(super) fn type_name(id: u8) -> Option<&'static str> {
    Some(match id {
        0x01 => "FAT12",
        0x04 | 0x06 | 0x0e => "FAT16",
        0x07 => "NTFS, exFAT or ReFS",
        0x0b | 0x0c => "FAT32",
        0x27 => "Windows recovery",
        0x42 => "dynamic disk (LDM)",
        0x82 => "Linux swap",
        0x83 => "Linux",
        0x8e => "Linux LVM",
        0xa5 | 0xa6 | 0xa9 => "BSD",
        0xaf => "Apple HFS",
        0xef => "EFI system",
        0xfd => "Linux RAID",
        _ => return None,
    })
}
