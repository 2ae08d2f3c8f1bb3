//! One test a rule of `docs/follow.md`; F numbers are those of that page.

use outrider_proto::ids::VmRole;

use super::*;
use crate::state::tests::{World, key, sighting};

mod absence;

/// A world whose VMs are followed as a leader does it.
struct Lead {
    w: World,
    follow: Follow,
}

impl Lead {
    fn new() -> Self {
        Self { w: World::new(), follow: Follow::default() }
    }

    fn hear(&mut self, event: Event) {
        let changes = self.follow.apply(event, &self.w.state);
        self.w.apply(Change::Many(changes));
    }

    fn inventory(&mut self, host: &str, vms: Vec<Instance>) {
        self.hear(Event::Inventory {
            host: host.into(),
            realm: "cluster".into(),
            vms,
            up: vec![],
            down: vec![],
        });
    }

    fn seen(&mut self, host: &str, instance: Instance) {
        self.hear(Event::Seen { host: host.into(), instance });
    }

    fn gone(&mut self, host: &str, vm: &VmKey) {
        self.hear(Event::Gone { host: host.into(), vm: vm.clone() });
    }

    fn owner(&mut self, vm: &VmKey, owner: &str) {
        self.hear(Event::Owner { vm: vm.clone(), owner: owner.into() });
    }

    fn node(&mut self, host: &str, up: bool) {
        self.hear(Event::Host { realm: "cluster".into(), host: host.into(), up });
    }

    fn silent(&mut self, host: &str, silent: bool) {
        self.hear(Event::Silent { host: host.into(), silent });
    }

    fn at(&self, vm: &VmKey) -> Option<(&str, u64)> {
        let vm = self.w.state.vms.get(vm)?;
        Some((vm.host.as_deref()?, vm.placement.0))
    }
}

fn clustered(vm: &VmKey, owner: &str) -> Instance {
    Instance { facts: sighting(vm, "vm"), realized: true, owner: Some(owner.into()) }
}

fn planned(vm: &VmKey, owner: &str) -> Instance {
    Instance { realized: false, ..clustered(vm, owner) }
}

fn alone(vm: &VmKey) -> Instance {
    let mut instance = Instance { facts: sighting(vm, "vm"), realized: true, owner: None };
    instance.facts.clustered = false;
    instance
}

#[test]
fn f1_a_planned_vm_claims_nothing() {
    let mut l = Lead::new();
    let vm = key(1);
    l.seen("hv2", planned(&vm, "hv2"));
    assert_eq!(l.at(&vm), None);
    l.seen("hv1", clustered(&vm, "hv1"));
    l.seen("hv2", planned(&vm, "hv2"));
    l.owner(&vm, "hv2");
    assert_eq!(l.at(&vm), Some(("hv1", 1)));
}

#[test]
fn f1_a_test_failover_is_shown_and_never_placed() {
    let mut l = Lead::new();
    let vm = VmKey { role: VmRole::TestReplica, ..key(1) };
    l.seen("hv1", clustered(&vm, "hv1"));
    l.owner(&key(1), "hv1");
    assert!(l.w.state.vms.contains_key(&vm));
    assert_eq!(l.at(&vm), None);
}

fn replica(vm: &VmKey) -> VmKey {
    VmKey { role: VmRole::Replica, ..vm.clone() }
}

#[test]
fn f13_a_replica_has_a_place_of_its_own_and_moves_in_its_cluster() {
    let mut l = Lead::new();
    l.w.attach("far", "other");
    let vm = key(1);
    let copy = replica(&elsewhere(&vm));
    l.seen("hv1", clustered(&vm, "hv1"));
    l.seen("far", alone(&copy));
    assert_eq!((l.at(&vm), l.at(&copy)), (Some(("hv1", 1)), Some(("far", 1))));
    assert!(l.w.state.vms.values().all(|vm| !vm.duplicate));
    // The cluster's database knows no roles.
    let here = replica(&key(2));
    l.seen("hv1", clustered(&here, "hv1"));
    l.seen("hv2", clustered(&here, "hv1"));
    l.owner(&key(2), "hv2");
    assert_eq!(l.at(&here), Some(("hv2", 2)));
}

