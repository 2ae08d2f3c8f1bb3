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
            let child = vm.disk(*disk).and_then(|d| child_of(&d.chain, frozen));
            let files = [Some(frozen.as_path()), child];
            files.into_iter().flatten().find_map(|file| {
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

fn child_of<'a>(chain: &'a [PathBuf], frozen: &Path) -> Option<&'a Path> {
    let at = chain.iter().position(|p| p == frozen)?;
    chain.get(at + 1).map(PathBuf::as_path)
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
        let (chain, runs) = cluster.read(|s| {
            let vm = s.vm(vm_id)?;
            let chain = vm.disk(*disk).map(|d| d.chain.clone()).unwrap_or_default();
            Ok::<_, LabError>((chain, vm.power.holds_disks()))
        })?;
        merge_disk(cluster, &mut io, vm_id, *disk, frozen, &chain, runs)?;
    }
    cluster.change(|s| {
        s.vm_mut(vm_id)?.merges.retain(|m| m.id != merge_id);
        s.announce_vm(vm_id);
        Ok(())
    })
}

fn merge_disk(
    cluster: &Cluster,
    io: &mut VmIo,
    vm_id: Uuid,
    disk: Uuid,
    frozen: &Path,
    chain: &[PathBuf],
    runs: bool,
) -> Result<(), LabError> {
    // Done by an earlier attempt.
    let Some(child) = child_of(chain, frozen) else { return Ok(()) };
    io.close(disk)?;
    io.changed(disk);
    let merged = merge_child_into_parent(child, frozen).and_then(|_| {
        child_of(chain, child).map_or(Ok(()), |grandchild| set_parent(grandchild, frozen))
    });
    if merged.is_ok() {
        cluster.change(|s| {
            let vm = s.vm_mut(vm_id)?;
            for disk in vm.disks.iter_mut().filter(|d| d.id == disk) {
                disk.chain.retain(|p| p != child);
            }
            let frozen_by_later = vm.checkpoints.iter_mut().flat_map(|c| &mut c.disks);
            for d in frozen_by_later.filter(|d| d.path == child) {
                d.path = frozen.to_owned();
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
