use outrider_proto::ids::{DutyId, LeaseEpoch};

use super::super::duties::{DutyState, DutyStep};
use super::super::enrolment::{Enrol, NewToken};
use super::super::jobs::Report;
use super::super::tests::World;
use super::super::{Change, Outcome, Refusal};
use super::*;

/// A VM on hv1 with a bound reference point, its job over.
fn based(w: &mut World, n: u8) -> VmKey {
    let vm = w.vm(n, "hv1");
    let (job, epoch) = w.leased(&vm, "hv1");
    let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
    assert_eq!(w.bind(job, epoch, point), Outcome::Bound);
    end(w, job, epoch);
    vm
}

fn end(w: &mut World, job: JobId, epoch: LeaseEpoch) {
    let report = Box::new(Report { data_safe: true, host_clean: true, ..Report::default() });
    w.apply(Change::Finish { job, epoch, report, retry_at_ms: None });
}

fn retire(w: &mut World, host: &str) -> Outcome {
    w.apply(Change::RetireHost { host: host.into(), by: "ann".into() })
}

fn forget(w: &mut World, host: &str, force: bool) -> Outcome {
    w.apply(Change::ForgetHost { host: host.into(), by: "ann".into(), force })
}

fn release(w: &mut World, vm: &VmKey) -> Outcome {
    w.apply(Change::ReleaseBase { vm: vm.clone(), duty: DutyId::random() })
}

#[test]
fn a_base_is_given_up_before_its_reference_point_goes_and_the_host_is_clean_after() {
    let mut w = World::new();
    let vm = based(&mut w, 1);
    assert!(matches!(release(&mut w, &vm), Outcome::Refused(_)), "hv1 does not leave");
    assert!(matches!(forget(&mut w, "hv1", false), Outcome::Refused(Refusal::NotLeaving(_))));
    retire(&mut w, "hv1");
    assert_eq!(w.state.departure("hv1").bases, vec![vm.clone()]);
    assert!(matches!(forget(&mut w, "hv1", false), Outcome::Refused(Refusal::NotClean { .. })));
    let reference_point = w.state.bases[&vm].binding.reference_point.clone();
    assert_eq!(release(&mut w, &vm), Outcome::Done);
    assert!(w.state.bases.is_empty() && w.state.unbased[&vm].contains("hv1"));
    let duty = w.state.open_duties(&vm).next().cloned().expect("a duty");
    assert_eq!((duty.state, &duty.reference_point), (DutyState::Converted, &reference_point));
    let departure = w.state.departure("hv1");
    assert_eq!((departure.duties.len(), departure.is_clean()), (1, false));
    // The cleanup job does it.
    let job = w.create(&vm, Work::Cleanup { why: String::new() }).expect("created");
    let Outcome::Leased(epoch) = w.lease(job, "hv1") else { panic!("not leased") };
    let step = DutyStep {
        state: DutyState::Done,
        checkpoint: String::new(),
        reference_point: String::new(),
        converting: None,
    };
    w.apply(Change::UpdateDuty { job, epoch, duty: duty.id, step });
    assert!(!w.state.departure("hv1").is_clean(), "the job still runs");
    end(&mut w, job, epoch);
    assert!(w.state.departure("hv1").is_clean());
    assert_eq!(forget(&mut w, "hv1", false), Outcome::Done);
    assert!(!w.state.hosts.contains_key("hv1"));
    assert_eq!(w.state.vms[&vm].host, None, "nobody looks at it any more");
    // Another host shows it: it is followed, and its next base ends the reason.
    w.place(&vm, "hv2");
    let (job, epoch) = w.leased(&vm, "hv2");
    let Outcome::Committed(point) = w.commit(job, epoch) else { panic!("not committed") };
    w.bind(job, epoch, point);
    assert!(w.state.unbased.is_empty());
}

