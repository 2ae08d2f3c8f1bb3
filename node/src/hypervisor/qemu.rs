//! QEMU and KVM, over QMP (docs/qemu.md).
//!
//! | file | idea |
//! | --- | --- |
//! | `qmp`, `guest` | clients of the monitor and of the guest agent |
//! | `fleet`, `machine` | the QEMU processes of this host, what they are and what happens to them |
//! | `blocks`, `names` | what QEMU's answers say of disks; the names of what we make (pure) |
//! | `checkpoint`, `scratch`, `server` | a moment of all disks: filters, scratch files, exports |
//! | `build`, `removal`, `upkeep` | putting one in, taking it out, and what happens to it meanwhile |
//! | `bitmaps` | dirty bitmaps as reference points |
//! | `traces` | what backups left, whoever made them |
//! | `held` | guests that we hold still, and letting them go for certain |
//! | `nbd`, `frozen` | reading what is exported |
//! | `definition`, `network`, `process`, `new_disk` | VMs from recovery points |
//! | `boot`, `console`, `screen` | seeing whether they boot |

mod bitmaps;
mod blocks;
mod boot;
mod build;
mod checkpoint;
mod console;
mod definition;
mod error;
mod fleet;
mod frozen;
mod guest;
mod held;
mod images;
mod machine;
mod names;
mod nbd;
mod network;
mod new_disk;
mod options;
mod process;
mod qmp;
mod removal;
mod restored;
mod scratch;
mod screen;
mod server;
#[cfg(test)]
mod tests;
mod traces;
mod upkeep;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use outrider_disk::{DiskError, RangeSet};
use outrider_process::tasks::TaskGroup;
use outrider_proto::ids::{CheckpointId, FabricId, VmGuid};
use outrider_proto::manifest::DiskManifest;
use outrider_wmi::files::{HostFiles, PlainFiles};
use tokio::sync::mpsc;

pub use error::QemuError;
pub use qmp::{QmpError, Version};

use self::checkpoint::{Broken, Checkpoints, Open, OpenDisk};
use self::fleet::Fleet;
use self::frozen::{Export, FrozenDisk, Pace, Rate};
use self::held::Held;
use self::machine::Machine;
use self::names::Bitmaps;
use super::facts::{Access, Guest, GuestKind, Service, VmFacts, Volume};
use super::{
    BootCheck, Booting, Change, Checkpoint, CheckpointRequest, Defined, FrozenDisk as Frozen,
    Hypervisor, HypervisorError, Inventory, NewVm, ReferencePoint, SetAside, VmState,
};
use crate::config::QemuConfig;
use crate::lease::Lease;
use crate::restore::NewDisk;
use crate::source::FrozenSource;

/// The first version whose copy-before-write gives up a checkpoint rather than a guest's write is 7.1; 7.2 is the oldest that is
/// tried.
pub const OLDEST: Version = Version(7, 2, 0);
/// Before this version QEMU's NBD server ends the whole QEMU when a client leaves an export whose disk is in an iothread (seen with
/// 7.2: an assertion in `nbd_blockdev_client_closed`). No backup is worth that.
const IOTHREADS: Version = Version(9, 0, 0);
const IN_IOTHREAD: &str = "the VM uses iothreads and its QEMU is older than 9.0, which crashes when a reader of such a disk leaves; \
                           update QEMU, or start the VM without iothreads";
const TOO_OLD: &str = "its QEMU is older than 7.2; update QEMU and restart the VM";

/// The QEMU processes of one host.
pub struct Qemu {
    config: QemuConfig,
    scratch: PathBuf,
    fleet: Fleet,
    /// Ends with this value.
    _tasks: TaskGroup,
    /// Open exports by the path that the job reads them by.
    exports: Mutex<HashMap<PathBuf, Known>>,
    /// Read budgets by VM.
    rates: Mutex<HashMap<VmGuid, Arc<Rate>>>,
}

#[derive(Clone)]
struct Known {
    vm: VmGuid,
    checkpoint: CheckpointId,
    index: usize,
    export: Export,
}

