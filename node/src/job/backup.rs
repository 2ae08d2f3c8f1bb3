//! A backup, phase by phase.
//!
//! ```text
//! ask -> clear leftovers -> command before -> precheck -> duty recorded -> checkpoint created -> named -> duty: created
//!     -> configuration, disks, changes (journalled once) -> pipeline -> manifest -> root -> commit
//!     -> converting (journalled) -> convert -> duty: converted -> bind -> remove the older reference point
//!     -> verify that the host is clean -> duty: done -> command after -> finish
//! ```
//! A later attempt (new lease, after a kill or a move) asks the coordinator first and enters where it must:
//!
//! | what it finds | what it does |
//! | --- | --- |
//! | the job has committed | hand-over only |
//! | the duty's checkpoint exists and the journal has begun on it | adopts both: reads only what is missing |
//! | the checkpoint exists, the journal has not begun | removes it (nothing was read) and starts over |
//! | the checkpoint is gone, change tracking goes on from its moment | makes a new one and carries over what did not change (`carry`) |
//! | the checkpoint is gone | starts over with a new one and a new duty; the old journal is void |

use std::sync::Arc;

use outrider_proto::ids::VmKey;
use outrider_proto::model::Binding;
use outrider_proto::rpc::{self, DutyState};

use super::leftovers::Recorded;
use super::{
    JobContext, JobError, Outcome, around, capture, carry, checkpoint, commit, handover, leftovers,
};
use crate::hypervisor::{Checkpoint, HypervisorError};
use crate::journal::{Adopted, Journal};
use crate::pipeline::Stats;

/// Checkpoints that may be lost under a running attempt before it gives up.
const STARTS: u32 = 3;

/// A checkpoint to read from, with the duty that covers it.
pub(super) struct Open {
    pub(super) checkpoint: Checkpoint,
    pub(super) duty: rpc::Duty,
    pub(super) origin: Origin,
}

/// Where a checkpoint came from.
pub(super) enum Origin {
    /// Made by this attempt; with what goes over from one that was lost.
    Made(checkpoint::How, Option<Box<carry::Carry>>),
    /// Made by an earlier one; the journal tells how far it got.
    Adopted(Box<Adopted>),
}

pub(super) async fn run(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: VmKey,
    work: &rpc::BackupWork,
    stats: &Arc<Stats>,
) -> Outcome {
    let mut warnings = Vec::new();
    let result = steps(context, message, &vm, work, stats, &mut warnings).await;
    let mut outcome = match result {
        Ok(host_clean) => Outcome {
            data_safe: true,
            host_clean: host_clean.is_none(),
            error: host_clean,
            warnings,
            restored_vm: None,
        },
        Err(error) if error.is_superseded() => Outcome::failed(error, false),
        Err(error) => {
            // The data is not safe; the host may still be made clean.
            context.sources.close().await;
            let host_clean = match abandon(context, message, &vm).await {
                Ok(()) => true,
                Err(e) => {
                    tracing::warn!(error = %e, "the checkpoint of the failed attempt stays for now");
                    false
                }
            };
            Outcome { warnings, ..Outcome::failed(error, host_clean) }
        }
    };
    around::after(context, message, &vm, work, &mut outcome).await;
    outcome
}

/// Removes what the failed attempt made. The bound reference point stays what it was.
async fn abandon(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
) -> Result<(), JobError> {
    let known = ask(context, message).await?;
    let bound = known.binding.as_ref();
    leftovers::clear(context, vm.guid, &known.duties, bound, Recorded::End, None).await
}

async fn ask(context: &JobContext, message: &rpc::JobLease) -> Result<rpc::AskReply, JobError> {
    let request =
        rpc::AskRequest { job_id: context.lease.job().to_string(), vm: message.vm.clone() };
    Ok(context.coordinator.ask(request).await?)
}

