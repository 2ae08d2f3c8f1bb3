//! VMs and their disks, as an operator changes them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrider_disk::DiskChain;
use uuid::Uuid;

use crate::checkpoint::{self, NewCheckpoint};
use crate::cluster::Cluster;
use crate::control::{CreateVm, DiskSource};
use crate::disks::{self, locked};
use crate::error::LabError;
use crate::guest::{self, Chance};
use crate::host;
use crate::import;
use crate::methods::announce_new;
use crate::model::{Busy, Disk, Power, State, SteadyGuest, Vm, guid};

/// Refuses while something else is at work on the VM.
pub(super) fn idle(cluster: &Cluster, id: Uuid) -> Result<(), LabError> {
    cluster.read(|s| {
        let vm = s.vm(id)?;
        match s.obstacle(vm) {
            Some((code, why)) => Err(LabError::refused(&vm.name, code, why)),
            None => Ok(()),
        }
    })
}

pub(super) fn user_checkpoint(cluster: &Cluster, id: Uuid, name: String) -> Result<Uuid, LabError> {
    idle(cluster, id)?;
    let new = cluster.change(|s| {
        let new = NewCheckpoint { id: s.new_guid(), name, recovery: false, consistency: 0 };
        s.vm_mut(id).map(|vm| vm.busy = Some(Busy::CreatingCheckpoint)).map(|()| new)
    })?;
    let made = checkpoint::create(cluster, id, &new);
    cluster.change_vm(id, |vm| vm.busy = None)?;
    made.map(|()| new.id)
}

pub(super) fn apply(cluster: &Cluster, id: Uuid, checkpoint: Uuid) -> Result<(), LabError> {
    idle(cluster, id)?;
    let was = cluster.read(|s| s.vm(id).map(|vm| vm.power))?;
    host::power(cluster, id, Power::Off)?;
    let applied = checkpoint::apply(cluster, id, checkpoint);
    host::power(cluster, id, was)?;
    applied
}

/// Longest name of a VM's folder in bytes; file systems end at 255.
const MAX_FOLDER: usize = 120;

/// A VM's folder: its name where that is a file name, made unique by its GUID.
fn folder_name(name: &str, id: Uuid) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if out.len() + c.len_utf8() > MAX_FOLDER {
            break;
        }
        let odd =
            c.is_control() || matches!(c, '/' | '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|');
        out.push(if odd { '_' } else { c });
    }
    format!("{out} {}", &guid(id)[..8])
}

pub(super) fn create_vm(cluster: &Arc<Cluster>, new: &CreateVm) -> Result<Uuid, LabError> {
    let (id, volume) = cluster.change(|s| {
        s.host_mut(&new.host)?;
        let volume = s.csvs.iter().find(|c| c.name == new.csv).map(|c| c.path.clone());
        let volume = volume.ok_or_else(|| LabError::unknown("CSV", &new.csv))?;
        let wanted = Chance::new(s.chance.clone().next() ^ new.seed).guid();
        s.chance.next();
        Ok::<_, LabError>((if s.vms.contains_key(&wanted) { s.new_guid() } else { wanted }, volume))
    })?;
    let folder = volume.join(folder_name(&new.name, id));
    let mut vm = Vm::new(id, &new.name, &new.host, folder);
    vm.generation = new.generation;
    vm.owner = new.clustered.then(|| new.host.clone());
    for (place, source) in new.disks.iter().enumerate() {
        let disk = make_disk(cluster, &vm, place, source)?;
        vm.disks.push(disk);
    }
    import::write_vm_files(&vm)?;
    cluster.change(|s| s.vms.insert(id, vm));
    announce_new(cluster, id);
    if new.start {
        host::power(cluster, id, Power::Running)?;
    }
    Ok(id)
}

fn make_disk(
    cluster: &Cluster,
    vm: &Vm,
    place: usize,
    source: &DiskSource,
) -> Result<Disk, LabError> {
    let folder = vm.folder.join("Virtual Hard Disks");
    std::fs::create_dir_all(&folder).map_err(LabError::io("make the folder", &folder))?;
    let id = cluster.change(State::new_guid);
    let stem = format!("disk{place}-{}", &guid(id)[..8]);
    let path = disks::provide(source, &folder, &stem)?;
    let location = u32::try_from(place).unwrap_or(u32::MAX);
    let device = disks::device(source, &folder, &stem);
    let mut disk = Disk { id, location, chain: Vec::new(), device, size: 0, disk_id: Uuid::nil() };
    if let Some(path) = path {
        let info = disks::info(&path)?;
        disk.size = info.size;
        disk.disk_id = info.disk_id;
        let chain = DiskChain::open(&path)?;
        disk.chain = chain.files();
        disk.chain.reverse();
        // The chain's own spelling may differ; the leaf is named as it was given.
        if let Some(leaf) = disk.chain.last_mut() {
            *leaf = path;
        }
    }
    Ok(disk)
}

