//! The life of jobs: created, leased, lost, ended.

use outrider_proto::ids::{JobId, LeaseEpoch, PlacementEpoch, VmIncarnation, VmKey};

use super::jobs::{End, Job, Lease, NewJob, Report, Stage, Work};
use super::{Outcome, Refusal, State};

/// Runs of commands that are remembered of a job.
const MAX_COMMANDS: usize = 8;

impl State {
    pub(super) fn create_job(&mut self, new: NewJob, now: u64) -> Outcome {
        if self.jobs.get(new.id).is_some() {
            return Outcome::Jobs(vec![new.id]);
        }
        let name = match (self.vms.get(&new.vm), &new.work) {
            (Some(vm), _) => vm.name.clone(),
            // The VM of a point may be unknown by now; its disks can be restored all the same.
            (None, Work::Restore(restore)) => match self.points.get(&restore.point) {
                Some(point) => point.vm_name.clone(),
                None => return Refusal::UnknownPoint(restore.point).into(),
            },
            (None, _) => return Refusal::UnknownVm(new.vm).into(),
        };
        if let Work::Restore(restore) = &new.work {
            if !self.points.contains_key(&restore.point) {
                return Refusal::UnknownPoint(restore.point).into();
            }
            if !self.hosts.contains_key(&restore.host) {
                return Refusal::UnknownHost(restore.host.clone()).into();
            }
        }
        if new.work.occupies_vm()
            && let Some(other) = self.jobs.active(&new.vm)
        {
            let waiting_cleanup = matches!(
                (&other.work, &other.stage),
                (Work::Cleanup { .. }, Stage::Pending { .. })
            );
            if !waiting_cleanup || matches!(new.work, Work::Cleanup { .. }) {
                return Refusal::Busy { vm: new.vm, job: other.id }.into();
            }
            // Open duties travel with any lease: the new job does the cleaning, too.
            let id = other.id;
            self.jobs.end(id, End::Cancelled, "another job does the work", now);
        }
        let id = new.id;
        self.jobs.insert(Job {
            id,
            work: new.work,
            vm: new.vm,
            vm_name: name,
            group: new.group,
            traceparent: new.traceparent,
            created_ms: now,
            stage: Stage::Pending { not_before_ms: 0 },
            lease_epoch: LeaseEpoch(0),
            attempts: Vec::new(),
            failures: 0,
            committed: None,
            data_safe: false,
            host_clean: false,
            error_code: String::new(),
            message: String::new(),
            warnings: Vec::new(),
            stats: super::facts::Stats::default(),
            restored_vm: None,
            unproven: false,
            commands: Vec::new(),
        });
        Outcome::Jobs(vec![id])
    }

    pub(super) fn lease(
        &mut self,
        id: JobId,
        host: &str,
        boot_id: u64,
        placement: PlacementEpoch,
        now: u64,
    ) -> Outcome {
        let Some(job) = self.jobs.get(id) else { return Refusal::UnknownJob(id).into() };
        if !matches!(job.stage, Stage::Pending { .. }) {
            return Refusal::NotLeasable(id).into();
        }
        let vm = self.vms.get(&job.vm);
        let fits = match &job.work {
            Work::Restore(restore) => restore.host == host,
            Work::Backup { .. } | Work::Cleanup { .. } => {
                vm.is_some_and(|vm| vm.host.as_deref() == Some(host) && vm.placement == placement)
            }
        };
        if !fits || !self.hosts.get(host).is_some_and(|h| h.up) {
            return Refusal::NotLeasable(id).into();
        }
        let epoch = job.lease_epoch.next();
        let incarnation = vm.map_or(VmIncarnation(1), |vm| vm.incarnation);
        let lease =
            Lease { host: host.to_owned(), boot_id, epoch, placement, incarnation, since_ms: now };
        self.jobs.lease(id, lease);
        Outcome::Leased(epoch)
    }

    pub(super) fn lease_lost(
        &mut self,
        id: JobId,
        epoch: LeaseEpoch,
        why: &str,
        not_before_ms: u64,
        now: u64,
    ) -> Outcome {
        match self.jobs.get(id) {
            None => Refusal::UnknownJob(id).into(),
            Some(job) if job.current(epoch).is_none() => Outcome::Superseded(job.superseded(epoch)),
            Some(_) => {
                self.jobs.release(id, &format!("lost: {why}"), not_before_ms, now);
                Outcome::Done
            }
        }
    }