/// All phases. `Ok(None)`: both results are good; `Ok(Some(why))`: data safe, host not clean.
async fn steps(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::BackupWork,
    stats: &Arc<Stats>,
    warnings: &mut Vec<String>,
) -> Result<Option<JobError>, JobError> {
    let mut lost = 0;
    loop {
        let known = ask(context, message).await?;
        let journal = Journal::read(&*context.store, &context.sealer, context.lease.job()).await?;
        if !known.committed_point_id.is_empty() {
            context.phase("finishing the hand-over");
            let untracked = untracked_now(context, vm, work).await;
            let handed = handover::resume(context, vm, &known, &journal, untracked).await;
            match handed_over(context, vm, handed).await? {
                Handed::Again => continue,
                Handed::Ended(why) => return Ok(why),
            }
        }
        // A move is followed by the end of this lease: what is not found meanwhile has moved, too.
        checkpoint::until_here(context, vm.guid).await?;
        let open = match adoptable(context, vm, &known, &journal).await? {
            Some(open) => open,
            None => {
                let bound = known.binding.as_ref();
                let carry = carry::find(context, vm.guid, &journal).await?;
                let spare = carry.as_ref().map(carry::Carry::point);
                leftovers::clear(context, vm.guid, &known.duties, bound, Recorded::Keep, spare)
                    .await?;
                let late = known.duties.iter().any(|d| d.state() == DutyState::Recorded);
                around::before(context, message, vm, work, warnings).await?;
                let made = checkpoint::make(context, message, vm, work, late).await?;
                warnings.extend(made.warnings.iter().cloned());
                Open {
                    checkpoint: made.checkpoint,
                    duty: made.duty,
                    origin: Origin::Made(made.how, carry.map(Box::new)),
                }
            }
        };
        let binding = known.binding.as_ref().map(Binding::try_from).transpose()?;
        let read = capture::run(
            context,
            message,
            vm,
            work,
            &open,
            binding.as_ref(),
            &journal,
            stats,
            warnings,
        )
        .await;
        match read {
            Ok(captured) => {
                let committed = commit::run(context, message, vm, &open, captured, stats).await?;
                // Nothing may hold a file of the checkpoint open when it is converted.
                context.sources.close().await;
                context.phase("handing over the base");
                let handed = handover::after_commit(
                    context,
                    vm,
                    &open,
                    committed,
                    binding.as_ref(),
                    &known,
                    untracked_now(context, vm, work).await,
                )
                .await;
                if let Handed::Ended(why) = handed_over(context, vm, handed).await? {
                    return Ok(why);
                }
            }
            Err(e) if e.is_superseded() => return Err(e),
            Err(e) => {
                let ended = match gone(context, vm, &open.checkpoint).await {
                    None => return Err(e),
                    Some(Gone::Checkpoint) => false,
                    Some(Gone::Vm) => true,
                };
                lost += 1;
                tracing::warn!(error = %e, ended, "the checkpoint went away, starting over");
                if lost >= STARTS {
                    return Err(JobError::CheckpointGone { name: open.checkpoint.name.clone() });
                }
                let name = &message.vm_name;
                if !ended {
                    warnings.push(format!(
                        "checkpoint {:?} went away while it was read; the run started over",
                        open.checkpoint.name
                    ));
                }
                // Gone with its VM, perhaps: then the end of this lease is on its way.
                match checkpoint::until_here(context, vm.guid).await {
                    Ok(()) if ended => warnings.push(format!(
                        "VM {name:?} ended while it was read (shut down, killed, or its host's power): the run waited until it was \
                         here again and went on with what its change tracking proves"
                    )),
                    Ok(()) => {}
                    Err(JobError::Hypervisor(e)) if e.is_absent() => {
                        return Err(JobError::VmEnded { vm: name.clone() });
                    }
                    Err(e) => return Err(e),
                }
            }
        }
    }
}

/// How a hand-over ended.
enum Handed {
    /// The VM was away and is here again.
    Again,
    /// `None`: the host is clean.
    Ended(Option<JobError>),
}

/// A VM that moved away in its hand-over took the checkpoint along: its new host goes on, after the end of this lease.
async fn handed_over(
    context: &JobContext,
    vm: &VmKey,
    handed: Result<(), JobError>,
) -> Result<Handed, JobError> {
    match handed {
        Err(JobError::Hypervisor(HypervisorError::NoSuchVm { .. })) => {
            tracing::info!("the VM left this host in the hand-over");
            match checkpoint::until_here(context, vm.guid).await {
                Ok(()) => Ok(Handed::Again),
                Err(e) if e.is_superseded() => Err(e),
                Err(e) => Ok(Handed::Ended(Some(e))),
            }
        }
        handed => Ok(Handed::Ended(handed.err())),
    }
}

/// Whether changes are not asked for the next time; a VM that does not answer is taken for one whose changes are.
async fn untracked_now(context: &JobContext, vm: &VmKey, work: &rpc::BackupWork) -> bool {
    let state = context.hypervisor.vm(vm.guid).await;
    work.no_change_tracking
        || state.is_ok_and(|state| checkpoint::untracked(&state, work).is_some())
}

/// What went away while it was read.
enum Gone {
    Checkpoint,
    Vm,
}

/// What is not there any more (asked after a failure, so an unanswered question counts as "there").
async fn gone(context: &JobContext, vm: &VmKey, checkpoint: &Checkpoint) -> Option<Gone> {
    match context.hypervisor.checkpoints(vm.guid).await {
        Ok(all) => all.iter().all(|c| c.id != checkpoint.id).then_some(Gone::Checkpoint),
        Err(e) => e.is_absent().then_some(Gone::Vm),
    }
}

/// The checkpoint of an open duty of this job that exists and that the journal has begun on.
async fn adoptable(
    context: &JobContext,
    vm: &VmKey,
    known: &rpc::AskReply,
    journal: &Journal,
) -> Result<Option<Open>, JobError> {
    let job = context.lease.job().to_string();
    let open = |d: &&rpc::Duty| {
        d.job_id == job && matches!(d.state(), DutyState::Recorded | DutyState::Created)
    };
    let mine: Vec<&rpc::Duty> = known.duties.iter().filter(open).collect();
    if mine.is_empty() {
        return Ok(None);
    }
    let checkpoints = context.hypervisor.checkpoints(vm.guid).await?;
    for duty in mine {
        let Some(checkpoint) = checkpoints.iter().find(|c| leftovers::names(duty, c)) else {
            continue;
        };
        if let Some(adopted) = journal.of(checkpoint.id) {
            tracing::info!(
                checkpoint = checkpoint.name,
                leaves = adopted.leaves.len(),
                "going on with the checkpoint of an earlier attempt"
            );
            return Ok(Some(Open {
                checkpoint: checkpoint.clone(),
                duty: duty.clone(),
                origin: Origin::Adopted(Box::new(adopted)),
            }));
        }
    }
    Ok(None)
}
