//! The user checkpoints of a VM, kept as layers of its disks (P2).
//!
//! The point itself is captured first and needs nothing of this: whatever speaks against a layer, the point is kept flat,
//! and says so. A layer's tree is the whole disk at its checkpoint, made from a tree that is known already
//! ([`order`]); what is read of it is what the files decide that the two chains do not have in common.
//!
//! A layer that the parent point has is taken over when its whole chain is as it was then, by every file's DataWriteGuid:
//! frozen files do not change while they exist. A random sample of it is read and compared all the same. A run that reads
//! everything (a full, a consistency check) takes no layer over either, so that no doubt about the point outlives it there.

mod describe;
mod find;
mod order;
mod reuse;
mod source;

use std::collections::HashMap;
use std::sync::Arc;

use futures::FutureExt;
use outrider_disk::{RangeSet, ReadDisk};
use outrider_proto::ids::{ChunkId, PgId, VmKey};
use outrider_proto::journal::{JournalEntry, JournalStart};
use outrider_proto::manifest::{Manifest, SavedCheckpoint};

use self::find::TreeDisk;
use self::order::{From, Step};
use super::backup::Open;
use super::capture::{self, SourceFacts};
use super::config::ConfigSets;
use super::{JobContext, JobError};
use crate::hypervisor::HypervisorError;
use crate::journal::Adopted;
use crate::pipeline::{DiskJob, DiskPlan, Pipeline, PipelineError, SharedJournal, Stats, TreeRoot};

/// What a job has begun with before it comes to the layers.
pub(super) struct Begun<'a> {
    pub(super) vm: &'a VmKey,
    pub(super) open: &'a Open,
    pub(super) start: &'a JournalStart,
    /// Whose unchanged pages are reused.
    pub(super) parent: Option<&'a Manifest>,
    pub(super) disks: &'a [SourceFacts],
    /// The trees of the disks at the point.
    pub(super) roots: &'a [TreeRoot],
    /// What an earlier attempt on this checkpoint did.
    pub(super) adopted: Option<&'a Adopted>,
    pub(super) pipeline: &'a Pipeline,
    pub(super) journal: &'a SharedJournal,
    pub(super) stats: &'a Arc<Stats>,
}

/// The layers of a job, in storage.
pub(super) struct Layers {
    checkpoints: Vec<SavedCheckpoint>,
    current: Option<outrider_proto::ids::CheckpointId>,
    disks: Vec<TreeDisk>,
    /// In the order in which they were read.
    stages: Vec<Stage>,
    /// What the point's report says.
    pub(super) said: String,
}

/// Layers that were read together: (disk, layer).
struct Stage {
    pipeline: Pipeline,
    of: Vec<(usize, usize)>,
}

/// Roots by (disk, layer).
pub(super) type Roots = HashMap<(usize, usize), TreeRoot>;

/// What became of the checkpoint tree.
pub(super) enum Outcome {
    /// There is none.
    None,
    /// It is kept.
    Kept(Box<Layers>),
    /// It is not, for this reason.
    Flat(String),
}

/// Captures the user checkpoints.
///
/// # Errors
/// Only what ends the job anyway: the lease, the journal, storage.
pub(super) async fn run(
    context: &JobContext,
    begun: &Begun<'_>,
    sets: &mut ConfigSets,
) -> Result<Outcome, JobError> {
    match captured(context, begun, sets).boxed().await {
        Ok(Some(layers)) => Ok(Outcome::Kept(Box::new(layers))),
        Ok(None) => Ok(Outcome::None),
        Err(e) if is_about_the_source(&e) => Ok(Outcome::Flat(e.to_string())),
        Err(e) => Err(e),
    }
}

/// Whether an error says nothing against the point itself, which is captured.
fn is_about_the_source(error: &JobError) -> bool {
    match error {
        JobError::Hypervisor(e) => !matches!(e, HypervisorError::Lease(_)),
        JobError::Pipeline(e) => matches!(e, PipelineError::Source(_)),
        JobError::Disk(_) | JobError::File { .. } | JobError::Unrestorable(_) => true,
        _ => false,
    }
}

