//! Decisions for given states and times.

use std::collections::BTreeSet;

use super::*;
use crate::state::duties::DutyState;
use crate::state::groups::{NewGroup, Policy};
use crate::state::tests::World;
use crate::state::{Change, Command};

fn live(hosts: &[&str]) -> Live {
    Live { attached: hosts.iter().map(|h| ((*h).to_owned(), 1)).collect(), ..Live::default() }
}

fn all() -> Live {
    live(&["hv1", "hv2", "hv3"])
}

fn group(w: &mut World, vms: &[&VmKey], every_ms: u64) -> GroupId {
    let id = GroupId::random();
    let new = NewGroup {
        id,
        name: id.to_string(),
        vms: vms.iter().map(|v| (*v).clone()).collect::<BTreeSet<_>>(),
        patterns: Vec::new(),
        policy: Policy { every_ms, ..Policy::default() },
        created_ms: 10_000,
    };
    w.apply(Change::CreateGroup(Box::new(new)));
    id
}

fn leased(decisions: &[Decision]) -> Vec<(JobId, String)> {
    decisions
        .iter()
        .filter_map(|d| match d {
            Decision::Lease { job, host, .. } => Some((*job, host.clone())),
            _ => None,
        })
        .collect()
}

#[test]
fn a_group_runs_at_its_interval_and_missed_runs_are_one() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let id = group(&mut w, &[&vm], 1_000);
    let table = [
        (10_999, None),
        (11_000, Some(12_000)),
        (11_999, Some(12_000)),
        (12_000, Some(13_000)),
        (55_500, Some(56_000)),
    ];
    for (now, next) in table {
        let expected = next.map(|next_run_ms| Decision::RunGroup {
            group: id,
            vms: vec![vm.clone()],
            checks: BTreeSet::new(),
            skipped: 0,
            next_run_ms,
        });
        let decided = decide(&w.state, &all(), &Limits::default(), now);
        assert_eq!(decided.first(), expected.as_ref(), "at {now}");
    }
}

#[test]
fn a_run_that_a_wrong_clock_put_off_for_a_year_is_due_and_an_hour_between_clocks_is_not() {
    const HOUR: u64 = 3_600_000;
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let id = group(&mut w, &[&vm], HOUR);
    let next = |w: &World| w.state.groups[&id].next_run_ms;
    let run = |w: &mut World, now: u64| {
        let decided = decide(&w.state, &all(), &Limits::default(), now);
        let Some(Decision::RunGroup { next_run_ms, .. }) = decided.first() else { return false };
        let run =
            Change::RunGroup { group: id, jobs: vec![], skipped: 0, next_run_ms: *next_run_ms };
        w.state.apply(Command { at_ms: now, change: run });
        true
    };
    let (today, in_a_year) = (HOUR * 10, HOUR * 9_000);
    assert!(run(&mut w, in_a_year), "a leader's clock is a year ahead");
    assert!(next(&w).is_some_and(|at| at > in_a_year));
    assert!(run(&mut w, today), "the next leader's is right");
    assert_eq!(next(&w), Some(today + HOUR));
    assert!(!run(&mut w, today - HOUR), "one that is an hour behind runs nothing twice");
    assert_eq!(next(&w), Some(today + HOUR));
}

#[test]
fn a_group_without_interval_runs_only_when_asked() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    group(&mut w, &[&vm], 0);
    assert!(decide(&w.state, &all(), &Limits::default(), u64::MAX).is_empty());
}

