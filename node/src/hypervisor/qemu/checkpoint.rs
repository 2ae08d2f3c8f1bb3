//! Checkpoints: for each disk a copy-before-write filter below the guest's device, what the guest overwrites being copied to a
//! scratch file first, and an NBD export of the disk as it was. With it begins a dirty bitmap, which becomes the reference point.
//!
//! ```text
//!   guest's device                      NBD export  outrider-0-...
//!         |                                  |
//!   outrider-c0 (copy-before-write) <-- outrider-a0 (snapshot-access)
//!      |                \
//!   the disk          outrider-s0 (scratch, a file without a name)
//!   + bitmap outrider-FABRIC-CHECKPOINT
//! ```
//!
//! The bitmap begins a moment before the filter, so that it can only say too much. A scratch file that is full, or too slow,
//! breaks the checkpoint and never the guest (`on-cbw-error=break-snapshot`). All disks get their filters while the VM stands
//! still for a few milliseconds, so that they are of one moment. QEMU refuses to hand a disk with such a filter over to the
//! target of a migration, so a checkpoint gives way to a migration at once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use outrider_proto::ids::CheckpointId;
use serde_json::Value;

use super::OLDEST;
use super::blocks::Disk;
use super::error::QemuError;
use super::frozen::Export;
use super::held::Held;
use super::machine::Machine;
use super::names::{self, Bitmaps, Node};
use super::qmp::QmpError;
use super::server::{self, export_ids};
use crate::hypervisor::{Checkpoint, HypervisorError};
use crate::lease::Lease;

/// Makes, finds and removes checkpoints.
#[derive(Debug, Clone)]
pub(super) struct Checkpoints {
    pub(super) bitmaps: Bitmaps,
    pub(super) scratch: PathBuf,
    pub(super) scratch_limit: u64,
    pub(super) held: Held,
    pub(super) broken: Broken,
}

/// Checkpoints that could not be read: their scratch file was full or too slow, which QEMU tells only to who reads.
#[derive(Debug, Clone, Default)]
pub(super) struct Broken(Arc<Mutex<BTreeSet<CheckpointId>>>);

impl Broken {
    pub(super) fn mark(&self, id: CheckpointId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
    }

    fn contains(&self, id: CheckpointId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
    }
}

/// A checkpoint that is open in a QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Open {
    pub(super) id: CheckpointId,
    pub(super) name: String,
    pub(super) disks: Vec<OpenDisk>,
}

/// One of its disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OpenDisk {
    pub(super) index: usize,
    pub(super) disk: Disk,
}

impl Open {
    pub(super) fn handle(&self, machine: &Machine) -> Checkpoint {
        Checkpoint {
            id: self.id,
            name: self.name.clone(),
            path: format!("qemu:{}/{}", machine.vm, self.id),
        }
    }

    pub(super) fn export(&self, machine: &Machine, of: &OpenDisk) -> Export {
        Export {
            socket: server::socket(machine),
            name: names::nbd_export(of.index, self.id),
            disk: of.disk.id(machine.vm),
            size: of.disk.size,
            file: of.disk.file_name(),
            cluster: of.disk.cluster.unwrap_or(1 << 20),
        }
    }
}

impl Checkpoints {
    /// The checkpoints of ours that are whole: exported, and between guest and disk.
    pub(super) async fn list(&self, machine: &Machine) -> Result<Vec<Open>, QmpError> {
        let exports = machine.qmp.execute("query-block-exports", Value::Null).await?;
        let ids: Vec<_> =
            export_ids(&exports).into_iter().filter_map(|id| names::parse_export(&id)).collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let disks = machine.disks().await?;
        let mut found: BTreeMap<CheckpointId, Open> = BTreeMap::new();
        let mut broken = Vec::new();
        for (index, id, name) in ids {
            let filter = names::node(Node::Filter, index, id);
            match disks.iter().find(|d| d.root == filter) {
                Some(disk) => {
                    let open =
                        found.entry(id).or_insert_with(|| Open { id, name, disks: Vec::new() });
                    open.disks.push(OpenDisk { index, disk: disk.clone() });
                }
                None => broken.push(id),
            }
        }
        found.retain(|id, _| !broken.contains(id) && !self.broken.contains(*id));
        let mut found: Vec<Open> = found.into_values().collect();
        for open in &mut found {
            open.disks.sort_by_key(|d| d.index);
        }
        Ok(found)
    }

