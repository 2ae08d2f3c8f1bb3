//! One record of the MFT: fixups and attributes.

use super::super::GuestError;
use super::super::bytes::{array, slice, u8_at, u16_at, u32_at, u64_at};

/// Types of attributes.
pub(super) mod kind {
    pub(in super::super) const STANDARD_INFORMATION: u32 = 0x10;
    pub(in super::super) const ATTRIBUTE_LIST: u32 = 0x20;
    pub(in super::super) const VOLUME_NAME: u32 = 0x60;
    pub(in super::super) const VOLUME_INFORMATION: u32 = 0x70;
    pub(in super::super) const DATA: u32 = 0x80;
    pub(in super::super) const INDEX_ROOT: u32 = 0x90;
    pub(in super::super) const INDEX_ALLOCATION: u32 = 0xa0;
    pub(in super::super) const BITMAP: u32 = 0xb0;
    pub(in super::super) const REPARSE_POINT: u32 = 0xc0;
    pub(in super::super) const END: u32 = 0xffff_ffff;
}

/// What is wrong with a record, or with another block that is fixed up like one: the end of a sentence that names it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadRecord {
    #[error("begins with {0:02x?}, not with FILE")]
    Magic([u8; 4]),
    #[error("has its fixups outside")]
    FixupsOutside,
    #[error("has {count} fixups for {sectors} sectors")]
    FixupCount { count: usize, sectors: usize },
    #[error("was written in part only (its fixups do not match)")]
    Torn,
    #[error("has an attribute of {0} bytes")]
    AttributeLength(usize),
    #[error("has an attribute that ends behind the record")]
    AttributeEnd,
    #[error("has an attribute whose {0} outside of it")]
    Outside(&'static str),
}

/// A record, fixed up.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) sequence: u16,
    pub(super) links: u16,
    pub(super) in_use: bool,
    pub(super) directory: bool,
    /// Record that this one extends; zero: none.
    pub(super) base: u64,
    pub(super) attributes: Vec<Attribute>,
}

/// An attribute, or one piece of it.
#[derive(Debug, Clone)]
pub(super) struct Attribute {
    pub(super) kind: u32,
    pub(super) name: Vec<u16>,
    pub(super) flags: u16,
    pub(super) body: Body,
}

/// Where an attribute's value is.
#[derive(Debug, Clone)]
pub(super) enum Body {
    Resident(Vec<u8>),
    NonResident(NonResident),
}

/// Header of a non-resident attribute; pieces joined.
#[derive(Debug, Clone)]
pub(super) struct NonResident {
    pub(super) lowest: u64,
    pub(super) highest: u64,
    /// Encoded runs of each piece: each begins counting clusters anew.
    pub(super) runs: Vec<(u64, u64, Vec<u8>)>,
    pub(super) size: u64,
    pub(super) initialized: u64,
    /// Exponent of the clusters in a compression unit; zero: not compressed.
    pub(super) unit: u8,
}

impl Attribute {
    pub(super) fn size(&self) -> u64 {
        match &self.body {
            Body::Resident(value) => value.len() as u64,
            Body::NonResident(body) => body.size,
        }
    }

    pub(super) fn is_compressed(&self) -> bool {
        self.flags & 0x00ff != 0
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.flags & 0x4000 != 0
    }

    pub(super) fn why_unreadable(&self) -> Option<&'static str> {
        if self.is_encrypted() {
            Some("it is encrypted (EFS) and the key is in the guest")
        } else if self.flags & 0x00ff > 1 {
            Some("it is compressed by an unknown method")
        } else {
            None
        }
    }
}

impl Record {
    /// Takes a record apart. `None`: the slot was never used.
    pub(super) fn parse(mut bytes: Vec<u8>, number: u64) -> Result<Self, GuestError> {
        let bad = |why: BadRecord| {
            GuestError::damaged("the master file table", format!("record {number} {why}"))
        };
        if !bytes.starts_with(b"FILE") {
            return Err(bad(BadRecord::Magic(array::<4>(&bytes, 0))));
        }
        fix_up(&mut bytes).map_err(bad)?;
        let flags = u16_at(&bytes, 22);
        let used = (u32_at(&bytes, 24) as usize).min(bytes.len());
        let mut attributes = Vec::new();
        let mut at = usize::from(u16_at(&bytes, 20));
        while at + 4 <= used && u32_at(&bytes, at) != kind::END {
            let len = u32_at(&bytes, at + 4) as usize;
            if len < 24 || !len.is_multiple_of(8) {
                return Err(bad(BadRecord::AttributeLength(len)));
            }
            let attribute =
                slice(&bytes[..used], at, len).ok_or_else(|| bad(BadRecord::AttributeEnd))?;
            attributes.push(parse_attribute(attribute).map_err(bad)?);
            at += len;
        }
        Ok(Self {
            sequence: u16_at(&bytes, 16),
            links: u16_at(&bytes, 18),
            in_use: flags & 1 != 0,
            directory: flags & 2 != 0,
            base: u64_at(&bytes, 32) & 0xffff_ffff_ffff,
            attributes,
        })
    }
}

/// Puts back the last two bytes of each sector, which the writer replaced by a number that shows torn writes.
pub(super) fn fix_up(bytes: &mut [u8]) -> Result<(), BadRecord> {
    const SECTOR: usize = 512;
    let (at, count) = (usize::from(u16_at(bytes, 4)), usize::from(u16_at(bytes, 6)));
    let sequence = slice(bytes, at, count * 2).ok_or(BadRecord::FixupsOutside)?.to_vec();
    if count != bytes.len() / SECTOR + 1 {
        return Err(BadRecord::FixupCount { count, sectors: bytes.len() / SECTOR });
    }
    for (i, sector) in bytes.chunks_exact_mut(SECTOR).enumerate() {
        if sector[SECTOR - 2..] != sequence[..2] {
            return Err(BadRecord::Torn);
        }
        sector[SECTOR - 2..].copy_from_slice(&sequence[2 * i + 2..2 * i + 4]);
    }
    Ok(())
}

fn parse_attribute(bytes: &[u8]) -> Result<Attribute, BadRecord> {
    let name = slice(bytes, u16_at(bytes, 10).into(), usize::from(u8_at(bytes, 9)) * 2)
        .ok_or(BadRecord::Outside("name is"))?
        .chunks_exact(2)
        .map(|b| u16::from_le_bytes([b[0], b[1]]))
        .collect();
    let body = if u8_at(bytes, 8) == 0 {
        let value = slice(bytes, u16_at(bytes, 20).into(), u32_at(bytes, 16) as usize)
            .ok_or(BadRecord::Outside("value is"))?;
        Body::Resident(value.to_vec())
    } else {
        let runs = bytes
            .get(usize::from(u16_at(bytes, 32))..)
            .filter(|_| bytes.len() >= 64)
            .ok_or(BadRecord::Outside("runs are"))?;
        let (lowest, highest) = (u64_at(bytes, 16), u64_at(bytes, 24));
        // Sizes are in the first piece only; an empty attribute ends one before its start.
        let first = lowest == 0;
        Body::NonResident(NonResident {
            lowest,
            highest,
            runs: vec![(lowest, highest, runs.to_vec())],
            size: if first { u64_at(bytes, 48) } else { 0 },
            initialized: if first { u64_at(bytes, 56) } else { 0 },
            unit: if first { u8_at(bytes, 34) } else { 0 },
        })
    };
    Ok(Attribute { kind: u32_at(bytes, 0), name, flags: u16_at(bytes, 12), body })
}
