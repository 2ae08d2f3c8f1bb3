//! `root\virtualization\v2`.

use std::path::MAIN_SEPARATOR;

use outrider_wmi::{Object, Value};
use uuid::Uuid;

use super::devices;
use super::facts::{self, COMPONENTS, integration, summary};
use crate::import::{CHECKPOINT_FOLDER, VM_FOLDER};
use crate::jobs::{COMPLETED, Job, RUNNING, WARNINGS};
use crate::model::{Checkpoint, Disk, Power, ReferencePoint, State, Vm, guid};
use crate::wql::path_of;

const VSSD: &str = "Msvm_VirtualSystemSettingData";
pub(super) const SASD: &str = "Msvm_StorageAllocationSettingData";
pub(super) const RASD: &str = "Msvm_ResourceAllocationSettingData";
const REFERENCE_POINT: &str = "Msvm_VirtualSystemReferencePoint";

/// The services: class and name of each.
const SERVICES: [(&str, &str); 6] = [
    ("Msvm_VirtualSystemManagementService", "vmms"),
    ("Msvm_VirtualSystemSnapshotService", "vssnapsvc"),
    ("Msvm_VirtualSystemReferencePointService", "vsrpsvc"),
    ("Msvm_ImageManagementService", "imagesvc"),
    ("Msvm_VirtualSystemMigrationService", "vsmigrationsvc"),
    ("Msvm_SecurityService", "securitysvc"),
];

pub(super) fn instances(state: &State, host: &str, class: &str) -> Option<Vec<Object>> {
    let here = || state.vms.values().filter(|vm| state.shown_on(vm) == host);
    let planned = || state.planned.values().filter(|vm| vm.host == host);
    let arriving = || {
        state.vms.values().filter(|vm| {
            let moves = vm.migration.as_ref().is_some_and(|m| m.planned && m.target == host);
            state.shown_on(vm) != host && (moves || vm.host == host)
        })
    };
    let is = |name: &str| class.eq_ignore_ascii_case(name);
    if let Some((class, name)) = SERVICES.iter().find(|(c, _)| is(c)) {
        return Some(vec![service(class, name, host)]);
    }
    if let Some(component) = COMPONENTS.iter().find(|c| is(c)) {
        return Some(here().map(|vm| integration(vm, component)).collect());
    }
    Some(if is("Msvm_ComputerSystem") {
        std::iter::once(host_system(host)).chain(here().map(computer_system)).collect()
    } else if is("Msvm_PlannedComputerSystem") {
        planned().chain(arriving()).map(|vm| planned_system(vm, host)).collect()
    } else if is(VSSD) {
        let of_vm = |vm: &Vm| {
            let mut all = vec![active_settings(vm, "Microsoft:Hyper-V:System:Realized")];
            all.extend(vm.checkpoints.iter().map(|c| checkpoint_settings(vm, c)));
            all
        };
        let of_planned = |vm: &Vm| {
            let mut all = vec![active_settings(vm, "Microsoft:Hyper-V:System:Planned")];
            all.extend(vm.checkpoints.iter().map(|c| planned_checkpoint(vm, c)));
            all
        };
        let definitions = state.hosts.get(host).map(devices::definitions).unwrap_or_default();
        here().flat_map(of_vm).chain(planned().flat_map(of_planned)).chain(definitions).collect()
    } else if is(SASD) {
        here().chain(planned()).flat_map(all_parts).filter(|o| o.class == SASD).collect()
    } else if is(RASD) {
        here().chain(planned()).flat_map(all_parts).filter(|o| o.class == RASD).collect()
    } else if is(devices::PORT) || is(devices::CONNECTION) || is(devices::SECURITY) {
        let parts = here().chain(planned()).flat_map(devices::all);
        parts.filter(|o| o.class.eq_ignore_ascii_case(class)).collect()
    } else if is(devices::SWITCH) {
        state.hosts.get(host).map(devices::switches).unwrap_or_default()
    } else if is(devices::CAPABILITIES) {
        vec![devices::capabilities()]
    } else if is("Msvm_ConcreteJob") {
        state.jobs.values().filter(|j| j.host == host).map(job).collect()
    } else if is(REFERENCE_POINT) {
        here().flat_map(|vm| vm.reference_points.iter().map(|r| reference_point(vm, r))).collect()
    } else if is("Msvm_SummaryInformation") {
        here().map(summary).collect()
    } else if is("Msvm_ReplicationRelationship") {
        here().flat_map(facts::relationships).collect()
    } else {
        return None;
    })
}

