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

/// What an incremental has to look at, when `changed` is what tracking says, `before` was left out of the parent and `now`
/// is left out of this point. Outside of it the parent's chunks are this point's:
///
/// * changes where both points have zeros do not matter;
/// * where only one of them has zeros, its bytes and the other's differ whatever tracking says.
#[must_use]
pub fn to_look_at(changed: &RangeSet, before: &RangeSet, now: &RangeSet) -> RangeSet {
    let both = before.intersect(now);
    let either = before.union(now).subtract(&both);
    changed.subtract(&both).union(&either)
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
    use outrider_disk::ByteRange;
    use proptest::prelude::*;

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

    /// A disk of 64 bytes and chunks of 4.
    const SIZE: u64 = 64;
    const FOUR: u64 = 4;

    fn some() -> impl Strategy<Value = RangeSet> {
        prop::collection::vec((0..SIZE, 0..12_u64), 0..5).prop_map(|ranges| {
            let mut set: RangeSet =
                ranges.into_iter().map(|(start, len)| ByteRange::new(start, len)).collect();
            set.clamp(SIZE);
            set
        })
    }

    fn without(bytes: &[u8], excluded: &RangeSet) -> Vec<u8> {
        (0..SIZE).map(|at| if excluded.contains(at) { 0 } else { bytes[at as usize] }).collect()
    }

    proptest! {
        #[test]
        fn what_is_not_read_is_the_same_in_both_points(
            first in prop::collection::vec(1_u8..5, SIZE as usize),
            second in prop::collection::vec(1_u8..5, SIZE as usize),
            over_reported in some(), before in some(), now in some(),
        ) {
            let differs = |at: &u64| first[*at as usize] != second[*at as usize];
            let real: RangeSet = (0..SIZE).filter(differs).map(|at| ByteRange::new(at, 1)).collect();
            let changed = real.union(&over_reported);
            let read = to_look_at(&changed, &before, &now).align_out(FOUR, SIZE);
            let (parent, point) = (without(&first, &before), without(&second, &now));
            let mut incremental = parent;
            for range in &read {
                let (from, to) = (range.start as usize, range.end() as usize);
                incremental[from..to].copy_from_slice(&point[from..to]);
            }
            prop_assert_eq!(incremental, point);
            // And nothing for the sake of what both points leave out.
            let both = before.intersect(&now);
            for range in &read {
                for chunk in range.start / FOUR..range.end().div_ceil(FOUR) {
                    let bytes = RangeSet::single(chunk * FOUR, FOUR);
                    prop_assert!(!bytes.subtract(&both).is_empty(), "chunk {} is zeros in both", chunk);
                }
            }
        }
    }
}
