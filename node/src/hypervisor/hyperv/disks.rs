//! The disks of a VM's settings, and those among them that no checkpoint can hold.

use std::sync::{Mutex, PoisonError};

use outrider_proto::ids::DiskId;
use outrider_wmi::{Object, Value, embedded};

use super::HyperV;
use super::call::Call;
use super::snapshot::is_virtual_disk;
use super::wql;
use crate::hypervisor::DiskSeen;
use crate::hypervisor::facts::Format;

pub(super) const PASS_THROUGH: &str = "Microsoft:Hyper-V:Physical Disk Drive";
const FIBRE_CHANNEL: &str = "Microsoft:Hyper-V:Synthetic FibreChannel Port";
const PERSISTENT_MEMORY: &str = "Microsoft:Hyper-V:Persistent Memory Controller";
const SCSI: &str = "Microsoft:Hyper-V:Synthetic SCSI Controller";

/// Identity and size by file, so that a full inventory does not ask for what an earlier one was told: a disk that is
/// replaced or resized changes its VM, and a VM that changed is asked anew.
#[derive(Default)]
pub(super) struct KnownDisks(Mutex<std::collections::HashMap<String, (Option<DiskId>, u64)>>);

/// Files remembered; beyond, all are forgotten and asked for again.
const MOST_KNOWN: usize = 1 << 16;

impl KnownDisks {
    fn get(&self, path: &str) -> Option<(Option<DiskId>, u64)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(path).copied()
    }

    fn learn(&self, path: &str, facts: (Option<DiskId>, u64)) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST_KNOWN {
            known.clear();
        }
        known.insert(path.to_owned(), facts);
    }
}

