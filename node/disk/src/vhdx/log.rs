//! The log: finding the updates that count, and writing new ones.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use uuid::Uuid;

use super::LOG_SECTOR;
use super::overlay::{Overlay, Patch, Sector};
use super::{Fields, checksum};
use crate::error::FormatError;
use crate::fields::put;

/// Logs are read whole; Hyper-V makes them 1 MiB long.
pub(crate) const MAX_LOG: u32 = 64 << 20;

/// Descriptors that fit into an entry's first sector: as many updates fit into one of our entries.
pub(crate) const MAX_UPDATES: usize = 126;

const HEADER_LEN: usize = 64;
const DESCRIPTOR_LEN: usize = 32;
const NAME: &str = "log";

/// What replaying the log does to the file.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    /// The updates, later ones over earlier ones.
    pub(crate) updates: Overlay,
    /// The file is at least this long before the updates...
    pub(crate) flushed_len: u64,
    /// ...and this long after them.
    pub(crate) last_len: u64,
}

/// An entry whose every part was checked.
struct Entry {
    sequence: u64,
    sectors: usize,
    tail: u64,
    flushed_len: u64,
    last_len: u64,
    updates: Vec<(u64, u64, Patch)>,
}

/// Finds the active sequence in a whole log: the valid run of entries with consecutive numbers that
/// contains its head's tail, and of those the one with the highest number.
///
/// # Errors
/// No valid sequence exists, or its updates are outside any file.
pub(crate) fn replay(log: &[u8], guid: Uuid) -> Result<Replay, FormatError> {
    let count = log.len() / LOG_SECTOR;
    // Real entries do not overlap, except for the one that was being overwritten. Bytes made to look
    // like many that do must not cost more than a few passes over the log.
    let mut budget = 4 * log.len();
    let mut entries: HashMap<usize, Entry> =
        (0..count).filter_map(|at| Some((at, parse_entry(log, at, guid, &mut budget)?))).collect();

    // The head of each entry's run. Successors have higher numbers, so they are known already.
    let mut order: Vec<usize> = entries.keys().copied().collect();
    order.sort_unstable_by_key(|at| std::cmp::Reverse(entries[at].sequence));
    let mut heads: HashMap<usize, usize> = HashMap::with_capacity(order.len());
    for &at in &order {
        let next = (at + entries[&at].sectors) % count;
        let follows = entries
            .get(&next)
            .is_some_and(|e| Some(e.sequence) == entries[&at].sequence.checked_add(1));
        let head = if follows { heads.get(&next).copied().unwrap_or(at) } else { at };
        heads.insert(at, head);
    }
    let tail_of = |at: usize| (entries[&at].tail / LOG_SECTOR as u64) as usize;
    let head = order
        .iter()
        .copied()
        .find(|&at| heads[&at] == at && heads.get(&tail_of(at)) == Some(&at))
        .ok_or_else(|| {
            FormatError::corrupt(NAME, "is marked as in use but has no valid sequence of entries")
        })?;

    let mut replay = Replay {
        flushed_len: entries[&head].flushed_len,
        last_len: entries[&head].last_len,
        ..Replay::default()
    };
    let mut at = tail_of(head);
    while let Some(entry) = entries.remove(&at) {
        for (start, end, patch) in entry.updates {
            match patch {
                Patch::Zero => replay.updates.put_zeros(start, end),
                Patch::Data(sector) => replay.updates.put_sector(start, sector),
            }
        }
        if at == head {
            break;
        }
        at = (at + entry.sectors) % count;
    }
    Ok(replay)
}

/// Replays a log of which nothing but its bytes is known; gives the number of places that it changes.
pub(crate) fn replay_bytes(log: &[u8]) -> Result<usize, FormatError> {
    let whole = &log[..log.len() / LOG_SECTOR * LOG_SECTOR];
    let guid = Fields::new(whole, NAME, LOG_SECTOR)?.guid(32);
    Ok(replay(whole, guid)?.updates.len())
}

