//! What the simulated cluster is made of.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use outrider_wmi::Object;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::{CheckpointOnMigration, CsvConfig};
use crate::control::{CallRecord, FaultKind, FileBytes, TruthRecord};
use crate::disks::VmIo;
use crate::error::LabError;
use crate::faults::{ActiveFault, Hold};
use crate::gate::{Gate, OpenFile};
use crate::guest::Chance;
use crate::hardware::{Equipment, GroupSettings, Hardware};
use crate::jobs::Job;
use crate::shape::{Device, Shape, Surroundings};

/// Everything that a query can see.
pub(crate) struct State {
    pub(crate) realm: String,
    pub(crate) hosts: BTreeMap<String, Host>,
    pub(crate) csvs: Vec<CsvConfig>,
    pub(crate) vms: BTreeMap<Uuid, Vm>,
    /// Planned VMs of imports. Those of migrations are derived from the VM that moves.
    pub(crate) planned: BTreeMap<Uuid, Vm>,
    pub(crate) jobs: BTreeMap<Uuid, Job>,
    pub(crate) switch: CheckpointOnMigration,
    pub(crate) faults: Vec<ActiveFault>,
    pub(crate) holds: Vec<Hold>,
    pub(crate) gates: Vec<Gate>,
    pub(crate) open_files: BTreeMap<u64, OpenFile>,
    /// Open files whose reader waits for a paused CSV, and which.
    pub(crate) paused_reads: BTreeMap<u64, String>,
    pub(crate) bytes_read: BTreeMap<(String, PathBuf), FileBytes>,
    pub(crate) calls: VecDeque<CallRecord>,
    pub(crate) truth: Vec<TruthRecord>,
    pub(crate) chance: Chance,
    pub(crate) counter: u64,
    pub(crate) outbox: Vec<Notice>,
    pub(crate) around: Surroundings,
}

/// Something that subscribers hear of.
#[derive(Debug, Clone)]
pub(crate) struct Notice {
    /// The host whose provider raises it; `None`: the cluster, heard on all hosts.
    pub(crate) host: Option<String>,
    pub(crate) kind: &'static str,
    pub(crate) target: Object,
    pub(crate) previous: Option<Object>,
}

pub(crate) const CREATED: &str = "__InstanceCreationEvent";
pub(crate) const MODIFIED: &str = "__InstanceModificationEvent";
pub(crate) const DELETED: &str = "__InstanceDeletionEvent";

/// A hypervisor host.
pub(crate) struct Host {
    pub(crate) up: bool,
    pub(crate) paused: bool,
    /// When it was started, Unix seconds.
    pub(crate) started: u64,
    pub(crate) connections: usize,
    /// Cancelled when the host crashes: its agent connections end.
    pub(crate) life: CancellationToken,
    /// Cancelled when its WMI service restarts: connections of agents' WMI end, files stay open.
    pub(crate) wmi: CancellationToken,
    /// Switches, versions, guardians.
    pub(crate) equipment: Equipment,
}

/// A VM's power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Power {
    Running,
    Off,
    Saved,
    Paused,
}

impl Power {
    pub(crate) fn enabled_state(self) -> u16 {
        match self {
            Self::Running => 2,
            Self::Off => 3,
            Self::Saved => 6,
            Self::Paused => 9,
        }
    }

    /// Whether the worker process holds the leaf files open.
    pub(crate) fn holds_disks(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// What a VM is busy with, as the second OperationalStatus says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Busy {
    CreatingCheckpoint = 32768,
    ApplyingCheckpoint = 32769,
    DeletingCheckpoint = 32770,
    BackingUp = 32776,
    Modifying = 32777,
    MovingStorage = 32778,
}

/// How far a migration is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Migration {
    pub(crate) target: String,
    /// False while it waits in the queue: nothing is to be seen on the target yet.
    pub(crate) planned: bool,
}

