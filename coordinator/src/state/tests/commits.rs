//! What may be committed.

use super::*;

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
        checkpoint: String::new(),
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
