//! Which parts of a file are taken, to find two blocks in one place.

use std::collections::BTreeMap;

/// Intervals that are disjoint, joined where they touch: a file written in order needs one.
pub(crate) struct Places {
    unit: u64,
    /// Start to end, in units.
    taken: BTreeMap<u64, u64>,
}

impl Places {
    /// All places are rounded outwards to multiples of `unit`.
    pub(crate) fn new(unit: u64) -> Self {
        Self { unit, taken: BTreeMap::new() }
    }

    /// Takes a place; false if a part of it is taken already.
    pub(crate) fn take(&mut self, start: u64, len: u64) -> bool {
        let (mut from, mut to) = (start / self.unit, start.saturating_add(len).div_ceil(self.unit));
        let before = self.taken.range(..to).next_back().map(|(a, b)| (*a, *b));
        if let Some((a, b)) = before {
            if b > from {
                return false;
            }
            if b == from {
                self.taken.remove(&a);
                from = a;
            }
        }
        if let Some(end) = self.taken.remove(&to) {
            to = end;
        }
        self.taken.insert(from, to);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::Places;

    #[test]
    fn a_place_is_given_once_and_neighbours_are_joined() {
        let mut places = Places::new(10);
        for (start, len) in [(20, 10), (0, 10), (10, 10), (100, 5), (30, 7)] {
            assert!(places.take(start, len), "{start}");
        }
        assert_eq!(places.taken.len(), 2);
        for (start, len) in [(0, 1), (39, 1), (35, 100), (95, 6), (105, 1)] {
            assert!(!places.take(start, len), "{start}");
        }
    }
}
