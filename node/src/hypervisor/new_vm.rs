//! What a restore asks for and hears: a VM from files, a host to fit it to, a VM to be replaced.

use std::path::PathBuf;

use outrider_proto::ids::{DiskId, VmGuid};
use outrider_proto::manifest::{ClusterGroup, Guardian, Switch};

/// A VM that is to be made from restored files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewVm {
    /// Definition file (.vmcx).
    pub definition: PathBuf,
    /// Folder that everything of the VM lies in.
    pub folder: PathBuf,
    /// Display name.
    pub name: String,
    /// Keep the GUID of the definition.
    pub keep_guid: bool,
    /// The VM of this host whose place it takes.
    pub replaces: Option<VmGuid>,
    /// Disk files by slot.
    pub disks: Vec<(String, PathBuf)>,
    /// It is made again from its own files: disks of the definition that are not among these stay as they are.
    pub as_it_was: bool,
    /// Make it highly available.
    pub clustered: bool,
    /// What its cluster group was like.
    pub group: Option<ClusterGroup>,
    /// How its adapters are connected.
    pub networks: Networks,
    /// Throw a saved state away.
    pub discard_saved_state: bool,
    /// Folder of its checkpoints' definitions, when they are restored.
    pub checkpoints: Option<PathBuf>,
    /// Its checkpoints, when they are restored.
    pub restored_checkpoints: Vec<RestoredCheckpoint>,
}

/// A checkpoint that is restored with its VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RestoredCheckpoint {
    /// Its GUID; under a new GUID of the VM, the hypervisor may give it another one.
    pub id: uuid::Uuid,
    /// Its display name.
    pub name: String,
    /// Disk files by slot.
    pub disks: Vec<(String, PathBuf)>,
}

/// How adapters of a restored VM are connected. A switch that is not chosen here is looked for by GUID, then by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks {
    /// Switch of the recovery point (name or GUID) and switch of this host (name or GUID).
    pub choices: Vec<(String, String)>,
    /// Connect none.
    pub disconnect: bool,
}

/// A VM that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defined {
    /// Its GUID.
    pub vm: VmGuid,
    /// What had to be mended so that it can start: one sentence each.
    pub mended: Vec<String>,
}

/// What a restore has to know of a host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// The host's name; empty when not told.
    pub host: String,
    /// Configuration versions that it supports; empty when not told.
    pub versions: Vec<String>,
    /// Its virtual switches.
    pub switches: Vec<Switch>,
    /// Guardians whose keys it has; `None` when not told.
    pub guardians: Option<Vec<Guardian>>,
}

/// What was found of a VM when it was made ready for being replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SetAside {
    /// Configuration files that define it; gone when its definition is removed.
    pub config: Vec<PathBuf>,
    /// It ran when it was asked for.
    pub ran: bool,
    /// Its disks.
    pub disks: Vec<DiskAside>,
    /// Its display name.
    pub name: String,
    /// Its cluster group.
    pub group: Option<ClusterGroup>,
}

/// A disk of a VM that was made ready for being replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskAside {
    /// Where it is attached.
    pub slot: String,
    /// Its file.
    pub file: PathBuf,
    /// Its VirtualDiskId, where the hypervisor told it.
    pub id: Option<DiskId>,
}
