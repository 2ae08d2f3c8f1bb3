//! What commonly stops a restored VM from starting, mended while it is only planned (R5; facts, section 9.3 steps 3 to 7).
//! Each mended thing is one sentence of the report.

use std::path::Path;

use outrider_proto::ids::VmGuid;
use outrider_proto::manifest::Switch;
use outrider_wmi::{Object, Value};

use super::{odd, slots};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::hyperv::HyperV;
use crate::hypervisor::hyperv::machine::{
    CONNECTION, DISABLED, PORT, asked_switch, is_image, switch_path,
};
use crate::hypervisor::hyperv::wql::{self, SETTINGS, literal};
use crate::hypervisor::{Networks, NewVm, RestoredCheckpoint};
use crate::lease::Lease;

const COMPONENT: &str = "Msvm_VirtualSystemSettingDataComponent";
const MISSING: &str = "Microsoft:Hyper-V:Snapshot:Missing";
/// Folders of a VM: property, and what it is for.
const ROOTS: [(&str, &str); 5] = [
    ("ConfigurationDataRoot", "configuration folder"),
    ("SnapshotDataRoot", "checkpoint folder"),
    ("SwapFileDataRoot", "Smart Paging folder"),
    ("SuspendDataRoot", "saved state folder"),
    ("GuestStateDataRoot", "guest state folder"),
];

impl HyperV {
    /// Fits a planned VM to this host; gives what was mended.
    pub(super) async fn mend(
        &self,
        lease: &Lease,
        planned: VmGuid,
        new: &NewVm,
    ) -> Result<Vec<String>, HypervisorError> {
        let reading = "read the planned VM";
        let path = self.planned_path(planned).await?;
        let settings = self
            .associated(reading, &path, "Msvm_SettingsDefineState", SETTINGS)
            .await?
            .into_iter()
            .next()
            .ok_or_else(|| odd(reading, "it has no settings"))?;
        let parts = self.associated(reading, &settings.path, COMPONENT, "").await?;
        let mut mended = Vec::new();

        let disks = slots::assign(&parts, &new.disks, new.as_it_was)?;
        self.modify(lease, "set the disks of the planned VM", &disks.set).await?;
        self.take_out(lease, "take disks out of the planned VM", &disks.out).await?;
        mended.extend(disks.out.iter().map(|disk| slots::told(disk, "the VM")));
        self.mend_checkpoints(lease, planned, new, &mut mended).await?;
        self.fit_devices(lease, &parts, new, &mut mended).await?;
        let roots: Vec<&str> = ROOTS.iter().filter_map(|(root, _)| settings.str(root)).collect();
        let absent = absent(roots.into_iter()).await;
        let settings = rooted(settings, new, &absent, &mut mended);
        let args = vec![("SystemSettings", Value::Object(Box::new(settings)))];
        self.manage(lease, "name the planned VM", "ModifySystemSettings", args).await?;
        Ok(mended)
    }

    /// Connects adapters to switches of this host, and ejects images that are not here.
    async fn fit_devices(
        &self,
        lease: &Lease,
        parts: &[Object],
        new: &NewVm,
        mended: &mut Vec<String>,
    ) -> Result<(), HypervisorError> {
        let connections = connections(parts, &self.switches().await?, new, mended)?;
        self.modify(lease, "connect the adapters of the planned VM", &connections).await?;
        let absent = absent(parts.iter().filter_map(image_of)).await;
        let is_missing =
            |o: &&Object| image_of(o).is_some_and(|file| absent.iter().any(|gone| gone == file));
        let missing: Vec<&Object> = parts.iter().filter(is_missing).collect();
        for image in &missing {
            mended.push(format!(
                "the image {:?} is not there for this host: it was ejected",
                image_of(image).unwrap_or_default()
            ));
        }
        self.take_out(lease, "eject missing images", &missing).await
    }

    async fn modify(
        &self,
        lease: &Lease,
        doing: &str,
        settings: &[Object],
    ) -> Result<(), HypervisorError> {
        if settings.is_empty() {
            return Ok(());
        }
        let objects = settings.iter().map(|o| Value::Object(Box::new(o.clone()))).collect();
        let args = vec![("ResourceSettings", Value::Array(objects))];
        self.manage(lease, doing, "ModifyResourceSettings", args).await?;
        Ok(())
    }

