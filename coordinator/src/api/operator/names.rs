//! Names and ids as operators give them: a key or id always works, a name only while it is unique.

use outrider_proto::ids::{GroupId, PointId, VmKey, VmRole};

use crate::state::State;
use crate::state::points::Point;
use crate::state::vms::{Vm, is_primary};

/// A name that does not name one thing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NameError {
    #[error(
        "no VM {0:?} is known; list the VMs with `outrider vm list`; an agent must run on the VM's host"
    )]
    UnknownVm(String),
    #[error("{} {what}s are named {name:?}: {}; use one of these ids instead of the name", .ids.len(), .ids.join(", "))]
    Ambiguous { what: &'static str, name: String, ids: Vec<String> },
    #[error("no protection group {0:?} is known; list the groups with `outrider group list`")]
    UnknownGroup(String),
    #[error("no recovery point {0:?} is known; list the points with `outrider point list`")]
    UnknownPoint(String),
    #[error("VM {0:?} has no recovery point yet; make one with `outrider backup run --vm`")]
    NoPoints(String),
    #[error("no host {0:?} is known; list the hosts with `outrider host list`")]
    UnknownHost(String),
    #[error(
        "{what} name {name:?} is empty, longer than 100 characters, or holds control characters; choose another one"
    )]
    Bad { what: &'static str, name: String },
}

/// 1 to 100 characters, none of them a control character.
pub(super) fn check_name(what: &'static str, name: &str) -> Result<(), NameError> {
    let fits = !name.trim().is_empty()
        && name.chars().count() <= 100
        && !name.chars().any(char::is_control);
    if fits { Ok(()) } else { Err(NameError::Bad { what, name: name.to_owned() }) }
}

/// What names the receiving side of a replication: `NAME@replica`.
const REPLICA: &str = "@replica";

/// Whether somebody said that a replica is meant.
pub(super) fn means_replica(text: &str) -> bool {
    text.ends_with(REPLICA) || text.parse::<VmKey>().is_ok_and(|key| key.role == VmRole::Replica)
}

/// All VMs that a name or key may mean.
pub(super) fn vms(state: &State, text: &str) -> Vec<VmKey> {
    if let Ok(key) = text.parse::<VmKey>()
        && state.vms.contains_key(&key)
    {
        return vec![key];
    }
    let named = |name: &str| -> Vec<VmKey> {
        state.vms.iter().filter(|(_, vm)| vm.name == name).map(|(key, _)| key.clone()).collect()
    };
    let found = named(text);
    match text.strip_suffix(REPLICA) {
        Some(of) if found.is_empty() => {
            let copies = |key: &VmKey| key.role == VmRole::Replica;
            let by_name: Vec<VmKey> = named(of).into_iter().filter(copies).collect();
            let same = |key: &&VmKey| copies(key) && key.guid.to_string() == of.to_lowercase();
            match by_name.is_empty() {
                true => state.vms.keys().filter(same).cloned().collect(),
                false => by_name,
            }
        }
        _ => found,
    }
}

/// The one VM that a name or key means. Replicas and duplicates carry the name of the VM they copy: they count only when
/// there is nothing else.
pub(super) fn vm(state: &State, text: &str) -> Result<VmKey, NameError> {
    let all = vms(state, text);
    let primary: Vec<VmKey> = all
        .iter()
        .filter(|key| is_primary(key) && state.vms.get(key).is_some_and(|vm| !vm.duplicate))
        .cloned()
        .collect();
    one("VM", text, if primary.is_empty() { all } else { primary })?
        .ok_or_else(|| NameError::UnknownVm(text.to_owned()))
}

/// As [`vm`], for work: after a failover both sides have been the VM, and the one that lives is meant.
pub(super) fn vm_at_work(state: &State, text: &str) -> Result<VmKey, NameError> {
    let found = vm(state, text);
    if !matches!(found, Err(NameError::Ambiguous { .. })) {
        return found;
    }
    let works = |key: &VmKey| state.vms.get(key).is_some_and(Vm::is_workable);
    let means_replica = means_replica(text);
    let mut living = vms(state, text);
    living.retain(|key| works(key) && (means_replica || is_primary(key)));
    match living.as_slice() {
        [one] => Ok(one.clone()),
        _ => found,
    }
}

/// As [`vm`], also for VMs that only their points remember.
pub(super) fn vm_with_points(state: &State, text: &str) -> Result<VmKey, NameError> {
    match vm(state, text) {
        Err(NameError::UnknownVm(_)) => {
            let mut keys: Vec<VmKey> = state
                .points
                .values()
                .filter(|p| p.vm.to_string() == text || is_named(p, text))
                .map(|p| p.vm.clone())
                .collect();
            keys.sort();
            keys.dedup();
            one("VM", text, keys)?.ok_or_else(|| NameError::UnknownVm(text.to_owned()))
        }
        found => found,
    }
}

/// Whether a point that outlived its VM is of the VM of this name. Of both sides of a replication the VM itself is meant.
fn is_named(point: &Point, text: &str) -> bool {
    match text.strip_suffix(REPLICA) {
        Some(of) => point.vm.role == VmRole::Replica && point.vm_name == of,
        None => is_primary(&point.vm) && point.vm_name == text,
    }
}

/// The one group that a name or id means.
pub(super) fn group(state: &State, text: &str) -> Result<GroupId, NameError> {
    let by_id = text.parse().ok().filter(|id| state.groups.contains_key(id));
    by_id
        .or_else(|| state.groups.iter().find(|(_, g)| g.name == text).map(|(id, _)| *id))
        .ok_or_else(|| NameError::UnknownGroup(text.to_owned()))
}

/// A point by id, or the latest one of a VM (with no id, or the id "latest").
pub(super) fn point<'s>(state: &'s State, id: &str, vm: &str) -> Result<&'s Point, NameError> {
    if vm.is_empty() || !(id.is_empty() || id == "latest") {
        let parsed: Option<PointId> = id.parse().ok();
        return parsed
            .and_then(|id| state.points.get(&id))
            .ok_or_else(|| NameError::UnknownPoint(id.to_owned()));
    }
    let key = vm_with_points(state, vm)?;
    state
        .points
        .values()
        .filter(|p| p.vm == key)
        // A VM has one job at a time, so commits are in order; when a point was taken goes by the clock of its host.
        .max_by_key(|p| (p.committed_ms, p.taken_ms))
        .ok_or_else(|| NameError::NoPoints(vm.to_owned()))
}

fn one(what: &'static str, text: &str, mut found: Vec<VmKey>) -> Result<Option<VmKey>, NameError> {
    if found.len() > 1 {
        let ids = found.iter().map(ToString::to_string).collect();
        return Err(NameError::Ambiguous { what, name: text.to_owned(), ids });
    }
    Ok(found.pop())
}
