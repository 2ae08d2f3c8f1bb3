//! The checkpoints that an administrator had made of a VM, and which layer of a disk belongs to which.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{ConfigFile, DiskManifest};
use crate::ids::CheckpointId;

/// The checkpoint tree of a VM. Empty: it had none, or it was not kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Checkpoints, parents before children.
    pub checkpoints: Vec<SavedCheckpoint>,
    /// The checkpoint that the point itself follows.
    pub current: Option<CheckpointId>,
    /// Per disk of the manifest, in its order, what each layer but the last is.
    pub layers: Vec<Vec<FrozenLayer>>,
}

/// A checkpoint that an administrator had made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedCheckpoint {
    /// GUID.
    pub id: CheckpointId,
    /// The one that it follows.
    pub parent: Option<CheckpointId>,
    /// Display name.
    pub name: String,
    /// Its configuration files.
    pub config: Vec<ConfigFile>,
}

/// What a layer of a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenLayer {
    /// The checkpoint that froze it.
    pub checkpoint: CheckpointId,
    /// Name of the frozen file, without folders.
    pub file_name: String,
    /// DataWriteGuid of each file of the frozen chain, leaf first: as long as they are the same, nothing was written.
    pub written: Vec<Uuid>,
}

/// Why a tree cannot be that of these disks.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeError {
    #[error("layers without checkpoints")]
    NoCheckpoints,
    #[error("checkpoint {0} is out of order")]
    OutOfOrder(CheckpointId),
    #[error("a checkpoint tree that does not fit the disks")]
    OtherDisks,
    #[error("disk {slot} has layers of no checkpoint")]
    StrayLayers { slot: String },
}

impl Tree {
    /// Whether it fits the disks: one more layer than it describes, parents before children.
    pub(super) fn check(&self, disks: &[DiskManifest]) -> Result<(), TreeError> {
        if self.checkpoints.is_empty() {
            return match self.layers.iter().all(Vec::is_empty) {
                true if disks.iter().all(|d| d.layers.len() == 1) => Ok(()),
                _ => Err(TreeError::NoCheckpoints),
            };
        }
        let before =
            |at: usize, id: CheckpointId| self.checkpoints.iter().take(at).any(|c| c.id == id);
        for (at, checkpoint) in self.checkpoints.iter().enumerate() {
            if before(at, checkpoint.id) || checkpoint.parent.is_some_and(|p| !before(at, p)) {
                return Err(TreeError::OutOfOrder(checkpoint.id));
            }
        }
        let known = |id: CheckpointId| before(self.checkpoints.len(), id);
        if self.current.is_some_and(|c| !known(c)) || self.layers.len() != disks.len() {
            return Err(TreeError::OtherDisks);
        }
        for (disk, layers) in disks.iter().zip(&self.layers) {
            if disk.layers.len() != layers.len() + 1 || !layers.iter().all(|l| known(l.checkpoint))
            {
                return Err(TreeError::StrayLayers { slot: disk.slot.clone() });
            }
        }
        Ok(())
    }
}
