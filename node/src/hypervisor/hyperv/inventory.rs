//! What VMs there are: one query a class, whatever the number of VMs.

use std::collections::HashMap;

use outrider_proto::ids::VmGuid;
use outrider_wmi::{Object, WmiError};
use uuid::Uuid;

use super::HyperV;
use super::cluster::ClusterView;
use super::facts::Replications;
use super::wql::{self, PLANNED, REALIZED, RESOURCE, SETTINGS, STORAGE, SYSTEM, literal};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::facts::ReplicaSide;
use crate::hypervisor::{Inventory, Power, ReplicaRole, VmSeen};

impl HyperV {
    pub(super) async fn full_inventory(&self) -> Result<Inventory, HypervisorError> {
        let (vms, view) = self.everything().await?;
        // Also learns how each volume is usually reached.
        self.csvs().await?;
        let hosts = |is_up: bool| {
            let wanted = view.hosts.iter().filter(move |(_, up)| view.speaks && **up == is_up);
            let mut names: Vec<String> = wanted.map(|(host, _)| host.clone()).collect();
            names.sort();
            names
        };
        Ok(Inventory { nodes_up: hosts(true), nodes_down: hosts(false), vms })
    }

    /// All VMs, planned ones included, and the cluster.
    pub(super) async fn everything(&self) -> Result<(Vec<VmSeen>, ClusterView), HypervisorError> {
        let doing = "list the VMs of this host";
        let systems = self.query(doing, &format!("SELECT * FROM {SYSTEM}")).await?;
        let planned = self.query(doing, &format!("SELECT * FROM {PLANNED}")).await?;
        let realized =
            format!("SELECT * FROM {SETTINGS} WHERE VirtualSystemType={}", literal(REALIZED));
        let settings = by_settings(self.query("read VMs' settings", &realized).await?);
        let listing = "list the disks of VMs";
        let mut parts = self.query(listing, &format!("SELECT * FROM {STORAGE}")).await?;
        parts.extend(self.query(listing, &format!("SELECT * FROM {RESOURCE}")).await?);
        let parts = by_settings(parts);
        let view = self.cluster_view().await?;
        let replications = self.replications(&systems).await?;
        let nothing = Vec::new();
        let mut vms = Vec::new();
        for system in &systems {
            // The host itself is a computer system, too; VMs are named by GUID. Captions are translated.
            let Some(vm) = wql::named_guid(system) else { continue };
            let mut seen = seen(system, vm, &view);
            seen.replica = role(&seen, &replications);
            if let Some(settings) = settings.get(&vm.0).and_then(|s| s.first()) {
                configured(&mut seen, settings);
            }
            seen.disks = self.disks(parts.get(&vm.0).unwrap_or(&nothing), true).await;
            vms.push(seen);
        }
        for system in &planned {
            let Some(vm) = wql::named_guid(system) else { continue };
            if vms.iter().all(|v| v.guid != vm) {
                vms.push(VmSeen { realized: false, ..seen(system, vm, &view) });
            }
        }
        Ok((vms, view))
    }

    /// One VM that is realized here; `None` when it is not.
    pub(super) async fn one_vm(
        &self,
        vm: VmGuid,
        view: &ClusterView,
    ) -> Result<Option<VmSeen>, HypervisorError> {
        let Some(system) = self.system(vm).await? else { return Ok(None) };
        let mut seen = seen(&system, vm, view);
        seen.replica = role(&seen, &self.replications(std::slice::from_ref(&system)).await?);
        if let Some(settings) = self.active_settings(vm).await? {
            configured(&mut seen, &settings);
            let parts = self.components(&settings).await?;
            seen.disks = self.disks(&parts, false).await;
        }
        Ok(Some(seen))
    }

    pub(super) async fn system(&self, vm: VmGuid) -> Result<Option<Object>, HypervisorError> {
        let wql = format!("SELECT * FROM {SYSTEM} WHERE Name={}", literal(&wql::guid(vm.0)));
        Ok(self.query("look at a VM", &wql).await?.into_iter().next())
    }

    /// That nothing of a VM was found says something only while it is here: it takes its checkpoints and reference points
    /// along when it moves. Asked after the search.
    pub(super) async fn is_here(&self, vm: VmGuid) -> Result<(), HypervisorError> {
        self.system(vm).await?.map(drop).ok_or(HypervisorError::NoSuchVm { vm })
    }

