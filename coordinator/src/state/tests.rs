//! The rules of the state, one by one.

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
fn one_active_job_per_vm() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let first = w.backup(&vm).expect("created");
    assert_eq!(w.backup(&vm), Err(Refusal::Busy { vm: vm.clone(), job: first }));
    let other = w.vm(2, "hv1");
    w.backup(&other).expect("another VM");
    w.apply(Change::Cancel { job: first, by: "ann".into() });
    w.backup(&vm).expect("free again");
}

#[test]
fn a_repeated_creation_is_the_same_job() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let work = Work::Cleanup { why: String::new() };
    let id = JobId::random();
    let job = NewJob { id, work, vm, group: None, traceparent: String::new() };
    for _ in 0..2 {
        let outcome = w.apply(Change::CreateJob(Box::new(job.clone())));
        assert_eq!(outcome, Outcome::Jobs(vec![id]));
    }
    assert_eq!(w.state.jobs.iter().count(), 1);
}

#[test]
fn a_pending_cleanup_makes_room_for_a_backup_but_a_running_one_does_not() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let cleanup = w.create(&vm, Work::Cleanup { why: String::new() }).expect("created");
    let backup = w.backup(&vm).expect("takes over");
    assert!(w.state.jobs.get(cleanup).expect("kept").has_ended());
    w.apply(Change::Cancel { job: backup, by: "ann".into() });
    let cleanup = w.create(&vm, Work::Cleanup { why: String::new() }).expect("created");
    w.lease(cleanup, "hv1");
    assert!(matches!(w.backup(&vm), Err(Refusal::Busy { .. })));
}

#[test]
fn a_job_is_leased_only_to_the_host_that_runs_the_vm() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let job = w.backup(&vm).expect("created");
    assert!(matches!(w.lease(job, "hv2"), Outcome::Refused(_)));
    assert_eq!(w.lease(job, "hv1"), Outcome::Leased(LeaseEpoch(1)));
    assert!(matches!(w.lease(job, "hv1"), Outcome::Refused(_)), "leased already");
    let stale = Change::Lease {
        job: w.backup(&key(1)).err().map_or_else(|| job, |_| job),
        host: "hv1".into(),
        boot_id: 1,
        placement: PlacementEpoch(99),
    };
    assert!(matches!(w.apply(stale), Outcome::Refused(_)), "a decision about another placement");
}

#[test]
fn a_move_ends_the_lease_and_the_same_job_goes_on_as_the_next_attempt() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, first) = w.leased(&vm, "hv1");
    w.place(&vm, "hv2");
    assert_eq!(w.state.vms[&vm].placement, PlacementEpoch(2));
    assert!(w.state.jobs.get(job).expect("there").current(first).is_none());
    assert_eq!(w.lease(job, "hv2"), Outcome::Leased(LeaseEpoch(2)));
    let found = w.state.jobs.get(job).expect("there");
    assert_eq!(found.attempts.len(), 2);
    assert_eq!((found.attempts[0].end.as_str(), found.attempts[1].number), ("moved", 2));
    assert!(w.state.jobs.has_open_predecessor(found));
    w.apply(Change::SourcesClosed { job, epoch: first });
    assert!(!w.state.jobs.has_open_predecessor(w.state.jobs.get(job).expect("there")));
}

#[test]
fn an_earlier_job_of_the_vm_is_a_predecessor_too() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (old, epoch) = w.leased(&vm, "hv1");
    w.apply(Change::Cancel { job: old, by: "ann".into() });
    w.place(&vm, "hv2");
    let (new, _) = w.leased(&vm, "hv2");
    assert!(w.state.jobs.has_open_predecessor(w.state.jobs.get(new).expect("there")));
    w.apply(Change::SourcesClosed { job: old, epoch });
    assert!(!w.state.jobs.has_open_predecessor(w.state.jobs.get(new).expect("there")));
}

#[test]
fn closing_a_current_lease_does_not_close_it() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    w.apply(Change::SourcesClosed { job, epoch });
    assert_eq!(w.state.jobs.open().count(), 1);
}

#[test]
fn a_commit_is_refused_after_the_vm_moved() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let proposal = w.proposal(job, epoch);
    w.place(&vm, "hv2");
    assert!(is_superseded(&w.apply(Change::Commit(Box::new(proposal)))));
    w.place(&vm, "hv1");
    assert!(is_superseded(&w.commit(job, epoch)), "also when the VM came back");
    let Outcome::Leased(next) = w.lease(job, "hv1") else { panic!("not leased") };
    assert!(matches!(w.commit(job, next), Outcome::Committed(_)));
}

