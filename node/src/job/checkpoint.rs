//! Prechecks, the duty, the checkpoint and its name.

use outrider_process::backoff::Backoff;
use outrider_proto::ids::{VmGuid, VmKey};
use outrider_proto::rpc;
use tokio::time::Instant;

use super::{JobContext, JobError};
use crate::consistency::{self, Method, Plan, Wanted, Way};
use crate::hypervisor::{
    Checkpoint, CheckpointRequest, HypervisorError, Power, ReferencePoint, Retry, VmState,
};
use crate::precheck::{self, Situation};

/// What every checkpoint of ours is called first.
pub(super) const PREFIX: &str = "Outrider ";
/// Times that somebody else's checkpoint may come first.
const ROUNDS: u32 = 5;

/// A checkpoint that was just made.
pub(super) struct Made {
    pub(super) checkpoint: Checkpoint,
    pub(super) duty: rpc::Duty,
    pub(super) how: How,
    pub(super) warnings: Vec<String>,
}

/// How and when it was made.
pub(super) struct How {
    pub(super) way: Way,
    pub(super) taken_unix_ms: u64,
    /// Why no changes can be asked for, now and the next time.
    pub(super) untracked: Option<String>,
}

/// Whether a checkpoint carries a name of ours.
pub(super) fn is_ours(checkpoint: &Checkpoint) -> bool {
    is_name_of_ours(&checkpoint.name)
}

