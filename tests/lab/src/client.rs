//! The control client: what tests, the demo and `outrider lab` commands use to steer a lab.

use std::path::{Path, PathBuf};
use std::time::Duration;

use outrider_wmi::WmiError;
use outrider_wmi::lab::LabLink;
use outrider_wmi::lab::wire::{Answer, Ask, Role};
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::config::CheckpointOnMigration;
use crate::control::{
    CallRecord, Command, Comparison, CreateVm, DiskSource, Fault, FileBytes, GateSpec, GuestWrite,
    HoldSpec, HostSetup, LabState, MigrationKind, TruthRecord, VmSetup, VmState, WaitFor,
};
use crate::shape::{HostShape, NetworkShape, VmShape};
use crate::steer::CommandError;

/// Why a command was not done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ControlError {
    /// The lab said no. The code is what a caller through WMI would have got, or 0.
    #[error("{message}")]
    Refused {
        /// Return code such as 32775 or 5960; 0 when there is none.
        code: u32,
        /// The lab's sentence.
        message: String,
    },
    /// The lab did not answer.
    #[error(transparent)]
    Link(#[from] WmiError),
    /// The lab answered something else; the two are of different versions.
    #[error("the lab's answer is not understood: {0}")]
    Odd(String),
}

/// Steers a lab.
pub struct LabControl {
    link: LabLink,
}

impl LabControl {
    /// Connects to the lab at `addr`.
    ///
    /// # Errors
    /// [`ControlError::Link`] when none listens there.
    pub async fn connect(addr: impl std::fmt::Display) -> Result<Self, ControlError> {
        Ok(Self { link: LabLink::connect(addr, Role::Control, None).await? })
    }

