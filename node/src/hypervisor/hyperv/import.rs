//! VMs from restored files: import as a planned VM, fix the paths, validate, realize, make highly available.

use outrider_proto::ids::VmGuid;
use outrider_wmi::{NS_VIRTUALIZATION, Object, Value, embedded};

use super::HyperV;
use super::call::{Call, provider};
use super::snapshot::is_virtual_disk;
use super::wql::{self, PLANNED, SETTINGS, STORAGE, SYSTEM, system_path};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::{Defined, NewVm};
use crate::lease::Lease;

const SERVICE: &str = "Msvm_VirtualSystemManagementService";
/// Values of RequestStateChange.
pub(super) const RUN: u32 = 2;
pub(super) const TURN_OFF: u32 = 3;

impl HyperV {
    pub(super) async fn import_vm(
        &self,
        lease: &Lease,
        new: &NewVm,
    ) -> Result<Defined, HypervisorError> {
        let planned = self.import_definition(lease, new).await?;
        let made = match self.finish_planned(lease, planned, new).await {
            Ok(made) => made,
            Err(e) => {
                self.give_up_planned(lease, planned).await;
                return Err(e);
            }
        };
        if new.clustered {
            self.make_highly_available(lease, made).await?;
        }
        Ok(Defined { vm: made, mended: Vec::new() })
    }

    async fn import_definition(
        &self,
        lease: &Lease,
        new: &NewVm,
    ) -> Result<VmGuid, HypervisorError> {
        let doing = format!("import the definition {}", new.definition.display());
        let call = Call {
            doing: doing.clone(),
            service: SERVICE,
            path: String::new(),
            method: "ImportSystemDefinition",
            args: vec![
                ("SystemDefinitionFile", new.definition.display().to_string().into()),
                ("SnapshotFolder", "".into()),
                ("GenerateNewSystemIdentifier", (!new.keep_guid).into()),
            ],
        };
        let finished = self.change(lease, &call).await?;
        let named = finished.affected(PLANNED).and_then(wql::named_guid);
        let told = || {
            let path = finished.out.str("ImportedSystem")?;
            path.rsplit_once("Name=\"")?.1.trim_end_matches('"').parse().ok()
        };
        named.or_else(told).ok_or_else(|| HypervisorError::Odd {
            doing,
            detail: "it reports success and names no planned VM".into(),
        })
    }

    async fn finish_planned(
        &self,
        lease: &Lease,
        planned: VmGuid,
        new: &NewVm,
    ) -> Result<VmGuid, HypervisorError> {
        let path = system_path(PLANNED, planned);
        let reading = "read the planned VM";
        let mut settings = self
            .associated(reading, &path, "Msvm_SettingsDefineState", SETTINGS)
            .await?
            .into_iter()
            .next()
            .ok_or_else(|| odd(reading, "it has no settings"))?;
        let disks = self
            .associated(reading, &settings.path, "Msvm_VirtualSystemSettingDataComponent", STORAGE)
            .await?;
        let disks = fixed_disks(&disks, new)?;
        if !disks.is_empty() {
            self.manage(
                lease,
                "set the disks of the planned VM",
                "ModifyResourceSettings",
                vec![(
                    "ResourceSettings",
                    disks.iter().map(embedded::to_text).collect::<Vec<_>>().into(),
                )],
            )
            .await?;
        }
        let folder = new.folder.display().to_string();
        settings.set("ElementName", new.name.as_str());
        for root in [
            "ConfigurationDataRoot",
            "SnapshotDataRoot",
            "SwapFileDataRoot",
            "SuspendDataRoot",
            "GuestStateDataRoot",
        ] {
            settings.set(root, folder.as_str());
        }
        let text = embedded::to_text(&settings);
        self.manage(
            lease,
            "name the planned VM",
            "ModifySystemSettings",
            vec![("SystemSettings", text.into())],
        )
        .await?;
        let reference = Value::Ref(path);
        self.manage(
            lease,
            "validate the planned VM",
            "ValidatePlannedSystem",
            vec![("PlannedSystem", reference.clone())],
        )
        .await?;
        let finished = self
            .manage(
                lease,
                "realize the planned VM",
                "RealizePlannedSystem",
                vec![("PlannedSystem", reference)],
            )
            .await?;
        // A planned VM keeps its GUID when it becomes real.
        Ok(finished.affected(SYSTEM).and_then(wql::named_guid).unwrap_or(planned))
    }

