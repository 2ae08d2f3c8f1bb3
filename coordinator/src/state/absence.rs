//! VMs that are proven to be nowhere in their realm (rule F15 of `docs/follow.md`): deleted, or taken elsewhere.
//!
//! Points and history stay. Nothing waits for such a VM any more, and what is owed to it rests. Should it come back under its GUID,
//! it was registered anew: its base is given up, and what was owed is owed again, so that even a wrong proof loses nothing but
//! a base.

use outrider_proto::error_code;
use outrider_proto::ids::{DutyId, JobId, VmKey};

use super::duties::{Duty, DutyState};
use super::jobs::End;
use super::{Outcome, Refusal, State};

/// Why its base is not used when it comes back.
const UNBASED: &str = "no host of its realm had the VM for a while: it was registered anew, and nothing tells what changed its disks meanwhile";

/// What a VM left that is nowhere any more.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LeftBehind<'a> {
    pub(crate) vm: &'a VmKey,
    pub(crate) name: &'a str,
    /// Where it was last.
    pub(crate) host: Option<&'a str>,
    pub(crate) duty: &'a Duty,
}

impl LeftBehind<'_> {
    /// What there may be, and why.
    pub(crate) fn why(&self) -> String {
        format!(
            "the VM went while the checkpoint {:?} of job {} was there, and no host of {:?} and no cluster database knows it any more;              what it wrote since lies in .avhdx files beside its disks",
            self.duty.checkpoint_name, self.duty.job, self.vm.realm
        )
    }

    /// What to do.
    pub(crate) fn next(&self) -> String {
        format!(
            "if it was deleted on purpose, remove its files from the volume; to keep its disks, merge the .avhdx into its parent first              (Edit Disk). Then say so: `outrider vm settle {:?}`. If it was exported, its duty is open again when it is imported",
            self.vm.to_string()
        )
    }

    /// A sentence for whoever has to act.
    pub(crate) fn alarm(&self) -> String {
        format!(
            "VM {:?} ({}) was deleted in the middle of a backup: {}; {}",
            self.name,
            self.vm,
            self.why(),
            self.next()
        )
    }
}

impl State {
    /// Checkpoints that VMs had when they went; a reference point alone leaves nothing that matters.
    pub(crate) fn left_by_deleted(&self) -> Vec<LeftBehind<'_>> {
        let left = self.resting_duties().filter(|duty| duty.state < DutyState::Converted);
        let left = left.filter_map(|duty| {
            let vm = self.vms.get(&duty.vm)?;
            let (name, host) = (vm.name.as_str(), vm.host.as_deref());
            Some(LeftBehind { vm: &duty.vm, name, host, duty })
        });
        left.collect()
    }

    /// VMs that are worth looking for: something is owed to them, or a job that follows them waits, and nobody is at work on them.
    pub(crate) fn owed(&self) -> Vec<VmKey> {
        let duties = self.duties.values().filter(|duty| duty.is_open()).map(|duty| &duty.vm);
        let waiting = self.jobs.unfinished().filter(|job| job.work.follows_vm());
        let mut vms: Vec<VmKey> = duties.chain(waiting.map(|job| &job.vm)).cloned().collect();
        vms.sort();
        vms.dedup();
        vms.retain(|vm| self.at_work(vm).is_none());
        vms
    }

    /// A job whose holder may still do something to the VM.
    fn at_work(&self, key: &VmKey) -> Option<JobId> {
        let leased = self.jobs.active(key).filter(|job| job.lease().is_some());
        let open = || {
            let mut open = self.jobs.open().map(|(job, _)| job);
            open.find(|job| job.vm == *key && job.work.occupies_vm())
        };
        leased.or_else(open).map(|job| job.id)
    }

    /// Ends what waits for the VM, and lets its duties rest. Refused while somebody may still be at work on it.
    pub(super) fn vm_absent(&mut self, key: &VmKey, now: u64) -> Outcome {
        if let Some(job) = self.at_work(key) {
            return Refusal::Busy { vm: key.clone(), job }.into();
        }
        let Some(vm) = self.vms.get_mut(key) else {
            return Refusal::UnknownVm(key.clone()).into();
        };
        vm.gone_since_ms.get_or_insert(now);
        self.end_what_waits(key, now);
        if let Some(base) = self.bases.remove(key) {
            if let Some(vm) = self.vms.get_mut(key) {
                vm.incarnation = vm.incarnation.next();
            }
            self.unbased.insert(key.clone(), UNBASED.to_owned());
            // Reference points have no name: only this tells that it is ours, should it come back with the VM. A job binds one
            // base, so that its number is free for one duty.
            let duty = Duty::to_remove_base(DutyId(base.job.0), key, base);
            self.duties.insert(duty.id, duty);
        }
        for duty in self.duties.values_mut().filter(|duty| duty.vm == *key) {
            duty.resting_since_ms.get_or_insert(now);
        }
        self.cleanups.remove(key);
        Outcome::Done
    }

    fn end_what_waits(&mut self, key: &VmKey, now: u64) {
        let waiting = self.jobs.active(key).filter(|job| job.work.follows_vm());
        let Some((id, safe)) = waiting.map(|job| (job.id, job.committed.is_some())) else { return };
        if let Some(job) = self.jobs.get_mut(id) {
            job.data_safe = safe;
            job.host_clean = false;
            job.error_code = error_code::UNKNOWN_VM.code.to_owned();
            job.message = format!(
                "VM {:?} is not there any more: no host of {:?} and no cluster database knows it; if it was deleted on purpose, look for \
                 what the backup left beside its disks (`outrider host orphans`)",
                job.vm_name, key.realm
            );
        }
        // As with any job: what was committed is safe, and the host is not clean.
        let end = if safe { End::Completed } else { End::Failed };
        self.jobs.end(id, end, "failed: the VM is not there any more", now);
    }

    /// Ends the resting duties of a VM, by an operator's word. Those of a VM that is there are for its host to fulfil.
    pub(super) fn settle_vm(&mut self, key: &VmKey) -> Outcome {
        if !self.vms.contains_key(key) {
            return Refusal::UnknownVm(key.clone()).into();
        }
        self.duties.retain(|_, duty| duty.vm != *key || duty.is_open());
        Outcome::Done
    }
}