/// Whether a checkpoint of this name is ours.
pub(crate) fn is_name_of_ours(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Ends the name of a checkpoint for which the VM may be saved: the duty that carries it says who has to start the VM
/// again, whoever holds it then.
const SAVES: &str = " saves";

/// The name of this attempt's checkpoint.
fn name(context: &JobContext, attempt: u32, plan: &Plan) -> String {
    let saves = plan.ways.iter().any(|w| w.method == Method::SaveFirst);
    let end = if saves { SAVES } else { "" };
    format!("{PREFIX}{} {attempt} {}{end}", context.lease.job(), context.lease.epoch())
}

/// Whether the VM may have been saved under this duty, and not been started again.
pub(super) fn may_have_saved(duty: &rpc::Duty) -> bool {
    duty.state() == rpc::DutyState::Recorded && duty.checkpoint_name.ends_with(SAVES)
}

/// Why changes of the VM are not to be asked for.
pub(super) fn untracked(state: &VmState, work: &rpc::BackupWork) -> Option<String> {
    if work.no_change_tracking {
        return Some("everything is read: change tracking is switched off for the group".into());
    }
    precheck::untracked(state)
}

/// Checks, records the duty, makes the checkpoint, names it, reports it.
///
/// `late`: an earlier attempt recorded its duty and died; the hypervisor may carry its call out only now. A nameless
/// recovery checkpoint that shows up meanwhile is that call's, and is removed.
pub(super) async fn make(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::BackupWork,
    late: bool,
) -> Result<Made, JobError> {
    context.phase("preparing");
    context.lease.wait_to_mutate().await?;
    let wanted = Wanted {
        wanted: work.wanted(),
        minimum: work.minimum(),
        quiesce: !work.no_quiesce,
        offline: work.allow_offline,
    };
    let mut rounds = 0;
    let started = Instant::now();
    let mut backoff =
        Backoff::new(context.times.busy_first, context.times.busy_ceiling, Backoff::any_seed());
    let (state, mut warnings, plan, duty, (checkpoint, way)) = loop {
        // Each time anew: while it waited, the VM may have been started, stopped or changed.
        let (state, warnings) = until_possible(context, vm, work.require_all_disks, late).await?;
        let plan = consistency::plan(&state, wanted)?;
        let checkpoint_name = name(context, message.attempt, &plan);
        let duty = context
            .coordinator
            .record_duty(rpc::RecordDutyRequest {
                job_id: context.lease.job().to_string(),
                lease_epoch: context.lease.epoch().0,
                attempt: message.attempt,
                checkpoint_name: checkpoint_name.clone(),
            })
            .await?;
        context.phase("creating the checkpoint");
        let attempt = Attempt { context, vm: vm.guid, name: &checkpoint_name, work };
        let error = match attempt.try_ways(&plan.ways).await {
            Ok(made) => break (state, warnings, plan, duty, made),
            Err(error) => error,
        };
        settle(context, vm.guid, &duty, &error).await?;
        let JobError::Hypervisor(e) = &error else { return Err(error) };
        if matches!(e, HypervisorError::Occupied { .. }) && rounds < ROUNDS {
            tracing::info!(reason = %e, "the checkpoint has to wait");
            rounds += 1;
        } else if let Some(collision) = collision(&state, e) {
            let pause = backoff.next_wait();
            if started.elapsed() + pause >= context.times.busy_patience {
                return Err(JobError::Precheck(collision));
            }
            tracing::info!(reason = collision.sentence, ?pause, "the checkpoint has to wait");
            tokio::time::sleep(pause).await;
        } else {
            return Err(error);
        }
    };
    if way.method != plan.ways.first().map_or(way.method, |w| w.method) {
        warnings.push(format!(
            "the recovery point is less consistent than planned ({}): {}",
            consistency::text(way.gives),
            way.reason
        ));
    }
    let taken_unix_ms = context.clock.unix_millis();
    let untracked = untracked(&state, work);
    let duty =
        update_duty(context, &duty, rpc::DutyState::Created, Some(&checkpoint), None).await?;
    Ok(Made { checkpoint, duty, how: How { way, taken_unix_ms, untracked }, warnings })
}

/// After a checkpoint that could not be made: ends its duty when nothing of it can be there. While the duty says *recorded*, a
/// nameless recovery checkpoint is taken for ours and removed, so it must not be open while another product has its turn.
///
/// Superseded, the duty is the next holder's; when the outcome is not known, or the VM may not run again yet, it stays open and
/// is cleaned up.
async fn settle(
    context: &JobContext,
    vm: VmGuid,
    duty: &rpc::Duty,
    error: &JobError,
) -> Result<(), JobError> {
    if error.is_superseded() {
        return Ok(());
    }
    let refused = matches!(error, JobError::Hypervisor(e) if e.has_made_nothing());
    let hypervisor = &context.hypervisor;
    let nothing = refused || hypervisor.checkpoints(vm).await.is_ok_and(|all| all.is_empty());
    let runs = !may_have_saved(duty)
        || hypervisor.vm(vm).await.is_ok_and(|state| state.vm.power == Power::Running);
    if nothing && runs {
        update_duty(context, duty, rpc::DutyState::Done, None, None).await?;
    }
    Ok(())
}

/// Waits until a VM is on this host (again).
pub(super) async fn until_here(context: &JobContext, vm: VmGuid) -> Result<(), JobError> {
    let started = Instant::now();
    let mut backoff =
        Backoff::new(context.times.busy_first, context.times.busy_ceiling, Backoff::any_seed());
    loop {
        context.lease.check()?;
        match context.hypervisor.vm(vm).await {
            Err(e) if e.is_absent() => {
                let pause = backoff.next_wait();
                if started.elapsed() + pause >= context.times.vm_wait {
                    return Err(e.into());
                }
                tokio::time::sleep(pause).await;
            }
            _ => return Ok(()),
        }
    }
}

/// Waits for what passes by itself: migrations, merges, other products' backups, replication.
async fn until_possible(
    context: &JobContext,
    key: &VmKey,
    require_all_disks: bool,
    late: bool,
) -> Result<(VmState, Vec<String>), JobError> {
    let vm = key.guid;
    let started = Instant::now();
    let mut backoff =
        Backoff::new(context.times.busy_first, context.times.busy_ceiling, Backoff::any_seed());
    loop {
        context.lease.check()?;
        let (failure, patience) = match context.hypervisor.vm(vm).await {
            Ok(state) => {
                if let Some(obstacle) = precheck::replica::other_role(&state, key.role) {
                    return Err(JobError::Precheck(obstacle));
                }
                let foreign: Vec<Checkpoint> = context
                    .hypervisor
                    .checkpoints(vm)
                    .await?
                    .into_iter()
                    .filter(|c| !is_ours(c))
                    .collect();
                if late && let [one] = foreign.as_slice() {
                    tracing::warn!(
                        checkpoint = one.name,
                        "removing the checkpoint of an earlier attempt's late call"
                    );
                    context.hypervisor.destroy_checkpoint(&context.lease, vm, one).await?;
                    continue;
                }
                let redirected_waited = started.elapsed() >= context.times.redirected_patience;
                let situation =
                    Situation { foreign: &foreign, require_all_disks, redirected_waited };
                let (obstacle, warnings) = precheck::check(&state, situation);
                match obstacle {
                    None => return Ok((state, warnings)),
                    Some(obstacle) if !obstacle.passes => return Err(JobError::Precheck(obstacle)),
                    Some(obstacle) => (JobError::Precheck(obstacle), context.times.busy_patience),
                }
            }
            Err(e) if e.is_absent() => (e.into(), context.times.vm_wait),
            Err(e) => return Err(e.into()),
        };
        let pause = backoff.next_wait();
        if started.elapsed() + pause >= patience {
            return Err(failure);
        }
        tracing::info!(reason = %failure, ?pause, "the checkpoint has to wait");
        context.phase("waiting for the VM");
        tokio::time::sleep(pause).await;
    }
}

/// On the receiving side of a replication a refusal is a collision with the replication itself, and passes.
fn collision(state: &VmState, error: &HypervisorError) -> Option<precheck::Obstacle> {
    let refused = matches!(error, HypervisorError::Refused { .. });
    let collides = refused && (error.is_guest_failure() || error.retry() == Retry::Later);
    if collides { precheck::replica::collision(state, &error.to_string()) } else { None }
}

/// One attempt to make a checkpoint.
struct Attempt<'a> {
    context: &'a JobContext,
    vm: VmGuid,
    name: &'a str,
    work: &'a rpc::BackupWork,
}

