//! Collecting ascending ranges in bounded memory.

use super::RangeSet;

/// A set that is collected from ascending ranges and never has more than [`BoundedRanges::LIMIT`] of
/// them: when it would, all ranges grow outwards to multiples of a granularity that doubles until they
/// are few enough. So it may end with more bytes than were put in, never with fewer.
pub(crate) struct BoundedRanges {
    set: RangeSet,
    granularity: u64,
    size: u64,
}

impl BoundedRanges {
    /// 8 MiB in memory.
    pub(crate) const LIMIT: usize = 512 << 10;

    /// No range reaches beyond `size`.
    pub(crate) fn new(size: u64) -> Self {
        Self { set: RangeSet::new(), granularity: 1, size }
    }

    #[inline]
    pub(crate) fn insert(&mut self, start: u64, len: u64) {
        if self.granularity == 1 {
            self.set.insert(start, len);
        } else {
            let end = start.saturating_add(len).next_multiple_of(self.granularity).min(self.size);
            let start = start / self.granularity * self.granularity;
            self.set.insert(start, end - start);
        }
        if self.set.len() > Self::LIMIT {
            self.coarsen();
        }
    }

    #[cold]
    fn coarsen(&mut self) {
        // Half the limit, so that this does not happen again at once.
        while self.set.len() > Self::LIMIT / 2 {
            self.granularity = (self.granularity * 2).max(4096);
            self.set = self.set.align_out(self.granularity, self.size);
        }
    }

    /// The set, and whether it has more bytes than were put in.
    pub(crate) fn finish(self) -> (RangeSet, bool) {
        (self.set, self.granularity > 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_ranges_are_kept_as_they_are() {
        let mut ranges = BoundedRanges::new(1 << 40);
        (0..1000_u64).for_each(|i| ranges.insert(i * 1000, 500));
        let (set, rounded) = ranges.finish();
        assert_eq!((set.len(), set.total_len(), rounded), (1000, 500_000, false));
    }

    #[test]
    fn many_ranges_grow_together_and_none_is_lost() {
        let size = 3_000_000_u64 * 8192 + 100;
        let mut ranges = BoundedRanges::new(size);
        (0..3_000_000_u64).for_each(|i| ranges.insert(i * 8192 + 100, 512));
        ranges.insert(size - 7, 7);
        let (set, rounded) = ranges.finish();
        assert!(rounded && set.len() <= BoundedRanges::LIMIT, "{}", set.len());
        assert!((0..3_000_000_u64).all(|i| set.contains(i * 8192 + 100)));
        assert!(set.contains(size - 1) && !set.contains(size));
    }
}