    /// Makes a checkpoint of all disks that can be captured.
    pub(super) async fn create(
        &self,
        machine: &Arc<Machine>,
        lease: &Lease,
        name: &str,
        quiesce: bool,
    ) -> Result<Checkpoint, HypervisorError> {
        if machine.qmp.version() < OLDEST {
            let (vm, found) = (machine.name.clone(), machine.qmp.version());
            return Err(QemuError::TooOld { vm, found, needed: OLDEST }.into());
        }
        let frozen = if quiesce { Some(self.held.freeze(machine).await?) } else { None };
        let made = self.create_now(machine, lease, name).await;
        let Some(frozen) = frozen else { return made };
        let thawed = frozen.thaw().await;
        match (made, thawed) {
            (Ok(checkpoint), Err(e)) => {
                // It was not frozen all the time: the checkpoint is not what was asked for.
                let _one = machine.graph.lock().await;
                self.take_down(machine, checkpoint.id).await.map_err(QemuError::from)?;
                self.remove_bitmap(machine, checkpoint.id).await?;
                Err(e.into())
            }
            (made, _) => made,
        }
    }

    async fn create_now(
        &self,
        machine: &Arc<Machine>,
        lease: &Lease,
        name: &str,
    ) -> Result<Checkpoint, HypervisorError> {
        let _one = machine.graph.lock().await;
        let busy = |what: &str| Self::busy(machine, what);
        // By QEMU's own word: events may be under way.
        machine.ask_for_migration().await;
        if machine.is_migrating() {
            return Err(busy("it is being migrated").into());
        }
        if let Some(open) = self.list(machine).await.map_err(QemuError::from)?.first() {
            return Err(HypervisorError::Occupied { vm: machine.vm, name: open.name.clone() });
        }
        let jobs =
            machine.qmp.execute("query-block-jobs", Value::Null).await.map_err(QemuError::from)?;
        if let Some(job) = jobs.as_array().and_then(|j| j.first()) {
            let (kind, id) = (
                job["type"].as_str().unwrap_or("block"),
                job["device"].as_str().unwrap_or_default(),
            );
            return Err(busy(&format!(
                "a {kind} job of another program, {id:?}, works on its disks"
            ))
            .into());
        }
        let disks = machine.disks().await.map_err(QemuError::from)?;
        let (captured, left_out): (Vec<Disk>, Vec<Disk>) =
            disks.into_iter().partition(|d| d.uncapturable.is_none());
        Self::check_active(machine, &captured)?;
        if captured.is_empty() && !left_out.is_empty() {
            let reason = left_out[0].uncapturable.unwrap_or_default().to_owned();
            return Err(QemuError::NoDisk { vm: machine.name.clone(), reason }.into());
        }
        // What an attempt left half-made is not in our way.
        self.remove_half_made(machine, &[]).await.map_err(QemuError::from)?;
        self.remove_copies(machine).await?;
        lease.may_mutate()?;
        let id = CheckpointId::random();
        machine.set_has_checkpoint(true);
        let built = self.build(machine, id, name, &captured).await;
        let gave_way = machine.is_migrating();
        if built.is_err() || gave_way {
            if let Err(e) = self.take_down(machine, id).await {
                tracing::warn!(vm = machine.name, error = %e, "a checkpoint that failed leaves something behind for now");
            }
            if let Err(e) = self.remove_bitmap(machine, id).await {
                tracing::warn!(vm = machine.name, error = %e, "a bitmap of a checkpoint that failed stays for now");
            }
        }
        built?;
        if gave_way {
            return Err(busy("a migration began").into());
        }
        let disks = captured.into_iter().enumerate().map(|(index, disk)| OpenDisk { index, disk });
        let open = Open { id, name: name.to_owned(), disks: disks.collect() };
        Ok(open.handle(machine))
    }

    /// QEMU refuses most changes of a disk that it does not hold, and ends at some.
    pub(super) fn check_active(machine: &Machine, disks: &[Disk]) -> Result<(), QemuError> {
        match disks.iter().find(|d| !d.active) {
            Some(disk) => {
                let what = format!(
                    "its disk {:?} is inactive, as after a migration until the VM is let go on (cont)",
                    disk.slot
                );
                Err(Self::busy(machine, &what))
            }
            None => Ok(()),
        }
    }

    pub(super) fn busy(machine: &Machine, what: &str) -> QemuError {
        QemuError::Busy { vm: machine.name.clone(), what: what.to_owned() }
    }
}
