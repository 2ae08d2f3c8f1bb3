//! What the pipeline is fed with: configuration, disks, and what has to be read of each. Computed once per checkpoint
//! and journalled, so that whoever continues reads by the same list.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt;
use outrider_disk::{ByteRange, DiskFormat, DiskKind, RangeSet, ReadDisk};
use outrider_proto::ids::{ChunkId, DiskId, PointId, VmIncarnation, VmKey};
use outrider_proto::journal::{JournalDisk, JournalEntry, JournalStart};
use outrider_proto::manifest::{ConfigFile, ImageFormat, Machine, Manifest};
use outrider_proto::model::{Binding, parse};
use outrider_proto::record::Record;
use outrider_proto::rpc::{self, BackupKind};

use super::backup::{Open, Origin};
use super::base::{BaseDecision, DiskFacts, Known, plan_base};
use super::config::ConfigSets;
use super::exclude::{self, Exclusion};
use super::layers::{self, Layers};
use super::{JobContext, JobError, carry};
use crate::consistency;
use crate::hypervisor::{FrozenDisk, HypervisorError};
use crate::journal::{Journal, JournalWriter};
use crate::pipeline::{
    DiskJob, DiskPlan, ParentTree, Pipeline, SharedJournal, Stats, plan, sample,
};
use crate::source::SourceDisk;

/// An open disk with its facts.
pub(super) struct SourceFacts {
    pub(super) facts: DiskFacts,
    pub(super) file_name: String,
    pub(super) logical_sector: u32,
    pub(super) physical_sector: u32,
    pub(super) block_size: u32,
    pub(super) fixed: bool,
    pub(super) format: ImageFormat,
    pub(super) path: std::path::PathBuf,
    pub(super) disk: Arc<SourceDisk>,
}

/// Everything read and sent, ready for a manifest.
pub(super) struct Captured {
    pub(super) pipeline: Pipeline,
    pub(super) start: JournalStart,
    pub(super) disks: Vec<SourceFacts>,
    pub(super) config: Vec<ConfigFile>,
    /// What of the configuration sets may have to be sent again.
    pub(super) sets: ConfigSets,
    pub(super) machine: Machine,
    pub(super) tracking_unproven: bool,
    pub(super) journal: SharedJournal,
    /// The user checkpoints, if they are kept.
    pub(super) layers: Option<Box<Layers>>,
    /// What became of them and of the VM's definition, for the point's report.
    pub(super) said: Vec<String>,
}

