//! What operators are told when it does not go as they asked.

use outrider_proto::error_code::{self, ErrorCode};
use outrider_proto::ids::{JobId, VmKey, VmRole};
use outrider_proto::status::status;
use tonic::Status;

use super::names::{self, NameError};
use crate::state::State;
use crate::state::points::Point;
use crate::state::vms::is_placed;

/// A replica is given work only when somebody says that it is meant: it is a copy, crash-consistent at best, and its points
/// are a history of their own.
pub(super) fn unmeant(state: &State, key: &VmKey, text: &str) -> Option<Status> {
    let name = state.vms.get(key).map_or(text, |vm| vm.name.as_str());
    if !is_placed(key) {
        return unworkable(state, key);
    }
    (key.role == VmRole::Replica && !names::means_replica(text)).then(|| {
        Status::failed_precondition(format!(
            "VM {name:?} is known here only as the receiving side of a Hyper-V replication ({key}): protect the VM itself, by \
             an agent on its primary host, or this copy, which is crash-consistent at best, as {:?}",
            format!("{name}@replica")
        ))
    })
}

/// Why a VM cannot be backed up whatever happens next; silence of its host is for the job to wait out.
pub(super) fn unworkable(state: &State, key: &VmKey) -> Option<Status> {
    let vm = state.vms.get(key)?;
    let reason = if !is_placed(key) {
        "is a test failover, which is thrown away after the test; back up the VM itself"
    } else if vm.duplicate {
        "is a duplicate of a VM in another realm; back that one up, or remove one of the two"
    } else {
        return None;
    };
    Some(Status::failed_precondition(format!("VM {} ({key}) {reason}", vm.name)))
}

/// The VM of a point has no place any more.
pub(super) fn no_host(point: &Point) -> Status {
    status(
        &error_code::UNKNOWN_HOST,
        format!("no host is known for VM {} any more; name one with --to-host", point.vm_name),
    )
}

/// No such job.
pub(super) fn unknown_job(id: &JobId) -> Status {
    status(
        &error_code::UNKNOWN_JOB,
        format!("no job {id} is known; list the jobs with `outrider job list`"),
    )
}

/// A name that means nothing, or several things.
pub(super) fn named(error: NameError) -> Status {
    let code: &ErrorCode = match &error {
        NameError::UnknownVm(_) => &error_code::UNKNOWN_VM,
        NameError::Ambiguous { .. } => &error_code::AMBIGUOUS_NAME,
        NameError::UnknownGroup(_) => &error_code::UNKNOWN_GROUP,
        NameError::UnknownPoint(_) | NameError::NoPoints(_) => &error_code::UNKNOWN_POINT,
        NameError::UnknownHost(_) => &error_code::UNKNOWN_HOST,
        NameError::Bad { .. } => &error_code::BAD_NAME,
    };
    status(code, error.to_string())
}
