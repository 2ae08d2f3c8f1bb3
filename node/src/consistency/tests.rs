//! Each row of requirements C and P9 and of facts section 10, by its id.

use super::*;
use crate::hypervisor::facts::{
    Guest, Host, Replication, ReplicationHealth, ReplicationState, UserSnapshots,
};
use crate::hypervisor::{ReplicaRole, VmSeen};
use outrider_proto::ids::VmGuid;

use Consistency::{Application, Crash, FileSystem, Off, SavedState};

/// A Windows guest on Server 2022.
pub(crate) fn state(power: Power, guest_answers: bool) -> VmState {
    let backup = if guest_answers { Service::Works } else { Service::Silent };
    let guest = Guest { kind: GuestKind::Windows, backup, ..Guest::default() };
    let host = Host { build: Some(20348), functional_level: Some(11), ..Host::default() };
    VmState {
        vm: VmSeen {
            guid: VmGuid::random(),
            name: "vm".into(),
            power,
            replica: ReplicaRole::None,
            realized: true,
            clustered: true,
            cluster_owner: Some("h1".into()),
            generation: 2,
            version: "10.0".into(),
            disks: vec![],
        },
        health: 2,
        operation: 0,
        facts: VmFacts { guest, host, scsi: Some(true), ..VmFacts::default() },
        volumes: vec![],
    }
}

/// Application is asked for, anything is accepted, nothing is interrupted.
const ASKED: Wanted = Wanted { wanted: Application, minimum: Crash, quiesce: true, offline: false };
const OFFLINE: Wanted = Wanted { offline: true, ..ASKED };

fn on(build: u32) -> impl Fn(&mut VmState) {
    move |s| s.facts.host.build = Some(build)
}

fn with(changes: &[&dyn Fn(&mut VmState)]) -> VmState {
    let mut vm = state(Power::Running, true);
    for change in changes {
        change(&mut vm);
    }
    vm
}

fn replica(side: ReplicaSide) -> impl Fn(&mut VmState) {
    move |s| {
        s.vm.power = Power::Off;
        s.facts.replication = vec![Replication {
            side,
            state: ReplicationState::Replicating,
            health: ReplicationHealth::Ok,
        }];
    }
}

struct Row {
    /// Requirement or line of the facts.
    id: &'static str,
    vm: VmState,
    want: Wanted,
    /// Methods and results, best first; empty: refused.
    expect: Vec<(Method, Consistency)>,
    /// Words of the reason of the last way, or of the refusal.
    says: &'static str,
}

fn row(
    id: &'static str,
    changes: &[&dyn Fn(&mut VmState)],
    want: Wanted,
    expect: &[(Method, Consistency)],
    says: &'static str,
) -> Row {
    Row { id, vm: with(changes), want, expect: expect.to_vec(), says }
}