    pub(super) async fn active_settings(
        &self,
        vm: VmGuid,
    ) -> Result<Option<Object>, HypervisorError> {
        let wql = format!(
            "SELECT * FROM {SETTINGS} WHERE VirtualSystemIdentifier={} AND VirtualSystemType={}",
            literal(&wql::guid(vm.0)),
            literal(REALIZED)
        );
        Ok(self.query("read a VM's settings", &wql).await?.into_iter().next())
    }

    /// All that a VM is made of, of whatever class; nothing when it left while we looked.
    pub(super) async fn components(
        &self,
        settings: &Object,
    ) -> Result<Vec<Object>, HypervisorError> {
        const ASSOCIATION: &str = "Msvm_VirtualSystemSettingDataComponent";
        match self.associated("list the disks of a VM", &settings.path, ASSOCIATION, "").await {
            Err(HypervisorError::Provider { source: WmiError::NotFound { .. }, .. }) => {
                Ok(Vec::new())
            }
            parts => parts,
        }
    }
}

/// Objects by the GUID of the settings that their InstanceID begins with. Default settings of pools have none.
fn by_settings(objects: Vec<Object>) -> HashMap<Uuid, Vec<Object>> {
    let mut out: HashMap<Uuid, Vec<Object>> = HashMap::new();
    for object in objects {
        if let Some(id) = wql::settings_guid(&object) {
            out.entry(id).or_default().push(object);
        }
    }
    out
}

/// What the computer system itself tells.
pub(super) fn seen(system: &Object, vm: VmGuid, view: &ClusterView) -> VmSeen {
    let (clustered, owner) = view.owner_of(vm);
    VmSeen {
        guid: vm,
        name: system.str("ElementName").unwrap_or_default().to_owned(),
        power: power(system.u64("EnabledState")),
        replica: match system.u64("ReplicationMode").and_then(ReplicaSide::of) {
            Some(ReplicaSide::Replica | ReplicaSide::Extended) => ReplicaRole::Replica,
            Some(ReplicaSide::Test) => ReplicaRole::TestReplica,
            Some(ReplicaSide::Primary) | None => ReplicaRole::None,
        },
        realized: true,
        clustered,
        cluster_owner: owner.map(str::to_owned),
        generation: 2,
        version: String::new(),
        disks: Vec::new(),
    }
}

/// What a VM is by its replications, else by its own ReplicationMode, which stays when none is active.
pub(super) fn role(seen: &VmSeen, replications: &Replications) -> ReplicaRole {
    let sides = || replications.get(&seen.guid).into_iter().flatten().map(|r| r.side);
    if sides().any(|side| side == ReplicaSide::Test) {
        ReplicaRole::TestReplica
    } else if sides().any(ReplicaSide::receives) {
        ReplicaRole::Replica
    } else {
        seen.replica
    }
}

/// EnabledState, in the numbers of v2 and those of v1 that v2 still shows in places. Above 32780 two lists contradict each
/// other (facts, section 1.1): such a number says nothing.
fn power(enabled_state: Option<u64>) -> Power {
    match enabled_state {
        Some(2) => Power::Running,
        Some(3) => Power::Off,
        Some(6 | 32769) => Power::Saved,
        Some(9 | 32768) => Power::Paused,
        _ => Power::Other,
    }
}

/// What the active settings tell.
pub(super) fn configured(seen: &mut VmSeen, settings: &Object) {
    seen.version = settings.str("Version").unwrap_or_default().to_owned();
    let first = settings.str("VirtualSystemSubType").is_some_and(|t| t.ends_with(":1"));
    seen.generation = if first { 1 } else { 2 };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Facts 1.1: both sets of EnabledState, and nothing decided by a number above 32780.
    #[test]
    fn power_is_told_by_both_sets_of_numbers() {
        let table = [
            (2, Power::Running),
            (3, Power::Off),
            (6, Power::Saved),
            (32769, Power::Saved),
            (9, Power::Paused),
            (32768, Power::Paused),
            (4, Power::Other),
            (10, Power::Other),
            (32770, Power::Other),
            (32781, Power::Other),
            (32792, Power::Other),
        ];
        for (number, expected) in table {
            assert_eq!(power(Some(number)), expected, "{number}");
        }
        assert_eq!(power(None), Power::Other);
    }

    #[test]
    fn a_host_is_no_vm_whatever_its_caption_is_called() {
        let host = Object::new(SYSTEM, "p").with("Name", "HV1").with("Caption", "Virtual Machine");
        assert_eq!(wql::named_guid(&host), None);
        let vm = "11111111-2222-3333-4444-555555555555";
        let translated =
            Object::new(SYSTEM, "p").with("Name", vm).with("Caption", "Virtueller Computer");
        assert!(wql::named_guid(&translated).is_some());
    }
}
