//! What VMs there are, and what state they are in.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use outrider_proto::ids::{DiskId, VmGuid};
use outrider_wmi::{Object, Value, WmiError, embedded};

use super::HyperV;
use super::call::Call;
use super::snapshot::is_virtual_disk;
use super::wql::{self, PLANNED, REALIZED, RESOURCE, SETTINGS, STORAGE, SYSTEM, literal};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::{DiskSeen, Inventory, Power, ReplicaRole, VmSeen, VmState};

const PASS_THROUGH: &str = "Microsoft:Hyper-V:Physical Disk Drive";

impl HyperV {
    pub(super) async fn full_inventory(&self) -> Result<Inventory, HypervisorError> {
        let doing = "list the VMs of this host";
        let systems = self.query(doing, &format!("SELECT * FROM {SYSTEM}")).await?;
        let planned = self.query(doing, &format!("SELECT * FROM {PLANNED}")).await?;
        let owners = self.cluster_owners().await?;
        let mut vms = Vec::new();
        for system in &systems {
            // The host itself is a computer system, too; VMs are named by GUID.
            let Some(vm) = wql::named_guid(system) else { continue };
            vms.push(self.describe(system, vm, &owners).await?);
        }
        for system in &planned {
            let Some(vm) = wql::named_guid(system) else { continue };
            if vms.iter().all(|v| v.guid != vm) {
                vms.push(VmSeen { realized: false, ..seen(system, vm, &owners) });
            }
        }
        let (nodes_up, nodes_down) = self.cluster_nodes().await?;
        Ok(Inventory { vms, nodes_up, nodes_down })
    }

    /// One VM that is realized here; `None` when it is not.
    pub(super) async fn one_vm(&self, vm: VmGuid) -> Result<Option<VmSeen>, HypervisorError> {
        let Some(system) = self.system(vm).await? else { return Ok(None) };
        let owners = self.cluster_owners().await?;
        self.describe(&system, vm, &owners).await.map(Some)
    }

    async fn system(&self, vm: VmGuid) -> Result<Option<Object>, HypervisorError> {
        let wql = format!("SELECT * FROM {SYSTEM} WHERE Name={}", literal(&wql::guid(vm.0)));
        Ok(self.query("look at a VM", &wql).await?.into_iter().next())
    }

    async fn describe(
        &self,
        system: &Object,
        vm: VmGuid,
        owners: &HashMap<VmGuid, String>,
    ) -> Result<VmSeen, HypervisorError> {
        let wql = format!(
            "SELECT * FROM {SETTINGS} WHERE VirtualSystemIdentifier={} AND VirtualSystemType={}",
            literal(&wql::guid(vm.0)),
            literal(REALIZED)
        );
        let settings = self.query("read a VM's settings", &wql).await?.into_iter().next();
        let mut seen = seen(system, vm, owners);
        if let Some(settings) = settings {
            seen.version = settings.str("Version").unwrap_or_default().to_owned();
            seen.generation =
                if settings.str("VirtualSystemSubType").is_some_and(|t| t.ends_with(":1")) {
                    1
                } else {
                    2
                };
            seen.disks = self.active_disks(&settings).await?;
        }
        Ok(seen)
    }

    async fn active_disks(&self, settings: &Object) -> Result<Vec<DiskSeen>, HypervisorError> {
        const ASSOCIATION: &str = "Msvm_VirtualSystemSettingDataComponent";
        let doing = "list the disks of a VM";
        let storage = match self.associated(doing, &settings.path, ASSOCIATION, STORAGE).await {
            // The VM left while we looked.
            Err(HypervisorError::Provider { source: WmiError::NotFound { .. }, .. }) => {
                return Ok(Vec::new());
            }
            storage => storage?,
        };
        let drives =
            self.associated(doing, &settings.path, ASSOCIATION, RESOURCE).await.unwrap_or_default();
        let mut disks = Vec::new();
        for object in storage.iter().filter(|o| is_virtual_disk(o)) {
            let Some((slot, path)) = slot_and_path(object) else { continue };
            let (disk_id, size) = self.disk_facts(&path).await.unwrap_or_default();
            let shared = object.bool("PersistentReservationsSupported") == Some(true);
            let uncapturable = if shared {
                Some("it is shared between VMs")
            } else if path.to_ascii_lowercase().ends_with(".vhd") {
                Some("it is a VHD, which has no change tracking; convert it with Convert-VHD")
            } else {
                None
            };
            disks.push(DiskSeen { disk_id, size, slot, path, uncapturable });
        }
        for object in drives.iter().filter(|o| o.str("ResourceSubType") == Some(PASS_THROUGH)) {
            let Some((slot, path)) = slot_and_path(object) else { continue };
            let uncapturable = Some("it is a pass-through disk");
            disks.push(DiskSeen { disk_id: None, size: 0, slot, path, uncapturable });
        }
        disks.sort_by(|a, b| wql::order_of(&a.slot).cmp(&wql::order_of(&b.slot)));
        Ok(disks)
    }

