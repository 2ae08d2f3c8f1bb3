//! The hand-over of the base: convert, bind, remove the older reference point, see that the host is clean.
//!
//! Never before the commit is acknowledged. A reference point is bound only when it is known to come from the committed
//! point's checkpoint: the conversion named it, or the duty did. One that merely appeared is removed, never bound.

use std::collections::HashSet;

use outrider_proto::ids::{CheckpointId, ChunkId, PointId, VmKey};
use outrider_proto::journal::JournalEntry;
use outrider_proto::manifest::Manifest;
use outrider_proto::model::{Binding, BoundDisk, parse};
use outrider_proto::rpc::{self, DutyState};

use super::backup::Open;
use super::checkpoint::{announce_conversion, update_duty};
use super::commit::Committed;
use super::leftovers::Recorded;
use super::{JobContext, JobError, capture, leftovers};
use crate::hypervisor::{Checkpoint, HypervisorError, ReferencePoint};
use crate::journal::{Adopted, BeforeConversion, Journal, JournalWriter};

/// What is handed over.
struct HandOver<'a> {
    vm: &'a VmKey,
    point: PointId,
    manifest_id: ChunkId,
    manifest: &'a Manifest,
    duty: rpc::Duty,
    /// Reference point that was bound before.
    older: Option<String>,
    /// Changes are not asked for the next time: no reference point is kept.
    untracked: bool,
}

/// Right after the commit, by the attempt that made it.
pub(super) async fn after_commit(
    context: &JobContext,
    vm: &VmKey,
    open: &Open,
    committed: Committed,
    binding: Option<&Binding>,
    known: &rpc::AskReply,
    untracked: bool,
) -> Result<(), JobError> {
    let Committed { point, manifest_id, manifest, journal } = committed;
    let mut journal = journal.lock().await;
    let work = HandOver {
        vm,
        point,
        manifest_id,
        manifest: &manifest,
        duty: open.duty.clone(),
        older: binding.map(|b| b.reference_point.clone()),
        untracked,
    };
    convert_and_bind(context, work, &open.checkpoint, &mut journal).await?;
    clean(context, vm, &known.duties).await
}

/// By a later attempt: the job has committed, the rest is unknown and is looked at.
pub(super) async fn resume(
    context: &JobContext,
    vm: &VmKey,
    known: &rpc::AskReply,
    journal: &Journal,
    untracked: bool,
) -> Result<(), JobError> {
    context.lease.wait_to_mutate().await?;
    let job = context.lease.job().to_string();
    let point: PointId = parse("AskReply", "committed_point_id", &known.committed_point_id)?;
    let adopted = journal.latest();
    let mine = known.duties.iter().find(|d| d.job_id == job && d.state() != DutyState::Done);
    if let Some(duty) = mine {
        finish_duty(context, vm, known, journal, point, duty, adopted.as_ref(), untracked).await?;
    }
    clean(context, vm, &known.duties).await
}

