//! Where each durable chunk is.
//!
//! The index is a cache of the segments: an id enters it only after its bytes are synced, and everything in it can be made
//! again by one pass over the segments. Beside each id it keeps how far each segment is indexed, in the same atomic step.

mod memory;
mod sled_index;

use outrider_format::segment::SegmentNumber;
use outrider_proto::ids::ChunkId;

pub use memory::MemoryIndex;
pub use sled_index::SledIndex;

/// Where an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// Segment.
    pub segment: SegmentNumber,
    /// Offset of the entry.
    pub offset: u64,
    /// Its bytes without padding.
    pub len: u32,
}

/// "Indexed through" of a sealed segment whose every record is indexed.
pub const WHOLE: u64 = u64::MAX;

/// The index refused; the store goes on only after a restart, which rebuilds it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the chunk index failed: {0}")]
pub struct IndexError(pub String);

/// Where each durable chunk is. All operations may be called by many threads; writes come from one.
pub trait ChunkIndex: Send + Sync + 'static {
    /// Where a chunk is.
    ///
    /// # Errors
    /// [`IndexError`].
    fn get(&self, id: &ChunkId) -> Result<Option<Location>, IndexError>;

    /// Adds entries and notes how far segments are indexed, in one atomic step.
    ///
    /// # Errors
    /// [`IndexError`]; nothing was added.
    fn insert(
        &self,
        entries: &[(ChunkId, Location)],
        through: &[(SegmentNumber, u64)],
    ) -> Result<(), IndexError>;

    /// Removes an id if it is indexed at this place; gives whether it was.
    ///
    /// # Errors
    /// [`IndexError`].
    fn remove(&self, id: &ChunkId, at: &Location) -> Result<bool, IndexError>;

    /// Removes what is indexed in `from..to` of a segment.
    ///
    /// # Errors
    /// [`IndexError`].
    fn cut(&self, segment: SegmentNumber, from: u64, to: u64) -> Result<(), IndexError>;

    /// Forgets a segment.
    ///
    /// # Errors
    /// [`IndexError`].
    fn forget(&self, segment: SegmentNumber) -> Result<(), IndexError>;

    /// How far each segment is indexed; [`WHOLE`] for sealed ones.
    ///
    /// # Errors
    /// [`IndexError`].
    fn through(&self) -> Result<Vec<(SegmentNumber, u64)>, IndexError>;

    /// Up to `limit` ids after `after` and not after `last`, in order.
    ///
    /// # Errors
    /// [`IndexError`].
    fn list(&self, after: ChunkId, last: ChunkId, limit: usize)
    -> Result<Vec<ChunkId>, IndexError>;

    /// Number of chunks.
    fn count(&self) -> u64;

    /// Makes the index durable, to open faster next time.
    ///
    /// # Errors
    /// [`IndexError`].
    fn flush(&self) -> Result<(), IndexError>;
}

#[cfg(test)]
mod tests;
