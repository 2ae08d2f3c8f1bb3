//! What has to be read of each disk: decided once per checkpoint, by its base or by what a lost checkpoint left.

use std::sync::Arc;

use outrider_disk::{RangeSet, ReadDisk};
use outrider_proto::ids::{ChunkId, DiskId, VmIncarnation, VmKey};
use outrider_proto::journal::{JournalDisk, JournalStart};
use outrider_proto::manifest::Manifest;
use outrider_proto::model::Binding;
use outrider_proto::rpc::{self, BackupKind};

use super::disks::SourceFacts;
use super::{fetch_manifest, pairs, ranges};
use crate::consistency;
use crate::hypervisor::HypervisorError;
use crate::job::backup::Open;
use crate::job::base::{BaseDecision, DiskFacts, Known, plan_base};
use crate::job::checkpoint::How;
use crate::job::exclude::{self, Exclusion};
use crate::job::{JobContext, JobError, carry};
use crate::pipeline::{DiskPlan, ParentTree, Stats, plan, sample};

/// What of a lost checkpoint goes over to this one; `None`: nothing, for a reason that is logged.
#[allow(clippy::too_many_arguments)]
pub(super) async fn carry_over(
    context: &JobContext,
    message: &rpc::JobLease,
    work: &rpc::BackupWork,
    open: &Open,
    binding: Option<&Binding>,
    how: &How,
    carry: &carry::Carry,
    disks: &[SourceFacts],
) -> Result<Option<carry::Carried>, JobError> {
    let excluded = exclusion(context, work, open, how, disks).await?;
    let onto = carry::Onto {
        excluded: &excluded,
        checkpoint: open.checkpoint.id,
        taken_unix_ms: how.taken_unix_ms,
        consistency: consistency::text(how.way.gives).to_owned(),
        way: how.way.reason.clone(),
        chunk_size: message.chunk_size,
        binding,
        disks: disks.iter().map(|d| (&d.facts, d.path.as_path())).collect(),
    };
    match carry::onto(context, carry, &onto).await? {
        Ok(carried) => {
            tracing::info!(
                pages = carried.leaves.len(),
                "going on from a checkpoint that was lost in a move"
            );
            Ok(Some(carried))
        }
        Err(reason) => {
            tracing::warn!(%reason, "nothing can be carried over from the lost checkpoint");
            Ok(None)
        }
    }
}

/// Decides what is read of each disk.
#[allow(clippy::too_many_arguments)]
pub(super) async fn begin(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::BackupWork,
    open: &Open,
    binding: Option<&Binding>,
    how: &How,
    disks: &[SourceFacts],
    stats: &Arc<Stats>,
    warnings: &mut Vec<String>,
) -> Result<JournalStart, JobError> {
    let points = context.hypervisor.reference_points(vm.guid).await?;
    let parent = match binding {
        Some(binding) => match fetch_manifest(context, binding.manifest).await {
            Ok(manifest) => Some(manifest),
            Err(e) if e.is_superseded() => return Err(e),
            Err(e) => {
                tracing::warn!(error = %e, "the bound point's manifest cannot be read: no incremental");
                None
            }
        },
        None => None,
    };
    let facts: Vec<DiskFacts> = disks.iter().map(|d| d.facts.clone()).collect();
    let known = Known {
        wanted: work.kind(),
        why: &work.why,
        untracked: how.untracked.as_deref(),
        no_base: &message.no_base,
        binding,
        reference_points: &points,
        parent: parent.as_ref(),
        incarnation: VmIncarnation(message.incarnation),
        chunk_size: message.chunk_size,
    };
    let plan = plan_base(known, &facts);
    let mut reasons = vec![how.way.reason.clone()];
    reasons.extend(plan.reasons.iter().cloned());
    let exclusion = exclusion(context, work, open, how, disks).await?;
    reasons.extend(exclusion.reasons.iter().cloned());
    let mut kind = plan.kind;
    let mut out = Vec::with_capacity(disks.len());
    for ((disk, decision), excluded) in disks.iter().zip(&plan.disks).zip(&exclusion.ranges) {
        let list =
            list_of(context, message.chunk_size, disk, decision, excluded, &mut reasons).await?;
        out.push(list);
    }
    if let Some(mismatch) = sample_unchanged(
        context,
        message.chunk_size,
        disks,
        &out,
        &exclusion,
        parent.as_ref(),
        stats,
    )
    .await?
    {
        warnings.push(mismatch.clone());
        reasons.push(mismatch);
        kind = BackupKind::ConsistencyCheck;
        for ((disk, journal), excluded) in disks.iter().zip(&mut out).zip(&exclusion.ranges) {
            *journal = everything(context, disk, excluded).await?;
        }
    }
    let any_incremental = out.iter().any(|d| d.incremental);
    if kind == BackupKind::Incremental && !any_incremental && !out.is_empty() {
        kind = BackupKind::Full;
    }
    Ok(JournalStart {
        checkpoint: open.checkpoint.id,
        chunk_size: message.chunk_size,
        taken_unix_ms: how.taken_unix_ms,
        consistency: consistency::text(how.way.gives).to_owned(),
        kind: kind.into(),
        reasons,
        parent: binding.filter(|_| any_incremental).map(|b| (b.point, b.manifest)),
        disks: out,
        excluded: exclusion.journalled(),
    })
}

