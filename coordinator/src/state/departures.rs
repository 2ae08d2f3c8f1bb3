//! Hosts that leave the fabric: no new work, what is ours is removed there, then the name is free and the certificate is refused.
//!
//! A base of a VM on a host that leaves is given up *before* its reference point is removed: the binding becomes an open duty, in
//! one step, and the cleanup jobs do the rest, under leases as always. A VM that moves away before keeps its base; one that
//! moves away after takes its duty along.

use outrider_process::identity::Role;
use outrider_proto::ids::{DutyId, JobId, VmKey};
use serde::{Deserialize, Serialize};

use super::duties::Duty;
use super::enrolment::member_key;
use super::jobs::{Job, Stage, Work};
use super::{Outcome, Refusal, State};

/// A host that is to leave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Leaving {
    pub(crate) since_ms: u64,
    /// Who wants it.
    pub(crate) by: String,
    /// VMs whose bases were given up for it.
    pub(crate) voided: u32,
}

/// A key whose certificate is not accepted any more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Revoked {
    /// `role/name`
    pub(crate) member: String,
    pub(crate) at_ms: u64,
    pub(crate) by: String,
}

/// What keeps a host from being clean.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Departure {
    /// Jobs at work there.
    pub(crate) running: Vec<JobId>,
    /// VMs there whose reference point is still bound.
    pub(crate) bases: Vec<VmKey>,
    /// VMs there with open duties, and how often cleaning up failed.
    pub(crate) duties: Vec<(VmKey, u32)>,
    /// Jobs that wait for the host, and that it gets no more.
    pub(crate) pending: Vec<JobId>,
}

impl Departure {
    pub(crate) fn is_clean(&self) -> bool {
        *self == Self::default()
    }

    /// Sentences for whoever waits.
    pub(crate) fn waits(&self) -> Vec<String> {
        let mut waits: Vec<String> = self
            .running
            .iter()
            .map(|job| {
                format!(
                    "job {job} runs there; wait for it, or cancel it with `outrider job cancel`"
                )
            })
            .collect();
        waits.extend(
            self.bases.iter().map(|vm| format!("VM {vm}: its reference point is to be removed")),
        );
        waits.extend(self.duties.iter().map(|(vm, failed)| match failed {
            0 => format!("VM {vm}: cleaning up"),
            n => format!("VM {vm}: cleaning up failed {n} times; look for a stuck merge there, and at `outrider job list --vm`"),
        }));
        waits.extend(self.pending.iter().map(|job| format!("job {job} is being cancelled")));
        waits
    }
}

impl State {
    /// What keeps a host from being clean. VMs that moved away took theirs along.
    pub(crate) fn departure(&self, host: &str) -> Departure {
        let here = |vm: &VmKey| {
            self.vms.get(vm).is_some_and(|v| v.host.as_deref() == Some(host) && v.is_workable())
        };
        let mut duties: Vec<&VmKey> =
            self.duties.values().map(|d| &d.vm).filter(|vm| here(vm)).collect();
        duties.sort();
        duties.dedup();
        let failed = |vm: &VmKey| self.cleanups.get(vm).map_or(0, |tries| tries.failed);
        let waits_for_host = |job: &Job| match &job.work {
            Work::Restore(restore) => restore.host == host,
            Work::Backup { .. } => here(&job.vm),
            Work::Cleanup { .. } => false,
        };
        Departure {
            // Also those whose lease has ended, and that have not closed their files yet.
            running: self
                .jobs
                .open()
                .filter(|(_, attempt)| attempt.host == host)
                .map(|(job, _)| job.id)
                .collect(),
            bases: self.bases.keys().filter(|vm| here(vm)).cloned().collect(),
            duties: duties.into_iter().map(|vm| (vm.clone(), failed(vm))).collect(),
            pending: self
                .jobs
                .unfinished()
                .filter(|job| matches!(job.stage, Stage::Pending { .. }) && waits_for_host(job))
                .map(|job| job.id)
                .collect(),
        }
    }

    /// Whether a host gets nothing to do but cleaning up.
    pub(crate) fn is_leaving(&self, host: &str) -> bool {
        self.hosts.get(host).is_some_and(|h| h.leaving.is_some())
    }