    /// Only for leases that have ended: a holder that goes on working is not closed.
    pub(super) fn sources_closed(&mut self, id: JobId, epoch: LeaseEpoch) -> Outcome {
        match self.jobs.get(id) {
            None => Refusal::UnknownJob(id).into(),
            Some(job) if job.current(epoch).is_some() => Outcome::Done,
            Some(_) => {
                self.jobs.close(id, epoch);
                Outcome::Done
            }
        }
    }

    pub(super) fn cancel(&mut self, id: JobId, by: &str, now: u64) -> Outcome {
        let Some(job) = self.jobs.get_mut(id) else { return Refusal::UnknownJob(id).into() };
        if job.has_ended() {
            return Refusal::Ended(id).into();
        }
        job.message = format!("cancelled by {by}");
        job.data_safe = job.committed.is_some();
        let vm = job.vm.clone();
        let clean = !self.has_open_duties(&vm);
        if let Some(job) = self.jobs.get_mut(id) {
            job.host_clean = clean;
        }
        self.jobs.end(id, End::Cancelled, "cancelled", now);
        Outcome::Done
    }

    pub(super) fn finish(
        &mut self,
        id: JobId,
        epoch: LeaseEpoch,
        report: Report,
        retry_at_ms: Option<u64>,
        now: u64,
    ) -> Outcome {
        let Some(job) = self.jobs.get(id) else { return Refusal::UnknownJob(id).into() };
        if job.current(epoch).is_none() {
            let repeated = job.has_ended() && job.lease_epoch == epoch;
            return if repeated {
                Outcome::Done
            } else {
                Outcome::Superseded(job.superseded(epoch))
            };
        }
        let vm = job.vm.clone();
        let clean = report.host_clean && !self.has_open_duties(&vm);
        let Some(job) = self.jobs.get_mut(id) else { return Refusal::UnknownJob(id).into() };
        // Whether data is safe is decided by what was committed, not by what an agent believes.
        job.data_safe = match job.work {
            Work::Backup { .. } => job.committed.is_some(),
            Work::Restore(_) => report.data_safe,
            Work::Cleanup { .. } => true,
        };
        job.host_clean = clean;
        job.error_code = report.error_code;
        job.message = report.message;
        job.warnings = report.warnings;
        job.stats = report.stats;
        job.restored_vm = report.restored_vm;
        job.commands.extend(report.commands);
        let too_many = job.commands.len().saturating_sub(MAX_COMMANDS);
        job.commands.drain(..too_many);
        let cleanup = matches!(job.work, Work::Cleanup { .. });
        let done = if cleanup { clean } else { job.data_safe };
        if done {
            self.jobs.end(id, End::Completed, "done", now);
        } else {
            job.failures += 1;
            let word = format!("failed: {}", job.message);
            match retry_at_ms {
                Some(at) => self.jobs.release(id, &word, at, now),
                None => self.jobs.end(id, End::Failed, &word, now),
            }
        }
        self.jobs.close(id, epoch);
        self.cleaned(&vm, clean, cleanup, now);
        Outcome::Done
    }

    pub(super) fn raise_incarnation(
        &mut self,
        id: JobId,
        epoch: LeaseEpoch,
        key: &VmKey,
        why: &str,
    ) -> Outcome {
        let Some(job) = self.jobs.get(id) else { return Refusal::UnknownJob(id).into() };
        if job.current(epoch).is_none() {
            return Outcome::Superseded(job.superseded(epoch));
        }
        // A restore may write over another VM than the one its point came from; nobody else may touch foreign VMs.
        if job.vm != *key && !matches!(job.work, Work::Restore(_)) {
            return Refusal::WrongKind { job: id, expected: "restore".to_owned() }.into();
        }
        let Some(vm) = self.vms.get_mut(key) else { return Refusal::UnknownVm(key.clone()).into() };
        vm.incarnation = vm.incarnation.next();
        let incarnation = vm.incarnation;
        self.bases.remove(key);
        if let Some(job) = self.jobs.get_mut(id) {
            if job.vm == *key
                && let Some(lease) = job.lease_mut()
            {
                lease.incarnation = incarnation;
            }
            job.warnings.push(format!("change tracking of {key} starts anew: {why}"));
        }
        Outcome::Incarnation(incarnation)
    }
}