#[test]
fn f13_a_replica_that_goes_makes_no_duplicate_the_vm() {
    let mut l = Lead::new();
    l.w.attach("far", "other");
    l.w.attach("third", "third");
    let vm = key(1);
    let copy = replica(&elsewhere(&vm));
    let twin = VmKey { realm: "third".into(), ..vm.clone() };
    l.seen("hv1", clustered(&vm, "hv1"));
    l.seen("far", alone(&copy));
    l.seen("third", alone(&twin));
    assert!(l.w.state.vms[&twin].duplicate);
    l.gone("far", &copy);
    assert_eq!(l.at(&twin), None, "the VM itself still runs");
    assert!(!l.w.state.vms[&copy].is_workable());
}

#[test]
fn f13_patterns_take_in_no_replica() {
    let mut l = Lead::new();
    let vm = replica(&key(1));
    l.seen("hv1", clustered(&vm, "hv1"));
    let group = |vms: &[&VmKey], patterns: &[&str]| crate::state::groups::NewGroup {
        id: outrider_proto::ids::GroupId::random(),
        name: format!("{patterns:?}"),
        vms: vms.iter().map(|vm| (*vm).clone()).collect(),
        patterns: patterns.iter().map(|p| (*p).to_owned()).collect(),
        policy: crate::state::groups::Policy::default(),
        created_ms: 1,
    };
    let (all, named) = (group(&[], &["*"]), group(&[&vm], &[]));
    let ids = (all.id, named.id);
    for group in [all, named] {
        l.w.apply(Change::CreateGroup(Box::new(group)));
    }
    assert_eq!((l.w.state.members(ids.0), l.w.state.members(ids.1)), (vec![], vec![vm]));
}

#[test]
fn f14_a_planned_failover_swaps_the_roles_and_neither_side_goes_on_from_its_old_base() {
    let mut l = Lead::new();
    l.w.attach("far", "other");
    let vm = key(1);
    let there = elsewhere(&vm);
    l.seen("hv1", clustered(&vm, "hv1"));
    l.seen("far", alone(&replica(&there)));
    let (job, epoch) = l.w.leased(&vm, "hv1");
    let crate::state::Outcome::Committed(point) = l.w.commit(job, epoch) else {
        panic!("not committed")
    };
    l.w.bind(job, epoch, point);
    l.w.finish(job, epoch, true, None);
    let incarnation = l.w.state.vms[&vm].incarnation;
    // Whatever comes first, and whether or not the agents say good-bye to the role before.
    l.seen("far", alone(&there));
    l.seen("hv1", clustered(&replica(&vm), "hv1"));
    assert_eq!(l.at(&there), Some(("far", 1)), "the VM is there now");
    assert_eq!(l.at(&replica(&vm)), Some(("hv1", 1)), "and its replica here");
    assert!(!l.w.state.vms[&vm].is_workable() && !l.w.state.vms[&replica(&there)].is_workable());
    assert!(!l.w.state.bases.contains_key(&vm), "its disks change behind its change tracking");
    assert!(l.w.state.vms[&vm].incarnation > incarnation);
    assert!(l.w.state.points.contains_key(&point), "its history is its own");
    // Said again it is nothing new.
    let before = l.w.state.clone();
    l.seen("hv1", clustered(&replica(&vm), "hv1"));
    assert_eq!(l.w.state.vms[&vm].incarnation, before.vms[&vm].incarnation);
    // Back again.
    l.seen("far", alone(&replica(&there)));
    l.seen("hv1", clustered(&vm, "hv1"));
    assert!(l.w.state.vms[&vm].is_workable());
    assert_eq!(l.at(&vm).map(|(host, _)| host), Some("hv1"));
    assert!(!l.w.state.vms[&replica(&vm)].is_workable());
}