    /// Whether a job of the VM ended since then: what was seen before it may be gone.
    pub(crate) fn worked_on_since(&self, vm: &VmKey, at_ms: u64) -> bool {
        let ended = |job: &Job| match job.stage {
            Stage::Ended { at_ms, .. } => Some(at_ms),
            _ => None,
        };
        self.jobs.iter().filter(|job| job.vm == *vm).filter_map(ended).any(|end| end > at_ms)
    }

    /// Whether the certificate of this key is refused, and why.
    pub(crate) fn revoked(&self, key: &str) -> Option<&Revoked> {
        self.enrolment.revoked.get(key)
    }

    pub(super) fn retire_host(&mut self, host: &str, by: &str, now: u64) -> Outcome {
        let Some(found) = self.hosts.get_mut(host) else {
            return Refusal::UnknownHost(host.to_owned()).into();
        };
        let leaving = || Leaving { since_ms: now, by: by.to_owned(), voided: 0 };
        found.leaving.get_or_insert_with(leaving);
        Outcome::Done
    }

    pub(super) fn keep_host(&mut self, host: &str) -> Outcome {
        match self.hosts.get_mut(host) {
            Some(found) => {
                found.leaving = None;
                Outcome::Done
            }
            None => Refusal::UnknownHost(host.to_owned()).into(),
        }
    }

    /// Turns the binding of a VM on a host that leaves into a duty to remove its reference point.
    pub(super) fn release_base(&mut self, vm: &VmKey, duty: DutyId) -> Outcome {
        let host = self.vms.get(vm).filter(|v| v.is_workable()).and_then(|v| v.host.clone());
        let Some(host) = host.filter(|host| self.is_leaving(host)) else {
            return Refusal::UnknownVm(vm.clone()).into();
        };
        if let Some(job) =
            self.jobs.active(vm).filter(|job| !matches!(job.work, Work::Cleanup { .. }))
        {
            // It may bind again.
            return Refusal::Busy { vm: vm.clone(), job: job.id }.into();
        }
        let Some(base) = self.bases.remove(vm) else { return Outcome::Done };
        self.unbased.insert(
            vm.clone(),
            format!("its reference point was removed when host {host} left the fabric"),
        );
        let duty = Duty::to_remove_base(duty, vm, base);
        self.duties.insert(duty.id, duty);
        if let Some(leaving) = self.hosts.get_mut(&host).and_then(|h| h.leaving.as_mut()) {
            leaving.voided = leaving.voided.saturating_add(1);
        }
        Outcome::Done
    }

    /// Frees the name. With `force` although something of ours may be left there: bases and duties stay with their VMs, for the
    /// host that shows them next.
    pub(super) fn forget_host(&mut self, host: &str, by: &str, force: bool, now: u64) -> Outcome {
        let member = member_key(Role::Node, host);
        if !self.hosts.contains_key(host) && !self.enrolment.members.contains_key(&member) {
            return Refusal::UnknownHost(host.to_owned()).into();
        }
        let departure = self.departure(host);
        if !force && self.hosts.contains_key(host) {
            if !self.is_leaving(host) {
                return Refusal::NotLeaving(host.to_owned()).into();
            }
            if !departure.is_clean() {
                let waits = departure.waits().join("; ");
                return Refusal::NotClean { host: host.to_owned(), waits }.into();
            }
        }
        for (job, epoch) in self.jobs.leased_to(host) {
            self.lease_lost(job, epoch, "the host was removed from the fabric", 0, now);
        }
        if force {
            // Whether it crashed, nobody will be able to tell any more.
            self.host_lost_tracking(host, now);
        }
        let there = self.vms.values_mut().filter(|vm| vm.host.as_deref() == Some(host));
        for vm in there {
            // Nobody looks at it any more, until another agent shows it.
            vm.host = None;
            vm.gone_since_ms.get_or_insert(now);
        }
        self.lasting.retain(|_, lasting| lasting.host != host);
        let attached = self.hosts.remove(host).map(|h| h.key).unwrap_or_default();
        let joined = self.enrolment.members.remove(&member).map(|m| m.key).unwrap_or_default();
        for key in [attached, joined].into_iter().filter(|key| !key.is_empty()) {
            let revoked = Revoked { member: member.clone(), at_ms: now, by: by.to_owned() };
            self.enrolment.revoked.entry(key).or_insert(revoked);
        }
        Outcome::Done
    }
}

#[cfg(test)]
mod tests;
