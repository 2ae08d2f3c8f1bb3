//! Power of VMs, and hosts that crash, start and are drained.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::classes;
use crate::cluster::{Cluster, now};
use crate::control::MigrationKind;
use crate::disks::locked;
use crate::error::LabError;
use crate::migrate;
use crate::model::{CREATED, MODIFIED, Power};
use crate::rct;

/// Brings a VM to another power state. Blocks.
pub(crate) fn power(cluster: &Cluster, vm_id: Uuid, wanted: Power) -> Result<(), LabError> {
    let (io, disks) = cluster.read(|s| {
        let vm = s.vm(vm_id)?;
        Ok::<_, LabError>((vm.io.clone(), vm.disks.clone()))
    })?;
    let mut io = locked(&io);
    let now = cluster.read(|s| s.vm(vm_id).map(|vm| vm.power))?;
    if !now.holds_disks() && wanted.holds_disks() {
        cluster.read(|s| {
            let vm = s.vm(vm_id)?;
            let host = s.hosts.get(&vm.host);
            match host.and_then(|host| vm.start_obstacle(host)) {
                Some(why) => Err(LabError::refused(&vm.name, 32768, why)),
                None => Ok(()),
            }
        })?;
    }
    match (now.holds_disks(), wanted.holds_disks()) {
        (false, true) => {
            let mut seen = Vec::new();
            for disk in &disks {
                if let Some(leaf) = disk.leaf() {
                    seen.push((disk.id, io.inspect(disk.id, leaf)?));
                }
            }
            io.open_all(&disks)?;
            cluster.change(|s| {
                let vm = s.vm_mut(vm_id)?;
                for (id, info) in seen {
                    for disk in vm.disks.iter_mut().filter(|d| d.id == id) {
                        disk.size = info.size;
                        disk.disk_id = info.disk_id;
                    }
                }
                Ok::<_, LabError>(())
            })?;
        }
        (true, false) => {
            io.close_all()?;
            // The map in memory ends with the worker process; the one in the .rct file goes on.
            io.coarsen(rct::AFTER_MOVE);
        }
        _ => {}
    }
    cluster.change(|s| {
        let vm = s.vm_mut(vm_id)?;
        vm.power = wanted;
        if wanted != Power::Saved {
            vm.hardware.saved_on = None;
        }
        s.announce_vm(vm_id);
        s.announce_group(vm_id, None);
        Ok(())
    })
}

impl crate::model::State {
    /// Tells all hosts that the VM's group and resource changed; with the owner before, if that changed.
    pub(crate) fn announce_group(&mut self, id: Uuid, owner_before: Option<&str>) {
        for target in classes::group_objects(self, id) {
            let previous = owner_before.map(|owner| target.clone().with("OwnerNode", owner));
            let previous = previous.unwrap_or_else(|| target.clone());
            self.notify(None, MODIFIED, target, Some(previous));
        }
    }

    /// Tells all hosts that a host went up or down.
    pub(crate) fn announce_node(&mut self, name: &str, was: u32) {
        let node = classes::nodes(self).into_iter().find(|n| n.str("Name") == Some(name));
        if let Some(node) = node {
            let previous = node.clone().with("State", was);
            self.notify(None, MODIFIED, node, Some(previous));
        }
    }
}