#[test]
fn f2_in_a_cluster_a_claim_counts_when_the_owner_agrees_in_both_orders() {
    let vm = key(1);
    for owner_first in [true, false] {
        let mut l = Lead::new();
        l.seen("hv1", clustered(&vm, "hv1"));
        if owner_first {
            l.owner(&vm, "hv2");
            assert_eq!(l.at(&vm), Some(("hv1", 1)), "the new host has not reported it yet");
            l.seen("hv2", clustered(&vm, "hv1"));
        } else {
            l.seen("hv2", clustered(&vm, "hv1"));
            assert_eq!(l.at(&vm), Some(("hv1", 1)), "the cluster has not agreed yet");
            l.owner(&vm, "hv2");
        }
        assert_eq!(l.at(&vm), Some(("hv2", 2)), "owner first: {owner_first}");
        l.gone("hv1", &vm);
        assert_eq!(l.at(&vm), Some(("hv2", 2)));
    }
}

#[test]
fn f2_the_new_hosts_own_reading_of_the_cluster_is_enough() {
    let mut l = Lead::new();
    let vm = key(1);
    l.seen("hv1", clustered(&vm, "hv1"));
    l.seen("hv2", clustered(&vm, "hv2"));
    assert_eq!(l.at(&vm), Some(("hv2", 2)));
}

#[test]
fn f3_every_order_of_a_migrations_events_moves_the_vm_exactly_once() {
    let vm = key(1);
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    for order in orders {
        let mut l = Lead::new();
        l.inventory("hv1", vec![clustered(&vm, "hv1")]);
        l.inventory("hv2", vec![planned(&vm, "hv1")]);
        for event in order {
            match event {
                0 => l.gone("hv1", &vm),
                1 => l.seen("hv2", clustered(&vm, "hv1")),
                _ => l.owner(&vm, "hv2"),
            }
        }
        assert_eq!(l.at(&vm), Some(("hv2", 2)), "order {order:?}");
        assert_eq!(l.w.state.vms[&vm].gone_since_ms, None, "order {order:?}");
    }
}

#[test]
fn f4_a_late_reading_of_the_old_host_does_not_pull_the_vm_back() {
    let mut l = Lead::new();
    let vm = key(1);
    l.seen("hv1", clustered(&vm, "hv1"));
    l.seen("hv2", clustered(&vm, "hv1"));
    l.owner(&vm, "hv2");
    for _ in 0..3 {
        l.seen("hv1", clustered(&vm, "hv1"));
        assert_eq!(l.at(&vm), Some(("hv2", 2)));
    }
}

#[test]
fn f4_a_vm_that_moves_back_is_followed_back() {
    let mut l = Lead::new();
    let vm = key(1);
    l.seen("hv1", clustered(&vm, "hv1"));
    for (round, (from, to)) in (2..).zip([("hv1", "hv2"), ("hv2", "hv1"), ("hv1", "hv3")]) {
        l.owner(&vm, to);
        l.gone(from, &vm);
        l.seen(to, clustered(&vm, to));
        assert_eq!(l.at(&vm), Some((to, round)));
    }
}

#[test]
fn f4_a_failed_migration_leaves_everything_as_it_was() {
    let mut l = Lead::new();
    let vm = key(1);
    l.seen("hv1", clustered(&vm, "hv1"));
    l.seen("hv2", planned(&vm, "hv1"));
    l.gone("hv2", &vm);
    assert_eq!(l.at(&vm), Some(("hv1", 1)));
    assert_eq!(l.w.state.vms[&vm].gone_since_ms, None);
}

#[test]
fn f5_outside_a_cluster_the_old_host_must_let_go_first() {
    let mut l = Lead::new();
    let vm = key(1);
    l.inventory("hv1", vec![alone(&vm)]);
    l.inventory("hv2", vec![alone(&vm)]);
    assert_eq!(l.at(&vm), Some(("hv1", 1)));
    l.gone("hv1", &vm);
    assert_eq!(l.at(&vm), Some(("hv2", 2)));
}

#[test]
fn f5_outside_a_cluster_a_dead_host_has_let_go() {
    let mut l = Lead::new();
    let vm = key(1);
    l.inventory("hv1", vec![alone(&vm)]);
    l.seen("hv2", alone(&vm));
    l.node("hv1", false);
    assert_eq!(l.at(&vm), Some(("hv2", 2)));
}

