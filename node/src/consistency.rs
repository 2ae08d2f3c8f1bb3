//! How a checkpoint is taken, and what it then is: a pure function of the VM's facts and the group's policy (requirements
//! C1 to C6, facts sections 7 and 10).
//!
//! The plan is a list of ways, best first. Only one thing leads from a way to the next: the guest itself failed to bring
//! its data to rest, which the host cannot know before it asked. Everything else is decided here, and a way that gives
//! less than the group's minimum is never in the list.
//!
//! Hosts up to Server 2012 R2 are planned for, too, although they are refused as sources (see `precheck`): what would be
//! done there is part of the answer to "why not".

use outrider_proto::rpc::Consistency;

use crate::hypervisor::facts::{GuestKind, Release, ReplicaSide, Service, VmFacts};
use crate::hypervisor::{Power, ReplicaRole, VmState, tracks_changes};

/// Times that a guest is asked to bring its data to rest before the next way: its writers fail now and then for reasons
/// that pass (facts, section 10).
const QUIESCE_ATTEMPTS: u32 = 2;

/// What the protection group wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Best that is asked for.
    pub wanted: Consistency,
    /// Worst that is accepted; a run that cannot reach it fails instead of pretending.
    pub minimum: Consistency,
    /// Guests may be brought to rest.
    pub quiesce: bool,
    /// A running VM may be saved for a moment.
    pub offline: bool,
}

/// What is done to the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The guest brings its data to rest first.
    Quiesce,
    /// A checkpoint of the disks as they are in that moment.
    Plain,
    /// The VM is off or saved already.
    AsItIs,
    /// The VM is saved, captured, and resumed.
    SaveFirst,
}

/// One way of taking the checkpoint, and what it gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// How.
    pub method: Method,
    /// What the checkpoint then is.
    pub gives: Consistency,
    /// How often it is tried.
    pub attempts: u32,
    /// Why this way: stored and shown with the recovery point.
    pub reason: String,
}

/// A condition of something better that is not met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmet {
    /// What is the case.
    pub condition: String,
    /// What to do about it.
    pub remedy: &'static str,
}

/// The ways to try, best first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// At least one.
    pub ways: Vec<Way>,
    /// Why nothing better is among them.
    pub unmet: Vec<Unmet>,
}

/// Why there is no way: the conditions that were not met, each with its remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "VM {vm:?} cannot be backed up with the consistency that its group insists on ({minimum}): {}",
    told(conditions)
)]
pub struct NoWay {
    /// Name.
    pub vm: String,
    /// Text form of the minimum.
    pub minimum: &'static str,
    /// At least one.
    pub conditions: Vec<Unmet>,
}

fn told(conditions: &[Unmet]) -> String {
    let one = |c: &Unmet| format!("{} ({})", c.condition, c.remedy);
    conditions.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Rank for comparing with a minimum: more is better.
fn rank(consistency: Consistency) -> u8 {
    match consistency {
        Consistency::Unspecified => 0,
        Consistency::Crash => 1,
        Consistency::SavedState => 2,
        Consistency::FileSystem => 3,
        // A VM that is off is clean as the guest left it.
        Consistency::Application | Consistency::Off => 4,
    }
}

/// Text form used in manifests and sentences.
#[must_use]
pub fn text(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Unspecified => "UNSPECIFIED",
        Consistency::Crash => "CRASH",
        Consistency::FileSystem => "FILE_SYSTEM",
        Consistency::Application => "APPLICATION",
        Consistency::SavedState => "SAVED_STATE",
        Consistency::Off => "OFF",
    }
}

/// The inverse of [`text`].
#[must_use]
pub fn from_text(text_form: &str) -> Consistency {
    [
        Consistency::Crash,
        Consistency::FileSystem,
        Consistency::Application,
        Consistency::SavedState,
        Consistency::Off,
    ]
    .into_iter()
    .find(|c| text(*c) == text_form)
    .unwrap_or(Consistency::Unspecified)
}

