//! Sets of byte ranges: sorted, disjoint, coalesced.

mod bounded;

use std::fmt;

pub(crate) use bounded::BoundedRanges;

/// The bytes from `start` up to, not including, `start + len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// A range; one that would pass the end of the 64-bit address space is cut there.
    pub fn new(start: u64, len: u64) -> Self {
        Self { start, len: len.min(u64::MAX - start) }
    }

    /// The first byte after the range.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    fn between(start: u64, end: u64) -> Self {
        Self { start, len: end - start }
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end())
    }
}

/// A set of bytes, kept as the shortest sorted list of ranges: no two touch, none is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<ByteRange>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The set of one range.
    pub fn single(start: u64, len: u64) -> Self {
        let mut set = Self::new();
        set.insert(start, len);
        set
    }

    /// Adds a range. Constant time at the end of the set, linear in the middle of it; many unsorted
    /// ranges are better collected with `from_iter`.
    pub fn insert(&mut self, start: u64, len: u64) {
        let new = ByteRange::new(start, len);
        if new.len == 0 {
            return;
        }
        match self.ranges.last_mut() {
            None => self.ranges.push(new),
            Some(last) if new.start > last.end() => self.ranges.push(new),
            Some(last) if new.start >= last.start => {
                *last = ByteRange::between(last.start, last.end().max(new.end()));
            }
            Some(_) => {
                let from = self.ranges.partition_point(|r| r.end() < new.start);
                let to = self.ranges.partition_point(|r| r.start <= new.end());
                if from == to {
                    self.ranges.insert(from, new);
                } else {
                    let start = new.start.min(self.ranges[from].start);
                    let end = new.end().max(self.ranges[to - 1].end());
                    self.ranges[from] = ByteRange::between(start, end);
                    self.ranges.drain(from + 1..to);
                }
            }
        }
    }

    /// The bytes that are in either set.
    pub fn union(&self, other: &Self) -> Self {
        let (mut a, mut b) = (self.iter().peekable(), other.iter().peekable());
        let mut out = Self { ranges: Vec::with_capacity(self.len().max(other.len())) };
        loop {
            let next = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x.start <= y.start => a.next(),
                (_, Some(_)) => b.next(),
                (Some(_), None) => a.next(),
                (None, None) => return out,
            };
            if let Some(range) = next {
                out.insert(range.start, range.len);
            }
        }
    }

    /// The bytes that are in both sets.
    pub fn intersect(&self, other: &Self) -> Self {
        let (mut i, mut j) = (0, 0);
        let mut out = Self::new();
        while let (Some(x), Some(y)) = (self.ranges.get(i), other.ranges.get(j)) {
            let (start, end) = (x.start.max(y.start), x.end().min(y.end()));
            if start < end {
                out.ranges.push(ByteRange::between(start, end));
            }
            if x.end() <= y.end() {
                i += 1;
            } else {
                j += 1;
            }
        }
        out
    }

    /// The bytes of this set that are not in `other`.
    pub fn subtract(&self, other: &Self) -> Self {
        let mut out = Self::new();
        let mut j = 0;
        for range in &self.ranges {
            let mut start = range.start;
            while other.ranges.get(j).is_some_and(|hole| hole.end() <= start) {
                j += 1;
            }
            let mut k = j;
            while let Some(hole) = other.ranges.get(k).filter(|hole| hole.start < range.end()) {
                if hole.start > start {
                    out.ranges.push(ByteRange::between(start, hole.start));
                }
                start = start.max(hole.end());
                k += 1;
            }
            if start < range.end() {
                out.ranges.push(ByteRange::between(start, range.end()));
            }
            // The last hole may reach into the next range too.
            j = k.saturating_sub(1).max(j);
        }
        out
    }

    /// Whether the byte at `offset` is in the set.
    pub fn contains(&self, offset: u64) -> bool {
        let at = self.ranges.partition_point(|r| r.end() <= offset);
        self.ranges.get(at).is_some_and(|r| r.start <= offset)
    }

    /// Whether any of the `len` bytes from `start` is in the set.
    pub fn overlaps(&self, start: u64, len: u64) -> bool {
        let at = self.ranges.partition_point(|r| r.end() <= start);
        let end = start.saturating_add(len);
        self.ranges.get(at).is_some_and(|r| r.start.max(start) < end)
    }

    /// The ranges in ascending order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = ByteRange> + DoubleEndedIterator + '_ {
        self.ranges.iter().copied()
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether no byte is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Number of bytes in the set.
    pub fn total_len(&self) -> u64 {
        self.ranges.iter().map(|r| r.len).sum()
    }

    /// Forgets every byte at or after `size`.
    pub fn clamp(&mut self, size: u64) {
        self.ranges.truncate(self.ranges.partition_point(|r| r.start < size));
        if let Some(last) = self.ranges.last_mut() {
            *last = ByteRange::between(last.start, last.end().min(size));
        }
    }

    /// The set grown outwards to whole multiples of `granularity`, cut at `size`.
    ///
    /// # Panics
    /// If `granularity` is zero, which is a mistake of the caller.
    pub fn align_out(&self, granularity: u64, size: u64) -> Self {
        assert!(granularity > 0, "a granularity is at least one byte");
        let mut out = Self { ranges: Vec::with_capacity(self.len()) };
        for range in &self.ranges {
            let start = range.start / granularity * granularity;
            let end = range.end().checked_next_multiple_of(granularity).unwrap_or(u64::MAX);
            out.insert(start, end - start);
        }
        out.clamp(size);
        out
    }
}

impl FromIterator<ByteRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = ByteRange>>(iter: I) -> Self {
        let mut ranges: Vec<_> = iter.into_iter().collect();
        if !ranges.is_sorted_by_key(|r| r.start) {
            ranges.sort_unstable_by_key(|r| r.start);
        }
        let mut set = Self::new();
        for range in ranges {
            set.insert(range.start, range.len);
        }
        set
    }
}

impl<'a> IntoIterator for &'a RangeSet {
    type Item = ByteRange;
    type IntoIter = std::iter::Copied<std::slice::Iter<'a, ByteRange>>;

    fn into_iter(self) -> Self::IntoIter {
        self.ranges.iter().copied()
    }
}

impl IntoIterator for RangeSet {
    type Item = ByteRange;
    type IntoIter = std::vec::IntoIter<ByteRange>;

    fn into_iter(self) -> Self::IntoIter {
        self.ranges.into_iter()
    }
}