pub(super) fn add_disk(
    cluster: &Cluster,
    id: Uuid,
    source: &DiskSource,
) -> Result<usize, LabError> {
    idle(cluster, id)?;
    let (io, place) = cluster.read(|s| s.vm(id).map(|vm| (vm.io.clone(), vm.disks.len())))?;
    let shape = cluster.read(|s| {
        s.vm(id).map(|vm| {
            let mut shape = Vm::new(vm.id, &vm.name, &vm.host, vm.folder.clone());
            shape.generation = vm.generation;
            shape
        })
    })?;
    let disk = make_disk(cluster, &shape, place, source)?;
    let mut io = locked(&io);
    let runs = cluster.read(|s| s.vm(id).map(|vm| vm.power.holds_disks()))?;
    if runs && let Some(leaf) = disk.leaf() {
        io.open(disk.id, leaf)?;
    }
    cluster.change(|s| {
        let vm = s.vm_mut(id)?;
        vm.disks.push(disk);
        import::write_vm_files(vm)?;
        s.announce_vm(id);
        Ok(place)
    })
}

/// Takes a disk out of the VM; its files stay, for checkpoints that have it.
pub(super) fn remove_disk(cluster: &Cluster, id: Uuid, place: usize) -> Result<(), LabError> {
    idle(cluster, id)?;
    let io = cluster.read(|s| s.vm(id).map(|vm| vm.io.clone()))?;
    let mut io = locked(&io);
    cluster.change(|s| {
        let vm = s.vm_mut(id)?;
        if place >= vm.disks.len() {
            return Err(LabError::unknown("disk", place));
        }
        let disk = vm.disks.remove(place);
        io.close(disk.id)?;
        io.forget(disk.id);
        import::write_vm_files(vm)?;
        s.announce_vm(id);
        Ok(())
    })
}

/// Puts another file into a disk's slot. Change tracking of that disk ends.
pub(crate) fn replace_file(
    cluster: &Cluster,
    id: Uuid,
    disk: Uuid,
    path: &Path,
) -> Result<(), LabError> {
    let io = cluster.read(|s| s.vm(id).map(|vm| vm.io.clone()))?;
    let mut io = locked(&io);
    let info = disks::info(path)?;
    let was_open = io.close(disk)?;
    io.forget(disk);
    if was_open {
        io.open(disk, path)?;
    }
    cluster.change(|s| {
        let vm = s.vm_mut(id)?;
        let slot = vm.disks.iter_mut().find(|d| d.id == disk);
        let slot = slot.ok_or_else(|| LabError::unknown("disk", disk))?;
        slot.chain = vec![path.to_owned()];
        slot.size = info.size;
        slot.disk_id = info.disk_id;
        import::write_vm_files(vm)?;
        s.announce_vm(id);
        Ok(())
    })
}

fn slot_without_checkpoints(
    cluster: &Cluster,
    id: Uuid,
    place: usize,
) -> Result<(Disk, PathBuf), LabError> {
    idle(cluster, id)?;
    cluster.read(|s| {
        let vm = s.vm(id)?;
        if !vm.checkpoints.is_empty() {
            return Err(LabError::refused(&vm.name, 32775, "the VM has checkpoints"));
        }
        let disk = vm.disks.get(place).filter(|d| d.is_virtual());
        let disk = disk.ok_or_else(|| LabError::unknown("virtual disk", place))?;
        Ok((disk.clone(), vm.folder.join("Virtual Hard Disks")))
    })
}

pub(super) fn replace_disk(
    cluster: &Cluster,
    id: Uuid,
    place: usize,
    with: &DiskSource,
) -> Result<(), LabError> {
    let (disk, folder) = slot_without_checkpoints(cluster, id, place)?;
    let stem = format!("disk{place}-{}", &guid(cluster.change(State::new_guid))[..8]);
    let path = disks::provide(with, &folder, &stem)?;
    let path =
        path.ok_or_else(|| LabError::refused(place, 32773, "a pass-through disk has no file"))?;
    replace_file(cluster, id, disk.id, &path)
}

/// Grows a disk: the same VirtualDiskId, another size. Change tracking of that disk ends.
pub(super) fn resize_disk(
    cluster: &Cluster,
    id: Uuid,
    place: usize,
    size: u64,
) -> Result<(), LabError> {
    let (disk, _) = slot_without_checkpoints(cluster, id, place)?;
    let Some(old) = disk.leaf().map(Path::to_owned) else { return Ok(()) };
    let io = cluster.read(|s| s.vm(id).map(|vm| vm.io.clone()))?;
    {
        let mut io = locked(&io);
        let was_open = io.close(disk.id)?;
        let grown = disks::grow(&old, size);
        io.forget(disk.id);
        if was_open {
            io.open(disk.id, &old)?;
        }
        grown?;
    }
    cluster.change_vm(id, |vm| {
        for d in vm.disks.iter_mut().filter(|d| d.id == disk.id) {
            d.size = size;
        }
    })
}

/// Lets a guest write all the time, at another rate than before, or no more; what it was at before has ended then.
pub(super) async fn guest_rate(
    cluster: &Arc<Cluster>,
    id: Uuid,
    rate: u64,
    seed: u64,
) -> Result<(), LabError> {
    let before = cluster.change(|s| s.vm_mut(id).map(|vm| vm.steady.take()))?;
    if let Some(before) = before {
        before.stop.cancel();
        before.stopped.cancelled().await;
    }
    if rate == 0 {
        return Ok(());
    }
    let steady = SteadyGuest::default();
    cluster.change(|s| s.vm_mut(id).map(|vm| vm.steady = Some(steady.clone())))?;
    let inner = cluster.clone();
    cluster.tasks.spawn(async move {
        let _says_so = steady.stopped.drop_guard();
        if let Err(e) = guest::write_steadily(&inner, id, rate, seed, &steady.stop).await {
            tracing::debug!(vm = %id, error = %e, "a guest stopped writing");
        }
    });
    Ok(())
}
