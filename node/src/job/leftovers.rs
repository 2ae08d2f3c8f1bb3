//! What earlier attempts and jobs left at the hypervisor, and its removal.
//!
//! Ours is: a checkpoint that carries a name of ours, or that an open duty names by GUID; a reference point that an open
//! duty names and that is not bound. One case is told by circumstance: the duty was recorded, the checkpoint was made, and
//! we died before it was named. A duty is recorded only while the VM has no recovery checkpoint that is not ours (the
//! precheck refuses others'), it ends as soon as our call is known to have made nothing (`checkpoint::settle`), and another
//! product's checkpoint cannot be made beside ours. So if a duty is still
//! *recorded* and exactly one nameless recovery checkpoint exists, it is taken for ours and removed (nothing was read from
//! it). If there are several, none is touched, and the duty stays open for an operator to see.
//!
//! A reference point that a conversion made and nobody reported is told in the same way: see `left_by_conversion`.

use outrider_process::backoff::Backoff;
use outrider_proto::ids::{VmGuid, VmKey};
use outrider_proto::rpc::{self, DutyState};
use tokio::time::Instant;

use super::checkpoint::{is_ours, may_have_saved, update_duty};
use super::{JobContext, JobError, Outcome};
use crate::hypervisor::{Checkpoint, HypervisorError, Power, ReferencePoint};

/// A cleanup job: nothing but the removal of what open duties name.
pub(super) async fn run(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: VmKey,
    work: &rpc::CleanupWork,
) -> Outcome {
    tracing::info!(why = work.why, "cleaning up");
    context.phase("cleaning up");
    let ask = rpc::AskRequest { job_id: context.lease.job().to_string(), vm: message.vm.clone() };
    let known = match context.coordinator.ask(ask).await {
        Ok(known) => known,
        Err(e) => return Outcome::failed(e.into(), false),
    };
    let bound = known.binding.as_ref();
    match clear(context, vm.guid, &known.duties, bound, Recorded::End, None).await {
        Ok(()) => Outcome { data_safe: true, host_clean: true, ..Outcome::default() },
        Err(e) => Outcome::failed(e, false),
    }
}

/// What becomes of a duty that was recorded and of which nothing is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recorded {
    /// It ends.
    End,
    /// It stays open: the hypervisor may carry a dead attempt's call out later.
    Keep,
}

