//! Leaves that an earlier attempt on the same checkpoint has stored: neither read nor sent again, once storage confirmed
//! every id of them.

use std::collections::{HashMap, HashSet};

use outrider_proto::frame::Presence;
use outrider_proto::ids::ChunkId;

use super::parent::{fetch_page, page_children};
use super::stats::Stats;
use super::{LeafKey, Pipeline, PipelineError};
use crate::store::StoreError;

/// Leaf pages asked for together.
const BATCH: usize = 64;

impl Pipeline {
    pub(super) async fn adopt(&self) -> Result<(), PipelineError> {
        let mut journalled: Vec<(LeafKey, ChunkId)> = {
            let state = self.state();
            let known =
                |key: &LeafKey| self.disks.get(key.0).is_some_and(|d| key.1 < d.plan.leaf_count());
            let open = |key: &LeafKey| {
                !state.leaves[key.0].contains_key(&key.1) && !state.forced.contains(key)
            };
            self.journalled
                .iter()
                .map(|(k, p)| (*k, *p))
                .filter(|(k, _)| known(k) && open(k))
                .collect()
        };
        journalled.sort_unstable_by_key(|(key, _)| *key);
        for part in journalled.chunks(BATCH) {
            self.lease.check()?;
            self.adopt_part(part).await?;
        }
        Ok(())
    }

    async fn adopt_part(&self, part: &[(LeafKey, ChunkId)]) -> Result<(), PipelineError> {
        let (holes, pages): (Vec<_>, Vec<_>) =
            part.iter().copied().partition(|(_, page)| page.is_hole());
        self.accept(holes);
        let present = self.confirmed(pages.iter().map(|(_, page)| *page).collect()).await?;
        let pages: Vec<(LeafKey, ChunkId)> =
            pages.into_iter().filter(|(_, page)| present.contains(page)).collect();
        if pages.is_empty() {
            return Ok(());
        }
        let ids: Vec<ChunkId> = pages.iter().map(|(_, page)| *page).collect();
        let records = match self.store.get(&ids).await {
            Ok(records) => records,
            // One of them is damaged: these leaves are done anew.
            Err(StoreError::Missing { .. }) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let mut children: HashMap<ChunkId, Vec<ChunkId>> = HashMap::new();
        for (id, record) in ids.iter().zip(&records) {
            let mut below = page_children(&self.sealer, record, *id, 1)?;
            below.retain(|id| !id.is_hole());
            children.insert(*id, below);
        }
        let present = self.confirmed(children.values().flatten().copied().collect()).await?;
        let whole = |page: &ChunkId| {
            children.get(page).is_some_and(|c| c.iter().all(|id| present.contains(id)))
        };
        self.accept(pages.into_iter().filter(|(_, page)| whole(page)).collect());
        Ok(())
    }

    async fn confirmed(&self, mut ids: Vec<ChunkId>) -> Result<HashSet<ChunkId>, PipelineError> {
        ids.sort_unstable();
        ids.dedup();
        if ids.is_empty() {
            return Ok(HashSet::new());
        }
        let answers = self.store.have(&ids).await?;
        Ok(ids
            .into_iter()
            .zip(answers)
            .filter(|(_, a)| *a == Presence::Yes)
            .map(|(id, _)| id)
            .collect())
    }

    fn accept(&self, leaves: Vec<(LeafKey, ChunkId)>) {
        Stats::add(&self.stats.adopted_pages, leaves.len() as u64);
        let mut state = self.state();
        for ((disk, leaf), page) in leaves {
            state.leaves[disk].insert(leaf, page);
        }
    }

    /// For a leaf that an earlier attempt had stored and that is done again: what it had stored (empty: cannot be told).
    pub(super) async fn earlier_children(&self, key: LeafKey) -> Option<HashSet<ChunkId>> {
        let page = *self.journalled.get(&key)?;
        if page.is_hole() {
            return None;
        }
        let children = fetch_page(&*self.store, &self.sealer, page, 1).await;
        Some(children.map(|c| c.into_iter().collect()).unwrap_or_default())
    }
}
