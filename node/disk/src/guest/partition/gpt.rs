//! GUID partition table: a header and an array of entries, twice, each with a CRC-32.

use uuid::{Uuid, uuid};

use super::super::bytes::{array, u16_at, u32_at, u64_at};
use super::super::window::Window;
use super::super::{GuestError, Name};
use super::{Partition, PartitionType, Table, TableKind};
use crate::ByteRange;

pub(super) const LINUX_SWAP: Uuid = uuid!("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f");
pub(super) const LDM_METADATA: Uuid = uuid!("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3");
pub(super) const LDM_DATA: Uuid = uuid!("af9b60a0-1431-4f62-bc68-3311714a69ad");
pub(super) const MICROSOFT_RESERVED: Uuid = uuid!("e3c9e316-0b5c-4db8-817d-f92df00215ae");
pub(super) const STORAGE_SPACES: Uuid = uuid!("e75caf8f-f680-4cee-afa3-b001e56efc2d");

/// Largest array of entries: 128 times what tools make.
const MAX_TABLE: u64 = 2 << 20;

struct Header {
    first_usable: u64,
    last_usable: u64,
    alternate: u64,
    guid: Uuid,
    /// The entries' bytes, CRC checked.
    entries: Vec<u8>,
    entry_size: usize,
}

/// Reads the copy that is sound: the first, else the one at the end of the disk. The sector size is the disk's own; an
/// image copied from a disk with other sectors is found, too.
pub(super) fn read(disk: &Window) -> Result<Table, GuestError> {
    let own = u64::from(disk.logical_sector());
    let other = if own == 512 { 4096 } else { 512 };
    let mut why = None;
    for sector in [own, other] {
        let primary = header(disk, sector, 1);
        let last = (disk.len() / sector).saturating_sub(1);
        let at = primary.as_ref().map_or(last, |h| h.alternate);
        let backup = header(disk, sector, at)
            .or_else(|e| if at == last { Err(e) } else { header(disk, sector, last) });
        match (primary, backup) {
            (Ok(first), Ok(second)) => {
                let mut table = table(disk, sector, &first)?;
                if first.guid != second.guid || first.entries != second.entries {
                    table
                        .doubts
                        .push("the two copies of the GPT differ; the first was used".into());
                }
                return Ok(table);
            }
            (Ok(first), Err(e)) => {
                let mut table = table(disk, sector, &first)?;
                table
                    .doubts
                    .push(format!("the GPT's copy at the end of the disk cannot be used ({e})"));
                return Ok(table);
            }
            (Err(e), Ok(second)) => {
                let mut table = table(disk, sector, &second)?;
                table.doubts.push(format!(
                    "the GPT at the start of the disk cannot be used ({e}); its copy at the end was"
                ));
                return Ok(table);
            }
            (Err(e), Err(_)) => why = why.or(Some(e)),
        }
    }
    Err(why.unwrap_or_else(|| GuestError::damaged("the GPT", "neither copy is there")))
}

fn header(disk: &Window, sector: u64, lba: u64) -> Result<Header, GuestError> {
    let bad = |detail: String| GuestError::damaged("the GPT header", detail);
    let offset = lba.checked_mul(sector).ok_or_else(|| bad(format!("it is at sector {lba}")))?;
    let bytes = disk.bytes(offset, sector as usize)?;
    if !bytes.starts_with(b"EFI PART") {
        return Err(bad(format!("sector {lba} does not hold its signature")));
    }
    let size = u32_at(&bytes, 12) as usize;
    if size < 92 || size > bytes.len() {
        return Err(bad(format!("it claims to have {size} bytes")));
    }
    let mut summed = bytes[..size].to_vec();
    summed[16..20].fill(0);
    if crc32fast::hash(&summed) != u32_at(&bytes, 16) {
        return Err(bad("its checksum is wrong".into()));
    }
    if u64_at(&bytes, 24) != lba {
        return Err(bad(format!("sector {lba} holds the header of sector {}", u64_at(&bytes, 24))));
    }
    let (count, entry_size) = (u64::from(u32_at(&bytes, 80)), u64::from(u32_at(&bytes, 84)));
    let total = count * entry_size;
    if entry_size < 128 || !entry_size.is_power_of_two() || total > MAX_TABLE {
        return Err(bad(format!("it claims {count} entries of {entry_size} bytes")));
    }
    let entries_at = u64_at(&bytes, 72)
        .checked_mul(sector)
        .ok_or_else(|| bad("its entries are beyond any disk".into()))?;
    let entries = disk.bytes(entries_at, total as usize)?;
    if crc32fast::hash(&entries) != u32_at(&bytes, 88) {
        return Err(GuestError::damaged("the GPT's array of entries", "its checksum is wrong"));
    }
    Ok(Header {
        first_usable: u64_at(&bytes, 40),
        last_usable: u64_at(&bytes, 48),
        alternate: u64_at(&bytes, 32),
        guid: Uuid::from_bytes_le(array(&bytes, 56)),
        entries,
        entry_size: entry_size as usize,
    })
}

