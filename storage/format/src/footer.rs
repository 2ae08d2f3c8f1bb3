//! The footer of a sealed segment: where each record is, sorted by id, and the proof that the segment is whole.
//!
//! ```text
//! count x 48 bytes, sorted by id then offset
//!   0 32 id · 32 8 offset of the entry · 40 4 length of the entry without padding · 44 2 PG · 46 2 zero
//! trailer, the last 64 bytes of the file
//!   0 4 magic "OSFT" · 4 4 count · 8 8 offset of the footer (= end of the records) · 16 32 BLAKE3 of the entries
//!  48 8 zero · 56 4 CRC-32C of trailer 0..56 · 60 4 magic "OEND"
//! ```

use std::io;

use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::wire::{DecodeError, Put, Reader};

use crate::read_at::ReadAt;
use crate::segment::HEADER_LEN;

/// Bytes of one line of the footer.
pub const LINE_LEN: usize = 48;
/// Bytes of the trailer.
pub const TRAILER_LEN: usize = 64;
const MAGIC: [u8; 4] = *b"OSFT";
const END: [u8; 4] = *b"OEND";

/// Where a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FooterLine {
    /// Id.
    pub id: ChunkId,
    /// Offset of its entry in the file.
    pub offset: u64,
    /// Bytes of the entry without padding.
    pub len: u32,
    /// PG.
    pub pg: PgId,
}

/// The directory of a sealed segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// Lines, sorted.
    pub lines: Vec<FooterLine>,
    /// Where the records end.
    pub records_end: u64,
}

/// Why a footer cannot be used. The segment's records can still be scanned.
#[derive(Debug, thiserror::Error)]
pub enum FooterError {
    /// The system refused.
    #[error("the footer cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Damaged, or there is none.
    #[error("the footer is damaged: {0}")]
    Damaged(#[from] DecodeError),
}

impl Footer {
    /// A footer over lines in any order.
    #[must_use]
    pub fn new(mut lines: Vec<FooterLine>, records_end: u64) -> Self {
        lines.sort_unstable();
        Self { lines, records_end }
    }

    /// Encodes lines and trailer: the bytes from `records_end` to the end of the file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.lines.len() * LINE_LEN + TRAILER_LEN);
        for line in &self.lines {
            out.extend_from_slice(&line.id.0);
            out.put_u64(line.offset);
            out.put_u32(line.len);
            out.put_u16(line.pg.0);
            out.put_u16(0);
        }
        let hash = blake3::hash(&out);
        let mut trailer = Vec::with_capacity(TRAILER_LEN);
        trailer.extend_from_slice(&MAGIC);
        trailer.put_u32(self.lines.len() as u32);
        trailer.put_u64(self.records_end);
        trailer.extend_from_slice(hash.as_bytes());
        trailer.put_u64(0);
        let crc = crc32c::crc32c(&trailer);
        trailer.put_u32(crc);
        trailer.extend_from_slice(&END);
        out.extend_from_slice(&trailer);
        out
    }

    /// Reads and checks the footer of a file of `len` bytes.
    ///
    /// # Errors
    /// [`FooterError`]. Lengths are checked against the file before anything is allocated.
    pub fn read(file: &(impl ReadAt + ?Sized), len: u64) -> Result<Self, FooterError> {
        let short = || DecodeError::Short {
            what: "segment footer",
            needed: TRAILER_LEN,
            left: usize::try_from(len).unwrap_or(usize::MAX),
        };
        let trailer_at = len.checked_sub(TRAILER_LEN as u64).ok_or_else(short)?;
        let mut trailer = [0; TRAILER_LEN];
        file.read_exact_at(&mut trailer, trailer_at)?;
        let mut r = Reader::new("segment footer", &trailer);
        if r.array::<4>()? != MAGIC || trailer[60..] != END {
            return Err(DecodeError::Value {
                what: "footer magic",
                found: "other bytes".to_owned(),
                expected: "\"OSFT\" ... \"OEND\"",
            }
            .into());
        }
        let crc = u32::from_le_bytes([trailer[56], trailer[57], trailer[58], trailer[59]]);
        if crc32c::crc32c(&trailer[..56]) != crc {
            return Err(DecodeError::Checksum { what: "footer trailer" }.into());
        }
        let count = r.u32()? as usize;
        let records_end = r.u64()?;
        let hash: [u8; 32] = r.array()?;
        let bytes = (count * LINE_LEN) as u64;
        if records_end < HEADER_LEN || records_end.checked_add(bytes) != Some(trailer_at) {
            return Err(DecodeError::Value {
                what: "footer count",
                found: count.to_string(),
                expected: "as many lines as stand between the records and the trailer",
            }
            .into());
        }
        let mut lines_bytes = vec![0; count * LINE_LEN];
        file.read_exact_at(&mut lines_bytes, records_end)?;
        if *blake3::hash(&lines_bytes).as_bytes() != hash {
            return Err(DecodeError::Checksum { what: "footer lines" }.into());
        }
        let mut r = Reader::new("segment footer", &lines_bytes);
        let mut lines = Vec::with_capacity(count);
        for _ in 0..count {
            let line = FooterLine {
                id: ChunkId(r.array()?),
                offset: r.u64()?,
                len: r.u32()?,
                pg: PgId(r.u16()?),
            };
            r.u16()?;
            let end = line.offset.checked_add(u64::from(line.len));
            if line.offset < HEADER_LEN || end.is_none_or(|end| end > records_end) {
                return Err(DecodeError::Value {
                    what: "footer offset",
                    found: line.offset.to_string(),
                    expected: "a place among the records",
                }
                .into());
            }
            lines.push(line);
        }
        Ok(Self { lines, records_end })
    }
}
