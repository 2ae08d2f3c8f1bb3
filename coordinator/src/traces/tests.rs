use outrider_proto::ids::VmRole;

use super::*;

/// A VM with nothing left on it.
pub(super) fn found() -> VmTraces {
    VmTraces {
        vm: VmKey {
            realm: "c".into(),
            guid: "00000000-0000-0000-0000-000000000001".parse().expect("a GUID"),
            role: VmRole::Primary,
        },
        name: "web".into(),
        checkpoints: vec![],
        points: vec![],
        chains: vec![],
        merging: false,
    }
}

fn checkpoint(id: &str, kind: Kind, ours: bool) -> Checkpoint {
    let name = if ours { format!("Outrider {id}") } else { String::new() };
    Checkpoint { id: id.into(), name, kind, created_ms: 7, ours }
}

fn point(id: &str, ours: Option<bool>) -> ReferencePoint {
    ReferencePoint { id: id.into(), name: String::new(), ours }
}

fn chain(files: &[&str]) -> Chain {
    let files = files.iter().map(|f| (*f).to_owned()).collect();
    Chain { slot: "0".into(), files, broken: String::new() }
}

fn duty(checkpoint: &str, name: &str, point: &str) -> KnownDuty {
    KnownDuty {
        checkpoint: checkpoint.into(),
        checkpoint_name: name.into(),
        reference_point: point.into(),
        ..KnownDuty::default()
    }
}

#[test]
fn what_duties_and_bases_explain_is_no_orphan_and_the_rest_has_an_owner() {
    use Kind::{Recovery, Replica, User};
    let unnamed = KnownDuty { unnamed: true, ..KnownDuty::default() };
    let converting = KnownDuty { converting: true, ..KnownDuty::default() };
    let bound = Some("RP1".to_owned());
    type Case = (&'static str, VmTraces, Known, Vec<(What, &'static str, Owner)>, u32);
    let checkpoints = |list: Vec<Checkpoint>| VmTraces { checkpoints: list, ..found() };
    let points = |list: Vec<ReferencePoint>| VmTraces { points: list, ..found() };
    let duties = |list: Vec<KnownDuty>| Known { duties: list, bound: None };
    let table: Vec<Case> = vec![
        ("nothing", found(), Known::default(), vec![], 0),
        (
            "named by a duty's id, whatever the case",
            checkpoints(vec![checkpoint("ab", Recovery, true)]),
            duties(vec![duty("AB", "", "")]),
            vec![],
            1,
        ),
        (
            "named by a duty's name",
            checkpoints(vec![checkpoint("ab", Recovery, true)]),
            duties(vec![duty("", "Outrider ab", "")]),
            vec![],
            1,
        ),
        (
            "ours without a duty",
            checkpoints(vec![checkpoint("ab", Recovery, true)]),
            duties(vec![duty("cd", "Outrider cd", "")]),
            vec![(What::Checkpoint, "ab", Owner::Ours)],
            0,
        ),
        (
            "one nameless beside a duty that was just recorded",
            checkpoints(vec![checkpoint("ab", Recovery, false)]),
            duties(vec![unnamed.clone()]),
            vec![],
            1,
        ),
        (
            "two nameless beside it: none is taken for ours",
            checkpoints(vec![checkpoint("ab", Recovery, false), checkpoint("cd", Recovery, false)]),
            duties(vec![unnamed]),
            vec![
                (What::Checkpoint, "ab", Owner::AnotherProduct),
                (What::Checkpoint, "cd", Owner::AnotherProduct),
            ],
            0,
        ),
        (
            "another product's, a user's and a replica's",
            checkpoints(vec![
                checkpoint("ab", Recovery, false),
                checkpoint("cd", User, false),
                checkpoint("ef", Replica, false),
            ]),
            Known::default(),
            vec![
                (What::Checkpoint, "ab", Owner::AnotherProduct),
                (What::Checkpoint, "cd", Owner::User),
                (What::Checkpoint, "ef", Owner::Replica),
            ],
            0,
        ),
        (
            "bound, named by a duty, and neither",
            points(vec![point("rp1", None), point("rp2", None), point("rp3", None)]),
            Known { duties: vec![duty("", "", "RP2")], bound: bound.clone() },
            vec![(What::ReferencePoint, "rp3", Owner::Unknown)],
            2,
        ),
        (
            "told by its name",
            points(vec![point("x", Some(true)), point("libvirt-1", Some(false))]),
            Known { duties: vec![converting], bound },
            vec![
                (What::ReferencePoint, "x", Owner::Ours),
                (What::ReferencePoint, "libvirt-1", Owner::AnotherProduct),
            ],
            0,
        ),
        (
            "a chain as long as its checkpoints make it",
            VmTraces {
                checkpoints: vec![checkpoint("cd", User, false)],
                chains: vec![chain(&["a.avhdx", "a.vhdx"])],
                ..found()
            },
            Known::default(),
            vec![(What::Checkpoint, "cd", Owner::User)],
            0,
        ),
        (
            "a chain without a checkpoint",
            VmTraces { chains: vec![chain(&["a.avhdx", "a.vhdx"])], ..found() },
            Known::default(),
            vec![(What::Chain, "0", Owner::Unknown)],
            0,
        ),
        (
            "the same while it is merged",
            VmTraces { chains: vec![chain(&["a.avhdx", "a.vhdx"])], merging: true, ..found() },
            Known::default(),
            vec![],
            0,
        ),
    ];
    for (what, found, known, expected, explained) in table {
        let (orphans, n) = orphans(&found, &known);
        let told: Vec<_> = orphans.iter().map(|o| (o.what, o.id.as_str(), o.owner)).collect();
        assert_eq!(told, expected, "{what}");
        assert_eq!(n, explained, "{what}");
        for orphan in &orphans {
            assert!(!orphan.why.is_empty() && !orphan.next.is_empty(), "{what}");
        }
    }
}

#[test]
fn a_chain_whose_parent_is_missing_is_told_whatever_checkpoints_there_are() {
    let broken = Chain { broken: "no such file".into(), ..chain(&["a.avhdx"]) };
    let checkpoints = vec![checkpoint("cd", Kind::User, false)];
    let found = VmTraces { chains: vec![broken], checkpoints, ..found() };
    let (orphans, _) = orphans(&found, &Known::default());
    let chain = orphans.iter().find(|o| o.what == What::Chain).expect("told");
    assert!(chain.why.contains("no such file"), "{chain:?}");
}
