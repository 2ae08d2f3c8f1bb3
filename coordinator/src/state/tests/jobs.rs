//! Jobs, their leases and how they end.

use super::*;

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
