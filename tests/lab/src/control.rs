//! What the control client can say to the lab, and what it hears.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::CheckpointOnMigration;
use crate::shape::{HostShape, NetworkShape, VmShape};

mod disturb;
mod state;

pub use disturb::{Fault, FaultKind, GateSpec, HoldSpec, WaitFor, When};
pub use state::{
    CallRecord, CheckpointState, Comparison, DiskState, FileBytes, HostState, LabState,
    ReferencePointState, TruthRecord, VmState,
};

/// A new VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateVm {
    /// Display name, any Unicode.
    pub name: String,
    /// Host that will own it.
    pub host: String,
    /// CSV that its folder is made on.
    pub csv: String,
    /// Its disks, in order of their SCSI location.
    pub disks: Vec<DiskSource>,
    /// Whether it gets a cluster group.
    pub clustered: bool,
    /// 1 or 2.
    pub generation: u8,
    /// Seed of its GUID and of its guest.
    pub seed: u64,
    /// Whether it is started at once.
    pub start: bool,
}

impl CreateVm {
    /// A running, clustered generation 2 VM with these disks.
    #[must_use]
    pub fn new(name: &str, host: &str, csv: &str, disks: Vec<DiskSource>) -> Self {
        let seed = name.bytes().fold(7, |h: u64, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
        Self {
            name: name.to_owned(),
            host: host.to_owned(),
            csv: csv.to_owned(),
            disks,
            clustered: true,
            generation: 2,
            seed,
            start: true,
        }
    }
}

/// Where a VM's disk comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum DiskSource {
    /// A VHDX or VHD that is copied into the VM's folder (never touched).
    CopyOf(PathBuf),
    /// A VHDX or VHD that is used where it is.
    InPlace(PathBuf),
    /// An empty dynamic VHDX.
    Empty {
        /// Guest-visible size in bytes.
        size: u64,
        /// VHDX block size in bytes; 0 takes 2 MiB.
        block_size: u32,
    },
    /// A pass-through disk: never part of a checkpoint.
    PassThrough,
    /// A virtual Fibre Channel adapter: its disks are not the host's.
    FibreChannel,
    /// A VHDX that several VMs share: never part of a checkpoint.
    Shared {
        /// Guest-visible size in bytes.
        size: u64,
    },
    /// A VHDX on a persistent memory controller: never part of a checkpoint.
    PersistentMemory {
        /// Guest-visible size in bytes.
        size: u64,
    },
    /// A VHD set.
    VhdSet {
        /// Guest-visible size in bytes.
        size: u64,
    },
}

/// What a VM gets besides its disks; replaces what it had.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VmSetup {
    /// Network adapters.
    pub nics: Vec<NicSetup>,
    /// Image in its DVD drive; need not exist.
    pub image: Option<PathBuf>,
    /// A virtual TPM, guarded by the host that it runs on.
    pub tpm: bool,
    /// Checkpoint folder (SnapshotDataRoot) other than the VM's own.
    pub snapshot_root: Option<PathBuf>,
    /// Smart Paging folder (SwapFileDataRoot) other than the VM's own.
    pub swap_root: Option<PathBuf>,
    /// Configuration version.
    pub version: Option<String>,
    /// Settings of its cluster group.
    pub group: Option<GroupSetup>,
}

/// A network adapter to be made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NicSetup {
    /// Name.
    pub name: String,
    /// Switch of the VM's host; none: not connected.
    pub switch: Option<String>,
    /// A fixed address; none: a dynamic one.
    pub static_mac: Option<String>,
}

impl NicSetup {
    /// Connected to a switch, with a dynamic address.
    #[must_use]
    pub fn on(switch: &str) -> Self {
        let switch = Some(switch.to_owned());
        Self { name: "Network Adapter".into(), switch, static_mac: None }
    }
}

/// Settings of a cluster group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSetup {
    /// Numbers by property, such as `Priority`.
    pub values: Vec<(String, u64)>,
    /// `AntiAffinityClassNames`.
    pub anti_affinity: Vec<String>,
    /// Preferred owners, first the most preferred.
    pub preferred_owners: Vec<String>,
}