#[allow(clippy::too_many_lines, reason = "one table")]
fn table() -> Vec<Row> {
    use Method::{AsItIs, Plain, Quiesce, SaveFirst};
    let power = |power| move |s: &mut VmState| s.vm.power = power;
    let backup = |service| move |s: &mut VmState| s.facts.guest.backup = service;
    let kind = |kind| move |s: &mut VmState| s.facts.guest.kind = kind;
    let no_scsi = |s: &mut VmState| s.facts.scsi = Some(false);
    let elsewhere = |s: &mut VmState| s.facts.checkpoints_beside_disks = Some(false);
    let silent = backup(Service::Silent);
    let asked = |wanted| Wanted { wanted, ..ASKED };
    let least = |minimum| Wanted { minimum, ..ASKED };
    let app = (Quiesce, Application);
    let crash = (Plain, Crash);
    vec![
        row(
            "C1, facts 10.1: Windows at rest on 2016+",
            &[],
            ASKED,
            &[app, crash],
            "in that moment",
        ),
        row(
            "C1: the service may be older",
            &[&backup(Service::WorksOlder)],
            ASKED,
            &[app, crash],
            "",
        ),
        row("C6, facts 10.2: no silent downgrade", &[], least(Application), &[app], "writers"),
        row(
            "C1, facts 10.3: service off",
            &[&backup(Service::Off)],
            ASKED,
            &[crash],
            "Enable-VMIntegrationService",
        ),
        row("C1, facts 10.3: service absent", &[&silent], ASKED, &[crash], "does not answer"),
        row(
            "C1, facts 10.3: service too old",
            &[&backup(Service::Incompatible)],
            ASKED,
            &[crash],
            "too old",
        ),
        row(
            "C1, facts 10.3: service lost",
            &[&backup(Service::Lost)],
            ASKED,
            &[crash],
            "stopped answering",
        ),
        row(
            "C2, facts 10.4: Linux with the daemon",
            &[&kind(GuestKind::Unix)],
            ASKED,
            &[(Quiesce, FileSystem), crash],
            "",
        ),
        row(
            "C2, facts 10.5: Linux without it",
            &[&kind(GuestKind::Unix), &silent],
            ASKED,
            &[crash],
            "hv_vss_daemon",
        ),
        row(
            "C2: QEMU with the guest agent",
            &[&kind(GuestKind::OfQemu)],
            ASKED,
            &[(Quiesce, FileSystem), crash],
            "",
        ),
        row(
            "C2: QEMU without it: its own agent is named, not Hyper-V's",
            &[&kind(GuestKind::OfQemu), &silent],
            ASKED,
            &[crash],
            "qemu-guest-agent",
        ),
        row(
            "C6: Linux is never application-consistent",
            &[&kind(GuestKind::Unix)],
            least(Application),
            &[],
            "FILE_SYSTEM only",
        ),
        row(
            "C4: an unknown guest is not called more than file-system consistent",
            &[&kind(GuestKind::Unknown)],
            ASKED,
            &[(Quiesce, FileSystem), crash],
            "",
        ),
        row(
            "C6: and says so",
            &[&kind(GuestKind::Unknown)],
            least(Application),
            &[],
            "Data Exchange",
        ),
        row("facts 10.6: crash is asked for", &[], asked(Crash), &[crash], "asks for no more"),
        row(
            "facts 10.7: user checkpoints disabled change no plan",
            &[&|s| s.facts.user_snapshots = UserSnapshots::Disabled],
            ASKED,
            &[app, crash],
            "",
        ),
        row(
            "facts 10.8: nor does their type",
            &[&|s| s.facts.user_snapshots = UserSnapshots::Standard],
            ASKED,
            &[app, crash],
            "",
        ),
        row("facts 10.9: paused", &[&power(Power::Paused)], ASKED, &[crash], "paused"),
        row(
            "C6, facts 10.9: paused, and more is insisted on",
            &[&power(Power::Paused)],
            least(FileSystem),
            &[],
            "resume it",
        ),
        row(
            "facts 10.10: saved",
            &[&power(Power::Saved)],
            ASKED,
            &[(AsItIs, SavedState)],
            "memory",
        ),
        row(
            "C6: saved is no application",
            &[&power(Power::Saved)],
            least(Application),
            &[],
            "start it",
        ),
        row("facts 10.11: off", &[&power(Power::Off)], least(Application), &[(AsItIs, Off)], "off"),
        row("C1, facts 10.12: 2012 R2, all conditions", &[&on(9600)], ASKED, &[app, crash], ""),
        row(
            "C1, C2, facts 10.13: 2012 R2 without SCSI",
            &[&on(9600), &no_scsi],
            ASKED,
            &[crash],
            "10103",
        ),
        row(
            "C1, facts 10.13: 2012 R2, checkpoints elsewhere",
            &[&on(9600), &elsewhere],
            ASKED,
            &[crash],
            "another volume",
        ),
        row("C1: 2016+ needs no SCSI controller", &[&no_scsi], ASKED, &[app, crash], ""),
        row("C1: nor checkpoints beside the disks", &[&elsewhere], ASKED, &[app, crash], ""),
        row("C1: 2012, all conditions", &[&on(9200)], ASKED, &[app], "writers"),
        row(
            "C3, facts 10.14: 2012, saved only by policy",
            &[&on(9200), &silent],
            OFFLINE,
            &[(SaveFirst, SavedState)],
            "does not answer",
        ),
        row(
            "C3, facts 10.14: 2008 R2, too",
            &[&on(7601), &silent],
            OFFLINE,
            &[(SaveFirst, SavedState)],
            "",
        ),
        row(
            "C3: else every unmet condition with its remedy",
            &[&on(9200), &silent],
            ASKED,
            &[],
            "--allow-offline",
        ),
        row(
            "C3: each of them",
            &[&on(9200), &silent, &elsewhere],
            ASKED,
            &[],
            "set the checkpoint location",
        ),
        row(
            "C2: saved when asked for",
            &[],
            Wanted { wanted: SavedState, ..OFFLINE },
            &[(SaveFirst, SavedState)],
            "asks for",
        ),
        row("C3: and never without being allowed", &[], asked(SavedState), &[], "--allow-offline"),
        row(
            "C3: a paused VM is not saved",
            &[&power(Power::Paused)],
            Wanted { wanted: SavedState, ..OFFLINE },
            &[],
            "resume",
        ),
        row(
            "C2: allowed, but 2016+ has a better way than interrupting",
            &[&silent],
            OFFLINE,
            &[crash],
            "",
        ),
        row(
            "C6: allowed, and crash is too little",
            &[&silent],
            Wanted { minimum: SavedState, ..OFFLINE },
            &[(SaveFirst, SavedState)],
            "does not answer",
        ),
        row(
            "C5: quiescing off",
            &[],
            Wanted { quiesce: false, ..ASKED },
            &[crash],
            "switched off for its group",
        ),
        row(
            "C5, C6: quiescing off and more insisted on",
            &[],
            Wanted { quiesce: false, ..least(FileSystem) },
            &[],
            "--no-quiesce=false",
        ),
        row(
            "facts 2.2: old configuration version",
            &[&|s| s.vm.version = "5.0".into()],
            ASKED,
            &[crash],
            "6.2",
        ),
        row(
            "P9: primary side",
            &[&|s| replica(ReplicaSide::Primary)(s), &power(Power::Running)],
            ASKED,
            &[app, crash],
            "",
        ),
        row(
            "P9, facts 10.15: replica side",
            &[&replica(ReplicaSide::Replica)],
            ASKED,
            &[crash],
            "replica",
        ),
        row("P9: extended replica", &[&replica(ReplicaSide::Extended)], ASKED, &[crash], "replica"),
        row(
            "P9, C6: a replica is never better",
            &[&replica(ReplicaSide::Replica)],
            least(Application),
            &[],
            "protect the primary",
        ),
        row(
            "P9: told by the VM itself",
            &[&|s| s.vm.replica = ReplicaRole::TestReplica],
            ASKED,
            &[crash],
            "",
        ),
        row(
            "facts 10.16: what only the guest sees leads to the next way",
            &[],
            ASKED,
            &[app, crash],
            "",
        ),
        row(
            "facts 10.17: a shielded VM is captured as any other",
            &[&|s| s.facts.shielded = true],
            ASKED,
            &[app, crash],
            "",
        ),
    ]
}