    async fn take_out(
        &self,
        lease: &Lease,
        doing: &str,
        parts: &[&Object],
    ) -> Result<(), HypervisorError> {
        if parts.is_empty() {
            return Ok(());
        }
        let paths: Vec<Value> = parts.iter().map(|o| Value::Ref(o.path.clone())).collect();
        let args = vec![("ResourceSettings", Value::Array(paths))];
        self.manage(lease, doing, "RemoveResourceSettings", args).await?;
        Ok(())
    }

    async fn checkpoints_of_planned(
        &self,
        planned: VmGuid,
    ) -> Result<Vec<Object>, HypervisorError> {
        let wql = format!(
            "SELECT * FROM {SETTINGS} WHERE VirtualSystemIdentifier={}",
            literal(&wql::guid(planned.0))
        );
        let mut found = self.query("list the checkpoints of the planned VM", &wql).await?;
        found.retain(|o| o.str("VirtualSystemType").is_some_and(|t| t.contains(":Snapshot:")));
        Ok(found)
    }

    /// Checkpoints that are not restored are taken out: realizing fails for the first one that is missing.
    async fn mend_checkpoints(
        &self,
        lease: &Lease,
        planned: VmGuid,
        new: &NewVm,
        mended: &mut Vec<String>,
    ) -> Result<(), HypervisorError> {
        let mut found = self.checkpoints_of_planned(planned).await?;
        let is_missing = |o: &Object| o.str("VirtualSystemType") == Some(MISSING);
        if let Some(folder) = &new.checkpoints
            && found.iter().any(is_missing)
        {
            let args = vec![
                ("PlannedSystem", Value::Ref(self.planned_path(planned).await?)),
                ("SnapshotFolder", folder.display().to_string().into()),
            ];
            let doing = "import the checkpoints of the planned VM";
            self.manage(lease, doing, "ImportSnapshotDefinitions", args).await?;
            found = self.checkpoints_of_planned(planned).await?;
        }
        for settings in found {
            let name = settings.str("ElementName").unwrap_or_default();
            if !is_missing(&settings)
                && let Some(restored) = restored_as(&settings, &new.restored_checkpoints)
            {
                self.fix_checkpoint(lease, &settings, restored, new, mended).await?;
                continue;
            }
            let doing = format!("take the checkpoint {name:?} out of the planned VM");
            self.destroy_snapshot(lease, &doing, &settings.path).await?;
            mended.push(match new.checkpoints {
                None => format!(
                    "the checkpoint {name:?} was not restored: the VM has the state of the recovery point"
                ),
                Some(_) => format!(
                    "the checkpoint {name:?} cannot be told to be one of the recovery point: it was removed"
                ),
            });
        }
        Ok(())
    }

    /// Fits a checkpoint's own settings, as those of the VM. Whoever applies it gets what they name; adapters and images stop no VM
    /// from coming back, so that what fails about them is told.
    async fn fix_checkpoint(
        &self,
        lease: &Lease,
        settings: &Object,
        restored: &RestoredCheckpoint,
        new: &NewVm,
        mended: &mut Vec<String>,
    ) -> Result<(), HypervisorError> {
        let reading = "read a checkpoint of the planned VM";
        let parts = self.associated(reading, &settings.path, COMPONENT, "").await?;
        let disks = slots::assign(&parts, &restored.disks, false)?;
        self.modify(lease, "set the disks of a checkpoint of the planned VM", &disks.set).await?;
        let doing = "take disks out of a checkpoint of the planned VM";
        self.take_out(lease, doing, &disks.out).await?;
        let of = format!("the checkpoint {:?}", restored.name);
        mended.extend(disks.out.iter().map(|disk| slots::told(disk, &of)));
        let mut of_it = Vec::new();
        // Told with the VM itself: its adapters' addresses.
        let as_told = NewVm { keep_guid: true, ..new.clone() };
        match self.fit_devices(lease, &parts, &as_told, &mut of_it).await {
            Ok(()) => {}
            Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
            Err(e) => {
                let what = format!("its adapters and images could not be fitted to this host: {e}");
                of_it = vec![what];
            }
        }
        let name = &restored.name;
        mended.extend(of_it.into_iter().map(|what| format!("in the checkpoint {name:?}: {what}")));
        Ok(())
    }
}

