//! What the pipeline is fed with: configuration, disks, and what has to be read of each. Computed once per checkpoint
//! and journalled, so that whoever continues reads by the same list.

mod beginning;
mod disks;
mod machine;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt;
use outrider_disk::{ByteRange, RangeSet};
use outrider_proto::ids::{ChunkId, PointId, VmKey};
use outrider_proto::journal::{JournalEntry, JournalStart};
use outrider_proto::manifest::{ConfigFile, Machine, Manifest};
use outrider_proto::model::{Binding, parse};
use outrider_proto::record::Record;
use outrider_proto::rpc;

use super::backup::{Open, Origin};
use super::config::ConfigSets;
use super::layers::{self, Layers};
use super::{JobContext, JobError, exclude};
use crate::hypervisor::HypervisorError;
use crate::journal::{Journal, JournalWriter};
use crate::pipeline::{DiskJob, DiskPlan, Pipeline, SharedJournal, Stats};
use beginning::{begin, carry_over, parent_root};
use disks::same_disks;
pub(super) use disks::{SourceFacts, open_disks};
use machine::machine;

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
    } else if !config.iter().any(|f| context.hypervisor.is_definition(Path::new(&f.name))) {
        warnings.push(
            "the checkpoint has no file that defines the VM (.vmcx): this point restores as disks alone (outrider export); see \
             what keeps the host from writing it, and back up again"
                .into(),
        );
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

pub(super) fn pairs(ranges: &RangeSet) -> Vec<(u64, u64)> {
    ranges.iter().map(|r| (r.start, r.len)).collect()
}

pub(super) fn ranges(pairs: &[(u64, u64)]) -> RangeSet {
    pairs.iter().map(|(start, len)| ByteRange::new(*start, *len)).collect()
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