/// What the policy leaves out of the disks.
async fn exclusion(
    context: &JobContext,
    work: &rpc::BackupWork,
    open: &Open,
    how: &How,
    disks: &[SourceFacts],
) -> Result<Exclusion, JobError> {
    if !work.skip_page_files {
        return Ok(Exclusion::nothing(disks.len()));
    }
    context.phase("looking for page files");
    let carries_memory = match context.hypervisor.machine(&open.checkpoint).await {
        Ok(machine) => machine.saved_state,
        Err(HypervisorError::Lease(lost)) => return Err(lost.into()),
        // Said where the machine is asked for again; what cannot be told is taken for the worse.
        Err(_) => true,
    };
    let sources = disks.iter().map(|d| (d.facts.slot.clone(), d.disk.clone() as Arc<dyn ReadDisk>));
    exclude::find(context, how.way.gives, carries_memory, sources.collect()).await
}

/// The ranges of one disk that have to be read.
async fn list_of(
    context: &JobContext,
    chunk_size: u32,
    disk: &SourceFacts,
    decision: &BaseDecision,
    excluded: &RangeSet,
    reasons: &mut Vec<String>,
) -> Result<JournalDisk, JobError> {
    let BaseDecision::Changes { tracking_id, parent_excluded, .. } = decision else {
        return everything(context, disk, excluded).await;
    };
    match context.hypervisor.changes(&disk.path, disk.facts.size, tracking_id).await {
        Ok(changed) => {
            let before = ranges(parent_excluded);
            let changed = plan::to_look_at(&changed, &before, excluded)
                .align_out(chunk_size.into(), disk.facts.size);
            Ok(JournalDisk {
                disk_id: disk.facts.disk,
                size: disk.facts.size,
                to_read: pairs(&changed),
                incremental: true,
            })
        }
        Err(HypervisorError::Lease(lost)) => Err(lost.into()),
        // Any doubt about change tracking: read in full, never guess.
        Err(e) => {
            tracing::warn!(slot = disk.facts.slot, error = %e, "the disk is read in full");
            reasons.push(format!("disk {} is read in full: {e}", disk.facts.slot));
            everything(context, disk, excluded).await
        }
    }
}

async fn everything(
    context: &JobContext,
    disk: &SourceFacts,
    excluded: &RangeSet,
) -> Result<JournalDisk, JobError> {
    let source = exclude::masked(disk.disk.clone(), &pairs(excluded));
    let allocated = context.pool.read(0, move || source.allocated()).await?.0?;
    Ok(JournalDisk {
        disk_id: disk.facts.disk,
        size: disk.facts.size,
        to_read: pairs(&allocated),
        incremental: false,
    })
}

/// Compares a sample of what tracking calls unchanged with the parent; gives the sentence of the first mismatch.
async fn sample_unchanged(
    context: &JobContext,
    chunk_size: u32,
    disks: &[SourceFacts],
    lists: &[JournalDisk],
    exclusion: &Exclusion,
    parent: Option<&Manifest>,
    stats: &Arc<Stats>,
) -> Result<Option<String>, JobError> {
    let Some(parent) = parent else { return Ok(None) };
    for ((disk, list), excluded) in disks.iter().zip(lists).zip(&exclusion.ranges) {
        if !list.incremental {
            continue;
        }
        let Some(root) = parent_root(parent, list.disk_id) else { continue };
        // What the parent left out is as zeros in its tree; where that differs from now, it is read anyway.
        let source = exclude::masked(disk.disk.clone(), &pairs(excluded));
        let plan = DiskPlan::incremental(list.size, chunk_size, &ranges(&list.to_read), root);
        let allocated = {
            let source = source.clone();
            context.pool.read(0, move || source.allocated()).await?.0?
        };
        let mut tree =
            ParentTree::new(context.store.clone(), context.sealer.clone(), root, plan.root_level());
        let found =
            sample::compare(&source, &plan, &allocated, &mut tree, &context.sealer, &context.pool)
                .await?;
        Stats::add(&stats.sampled_chunks, found.chunks);
        Stats::add(&stats.read_bytes, found.bytes);
        if let Some(offset) = found.mismatch {
            let sentence = format!(
                "change tracking called the chunk at offset {offset} of disk {} unchanged, but it differs from the parent \
                 point: tracking is not trusted, all that is allocated was read and compared",
                disk.facts.slot
            );
            tracing::error!(sentence, "change tracking missed a change");
            return Ok(Some(sentence));
        }
    }
    Ok(None)
}

/// The parent's tree of a disk.
pub(super) fn parent_root(parent: &Manifest, disk: DiskId) -> Option<ChunkId> {
    let tree = parent.disks.iter().find(|d| d.disk_id == disk)?;
    tree.layers.last().map(|l| l.root)
}