    async fn ask<T: DeserializeOwned>(&self, command: Command) -> Result<T, ControlError> {
        let odd = |e: &dyn std::fmt::Display| ControlError::Odd(e.to_string());
        let command = serde_json::to_value(command).map_err(|e| odd(&e))?;
        let Answer::Value(answer) = self.link.call(Ask::Control(command)).await? else {
            return Err(odd(&"an answer of another kind"));
        };
        match serde_json::from_value::<Result<T, CommandError>>(answer) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(CommandError { code, message })) => Err(ControlError::Refused { code, message }),
            Err(e) => Err(odd(&e)),
        }
    }

    /// The whole cluster.
    pub async fn state(&self) -> Result<LabState, ControlError> {
        self.ask(Command::State).await
    }

    /// One VM by name or GUID.
    pub async fn vm(&self, vm: &str) -> Result<VmState, ControlError> {
        let id = vm.parse::<Uuid>().ok();
        let found = self.state().await?.vms.into_iter().find(|v| v.name == vm || Some(v.id) == id);
        found.ok_or_else(|| ControlError::Refused {
            code: 0,
            message: format!("the lab has no VM {vm:?}"),
        })
    }

    /// Makes a VM.
    pub async fn create_vm(&self, new: CreateVm) -> Result<VmState, ControlError> {
        self.ask(Command::CreateVm(new)).await
    }

    /// Adds a disk; gives its place.
    pub async fn add_disk(&self, vm: &str, disk: DiskSource) -> Result<usize, ControlError> {
        self.ask(Command::AddDisk { vm: vm.into(), disk }).await
    }

    /// Takes a disk out of a VM. Its checkpoints keep it.
    pub async fn remove_disk(&self, vm: &str, disk: usize) -> Result<(), ControlError> {
        self.ask(Command::RemoveDisk { vm: vm.into(), disk }).await
    }

    /// Grows a disk; its change tracking ends.
    pub async fn resize_disk(&self, vm: &str, disk: usize, size: u64) -> Result<(), ControlError> {
        self.ask(Command::ResizeDisk { vm: vm.into(), disk, size }).await
    }

    /// Puts another file into a disk's slot; its change tracking ends.
    pub async fn replace_disk(
        &self,
        vm: &str,
        disk: usize,
        with: DiskSource,
    ) -> Result<(), ControlError> {
        self.ask(Command::ReplaceDisk { vm: vm.into(), disk, with }).await
    }

    /// Starts a VM.
    pub async fn start_vm(&self, vm: &str) -> Result<(), ControlError> {
        self.ask(Command::StartVm { vm: vm.into() }).await
    }

    /// Turns a VM off.
    pub async fn stop_vm(&self, vm: &str) -> Result<(), ControlError> {
        self.ask(Command::StopVm { vm: vm.into() }).await
    }

    /// Pauses a VM.
    pub async fn pause_vm(&self, vm: &str) -> Result<(), ControlError> {
        self.ask(Command::PauseVm { vm: vm.into() }).await
    }

    /// Saves a VM.
    pub async fn save_vm(&self, vm: &str) -> Result<(), ControlError> {
        self.ask(Command::SaveVm { vm: vm.into() }).await
    }

    /// Gives a VM adapters, an image, a TPM and the like.
    pub async fn set_up_vm(&self, vm: &str, setup: VmSetup) -> Result<(), ControlError> {
        self.ask(Command::SetUpVm { vm: vm.into(), setup }).await
    }

    /// Gives a host switches, versions and guardians.
    pub async fn set_up_host(&self, host: &str, setup: HostSetup) -> Result<(), ControlError> {
        self.ask(Command::SetUpHost { host: host.into(), setup }).await
    }

    /// Removes a VM; its disk files stay.
    pub async fn delete_vm(&self, vm: &str) -> Result<(), ControlError> {
        self.ask(Command::DeleteVm { vm: vm.into() }).await
    }

    /// Whether the guest's VSS integration answers.
    pub async fn set_vss(&self, vm: &str, ok: bool) -> Result<(), ControlError> {
        self.ask(Command::SetVss { vm: vm.into(), ok }).await
    }

    /// Changes what WMI shows of a VM.
    pub async fn shape_vm(&self, vm: &str, shape: VmShape) -> Result<(), ControlError> {
        self.ask(Command::ShapeVm { vm: vm.into(), shape: Box::new(shape) }).await
    }

    /// Changes what Windows and the cluster show of a host.
    pub async fn shape_host(&self, host: &str, shape: HostShape) -> Result<(), ControlError> {
        self.ask(Command::ShapeHost { host: host.into(), shape }).await
    }

    /// Changes the cluster's functional level.
    pub async fn shape_cluster(&self, functional_level: u32) -> Result<(), ControlError> {
        self.ask(Command::ShapeCluster { functional_level }).await
    }

    /// Changes the FaultState of a CSV: 0 direct, 1 redirected, 2 no access.
    pub async fn shape_csv(&self, csv: &str, fault_state: u32) -> Result<(), ControlError> {
        self.ask(Command::ShapeCsv { csv: csv.into(), fault_state }).await
    }

    /// Lets the guest write now; gives the bytes written.
    pub async fn guest_write(&self, write: GuestWrite) -> Result<u64, ControlError> {
        self.ask(Command::GuestWrite(write)).await
    }

    /// Lets the guest write all the time; 0 ends it.
    pub async fn guest_rate(
        &self,
        vm: &str,
        bytes_per_second: u64,
        seed: u64,
    ) -> Result<(), ControlError> {
        self.ask(Command::GuestRate { vm: vm.into(), bytes_per_second, seed }).await
    }

    /// Makes a user checkpoint.
    pub async fn user_checkpoint(&self, vm: &str, name: &str) -> Result<Uuid, ControlError> {
        self.ask(Command::UserCheckpoint { vm: vm.into(), name: name.into() }).await
    }

    /// Turns the VM off, goes back to the newest checkpoint, and restores its power state.
    pub async fn apply_checkpoint(&self, vm: &str, checkpoint: Uuid) -> Result<(), ControlError> {
        self.ask(Command::ApplyCheckpoint { vm: vm.into(), checkpoint }).await
    }

    /// Deletes a checkpoint; the merge goes on in the background.
    pub async fn delete_checkpoint(&self, vm: &str, checkpoint: Uuid) -> Result<(), ControlError> {
        self.ask(Command::DeleteCheckpoint { vm: vm.into(), checkpoint }).await
    }

    /// Migrates a VM inside the cluster and returns when it is there.
    pub async fn migrate(
        &self,
        vm: &str,
        target: &str,
        kind: MigrationKind,
    ) -> Result<(), ControlError> {
        self.ask(Command::Migrate { vm: vm.into(), target: target.into(), kind }).await
    }

    /// Moves a VM's disks to another CSV; change tracking ends.
    pub async fn migrate_storage(&self, vm: &str, csv: &str) -> Result<(), ControlError> {
        self.ask(Command::MigrateStorage { vm: vm.into(), csv: csv.into() }).await
    }

    /// Kills a host and returns when its clustered VMs run elsewhere.
    pub async fn crash_host(&self, host: &str) -> Result<(), ControlError> {
        self.ask(Command::CrashHost { host: host.into() }).await
    }

    /// Brings a host back.
    pub async fn start_host(&self, host: &str) -> Result<(), ControlError> {
        self.ask(Command::StartHost { host: host.into() }).await
    }

    /// Drains a host; gives the VMs that stayed and why.
    pub async fn drain_host(&self, host: &str) -> Result<Vec<(String, String)>, ControlError> {
        self.ask(Command::DrainHost { host: host.into() }).await
    }

    /// Ends a drain.
    pub async fn resume_host(&self, host: &str) -> Result<(), ControlError> {
        self.ask(Command::ResumeHost { host: host.into() }).await
    }

    /// The cluster has these networks.
    pub async fn shape_networks(&self, networks: Vec<NetworkShape>) -> Result<(), ControlError> {
        self.ask(Command::ShapeNetworks { networks }).await
    }

    /// Replication writes to the disks of a VM that is off, behind its change tracking.
    pub async fn apply_log(&self, vm: &str, bytes: u64, seed: u64) -> Result<u64, ControlError> {
        self.ask(Command::ApplyLog { vm: vm.into(), bytes, seed }).await
    }

    /// WMI's service on a host restarts: its agent's connections and subscriptions end.
    pub async fn restart_wmi(&self, host: &str) -> Result<(), ControlError> {
        self.ask(Command::RestartWmi { host: host.into() }).await
    }

    /// What migrations do to recovery checkpoints from now on.
    pub async fn set_checkpoint_on_migration(
        &self,
        switch: CheckpointOnMigration,
    ) -> Result<(), ControlError> {
        self.ask(Command::SetCheckpointOnMigration(switch)).await
    }

    /// Recorded checkpoints of a VM, oldest first.
    pub async fn truth_list(&self, vm: &str) -> Result<Vec<TruthRecord>, ControlError> {
        self.ask(Command::TruthList { vm: vm.into() }).await
    }

    /// Raw copy of a disk at a checkpoint; `None` when pruned.
    pub async fn truth_path(
        &self,
        vm: &str,
        checkpoint: Uuid,
        disk: usize,
    ) -> Result<Option<PathBuf>, ControlError> {
        let all = self.truth_list(vm).await?;
        let record = all.into_iter().find(|t| t.checkpoint == checkpoint);
        Ok(record.and_then(|t| t.disks.get(disk).cloned().flatten()))
    }

    /// Compares a VHDX (with its parents) with what a checkpoint froze.
    pub async fn compare_disk(
        &self,
        disk_path: &Path,
        checkpoint: Uuid,
        disk: usize,
    ) -> Result<Comparison, ControlError> {
        self.ask(Command::Compare { disk_path: disk_path.to_owned(), checkpoint, disk }).await
    }

    /// Puts a fault in force; gives its id.
    pub async fn set_fault(&self, fault: Fault) -> Result<u64, ControlError> {
        self.ask(Command::SetFault(fault)).await
    }

    /// Ends a fault.
    pub async fn clear_fault(&self, fault: u64) -> Result<(), ControlError> {
        self.ask(Command::ClearFault { fault }).await
    }

    /// Ends all faults.
    pub async fn clear_faults(&self) -> Result<(), ControlError> {
        self.ask(Command::ClearFaults).await
    }

    /// Makes every change tracking id of the VM invalid.
    pub async fn lose_rct(&self, vm: &str) -> Result<(), ControlError> {
        self.ask(Command::LoseRct { vm: vm.into() }).await
    }

    /// Holds the next call like this; gives the hold's id.
    pub async fn hold(&self, spec: HoldSpec) -> Result<u64, ControlError> {
        self.ask(Command::Hold(spec)).await
    }

    /// Lets a held call go on (or forgets the hold).
    pub async fn release(&self, hold: u64) -> Result<(), ControlError> {
        self.ask(Command::Release { hold }).await
    }

    /// Pauses reads after so many bytes; gives the gate's id.
    pub async fn set_gate(&self, spec: GateSpec) -> Result<u64, ControlError> {
        self.ask(Command::SetGate(spec)).await
    }

    /// Opens a gate for good.
    pub async fn release_gate(&self, gate: u64) -> Result<(), ControlError> {
        self.ask(Command::ReleaseGate { gate }).await
    }

    /// Bytes read so far, per host and file.
    pub async fn bytes_read(
        &self,
        vm: Option<&str>,
        host: Option<&str>,
    ) -> Result<Vec<FileBytes>, ControlError> {
        let command =
            Command::BytesRead { vm: vm.map(str::to_owned), host: host.map(str::to_owned) };
        self.ask(command).await
    }

    /// Calls of methods so far, in order.
    pub async fn call_log(&self, host: Option<&str>) -> Result<Vec<CallRecord>, ControlError> {
        self.ask(Command::CallLog { host: host.map(str::to_owned) }).await
    }

    /// Waits until a condition holds.
    ///
    /// # Errors
    /// [`ControlError::Refused`] after `deadline`, saying what is the case instead.
    pub async fn wait(&self, condition: WaitFor, deadline: Duration) -> Result<(), ControlError> {
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        self.ask(Command::Wait { condition, deadline_ms }).await
    }

    /// Ends the lab.
    pub async fn shutdown(&self) -> Result<(), ControlError> {
        self.ask(Command::Shutdown).await
    }
}