#[test]
fn a_vm_that_moves_away_keeps_its_base_or_takes_its_duty_along() {
    let mut w = World::new();
    let (early, late) = (based(&mut w, 1), based(&mut w, 2));
    w.place(&early, "hv2");
    retire(&mut w, "hv1");
    assert_eq!(w.state.departure("hv1").bases, vec![late.clone()]);
    release(&mut w, &late);
    w.place(&late, "hv3");
    assert!(w.state.departure("hv1").is_clean());
    assert_eq!(forget(&mut w, "hv1", false), Outcome::Done);
    assert!(w.state.bases.contains_key(&early) && w.state.has_open_duties(&late));
}

#[test]
fn a_running_job_is_waited_for_and_its_base_is_not_taken_meanwhile() {
    let mut w = World::new();
    let vm = based(&mut w, 1);
    let (job, epoch) = w.leased(&vm, "hv1");
    retire(&mut w, "hv1");
    assert_eq!(w.state.departure("hv1").running, vec![job]);
    assert!(matches!(release(&mut w, &vm), Outcome::Refused(Refusal::Busy { .. })));
    end(&mut w, job, epoch);
    let waiting = w.backup(&vm).expect("created");
    assert_eq!(w.state.departure("hv1").pending, vec![waiting]);
    w.apply(Change::Cancel { job: waiting, by: "the fabric".into() });
    assert_eq!(release(&mut w, &vm), Outcome::Done);
}

#[test]
fn a_forgotten_hosts_key_is_refused_and_its_name_is_free() {
    let mut w = World::new();
    let token = NewToken {
        public_key: [1; 32],
        role: Role::Node,
        name: None,
        valid_ms: 1_000_000,
        uses: 9,
        replace: false,
        by: "ann".into(),
    };
    w.apply(Change::CreateToken(Box::new(token)));
    let enrol = |w: &mut World, key: &str| {
        let enrol = Enrol { token: [1; 32], name: "hv9".into(), key: key.into() };
        w.apply(Change::Enrol(Box::new(enrol)))
    };
    assert_eq!(enrol(&mut w, "k1"), Outcome::Done);
    w.attach("hv9", "cluster");
    retire(&mut w, "hv9");
    assert_eq!(forget(&mut w, "hv9", false), Outcome::Done);
    for key in ["k1", "key of hv9"] {
        assert_eq!(w.state.revoked(key).map(|r| r.member.as_str()), Some("node/hv9"), "{key}");
    }
    assert!(matches!(enrol(&mut w, "k1"), Outcome::Refused(Refusal::Revoked { .. })));
    assert_eq!(enrol(&mut w, "k2"), Outcome::Done, "the name is free");
    assert!(w.state.revoked("k2").is_none());
}

#[test]
fn a_host_that_died_is_forgotten_by_force_and_what_it_left_stays_with_its_vms() {
    let mut w = World::new();
    let vm = based(&mut w, 1);
    let (job, _) = w.leased(&vm, "hv1");
    assert_eq!(forget(&mut w, "hv1", true), Outcome::Done);
    let base = w.state.bases.get(&vm).expect("its reference point may be shown by another host");
    assert!(base.binding.tracking_unproven, "whether the host crashed nobody can tell any more");
    assert!(w.state.jobs.get(job).expect("there").lease().is_none());
    assert!(matches!(forget(&mut w, "hv1", true), Outcome::Refused(Refusal::UnknownHost(_))));
    assert!(matches!(retire(&mut w, "nobody"), Outcome::Refused(Refusal::UnknownHost(_))));
}

#[test]
fn a_host_that_is_kept_after_all_works_again() {
    let mut w = World::new();
    let vm = based(&mut w, 1);
    retire(&mut w, "hv1");
    w.attach("hv1", "cluster");
    assert!(w.state.is_leaving("hv1"), "a restart of its agent changes nothing");
    w.apply(Change::KeepHost { host: "hv1".into() });
    assert!(!w.state.is_leaving("hv1") && w.state.bases.contains_key(&vm));
}
