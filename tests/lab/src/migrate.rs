//! Migrations inside the cluster: what agents see of them, in both orders.

use std::sync::Arc;

use outrider_disk::DiskChain;
use uuid::Uuid;

use crate::checkpoint;
use crate::classes;
use crate::cluster::Cluster;
use crate::config::CheckpointOnMigration;
use crate::control::MigrationKind;
use crate::disks::locked;
use crate::error::LabError;
use crate::host;
use crate::merge;
use crate::model::{Busy, CREATED, DELETED, Migration, Power, State};
use crate::rct;

/// Error of the cluster for a group with a locked resource.
const LOCKED: u32 = 5960;

/// Moves a VM to another host and returns when the cluster is done with it.
pub(crate) async fn migrate(
    cluster: &Arc<Cluster>,
    vm: Uuid,
    target: &str,
    kind: MigrationKind,
) -> Result<(), LabError> {
    let source = cluster.change(|s| begin(s, vm, target))?;
    let moved = go(cluster, vm, &source, target, kind).await;
    cluster.change(|s| {
        // A crash of the source meanwhile has ended the migration in its own way.
        if let Ok(found) = s.vm_mut(vm) {
            found.migration = None;
            s.announce_vm(vm);
            s.announce_group(vm, None);
        }
    });
    moved
}

fn begin(s: &mut State, id: Uuid, target: &str) -> Result<String, LabError> {
    let host = s.hosts.get(target).ok_or_else(|| LabError::unknown("host", target))?;
    if !host.up || host.paused {
        return Err(LabError::refused(target, 5957, "the host is down or paused"));
    }
    let vm = s.vm(id)?;
    if vm.host == target {
        return Err(LabError::refused(&vm.name, 5023, format!("the VM is on {target} already")));
    }
    if vm.migration.is_some() {
        return Err(LabError::refused(&vm.name, 5908, "the group is moving already"));
    }
    if let Some((_, why)) = s.obstacle(vm) {
        return Err(LabError::refused(&vm.name, LOCKED, why));
    }
    if s.switch == CheckpointOnMigration::Blocks && vm.recovery_checkpoint().is_some() {
        return Err(LabError::refused(&vm.name, LOCKED, "the VM is being backed up"));
    }
    let source = vm.host.clone();
    s.vm_mut(id)?.migration = Some(Migration { target: target.to_owned(), planned: false });
    s.announce_group(id, None);
    Ok(source)
}

async fn go(
    cluster: &Arc<Cluster>,
    id: Uuid,
    source: &str,
    target: &str,
    kind: MigrationKind,
) -> Result<(), LabError> {
    let step = cluster.config.delays.migration_ms;
    cluster.pause(step).await;
    cluster.change(|s| {
        still_moving(s, id, target)?;
        let vm = s.vm_mut(id)?;
        vm.migration = Some(Migration { target: target.to_owned(), planned: true });
        let planned = classes::planned_system(vm, target);
        s.announce_vm(id);
        s.notify(Some(target), CREATED, planned, None);
        Ok::<_, LabError>(())
    })?;
    let was = cluster.read(|s| s.vm(id).map(|vm| vm.power))?;
    if kind == MigrationKind::Quick && was.holds_disks() {
        let inner = cluster.clone();
        cluster.blocking(move || host::power(&inner, id, Power::Saved)).await??;
    }
    cluster.pause(step).await;
    let io = cluster.read(|s| s.vm(id).map(|vm| vm.io.clone()))?;
    cluster.blocking(move || locked(&io).coarsen(rct::AFTER_MOVE)).await?;

    let owner_first = cluster.change(|s| s.chance.below(2) == 0);
    if owner_first {
        cluster.change(|s| hand_over_group(s, id, target))?;
        cluster.pause(step).await;
    }
    let lost = cluster.change(|s| hand_over_vm(s, id, source, target))?;
    if kind == MigrationKind::Quick && was.holds_disks() {
        let inner = cluster.clone();
        cluster.blocking(move || host::power(&inner, id, was)).await??;
    }
    if !owner_first {
        cluster.pause(step).await;
        cluster.change(|s| hand_over_group(s, id, target))?;
    }
    if let Some(merge) = lost {
        merge::start(cluster, id, merge);
        let inner = cluster.clone();
        cluster.blocking(move || checkpoint::forget_marks(&inner, id)).await??;
    }
    Ok(())
}