#[test]
fn a_vm_whose_last_run_still_runs_is_skipped_and_counted() {
    let mut w = World::new();
    let (a, b) = (w.vm(1, "hv1"), w.vm(2, "hv1"));
    let id = group(&mut w, &[&a, &b], 1_000);
    w.leased(&a, "hv1");
    let decided = decide(&w.state, &all(), &Limits::default(), 11_000);
    let run = Decision::RunGroup {
        group: id,
        vms: vec![b.clone()],
        checks: BTreeSet::new(),
        skipped: 1,
        next_run_ms: 12_000,
    };
    assert_eq!(decided[0], run);
    let jobs = vec![crate::leader::backup(b, Some(id), crate::state::facts::BackupKind::Full, "")];
    let change = Change::RunGroup { group: id, jobs, skipped: 1, next_run_ms: 12_000 };
    w.apply(change.clone());
    w.apply(change);
    let group = &w.state.groups[&id];
    assert_eq!((group.skipped_runs, group.next_run_ms), (1, Some(12_000)), "a run is taken once");
    assert_eq!(w.state.jobs.iter().count(), 2);
}

#[test]
fn vms_that_nobody_can_reach_for_good_are_left_out() {
    let mut w = World::new();
    let (a, b) = (w.vm(1, "hv1"), w.vm(2, "hv1"));
    group(&mut w, &[&a, &b], 1_000);
    w.apply(Change::VmGone { vm: a });
    let decided = decide(&w.state, &all(), &Limits::default(), 11_000);
    assert!(matches!(&decided[0], Decision::RunGroup { vms, .. } if *vms == vec![b]));
}

#[test]
fn limits_per_host_and_fabric_hold() {
    let mut w = World::new();
    for n in 0..20 {
        let host = ["hv1", "hv2"][usize::from(n % 2)];
        let vm = w.vm(n, host);
        w.backup(&vm).expect("created");
    }
    let decided = leased(&decide(&w.state, &all(), &Limits::default(), w.now));
    assert_eq!(decided.len(), 8);
    assert_eq!(decided.iter().filter(|(_, host)| host == "hv1").count(), 4);
    let tight = Limits { fabric: 3, ..Limits::default() };
    assert_eq!(leased(&decide(&w.state, &all(), &tight, w.now)).len(), 3);
    for (job, host) in &decided {
        w.lease(*job, host);
    }
    assert!(leased(&decide(&w.state, &all(), &Limits::default(), w.now)).is_empty());
    let waiting = w.state.jobs.unfinished().find(|j| j.lease().is_none()).expect("some wait");
    let why = waits(&w.state, &all(), &Limits::default(), waiting, w.now);
    assert!(matches!(why, Some(Waits::HostBusy(_))), "{why:?}");
}

#[test]
fn a_job_that_has_begun_goes_before_one_that_has_not() {
    let mut w = World::new();
    let first = w.vm(1, "hv1");
    let fresh = w.backup(&first).expect("created");
    let second = w.vm(2, "hv1");
    let (begun, _) = w.leased(&second, "hv1");
    w.place(&second, "hv2");
    let tight = Limits { fabric: 1, ..Limits::default() };
    assert_eq!(leased(&decide(&w.state, &all(), &tight, w.now)), [(begun, "hv2".to_owned())]);
    assert_ne!(begun, fresh);
}

#[test]
fn a_job_waits_for_its_host_its_layout_and_its_back_off_and_says_so() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let job = w.backup(&vm).expect("created");
    let limits = Limits::default();
    let why = |w: &World, live: &Live, now: u64| {
        waits(&w.state, live, &limits, w.state.jobs.get(job).expect("there"), now)
    };
    assert_eq!(why(&w, &all(), w.now), None);
    assert_eq!(why(&w, &live(&["hv2"]), w.now), Some(Waits::HostSilent("hv1".into())));
    let slots = std::mem::take(&mut w.state.storage.layout);
    assert_eq!(why(&w, &all(), w.now), Some(Waits::NoLayout));
    w.state.storage.layout = slots;
    let crate::state::Outcome::Leased(epoch) = w.lease(job, "hv1") else { panic!("not leased") };
    let at = w.now + 500;
    w.finish(job, epoch, true, Some(at));
    assert_eq!(why(&w, &all(), at - 1), Some(Waits::BackOff(at)));
    assert_eq!(why(&w, &all(), at), None);
    w.apply(Change::HostDown { host: "hv1".into() });
    assert_eq!(why(&w, &all(), at), Some(Waits::HostDown("hv1".into())));
    w.apply(Change::VmGone { vm });
    assert_eq!(why(&w, &all(), at), Some(Waits::NoHost));
}

