//! Names, paths and literals of WMI.

use outrider_proto::ids::VmGuid;
use outrider_wmi::Object;
use uuid::Uuid;

pub(super) const SYSTEM: &str = "Msvm_ComputerSystem";
pub(super) const PLANNED: &str = "Msvm_PlannedComputerSystem";
pub(super) const SETTINGS: &str = "Msvm_VirtualSystemSettingData";
pub(super) const STORAGE: &str = "Msvm_StorageAllocationSettingData";
pub(super) const RESOURCE: &str = "Msvm_ResourceAllocationSettingData";
pub(super) const REFERENCE_POINT: &str = "Msvm_VirtualSystemReferencePoint";

pub(super) const RECOVERY: &str = "Microsoft:Hyper-V:Snapshot:Recovery";
pub(super) const REALIZED: &str = "Microsoft:Hyper-V:System:Realized";

/// A GUID as Hyper-V writes it.
pub(super) fn guid(id: Uuid) -> String {
    id.hyphenated().to_string().to_uppercase()
}

/// The object path of a VM.
pub(super) fn vm_path(vm: VmGuid) -> String {
    format!("{SYSTEM}.CreationClassName=\"{SYSTEM}\",Name=\"{}\"", guid(vm.0))
}

/// A text literal, quotes included.
pub(super) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// The GUID that an InstanceID of settings starts with (`Microsoft:<GUID>...`).
pub(super) fn settings_guid(object: &Object) -> Option<Uuid> {
    let id = object.str("InstanceID")?.strip_prefix("Microsoft:")?;
    id.split('\\').next()?.parse().ok()
}

/// The stable tail of a disk's InstanceID: what follows the configuration's GUID.
pub(super) fn slot(instance_id: &str) -> Option<&str> {
    instance_id.strip_prefix("Microsoft:")?.split_once('\\').map(|(_, tail)| tail)
}

/// The InstanceID in an object path (`...Class.InstanceID="..."`), its doubled backslashes undone.
pub(super) fn instance_id_of(path: &str) -> Option<String> {
    let (_, rest) = path.split_once("InstanceID=\"")?;
    Some(rest.strip_suffix('"')?.replace("\\\\", "\\"))
}

/// Order of disks: by controller and location, which is how an administrator counts them.
pub(super) fn order_of(slot: &str) -> (u32, u32, &str) {
    let mut parts = slot.split('\\').skip(1).map(|p| p.parse().unwrap_or(u32::MAX));
    (parts.next().unwrap_or(u32::MAX), parts.next().unwrap_or(u32::MAX), slot)
}

/// A time as WMI writes it (`yyyymmddHHMMSS.ffffff+UUU`, minutes east of Greenwich), as Unix milliseconds.
pub(super) fn unix_ms(text: &str) -> Option<u64> {
    let local = jiff::civil::DateTime::strptime("%Y%m%d%H%M%S", text.get(..14)?).ok()?;
    let east: i64 = text.get(21..25)?.parse().ok()?;
    let utc = local.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_millisecond();
    u64::try_from(utc.checked_sub(east.checked_mul(60_000)?)?).ok()
}

/// The VM that an object is of, by its Name.
pub(super) fn named_guid(object: &Object) -> Option<VmGuid> {
    object.str("Name")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backslashes_of_instance_ids_are_doubled_in_literals() {
        assert_eq!(literal(r"Microsoft:A\B"), r"'Microsoft:A\\B'");
    }

    #[test]
    fn the_slot_is_what_vm_and_checkpoint_settings_have_in_common() {
        let of_vm = r"Microsoft:11111111-1111-1111-1111-111111111111\83F8638B\0\1\L";
        let of_checkpoint = r"Microsoft:22222222-2222-2222-2222-222222222222\83F8638B\0\1\L";
        assert_eq!(slot(of_vm), slot(of_checkpoint));
        assert_eq!(slot(of_vm), Some(r"83F8638B\0\1\L"));
    }
}
