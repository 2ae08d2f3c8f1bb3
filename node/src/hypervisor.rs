//! What a backup or restore asks of a hypervisor. [`hyperv`] answers it over WMI, `qemu` (on Unix) over QMP.
//!
//! Every method that changes something takes the job's [`Lease`] and asks it right before each call to the hypervisor,
//! retries included: a stale agent that wakes up in the middle of a back-off changes nothing.

mod boot;
pub mod error;
pub mod facts;
pub mod hyperv;
mod new_vm;
#[cfg(unix)]
pub mod qemu;
pub mod traces;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use outrider_disk::{DiskError, RangeSet};
use outrider_process::network::Subnet;
use outrider_proto::ids::{CheckpointId, DiskId, VmGuid};
use outrider_proto::manifest::{DiskManifest, Machine, Security};
use outrider_wmi::files::HostFiles;
use tokio::sync::mpsc;

pub use boot::{BootCheck, Booting, Sign};
pub use error::{HypervisorError, Retry};
pub use new_vm::{Defined, DiskAside, HostFacts, Networks, NewVm, RestoredCheckpoint, SetAside};

use crate::lease::Lease;
use crate::restore::{NewDisk, image_extension, new_child, new_image};
use crate::source::{FrozenSource, open_chain};

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Runs.
    Running,
    /// Off.
    Off,
    /// Saved to disk.
    Saved,
    /// Paused in memory.
    Paused,
    /// Between states, or unknown.
    Other,
}

impl Power {
    /// The word of `VmFacts.state`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Off => "off",
            Self::Saved => "saved",
            Self::Paused => "paused",
            Self::Other => "other",
        }
    }
}

/// What Hyper-V Replica makes of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplicaRole {
    /// Not a replica (or the sending side).
    #[default]
    None,
    /// Receives.
    Replica,
    /// A test failover of a replica.
    TestReplica,
}

/// A VM as this host's hypervisor shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSeen {
    /// GUID.
    pub guid: VmGuid,
    /// Display name.
    pub name: String,
    /// Power.
    pub power: Power,
    /// Replica role.
    pub replica: ReplicaRole,
    /// False for planned VMs.
    pub realized: bool,
    /// Whether the cluster database has a group for it.
    pub clustered: bool,
    /// Owner host that the cluster database names.
    pub cluster_owner: Option<String>,
    /// 1 or 2.
    pub generation: u32,
    /// Configuration version, e.g. "10.0".
    pub version: String,
    /// Its disks, as far as their facts could be read.
    pub disks: Vec<DiskSeen>,
}

/// A disk of a VM's active settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskSeen {
    /// VirtualDiskId, where the hypervisor told it.
    pub disk_id: Option<DiskId>,
    /// Size, bytes; 0 when not told.
    pub size: u64,
    /// Stable tail of the settings' InstanceID.
    pub slot: String,
    /// File; for a pass-through disk the device's path.
    pub path: String,
    /// What the file is.
    pub format: facts::Format,
    /// Why it cannot be part of a checkpoint; `None` when it can.
    pub uncapturable: Option<&'static str>,
}

/// All that this host and its cluster know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// VMs of this host.
    pub vms: Vec<VmSeen>,
    /// Cluster members that are up.
    pub nodes_up: Vec<String>,
    /// Cluster members that are down.
    pub nodes_down: Vec<String>,
}

/// A difference, as events arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A VM appeared or changed.
    Seen(Box<VmSeen>),
    /// A VM is not on this host any more, in the role that it had.
    Gone(VmGuid, ReplicaRole),
    /// The cluster database names another owner.
    Owner(VmGuid, String),
    /// A cluster member went up or down.
    Host {
        /// Its name.
        host: String,
        /// Up?
        up: bool,
    },
    /// Events were lost: take a full inventory.
    Lost,
}

