//! One record in a segment.
//!
//! ```text
//! prefix, 48 bytes
//!   0 4 magic "OSR1" · 4 4 length (prefix + name + record, without padding) · 8 8 layout epoch
//!  16 8 storage node incarnation · 24 16 job of the ticket · 40 2 PG · 42 2 flags (1: a name follows)
//!  44 4 CRC-32C of prefix 0..44, name, and the record's header (136 bytes)
//! name, 80 bytes, only with flag 1
//!   0 1 space · 1 1 key length · 2 6 zero · 8 8 fence · 16 64 key, padded with zeros
//! the sealed record, verbatim (see proto::record) · zeros up to a multiple of 8
//! ```

use outrider_proto::frame::MAX_KEY_LEN;
use outrider_proto::ids::{JobId, LayoutEpoch, NodeIncarnation, PgId};
use outrider_proto::record::{self, Header, MAX_PAYLOAD, Record};
use outrider_proto::wire::{DecodeError, Put, Reader};

use crate::segment::ALIGNMENT;

/// Bytes of the prefix.
pub const PREFIX_LEN: usize = 48;
/// Bytes of the name block.
pub const NAME_LEN: usize = 80;
/// First bytes of every entry.
pub const MAGIC: [u8; 4] = *b"OSR1";
/// Largest entry without padding.
pub const MAX_ENTRY: usize = PREFIX_LEN + NAME_LEN + record::HEADER_LEN + MAX_PAYLOAD;

const FLAG_NAMED: u16 = 1;

/// Under which conditions a record was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Provenance {
    /// Layout of the write.
    pub layout_epoch: LayoutEpoch,
    /// Incarnation of the node that wrote.
    pub incarnation: NodeIncarnation,
    /// Job of the ticket; all zeros for copies between storage nodes.
    pub job: JobId,
    /// PG of the id; 0 for named records.
    pub pg: PgId,
}

/// The name of a named record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// Space number.
    pub space: u8,
    /// Key, at most [`MAX_KEY_LEN`] bytes.
    pub key: Vec<u8>,
    /// Fence it was written under.
    pub fence: u64,
}

/// Everything of an entry but the record's payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryHead {
    /// Conditions.
    pub provenance: Provenance,
    /// Name, for named records.
    pub name: Option<Name>,
    /// The record's header.
    pub header: Header,
}

impl EntryHead {
    /// Where the record begins within the entry.
    #[must_use]
    pub fn record_offset(&self) -> usize {
        PREFIX_LEN + if self.name.is_some() { NAME_LEN } else { 0 }
    }

    /// Bytes of the entry without padding.
    #[must_use]
    pub fn len(&self) -> usize {
        self.record_offset() + self.header.record_len()
    }

    /// An entry is never empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes of the entry in the file.
    #[must_use]
    pub fn padded_len(&self) -> u64 {
        padded(self.len())
    }

    /// Decodes the head of an entry from its first bytes; `bytes` may go on with anything.
    ///
    /// # Errors
    /// [`DecodeError`] naming the field. Nothing is allocated by lengths that were not checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("segment record", bytes);
        let magic = r.array::<4>()?;
        if magic != MAGIC {
            return Err(DecodeError::Value {
                what: "segment record magic",
                found: format!("{magic:02x?}"),
                expected: "\"OSR1\"",
            });
        }
        let len = r.u32()? as usize;
        let layout_epoch = LayoutEpoch(r.u64()?);
        let incarnation = NodeIncarnation(r.u64()?);
        let job = JobId::from_bytes(r.array()?);
        let pg = PgId(r.u16()?);
        let flags = r.u16()?;
        let crc = r.u32()?;
        let named = flags & FLAG_NAMED != 0;
        if flags & !FLAG_NAMED != 0 {
            return Err(value("segment record flags", flags, "0 or 1"));
        }
        let name_bytes = if named { r.bytes(NAME_LEN)? } else { &[] };
        let head = r.bytes(record::HEADER_LEN)?;
        let mut sum = crc32c::crc32c(&bytes[..44]);
        sum = crc32c::crc32c_append(sum, name_bytes);
        sum = crc32c::crc32c_append(sum, head);
        if sum != crc {
            return Err(DecodeError::Checksum { what: "segment record head" });
        }
        let header = Header::decode(head)?;
        let name = if named { Some(Name::decode(name_bytes)?) } else { None };
        let entry =
            Self { provenance: Provenance { layout_epoch, incarnation, job, pg }, name, header };
        if entry.len() != len {
            return Err(value("segment record length", len, "the length of its record"));
        }
        Ok(entry)
    }
}

impl Name {
    fn encode(&self) -> [u8; NAME_LEN] {
        let mut out = [0; NAME_LEN];
        let key = &self.key[..self.key.len().min(MAX_KEY_LEN)];
        out[0] = self.space;
        out[1] = u8::try_from(key.len()).unwrap_or(u8::MAX);
        out[8..16].copy_from_slice(&self.fence.to_le_bytes());
        out[16..16 + key.len()].copy_from_slice(key);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("segment record name", bytes);
        let space = r.u8()?;
        let key_len = usize::from(r.u8()?);
        r.bytes(6)?;
        let fence = r.u64()?;
        if key_len > MAX_KEY_LEN {
            return Err(value("key length", key_len, "at most 64"));
        }
        let key = r.bytes(key_len)?.to_vec();
        Ok(Self { space, key, fence })
    }
}

/// The bytes that stand in front of a record in a segment.
#[must_use]
pub fn encode_head(provenance: &Provenance, name: Option<&Name>, record: &Record) -> Vec<u8> {
    let name_block = name.map(Name::encode);
    let name_bytes: &[u8] = name_block.as_ref().map_or(&[], |n| n.as_slice());
    let len = PREFIX_LEN + name_bytes.len() + record.bytes().len();
    let mut out = Vec::with_capacity(PREFIX_LEN + NAME_LEN);
    out.extend_from_slice(&MAGIC);
    out.put_u32(len as u32);
    out.put_u64(provenance.layout_epoch.0);
    out.put_u64(provenance.incarnation.0);
    out.extend_from_slice(&provenance.job.to_bytes());
    out.put_u16(provenance.pg.0);
    out.put_u16(if name.is_some() { FLAG_NAMED } else { 0 });
    let mut crc = crc32c::crc32c(&out);
    crc = crc32c::crc32c_append(crc, name_bytes);
    crc = crc32c::crc32c_append(crc, &record.bytes()[..record::HEADER_LEN]);
    out.put_u32(crc);
    out.extend_from_slice(name_bytes);
    out
}

/// Bytes that an entry of `len` takes in the file.
#[must_use]
pub const fn padded(len: usize) -> u64 {
    (len as u64).next_multiple_of(ALIGNMENT)
}

fn value(what: &'static str, found: impl ToString, expected: &'static str) -> DecodeError {
    DecodeError::Value { what, found: found.to_string(), expected }
}