#[allow(clippy::too_many_arguments)]
pub(super) async fn run(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::BackupWork,
    open: &Open,
    binding: Option<&Binding>,
    journal: &Journal,
    stats: &Arc<Stats>,
    warnings: &mut Vec<String>,
) -> Result<Captured, JobError> {
    context.phase("opening the disks");
    let frozen = context.hypervisor.checkpoint_disks(&open.checkpoint).await?;
    let disks = open_disks(context, frozen).await?;
    let mut appender = JournalWriter::after(
        journal,
        context.store.clone(),
        context.sealer.clone(),
        context.lease.job(),
        open.checkpoint.id,
        context.lease.epoch(),
    );
    let (start, journalled) = match &open.origin {
        Origin::Adopted(adopted) if same_disks(&adopted.start, &disks) => {
            (adopted.start.clone(), adopted.leaves.clone())
        }
        Origin::Adopted(_) => {
            // Cannot happen while the hypervisor keeps a checkpoint's disks as they are; never mix.
            return Err(JobError::Hypervisor(HypervisorError::Odd {
                doing: "go on with an earlier attempt's checkpoint".into(),
                detail: "its disks are not those that the job's journal names".into(),
            }));
        }
        Origin::Made(how, carry) => {
            context.phase("querying changes");
            let carried = match carry {
                Some(carry) => {
                    carry_over(context, message, work, open, binding, how, carry, &disks).await?
                }
                None => None,
            };
            let (start, leaves) = match carried {
                Some(carried) => (carried.start, carried.leaves),
                None => {
                    let begun = begin(
                        context, message, vm, work, open, binding, how, &disks, stats, warnings,
                    );
                    (begun.await?, HashMap::new())
                }
            };
            appender.append(&JournalEntry::Start(start.clone())).await?;
            let list: Vec<(u32, u64, ChunkId)> = leaves
                .iter()
                .map(|((disk, leaf), page)| {
                    (u32::try_from(*disk).unwrap_or(u32::MAX), *leaf, *page)
                })
                .collect();
            appender.leaves(&list).await?;
            (start, leaves)
        }
    };
    let parent = match &start.parent {
        Some((_, manifest)) => Some(fetch_manifest(context, *manifest).await?),
        None => None,
    };
    Stats::set(&stats.excluded_bytes, start.excluded.iter().flatten().map(|(_, len)| len).sum());
    let jobs = disk_jobs(&start, &disks, parent.as_ref())?;
    let pipeline = Pipeline::new(
        context.store.clone(),
        context.sealer.clone(),
        context.pool.clone(),
        context.lease.clone(),
        stats.clone(),
        context.bounds(),
        start.chunk_size,
        jobs,
    );
    context.phase("saving the configuration");
    let mut sets = ConfigSets::new(start.chunk_size);
    let config = sets.save(context, &open.checkpoint, &pipeline).await?;
    let mut said = Vec::new();
    if let Some(why) = context.hypervisor.definition_obstacle(&open.checkpoint).await? {
        let sentence =
            format!("only the disks of this point can be restored, no VM can be made of it: {why}");
        warnings.push(sentence.clone());
        said.push(sentence);
    }
    let machine = machine(context, open, warnings).await?;
    context.phase("running");
    let tracking_unproven = binding.is_some_and(|b| b.tracking_unproven) && start.parent.is_some();
    let journal = Arc::new(tokio::sync::Mutex::new(appender));
    let resumed = matches!(open.origin, Origin::Adopted(_) | Origin::Made(_, Some(_)));
    let pipeline = pipeline.with_journal(journal.clone(), journalled).resumed(resumed);
    // Roots are asked for again at the commit, where nothing is left to do unless storage lost something.
    let roots = pipeline.capture().boxed().await?;
    let begun = layers::Begun {
        vm,
        open,
        start: &start,
        parent: parent.as_ref(),
        disks: &disks,
        roots: &roots,
        adopted: match &open.origin {
            Origin::Adopted(adopted) => Some(adopted),
            Origin::Made(..) => None,
        },
        pipeline: &pipeline,
        journal: &journal,
        stats,
    };
    let kept = tree(context, work, &begun, &mut sets, warnings).await?;
    sets.add_to(stats);
    let layers = match kept {
        Some(Ok(layers)) => {
            said.push(layers.said.clone());
            Some(layers)
        }
        Some(Err(why)) => {
            said.push(why);
            None
        }
        None => None,
    };
    Ok(Captured {
        pipeline,
        start,
        disks,
        config,
        sets,
        machine,
        tracking_unproven,
        journal,
        layers,
        said,
    })
}

/// The VM's user checkpoints, or why they are not kept; `None`: it has none, or they are not wanted.
async fn tree(
    context: &JobContext,
    work: &rpc::BackupWork,
    begun: &layers::Begun<'_>,
    sets: &mut ConfigSets,
    warnings: &mut Vec<String>,
) -> Result<Option<Result<Box<Layers>, String>>, JobError> {
    if work.flat_checkpoints {
        return Ok(None);
    }
    Ok(match layers::run(context, begun, sets).await? {
        layers::Outcome::Kept(layers) => Some(Ok(layers)),
        layers::Outcome::None => None,
        layers::Outcome::Flat(why) => {
            let sentence = format!(
                "the VM's checkpoints are not kept with this point, which holds the disks as they add up to: {why}"
            );
            tracing::warn!(reason = why, "the point is kept without the VM's checkpoints");
            warnings.push(sentence.clone());
            Some(Err(sentence))
        }
    })
}

/// What of a lost checkpoint goes over to this one; `None`: nothing, for a reason that is logged.
#[allow(clippy::too_many_arguments)]
async fn carry_over(
    context: &JobContext,
    message: &rpc::JobLease,
    work: &rpc::BackupWork,
    open: &Open,
    binding: Option<&Binding>,
    how: &super::checkpoint::How,
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
            tracing::warn!(reason, "nothing can be carried over from the lost checkpoint");
            Ok(None)
        }
    }
}

