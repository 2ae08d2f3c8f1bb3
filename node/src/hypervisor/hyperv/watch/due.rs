//! When to look at what. Pure: times come in.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use outrider_proto::ids::VmGuid;

/// Looks after an event, counted from the look before: reads may not show yet what an event tells of.
const AGAIN: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(8)];
/// Shortest time between two looks at one thing, however many events there are.
const SPACING: Duration = Duration::from_millis(250);
/// After so long a read is believed that a VM is not here, although no event said so.
pub(super) const SETTLED: Duration = Duration::from_secs(2);

/// What is to be looked at now.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Round {
    /// Everything; the rest is then part of it.
    pub(super) all: bool,
    /// Owners and hosts.
    pub(super) cluster: bool,
    /// VMs, and whether an event called them deleted.
    pub(super) vms: Vec<(VmGuid, bool)>,
}

/// The looks that are due.
#[derive(Debug)]
pub(super) struct Due {
    vms: HashMap<VmGuid, Look>,
    cluster: Option<Look>,
    all: Option<Instant>,
    interval: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Look {
    at: Instant,
    /// Looks done since the last event.
    done: usize,
    last: Option<Instant>,
    deleted: bool,
}

impl Look {
    /// An event: from now on as if it were the first.
    fn again(before: Option<Self>, deleted: bool, now: Instant) -> Self {
        let waiting = before.filter(|look| look.done == 0);
        let last = before.and_then(|look| look.last);
        let at = last.map_or(now, |last| now.max(last + SPACING));
        Self {
            at: waiting.map_or(at, |look| look.at.min(at)),
            done: 0,
            last,
            deleted: deleted || waiting.is_some_and(|look| look.deleted),
        }
    }

    /// After a look; `None` when it was the last one.
    fn after(self, now: Instant) -> Option<Self> {
        let pause = AGAIN.get(self.done)?;
        Some(Self { at: now + *pause, done: self.done + 1, last: Some(now), deleted: false })
    }
}

impl Due {
    /// Everything is looked at every `interval`.
    pub(super) fn new(interval: Duration) -> Self {
        Self { vms: HashMap::new(), cluster: None, all: None, interval }
    }

    /// An event about a VM.
    pub(super) fn vm(&mut self, vm: VmGuid, deleted: bool, now: Instant) {
        let before = self.vms.get(&vm).copied();
        self.vms.insert(vm, Look::again(before, deleted, now));
    }

    /// A VM that should be here.
    pub(super) fn expect(&mut self, vm: VmGuid, now: Instant) {
        self.vms.entry(vm).or_insert_with(|| Look::again(None, false, now));
    }

    /// A look did not find a VM: another one has to confirm it.
    pub(super) fn confirm(&mut self, vm: VmGuid, now: Instant) {
        let at = now + SETTLED;
        let look = Look { at, done: 0, last: Some(now), deleted: false };
        self.vms.entry(vm).and_modify(|l| l.at = l.at.min(at)).or_insert(look);
    }

    /// An event of the cluster.
    pub(super) fn cluster(&mut self, now: Instant) {
        self.cluster = Some(Look::again(self.cluster, false, now));
    }

    /// Events were lost.
    pub(super) fn all(&mut self, now: Instant) {
        self.all = Some(now);
    }

    /// Everything was looked at.
    pub(super) fn looked_at_all(&mut self, now: Instant) {
        self.all = Some(now + self.interval);
    }

    /// When the next look is due.
    pub(super) fn next(&self) -> Instant {
        let looks = self.vms.values().chain(&self.cluster).map(|look| look.at);
        // Without anything due the clock is looked at after an interval.
        looks.chain(self.all).min().unwrap_or_else(|| Instant::now() + self.interval)
    }

    /// Takes what is due, and plans the looks that follow.
    pub(super) fn take(&mut self, now: Instant) -> Round {
        let mut round = Round { all: self.all.is_some_and(|at| at <= now), ..Round::default() };
        if let Some(look) = self.cluster.filter(|look| look.at <= now) {
            round.cluster = true;
            self.cluster = look.after(now);
        }
        self.vms.retain(|vm, look| {
            if look.at > now {
                return true;
            }
            round.vms.push((*vm, look.deleted));
            match look.after(now) {
                Some(next) => {
                    *look = next;
                    true
                }
                None => false,
            }
        });
        round
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmGuid = VmGuid(uuid::Uuid::from_u128(1));

    fn due() -> Due {
        Due::new(Duration::from_secs(300))
    }

    /// Facts 1: reads lag behind events.
    #[test]
    fn what_an_event_is_about_is_looked_at_at_once_and_twice_more() {
        let (mut due, start) = (due(), Instant::now());
        due.vm(VM, true, start);
        let mut seen = Vec::new();
        let mut now = start;
        for _ in 0..3 {
            let round = due.take(now);
            seen.push((now - start, round.vms));
            now = due.next();
        }
        let expected = [(0, true), (2, false), (10, false)];
        let expected = expected.map(|(at, deleted)| (Duration::from_secs(at), vec![(VM, deleted)]));
        assert_eq!(seen, expected);
        assert_eq!(due.take(start + Duration::from_secs(200)), Round::default(), "that was all");
    }

    #[test]
    fn a_storm_of_events_is_one_look_a_moment() {
        let (mut due, start) = (due(), Instant::now());
        let mut looks = 0;
        for ms in 0..1000 {
            let now = start + Duration::from_millis(ms);
            due.vm(VM, false, now);
            looks += due.take(now).vms.len();
        }
        assert_eq!(looks, 4);
    }

    #[test]
    fn a_deletion_is_not_forgotten_when_another_event_follows() {
        let (mut due, now) = (due(), Instant::now());
        due.vm(VM, true, now);
        due.vm(VM, false, now);
        assert_eq!(due.take(now).vms, [(VM, true)]);
    }

    #[test]
    fn everything_is_looked_at_every_interval_and_when_events_were_lost() {
        let (mut due, now) = (due(), Instant::now());
        due.looked_at_all(now);
        assert!(!due.take(now + Duration::from_secs(299)).all);
        assert!(due.take(now + Duration::from_secs(300)).all);
        due.looked_at_all(now);
        due.all(now);
        assert!(due.take(now).all);
    }
}
