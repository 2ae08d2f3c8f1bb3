//! Which leaf pages and chunks of a disk have to be looked at. Pure.

use outrider_disk::RangeSet;
use outrider_proto::ids::ChunkId;
use outrider_proto::page::{FANOUT, chunks_of, leaves_of, root_level};

/// What to do with one disk.
#[derive(Debug, Clone)]
pub struct DiskPlan {
    size: u64,
    chunk_size: u32,
    /// In whole chunks.
    to_read: RangeSet,
    parent: Option<ChunkId>,
}

impl DiskPlan {
    /// Everything outside `to_read` is zeros.
    #[must_use]
    pub fn full(size: u64, chunk_size: u32, to_read: &RangeSet) -> Self {
        let to_read = to_read.align_out(chunk_size.into(), size);
        Self { size, chunk_size, to_read, parent: None }
    }

    /// Everything outside `to_read` is as in the tree `parent` (a hole: zeros) of the same size and chunk size.
    #[must_use]
    pub fn incremental(size: u64, chunk_size: u32, to_read: &RangeSet, parent: ChunkId) -> Self {
        Self { parent: Some(parent), ..Self::full(size, chunk_size, to_read) }
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of a chunk.
    #[must_use]
    pub fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    /// Bytes that will be read.
    #[must_use]
    pub fn bytes_to_read(&self) -> u64 {
        self.to_read.total_len()
    }

    /// Root of the tree that unchanged regions are taken from; the hole for a full.
    #[must_use]
    pub fn parent_root(&self) -> ChunkId {
        self.parent.unwrap_or(ChunkId::HOLE)
    }

    /// Level of the root page.
    #[must_use]
    pub fn root_level(&self) -> u8 {
        root_level(self.size, self.chunk_size)
    }

    /// Number of leaf pages.
    #[must_use]
    pub fn leaf_count(&self) -> u64 {
        leaves_of(self.size, self.chunk_size)
    }

    /// The first leaf at or after `from` that has something to read.
    #[must_use]
    pub fn next_leaf(&self, from: u64) -> Option<u64> {
        let per_leaf = self.leaf_bytes();
        let start = from.checked_mul(per_leaf)?;
        // Ranges are sorted: the first that ends behind `start`.
        let range = self.to_read.iter().find(|r| r.end() > start)?;
        Some(range.start.max(start) / per_leaf)
    }

    /// Whether a subtree (level 1: a leaf) has something to read.
    #[must_use]
    pub fn subtree_changed(&self, level: u8, index: u64) -> bool {
        let (start, len) = self.subtree_range(level, index);
        self.to_read.overlaps(start, len)
    }

    /// Leaves of a subtree.
    #[must_use]
    pub fn leaves_below(&self, level: u8, index: u64) -> std::ops::Range<u64> {
        let width = (FANOUT as u64).pow(u32::from(level.saturating_sub(1)));
        let start = index.saturating_mul(width);
        start..start.saturating_add(width).min(self.leaf_count())
    }

    fn subtree_range(&self, level: u8, index: u64) -> (u64, u64) {
        let leaves = self.leaves_below(level, index);
        let bytes = self.leaf_bytes();
        (
            leaves.start.saturating_mul(bytes),
            (leaves.end.saturating_sub(leaves.start)).saturating_mul(bytes),
        )
    }

    fn leaf_bytes(&self) -> u64 {
        FANOUT as u64 * u64::from(self.chunk_size)
    }

    /// Number of children of a leaf page.
    #[must_use]
    pub fn leaf_len(&self, leaf: u64) -> usize {
        let left = chunks_of(self.size, self.chunk_size).saturating_sub(leaf * FANOUT as u64);
        usize::try_from(left.min(FANOUT as u64)).unwrap_or(FANOUT)
    }

    /// Which children of a leaf have to be read.
    #[must_use]
    pub fn chunks_to_read(&self, leaf: u64) -> Vec<bool> {
        let chunk = u64::from(self.chunk_size);
        let first = leaf * FANOUT as u64;
        (0..self.leaf_len(leaf) as u64)
            .map(|i| self.to_read.overlaps((first + i) * chunk, chunk))
            .collect()
    }

    /// Byte range of a chunk of a leaf: offset, length (the last chunk of a disk is shorter).
    #[must_use]
    pub fn chunk_range(&self, leaf: u64, child: usize) -> (u64, usize) {
        let offset = (leaf * FANOUT as u64 + child as u64) * u64::from(self.chunk_size);
        let length = self.size.saturating_sub(offset).min(self.chunk_size.into());
        (offset, usize::try_from(length).unwrap_or(0))
    }
}

/// Consecutive runs of `true`, cut into pieces of at most `longest`: (first, length).
#[must_use]
pub fn runs(wanted: &[bool], longest: usize) -> Vec<(usize, usize)> {
    let mut out: Vec<(usize, usize)> = Vec::new();
    for (i, _) in wanted.iter().enumerate().filter(|(_, w)| **w) {
        match out.last_mut() {
            Some((first, len)) if *first + *len == i && *len < longest => *len += 1,
            _ => out.push((i, 1)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u32 = 64 << 10;
    const LEAF: u64 = 128 * (64 << 10);

    #[test]
    fn only_leaves_with_something_to_read_are_visited() {
        let mut to_read = RangeSet::single(5, 1);
        to_read.insert(3 * LEAF - 1, 2);
        let plan = DiskPlan::full(10 * LEAF + 7, CHUNK, &to_read);
        assert_eq!(plan.next_leaf(0), Some(0));
        assert_eq!(plan.next_leaf(1), Some(2));
        assert_eq!(plan.next_leaf(3), Some(3));
        assert_eq!(plan.next_leaf(4), None);
        assert_eq!(plan.leaf_count(), 11);
        assert_eq!(plan.leaf_len(10), 1);
        assert_eq!(plan.chunk_range(10, 0), (10 * LEAF, 7));
    }

    #[test]
    fn a_changed_byte_means_its_whole_chunk() {
        let plan = DiskPlan::full(LEAF, CHUNK, &RangeSet::single(u64::from(CHUNK) + 1, 1));
        let wanted = plan.chunks_to_read(0);
        assert_eq!(wanted.iter().filter(|w| **w).count(), 1);
        assert!(wanted[1]);
    }

    #[test]
    fn runs_are_cut_at_the_longest_read() {
        assert_eq!(runs(&[true, true, true, false, true], 2), [(0, 2), (2, 1), (4, 1)]);
        assert_eq!(runs(&[false], 2), []);
    }
}
