//! The rules of the state, one by one; the world that they are tried in.

mod absence;
mod bindings;
mod commits;
mod duties;
mod groups;
mod jobs;

use outrider_proto::ids::{
    ChunkId, DutyId, GroupId, JobId, LayoutEpoch, LeaseEpoch, NodeIncarnation, PlacementEpoch,
    PointId, VmGuid, VmIncarnation, VmKey, VmRole,
};
use outrider_proto::layout::StorageNode;
use outrider_proto::model::Binding;

use super::duties::{DutyState, DutyStep, NewDuty};
use super::facts::{BackupKind, Consistency, Stats};
use super::groups::{NewGroup, Policy, matches};
use super::hosts::Attached;
use super::jobs::{End, NewJob, Report, Restore, Stage, Work};
use super::layout::{NewLayout, Slots};
use super::points::Proposal;
use super::vms::Sighting;
use super::{Change, Command, Outcome, Refusal, State};

/// A state with hosts, VMs and a layout, and a clock.
pub(crate) struct World {
    pub(crate) state: State,
    pub(crate) now: u64,
}

pub(crate) fn key(n: u8) -> VmKey {
    VmKey { realm: "cluster".into(), guid: VmGuid::from_bytes([n; 16]), role: VmRole::Primary }
}

pub(crate) fn sighting(vm: &VmKey, name: &str) -> Sighting {
    Sighting {
        vm: vm.clone(),
        name: name.to_owned(),
        state: "running".into(),
        generation: 2,
        config_version: "9.0".into(),
        disks: Vec::new(),
        clustered: true,
    }
}

impl World {
    pub(crate) fn new() -> Self {
        let mut world = Self { state: State::default(), now: 1_000 };
        for host in ["hv1", "hv2", "hv3"] {
            world.attach(host, "cluster");
        }
        for name in ["s1", "s2", "s3"] {
            world.storage(name, 1);
        }
        let nodes = ["s1", "s2", "s3"].map(str::to_owned).to_vec();
        world.apply(Change::SetLayout(Box::new(NewLayout(Slots {
            epoch: LayoutEpoch(1),
            replicas: 3,
            min_durable: 2,
            nodes,
            pgs: vec![vec![0, 1, 2]; 4],
        }))));
        world
    }

    pub(crate) fn attach(&mut self, host: &str, realm: &str) {
        self.attach_in(host, realm, 0);
    }

    fn attach_started(&mut self, host: &str, started_ms: u64) {
        self.attach_in(host, "cluster", started_ms);
    }

    fn attach_in(&mut self, host: &str, realm: &str, started_ms: u64) {
        self.apply(Change::HostAttached(Attached {
            host: host.to_owned(),
            realm: realm.to_owned(),
            version: "1".into(),
            hypervisor: "hyperv".into(),
            boot_id: 1,
            started_ms,
            key: format!("key of {host}"),
        }));
    }

    pub(crate) fn storage(&mut self, name: &str, incarnation: u64) -> Outcome {
        self.apply(Change::StorageSeen(Box::new(StorageNode {
            name: name.to_owned(),
            addresses: vec!["127.0.0.1:1".into()],
            zone: name.to_owned(),
            capacity_bytes: 1,
            receipt_key: vec![1; 32],
            incarnation: NodeIncarnation(incarnation),
            online: false,
        })))
    }

    pub(crate) fn apply(&mut self, change: Change) -> Outcome {
        self.now += 1;
        self.state.apply(Command { at_ms: self.now, change })
    }

    pub(crate) fn vm(&mut self, n: u8, host: &str) -> VmKey {
        let vm = key(n);
        self.apply(Change::VmSeen(Box::new(sighting(&vm, &format!("vm{n}")))));
        self.place(&vm, host);
        vm
    }

    pub(crate) fn place(&mut self, vm: &VmKey, host: &str) -> Outcome {
        self.apply(Change::VmPlaced { vm: vm.clone(), host: host.to_owned() })
    }

