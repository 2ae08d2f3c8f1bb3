//! VMs: define, import, realize, modify, destroy, power.

use std::path::PathBuf;
use std::sync::Arc;

use outrider_wmi::lab::wire::Refusal;
use outrider_wmi::{Object, Value};
use uuid::Uuid;

use super::{Call, INVALID, Outcome};
use crate::classes;
use crate::cluster::Cluster;
use crate::hardware::Port;
use crate::host;
use crate::host_path::host_path;
use crate::import;
use crate::jobs::JobError;
use crate::model::{Busy, CREATED, Disk, Power, State, Vm, guid};
use crate::wql::ObjectPath;

const PLANNED: &str = "Msvm_PlannedComputerSystem";

pub(super) fn call(cluster: &Arc<Cluster>, call: &Call) -> Option<Result<Outcome, Refusal>> {
    Some(match call.method.as_str() {
        "DefineSystem" => define(cluster, call),
        "ImportSystemDefinition" => import_definition(cluster, call),
        "ImportSnapshotDefinitions" => import_checkpoints(cluster, call),
        "RemoveResourceSettings" => remove_resources(cluster, call),
        "ValidatePlannedSystem" => validate(cluster, call),
        "RealizePlannedSystem" => realize(cluster, call),
        "DestroySystem" => destroy(cluster, call),
        "ModifySystemSettings" => modify_settings(cluster, call),
        "ModifyResourceSettings" => modify_resources(cluster, call),
        "RequestStateChange" => request_state(cluster, call),
        "GetSummaryInformation" => Ok(summaries(cluster, call)),
        _ => return None,
    })
}

fn define(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let settings = call.args.embedded("SystemSettings")?.unwrap_or_default();
    let resources = call.args.embedded_array("ResourceSettings")?;
    let id = cluster.change(|s| {
        let id = s.new_guid();
        let name = settings.str("ElementName").unwrap_or("New Virtual Machine");
        let root = match settings.str("ConfigurationDataRoot") {
            Some(root) => host_path(root),
            None => s.csvs.first().map(|c| c.path.join(guid(id))).unwrap_or_default(),
        };
        let mut vm = Vm::new(id, name, &call.host, root);
        if settings.str("VirtualSystemSubType") == Some("Microsoft:Hyper-V:SubType:1") {
            vm.generation = 1;
        }
        let paths = resources.iter().filter_map(host_resource);
        vm.disks = (0..)
            .zip(paths)
            .map(|(location, path)| new_disk(s.new_guid(), location, path))
            .collect();
        s.planned.insert(id, vm);
        id
    });
    let job = cluster.change(|s| s.begin_job(&call.host, Some(id), &call.method, 20, None));
    Ok(Outcome::job(cluster.run_job(job, move |cluster| match import::realize(cluster, id) {
        Ok(()) => Ok(vec![classes::system_path("Msvm_ComputerSystem", &guid(id))]),
        Err(e) => {
            cluster.change(|s| s.planned.remove(&id));
            Err(e)
        }
    })))
}

fn new_disk(id: Uuid, location: u32, path: PathBuf) -> Disk {
    Disk { id, location, chain: vec![path], device: None, size: 0, disk_id: Uuid::nil() }
}

/// Summaries of the VMs that the settings name, all of this host's without any.
fn summaries(cluster: &Cluster, call: &Call) -> Outcome {
    let wanted = call.args.text_list("SettingData");
    let requested = call.args.number_list("RequestedInformation");
    let found: Vec<Value> = cluster.read(|s| {
        s.vms
            .values()
            .filter(|vm| vm.host == call.host)
            .filter(|vm| wanted.is_empty() || wanted.iter().any(|path| path.contains(&vm.guid())))
            .map(|vm| Value::Object(Box::new(classes::summary_of(vm, &requested))))
            .collect()
    });
    Outcome::code(0).with("SummaryInformation", Value::Array(found))
}

fn host_resource(settings: &Object) -> Option<PathBuf> {
    settings.array("HostResource").first().and_then(Value::as_str).map(host_path)
}

fn import_definition(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let file = host_path(call.args.str("SystemDefinitionFile"));
    let snapshots = match call.args.str("SnapshotFolder") {
        "" if call.args.has("SnapshotFolder") => return Ok(Outcome::code(INVALID)),
        "" => PathBuf::new(),
        folder => host_path(folder),
    };
    let new_id = call.args.bool("GenerateNewSystemIdentifier");
    let job = cluster.change(|s| s.begin_job(&call.host, None, &call.method, 61, None));
    let host = call.host.clone();
    Ok(Outcome::job(cluster.run_job(job, move |cluster| {
        let id = import::import(cluster, &host, &file, &snapshots, new_id)?;
        Ok(vec![classes::system_path(PLANNED, &guid(id))])
    })))
}

