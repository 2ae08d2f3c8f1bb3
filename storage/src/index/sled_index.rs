//! The index in sled, for nodes of up to some ten million chunks.
//!
//! One tree, so that one batch is one atomic step: `i` + id -> place, `l` + place -> id, `s` + segment -> indexed through.
//! Numbers in keys are big-endian, so that order is order.

use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};

use outrider_format::segment::SegmentNumber;
use outrider_proto::ids::ChunkId;
use outrider_proto::wire::Reader;

use super::{ChunkIndex, IndexError, Location};

/// An index in a sled tree.
#[derive(Debug)]
pub struct SledIndex {
    tree: sled::Tree,
    count: AtomicU64,
}

impl SledIndex {
    /// The index in a tree. Counts its ids once, which takes a pass over it.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn open(tree: sled::Tree) -> Result<Self, IndexError> {
        let mut count = 0;
        for item in tree.scan_prefix(b"i").keys() {
            item?;
            count += 1;
        }
        Ok(Self { tree, count: AtomicU64::new(count) })
    }
}

impl From<sled::Error> for IndexError {
    fn from(error: sled::Error) -> Self {
        Self(error.to_string())
    }
}

fn chunk_key(id: &ChunkId) -> [u8; 33] {
    let mut key = [b'i'; 33];
    key[1..].copy_from_slice(&id.0);
    key
}

fn place_key(segment: SegmentNumber, offset: u64) -> [u8; 17] {
    let mut key = [b'l'; 17];
    key[1..9].copy_from_slice(&segment.0.to_be_bytes());
    key[9..].copy_from_slice(&offset.to_be_bytes());
    key
}

fn through_key(segment: SegmentNumber) -> [u8; 9] {
    let mut key = [b's'; 9];
    key[1..].copy_from_slice(&segment.0.to_be_bytes());
    key
}

fn place(location: &Location) -> [u8; 20] {
    let mut value = [0; 20];
    value[..8].copy_from_slice(&location.segment.0.to_le_bytes());
    value[8..16].copy_from_slice(&location.offset.to_le_bytes());
    value[16..].copy_from_slice(&location.len.to_le_bytes());
    value
}

fn read_place(value: &[u8]) -> Result<Location, IndexError> {
    let mut r = Reader::new("index entry", value);
    let mut read =
        || Ok(Location { segment: SegmentNumber(r.u64()?), offset: r.u64()?, len: r.u32()? });
    read().map_err(|e: outrider_proto::wire::DecodeError| IndexError(e.to_string()))
}

fn read_id(value: &[u8]) -> Result<ChunkId, IndexError> {
    value.try_into().map(ChunkId).map_err(|_| IndexError("an id of a wrong length".to_owned()))
}

impl ChunkIndex for SledIndex {
    fn get(&self, id: &ChunkId) -> Result<Option<Location>, IndexError> {
        self.tree.get(chunk_key(id))?.map(|value| read_place(&value)).transpose()
    }

    fn insert(
        &self,
        entries: &[(ChunkId, Location)],
        through: &[(SegmentNumber, u64)],
    ) -> Result<(), IndexError> {
        let mut batch = sled::Batch::default();
        let mut fresh = std::collections::HashSet::new();
        for (id, location) in entries {
            if self.tree.get(chunk_key(id))?.is_none() {
                fresh.insert(*id);
            }
            batch.insert(&chunk_key(id)[..], &place(location)[..]);
            batch.insert(&place_key(location.segment, location.offset)[..], &id.0[..]);
        }
        for (segment, through) in through {
            batch.insert(&through_key(*segment)[..], &through.to_le_bytes()[..]);
        }
        self.tree.apply_batch(batch)?;
        self.count.fetch_add(fresh.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn remove(&self, id: &ChunkId, at: &Location) -> Result<bool, IndexError> {
        if self.get(id)? != Some(*at) {
            return Ok(false);
        }
        let mut batch = sled::Batch::default();
        batch.remove(&chunk_key(id)[..]);
        batch.remove(&place_key(at.segment, at.offset)[..]);
        self.tree.apply_batch(batch)?;
        self.count.fetch_sub(1, Ordering::Relaxed);
        Ok(true)
    }

    fn cut(&self, segment: SegmentNumber, from: u64, to: u64) -> Result<(), IndexError> {
        if from >= to {
            return Ok(());
        }
        let mut batch = sled::Batch::default();
        let mut gone = std::collections::HashSet::new();
        for item in self.tree.range(place_key(segment, from)..place_key(segment, to)) {
            let (key, value) = item?;
            let id = read_id(&value)?;
            let here = self.get(&id)?.is_some_and(|l| place_key(l.segment, l.offset) == key[..]);
            if here && gone.insert(id) {
                batch.remove(&chunk_key(&id)[..]);
            }
            batch.remove(key);
        }
        self.tree.apply_batch(batch)?;
        self.count.fetch_sub(gone.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn forget(&self, segment: SegmentNumber) -> Result<(), IndexError> {
        self.cut(segment, 0, u64::MAX)?;
        self.tree.remove(through_key(segment))?;
        Ok(())
    }

    fn through(&self) -> Result<Vec<(SegmentNumber, u64)>, IndexError> {
        let bad = || IndexError("a segment mark of a wrong length".to_owned());
        let mut all = Vec::new();
        for item in self.tree.scan_prefix(b"s") {
            let (key, value) = item?;
            let segment = key[1..].try_into().map(u64::from_be_bytes).map_err(|_| bad())?;
            let through = value[..].try_into().map(u64::from_le_bytes).map_err(|_| bad())?;
            all.push((SegmentNumber(segment), through));
        }
        Ok(all)
    }

    fn list(
        &self,
        after: ChunkId,
        last: ChunkId,
        limit: usize,
    ) -> Result<Vec<ChunkId>, IndexError> {
        if after >= last {
            return Ok(Vec::new());
        }
        let range = (Bound::Excluded(chunk_key(&after)), Bound::Included(chunk_key(&last)));
        let range: sled::Iter = self.tree.range::<[u8; 33], _>(range);
        range.keys().take(limit).map(|key| read_id(&key?[1..])).collect()
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn flush(&self) -> Result<(), IndexError> {
        self.tree.flush()?;
        Ok(())
    }
}
