//! Recovery points, and the only door through which one comes in.

use outrider_proto::ids::{
    ChunkId, JobId, LayoutEpoch, LeaseEpoch, NodeIncarnation, PlacementEpoch, PointId,
    VmIncarnation, VmKey,
};
use serde::{Deserialize, Serialize};

use super::facts::{BackupKind, Consistency, Disk, Stats};
use super::jobs::Work;
use super::{Outcome, Refusal, State};

/// A complete, restorable state of a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) id: PointId,
    pub(crate) vm: VmKey,
    pub(crate) vm_name: String,
    pub(crate) job: JobId,
    pub(crate) incarnation: VmIncarnation,
    pub(crate) manifest: ChunkId,
    pub(crate) taken_ms: u64,
    pub(crate) committed_ms: u64,
    pub(crate) consistency: Consistency,
    pub(crate) kind: BackupKind,
    pub(crate) stats: Stats,
    pub(crate) reasons: Vec<String>,
    pub(crate) checkpoint: String,
    pub(crate) tracking_unproven: bool,
    pub(crate) disks: Vec<Disk>,
    pub(crate) hosts: Vec<String>,
    pub(crate) parent: Option<PointId>,
}

/// A commit whose receipts the leader has verified against the layout and the incarnations named here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Proposal {
    pub(crate) job: JobId,
    pub(crate) epoch: LeaseEpoch,
    pub(crate) placement: PlacementEpoch,
    pub(crate) point: PointId,
    pub(crate) manifest: ChunkId,
    pub(crate) taken_ms: u64,
    pub(crate) consistency: Consistency,
    pub(crate) kind: BackupKind,
    pub(crate) stats: Stats,
    pub(crate) reasons: Vec<String>,
    pub(crate) checkpoint: String,
    pub(crate) tracking_unproven: bool,
    pub(crate) disks: Vec<Disk>,
    pub(crate) parent: Option<PointId>,
    /// Layout that the receipts were judged by.
    pub(crate) layout: LayoutEpoch,
    /// Nodes whose receipts count, as they were then.
    pub(crate) witnesses: Vec<(String, NodeIncarnation)>,
}

impl State {
    pub(super) fn commit(&mut self, p: Proposal, now: u64) -> Outcome {
        let Some(job) = self.jobs.get(p.job) else { return Refusal::UnknownJob(p.job).into() };
        // For ever: whoever asks again, however late, hears what this job committed.
        if let Some(point) = job.committed {
            return Outcome::Committed(point);
        }
        let Some(lease) = job.current(p.epoch) else {
            return Outcome::Superseded(job.superseded(p.epoch));
        };
        let Work::Backup { point, .. } = &job.work else {
            return Refusal::WrongKind { job: p.job, expected: "backup".to_owned() }.into();
        };
        if *point != p.point {
            return Refusal::WrongPoint { job: p.job, expected: *point, found: p.point }.into();
        }
        let Some(vm) = self.vms.get(&job.vm) else {
            return Refusal::UnknownVm(job.vm.clone()).into();
        };
        if vm.placement != p.placement || vm.placement != lease.placement {
            return Outcome::Superseded("the VM has moved".to_owned());
        }
        if vm.incarnation != lease.incarnation {
            return Outcome::Superseded("the VM's disks were replaced meanwhile".to_owned());
        }
        let storage = &self.storage;
        let fresh = |(name, incarnation): &(String, NodeIncarnation)| {
            storage.nodes.get(name).is_some_and(|node| node.incarnation == *incarnation)
        };
        if storage.layout.epoch != p.layout || !p.witnesses.iter().all(fresh) {
            return Outcome::ReceiptsVoid;
        }
        let hosts = job.hosts();
        // From the first attempt on: what it took the VM, not what it took the host that committed.
        let began = job.attempts.first().map_or(now, |a| a.started_ms);
        let stats = Stats { duration_ms: now.saturating_sub(began), ..p.stats };
        let point = Point {
            id: p.point,
            vm: job.vm.clone(),
            vm_name: vm.name.clone(),
            job: p.job,
            incarnation: vm.incarnation,
            manifest: p.manifest,
            taken_ms: p.taken_ms,
            committed_ms: now,
            consistency: p.consistency,
            kind: p.kind,
            stats,
            reasons: p.reasons,
            checkpoint: p.checkpoint,
            tracking_unproven: p.tracking_unproven || (job.unproven && p.parent.is_some()),
            disks: p.disks,
            hosts,
            parent: p.parent,
        };
        self.points.insert(point.id, point);
        if let Some(job) = self.jobs.get_mut(p.job) {
            job.committed = Some(p.point);
            job.data_safe = true;
            job.stats = stats;
        }
        Outcome::Committed(p.point)
    }
}
