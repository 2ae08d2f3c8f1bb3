//! What the lab tells of itself: the cluster as it is, and the truth of every checkpoint.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::GroupSetup;
use crate::config::CheckpointOnMigration;

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
    /// Its adapters and the switches that they are connected to.
    #[serde(default)]
    pub nics: Vec<(String, Option<String>)>,
    /// Images in its drives.
    #[serde(default)]
    pub images: Vec<PathBuf>,
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