/// A host dies: its agent loses every connection, its clustered VMs restart on other hosts.
pub(crate) async fn crash(cluster: &Arc<Cluster>, name: &str) -> Result<(), LabError> {
    let victims = cluster.change(|s| {
        let host = s.host_mut(name)?;
        host.up = false;
        host.life.cancel();
        host.connections = 0;
        s.open_files.retain(|_, f| f.host != name);
        for job in s.jobs.values_mut().filter(|j| j.host == name) {
            // Nobody can ask for it any more.
            job.host.clear();
        }
        s.planned.retain(|_, vm| vm.host != name);
        // Down comes before the restarts elsewhere, as in a real cluster.
        s.announce_node(name, 0);
        let on_host: Vec<Uuid> = s.vms.values().filter(|v| v.host == name).map(|v| v.id).collect();
        for id in &on_host {
            if let Ok(vm) = s.vm_mut(*id) {
                vm.migration = None;
            }
        }
        Ok::<_, LabError>(on_host)
    })?;
    cluster.pause(cluster.config.delays.migration_ms).await;
    for id in victims {
        let inner = cluster.clone();
        let died = cluster.blocking(move || die(&inner, id)).await??;
        if !died.clustered {
            continue;
        }
        let target = cluster.change(|s| {
            let up: Vec<String> =
                s.hosts.iter().filter(|(_, h)| h.up && !h.paused).map(|(n, _)| n.clone()).collect();
            if up.is_empty() {
                return None;
            }
            let at = s.chance.below(up.len() as u64) as usize;
            let target = up.get(at).cloned()?;
            let vm = s.vms.get_mut(&id)?;
            vm.host.clone_from(&target);
            vm.owner = Some(target.clone());
            let realized = classes::computer_system(vm);
            s.announce_group(id, Some(name));
            s.notify(Some(&target), CREATED, realized, None);
            Some(target)
        });
        if target.is_some() && died.ran {
            let inner = cluster.clone();
            cluster.blocking(move || power(&inner, id, Power::Running)).await??;
        }
    }
    Ok(())
}

struct Died {
    clustered: bool,
    ran: bool,
}

fn die(cluster: &Cluster, id: Uuid) -> Result<Died, LabError> {
    let io = cluster.read(|s| s.vm(id).map(|vm| vm.io.clone()))?;
    let mut io = locked(&io);
    io.crash();
    io.coarsen(rct::AFTER_CRASH);
    cluster.change(|s| {
        let vm = s.vm_mut(id)?;
        let ran = vm.power.holds_disks();
        if ran {
            vm.power = Power::Off;
        }
        Ok(Died { clustered: vm.owner.is_some(), ran })
    })
}

/// A host comes back.
pub(crate) fn start(cluster: &Cluster, name: &str) -> Result<(), LabError> {
    cluster.change(|s| {
        let host = s.host_mut(name)?;
        if !host.up {
            host.up = true;
            host.started = now();
            host.life = CancellationToken::new();
            s.announce_node(name, 1);
        }
        Ok(())
    })
}

/// Takes new VMs again.
pub(crate) fn resume(cluster: &Cluster, name: &str) -> Result<(), LabError> {
    cluster.change(|s| {
        s.host_mut(name)?.paused = false;
        s.announce_node(name, 2);
        Ok(())
    })
}

/// WMI's service on a host restarts: every connection of its agent's WMI ends, calls in flight have an unknown outcome.
pub(crate) fn restart_wmi(cluster: &Cluster, name: &str) -> Result<(), LabError> {
    cluster.change(|s| {
        std::mem::take(&mut s.host_mut(name)?.wmi).cancel();
        Ok(())
    })
}

/// No new VMs come to the host, and its own are live-migrated away, one after the other. Gives the VMs that stayed and
/// why.
pub(crate) async fn drain(
    cluster: &Arc<Cluster>,
    name: &str,
) -> Result<Vec<(String, String)>, LabError> {
    let vms = cluster.change(|s| {
        s.host_mut(name)?.paused = true;
        s.announce_node(name, 0);
        Ok::<_, LabError>(
            s.vms.values().filter(|v| v.host == name).map(|v| v.id).collect::<Vec<_>>(),
        )
    })?;
    let mut stayed = Vec::new();
    for id in vms {
        let target = cluster.read(|s| {
            s.hosts.iter().find(|(n, h)| h.up && !h.paused && *n != name).map(|(n, _)| n.clone())
        });
        let moved = match target {
            Some(target) => migrate::migrate(cluster, id, &target, MigrationKind::Live).await,
            None => Err(LabError::refused(name, 5951, "no other host takes VMs")),
        };
        if let Err(e) = moved {
            let vm = cluster.read(|s| s.vm(id).map_or_else(|_| id.to_string(), |v| v.name.clone()));
            stayed.push((vm, e.to_string()));
        }
    }
    Ok(stayed)
}