/// What speaks for and against a checkpoint now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmState {
    /// The VM.
    pub vm: VmSeen,
    /// First operational status: 2 fine, 11 busy.
    pub health: u64,
    /// Second operational status (what is going on).
    pub operation: u64,
    /// What else is known of it.
    pub facts: facts::VmFacts,
    /// The volumes of its disks.
    pub volumes: Vec<facts::Volume>,
}

impl VmState {
    /// Whether the hypervisor is busy with a request for this VM.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.health == 11
    }

    /// Whether it is being moved right now.
    #[must_use]
    pub fn is_migrating(&self) -> bool {
        // On the source, and on the target.
        matches!(self.operation, 32774 | 32780)
    }

    /// Whether its storage is being moved.
    #[must_use]
    pub fn is_moving_storage(&self) -> bool {
        matches!(self.operation, 32778 | 32779)
    }

    /// Whether the hypervisor calls it critical.
    #[must_use]
    pub fn is_critical(&self) -> bool {
        matches!(self.operation, 32782 | 32795)
    }

    /// Whether a checkpoint is being merged.
    #[must_use]
    pub fn is_merging(&self) -> bool {
        self.operation == 32772
    }
}

/// Whether a VM of this configuration version can be captured with production checkpoints and change tracking (6.2 and
/// later; facts, section 2.2). A version that is not told is not held against the VM: the hypervisor itself will refuse.
#[must_use]
pub fn tracks_changes(version: &str) -> bool {
    let mut parts = version.split('.').map(|p| p.parse::<u32>().unwrap_or(0));
    let found = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    version.is_empty() || found >= (6, 2)
}

/// How a checkpoint is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointRequest {
    /// Let the guest write its state out (VSS, file system freeze).
    pub quiesce: bool,
    /// Let writers in the guest truncate their logs: breaks other backups' chains, so only when asked for.
    pub truncate_logs: bool,
}

/// A recovery checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// GUID.
    pub id: CheckpointId,
    /// ElementName.
    pub name: String,
    /// The hypervisor's handle to it.
    pub path: String,
}

/// A frozen disk of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrozenDisk {
    /// Stable tail of the settings' InstanceID.
    pub slot: String,
    /// Leaf file of the frozen chain.
    pub path: PathBuf,
}

/// A checkpoint that an administrator made, or the host by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserCheckpoint {
    /// It; what a recovery checkpoint can be asked for, it can be asked for, too.
    pub checkpoint: Checkpoint,
    /// The one that it follows.
    pub parent: Option<CheckpointId>,
    /// The administrator's remarks.
    pub notes: String,
    /// When it was made, milliseconds since the Unix epoch; 0: not told.
    pub created_unix_ms: u64,
    /// The host made it by itself.
    pub automatic: bool,
    /// It carries a saved state.
    pub saved_state: bool,
}

/// The user checkpoints of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserCheckpoints {
    /// All, parents before children.
    pub all: Vec<UserCheckpoint>,
    /// The one that a recovery checkpoint follows.
    pub current: Option<CheckpointId>,
}

/// A reference point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferencePoint {
    /// The hypervisor's id.
    pub id: String,
    /// The hypervisor's handle to it.
    pub path: String,
    /// Change tracking id by slot; a disk that is missing here has none.
    pub tracking: Vec<(String, String)>,
}

impl ReferencePoint {
    /// The change tracking id of a slot.
    #[must_use]
    pub fn tracking_of(&self, slot: &str) -> Option<&str> {
        self.tracking.iter().find(|(s, _)| s.eq_ignore_ascii_case(slot)).map(|(_, id)| id.as_str())
    }
}

/// The answer to [`Hypervisor::search`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Those of the VMs that are known.
    pub vms: Vec<VmGuid>,
    /// All members of the cluster, whatever their state; none on a stand-alone host.
    pub cluster_hosts: Vec<String>,
}

