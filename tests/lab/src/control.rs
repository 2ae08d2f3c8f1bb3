//! What the control client can say to the lab, and what it hears.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::CheckpointOnMigration;
use crate::shape::{HostShape, NetworkShape, VmShape};

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

/// A fault that is in force until it is cleared or used up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fault {
    /// What goes wrong.
    pub kind: FaultKind,
    /// Only for this VM (name or GUID).
    pub vm: Option<String>,
    /// Only on this host.
    pub host: Option<String>,
    /// How often; `None` until cleared.
    pub times: Option<u32>,
}

impl Fault {
    /// A fault for everybody until cleared.
    #[must_use]
    pub fn new(kind: FaultKind) -> Self {
        Self { kind, vm: None, host: None, times: None }
    }

    /// Only for `vm`.
    #[must_use]
    pub fn on_vm(mut self, vm: &str) -> Self {
        self.vm = Some(vm.to_owned());
        self
    }

    /// Only on `host`.
    #[must_use]
    pub fn on_host(mut self, host: &str) -> Self {
        self.host = Some(host.to_owned());
        self
    }

    /// Only `times` times.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }
}

/// Kinds of faults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FaultKind {
    /// `method` returns `code` at once, without effect.
    MethodReturns {
        /// Method name.
        method: String,
        /// Return code.
        code: u32,
    },
    /// The job of `method` ends as an exception, without effect (guest VSS writers fail this way).
    JobFails {
        /// Method name.
        method: String,
        /// ErrorCode of the job.
        code: u32,
        /// ErrorDescription of the job.
        description: String,
    },
    /// The job of `method` works but ends in state 32768, completed with warnings.
    JobWarns {
        /// Method name.
        method: String,
    },
    /// The job of `method` works and is forgotten at once: it cannot be asked for any more.
    JobVanishes {
        /// Method name.
        method: String,
    },
    /// The `Resulting...` references of `method` stay null.
    NullResult {
        /// Method name.
        method: String,
    },
    /// `method` is delayed before its effect.
    Delay {
        /// Method name.
        method: String,
        /// Milliseconds.
        ms: u64,
    },
    /// Background merges do not go on.
    StuckMerge,
    /// A CSV says it has only so many bytes free.
    LowSpace {
        /// Name of the CSV.
        csv: String,
        /// Bytes.
        free: u64,
    },
    /// Change tracking ids are refused as invalid (0xC03A0029).
    RejectIds {
        /// As the error of a job (true) or as a return value (false).
        as_job: bool,
    },
    /// Events are not delivered, and nobody is told.
    DropEvents,
    /// Events of one provider wait until this is cleared, then all arrive in their order: reads are ahead of them.
    HoldEvents {
        /// The failover cluster's (true) or the hypervisor's (false).
        cluster: bool,
    },
    /// Events are ahead of reads: a VM that moved is read as if it were where it was before its move.
    LateReads,
    /// Events are ahead of reads of the cluster's database: a group that moved is read with the owner before.
    LateClusterReads,
    /// Instead of an event its subscriber hears that events were lost.
    OverflowEvents,
    /// Instead of an event its subscription ends.
    EndSubscriptions,
    /// WMI answers nothing, as for a while after its service or the host was started.
    WmiAway,
    /// Reads from a CSV stand still.
    CsvPaused {
        /// Name of the CSV.
        csv: String,
    },
    /// Reads from a CSV fail, as when its pause took too long (5979).
    CsvFails {
        /// Name of the CSV.
        csv: String,
        /// Windows' code.
        code: u32,
    },
    /// Opening such a file meets a sharing violation.
    FileBusy {
        /// How its name ends.
        ends_with: String,
    },
}

/// When a held method is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum When {
    /// Before it has any effect. If the caller dies meanwhile the method never happens.
    Before,
    /// After its effect, its job included, before the caller hears of it.
    After,
}

/// Holds one call of a method.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HoldSpec {
    /// Method name.
    pub method: String,
    /// Only for this VM (name or GUID).
    pub vm: Option<String>,
    /// Only on this host.
    pub host: Option<String>,
    /// Before or after its effect.
    pub when: When,
}

/// Pauses reads of a VM's files after so many bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GateSpec {
    /// VM by name or GUID.
    pub vm: String,
    /// Host; `None` counts and pauses all hosts together.
    pub host: Option<String>,
    /// Bytes that may still be read.
    pub budget: u64,
}

/// A condition to wait for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum WaitFor {
    /// The VM is realized on the host, the cluster agrees, and no migration is running.
    VmOnHost {
        /// VM.
        vm: String,
        /// Host.
        host: String,
    },
    /// The VM has no merge pending and no job running.
    NoMerge {
        /// VM.
        vm: String,
    },
    /// The VM has exactly so many recovery checkpoints.
    RecoveryCheckpoints {
        /// VM.
        vm: String,
        /// How many.
        count: usize,
    },
    /// A merge of the VM waits for readers that hold its files open.
    MergeWaitsForReaders {
        /// VM.
        vm: String,
    },
    /// A reader is blocked at this gate.
    GateBlocked {
        /// Gate id.
        gate: u64,
    },
    /// A reader waits for a paused CSV.
    ReadsPaused {
        /// Name of the CSV.
        csv: String,
    },
    /// A call is held by this hold.
    MethodHeld {
        /// Hold id.
        hold: u64,
    },
    /// The method was called so many times on the VM (any host) since the lab began.
    Called {
        /// Method.
        method: String,
        /// VM.
        vm: String,
        /// At least so often.
        count: usize,
    },
}

