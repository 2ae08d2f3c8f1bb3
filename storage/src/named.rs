//! Where each named record is, and the fences. As the chunk index, a cache of the segments.

use std::ops::Bound;

use outrider_format::entry::Name;
use outrider_format::segment::SegmentNumber;
use outrider_proto::ids::ChunkId;
use outrider_proto::wire::{DecodeError, Put, Reader};

use crate::index::{IndexError, Location};

/// Bytes of a key that a fence protects: a job, a point.
pub const FENCED_LEN: usize = 16;

/// A named record in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedEntry {
    /// Key in its space.
    pub key: Vec<u8>,
    /// Fence it was written under.
    pub fence: u64,
    /// Record.
    pub id: ChunkId,
    /// Where it is.
    pub location: Location,
}

/// The table of named records.
#[derive(Debug)]
pub struct NamedTable {
    names: sled::Tree,
    fences: sled::Tree,
}

/// Key of the fence that protects a name.
#[must_use]
pub fn fence_key(space: u8, key: &[u8]) -> Vec<u8> {
    [&[space], &key[..key.len().min(FENCED_LEN)]].concat()
}

impl NamedTable {
    /// The table in a database.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn open(db: &sled::Db) -> Result<Self, IndexError> {
        Ok(Self { names: db.open_tree("names")?, fences: db.open_tree("fences")? })
    }

    /// The record of a name.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn get(&self, space: u8, key: &[u8]) -> Result<Option<NamedEntry>, IndexError> {
        let value = self.names.get([&[space], key].concat())?;
        value.map(|v| decode(key.to_vec(), &v)).transpose()
    }

    /// Highest fence seen for what a key begins with.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn fence(&self, space: u8, key: &[u8]) -> Result<u64, IndexError> {
        let value = self.fences.get(fence_key(space, key))?;
        Ok(value.and_then(|v| v[..].try_into().ok()).map_or(0, u64::from_le_bytes))
    }

    /// Keeps a name, unless a newer fence has it; raises the fence.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn insert(&self, name: &Name, id: ChunkId, at: Location) -> Result<(), IndexError> {
        let known = self.get(name.space, &name.key)?;
        if known.is_none_or(|k| k.fence <= name.fence) {
            let mut value = Vec::with_capacity(60);
            value.put_u64(name.fence);
            value.extend_from_slice(&id.0);
            value.put_u64(at.segment.0);
            value.put_u64(at.offset);
            value.put_u32(at.len);
            self.names.insert([&[name.space], name.key.as_slice()].concat(), value)?;
        }
        if self.fence(name.space, &name.key)? < name.fence {
            self.fences.insert(fence_key(name.space, &name.key), &name.fence.to_le_bytes())?;
        }
        Ok(())
    }

    /// The names of a space that begin with `prefix`, in order.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn list(&self, space: u8, prefix: &[u8]) -> Result<Vec<NamedEntry>, IndexError> {
        let mut entries = Vec::new();
        for item in self.names.scan_prefix([&[space], prefix].concat()) {
            let (key, value) = item?;
            entries.push(decode(key[1..].to_vec(), &value)?);
        }
        Ok(entries)
    }

    /// Up to `limit` names of a space after `after`, in order.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn list_after(
        &self,
        space: u8,
        after: &[u8],
        limit: usize,
    ) -> Result<Vec<NamedEntry>, IndexError> {
        let from = Bound::Excluded([&[space], after].concat());
        let range: sled::Iter =
            self.names.range::<Vec<u8>, _>((from, Bound::Excluded(vec![space + 1])));
        range
            .take(limit)
            .map(|item| {
                let (key, value) = item?;
                decode(key[1..].to_vec(), &value)
            })
            .collect()
    }

    /// Forgets a name if its bytes are at this place; gives whether they were. Its fence stays.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn remove(&self, space: u8, key: &[u8], at: &Location) -> Result<bool, IndexError> {
        let here = self.get(space, key)?.is_some_and(|entry| entry.location == *at);
        if here {
            self.names.remove([&[space], key].concat())?;
        }
        Ok(here)
    }

    /// Forgets the names whose bytes lie in `from..to` of a segment.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn cut(&self, segment: SegmentNumber, from: u64, to: u64) -> Result<(), IndexError> {
        for item in &self.names {
            let (key, value) = item?;
            let at = decode(Vec::new(), &value)?.location;
            if at.segment == segment && (from..to).contains(&at.offset) {
                self.names.remove(key)?;
            }
        }
        Ok(())
    }
}

fn decode(key: Vec<u8>, value: &[u8]) -> Result<NamedEntry, IndexError> {
    let read = || {
        let mut r = Reader::new("named entry", value);
        Ok(NamedEntry {
            key,
            fence: r.u64()?,
            id: ChunkId(r.array()?),
            location: Location {
                segment: SegmentNumber(r.u64()?),
                offset: r.u64()?,
                len: r.u32()?,
            },
        })
    };
    read().map_err(|e: DecodeError| IndexError(e.to_string()))
}