#[test]
fn open_duties_bring_cleanups_that_back_off_until_the_host_is_clean() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let crate::state::Outcome::Duty(duty) = w.duty(job, epoch, "cp") else { panic!("no duty") };
    let limits = Limits { back_off_ms: 1_000, back_off_max_ms: 3_000, ..Limits::default() };
    let cleanup = |w: &World, now: u64| {
        decide(&w.state, &all(), &limits, now).iter().any(
            |d| matches!(d, Decision::Cleanup { vm, .. } if *vm == crate::state::tests::key(1)),
        )
    };
    assert!(!cleanup(&w, w.now), "the job itself still works on it");
    w.commit(job, epoch);
    w.finish(job, epoch, false, None);
    assert!(cleanup(&w, w.now), "at once after the job");
    for wait in [1_000, 2_000, 3_000, 3_000] {
        let work = Work::Cleanup { why: String::new() };
        let job = w.create(&vm, work).expect("created");
        let crate::state::Outcome::Leased(epoch) = w.lease(job, "hv1") else { panic!("no lease") };
        w.finish(job, epoch, false, None);
        assert!(!cleanup(&w, w.now + wait - 1));
        assert!(cleanup(&w, w.now + wait));
    }
    let job = w.create(&vm, Work::Cleanup { why: String::new() }).expect("created");
    let crate::state::Outcome::Leased(epoch) = w.lease(job, "hv1") else { panic!("no lease") };
    w.step((job, epoch), duty, DutyState::Done);
    w.finish(job, epoch, true, None);
    assert!(!cleanup(&w, u64::MAX));
    assert!(w.state.cleanups.is_empty());
}

#[test]
fn what_a_host_that_leaves_shows_of_ours_is_cleaned_up_once_for_each_look() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let cleanups = |w: &World, seen: u64| {
        let live = Live { litter: [(vm.clone(), seen)].into(), ..all() };
        let decisions = decide(&w.state, &live, &Limits::default(), w.now);
        decisions.iter().filter(|d| matches!(d, Decision::Cleanup { .. })).count()
    };
    let seen = w.now;
    assert_eq!(cleanups(&w, seen), 1);
    let job = w.create(&vm, Work::Cleanup { why: String::new() }).expect("created");
    assert_eq!(cleanups(&w, seen), 0, "one is on its way");
    let crate::state::Outcome::Leased(epoch) = w.lease(job, "hv1") else { panic!("no lease") };
    w.finish(job, epoch, true, None);
    assert_eq!(cleanups(&w, seen), 0, "what was seen before may be gone");
    assert_eq!(cleanups(&w, w.now), 1, "it is there still");
}

#[test]
fn failed_attempts_are_tried_again_so_often_and_no_oftener() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let id = w.backup(&vm).expect("created");
    let limits = Limits { back_off_ms: 100, ..Limits::default() };
    let mut waited = Vec::new();
    loop {
        let crate::state::Outcome::Leased(epoch) = w.lease(id, "hv1") else { panic!("no lease") };
        let now = w.now;
        let at = retry_at(w.state.jobs.get(id).expect("there"), true, &limits, now);
        w.finish(id, epoch, true, at);
        match at {
            Some(at) => waited.push(at - now),
            None => break,
        }
    }
    assert_eq!(waited, [100, 200]);
    assert!(w.state.jobs.get(id).expect("there").has_ended());
    let job = w.backup(&vm).expect("created");
    let job = w.state.jobs.get(job).expect("there");
    assert_eq!(retry_at(job, false, &limits, 0), None, "the agent knows that it is in vain");
}