impl Qemu {
    /// Looks for the QEMU processes of this host.
    ///
    /// # Errors
    /// [`QemuError::Scratch`]: the folder for scratch files cannot be used.
    pub async fn start(
        config: QemuConfig,
        agent_scratch: &Path,
        fabric: FabricId,
        tasks: TaskGroup,
    ) -> Result<Self, QemuError> {
        let scratch = config.scratch.clone().unwrap_or_else(|| agent_scratch.to_owned());
        // Tried now, so that a wrong setting is heard at once and not in the night.
        drop(scratch::file(&scratch, 512)?);
        let held = Held {
            folder: agent_scratch.join("held"),
            freeze: config.freeze,
            patience: config.guest_agent,
            tasks: tasks.spawner(),
        };
        let checkpoints = Checkpoints {
            bitmaps: Bitmaps::of(fabric),
            scratch: scratch.clone(),
            scratch_limit: config.scratch_limit.0,
            held,
            broken: Broken::default(),
        };
        let fleet = Fleet::start(config.sockets.clone(), checkpoints, &tasks).await;
        let (exports, rates) = (Mutex::default(), Mutex::default());
        Ok(Self { config, scratch, fleet, _tasks: tasks, exports, rates })
    }

    fn machine(&self, vm: VmGuid) -> Result<Arc<Machine>, HypervisorError> {
        match self.fleet.find(vm) {
            Some(machine) => Ok(machine),
            None if self.definition(vm).is_some() => Err(QemuError::NotRunning { vm }.into()),
            None => Err(HypervisorError::NoSuchVm { vm }),
        }
    }

    fn checkpoints_of(&self) -> &Checkpoints {
        self.fleet.checkpoints()
    }

    async fn open_checkpoint(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<(Arc<Machine>, Open), HypervisorError> {
        let gone = || HypervisorError::CheckpointGone { checkpoint: checkpoint.name.clone() };
        let vm = checkpoint.path.strip_prefix("qemu:").and_then(|p| p.split('/').next());
        let vm: VmGuid = vm.and_then(|v| v.parse().ok()).ok_or_else(gone)?;
        let machine = self.machine(vm)?;
        let open = self.checkpoints_of().list(&machine).await.map_err(QemuError::from)?;
        let open = open.into_iter().find(|o| o.id == checkpoint.id).ok_or_else(gone)?;
        Ok((machine, open))
    }

    /// Ends a checkpoint; its bitmap stays.
    async fn end(&self, machine: &Machine, id: CheckpointId) -> Result<(), HypervisorError> {
        locked(&self.exports).retain(|_, known| known.checkpoint != id);
        let _one = machine.graph.lock().await;
        self.checkpoints_of().take_down(machine, id).await.map_err(QemuError::from)?;
        Ok(())
    }

    fn pace(&self, vm: VmGuid) -> Pace {
        let rate = self.config.max_read_rate.map(|rate| {
            let mut rates = locked(&self.rates);
            rates.entry(vm).or_insert_with(|| Arc::new(Rate::new(rate.0))).clone()
        });
        Pace { depth: self.config.read_depth.max(1), rate }
    }
}

#[async_trait]
impl Hypervisor for Qemu {
    fn kind(&self) -> &'static str {
        "qemu"
    }

    fn files(&self) -> Arc<dyn HostFiles> {
        Arc::new(PlainFiles)
    }

    fn open_disk(&self, path: &Path) -> Result<Box<dyn FrozenSource>, DiskError> {
        let known = locked(&self.exports).get(path).cloned();
        let known = known.ok_or_else(|| DiskError::Io {
            path: path.to_owned(),
            op: "open",
            source: std::io::Error::new(
                std::io::ErrorKind::NotFound,
                "the checkpoint is not open any more",
            ),
        })?;
        let broken = self.checkpoints_of().broken.clone();
        let unreadable = Box::new(move || broken.mark(known.checkpoint));
        Ok(Box::new(FrozenDisk::open(known.export, self.pace(known.vm), unreadable)?))
    }

    fn create_disk(
        &self,
        path: &Path,
        disk: &DiskManifest,
        _keep_disk_id: bool,
    ) -> Result<Box<dyn NewDisk>, DiskError> {
        new_disk::create(path, disk)
    }