async fn captured(
    context: &JobContext,
    begun: &Begun<'_>,
    sets: &mut ConfigSets,
) -> Result<Option<Layers>, JobError> {
    let hypervisor = &context.hypervisor;
    let mut tree = hypervisor.user_checkpoints(begun.vm.guid, &begun.open.checkpoint).await?;
    if tree.all.is_empty() {
        return Ok(None);
    }
    context.phase("reading checkpoints");
    let disks = find::disks(context, &mut tree, begun.disks).await?;
    let checkpoints = find::checkpoints(context, &tree, begun.pipeline, sets).await?;
    // Nobody else's barrier must find these lost.
    while !begun.pipeline.flush().await? {
        begun.pipeline.capture().boxed().await?;
    }
    let mut layers = Layers {
        checkpoints,
        current: tree.current,
        disks,
        stages: Vec::new(),
        said: String::new(),
    };
    let (steps, numbers) = layers.plan(context, begun).await?;
    layers.read(context, begun, &steps, &numbers).await?;
    if let Some(file) = find::written_meanwhile(context, &layers.disks).await? {
        return Err(JobError::Hypervisor(HypervisorError::Odd {
            doing: "read the VM's checkpoints".into(),
            detail: format!(
                "{file} was written to meanwhile: a checkpoint was removed, perhaps; the next run keeps those that are left"
            ),
        }));
    }
    layers.said = layers.report(&steps);
    Ok(Some(layers))
}

/// What the first files of a chain decide.
type Decided = Box<dyn FnOnce(usize) -> Result<RangeSet, outrider_disk::DiskError> + Send>;

/// Steps by (disk, layer).
type Steps = Vec<Vec<Step>>;

impl Layers {
    /// Decides what is read of each layer, and journals the layers under numbers of their own.
    async fn plan(
        &self,
        context: &JobContext,
        begun: &Begun<'_>,
    ) -> Result<(Steps, Vec<Vec<u32>>), JobError> {
        let mut steps = Vec::with_capacity(self.disks.len());
        for disk in &self.disks {
            let mut unchanged = Vec::with_capacity(disk.layers.len());
            for layer in &disk.layers {
                unchanged.push(self.kept(context, begun, disk, layer).await?.is_some());
            }
            let chains: Vec<_> = disk.layers.iter().map(|l| l.chain.clone()).collect();
            let point = disk.now.map(|_| disk.chain.as_slice());
            steps.push(order::plan(point, &chains, &unchanged));
        }
        let earlier = begun.adopted.map_or(0, |a| a.layers.len());
        let mut number = u32::try_from(begun.start.disks.len() + earlier).unwrap_or(u32::MAX);
        let mut numbers = Vec::with_capacity(self.disks.len());
        let mut entry = Vec::new();
        for disk in &self.disks {
            numbers.push((number..).take(disk.layers.len()).collect());
            number = number.saturating_add(u32::try_from(disk.layers.len()).unwrap_or(u32::MAX));
            entry.extend(disk.layers.iter().map(|layer| self.journalled(disk, layer)));
        }
        begun.journal.lock().await.append(&JournalEntry::Layers(entry)).await?;
        Ok((steps, numbers))
    }

    /// Reads all layers, stage by stage.
    async fn read(
        &mut self,
        context: &JobContext,
        begun: &Begun<'_>,
        steps: &Steps,
        numbers: &[Vec<u32>],
    ) -> Result<(), JobError> {
        let figures = Arc::new(Stats::default());
        let mut roots = Roots::new();
        let last = steps.iter().flatten().map(|s| s.stage).max().unwrap_or(0);
        for stage in 0..=last {
            let at = |(disk, steps): (usize, &Vec<Step>)| {
                let of_stage = steps.iter().enumerate().filter(|(_, s)| s.stage == stage);
                of_stage.map(|(layer, _)| (disk, layer)).collect::<Vec<_>>()
            };
            let of: Vec<(usize, usize)> = steps.iter().enumerate().flat_map(at).collect();
            if of.is_empty() {
                continue;
            }
            let mut jobs = Vec::with_capacity(of.len());
            let mut journalled = HashMap::new();
            for (local, (disk, layer)) in of.iter().enumerate() {
                jobs.push(
                    self.job(context, begun, (*disk, *layer), steps[*disk][*layer], &roots).await?,
                );
                let leaves = self.adopted(begun, &self.disks[*disk], *layer);
                journalled.extend(leaves.into_iter().map(|(leaf, page)| ((local, leaf), page)));
            }
            let before = figures.snapshot();
            let pipeline = Pipeline::new(
                context.store.clone(),
                context.sealer.clone(),
                context.pool.clone(),
                context.lease.clone(),
                figures.clone(),
                context.bounds(),
                begun.start.chunk_size,
                jobs,
            )
            .with_journal(begun.journal.clone(), journalled)
            .numbered(of.iter().map(|(disk, layer)| numbers[*disk][*layer]).collect());
            let captured = pipeline.capture().boxed().await?;
            self.close(&of);
            roots.extend(of.iter().copied().zip(captured));
            begun.stats.absorb(&figures.snapshot(), &before);
            self.stages.push(Stage { pipeline, of });
        }
        Ok(())
    }