/// A virtual machine.
pub(crate) struct Vm {
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) generation: u8,
    pub(crate) version: String,
    /// Where it is realized (or planned).
    pub(crate) host: String,
    /// Owner node of its cluster group; `None` when not clustered.
    pub(crate) owner: Option<String>,
    /// Host and owner before its last move, which reads that lag still show.
    pub(crate) before: Before,
    pub(crate) power: Power,
    pub(crate) busy: Option<Busy>,
    pub(crate) migration: Option<Migration>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) checkpoints: Vec<Checkpoint>,
    pub(crate) last_applied: Option<Uuid>,
    /// The checkpoint that it follows now: the newest, or the one that was applied.
    pub(crate) current: Option<Uuid>,
    pub(crate) reference_points: Vec<ReferencePoint>,
    pub(crate) merges: Vec<Merge>,
    /// Its folder: configuration files below `Virtual Machines` and `Snapshots`.
    pub(crate) folder: PathBuf,
    pub(crate) created: u64,
    /// Whether the guest's VSS integration answers.
    pub(crate) vss: bool,
    /// What WMI shows besides.
    pub(crate) shape: Shape,
    pub(crate) steady: Option<SteadyGuest>,
    /// Adapters, drives, TPM, folders.
    pub(crate) hardware: Hardware,
    /// Whether its account may open its files.
    pub(crate) rights: bool,
    /// Settings of its cluster group, while it has one.
    pub(crate) group: GroupSettings,
    /// Times that it stopped under a cluster that had not stopped it.
    pub(crate) cluster_failures: u32,
    /// The bytes; locked only on threads that may block, and never while the state is locked.
    pub(crate) io: Arc<Mutex<VmIo>>,
}

/// Where a VM was before its last move.
#[derive(Debug, Clone, Default)]
pub(crate) struct Before {
    pub(crate) host: Option<String>,
    pub(crate) owner: Option<String>,
}

/// A guest that writes all the time.
#[derive(Debug, Clone, Default)]
pub(crate) struct SteadyGuest {
    /// Cancelled to make it stop after the write it is at.
    pub(crate) stop: CancellationToken,
    /// Cancelled when it has stopped.
    pub(crate) stopped: CancellationToken,
}

/// A disk slot of a VM.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    pub(crate) id: Uuid,
    pub(crate) location: u32,
    /// Base first, leaf last; empty for a disk that no checkpoint holds.
    pub(crate) chain: Vec<PathBuf>,
    /// What such a disk is, if it is no pass-through disk.
    pub(crate) device: Option<Device>,
    pub(crate) size: u64,
    pub(crate) disk_id: Uuid,
}

impl Disk {
    pub(crate) fn is_virtual(&self) -> bool {
        !self.chain.is_empty()
    }

    pub(crate) fn leaf(&self) -> Option<&Path> {
        self.chain.last().map(PathBuf::as_path)
    }
}

/// A checkpoint.
#[derive(Debug, Clone)]
pub(crate) struct Checkpoint {
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) recovery: bool,
    pub(crate) consistency: u8,
    pub(crate) created: u64,
    pub(crate) disks: Vec<FrozenDisk>,
    pub(crate) parent: Option<Uuid>,
    pub(crate) notes: String,
    /// It carries a saved state.
    pub(crate) saved: bool,
    /// What the VM had besides disks.
    pub(crate) hardware: Hardware,
    /// Of a planned VM: the GUID that its files are named by.
    pub(crate) file_id: Uuid,
    /// Of a planned VM: its definition file was not found.
    pub(crate) missing: bool,
}

/// A disk as a checkpoint froze it.
#[derive(Debug, Clone)]
pub(crate) struct FrozenDisk {
    /// Slot.
    pub(crate) disk: Uuid,
    /// Its place at the controller: the VM itself may have the disk no more.
    pub(crate) location: u32,
    /// File that is frozen; its parents are, too.
    pub(crate) path: PathBuf,
    /// It and its parents, base first.
    pub(crate) chain: Vec<PathBuf>,
    /// Name of this moment in change tracking; only recovery checkpoints have one.
    pub(crate) mark: Option<String>,
}

/// A reference point.
#[derive(Debug, Clone)]
pub(crate) struct ReferencePoint {
    pub(crate) id: Uuid,
    pub(crate) consistency: u8,
    pub(crate) marks: Vec<(Uuid, String)>,
}

/// A merge to be done: the child made by a checkpoint goes back into what it froze.
#[derive(Debug, Clone)]
pub(crate) struct Merge {
    pub(crate) id: u64,
    pub(crate) frozen: Vec<(Uuid, PathBuf)>,
    pub(crate) waits: Option<String>,
}

impl Vm {
    pub(crate) fn guid(&self) -> String {
        guid(self.id)
    }

    pub(crate) fn recovery_checkpoint(&self) -> Option<&Checkpoint> {
        self.checkpoints.iter().find(|c| c.recovery)
    }

    pub(crate) fn disk(&self, id: Uuid) -> Option<&Disk> {
        self.disks.iter().find(|d| d.id == id)
    }

    /// Every chain of a disk: its own, and those that checkpoints froze.
    pub(crate) fn chains(&self, disk: Uuid) -> impl Iterator<Item = &Vec<PathBuf>> {
        let frozen = self.checkpoints.iter().flat_map(|c| &c.disks);
        let frozen = frozen.filter(move |f| f.disk == disk).map(|f| &f.chain);
        self.disk(disk).map(|d| &d.chain).into_iter().chain(frozen)
    }