/// A crash of the source or of the target ends a migration.
fn still_moving(s: &State, id: Uuid, target: &str) -> Result<(), LabError> {
    let vm = s.vm(id)?;
    if vm.migration.is_none() {
        return Err(LabError::refused(&vm.name, 5908, "the migration ended when the source died"));
    }
    if s.hosts.get(target).is_none_or(|h| !h.up) {
        return Err(LabError::refused(&vm.name, 5908, "the migration ended when the target died"));
    }
    Ok(())
}

fn hand_over_group(s: &mut State, id: Uuid, target: &str) -> Result<(), LabError> {
    still_moving(s, id, target)?;
    let before = s.vm_mut(id)?.owner.replace(target.to_owned());
    s.vm_mut(id)?.before.owner.clone_from(&before);
    match before {
        Some(before) => s.announce_group(id, Some(&before)),
        // Not clustered: no group to hand over.
        None => s.vm_mut(id)?.owner = None,
    }
    Ok(())
}

/// Makes the VM real on the target. Gives the merge of a checkpoint that got lost on the way.
fn hand_over_vm(
    s: &mut State,
    id: Uuid,
    source: &str,
    target: &str,
) -> Result<Option<u64>, LabError> {
    still_moving(s, id, target)?;
    let loses = s.switch == CheckpointOnMigration::Lost;
    let merge = s.next();
    let vm = s.vm_mut(id)?;
    let gone = classes::computer_system(vm);
    let planned = classes::planned_system(vm, target);
    vm.host = target.to_owned();
    vm.before.host = Some(source.to_owned());
    let lost = match vm.recovery_checkpoint().map(|c| c.id) {
        Some(checkpoint) if loses => Some(checkpoint::take_out(vm, checkpoint, None, merge)?),
        _ => None,
    };
    let realized = classes::computer_system(vm);
    s.notify(Some(target), DELETED, planned, None);
    s.notify(Some(target), CREATED, realized, None);
    s.notify(Some(source), DELETED, gone, None);
    Ok(lost)
}

/// Moves a VM's disks to another CSV. Change tracking does not survive it. Blocks.
pub(crate) fn storage(cluster: &Cluster, id: Uuid, csv: &str) -> Result<(), LabError> {
    let (io, folder) = cluster.change(|s| {
        let volume = s.csvs.iter().find(|c| c.name == csv).map(|c| c.path.clone());
        let volume = volume.ok_or_else(|| LabError::unknown("CSV", csv))?;
        let vm = s.vm(id)?;
        if let Some((code, why)) = s.obstacle(vm) {
            return Err(LabError::refused(&vm.name, code, why));
        }
        if !vm.checkpoints.is_empty() {
            return Err(LabError::refused(&vm.name, 32775, "the VM has checkpoints"));
        }
        let folder = volume.join(vm.folder.file_name().unwrap_or_default());
        if folder == vm.folder {
            return Err(LabError::refused(&vm.name, 32775, "the VM is there already"));
        }
        let vm = s.vm_mut(id)?;
        vm.busy = Some(Busy::MovingStorage);
        let io = vm.io.clone();
        s.announce_vm(id);
        Ok((io, folder))
    })?;
    let mut io = locked(&io);
    let moved = move_disks(cluster, &mut io, id, &folder);
    cluster.change_vm(id, |vm| vm.busy = None)?;
    moved
}

fn move_disks(
    cluster: &Cluster,
    io: &mut crate::disks::VmIo,
    id: Uuid,
    folder: &std::path::Path,
) -> Result<(), LabError> {
    std::fs::create_dir_all(folder).map_err(LabError::io("make the folder", folder))?;
    let (mut disks, runs) = cluster.read(|s| {
        let vm = s.vm(id)?;
        Ok::<_, LabError>((vm.disks.clone(), vm.power.holds_disks()))
    })?;
    io.close_all()?;
    let mut old = Vec::new();
    for disk in &mut disks {
        let Some(from) = disk.leaf().map(std::path::Path::to_owned) else { continue };
        DiskChain::open(&from)?;
        let to = folder.join(from.file_name().unwrap_or_default());
        std::fs::copy(&from, &to).map_err(LabError::io("copy the disk", &from))?;
        disk.chain = vec![to];
        old.push(from);
    }
    io.forget_all();
    if runs {
        io.open_all(&disks)?;
    }
    cluster.change(|s| {
        let vm = s.vm_mut(id)?;
        crate::import::remove_vm_files(vm);
        vm.disks = disks;
        vm.folder = folder.to_owned();
        crate::import::write_vm_files(vm)?;
        s.announce_vm(id);
        Ok::<_, LabError>(())
    })?;
    for path in old {
        std::fs::remove_file(&path).map_err(LabError::io("remove", &path))?;
    }
    Ok(())
}
