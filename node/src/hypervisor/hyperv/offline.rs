//! Saving a VM for a moment (requirement C3): a VM that is not highly available by itself, a clustered one only through its
//! cluster resource, because the cluster takes a VM that stops by itself for a failure and starts it again.

use std::time::Duration;

use outrider_process::backoff::Backoff;
use outrider_proto::ids::VmGuid;
use outrider_wmi::Object;
use tokio::time::Instant;

use super::HyperV;
use super::group::RESOURCE_WAIT;
use super::import::RUN;
use super::wql;
use crate::hypervisor::Power;
use crate::hypervisor::error::HypervisorError;
use crate::lease::Lease;

/// RequestedState: save.
const SAVE: u32 = 6;
const FIRST_LOOK: Duration = Duration::from_millis(20);
const LONGEST_LOOK: Duration = Duration::from_secs(2);

impl HyperV {
    pub(super) async fn save(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        let Some(resource) = self.vm_resource(vm).await? else {
            self.request_state(lease, vm, SAVE, "save").await?;
            return self.until(vm, Power::Saved, "save").await;
        };
        let action = resource.object("PrivateProperties").and_then(|p| p.u64("OfflineAction"));
        if action != Some(1) {
            return Err(HypervisorError::Refused {
                doing: format!("save VM {vm} through its cluster resource"),
                code: 5955,
                reason: format!(
                    "taking it offline would not save the VM (OfflineAction {})",
                    action.map_or("not told".to_owned(), |a| a.to_string())
                ),
                remedy: "set the resource's cluster-controlled offline action to Save",
            });
        }
        self.cluster_call(lease, vm, &resource, "TakeOffline", "save").await?;
        self.until(vm, Power::Saved, "save").await
    }

    pub(super) async fn resume(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        if self.power_of(vm).await? == Power::Running {
            return Ok(());
        }
        match self.vm_resource(vm).await? {
            None => self.request_state(lease, vm, RUN, "resume").await?,
            Some(resource) => {
                self.cluster_call(lease, vm, &resource, "BringOnline", "resume").await?;
            }
        }
        self.until(vm, Power::Running, "resume").await
    }

    async fn cluster_call(
        &self,
        lease: &Lease,
        vm: VmGuid,
        resource: &Object,
        method: &str,
        verb: &str,
    ) -> Result<(), HypervisorError> {
        let doing = format!("{verb} VM {vm} through its cluster resource");
        let args = vec![("TimeOut".to_owned(), RESOURCE_WAIT.into())];
        self.cluster_change(lease, &doing, &resource.path, method, args).await
    }

    async fn power_of(&self, vm: VmGuid) -> Result<Power, HypervisorError> {
        let system = self.system(vm).await?.ok_or(HypervisorError::NoSuchVm { vm })?;
        let view = super::cluster::ClusterView::default();
        Ok(super::inventory::seen(&system, vm, &view).power)
    }

    async fn until(&self, vm: VmGuid, wanted: Power, verb: &str) -> Result<(), HypervisorError> {
        let end = Instant::now() + self.times.hypervisor_job;
        let mut backoff = Backoff::new(FIRST_LOOK, LONGEST_LOOK, Backoff::any_seed());
        while self.power_of(vm).await? != wanted {
            let pause = backoff.next_wait();
            if Instant::now() + pause >= end {
                return Err(HypervisorError::TooLong {
                    doing: format!("{verb} VM {}", wql::guid(vm.0)),
                    waited: self.times.hypervisor_job,
                });
            }
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }
}
