//! F15: when a VM counts as absent.

use super::*;

const GRACE: Duration = Duration::from_secs(60);

/// hv1 had the VM, whose backup was interrupted, and said that it is gone.
fn deleted() -> (Lead, VmKey) {
    let mut l = Lead::new();
    l.follow = Follow::new(GRACE);
    for host in ["hv2", "hv3"] {
        l.inventory(host, vec![]);
    }
    let vm = key(1);
    l.inventory("hv1", vec![clustered(&vm, "hv1")]);
    let (job, epoch) = l.w.leased(&vm, "hv1");
    l.w.duty(job, epoch, "cp");
    l.w.finish(job, epoch, false, Some(0));
    assert_eq!(l.follow.sought("cluster", &l.w.state), vec![], "it is shown");
    l.gone("hv1", &vm);
    assert_eq!(l.follow.sought("cluster", &l.w.state), vec![vm.clone()]);
    (l, vm)
}

impl Lead {
    /// Hosts that look for a VM at this second, and whether they find it.
    fn searched(&mut self, second: u64, hosts: &[&str], vm: &VmKey, found: bool) {
        for host in hosts {
            self.hear(Event::Searched(Searched {
                host: (*host).to_owned(),
                realm: vm.realm.clone(),
                asked: Duration::from_secs(second),
                sought: vec![vm.guid],
                found: found.then_some(vm.guid).into_iter().collect(),
                cluster: ["HV1", "hv2", "hv3"].map(str::to_owned).to_vec(),
            }));
        }
    }

    fn rests(&self) -> bool {
        self.w.state.resting_duties().next().is_some()
    }
}

const ALL: [&str; 3] = ["hv1", "hv2", "hv3"];

#[test]
fn f15_a_vm_is_absent_when_all_hosts_have_said_so_twice_and_not_before() {
    let (mut l, vm) = deleted();
    l.searched(10, &ALL, &vm, false);
    l.searched(60, &ALL, &vm, false);
    assert!(!l.rests(), "the second look was too soon");
    l.searched(71, &["hv1", "hv3"], &vm, false);
    assert!(!l.rests(), "one has not looked again");
    l.searched(72, &["hv2"], &vm, false);
    assert!(l.rests(), "all have");
    assert!(l.follow.sought("cluster", &l.w.state).is_empty());
    // It comes back, imported under its GUID: what was owed is owed.
    l.seen("hv2", clustered(&vm, "hv2"));
    assert_eq!(l.w.state.open_duties(&vm).count(), 1);
    assert!(!l.rests());
}

#[test]
fn f15_silence_of_a_host_that_is_down_or_cut_off_proves_nothing() {
    for down in [false, true] {
        let (mut l, vm) = deleted();
        if down {
            l.node("hv3", false);
        } else {
            l.silent("hv3", true);
        }
        for second in [10, 100, 1000] {
            l.searched(second, &["hv1", "hv2"], &vm, false);
        }
        assert!(!l.rests(), "down: {down}");
        // It was removed from the fabric, but the cluster still counts it: its VMs may be there.
        l.w.apply(Change::ForgetHost { host: "hv3".into(), by: "op".into(), force: true });
        l.hear(Event::Forgotten { host: "hv3".into() });
        l.searched(2000, &["hv1", "hv2"], &vm, false);
        assert!(!l.rests(), "a member of the cluster without an agent");
    }
}

#[test]
fn f15_whatever_shows_the_vm_begins_the_proof_anew() {
    type Show = fn(&mut Lead, &VmKey);
    let shows: [(&str, Show); 3] = [
        ("a host finds it, or the cluster's database names it", |l, vm| {
            l.searched(50, &["hv2"], vm, true);
        }),
        ("it is on its way to a host, and the migration fails", |l, vm| {
            l.seen("hv2", planned(vm, "hv1"));
            assert_eq!(l.follow.sought("cluster", &l.w.state), vec![], "it is in transit");
            l.gone("hv2", vm);
        }),
        ("it was there for a moment", |l, vm| {
            l.seen("hv3", clustered(vm, "hv3"));
            l.gone("hv3", vm);
        }),
    ];
    for (what, show) in shows {
        let (mut l, vm) = deleted();
        l.searched(10, &ALL, &vm, false);
        show(&mut l, &vm);
        l.searched(80, &ALL, &vm, false);
        assert!(!l.rests(), "{what}");
        l.searched(150, &ALL, &vm, false);
        assert!(l.rests(), "{what}: it is gone now");
    }
}

#[test]
fn f15_a_clustered_vm_is_not_absent_while_no_cluster_database_is_read() {
    let (mut l, vm) = deleted();
    for second in [10, 100] {
        for host in ALL {
            l.hear(Event::Searched(Searched {
                host: host.to_owned(),
                realm: vm.realm.clone(),
                asked: Duration::from_secs(second),
                sought: vec![vm.guid],
                found: vec![],
                cluster: vec![],
            }));
        }
    }
    assert!(!l.rests());
}

#[test]
fn f15_a_vm_in_another_role_or_with_nothing_owed_is_not_looked_for() {
    let (mut l, vm) = deleted();
    l.seen("hv2", clustered(&replica(&vm), "hv2"));
    assert_eq!(l.follow.sought("cluster", &l.w.state), vec![], "its GUID is there");
    let idle = key(2);
    l.seen("hv1", clustered(&idle, "hv1"));
    l.gone("hv1", &idle);
    assert_eq!(l.follow.sought("cluster", &l.w.state), vec![], "nothing is owed to it");
}
