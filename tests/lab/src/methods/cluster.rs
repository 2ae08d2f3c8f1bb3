//! Methods of the failover cluster.

use std::sync::Arc;

use outrider_wmi::Object;
use outrider_wmi::lab::wire::Refusal;
use uuid::Uuid;

use super::{Call, Outcome, invalid};
use crate::classes;
use crate::cluster::Cluster;
use crate::control::MigrationKind;
use crate::error::LabError;
use crate::hardware::GroupSettings;
use crate::host;
use crate::migrate;
use crate::model::{CREATED, DELETED, Power, State, Vm};

/// ERROR_INVALID_PARAMETER, ERROR_GROUP_NOT_FOUND, ERROR_OBJECT_ALREADY_EXISTS.
const BAD_PARAMETER: u32 = 87;
const NO_GROUP: u32 = 5013;
const EXISTS: u32 = 5010;
/// A resource of the group is locked.
const LOCKED: u32 = 5960;

pub(super) async fn call(
    cluster: &Arc<Cluster>,
    call: &Call,
    target: &Object,
) -> Option<Result<Outcome, Refusal>> {
    let group = cluster.read(|s| vm_of_group(s, target));
    Some(match (target.class.as_str(), call.method.as_str()) {
        ("MSCluster_Cluster", "AddVirtualMachine") => Ok(Outcome::code(add(cluster, call))),
        ("MSCluster_ResourceGroup", "DestroyGroup") => Ok(Outcome::code(destroy(cluster, group))),
        ("MSCluster_ResourceGroup", "MoveToNewNode") => {
            Ok(Outcome::code(move_to(cluster, group, call.args.str("NodeName")).await))
        }
        ("MSCluster_ResourceGroup", "BringOnline") => {
            power(cluster, call, group, Power::Running).await
        }
        ("MSCluster_ResourceGroup", "TakeOffline") => power(cluster, call, group, Power::Off).await,
        ("MSCluster_Resource", "BringOnline") if is_vm(target) => {
            power(cluster, call, vm_of_resource(cluster, target), Power::Running).await
        }
        ("MSCluster_Resource", "TakeOffline") if is_vm(target) => {
            let vm = vm_of_resource(cluster, target);
            let wanted = cluster.read(|s| vm.and_then(|id| s.vms.get(&id)).map(offline));
            power(cluster, call, vm, wanted.unwrap_or(Power::Off)).await
        }
        ("MSCluster_ResourceGroup", "GetPreferredOwners") => {
            let owners = cluster.read(|s| {
                let vm = group.and_then(|id| s.vms.get(&id));
                vm.map(|vm| vm.group.preferred_owners.clone()).unwrap_or_default()
            });
            Ok(Outcome::code(0).with("NodeNames", owners))
        }
        ("MSCluster_ResourceGroup", "SetPreferredOwners") => {
            let owners = call.args.text_array("NodeNames");
            Ok(Outcome::code(cluster.change(|s| {
                let Some(vm) = group.and_then(|id| s.vms.get_mut(&id)) else { return NO_GROUP };
                vm.group.preferred_owners = owners;
                0
            })))
        }
        ("MSCluster_Resource", "UpdateVirtualMachine") => Ok(Outcome::code(0)),
        _ => return None,
    })
}

fn is_vm(resource: &Object) -> bool {
    resource.str("Type") == Some("Virtual Machine")
}

/// The VM that a resource is of.
fn vm_of_resource(cluster: &Cluster, target: &Object) -> Option<Uuid> {
    let id = target.object("PrivateProperties")?.str("VmID")?.parse().ok()?;
    cluster.read(|s| s.vms.contains_key(&id)).then_some(id)
}

/// What taking its resource offline makes of a VM.
fn offline(vm: &Vm) -> Power {
    match vm.shape.offline_action {
        1 if vm.power.holds_disks() => Power::Saved,
        1 => vm.power,
        _ => Power::Off,
    }
}

pub(super) fn vm_of_group(s: &State, target: &Object) -> Option<Uuid> {
    let is = |id: &&Uuid| classes::group_objects(s, **id).iter().any(|o| o.path == target.path);
    s.vms.keys().find(is).copied()
}

/// Makes a VM highly available; it is named by GUID, or by name if that is unique.
fn add(cluster: &Cluster, call: &Call) -> u32 {
    cluster.change(|s| {
        let found = call.args.texts().find_map(|t| s.find_vm(t).ok().map(|vm| vm.id));
        let Some(vm) = found.and_then(|id| s.vms.get_mut(&id)) else { return BAD_PARAMETER };
        if vm.owner.is_some() {
            return EXISTS;
        }
        vm.owner = Some(vm.host.clone());
        vm.group = GroupSettings::default();
        let id = vm.id;
        for object in classes::group_objects(s, id) {
            s.notify(None, CREATED, object, None);
        }
        0
    })
}

fn destroy(cluster: &Cluster, vm: Option<Uuid>) -> u32 {
    cluster.change(|s| {
        let Some(id) = vm else { return NO_GROUP };
        for object in classes::group_objects(s, id) {
            s.notify(None, DELETED, object, None);
        }
        match s.vms.get_mut(&id) {
            Some(vm) => {
                vm.owner = None;
                0
            }
            None => NO_GROUP,
        }
    })
}

async fn move_to(cluster: &Arc<Cluster>, vm: Option<Uuid>, node: &str) -> u32 {
    let Some(vm) = vm else { return NO_GROUP };
    match migrate::migrate(cluster, vm, node, MigrationKind::Live).await {
        Ok(()) => 0,
        Err(LabError::Refused { code, .. }) => code,
        Err(_) => BAD_PARAMETER,
    }
}

async fn power(
    cluster: &Arc<Cluster>,
    call: &Call,
    vm: Option<Uuid>,
    wanted: Power,
) -> Result<Outcome, Refusal> {
    let Some(vm) = vm else { return Ok(Outcome::code(NO_GROUP)) };
    let locked = cluster.change(|s| {
        let Ok(found) = s.vm_mut(vm) else { return true };
        if found.busy.is_some() || found.migration.is_some() {
            return true;
        }
        found.group.offline = wanted != Power::Running;
        false
    });
    if locked {
        return Ok(Outcome::code(LOCKED));
    }
    let inner = cluster.clone();
    let done = cluster.blocking(move || host::power(&inner, vm, wanted)).await;
    match done.and_then(|r| r) {
        Ok(()) => Ok(Outcome::code(0)),
        Err(e) => Err(invalid(&call.method, &e.to_string())),
    }
}