/// Removes what `duties` and names of ours point to, and ends the duties. Where reference points can be told to be ours, every
/// one that is not bound goes, too, except `spare`.
pub(super) async fn clear(
    context: &JobContext,
    vm: VmGuid,
    duties: &[rpc::Duty],
    binding: Option<&rpc::Binding>,
    recorded: Recorded,
    spare: Option<&str>,
) -> Result<(), JobError> {
    context.lease.wait_to_mutate().await?;
    let checkpoints = context.hypervisor.checkpoints(vm).await?;
    let points = context.hypervisor.reference_points(vm).await?;
    let bound = binding.map(|b| b.reference_point_id.as_str()).unwrap_or_default();
    let open: Vec<&rpc::Duty> = duties.iter().filter(|d| d.state() != DutyState::Done).collect();

    if open.iter().any(|d| may_have_saved(d))
        && context.hypervisor.vm(vm).await?.vm.power == Power::Saved
    {
        tracing::warn!(%vm, "starting a VM that an earlier attempt saved");
        context.hypervisor.resume_vm(&context.lease, vm).await?;
    }

    let nameless: Vec<&Checkpoint> =
        checkpoints.iter().filter(|c| !is_ours(c) && !named_by(c, &open)).collect();
    let unnamed_is_ours =
        nameless.len() == 1 && open.iter().any(|d| d.state() == DutyState::Recorded);
    if nameless.len() > 1 && open.iter().any(|d| d.state() == DutyState::Recorded) {
        tracing::warn!(%vm, count = nameless.len(), "several recovery checkpoints without a name of ours: none is touched");
    }
    for checkpoint in &checkpoints {
        if is_ours(checkpoint) || named_by(checkpoint, &open) || unnamed_is_ours {
            tracing::warn!(
                checkpoint = checkpoint.name,
                "removing a checkpoint that an earlier attempt left"
            );
            context.hypervisor.destroy_checkpoint(&context.lease, vm, checkpoint).await?;
        }
    }
    for point in points.iter().filter(|p| context.hypervisor.owns(p)) {
        let kept = [Some(bound), spare].into_iter().flatten();
        if !kept.into_iter().any(|id| point.id.eq_ignore_ascii_case(id)) {
            remove_point(context, vm, &points, &point.id).await?;
        }
    }
    // Those that a hypervisor calls ours by name are dealt with already.
    let nameless_points: Vec<&ReferencePoint> =
        points.iter().filter(|p| !context.hypervisor.owns(p)).collect();
    let mut unclear = None;
    for duty in &open {
        let there = checkpoints.iter().any(|c| names(duty, c));
        let kept: Vec<&str> = [Some(bound), spare].into_iter().flatten().collect();
        match left_by_conversion(duty, there, &nameless_points, &kept, duties) {
            Left::Nothing => {}
            Left::Ours(point) => {
                tracing::info!(
                    reference_point = point.id,
                    "removing the reference point of a conversion that nobody lived to report"
                );
                context.hypervisor.destroy_reference_point(&context.lease, vm, point).await?;
            }
            Left::Unclear(found) => {
                unclear = Some(JobError::Unclear { vm, points: found });
            }
        }
    }
    if let Some(unclear) = unclear {
        // The duties stay: somebody has to look.
        return Err(unclear);
    }
    if recorded == Recorded::End && !open.is_empty() {
        wait_for_merge(context, vm).await?;
    }
    for duty in open {
        if !duty.reference_point_id.is_empty()
            && !duty.reference_point_id.eq_ignore_ascii_case(bound)
            && spare.is_none_or(|s| !duty.reference_point_id.eq_ignore_ascii_case(s))
        {
            remove_point(context, vm, &points, &duty.reference_point_id).await?;
        }
        let found = unnamed_is_ours || checkpoints.iter().any(|c| names(duty, c));
        if duty.state() == DutyState::Recorded && !found && recorded == Recorded::Keep {
            continue;
        }
        update_duty(context, duty, DutyState::Done, None, None).await?;
    }
    Ok(())
}

/// Waits until no checkpoint of the VM is being merged: only then is a host clean (promise 5). A VM that is not here has
/// nothing to merge here, unless its hypervisor says that it may have taken the merge along.
///
/// # Errors
/// [`HypervisorError::TooLong`] when the merge takes longer than is waited for: its duty stays open.
pub(super) async fn wait_for_merge(context: &JobContext, vm: VmGuid) -> Result<(), JobError> {
    let until = Instant::now() + context.times.merge_wait;
    let mut backoff =
        Backoff::new(context.times.busy_first, context.times.busy_ceiling, Backoff::any_seed());
    loop {
        context.lease.check()?;
        let state = match context.hypervisor.vm(vm).await {
            Ok(state) => state,
            Err(HypervisorError::NoSuchVm { .. }) => {
                return Ok(context.hypervisor.checkpoints(vm).await.map(drop)?);
            }
            Err(e) => return Err(e.into()),
        };
        let ours = |path: &str| path.to_ascii_lowercase().ends_with(".avhdx");
        if !state.is_merging() {
            return Ok(());
        }
        let pause = backoff.next_wait();
        if Instant::now() + pause >= until {
            let open = state.vm.disks.iter().filter(|d| ours(&d.path)).count();
            return Err(JobError::Hypervisor(HypervisorError::TooLong {
                doing: format!(
                    "merge the checkpoint of VM {:?} ({open} disks still on a child file)",
                    state.vm.name
                ),
                waited: context.times.merge_wait,
            }));
        }
        tokio::time::sleep(pause).await;
    }
}

/// What a conversion that was announced and never reported left.
#[derive(Debug, PartialEq, Eq)]
enum Left<'a> {
    Nothing,
    /// Exactly one reference point appeared, and its checkpoint is gone.
    Ours(&'a ReferencePoint),
    /// Several appeared: one may be ours, and another product's is never touched on a guess.
    Unclear(Vec<String>),
}