impl HyperV {
    /// The disks among a VM's components, in the order of their slots.
    pub(super) async fn disks(&self, parts: &[Object], remembered: bool) -> Vec<DiskSeen> {
        let mut disks = described(parts);
        for disk in disks.iter_mut().filter(|d| matches!(d.format, Format::Vhdx | Format::Vhd)) {
            let known = if remembered { self.known.get(&disk.path) } else { None };
            let facts = match known {
                Some(facts) => Some(facts),
                None => self.disk_facts(&disk.path).await,
            };
            if let Some(facts) = facts {
                self.known.learn(&disk.path, facts);
                (disk.disk_id, disk.size) = facts;
            }
        }
        disks
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
}

/// Whether there is a SCSI controller among a VM's components.
pub(super) fn has_scsi(parts: &[Object]) -> bool {
    parts.iter().any(|o| o.str("ResourceSubType") == Some(SCSI))
}

/// What the settings themselves tell of the disks.
pub(super) fn described(parts: &[Object]) -> Vec<DiskSeen> {
    let mut disks = Vec::new();
    for object in parts {
        let device = |why| {
            let (slot, path) = slot_and_path(object)?;
            let format = Format::Device;
            Some(DiskSeen { disk_id: None, size: 0, slot, path, format, uncapturable: Some(why) })
        };
        let seen = match object.str("ResourceSubType") {
            _ if is_virtual_disk(object) => virtual_disk(object, parts),
            Some(PASS_THROUGH) => device("it is a pass-through disk"),
            Some(FIBRE_CHANNEL) => {
                device("it is a virtual Fibre Channel adapter, its disks are not the host's")
            }
            _ => None,
        };
        disks.extend(seen);
    }
    disks.sort_by(|a, b| wql::order_of(&a.slot).cmp(&wql::order_of(&b.slot)));
    disks
}

fn virtual_disk(object: &Object, parts: &[Object]) -> Option<DiskSeen> {
    let (slot, path) = slot_and_path(object)?;
    let format = Format::of(&path);
    let shared = object.bool("PersistentReservationsSupported") == Some(true);
    let uncapturable =
        if on_persistent_memory(object, parts) || path.to_ascii_lowercase().ends_with(".vhdpmem") {
            Some("it is on a persistent memory controller, which no checkpoint holds")
        } else if shared || format == Format::VhdSet {
            Some("it is shared between VMs")
        } else {
            None
        };
    Some(DiskSeen { disk_id: None, size: 0, slot, path, format, uncapturable })
}

/// Disk -> drive -> controller, by the paths in `Parent`.
fn on_persistent_memory(disk: &Object, parts: &[Object]) -> bool {
    let parent = |object: &Object| {
        let id = wql::instance_id_of(object.str("Parent")?)?;
        parts.iter().find(|o| o.str("InstanceID").is_some_and(|i| i.eq_ignore_ascii_case(&id)))
    };
    let drive = parent(disk);
    let controller = drive.and_then(parent);
    [drive, controller]
        .into_iter()
        .flatten()
        .any(|o| o.str("ResourceSubType") == Some(PERSISTENT_MEMORY))
}

fn slot_and_path(object: &Object) -> Option<(String, String)> {
    let slot = wql::slot(object.str("InstanceID")?)?.to_owned();
    let path = object.array("HostResource").first().and_then(Value::as_str).unwrap_or_default();
    Some((slot, path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::super::wql::{RESOURCE, STORAGE};
    use super::*;

    fn part(class: &str, tail: &str, kind: &str, parent: &str) -> Object {
        let path = |tail: &str| {
            format!(r#"\\HV1\root\virtualization\v2:{RESOURCE}.InstanceID="Microsoft:VM\\{tail}""#)
        };
        Object::new(class, path(tail))
            .with("InstanceID", format!(r"Microsoft:VM\{}", tail.replace(r"\\", r"\")))
            .with("ResourceSubType", kind)
            .with("Parent", Value::Ref(path(parent)))
    }

    fn disk(tail: &str, drive: &str, file: &str) -> Object {
        part(STORAGE, tail, "Microsoft:Hyper-V:Virtual Hard Disk", drive)
            .with("ResourceType", 31_u16)
            .with("HostResource", vec![file])
    }

    /// P5: each kind of disk that the host cannot capture is named with its reason.
    #[test]
    fn what_no_checkpoint_holds_is_told_by_its_settings() {
        let drive = |tail: &str, controller: &str| {
            part(RESOURCE, tail, "Microsoft:Hyper-V:Synthetic Disk Drive", controller)
        };
        let parts = [
            part(RESOURCE, "C0", SCSI, ""),
            part(RESOURCE, "P0", PERSISTENT_MEMORY, ""),
            drive(r"C0\\0\\0\\D", "C0"),
            drive(r"P0\\1\\0\\D", "P0"),
            disk(r"C0\\0\\0\\L", r"C0\\0\\0\\D", r"C:\a.vhdx"),
            disk(r"C0\\0\\1\\L", r"C0\\0\\0\\D", r"C:\q.vhdx")
                .with("PersistentReservationsSupported", true),
            disk(r"C0\\0\\2\\L", r"C0\\0\\0\\D", r"C:\s.vhds"),
            disk(r"P0\\1\\0\\L", r"P0\\1\\0\\D", r"C:\m.vhdx"),
            part(RESOURCE, r"C0\\0\\3\\D", PASS_THROUGH, "C0")
                .with("HostResource", vec!["PhysicalDrive2"]),
            part("Msvm_SyntheticFcPortSettingData", r"F0\\2\\0", FIBRE_CHANNEL, ""),
        ];
        let found = described(&parts);
        let told: Vec<_> =
            found.iter().map(|d| (d.path.as_str(), d.uncapturable.map(|w| w.len() > 10))).collect();
        assert_eq!(
            found.iter().find(|d| d.path == r"C:\a.vhdx").and_then(|d| d.uncapturable),
            None
        );
        assert_eq!(told.len(), 6, "{told:?}");
        assert_eq!(told.iter().filter(|(_, why)| *why == Some(true)).count(), 5, "{told:?}");
        let of = |path: &str| found.iter().find(|d| d.path == path).expect("a disk");
        assert!(of(r"C:\m.vhdx").uncapturable.is_some_and(|w| w.contains("persistent memory")));
        assert_eq!(of(r"C:\s.vhds").format, Format::VhdSet);
        assert!(has_scsi(&parts) && !has_scsi(&parts[1..]));
    }
}