    pub(crate) fn create(&mut self, vm: &VmKey, work: Work) -> Result<JobId, Refusal> {
        let id = JobId::random();
        let job = NewJob { id, work, vm: vm.clone(), group: None, traceparent: String::new() };
        match self.apply(Change::CreateJob(Box::new(job))) {
            Outcome::Jobs(ids) => Ok(ids[0]),
            Outcome::Refused(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn backup(&mut self, vm: &VmKey) -> Result<JobId, Refusal> {
        self.create(
            vm,
            Work::Backup {
                kind: BackupKind::Incremental,
                why: String::new(),
                point: PointId::random(),
            },
        )
    }

    pub(crate) fn lease(&mut self, job: JobId, host: &str) -> Outcome {
        let vm = self.state.jobs.get(job).expect("there").vm.clone();
        let placement = self.state.vms.get(&vm).map_or(PlacementEpoch(0), |vm| vm.placement);
        self.apply(Change::Lease { job, host: host.to_owned(), boot_id: 1, placement })
    }

    pub(crate) fn leased(&mut self, vm: &VmKey, host: &str) -> (JobId, LeaseEpoch) {
        let job = self.backup(vm).expect("created");
        let Outcome::Leased(epoch) = self.lease(job, host) else { panic!("not leased") };
        (job, epoch)
    }

    pub(crate) fn proposal(&self, job: JobId, epoch: LeaseEpoch) -> Proposal {
        let found = self.state.jobs.get(job).expect("there");
        let point = match &found.work {
            Work::Backup { point, .. } => *point,
            _ => PointId::random(),
        };
        Proposal {
            job,
            epoch,
            placement: self.state.vms[&found.vm].placement,
            point,
            manifest: ChunkId([3; 32]),
            taken_ms: self.now,
            consistency: Consistency::Application,
            kind: BackupKind::Full,
            stats: Stats::default(),
            reasons: Vec::new(),
            checkpoint: "cp".into(),
            tracking_unproven: false,
            disks: Vec::new(),
            parent: None,
            layout: self.state.storage.layout.epoch,
            witnesses: vec![("s1".into(), self.state.storage.nodes["s1"].incarnation)],
        }
    }

    pub(crate) fn commit(&mut self, job: JobId, epoch: LeaseEpoch) -> Outcome {
        let proposal = self.proposal(job, epoch);
        self.apply(Change::Commit(Box::new(proposal)))
    }

    pub(crate) fn bind(&mut self, job: JobId, epoch: LeaseEpoch, point: PointId) -> Outcome {
        let binding = Box::new(Binding {
            point,
            manifest: ChunkId([3; 32]),
            reference_point: format!("rp-{point}"),
            disks: Vec::new(),
            tracking_unproven: false,
        });
        self.apply(Change::Bind { job, epoch, binding })
    }

    pub(crate) fn duty(&mut self, job: JobId, epoch: LeaseEpoch, name: &str) -> Outcome {
        self.apply(Change::RecordDuty(Box::new(NewDuty {
            id: DutyId::random(),
            job,
            epoch,
            attempt: 1,
            checkpoint_name: name.to_owned(),
        })))
    }

    pub(crate) fn step(
        &mut self,
        (job, epoch): (JobId, LeaseEpoch),
        duty: DutyId,
        state: DutyState,
    ) -> Outcome {
        let step = DutyStep {
            state,
            checkpoint: String::new(),
            reference_point: String::new(),
            converting: None,
        };
        self.apply(Change::UpdateDuty { job, epoch, duty, step })
    }

    pub(crate) fn finish(
        &mut self,
        job: JobId,
        epoch: LeaseEpoch,
        clean: bool,
        retry_at_ms: Option<u64>,
    ) -> Outcome {
        let report =
            Report { data_safe: true, host_clean: clean, message: "m".into(), ..Report::default() };
        self.apply(Change::Finish { job, epoch, report: Box::new(report), retry_at_ms })
    }
}

fn is_superseded(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Superseded(_))
}

#[test]
fn the_state_comes_back_from_json_as_it_was() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    w.duty(job, epoch, "cp");
    let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
    w.bind(job, epoch, point);
    w.finish(job, epoch, false, None);
    w.place(&vm, "hv2");
    let json = serde_json::to_vec(&w.state).expect("serialises");
    let back: State = serde_json::from_slice(&json).expect("reads back");
    assert_eq!(back, w.state);
    let empty: State = serde_json::from_str("{}").expect("a state of the past has fewer fields");
    assert_eq!(empty, State::default());
}
