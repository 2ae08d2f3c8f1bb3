//! Resilient change tracking of one disk, computed from the guest's writes.
//!
//! Time is cut by marks: one at every recovery checkpoint. Between marks the changed 64 KiB cells are collected. What
//! changed between two marks is the union of the cells in between, coarsened by what happened to the memory copy of the
//! map meanwhile: a move coarsens everything collected so far to 1 MiB, a crash to 16 MiB. It reports more than what
//! changed after such an event, and never less.

use std::collections::BTreeSet;

use outrider_disk::RangeSet;

const CELL: u64 = 64 << 10;
/// After a live or quick migration, stop and start.
pub(crate) const AFTER_MOVE: u64 = 1 << 20;
/// After a host crash.
pub(crate) const AFTER_CRASH: u64 = 16 << 20;

/// The change tracking of one disk.
#[derive(Debug, Default)]
pub(crate) struct Tracker {
    /// Marks and what was written since each, oldest first.
    spans: Vec<Span>,
    next: u64,
}

#[derive(Debug)]
struct Span {
    id: String,
    cells: BTreeSet<u64>,
    granularity: u64,
}

impl Tracker {
    /// Seals what was collected and begins to collect anew. The id names this moment.
    pub(crate) fn mark(&mut self, disk: &str) -> String {
        self.next += 1;
        let id =
            format!("rctX:{}:{:08x}:{:08x}", disk.to_ascii_lowercase(), self.next, 0x0001_0000);
        self.spans.push(Span { id: id.clone(), cells: BTreeSet::new(), granularity: CELL });
        id
    }

    /// A guest wrote `len` bytes at `offset`.
    pub(crate) fn wrote(&mut self, offset: u64, len: u64) {
        if let Some(span) = self.spans.last_mut()
            && len > 0
        {
            span.cells.extend(offset / CELL..=(offset + len - 1) / CELL);
        }
    }

    /// The finest map was lost in a normal or abnormal way.
    pub(crate) fn coarsen(&mut self, granularity: u64) {
        for span in &mut self.spans {
            span.granularity = span.granularity.max(granularity);
        }
    }

    /// Every id becomes invalid: the disk's content may have changed behind tracking.
    pub(crate) fn forget_all(&mut self) {
        self.spans.clear();
    }

    /// Forgets marks that nobody refers to. The changes since an older mark stay complete.
    pub(crate) fn keep_only(&mut self, wanted: &[String]) {
        let mut kept: Vec<Span> = Vec::new();
        for span in self.spans.drain(..) {
            if wanted.contains(&span.id) {
                kept.push(span);
            } else if let Some(last) = kept.last_mut() {
                last.cells.extend(span.cells);
                last.granularity = last.granularity.max(span.granularity);
            }
        }
        self.spans = kept;
    }

    /// What changed between the marks `from` and `until`; `None` when either id is not known (any more) or they are in
    /// the wrong order.
    pub(crate) fn changes(&self, from: &str, until: &str, size: u64) -> Option<RangeSet> {
        let from = self.spans.iter().position(|s| s.id == from)?;
        let until = self.spans.iter().position(|s| s.id == until)?;
        let spans = self.spans.get(from..until)?;
        Some(spans.iter().fold(RangeSet::new(), |all, span| {
            let mut cells = RangeSet::new();
            for cell in &span.cells {
                cells.insert(cell * CELL, CELL);
            }
            cells.clamp(size);
            all.union(&cells.align_out(span.granularity, size))
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(set: &RangeSet) -> Vec<(u64, u64)> {
        set.iter().map(|r| (r.start, r.len)).collect()
    }

    #[test]
    fn changes_are_those_between_the_two_marks_only() {
        let mut tracker = Tracker::default();
        tracker.wrote(0, 1);
        let a = tracker.mark("d");
        tracker.wrote(CELL + 5, 1);
        let b = tracker.mark("d");
        tracker.wrote(CELL * 9, 10);
        let all = tracker.changes(&a, &b, 1 << 30).expect("known");
        assert_eq!(ranges(&all), vec![(CELL, CELL)]);
        assert!(tracker.changes(&b, &a, 1 << 30).is_none());
        assert!(tracker.changes("stale", &b, 1 << 30).is_none());
    }

    #[test]
    fn a_move_reports_more_and_never_less() {
        let mut tracker = Tracker::default();
        let a = tracker.mark("d");
        tracker.wrote(AFTER_MOVE * 3 + CELL * 5, 1);
        tracker.coarsen(AFTER_MOVE);
        let b = tracker.mark("d");
        tracker.wrote(0, 1);
        let c = tracker.mark("d");
        let changed = tracker.changes(&a, &c, 1 << 30).expect("known");
        assert_eq!(ranges(&changed), vec![(0, CELL), (AFTER_MOVE * 3, AFTER_MOVE)]);
        tracker.keep_only(&[a.clone(), c.clone()]);
        assert!(tracker.changes(&a, &b, 1 << 30).is_none());
        let coarser = tracker.changes(&a, &c, 1 << 30).expect("known");
        assert!(changed.subtract(&coarser).is_empty());
    }
}
