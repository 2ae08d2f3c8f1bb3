//! Checkpoints: real AVHDX children, real frozen parents.

use std::path::{Path, PathBuf};

use outrider_disk::DiskWriter;
use uuid::Uuid;

use crate::cluster::{Cluster, now};
use crate::disks::{VmIo, locked};
use crate::error::LabError;
use crate::import;
use crate::merge;
use crate::model::{Checkpoint, Disk, FrozenDisk, Merge, Power, ReferencePoint, State, Vm, guid};
use crate::truth;

/// What is to be made.
#[derive(Debug, Clone)]
pub(crate) struct NewCheckpoint {
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) recovery: bool,
    pub(crate) consistency: u8,
}

impl State {
    /// Why the VM cannot do this now, as the code that Hyper-V returns: 32774 busy, 32775 wrong state.
    pub(crate) fn obstacle(&self, vm: &Vm) -> Option<(u32, &'static str)> {
        if vm.migration.is_some() {
            Some((32775, "the VM is being migrated"))
        } else if vm.busy.is_some() {
            Some((32774, "another operation is at work on the VM"))
        } else if !vm.merges.is_empty() {
            Some((32775, "a checkpoint of the VM is being merged"))
        } else {
            None
        }
    }
}

/// Freezes the disks and lets the guest write on to children. Blocks.
pub(crate) fn create(cluster: &Cluster, vm_id: Uuid, new: &NewCheckpoint) -> Result<(), LabError> {
    let (io, disks) = cluster.read(|s| {
        let vm = s.vm(vm_id)?;
        Ok::<_, LabError>((vm.io.clone(), vm.disks.clone()))
    })?;
    let frozen = {
        let mut io = locked(&io);
        let runs = cluster.read(|s| s.vm(vm_id).map(|vm| vm.power.holds_disks()))?;
        let made =
            freeze(&mut io, &disks, new, runs).inspect_err(|_| undo(&mut io, &disks, new, runs))?;
        cluster.change(|s| {
            let vm = s.vm_mut(vm_id)?;
            for (disk, child) in vm.disks.iter_mut().filter(|d| d.is_virtual()).zip(made.children) {
                disk.chain.push(child);
            }
            let parent = vm.current.replace(new.id);
            vm.checkpoints.push(Checkpoint {
                id: new.id,
                name: new.name.clone(),
                recovery: new.recovery,
                consistency: new.consistency,
                created: now(),
                disks: made.frozen.clone(),
                parent,
                notes: if new.recovery { String::new() } else { format!("why {:?}", new.name) },
                saved: vm.power == Power::Saved,
                hardware: vm.hardware.clone(),
                file_id: new.id,
                missing: false,
            });
            import::write_checkpoint_files(vm, new.id)?;
            s.announce_vm(vm_id);
            Ok::<_, LabError>(())
        })?;
        made.frozen
    };
    truth::record(cluster, vm_id, new.id, &frozen)
}

struct Made {
    frozen: Vec<FrozenDisk>,
    children: Vec<PathBuf>,
}

fn child_path(disk: &Disk, checkpoint: Uuid) -> Option<PathBuf> {
    let base = disk.chain.first()?;
    let stem = base.file_stem()?.to_string_lossy();
    // A checkpoint's file is of the disk's own format.
    let extension = if is_vhd(base) { "avhd" } else { "avhdx" };
    Some(base.with_file_name(format!("{stem}_{}.{extension}", guid(checkpoint))))
}

fn is_vhd(path: &Path) -> bool {
    path.extension().and_then(|e| e.to_str()).is_some_and(|extension| {
        extension.eq_ignore_ascii_case("vhd") || extension.eq_ignore_ascii_case("avhd")
    })
}

fn freeze(
    io: &mut VmIo,
    disks: &[Disk],
    new: &NewCheckpoint,
    runs: bool,
) -> Result<Made, LabError> {
    let mut made = Made { frozen: Vec::new(), children: Vec::new() };
    for disk in disks {
        let (Some(leaf), Some(child)) = (disk.leaf(), child_path(disk, new.id)) else { continue };
        if !io.close(disk.id)? {
            io.inspect(disk.id, leaf)?;
        }
        io.changed(disk.id);
        DiskWriter::create_child(&child, leaf, None)?.close()?;
        if runs {
            io.open(disk.id, &child)?;
        }
        made.frozen.push(FrozenDisk {
            disk: disk.id,
            location: disk.location,
            path: leaf.to_owned(),
            chain: disk.chain.clone(),
            mark: None,
        });
        made.children.push(child);
    }
    // Only when nothing can fail any more: a mark cuts the record of changes.
    if new.recovery {
        for frozen in &mut made.frozen {
            // Change tracking needs VHDX.
            frozen.mark = (!is_vhd(&frozen.path)).then(|| io.mark(frozen.disk));
        }
    }
    Ok(made)
}

/// Puts everything back after a checkpoint could not be made.
fn undo(io: &mut VmIo, disks: &[Disk], new: &NewCheckpoint, runs: bool) {
    for disk in disks {
        let (Some(leaf), Some(child)) = (disk.leaf(), child_path(disk, new.id)) else { continue };
        let restored = io.close(disk.id).and_then(|_| {
            if child.exists() {
                std::fs::remove_file(&child).map_err(LabError::io("remove", &child))?;
            }
            if runs { io.open(disk.id, leaf) } else { Ok(()) }
        });
        if let Err(e) = restored {
            tracing::error!(disk = %leaf.display(), error = %e, "a checkpoint that failed could not be undone");
        }
    }
}

