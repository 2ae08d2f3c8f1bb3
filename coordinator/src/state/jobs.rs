//! Jobs: pending -> leased -> ended, with their attempts.
//!
//! A lease is current while the job's stage holds exactly its epoch. An attempt stays *open* after its lease has ended
//! until its holder said "closed" or its time is over by the leader's clock: until then it may hold handles.

use std::collections::{BTreeMap, BTreeSet};

use outrider_proto::ids::{
    ChunkId, GroupId, JobId, LeaseEpoch, PlacementEpoch, PointId, VmIncarnation, VmKey,
};
use serde::{Deserialize, Serialize};

use super::facts::{BackupKind, Stats};
use super::pairs;

/// All jobs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Jobs {
    all: BTreeMap<JobId, Job>,
    /// The one unfinished job that occupies a VM.
    #[serde(with = "pairs")]
    active: BTreeMap<VmKey, JobId>,
    /// Pending or leased.
    unfinished: BTreeSet<JobId>,
    /// Attempts that may still hold handles.
    open: BTreeSet<(JobId, LeaseEpoch)>,
}

/// One unit of work, leased to one host at a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) work: Work,
    pub(crate) vm: VmKey,
    /// As it was called then.
    pub(crate) vm_name: String,
    pub(crate) group: Option<GroupId>,
    /// W3C context of the decision.
    pub(crate) traceparent: String,
    pub(crate) created_ms: u64,
    pub(crate) stage: Stage,
    /// Last epoch given; 0: never leased.
    pub(crate) lease_epoch: LeaseEpoch,
    pub(crate) attempts: Vec<Attempt>,
    /// Attempts that ended with a failure of their own (not: moved, lost).
    pub(crate) failures: u32,
    /// The point that this job committed. Never unset, never changed.
    pub(crate) committed: Option<PointId>,
    pub(crate) data_safe: bool,
    pub(crate) host_clean: bool,
    pub(crate) error_code: String,
    pub(crate) message: String,
    pub(crate) warnings: Vec<String>,
    pub(crate) stats: Stats,
    pub(crate) restored_vm: Option<VmKey>,
    /// The VM's host crashed while the job was under way: what it binds has tracking that nobody flushed.
    #[serde(default)]
    pub(crate) unproven: bool,
    /// Commands that hosts ran for it, the last ones.
    #[serde(default)]
    pub(crate) commands: Vec<CommandRun>,
}

/// A command that a host ran for a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct CommandRun {
    pub(crate) name: String,
    /// before, after
    pub(crate) when: String,
    pub(crate) host: String,
    pub(crate) started_ms: u64,
    pub(crate) duration_ms: u64,
    pub(crate) end: String,
    pub(crate) output: String,
    pub(crate) good: bool,
}

/// A job to be created.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct NewJob {
    pub(crate) id: JobId,
    pub(crate) work: Work,
    pub(crate) vm: VmKey,
    pub(crate) group: Option<GroupId>,
    pub(crate) traceparent: String,
}

/// What a job does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Work {
    /// Makes `point`.
    Backup { kind: BackupKind, why: String, point: PointId },
    /// Writes a point's disks on `host`.
    Restore(Box<Restore>),
    /// Fulfils the VM's open duties.
    Cleanup { why: String },
}

/// A restore.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Restore {
    pub(crate) point: PointId,
    pub(crate) manifest: ChunkId,
    pub(crate) host: String,
    pub(crate) name: String,
    pub(crate) folder: String,
    pub(crate) keep_guid: bool,
    pub(crate) overwrite: bool,
    pub(crate) power_on: bool,
    pub(crate) highly_available: bool,
    /// Switches of the point, and those of the target host that take their place.
    #[serde(default)]
    pub(crate) switches: Vec<(String, String)>,
    #[serde(default)]
    pub(crate) disconnect: bool,
    #[serde(default)]
    pub(crate) discard_saved_state: bool,
    #[serde(default)]
    pub(crate) with_checkpoints: bool,
    /// As of this checkpoint of the point; empty: the point itself.
    #[serde(default)]
    pub(crate) checkpoint: String,
    #[serde(default)]
    pub(crate) keep_replaced: bool,
    #[serde(default)]
    pub(crate) boot_check: Option<BootCheck>,
}

/// How it is seen whether a restored VM boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BootCheck {
    pub(crate) patience_ms: u64,
    pub(crate) text: String,
    pub(crate) screen: bool,
}

