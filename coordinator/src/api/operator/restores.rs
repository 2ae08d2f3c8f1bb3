//! A restore as an operator asks for it.

use outrider_proto::rpc;
use tonic::Status;

use super::names::{self, NameError};
use super::refusals::{named, no_host};
use crate::leader::new_job;
use crate::state::State;
use crate::state::jobs::{BootCheck, NewJob, Restore, Work};

/// The job, if the point, the host and the names are there.
pub(super) fn job(state: &State, r: rpc::RestoreRequest) -> Result<NewJob, Status> {
    if !r.new_name.is_empty() {
        names::check_name("VM", &r.new_name).map_err(named)?;
    }
    if r.with_checkpoints && !r.checkpoint.is_empty() {
        return Err(Status::invalid_argument(
            "a VM is restored with its checkpoints, or as it was at one of them: choose one",
        ));
    }
    let point = names::point(state, &r.point_id, &r.vm).map_err(named)?;
    let host = match (&r.to_host, state.vms.get(&point.vm)) {
        (host, _) if !host.is_empty() => host.clone(),
        (_, Some(vm)) => vm.host.clone().ok_or_else(|| no_host(point))?,
        (_, None) => return Err(no_host(point)),
    };
    if !state.hosts.contains_key(&host) {
        return Err(named(NameError::UnknownHost(host)));
    }
    let restore = Restore {
        point: point.id,
        manifest: point.manifest,
        host,
        name: if r.new_name.is_empty() { point.vm_name.clone() } else { r.new_name },
        folder: r.target_folder,
        keep_guid: r.keep_guid,
        overwrite: r.overwrite,
        power_on: r.power_on,
        highly_available: r.highly_available,
        switches: r.switches.into_iter().map(|s| (s.from, s.to)).collect(),
        disconnect: r.disconnect,
        discard_saved_state: r.discard_saved_state,
        with_checkpoints: r.with_checkpoints,
        checkpoint: r.checkpoint,
        keep_replaced: r.keep_replaced,
        boot_check: r.boot_check.map(|check| BootCheck {
            patience_ms: check.patience_ms,
            text: check.text,
            screen: check.screen,
        }),
    };
    Ok(new_job(point.vm.clone(), None, |_| Work::Restore(Box::new(restore))))
}
