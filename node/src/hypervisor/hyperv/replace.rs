//! Making a VM ready for being replaced by a restored one: stopped in its cluster's eyes, off, without checkpoints.

use std::path::PathBuf;

use outrider_process::backoff::Backoff;
use outrider_proto::ids::VmGuid;
use outrider_wmi::Object;
use tokio::time::Instant;

use super::HyperV;
use super::import::TURN_OFF;
use super::snapshot::files_of;
use super::user_checkpoints::USER_CHECKPOINT;
use super::wql::{self, SETTINGS, literal};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::{DiskAside, Power, SetAside, VmState};
use crate::lease::Lease;

impl HyperV {
    pub(super) async fn set_vm_aside(
        &self,
        lease: &Lease,
        vm: VmGuid,
        lost: &mut Vec<String>,
    ) -> Result<SetAside, HypervisorError> {
        let mut aside = SetAside {
            group: self.group_of(vm).await?.map(|(_, group)| group),
            ..SetAside::default()
        };
        let power = self.vm_state(vm).await?.vm.power;
        aside.ran = power == Power::Running;
        // First: a VM that stops while its cluster thinks it runs is a failure, and is started again.
        self.take_offline(lease, vm).await?;
        let state = self.vm_state(vm).await?;
        aside.name.clone_from(&state.vm.name);
        if state.vm.power != Power::Off {
            self.request_state(lease, vm, TURN_OFF, "turn off").await?;
            if power == Power::Saved {
                lost.push("the saved state of the VM that was replaced is gone".into());
            }
        }
        self.remove_all_checkpoints(lease, vm, lost).await?;
        let state = self.until_merged(lease, vm).await?;
        let disks = state.vm.disks.iter().filter(|d| !d.path.is_empty());
        aside.disks = disks
            .filter(|d| d.size > 0 || d.uncapturable.is_none())
            .map(|d| DiskAside {
                slot: d.slot.clone(),
                file: PathBuf::from(&d.path),
                id: d.disk_id,
            })
            .collect();
        aside.config = self.files_of_vm(vm).await?;
        Ok(aside)
    }

    /// The files that define a VM and go with its definition.
    pub(super) async fn files_of_vm(&self, vm: VmGuid) -> Result<Vec<PathBuf>, HypervisorError> {
        let files = match self.active_settings(vm).await? {
            Some(settings) => files_of(&settings).await?,
            None => return Err(HypervisorError::NoSuchVm { vm }),
        };
        let defines =
            |file: &PathBuf| file.extension().is_some_and(|e| e.eq_ignore_ascii_case("vmcx"));
        if files.iter().any(defines) {
            return Ok(files);
        }
        Err(HypervisorError::Odd {
            doing: format!("where the definition of VM {vm} is"),
            detail: "the file that it names (.vmcx) is not there, so the VM could not be brought back if it were replaced; \
                     restore under another name"
                .into(),
        })
    }

    async fn settings_by_type(
        &self,
        vm: VmGuid,
        kind: &str,
    ) -> Result<Vec<Object>, HypervisorError> {
        let wql = format!(
            "SELECT * FROM {SETTINGS} WHERE VirtualSystemIdentifier={} AND VirtualSystemType={}",
            literal(&wql::guid(vm.0)),
            literal(kind)
        );
        self.query("read the settings of a VM", &wql).await
    }

    /// Newest first; a sentence goes to `lost` for each that was an administrator's.
    async fn remove_all_checkpoints(
        &self,
        lease: &Lease,
        vm: VmGuid,
        lost: &mut Vec<String>,
    ) -> Result<(), HypervisorError> {
        for checkpoint in self.recovery_checkpoints(vm).await? {
            self.remove_checkpoint(lease, vm, &checkpoint).await?;
        }
        let mut users = self.settings_by_type(vm, USER_CHECKPOINT).await?;
        users.sort_by(|a, b| b.str("CreationTime").cmp(&a.str("CreationTime")));
        for settings in users {
            self.until_merged(lease, vm).await?;
            let name = settings.str("ElementName").unwrap_or_default();
            let doing = format!("remove the checkpoint {name:?} of VM {vm}");
            self.destroy_snapshot(lease, &doing, &settings.path).await?;
            lost.push(format!("the checkpoint {name:?} of the VM that was replaced is gone"));
        }
        Ok(())
    }

    async fn until_merged(&self, lease: &Lease, vm: VmGuid) -> Result<VmState, HypervisorError> {
        let until = Instant::now() + self.times.merge_wait;
        let mut backoff =
            Backoff::new(self.times.busy_first, self.times.busy_ceiling, Backoff::any_seed());
        loop {
            lease.may_mutate()?;
            let state = self.vm_state(vm).await?;
            if !state.is_merging() && !state.is_busy() {
                return Ok(state);
            }
            let pause = backoff.next_wait();
            if Instant::now() + pause >= until {
                return Err(HypervisorError::TooLong {
                    doing: format!("merge the checkpoints of VM {:?}", state.vm.name),
                    waited: self.times.merge_wait,
                });
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                lost = lease.lost() => return Err(lost.into()),
            }
        }
    }
}