fn import_checkpoints(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let id = cluster
        .read(|s| s.planned_by_ref(&call.host, call.args.str("PlannedSystem")).map(|vm| vm.id))?;
    let folder = host_path(call.args.str("SnapshotFolder"));
    let job = cluster.change(|s| s.begin_job(&call.host, Some(id), &call.method, 61, None));
    Ok(Outcome::job(
        cluster.run_job(job, move |cluster| import::import_checkpoints(cluster, id, &folder)),
    ))
}

/// Takes an image out of its drive, the connection from an adapter, or a disk: of a planned VM or its checkpoint.
fn remove_resources(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let ids: Vec<String> = call
        .args
        .text_array("ResourceSettings")
        .iter()
        .filter_map(|path| Some(ObjectPath::parse(path)?.key("InstanceID")?.to_owned()))
        .collect();
    let parts = |id: &str| -> Option<(Uuid, Uuid)> {
        let mut parts = id.strip_prefix("Microsoft:")?.split('\\');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    let parsed: Option<Vec<(Uuid, Uuid)>> = ids.iter().map(|id| parts(id)).collect();
    let Some(parsed) = parsed.filter(|p| !p.is_empty()) else {
        return Ok(Outcome::code(INVALID));
    };
    let vm = planned_with(cluster, parsed[0].0);
    let begun = cluster.change(|s| {
        s.planned
            .get(&vm)
            .is_some_and(|p| p.host == call.host)
            .then(|| s.begin_job(&call.host, Some(vm), &call.method, 20, None))
    });
    let Some(job) = begun else { return Ok(Outcome::code(INVALID)) };
    Ok(Outcome::job(cluster.run_job(job, move |cluster| {
        cluster.change(|s| {
            let Some(planned) = s.planned.get_mut(&vm) else {
                return Err(JobError::new(32773, "no such planned VM"));
            };
            for (config, part) in &parsed {
                if *config == vm {
                    planned.disks.retain(|d| d.id != *part);
                }
                for checkpoint in planned.checkpoints.iter_mut().filter(|c| c.id == *config) {
                    checkpoint.disks.retain(|d| d.disk != *part);
                }
                let Some(hardware) = planned.hardware_of(*config) else { continue };
                for drive in hardware.drives.iter_mut().filter(|d| d.id == *part) {
                    drive.image = None;
                }
                for nic in hardware.nics.iter_mut().filter(|n| n.id == *part) {
                    nic.port = None;
                }
            }
            Ok(Vec::new())
        })
    })))
}

fn validate(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let id = cluster
        .read(|s| s.planned_by_ref(&call.host, call.args.str("PlannedSystem")).map(|vm| vm.id))?;
    let job = cluster.change(|s| s.begin_job(&call.host, Some(id), &call.method, 140, None));
    Ok(Outcome::job(
        cluster.run_job(job, move |cluster| import::validate(cluster, id).map(|_| Vec::new())),
    ))
}

fn realize(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let id = cluster
        .read(|s| s.planned_by_ref(&call.host, call.args.str("PlannedSystem")).map(|vm| vm.id))?;
    let job = cluster.change(|s| s.begin_job(&call.host, Some(id), &call.method, 141, None));
    Ok(Outcome::job(cluster.run_job(job, move |cluster| {
        import::realize(cluster, id)?;
        Ok(vec![classes::system_path("Msvm_ComputerSystem", &guid(id))])
    })))
}

fn destroy(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let reference = call.args.str("AffectedSystem");
    let begun = cluster.change(|s| {
        if let Ok(vm) = s.planned_by_ref(&call.host, reference) {
            let id = vm.id;
            return Ok(Ok((id, s.begin_job(&call.host, Some(id), &call.method, 21, None))));
        }
        let vm = s.vm_by_ref(&call.host, reference)?;
        if let Some((code, _)) = s.obstacle(vm) {
            return Ok(Err(code));
        }
        if vm.power.holds_disks() {
            return Ok(Err(super::WRONG_STATE));
        }
        let id = vm.id;
        Ok::<_, Refusal>(Ok((
            id,
            s.begin_job(&call.host, Some(id), &call.method, 21, Some(Busy::Modifying)),
        )))
    })?;
    match begun {
        Err(code) => Ok(Outcome::code(code)),
        Ok((id, job)) => Ok(Outcome::job(cluster.run_job(job, move |cluster| {
            import::destroy(cluster, id)?;
            Ok(Vec::new())
        }))),
    }
}

/// Renames a checkpoint or VM, or changes the folder of a planned VM.
fn modify_settings(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let Some(settings) = call.args.embedded("SystemSettings")? else {
        return Ok(Outcome::code(INVALID));
    };
    let Some(id) = settings
        .str("InstanceID")
        .and_then(|i| i.strip_prefix("Microsoft:"))
        .and_then(|i| i.parse::<Uuid>().ok())
    else {
        return Ok(Outcome::code(INVALID));
    };
    let (kind, host) = (20, call.host.as_str());
    let begun = cluster.change(|s| {
        let owner = s
            .vms
            .values()
            .filter(|vm| vm.host == host)
            .find(|vm| vm.id == id || vm.checkpoints.iter().any(|c| c.id == id));
        let owner = owner.map(|vm| (vm.id, vm.busy.is_some(), vm.migration.is_some()));
        match owner {
            Some((_, true, _)) => Err(super::IN_USE),
            Some((_, _, true)) => Err(super::WRONG_STATE),
            Some((vm, ..)) => {
                Ok((vm, s.begin_job(host, Some(vm), &call.method, kind, Some(Busy::Modifying))))
            }
            None if s.planned.get(&id).is_some_and(|vm| vm.host == host) => {
                Ok((id, s.begin_job(host, Some(id), &call.method, kind, None)))
            }
            None => Err(INVALID),
        }
    });
    let (vm, job) = match begun {
        Ok(begun) => begun,
        Err(code) => return Ok(Outcome::code(code)),
    };
    Ok(Outcome::job(cluster.run_job(job, move |cluster| {
        let name = settings.str("ElementName").map(str::to_owned);
        let root = settings.str("ConfigurationDataRoot").map(host_path);
        cluster.change(|s| {
            if let Some(planned) = s.planned.get_mut(&id) {
                planned.name = name.unwrap_or_else(|| planned.name.clone());
                planned.folder = root.unwrap_or_else(|| planned.folder.clone());
                let hardware = &mut planned.hardware;
                for (property, slot) in [
                    ("SnapshotDataRoot", &mut hardware.snapshot_root),
                    ("SwapFileDataRoot", &mut hardware.swap_root),
                    ("SuspendDataRoot", &mut hardware.suspend_root),
                ] {
                    if let Some(root) = settings.str(property) {
                        let root = host_path(root);
                        *slot = (root != planned.folder).then_some(root);
                    }
                }
                return Ok(Vec::new());
            }
            let found = s.vm_mut(vm)?;
            let Some(name) = name else { return Ok(Vec::new()) };
            match found.checkpoints.iter_mut().find(|c| c.id == id) {
                Some(checkpoint) => checkpoint.name = name,
                None if found.id == id => found.name = name,
                None => return Err(JobError::new(32773, "the checkpoint is gone")),
            }
            s.announce_vm(vm);
            Ok(Vec::new())
        })
    })))
}

/// Changes the files of disks: of a planned VM, or of a VM that is off and has no checkpoints.
fn modify_resources(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let resources = call.args.embedded_array("ResourceSettings")?;
    let mut changes = Vec::new();
    for resource in &resources {
        let parts: Vec<&str> = resource
            .str("InstanceID")
            .and_then(|i| i.strip_prefix("Microsoft:"))
            .map(|i| i.split('\\').collect())
            .unwrap_or_default();
        let ids = parts
            .first()
            .and_then(|p| p.parse::<Uuid>().ok())
            .zip(parts.get(1).and_then(|p| p.parse::<Uuid>().ok()));
        let Some((config, part)) = ids else { return Ok(Outcome::code(INVALID)) };
        changes.push((config, part, resource.clone()));
    }
    let Some(config) = changes.first().map(|c| c.0) else { return Ok(Outcome::code(INVALID)) };
    let vm = planned_with(cluster, config);
    let begun = cluster.change(|s| {
        if s.planned.get(&vm).is_some_and(|p| p.host == call.host) {
            return Ok(s.begin_job(&call.host, Some(vm), &call.method, 20, None));
        }
        let Some(found) = s.vms.get(&vm).filter(|v| v.host == call.host) else {
            return Err(INVALID);
        };
        if let Some((code, _)) = s.obstacle(found) {
            return Err(code);
        }
        if found.power.holds_disks() || !found.checkpoints.is_empty() {
            return Err(super::WRONG_STATE);
        }
        Ok(s.begin_job(&call.host, Some(vm), &call.method, 20, Some(Busy::Modifying)))
    });
    let job = match begun {
        Ok(job) => job,
        Err(code) => return Ok(Outcome::code(code)),
    };
    Ok(Outcome::job(cluster.run_job(job, move |cluster| {
        if cluster.read(|s| s.planned.contains_key(&vm)) {
            return cluster.change(|s| {
                for (config, part, settings) in &changes {
                    modify_planned(s, vm, *config, *part, settings)?;
                }
                Ok(Vec::new())
            });
        }
        for (_, disk, settings) in &changes {
            let path = host_resource(settings)
                .ok_or_else(|| JobError::new(32773, "no file for the disk"))?;
            crate::steer::replace_file(cluster, vm, *disk, &path)?;
        }
        Ok(Vec::new())
    })))
}

/// The planned VM whose settings, or whose checkpoint's settings, these are; else the settings' own GUID.
fn planned_with(cluster: &Cluster, config: Uuid) -> Uuid {
    cluster.read(|s| {
        let of = |vm: &&Vm| vm.id == config || vm.checkpoints.iter().any(|c| c.id == config);
        s.planned.values().find(of).map_or(config, |vm| vm.id)
    })
}

/// Changes one disk, adapter connection or drive of a planned VM.
fn modify_planned(
    s: &mut State,
    vm: Uuid,
    config: Uuid,
    part: Uuid,
    settings: &Object,
) -> Result<(), JobError> {
    let host = s.planned.get(&vm).and_then(|p| s.hosts.get(&p.host));
    let switches = host.map(|h| h.equipment.switches.clone()).unwrap_or_default();
    let gone = || JobError::new(32773, "no such part of the planned VM");
    let planned = s.planned.get_mut(&vm).ok_or_else(gone)?;
    let hardware = planned.hardware_of(config).ok_or_else(gone)?;
    if let Some(nic) = hardware.nics.iter_mut().find(|n| n.id == part) {
        let asked = settings.array("HostResource").first().and_then(Value::as_str);
        let id = asked.and_then(classes::switch_of);
        let found = switches.iter().find(|s| Some(s.id) == id);
        let enabled = settings.u64("EnabledState") != Some(3);
        nic.port = match found {
            Some(found) => Some(Port { switch: found.id, name: found.name.clone(), enabled }),
            None => nic.port.take().map(|port| Port { enabled, ..port }),
        };
        return Ok(());
    }
    let path = host_resource(settings).ok_or_else(gone)?;
    if config != vm {
        let checkpoint = planned.checkpoints.iter_mut().find(|c| c.id == config);
        let disk = checkpoint.and_then(|c| c.disks.iter_mut().find(|d| d.disk == part));
        disk.ok_or_else(gone)?.path = path;
        return Ok(());
    }
    planned.disks.iter_mut().find(|d| d.id == part).ok_or_else(gone)?.chain = vec![path];
    Ok(())
}

fn request_state(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let wanted = match call.args.u64("RequestedState") {
        Some(2) => Power::Running,
        Some(3 | 4) => Power::Off,
        Some(6 | 32773) => Power::Saved,
        Some(9 | 32776) => Power::Paused,
        _ => return Ok(Outcome::code(INVALID)),
    };
    let begun = cluster.change(|s| {
        let vm = s.vm_by_ref(&call.host, &call.path)?;
        if vm.migration.is_some() || vm.busy.is_some() {
            return Ok(Err(super::WRONG_STATE));
        }
        let id = vm.id;
        let stops = vm.power.holds_disks() && matches!(wanted, Power::Off | Power::Saved);
        if stops
            && vm.owner.is_some()
            && !vm.group.offline
            && let Some(vm) = s.vms.get_mut(&id)
        {
            vm.cluster_failures += 1;
        }
        Ok::<_, Refusal>(Ok((
            id,
            s.begin_job(&call.host, Some(id), &call.method, 4, Some(Busy::Modifying)),
        )))
    })?;
    match begun {
        Err(code) => Ok(Outcome::code(code)),
        Ok((id, job)) => Ok(Outcome::job(cluster.run_job(job, move |cluster| {
            host::power(cluster, id, wanted)?;
            Ok(vec![classes::system_path("Msvm_ComputerSystem", &guid(id))])
        }))),
    }
}

/// Announces a VM that came to be outside of the WMI face.
pub(crate) fn announce_new(cluster: &Cluster, id: Uuid) {
    cluster.change(|s| {
        if let Some(vm) = s.vms.get(&id) {
            let (host, target) = (vm.host.clone(), classes::computer_system(vm));
            s.notify(Some(&host), CREATED, target, None);
        }
        for group in classes::group_objects(s, id) {
            s.notify(None, CREATED, group, None);
        }
    });
}