#[test]
fn a_commit_under_a_placement_of_the_past_is_refused() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let mut proposal = w.proposal(job, epoch);
    proposal.placement = PlacementEpoch(0);
    assert!(is_superseded(&w.apply(Change::Commit(Box::new(proposal)))));
}

#[test]
fn a_commit_is_idempotent_for_ever() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let first = w.commit(job, epoch);
    assert!(matches!(first, Outcome::Committed(_)));
    assert_eq!(w.commit(job, epoch), first);
    w.finish(job, epoch, true, None);
    w.place(&vm, "hv3");
    assert_eq!(w.commit(job, LeaseEpoch(77)), first);
    assert_eq!(w.state.points.len(), 1);
}

#[test]
fn a_commit_must_make_the_point_that_the_job_was_given() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let mut proposal = w.proposal(job, epoch);
    proposal.point = PointId::random();
    let outcome = w.apply(Change::Commit(Box::new(proposal)));
    assert!(matches!(outcome, Outcome::Refused(Refusal::WrongPoint { .. })));
}

#[test]
fn receipts_of_a_node_that_restarted_meanwhile_are_void() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let proposal = w.proposal(job, epoch);
    w.storage("s1", 2);
    assert_eq!(w.apply(Change::Commit(Box::new(proposal))), Outcome::ReceiptsVoid);
    let mut proposal = w.proposal(job, epoch);
    proposal.layout = LayoutEpoch(9);
    assert_eq!(w.apply(Change::Commit(Box::new(proposal))), Outcome::ReceiptsVoid);
    assert!(matches!(w.commit(job, epoch), Outcome::Committed(_)));
}

#[test]
fn an_incarnation_raised_by_another_job_supersedes_the_commit() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (first, e1) = w.leased(&vm, "hv1");
    let Outcome::Committed(point) = w.commit(first, e1) else { panic!("not committed") };
    w.finish(first, e1, true, None);
    let (backup, epoch) = w.leased(&vm, "hv1");
    let restore = Restore {
        point,
        manifest: ChunkId([3; 32]),
        host: "hv2".into(),
        name: "copy".into(),
        folder: String::new(),
        keep_guid: false,
        overwrite: false,
        power_on: false,
        highly_available: false,
        switches: vec![],
        disconnect: false,
        discard_saved_state: false,
        with_checkpoints: false,
        keep_replaced: false,
        boot_check: None,
    };
    let restore = w.create(&key(1), Work::Restore(Box::new(restore))).expect("beside the backup");
    let Outcome::Leased(re) = w.lease(restore, "hv2") else { panic!("not leased") };
    let raised = w.apply(Change::RaiseIncarnation {
        job: restore,
        epoch: re,
        vm: key(1),
        why: "test".into(),
    });
    assert_eq!(raised, Outcome::Incarnation(VmIncarnation(2)));
    // The restore's own VM is the same here, so its lease went along; the backup's did not.
    assert!(is_superseded(&w.commit(backup, epoch)));
}

#[test]
fn a_job_that_raises_the_incarnation_itself_goes_on() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    w.apply(Change::RaiseIncarnation { job, epoch, vm: vm.clone(), why: "disk replaced".into() });
    assert!(matches!(w.commit(job, epoch), Outcome::Committed(_)));
    assert_eq!(w.state.points.values().next().expect("one").incarnation, VmIncarnation(2));
}

#[test]
fn a_backup_may_not_raise_the_incarnation_of_another_vm() {
    let mut w = World::new();
    let (a, b) = (w.vm(1, "hv1"), w.vm(2, "hv1"));
    let (job, epoch) = w.leased(&a, "hv1");
    let outcome = w.apply(Change::RaiseIncarnation { job, epoch, vm: b, why: String::new() });
    assert!(matches!(outcome, Outcome::Refused(Refusal::WrongKind { .. })));
}

