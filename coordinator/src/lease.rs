//! Leases in time: until when, by the leader's monotonic clock, a holder may still act.
//!
//! A lease is recorded in the state; its time is the leader's alone. A new leader knows no times: it gives every holder a
//! full lease from the moment it began to lead. A holder stops by its own clock at `cutoff` after it *sent* the heartbeat
//! that was answered last; the leader counts `duration` from when it *received* it, which is later. So whoever is called
//! ended here has stopped before.

use std::collections::BTreeMap;
use std::time::Duration;

use outrider_proto::ids::{JobId, LeaseEpoch};

/// A lease of a job.
pub(crate) type Held = (JobId, LeaseEpoch);

/// Ends of leases by the leader's clock.
#[derive(Debug)]
pub(crate) struct Holds {
    duration: Duration,
    until: BTreeMap<Held, Duration>,
}

impl Holds {
    /// Knows nothing yet.
    pub(crate) fn new(duration: Duration) -> Self {
        Self { duration, until: BTreeMap::new() }
    }

    /// Takes over which attempts are open; new ones get a full lease from now.
    pub(crate) fn sync(&mut self, open: impl Iterator<Item = Held>, now: Duration) {
        let mut until = BTreeMap::new();
        for held in open {
            let end = self.until.get(&held).copied().unwrap_or(now + self.duration);
            until.insert(held, end);
        }
        self.until = until;
    }

    /// The holder was heard from at `heard`. Never shortens.
    pub(crate) fn renew(&mut self, held: Held, heard: Duration) {
        let end = heard + self.duration;
        let until = self.until.entry(held).or_insert(end);
        *until = (*until).max(end);
    }

    /// Leases whose holders have stopped by now.
    pub(crate) fn over(&self, now: Duration) -> Vec<Held> {
        self.until.iter().filter(|(_, end)| **end <= now).map(|(held, _)| *held).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(30);

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_new_leader_waits_a_full_lease_for_holders_it_knows_nothing_of() {
        let held = (JobId::random(), LeaseEpoch(3));
        let mut holds = Holds::new(LEASE);
        holds.sync([held].into_iter(), seconds(100));
        assert!(holds.over(seconds(129)).is_empty());
        assert_eq!(holds.over(seconds(130)), [held]);
    }

    #[test]
    fn a_renewal_counts_from_when_the_beat_was_heard_and_never_shortens() {
        let held = (JobId::random(), LeaseEpoch(1));
        let mut holds = Holds::new(LEASE);
        holds.sync([held].into_iter(), seconds(0));
        holds.renew(held, seconds(10));
        holds.renew(held, seconds(5));
        assert!(holds.over(seconds(39)).is_empty());
        assert_eq!(holds.over(seconds(40)), [held]);
    }

    #[test]
    fn looking_again_does_not_prolong() {
        let held = (JobId::random(), LeaseEpoch(1));
        let mut holds = Holds::new(LEASE);
        for second in 0..40 {
            holds.sync([held].into_iter(), seconds(second));
        }
        assert_eq!(holds.over(seconds(30)), [held]);
        holds.sync([].into_iter(), seconds(41));
        assert!(holds.over(seconds(100)).is_empty());
    }
}
