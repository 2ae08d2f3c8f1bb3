//! Receipts became void: ask for the ids again, read and send what is missing.

use std::collections::HashSet;

use outrider_proto::frame::Presence;
use outrider_proto::ids::{ChunkId, PgId};

use super::parent::page_children;
use super::{LeafKey, Pipeline, PipelineError};
use crate::store::StoreError;

/// Leaves looked at together.
const BATCH: usize = 64;

impl Pipeline {
    /// The coordinator lacks receipts for these PGs: asks storage again for every id of this job in them. The claims of
    /// the PGs have to be dropped before. Call [`Pipeline::capture`] afterwards.
    ///
    /// # Errors
    /// [`PipelineError`].
    pub async fn recheck(&self, pgs: &[PgId]) -> Result<(), PipelineError> {
        let pgs: HashSet<PgId> = pgs.iter().copied().collect();
        self.recheck_where(&|id| self.store.pg_of(id).is_none_or(|pg| pgs.contains(&pg))).await
    }

    pub(super) async fn recheck_ids(&self, ids: Vec<ChunkId>) -> Result<(), PipelineError> {
        let ids: HashSet<ChunkId> = ids.into_iter().collect();
        self.recheck_where(&|id| ids.contains(id)).await
    }

    async fn recheck_where(
        &self,
        concerned: &(dyn Fn(&ChunkId) -> bool + Sync),
    ) -> Result<(), PipelineError> {
        let leaves: Vec<(LeafKey, ChunkId)> = {
            let mut state = self.state();
            // Of what was sent lately nothing is known any more, that of leaves whose pages are gone, too: each id that is met
            // again is asked for again.
            state.recent = Default::default();
            let of_disk = |(disk, leaves): (usize, &std::collections::BTreeMap<u64, ChunkId>)| {
                leaves.iter().map(|(leaf, page)| ((disk, *leaf), *page)).collect::<Vec<_>>()
            };
            state
                .leaves
                .iter()
                .enumerate()
                .flat_map(of_disk)
                .filter(|(_, page)| !page.is_hole())
                .collect()
        };
        let mut again = Vec::new();
        for part in leaves.chunks(BATCH) {
            self.recheck_leaves(part, concerned, &mut again).await?;
        }
        self.recheck_small(concerned).await?;
        self.recheck_reused(concerned).await?;
        if !again.is_empty() {
            tracing::info!(leaves = again.len(), "leaf pages are done again");
            Box::pin(self.drive(again, false)).await?;
        }
        Ok(())
    }

    async fn recheck_leaves(
        &self,
        part: &[(LeafKey, ChunkId)],
        concerned: &(dyn Fn(&ChunkId) -> bool + Sync),
        again: &mut Vec<LeafKey>,
    ) -> Result<(), PipelineError> {
        let mut of_leaf: Vec<(LeafKey, Vec<ChunkId>)> = Vec::new();
        for (key, page) in part {
            let record = match self.store.get(&[*page]).await {
                Ok(records) => records.into_iter().next(),
                Err(StoreError::Missing { .. }) => None,
                Err(e) => return Err(e.into()),
            };
            let Some(record) = record else {
                again.push(*key);
                continue;
            };
            let children = page_children(&self.sealer, &record, *page, 1)?;
            let ids =
                std::iter::once(*page).chain(children).filter(|id| !id.is_hole() && concerned(id));
            of_leaf.push((*key, ids.collect()));
        }
        let all: Vec<ChunkId> = of_leaf.iter().flat_map(|(_, ids)| ids.iter().copied()).collect();
        if all.is_empty() {
            return Ok(());
        }
        let answers = self.store.have(&all).await?;
        let missing: HashSet<ChunkId> = all
            .iter()
            .zip(answers)
            .filter(|(_, a)| *a != Presence::Yes)
            .map(|(id, _)| *id)
            .collect();
        {
            let mut state = self.state();
            for id in &missing {
                for recent in &mut state.recent {
                    recent.remove(id);
                }
            }
        }
        again.extend(
            of_leaf
                .iter()
                .filter(|(_, ids)| ids.iter().any(|id| missing.contains(id)))
                .map(|(key, _)| *key),
        );
        Ok(())
    }

    async fn recheck_small(
        &self,
        concerned: &(dyn Fn(&ChunkId) -> bool + Sync),
    ) -> Result<(), PipelineError> {
        let ids: Vec<ChunkId> =
            self.state().small.keys().filter(|id| concerned(id)).copied().collect();
        if ids.is_empty() {
            return Ok(());
        }
        let answers = self.store.have(&ids).await?;
        for (id, _) in ids.iter().zip(answers).filter(|(_, a)| *a != Presence::Yes) {
            let record = self.state().small.get(id).cloned();
            if let Some(record) = record {
                self.put(record).await?;
            }
        }
        Ok(())
    }

    async fn recheck_reused(
        &self,
        concerned: &(dyn Fn(&ChunkId) -> bool + Sync),
    ) -> Result<(), PipelineError> {
        let ids: Vec<ChunkId> =
            self.state().reused.keys().filter(|id| concerned(id)).copied().collect();
        if ids.is_empty() {
            return Ok(());
        }
        let answers = self.store.have(&ids).await?;
        let mut state = self.state();
        for (id, _) in ids.iter().zip(answers).filter(|(_, a)| *a != Presence::Yes) {
            if let Some((disk, level, index)) = state.reused.remove(id) {
                let leaves = self.disks[disk].plan.leaves_below(level, index);
                state.forced.extend(leaves.map(|leaf| (disk, leaf)));
            }
        }
        Ok(())
    }
}