/// Removes a checkpoint and starts the merge of what was written since. With `reference_point` the checkpoint becomes
/// one under this id.
pub(crate) fn remove(
    cluster: &std::sync::Arc<Cluster>,
    vm_id: Uuid,
    checkpoint: Uuid,
    reference_point: Option<Uuid>,
) -> Result<(), LabError> {
    let merge = cluster.change(|s| {
        let merge_id = s.next();
        let vm = s.vm_mut(vm_id)?;
        let merge = take_out(vm, checkpoint, reference_point, merge_id)?;
        s.announce_vm(vm_id);
        Ok::<_, LabError>(merge)
    })?;
    merge::start(cluster, vm_id, merge);
    forget_marks(cluster, vm_id)
}

/// Takes the checkpoint out of the list and notes the merge it leaves.
pub(crate) fn take_out(
    vm: &mut Vm,
    checkpoint: Uuid,
    reference_point: Option<Uuid>,
    merge_id: u64,
) -> Result<u64, LabError> {
    let at = vm
        .checkpoints
        .iter()
        .position(|c| c.id == checkpoint)
        .ok_or_else(|| LabError::unknown("checkpoint", checkpoint))?;
    let gone = vm.checkpoints.remove(at);
    if vm.current == Some(checkpoint) {
        vm.current = gone.parent;
    }
    for later in &mut vm.checkpoints {
        if later.parent == Some(checkpoint) {
            later.parent = gone.parent;
        }
    }
    if let Some(id) = reference_point {
        let marks = gone.disks.iter().filter_map(|d| Some((d.disk, d.mark.clone()?))).collect();
        let consistency = gone.consistency;
        vm.reference_points.push(ReferencePoint { id, consistency, marks });
    }
    let frozen = gone.disks.into_iter().map(|d| (d.disk, d.path)).collect();
    vm.merges.push(Merge { id: merge_id, frozen, waits: None });
    import::remove_checkpoint_files(vm, checkpoint);
    Ok(merge_id)
}

/// Drops change tracking marks that nobody refers to any more. Blocks.
pub(crate) fn forget_marks(cluster: &Cluster, vm_id: Uuid) -> Result<(), LabError> {
    let io = cluster.read(|s| s.vm(vm_id).map(|vm| vm.io.clone()))?;
    let mut io = locked(&io);
    let wanted: Vec<(Uuid, String)> = cluster.read(|s| {
        let vm = s.vm(vm_id)?;
        let open = vm.checkpoints.iter().flat_map(|c| &c.disks);
        let open = open.filter_map(|d| Some((d.disk, d.mark.clone()?)));
        let bound = vm.reference_points.iter().flat_map(|r| r.marks.iter().cloned());
        Ok::<_, LabError>(open.chain(bound).collect())
    })?;
    io.keep_marks(&wanted);
    Ok(())
}

/// Throws away what was written since the VM's last checkpoint, and goes on from another (or the same) one. The VM is off.
/// Blocks.
pub(crate) fn apply(cluster: &Cluster, vm_id: Uuid, checkpoint: Uuid) -> Result<(), LabError> {
    let io = cluster.read(|s| s.vm(vm_id).map(|vm| vm.io.clone()))?;
    let mut io = locked(&io);
    let moves = cluster.change(|s| {
        let fresh = s.new_guid();
        let vm = s.vm(vm_id)?;
        if vm.recovery_checkpoint().is_some() {
            return Err(LabError::refused(&vm.name, 32775, "a backup is at work on the VM"));
        }
        let applied = vm
            .checkpoints
            .iter()
            .find(|c| c.id == checkpoint)
            .ok_or_else(|| LabError::unknown("checkpoint", checkpoint))?;
        let moved = applied.disks.iter().filter_map(|frozen| {
            let disk = vm.disk(frozen.disk)?;
            let old = disk.leaf()?.to_owned();
            // Where it was already, the leaf keeps its name.
            let stays = vm.current == Some(checkpoint);
            let new = if stays { old.clone() } else { child_path(disk, fresh)? };
            Some(Moved { disk: disk.id, chain: frozen.chain.clone(), old, new })
        });
        Ok(moved.collect::<Vec<_>>())
    })?;
    for moved in &moves {
        std::fs::remove_file(&moved.old).map_err(LabError::io("remove", &moved.old))?;
        let frozen = moved.chain.last().unwrap_or(&moved.old);
        DiskWriter::create_child(&moved.new, frozen, None)?.close()?;
        io.changed(moved.disk);
    }
    io.forget_all();
    cluster.change_vm(vm_id, |vm| {
        for moved in moves {
            for disk in vm.disks.iter_mut().filter(|d| d.id == moved.disk) {
                disk.chain = [moved.chain.as_slice(), std::slice::from_ref(&moved.new)].concat();
            }
        }
        // The VM has what it had then.
        if let Some(applied) = vm.checkpoints.iter().find(|c| c.id == checkpoint) {
            vm.hardware = applied.hardware.clone();
        }
        (vm.last_applied, vm.current) = (Some(checkpoint), Some(checkpoint));
    })
}

/// A disk that goes on elsewhere.
struct Moved {
    disk: Uuid,
    /// What it goes on from, base first.
    chain: Vec<PathBuf>,
    old: PathBuf,
    new: PathBuf,
}
