//! Recovery checkpoints: make, name, look into, remove.
//!
//! Hyper-V gives a new checkpoint a name of its own choice; ours is set right afterwards. Between the two calls the
//! checkpoint is told from others by being the one that was not there before (another product's recovery checkpoint
//! would have made ours fail). What a crash leaves there is the duty's business: see `job::leftovers`.

use std::path::PathBuf;

use outrider_proto::ids::{CheckpointId, VmGuid};
use outrider_wmi::{NS_VIRTUALIZATION, Object, Value, WmiError};

use super::HyperV;
use super::call::{Call, provider};
use super::disks::described;
use super::wql::{self, RECOVERY, SETTINGS, literal};
use crate::hypervisor::error::{HypervisorError, Retry};
use crate::hypervisor::{Checkpoint, CheckpointRequest, FrozenDisk};
use crate::lease::Lease;

const SERVICE: &str = "Msvm_VirtualSystemSnapshotService";
const SNAPSHOT_TYPE_RECOVERY: u32 = 32768;
/// ConsistencyLevel and GuestBackupType.
const APPLICATION: u32 = 1;
const CRASH: u32 = 2;
/// Windows 10, version 1703: Server 2016 (14393) has no GuestBackupType, and refuses settings with a property that it does not
/// know. There the guest's writers get what the host chooses.
const GUEST_BACKUP_TYPE_SINCE: u32 = 15_063;
const GUEST_FULL: u32 = 1;
const GUEST_COPY: u32 = 2;
/// Resource type of virtual disks.
const VIRTUAL_DISK: u64 = 31;
const VIRTUAL_DISK_KIND: &str = "Microsoft:Hyper-V:Virtual Hard Disk";
/// Files of a configuration set.
const CONFIG_EXTENSIONS: [&str; 6] = ["vmcx", "VMCX", "vmrs", "VMRS", "vmgs", "VMGS"];

impl HyperV {
    pub(super) async fn recovery_checkpoints(
        &self,
        vm: VmGuid,
    ) -> Result<Vec<Checkpoint>, HypervisorError> {
        let wql = format!(
            "SELECT * FROM {SETTINGS} WHERE VirtualSystemIdentifier={} AND VirtualSystemType={}",
            literal(&wql::guid(vm.0)),
            literal(RECOVERY)
        );
        let found = self.query("list the checkpoints of a VM", &wql).await?;
        if found.is_empty() {
            self.is_here(vm).await?;
        }
        Ok(found.iter().filter_map(checkpoint).collect())
    }

    pub(super) async fn create_recovery_checkpoint(
        &self,
        lease: &Lease,
        vm: VmGuid,
        name: &str,
        request: CheckpointRequest,
    ) -> Result<Checkpoint, HypervisorError> {
        let doing = format!("create a checkpoint of VM {vm}");
        let mut settings = Object::new("Msvm_VirtualSystemSnapshotSettingData", "")
            .with("ConsistencyLevel", if request.quiesce { APPLICATION } else { CRASH })
            .with("IgnoreNonSnapshottableDisks", true);
        if self.build().await?.is_none_or(|build| build >= GUEST_BACKUP_TYPE_SINCE) {
            let kind = if request.truncate_logs { GUEST_FULL } else { GUEST_COPY };
            settings.set("GuestBackupType", kind);
        }
        let before = self.recovery_checkpoints(vm).await?;
        let call = Call {
            doing: doing.clone(),
            service: SERVICE,
            path: String::new(),
            method: "CreateSnapshot",
            args: vec![
                ("AffectedSystem", Value::Ref(wql::vm_path(vm))),
                ("SnapshotSettings", Value::Object(Box::new(settings))),
                ("SnapshotType", SNAPSHOT_TYPE_RECOVERY.into()),
            ],
        };
        let occupied = || async {
            match self.made_since(vm, &before).await? {
                Some(other) => Err(HypervisorError::Occupied { vm, name: other.name }),
                None => Ok(()),
            }
        };
        match self.change_unless(lease, &call, occupied).await {
            Ok(_) => {}
            // Perhaps it was made: look.
            Err(e) if e.retry() == Retry::Inspect => {
                tracing::warn!(error = %e, "looking for the checkpoint that may have been made");
                if self.made_since(vm, &before).await?.is_none() {
                    return Err(e);
                }
            }
            Err(e) => return Err(self.unless_gone(vm, e).await),
        }
        let made = self.made_since(vm, &before).await?.ok_or_else(|| HypervisorError::Odd {
            doing: doing.clone(),
            detail: "it reports success, but there is no new recovery checkpoint".into(),
        })?;
        let checkpoint = made.id.to_string();
        match self.name_checkpoint(lease, made, name).await {
            Ok(named) => Ok(named),
            Err(e) => Err(match self.unless_gone(vm, e).await {
                e @ (HypervisorError::Lease(_) | HypervisorError::NoSuchVm { .. }) => e,
                e => HypervisorError::Nameless { checkpoint, source: Box::new(e) },
            }),
        }
    }

