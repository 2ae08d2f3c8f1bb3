//! The index in memory: for tests, benchmarks, and nodes small enough to rebuild it at every start.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use outrider_format::segment::SegmentNumber;
use outrider_proto::ids::ChunkId;

use super::{ChunkIndex, IndexError, Location};

/// An index that ends with the process.
#[derive(Debug, Default)]
pub struct MemoryIndex {
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    chunks: BTreeMap<ChunkId, Location>,
    places: BTreeMap<(SegmentNumber, u64), ChunkId>,
    through: BTreeMap<SegmentNumber, u64>,
}

impl MemoryIndex {
    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ChunkIndex for MemoryIndex {
    fn get(&self, id: &ChunkId) -> Result<Option<Location>, IndexError> {
        Ok(self.lock().chunks.get(id).copied())
    }

    fn insert(
        &self,
        entries: &[(ChunkId, Location)],
        through: &[(SegmentNumber, u64)],
    ) -> Result<(), IndexError> {
        let mut tables = self.lock();
        for (id, location) in entries {
            tables.chunks.insert(*id, *location);
            tables.places.insert((location.segment, location.offset), *id);
        }
        tables.through.extend(through.iter().copied());
        Ok(())
    }

    fn remove(&self, id: &ChunkId, at: &Location) -> Result<bool, IndexError> {
        let mut tables = self.lock();
        if tables.chunks.get(id) != Some(at) {
            return Ok(false);
        }
        tables.chunks.remove(id);
        tables.places.remove(&(at.segment, at.offset));
        Ok(true)
    }

    fn cut(&self, segment: SegmentNumber, from: u64, to: u64) -> Result<(), IndexError> {
        if from >= to {
            return Ok(());
        }
        let mut tables = self.lock();
        let gone: Vec<_> =
            tables.places.range((segment, from)..(segment, to)).map(|(k, v)| (*k, *v)).collect();
        for (place, id) in gone {
            tables.places.remove(&place);
            let here = |l: &Location| (l.segment, l.offset) == place;
            if tables.chunks.get(&id).is_some_and(here) {
                tables.chunks.remove(&id);
            }
        }
        Ok(())
    }

    fn forget(&self, segment: SegmentNumber) -> Result<(), IndexError> {
        self.cut(segment, 0, u64::MAX)?;
        self.lock().through.remove(&segment);
        Ok(())
    }

    fn through(&self) -> Result<Vec<(SegmentNumber, u64)>, IndexError> {
        Ok(self.lock().through.iter().map(|(k, v)| (*k, *v)).collect())
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
        let range = (Bound::Excluded(after), Bound::Included(last));
        Ok(self.lock().chunks.range(range).take(limit).map(|(id, _)| *id).collect())
    }

    fn count(&self) -> u64 {
        self.lock().chunks.len() as u64
    }

    fn flush(&self) -> Result<(), IndexError> {
        Ok(())
    }
}