pub(super) async fn open_disks(
    context: &JobContext,
    frozen: Vec<FrozenDisk>,
) -> Result<Vec<SourceFacts>, JobError> {
    let mut disks = Vec::with_capacity(frozen.len());
    for disk in frozen {
        let (sources, path) = (context.sources.clone(), disk.path.clone());
        let source = context.pool.read(0, move || sources.open(&path)).await?.0?;
        let info = source.info().clone();
        // The base names the disk; a frozen leaf may be a user checkpoint's file.
        let base = source.files().last().cloned().unwrap_or_else(|| disk.path.clone());
        disks.push(SourceFacts {
            facts: DiskFacts { disk: DiskId(info.disk_id), size: info.size, slot: disk.slot },
            file_name: file_name(&base),
            logical_sector: info.logical_sector,
            physical_sector: info.physical_sector,
            block_size: info.block_size,
            fixed: info.kind == DiskKind::Fixed,
            format: match info.format {
                DiskFormat::Vhdx => ImageFormat::Vhdx,
                DiskFormat::Vhd => ImageFormat::Vhd,
                DiskFormat::Raw => ImageFormat::Raw,
            },
            path: disk.path,
            disk: Arc::new(source),
        });
    }
    Ok(disks)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn same_disks(start: &JournalStart, disks: &[SourceFacts]) -> bool {
    start.disks.len() == disks.len()
        && start
            .disks
            .iter()
            .zip(disks)
            .all(|(j, d)| j.disk_id == d.facts.disk && j.size == d.facts.size)
}

/// Decides what is read of each disk.
#[allow(clippy::too_many_arguments)]
async fn begin(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::BackupWork,
    open: &Open,
    binding: Option<&Binding>,
    how: &super::checkpoint::How,
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
    how: &super::checkpoint::How,
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

pub(super) fn pairs(ranges: &RangeSet) -> Vec<(u64, u64)> {
    ranges.iter().map(|r| (r.start, r.len)).collect()
}

pub(super) fn ranges(pairs: &[(u64, u64)]) -> RangeSet {
    pairs.iter().map(|(start, len)| ByteRange::new(*start, *len)).collect()
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

fn parent_root(parent: &Manifest, disk: DiskId) -> Option<ChunkId> {
    let tree = parent.disks.iter().find(|d| d.disk_id == disk)?;
    tree.layers.last().map(|l| l.root)
}

fn disk_jobs(
    start: &JournalStart,
    disks: &[SourceFacts],
    parent: Option<&Manifest>,
) -> Result<Vec<DiskJob>, JobError> {
    let mut jobs = Vec::with_capacity(disks.len());
    for (i, (list, disk)) in start.disks.iter().zip(disks).enumerate() {
        let to_read = ranges(&list.to_read);
        let plan = if list.incremental {
            let root = parent.and_then(|p| parent_root(p, list.disk_id)).ok_or_else(|| {
                JobError::Unrestorable(format!(
                    "the parent point does not hold disk {} that the journal relies on",
                    disk.facts.slot
                ))
            })?;
            DiskPlan::incremental(list.size, start.chunk_size, &to_read, root)
        } else {
            DiskPlan::full(list.size, start.chunk_size, &to_read)
        };
        let excluded = start.excluded.get(i).map_or(&[][..], Vec::as_slice);
        jobs.push(DiskJob { source: exclude::masked(disk.disk.clone(), excluded), plan });
    }
    Ok(jobs)
}

/// What the VM is besides its disks. That it cannot be told spoils no backup: the point then lacks what restores plan
/// with, and says so.
async fn machine(
    context: &JobContext,
    open: &Open,
    warnings: &mut Vec<String>,
) -> Result<Machine, JobError> {
    match context.hypervisor.machine(&open.checkpoint).await {
        Ok(mut machine) => {
            machine.host.clone_from(&context.host);
            warnings.extend(exportable(&machine));
            Ok(machine)
        }
        Err(HypervisorError::Lease(lost)) => Err(lost.into()),
        Err(e) => {
            tracing::warn!(error = %e, "the point holds no facts about adapters, images and security");
            warnings.push(format!(
                "what the VM has besides disks could not be told ({e}): a restore cannot check switches, images and \
                 guardian certificates before it writes"
            ));
            Ok(Machine::default())
        }
    }
}

/// A virtual TPM starts only where a guardian's private keys are; this host can still give them away (P12).
fn exportable(machine: &Machine) -> Option<String> {
    let security = machine.security.as_ref().filter(|s| s.tpm)?;
    let here: Vec<&str> =
        security.guardians.iter().filter(|g| g.private_keys).map(|g| g.name.as_str()).collect();
    (!here.is_empty()).then(|| {
        format!(
            "the VM has a virtual TPM whose keys are guarded by {} on host {}: without these certificates no other host \
             can start it. Export them from \"Shielded VM Local Certificates\" with their private keys, and keep them apart",
            here.join(", "),
            machine.host
        )
    })
}

/// Reads a manifest from storage.
pub(super) async fn fetch_manifest(
    context: &JobContext,
    id: ChunkId,
) -> Result<Manifest, JobError> {
    let record: Record =
        context.store.get(&[id]).await?.pop().ok_or(crate::store::StoreError::Missing { id })?;
    Ok(Manifest::open(&context.sealer, &record)?)
}

/// The id that the coordinator chose for the point.
pub(super) fn point_of(work: &rpc::BackupWork) -> Result<PointId, JobError> {
    Ok(parse("BackupWork", "point_id", &work.point_id)?)
}
