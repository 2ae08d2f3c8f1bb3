//! Our facts as messages.

use outrider_proto::ids::{VmGuid, VmKey, VmRole};
use outrider_proto::rpc;

use crate::hypervisor::traces::{CheckpointKind, VmTraces};
use crate::hypervisor::{Change, Inventory, ReplicaRole, VmSeen};

/// Turns facts into messages of one realm.
#[derive(Debug, Clone)]
pub(super) struct Wire {
    pub(super) realm: String,
}

impl Wire {
    fn key(&self, guid: VmGuid, replica: ReplicaRole) -> rpc::VmKey {
        let role = match replica {
            ReplicaRole::None => VmRole::Primary,
            ReplicaRole::Replica => VmRole::Replica,
            ReplicaRole::TestReplica => VmRole::TestReplica,
        };
        rpc::VmKey::from(&VmKey { realm: self.realm.clone(), guid, role })
    }

    fn facts(&self, vm: &VmSeen) -> rpc::VmFacts {
        rpc::VmFacts {
            vm: Some(self.key(vm.guid, vm.replica)),
            name: vm.name.clone(),
            state: vm.power.as_str().to_owned(),
            clustered: vm.clustered,
            cluster_owner: vm.cluster_owner.clone().unwrap_or_default(),
            generation: vm.generation,
            config_version: vm.version.clone(),
            disks: vm
                .disks
                .iter()
                .map(|d| rpc::DiskIdentity {
                    disk_id: d.disk_id.map(|id| id.to_string()).unwrap_or_default(),
                    size_bytes: d.size,
                    slot: d.slot.clone(),
                })
                .collect(),
            realized: vm.realized,
        }
    }

    pub(super) fn inventory(&self, inventory: &Inventory) -> rpc::Inventory {
        rpc::Inventory {
            vms: inventory.vms.iter().map(|vm| self.facts(vm)).collect(),
            nodes_up: inventory.nodes_up.clone(),
            nodes_down: inventory.nodes_down.clone(),
        }
    }

    pub(super) fn traces(&self, vm: VmTraces) -> rpc::VmTraces {
        rpc::VmTraces {
            vm: Some(self.key(vm.guid, vm.replica)),
            vm_name: vm.name,
            checkpoints: vm
                .checkpoints
                .into_iter()
                .map(|c| rpc::FoundCheckpoint {
                    id: c.id,
                    name: c.name,
                    kind: match c.kind {
                        CheckpointKind::Recovery => rpc::CheckpointKind::Recovery,
                        CheckpointKind::User => rpc::CheckpointKind::User,
                        CheckpointKind::Replica => rpc::CheckpointKind::Replica,
                    }
                    .into(),
                    created_unix_ms: c.created_unix_ms.unwrap_or(0),
                    ours: c.ours,
                })
                .collect(),
            reference_points: vm
                .points
                .into_iter()
                .map(|p| rpc::FoundReferencePoint { id: p.id, name: p.name, ours: p.ours })
                .collect(),
            chains: vm
                .chains
                .into_iter()
                .map(|c| rpc::FoundChain {
                    slot: c.slot,
                    files: c.files,
                    broken: c.broken.unwrap_or_default(),
                })
                .collect(),
            merging: vm.merging,
        }
    }

    /// `None` for [`Change::Lost`], which calls for an inventory.
    pub(super) fn change(&self, change: &Change) -> Option<rpc::VmChange> {
        use rpc::vm_change::What;
        let what = match change {
            Change::Seen(vm) => What::Seen(self.facts(vm)),
            Change::Gone(vm, role) => What::Gone(self.key(*vm, *role)),
            Change::Owner(vm, owner) => What::Owner(rpc::OwnerChange {
                vm: Some(self.key(*vm, ReplicaRole::None)),
                owner: owner.clone(),
            }),
            Change::Host { host, up } => What::Host(rpc::HostState { host: host.clone(), up: *up }),
            Change::Lost => return None,
        };
        Some(rpc::VmChange { what: Some(what) })
    }
}
