//! The user checkpoints of a VM with their frozen disks, open, and grouped by disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrider_proto::journal::FileStamp;
use outrider_proto::manifest::{CheckpointFacts, DiskManifest, SavedCheckpoint};

use super::super::capture::{self, SourceFacts};
use super::super::config::ConfigSets;
use super::super::{JobContext, JobError};
use super::source::LayerDisk;
use crate::hypervisor::UserCheckpoints;
use crate::pipeline::Pipeline;

/// A disk, at the point, at checkpoints, or both.
pub(super) struct TreeDisk {
    /// Which of the point's disks it is; `None`: only checkpoints have it.
    pub(super) now: Option<usize>,
    /// Its facts, without layers.
    pub(super) like: DiskManifest,
    /// The chain at the point, leaf first; empty without it.
    pub(super) chain: Vec<PathBuf>,
    pub(super) layers: Vec<TreeLayer>,
}

/// A disk as a checkpoint froze it.
pub(super) struct TreeLayer {
    /// Position of the checkpoint in the tree.
    pub(super) checkpoint: usize,
    /// Its chain, leaf first, by the files' real places.
    pub(super) chain: Vec<PathBuf>,
    pub(super) source: Arc<LayerDisk>,
}

impl TreeLayer {
    /// Whether its files tell when they are written to.
    pub(super) fn tells(&self) -> bool {
        let stamps = self.source.stamps();
        !stamps.is_empty() && stamps.iter().all(FileStamp::tells)
    }
}

/// Opens the frozen disks of all checkpoints. The disks of the point come first, in their order.
pub(super) async fn disks(
    context: &JobContext,
    tree: &mut UserCheckpoints,
    disks: &[SourceFacts],
) -> Result<Vec<TreeDisk>, JobError> {
    let mut found = Vec::with_capacity(disks.len());
    for (now, disk) in disks.iter().enumerate() {
        let chain = real(context, disk.disk.files()).await?;
        found.push(TreeDisk { now: Some(now), like: disk.described(), chain, layers: Vec::new() });
    }
    let mut of_checkpoints = Vec::new();
    let mut later = Vec::new();
    for user in &tree.all {
        let frozen = context.hypervisor.checkpoint_disks(&user.checkpoint).await?;
        let opened = capture::open_disks(context, frozen).await?;
        let mut of_it = Vec::with_capacity(opened.len());
        for disk in opened {
            let (like, chain) = (disk.described(), real(context, disk.disk.files()).await?);
            let source = LayerDisk::of(context.sources.clone(), disk.path, &disk.disk);
            of_it.push((like, chain, Arc::new(source)));
        }
        // Made after the point was taken: it froze what the point's disks had become since.
        let after = |(_, chain, _): &(DiskManifest, Vec<PathBuf>, _)| {
            found.iter().any(|d| d.chain.first().is_some_and(|leaf| chain.contains(leaf)))
        };
        if of_it.iter().any(after) || user.parent.is_some_and(|p| later.contains(&p)) {
            later.push(user.checkpoint.id);
        } else {
            of_checkpoints.push(of_it);
        }
    }
    tree.all.retain(|user| !later.contains(&user.checkpoint.id));
    for (checkpoint, of_it) in of_checkpoints.into_iter().enumerate() {
        for (like, chain, source) in of_it {
            let at = match found.iter().position(|d| is_same(&d.like, &like)) {
                Some(at) => at,
                None => {
                    found.push(TreeDisk { now: None, like, chain: Vec::new(), layers: Vec::new() });
                    found.len() - 1
                }
            };
            found[at].layers.push(TreeLayer { checkpoint, chain, source });
        }
    }
    Ok(found)
}

/// Whether two frozen disks are states of one disk.
fn is_same(a: &DiskManifest, b: &DiskManifest) -> bool {
    let facts =
        |d: &DiskManifest| (d.disk_id, d.size, d.logical_sector, d.physical_sector, d.format);
    facts(a) == facts(b) && a.slot.eq_ignore_ascii_case(&b.slot)
}

/// The files by their real places: two chains may name one file in two ways.
async fn real(context: &JobContext, files: Vec<PathBuf>) -> Result<Vec<PathBuf>, JobError> {
    let place = |file: PathBuf| file.canonicalize().unwrap_or(file);
    Ok(context.pool.run(move || files.into_iter().map(place).collect()).await?)
}

impl SourceFacts {
    /// What a manifest says of it, without layers.
    pub(in crate::job) fn described(&self) -> DiskManifest {
        DiskManifest {
            disk_id: self.facts.disk,
            slot: self.facts.slot.clone(),
            file_name: self.file_name.clone(),
            size: self.facts.size,
            logical_sector: self.logical_sector,
            physical_sector: self.physical_sector,
            block_size: self.block_size,
            fixed: self.fixed,
            layers: Vec::new(),
            excluded: Vec::new(),
            format: self.format,
        }
    }
}

/// The first file of the frozen chains that was written to while they were read. A merge does that: an administrator has
/// removed a checkpoint meanwhile.
pub(super) async fn written_meanwhile(
    context: &JobContext,
    disks: &[TreeDisk],
) -> Result<Option<String>, JobError> {
    for layer in disks.iter().flat_map(|d| &d.layers) {
        let source = layer.source.clone();
        if !context.pool.read(0, move || source.is_unchanged()).await?.0? {
            return Ok(Some(name_of(layer.source.leaf())));
        }
    }
    Ok(None)
}

pub(super) fn name_of(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The checkpoints with their configuration sets, which are put to storage.
pub(super) async fn checkpoints(
    context: &JobContext,
    tree: &UserCheckpoints,
    pipeline: &Pipeline,
    sets: &mut ConfigSets,
) -> Result<Vec<SavedCheckpoint>, JobError> {
    let mut saved = Vec::with_capacity(tree.all.len());
    for user in &tree.all {
        saved.push(SavedCheckpoint {
            id: user.checkpoint.id,
            parent: user.parent,
            name: user.checkpoint.name.clone(),
            config: sets.save(context, &user.checkpoint, pipeline).await?,
            facts: CheckpointFacts {
                notes: user.notes.clone(),
                created_unix_ms: user.created_unix_ms,
                saved_state: user.saved_state,
                automatic: user.automatic,
                security: context.hypervisor.security(&user.checkpoint).await?,
            },
        });
    }
    Ok(saved)
}