/// Plans.
///
/// # Errors
/// [`NoWay`] when nothing reaches the minimum.
pub fn plan(state: &VmState, want: Wanted) -> Result<Plan, NoWay> {
    let Plan { ways, mut unmet } = all_ways(state, want);
    let (enough, too_little): (Vec<Way>, Vec<Way>) =
        ways.into_iter().partition(|w| rank(w.gives) >= rank(want.minimum));
    if enough.is_empty() {
        // Where no condition says why, what would be had says it.
        if unmet.is_empty() {
            unmet.extend(too_little.iter().map(|w| Unmet {
                condition: format!("{}, which gives {} only", w.reason, text(w.gives)),
                remedy: "accept it with `outrider group edit GROUP --minimum LEVEL`",
            }));
        }
        return Err(NoWay {
            vm: state.vm.name.clone(),
            minimum: text(want.minimum),
            conditions: unmet,
        });
    }
    Ok(Plan { ways: enough, unmet })
}

fn all_ways(state: &VmState, want: Wanted) -> Plan {
    let way = |method, gives, reason: &str| Way {
        method,
        gives,
        attempts: if method == Method::Quiesce { QUIESCE_ATTEMPTS } else { 1 },
        reason: reason.to_owned(),
    };
    let only = |way, condition: &str, remedy| Plan {
        ways: vec![way],
        unmet: vec![Unmet { condition: condition.to_owned(), remedy }],
    };
    if is_replica(state) {
        return only(
            way(
                Method::Plain,
                Consistency::Crash,
                "a replica is written to by its host: never better than crash-consistent",
            ),
            "it is a replica",
            "protect the primary VM, or accept crash consistency",
        );
    }
    match state.vm.power {
        Power::Off => {
            return Plan {
                ways: vec![way(Method::AsItIs, Consistency::Off, "the VM was off")],
                unmet: vec![],
            };
        }
        Power::Saved => {
            return only(
                way(
                    Method::AsItIs,
                    Consistency::SavedState,
                    "the VM was saved, its memory is part of the point",
                ),
                "it is saved",
                "start it, or accept a saved state",
            );
        }
        Power::Running | Power::Paused | Power::Other => {}
    }
    let release = state.facts.host.release();
    let mut unmet = unmet_for_quiescing(state, want, release);
    let mut ways = Vec::new();
    let better_than_crash = want.wanted == Consistency::Unspecified
        || rank(want.wanted) > rank(Consistency::SavedState);
    if unmet.is_empty() && (better_than_crash || release == Release::Server2012) {
        let (gives, reason) = at_rest(&state.facts);
        ways.push(way(Method::Quiesce, gives, reason));
    }
    let save =
        || way(Method::SaveFirst, Consistency::SavedState, &because("saved for a moment", &unmet));
    let may_save = want.offline && state.vm.power == Power::Running;
    let not_allowed = Unmet {
        condition: "saving it for a moment is not allowed".into(),
        remedy: "allow it with `outrider group edit GROUP --allow-offline`",
    };
    if want.wanted == Consistency::SavedState {
        // Asked for, so nothing less takes its place.
        return if may_save {
            Plan {
                ways: vec![way(
                    Method::SaveFirst,
                    Consistency::SavedState,
                    "saved for a moment, as the group asks for",
                )],
                unmet: vec![],
            }
        } else if want.offline {
            only_unmet("it is paused: it can be saved only while it runs", "resume it")
        } else {
            Plan { ways: vec![], unmet: vec![not_allowed] }
        };
    }
    if release == Release::Server2012 {
        // No checkpoint of a running VM without its guest: the writer saves it.
        if may_save {
            ways.push(save());
        } else if ways.is_empty() {
            unmet.push(not_allowed);
        }
        return Plan { ways, unmet };
    }
    if may_save && rank(want.minimum) == rank(Consistency::SavedState) {
        ways.push(save());
    }
    let reason = if want.wanted == Consistency::Crash {
        "the group asks for no more".to_owned()
    } else {
        because("the disks as they were in that moment", &unmet)
    };
    ways.push(way(Method::Plain, Consistency::Crash, &reason));
    Plan { ways, unmet }
}

fn only_unmet(condition: &str, remedy: &'static str) -> Plan {
    Plan { ways: vec![], unmet: vec![Unmet { condition: condition.to_owned(), remedy }] }
}

fn because(what: &str, unmet: &[Unmet]) -> String {
    if unmet.is_empty() { what.to_owned() } else { format!("{what}: {}", told(unmet)) }
}

