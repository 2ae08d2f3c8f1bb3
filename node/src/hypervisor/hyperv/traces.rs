//! What backups left here: checkpoints, reference points and child files, one query a class.

use std::collections::BTreeMap;

use outrider_proto::ids::VmGuid;
use outrider_wmi::{Object, Value, embedded};

use super::HyperV;
use super::call::Call;
use super::snapshot::is_virtual_disk;
use super::wql::{self, REALIZED, RECOVERY, REFERENCE_POINT, SETTINGS, STORAGE, SYSTEM};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::traces::{
    CheckpointKind, FoundChain, FoundCheckpoint, FoundPoint, VmTraces,
};
use crate::job::is_name_of_ours;

const USER: &str = "Microsoft:Hyper-V:Snapshot:Realized";
const REPLICA: &str = "Microsoft:Hyper-V:Snapshot:Replica:";
/// Second operational status of a VM whose checkpoint is being merged.
const MERGING: u64 = 32772;
/// Files of a chain that are followed; Hyper-V makes at most 50 checkpoints of a VM.
const LONGEST: usize = 64;

impl HyperV {
    pub(super) async fn all_traces(&self) -> Result<Vec<VmTraces>, HypervisorError> {
        let systems =
            self.query("list the VMs of this host", &format!("SELECT * FROM {SYSTEM}")).await?;
        let mut vms: BTreeMap<VmGuid, VmTraces> = BTreeMap::new();
        for system in &systems {
            let Some(vm) = wql::named_guid(system) else { continue };
            let seen = super::inventory::seen(system, vm, &Default::default());
            let mut found = VmTraces::of(vm, &seen.name, seen.replica);
            let status = system.array("OperationalStatus").get(1).and_then(Value::as_u64);
            found.merging = status == Some(MERGING);
            vms.insert(vm, found);
        }
        let settings =
            self.query("list all checkpoints", &format!("SELECT * FROM {SETTINGS}")).await?;
        // Settings of VMs have the GUID of the VM itself.
        let mut active = Vec::new();
        for object in &settings {
            let Some(vm) = owner(object) else { continue };
            if object.str("VirtualSystemType") == Some(REALIZED) {
                active.extend(wql::settings_guid(object).map(|id| (id, vm)));
            } else if let (Some(found), Some(checkpoint)) = (vms.get_mut(&vm), checkpoint(object)) {
                found.checkpoints.push(checkpoint);
            }
        }
        let doing = "list all reference points";
        for object in self.query(doing, &format!("SELECT * FROM {REFERENCE_POINT}")).await? {
            let found = owner(&object).and_then(|vm| vms.get_mut(&vm));
            if let (Some(found), Some(id)) = (found, object.str("InstanceID")) {
                let point = FoundPoint { id: id.to_owned(), name: String::new(), ours: None };
                found.points.push(point);
            }
        }
        let disks = self.query("list all disks", &format!("SELECT * FROM {STORAGE}")).await?;
        for object in disks.iter().filter(|o| is_virtual_disk(o)) {
            let of = wql::settings_guid(object)
                .and_then(|id| active.iter().find(|(settings, _)| *settings == id));
            let path = object.array("HostResource").first().and_then(Value::as_str);
            let (Some((_, vm)), Some(path)) = (of, path) else { continue };
            if !is_child(path) {
                continue;
            }
            let slot = object.str("InstanceID").and_then(wql::slot).unwrap_or_default();
            let (files, broken) = self.chain_of(path).await;
            if let Some(found) = vms.get_mut(vm) {
                found.chains.push(FoundChain { slot: slot.to_owned(), files, broken });
            }
        }
        Ok(vms.into_values().filter(|vm| !vm.is_empty()).collect())
    }

    /// A file and its parents, as the image service tells them, as far as it does.
    async fn chain_of(&self, leaf: &str) -> (Vec<String>, Option<String>) {
        let mut files = vec![leaf.to_owned()];
        while let Some(file) = files.last() {
            let call = Call {
                doing: format!("look for the parent of {file}"),
                service: "Msvm_ImageManagementService",
                path: String::new(),
                method: "GetVirtualHardDiskSettingData",
                args: vec![("Path", file.as_str().into())],
            };
            let out = match self.ask(&call).await {
                Ok(finished) => finished.out,
                Err(e) => return (files, Some(e.to_string())),
            };
            let facts = match out.get("SettingData") {
                Value::Object(o) => Some((**o).clone()),
                value => value.as_str().and_then(|text| embedded::from_text(text).ok()),
            };
            let parent = facts.as_ref().and_then(|f| f.str("ParentPath")).unwrap_or_default();
            if parent.is_empty() {
                return (files, None);
            }
            if files.len() == LONGEST || files.iter().any(|f| f.eq_ignore_ascii_case(parent)) {
                return (files, Some("the chain does not end".to_owned()));
            }
            files.push(parent.to_owned());
        }
        (files, None)
    }
}

/// Files that Hyper-V itself makes for checkpoints; a differencing disk that somebody made on purpose is called `.vhdx`.
fn is_child(path: &str) -> bool {
    let path = path.to_ascii_lowercase();
    [".avhdx", ".avhd", ".avhds"].iter().any(|end| path.ends_with(end))
}

fn owner(object: &Object) -> Option<VmGuid> {
    object.str("VirtualSystemIdentifier")?.parse().ok()
}

fn checkpoint(settings: &Object) -> Option<FoundCheckpoint> {
    let kind = match settings.str("VirtualSystemType")? {
        RECOVERY => CheckpointKind::Recovery,
        USER => CheckpointKind::User,
        other if other.starts_with(REPLICA) => CheckpointKind::Replica,
        _ => return None,
    };
    let name = settings.str("ElementName").unwrap_or_default().to_owned();
    Some(FoundCheckpoint {
        id: wql::settings_guid(settings)?.to_string(),
        ours: kind == CheckpointKind::Recovery && is_name_of_ours(&name),
        name,
        kind,
        created_unix_ms: settings.str("CreationTime").and_then(wql::unix_ms),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_checkpoints_are_told_by_their_type_and_ours_by_name() {
        let settings = |kind: &str, name: &str| {
            Object::new(SETTINGS, "p")
                .with("InstanceID", "Microsoft:11111111-2222-3333-4444-555555555555")
                .with("VirtualSystemType", format!("Microsoft:Hyper-V:{kind}"))
                .with("ElementName", name)
                .with("CreationTime", "20261126001500.000000+060")
        };
        let told = |kind, name| checkpoint(&settings(kind, name)).map(|c| (c.kind, c.ours));
        let ours = "Outrider 0195-a 3 7";
        assert_eq!(told("Snapshot:Recovery", ours), Some((CheckpointKind::Recovery, true)));
        assert_eq!(told("Snapshot:Recovery", "X"), Some((CheckpointKind::Recovery, false)));
        assert_eq!(told("Snapshot:Realized", ours), Some((CheckpointKind::User, false)));
        let replica = told("Snapshot:Replica:Standard", "r");
        assert_eq!(replica, Some((CheckpointKind::Replica, false)));
        assert_eq!(told("System:Planned", "p"), None);
        let made = checkpoint(&settings("Snapshot:Recovery", "X")).and_then(|c| c.created_unix_ms);
        assert_eq!(made, Some(1_795_648_500_000), "an hour east of Greenwich");
    }
}