    /// VirtualDiskId and size, when the image service tells them.
    async fn disk_facts(&self, path: &str) -> Option<(Option<DiskId>, u64)> {
        let call = Call {
            doing: format!("read the facts of {path}"),
            service: "Msvm_ImageManagementService",
            path: String::new(),
            method: "GetVirtualHardDiskSettingData",
            args: vec![("Path", path.into())],
        };
        let out = self.ask(&call).await.ok()?.out;
        let facts = match out.get("SettingData") {
            Value::Object(o) => (**o).clone(),
            value => embedded::from_text(value.as_str()?).ok()?,
        };
        let id = facts.str("VirtualDiskId").and_then(|t| t.trim_matches(['{', '}']).parse().ok());
        Some((id, facts.u64("MaxInternalSize").unwrap_or(0)))
    }

    pub(super) async fn vm_state(&self, vm: VmGuid) -> Result<VmState, HypervisorError> {
        let system = self.system(vm).await?.ok_or(HypervisorError::NoSuchVm { vm })?;
        let owners = self.cluster_owners().await?;
        let seen = self.describe(&system, vm, &owners).await?;
        let status = |n: usize| {
            system.array("OperationalStatus").get(n).and_then(Value::as_u64).unwrap_or(0)
        };
        let guid = literal(&wql::guid(vm.0));
        let vss = self
            .query(
                "look at a VM's integration services",
                &format!("SELECT * FROM Msvm_VssComponent WHERE SystemName={guid}"),
            )
            .await?;
        let guest_quiesce = vss.iter().any(|c| {
            c.u64("EnabledState") == Some(2)
                && matches!(
                    c.array("OperationalStatus").first().and_then(Value::as_u64),
                    Some(2 | 3)
                )
        });
        let relations = self
            .query("look at a VM's replication", "SELECT * FROM Msvm_ReplicationRelationship")
            .await
            .unwrap_or_default();
        let replication = relations
            .iter()
            .find(|r| wql::settings_guid(r) == Some(vm.0))
            .and_then(|r| Some((r.u64("ReplicationState")?, r.u64("ReplicationHealth")?)))
            .filter(|(state, _)| *state != 0);
        let folders = seen.disks.iter().filter(|d| d.uncapturable.is_none());
        let folders: Vec<PathBuf> =
            folders.filter_map(|d| Path::new(&d.path).parent().map(Path::to_owned)).collect();
        let volumes = self.free_space(folders).await?;
        Ok(VmState {
            vm: seen,
            health: status(0),
            operation: status(1),
            guest_quiesce,
            replication,
            volumes,
        })
    }
}

fn slot_and_path(object: &Object) -> Option<(String, String)> {
    let slot = wql::slot(object.str("InstanceID")?)?.to_owned();
    let path = object.array("HostResource").first().and_then(Value::as_str).unwrap_or_default();
    Some((slot, path.to_owned()))
}

/// What the computer system itself tells.
fn seen(system: &Object, vm: VmGuid, owners: &HashMap<VmGuid, String>) -> VmSeen {
    let owner = owners.get(&vm).cloned();
    VmSeen {
        guid: vm,
        name: system.str("ElementName").unwrap_or_default().to_owned(),
        power: match system.u64("EnabledState") {
            Some(2) => Power::Running,
            Some(3) => Power::Off,
            Some(6 | 32769) => Power::Saved,
            Some(9 | 32768) => Power::Paused,
            _ => Power::Other,
        },
        replica: match system.u64("ReplicationMode") {
            Some(2 | 4) => ReplicaRole::Replica,
            Some(3) => ReplicaRole::TestReplica,
            _ => ReplicaRole::None,
        },
        realized: true,
        clustered: owner.is_some(),
        cluster_owner: owner,
        generation: 2,
        version: String::new(),
        disks: Vec::new(),
    }
}
