//! Groups and their policies.

use super::*;

#[test]
fn a_vm_is_named_by_one_group_only_and_patterns_come_second() {
    let mut w = World::new();
    let (a, b) = (w.vm(1, "hv1"), w.vm(2, "hv1"));
    let group = |name: &str, vms: &[&VmKey], patterns: &[&str]| NewGroup {
        id: GroupId::random(),
        name: name.into(),
        vms: vms.iter().map(|v| (*v).clone()).collect(),
        patterns: patterns.iter().map(|p| (*p).into()).collect(),
        policy: Policy::default(),
        created_ms: 1,
    };
    let all = group("all", &[], &["VM*"]);
    let one = group("one", &[&a], &[]);
    w.apply(Change::CreateGroup(Box::new(all.clone())));
    w.apply(Change::CreateGroup(Box::new(one.clone())));
    assert_eq!(w.state.group_of(&a).expect("in one").0, one.id);
    assert_eq!(w.state.members(all.id), vec![b]);
    let taken = w.apply(Change::CreateGroup(Box::new(group("two", &[&a], &[]))));
    assert!(matches!(taken, Outcome::Refused(Refusal::VmTaken { .. })));
    let taken = w.apply(Change::CreateGroup(Box::new(group("one", &[], &["x"]))));
    assert!(matches!(taken, Outcome::Refused(Refusal::NameTaken(_))));
    let unknown = w.apply(Change::CreateGroup(Box::new(group("three", &[&key(99)], &[]))));
    assert!(matches!(unknown, Outcome::Refused(Refusal::UnknownVm(_))));
}

#[test]
fn an_edited_policy_holds_from_then_on_and_an_old_one_reads_with_everything_new_switched_off() {
    let mut w = World::new();
    let vm = w.vm(1, "hv1");
    let id = GroupId::random();
    let new = NewGroup {
        id,
        name: "g".into(),
        vms: [vm].into(),
        patterns: vec![],
        policy: Policy::default(),
        created_ms: 1,
    };
    w.apply(Change::CreateGroup(Box::new(new)));
    let policy = Policy { every_ms: 1000, allow_offline: true, ..Policy::default() };
    let edited = w.apply(Change::EditGroup { group: id, policy: Box::new(policy.clone()) });
    assert_eq!(edited, Outcome::Group(id));
    assert_eq!(w.state.groups[&id].policy, policy);
    assert!(w.state.groups[&id].next_run_ms.is_some_and(|at| at > 1000), "it is scheduled now");
    let unknown = Change::EditGroup { group: GroupId::random(), policy: Box::new(policy) };
    assert!(matches!(w.apply(unknown), Outcome::Refused(Refusal::UnknownGroup(_))));
    let old = r#"{"every_ms":0,"wanted":"Application","minimum":"Crash","chunk_size":0,"require_all_disks":true}"#;
    let read: Policy = serde_json::from_str(old).expect("a policy of the past");
    assert_eq!(read, Policy::default());
}

#[test]
fn name_patterns_match_as_people_expect() {
    let table = [
        ("*", "", true),
        ("*", "anything", true),
        ("web*", "web-01", true),
        ("WEB*", "web-01", true),
        ("web-??", "web-01", true),
        ("web-?", "web-01", false),
        ("*sql*", "my sql server", true),
        ("*a*b*c", "xxaxxbxxc", true),
        ("*a*b*c", "xxaxxcxxb", false),
        ("서울-*", "서울-1", true),
        ("", "x", false),
        ("a", "a", true),
    ];
    for (pattern, name, expected) in table {
        assert_eq!(matches(pattern, name), expected, "{pattern:?} on {name:?}");
    }
}
