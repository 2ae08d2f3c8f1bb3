//! Schedule: what to start now. A pure function of the state, of who is attached, and of the time.

pub(crate) mod check;

use std::collections::{BTreeMap, BTreeSet};

use outrider_proto::ids::{GroupId, JobId, PlacementEpoch, VmKey};

use crate::state::State;
use crate::state::jobs::{Job, Stage, Work};
use crate::state::vms::Vm;

/// Bounds of the fabric's work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Jobs that one host works on at a time.
    pub(crate) per_host: usize,
    /// Jobs that the fabric works on at a time.
    pub(crate) fabric: usize,
    /// Attempts that may fail before the job does.
    pub(crate) runs: u32,
    /// First wait before another try, doubled with each, milliseconds.
    pub(crate) back_off_ms: u64,
    /// Longest wait.
    pub(crate) back_off_max_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { per_host: 4, fabric: 64, runs: 3, back_off_ms: 5_000, back_off_max_ms: 300_000 }
    }
}

/// What only the leader knows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Live {
    /// Attached agents and their starts.
    pub(crate) attached: BTreeMap<String, u64>,
    /// VMs on hosts that leave which showed something of ours that nothing known explains, and when they did.
    pub(crate) litter: BTreeMap<VmKey, u64>,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Decision {
    /// A group's time has come. Runs missed meanwhile are this one run. What `checks` names of `vms` is read as a whole.
    RunGroup {
        group: GroupId,
        vms: Vec<VmKey>,
        checks: BTreeSet<VmKey>,
        skipped: u64,
        next_run_ms: u64,
    },
    /// Somebody must fulfil the VM's duties, or remove what is ours on a host that leaves.
    Cleanup { vm: VmKey, why: String },
    /// The VM's host leaves: its base is given up.
    Release { vm: VmKey },
    /// The job waits for a host that leaves.
    Drop { job: JobId, host: String },
    /// Give the job to the host.
    Lease { job: JobId, host: String, boot_id: u64, placement: PlacementEpoch },
}

/// Why a job waits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Waits {
    #[error("waits until {0} ms for another try")]
    BackOff(u64),
    #[error("too few storage nodes have joined: start more of them")]
    NoLayout,
    #[error("no host is known to have the VM: start the agent on its host")]
    NoHost,
    #[error(
        "the agent on {0} has not been heard from: start it, and check the network between it and the coordinators"
    )]
    HostSilent(String),
    #[error("the cluster calls host {0} down")]
    HostDown(String),
    #[error("host {0} works on as many jobs as it may")]
    HostBusy(String),
    #[error(
        "host {0} is leaving the fabric; move the VM to another host, or keep it with `outrider host retire --cancel`"
    )]
    HostLeaving(String),
    #[error("the fabric works on as many jobs as it may")]
    FabricBusy,
}

/// What lies farther ahead than any pause was set by a leader whose clock was wrong.
const HOUR_MS: u64 = 3_600_000;

/// All decisions that are due.
pub(crate) fn decide(state: &State, live: &Live, limits: &Limits, now_ms: u64) -> Vec<Decision> {
    let mut decisions = due_groups(state, now_ms);
    decisions.extend(departures(state));
    decisions.extend(due_cleanups(state, live, limits, now_ms));
    decisions.extend(leases(state, live, limits, now_ms));
    decisions
}

fn due_groups(state: &State, now_ms: u64) -> Vec<Decision> {
    let due = state.groups.iter().filter_map(|(id, group)| {
        let every = group.policy.every_ms.max(1);
        let at = group.next_run_ms?;
        // Set by a leader whose clock was ahead: nobody would notice that nothing runs any more.
        let at = if group.is_beyond_reason(at, now_ms) { now_ms } else { at };
        (at <= now_ms).then_some((*id, at, every))
    });
    due.map(|(group, at, every)| {
        let (vms, others): (Vec<_>, Vec<_>) = state
            .members(group)
            .into_iter()
            .filter(|vm| state.vms.get(vm).is_some_and(Vm::is_workable))
            .filter(|vm| !on_leaving_host(state, vm))
            .partition(|vm| !runs(state, vm));
        let missed = (now_ms - at) / every;
        let next_run_ms = at.saturating_add(every.saturating_mul(missed + 1));
        let checks = vms.iter().filter(|vm| check::is_due(state, vm, now_ms)).cloned().collect();
        Decision::RunGroup { group, vms, checks, skipped: others.len() as u64, next_run_ms }
    })
    .collect()
}

/// Its job would only be cancelled again.
fn on_leaving_host(state: &State, vm: &VmKey) -> bool {
    let host = state.vms.get(vm).and_then(|vm| vm.host.as_deref());
    host.is_some_and(|host| state.is_leaving(host))
}

/// What hosts that leave still have to lose.
fn departures(state: &State) -> Vec<Decision> {
    let mut decisions = Vec::new();
    for host in state.hosts.keys().filter(|host| state.is_leaving(host)) {
        let departure = state.departure(host);
        let free = |vm: &VmKey| {
            state.jobs.active(vm).is_none_or(|job| matches!(job.work, Work::Cleanup { .. }))
        };
        decisions.extend(
            departure.pending.into_iter().map(|job| Decision::Drop { job, host: host.clone() }),
        );
        decisions
            .extend(departure.bases.into_iter().filter(free).map(|vm| Decision::Release { vm }));
    }
    decisions
}

/// A cleanup that waits makes room; everything else that is unfinished is the predecessor.
fn runs(state: &State, vm: &VmKey) -> bool {
    state.jobs.active(vm).is_some_and(|job| {
        !matches!((&job.work, &job.stage), (Work::Cleanup { .. }, Stage::Pending { .. }))
    })
}

