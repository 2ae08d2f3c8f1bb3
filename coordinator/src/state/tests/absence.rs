//! VMs that are nowhere any more (F15).

use super::*;

/// A VM with a point, a base, and a job that was interrupted with its checkpoint made.
fn interrupted(w: &mut World) -> (VmKey, JobId, LeaseEpoch, DutyId) {
    let vm = w.vm(1, "hv1");
    let (first, epoch) = w.leased(&vm, "hv1");
    let Outcome::Committed(point) = w.commit(first, epoch) else { panic!("not committed") };
    w.bind(first, epoch, point);
    w.finish(first, epoch, true, None);
    let (job, epoch) = w.leased(&vm, "hv1");
    let Outcome::Duty(duty) = w.duty(job, epoch, "cp a1") else { panic!("not recorded") };
    w.step((job, epoch), duty, DutyState::Created);
    (vm, job, epoch, duty)
}

fn absent(w: &mut World, vm: &VmKey) -> Outcome {
    w.apply(Change::VmAbsent { vm: vm.clone() })
}

#[test]
fn the_duty_of_a_vm_that_is_nowhere_rests_its_job_ends_and_its_history_stays() {
    let mut w = World::new();
    let (vm, job, epoch, duty) = interrupted(&mut w);
    w.finish(job, epoch, false, Some(0));
    assert_eq!(w.state.owed(), vec![vm.clone()]);
    assert_eq!(absent(&mut w, &vm), Outcome::Done);
    let found = w.state.jobs.get(job).expect("there");
    assert!(matches!(found.stage, Stage::Ended { end: End::Failed, .. }));
    assert!(!found.host_clean && !found.data_safe, "two results, neither is good");
    assert!(found.message.contains("vm1") && found.error_code.starts_with("OUT-C"), "{found:?}");
    assert_eq!(w.state.open_duties(&vm).count(), 0);
    assert_eq!(
        w.state.resting_duties().count(),
        2,
        "its checkpoint, and the bound reference point"
    );
    let left = w.state.left_by_deleted();
    assert_eq!(left.iter().map(|l| l.duty.id).collect::<Vec<_>>(), [duty]);
    let alarm = left[0].alarm();
    assert!(
        alarm.contains("vm1") && alarm.contains("cp a1") && alarm.contains("vm settle"),
        "{alarm}"
    );
    assert_eq!(w.state.points.len(), 1, "history stays");
    assert!(w.state.owed().is_empty() && w.state.cleanups.is_empty());
    assert!(w.state.vms[&vm].gone_since_ms.is_some());
}

#[test]
fn a_vm_that_comes_back_is_owed_all_that_it_was_owed_and_has_no_base() {
    for host in ["hv1", "hv2"] {
        let mut w = World::new();
        let (vm, job, epoch, duty) = interrupted(&mut w);
        let incarnation = w.state.vms[&vm].incarnation;
        w.finish(job, epoch, false, None);
        absent(&mut w, &vm);
        absent(&mut w, &vm);
        w.place(&vm, host);
        let open: Vec<_> = w.state.open_duties(&vm).collect();
        assert_eq!(open.len(), 2, "{open:?}");
        assert!(open.iter().any(|d| d.id == duty && d.state == DutyState::Created));
        let rp = open.iter().find(|d| d.state == DutyState::Converted).expect("the former base");
        assert!(rp.reference_point.starts_with("rp-"), "{rp:?}");
        assert!(w.state.bases.is_empty() && w.state.unbased.contains_key(&vm));
        assert!(w.state.vms[&vm].incarnation > incarnation);
    }
}

#[test]
fn nothing_ends_while_somebody_may_be_at_work() {
    let mut w = World::new();
    let (vm, job, epoch, duty) = interrupted(&mut w);
    assert!(matches!(absent(&mut w, &vm), Outcome::Refused(Refusal::Busy { .. })), "leased");
    w.apply(Change::LeaseLost { job, epoch, why: "test".into(), not_before_ms: 0 });
    assert!(
        matches!(absent(&mut w, &vm), Outcome::Refused(Refusal::Busy { .. })),
        "not closed yet"
    );
    assert_eq!(w.state.open_duties(&vm).map(|d| d.id).collect::<Vec<_>>(), [duty]);
    w.apply(Change::SourcesClosed { job, epoch });
    assert_eq!(absent(&mut w, &vm), Outcome::Done);
}

#[test]
fn an_operator_settles_what_rests_and_nothing_that_a_host_can_clean() {
    let mut w = World::new();
    let (vm, job, epoch, _) = interrupted(&mut w);
    w.finish(job, epoch, false, None);
    w.apply(Change::SettleVm { vm: vm.clone() });
    assert_eq!(w.state.open_duties(&vm).count(), 1, "the VM is there");
    absent(&mut w, &vm);
    w.apply(Change::SettleVm { vm: vm.clone() });
    assert!(w.state.duties.is_empty());
    assert_eq!(w.state.left_by_deleted(), vec![]);
    let unknown = w.apply(Change::SettleVm { vm: key(9) });
    assert!(matches!(unknown, Outcome::Refused(Refusal::UnknownVm(_))));
}

#[test]
fn a_point_that_was_committed_before_its_vm_went_stays_safe_and_the_job_is_not_green() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    w.duty(job, epoch, "cp");
    w.commit(job, epoch);
    w.apply(Change::LeaseLost { job, epoch, why: "test".into(), not_before_ms: 0 });
    w.apply(Change::SourcesClosed { job, epoch });
    absent(&mut w, &vm);
    let found = w.state.jobs.get(job).expect("there");
    assert!(matches!(found.stage, Stage::Ended { end: End::Completed, .. }), "{found:?}");
    assert!(found.data_safe && !found.host_clean && !found.error_code.is_empty(), "{found:?}");
}