    /// What a refusal means when the VM left meanwhile, its checkpoint with it: the job goes on where the VM is.
    async fn unless_gone(&self, vm: VmGuid, error: HypervisorError) -> HypervisorError {
        if matches!(error, HypervisorError::Lease(_)) {
            return error;
        }
        match self.is_here(vm).await {
            Err(gone @ HypervisorError::NoSuchVm { .. }) => {
                tracing::info!(%error, "the VM left while its checkpoint was made");
                gone
            }
            _ => error,
        }
    }

    async fn made_since(
        &self,
        vm: VmGuid,
        before: &[Checkpoint],
    ) -> Result<Option<Checkpoint>, HypervisorError> {
        let now = self.recovery_checkpoints(vm).await?;
        Ok(now.into_iter().find(|c| before.iter().all(|b| b.id != c.id)))
    }

    async fn name_checkpoint(
        &self,
        lease: &Lease,
        mut made: Checkpoint,
        name: &str,
    ) -> Result<Checkpoint, HypervisorError> {
        let doing = format!("name the checkpoint {}", made.id);
        let mut settings = self.settings_of(&made).await?;
        settings.set("ElementName", name);
        let call = Call {
            doing,
            service: "Msvm_VirtualSystemManagementService",
            path: String::new(),
            method: "ModifySystemSettings",
            args: vec![("SystemSettings", Value::Object(Box::new(settings)))],
        };
        self.change(lease, &call).await?;
        made.name = name.to_owned();
        Ok(made)
    }

    async fn settings_of(&self, checkpoint: &Checkpoint) -> Result<Object, HypervisorError> {
        match self.wmi.get(NS_VIRTUALIZATION, &checkpoint.path).await {
            Ok(object) => Ok(object),
            Err(WmiError::NotFound { .. }) => {
                Err(HypervisorError::CheckpointGone { checkpoint: checkpoint.name.clone() })
            }
            Err(e) => Err(provider("read a checkpoint's settings")(e)),
        }
    }

