//! Instances that tell what a VM is and how it is: integration components, summaries, replication, controllers, disks that
//! no checkpoint holds; and Windows itself.

use outrider_wmi::{Object, Value, embedded};
use uuid::Uuid;

use super::virtualization::{RASD, SASD, datetime};
use crate::model::{Disk, Power, State, Vm, guid};
use crate::shape::Device;
use crate::wql::path_of;

/// Integration components of a VM.
pub(super) const COMPONENTS: [&str; 5] = [
    "Msvm_VssComponent",
    "Msvm_HeartbeatComponent",
    "Msvm_ShutdownComponent",
    "Msvm_KvpExchangeComponent",
    "Msvm_TimeSyncComponent",
];

/// `root\cimv2`
pub(super) fn windows(state: &State, host: &str, class: &str) -> Option<Vec<Object>> {
    let is = |name: &str| class.eq_ignore_ascii_case(name);
    Some(if is("Win32_OperatingSystem") {
        vec![
            Object::new("Win32_OperatingSystem", "Win32_OperatingSystem=@")
                .with("BuildNumber", state.around.build(host).to_string())
                .with("Version", format!("10.0.{}", state.around.build(host)))
                .with("Caption", "Microsoft Windows Server")
                .with("CSName", host)
                .with("LastBootUpTime", datetime(state.hosts.get(host).map_or(0, |h| h.started))),
        ]
    } else if is("Win32_Service") {
        let service = |name: &str| {
            Object::new("Win32_Service", path_of("Win32_Service", &[("Name", name)]))
                .with("Name", name)
                .with("State", "Running")
                .with("StartMode", "Auto")
        };
        ["vmms", "ClusSvc", "Winmgmt"].map(service).to_vec()
    } else {
        return None;
    })
}

pub(super) fn integration(vm: &Vm, class: &str) -> Object {
    let keys = [
        ("CreationClassName", class),
        ("SystemCreationClassName", "Msvm_ComputerSystem"),
        ("SystemName", &vm.guid()),
    ];
    let set = match class {
        "Msvm_VssComponent" => vm.shape.backup_service,
        "Msvm_HeartbeatComponent" => vm.shape.heartbeat_service,
        "Msvm_KvpExchangeComponent" => vm.shape.exchange_service,
        _ => None,
    };
    let answers = vm.power == Power::Running && (vm.vss || class != "Msvm_VssComponent");
    let (enabled, status) = match set {
        Some(set) if vm.power == Power::Running => set,
        _ => (2, if answers { [2, 2] } else { [12, 2] }),
    };
    let object = keys
        .iter()
        .fold(Object::new(class, path_of(class, &keys)), |o, (k, v)| o.with(k, *v))
        .with("EnabledState", enabled)
        .with("OperationalStatus", status.to_vec());
    if class != "Msvm_KvpExchangeComponent" {
        return object;
    }
    // A guest that is not contacted tells nothing.
    let talks = enabled == 2 && matches!(status[0], 2 | 3);
    object.with("GuestIntrinsicExchangeItems", if talks { exchanged(vm) } else { Vec::new() })
}

fn exchanged(vm: &Vm) -> Vec<String> {
    let (os, version) = &vm.shape.guest_os;
    let items = [
        ("FullyQualifiedDomainName", vm.name.as_str()),
        ("OSName", os.as_str()),
        ("OSVersion", version.as_str()),
        ("IntegrationServicesVersion", version.as_str()),
        ("NetworkAddressIPv4", "192.0.2.7"),
    ];
    let item = |(name, data): (&str, &str)| {
        let item = Object::new("Msvm_KvpExchangeDataItem", "")
            .with("Name", name)
            .with("Data", data)
            .with("Source", 2_u16);
        embedded::to_text(&item)
    };
    items.into_iter().filter(|(_, data)| !data.is_empty()).map(item).collect()
}

pub(crate) fn summary(vm: &Vm) -> Object {
    let id = vm.guid();
    let relation = vm.shape.replication.first();
    Object::new("Msvm_SummaryInformation", path_of("Msvm_SummaryInformation", &[("Name", &id)]))
        .with("Name", id)
        .with("ElementName", vm.name.as_str())
        .with("Version", vm.version.as_str())
        .with("EnabledState", enabled_state(vm))
        .with("HealthState", 5_u16)
        .with("OperationalStatus", vm.operational_status().to_vec())
        .with("GuestOperatingSystem", vm.shape.guest_os.0.as_str())
        .with("ReplicationMode", relation.map_or(0, |r| r.mode))
        .with("ReplicationState", relation.map_or(0, |r| r.state))
        .with("ReplicationHealth", relation.map_or(0, |r| r.health))
        .with("IntegrationServicesVersionState", vm.shape.services_version)
}

