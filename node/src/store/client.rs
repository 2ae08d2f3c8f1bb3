//! [`JobStore`] over the real client of the storage tier.

use async_trait::async_trait;
use bytes::Bytes;
use outrider_proto::frame::{Presence, Refusal, Space};
use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::record::Record;
use outrider_proto::rpc;
use outrider_storage_client as client;

use super::{BarrierError, JobStore, Named, StoreError};

/// A job's store of `outrider-storage-client`.
pub struct ClientStore(pub client::JobStore);

#[async_trait]
impl JobStore for ClientStore {
    async fn have(&self, ids: &[ChunkId]) -> Result<Vec<Presence>, StoreError> {
        Ok(self.0.have(ids).await?)
    }

    async fn put(&self, record: Record) -> Result<(), StoreError> {
        Ok(self.0.put(record).await?)
    }

    async fn barrier(&self) -> Result<(), BarrierError> {
        self.0.barrier().await.map_err(|e| match e {
            client::BarrierError::Lost { ids, reason } => {
                tracing::warn!(count = ids.len(), reason, "records have to be sent again");
                BarrierError::Lost { ids }
            }
            client::BarrierError::Store(e) => BarrierError::Store(e.into()),
        })
    }

    async fn get(&self, ids: &[ChunkId]) -> Result<Vec<Record>, StoreError> {
        Ok(self.0.get(ids).await?)
    }

    fn claims(&self) -> Vec<rpc::WindowClaim> {
        self.0.claims()
    }

    fn drop_claims(&self, pgs: &[PgId]) {
        self.0.drop_claims(pgs);
    }

    fn stored_bytes(&self) -> u64 {
        self.0.stats().stored_bytes
    }

    fn pg_of(&self, id: &ChunkId) -> Option<PgId> {
        self.0.pg_of(id)
    }

    async fn put_named(
        &self,
        space: Space,
        key: Vec<u8>,
        fence: u64,
        record: Record,
    ) -> Result<Vec<Bytes>, StoreError> {
        Ok(self.0.put_named(space, key, fence, record).await?)
    }

    async fn list_named(&self, space: Space, prefix: &[u8]) -> Result<Vec<Named>, StoreError> {
        let found = self.0.list_named(space, prefix).await?;
        Ok(found
            .into_iter()
            .map(|n| Named { key: n.key, fence: n.fence, record: n.record })
            .collect())
    }
}

impl From<client::StoreError> for StoreError {
    fn from(e: client::StoreError) -> Self {
        let reason = e.to_string();
        match e {
            client::StoreError::Fenced { .. } => Self::Fenced { reason },
            client::StoreError::Missing { id, .. } => Self::Missing { id },
            e if e.refusal() == Some(Refusal::Full) => Self::Full { reason },
            e if e.may_succeed_later() => Self::Unavailable { reason },
            _ => Self::Refused { reason },
        }
    }
}
