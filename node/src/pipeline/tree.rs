//! From leaves to the root page. Subtrees without a new leaf are the parent's.

use futures::FutureExt;
use futures::future::BoxFuture;
use outrider_proto::frame::Presence;
use outrider_proto::ids::ChunkId;
use outrider_proto::page::FANOUT;

use super::stats::Stats;
use super::{LeafKey, Pipeline, PipelineError};

/// Ids asked for at once.
const BATCH: usize = 4096;

/// The root of a captured disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeRoot {
    /// Level of the root page.
    pub level: u8,
    /// Root page, or the hole.
    pub id: ChunkId,
}

impl Pipeline {
    pub(super) async fn assemble_all(&self) -> Result<Vec<TreeRoot>, PipelineError> {
        self.state().reused.clear();
        let mut roots = Vec::with_capacity(self.disks.len());
        for (disk, job) in self.disks.iter().enumerate() {
            let level = job.plan.root_level();
            let id = self.assemble(disk, level, 0).await?;
            roots.push(TreeRoot { level, id });
        }
        Stats::set(&self.stats.reused_pages, self.state().reused.len() as u64);
        Ok(roots)
    }

    fn assemble(
        &self,
        disk: usize,
        level: u8,
        index: u64,
    ) -> BoxFuture<'_, Result<ChunkId, PipelineError>> {
        async move {
            let below = self.disks[disk].plan.leaves_below(level, index);
            let first_new = self.state().leaves[disk].range(below).next().map(|(_, page)| *page);
            let Some(page) = first_new else {
                let id = self.parents[disk].lock().await.page_id(level, index).await?;
                if !id.is_hole() {
                    self.state().reused.insert(id, (disk, level, index));
                }
                return Ok(id);
            };
            if level == 1 {
                return Ok(page);
            }
            let mut children = Vec::with_capacity(FANOUT);
            let first = index * FANOUT as u64;
            for child in first..first + FANOUT as u64 {
                if self.disks[disk].plan.leaves_below(level - 1, child).is_empty() {
                    break;
                }
                children.push(self.assemble(disk, level - 1, child).await?);
            }
            let Some(record) = self.seal_page(level, &children)? else { return Ok(ChunkId::HOLE) };
            let id = record.id();
            if !self.state().small.contains_key(&id) {
                self.put_small(record).await?;
            }
            Ok(id)
        }
        .boxed()
    }

    /// Asks for the pages taken from the parent. Leaves below those that are not there have to be read whole.
    pub(super) async fn ask_for_reused(&self) -> Result<Vec<LeafKey>, PipelineError> {
        let reused: Vec<ChunkId> = self.state().reused.keys().copied().collect();
        let mut forced = Vec::new();
        for part in reused.chunks(BATCH) {
            let answers = self.store.have(part).await?;
            let mut state = self.state();
            for (id, _) in part.iter().zip(answers).filter(|(_, a)| *a != Presence::Yes) {
                if let Some((disk, level, index)) = state.reused.remove(id) {
                    tracing::warn!(page = %id.short(), disk, "a page of the parent is not in storage any more; its range is read");
                    let leaves = self.disks[disk].plan.leaves_below(level, index);
                    forced.extend(leaves.map(|leaf| (disk, leaf)));
                }
            }
            state.forced.extend(forced.iter().copied());
        }
        Ok(forced)
    }
}