/// The entry that starts at sector `at`, if there is a valid one.
fn parse_entry(log: &[u8], at: usize, guid: Uuid, budget: &mut usize) -> Option<Entry> {
    let start = at * LOG_SECTOR;
    let first = Fields::new(log.get(start..start + LOG_SECTOR)?, NAME, LOG_SECTOR).ok()?;
    if &first.array::<4>(0) != b"loge" || first.guid(32) != guid {
        return None;
    }
    let length = first.u32(8) as usize;
    let (tail, sequence, descriptors) = (first.u32(12), first.u64(16), first.u32(24) as usize);
    let header_sectors =
        (HEADER_LEN + descriptors.checked_mul(DESCRIPTOR_LEN)?).div_ceil(LOG_SECTOR);
    let sound = length.is_multiple_of(LOG_SECTOR)
        && (header_sectors * LOG_SECTOR..=log.len()).contains(&length)
        && (tail as usize).is_multiple_of(LOG_SECTOR)
        && (tail as usize) < log.len()
        && sequence > 0;
    if !sound {
        return None;
    }
    *budget = budget.checked_sub(length)?;
    // An entry may go round the end of the ring.
    let mut bytes = log[start..log.len().min(start + length)].to_vec();
    bytes.extend_from_slice(&log[..length - bytes.len()]);
    if checksum(&bytes) != first.u32(4) {
        return None;
    }
    let updates = parse_updates(&bytes, descriptors, header_sectors, sequence)?;
    Some(Entry {
        sequence,
        sectors: length / LOG_SECTOR,
        tail: u64::from(tail),
        flushed_len: first.u64(48),
        last_len: first.u64(56),
        updates,
    })
}

fn parse_updates(
    entry: &[u8],
    descriptors: usize,
    header_sectors: usize,
    sequence: u64,
) -> Option<Vec<(u64, u64, Patch)>> {
    let fields = Fields::new(entry, NAME, HEADER_LEN).ok()?;
    let unit = LOG_SECTOR as u64;
    let mut data_sectors = entry[header_sectors * LOG_SECTOR..].chunks_exact(LOG_SECTOR);
    let mut updates = Vec::with_capacity(descriptors);
    for at in (0..descriptors).map(|i| HEADER_LEN + i * DESCRIPTOR_LEN) {
        let (offset, number) = (fields.u64(at + 16), fields.u64(at + 24));
        if number != sequence || !offset.is_multiple_of(unit) {
            return None;
        }
        let update = match &fields.array::<4>(at) {
            b"zero" => {
                let length = fields.u64(at + 8);
                let end = offset.checked_add(length).filter(|_| length.is_multiple_of(unit))?;
                (offset, end, Patch::Zero)
            }
            b"desc" => {
                let stored = Fields::new(data_sectors.next()?, NAME, LOG_SECTOR).ok()?;
                let number =
                    (u64::from(stored.u32(4)) << 32) | u64::from(stored.u32(LOG_SECTOR - 4));
                if &stored.array::<4>(0) != b"data" || number != sequence {
                    return None;
                }
                let mut sector: Sector = Box::new(stored.array::<LOG_SECTOR>(0));
                put(&mut sector[..], 0, &fields.array::<8>(at + 8));
                put(&mut sector[..], LOG_SECTOR - 4, &fields.array::<4>(at + 4));
                (offset, offset.checked_add(unit)?, Patch::Data(sector))
            }
            _ => return None,
        };
        updates.push(update);
    }
    Some(updates)
}

/// Where the next entry goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogCursor {
    pub(crate) guid: Uuid,
    /// Sequence number of the next entry.
    pub(crate) sequence: u64,
    /// Its offset in the log.
    pub(crate) position: u64,
}

/// An entry with the given sectors, at most [`MAX_UPDATES`]. Its tail is itself: everything before it
/// is in its place already.
pub(crate) fn encode_entry(
    cursor: &LogCursor,
    updates: &[(u64, Sector)],
    file_len: u64,
) -> Vec<u8> {
    debug_assert!(updates.len() <= MAX_UPDATES, "one entry takes {MAX_UPDATES} updates");
    let mut out = vec![0; LOG_SECTOR * (1 + updates.len())];
    let length = out.len() as u32;
    let sequence = cursor.sequence.to_le_bytes();
    put(&mut out, 0, b"loge");
    put(&mut out, 8, &length.to_le_bytes());
    put(&mut out, 12, &(cursor.position as u32).to_le_bytes());
    put(&mut out, 16, &sequence);
    put(&mut out, 24, &(updates.len() as u32).to_le_bytes());
    put(&mut out, 32, &cursor.guid.to_bytes_le());
    put(&mut out, 48, &file_len.to_le_bytes());
    put(&mut out, 56, &file_len.to_le_bytes());
    for (i, (offset, sector)) in updates.iter().enumerate() {
        let at = HEADER_LEN + i * DESCRIPTOR_LEN;
        put(&mut out, at, b"desc");
        put(&mut out, at + 4, &sector[LOG_SECTOR - 4..]);
        put(&mut out, at + 8, &sector[..8]);
        put(&mut out, at + 16, &offset.to_le_bytes());
        put(&mut out, at + 24, &sequence);
        let data = LOG_SECTOR * (1 + i);
        put(&mut out, data, &sector[..]);
        put(&mut out, data, b"data");
        put(&mut out, data + 4, &sequence[4..]);
        put(&mut out, data + LOG_SECTOR - 4, &sequence[..4]);
    }
    let crc = checksum(&out);
    put(&mut out, 4, &crc.to_le_bytes());
    out
}
