//! What the control client sees of the cluster, and what it can wait for.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::control::{
    CheckpointState, DiskState, GroupSetup, HostState, LabState, ReferencePointState, VmState,
    WaitFor,
};
use crate::error::LabError;
use crate::faults::Progress;
use crate::hardware::Hardware;
use crate::merge::Obstacle;
use crate::model::{State, Vm};

pub(super) fn describe(s: &State) -> LabState {
    let hosts = s.hosts.iter().map(|(name, h)| HostState {
        name: name.clone(),
        up: h.up,
        paused: h.paused,
        connections: h.connections,
    });
    let mut vms: Vec<VmState> = s.vms.values().map(describe_vm(s)).collect();
    vms.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    LabState {
        realm: s.realm.clone(),
        hosts: hosts.collect(),
        vms,
        checkpoint_on_migration: s.switch,
        planned: s.planned.values().map(|vm| (vm.host.clone(), vm.name.clone())).collect(),
    }
}

pub(super) fn describe_vm(s: &State) -> impl Fn(&Vm) -> VmState + '_ {
    |vm| VmState {
        id: vm.id,
        name: vm.name.clone(),
        host: vm.host.clone(),
        owner: vm.owner.clone(),
        enabled_state: vm.power.enabled_state(),
        disks: vm
            .disks
            .iter()
            .map(|d| DiskState { chain: d.chain.clone(), size: d.size })
            .collect(),
        current: vm.current,
        checkpoints: vm
            .checkpoints
            .iter()
            .map(|c| CheckpointState {
                id: c.id,
                name: c.name.clone(),
                recovery: c.recovery,
                parent: c.parent,
                frozen: c.disks.iter().map(|d| d.path.clone()).collect(),
                notes: c.notes.clone(),
                saved: c.saved,
                nics: nics(&c.hardware),
                images: images(&c.hardware),
            })
            .collect(),
        reference_points: vm
            .reference_points
            .iter()
            .map(|r| ReferencePointState {
                id: r.id,
                rct_ids: vm
                    .disks
                    .iter()
                    .map(|d| r.marks.iter().find(|(id, _)| *id == d.id).map(|(_, m)| m.clone()))
                    .collect(),
            })
            .collect(),
        merges: vm.merges.len(),
        merge_waits: vm.merges.first().and_then(|m| match s.merge_obstacle(vm, m) {
            Some(Obstacle::Readers(text)) => Some(text),
            Some(Obstacle::Stuck) => Some("stuck by a fault".into()),
            None => m.waits.clone(),
        }),
        migrating: vm.migration.is_some(),
        busy: vm.busy.is_some(),
        nics: nics(&vm.hardware),
        images: images(&vm.hardware),
        folders: [None, Some(&vm.hardware.snapshot_root), Some(&vm.hardware.swap_root)]
            .into_iter()
            .map(|root| root.and_then(Option::as_ref).unwrap_or(&vm.folder).clone())
            .collect(),
        rights: vm.rights,
        group: vm.owner.as_ref().map(|_| GroupSetup {
            values: vm.group.values.clone(),
            anti_affinity: vm.group.anti_affinity.clone(),
            preferred_owners: vm.group.preferred_owners.clone(),
        }),
        cluster_failures: vm.cluster_failures,
    }
}

/// Adapters by name, with the switch that each is connected to.
fn nics(hardware: &Hardware) -> Vec<(String, Option<String>)> {
    let nics = hardware.nics.iter().map(|n| {
        let port = n.port.as_ref().filter(|p| p.enabled);
        (n.name.clone(), port.map(|p| p.name.clone()))
    });
    nics.collect()
}

fn images(hardware: &Hardware) -> Vec<PathBuf> {
    hardware.drives.iter().filter_map(|d| d.image.clone()).collect()
}

fn holds(s: &State, condition: &WaitFor) -> Result<bool, LabError> {
    Ok(match condition {
        WaitFor::VmOnHost { vm, host } => {
            let vm = s.find_vm(vm)?;
            vm.host == *host
                && vm.migration.is_none()
                && vm.owner.as_ref().is_none_or(|owner| owner == host)
        }
        WaitFor::NoMerge { vm } => {
            let vm = s.find_vm(vm)?;
            vm.merges.is_empty() && vm.busy.is_none()
        }
        WaitFor::RecoveryCheckpoints { vm, count } => {
            s.find_vm(vm)?.checkpoints.iter().filter(|c| c.recovery).count() == *count
        }
        WaitFor::MergeWaitsForReaders { vm } => {
            let vm = s.find_vm(vm)?;
            vm.merges
                .first()
                .is_some_and(|m| matches!(s.merge_obstacle(vm, m), Some(Obstacle::Readers(_))))
        }
        WaitFor::GateBlocked { gate } => {
            let gate = s.gates.iter().find(|g| g.id == *gate);
            !gate
                .ok_or_else(|| LabError::unknown("gate", "released or never set"))?
                .blocked
                .is_empty()
        }
        WaitFor::ReadsPaused { csv } => s.paused_reads.values().any(|waits_for| waits_for == csv),
        WaitFor::MethodHeld { hold } => {
            let hold = s.holds.iter().find(|h| h.id == *hold);
            hold.ok_or_else(|| LabError::unknown("hold", "released or never set"))?.progress
                == Progress::Holds
        }
        WaitFor::Called { method, vm, count } => {
            let id = s.find_vm(vm)?.id;
            let calls = s.calls.iter().filter(|c| c.vm == Some(id) && c.method == *method);
            calls.count() >= *count
        }
    })
}

pub(super) async fn wait(
    cluster: &Cluster,
    condition: &WaitFor,
    deadline_ms: u64,
) -> Result<(), LabError> {
    let begun = Instant::now();
    let held = cluster.until(|s| match holds(s, condition) {
        Ok(true) => Some(Ok(())),
        Ok(false) => None,
        Err(e) => Some(Err(e)),
    });
    match tokio::time::timeout(Duration::from_millis(deadline_ms), held).await {
        Ok(result) => result,
        Err(_) => Err(LabError::Deadline {
            what: format!("{condition:?}"),
            waited_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            now: cluster.read(|s| format!("{:?}", describe(s).vms)),
        }),
    }
}
