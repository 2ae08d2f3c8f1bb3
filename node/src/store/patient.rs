//! A store that asks again: a job pauses while storage is away and goes on when it is back.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use outrider_process::backoff::Backoff;
use outrider_proto::frame::{Presence, Space};
use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::record::Record;
use outrider_proto::rpc;
use tokio::time::Instant;

use super::{BarrierError, JobStore, Named, StoreError};

/// First and longest pause.
const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// Repeats what failed with [`StoreError::Unavailable`] until it works or `patience` is over.
pub struct Patient {
    inner: Arc<dyn JobStore>,
    patience: Duration,
}

impl Patient {
    /// Wraps a store.
    #[must_use]
    pub fn new(inner: Arc<dyn JobStore>, patience: Duration) -> Self {
        Self { inner, patience }
    }

    async fn again<T, F, Fut>(&self, call: F) -> Result<T, StoreError>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<T, StoreError>>,
    {
        let until = Instant::now() + self.patience;
        let mut backoff = Backoff::new(FIRST, LONGEST, Backoff::any_seed());
        loop {
            let failure = match call().await {
                Err(failure @ (StoreError::Unavailable { .. } | StoreError::Full { .. })) => {
                    failure
                }
                done => return done,
            };
            let pause = backoff.next_wait();
            if Instant::now() + pause >= until {
                return Err(failure);
            }
            tracing::warn!(error = %failure, ?pause, "waiting for storage");
            tokio::time::sleep(pause).await;
        }
    }
}

#[async_trait]
impl JobStore for Patient {
    async fn have(&self, ids: &[ChunkId]) -> Result<Vec<Presence>, StoreError> {
        self.again(|| self.inner.have(ids)).await
    }

    async fn put(&self, record: Record) -> Result<(), StoreError> {
        self.again(|| self.inner.put(record.clone())).await
    }

    async fn barrier(&self) -> Result<(), BarrierError> {
        let lost = self
            .again(|| async {
                match self.inner.barrier().await {
                    Ok(()) => Ok(Vec::new()),
                    // Never taken for a good one, whatever it means to say.
                    Err(BarrierError::Lost { ids }) if ids.is_empty() => {
                        Err(StoreError::Unavailable {
                            reason: "a barrier was not confirmed".to_owned(),
                        })
                    }
                    Err(BarrierError::Lost { ids }) => Ok(ids),
                    Err(BarrierError::Store(e)) => Err(e),
                }
            })
            .await?;
        if lost.is_empty() { Ok(()) } else { Err(BarrierError::Lost { ids: lost }) }
    }

    async fn get(&self, ids: &[ChunkId]) -> Result<Vec<Record>, StoreError> {
        self.again(|| self.inner.get(ids)).await
    }

    fn claims(&self) -> Vec<rpc::WindowClaim> {
        self.inner.claims()
    }

    fn drop_claims(&self, pgs: &[PgId]) {
        self.inner.drop_claims(pgs);
    }

    fn stored_bytes(&self) -> u64 {
        self.inner.stored_bytes()
    }

    fn pg_of(&self, id: &ChunkId) -> Option<PgId> {
        self.inner.pg_of(id)
    }

    async fn put_named(
        &self,
        space: Space,
        key: Vec<u8>,
        fence: u64,
        record: Record,
    ) -> Result<Vec<Bytes>, StoreError> {
        self.again(|| self.inner.put_named(space, key.clone(), fence, record.clone())).await
    }

    async fn list_named(&self, space: Space, prefix: &[u8]) -> Result<Vec<Named>, StoreError> {
        self.again(|| self.inner.list_named(space, prefix)).await
    }
}
