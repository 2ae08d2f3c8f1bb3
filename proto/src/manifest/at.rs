//! A recovery point as it was at one of its checkpoints: the state of the VM then, without any tree.

use super::{DiskManifest, FrozenLayer, Manifest, SavedCheckpoint, Tree};

/// Why a recovery point cannot be shown as of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AtError {
    /// No such checkpoint.
    #[error(
        "recovery point {point} holds no checkpoint {wanted:?}; it holds {}",
        if .held.is_empty() { "none".to_owned() } else { .held.join(", ") }
    )]
    Unknown {
        /// Point.
        point: String,
        /// Name or GUID asked for.
        wanted: String,
        /// Names of those that it holds.
        held: Vec<String>,
    },
    /// Several of one name.
    #[error("recovery point {point} holds several checkpoints called {wanted:?}: name one by its GUID, {}", .ids.join(" or "))]
    Ambiguous {
        /// Point.
        point: String,
        /// Name asked for.
        wanted: String,
        /// GUIDs of them.
        ids: Vec<String>,
    },
}

impl Manifest {
    /// The VM at a checkpoint of the point, by the checkpoint's name or GUID: configuration, disks, security and saved
    /// state of then. What it was besides (adapters, images, cluster group) is of the point itself.
    ///
    /// # Errors
    /// [`AtError`].
    pub fn at(&self, wanted: &str) -> Result<Self, AtError> {
        let found = self.find(wanted)?;
        let frozen = |disk: &DiskManifest, layers: &[FrozenLayer]| {
            let at = layers.iter().position(|l| l.checkpoint == found.id)?;
            let layers = vec![*disk.layers.get(at)?];
            // What was left out was left out of the point's own layer.
            Some(DiskManifest { layers, excluded: Vec::new(), ..disk.clone() })
        };
        let now = self.disks.iter().zip(&self.tree.layers);
        let former = self.tree.former.iter().map(|f| (&f.disk, &f.layers));
        let disks = now.chain(former).filter_map(|(disk, layers)| frozen(disk, layers)).collect();
        let mut machine = self.machine.clone();
        machine.saved_state = found.facts.saved_state;
        machine.security.clone_from(&found.facts.security);
        Ok(Self {
            disks,
            machine,
            config: found.config.clone(),
            tree: Tree::default(),
            ..self.clone()
        })
    }

    fn find(&self, wanted: &str) -> Result<&SavedCheckpoint, AtError> {
        let all = &self.tree.checkpoints;
        let id = |c: &SavedCheckpoint| c.id.to_string();
        if let Some(found) = all.iter().find(|c| id(c).eq_ignore_ascii_case(wanted)) {
            return Ok(found);
        }
        let named: Vec<&SavedCheckpoint> = all.iter().filter(|c| c.name == wanted).collect();
        let (point, wanted) = (self.point.to_string(), wanted.to_owned());
        match named.as_slice() {
            [found] => Ok(found),
            [] => {
                let held = all.iter().map(|c| format!("{:?}", c.name)).collect();
                Err(AtError::Unknown { point, wanted, held })
            }
            several => {
                let ids = several.iter().map(|c| id(c)).collect();
                Err(AtError::Ambiguous { point, wanted, ids })
            }
        }
    }
}
