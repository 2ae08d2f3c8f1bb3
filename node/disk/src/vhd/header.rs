//! The dynamic header: where blocks are looked up, and which parent a differencing disk has.

use uuid::Uuid;

use super::locator::{self, LocatorEntry};
use super::{Fields, SECTOR, checksum};
use crate::error::FormatError;
use crate::fields::put;

/// Bytes of the header.
pub(crate) const LEN: usize = 1024;

/// Places for parent locators.
pub(crate) const LOCATORS: usize = 8;

const COOKIE: &[u8; 8] = b"cxsparse";
const NAME: &str = "dynamic header";
const CHECKSUM_AT: usize = 36;
const NAME_AT: usize = 64;
const NAME_LEN: usize = 512;
const LOCATORS_AT: usize = 576;

/// Largest block that is read. Windows makes blocks of 512 KiB and 2 MiB.
const MAX_BLOCK: u32 = 256 << 20;

/// What the dynamic header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DynamicHeader {
    /// File offset of the block allocation table.
    pub table_offset: u64,
    /// Entries that the table has.
    pub entries: u32,
    /// Guest-visible bytes of a block, without its sector bitmap.
    pub block_size: u32,
    /// The id in the footer of the parent; nil without one.
    pub parent_id: Uuid,
    /// When the parent's file was last modified, seconds since 2000-01-01 UTC.
    pub parent_timestamp: u32,
    /// The parent's name or path.
    pub parent_name: String,
    pub(crate) locators: Vec<LocatorEntry>,
}

impl DynamicHeader {
    /// Reads a header's 1024 bytes.
    ///
    /// # Errors
    /// A wrong cookie, checksum or version, or a block size that cannot be.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let fields = Fields::new(bytes, NAME, LEN)?;
        if &fields.array::<8>(0) != COOKIE {
            return Err(FormatError::corrupt(NAME, "does not start with \"cxsparse\""));
        }
        let (found, expected) = (fields.u32(CHECKSUM_AT), checksum(&bytes[..LEN], CHECKSUM_AT));
        if found != expected {
            let detail = format!("has checksum {found:#x} where its bytes give {expected:#x}");
            return Err(FormatError::corrupt(NAME, detail));
        }
        let version = fields.u32(24);
        if version >> 16 != 1 {
            let detail = format!("has version {}.{}, not 1.0", version >> 16, version & 0xffff);
            return Err(FormatError::unsupported(NAME, detail));
        }
        let block_size = fields.u32(32);
        if !block_size.is_power_of_two() || !(SECTOR as u32..=MAX_BLOCK).contains(&block_size) {
            let detail = format!(
                "has block size {block_size}; a power of two from 512 bytes to 256 MiB is expected"
            );
            return Err(FormatError::corrupt(NAME, detail));
        }
        let name = fields.array::<NAME_LEN>(NAME_AT);
        let units = name.chunks_exact(2).map(|c| u16::from_be_bytes([c[0], c[1]]));
        let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        Ok(Self {
            table_offset: fields.u64(16),
            entries: fields.u32(28),
            block_size,
            parent_id: fields.guid(40),
            parent_timestamp: fields.u32(56),
            parent_name: String::from_utf16_lossy(&units),
            locators: (0..LOCATORS)
                .map(|i| LocatorEntry::parse(&fields, LOCATORS_AT + i * locator::ENTRY_LEN))
                .filter(|entry| entry.code != [0; 4])
                .collect(),
        })
    }

    /// The header's 1024 bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; LEN];
        put(&mut out, 0, COOKIE);
        put(&mut out, 8, &u64::MAX.to_be_bytes());
        put(&mut out, 16, &self.table_offset.to_be_bytes());
        put(&mut out, 24, &0x0001_0000_u32.to_be_bytes());
        put(&mut out, 28, &self.entries.to_be_bytes());
        put(&mut out, 32, &self.block_size.to_be_bytes());
        put(&mut out, 40, self.parent_id.as_bytes());
        put(&mut out, 56, &self.parent_timestamp.to_be_bytes());
        // One unit less than there is room for: the rest is the final NUL.
        let units = self.parent_name.encode_utf16().take(NAME_LEN / 2 - 1);
        let name: Vec<u8> = units.flat_map(u16::to_be_bytes).collect();
        put(&mut out, NAME_AT, &name);
        for (i, entry) in self.locators.iter().take(LOCATORS).enumerate() {
            entry.encode(&mut out[LOCATORS_AT + i * locator::ENTRY_LEN..][..locator::ENTRY_LEN]);
        }
        let sum = checksum(&out, CHECKSUM_AT);
        put(&mut out, CHECKSUM_AT, &sum.to_be_bytes());
        out
    }
}