/// What a host gets; what is left out stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct HostSetup {
    /// Names of its switches.
    pub switches: Option<Vec<String>>,
    /// Configuration versions that it supports.
    pub versions: Option<Vec<String>>,
    /// Hosts whose guardian certificates are imported with their private keys.
    pub guardians_of: Vec<String>,
}

/// Kinds of migration inside the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationKind {
    /// Memory copied while the guest runs.
    Live,
    /// Save, move, resume.
    Quick,
}

/// A deterministic write of a guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestWrite {
    /// VM, by name or GUID.
    pub vm: String,
    /// Bytes to write in all.
    pub bytes: u64,
    /// Seed of places and content.
    pub seed: u64,
    /// Disk by its place in the list; `None` spreads over all.
    pub disk: Option<usize>,
    /// Guest-visible window `(start, length)`; `None` is the whole disk.
    pub window: Option<(u64, u64)>,
    /// Writes front to back from the window's start instead of scattered.
    pub sequential: bool,
}

impl GuestWrite {
    /// Scattered over all disks.
    #[must_use]
    pub fn scattered(vm: &str, bytes: u64, seed: u64) -> Self {
        Self { vm: vm.to_owned(), bytes, seed, disk: None, window: None, sequential: false }
    }

    /// One contiguous write.
    #[must_use]
    pub fn at(vm: &str, disk: usize, offset: u64, bytes: u64, seed: u64) -> Self {
        let window = Some((offset, bytes));
        Self { vm: vm.to_owned(), bytes, seed, disk: Some(disk), window, sequential: true }
    }
}

/// A command to the lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Command {
    State,
    CreateVm(CreateVm),
    AddDisk { vm: String, disk: DiskSource },
    RemoveDisk { vm: String, disk: usize },
    ResizeDisk { vm: String, disk: usize, size: u64 },
    ReplaceDisk { vm: String, disk: usize, with: DiskSource },
    StartVm { vm: String },
    StopVm { vm: String },
    PauseVm { vm: String },
    DeleteVm { vm: String },
    SaveVm { vm: String },
    SetUpVm { vm: String, setup: VmSetup },
    SetUpHost { host: String, setup: HostSetup },
    SetVss { vm: String, ok: bool },
    ShapeVm { vm: String, shape: Box<VmShape> },
    ShapeHost { host: String, shape: HostShape },
    ShapeCluster { functional_level: u32 },
    ShapeNetworks { networks: Vec<NetworkShape> },
    ShapeCsv { csv: String, fault_state: u32 },
    GuestWrite(GuestWrite),
    GuestRate { vm: String, bytes_per_second: u64, seed: u64 },
    UserCheckpoint { vm: String, name: String },
    ApplyCheckpoint { vm: String, checkpoint: Uuid },
    DeleteCheckpoint { vm: String, checkpoint: Uuid },
    Migrate { vm: String, target: String, kind: MigrationKind },
    MigrateStorage { vm: String, csv: String },
    CrashHost { host: String },
    StartHost { host: String },
    DrainHost { host: String },
    ResumeHost { host: String },
    RestartWmi { host: String },
    ApplyLog { vm: String, bytes: u64, seed: u64 },
    SetCheckpointOnMigration(CheckpointOnMigration),
    TruthList { vm: String },
    Compare { disk_path: PathBuf, checkpoint: Uuid, disk: usize },
    SetFault(Fault),
    ClearFault { fault: u64 },
    ClearFaults,
    LoseRct { vm: String },
    Hold(HoldSpec),
    Release { hold: u64 },
    SetGate(GateSpec),
    ReleaseGate { gate: u64 },
    BytesRead { vm: Option<String>, host: Option<String> },
    CallLog { host: Option<String> },
    Wait { condition: WaitFor, deadline_ms: u64 },
    Shutdown,
}
