//! Making a VM ready for being replaced by a restored one: stopped in its cluster's eyes, off, without checkpoints.

use std::path::PathBuf;

use outrider_process::backoff::Backoff;
use outrider_proto::ids::VmGuid;
use outrider_wmi::Object;
use tokio::time::Instant;

use super::HyperV;
use super::import::TURN_OFF;
use super::user_checkpoints::USER_CHECKPOINT;
use super::wql::{self, REALIZED, SETTINGS, literal};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::{DiskAside, Power, SetAside, VmState};
use crate::lease::Lease;

impl HyperV {
    pub(super) async fn set_vm_aside(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<SetAside, HypervisorError> {
        let mut aside = SetAside {
            group: self.group_of(vm).await?.map(|(_, group)| group),
            ran: self.vm_state(vm).await?.vm.power == Power::Running,
            ..SetAside::default()
        };
        // First: a VM that stops while its cluster thinks it runs is a failure, and is started again.
        self.take_offline(lease, vm).await?;
        let state = self.vm_state(vm).await?;
        aside.name.clone_from(&state.vm.name);
        if state.vm.power != Power::Off {
            self.request_state(lease, vm, TURN_OFF, "turn off").await?;
        }
        aside.lost = self.remove_all_checkpoints(lease, vm).await?;
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
        aside.config = match self.settings_by_type(vm, REALIZED).await?.into_iter().next() {
            Some(settings) => self.existing_files(settings).await?,
            None => Vec::new(),
        };
        Ok(aside)
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

    /// Newest first; gives a sentence for each that was an administrator's.
    async fn remove_all_checkpoints(
        &self,
        lease: &Lease,
        vm: VmGuid,
    ) -> Result<Vec<String>, HypervisorError> {
        for checkpoint in self.recovery_checkpoints(vm).await? {
            self.remove_checkpoint(lease, vm, &checkpoint).await?;
        }
        let mut lost = Vec::new();
        let mut users = self.settings_by_type(vm, USER_CHECKPOINT).await?;
        users.sort_by(|a, b| b.str("CreationTime").cmp(&a.str("CreationTime")));
        for settings in users {
            self.until_merged(lease, vm).await?;
            let name = settings.str("ElementName").unwrap_or_default();
            let doing = format!("remove the checkpoint {name:?} of VM {vm}");
            self.destroy_snapshot(lease, &doing, &settings.path).await?;
            lost.push(format!("the checkpoint {name:?} of the VM that was replaced is gone"));
        }
        Ok(lost)
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