#[expect(clippy::too_many_arguments, reason = "all that a later attempt finds")]
async fn finish_duty(
    context: &JobContext,
    vm: &VmKey,
    known: &rpc::AskReply,
    journal: &Journal,
    point: PointId,
    duty: &rpc::Duty,
    adopted: Option<&Adopted>,
    untracked: bool,
) -> Result<(), JobError> {
    let point_id = point;
    let bound =
        known.binding.as_ref().map(|b| b.reference_point_id.clone()).filter(|b| !b.is_empty());
    let checkpoints = context.hypervisor.checkpoints(vm.guid).await?;
    let points = context.hypervisor.reference_points(vm.guid).await?;
    let checkpoint = checkpoints.iter().find(|c| leftovers::names(duty, c));
    let before = adopted.and_then(|a| a.before_conversion.clone());
    let manifest_id = adopted.and_then(|a| a.manifest);
    let older = || match &before {
        Some(before) => before.bound.clone(),
        None => bound.clone(),
    };
    let manifest = match manifest_id {
        Some(id) => match capture::fetch_manifest(context, id).await {
            // Only the manifest that was committed will do.
            Ok(manifest) if manifest.point == point => Some((id, manifest)),
            _ => None,
        },
        None => None,
    };
    match (checkpoint, manifest) {
        // Not converted yet.
        (Some(checkpoint), Some((manifest_id, manifest)))
            if manifest.checkpoint == checkpoint.id =>
        {
            let mut writer = JournalWriter::after(
                journal,
                context.store.clone(),
                context.sealer.clone(),
                context.lease.job(),
                checkpoint.id,
                context.lease.epoch(),
            );
            let older = older();
            let work = HandOver {
                vm,
                point,
                manifest_id,
                manifest: &manifest,
                duty: duty.clone(),
                older,
                untracked,
            };
            return convert_and_bind(context, work, checkpoint, &mut writer).await;
        }
        // The reference point is known to come from this duty's checkpoint.
        (None, Some((manifest_id, manifest))) if duty.state() == DutyState::Converted => {
            let named = points.iter().find(|p| p.id.eq_ignore_ascii_case(&duty.reference_point_id));
            if let Some(named) = named {
                let older = older();
                let work = HandOver {
                    vm,
                    point,
                    manifest_id,
                    manifest: &manifest,
                    duty: duty.clone(),
                    older,
                    untracked,
                };
                return bind(context, &work, named).await;
            }
        }
        // The checkpoint was lost; what it would have become is there all the same.
        (None, Some((manifest_id, manifest)))
            if duty.checkpoint_id == manifest.checkpoint.to_string() =>
        {
            if let Some(point) = derived(context, &points, manifest.checkpoint) {
                let duty =
                    update_duty(context, duty, DutyState::Converted, None, Some(&point.id)).await?;
                let older = older();
                let work = HandOver {
                    vm,
                    point: point_id,
                    manifest_id,
                    manifest: &manifest,
                    duty,
                    older,
                    untracked: false,
                };
                return bind(context, &work, point).await;
            }
        }
        _ => {}
    }
    // The base stays what it was: the next run decides by the base rule. While the checkpoint is there no conversion has
    // happened, and one that was reported has told its reference point: then a new one is somebody else's.
    let told = checkpoint.is_some() || !duty.reference_point_id.is_empty();
    if let Some(before) = before.as_ref().filter(|_| !told) {
        remove_unknown(context, vm, before, &points, bound.as_deref()).await?;
    }
    Ok(())
}

/// The reference point of a checkpoint, where the hypervisor says beforehand which one that is.
fn derived<'a>(
    context: &JobContext,
    points: &'a [ReferencePoint],
    checkpoint: CheckpointId,
) -> Option<&'a ReferencePoint> {
    let id = context.hypervisor.point_of(checkpoint)?;
    points.iter().find(|p| p.id.eq_ignore_ascii_case(&id))
}

/// A reference point that appeared since the conversion began, and that nobody recorded, is of unknown origin. Exactly one
/// is taken for our own conversion's and removed; among several ours cannot be told.
async fn remove_unknown(
    context: &JobContext,
    vm: &VmKey,
    before: &BeforeConversion,
    points: &[ReferencePoint],
    bound: Option<&str>,
) -> Result<(), JobError> {
    let known: HashSet<String> = before.all.iter().map(|id| id.to_ascii_lowercase()).collect();
    let is_bound = |p: &ReferencePoint| bound.is_some_and(|b| p.id.eq_ignore_ascii_case(b));
    let unknown: Vec<&ReferencePoint> = points
        .iter()
        .filter(|p| !known.contains(&p.id.to_ascii_lowercase()) && !is_bound(p))
        .collect();
    match unknown.as_slice() {
        [] => {}
        [point] => {
            tracing::info!(
                reference_point = point.id,
                "removing an unbound reference point of an interrupted hand-over"
            );
            context.hypervisor.destroy_reference_point(&context.lease, vm.guid, point).await?;
        }
        several => tracing::warn!(
            count = several.len(),
            "several reference points appeared during an interrupted hand-over; none is touched"
        ),
    }
    Ok(())
}