/// Which restored checkpoint settings are of: by GUID, else by a name that only one has, for a VM that gets a new GUID may
/// get checkpoints of new GUIDs.
fn restored_as<'a>(
    settings: &Object,
    restored: &'a [RestoredCheckpoint],
) -> Option<&'a RestoredCheckpoint> {
    let id = wql::settings_guid(settings);
    let same = restored.iter().find(|r| Some(r.id) == id);
    same.or_else(|| {
        let mut named = restored.iter().filter(|r| settings.str("ElementName") == Some(&r.name));
        named.next().filter(|_| named.next().is_none())
    })
}

/// The image in a drive.
fn image_of(settings: &Object) -> Option<&str> {
    let file = settings.array("HostResource").first().and_then(Value::as_str);
    file.filter(|file| is_image(settings) && !file.is_empty())
}

/// Those of the files and folders that do not exist. Looks elsewhere: an image may lie on a server that does not answer.
async fn absent<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut paths: Vec<String> = paths.map(str::to_owned).collect();
    let look = move || {
        paths.retain(|path| !Path::new(path).exists());
        paths
    };
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

/// How one connection is made.
#[derive(Debug, PartialEq, Eq)]
enum Way<'a> {
    /// As it is: the switch is there.
    Same,
    /// To this switch.
    To(&'a Switch),
    /// Not at all.
    Off,
}

fn find<'a>(switches: &'a [Switch], wanted: &str) -> Option<&'a Switch> {
    let by_id = switches.iter().find(|s| s.id.eq_ignore_ascii_case(wanted));
    by_id.or_else(|| switches.iter().find(|s| s.name == wanted))
}

/// A choice, else the same GUID, else the same name, else nothing.
fn way<'a>(
    asked: &Switch,
    switches: &'a [Switch],
    networks: &Networks,
) -> Result<Way<'a>, HypervisorError> {
    if networks.disconnect {
        return Ok(Way::Off);
    }
    let chosen = networks
        .choices
        .iter()
        .find(|(from, _)| from.eq_ignore_ascii_case(&asked.id) || *from == asked.name);
    if let Some((from, to)) = chosen {
        let found = find(switches, to).ok_or_else(|| {
            odd("connect the adapters", &format!("no switch {to:?} here to take {from:?}'s place"))
        })?;
        return Ok(Way::To(found));
    }
    if switches.iter().any(|s| s.id.eq_ignore_ascii_case(&asked.id)) {
        return Ok(Way::Same);
    }
    let named = switches.iter().find(|s| !asked.name.is_empty() && s.name == asked.name);
    Ok(named.map_or(Way::Off, Way::To))
}

/// The connections that have to be changed.
fn connections(
    parts: &[Object],
    switches: &[Switch],
    new: &NewVm,
    mended: &mut Vec<String>,
) -> Result<Vec<Object>, HypervisorError> {
    let mut out = Vec::new();
    for port in parts.iter().filter(|o| o.str("ResourceSubType").is_some_and(is_adapter)) {
        let name = port.str("ElementName").unwrap_or_default();
        let mac = port.str("Address").unwrap_or_default();
        if !new.keep_guid && port.bool("StaticMacAddress") == Some(false) && !mac.is_empty() {
            mended.push(format!(
                "the adapter {name:?} had the dynamic address {mac}: it gets another one"
            ));
        }
        let slot = port.str("InstanceID").and_then(wql::slot).unwrap_or_default();
        let of_port = |o: &&Object| {
            o.class == CONNECTION
                && o.str("InstanceID").and_then(wql::slot).is_some_and(|s| s.starts_with(slot))
        };
        for connection in parts.iter().filter(of_port) {
            let Some(asked) = asked_switch(connection, switches) else { continue };
            let mut changed = connection.clone();
            match way(&asked, switches, &new.networks)? {
                Way::Same => continue,
                Way::To(switch) => {
                    mended.push(format!(
                        "the adapter {name:?} was connected to the switch {:?}: here it is connected to {:?}",
                        asked.name, switch.name
                    ));
                    // A path in a text: the transport makes it whole.
                    let path = Value::Ref(switch_path(&switch.id));
                    changed.set("HostResource", Value::Array(vec![path]));
                }
                Way::Off => {
                    mended.push(if new.networks.disconnect {
                        format!("the adapter {name:?} was left unconnected, as asked")
                    } else {
                        format!(
                            "the adapter {name:?} was connected to the switch {:?}, which this host does not have: it was \
                             left unconnected; connect it, or restore with --switch {:?}=NEW",
                            asked.name, asked.name
                        )
                    });
                    changed.set("EnabledState", u32::try_from(DISABLED).unwrap_or(3));
                }
            }
            out.push(changed);
        }
    }
    Ok(out)
}