/// A command to the lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Command {
    State,
    CreateVm(CreateVm),
    AddDisk { vm: String, disk: DiskSource },
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

/// The cluster as the lab sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabState {
    /// Cluster name.
    pub realm: String,
    /// Hosts.
    pub hosts: Vec<HostState>,
    /// VMs by name.
    pub vms: Vec<VmState>,
    /// The switch.
    pub checkpoint_on_migration: CheckpointOnMigration,
    /// VMs in the making: (host, name).
    #[serde(default)]
    pub planned: Vec<(String, String)>,
}

/// A host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostState {
    /// Name.
    pub name: String,
    /// Whether it runs.
    pub up: bool,
    /// Whether it is drained.
    pub paused: bool,
    /// Agent connections.
    pub connections: usize,
}

/// A VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    /// GUID.
    pub id: Uuid,
    /// Name.
    pub name: String,
    /// Host where it is realized.
    pub host: String,
    /// Owner of its group as the cluster database says; `None` when not clustered.
    pub owner: Option<String>,
    /// `EnabledState` as in WMI: 2 running, 3 off, 6 saved, 9 paused.
    pub enabled_state: u16,
    /// Disks.
    pub disks: Vec<DiskState>,
    /// Checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointState>,
    /// The checkpoint that it follows now.
    #[serde(default)]
    pub current: Option<Uuid>,
    /// Reference points, oldest first.
    pub reference_points: Vec<ReferencePointState>,
    /// Merges not finished.
    pub merges: usize,
    /// Why the last merge attempt failed, while it still waits.
    pub merge_waits: Option<String>,
    /// Whether a migration is under way.
    pub migrating: bool,
    /// Whether a WMI job is at work on it.
    pub busy: bool,
    /// Its adapters: name and the switch that it is connected to.
    #[serde(default)]
    pub nics: Vec<(String, Option<String>)>,
    /// Images in its drives.
    #[serde(default)]
    pub images: Vec<PathBuf>,
    /// Folders of its configuration, checkpoints, saved state and Smart Paging file.
    #[serde(default)]
    pub folders: Vec<PathBuf>,
    /// Whether its account may open its files.
    #[serde(default)]
    pub rights: bool,
    /// Its cluster group's settings; `None` when not clustered.
    #[serde(default)]
    pub group: Option<GroupSetup>,
    /// Times that the cluster took a stop for a failure.
    #[serde(default)]
    pub cluster_failures: u32,
}

impl VmState {
    /// Its recovery checkpoints.
    pub fn recovery_checkpoints(&self) -> impl Iterator<Item = &CheckpointState> {
        self.checkpoints.iter().filter(|c| c.recovery)
    }
}

/// A disk of a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DiskState {
    /// Files, base first, leaf last; empty for a pass-through disk.
    pub chain: Vec<PathBuf>,
    /// Guest-visible size in bytes.
    pub size: u64,
}

/// A checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckpointState {
    /// GUID.
    pub id: Uuid,
    /// ElementName.
    pub name: String,
    /// Whether it is of the recovery type.
    pub recovery: bool,
    /// The one that it follows.
    #[serde(default)]
    pub parent: Option<Uuid>,
    /// The files that it froze, by disk place.
    #[serde(default)]
    pub frozen: Vec<PathBuf>,
    /// The administrator's remarks.
    #[serde(default)]
    pub notes: String,
    /// It carries a saved state.
    #[serde(default)]
    pub saved: bool,
}

/// A reference point.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReferencePointState {
    /// GUID.
    pub id: Uuid,
    /// RCT ids by disk place; `None` for a disk without one.
    pub rct_ids: Vec<Option<String>>,
}

/// The exact bytes of a VM's disks at a recovery checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TruthRecord {
    /// VM GUID.
    pub vm: Uuid,
    /// Checkpoint GUID.
    pub checkpoint: Uuid,
    /// Grows with every checkpoint of the lab.
    pub order: u64,
    /// Raw sparse copies by disk place; `None` when pruned or not a virtual disk.
    pub disks: Vec<Option<PathBuf>>,
}

/// Result of a comparison with the truth.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Comparison {
    /// Byte for byte the same.
    Identical,
    /// Another size.
    SizeDiffers {
        /// Size at the checkpoint.
        expected: u64,
        /// Size of the disk compared.
        found: u64,
    },
    /// The first difference.
    DiffersAt {
        /// Guest-visible offset (of the byte, or of its 256 KiB piece when only hashes are kept).
        offset: u64,
    },
}

/// A call of a method.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CallRecord {
    /// Order over all hosts.
    pub order: u64,
    /// Host that was asked.
    pub host: String,
    /// Method.
    pub method: String,
    /// Object path it was called on.
    pub path: String,
    /// VM concerned, if any.
    pub vm: Option<Uuid>,
    /// Return value.
    pub code: u32,
}

/// Bytes read of a file by a host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileBytes {
    /// Host.
    pub host: String,
    /// VM that the file belonged to when it was opened.
    pub vm: Option<Uuid>,
    /// File.
    pub path: PathBuf,
    /// Bytes granted to be read.
    pub bytes: u64,
}
