//! Hyper-V, over any [`Wmi`] transport (facts, sections 1, 2, 4 and 9).
//!
//! | file | idea |
//! | --- | --- |
//! | `wql` | names, paths and literals |
//! | `call` | methods, their jobs, and when to ask again |
//! | `snapshot` | recovery checkpoints: make, name, look into, remove |
//! | `user_checkpoints` | the tree of checkpoints that administrators made |
//! | `reference_point`, `changes` | resilient change tracking |
//! | `inventory`, `watch`, `cluster` | what is there, and what changes |
//! | `traces` | what backups left, whoever made them |
//! | `networks` | which networks the cluster has for itself |
//! | `facts`, `disks`, `volumes` | what the consistency plan and the prechecks decide on |
//! | `contract` | what is expected of WMI: for `node doctor` and the documents |
//! | `offline` | saving a VM for a moment |
//! | `attached` | disks whose files cannot be opened |
//! | `machine` | what a VM has besides disks, and what a host has for it |
//! | `group` | a VM's cluster group |
//! | `heartbeat` | seeing whether a VM boots |
//! | `import`, `replace` | VMs from restored files, and in the place of others |

mod attached;
mod call;
mod changes;
mod cluster;
pub mod contract;
mod disks;
mod facts;
mod group;
mod heartbeat;
mod import;
mod inventory;
mod machine;
mod networks;
mod offline;
mod reference_point;
mod replace;
mod search;
mod snapshot;
mod traces;
mod user_checkpoints;
mod volumes;
mod watch;
mod wql;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use outrider_disk::{DiskError, RangeSet};
use outrider_process::network::Subnet;
use outrider_proto::ids::VmGuid;
use outrider_proto::manifest::{Machine, Security};
use outrider_wmi::Wmi;
use outrider_wmi::files::HostFiles;
use tokio::sync::mpsc;

use super::{
    BootCheck, Booting, Change, Checkpoint, CheckpointRequest, Defined, Found, FrozenDisk,
    HostFacts, Hypervisor, HypervisorError, Inventory, NewVm, ReferencePoint, SetAside,
    UserCheckpoints, VmState,
};
use crate::config::JobTimes;
use crate::lease::Lease;
use crate::source::FrozenSource;

/// The Hyper-V of one host.
#[derive(Clone)]
pub struct HyperV {
    wmi: Arc<dyn Wmi>,
    files: Arc<dyn HostFiles>,
    times: JobTimes,
    usual: Arc<volumes::UsualAccess>,
    known: Arc<disks::KnownDisks>,
    /// This host's name, once it was told.
    this: Arc<tokio::sync::OnceCell<String>>,
}

impl HyperV {
    /// What is known of this host.
    ///
    /// # Errors
    /// When the provider does not answer.
    pub async fn host(&self) -> Result<super::facts::Host, HypervisorError> {
        self.host_facts().await
    }

    /// The Hyper-V that `wmi` speaks to, of the host whose files `files` opens.
    #[must_use]
    pub fn new(wmi: Arc<dyn Wmi>, files: Arc<dyn HostFiles>, times: JobTimes) -> Self {
        Self {
            wmi,
            files,
            times,
            usual: Arc::default(),
            known: Arc::default(),
            this: Arc::default(),
        }
    }
}