/// Where a job is in its life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Stage {
    /// Waits for a host.
    Pending { not_before_ms: u64 },
    /// A host works on it.
    Leased(Lease),
    /// Over.
    Ended { at_ms: u64, end: End },
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum End {
    Completed,
    Failed,
    Cancelled,
}

/// The right to work on a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub(crate) host: String,
    pub(crate) boot_id: u64,
    pub(crate) epoch: LeaseEpoch,
    /// Placement of the VM when leased.
    pub(crate) placement: PlacementEpoch,
    /// Incarnation of the VM that the holder works on.
    pub(crate) incarnation: VmIncarnation,
    pub(crate) since_ms: u64,
}

/// One lease of a job, current or past.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Attempt {
    pub(crate) number: u32,
    pub(crate) host: String,
    pub(crate) boot_id: u64,
    pub(crate) epoch: LeaseEpoch,
    pub(crate) started_ms: u64,
    /// 0: not ended.
    pub(crate) ended_ms: u64,
    /// Empty while it lasts; then moved, lost: ..., failed: ..., cancelled, done.
    pub(crate) end: String,
}

/// The holder's word at the end of an attempt.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) data_safe: bool,
    pub(crate) host_clean: bool,
    pub(crate) error_code: String,
    pub(crate) message: String,
    pub(crate) stats: Stats,
    pub(crate) warnings: Vec<String>,
    pub(crate) restored_vm: Option<VmKey>,
    #[serde(default)]
    pub(crate) commands: Vec<CommandRun>,
}

impl Work {
    /// backup, restore, cleanup.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Backup { .. } => "backup",
            Self::Restore(_) => "restore",
            Self::Cleanup { .. } => "cleanup",
        }
    }

    /// Whether the job works on the VM itself, so that no other job may, and it goes where the VM goes.
    pub(crate) fn follows_vm(&self) -> bool {
        !matches!(self, Self::Restore(_))
    }

    /// Whether no other job may work on the VM meanwhile.
    pub(crate) fn occupies_vm(&self) -> bool {
        match self {
            Self::Restore(restore) => restore.overwrite,
            Self::Backup { .. } | Self::Cleanup { .. } => true,
        }
    }
}

impl Job {
    /// The lease, if `epoch` is the current one.
    pub(crate) fn current(&self, epoch: LeaseEpoch) -> Option<&Lease> {
        self.lease().filter(|lease| lease.epoch == epoch)
    }

    /// The current lease.
    pub(crate) fn lease(&self) -> Option<&Lease> {
        match &self.stage {
            Stage::Leased(lease) => Some(lease),
            _ => None,
        }
    }

    pub(super) fn lease_mut(&mut self) -> Option<&mut Lease> {
        match &mut self.stage {
            Stage::Leased(lease) => Some(lease),
            _ => None,
        }
    }

    /// Whether it is over.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.stage, Stage::Ended { .. })
    }

    /// Whether an operator cancelled it.
    pub(crate) fn is_cancelled(&self) -> bool {
        matches!(self.stage, Stage::Ended { end: End::Cancelled, .. })
    }

    /// Hosts that worked on it, in order, each once.
    pub(crate) fn hosts(&self) -> Vec<String> {
        let mut hosts: Vec<String> = Vec::new();
        for attempt in &self.attempts {
            if !hosts.contains(&attempt.host) {
                hosts.push(attempt.host.clone());
            }
        }
        hosts
    }

    /// Whether `host` ever held it.
    pub(crate) fn was_held_by(&self, host: &str) -> bool {
        self.attempts.iter().any(|a| a.host == host)
    }

    /// Why `epoch` is not current, for the agent that holds it.
    pub(crate) fn superseded(&self, epoch: LeaseEpoch) -> String {
        let held = self.attempts.iter().find(|a| a.epoch == epoch);
        match (&self.stage, held) {
            (Stage::Ended { end: End::Cancelled, .. }, _) => "the job was cancelled".to_owned(),
            (Stage::Ended { .. }, _) => "the job has ended".to_owned(),
            (Stage::Leased(l), _) if l.epoch != epoch => {
                format!("the job was leased to {} (lease {})", l.host, l.epoch)
            }
            (_, Some(attempt)) => attempt.end.clone(),
            (_, None) => format!("lease {epoch} was never given"),
        }
    }

    fn end_attempt(&mut self, end: &str, now: u64) {
        if let Some(attempt) = self.attempts.last_mut().filter(|a| a.ended_ms == 0) {
            attempt.ended_ms = now.max(1);
            attempt.end = end.to_owned();
        }
    }
}