/// A reference point has no name. Ours is told by what is known around it: the duty says which ones there were before the
/// conversion; while the checkpoint is there, no conversion has happened, and no other product can make a checkpoint of
/// its own to convert; what the coordinator has bound or a duty names is accounted for.
fn left_by_conversion<'a>(
    duty: &rpc::Duty,
    checkpoint_there: bool,
    points: &[&'a ReferencePoint],
    kept: &[&str],
    duties: &[rpc::Duty],
) -> Left<'a> {
    let reported = !duty.reference_point_id.is_empty();
    if !duty.converting || reported || checkpoint_there {
        return Left::Nothing;
    }
    let known = |point: &ReferencePoint| {
        let same = |id: &str| point.id.eq_ignore_ascii_case(id);
        duty.reference_points_before.iter().any(|id| same(id))
            || kept.iter().any(|id| same(id))
            || duties.iter().any(|d| same(&d.reference_point_id))
    };
    let new: Vec<&ReferencePoint> = points.iter().copied().filter(|p| !known(p)).collect();
    match new.as_slice() {
        [] => Left::Nothing,
        [one] => Left::Ours(one),
        several => Left::Unclear(several.iter().map(|p| p.id.clone()).collect()),
    }
}

fn named_by(checkpoint: &Checkpoint, duties: &[&rpc::Duty]) -> bool {
    duties.iter().any(|d| names(d, checkpoint))
}

/// Whether a duty names this checkpoint.
pub(super) fn names(duty: &rpc::Duty, checkpoint: &Checkpoint) -> bool {
    (!duty.checkpoint_id.is_empty() && duty.checkpoint_id == checkpoint.id.to_string())
        || (!duty.checkpoint_name.is_empty() && duty.checkpoint_name == checkpoint.name)
}

/// Removes a reference point of ours by its id, if it is still there.
pub(super) async fn remove_point(
    context: &JobContext,
    vm: VmGuid,
    points: &[ReferencePoint],
    id: &str,
) -> Result<(), HypervisorError> {
    match points.iter().find(|p| p.id.eq_ignore_ascii_case(id)) {
        Some(point) => {
            tracing::info!(
                reference_point = point.id,
                "removing a reference point of ours that is not bound"
            );
            context.hypervisor.destroy_reference_point(&context.lease, vm, point).await
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(id: &str) -> ReferencePoint {
        ReferencePoint { id: id.into(), path: String::new(), tracking: vec![] }
    }

    #[test]
    fn only_the_one_reference_point_that_a_conversion_can_have_made_is_taken_for_ours() {
        let duty = rpc::Duty {
            converting: true,
            reference_points_before: vec!["BOUND".into(), "OTHERS".into()],
            ..rpc::Duty::default()
        };
        let duties = [duty.clone()];
        let before = [point("bound"), point("others"), point("spare")];
        let one = [point("bound"), point("others"), point("new")];
        let two = [point("bound"), point("new"), point("newer")];
        fn refs(points: &[ReferencePoint]) -> Vec<&ReferencePoint> {
            points.iter().collect()
        }
        let kept = ["bound", "spare"];
        let left = |points: &[ReferencePoint], there| match left_by_conversion(
            &duty,
            there,
            &refs(points),
            &kept,
            &duties,
        ) {
            Left::Nothing => "nothing".to_owned(),
            Left::Ours(point) => format!("ours: {}", point.id),
            Left::Unclear(points) => format!("unclear: {}", points.join(" ")),
        };
        assert_eq!(left(&before, false), "nothing", "it was not converted");
        assert_eq!(left(&one, false), "ours: new");
        assert_eq!(left(&one, true), "nothing", "the checkpoint is there: another's");
        assert_eq!(left(&two, false), "unclear: new newer", "never on a guess");
        let named = [rpc::Duty { reference_point_id: "NEW".into(), ..rpc::Duty::default() }];
        let by_duty = left_by_conversion(&duty, false, &refs(&one), &kept, &named);
        assert_eq!(by_duty, Left::Nothing);
        let silent = rpc::Duty { converting: false, ..duty.clone() };
        let silent = left_by_conversion(&silent, false, &refs(&one), &kept, &duties);
        assert_eq!(silent, Left::Nothing);
    }
}