#[async_trait]
impl Hypervisor for HyperV {
    fn kind(&self) -> &'static str {
        "hyperv"
    }

    fn files(&self) -> Arc<dyn HostFiles> {
        self.files.clone()
    }

    fn open_disk(&self, path: &Path) -> Result<Box<dyn FrozenSource>, DiskError> {
        attached::open(&self.files, path)
    }

    async fn inventory(&self) -> Result<Inventory, HypervisorError> {
        self.full_inventory().await
    }

    async fn watch(&self) -> Result<mpsc::Receiver<Change>, HypervisorError> {
        watch::start(self.clone()).await
    }

    async fn search(&self, vms: &[VmGuid]) -> Result<Option<Found>, HypervisorError> {
        self.found_of(vms).await
    }

    async fn traces(&self) -> Result<Vec<super::traces::VmTraces>, HypervisorError> {
        self.all_traces().await
    }

    async fn vm(&self, vm: VmGuid) -> Result<VmState, HypervisorError> {
        self.vm_state(vm).await
    }

    async fn checkpoints(&self, vm: VmGuid) -> Result<Vec<Checkpoint>, HypervisorError> {
        self.recovery_checkpoints(vm).await
    }

    async fn create_checkpoint(
        &self,
        lease: &Lease,
        vm: VmGuid,
        name: &str,
        request: CheckpointRequest,
    ) -> Result<Checkpoint, HypervisorError> {
        self.create_recovery_checkpoint(lease, vm, name, request).await
    }

    async fn checkpoint_disks(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Vec<FrozenDisk>, HypervisorError> {
        self.frozen_disks(checkpoint).await
    }

    async fn checkpoint_config(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Vec<PathBuf>, HypervisorError> {
        self.config_files(checkpoint).await
    }

    async fn changes(
        &self,
        disk: &Path,
        size: u64,
        tracking_id: &str,
    ) -> Result<RangeSet, HypervisorError> {
        self.disk_changes(disk, size, tracking_id).await
    }

    async fn reference_points(&self, vm: VmGuid) -> Result<Vec<ReferencePoint>, HypervisorError> {
        self.list_reference_points(vm).await
    }

    async fn convert(
        &self,
        lease: &Lease,
        vm: VmGuid,
        checkpoint: &Checkpoint,
    ) -> Result<ReferencePoint, HypervisorError> {
        self.convert_checkpoint(lease, vm, checkpoint).await
    }

    async fn destroy_checkpoint(
        &self,
        lease: &Lease,
        vm: VmGuid,
        checkpoint: &Checkpoint,
    ) -> Result<(), HypervisorError> {
        self.remove_checkpoint(lease, vm, checkpoint).await
    }

    async fn destroy_reference_point(
        &self,
        lease: &Lease,
        vm: VmGuid,
        point: &ReferencePoint,
    ) -> Result<(), HypervisorError> {
        self.remove_reference_point(lease, vm, point).await
    }

    async fn cluster_only_networks(&self) -> Result<Vec<Subnet>, HypervisorError> {
        self.networks_of_cluster().await
    }

    async fn storage_roots(&self) -> Result<Vec<(PathBuf, u64)>, HypervisorError> {
        self.shared_volumes().await
    }

    async fn define_vm(&self, lease: &Lease, new: &NewVm) -> Result<Defined, HypervisorError> {
        self.import_vm(lease, new).await
    }

    async fn user_checkpoints(
        &self,
        vm: VmGuid,
        at: &Checkpoint,
    ) -> Result<UserCheckpoints, HypervisorError> {
        self.tree_at(vm, at).await
    }

    async fn security(&self, checkpoint: &Checkpoint) -> Result<Option<Security>, HypervisorError> {
        self.security_of(checkpoint).await
    }

    async fn machine(&self, checkpoint: &Checkpoint) -> Result<Machine, HypervisorError> {
        self.machine_at(checkpoint).await
    }

    async fn host_started(&self) -> Result<Option<u64>, HypervisorError> {
        self.started().await
    }

    async fn host_facts(&self) -> Result<HostFacts, HypervisorError> {
        self.facts_of_host().await
    }

    async fn owner_of(&self, vm: VmGuid) -> Result<Option<String>, HypervisorError> {
        self.cluster_owner(vm).await
    }

    async fn rehearse_vm(&self, lease: &Lease, new: &NewVm) -> Result<(), HypervisorError> {
        self.rehearse(lease, new).await
    }

    async fn finish_vm(
        &self,
        lease: &Lease,
        vm: VmGuid,
        new: &NewVm,
    ) -> Result<Vec<String>, HypervisorError> {
        self.finish(lease, vm, new).await
    }

    async fn forget_planned(&self, lease: &Lease, folder: &Path) -> Result<(), HypervisorError> {
        self.forget_planned_in(lease, folder).await
    }

    async fn made_in(&self, folder: &Path) -> Result<Option<VmGuid>, HypervisorError> {
        self.real_vm_in(folder).await
    }

    async fn config_of(&self, vm: VmGuid) -> Result<Vec<PathBuf>, HypervisorError> {
        self.files_of_vm(vm).await
    }

    async fn set_aside(
        &self,
        lease: &Lease,
        vm: VmGuid,
        lost: &mut Vec<String>,
    ) -> Result<SetAside, HypervisorError> {
        self.set_vm_aside(lease, vm, lost).await
    }

    async fn start_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        // Through its cluster, which would otherwise take it for stopped.
        if self.bring_online(lease, vm).await? {
            return Ok(());
        }
        self.request_state(lease, vm, import::RUN, "start").await
    }

    fn boot_obstacle(&self, check: &BootCheck) -> Option<&'static str> {
        heartbeat::obstacle(check)
    }

    async fn boot_vm(
        &self,
        lease: &Lease,
        vm: VmGuid,
        check: &BootCheck,
    ) -> Result<Booting, HypervisorError> {
        self.start_vm(lease, vm).await?;
        self.wait_for_heartbeat(lease, vm, check).await
    }

    async fn save_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        self.save(lease, vm).await
    }

    async fn resume_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        self.resume(lease, vm).await
    }

    async fn stop_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        self.request_state(lease, vm, import::TURN_OFF, "turn off").await
    }

    async fn remove_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        self.destroy_system(lease, vm).await
    }
}