fn is_replica(state: &VmState) -> bool {
    state.vm.replica != ReplicaRole::None
        || state.facts.replication.iter().any(|r| r.side.receives() || r.side == ReplicaSide::Test)
}

/// What a guest at rest is worth, by what brought it to rest.
fn at_rest(facts: &VmFacts) -> (Consistency, &'static str) {
    match facts.guest.kind {
        GuestKind::Windows => {
            (Consistency::Application, "the guest's writers brought their data to rest")
        }
        GuestKind::Unix => {
            (Consistency::FileSystem, "the guest's daemon froze its mounted file systems")
        }
        GuestKind::OfQemu => {
            (Consistency::FileSystem, "the QEMU guest agent froze the guest's mounted file systems")
        }
        // Nobody says that applications took part.
        GuestKind::Unknown => (
            Consistency::FileSystem,
            "the guest brought its data to rest, and does not tell what it is (no Data Exchange service)",
        ),
    }
}

/// The conditions of C1 and C2 that the host can see; what only the guest can see (dynamic disks, FAT, failing writers)
/// comes back as the guest's own failure.
fn unmet_for_quiescing(state: &VmState, want: Wanted, release: Release) -> Vec<Unmet> {
    let mut unmet = Vec::new();
    let mut add = |condition: String, remedy| unmet.push(Unmet { condition, remedy });
    if state.vm.power == Power::Paused {
        add(
            "it is paused: no code runs in it that could prepare it".into(),
            "resume it, or accept crash consistency",
        );
    }
    if !want.quiesce {
        add(
            "quiescing is switched off for its group".into(),
            "switch it on with `outrider group edit GROUP --no-quiesce=false`",
        );
    }
    let backup = state.facts.guest.backup;
    if state.vm.power != Power::Paused
        && let Some((condition, remedy)) = service_obstacle(backup, state.facts.guest.kind)
    {
        add(condition.to_owned(), remedy);
    }
    if release == Release::Server2016 && !tracks_changes(&state.vm.version) {
        add(
            format!(
                "its configuration version is {}: production checkpoints need 6.2 or later",
                state.vm.version
            ),
            "upgrade it with Update-VMVersion while it is off",
        );
    }
    if release < Release::Server2016 {
        if release == Release::Server2012R2 && state.facts.scsi == Some(false) {
            add(
                "it has no SCSI controller, which the host's writer needs (event 10103)".into(),
                "add one while it is off; it may stay empty",
            );
        }
        if state.facts.checkpoints_beside_disks == Some(false) {
            add(
                "its checkpoint files are on another volume than its disks".into(),
                "set the checkpoint location to the volume of its disks",
            );
        }
    }
    unmet
}

fn service_obstacle(service: Service, guest: GuestKind) -> Option<(&'static str, &'static str)> {
    let install = match guest {
        GuestKind::Windows => {
            "start the Hyper-V Volume Shadow Copy Requestor service in the guest, or install its integration services"
        }
        GuestKind::Unix => {
            "install and start the guest's hv_vss_daemon (hyperv-daemons, linux-cloud-tools)"
        }
        GuestKind::OfQemu => return of_qemu(service),
        GuestKind::Unknown => {
            "install or start the integration services in the guest, or accept crash consistency"
        }
    };
    Some(match service {
        Service::Works | Service::WorksOlder => return None,
        Service::Off => (
            "its backup (volume shadow copy) integration service is switched off",
            "switch it on with Enable-VMIntegrationService",
        ),
        Service::Incompatible => (
            "the guest's backup integration service is too old for this host",
            "update the integration services in the guest",
        ),
        Service::Lost => ("the guest's backup integration service stopped answering", install),
        Service::Silent | Service::Unknown => {
            ("the guest's backup integration service does not answer", install)
        }
    })
}

fn of_qemu(service: Service) -> Option<(&'static str, &'static str)> {
    (!service.answers()).then_some((
        "its QEMU guest agent cannot be asked: there is no socket NAME.qga beside the monitor",
        "install qemu-guest-agent in the guest and give the VM its port and socket (docs/qemu.md), or accept crash consistency",
    ))
}

#[cfg(test)]
pub(crate) mod tests;