    fn disk_extension(&self, disk: &DiskManifest) -> &'static str {
        if Path::new(&disk.file_name).extension().is_some_and(|e| e == "qcow2") {
            "qcow2"
        } else {
            "raw"
        }
    }

    fn is_definition(&self, file: &Path) -> bool {
        file.file_name().is_some_and(|n| n == definition::FILE)
    }

    fn owns(&self, point: &ReferencePoint) -> bool {
        // Others' bitmaps are not listed at all.
        point.path.starts_with("qemu:")
    }

    fn point_of(&self, checkpoint: CheckpointId) -> Option<String> {
        Some(checkpoint.to_string())
    }

    async fn inventory(&self) -> Result<Inventory, HypervisorError> {
        let mut vms = Vec::new();
        for machine in self.fleet.machines() {
            match machine.seen().await {
                Ok(seen) => vms.push(seen),
                Err(e) if e.is_gone() => {}
                // Nothing new is no news; a VM that hangs is still here.
                Err(e) => {
                    tracing::warn!(vm = machine.name, error = %e, "a VM does not answer");
                    vms.extend(machine.last());
                }
            }
        }
        for defined in self.defined_only(&vms) {
            vms.push(defined);
        }
        Ok(Inventory { vms, ..Inventory::default() })
    }

    async fn watch(&self) -> Result<mpsc::Receiver<Change>, HypervisorError> {
        Ok(self.fleet.listen())
    }

    async fn traces(&self) -> Result<Vec<super::traces::VmTraces>, HypervisorError> {
        let mut vms = Vec::new();
        for machine in self.fleet.machines() {
            match self.checkpoints_of().traces(&machine).await {
                Ok(found) => vms.extend(Some(found).filter(|vm| !vm.is_empty())),
                Err(e) if e.is_gone() => {}
                Err(e) => return Err(QemuError::from(e).into()),
            }
        }
        Ok(vms)
    }

    async fn vm(&self, vm: VmGuid) -> Result<VmState, HypervisorError> {
        let machine = self.machine(vm)?;
        if machine.is_migrating() {
            machine.ask_for_migration().await;
        }
        let seen = machine.seen().await.map_err(QemuError::from)?;
        let free = scratch::free(&self.scratch).map_err(|e| QemuError::Scratch {
            path: self.scratch.clone(),
            reason: e.to_string(),
        })?;
        let captured: Vec<u64> =
            seen.disks.iter().filter(|d| d.uncapturable.is_none()).map(|d| d.size).collect();
        Ok(VmState {
            vm: seen,
            health: 2,
            operation: if machine.is_migrating() { 32774 } else { 0 },
            facts: VmFacts { guest: guest(machine.agent_socket().is_some()), ..VmFacts::default() },
            volumes: vec![Volume {
                folder: self.scratch.clone(),
                free,
                disk_bytes: captured.iter().sum(),
                access: Access::Unknown,
                usual: Access::Unknown,
            }],
        })
    }

    async fn checkpoints(&self, vm: VmGuid) -> Result<Vec<Checkpoint>, HypervisorError> {
        let machine = self.machine(vm)?;
        let open = self.checkpoints_of().list(&machine).await.map_err(QemuError::from)?;
        Ok(open.iter().map(|o| o.handle(&machine)).collect())
    }

    async fn create_checkpoint(
        &self,
        lease: &Lease,
        vm: VmGuid,
        name: &str,
        request: CheckpointRequest,
    ) -> Result<Checkpoint, HypervisorError> {
        lease.may_mutate()?;
        let machine = self.machine(vm)?;
        self.checkpoints_of().create(&machine, lease, name, request.quiesce).await
    }

    async fn checkpoint_disks(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Vec<Frozen>, HypervisorError> {
        let (machine, open) = self.open_checkpoint(checkpoint).await?;
        let mut disks = Vec::with_capacity(open.disks.len());
        for of in &open.disks {
            let export = open.export(&machine, of);
            let path = names::uri(&export.socket, &export.name);
            let known = Known { vm: machine.vm, checkpoint: open.id, index: of.index, export };
            locked(&self.exports).insert(path.clone(), known);
            disks.push(Frozen { slot: of.disk.slot.clone(), path });
        }
        Ok(disks)
    }

    async fn checkpoint_config(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Vec<PathBuf>, HypervisorError> {
        let (machine, open) = self.open_checkpoint(checkpoint).await?;
        Ok(vec![self.write_definition(&machine, &open)?])
    }

    async fn definition_obstacle(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Option<String>, HypervisorError> {
        let (machine, open) = self.open_checkpoint(checkpoint).await?;
        Ok(self.definition_of(&machine, &open).obstacle())
    }

    async fn changes(
        &self,
        disk: &Path,
        _size: u64,
        tracking_id: &str,
    ) -> Result<RangeSet, HypervisorError> {
        let known = locked(&self.exports).get(disk).cloned();
        let lost = |reason: &str| HypervisorError::TrackingLost {
            disk: disk.to_owned(),
            reason: reason.into(),
        };
        let known = known.ok_or_else(|| lost("the checkpoint is not open any more"))?;
        let machine = self.machine(known.vm)?;
        let open = self.checkpoints_of().list(&machine).await.map_err(QemuError::from)?;
        let open = open.into_iter().find(|o| o.id == known.checkpoint);
        let open = open.ok_or_else(|| lost("the checkpoint is not open any more"))?;
        let of: Option<OpenDisk> = open.disks.iter().find(|d| d.index == known.index).cloned();
        let of = of.ok_or_else(|| lost("the disk is not part of the checkpoint"))?;
        self.checkpoints_of().changes(&machine, &open, &of, tracking_id, disk).await
    }

    async fn reference_points(&self, vm: VmGuid) -> Result<Vec<ReferencePoint>, HypervisorError> {
        let machine = self.machine(vm)?;
        Ok(self.checkpoints_of().points(&machine).await.map_err(QemuError::from)?)
    }

    async fn convert(
        &self,
        lease: &Lease,
        vm: VmGuid,
        checkpoint: &Checkpoint,
    ) -> Result<ReferencePoint, HypervisorError> {
        let machine = self.machine(vm)?;
        self.open_checkpoint(checkpoint).await?;
        lease.may_mutate()?;
        self.end(&machine, checkpoint.id).await?;
        let points = self.checkpoints_of().points(&machine).await.map_err(QemuError::from)?;
        let id = checkpoint.id.to_string();
        // No disk could have a bitmap: a reference point without tracking, which the next run reads in full from.
        let without = || ReferencePoint {
            id: id.clone(),
            path: format!("qemu:{vm}/{id}"),
            tracking: Vec::new(),
        };
        Ok(points.into_iter().find(|p| p.id == id).unwrap_or_else(without))
    }

    async fn destroy_checkpoint(
        &self,
        lease: &Lease,
        vm: VmGuid,
        checkpoint: &Checkpoint,
    ) -> Result<(), HypervisorError> {
        lease.may_mutate()?;
        let machine = self.machine(vm)?;
        self.end(&machine, checkpoint.id).await?;
        let removed = self.checkpoints_of().remove_bitmap(&machine, checkpoint.id).await;
        Ok(removed?)
    }

    async fn destroy_reference_point(
        &self,
        lease: &Lease,
        vm: VmGuid,
        point: &ReferencePoint,
    ) -> Result<(), HypervisorError> {
        lease.may_mutate()?;
        let Ok(id) = point.id.parse::<CheckpointId>() else { return Ok(()) };
        let machine = self.machine(vm)?;
        let removed = self.checkpoints_of().remove_bitmap(&machine, id).await;
        Ok(removed?)
    }

    async fn storage_roots(&self) -> Result<Vec<(PathBuf, u64)>, HypervisorError> {
        let roots = self.config.images.iter();
        Ok(roots.filter_map(|r| Some((r.clone(), scratch::free(r).ok()?))).collect())
    }

    async fn define_vm(&self, lease: &Lease, new: &NewVm) -> Result<Defined, HypervisorError> {
        lease.may_mutate()?;
        Ok(self.define(new)?)
    }

    async fn precheck_vm(&self, new: &NewVm) -> Result<(), HypervisorError> {
        Ok(self.plan(new).map(drop)?)
    }

    async fn rehearse_vm(&self, _lease: &Lease, new: &NewVm) -> Result<(), HypervisorError> {
        Ok(self.plan(new).map(drop)?)
    }

    async fn set_aside(
        &self,
        lease: &Lease,
        vm: VmGuid,
        _lost: &mut Vec<String>,
    ) -> Result<SetAside, HypervisorError> {
        lease.may_mutate()?;
        Ok(self.put_aside(lease, vm).await?)
    }

    async fn start_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        lease.may_mutate()?;
        Ok(self.power_on(vm).await?)
    }

    fn boot_obstacle(&self, _check: &BootCheck) -> Option<&'static str> {
        None
    }

    async fn boot_vm(
        &self,
        lease: &Lease,
        vm: VmGuid,
        check: &BootCheck,
    ) -> Result<Booting, HypervisorError> {
        lease.may_mutate()?;
        self.boot(lease, vm, check).await
    }

    async fn stop_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        lease.may_mutate()?;
        Ok(self.power_off(vm).await?)
    }

    async fn remove_vm(&self, lease: &Lease, vm: VmGuid) -> Result<(), HypervisorError> {
        lease.may_mutate()?;
        Ok(self.forget(vm)?)
    }
}

/// A guest agent freezes mounted file systems; that applications take part, it does not tell.
fn guest(has_agent: bool) -> Guest {
    let backup = if has_agent { Service::Works } else { Service::Silent };
    Guest { kind: GuestKind::OfQemu, backup, ..Guest::default() }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
