//! Hyper-V Replica (requirement P9, facts section 1.1). Hyper-V makes a backup of the receiving side fail while it works on
//! the replica; each of these states has its own sentence, and all of them pass, some only after somebody acted.

use outrider_proto::error_code;
use outrider_proto::ids::VmRole;

use super::Obstacle;
use crate::hypervisor::facts::{ReplicaSide, Replication, ReplicationHealth, ReplicationState};
use crate::hypervisor::{ReplicaRole, VmState};

pub(super) fn obstacle(state: &VmState) -> Option<Obstacle> {
    let of = |r: &Replication| {
        let (what, remedy) = if r.side.receives() { receiving(r)? } else { sending(r)? };
        let vm = &state.vm.name;
        let sentence = format!("VM {vm:?} cannot be backed up now: {what}; {remedy}");
        Some(Obstacle { code: error_code::REPLICA_STATE, sentence, passes: true })
    };
    state.facts.replication.iter().find_map(of)
}

/// Why a run that is for a VM in one role does not go on with what its host shows now: both sides of a replication have one
/// GUID, and their histories are kept apart.
#[must_use]
pub(crate) fn other_role(state: &VmState, wanted: VmRole) -> Option<Obstacle> {
    let role = |replica| match replica {
        ReplicaRole::None => VmRole::Primary,
        ReplicaRole::Replica => VmRole::Replica,
        ReplicaRole::TestReplica => VmRole::TestReplica,
    };
    let found = role(state.vm.replica);
    let word = |role| match role {
        VmRole::Primary => "the VM itself",
        VmRole::Replica => "the receiving side of a replication",
        VmRole::TestReplica => "a test failover",
    };
    (found != wanted).then(|| Obstacle {
        code: error_code::REPLICA_STATE,
        passes: false,
        sentence: format!(
            "VM {:?} is {} now, this run is for {}: the two have recovery points of their own; back up the one that is meant \
             (a replica is named \"NAME@replica\")",
            state.vm.name,
            word(found),
            word(wanted)
        ),
    })
}

/// The receiving side: never better than crash-consistent, and not at all in these states.
fn receiving(r: &Replication) -> Option<(&'static str, &'static str)> {
    Some(match r.state {
        ReplicationState::ReadyForInitial => (
            "its initial replication has not begun",
            "start it at the primary (Start-VMInitialReplication)",
        ),
        ReplicationState::InitialRunning => {
            ("its initial replication is running", "wait until it has completed")
        }
        ReplicationState::ResyncRequired => (
            "its replica has to be resynchronised",
            "resynchronise it at the primary (Resume-VMReplication -Resynchronize)",
        ),
        ReplicationState::Resynchronizing => {
            ("its replica is being resynchronised", "wait until that has ended")
        }
        ReplicationState::ResyncSuspended => (
            "the resynchronisation of its replica is suspended",
            "resume it at the primary (Resume-VMReplication -Resynchronize)",
        ),
        ReplicationState::FailoverRunning => {
            ("a failover to it is in progress", "wait until it has ended")
        }
        ReplicationState::Recovered => (
            "a failover to it waits to be completed or cancelled",
            "complete it (Complete-VMFailover) or cancel it (Stop-VMFailover)",
        ),
        ReplicationState::FailbackRunning => {
            ("a failback of it is in progress", "wait until it has ended")
        }
        ReplicationState::DiskUpdate => {
            ("the disks of its replica are being changed", "wait until that has ended")
        }
        ReplicationState::DiskUpdateCritical => (
            "changing the disks of its replica failed",
            "look at the replication's health on both sides and resume it",
        ),
        ReplicationState::Critical => (
            "its replication is in a critical state",
            "look at the replication's health on both sides and resume it (Resume-VMReplication)",
        ),
        // Whatever the state, Hyper-V refuses while it calls the replica unwell.
        _ if r.health == ReplicationHealth::Critical => (
            "the health of its replication is critical",
            "look at the replication's health on both sides and resume it (Resume-VMReplication)",
        ),
        _ => return None,
    })
}

/// The sending side is captured like any VM, but not while it changes sides.
fn sending(r: &Replication) -> Option<(&'static str, &'static str)> {
    match (r.side, r.state) {
        (ReplicaSide::Primary, ReplicationState::FailoverRunning) => {
            Some(("a planned failover of it is in progress", "wait until it has ended"))
        }
        (ReplicaSide::Primary, ReplicationState::FailbackRunning) => {
            Some(("a failback of it is in progress", "wait until it has ended"))
        }
        _ => None,
    }
}

pub(super) fn warning(state: &VmState) -> Option<String> {
    let ill = |r: &&Replication| {
        r.side == ReplicaSide::Primary
            && (r.health == ReplicationHealth::Critical || r.state == ReplicationState::Critical)
    };
    state.facts.replication.iter().find(ill).map(|_| {
        format!(
            "the replication of VM {:?} is in a critical state; its backup does not depend on it; resume it \
             (Resume-VMReplication)",
            state.vm.name
        )
    })
}

/// Hyper-V applies the replication log every few seconds to minutes and makes a backup fail meanwhile, without saying so
/// in a state that can be read: on the receiving side a refusal of this kind is a collision, and passes.
#[must_use]
pub(crate) fn collision(state: &VmState, told: &str) -> Option<Obstacle> {
    state.facts.replication.iter().any(|r| r.side.receives()).then(|| Obstacle {
        code: error_code::REPLICA_STATE,
        passes: true,
        sentence: format!(
            "VM {:?} cannot be backed up now: its host is applying the replication log, or an earlier apply was cancelled or \
             failed; the run is repeated; if that does not help, look at the replication's health ({told})",
            state.vm.name
        ),
    })
}
