//! What is owed to a host.

use super::*;

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
