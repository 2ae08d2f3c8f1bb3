//! The checkpoints that an administrator had made of a VM, and which layer of a disk belongs to which.
//!
//! A layer is a whole disk at the moment of its checkpoint, never a difference: which one it follows is told by the
//! checkpoints' parents, so branches need nothing of their own, and a layer restores without any other.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::machine::Security;
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
    /// Disks that checkpoints have and the VM at the point has not (section 5).
    #[serde(skip)]
    pub former: Vec<FormerDisk>,
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
    /// What else is known of it (section 4).
    #[serde(skip)]
    pub facts: CheckpointFacts,
}

/// What a checkpoint is besides its files. Everything empty: nothing was told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointFacts {
    /// The administrator's remarks.
    pub notes: String,
    /// When it was made, milliseconds since the Unix epoch; 0: not told.
    pub created_unix_ms: u64,
    /// It carries a saved state, memory included, in its configuration files.
    pub saved_state: bool,
    /// The host made it by itself, as clients do at each start.
    pub automatic: bool,
    /// vTPM and shielding as of then, where the VM had any of it: the key protector belongs to the guest state of the
    /// same checkpoint.
    pub security: Option<Security>,
}

/// What a layer of a disk is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenLayer {
    /// The checkpoint that froze it.
    pub checkpoint: CheckpointId,
    /// Name of the frozen file, without folders.
    pub file_name: String,
    /// DataWriteGuid of each file of the frozen chain, leaf first: as long as they are the same, nothing was written.
    /// Empty when the files do not tell.
    pub written: Vec<Uuid>,
}

/// A disk that only checkpoints have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormerDisk {
    /// The disk; all of its layers are checkpoints'.
    pub disk: DiskManifest,
    /// What each layer is.
    pub layers: Vec<FrozenLayer>,
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
    #[error("disk {slot} has two layers of one checkpoint")]
    Twice { slot: String },
}

impl Tree {
    /// A checkpoint.
    #[must_use]
    pub fn checkpoint(&self, id: CheckpointId) -> Option<&SavedCheckpoint> {
        self.checkpoints.iter().find(|c| c.id == id)
    }

    /// Which of a disk's layers is the state that `from` has or follows: its own, else that of its nearest ancestor which
    /// has the disk.
    #[must_use]
    pub fn layer_at(&self, layers: &[FrozenLayer], from: Option<CheckpointId>) -> Option<usize> {
        let mut at = from;
        // Parents stand before children, so this ends.
        while let Some(id) = at {
            if let Some(found) = layers.iter().position(|l| l.checkpoint == id) {
                return Some(found);
            }
            at = self.checkpoint(id)?.parent;
        }
        None
    }

    /// The layer that a disk's layer follows.
    #[must_use]
    pub fn parent_of(&self, layers: &[FrozenLayer], layer: usize) -> Option<usize> {
        let own = layers.get(layer)?.checkpoint;
        self.layer_at(layers, self.checkpoint(own)?.parent)
    }

    /// Whether it fits the disks: one more layer than it describes, parents before children.
    pub(super) fn check(&self, disks: &[DiskManifest]) -> Result<(), TreeError> {
        if self.checkpoints.is_empty() {
            let flat = self.layers.iter().all(Vec::is_empty) && self.former.is_empty();
            return match flat && disks.iter().all(|d| d.layers.len() == 1) {
                true => Ok(()),
                false => Err(TreeError::NoCheckpoints),
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
        let former = self.former.iter().map(|f| (&f.disk, &f.layers, f.layers.len()));
        let now =
            disks.iter().zip(&self.layers).map(|(disk, layers)| (disk, layers, layers.len() + 1));
        for (disk, layers, expected) in now.chain(former) {
            if disk.layers.len() != expected || !layers.iter().all(|l| known(l.checkpoint)) {
                return Err(TreeError::StrayLayers { slot: disk.slot.clone() });
            }
            for (at, layer) in layers.iter().enumerate() {
                if layers.iter().take(at).any(|l| l.checkpoint == layer.checkpoint) {
                    return Err(TreeError::Twice { slot: disk.slot.clone() });
                }
            }
        }
        Ok(())
    }
}
