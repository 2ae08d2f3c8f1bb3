//! What need not be read of a layer: the parent point has it, or an earlier attempt of this job has stored leaves of it.

use std::sync::Arc;

use outrider_disk::{RangeSet, ReadDisk};
use outrider_proto::ids::ChunkId;
use outrider_proto::journal::JournalLayer;
use outrider_proto::manifest::Manifest;

use super::find::{TreeDisk, TreeLayer};
use super::{Begun, Layers};
use crate::job::{JobContext, JobError};
use crate::pipeline::{DiskPlan, ParentTree, PipelineError, Stats, sample};
use crate::store::StoreError;

impl Layers {
    pub(super) fn journalled(&self, disk: &TreeDisk, layer: &TreeLayer) -> JournalLayer {
        JournalLayer {
            checkpoint: self.checkpoints[layer.checkpoint].id,
            disk_id: disk.like.disk_id,
            slot: disk.like.slot.clone(),
            size: disk.like.size,
            files: layer.source.stamps().to_vec(),
        }
    }

    /// The parent point's tree of a layer, when nothing was written to it since; any doubt reads it.
    pub(super) async fn kept(
        &self,
        context: &JobContext,
        begun: &Begun<'_>,
        disk: &TreeDisk,
        layer: &TreeLayer,
    ) -> Result<Option<ChunkId>, JobError> {
        let tracked =
            disk.now.is_none_or(|now| begun.start.disks.get(now).is_some_and(|d| d.incremental));
        let Some(parent) = begun.parent.filter(|_| tracked) else { return Ok(None) };
        let Some(root) = self.root_in(parent, disk, layer) else { return Ok(None) };
        let source: Arc<dyn ReadDisk> = layer.source.clone();
        let allocated = {
            let source = source.clone();
            context.pool.read(0, move || source.allocated()).await?.0?
        };
        let none = RangeSet::new();
        let plan = DiskPlan::incremental(disk.like.size, begun.start.chunk_size, &none, root);
        let (store, sealer) = (context.store.clone(), context.sealer.clone());
        let mut tree = ParentTree::new(store, sealer, root, plan.root_level());
        let compared =
            sample::compare(&source, &plan, &allocated, &mut tree, &context.sealer, &context.pool);
        let found = match compared.await {
            Ok(found) => found,
            // Its pages are not what they were: it is read.
            Err(PipelineError::Store(StoreError::Missing { .. })) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        layer.source.close();
        Stats::add(&begun.stats.sampled_chunks, found.chunks);
        Stats::add(&begun.stats.read_bytes, found.bytes);
        if let Some(offset) = found.mismatch {
            tracing::error!(
                file = %layer.source.leaf().display(),
                offset,
                "a frozen file has changed although it says that it has not; the layer is read again"
            );
            return Ok(None);
        }
        Ok(Some(root))
    }

    pub(super) fn root_in(
        &self,
        parent: &Manifest,
        disk: &TreeDisk,
        layer: &TreeLayer,
    ) -> Option<ChunkId> {
        if !layer.tells() {
            return None;
        }
        let written = layer.source.stamps().iter().map(|s| s.written);
        let checkpoint = self.checkpoints[layer.checkpoint].id;
        let now = parent.disks.iter().zip(&parent.tree.layers);
        let former = parent.tree.former.iter().map(|f| (&f.disk, &f.layers));
        let (of, layers) = now.chain(former).find(|(d, _)| {
            d.disk_id == disk.like.disk_id && d.slot == disk.like.slot && d.size == disk.like.size
        })?;
        let at = layers.iter().position(|l| l.checkpoint == checkpoint)?;
        layers[at].written.iter().copied().eq(written).then(|| of.layers.get(at).map(|l| l.root))?
    }

    /// Leaves of a layer that an earlier attempt has stored, if its files are as they were.
    pub(super) fn adopted(
        &self,
        begun: &Begun<'_>,
        disk: &TreeDisk,
        layer: usize,
    ) -> Vec<(u64, ChunkId)> {
        let Some(adopted) = begun.adopted.filter(|_| disk.layers[layer].tells()) else {
            return Vec::new();
        };
        let layer = self.journalled(disk, &disk.layers[layer]);
        let first = begun.start.disks.len();
        let same: Vec<usize> = (0..adopted.layers.len())
            .filter(|at| adopted.layers[*at] == layer)
            .map(|at| first + at)
            .collect();
        let leaves = adopted.leaves.iter().filter(|((disk, _), _)| same.contains(disk));
        leaves.map(|((_, leaf), page)| (*leaf, *page)).collect()
    }
}
