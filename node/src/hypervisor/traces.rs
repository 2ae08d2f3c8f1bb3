//! What backups leave at a hypervisor, ours or another product's: for an operator who looks for litter, and for a host that is
//! about to leave. Looking changes nothing. What of it is explained, the coordinators decide: they know duties and bases.

use outrider_proto::ids::VmGuid;

use super::ReplicaRole;

/// What was found of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmTraces {
    /// The VM.
    pub guid: VmGuid,
    /// Its display name.
    pub name: String,
    /// Its replica role.
    pub replica: ReplicaRole,
    /// Checkpoints of all kinds.
    pub checkpoints: Vec<FoundCheckpoint>,
    /// Reference points, and what else records changes.
    pub points: Vec<FoundPoint>,
    /// Disks that write to a child file.
    pub chains: Vec<FoundChain>,
    /// Whether the hypervisor merges right now.
    pub merging: bool,
}

impl VmTraces {
    /// A VM of which nothing was found yet.
    #[must_use]
    pub fn of(guid: VmGuid, name: &str, replica: ReplicaRole) -> Self {
        Self {
            guid,
            name: name.to_owned(),
            replica,
            checkpoints: Vec::new(),
            points: Vec::new(),
            chains: Vec::new(),
            merging: false,
        }
    }

    /// Whether there is nothing to tell.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.checkpoints.is_empty()
            && self.points.is_empty()
            && self.chains.is_empty()
            && !self.merging
    }
}

/// Who makes checkpoints of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointKind {
    /// Backup programs.
    Recovery,
    /// Administrators.
    User,
    /// Hyper-V Replica.
    Replica,
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundCheckpoint {
    /// GUID, or the hypervisor's own name for it.
    pub id: String,
    /// Display name.
    pub name: String,
    /// Kind.
    pub kind: CheckpointKind,
    /// When it was made, Unix milliseconds, where the hypervisor tells.
    pub created_unix_ms: Option<u64>,
    /// Whether its name is one that we give.
    pub ours: bool,
}

/// A reference point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundPoint {
    /// The hypervisor's id.
    pub id: String,
    /// Its name, where it has one.
    pub name: String,
    /// Whether we made it; `None`: nothing about it tells.
    pub ours: Option<bool>,
}

/// A disk that writes to a child file, or through another program's filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundChain {
    /// The disk's slot.
    pub slot: String,
    /// The file that is written to, its parent, and so on.
    pub files: Vec<String>,
    /// Why the parents could not be followed to their end.
    pub broken: Option<String>,
}
