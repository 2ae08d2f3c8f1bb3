//! Reference points: dirty bitmaps of ours. One records from the moment of its checkpoint on and is never changed, so that it stays
//! a proven base whatever happens to the jobs that read it; what is read is a copy.

use std::collections::BTreeMap;
use std::path::Path;

use outrider_disk::RangeSet;
use outrider_proto::ids::CheckpointId;
use serde_json::json;

use super::blocks::Disk;
use super::checkpoint::{Checkpoints, Open, OpenDisk};
use super::error::QemuError;
use super::frozen::extents;
use super::machine::Machine;
use super::names::{self, Node, Ours};
use super::nbd::{self, Nbd};
use super::qmp::QmpError;
use super::server;
use crate::hypervisor::{HypervisorError, ReferencePoint};

/// Granularity of our bitmaps, bytes; of a copy the same.
const GRANULARITY: u64 = 64 << 10;

impl Checkpoints {
    /// A disk that cannot have a bitmap is captured all the same; the next run reads it in full.
    pub(super) async fn add_bitmap(
        &self,
        machine: &Machine,
        disk: &Disk,
        id: CheckpointId,
    ) -> Result<(), QemuError> {
        let bitmap = json!({
            "node": disk.base, "name": self.bitmaps.since(id), "granularity": GRANULARITY, "persistent": disk.persistent,
        });
        match machine.qmp.execute("block-dirty-bitmap-add", bitmap).await {
            Ok(_) => Ok(()),
            Err(e) if e.is_refusal() => {
                tracing::warn!(vm = machine.name, slot = disk.slot, error = %e, "no change tracking for this disk");
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// The reference points of a VM: bitmaps of ours whose checkpoint is not open any more.
    pub(super) async fn points(&self, machine: &Machine) -> Result<Vec<ReferencePoint>, QmpError> {
        let open: Vec<CheckpointId> = self.list(machine).await?.into_iter().map(|o| o.id).collect();
        let mut found: BTreeMap<CheckpointId, Vec<(String, String)>> = BTreeMap::new();
        for disk in machine.disks().await? {
            for bitmap in &disk.bitmaps {
                let Some(Ours::Since(id)) = self.bitmaps.parse(&bitmap.name) else { continue };
                if open.contains(&id) {
                    continue;
                }
                let tracking = found.entry(id).or_default();
                // One that was not stored, or does not record, proves nothing; it is listed to be removed.
                if bitmap.recording && !bitmap.inconsistent {
                    tracking.push((disk.slot.clone(), id.to_string()));
                }
            }
        }
        let point = |(id, tracking): (CheckpointId, Vec<_>)| ReferencePoint {
            id: id.to_string(),
            path: format!("qemu:{}/{id}", machine.vm),
            tracking,
        };
        Ok(found.into_iter().map(point).collect())
    }

    /// What changed on a disk of an open checkpoint since another one: at least that.
    pub(super) async fn changes(
        &self,
        machine: &Machine,
        open: &Open,
        of: &OpenDisk,
        since: &str,
        file: &Path,
    ) -> Result<RangeSet, HypervisorError> {
        let lost = |reason: String| HypervisorError::TrackingLost { disk: file.to_owned(), reason };
        let since: CheckpointId =
            since.parse().map_err(|_| lost(format!("{since:?} is no bitmap of ours")))?;
        let (original, copy) = (self.bitmaps.since(since), self.bitmaps.changes(since));
        match of.disk.bitmap(&original) {
            None => return Err(lost("the dirty bitmap is gone: QEMU ended without storing it, or the image was replaced".into())),
            Some(b) if b.inconsistent => {
                return Err(lost("the dirty bitmap is inconsistent: QEMU was killed before it could store it".into()));
            }
            Some(b) if !b.recording => return Err(lost("the dirty bitmap was stopped by another program".into())),
            Some(_) => {}
        }
        let _one = machine.graph.lock().await;
        let node = of.disk.base.as_str();
        let copied = json!({ "actions": [
            { "type": "block-dirty-bitmap-add",
              "data": { "node": node, "name": copy, "granularity": GRANULARITY, "disabled": true } },
            { "type": "block-dirty-bitmap-merge",
              "data": { "node": node, "target": copy, "bitmaps": [original] } },
        ] });
        machine.qmp.execute("transaction", copied).await.map_err(QemuError::from)?;
        let read = self.read_copy(machine, open, of, &copy).await;
        let removed = machine
            .qmp
            .execute("block-dirty-bitmap-remove", json!({ "node": node, "name": copy }))
            .await;
        if let Err(e) = removed {
            tracing::warn!(vm = machine.name, error = %e, "a copy of a bitmap stays until the next checkpoint");
        }
        let mut changed = read?;
        changed.clamp(of.disk.size);
        Ok(changed)
    }

    async fn read_copy(
        &self,
        machine: &Machine,
        open: &Open,
        of: &OpenDisk,
        copy: &str,
    ) -> Result<RangeSet, QemuError> {
        let name = format!("{}-changes", names::nbd_export(of.index, open.id));
        let id = format!("outrider-{name}");
        let export = json!({
            "type": "nbd", "id": id, "node-name": names::node(Node::Access, of.index, open.id),
            "name": name, "writable": false, "bitmaps": [{ "node": of.disk.base, "name": copy }],
        });
        machine.qmp.execute("block-export-add", export).await?;
        let (socket, context) = (server::socket(machine), format!("qemu:dirty-bitmap:{copy}"));
        let read = tokio::task::spawn_blocking(move || {
            let mut nbd = Nbd::connect(&socket, &name, Some(&context))?;
            let changed = extents(&mut nbd, |flags| flags & nbd::DIRTY != 0)?;
            nbd.disconnect()?;
            Ok::<_, std::io::Error>(changed)
        })
        .await;
        machine.qmp.execute("block-export-del", json!({ "id": id, "mode": "hard" })).await?;
        self.export_gone(machine, &id).await?;
        let failed = |reason: String| QemuError::File {
            doing: "read the dirty bitmap of",
            path: of.disk.image.clone(),
            reason,
        };
        match read {
            Ok(read) => read.map_err(|e| failed(e.to_string())),
            Err(_) => Err(failed("the reading thread failed".into())),
        }
    }

    async fn export_gone(&self, machine: &Machine, id: &str) -> Result<(), QmpError> {
        self.exports_gone(machine, &[id.to_owned()]).await
    }

    /// Removes the bitmap that began with a checkpoint, wherever it is.
    pub(super) async fn remove_bitmap(
        &self,
        machine: &Machine,
        id: CheckpointId,
    ) -> Result<(), QemuError> {
        self.remove_bitmaps(machine, &|name| name == self.bitmaps.since(id)).await
    }

    pub(super) async fn remove_bitmaps(
        &self,
        machine: &Machine,
        wanted: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<(), QemuError> {
        for disk in machine.disks().await? {
            for bitmap in disk.bitmaps.iter().filter(|b| wanted(&b.name)) {
                Self::check_active(machine, std::slice::from_ref(&disk))?;
                let named = json!({ "node": disk.base, "name": bitmap.name });
                machine.qmp.execute("block-dirty-bitmap-remove", named).await?;
            }
        }
        Ok(())
    }

    /// Removes the copies that an interrupted reading left.
    pub(super) async fn remove_copies(&self, machine: &Machine) -> Result<(), QemuError> {
        let copy = |name: &str| matches!(self.bitmaps.parse(name), Some(Ours::Changes(_)));
        self.remove_bitmaps(machine, &copy).await
    }
}