pub(super) fn associated(state: &State, host: &str, source: &Object, assoc: &str) -> Vec<Object> {
    let is = |name: &str| assoc.is_empty() || assoc.eq_ignore_ascii_case(name);
    let mut out = Vec::new();
    let all_vms = || state.vms.values().filter(|vm| state.shown_on(vm) == host);
    let with_planned = || all_vms().chain(state.planned.values().filter(|vm| vm.host == host));
    match source.class.as_str() {
        "Msvm_ComputerSystem" | "Msvm_PlannedComputerSystem" => {
            for vm in with_planned().filter(|vm| source.str("Name") == Some(&vm.guid())) {
                if is("Msvm_SettingsDefineState") {
                    let planned = state.planned.contains_key(&vm.id);
                    let kind = if planned { "Planned" } else { "Realized" };
                    out.push(active_settings(vm, &format!("Microsoft:Hyper-V:System:{kind}")));
                }
                if is("Msvm_SnapshotOfVirtualSystem") {
                    let planned = state.planned.contains_key(&vm.id);
                    let settings = if planned { planned_checkpoint } else { checkpoint_settings };
                    out.extend(vm.checkpoints.iter().map(|c| settings(vm, c)));
                }
                if is("Msvm_LastAppliedSnapshot") {
                    let applied = vm.checkpoints.iter().filter(|c| Some(c.id) == vm.last_applied);
                    out.extend(applied.map(|c| checkpoint_settings(vm, c)));
                }
                if is("Msvm_MostCurrentSnapshotInBranch") {
                    let current = vm.checkpoints.iter().filter(|c| Some(c.id) == vm.current);
                    out.extend(current.map(|c| checkpoint_settings(vm, c)));
                }
                if is("Msvm_ReferencePointOfVirtualSystem") {
                    out.extend(vm.reference_points.iter().map(|r| reference_point(vm, r)));
                }
                if is("Msvm_SystemDevice") {
                    out.extend(COMPONENTS.iter().map(|c| integration(vm, c)));
                }
            }
        }
        VSSD => {
            let id = source.str("InstanceID").unwrap_or_default().to_owned();
            if is("Msvm_VirtualSystemSettingDataComponent") {
                let prefix = format!("{id}\\");
                let of_settings =
                    |o: &Object| o.str("InstanceID").is_some_and(|i| i.starts_with(&prefix));
                out.extend(with_planned().flat_map(all_parts).filter(of_settings));
            }
            let owner =
                all_vms().find(|vm| source.str("VirtualSystemIdentifier") == Some(&vm.guid()));
            let active = owner.is_some_and(|vm| id == settings_id(vm.id));
            if (active && is("Msvm_SettingsDefineState"))
                || (!active && is("Msvm_SnapshotOfVirtualSystem"))
            {
                out.extend(owner.map(computer_system));
            }
        }
        devices::CAPABILITIES if is("Msvm_SettingsDefineCapabilities") => {
            out.extend(state.hosts.get(host).map(devices::definitions).unwrap_or_default());
        }
        REFERENCE_POINT if is("Msvm_ReferencePointOfVirtualSystem") => {
            let owner = |vm: &&Vm| source.str("VirtualSystemIdentifier") == Some(&vm.guid());
            out.extend(all_vms().find(owner).map(computer_system));
        }
        "Msvm_ConcreteJob" if is("Msvm_AffectedJobElement") => {
            let job = state.jobs.values().find(|j| source.str("InstanceID") == Some(&guid(j.id)));
            for path in job.iter().flat_map(|j| &j.affected) {
                // What the job made may be gone again.
                out.extend(super::get(state, host, outrider_wmi::NS_VIRTUALIZATION, path).ok());
            }
        }
        _ => {}
    }
    out
}

