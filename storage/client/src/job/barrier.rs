//! Closing windows: receipts for what is durable, the ids of what is not.

use std::sync::Arc;

use futures::future::join_all;
use outrider_process::backoff::Backoff;
use outrider_proto::frame::Presence;
use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::layout::Layout;

use crate::error::{BarrierError, StoreError, TransportError};

use super::sessions::NodeSession;
use super::window::{Claim, OpenWindow, PgClaim, judge};
use super::{Inner, JobStore};

impl JobStore {
    /// Closes the open windows: when it returns, everything put or found present before is durable on `min_durable`
    /// replicas, and [`JobStore::claims`] has the receipts.
    ///
    /// # Errors
    /// [`BarrierError::Lost`]: these ids, and only these, have to be put again; the others of the failed windows were
    /// asked for and are counted in a fresh window. [`BarrierError::Store`]: nobody could be asked, or confirms; call again.
    pub async fn barrier(&self) -> Result<(), BarrierError> {
        // One barrier at a time: two would share windows, and each would see half of the receipts.
        let _turn = self.inner.barrier.acquire().await.map_err(|_| StoreError::Closed)?;
        let limits = &self.inner.limits;
        let mut pauses =
            Backoff::new(limits.first_pause, limits.longest_pause, Backoff::any_seed());
        let mut reason = None;
        for attempt in 0.. {
            let suspects = self.close_windows(&mut reason).await?;
            if suspects.is_empty() {
                return Ok(());
            }
            if attempt > 0 {
                // A node that restarts needs a moment; asking faster would not make it come back.
                tokio::time::sleep(pauses.next_wait()).await;
            }
            let answers = self.have(&suspects).await?;
            // Answered: a yes is counted in a fresh window, the rest is the caller's from here on.
            self.inner.lock().suspects.clear();
            let ids: Vec<ChunkId> = suspects
                .into_iter()
                .zip(answers)
                .filter(|(_, answer)| *answer != Presence::Yes)
                .map(|(id, _)| id)
                .collect();
            let why = || {
                let said = reason.as_ref().map(ToString::to_string);
                said.unwrap_or_else(|| "a replica did not confirm them".to_owned())
            };
            if !ids.is_empty() {
                self.inner.lock().stats.lost += ids.len() as u64;
                return Err(BarrierError::Lost { ids, reason: why() });
            }
            if attempt + 1 >= limits.barrier_attempts {
                // All are there, says somebody, and nobody signs for it: they stand in an open window, and are no claim.
                return Err(StoreError::Unconfirmed { reason: why() }.into());
            }
        }
        Ok(())
    }

    /// Closes every open window; keeps the claims and returns the ids that no receipt covers. These stay in the state
    /// until somebody has been asked about them.
    async fn close_windows(
        &self,
        reason: &mut Option<TransportError>,
    ) -> Result<Vec<ChunkId>, StoreError> {
        let layout = self.inner.layout()?;
        let work = self.inner.sessions.take_work();
        let errors = join_all(work.into_iter().map(|s| self.close_one(s, &layout))).await;
        *reason = errors.into_iter().flatten().last().or(reason.take());
        let mut state = self.inner.lock();
        state.suspects.sort_unstable();
        state.suspects.dedup();
        Ok(state.suspects.clone())
    }

    /// Closes one window; its claim or its uncovered ids end up in the state, also when this call is dropped half-way.
    async fn close_one(
        &self,
        session: Arc<NodeSession>,
        layout: &Layout,
    ) -> Option<TransportError> {
        let mut closing =
            Closing { inner: &self.inner, window: session.close_window(), done: None };
        let window = Arc::clone(&closing.window);
        window.requests.close();
        window.requests.wait().await;
        let counts = window.counts();
        if counts.is_empty() {
            closing.done = Some((None, Vec::new()));
            return None;
        }
        if !session.is_usable() {
            return Some(session.failure());
        }
        let pgs = counts.iter().map(|(&pg, &(puts, _))| (pg, puts)).collect();
        let receipts = match session.link().barrier(window.head, pgs).await {
            Ok(receipts) => receipts,
            Err(error) => {
                session.give_up(&error);
                return Some(error);
            }
        };
        closing.done = Some(judge(&window.head, &counts, receipts, layout));
        None
    }
}

/// A window on its way to be a claim. A commit is judged by its claims alone, so a window must never just vanish: what no
/// receipt covers becomes suspect.
struct Closing<'a> {
    inner: &'a Inner,
    window: Arc<OpenWindow>,
    done: Option<(Option<Claim>, Vec<PgId>)>,
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        match self.done.take() {
            Some((claim, lacking)) => {
                state.stats.windows += u64::from(claim.is_some());
                let stored = |c: &PgClaim| self.window.bytes_of(c.pg) * u64::from(c.copies);
                state.stats.stored_bytes +=
                    claim.iter().flat_map(|c| &c.pgs).map(stored).sum::<u64>();
                state.claims.extend(claim);
                if !lacking.is_empty() {
                    state.suspects.extend(self.window.ids(Some(&lacking)));
                }
            }
            None => state.suspects.extend(self.window.ids(None)),
        }
    }
}