    /// Closes layers until they are read again.
    fn close(&self, layers: &[(usize, usize)]) {
        for (disk, layer) in layers {
            self.disks[*disk].layers[*layer].source.close();
        }
    }

    /// What the pipeline has to do for a layer.
    async fn job(
        &self,
        context: &JobContext,
        begun: &Begun<'_>,
        (disk, layer): (usize, usize),
        step: Step,
        roots: &Roots,
    ) -> Result<DiskJob, JobError> {
        let of = &self.disks[disk];
        let (size, chunk_size) = (of.like.size, begun.start.chunk_size);
        let source = of.layers[layer].source.clone();
        let (other, known, masked) = match step.from {
            From::Parent => {
                let root = begun.parent.and_then(|p| self.root_in(p, of, &of.layers[layer]));
                let none = RangeSet::new();
                let plan =
                    DiskPlan::incremental(size, chunk_size, &none, root.unwrap_or(ChunkId::HOLE));
                // Without the root nothing would be read.
                return match root {
                    Some(_) => Ok(DiskJob { source, plan }),
                    None => {
                        Err(JobError::Unrestorable("a layer of the parent point is lost".into()))
                    }
                };
            }
            From::Nothing => {
                let allocated = {
                    let source = source.clone();
                    context.pool.read(0, move || source.allocated()).await?.0?
                };
                return Ok(DiskJob { source, plan: DiskPlan::full(size, chunk_size, &allocated) });
            }
            From::Point => {
                let now = of.now.unwrap_or_default();
                // What the point leaves out is zeros there, and is not left out of checkpoints.
                let masked = begun.start.excluded.get(now).map_or(&[][..], Vec::as_slice);
                let point = begun.disks[now].disk.clone();
                let other: Decided = Box::new(move |count| point.decided(count));
                (other, begun.roots[now], capture::ranges(masked))
            }
            From::Layer(at) => {
                let known = roots.get(&(disk, at)).copied().ok_or_else(|| {
                    JobError::Unrestorable("a layer is planned before what it is told from".into())
                })?;
                let layer = of.layers[at].source.clone();
                let other: Decided = Box::new(move |count| layer.decided(count));
                (other, known, RangeSet::new())
            }
        };
        let decided = {
            let (source, step) = (source.clone(), step);
            let both =
                move || source.decided(step.own).and_then(|own| Ok(own.union(&other(step.other)?)));
            context.pool.read(0, both).await?.0?
        };
        let to_read = RangeSet::union(&decided, &masked);
        Ok(DiskJob { source, plan: DiskPlan::incremental(size, chunk_size, &to_read, known.id) })
    }

    /// The roots; reads and sends again what storage has lost meanwhile.
    ///
    /// # Errors
    /// [`JobError`].
    pub(super) async fn capture(&self) -> Result<Roots, JobError> {
        let mut roots = Roots::new();
        for stage in &self.stages {
            let captured = stage.pipeline.capture().boxed().await?;
            self.close(&stage.of);
            roots.extend(stage.of.iter().copied().zip(captured));
        }
        Ok(roots)
    }

    /// As [`Pipeline::recheck`], for all layers; afterwards everything is durable again.
    ///
    /// # Errors
    /// [`JobError`].
    pub(super) async fn recheck(&self, pgs: &[PgId]) -> Result<(), JobError> {
        for stage in &self.stages {
            stage.pipeline.recheck(pgs).boxed().await?;
            // What one pipeline has put, the barrier of another could not send again.
            stage.pipeline.capture().boxed().await?;
        }
        Ok(())
    }
}