/// Object path of a VM.
pub(crate) fn system_path(class: &str, name: &str) -> String {
    path_of(class, &[("CreationClassName", class), ("Name", name)])
}

fn system(class: &str, name: &str) -> Object {
    Object::new(class, system_path(class, name)).with("CreationClassName", class).with("Name", name)
}

fn host_system(host: &str) -> Object {
    system("Msvm_ComputerSystem", host)
        .with("ElementName", host)
        .with("Caption", "Hosting Computer System")
        .with("Description", "Microsoft Hosting Computer System")
        .with("EnabledState", 2_u16)
        .with("HealthState", 5_u16)
        .with("OperationalStatus", vec![2_u16])
}

/// A realized VM.
pub(crate) fn computer_system(vm: &Vm) -> Object {
    system("Msvm_ComputerSystem", &vm.guid())
        .with("ElementName", vm.name.as_str())
        .with("Caption", "Virtual Machine")
        .with("Description", "Microsoft Virtual Computer System")
        .with("EnabledState", facts::enabled_state(vm))
        .with("RequestedState", 12_u16)
        .with("HealthState", 5_u16)
        .with("OperationalStatus", vm.operational_status().to_vec())
        .with("ProcessID", if vm.power.holds_disks() { 4000_u32 } else { 0 })
        .with("ReplicationState", vm.shape.replication.first().map_or(0, |r| r.state))
        .with("ReplicationMode", vm.shape.replication.first().map_or(0, |r| r.mode))
        .with("ReplicationHealth", vm.shape.replication.first().map_or(0, |r| r.health))
        .with("InstallDate", datetime(vm.created))
}

/// A planned VM of an import, or of a migration that arrives on `host`.
pub(crate) fn planned_system(vm: &Vm, host: &str) -> Object {
    let arriving = vm.host != host;
    system("Msvm_PlannedComputerSystem", &vm.guid())
        .with("ElementName", vm.name.as_str())
        .with("Caption", "Planned Virtual Machine")
        .with("EnabledState", 3_u16)
        .with("OperationalStatus", if arriving { vec![11_u16, 32780] } else { vec![2_u16] })
}

fn settings_id(id: Uuid) -> String {
    format!("Microsoft:{}", guid(id))
}

/// Object path of a checkpoint's (or VM's) settings.
pub(crate) fn checkpoint_path(id: Uuid) -> String {
    path_of(VSSD, &[("InstanceID", &settings_id(id))])
}

fn settings(vm: &Vm, id: Uuid, kind: &str, folder: &str) -> Object {
    let file = |extension: &str| format!("{folder}{MAIN_SEPARATOR}{}.{extension}", guid(id));
    let root = vm.folder.display().to_string();
    let other = |root: &Option<std::path::PathBuf>| {
        root.as_ref().unwrap_or(&vm.folder).display().to_string()
    };
    Object::new(VSSD, checkpoint_path(id))
        .with("InstanceID", settings_id(id))
        .with("VirtualSystemIdentifier", vm.guid())
        .with("VirtualSystemType", kind)
        .with("VirtualSystemSubType", format!("Microsoft:Hyper-V:SubType:{}", vm.generation))
        .with("ConfigurationID", guid(id))
        .with("ConfigurationDataRoot", root.as_str())
        .with("ConfigurationFile", file("vmcx"))
        .with("GuestStateDataRoot", root.as_str())
        .with("GuestStateFile", file("vmgs"))
        .with("SnapshotDataRoot", other(&vm.hardware.snapshot_root))
        .with("SuspendDataRoot", other(&vm.hardware.suspend_root))
        .with("SwapFileDataRoot", other(&vm.hardware.swap_root))
        .with("Version", vm.version.as_str())
        .with("UserSnapshotType", vm.shape.user_snapshot_type)
        .with("IncrementalBackupEnabled", false)
        .with("IsSaved", vm.power == Power::Saved)
        .with("Architecture", "x64")
        .with("SecureBootEnabled", vm.generation == 2)
}