fn table(disk: &Window, sector: u64, header: &Header) -> Result<Table, GuestError> {
    let mut table = Table { kind: TableKind::Gpt, partitions: Vec::new(), doubts: Vec::new() };
    for (i, entry) in header.entries.chunks_exact(header.entry_size).enumerate() {
        let kind = Uuid::from_bytes_le(array(entry, 0));
        if kind.is_nil() {
            continue;
        }
        let number = i as u32 + 1;
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let fits = first >= header.first_usable
            && last <= header.last_usable
            && first <= last
            && last
                .checked_add(1)
                .and_then(|n| n.checked_mul(sector))
                .is_some_and(|e| e <= disk.len());
        if !fits {
            table.doubts.push(format!(
                "partition {number} is at sectors {first} to {last}, outside of the disk"
            ));
            continue;
        }
        let units: Vec<u16> =
            (0..36).map(|c| u16_at(entry, 56 + 2 * c)).take_while(|u| *u != 0).collect();
        table.partitions.push(Partition {
            number,
            range: ByteRange::new(first * sector, (last - first + 1) * sector),
            kind: PartitionType::Gpt(kind),
            name: Name::from_utf16(&units).to_string(),
        });
    }
    let mut sorted: Vec<&Partition> = table.partitions.iter().collect();
    sorted.sort_by_key(|p| p.range.start);
    if sorted.windows(2).any(|w| w[0].range.end() > w[1].range.start) {
        table.doubts.push("partitions overlap".into());
    }
    Ok(table)
}

pub(super) fn type_name(id: Uuid) -> Option<&'static str> {
    const NAMES: [(Uuid, &str); 16] = [
        (uuid!("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"), "EFI system"),
        (uuid!("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7"), "basic data"),
        (uuid!("de94bba4-06d1-4d40-a16a-bfd50179d6ac"), "Windows recovery"),
        (MICROSOFT_RESERVED, "Microsoft reserved"),
        (LDM_METADATA, "dynamic disk (LDM) metadata"),
        (LDM_DATA, "dynamic disk (LDM) data"),
        (STORAGE_SPACES, "Storage Spaces"),
        (uuid!("0fc63daf-8483-4772-8e79-3d69d8477de4"), "Linux"),
        (uuid!("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"), "Linux root (x86-64)"),
        (uuid!("933ac7e1-2eb4-4f13-b844-0e14e2aef915"), "Linux home"),
        (uuid!("bc13c2ff-59e6-4262-a352-b275fd6f7172"), "Linux boot"),
        (LINUX_SWAP, "Linux swap"),
        (uuid!("e6d6d379-f507-44c2-a23c-238f2a3df928"), "Linux LVM"),
        (uuid!("a19d880f-05fc-4d3b-a006-743f0f84911e"), "Linux RAID"),
        (uuid!("ca7d7ccb-63ed-4c53-861c-1742536059cc"), "Linux LUKS"),
        (uuid!("21686148-6449-6e6f-744e-656564454649"), "BIOS boot"),
    ];
    NAMES.iter().find(|(known, _)| *known == id).map(|(_, name)| *name)
}