impl Attempt<'_> {
    /// The best way that works. A guest that fails to bring its data to rest is asked again, and then leads to the next
    /// way; nothing else does.
    async fn try_ways(&self, ways: &[Way]) -> Result<(Checkpoint, Way), JobError> {
        let mut guest_failure: Option<HypervisorError> = None;
        for way in ways {
            for _ in 0..way.attempts.max(1) {
                match self.take(way).await {
                    Ok(checkpoint) => {
                        let mut way = way.clone();
                        if let Some(failure) =
                            guest_failure.filter(|_| way.method != Method::Quiesce)
                        {
                            way.reason = format!(
                                "{}, because the guest could not bring its data to rest: {failure}",
                                way.reason
                            );
                        }
                        return Ok((checkpoint, way));
                    }
                    Err(e) if e.is_guest_failure() && way.method == Method::Quiesce => {
                        tracing::warn!(error = %e, "the guest could not bring its data to rest");
                        guest_failure = Some(e);
                    }
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Err(guest_failure.map_or_else(
            || {
                JobError::Hypervisor(HypervisorError::Odd {
                    doing: "create a checkpoint".into(),
                    detail: "the consistency plan holds no way".into(),
                })
            },
            JobError::from,
        ))
    }

    async fn take(&self, way: &Way) -> Result<Checkpoint, HypervisorError> {
        let (hypervisor, lease) = (&self.context.hypervisor, &self.context.lease);
        let request = CheckpointRequest {
            quiesce: way.method == Method::Quiesce,
            truncate_logs: self.work.truncate_logs,
        };
        if way.method != Method::SaveFirst {
            return hypervisor.create_checkpoint(lease, self.vm, self.name, request).await;
        }
        self.context.phase("saving the VM for a moment");
        let saved = hypervisor.save_vm(lease, self.vm).await;
        let made = match saved {
            Ok(()) => hypervisor.create_checkpoint(lease, self.vm, self.name, request).await,
            Err(e) => Err(e),
        };
        // Whatever happened, it is to run on; when this fails the duty says so to whoever comes next. A VM that somebody shut
        // down meanwhile is not saved, and stays off.
        let off = hypervisor.vm(self.vm).await.is_ok_and(|state| state.vm.power == Power::Off);
        let resumed = match off {
            true => Ok(()),
            false => hypervisor.resume_vm(lease, self.vm).await,
        };
        self.context.phase("creating the checkpoint");
        let made = made?;
        resumed.map(|()| made)
    }
}

/// Tells the coordinator what became of a duty.
pub(super) async fn update_duty(
    context: &JobContext,
    duty: &rpc::Duty,
    state: rpc::DutyState,
    checkpoint: Option<&Checkpoint>,
    reference_point: Option<&str>,
) -> Result<rpc::Duty, JobError> {
    let request = rpc::UpdateDutyRequest {
        job_id: context.lease.job().to_string(),
        lease_epoch: context.lease.epoch().0,
        duty_id: duty.duty_id.clone(),
        state: state.into(),
        checkpoint_id: checkpoint.map_or_else(|| duty.checkpoint_id.clone(), |c| c.id.to_string()),
        reference_point_id: reference_point
            .map_or_else(|| duty.reference_point_id.clone(), str::to_owned),
        converting: false,
        reference_points_before: Vec::new(),
    };
    Ok(context.coordinator.update_duty(request).await?)
}

/// Tells the coordinator, before a checkpoint is converted, which reference points there are: whoever cleans up later
/// can tell the one that the conversion made, also when nobody lived to report it.
pub(super) async fn announce_conversion(
    context: &JobContext,
    duty: &rpc::Duty,
    before: &[ReferencePoint],
) -> Result<rpc::Duty, JobError> {
    let request = rpc::UpdateDutyRequest {
        job_id: context.lease.job().to_string(),
        lease_epoch: context.lease.epoch().0,
        duty_id: duty.duty_id.clone(),
        state: rpc::DutyState::Created.into(),
        checkpoint_id: duty.checkpoint_id.clone(),
        reference_point_id: duty.reference_point_id.clone(),
        converting: true,
        reference_points_before: before.iter().map(|p| p.id.clone()).collect(),
    };
    Ok(context.coordinator.update_duty(request).await?)
}