    /// Removes a planned VM that cannot be finished; a failure is logged, the caller has the reason that matters.
    async fn give_up_planned(&self, lease: &Lease, planned: VmGuid) {
        let args = vec![("AffectedSystem", Value::Ref(system_path(PLANNED, planned)))];
        if let Err(e) = self.manage(lease, "remove the planned VM", "DestroySystem", args).await {
            tracing::warn!(vm = %planned, error = %e, "a planned VM stays behind");
        }
    }

    async fn manage(
        &self,
        lease: &Lease,
        doing: &str,
        method: &'static str,
        args: Vec<(&str, Value)>,
    ) -> Result<super::call::Finished, HypervisorError> {
        let call =
            Call { doing: doing.to_owned(), service: SERVICE, path: String::new(), method, args };
        self.change(lease, &call).await
    }

    pub(super) async fn request_state(
        &self,
        lease: &Lease,
        vm: VmGuid,
        wanted: u32,
        verb: &str,
    ) -> Result<(), HypervisorError> {
        let call = Call {
            doing: format!("{verb} VM {vm}"),
            service: SYSTEM,
            path: wql::vm_path(vm),
            method: "RequestStateChange",
            args: vec![("RequestedState", wanted.into())],
        };
        self.change(lease, &call).await?;
        Ok(())
    }

    pub(super) async fn destroy_system(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<(), HypervisorError> {
        self.remove_from_cluster(lease, vm).await?;
        let path = wql::vm_path(vm);
        if let Err(outrider_wmi::WmiError::NotFound { .. }) =
            self.wmi.get(NS_VIRTUALIZATION, &path).await
        {
            return Ok(());
        }
        let doing = format!("remove the definition of VM {vm}");
        self.manage(lease, &doing, "DestroySystem", vec![("AffectedSystem", Value::Ref(path))])
            .await?;
        // It is gone when it cannot be read any more.
        match self.wmi.get(NS_VIRTUALIZATION, &wql::vm_path(vm)).await {
            Err(outrider_wmi::WmiError::NotFound { .. }) => Ok(()),
            Ok(_) => Err(odd(&doing, "it reports success, but the VM is still there")),
            Err(e) => Err(provider(&doing)(e)),
        }
    }
}

/// The disks' settings with the restored files in them.
fn fixed_disks(disks: &[Object], new: &NewVm) -> Result<Vec<Object>, HypervisorError> {
    let mut out = Vec::new();
    for object in disks.iter().filter(|o| is_virtual_disk(o)) {
        let slot = object.str("InstanceID").and_then(wql::slot).unwrap_or_default();
        // With a new GUID the disk part of the slot may be new, too; controller and location are not.
        let place = |slot: &str| slot.split_once('\\').map(|(_, place)| place.to_ascii_lowercase());
        let same = new.disks.iter().find(|(s, _)| s.eq_ignore_ascii_case(slot));
        let file = same
            .or_else(|| new.disks.iter().find(|(s, _)| place(s) == place(slot)))
            .map(|(_, file)| file);
        let file = file.ok_or_else(|| {
            odd("set the disks of the planned VM", &format!("no restored disk for its slot {slot}"))
        })?;
        let mut object = object.clone();
        object.set("HostResource", vec![file.display().to_string()]);
        out.push(object);
    }
    Ok(out)
}

fn odd(doing: &str, detail: &str) -> HypervisorError {
    HypervisorError::Odd { doing: doing.to_owned(), detail: detail.to_owned() }
}
