//! Promises that no sequence of commands may break, each checked after every step of thousands of random ones.

use std::collections::BTreeMap;

use outrider_proto::ids::{
    DutyId, JobId, LeaseEpoch, PlacementEpoch, PointId, VmIncarnation, VmKey,
};
use proptest::prelude::*;

use super::duties::DutyState;
use super::jobs::Stage;
use super::tests::{World, key};
use super::{Change, Outcome, State};

const HOSTS: [&str; 3] = ["hv1", "hv2", "hv3"];

/// What may happen, with small numbers that pick among what there is: also stale and foreign leases.
#[derive(Debug, Clone)]
enum Act {
    Backup(u8),
    Lease(usize, usize),
    Move(u8, usize),
    Down(usize),
    Up(usize),
    Lost(usize, u64),
    Closed(usize, u64),
    Cancel(usize),
    Duty(usize, u64),
    Step(usize, u64, usize, bool),
    Commit(usize, u64),
    Bind(usize, u64, usize),
    Raise(usize, u64, u8),
    Finish(usize, u64, bool, bool),
    StorageRestart(u64),
    Gone(u8),
    Absent(u8),
}

fn act() -> impl Strategy<Value = Act> {
    let (vm, host, job, back) = (0u8..3, 0usize..3, 0usize..6, 0u64..3);
    prop_oneof![
        3 => vm.clone().prop_map(Act::Backup),
        6 => (job.clone(), host.clone()).prop_map(|(j, h)| Act::Lease(j, h)),
        2 => (vm.clone(), host.clone()).prop_map(|(v, h)| Act::Move(v, h)),
        1 => host.clone().prop_map(Act::Down),
        1 => host.prop_map(Act::Up),
        1 => (job.clone(), back.clone()).prop_map(|(j, b)| Act::Lost(j, b)),
        1 => (job.clone(), back.clone()).prop_map(|(j, b)| Act::Closed(j, b)),
        1 => job.clone().prop_map(Act::Cancel),
        3 => (job.clone(), back.clone()).prop_map(|(j, b)| Act::Duty(j, b)),
        3 => (job.clone(), back.clone(), 0usize..4, any::<bool>())
            .prop_map(|(j, b, d, done)| Act::Step(j, b, d, done)),
        5 => (job.clone(), back.clone()).prop_map(|(j, b)| Act::Commit(j, b)),
        4 => (job.clone(), back.clone(), 0usize..6).prop_map(|(j, b, p)| Act::Bind(j, b, p)),
        1 => (job.clone(), back.clone(), vm.clone()).prop_map(|(j, b, v)| Act::Raise(j, b, v)),
        2 => (job, back, any::<bool>(), any::<bool>())
            .prop_map(|(j, b, c, r)| Act::Finish(j, b, c, r)),
        1 => (1u64..5).prop_map(Act::StorageRestart),
        1 => vm.clone().prop_map(Act::Gone),
        1 => vm.prop_map(Act::Absent),
    ]
}

/// A job of the last few and a lease of it, counted back from its last one.
fn held(state: &State, jobs: &[JobId], job: usize, back: u64) -> Option<(JobId, LeaseEpoch)> {
    let id = *jobs.iter().rev().nth(job)?;
    let last = state.jobs.get(id)?.lease_epoch.0;
    Some((id, LeaseEpoch(last.saturating_sub(back))))
}

struct Seen {
    placements: BTreeMap<VmKey, PlacementEpoch>,
    incarnations: BTreeMap<VmKey, VmIncarnation>,
    leases: BTreeMap<JobId, LeaseEpoch>,
    committed: BTreeMap<JobId, PointId>,
    duties: Vec<DutyId>,
}

fn check(before: &Seen, state: &State, done: Option<DutyId>, committing: Option<&Committing>) {
    for (vm, epoch) in &before.placements {
        assert!(state.vms[vm].placement >= *epoch, "a placement epoch went back");
    }
    for (vm, incarnation) in &before.incarnations {
        assert!(state.vms[vm].incarnation >= *incarnation, "an incarnation went back");
    }
    for (job, epoch) in &before.leases {
        assert!(state.jobs.get(*job).expect("jobs stay").lease_epoch >= *epoch);
    }
    for (job, point) in &before.committed {
        let found = state.jobs.get(*job).expect("jobs stay");
        assert_eq!(found.committed, Some(*point), "a committed point was unset or changed");
        assert!(state.points.contains_key(point), "a committed point is gone");
    }
    for duty in &before.duties {
        let gone = !state.duties.contains_key(duty);
        assert!(!gone || done == Some(*duty), "a duty disappeared without DONE");
    }
    for duty in state.duties.values().filter(|duty| !duty.is_open()) {
        let vm = &state.vms[&duty.vm];
        assert!(vm.gone_since_ms.is_some(), "a duty rests while its VM is there");
        assert!(
            !state.bases.contains_key(&duty.vm),
            "a base outlived the proof that its VM is gone"
        );
    }
    let fresh: Vec<_> = state
        .jobs
        .iter()
        .filter(|j| j.committed.is_some() && !before.committed.contains_key(&j.id))
        .collect();
    for job in fresh {
        let by = committing.expect("only a commit commits");
        assert_eq!(by.job, job.id);
        assert!(by.current, "committed by a lease that was not current");
        assert!(by.placement_current, "committed at a placement that was not current");
    }
    let jobs_of_points: std::collections::BTreeSet<_> =
        state.points.values().map(|p| p.job).collect();
    assert_eq!(jobs_of_points.len(), state.points.len(), "a job committed two points");
    for (vm, base) in &state.bases {
        let point = state.points.get(&base.binding.point).expect("bound to a committed point");
        assert_eq!(&point.vm, vm);
        assert_eq!(point.incarnation, state.vms[vm].incarnation, "bound across incarnations");
        assert_eq!(point.manifest, base.binding.manifest);
    }
    let mut busy = std::collections::BTreeSet::new();
    for job in state.jobs.unfinished() {
        assert!(!job.has_ended());
        assert!(busy.insert(job.vm.clone()), "two active jobs on one VM");
        if let Stage::Leased(lease) = &job.stage {
            assert_eq!(lease.epoch, job.lease_epoch);
            let vm = &state.vms[&job.vm];
            assert_eq!(vm.host.as_ref(), Some(&lease.host), "leased to a host the VM has left");
            assert_eq!(vm.placement, lease.placement);
            assert!(
                state.jobs.open().any(|(j, a)| j.id == job.id && a.epoch == lease.epoch),
                "a current lease is always open"
            );
        }
    }
}

