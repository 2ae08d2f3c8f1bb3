//! Fetching what this node should keep and does not: after a start, after a new layout, and from time to time.

mod compared;

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use outrider_format::entry::{Name, Provenance};
use outrider_proto::frame::Space;
use outrider_proto::ids::{ChunkId, JobId, PgId};
use outrider_proto::layout::{Layout, StorageNode};
use outrider_storage_client::TransportError;
use outrider_storage_client::transport::ChunkSession;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::error::StoreError;
use crate::metrics::StorageMetrics;
use crate::peers::Peers;
use crate::store::{Append, Store};

use self::compared::Compared;

/// Ids fetched with one request.
const FETCH: usize = 32;

/// The task that fetches.
pub struct CatchUp {
    /// This node.
    pub name: String,
    /// Store.
    pub store: Arc<Store>,
    /// Other nodes.
    pub peers: Arc<Peers>,
    /// Layout.
    pub layout: watch::Receiver<Layout>,
    /// Told to whoever answers `Have`: whether something may be missing here.
    pub incomplete: watch::Sender<bool>,
    /// Figures.
    pub metrics: StorageMetrics,
    /// Bytes a second.
    pub rate: u64,
    /// Pause between two looks.
    pub every: Duration,
}

/// Why a look ended early.
#[derive(Debug, thiserror::Error)]
enum CatchUpError {
    #[error(transparent)]
    Peer(#[from] TransportError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CatchUp {
    /// Looks and fetches until cancelled.
    pub async fn run(mut self, token: CancellationToken) {
        let mut compared = Compared::default();
        loop {
            let work = async {
                let complete = self.look(&mut compared).await;
                self.incomplete.send_replace(!complete);
                // What could not be asked is asked again soon.
                let pause =
                    if complete { self.every } else { self.every.min(Duration::from_secs(1)) };
                let _ = tokio::time::timeout(pause, self.layout.changed()).await;
            };
            tokio::select! {
                () = work => {}
                () = token.cancelled() => return,
            }
        }
    }

    /// One look at all PGs and names. Whether every other replica could be asked and nothing is missing.
    async fn look(&self, compared: &mut Compared) -> bool {
        let layout = self.layout.borrow().clone();
        if layout.node(&self.name).is_none() {
            return false;
        }
        let mut complete = true;
        for peer in layout.nodes.iter().filter(|n| n.name != self.name) {
            let shared: Vec<PgId> = (0..u16::try_from(layout.pgs.len()).unwrap_or(u16::MAX))
                .map(PgId)
                .filter(|&pg| layout.keeps(&self.name, pg) && layout.keeps(&peer.name, pg))
                .collect();
            if let Err(error) = self.look_at(&layout, peer, &shared, compared).await {
                tracing::debug!(%error, peer = %peer.name, "could not catch up from this node");
                complete = false;
            }
        }
        self.metrics.catching_up.set(0);
        complete
    }

    async fn look_at(
        &self,
        layout: &Layout,
        peer: &StorageNode,
        shared: &[PgId],
        compared: &mut Compared,
    ) -> Result<(), CatchUpError> {
        let session = self.peers.session(peer).await?;
        for &pg in shared {
            let mut after = ChunkId::HOLE;
            loop {
                let ids = session.list_pg(pg, after).await?;
                let Some(&last) = ids.last() else { break };
                after = last;
                let mut missing = Vec::new();
                for id in ids {
                    if !self.store.contains(&id)? {
                        missing.push(id);
                    }
                }
                self.fetch(&*session, layout, pg, missing).await?;
            }
        }
        // Before, not after: what is found damaged meanwhile may have been passed already.
        let damaged = self.store.status().damaged;
        if compared.is_due(&session, damaged) {
            self.named(&*session, layout).await?;
            compared.note(&session, damaged);
        }
        Ok(())
    }

    async fn fetch(
        &self,
        session: &dyn ChunkSession,
        layout: &Layout,
        pg: PgId,
        missing: Vec<ChunkId>,
    ) -> Result<(), CatchUpError> {
        self.metrics.catching_up.set(i64::try_from(missing.len()).unwrap_or(i64::MAX));
        for ids in missing.chunks(FETCH) {
            let records = session.get(ids.to_vec()).await?;
            let appends: Vec<Append> = records
                .into_iter()
                .zip(ids)
                .filter_map(|(record, id)| record.filter(|r| r.id() == *id && r.verify().is_ok()))
                .map(|record| Append { provenance: self.provenance(layout, pg), record })
                .collect();
            let bytes: u64 = appends.iter().map(|a| a.record.bytes().len() as u64).sum();
            self.metrics.caught_up.inc_by(appends.len() as u64);
            self.store.append(appends).await?;
            self.pace(bytes).await;
        }
        if !missing.is_empty() {
            self.store.sync().await?;
            tracing::info!(%pg, records = missing.len(), from = %session.opened().node, "caught up");
        }
        Ok(())
    }

    /// Compares all names page by page, and fetches one record after the other.
    async fn named(&self, session: &dyn ChunkSession, layout: &Layout) -> Result<(), CatchUpError> {
        for space in [Space::Root, Space::Journal, Space::State] {
            if session.opened().version < 2 {
                // An older node has no list of names alone.
                self.take_named(session, layout, space, Vec::new()).await?;
                continue;
            }
            let mut after = Vec::new();
            loop {
                let names = session.list_names(space, after).await?;
                let Some((last, _)) = names.last() else { break };
                after = last.clone();
                for (key, fence) in names {
                    if self.lacks(space, &key, fence)? {
                        self.take_named(session, layout, space, key).await?;
                    }
                }
            }
        }
        Ok(())
    }

    fn lacks(&self, space: Space, key: &[u8], fence: u64) -> Result<bool, StoreError> {
        Ok(self.store.find_named(space, key)?.is_none_or(|known| known.fence < fence))
    }

    /// Takes the named records of a prefix that are missing or older here, each as it arrives.
    async fn take_named(
        &self,
        session: &dyn ChunkSession,
        layout: &Layout,
        space: Space,
        prefix: Vec<u8>,
    ) -> Result<(), CatchUpError> {
        let mut records = session.stream_named(space, prefix);
        while let Some(named) = records.try_next().await? {
            if !self.lacks(space, &named.key, named.fence)? || named.record.verify().is_err() {
                continue;
            }
            let bytes = named.record.bytes().len() as u64;
            let name = Name { space: space as u8, key: named.key, fence: named.fence };
            let provenance = self.provenance(layout, PgId(0));
            match self.store.put_named(name, provenance, named.record).await {
                // A newer entry of the same job is here already: the old one is of no use.
                Ok(()) | Err(StoreError::Fenced { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            self.pace(bytes).await;
        }
        Ok(())
    }

    /// Repair must leave room for the work of the day: this is the rate, not a wait for something.
    async fn pace(&self, bytes: u64) {
        let pause = Duration::from_secs_f64(bytes as f64 / self.rate.max(1) as f64);
        tokio::time::sleep(pause).await;
    }

    fn provenance(&self, layout: &Layout, pg: PgId) -> Provenance {
        Provenance {
            layout_epoch: layout.epoch,
            incarnation: self.store.incarnation(),
            job: JobId::from_bytes([0; 16]),
            pg,
        }
    }
}

#[cfg(test)]
mod tests;
