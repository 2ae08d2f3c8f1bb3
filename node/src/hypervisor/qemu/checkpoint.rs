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
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use outrider_proto::ids::CheckpointId;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::blocks::Disk;
use super::error::QemuError;
use super::frozen::Export;
use super::held::Held;
use super::machine::Machine;
use super::names::{self, Bitmaps, Node};
use super::qmp::QmpError;
use super::server;
use super::{OLDEST, scratch};
use crate::hypervisor::{Checkpoint, HypervisorError};
use crate::lease::Lease;

/// Granularity of our bitmaps, bytes.
const GRANULARITY: u64 = 64 << 10;
/// How long the scratch file may take for one write before the checkpoint is given up, seconds.
const SCRATCH_PATIENCE: u64 = 15;
/// How long an export may take to go.
const EXPORT_PATIENCE: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

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
            ids(&exports).into_iter().filter_map(|id| names::parse_export(&id)).collect();
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
    fn check_active(machine: &Machine, disks: &[Disk]) -> Result<(), QemuError> {
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

    fn busy(machine: &Machine, what: &str) -> QemuError {
        QemuError::Busy { vm: machine.name.clone(), what: what.to_owned() }
    }

    async fn build(
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

    /// A disk that cannot have a bitmap is captured all the same; the next run reads it in full.
    async fn add_bitmap(
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
        let mut commands: Vec<(&str, Value)> = disks.iter().enumerate().map(set).collect();
        let stopped = disks.len() > 1 && machine.run_state().await? == "running";
        if stopped {
            // A stop in the last moments of a migration would travel: the VM would arrive paused, and stay so.
            machine.ask_for_migration().await;
            if machine.is_migrating() {
                return Err(Self::busy(machine, "a migration began"));
            }
            self.held.note_stopped(machine)?;
            commands.insert(0, ("stop", Value::Null));
        }
        let answers = machine.qmp.execute_all(commands).await;
        if stopped {
            self.held.resume(machine).await?;
        }
        answers.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(())
    }

    /// Takes a checkpoint out of the guest's way and removes it; its bitmaps stay. What is gone already is no error.
    pub(super) async fn take_down(
        &self,
        machine: &Machine,
        id: CheckpointId,
    ) -> Result<(), QmpError> {
        self.take_down_named(machine, &names::digits(id)).await
    }

    async fn take_down_named(&self, machine: &Machine, digits: &str) -> Result<(), QmpError> {
        let qmp = &machine.qmp;
        let of_this = |name: &str| names::parse_node(name).is_some_and(|(_, _, d)| d == digits);
        let devices: Vec<Disk> =
            machine.disks().await?.into_iter().filter(|d| of_this(&d.root)).collect();
        let exports = qmp.execute("query-block-exports", Value::Null).await?;
        let exports: Vec<String> = ids(&exports)
            .into_iter()
            .filter(|e| {
                names::parse_export(e).is_some_and(|(_, id, _)| names::digits(id) == digits)
            })
            .collect();
        let mut failure = None;
        let ends = exports
            .iter()
            .map(|export| ("block-export-del", json!({ "id": export, "mode": "hard" })));
        for answer in qmp.execute_all(ends.collect()).await {
            failure = failure.or(answer.err());
        }
        self.exports_gone(machine, &exports).await?;
        let mut nodes = self.nodes_of(machine, &of_this).await?;
        nodes.sort();
        let (access, below): (Vec<_>, Vec<_>) =
            nodes.into_iter().partition(|(kind, _)| *kind == Node::Access);
        // As long as it is read through, a filter keeps others from writing to the disk: so that goes first, then the device
        // returns to its disk, then the filter goes.
        let delete = |(_, name): (Node, String)| ("blockdev-del", json!({ "node-name": name }));
        let mut commands: Vec<(&str, Value)> = access.into_iter().map(delete).collect();
        for disk in &devices {
            let value = json!({ "path": disk.device, "property": "drive", "value": disk.base });
            commands.push(("qom-set", value));
        }
        commands.extend(below.into_iter().map(delete));
        for answer in qmp.execute_all(commands).await {
            failure = failure.or(answer.err());
        }
        if let Err(e) = self.close_scratch(machine, &of_this).await {
            tracing::debug!(vm = machine.name, error = %e, "scratch files stay with QEMU until it closes them");
        }
        server::stop_if_idle(machine).await?;
        // What counts is what is left.
        let left = self.nodes_of(machine, &of_this).await?;
        match failure {
            Some(failure) if !left.is_empty() => Err(failure),
            _ => {
                machine.set_has_checkpoint(false);
                Ok(())
            }
        }
    }

    async fn nodes_of(
        &self,
        machine: &Machine,
        wanted: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<Vec<(Node, String)>, QmpError> {
        let nodes = machine.nodes().await?;
        let names = nodes.as_array().into_iter().flatten().filter_map(|n| n["node-name"].as_str());
        let ours = names.filter(|n| wanted(n));
        Ok(ours.filter_map(|n| Some((names::parse_node(n)?.0, n.to_owned()))).collect())
    }

    pub(super) async fn exports_gone(
        &self,
        machine: &Machine,
        wanted: &[String],
    ) -> Result<(), QmpError> {
        let until = Instant::now() + EXPORT_PATIENCE;
        loop {
            let left = ids(&machine.qmp.execute("query-block-exports", Value::Null).await?);
            if !left.iter().any(|id| wanted.contains(id)) || Instant::now() >= until {
                return Ok(());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn close_scratch(
        &self,
        machine: &Machine,
        wanted: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<(), QmpError> {
        let sets = machine.qmp.execute("query-fdsets", Value::Null).await?;
        for set in sets.as_array().into_iter().flatten() {
            let opaque =
                set["fds"].as_array().and_then(|f| f.first()).and_then(|f| f["opaque"].as_str());
            if opaque.is_some_and(wanted) {
                machine.qmp.execute("remove-fd", json!({ "fdset-id": set["fdset-id"] })).await?;
            }
        }
        Ok(())
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

    /// A migration begins: whatever is open goes at once. Its bitmap stays and travels.
    pub(super) async fn give_way(&self, machine: &Machine) {
        let _one = machine.graph.lock().await;
        let began = Instant::now();
        match self.remove_half_made(machine, &[]).await {
            Ok(0) => {}
            Ok(_) => tracing::info!(
                vm = machine.name,
                milliseconds = began.elapsed().as_millis(),
                "the checkpoint gave way to a migration; its bitmap travels"
            ),
            Err(e) => {
                tracing::error!(vm = machine.name, error = %e, "the checkpoint could not give way to a migration");
            }
        }
    }

    /// Removes every node, export and copy of a bitmap of ours that is no part of the checkpoints in `whole`.
    async fn remove_half_made(
        &self,
        machine: &Machine,
        whole: &[CheckpointId],
    ) -> Result<usize, QmpError> {
        let kept: Vec<String> = whole.iter().map(|id| names::digits(*id)).collect();
        let nodes = machine.nodes().await?;
        let nodes = nodes.as_array().into_iter().flatten().filter_map(|n| n["node-name"].as_str());
        let mut found: Vec<String> =
            nodes.filter_map(|n| Some(names::parse_node(n)?.2.to_owned())).collect();
        found.sort();
        found.dedup();
        found.retain(|digits| !kept.contains(digits));
        for digits in &found {
            self.take_down_named(machine, digits).await?;
        }
        Ok(found.len())
    }

    /// A monitor was just connected: what a dead agent left frozen is thawed, what it left half-made is removed; a whole
    /// checkpoint stays for the job whose duty it is.
    pub(super) async fn take_stock(&self, machine: &Arc<Machine>) {
        self.held.release(machine).await;
        let _one = machine.graph.lock().await;
        let stock = async {
            let open = self.list(machine).await?;
            let whole: Vec<CheckpointId> = open.iter().map(|o| o.id).collect();
            let removed = self.remove_half_made(machine, &whole).await?;
            self.remove_copies(machine).await?;
            Ok::<_, QemuError>((open, removed))
        };
        match stock.await {
            Ok((open, removed)) => {
                machine.set_has_checkpoint(!open.is_empty());
                if removed > 0 {
                    tracing::warn!(
                        vm = machine.name,
                        removed,
                        "removed what an earlier agent had left half-made"
                    );
                }
                for open in open {
                    tracing::info!(
                        vm = machine.name,
                        checkpoint = open.name,
                        "a checkpoint of an earlier agent is open"
                    );
                }
            }
            Err(e) => {
                tracing::warn!(vm = machine.name, error = %e, "what an earlier agent left cannot be looked at");
            }
        }
    }

    /// Gives a checkpoint up that could not be read, or whose scratch files have become too large, or whose folder is nearly full.
    pub(super) async fn watch_scratch(&self, machine: &Machine) {
        // Whoever makes or removes one now holds the graph; the next look is soon.
        let Ok(_one) = machine.graph.try_lock() else { return };
        let (Ok(nodes), Ok(whole)) = (machine.nodes().await, self.list(machine).await) else {
            return;
        };
        let used = scratch::used(&nodes);
        let unreadable =
            || "it could not be read: its scratch file was full or too slow".to_owned();
        let reason = scratch::too_much(&self.scratch, used, self.scratch_limit)
            .or_else(|| whole.is_empty().then(unreadable));
        let Some(reason) = reason else { return };
        tracing::error!(vm = machine.name, used, reason, "the checkpoint is given up");
        if let Err(e) = self.remove_half_made(machine, &[]).await {
            tracing::error!(vm = machine.name, error = %e, "the checkpoint could not be given up");
        }
    }
}

/// The ids of an answer to `query-block-exports`.
pub(super) fn ids(exports: &Value) -> Vec<String> {
    let all = exports.as_array().into_iter().flatten();
    all.filter_map(|e| e["id"].as_str().map(str::to_owned)).collect()
}
