//! How a checkpoint is taken: a pure function of the VM's facts and the policy (first version of the planner).

use outrider_proto::rpc::Consistency;

use crate::hypervisor::{Power, ReplicaRole, VmState};

/// What the protection group wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Best that is asked for.
    pub wanted: Consistency,
    /// Worst that is accepted; a run that cannot reach it fails instead of pretending.
    pub minimum: Consistency,
}

/// One way of taking the checkpoint, and what it gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// Bring the guest to rest first.
    pub quiesce: bool,
    /// What the checkpoint then is.
    pub gives: Consistency,
    /// Why this way: shown with the recovery point.
    pub reason: String,
}

/// The ways to try, best first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// At least one.
    pub ways: Vec<Way>,
}

/// Why there is no way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "VM {vm:?} cannot be backed up with the consistency that its group insists on ({minimum}): {reason}; {remedy}"
)]
pub struct NoWay {
    /// Name.
    pub vm: String,
    /// Text form of the minimum.
    pub minimum: &'static str,
    /// Why not.
    pub reason: String,
    /// What to do.
    pub remedy: &'static str,
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
    let way = |quiesce, gives, reason: &str| Way { quiesce, gives, reason: reason.to_owned() };
    let (ways, obstacle, remedy) = match state.vm.power {
        _ if state.vm.replica != ReplicaRole::None => (
            vec![way(false, Consistency::Crash, "a replica is never better than crash-consistent")],
            "it is a replica",
            "protect the primary VM, or accept crash consistency",
        ),
        Power::Off => (
            vec![way(false, Consistency::Off, "the VM was off")],
            "it is off",
            "accept the consistency of a VM that is off",
        ),
        Power::Saved => (
            vec![way(
                false,
                Consistency::SavedState,
                "the VM was saved, its memory is part of the point",
            )],
            "it is saved",
            "start it, or accept a saved state",
        ),
        Power::Paused => (
            vec![way(
                false,
                Consistency::Crash,
                "the VM was paused: no code runs in it that could prepare it",
            )],
            "it is paused",
            "resume it, or accept crash consistency",
        ),
        Power::Running | Power::Other => {
            let crash = |reason| way(false, Consistency::Crash, reason);
            if rank(want.wanted) <= rank(Consistency::Crash)
                && want.wanted != Consistency::Unspecified
            {
                (vec![crash("the group asks for no more")], "", "")
            } else if state.guest_quiesce {
                (
                    vec![
                        way(
                            true,
                            Consistency::Application,
                            "the guest's writers were brought to rest",
                        ),
                        crash("the guest could not bring its data to rest"),
                    ],
                    "the guest could not bring its data to rest",
                    "repair the VSS writers (Windows) or the hv_vss_daemon (Linux) in the guest",
                )
            } else {
                (
                    vec![crash("the guest's backup integration service does not answer")],
                    "the guest's backup integration service does not answer",
                    "install or start the integration services in the guest, or accept crash consistency",
                )
            }
        }
    };
    let ways: Vec<Way> = ways.into_iter().filter(|w| rank(w.gives) >= rank(want.minimum)).collect();
    if ways.is_empty() {
        return Err(NoWay {
            vm: state.vm.name.clone(),
            minimum: text(want.minimum),
            reason: obstacle.to_owned(),
            remedy,
        });
    }
    Ok(Plan { ways })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::hypervisor::VmSeen;
    use outrider_proto::ids::VmGuid;

    pub(crate) fn state(power: Power, guest_quiesce: bool) -> VmState {
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
            guest_quiesce,
            replication: None,
            volumes: vec![],
        }
    }

    fn want(wanted: Consistency, minimum: Consistency) -> Wanted {
        Wanted { wanted, minimum }
    }

    #[test]
    fn a_healthy_guest_is_quiesced_and_falls_back_only_as_far_as_allowed() {
        let running = state(Power::Running, true);
        let plan_of =
            |minimum| plan(&running, want(Consistency::Application, minimum)).expect("a way");
        let gives = |p: Plan| p.ways.iter().map(|w| w.gives).collect::<Vec<_>>();
        assert_eq!(
            gives(plan_of(Consistency::Crash)),
            [Consistency::Application, Consistency::Crash]
        );
        assert_eq!(gives(plan_of(Consistency::Application)), [Consistency::Application]);
    }

    #[test]
    fn what_cannot_be_reached_is_a_sentence_with_a_remedy() {
        let silent = state(Power::Running, false);
        let error = plan(&silent, want(Consistency::Application, Consistency::Application))
            .expect_err("no way")
            .to_string();
        assert!(error.contains("integration") && error.contains("APPLICATION"), "{error}");
    }

    #[test]
    fn a_vm_that_is_off_needs_no_guest() {
        let off = state(Power::Off, false);
        let ways = plan(&off, want(Consistency::Application, Consistency::Application))
            .expect("a way")
            .ways;
        assert_eq!(ways[0].gives, Consistency::Off);
        assert!(!ways[0].quiesce);
    }

    #[test]
    fn text_forms_round_trip() {
        for c in [
            Consistency::Crash,
            Consistency::Application,
            Consistency::Off,
            Consistency::SavedState,
        ] {
            assert_eq!(from_text(text(c)), c);
        }
    }
}
