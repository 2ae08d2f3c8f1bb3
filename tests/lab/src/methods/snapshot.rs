//! Checkpoints and reference points.

use std::sync::Arc;

use outrider_wmi::lab::wire::Refusal;
use uuid::Uuid;

use super::{Call, IN_USE, INVALID, Outcome, WRONG_STATE};
use crate::checkpoint::{self, NewCheckpoint};
use crate::classes;
use crate::cluster::Cluster;
use crate::control::FaultKind;
use crate::jobs::JobError;
use crate::model::{Busy, Power, State, Vm};

/// SnapshotType of a backup checkpoint.
const RECOVERY: u64 = 32768;

/// The method, if it is one of these services'.
pub(super) fn call(cluster: &Arc<Cluster>, call: &Call) -> Option<Result<Outcome, Refusal>> {
    Some(match call.method.as_str() {
        "CreateSnapshot" => create(cluster, call),
        "DestroySnapshot" => destroy(cluster, call),
        "ConvertToReferencePoint" => convert(cluster, call),
        "ApplySnapshot" => apply(cluster, call),
        "DestroyReferencePoint" => destroy_reference_point(cluster, call),
        _ => return None,
    })
}

/// Why the guest cannot take part in an application-consistent checkpoint.
fn guest_refuses(vm: &Vm) -> Option<JobError> {
    let why = match vm.power {
        Power::Running
            if vm.vss
                && vm
                    .shape
                    .backup_service
                    .is_none_or(|(on, [s, _])| on == 2 && matches!(s, 2 | 3)) =>
        {
            return None;
        }
        Power::Running => "the guest's backup integration component does not answer",
        Power::Paused => "the virtual machine is paused",
        // Nobody writes: consistent as it is.
        Power::Off | Power::Saved => return None,
    };
    Some(JobError::new(32768, format!("'{}': production checkpoint failed: {why}", vm.name)))
}

fn create(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let settings = call.args.embedded("SnapshotSettings")?;
    // Server 2016 has no such property.
    let old = cluster.read(|s| s.around.build(&call.host)) < 15_063;
    if old && settings.as_ref().is_some_and(|s| s.iter().any(|(name, _)| name == "GuestBackupType"))
    {
        return Ok(Outcome::code(INVALID));
    }
    let setting = |name: &str| settings.as_ref().and_then(|s| s.u64(name));
    let consistency = u8::try_from(setting("ConsistencyLevel").unwrap_or(1)).unwrap_or(0);
    let ignore =
        settings.as_ref().and_then(|s| s.bool("IgnoreNonSnapshottableDisks")).unwrap_or_default();
    let recovery = match call.args.u64("SnapshotType") {
        Some(RECOVERY) => true,
        Some(2 | 3) => false,
        _ => return Ok(Outcome::code(INVALID)),
    };
    if recovery && !matches!(consistency, 1 | 2) {
        return Ok(Outcome::code(INVALID));
    }
    let begun = cluster.change(|s| {
        let vm = s.vm_by_ref(&call.host, call.args.str("AffectedSystem"))?;
        if let Some((code, _)) = s.obstacle(vm) {
            return Ok(Err(code));
        }
        if vm.shape.applying_log {
            return Ok(Err(WRONG_STATE));
        }
        if recovery && vm.recovery_checkpoint().is_some() {
            return Ok(Err(WRONG_STATE));
        }
        let mut failure = if recovery && consistency == 1 { guest_refuses(vm) } else { None };
        if !ignore && vm.disks.iter().any(|d| !d.is_virtual()) {
            let text = format!("'{}' has a disk that cannot be part of a checkpoint", vm.name);
            failure = Some(JobError::new(32768, text));
        }
        let id = vm.id;
        let name = format!("{} - backup checkpoint", vm.name);
        let new = NewCheckpoint { id: s.new_guid(), name, recovery, consistency };
        let (kind, busy) =
            if recovery { (170, Busy::BackingUp) } else { (70, Busy::CreatingCheckpoint) };
        let job = s.begin_job(&call.host, Some(id), &call.method, kind, Some(busy));
        Ok::<_, Refusal>(Ok((id, new, job, failure)))
    })?;
    let (vm, new, job, failure) = match begun {
        Ok(begun) => begun,
        Err(code) => return Ok(Outcome::code(code)),
    };
    Ok(Outcome::job(cluster.run_job(job, move |cluster| match failure {
        Some(e) => Err(e),
        None => {
            checkpoint::create(cluster, vm, &new)?;
            Ok(vec![classes::checkpoint_path(new.id)])
        }
    })))
}