fn active_settings(vm: &Vm, kind: &str) -> Object {
    settings(vm, vm.id, kind, VM_FOLDER)
        .with("ElementName", vm.name.as_str())
        .with("CreationTime", datetime(vm.created))
}

fn checkpoint_settings(vm: &Vm, c: &Checkpoint) -> Object {
    let kind = if c.recovery { "Recovery" } else { "Realized" };
    let object =
        settings(vm, c.id, &format!("Microsoft:Hyper-V:Snapshot:{kind}"), CHECKPOINT_FOLDER)
            .with("ElementName", c.name.as_str())
            .with("Notes", vec![c.notes.as_str()])
            .with("IsSaved", c.saved)
            .with("IsAutomaticSnapshot", false)
            .with("CreationTime", datetime(c.created));
    match c.parent {
        Some(parent) => object.with("Parent", checkpoint_path(parent)),
        None => object,
    }
}

/// A checkpoint of a planned VM.
fn planned_checkpoint(vm: &Vm, c: &Checkpoint) -> Object {
    let kind = if c.missing { "Missing" } else { "Planned" };
    checkpoint_settings(vm, c)
        .with("VirtualSystemType", format!("Microsoft:Hyper-V:Snapshot:{kind}"))
}

/// InstanceID of a disk's SASD in the settings `config` (VM or checkpoint).
fn sasd_id(config: Uuid, disk: &Disk) -> String {
    format!("Microsoft:{}\\{}\\0\\{}\\L", guid(config), guid(disk.id), disk.location)
}

fn drive_id(config: Uuid, disk: &Disk) -> String {
    format!("Microsoft:{}\\{}\\0\\{}\\D", guid(config), guid(disk.id), disk.location)
}

