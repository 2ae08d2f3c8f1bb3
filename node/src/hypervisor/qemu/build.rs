//! Putting a checkpoint between a VM and its disks: scratch files, filters, exports.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use outrider_proto::ids::CheckpointId;
use serde_json::{Value, json};

use super::blocks::Disk;
use super::checkpoint::Checkpoints;
use super::error::QemuError;
use super::machine::Machine;
use super::names::{self, Node};
use super::{scratch, server};

/// How long the scratch file may take for one write before the checkpoint is given up, seconds.
const SCRATCH_PATIENCE: u64 = 15;
impl Checkpoints {
    /// Builds all of it.
    pub(super) async fn build(
        &self,
        machine: &Arc<Machine>,
        id: CheckpointId,
        name: &str,
        disks: &[Disk],
    ) -> Result<(), QemuError> {
        server::ensure(machine).await?;
        let qmp = &machine.qmp;
        for (index, disk) in disks.iter().enumerate() {
            let file = scratch::file(&self.scratch, disk.size)?;
            self.add_scratch(machine, index, id, file).await?;
            let filter = json!({
                "driver": "copy-before-write", "node-name": names::node(Node::Filter, index, id),
                "file": disk.base, "target": names::node(Node::Scratch, index, id),
                "on-cbw-error": "break-snapshot", "cbw-timeout": SCRATCH_PATIENCE,
            });
            qmp.execute("blockdev-add", filter).await?;
        }
        for disk in disks {
            self.add_bitmap(machine, disk, id).await?;
        }
        self.insert(machine, id, disks).await?;
        for index in 0..disks.len() {
            let access = names::node(Node::Access, index, id);
            let node = json!({
                "driver": "snapshot-access", "node-name": access, "file": names::node(Node::Filter, index, id),
            });
            qmp.execute("blockdev-add", node).await?;
            let export = json!({
                "type": "nbd", "id": names::export(index, id, name), "node-name": access,
                "name": names::nbd_export(index, id), "writable": false,
            });
            qmp.execute("block-export-add", export).await?;
        }
        Ok(())
    }

    async fn add_scratch(
        &self,
        machine: &Machine,
        index: usize,
        id: CheckpointId,
        file: OwnedFd,
    ) -> Result<(), QemuError> {
        let opaque = names::node(Node::Scratch, index, id);
        let added = machine.qmp.execute_with("add-fd", json!({ "opaque": opaque }), file).await?;
        let set = added["fdset-id"].as_u64().unwrap_or_default();
        let node = json!({
            "driver": "file", "node-name": opaque, "filename": format!("/dev/fdset/{set}"), "locking": "off",
        });
        machine.qmp.execute("blockdev-add", node).await?;
        Ok(())
    }

    /// Puts the filters below the guest's devices, all at one moment.
    async fn insert(
        &self,
        machine: &Arc<Machine>,
        id: CheckpointId,
        disks: &[Disk],
    ) -> Result<(), QemuError> {
        let set = |(index, disk): (usize, &Disk)| {
            let filter = names::node(Node::Filter, index, id);
            ("qom-set", json!({ "path": disk.device, "property": "drive", "value": filter }))
        };
        let commands: Vec<(&str, Value)> = disks.iter().enumerate().map(set).collect();
        let answers = match commands.len() {
            0 | 1 => machine.qmp.execute_all(commands).await,
            _ => self.held.while_still(machine, commands).await?,
        };
        answers.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(())
    }
}