impl Jobs {
    /// A job.
    pub(crate) fn get(&self, id: JobId) -> Option<&Job> {
        self.all.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: JobId) -> Option<&mut Job> {
        self.all.get_mut(&id)
    }

    /// All, by id.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Job> {
        self.all.values()
    }

    /// Pending and leased ones.
    pub(crate) fn unfinished(&self) -> impl Iterator<Item = &Job> {
        self.unfinished.iter().filter_map(|id| self.all.get(id))
    }

    /// The job that occupies a VM.
    pub(crate) fn active(&self, vm: &VmKey) -> Option<&Job> {
        self.active.get(vm).and_then(|id| self.all.get(id))
    }

    /// Attempts that may still hold handles: job, epoch, host, agent start.
    pub(crate) fn open(&self) -> impl Iterator<Item = (&Job, &Attempt)> {
        self.open.iter().filter_map(|(id, epoch)| {
            let job = self.all.get(id)?;
            Some((job, job.attempts.iter().find(|a| a.epoch == *epoch)?))
        })
    }

    /// Whether an earlier holder, of this job or of an earlier one on the same VM, may still hold handles.
    pub(crate) fn has_open_predecessor(&self, job: &Job) -> bool {
        self.open().any(|(other, attempt)| {
            let same_work = other.id == job.id
                || other.vm == job.vm && other.work.occupies_vm() && job.work.occupies_vm();
            same_work && (other.id, attempt.epoch) != (job.id, job.lease_epoch)
        })
    }

    pub(super) fn leased_to(&self, host: &str) -> Vec<(JobId, LeaseEpoch)> {
        self.unfinished()
            .filter_map(|job| job.lease().map(|lease| (job.id, lease)))
            .filter(|(_, lease)| lease.host == host)
            .map(|(id, lease)| (id, lease.epoch))
            .collect()
    }

    pub(super) fn insert(&mut self, job: Job) {
        if job.work.occupies_vm() {
            self.active.insert(job.vm.clone(), job.id);
        }
        self.unfinished.insert(job.id);
        self.all.insert(job.id, job);
    }

    pub(super) fn lease(&mut self, id: JobId, lease: Lease) {
        let Some(job) = self.all.get_mut(&id) else { return };
        job.lease_epoch = lease.epoch;
        job.attempts.push(Attempt {
            number: u32::try_from(job.attempts.len()).unwrap_or(u32::MAX).saturating_add(1),
            host: lease.host.clone(),
            boot_id: lease.boot_id,
            epoch: lease.epoch,
            started_ms: lease.since_ms,
            ended_ms: 0,
            end: String::new(),
        });
        self.open.insert((id, lease.epoch));
        job.stage = Stage::Leased(lease);
    }

    /// Takes the lease away; the job waits for the next one.
    pub(super) fn release(&mut self, id: JobId, end: &str, not_before_ms: u64, now: u64) {
        if let Some(job) = self.all.get_mut(&id) {
            job.end_attempt(end, now);
            job.stage = Stage::Pending { not_before_ms };
        }
    }

    /// Ends the job.
    pub(super) fn end(&mut self, id: JobId, end: End, word: &str, now: u64) {
        let Some(job) = self.all.get_mut(&id) else { return };
        job.end_attempt(word, now);
        job.stage = Stage::Ended { at_ms: now, end };
        if self.active.get(&job.vm) == Some(&id) {
            self.active.remove(&job.vm);
        }
        self.unfinished.remove(&id);
    }

    /// The holder has nothing open any more.
    pub(super) fn close(&mut self, id: JobId, epoch: LeaseEpoch) {
        self.open.remove(&(id, epoch));
    }

    /// Marks the backup under way on a VM whose host crashed.
    pub(super) fn mark_unproven(&mut self, vm: &VmKey) {
        let under_way = self.active.get(vm).and_then(|id| self.all.get_mut(id));
        if let Some(job) = under_way.filter(|job| !job.attempts.is_empty()) {
            job.unproven = true;
        }
    }

    /// Ends the lease of the job that follows the VM.
    pub(super) fn vm_moved(&mut self, vm: &VmKey, now: u64) {
        let Some(id) = self.active.get(vm).copied() else { return };
        let follows =
            self.all.get(&id).is_some_and(|job| job.work.follows_vm() && job.lease().is_some());
        if follows {
            self.release(id, "moved", 0, now);
        }
    }
}