fn is_adapter(kind: &str) -> bool {
    kind.ends_with("Ethernet Port") || kind == PORT
}

/// Name and folders of the VM; folders that do not exist here are told.
fn rooted(
    mut settings: Object,
    new: &NewVm,
    absent: &[String],
    mended: &mut Vec<String>,
) -> Object {
    let folder = new.folder.display().to_string();
    for (property, what) in ROOTS {
        // Hosts before version 1709 (Server 2016) have no folder for guest state, and refuse settings that name it.
        if settings.iter().all(|(name, _)| !name.eq_ignore_ascii_case(property)) {
            continue;
        }
        let before = settings.str(property).unwrap_or_default().to_owned();
        if !before.is_empty() && before != folder && absent.contains(&before) {
            mended.push(format!(
                "the {what} {before:?} does not exist here: it was reset to the VM's own folder"
            ));
        }
        settings.set(property, folder.as_str());
    }
    settings.set("ElementName", new.name.as_str());
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_is_chosen_else_found_by_id_else_by_name_else_left_off() {
        let switch = |id: &str, name: &str| Switch { id: id.into(), name: name.into() };
        let here = [switch("A1", "LAN"), switch("B2", "Storage")];
        let none = Networks::default();
        let chosen = |asked: &Switch, networks: &Networks| {
            way(asked, &here, networks).map_err(|e| e.to_string())
        };
        assert_eq!(chosen(&switch("a1", "old"), &none), Ok(Way::Same));
        assert_eq!(chosen(&switch("X", "LAN"), &none), Ok(Way::To(&here[0])));
        assert_eq!(chosen(&switch("X", "DMZ"), &none), Ok(Way::Off));
        assert_eq!(chosen(&switch("X", ""), &none), Ok(Way::Off), "no name is no name");
        let choices = Networks {
            choices: vec![("DMZ".into(), "b2".into()), ("A1".into(), "Nowhere".into())],
            disconnect: false,
        };
        assert_eq!(chosen(&switch("X", "DMZ"), &choices), Ok(Way::To(&here[1])));
        chosen(&switch("A1", "LAN"), &choices).expect_err("no such switch here");
        let off = Networks { disconnect: true, ..Networks::default() };
        assert_eq!(chosen(&switch("A1", "LAN"), &off), Ok(Way::Off));
    }

    #[test]
    fn a_folder_that_does_not_exist_is_reset_and_told_once() {
        let new = NewVm { folder: "/restored".into(), name: "web".into(), ..NewVm::default() };
        let before = Object::new(SETTINGS, "s")
            .with("SnapshotDataRoot", "/nowhere/to/be/found")
            .with("SwapFileDataRoot", "/");
        let mut mended = Vec::new();
        let absent = ["/nowhere/to/be/found".to_owned()];
        let after = rooted(before, &new, &absent, &mut mended);
        assert_eq!(after.str("SnapshotDataRoot"), Some("/restored"));
        assert_eq!(after.str("SwapFileDataRoot"), Some("/restored"));
        assert_eq!(after.get("GuestStateDataRoot"), &Value::Null, "this host has none");
        assert_eq!(mended.len(), 1, "{mended:?}");
        assert!(mended[0].contains("checkpoint folder"), "{mended:?}");
    }
}