#[test]
fn every_row_of_the_requirements_has_its_way() {
    for row in table() {
        let found = plan(&row.vm, row.want);
        let (ways, said) = match &found {
            Ok(plan) => {
                let ways = plan.ways.iter().map(|w| (w.method, w.gives)).collect();
                (ways, plan.ways.last().map(|w| w.reason.clone()).unwrap_or_default())
            }
            Err(no_way) => (Vec::new(), no_way.to_string()),
        };
        assert_eq!(ways, row.expect, "{}: {found:?}", row.id);
        assert!(said.contains(row.says), "{}: {said}", row.id);
    }
}

/// C3, C6: whatever is refused names conditions, and each has its remedy.
#[test]
fn a_refusal_lists_conditions_with_remedies() {
    for row in table().into_iter().filter(|r| r.expect.is_empty()) {
        let no_way = plan(&row.vm, row.want).expect_err(row.id);
        assert!(!no_way.conditions.is_empty(), "{}", row.id);
        for condition in &no_way.conditions {
            assert!(!condition.condition.is_empty() && !condition.remedy.is_empty(), "{}", row.id);
        }
    }
}

/// For every combination of what can be told: no way is below the minimum, none interrupts a VM without being allowed to,
/// none brings a guest to rest where that is switched off, and the ways get worse one after the other.
#[test]
fn no_plan_breaks_the_policy() {
    let powers = [Power::Running, Power::Off, Power::Saved, Power::Paused, Power::Other];
    let services =
        [Service::Works, Service::WorksOlder, Service::Off, Service::Silent, Service::Unknown];
    let kinds = [GuestKind::Windows, GuestKind::Unix, GuestKind::OfQemu, GuestKind::Unknown];
    let levels = [Consistency::Unspecified, Crash, SavedState, FileSystem, Application];
    let mut plans = 0;
    for power in powers {
        for service in services {
            for kind in kinds {
                for build in [7601, 9200, 9600, 14393, 26100] {
                    let mut vm = state(power, true);
                    vm.facts.guest.backup = service;
                    vm.facts.guest.kind = kind;
                    vm.facts.host.build = Some(build);
                    for wanted in levels {
                        for minimum in levels {
                            for (quiesce, offline) in
                                [(true, true), (true, false), (false, true), (false, false)]
                            {
                                let want = Wanted { wanted, minimum, quiesce, offline };
                                plans += 1;
                                let Ok(plan) = plan(&vm, want) else { continue };
                                let what = format!("{vm:?} {want:?} {plan:?}");
                                assert!(!plan.ways.is_empty(), "{what}");
                                for way in &plan.ways {
                                    assert!(rank(way.gives) >= rank(minimum), "{what}");
                                    assert!(offline || way.method != Method::SaveFirst, "{what}");
                                    assert!(quiesce || way.method != Method::Quiesce, "{what}");
                                    assert!(!way.reason.is_empty(), "{what}");
                                }
                                let worse =
                                    plan.ways.is_sorted_by(|a, b| rank(a.gives) > rank(b.gives));
                                assert!(worse, "{what}");
                            }
                        }
                    }
                }
            }
        }
    }
    assert_eq!(plans, 5 * 5 * 4 * 5 * 25 * 4);
}

#[test]
fn text_forms_round_trip() {
    for c in [Crash, FileSystem, Application, Off, SavedState] {
        assert_eq!(from_text(text(c)), c);
    }
}