/// What is owed, and what hosts that leave have shown: both are tried again after a while.
fn due_cleanups(state: &State, live: &Live, limits: &Limits, now_ms: u64) -> Vec<Decision> {
    let owed = state.duties.values().filter(|duty| duty.is_open()).map(|duty| &duty.vm);
    let owed = owed.map(|vm| (vm, "an earlier job left something on the host"));
    let shown = live.litter.iter().filter(|(vm, at)| !state.worked_on_since(vm, **at));
    let shown =
        shown.map(|(vm, _)| (vm, "something of ours is on a host that is leaving the fabric"));
    // Both may be so of one VM: it is one job.
    let vms: BTreeMap<&VmKey, &str> = shown.chain(owed).collect();
    vms.into_iter()
        .filter(|(vm, _)| state.jobs.active(vm).is_none())
        .filter(|(vm, _)| state.vms.get(vm).is_some_and(Vm::is_workable))
        .filter(|(vm, _)| {
            state.cleanups.get(vm).is_none_or(|tries| {
                tries.failed == 0
                    || tries.last_ms.saturating_add(back_off(limits, tries.failed)) <= now_ms
                    || tries.last_ms > now_ms.saturating_add(HOUR_MS)
            })
        })
        .map(|(vm, why)| Decision::Cleanup { vm: vm.clone(), why: why.to_owned() })
        .collect()
}

fn leases(state: &State, live: &Live, limits: &Limits, now_ms: u64) -> Vec<Decision> {
    let mut load = Load::of(state);
    let mut pending: Vec<&Job> =
        state.jobs.unfinished().filter(|job| job.lease().is_none()).collect();
    // Jobs that have begun hold a checkpoint that grows; after them the oldest first.
    pending.sort_by_key(|job| (job.attempts.is_empty(), job.created_ms, job.id));
    let mut decisions = Vec::new();
    for job in pending {
        if let Ok((host, boot_id, placement)) = ready(state, live, limits, &load, job, now_ms) {
            load.add(&host);
            decisions.push(Decision::Lease { job: job.id, host, boot_id, placement });
        }
    }
    decisions
}

/// Why a pending job waits; none if it is about to be leased.
pub(crate) fn waits(
    state: &State,
    live: &Live,
    limits: &Limits,
    job: &Job,
    now_ms: u64,
) -> Option<Waits> {
    ready(state, live, limits, &Load::of(state), job, now_ms).err()
}

fn ready(
    state: &State,
    live: &Live,
    limits: &Limits,
    load: &Load,
    job: &Job,
    now_ms: u64,
) -> Result<(String, u64, PlacementEpoch), Waits> {
    if let Stage::Pending { not_before_ms } = job.stage
        && not_before_ms > now_ms
        // Longer than any pause: set by a leader whose clock was ahead.
        && not_before_ms <= now_ms.saturating_add(limits.back_off_max_ms.max(HOUR_MS))
    {
        return Err(Waits::BackOff(not_before_ms));
    }
    let vm = state.vms.get(&job.vm);
    let host = match &job.work {
        Work::Restore(restore) => restore.host.clone(),
        Work::Backup { .. } | Work::Cleanup { .. } => {
            vm.filter(|vm| vm.is_workable()).and_then(|vm| vm.host.clone()).ok_or(Waits::NoHost)?
        }
    };
    if !matches!(job.work, Work::Cleanup { .. }) && state.is_leaving(&host) {
        return Err(Waits::HostLeaving(host));
    }
    if !matches!(job.work, Work::Cleanup { .. }) && state.storage.layout.pgs.is_empty() {
        return Err(Waits::NoLayout);
    }
    if state.hosts.get(&host).is_some_and(|h| !h.up) {
        return Err(Waits::HostDown(host));
    }
    let Some(boot_id) = live.attached.get(&host).copied() else {
        return Err(Waits::HostSilent(host));
    };
    if load.fabric >= limits.fabric {
        return Err(Waits::FabricBusy);
    }
    if load.on(&host) >= limits.per_host {
        return Err(Waits::HostBusy(host));
    }
    Ok((host, boot_id, vm.map_or(PlacementEpoch(0), |vm| vm.placement)))
}

/// When a failed attempt may be tried again; none: the failure is final.
pub(crate) fn retry_at(job: &Job, wanted: bool, limits: &Limits, now_ms: u64) -> Option<u64> {
    let again = wanted
        && !matches!(job.work, Work::Cleanup { .. })
        && job.failures.saturating_add(1) < limits.runs;
    again.then(|| now_ms.saturating_add(back_off(limits, job.failures.saturating_add(1))))
}

/// The wait after `failed` failures in a row.
fn back_off(limits: &Limits, failed: u32) -> u64 {
    let doublings = failed.saturating_sub(1).min(32);
    limits.back_off_ms.saturating_mul(1 << doublings).min(limits.back_off_max_ms)
}

/// Jobs at work.
struct Load {
    fabric: usize,
    hosts: BTreeMap<String, usize>,
}

impl Load {
    fn of(state: &State) -> Self {
        let mut load = Self { fabric: 0, hosts: BTreeMap::new() };
        for lease in state.jobs.unfinished().filter_map(Job::lease) {
            load.add(&lease.host);
        }
        load
    }

    fn add(&mut self, host: &str) {
        self.fabric += 1;
        *self.hosts.entry(host.to_owned()).or_default() += 1;
    }

    fn on(&self, host: &str) -> usize {
        self.hosts.get(host).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