    pub(super) async fn frozen_disks(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Vec<FrozenDisk>, HypervisorError> {
        let doing = "list the disks of a checkpoint";
        // Also finds out that the checkpoint is gone.
        self.settings_of(checkpoint).await?;
        let parts = self
            .associated(doing, &checkpoint.path, "Msvm_VirtualSystemSettingDataComponent", "")
            .await?;
        // Settings may name disks that the checkpoint did not freeze, shared ones for instance: the guest goes on writing there.
        let left_out: Vec<String> = described(&parts)
            .into_iter()
            .filter(|disk| disk.uncapturable.is_some())
            .map(|disk| disk.slot)
            .collect();
        let mut disks: Vec<FrozenDisk> = parts
            .iter()
            .filter(|o| is_virtual_disk(o))
            .filter_map(frozen)
            .filter(|disk| !left_out.contains(&disk.slot))
            .collect();
        disks.sort_by(|a, b| wql::order_of(&a.slot).cmp(&wql::order_of(&b.slot)));
        Ok(disks)
    }

    pub(super) async fn config_files(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Vec<PathBuf>, HypervisorError> {
        files_of(&self.settings_of(checkpoint).await?).await
    }

    /// Removes a checkpoint of any kind, of a VM or of a planned one.
    pub(super) async fn destroy_snapshot(
        &self,
        lease: &Lease,
        doing: &str,
        path: &str,
    ) -> Result<(), HypervisorError> {
        let call = Call {
            doing: doing.to_owned(),
            service: SERVICE,
            path: String::new(),
            method: "DestroySnapshot",
            args: vec![("AffectedSnapshot", Value::Ref(path.to_owned()))],
        };
        self.change(lease, &call).await.map(drop)
    }

    pub(super) async fn remove_checkpoint(
        &self,
        lease: &Lease,
        vm: VmGuid,
        checkpoint: &Checkpoint,
    ) -> Result<(), HypervisorError> {
        let call = Call {
            doing: format!("remove the checkpoint {:?} of VM {vm}", checkpoint.name),
            service: SERVICE,
            path: String::new(),
            method: "DestroySnapshot",
            args: vec![("AffectedSnapshot", Value::Ref(checkpoint.path.clone()))],
        };
        let failure = match self.change(lease, &call).await {
            Ok(_) => return Ok(()),
            Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
            Err(failure) => failure,
        };
        let left = self.recovery_checkpoints(vm).await?;
        if left.iter().any(|c| c.id == checkpoint.id) { Err(failure) } else { Ok(()) }
    }
}

pub(super) fn checkpoint(settings: &Object) -> Option<Checkpoint> {
    Some(Checkpoint {
        id: CheckpointId(wql::settings_guid(settings)?),
        name: settings.str("ElementName").unwrap_or_default().to_owned(),
        path: settings.path.clone(),
    })
}

/// The configuration files that settings (of a VM or a checkpoint) name and that exist.
///
/// # Errors
/// It cannot be told whether one exists: a volume that does not answer has not lost it.
pub(super) async fn files_of(settings: &Object) -> Result<Vec<PathBuf>, HypervisorError> {
    let settings = settings.clone();
    let looked = tokio::task::spawn_blocking(move || files_that_exist(&settings)).await;
    looked.unwrap_or_else(|e| {
        Err(HypervisorError::File { path: PathBuf::new(), reason: e.to_string() })
    })
}

/// As [`files_of`]. Blocks.
fn files_that_exist(settings: &Object) -> Result<Vec<PathBuf>, HypervisorError> {
    let text = |name| settings.str(name).unwrap_or_default();
    let set_of = |definition: &std::path::Path| {
        existing(CONFIG_EXTENSIONS.iter().map(|e| definition.with_extension(e)).collect())
    };
    let mut found = set_of(&joined(text("ConfigurationDataRoot"), text("ConfigurationFile")))?;
    if found.is_empty() && !text("ConfigurationID").is_empty() {
        // Where others look for a checkpoint's files, whatever its settings say.
        let name = format!("{}.vmcx", text("ConfigurationID"));
        found = set_of(&joined(text("ConfigurationDataRoot"), "Snapshots").join(name))?;
    }
    // The guest state may lie elsewhere.
    if !text("GuestStateFile").is_empty() {
        found.push(joined(text("GuestStateDataRoot"), text("GuestStateFile")));
        found = existing(found)?;
    }
    Ok(found)
}

/// Those of the files that there are. Blocks.
fn existing(named: Vec<PathBuf>) -> Result<Vec<PathBuf>, HypervisorError> {
    let mut found: Vec<PathBuf> = Vec::new();
    for file in named {
        if found.iter().any(|f| same_but_for_case(f, &file)) {
            continue;
        }
        match std::fs::metadata(&file) {
            Ok(metadata) if metadata.is_file() => found.push(file),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(HypervisorError::File { path: file, reason: e.to_string() }),
        }
    }
    Ok(found)
}

pub(super) fn is_virtual_disk(settings: &Object) -> bool {
    settings.u64("ResourceType") == Some(VIRTUAL_DISK)
        && settings.str("ResourceSubType") == Some(VIRTUAL_DISK_KIND)
}

fn frozen(settings: &Object) -> Option<FrozenDisk> {
    Some(FrozenDisk {
        slot: wql::slot(settings.str("InstanceID")?)?.to_owned(),
        path: PathBuf::from(settings.array("HostResource").first()?.as_str()?),
    })
}

/// A root folder and a relative path that may be written with either separator.
fn joined(root: &str, relative: &str) -> PathBuf {
    let mut path = PathBuf::from(root);
    path.extend(relative.split(['\\', '/']).filter(|p| !p.is_empty()));
    path
}

fn same_but_for_case(a: &std::path::Path, b: &std::path::Path) -> bool {
    cfg!(windows) && a.as_os_str().eq_ignore_ascii_case(b.as_os_str()) || a == b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_checkpoints_files_are_found_where_settings_say_else_by_its_id() {
        let dir = tempfile::tempdir().expect("a folder");
        let (root, id) = (dir.path(), "0B1C-2");
        let folder = root.join("Snapshots");
        std::fs::create_dir(&folder).expect("made");
        for extension in ["vmcx", "VMRS"] {
            std::fs::write(folder.join(id).with_extension(extension), b"x").expect("written");
        }
        let settings = |file: &str| {
            Object::new(SETTINGS, "p")
                .with("ConfigurationDataRoot", root.display().to_string())
                .with("ConfigurationID", id)
                .with("ConfigurationFile", file)
        };
        for file in [r"Snapshots\0B1C-2.vmcx", "elsewhere.vmcx", ""] {
            assert_eq!(files_of(&settings(file)).await.expect("told").len(), 2, "{file}");
        }
    }

    #[tokio::test]
    async fn only_a_file_that_is_not_there_is_absent() {
        use crate::hypervisor::error::Retry;
        let dir = tempfile::tempdir().expect("a folder");
        let of = |root: &std::path::Path| {
            Object::new(SETTINGS, "s")
                .with("ConfigurationDataRoot", root.display().to_string())
                .with("ConfigurationFile", r"Snapshots\A.vmcx")
        };
        assert_eq!(files_of(&of(dir.path())).await.expect("none"), [] as [PathBuf; 0]);
        std::fs::create_dir(dir.path().join("Snapshots")).expect("made");
        let file = dir.path().join("Snapshots").join("A.vmrs");
        std::fs::write(&file, b"state").expect("written");
        assert_eq!(files_of(&of(dir.path())).await.expect("one"), std::slice::from_ref(&file));
        // No answer: here, a file where a folder should be, which Windows calls absent, too.
        if cfg!(unix) {
            let unknown = files_of(&of(&file)).await.expect_err("it cannot be told");
            assert_eq!(unknown.retry(), Retry::Later, "{unknown}");
            assert!(unknown.to_string().contains("A.vmrs"), "{unknown}");
        }
    }
}