async fn convert_and_bind(
    context: &JobContext,
    work: HandOver<'_>,
    checkpoint: &Checkpoint,
    journal: &mut JournalWriter,
) -> Result<(), JobError> {
    context.lease.wait_to_mutate().await?;
    if work.untracked {
        // What was bound before stays bound: it is a base for the day when changes are asked for again.
        context.hypervisor.destroy_checkpoint(&context.lease, work.vm.guid, checkpoint).await?;
        return Ok(());
    }
    let existing = context.hypervisor.reference_points(work.vm.guid).await?;
    journal
        .append(&JournalEntry::Converting {
            reference_points: existing.iter().map(|p| p.id.clone()).collect(),
            bound: work.older.clone().unwrap_or_default(),
        })
        .await?;
    let duty = announce_conversion(context, &work.duty, &existing).await?;
    let work = HandOver { duty, ..work };
    let point = match context.hypervisor.convert(&context.lease, work.vm.guid, checkpoint).await {
        Ok(point) => point,
        Err(HypervisorError::CheckpointGone { checkpoint }) => {
            tracing::warn!(checkpoint, "the checkpoint is gone: the base stays what it was");
            let points = context.hypervisor.reference_points(work.vm.guid).await?;
            if let Some(point) = derived(context, &points, work.manifest.checkpoint) {
                let duty =
                    update_duty(context, &work.duty, DutyState::Converted, None, Some(&point.id))
                        .await?;
                return bind(context, &HandOver { duty, ..work }, point).await;
            }
            let before = BeforeConversion {
                all: existing.iter().map(|p| p.id.clone()).collect(),
                bound: work.older.clone(),
            };
            return remove_unknown(context, work.vm, &before, &points, work.older.as_deref()).await;
        }
        Err(e) => return Err(e.into()),
    };
    let duty =
        update_duty(context, &work.duty, DutyState::Converted, None, Some(&point.id)).await?;
    bind(context, &HandOver { duty, ..work }, &point).await
}

async fn bind(
    context: &JobContext,
    work: &HandOver<'_>,
    point: &ReferencePoint,
) -> Result<(), JobError> {
    context.lease.check()?;
    let disks = work.manifest.disks.iter().map(|d| BoundDisk {
        disk: d.disk_id,
        size: d.size,
        slot: d.slot.clone(),
        rct_id: point.tracking_of(&d.slot).unwrap_or_default().to_owned(),
    });
    let binding = Binding {
        point: work.point,
        manifest: work.manifest_id,
        reference_point: point.id.clone(),
        disks: disks.collect(),
        tracking_unproven: false,
    };
    let reply = context
        .coordinator
        .bind(rpc::BindRequest {
            job_id: context.lease.job().to_string(),
            lease_epoch: context.lease.epoch().0,
            binding: Some((&binding).into()),
        })
        .await?;
    if !reply.bound {
        // Restored or reverted meanwhile: nothing may start from it.
        tracing::warn!(
            reason = reply.reason,
            "the new reference point was not bound; it is removed"
        );
        context.hypervisor.destroy_reference_point(&context.lease, work.vm.guid, point).await?;
        return Ok(());
    }
    if let Some(older) = work.older.as_deref().filter(|o| !o.eq_ignore_ascii_case(&point.id)) {
        let points = context.hypervisor.reference_points(work.vm.guid).await?;
        leftovers::remove_point(context, work.vm.guid, &points, older).await?;
    }
    Ok(())
}

/// Ends all open duties of the VM and waits until nothing of ours is left and the merge is done.
async fn clean(context: &JobContext, vm: &VmKey, known: &[rpc::Duty]) -> Result<(), JobError> {
    context.phase("verifying that the host is clean");
    let ask = rpc::AskRequest { job_id: context.lease.job().to_string(), vm: Some(vm.into()) };
    let now = context.coordinator.ask(ask).await?;
    let duties: Vec<rpc::Duty> =
        if now.duties.is_empty() { known.to_vec() } else { now.duties.clone() };
    let job = context.lease.job().to_string();
    let (mine, others): (Vec<rpc::Duty>, Vec<rpc::Duty>) =
        duties.into_iter().filter(|d| d.state() != DutyState::Done).partition(|d| d.job_id == job);
    let bound = now.binding.as_ref();
    leftovers::clear(context, vm.guid, &others, bound, Recorded::End, None).await?;
    leftovers::wait_for_merge(context, vm.guid).await?;
    leftovers::clear(context, vm.guid, &mine, bound, Recorded::End, None).await
}
