//! VMs from restored files: import as a planned VM, mend it, validate, realize, grant rights, make highly available
//! (facts, section 9.3).

mod mend;
mod slots;

use std::path::Path;

use outrider_proto::ids::VmGuid;
use outrider_wmi::{NS_VIRTUALIZATION, Object, Value};

use super::HyperV;
use super::call::{Call, provider};
use super::wql::{self, PLANNED, REALIZED, SETTINGS, SYSTEM, literal};
use crate::hypervisor::error::{HypervisorError, Retry};
use crate::hypervisor::{Defined, NewVm, Power, VmSeen};
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
        let finished = self.realize(lease, planned, new).await;
        let (vm, mut mended) = match finished {
            Ok(finished) => finished,
            Err(e) => {
                if let Err(left) = self.give_up_planned(lease, planned).await {
                    tracing::warn!(vm = %planned, error = %left, "a planned VM may stay behind");
                }
                return Err(e);
            }
        };
        mended.extend(self.finish(lease, vm, new).await?);
        Ok(Defined { vm, mended })
    }

    /// Rights, saved state, cluster. There is a VM: what fails is told, and the VM stays.
    ///
    /// # Errors
    /// Only that the lease is over.
    pub(super) async fn finish(
        &self,
        lease: &Lease,
        vm: VmGuid,
        new: &NewVm,
    ) -> Result<Vec<String>, HypervisorError> {
        let mut mended = Vec::new();
        if let Err(e) = self.grant(vm, new).await {
            mended.push(format!(
                "the VM's account could not be given rights on {} ({e}); if it does not start with \"access denied\", grant \
                 them: icacls FOLDER /grant \"NT VIRTUAL MACHINE\\{vm}:(OI)(CI)F\" /T",
                new.folder.display()
            ));
        }
        if new.discard_saved_state {
            match self.discard_saved_state(lease, vm).await {
                Ok(told) => mended.extend(told),
                Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
                Err(e) => mended.push(format!(
                    "its saved state could not be discarded ({e}): do that before it is started (Remove-VMSavedState)"
                )),
            }
        }
        if new.clustered {
            match self.make_highly_available(lease, vm, new.group.as_ref()).await {
                Ok(notes) => mended.extend(notes),
                Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
                Err(e) => mended.push(format!("the VM is not highly available: {e}")),
            }
        }
        Ok(mended)
    }

    async fn discard_saved_state(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<Option<String>, HypervisorError> {
        if self.vm_state(vm).await?.vm.power != Power::Saved {
            return Ok(None);
        }
        self.request_state(lease, vm, TURN_OFF, "discard the saved state of").await?;
        Ok(Some("its saved state was discarded: it starts as after a power cut".into()))
    }

    /// Everything short of making the VM real, under a GUID of its own, and back.
    pub(super) async fn rehearse(&self, lease: &Lease, new: &NewVm) -> Result<(), HypervisorError> {
        let new = NewVm { keep_guid: false, clustered: false, ..new.clone() };
        let planned = self.import_definition(lease, &new).await?;
        let checked = async {
            self.mend(lease, planned, &new).await?;
            self.validate(lease, planned).await
        };
        let checked = checked.await;
        let given_up = self.give_up_planned(lease, planned).await;
        checked.and(given_up)
    }

    /// Gives the VM's account rights on its files. Blocks elsewhere.
    async fn grant(&self, vm: VmGuid, new: &NewVm) -> std::io::Result<()> {
        let (files, folder) = (self.files.clone(), new.folder.clone());
        tokio::task::spawn_blocking(move || files.grant(vm.0, &folder))
            .await
            .unwrap_or_else(|e| Err(std::io::Error::other(e)))
    }

    /// Removes VMs in the making that lie in a folder: an attempt that died left them.
    pub(super) async fn forget_planned_in(
        &self,
        lease: &Lease,
        folder: &Path,
    ) -> Result<(), HypervisorError> {
        let doing = "look for VMs in the making";
        for system in self.query(doing, &format!("SELECT * FROM {PLANNED}")).await? {
            let Some(planned) = wql::named_guid(&system) else { continue };
            let settings =
                self.associated(doing, &system.path, "Msvm_SettingsDefineState", SETTINGS).await;
            let settings = match settings {
                Err(e) if e.retry() != Retry::No => return Err(e),
                // One that arrives in a migration has none here.
                settings => settings.unwrap_or_default(),
            };
            let root = settings.first().and_then(|s| s.str("ConfigurationDataRoot"));
            if root.is_some_and(|root| Path::new(root).starts_with(folder)) {
                tracing::info!(vm = %planned, "removing a VM in the making that an earlier attempt left");
                self.give_up_planned(lease, planned).await?;
            }
        }
        Ok(())
    }

    /// The VM that is real and has its definition or a disk in a folder.
    pub(super) async fn real_vm_in(
        &self,
        folder: &Path,
    ) -> Result<Option<VmGuid>, HypervisorError> {
        let real =
            format!("SELECT * FROM {SETTINGS} WHERE VirtualSystemType={}", literal(REALIZED));
        let is_in = |o: &&Object| {
            o.str("ConfigurationDataRoot").is_some_and(|root| Path::new(root).starts_with(folder))
        };
        let defined = self.query("look for VMs in a folder", &real).await?;
        if let Some(vm) = defined.iter().find(is_in).and_then(wql::settings_guid) {
            return Ok(Some(VmGuid(vm)));
        }
        let has_disk = |vm: &&VmSeen| {
            vm.realized && vm.disks.iter().any(|disk| Path::new(&disk.path).starts_with(folder))
        };
        Ok(self.full_inventory().await?.vms.iter().find(has_disk).map(|vm| vm.guid))
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
                ("GenerateNewSystemIdentifier", (!new.keep_guid).into()),
            ]
            .into_iter()
            // Without checkpoints there is no folder of them: an empty text would be a path that does not exist.
            .chain(
                new.checkpoints.iter().map(|f| ("SnapshotFolder", f.display().to_string().into())),
            )
            .collect(),
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

    async fn realize(
        &self,
        lease: &Lease,
        planned: VmGuid,
        new: &NewVm,
    ) -> Result<(VmGuid, Vec<String>), HypervisorError> {
        let mended = self.mend(lease, planned, new).await?;
        self.validate(lease, planned).await?;
        let args = vec![("PlannedSystem", Value::Ref(self.planned_path(planned).await?))];
        let realized =
            self.manage(lease, "realize the planned VM", "RealizePlannedSystem", args).await;
        // A planned VM keeps its GUID when it becomes real.
        let vm = match realized {
            Ok(finished) => finished.affected(SYSTEM).and_then(wql::named_guid).unwrap_or(planned),
            Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
            // It may have been made all the same.
            Err(e) => match self.is_here(planned).await {
                Ok(()) => {
                    tracing::warn!(vm = %planned, error = %e, "the VM is there, whatever was said of it");
                    planned
                }
                Err(_) => return Err(e),
            },
        };
        Ok((vm, mended))
    }

    async fn validate(&self, lease: &Lease, planned: VmGuid) -> Result<(), HypervisorError> {
        let args = vec![("PlannedSystem", Value::Ref(self.planned_path(planned).await?))];
        self.manage(lease, "validate the planned VM", "ValidatePlannedSystem", args).await?;
        Ok(())
    }

    /// Removes a planned VM that cannot be finished.
    async fn give_up_planned(&self, lease: &Lease, planned: VmGuid) -> Result<(), HypervisorError> {
        let args = vec![("AffectedSystem", Value::Ref(self.planned_path(planned).await?))];
        let doing = format!("remove the planned VM {planned}");
        self.manage(lease, &doing, "DestroySystem", args).await?;
        Ok(())
    }

    /// The object path of a planned VM, as the provider writes it: what its CreationClassName is, is told nowhere.
    async fn planned_path(&self, planned: VmGuid) -> Result<String, HypervisorError> {
        let doing = "look for the planned VM";
        let name = literal(&wql::guid(planned.0));
        let found =
            self.query(doing, &format!("SELECT * FROM {PLANNED} WHERE Name={name}")).await?;
        found.into_iter().next().map(|o| o.path).ok_or(HypervisorError::NoSuchVm { vm: planned })
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
        let group = self.group_of(vm).await?.map(|(_, group)| group);
        self.remove_from_cluster(lease, vm).await?;
        let path = wql::vm_path(vm);
        if let Err(outrider_wmi::WmiError::NotFound { .. }) =
            self.wmi.get(NS_VIRTUALIZATION, &path).await
        {
            return Ok(());
        }
        let doing = format!("remove the definition of VM {vm}");
        let args = vec![("AffectedSystem", Value::Ref(path))];
        if let Err(e) = self.manage(lease, &doing, "DestroySystem", args).await {
            if let Some(group) = &group
                && !matches!(e, HypervisorError::Lease(_))
            {
                // The VM stays, so it stays highly available.
                let again = self.make_highly_available(lease, vm, Some(group)).await;
                tracing::warn!(%vm, ?again, "the VM could not be removed and was clustered again");
            }
            return Err(e);
        }
        // It is gone when it cannot be read any more.
        match self.wmi.get(NS_VIRTUALIZATION, &wql::vm_path(vm)).await {
            Err(outrider_wmi::WmiError::NotFound { .. }) => Ok(()),
            Ok(_) => Err(odd(&doing, "it reports success, but the VM is still there")),
            Err(e) => Err(provider(&doing)(e)),
        }
    }
}

fn odd(doing: &str, detail: &str) -> HypervisorError {
    HypervisorError::Odd { doing: doing.to_owned(), detail: detail.to_owned() }
}
