//! Range arithmetic against a plain array of bytes.

use outrider_disk::{ByteRange, RangeSet};
use proptest::prelude::*;

const SPACE: u64 = 200;

fn set() -> impl Strategy<Value = RangeSet> {
    prop::collection::vec((0..SPACE, 0..30_u64), 0..12).prop_map(|ranges| {
        let mut set: RangeSet = ranges.into_iter().map(|(s, l)| ByteRange::new(s, l)).collect();
        set.clamp(SPACE);
        set
    })
}

fn bytes(set: &RangeSet) -> Vec<bool> {
    let mut out = vec![false; SPACE as usize];
    for range in set {
        out[range.start as usize..range.end() as usize].fill(true);
    }
    out
}

fn assert_canonical(set: &RangeSet) {
    let ranges: Vec<_> = set.iter().collect();
    assert!(ranges.iter().all(|r| r.len > 0), "{ranges:?}");
    assert!(ranges.windows(2).all(|p| p[0].end() < p[1].start), "{ranges:?}");
}

fn assert_bytes(set: &RangeSet, expected: impl Fn(usize) -> bool) {
    assert_canonical(set);
    assert!(bytes(set).into_iter().enumerate().all(|(i, is)| is == expected(i)), "{set:?}");
}

proptest! {
    #[test]
    fn set_algebra_is_bytewise(a in set(), b in set()) {
        let (x, y) = (bytes(&a), bytes(&b));
        assert_bytes(&a.union(&b), |i| x[i] || y[i]);
        assert_bytes(&a.intersect(&b), |i| x[i] && y[i]);
        assert_bytes(&a.subtract(&b), |i| x[i] && !y[i]);
        prop_assert_eq!(a.total_len(), x.iter().filter(|is| **is).count() as u64);
        for i in 0..SPACE {
            prop_assert_eq!(a.contains(i), x[i as usize]);
        }
    }

    #[test]
    fn inserting_one_by_one_equals_collecting(ranges in prop::collection::vec((0..SPACE, 0..30_u64), 0..20)) {
        let mut one_by_one = RangeSet::new();
        for (start, len) in &ranges {
            one_by_one.insert(*start, *len);
            assert_canonical(&one_by_one);
        }
        let collected: RangeSet = ranges.iter().map(|(s, l)| ByteRange::new(*s, *l)).collect();
        prop_assert_eq!(one_by_one, collected);
    }

    #[test]
    fn overlap_and_clamp_are_bytewise(a in set(), start in 0..SPACE, len in 0..40_u64) {
        let x = bytes(&a);
        let end = (start + len).min(SPACE) as usize;
        prop_assert_eq!(a.overlaps(start, len), x[start as usize..end].contains(&true));
        let mut clamped = a.clone();
        clamped.clamp(start);
        assert_bytes(&clamped, |i| x[i] && (i as u64) < start);
    }

    #[test]
    fn aligning_covers_every_touched_unit_and_no_other(a in set(), unit in 1..40_u64) {
        let x = bytes(&a);
        let touched = |i: usize| {
            let from = i as u64 / unit * unit;
            (from..(from + unit).min(SPACE)).any(|j| x[j as usize])
        };
        assert_bytes(&a.align_out(unit, SPACE), touched);
    }
}

#[test]
fn ranges_at_the_end_of_the_address_space_do_not_overflow() {
    let mut set = RangeSet::single(u64::MAX - 10, 100);
    assert_eq!(set.iter().next(), Some(ByteRange { start: u64::MAX - 10, len: 10 }));
    assert!(set.overlaps(5, u64::MAX));
    assert_eq!(set.align_out(4096, u64::MAX).len(), 1);
    set.insert(0, u64::MAX);
    assert_eq!(set.total_len(), u64::MAX);
}
