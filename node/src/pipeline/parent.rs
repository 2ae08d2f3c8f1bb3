//! The tree of the parent point, fetched along the paths that are asked for. Asked in ascending order, each page is
//! fetched once.

use std::sync::Arc;

use outrider_proto::ids::ChunkId;
use outrider_proto::page::{FANOUT, Links};
use outrider_proto::seal::Sealer;

use super::PipelineError;
use crate::store::JobStore;

/// A cursor over a tree in storage.
pub struct ParentTree {
    store: Arc<dyn JobStore>,
    sealer: Sealer,
    root: ChunkId,
    root_level: u8,
    /// The page last used of each level from 1 up: its index and children.
    path: Vec<Option<(u64, Vec<ChunkId>)>>,
}

impl ParentTree {
    /// The tree below `root`; the hole is a tree of zeros.
    #[must_use]
    pub fn new(store: Arc<dyn JobStore>, sealer: Sealer, root: ChunkId, root_level: u8) -> Self {
        Self { store, sealer, root, root_level, path: vec![None; usize::from(root_level) + 1] }
    }

    /// The id of the page of `level` (1: leaf) at `index` within its level.
    ///
    /// # Errors
    /// [`PipelineError`].
    pub async fn page_id(&mut self, level: u8, index: u64) -> Result<ChunkId, PipelineError> {
        // From the root down to the page above the wanted one.
        let mut id = self.root;
        for above in (level + 1..=self.root_level).rev() {
            if id.is_hole() {
                return Ok(id);
            }
            let width = (FANOUT as u64).pow(u32::from(above - level));
            let at = index / width;
            let child = (index / (width / FANOUT as u64) % FANOUT as u64) as usize;
            id = self.child(id, above, at, child).await?;
        }
        Ok(id)
    }

    /// The children of a leaf; all holes where there is no page.
    ///
    /// # Errors
    /// [`PipelineError`].
    pub async fn leaf(&mut self, leaf: u64, len: usize) -> Result<Vec<ChunkId>, PipelineError> {
        let id = self.page_id(1, leaf).await?;
        if id.is_hole() {
            return Ok(vec![ChunkId::HOLE; len]);
        }
        let mut children = fetch_page(&*self.store, &self.sealer, id, 1).await?;
        children.resize(len, ChunkId::HOLE);
        Ok(children)
    }

    async fn child(
        &mut self,
        id: ChunkId,
        level: u8,
        index: u64,
        child: usize,
    ) -> Result<ChunkId, PipelineError> {
        let slot = &mut self.path[usize::from(level)];
        if slot.as_ref().is_none_or(|(i, _)| *i != index) {
            let children = fetch_page(&*self.store, &self.sealer, id, level).await?;
            *slot = Some((index, children));
        }
        let children = slot.as_ref().map(|(_, c)| c.as_slice()).unwrap_or_default();
        Ok(children.get(child).copied().unwrap_or(ChunkId::HOLE))
    }
}

/// Fetches one page and authenticates it.
pub(crate) async fn fetch_page(
    store: &dyn JobStore,
    sealer: &Sealer,
    id: ChunkId,
    level: u8,
) -> Result<Vec<ChunkId>, PipelineError> {
    let record = store.get(&[id]).await?.pop().ok_or(crate::store::StoreError::Missing { id })?;
    page_children(sealer, &record, id, level)
}

/// The children of a fetched page.
pub(crate) fn page_children(
    sealer: &Sealer,
    record: &outrider_proto::record::Record,
    id: ChunkId,
    level: u8,
) -> Result<Vec<ChunkId>, PipelineError> {
    // Opening also checks that the content is what the id names.
    sealer.open(record)?;
    if record.id() != id {
        return Err(PipelineError::WrongPage { id, level });
    }
    match Links::decode(record.clear()).map_err(|source| PipelineError::Page { id, source })? {
        Links::Page { level: found, children } if found == level => Ok(children),
        _ => Err(PipelineError::WrongPage { id, level }),
    }
}