/// A hypervisor of this host.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// Its name on the wire ("hyperv").
    fn kind(&self) -> &'static str;

    /// How source files of this host are opened.
    fn files(&self) -> Arc<dyn HostFiles>;

    /// Opens a disk of a checkpoint ([`FrozenDisk::path`]) for reading. Blocks.
    ///
    /// # Errors
    /// [`DiskError`].
    fn open_disk(&self, path: &Path) -> Result<Box<dyn FrozenSource>, DiskError> {
        open_chain(&self.files(), path)
    }

    /// Makes the empty disk that a restore fills. Blocks.
    ///
    /// # Errors
    /// [`DiskError`].
    fn create_disk(
        &self,
        path: &Path,
        disk: &DiskManifest,
        keep_disk_id: bool,
    ) -> Result<Box<dyn NewDisk>, DiskError> {
        new_image(path, disk, keep_disk_id)
    }

    /// Makes the empty differencing disk over `parent` that a restore of checkpoints fills. Blocks.
    ///
    /// # Errors
    /// [`DiskError`].
    fn create_child(&self, path: &Path, parent: &Path) -> Result<Box<dyn NewDisk>, DiskError> {
        new_child(path, parent)
    }

    /// Extension of the file that a restore writes a disk to.
    fn disk_extension(&self, disk: &DiskManifest) -> &'static str {
        image_extension(disk)
    }

    /// Whether a configuration file of a recovery point is the one that [`Hypervisor::define_vm`] wants.
    fn is_definition(&self, file: &Path) -> bool {
        file.extension().is_some_and(|e| e.eq_ignore_ascii_case("vmcx"))
    }

    /// Whether a reference point can be told to be ours by itself. One that nothing is bound to is then removed.
    fn owns(&self, _point: &ReferencePoint) -> bool {
        false
    }

    /// The id of the reference point that a checkpoint of ours becomes, where it is known beforehand. Such a point is there
    /// even when the checkpoint was lost: it records from the checkpoint's moment on.
    fn point_of(&self, _checkpoint: CheckpointId) -> Option<String> {
        None
    }

    /// When this host was started, Unix milliseconds; `None` where nothing depends on it: change tracking that tells by
    /// itself what it lost in a crash.
    async fn host_started(&self) -> Result<Option<u64>, HypervisorError> {
        Ok(None)
    }

    /// Everything.
    async fn inventory(&self) -> Result<Inventory, HypervisorError>;

    /// Differences from now on; the channel is bounded and closes when the hypervisor is out of reach.
    async fn watch(&self) -> Result<mpsc::Receiver<Change>, HypervisorError>;

    /// What backups left here, whoever made them; VMs of which there is nothing are left out. Changes nothing.
    async fn traces(&self) -> Result<Vec<traces::VmTraces>, HypervisorError>;

    /// Which of these VMs this host, or the cluster's database as it reads it, knows in any form: realized, on their way here, or as
    /// settings alone. None: it cannot say for certain, as where a VM that is off is not known at all.
    async fn search(&self, _vms: &[VmGuid]) -> Result<Option<Found>, HypervisorError> {
        Ok(None)
    }

    /// One VM's state.
    async fn vm(&self, vm: VmGuid) -> Result<VmState, HypervisorError>;

    /// Its recovery checkpoints, whoever made them.
    ///
    /// # Errors
    /// [`HypervisorError::NoSuchVm`] when the VM is not here and may have taken them along.
    async fn checkpoints(&self, vm: VmGuid) -> Result<Vec<Checkpoint>, HypervisorError>;

    /// Makes a recovery checkpoint and names it `name`.
    async fn create_checkpoint(
        &self,
        lease: &Lease,
        vm: VmGuid,
        name: &str,
        request: CheckpointRequest,
    ) -> Result<Checkpoint, HypervisorError>;

    /// The frozen disks of a checkpoint, in slot order.
    async fn checkpoint_disks(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Vec<FrozenDisk>, HypervisorError>;

    /// The configuration files of a checkpoint.
    async fn checkpoint_config(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Vec<PathBuf>, HypervisorError>;

    /// Why no VM can be made of a checkpoint's configuration files; its disks can be restored all the same.
    async fn definition_obstacle(
        &self,
        _checkpoint: &Checkpoint,
    ) -> Result<Option<String>, HypervisorError> {
        Ok(None)
    }

    /// The VM's user checkpoints, as `at` (a recovery checkpoint) follows them. An empty answer is allowed: this hypervisor
    /// then has none that it could restore.
    async fn user_checkpoints(
        &self,
        _vm: VmGuid,
        _at: &Checkpoint,
    ) -> Result<UserCheckpoints, HypervisorError> {
        Ok(UserCheckpoints::default())
    }

    /// vTPM and shielding at a checkpoint.
    async fn security(
        &self,
        _checkpoint: &Checkpoint,
    ) -> Result<Option<Security>, HypervisorError> {
        Ok(None)
    }

    /// What the VM was at a checkpoint besides its disks. An empty answer is allowed: restores then plan with less.
    async fn machine(&self, _checkpoint: &Checkpoint) -> Result<Machine, HypervisorError> {
        Ok(Machine::default())
    }

    /// What changed on a disk since the point in time that the tracking id stands for.
    ///
    /// # Errors
    /// [`HypervisorError::TrackingLost`]: read the disk in full, never guess.
    async fn changes(
        &self,
        disk: &Path,
        size: u64,
        tracking_id: &str,
    ) -> Result<RangeSet, HypervisorError>;

    /// The VM's reference points, whoever made them.
    ///
    /// # Errors
    /// As [`Hypervisor::checkpoints`].
    async fn reference_points(&self, vm: VmGuid) -> Result<Vec<ReferencePoint>, HypervisorError>;

    /// Turns a checkpoint into a reference point; the checkpoint is gone afterwards.
    async fn convert(
        &self,
        lease: &Lease,
        vm: VmGuid,
        checkpoint: &Checkpoint,
    ) -> Result<ReferencePoint, HypervisorError>;

    /// Removes a checkpoint; one that is gone already is no error.
    async fn destroy_checkpoint(
        &self,
        lease: &Lease,
        vm: VmGuid,
        checkpoint: &Checkpoint,
    ) -> Result<(), HypervisorError>;

    /// Removes a reference point; one that is gone already is no error.
    async fn destroy_reference_point(
        &self,
        lease: &Lease,
        vm: VmGuid,
        point: &ReferencePoint,
    ) -> Result<(), HypervisorError>;

    /// Networks that this host's cluster has for itself: backups keep off them.
    async fn cluster_only_networks(&self) -> Result<Vec<Subnet>, HypervisorError> {
        Ok(Vec::new())
    }

    /// Folders that VMs may be restored to, with the free bytes of each.
    async fn storage_roots(&self) -> Result<Vec<(PathBuf, u64)>, HypervisorError>;

    /// What a restore has to know of this host before it writes. An empty answer is allowed: nothing is refused for it.
    async fn host_facts(&self) -> Result<HostFacts, HypervisorError> {
        Ok(HostFacts::default())
    }

    /// The host that runs a VM of this GUID, as the cluster knows; `None` when no host of the cluster does.
    async fn owner_of(&self, _vm: VmGuid) -> Result<Option<String>, HypervisorError> {
        Ok(None)
    }

    /// Whatever speaks against a VM by its definition alone, before its disks are written. No answer is allowed: what it would
    /// have said is then heard later.
    async fn precheck_vm(&self, _new: &NewVm) -> Result<(), HypervisorError> {
        Ok(())
    }

    /// Does everything that [`Hypervisor::define_vm`] does short of making the VM real, under another GUID, and undoes
    /// it: what a VM that is about to be replaced must not be removed for.
    async fn rehearse_vm(&self, _lease: &Lease, _new: &NewVm) -> Result<(), HypervisorError> {
        Ok(())
    }

    /// Defines a VM from restored files: planned VM, paths fixed, mended, validated, realized, rights granted, clustered.
    /// Whatever fails, no planned VM stays behind.
    async fn define_vm(&self, lease: &Lease, new: &NewVm) -> Result<Defined, HypervisorError>;

    /// Does again what [`Hypervisor::define_vm`] does after the VM is real: an attempt that died may have got just so far.
    async fn finish_vm(
        &self,
        _lease: &Lease,
        _vm: VmGuid,
        _new: &NewVm,
    ) -> Result<Vec<String>, HypervisorError> {
        Ok(Vec::new())
    }

    /// Removes VMs in the making whose files lie in `folder`, which an attempt that died left.
    ///
    /// # Errors
    /// Also when one stays behind.
    async fn forget_planned(&self, _lease: &Lease, _folder: &Path) -> Result<(), HypervisorError> {
        Ok(())
    }

    /// The VM of this host that is real and has a disk or its definition in `folder`.
    async fn made_in(&self, folder: &Path) -> Result<Option<VmGuid>, HypervisorError> {
        let is_in = |vm: &&VmSeen| {
            vm.realized && vm.disks.iter().any(|disk| Path::new(&disk.path).starts_with(folder))
        };
        Ok(self.inventory().await?.vms.iter().find(is_in).map(|vm| vm.guid))
    }

    /// The configuration files of a VM that go when its definition is removed; none where they are only told when it is set
    /// aside.
    ///
    /// # Errors
    /// Also when the file that defines it is not among them: nobody could bring it back.
    async fn config_of(&self, _vm: VmGuid) -> Result<Vec<PathBuf>, HypervisorError> {
        Ok(Vec::new())
    }

    /// Prepares a VM for being replaced: known to its cluster as stopped on purpose, off, without checkpoints and
    /// merges. Nothing of it is lost but its saved state and its checkpoints: `lost` gets a sentence for each, also when
    /// this fails in the middle.
    async fn set_aside(
        &self,
        lease: &Lease,
        vm: VmGuid,
        _lost: &mut Vec<String>,
    ) -> Result<SetAside, HypervisorError> {
        self.stop_vm(lease, vm).await?;
        Ok(SetAside::default())
    }

    /// Starts a VM.
    async fn start_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError>;

    /// Why [`Hypervisor::boot_vm`] cannot see what this check asks for, whatever the VM; asked before a restore writes anything.
    fn boot_obstacle(&self, _check: &BootCheck) -> Option<&'static str> {
        Some("this hypervisor does not tell whether a VM boots")
    }

    /// Starts a VM and watches until it is seen to have booted, it ends, or the check's patience does. The VM stays as it
    /// is, whatever was seen.
    ///
    /// # Errors
    /// It could not be started or asked; that it does not boot is no error.
    async fn boot_vm(
        &self,
        _lease: &Lease,
        vm: VmGuid,
        check: &BootCheck,
    ) -> Result<Booting, HypervisorError> {
        Err(HypervisorError::Odd {
            doing: format!("see whether VM {vm} boots"),
            detail: self.boot_obstacle(check).unwrap_or_default().into(),
        })
    }

    /// Saves a running VM for a moment, through its cluster group where it has one; returns when it is saved.
    ///
    /// # Errors
    /// Also where this hypervisor cannot do so without another interruption than saving.
    async fn save_vm(&self, _lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        Err(HypervisorError::Odd {
            doing: format!("save VM {vm}"),
            detail: "VMs of this hypervisor are never saved for a backup: change the group's consistency".into(),
        })
    }

    /// Lets a VM run on that [`Hypervisor::save_vm`] saved, the same way; one that runs already is no error.
    async fn resume_vm(&self, _lease: &Lease, _vm: VmGuid) -> Result<(), HypervisorError> {
        Ok(())
    }

    /// Turns a VM off at once (its disks are about to be replaced).
    async fn stop_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError>;

    /// Removes a VM's definition; its disks stay.
    async fn remove_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError>;
}