#[test]
fn only_a_committed_point_of_this_job_is_bound() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let point = w.proposal(job, epoch).point;
    assert!(matches!(w.bind(job, epoch, point), Outcome::Refused(Refusal::NotBindable(_))));
    w.commit(job, epoch);
    assert!(matches!(w.bind(job, epoch, PointId::random()), Outcome::Refused(_)));
    assert_eq!(w.bind(job, epoch, point), Outcome::Bound);
    assert_eq!(w.bind(job, epoch, point), Outcome::Bound, "asked again");
    w.place(&vm, "hv2");
    assert_eq!(w.bind(job, epoch, point), Outcome::Bound, "the outcome was unknown, the VM moved");
}

#[test]
fn a_binding_of_a_past_incarnation_is_refused_and_raising_clears_it() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
    w.bind(job, epoch, point);
    w.apply(Change::RaiseIncarnation { job, epoch, vm: vm.clone(), why: "restore".into() });
    assert!(w.state.bases.is_empty());
    assert!(matches!(w.bind(job, epoch, point), Outcome::Refused(Refusal::NotBindable(_))));
}

#[test]
fn a_host_crash_makes_tracking_unproven_in_both_orders() {
    for crash_first in [true, false] {
        let mut w = World::new();
        let vm = w.vm(1, "hv1");
        let (job, epoch) = w.leased(&vm, "hv1");
        let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
        w.bind(job, epoch, point);
        w.finish(job, epoch, true, None);
        if crash_first {
            w.apply(Change::HostDown { host: "hv1".into() });
            w.place(&vm, "hv2");
        } else {
            w.place(&vm, "hv2");
            w.apply(Change::HostDown { host: "hv1".into() });
            w.apply(Change::TrackingUnproven { vm: vm.clone() });
        }
        assert!(w.state.bases[&vm].binding.tracking_unproven, "crash first: {crash_first}");
        // A new proven base ends it.
        let (job, epoch) = w.leased(&vm, "hv2");
        let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
        w.bind(job, epoch, point);
        assert!(!w.state.bases[&vm].binding.tracking_unproven);
    }
}

/// What a point may lack, every point built on it lacks, too.
#[test]
fn doubt_about_change_tracking_is_handed_on_until_everything_was_read() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let run = |w: &mut World, unproven| {
        let (job, epoch) = w.leased(&vm, "hv1");
        let mut proposal = w.proposal(job, epoch);
        proposal.tracking_unproven = unproven;
        let outcome = w.apply(Change::Commit(Box::new(proposal)));
        let Outcome::Committed(point) = outcome else { panic!("not committed") };
        w.bind(job, epoch, point);
        w.finish(job, epoch, true, None);
        let base = &w.state.bases[&vm];
        (base.binding.tracking_unproven, base.unproven_since_ms)
    };
    assert_eq!(run(&mut w, false), (false, None));
    w.apply(Change::TrackingUnproven { vm: vm.clone() });
    let crashed = w.now;
    w.apply(Change::TrackingUnproven { vm: vm.clone() });
    assert_eq!(run(&mut w, true), (true, Some(crashed)), "an incremental");
    assert_eq!(run(&mut w, true), (true, Some(crashed)), "and what is built on it");
    assert_eq!(run(&mut w, false), (false, None), "everything was read");
}

/// A host that comes back before anybody calls it down has lost the change tracking in its memory all the same.
#[test]
fn a_host_that_was_started_anew_leaves_tracking_unproven() {
    let table = [
        (0, 0, false),
        (0, 50_000, false),
        (50_000, 0, false),
        (50_000, 59_999, false),
        (50_000, 40_001, false),
        (50_000, 60_001, true),
        (50_000, 20_000, true),
    ];
    for (before, after, expected) in table {
        let mut w = World::new();
        w.attach_started("hv1", before);
        let (here, elsewhere) = (w.vm(1, "hv1"), w.vm(2, "hv2"));
        for (vm, host) in [(&here, "hv1"), (&elsewhere, "hv2")] {
            let (job, epoch) = w.leased(vm, host);
            let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
            w.bind(job, epoch, point);
        }
        w.attach_started("hv1", after);
        let unproven = |vm: &VmKey| w.state.bases[vm].binding.tracking_unproven;
        assert_eq!(unproven(&here), expected, "started at {before}, then at {after}");
        assert!(!unproven(&elsewhere));
    }
    // A hello that does not tell it forgets nothing.
    let mut w = World::new();
    for started in [50_000, 0] {
        w.attach_started("hv1", started);
    }
    assert_eq!(w.state.hosts["hv1"].started_ms, 50_000);
}