/// What a summary shows when only some information is asked for: the rest is null.
pub(crate) fn summary_of(vm: &Vm, requested: &[u64]) -> Object {
    const NAMES: [(u64, &str); 11] = [
        (0, "Name"),
        (1, "ElementName"),
        (10, "Version"),
        (100, "EnabledState"),
        (106, "GuestOperatingSystem"),
        (109, "HealthState"),
        (110, "OperationalStatus"),
        (114, "ReplicationMode"),
        (115, "ReplicationState"),
        (116, "ReplicationHealth"),
        (121, "IntegrationServicesVersionState"),
    ];
    let all = summary(vm);
    let wanted = NAMES.iter().filter(|(id, _)| requested.contains(id));
    wanted.fold(Object::new(all.class.clone(), ""), |o, (_, name)| {
        o.with(name, all.get(name).clone())
    })
}

pub(super) fn enabled_state(vm: &Vm) -> u16 {
    if vm.shape.enabled_state == 0 { vm.power.enabled_state() } else { vm.shape.enabled_state }
}

pub(super) fn relationships(vm: &Vm) -> Vec<Object> {
    let one = |(number, relation): (usize, &crate::shape::Relation)| {
        let id = format!("Microsoft:{}\\HVR\\{number}", vm.guid());
        let class = "Msvm_ReplicationRelationship";
        Object::new(class, path_of(class, &[("InstanceID", &id)]))
            .with("InstanceID", id)
            .with("ReplicationState", relation.state)
            .with("ReplicationHealth", relation.health)
    };
    vm.shape.replication.iter().enumerate().map(one).collect()
}

fn controller_id(config: Uuid, kind: &str) -> String {
    // Well-known ids of the controllers of every VM.
    let id = match kind {
        PMEM => "7D3C0F2E-4F0C-4D3B-9A51-6B1D0E5C7A10",
        SCSI => "83F8638B-8DCA-4152-9EDA-2CA8B33039B4",
        _ => "5681CCB4-21C5-4D7D-A1A4-1E3C0F5A3C30",
    };
    format!("Microsoft:{}\\{id}\\0", guid(config))
}

const SCSI: &str = "Microsoft:Hyper-V:Synthetic SCSI Controller";
const IDE: &str = "Microsoft:Hyper-V:Emulated IDE Controller";
const PMEM: &str = "Microsoft:Hyper-V:Persistent Memory Controller";

/// The controllers of a configuration.
pub(super) fn controllers(vm: &Vm, config: Uuid) -> Vec<Object> {
    let controller = |kind: &str, number: u16| {
        let id = controller_id(config, kind);
        Object::new(RASD, path_of(RASD, &[("InstanceID", &id)]))
            .with("InstanceID", id)
            .with("ResourceType", number)
            .with("ResourceSubType", kind)
    };
    let mut out = Vec::new();
    if vm.generation == 1 || !vm.shape.scsi {
        out.push(controller(IDE, 5));
    }
    if vm.shape.scsi {
        out.push(controller(SCSI, 6));
    }
    if vm.disks.iter().any(|d| matches!(d.device, Some(Device::PersistentMemory(_)))) {
        out.push(controller(PMEM, 32771));
    }
    out
}

/// Object path of the controller that a disk's drive hangs on.
pub(super) fn controller_of(config: Uuid, disk: &Disk) -> Value {
    let kind = match disk.device {
        Some(Device::PersistentMemory(_)) => PMEM,
        _ => SCSI,
    };
    Value::Ref(path_of(RASD, &[("InstanceID", &controller_id(config, kind))]))
}

/// The settings of a disk that no checkpoint holds, besides its drive; and what kind of slot it is in.
pub(super) fn device(config: Uuid, disk: &Disk, drive: &str) -> Option<(&'static str, Object)> {
    let id = format!("Microsoft:{}\\{}\\0\\{}\\L", guid(config), guid(disk.id), disk.location);
    let file = |path: &std::path::Path, shared: bool| {
        Object::new(SASD, path_of(SASD, &[("InstanceID", &id)]))
            .with("InstanceID", id.as_str())
            .with("ResourceType", 31_u16)
            .with("ResourceSubType", "Microsoft:Hyper-V:Virtual Hard Disk")
            .with("Parent", Value::Ref(drive.to_owned()))
            .with("HostResource", vec![path.display().to_string()])
            .with("PersistentReservationsSupported", shared)
    };
    let slot = "Microsoft:Hyper-V:Synthetic Disk Drive";
    Some(match disk.device.as_ref()? {
        Device::Shared(path) | Device::VhdSet(path) => (slot, file(path, true)),
        Device::PersistentMemory(path) => (slot, file(path, false)),
        Device::FibreChannel => {
            let class = "Msvm_SyntheticFcPortSettingData";
            let port = Object::new(class, path_of(class, &[("InstanceID", &id)]))
                .with("InstanceID", id.as_str())
                .with("ResourceType", 7_u16)
                .with("ResourceSubType", "Microsoft:Hyper-V:Synthetic FibreChannel Port");
            ("", port)
        }
    })
}
