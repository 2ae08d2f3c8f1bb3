//! Adapters, switches, drives and security settings, versions of a host, and guardians.

use outrider_wmi::{Object, Value};
use uuid::Uuid;

use crate::hardware::{Drive, Hardware, Nic, Security};
use crate::model::{Host, Vm, guid};
use crate::wql::path_of;

pub(super) const PORT: &str = "Msvm_SyntheticEthernetPortSettingData";
pub(super) const CONNECTION: &str = "Msvm_EthernetPortAllocationSettingData";
pub(super) const SWITCH: &str = "Msvm_VirtualEthernetSwitch";
pub(super) const SECURITY: &str = "Msvm_SecuritySettingData";
pub(super) const CAPABILITIES: &str = "Msvm_VirtualSystemManagementCapabilities";
const SASD: &str = "Msvm_StorageAllocationSettingData";
const RASD: &str = "Msvm_ResourceAllocationSettingData";
const VSSD: &str = "Msvm_VirtualSystemSettingData";

fn settings(class: &str, id: &str) -> Object {
    Object::new(class, path_of(class, &[("InstanceID", id)])).with("InstanceID", id)
}

/// Object path of a switch.
fn switch_path(id: Uuid) -> String {
    path_of(SWITCH, &[("CreationClassName", SWITCH), ("Name", &guid(id))])
}

/// The GUID in the object path of a switch.
pub(crate) fn switch_of(path: &str) -> Option<Uuid> {
    path.rsplit_once("Name=\"")?.1.trim_end_matches('"').parse().ok()
}

pub(super) fn switches(host: &Host) -> Vec<Object> {
    let switch = |s: &crate::hardware::Switch| {
        Object::new(SWITCH, switch_path(s.id))
            .with("CreationClassName", SWITCH)
            .with("Name", guid(s.id))
            .with("ElementName", s.name.as_str())
            .with("HealthState", 5_u16)
            .with("EnabledState", 2_u16)
    };
    host.equipment.switches.iter().map(switch).collect()
}

/// Object path of an adapter's settings.
pub(crate) fn port_path(config: Uuid, nic: &Nic) -> String {
    path_of(PORT, &[("InstanceID", &format!("Microsoft:{}\\{}", guid(config), guid(nic.id)))])
}

/// Object path of the settings of the first image.
pub(crate) fn image_path(config: Uuid, hardware: &Hardware) -> String {
    let id = hardware.drives.first().map(|d| drive_id(config, d, 'D')).unwrap_or_default();
    path_of(SASD, &[("InstanceID", &id)])
}

fn drive_id(config: Uuid, drive: &Drive, kind: char) -> String {
    format!("Microsoft:{}\\{}\\0\\{}\\{kind}", guid(config), guid(drive.id), drive.location)
}

/// Everything but disks in the settings `config` (VM or checkpoint).
pub(super) fn of(config: Uuid, hardware: &Hardware) -> Vec<Object> {
    let mut out = Vec::new();
    for nic in &hardware.nics {
        let id = format!("Microsoft:{}\\{}", guid(config), guid(nic.id));
        let port = settings(PORT, &id)
            .with("ElementName", nic.name.as_str())
            .with("ResourceType", 10_u16)
            .with("ResourceSubType", "Microsoft:Hyper-V:Synthetic Ethernet Port")
            .with("Address", nic.mac.as_str())
            .with("StaticMacAddress", nic.static_mac);
        if let Some(asked) = &nic.port {
            let connection = settings(CONNECTION, &format!("{id}\\C"))
                .with("ElementName", "Dynamic Ethernet Switch Port")
                .with("ResourceType", 33_u16)
                .with("ResourceSubType", "Microsoft:Hyper-V:Ethernet Connection")
                .with("Parent", Value::Ref(port.path.clone()))
                .with("HostResource", vec![switch_path(asked.switch)])
                .with("LastKnownSwitchName", asked.name.as_str())
                .with("EnabledState", if asked.enabled { 2_u16 } else { 3 });
            out.push(connection);
        }
        out.push(port);
    }
    for drive in &hardware.drives {
        let slot = drive_id(config, drive, 'L');
        let slot = settings(RASD, &slot)
            .with("ResourceType", 16_u16)
            .with("ResourceSubType", "Microsoft:Hyper-V:Synthetic DVD Drive")
            .with("AddressOnParent", drive.location.to_string());
        if let Some(image) = &drive.image {
            out.push(
                settings(SASD, &drive_id(config, drive, 'D'))
                    .with("ResourceType", 31_u16)
                    .with("ResourceSubType", "Microsoft:Hyper-V:Virtual CD/DVD Disk")
                    .with("Parent", Value::Ref(slot.path.clone()))
                    .with("HostResource", vec![image.display().to_string()]),
            );
        }
        out.push(slot);
    }
    let none = Security { tpm: false, shielded: false, guardians: Vec::new() };
    let security = hardware.security.as_ref().unwrap_or(&none);
    out.push(
        settings(SECURITY, &format!("Microsoft:{}\\Security", guid(config)))
            .with("TpmEnabled", security.tpm)
            .with("KsdEnabled", false)
            .with("ShieldingRequested", security.shielded)
            .with("DataProtectionRequested", false)
            .with("EncryptStateAndVmMigrationTraffic", security.tpm)
            .with("VirtualizationBasedSecurityOptOut", false),
    );
    out
}

/// Of the active settings and of every checkpoint.
pub(super) fn all(vm: &Vm) -> Vec<Object> {
    let checkpoints = vm.checkpoints.iter().flat_map(|c| of(c.id, &c.hardware));
    of(vm.id, &vm.hardware).into_iter().chain(checkpoints).collect()
}

pub(super) fn capabilities() -> Object {
    let id = "Microsoft:VirtualSystemManagementCapabilities";
    settings(CAPABILITIES, id)
        .with("ElementName", "Hyper-V Virtual System Management Service Capabilities")
}

/// Settings that define what the host can make: one per version, and some that are about other things.
pub(super) fn definitions(host: &Host) -> Vec<Object> {
    let version = |v: &String| {
        settings(VSSD, &format!("Microsoft:Definition\\VirtualSystem\\Version\\{v}"))
            .with("ElementName", format!("Version {v}"))
            .with("Version", v.as_str())
    };
    let isolation =
        settings(VSSD, "Microsoft:Definition\\VirtualSystem\\GuestStateIsolationType\\1")
            .with("GuestStateIsolationType", 1_u32);
    host.equipment.versions.iter().map(version).chain([isolation]).collect()
}

/// `root\Microsoft\Windows\Hgs`.
pub(super) fn guardians(host: &Host, class: &str) -> Option<Vec<Object>> {
    if class.eq_ignore_ascii_case("MSFT_HgsGuardian") {
        return Some(host.equipment.guardians.iter().map(|g| g.object(true)).collect());
    }
    // Its methods belong to the class.
    class
        .eq_ignore_ascii_case("MSFT_HgsKeyProtector")
        .then(|| vec![Object::new("MSFT_HgsKeyProtector", "MSFT_HgsKeyProtector")])
}