    /// The files that were made from a file of a disk.
    pub(crate) fn children_of(&self, disk: Uuid, parent: &Path) -> Vec<&Path> {
        let mut children: Vec<&Path> = self
            .chains(disk)
            .flat_map(|chain| chain.iter().zip(chain.iter().skip(1)))
            .filter(|(p, _)| *p == parent)
            .map(|(_, child)| child.as_path())
            .collect();
        children.sort();
        children.dedup();
        children
    }

    /// Whether a checkpoint keeps a file as it is.
    pub(crate) fn is_frozen(&self, disk: Uuid, path: &Path) -> bool {
        self.checkpoints.iter().flat_map(|c| &c.disks).any(|f| f.disk == disk && f.path == path)
    }

    /// Files that a pending merge reads or writes.
    pub(crate) fn merging(&self, path: &Path) -> bool {
        self.merges
            .iter()
            .flat_map(|m| &m.frozen)
            .any(|(disk, frozen)| frozen == path || self.children_of(*disk, frozen).contains(&path))
    }

    /// Whether the hypervisor is writing to this file.
    pub(crate) fn writes(&self, path: &Path) -> bool {
        self.power.holds_disks() && self.disks.iter().any(|d| d.leaf() == Some(path))
    }

    /// The two OperationalStatus values.
    pub(crate) fn operational_status(&self) -> [u16; 2] {
        if self.migration.as_ref().is_some_and(|m| m.planned) {
            [11, 32774]
        } else if let Some(busy) = self.busy {
            [11, busy as u16]
        } else if !self.merges.is_empty() {
            [11, 32772]
        } else {
            [2, 2]
        }
    }
}

/// A GUID as Hyper-V writes it.
pub(crate) fn guid(id: Uuid) -> String {
    id.hyphenated().to_string().to_ascii_uppercase()
}

impl State {
    pub(crate) fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// A GUID by the lab's seed.
    pub(crate) fn new_guid(&mut self) -> Uuid {
        self.chance.guid()
    }

    /// A realized VM by GUID or by name.
    pub(crate) fn find_vm(&self, name: &str) -> Result<&Vm, LabError> {
        if let Ok(id) = name.parse::<Uuid>()
            && let Some(vm) = self.vms.get(&id)
        {
            return Ok(vm);
        }
        let mut named = self.vms.values().filter(|v| v.name == name);
        match (named.next(), named.next()) {
            (Some(vm), None) => Ok(vm),
            (Some(_), Some(_)) => {
                Err(LabError::refused(name, 1, "several VMs have this name; use the GUID"))
            }
            (None, _) => Err(LabError::unknown("VM", name)),
        }
    }

    pub(crate) fn vm(&self, id: Uuid) -> Result<&Vm, LabError> {
        self.vms.get(&id).ok_or_else(|| LabError::unknown("VM", id))
    }

    pub(crate) fn vm_mut(&mut self, id: Uuid) -> Result<&mut Vm, LabError> {
        self.vms.get_mut(&id).ok_or_else(|| LabError::unknown("VM", id))
    }

    pub(crate) fn host_mut(&mut self, name: &str) -> Result<&mut Host, LabError> {
        self.hosts.get_mut(name).ok_or_else(|| LabError::unknown("host", name))
    }

    /// The VM that a file belongs to, by its chains, checkpoints and folder.
    pub(crate) fn vm_of_file(&self, path: &Path) -> Option<&Vm> {
        let all = || self.vms.values().chain(self.planned.values());
        all()
            .find(|vm| vm.disks.iter().any(|d| d.chain.iter().any(|p| p == path)))
            .or_else(|| all().find(|vm| path.starts_with(&vm.folder)))
    }

    /// The host on which reads show a VM.
    pub(crate) fn shown_on<'a>(&self, vm: &'a Vm) -> &'a str {
        let before = vm.before.host.as_deref();
        let late = || self.ails(Some(vm.id), None, |k| *k == FaultKind::LateReads);
        before.filter(|_| late()).unwrap_or(&vm.host)
    }

    /// The owner of a VM's group as the cluster's database is read.
    pub(crate) fn shown_owner<'a>(&self, vm: &'a Vm) -> Option<&'a str> {
        let before = vm.before.owner.as_deref();
        let late = || self.ails(Some(vm.id), None, |k| *k == FaultKind::LateClusterReads);
        before.filter(|_| late()).or(vm.owner.as_deref())
    }

    pub(crate) fn notify(
        &mut self,
        host: Option<&str>,
        kind: &'static str,
        target: Object,
        previous: Option<Object>,
    ) {
        self.outbox.push(Notice { host: host.map(str::to_owned), kind, target, previous });
    }
}