/// The checkpoint may be older than the crash: what changed between the two was tracked in memory only.
#[test]
fn a_job_that_was_under_way_in_a_host_crash_binds_an_unproven_base() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, _) = w.leased(&vm, "hv1");
    w.apply(Change::HostDown { host: "hv1".into() });
    w.place(&vm, "hv2");
    let Outcome::Leased(epoch) = w.lease(job, "hv2") else { panic!("not leased") };
    let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
    w.bind(job, epoch, point);
    assert!(w.state.bases[&vm].binding.tracking_unproven);
}

#[test]
fn a_live_migration_leaves_tracking_proven() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
    w.bind(job, epoch, point);
    w.place(&vm, "hv2");
    assert!(!w.state.bases[&vm].binding.tracking_unproven);
}

#[test]
fn a_dead_host_loses_its_leases() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    w.apply(Change::HostDown { host: "hv1".into() });
    let found = w.state.jobs.get(job).expect("there");
    assert!(found.current(epoch).is_none() && !found.has_ended());
    assert!(matches!(w.lease(job, "hv1"), Outcome::Refused(_)), "not to a dead host");
    assert_eq!(w.state.jobs.open().count(), 1, "it may still hold handles until its time is over");
}

#[test]
fn a_duty_is_recorded_once_and_travels_with_the_vm() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let Outcome::Duty(duty) = w.duty(job, epoch, "cp a1") else { panic!("not recorded") };
    assert_eq!(w.duty(job, epoch, "cp a1"), Outcome::Duty(duty), "asked again");
    w.place(&vm, "hv2");
    assert!(is_superseded(&w.duty(job, epoch, "cp a2")));
    assert!(is_superseded(&w.step((job, epoch), duty, DutyState::Done)));
    let Outcome::Leased(next) = w.lease(job, "hv2") else { panic!("not leased") };
    assert_eq!(w.state.open_duties(&vm).count(), 1);
    w.step((job, next), duty, DutyState::Converted);
    w.step((job, next), duty, DutyState::Created);
    assert_eq!(w.state.duties[&duty].state, DutyState::Converted, "states never go back");
    assert_eq!(w.step((job, next), duty, DutyState::Done), Outcome::Duty(duty));
    assert_eq!(w.step((job, next), duty, DutyState::Done), Outcome::Duty(duty), "asked again");
    assert!(w.state.duties.is_empty());
}

#[test]
fn a_duty_of_another_vm_is_not_ours_to_end() {
    let mut w = World::new();
    let (a, b) = (w.vm(1, "hv1"), w.vm(2, "hv1"));
    let held_a = w.leased(&a, "hv1");
    let held_b = w.leased(&b, "hv1");
    let Outcome::Duty(duty) = w.duty(held_a.0, held_a.1, "cp") else { panic!("not recorded") };
    let outcome = w.step(held_b, duty, DutyState::Done);
    assert!(matches!(outcome, Outcome::Refused(Refusal::UnknownDuty(_))));
    assert_eq!(w.state.duties.len(), 1);
}

#[test]
fn a_job_with_an_open_duty_is_never_green() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    w.duty(job, epoch, "cp");
    w.commit(job, epoch);
    w.finish(job, epoch, true, None);
    let found = w.state.jobs.get(job).expect("there");
    assert!(found.data_safe && !found.host_clean);
    assert!(matches!(found.stage, Stage::Ended { end: End::Completed, .. }));
}

#[test]
fn what_was_not_committed_is_not_safe_whatever_the_agent_says() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    w.finish(job, epoch, true, None);
    let found = w.state.jobs.get(job).expect("there");
    assert!(!found.data_safe);
    assert!(matches!(found.stage, Stage::Ended { end: End::Failed, .. }));
}

#[test]
fn a_failed_attempt_with_a_retry_waits_as_the_same_job() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let at = w.now + 5_000;
    w.finish(job, epoch, true, Some(at));
    let found = w.state.jobs.get(job).expect("there");
    assert_eq!(found.stage, Stage::Pending { not_before_ms: at });
    assert_eq!(found.failures, 1);
    assert!(is_superseded(&w.finish(job, epoch, true, None)), "the old lease is over");
    assert_eq!(w.lease(job, "hv1"), Outcome::Leased(LeaseEpoch(2)));
}

