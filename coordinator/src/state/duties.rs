//! Duties: the promise to leave a host clean. Recorded before the checkpoint exists, carried by every later lease of
//! the VM, gone only when the holder said DONE.
//!
//! A duty of a VM that is proven to be nowhere *rests*: there is no host that could fulfil it. It is told to operators, and is
//! open again as soon as the VM is placed somewhere.

use outrider_proto::ids::{DutyId, JobId, LeaseEpoch, VmKey};
use serde::{Deserialize, Serialize};

use super::bindings::Base;
use super::{Outcome, Refusal, State};

/// An open duty.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Duty {
    pub(crate) id: DutyId,
    pub(crate) vm: VmKey,
    pub(crate) job: JobId,
    pub(crate) attempt: u32,
    pub(crate) state: DutyState,
    pub(crate) checkpoint_name: String,
    pub(crate) checkpoint: String,
    pub(crate) reference_point: String,
    /// Reference points that the VM had when the conversion of the checkpoint was about to begin.
    #[serde(default)]
    pub(crate) converting: Option<Vec<String>>,
    /// Since when its VM is nowhere, by all that could know it, Unix milliseconds; none: it is open.
    #[serde(default)]
    pub(crate) resting_since_ms: Option<u64>,
}

impl Duty {
    /// What is left to do when a base is given up: its reference point is to go.
    pub(super) fn to_remove_base(id: DutyId, vm: &VmKey, base: Base) -> Self {
        Self {
            id,
            vm: vm.clone(),
            job: base.job,
            attempt: 0,
            state: DutyState::Converted,
            checkpoint_name: String::new(),
            checkpoint: String::new(),
            reference_point: base.binding.reference_point,
            converting: None,
            resting_since_ms: None,
        }
    }

    /// Whether somebody has to fulfil it.
    pub(crate) fn is_open(&self) -> bool {
        self.resting_since_ms.is_none()
    }
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum DutyState {
    Recorded,
    Created,
    Converted,
    Done,
}

/// A duty to be recorded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct NewDuty {
    pub(crate) id: DutyId,
    pub(crate) job: JobId,
    pub(crate) epoch: LeaseEpoch,
    pub(crate) attempt: u32,
    pub(crate) checkpoint_name: String,
}

/// What became of a duty. Empty texts say nothing new.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct DutyStep {
    pub(crate) state: DutyState,
    pub(crate) checkpoint: String,
    pub(crate) reference_point: String,
    /// The conversion is about to begin, with these reference points there.
    #[serde(default)]
    pub(crate) converting: Option<Vec<String>>,
}

/// Tries to clean up after a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cleanups {
    /// Cleanup jobs in a row that left something.
    pub(crate) failed: u32,
    /// When the last job on the VM ended unclean.
    pub(crate) last_ms: u64,
}

impl State {
    /// Open duties of a VM.
    pub(crate) fn open_duties<'a>(&'a self, vm: &'a VmKey) -> impl Iterator<Item = &'a Duty> {
        self.duties.values().filter(move |duty| duty.vm == *vm && duty.is_open())
    }

    /// Duties of VMs that are nowhere.
    pub(crate) fn resting_duties(&self) -> impl Iterator<Item = &Duty> {
        self.duties.values().filter(|duty| !duty.is_open())
    }

    pub(super) fn has_open_duties(&self, vm: &VmKey) -> bool {
        self.open_duties(vm).next().is_some()
    }

    /// The same checkpoint name is the same duty: a repeated request whose answer was lost.
    pub(super) fn record_duty(&mut self, new: NewDuty) -> Outcome {
        let Some(job) = self.jobs.get(new.job) else { return Refusal::UnknownJob(new.job).into() };
        if job.current(new.epoch).is_none() {
            return Outcome::Superseded(job.superseded(new.epoch));
        }
        let same = self
            .duties
            .values()
            .find(|d| d.job == new.job && d.checkpoint_name == new.checkpoint_name);
        if let Some(duty) = same {
            return Outcome::Duty(duty.id);
        }
        let duty = Duty {
            id: new.id,
            vm: job.vm.clone(),
            job: new.job,
            attempt: new.attempt,
            state: DutyState::Recorded,
            checkpoint_name: new.checkpoint_name,
            checkpoint: String::new(),
            reference_point: String::new(),
            converting: None,
            resting_since_ms: None,
        };
        self.duties.insert(new.id, duty);
        Outcome::Duty(new.id)
    }

    /// Any current lease of the VM may fulfil its duties, whichever job made them.
    pub(super) fn update_duty(
        &mut self,
        id: JobId,
        epoch: LeaseEpoch,
        duty: DutyId,
        step: &DutyStep,
    ) -> Outcome {
        let Some(job) = self.jobs.get(id) else { return Refusal::UnknownJob(id).into() };
        if job.current(epoch).is_none() {
            return Outcome::Superseded(job.superseded(epoch));
        }
        let vm = job.vm.clone();
        if step.state == DutyState::Done {
            if self.duties.get(&duty).is_some_and(|d| d.vm != vm) {
                return Refusal::UnknownDuty(duty).into();
            }
            // Not there: done before, and the answer was lost.
            self.duties.remove(&duty);
            return Outcome::Duty(duty);
        }
        let Some(found) = self.duties.get_mut(&duty).filter(|d| d.vm == vm) else {
            return Refusal::UnknownDuty(duty).into();
        };
        found.state = found.state.max(step.state);
        if !step.checkpoint.is_empty() {
            found.checkpoint.clone_from(&step.checkpoint);
        }
        if !step.reference_point.is_empty() {
            found.reference_point.clone_from(&step.reference_point);
        }
        if step.converting.is_some() {
            // Said again: the earlier conversion did not happen, or there would be nothing to convert.
            found.converting.clone_from(&step.converting);
        }
        Outcome::Duty(duty)
    }

    /// Counts what a finished attempt left behind.
    pub(super) fn cleaned(&mut self, vm: &VmKey, clean: bool, was_cleanup: bool, now: u64) {
        if clean {
            self.cleanups.remove(vm);
        } else if was_cleanup || self.has_open_duties(vm) {
            let tries = self.cleanups.entry(vm.clone()).or_default();
            tries.last_ms = now;
            tries.failed = tries.failed.saturating_add(u32::from(was_cleanup));
        }
    }
}
