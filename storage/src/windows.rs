//! Which puts of which window are here, so that receipts say no more and no less.
//!
//! Puts arrive in any order (several requests travel at once); a receipt speaks of the run without gaps from 1. What is far
//! ahead of a gap is not remembered: then the receipt says less, and the client sends again.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use outrider_proto::ids::PgId;
use outrider_proto::receipt::PgReceipt;
use outrider_storage_client::transport::WindowHead;
use tokio_util::task::TaskTracker;

/// Numbers remembered beyond a gap, per PG of a window.
const AHEAD: usize = 8192;

/// The windows of all sessions, bounded: the one that was touched longest ago is forgotten first.
#[derive(Debug)]
pub struct Windows {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    windows: HashMap<WindowHead, OneWindow>,
    clock: u64,
}

#[derive(Debug, Default)]
struct OneWindow {
    pgs: HashMap<PgId, Numbers>,
    /// Per replica: what is on its way there.
    forwarded: HashMap<String, TaskTracker>,
    touched: u64,
}

#[derive(Debug, Default)]
struct Numbers {
    through: u32,
    ahead: BTreeSet<u32>,
    haves: u32,
}

impl Numbers {
    fn note(&mut self, sequence: u32) {
        if sequence <= self.through {
            return;
        }
        if sequence == self.through + 1 {
            self.through = sequence;
            while self.ahead.remove(&(self.through + 1)) {
                self.through += 1;
            }
        } else if self.ahead.len() < AHEAD {
            self.ahead.insert(sequence);
        }
    }
}

impl Windows {
    /// At most `limit` windows.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), state: Mutex::default() }
    }

    /// A put was written (not yet synced).
    pub fn note_put(&self, head: WindowHead, pg: PgId, sequence: u32) {
        self.with(head, |w| w.pgs.entry(pg).or_default().note(sequence));
    }

    /// An id was answered with yes.
    pub fn note_have(&self, head: WindowHead, pg: PgId) {
        self.with(head, |w| w.pgs.entry(pg).or_default().haves += 1);
    }

    /// What a receipt may say once everything written until now is synced.
    #[must_use]
    pub fn receipt(&self, head: WindowHead, pgs: &[PgId]) -> Vec<PgReceipt> {
        self.with(head, |w| {
            let said = |&pg: &PgId| {
                let numbers = w.pgs.get(&pg);
                PgReceipt {
                    pg,
                    puts_through: numbers.map_or(0, |n| n.through),
                    haves: numbers.map_or(0, |n| n.haves),
                }
            };
            pgs.iter().map(said).collect()
        })
    }

    /// The tracker of what is on its way to a replica.
    #[must_use]
    pub fn forwarded(&self, head: WindowHead, replica: &str) -> TaskTracker {
        self.with(head, |w| match w.forwarded.get(replica) {
            Some(tracker) => tracker.clone(),
            None => {
                let tracker = TaskTracker::new();
                tracker.close();
                w.forwarded.insert(replica.to_owned(), tracker.clone());
                tracker
            }
        })
    }

    fn with<T>(&self, head: WindowHead, work: impl FnOnce(&mut OneWindow) -> T) -> T {
        let mut state = self.lock();
        state.clock += 1;
        let now = state.clock;
        if state.windows.len() >= self.limit && !state.windows.contains_key(&head) {
            // Forgetting an eighth at once keeps the search rare.
            let mut ages: Vec<u64> = state.windows.values().map(|w| w.touched).collect();
            ages.sort_unstable();
            let oldest = ages[ages.len() / 8];
            state.windows.retain(|_, w| w.touched > oldest);
        }
        let window = state.windows.entry(head).or_default();
        window.touched = now;
        work(window)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use outrider_proto::ids::{JobId, LayoutEpoch, SessionId, Window};

    use super::*;

    fn head(window: u32) -> WindowHead {
        WindowHead {
            job: JobId::from_bytes([1; 16]),
            session: SessionId::from_bytes([2; 16]),
            window: Window(window),
            layout_epoch: LayoutEpoch(1),
        }
    }

    #[test]
    fn a_receipt_ends_before_the_first_gap() {
        let windows = Windows::new(10);
        for sequence in [2, 3, 1, 5] {
            windows.note_put(head(1), PgId(4), sequence);
        }
        assert_eq!(windows.receipt(head(1), &[PgId(4)])[0].puts_through, 3);
        windows.note_put(head(1), PgId(4), 4);
        assert_eq!(windows.receipt(head(1), &[PgId(4), PgId(5)])[0].puts_through, 5);
        assert_eq!(windows.receipt(head(2), &[PgId(4)])[0].puts_through, 0);
    }

    #[test]
    fn memory_is_bounded_and_forgetting_never_says_more() {
        let windows = Windows::new(8);
        for n in 0..100 {
            windows.note_put(head(n), PgId(0), 1);
        }
        assert!(windows.lock().windows.len() <= 8);
        assert_eq!(windows.receipt(head(0), &[PgId(0)])[0].puts_through, 0);
        assert_eq!(windows.receipt(head(99), &[PgId(0)])[0].puts_through, 1);
        for sequence in 2..20_000 {
            windows.note_put(head(1), PgId(0), sequence + 1);
        }
        assert_eq!(windows.receipt(head(1), &[PgId(0)])[0].puts_through, 0);
    }
}