#[test]
fn f5_a_new_leader_does_not_take_silence_for_letting_go() {
    let mut l = Lead::new();
    let vm = key(1);
    l.inventory("hv1", vec![alone(&vm)]);
    l.follow = Follow::default();
    l.inventory("hv2", vec![alone(&vm)]);
    assert_eq!(l.at(&vm), Some(("hv1", 1)), "hv1 has not attached to this leader yet");
    l.inventory("hv1", vec![]);
    assert_eq!(l.at(&vm), Some(("hv2", 2)));
}

#[test]
fn f12_without_a_cluster_database_a_host_silent_beyond_any_lease_has_let_go_of_what_another_claims()
{
    for silent_first in [true, false] {
        let mut l = Lead::new();
        let (vm, other) = (key(1), key(2));
        l.inventory("hv1", vec![alone(&vm), alone(&other)]);
        let (job, epoch) = l.w.leased(&vm, "hv1");
        let crate::state::Outcome::Committed(point) = l.w.commit(job, epoch) else {
            panic!("not committed")
        };
        l.w.bind(job, epoch, point);
        l.w.finish(job, epoch, true, None);
        if silent_first {
            l.silent("hv1", true);
            assert_eq!(l.at(&vm), Some(("hv1", 1)), "silence alone is not letting go");
        }
        l.seen("hv2", alone(&vm));
        if !silent_first {
            assert_eq!(l.at(&vm), Some(("hv1", 1)));
            l.silent("hv1", true);
        }
        assert_eq!(l.at(&vm), Some(("hv2", 2)), "silent first: {silent_first}");
        assert!(l.w.state.bases[&vm].binding.tracking_unproven);
        assert_eq!(l.at(&other), Some(("hv1", 1)), "nobody else claims it");
        // Back again, and its old instance claims: the new host keeps what it holds.
        l.inventory("hv1", vec![alone(&vm), alone(&other)]);
        assert_eq!(l.at(&vm), Some(("hv2", 2)));
    }
}

#[test]
fn f12_a_host_that_is_heard_again_has_not_let_go() {
    let mut l = Lead::new();
    let vm = key(1);
    l.inventory("hv1", vec![alone(&vm)]);
    l.silent("hv1", true);
    l.silent("hv1", false);
    l.seen("hv2", alone(&vm));
    assert_eq!(l.at(&vm), Some(("hv1", 1)));
}

#[test]
fn f12_where_there_is_a_cluster_database_only_that_calls_a_host_dead() {
    let mut l = Lead::new();
    let vm = key(1);
    l.inventory("hv1", vec![alone(&vm)]);
    l.node("hv2", true);
    l.seen("hv2", alone(&vm));
    l.silent("hv1", true);
    assert_eq!(l.at(&vm), Some(("hv1", 1)));
    l.node("hv1", false);
    assert_eq!(l.at(&vm), Some(("hv2", 2)));
}

#[test]
fn f6_an_empty_or_shrunken_inventory_deletes_nothing() {
    let mut l = Lead::new();
    let (a, b) = (key(1), key(2));
    l.inventory("hv1", vec![clustered(&a, "hv1"), clustered(&b, "hv1")]);
    for vms in [vec![clustered(&a, "hv1")], vec![]] {
        l.inventory("hv1", vms);
        for vm in [&a, &b] {
            assert_eq!(l.at(vm), Some(("hv1", 1)));
            assert_eq!(l.w.state.vms[vm].gone_since_ms, None);
        }
    }
}

#[test]
fn f7_a_vm_that_its_host_calls_gone_is_kept_and_comes_back() {
    let mut l = Lead::new();
    let vm = key(1);
    l.seen("hv1", clustered(&vm, "hv1"));
    l.gone("hv1", &vm);
    let kept = &l.w.state.vms[&vm];
    assert!(kept.gone_since_ms.is_some() && !kept.is_workable());
    l.seen("hv1", clustered(&vm, "hv1"));
    assert_eq!(l.at(&vm), Some(("hv1", 1)), "no move");
    assert!(l.w.state.vms[&vm].is_workable());
}

fn elsewhere(vm: &VmKey) -> VmKey {
    VmKey { realm: "other".into(), ..vm.clone() }
}