fn disk_settings(config: Uuid, disk: &Disk, path: Option<&std::path::Path>) -> Vec<Object> {
    let drive = drive_id(config, disk);
    let drive_path = path_of(RASD, &[("InstanceID", &drive)]);
    let slot = Object::new(RASD, drive_path.clone())
        .with("InstanceID", drive)
        .with("ResourceType", 17_u16)
        .with("AddressOnParent", disk.location.to_string())
        .with("Parent", facts::controller_of(config, disk));
    if let Some((kind, device)) = facts::device(config, disk, &drive_path) {
        // An adapter has no drive.
        return if kind.is_empty() {
            vec![device]
        } else {
            vec![slot.with("ResourceSubType", kind), device]
        };
    }
    let Some(path) = path else {
        return vec![
            slot.with("ResourceSubType", "Microsoft:Hyper-V:Physical Disk Drive").with(
                "HostResource",
                vec![r#"Msvm_DiskDrive.DeviceID="Microsoft:PhysicalDrive1""#],
            ),
        ];
    };
    let id = sasd_id(config, disk);
    let disk = Object::new(SASD, path_of(SASD, &[("InstanceID", &id)]))
        .with("InstanceID", id)
        .with("ResourceType", 31_u16)
        .with("ResourceSubType", "Microsoft:Hyper-V:Virtual Hard Disk")
        .with("Parent", Value::Ref(drive_path))
        .with("Address", "")
        .with("HostResource", vec![path.display().to_string()])
        .with("PersistentReservationsSupported", false)
        .with("CachingMode", 2_u16);
    vec![slot.with("ResourceSubType", "Microsoft:Hyper-V:Synthetic Disk Drive"), disk]
}

/// Object path of a disk's settings.
pub(crate) fn disk_path(config: Uuid, disk: &Disk) -> String {
    path_of(SASD, &[("InstanceID", &sasd_id(config, disk))])
}

/// Everything that the active settings and every checkpoint consist of.
fn all_parts(vm: &Vm) -> Vec<Object> {
    let mut parts = all_disks(vm);
    parts.extend(devices::all(vm));
    parts
}

/// Drives and disks of the active settings and of every checkpoint.
fn all_disks(vm: &Vm) -> Vec<Object> {
    let mut out = facts::controllers(vm, vm.id);
    out.extend(vm.disks.iter().flat_map(|d| disk_settings(vm.id, d, d.leaf())));
    for checkpoint in &vm.checkpoints {
        out.extend(facts::controllers(vm, checkpoint.id));
        for frozen in &checkpoint.disks {
            let former = || Disk {
                id: frozen.disk,
                location: frozen.location,
                chain: frozen.chain.clone(),
                device: None,
                size: 0,
                disk_id: Uuid::nil(),
            };
            let disk = vm.disk(frozen.disk).cloned().unwrap_or_else(former);
            out.extend(disk_settings(checkpoint.id, &disk, Some(&frozen.path)));
        }
        // Disks that it left out are listed, too.
        for disk in vm.disks.iter().filter(|d| !d.is_virtual()) {
            out.extend(disk_settings(checkpoint.id, disk, None));
        }
    }
    out
}

fn reference_point_id(vm: &Vm, id: Uuid) -> String {
    format!("Microsoft:{}\\{}", vm.guid(), guid(id))
}

/// Object path of a reference point.
pub(crate) fn reference_point_path(vm: &Vm, id: Uuid) -> String {
    path_of(REFERENCE_POINT, &[("InstanceID", &reference_point_id(vm, id))])
}

fn reference_point(vm: &Vm, point: &ReferencePoint) -> Object {
    // Not in the order of the disks: they are to be paired by identifier.
    let pairs = || point.marks.iter().rev().filter_map(|(id, mark)| Some((vm.disk(*id)?, mark)));
    let disks: Vec<String> = pairs().map(|(d, _)| sasd_id(vm.id, d)).collect();
    let ids: Vec<String> = pairs().map(|(_, mark)| mark.clone()).collect();
    Object::new(REFERENCE_POINT, reference_point_path(vm, point.id))
        .with("InstanceID", reference_point_id(vm, point.id))
        .with("VirtualSystemIdentifier", vm.guid())
        .with("ReferencePointType", 2_u16)
        .with("ConsistencyLevel", u32::from(point.consistency))
        .with("VirtualDiskIdentifiers", disks)
        .with("ResilientChangeTrackingIdentifiers", ids)
}

/// Object path of a job.
pub(crate) fn job_path(id: &str) -> String {
    path_of("Msvm_ConcreteJob", &[("InstanceID", id)])
}

fn job(job: &Job) -> Object {
    let id = guid(job.id);
    let good = matches!(job.state, COMPLETED | WARNINGS);
    Object::new("Msvm_ConcreteJob", job_path(&id))
        .with("InstanceID", id)
        .with("ElementName", job.method.as_str())
        .with("JobState", job.state)
        .with("JobStatus", if good { "Job is completed successfully" } else { "" })
        .with("JobType", job.kind)
        .with("PercentComplete", if job.state == RUNNING { 50_u16 } else { 100 })
        .with("ErrorCode", job.error_code)
        .with("ErrorDescription", job.error.as_str())
        .with("ErrorSummaryDescription", job.error.as_str())
        .with("StartTime", datetime(job.started))
        .with("Cancellable", false)
}

fn service(class: &str, name: &str, host: &str) -> Object {
    let keys = [
        ("CreationClassName", class),
        ("Name", name),
        ("SystemCreationClassName", "Msvm_ComputerSystem"),
        ("SystemName", host),
    ];
    keys.iter().fold(Object::new(class, path_of(class, &keys)), |o, (k, v)| o.with(k, *v))
}

/// CIM datetime, in UTC.
pub(super) fn datetime(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days since 1970 (proleptic Gregorian calendar, years from March on).
    let z = days + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 { month_index + 3 } else { month_index - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}.000000+000")
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_datetime_is_the_civil_one() {
        assert_eq!(super::datetime(951_782_400), "20000229000000.000000+000");
        assert_eq!(super::datetime(1_735_689_599), "20241231235959.000000+000");
    }
}
