//! How far the unsealed segments of a store are known to be durable.
//!
//! One small file, `WATERMARKS`, for all unsealed segments (at most one a kind): a group commit syncs the segments it wrote
//! to, then writes one slot of this file and syncs it, and only then answers. The two slots are written in turn, each in
//! blocks of its own, so a crash while one is written leaves the other. The slot with the higher generation and a good
//! checksum counts. The file has its full length from the start: its sync carries no metadata.
//!
//! A watermark is a promise in one direction: bytes below it *were* durable, so a bad record there is damage. Bytes above
//! it may be durable, too; they were never acknowledged.
//!
//! ```text
//! slot (4096 bytes, at 0 and at 4096): 0 4 magic "OSWM" · 4 2 version (1) · 6 2 count (at most 64) · 8 8 generation
//!   16 count x (8 segment number, 8 length) · then 4 CRC-32C of all before it · zeros
//! ```

use std::collections::BTreeMap;

use outrider_proto::wire::{DecodeError, Put, Reader};

use crate::segment::SegmentNumber;

/// Name of the file in a store's segment folder.
pub const FILE_NAME: &str = "WATERMARKS";
/// Bytes of one slot.
pub const SLOT_LEN: usize = 4096;
/// Bytes of the file.
pub const FILE_LEN: usize = 2 * SLOT_LEN;
/// Most unsealed segments of a store.
pub const MAX_SEGMENTS: usize = 64;

const MAGIC: [u8; 4] = *b"OSWM";
const VERSION: u16 = 1;

/// Durable lengths of the unsealed segments.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Watermarks {
    /// Grows with every write of the file.
    pub generation: u64,
    /// Durable length of each unsealed segment.
    pub lengths: BTreeMap<SegmentNumber, u64>,
}

impl Watermarks {
    /// Where this generation's slot stands in the file.
    #[must_use]
    pub fn slot_offset(&self) -> u64 {
        (self.generation % 2) * SLOT_LEN as u64
    }

    /// The whole slot. At most [`MAX_SEGMENTS`] segments are written.
    #[must_use]
    pub fn encode_slot(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SLOT_LEN);
        let count = self.lengths.len().min(MAX_SEGMENTS);
        out.extend_from_slice(&MAGIC);
        out.put_u16(VERSION);
        out.put_u16(count as u16);
        out.put_u64(self.generation);
        for (number, length) in self.lengths.iter().take(count) {
            out.put_u64(number.0);
            out.put_u64(*length);
        }
        let crc = crc32c::crc32c(&out);
        out.put_u32(crc);
        out.resize(SLOT_LEN, 0);
        out
    }

    /// The newest good slot of a file; `None` when neither is good.
    #[must_use]
    pub fn decode(file: &[u8]) -> Option<Self> {
        file.chunks(SLOT_LEN)
            .take(2)
            .filter_map(|slot| Self::decode_slot(slot).ok())
            .max_by_key(|w| w.generation)
    }

    /// Decodes one slot.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode_slot(slot: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("watermarks", slot);
        let (magic, version) = (r.array::<4>()?, r.u16()?);
        if magic != MAGIC || version != VERSION {
            return Err(DecodeError::Value {
                what: "watermarks magic and version",
                found: format!("{magic:02x?} {version}"),
                expected: "\"OSWM\" 1",
            });
        }
        let count = usize::from(r.u16()?);
        if count > MAX_SEGMENTS {
            return Err(DecodeError::Value {
                what: "watermark count",
                found: count.to_string(),
                expected: "at most 64",
            });
        }
        let generation = r.u64()?;
        let mut lengths = BTreeMap::new();
        for _ in 0..count {
            lengths.insert(SegmentNumber(r.u64()?), r.u64()?);
        }
        let crc = r.u32()?;
        if crc32c::crc32c(&slot[..16 + count * 16]) != crc {
            return Err(DecodeError::Checksum { what: "watermarks" });
        }
        Ok(Self { generation, lengths })
    }
}