#[test]
fn f8_a_second_realm_with_the_same_vm_is_a_duplicate_until_the_first_is_gone() {
    for crash in [true, false] {
        let mut l = Lead::new();
        l.w.attach("far", "other");
        let vm = key(1);
        let copy = elsewhere(&vm);
        l.seen("hv1", clustered(&vm, "hv1"));
        l.seen("far", alone(&copy));
        assert_eq!(l.at(&copy), None);
        assert!(l.w.state.vms[&copy].duplicate);
        if crash {
            l.node("hv1", false);
        } else {
            l.gone("hv1", &vm);
        }
        assert_eq!(l.at(&copy), Some(("far", 1)), "crash: {crash}");
        assert!(!l.w.state.vms[&copy].duplicate);
    }
}

#[test]
fn f8_a_replica_elsewhere_is_no_duplicate() {
    let mut l = Lead::new();
    l.w.attach("far", "other");
    let vm = key(1);
    l.seen("far", alone(&VmKey { role: VmRole::Replica, ..elsewhere(&vm) }));
    l.seen("hv1", clustered(&vm, "hv1"));
    assert_eq!(l.at(&vm), Some(("hv1", 1)));
    assert!(l.w.state.vms.values().all(|vm| !vm.duplicate));
}

#[test]
fn f9_a_crash_is_followed_in_both_orders_and_leaves_tracking_unproven() {
    let vm = key(1);
    for down_first in [true, false] {
        let mut l = Lead::new();
        l.inventory("hv1", vec![clustered(&vm, "hv1")]);
        let (job, epoch) = l.w.leased(&vm, "hv1");
        let crate::state::Outcome::Committed(point) = l.w.commit(job, epoch) else {
            panic!("not committed")
        };
        l.w.bind(job, epoch, point);
        l.w.finish(job, epoch, true, None);
        if down_first {
            l.node("hv1", false);
        }
        l.owner(&vm, "hv2");
        l.seen("hv2", clustered(&vm, "hv2"));
        if !down_first {
            l.node("hv1", false);
        }
        assert_eq!(l.at(&vm), Some(("hv2", 2)));
        assert!(!l.w.state.hosts["hv1"].up);
        assert!(l.w.state.bases[&vm].binding.tracking_unproven, "down first: {down_first}");
    }
}

#[test]
fn f9_a_host_that_said_good_bye_before_it_went_down_leaves_tracking_proven() {
    let vm = key(1);
    let mut l = Lead::new();
    l.inventory("hv1", vec![clustered(&vm, "hv1")]);
    let (job, epoch) = l.w.leased(&vm, "hv1");
    let crate::state::Outcome::Committed(point) = l.w.commit(job, epoch) else {
        panic!("not committed")
    };
    l.w.bind(job, epoch, point);
    l.w.finish(job, epoch, true, None);
    l.owner(&vm, "hv2");
    l.gone("hv1", &vm);
    l.seen("hv2", clustered(&vm, "hv2"));
    l.node("hv1", false);
    assert!(!l.w.state.bases[&vm].binding.tracking_unproven);
}

#[test]
fn f10_a_cluster_speaks_of_its_own_hosts_only() {
    let mut l = Lead::new();
    l.w.attach("far", "other");
    l.hear(Event::Host { realm: "cluster".into(), host: "far".into(), up: false });
    assert!(l.w.state.hosts["far"].up);
    l.hear(Event::Host { realm: "other".into(), host: "far".into(), up: false });
    assert!(!l.w.state.hosts["far"].up);
    l.hear(Event::Host { realm: "other".into(), host: "far".into(), up: true });
    assert!(l.w.state.hosts["far"].up);
}

#[test]
fn f11_facts_come_from_the_host_that_has_the_vm() {
    let mut l = Lead::new();
    let vm = key(1);
    l.seen("hv1", clustered(&vm, "hv1"));
    let mut late = clustered(&vm, "hv1");
    late.facts.name = "old name".into();
    l.seen("hv2", late.clone());
    assert_eq!(l.w.state.vms[&vm].name, "vm");
    late.facts.name = "new name".into();
    l.seen("hv1", late.clone());
    assert_eq!(l.w.state.vms[&vm].name, "new name");
    let same = Event::Seen { host: "hv1".into(), instance: late };
    assert!(l.follow.apply(same, &l.w.state).is_empty(), "nothing new is not replicated");
}
