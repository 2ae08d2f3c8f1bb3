//! Background merges: what was written during a checkpoint goes back into what the checkpoint froze.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrider_disk::merge::{merge_child_into_parent, set_parent};
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::control::FaultKind;
use crate::disks::{VmIo, locked};
use crate::error::LabError;
use crate::model::{Merge, State, Vm};

/// Pause before a merge that failed is tried again.
const RETRY_MS: u64 = 200;

/// Why a merge cannot go on.
pub(crate) enum Obstacle {
    Stuck,
    Readers(String),
}

impl State {
    /// What keeps a merge from going on: the fault, or agents that still hold a file of it open.
    pub(crate) fn merge_obstacle(&self, vm: &Vm, merge: &Merge) -> Option<Obstacle> {
        if self.ails(Some(vm.id), Some(&vm.host), |k| *k == FaultKind::StuckMerge) {
            return Some(Obstacle::Stuck);
        }
        merge.frozen.iter().find_map(|(disk, frozen)| {
            let children = vm.children_of(*disk, frozen);
            std::iter::once(frozen.as_path()).chain(children).find_map(|file| {
                self.readers_of(file).next().map(|reader| {
                    Obstacle::Readers(format!(
                        "{} is open on host {} (0x80070020)",
                        file.display(),
                        reader.host
                    ))
                })
            })
        })
    }
}

/// Starts the merge that was noted under `merge`.
pub(crate) fn start(cluster: &Arc<Cluster>, vm: Uuid, merge: u64) {
    let inner = cluster.clone();
    cluster.tasks.spawn(async move {
        tokio::select! {
            () = run(&inner, vm, merge) => {}
            () = inner.cancel.cancelled() => {}
        }
    });
}

async fn run(cluster: &Arc<Cluster>, vm_id: Uuid, merge: u64) {
    cluster.pause(cluster.config.delays.merge_ms).await;
    loop {
        let goes_on = cluster
            .until(|s| {
                let Some(vm) = s.vms.get(&vm_id) else { return Some(false) };
                // One at a time, in order.
                let first = vm.merges.first()?;
                (first.id == merge && s.merge_obstacle(vm, first).is_none()).then_some(true)
            })
            .await;
        if !goes_on {
            return;
        }
        let inner = cluster.clone();
        let done = cluster.blocking(move || merge_now(&inner, vm_id, merge)).await;
        match done {
            Ok(Ok(())) => return,
            Ok(Err(e)) | Err(e) => {
                tracing::warn!(vm = %vm_id, error = %e, "a merge failed and will be tried again");
                cluster.change(|s| {
                    if let Ok(vm) = s.vm_mut(vm_id)
                        && let Some(m) = vm.merges.iter_mut().find(|m| m.id == merge)
                    {
                        m.waits = Some(e.to_string());
                    }
                });
                cluster.pause(RETRY_MS).await;
            }
        }
    }
}

fn merge_now(cluster: &Cluster, vm_id: Uuid, merge_id: u64) -> Result<(), LabError> {
    let io = cluster.read(|s| s.vm(vm_id).map(|vm| vm.io.clone()))?;
    let mut io = locked(&io);
    let merge = cluster.read(|s| {
        s.vms.get(&vm_id).and_then(|vm| vm.merges.iter().find(|m| m.id == merge_id)).cloned()
    });
    let Some(merge) = merge else { return Ok(()) };
    for (disk, frozen) in &merge.frozen {
        settle(cluster, &mut io, vm_id, *disk, frozen)?;
    }
    cluster.change(|s| {
        s.vm_mut(vm_id)?.merges.retain(|m| m.id != merge_id);
        s.announce_vm(vm_id);
        Ok(())
    })
}

/// Whatever a file that no checkpoint freezes any more has to become: its only child goes into it; without any child it is
/// of no use, nor perhaps are its parents; of several children it stays the parent.
fn settle(
    cluster: &Cluster,
    io: &mut VmIo,
    vm_id: Uuid,
    disk: Uuid,
    frozen: &Path,
) -> Result<(), LabError> {
    let mut frozen = frozen.to_owned();
    loop {
        let (kept, children, parent) = cluster.read(|s| {
            let vm = s.vm(vm_id)?;
            let is_leaf = vm.disk(disk).is_some_and(|d| d.leaf() == Some(&frozen));
            let children: Vec<PathBuf> =
                vm.children_of(disk, &frozen).into_iter().map(Path::to_owned).collect();
            let parents = vm.chains(disk).flat_map(|c| c.iter().zip(c.iter().skip(1)));
            let parent = parents.filter(|(_, c)| **c == frozen).map(|(p, _)| p.clone()).next();
            Ok::<_, LabError>((is_leaf || vm.is_frozen(disk, &frozen), children, parent))
        })?;
        match children.as_slice() {
            // Done by an earlier attempt, or taken by a checkpoint again.
            _ if kept => return Ok(()),
            [child] => return merge_disk(cluster, io, vm_id, disk, &frozen, child),
            [] => {
                let parent = parent.or_else(|| parent_on_disk(&frozen));
                if frozen.exists() {
                    std::fs::remove_file(&frozen).map_err(LabError::io("remove", &frozen))?;
                }
                match parent {
                    Some(parent) => frozen = parent,
                    None => return Ok(()),
                }
            }
            _ => return Ok(()),
        }
    }
}

/// A frozen file's chain went with its checkpoint: the file itself tells its parent.
fn parent_on_disk(file: &Path) -> Option<PathBuf> {
    outrider_disk::DiskChain::open(file).ok()?.files().into_iter().nth(1)
}

fn merge_disk(
    cluster: &Cluster,
    io: &mut VmIo,
    vm_id: Uuid,
    disk: Uuid,
    frozen: &Path,
    child: &Path,
) -> Result<(), LabError> {
    let (grandchildren, runs) = cluster.read(|s| {
        let vm = s.vm(vm_id)?;
        let children = vm.children_of(disk, child).into_iter().map(Path::to_owned);
        Ok::<_, LabError>((children.collect::<Vec<PathBuf>>(), vm.power.holds_disks()))
    })?;
    io.close(disk)?;
    io.changed(disk);
    let merged = merge_child_into_parent(child, frozen)
        .and_then(|_| grandchildren.iter().try_for_each(|g| set_parent(g, frozen)));
    if merged.is_ok() {
        cluster.change(|s| {
            let vm = s.vm_mut(vm_id)?;
            for disk in vm.disks.iter_mut().filter(|d| d.id == disk) {
                disk.chain.retain(|p| p != child);
            }
            for d in vm.checkpoints.iter_mut().flat_map(|c| &mut c.disks) {
                d.chain.retain(|p| p != child);
                if d.path == child {
                    d.path = frozen.to_owned();
                }
            }
            let merged_later = vm.merges.iter_mut().flat_map(|m| &mut m.frozen);
            for (_, path) in merged_later.filter(|(_, path)| path == child) {
                *path = frozen.to_owned();
            }
            Ok::<_, LabError>(())
        })?;
        std::fs::remove_file(child).map_err(LabError::io("remove", child))?;
    }
    if runs {
        let leaf = cluster
            .read(|s| s.vm(vm_id).ok().and_then(|vm| vm.disk(disk)?.leaf().map(Path::to_owned)));
        if let Some(leaf) = leaf {
            io.open(disk, &leaf)?;
        }
    }
    Ok(merged?)
}