struct Committing {
    job: JobId,
    current: bool,
    placement_current: bool,
}

fn seen(state: &State) -> Seen {
    Seen {
        placements: state.vms.iter().map(|(k, v)| (k.clone(), v.placement)).collect(),
        incarnations: state.vms.iter().map(|(k, v)| (k.clone(), v.incarnation)).collect(),
        leases: state.jobs.iter().map(|j| (j.id, j.lease_epoch)).collect(),
        committed: state.jobs.iter().filter_map(|j| Some((j.id, j.committed?))).collect(),
        duties: state.duties.keys().copied().collect(),
    }
}

fn play(acts: Vec<Act>) {
    let mut w = World::new();
    for n in 0..3 {
        w.vm(n, "hv1");
    }
    let mut jobs: Vec<JobId> = Vec::new();
    let mut restarts = 1;
    for act in acts {
        let before = seen(&w.state);
        let mut done = None;
        let mut committing = None;
        let pick = |w: &World, job: usize, back: u64| held(&w.state, &jobs, job, back);
        match act {
            Act::Backup(vm) => jobs.extend(w.backup(&key(vm)).ok()),
            Act::Lease(job, host) => {
                if let Some(id) = jobs.iter().rev().nth(job) {
                    w.lease(*id, HOSTS[host]);
                }
            }
            Act::Move(vm, host) => drop(w.place(&key(vm), HOSTS[host])),
            Act::Down(host) => drop(w.apply(Change::HostDown { host: HOSTS[host].into() })),
            Act::Up(host) => drop(w.apply(Change::HostUp { host: HOSTS[host].into() })),
            Act::Lost(job, back) => {
                if let Some((job, epoch)) = pick(&w, job, back) {
                    w.apply(Change::LeaseLost { job, epoch, why: "test".into(), not_before_ms: 0 });
                }
            }
            Act::Closed(job, back) => {
                if let Some((job, epoch)) = pick(&w, job, back) {
                    w.apply(Change::SourcesClosed { job, epoch });
                }
            }
            Act::Cancel(job) => {
                if let Some((job, _)) = pick(&w, job, 0) {
                    w.apply(Change::Cancel { job, by: "test".into() });
                }
            }
            Act::Duty(job, back) => {
                if let Some((job, epoch)) = pick(&w, job, back) {
                    w.duty(job, epoch, &format!("cp {job} {epoch}"));
                }
            }
            Act::Step(job, back, duty, is_done) => {
                let duty = w.state.duties.keys().nth(duty).copied();
                if let (Some(held), Some(duty)) = (pick(&w, job, back), duty) {
                    let state = if is_done { DutyState::Done } else { DutyState::Created };
                    if matches!(w.step(held, duty, state), Outcome::Duty(_)) && is_done {
                        done = Some(duty);
                    }
                }
            }
            Act::Commit(job, back) => {
                if let Some((job, epoch)) = pick(&w, job, back) {
                    let found = w.state.jobs.get(job).expect("there");
                    let placement = w.state.vms[&found.vm].placement;
                    let lease = found.current(epoch);
                    committing = Some(Committing {
                        job,
                        current: lease.is_some(),
                        placement_current: lease.is_some_and(|l| l.placement == placement),
                    });
                    w.commit(job, epoch);
                }
            }
            Act::Bind(job, back, point) => {
                let point = w.state.points.keys().nth(point).copied();
                if let (Some((job, epoch)), Some(point)) = (pick(&w, job, back), point) {
                    w.bind(job, epoch, point);
                }
            }
            Act::Raise(job, back, vm) => {
                if let Some((job, epoch)) = pick(&w, job, back) {
                    w.apply(Change::RaiseIncarnation {
                        job,
                        epoch,
                        vm: key(vm),
                        why: "test".into(),
                    });
                }
            }
            Act::Finish(job, back, clean, retry) => {
                if let Some((job, epoch)) = pick(&w, job, back) {
                    let at = retry.then_some(w.now);
                    w.finish(job, epoch, clean, at);
                }
            }
            Act::StorageRestart(by) => {
                restarts += by;
                w.storage("s1", restarts);
            }
            Act::Gone(vm) => drop(w.apply(Change::VmGone { vm: key(vm) })),
            Act::Absent(vm) => drop(w.apply(Change::VmAbsent { vm: key(vm) })),
        }
        check(&before, &w.state, done, committing.as_ref());
    }
    let json = serde_json::to_vec(&w.state).expect("serialises");
    let back: State = serde_json::from_slice(&json).expect("reads back");
    assert_eq!(back, w.state, "a snapshot changes nothing");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_commands_breaks_a_promise(acts in prop::collection::vec(act(), 1..120)) {
        play(acts);
    }
}
