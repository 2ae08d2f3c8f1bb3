//! Bases, and what makes change tracking doubtful.

use super::*;

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
