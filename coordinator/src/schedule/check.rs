//! When a VM is read as a whole because its host crashed (design 4.1, promise 4).
//!
//! After a crash the hypervisor's coarse map is used, so that no recovery point is missed; whether it names every change
//! is proven only by reading everything. That is done within the group's time, at one of its runs, and spread over that
//! time so that not all VMs of a dead host are read at once.

use std::hash::{DefaultHasher, Hash, Hasher};

use outrider_proto::ids::VmKey;

use crate::state::State;
use crate::state::bindings::Base;
use crate::state::groups::Policy;

/// Why such a run reads everything.
pub(crate) const WHY: &str =
    "the VM's host crashed or was started anew, and change tracking was not proven since";

/// Whether the VM's next run is the one that reads everything.
pub(crate) fn is_due(state: &State, vm: &VmKey, now_ms: u64) -> bool {
    let Some(base) = state.bases.get(vm).filter(|base| base.binding.tracking_unproven) else {
        return false;
    };
    let group = state.group_of(vm).map(|(_, group)| &group.policy);
    let fallback = Policy::default();
    let taken_ms = state.points.get(&base.binding.point).map_or(0, |point| point.taken_ms);
    due(base, group.unwrap_or(&fallback), taken_ms, spread(vm), now_ms)
}

/// `taken_ms`: moment of the bound point. `spread`: the VM's share of the time, from 0 to 255.
fn due(base: &Base, policy: &Policy, taken_ms: u64, spread: u8, now_ms: u64) -> bool {
    // A base that an earlier release marked has no moment: it waits no longer.
    let Some(since) = base.unproven_since_ms else { return true };
    let within = policy.check_within_ms;
    if within == 0 {
        return true;
    }
    let last_run = since.saturating_add(within) <= now_ms.saturating_add(policy.every_ms);
    // The first run after the crash is quick: it keeps the recovery point objective.
    let quick_one_done = taken_ms > since;
    // From an eighth to seven eighths of the time.
    let share = within / 8 + (within / 256 * 3 / 4).saturating_mul(spread.into());
    last_run || (quick_one_done && since.saturating_add(share) <= now_ms)
}

/// The same number for a VM at every leader of one release; any number would do.
fn spread(vm: &VmKey) -> u8 {
    let mut hasher = DefaultHasher::new();
    vm.to_string().hash(&mut hasher);
    hasher.finish().to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::World;
    use crate::state::{Change, Outcome};

    const DAY: u64 = 24 * 60 * 60 * 1000;
    const HOUR: u64 = DAY / 24;

    fn crashed() -> Base {
        let mut w = World::new();
        let vm = w.vm(1, "hv1");
        let (job, epoch) = w.leased(&vm, "hv1");
        let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
        w.bind(job, epoch, point);
        w.apply(Change::TrackingUnproven { vm: vm.clone() });
        Base { unproven_since_ms: Some(10 * DAY), ..w.state.bases[&vm].clone() }
    }

    #[test]
    fn the_check_comes_at_the_vms_share_of_the_time_and_never_too_late() {
        let base = crashed();
        let hourly = Policy { every_ms: HOUR, ..Policy::default() };
        let weekly = Policy { every_ms: 7 * DAY, ..Policy::default() };
        let at_once = Policy { check_within_ms: 0, ..hourly.clone() };
        let asked = Policy::default();
        // Policy, moment of the bound point, share, now, due?
        let table = [
            (&hourly, 9 * DAY, 0, 10 * DAY + HOUR, false, "first the quick one"),
            (&hourly, 11 * DAY, 0, 10 * DAY + 20 * HOUR, false, "its share is later"),
            (&hourly, 11 * DAY, 0, 11 * DAY + HOUR, true, "its share has come"),
            (&hourly, 11 * DAY, 128, 11 * DAY + HOUR, false, "its share is later"),
            (&hourly, 11 * DAY, 128, 14 * DAY, true, "its share has come"),
            (&hourly, 9 * DAY, 255, 17 * DAY - HOUR, true, "no run would follow in time"),
            (&weekly, 9 * DAY, 255, 10 * DAY + HOUR, true, "no run would follow in time"),
            (&at_once, 9 * DAY, 255, 10 * DAY + 1, true, "the policy says so"),
            (&asked, 11 * DAY, 128, 11 * DAY, false, "not yet"),
            (&asked, 9 * DAY, 255, 20 * DAY, true, "too late already"),
        ];
        for (policy, taken, share, now, expected, why) in table {
            assert_eq!(due(&base, policy, taken, share, now), expected, "{why} ({share})");
        }
        let old = Base { unproven_since_ms: None, ..base };
        assert!(due(&old, &hourly, 11 * DAY, 255, 11 * DAY), "marked by an earlier release");
    }
}