#[test]
fn a_repeated_finish_is_taken_once() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    w.commit(job, epoch);
    assert_eq!(w.finish(job, epoch, true, None), Outcome::Done);
    assert_eq!(w.finish(job, epoch, false, None), Outcome::Done);
    assert!(w.state.jobs.get(job).expect("there").host_clean);
    assert_eq!(w.state.jobs.open().count(), 0);
}

#[test]
fn a_cancelled_job_neither_commits_nor_is_leased_again() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    w.apply(Change::Cancel { job, by: "ann".into() });
    assert!(is_superseded(&w.commit(job, epoch)));
    assert!(matches!(w.lease(job, "hv1"), Outcome::Refused(_)));
    let again = w.apply(Change::Cancel { job, by: "bob".into() });
    assert!(matches!(again, Outcome::Refused(Refusal::Ended(_))));
}

#[test]
fn a_vm_is_named_by_one_group_only_and_patterns_come_second() {
    let mut w = World::new();
    let (a, b) = (w.vm(1, "hv1"), w.vm(2, "hv1"));
    let group = |name: &str, vms: &[&VmKey], patterns: &[&str]| NewGroup {
        id: GroupId::random(),
        name: name.into(),
        vms: vms.iter().map(|v| (*v).clone()).collect(),
        patterns: patterns.iter().map(|p| (*p).into()).collect(),
        policy: Policy::default(),
        created_ms: 1,
    };
    let all = group("all", &[], &["VM*"]);
    let one = group("one", &[&a], &[]);
    w.apply(Change::CreateGroup(Box::new(all.clone())));
    w.apply(Change::CreateGroup(Box::new(one.clone())));
    assert_eq!(w.state.group_of(&a).expect("in one").0, one.id);
    assert_eq!(w.state.members(all.id), vec![b]);
    let taken = w.apply(Change::CreateGroup(Box::new(group("two", &[&a], &[]))));
    assert!(matches!(taken, Outcome::Refused(Refusal::VmTaken { .. })));
    let taken = w.apply(Change::CreateGroup(Box::new(group("one", &[], &["x"]))));
    assert!(matches!(taken, Outcome::Refused(Refusal::NameTaken(_))));
    let unknown = w.apply(Change::CreateGroup(Box::new(group("three", &[&key(99)], &[]))));
    assert!(matches!(unknown, Outcome::Refused(Refusal::UnknownVm(_))));
}

#[test]
fn an_edited_policy_holds_from_then_on_and_an_old_one_reads_with_everything_new_switched_off() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let id = GroupId::random();
    let new = NewGroup {
        id,
        name: "g".into(),
        vms: [vm].into(),
        patterns: vec![],
        policy: Policy::default(),
        created_ms: 1,
    };
    w.apply(Change::CreateGroup(Box::new(new)));
    let policy = Policy { every_ms: 1000, allow_offline: true, ..Policy::default() };
    let edited = w.apply(Change::EditGroup { group: id, policy: Box::new(policy.clone()) });
    assert_eq!(edited, Outcome::Group(id));
    assert_eq!(w.state.groups[&id].policy, policy);
    assert!(w.state.groups[&id].next_run_ms.is_some_and(|at| at > 1000), "it is scheduled now");
    let unknown = Change::EditGroup { group: GroupId::random(), policy: Box::new(policy) };
    assert!(matches!(w.apply(unknown), Outcome::Refused(Refusal::UnknownGroup(_))));
    let old = r#"{"every_ms":0,"wanted":"Application","minimum":"Crash","chunk_size":0,"require_all_disks":true}"#;
    let read: Policy = serde_json::from_str(old).expect("a policy of the past");
    assert_eq!(read, Policy::default());
}

#[test]
fn name_patterns_match_as_people_expect() {
    let table = [
        ("*", "", true),
        ("*", "anything", true),
        ("web*", "web-01", true),
        ("WEB*", "web-01", true),
        ("web-??", "web-01", true),
        ("web-?", "web-01", false),
        ("*sql*", "my sql server", true),
        ("*a*b*c", "xxaxxbxxc", true),
        ("*a*b*c", "xxaxxcxxb", false),
        ("서울-*", "서울-1", true),
        ("", "x", false),
        ("a", "a", true),
    ];
    for (pattern, name, expected) in table {
        assert_eq!(matches(pattern, name), expected, "{pattern:?} on {name:?}");
    }
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
