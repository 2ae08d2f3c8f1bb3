//! The region table: where the BAT and the metadata are.

use uuid::{Uuid, uuid};

use super::{Fields, checksum};
use super::{MAX_FILE, MIB};
use crate::error::FormatError;
use crate::fields::put;

/// Bytes of a region table, all covered by its checksum.
pub(crate) const TABLE_LEN: usize = 64 << 10;

/// Where the two copies are.
pub(crate) const TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];

const BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
const MAX_ENTRIES: usize = 2047;
const NAME: &str = "region table";

/// A part of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First byte in the file.
    pub offset: u64,
    /// Number of bytes.
    pub length: u32,
}

impl Region {
    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.length))
    }

    pub(crate) fn overlaps(&self, start: u64, len: u64) -> bool {
        start < self.end() && self.offset < start.saturating_add(len)
    }
}

/// The regions that we use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionTable {
    /// The block allocation table.
    pub bat: Region,
    /// The metadata.
    pub metadata: Region,
}

impl RegionTable {
    /// Reads one copy of the table from its 64 KiB.
    ///
    /// # Errors
    /// A wrong signature or checksum, a missing, misplaced or overlapping region, or an unknown region
    /// that must be understood.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let fields = Fields::new(bytes, NAME, TABLE_LEN)?;
        if &fields.array::<4>(0) != b"regi" {
            return Err(FormatError::corrupt(NAME, "does not start with \"regi\""));
        }
        let (found, expected) = (fields.u32(4), checksum(&bytes[..TABLE_LEN]));
        if found != expected {
            let detail = format!("has checksum {found:#x} where its bytes give {expected:#x}");
            return Err(FormatError::corrupt(NAME, detail));
        }
        let count = fields.u32(8) as usize;
        if count > MAX_ENTRIES {
            let detail = format!("has {count} entries; at most {MAX_ENTRIES} are allowed");
            return Err(FormatError::corrupt(NAME, detail));
        }
        let (mut bat, mut metadata) = (None, None);
        let mut all = Vec::with_capacity(count);
        for at in (0..count).map(|i| 16 + i * 32) {
            let id = fields.guid(at);
            let region = Region { offset: fields.u64(at + 16), length: fields.u32(at + 24) };
            let aligned =
                region.offset.is_multiple_of(MIB) && u64::from(region.length).is_multiple_of(MIB);
            let possible = region.end() <= MAX_FILE;
            if !aligned || !possible || region.offset < MIB || region.length == 0 {
                let detail = format!(
                    "puts region {id} at {} with {} bytes; both must be multiples of 1 MiB and not zero",
                    region.offset, region.length
                );
                return Err(FormatError::corrupt(NAME, detail));
            }
            let place = match id {
                BAT => &mut bat,
                METADATA => &mut metadata,
                _ if fields.u32(at + 28) & 1 == 1 => {
                    let detail = format!("requires the unknown region {id}");
                    return Err(FormatError::unsupported(NAME, detail));
                }
                _ => &mut None,
            };
            if place.replace(region).is_some() {
                return Err(FormatError::corrupt(NAME, format!("names region {id} twice")));
            }
            all.push(region);
        }
        refuse_overlap(&mut all)?;
        let missing = |what| FormatError::corrupt(NAME, format!("does not name the {what} region"));
        Ok(Self {
            bat: bat.ok_or_else(|| missing("BAT"))?,
            metadata: metadata.ok_or_else(|| missing("metadata"))?,
        })
    }

    /// The table from its two copies; the second counts only if the first is bad.
    ///
    /// # Errors
    /// Both are bad: what is wrong with the first.
    pub fn choose(first: &[u8], second: &[u8]) -> Result<Self, FormatError> {
        Self::parse(first).or_else(|error| Self::parse(second).map_err(|_| error))
    }

    /// Refuses a log that lies over a region.
    pub(crate) fn check_log(&self, offset: u64, length: u32) -> Result<(), FormatError> {
        let mut all = vec![self.bat, self.metadata];
        if length > 0 {
            all.push(Region { offset, length });
        }
        refuse_overlap(&mut all)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; TABLE_LEN];
        put(&mut out, 0, b"regi");
        put(&mut out, 8, &2_u32.to_le_bytes());
        for (at, (id, region)) in [(16, (BAT, self.bat)), (48, (METADATA, self.metadata))] {
            put(&mut out, at, &id.to_bytes_le());
            put(&mut out, at + 16, &region.offset.to_le_bytes());
            put(&mut out, at + 24, &region.length.to_le_bytes());
            put(&mut out, at + 28, &1_u32.to_le_bytes());
        }
        let crc = checksum(&out);
        put(&mut out, 4, &crc.to_le_bytes());
        out
    }
}

fn refuse_overlap(regions: &mut [Region]) -> Result<(), FormatError> {
    regions.sort_unstable_by_key(|r| r.offset);
    for pair in regions.windows(2) {
        if pair[0].end() > pair[1].offset {
            let detail = format!(
                "has regions that overlap, at {} and {} in the file",
                pair[0].offset, pair[1].offset
            );
            return Err(FormatError::corrupt(NAME, detail));
        }
    }
    Ok(())
}
