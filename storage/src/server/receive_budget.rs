//! The memory for bytes that have arrived and were not read yet, shared out among the connections that are open.
//!
//! Every connection that comes or goes changes the share of all. QUIC takes no credit back: a connection whose share
//! shrinks uses up what it was given before, and gets no more until then. So each begins with the least.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quinn::Connection;

/// What a connection has at least. With so many that their least exceeds the budget, the budget is exceeded.
pub(super) const LEAST: u32 = 256 << 10;

/// What has a receive window.
pub(super) trait Windowed {
    /// Bytes that may be on their way or unread.
    fn set_window(&self, bytes: u32);
}

impl Windowed for Connection {
    fn set_window(&self, bytes: u32) {
        self.set_receive_window(bytes.into());
    }
}

/// The budget of a node.
pub(super) struct ReceiveBudget<C: Windowed> {
    bytes: u64,
    largest: u32,
    open: Mutex<Open<C>>,
}

struct Open<C> {
    next: u64,
    connections: HashMap<u64, C>,
}

impl<C: Windowed> ReceiveBudget<C> {
    /// `bytes` for all connections together, `largest` for one of them.
    pub(super) fn new(bytes: u64, largest: u32) -> Arc<Self> {
        let open = Open { next: 0, connections: HashMap::new() };
        Arc::new(Self { bytes, largest: largest.max(LEAST), open: Mutex::new(open) })
    }

    /// A connection has its share until the answer is dropped.
    pub(super) fn join(self: &Arc<Self>, connection: C) -> Share<C> {
        let mut open = self.lock();
        let key = open.next;
        open.next += 1;
        open.connections.insert(key, connection);
        self.share_out(&open);
        Share { budget: Arc::clone(self), key }
    }

    fn share_out(&self, open: &Open<C>) {
        let each = self.bytes / (open.connections.len() as u64).max(1);
        let each = u32::try_from(each).unwrap_or(u32::MAX).clamp(LEAST, self.largest);
        for connection in open.connections.values() {
            connection.set_window(each);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Open<C>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place in the budget.
pub(super) struct Share<C: Windowed> {
    budget: Arc<ReceiveBudget<C>>,
    key: u64,
}

impl<C: Windowed> Drop for Share<C> {
    fn drop(&mut self) {
        let mut open = self.budget.lock();
        open.connections.remove(&self.key);
        self.budget.share_out(&open);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    impl Windowed for Arc<AtomicU32> {
        fn set_window(&self, bytes: u32) {
            self.store(bytes, Ordering::SeqCst);
        }
    }

    #[test]
    fn the_windows_of_all_connections_stay_within_the_budget_and_grow_when_others_leave() {
        let budget = ReceiveBudget::new(128 << 20, 32 << 20);
        let mut open = Vec::new();
        let window = |(w, _): &(Arc<AtomicU32>, _)| u64::from(w.load(Ordering::SeqCst));
        for _ in 0..512 {
            let one = Arc::new(AtomicU32::new(0));
            open.push((Arc::clone(&one), budget.join(one)));
            let sum: u64 = open.iter().map(window).sum();
            assert!(sum <= 128 << 20, "{} connections may fill {sum} bytes", open.len());
            assert!(open.iter().all(|one| window(one) >= u64::from(LEAST)));
        }
        open.truncate(8);
        assert!(open.iter().all(|one| window(one) == 16 << 20), "what others left is shared out");
        open.truncate(2);
        assert!(open.iter().all(|one| window(one) == 32 << 20), "one has no more than its largest");
    }
}