/// Checks what destroying, converting and applying have in common, and begins the job.
fn begin(
    s: &mut State,
    call: &Call,
    argument: &str,
    kind: u16,
    busy: Busy,
    more: impl FnOnce(&Vm, &crate::model::Checkpoint) -> Option<u32>,
) -> Result<Result<(Uuid, Uuid, Uuid), u32>, Refusal> {
    let (vm, checkpoint) = s.checkpoint_by_ref(&call.host, call.args.str(argument))?;
    if vm.migration.is_some() {
        return Ok(Err(WRONG_STATE));
    }
    if vm.busy.is_some() {
        return Ok(Err(IN_USE));
    }
    if let Some(code) = more(vm, checkpoint) {
        return Ok(Err(code));
    }
    let (vm, checkpoint) = (vm.id, checkpoint.id);
    let job = s.begin_job(&call.host, Some(vm), &call.method, kind, Some(busy));
    Ok(Ok((vm, checkpoint, job)))
}

fn destroy(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let reference = call.args.str("AffectedSnapshot");
    if let Some((vm, checkpoint)) = cluster.read(|s| s.planned_checkpoint(&call.host, reference)) {
        let job = cluster.change(|s| s.begin_job(&call.host, Some(vm), &call.method, 72, None));
        return Ok(Outcome::job(cluster.run_job(job, move |cluster| {
            cluster.change(|s| {
                if let Some(planned) = s.planned.get_mut(&vm) {
                    planned.checkpoints.retain(|c| c.id != checkpoint);
                    if planned.current == Some(checkpoint) {
                        planned.current = None;
                    }
                }
            });
            Ok(Vec::new())
        })));
    }
    let begun = cluster.change(|s| {
        begin(s, call, "AffectedSnapshot", 72, Busy::DeletingCheckpoint, |_, _| None)
    })?;
    let (vm, checkpoint, job) = match begun {
        Ok(begun) => begun,
        Err(code) => return Ok(Outcome::code(code)),
    };
    Ok(Outcome::job(cluster.run_job(job, move |cluster| {
        checkpoint::remove(cluster, vm, checkpoint, None)?;
        Ok(Vec::new())
    })))
}

fn convert(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    // Nobody is known to give them, not even empty ones.
    if call.args.has("ReferencePointSettings") {
        return Ok(Outcome::code(INVALID));
    }
    let begun = cluster.change(|s| {
        begin(s, call, "AffectedSnapshot", 200, Busy::BackingUp, |_, checkpoint| {
            (!checkpoint.recovery).then_some(INVALID)
        })
    })?;
    let (vm, checkpoint, job) = match begun {
        Ok(begun) => begun,
        Err(code) => return Ok(Outcome::code(code)),
    };
    let (host, method) = (call.host.clone(), call.method.clone());
    Ok(Outcome::job(cluster.run_job(job, move |cluster| {
        let id = cluster.change(State::new_guid);
        checkpoint::remove(cluster, vm, checkpoint, Some(id))?;
        let silent = cluster.change(|s| {
            s.strike(Some(vm), Some(&host), |k| {
                (matches!(k, FaultKind::NullResult { .. }) && k.is_about(&method)).then_some(())
            })
        });
        if silent.is_some() {
            return Ok(Vec::new());
        }
        Ok(cluster.read(|s| s.vm(vm).map(|vm| vec![classes::reference_point_path(vm, id)]))?)
    })))
}

fn apply(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let begun = cluster.change(|s| {
        begin(s, call, "Snapshot", 71, Busy::ApplyingCheckpoint, |vm, checkpoint| {
            let wrong = checkpoint.recovery || vm.power.holds_disks() || !vm.merges.is_empty();
            wrong.then_some(WRONG_STATE)
        })
    })?;
    let (vm, checkpoint, job) = match begun {
        Ok(begun) => begun,
        Err(code) => return Ok(Outcome::code(code)),
    };
    Ok(Outcome::job(cluster.run_job(job, move |cluster| {
        checkpoint::apply(cluster, vm, checkpoint)?;
        Ok(Vec::new())
    })))
}

fn destroy_reference_point(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    let begun = cluster.change(|s| {
        let (vm, point) =
            s.reference_point_by_ref(&call.host, call.args.str("AffectedReferencePoint"))?;
        if vm.migration.is_some() {
            return Ok(Err(WRONG_STATE));
        }
        if vm.busy.is_some() {
            return Ok(Err(IN_USE));
        }
        let vm = vm.id;
        let job = s.begin_job(&call.host, Some(vm), &call.method, 202, Some(Busy::Modifying));
        Ok::<_, Refusal>(Ok((vm, point, job)))
    })?;
    let (vm, point, job) = match begun {
        Ok(begun) => begun,
        Err(code) => return Ok(Outcome::code(code)),
    };
    Ok(Outcome::job(cluster.run_job(job, move |cluster| {
        cluster.change_vm(vm, |vm| vm.reference_points.retain(|r| r.id != point))?;
        checkpoint::forget_marks(cluster, vm)?;
        Ok(Vec::new())
    })))
}
