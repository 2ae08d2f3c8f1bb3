//! What backups left in a QEMU: checkpoints (filters and exports), dirty bitmaps, and filters of other programs.

use std::collections::BTreeSet;

use outrider_proto::ids::CheckpointId;
use serde_json::Value;

use super::blocks::{Disk, is_filter};
use super::checkpoint::Checkpoints;
use super::machine::Machine;
use super::names;
use super::qmp::QmpError;
use super::server::export_ids;
use crate::hypervisor::ReplicaRole;
use crate::hypervisor::traces::{
    CheckpointKind, FoundChain, FoundCheckpoint, FoundPoint, VmTraces,
};

impl Checkpoints {
    /// All of one VM.
    pub(super) async fn traces(&self, machine: &Machine) -> Result<VmTraces, QmpError> {
        let exports = machine.qmp.execute("query-block-exports", Value::Null).await?;
        let disks = machine.disks().await?;
        let mut found = VmTraces::of(machine.vm, &machine.name, ReplicaRole::None);
        found.checkpoints = exported(&export_ids(&exports));
        let open: BTreeSet<&str> = found.checkpoints.iter().map(|c| c.id.as_str()).collect();
        let mut points: Vec<FoundPoint> = Vec::new();
        for bitmap in disks.iter().flat_map(|d| &d.bitmaps) {
            let ours = match self.bitmaps.parse(&bitmap.name) {
                Some(names::Ours::Since(id)) => Some(id),
                // A copy that an interrupted reading left; the next checkpoint removes it.
                Some(names::Ours::Changes(_)) => continue,
                None => None,
            };
            let id = ours.map_or_else(|| bitmap.name.clone(), |id| id.to_string());
            if !open.contains(id.as_str()) && points.iter().all(|p| p.id != id) {
                points.push(FoundPoint {
                    id,
                    name: bitmap.name.clone(),
                    ours: Some(ours.is_some()),
                });
            }
        }
        found.points = points;
        found.chains = disks.iter().filter_map(filtered).collect();
        Ok(found)
    }
}

/// Checkpoints of ours by their exports; what others export is a backup of theirs, or a migration of storage.
fn exported(ids: &[String]) -> Vec<FoundCheckpoint> {
    let mut found: Vec<FoundCheckpoint> = Vec::new();
    for id in ids {
        let ours: Option<(usize, CheckpointId, String)> = names::parse_export(id);
        let (id, name, ours) = match ours {
            Some((_, checkpoint, name)) => (checkpoint.to_string(), name, true),
            None => (id.clone(), String::new(), false),
        };
        if found.iter().all(|c| c.id != id) {
            let kind = CheckpointKind::Recovery;
            found.push(FoundCheckpoint { id, name, kind, created_unix_ms: None, ours });
        }
    }
    found
}

/// A filter of another program between the VM and its image.
fn filtered(disk: &Disk) -> Option<FoundChain> {
    is_filter(&disk.format).then(|| FoundChain {
        slot: disk.slot.clone(),
        files: vec![format!("{} ({})", disk.base, disk.format), disk.image.display().to_string()],
        broken: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_of_ours_are_one_checkpoint_and_others_are_told_apart() {
        let id = CheckpointId::random();
        let name = "Outrider 0195-a 3 7";
        let ids =
            [names::export(0, id, name), names::export(1, id, name), "libvirt-backup".to_owned()];
        let found = exported(&ids);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].ours && found[0].id == id.to_string() && found[0].name == name);
        assert!(!found[1].ours && found[1].id == "libvirt-backup");
    }
}
