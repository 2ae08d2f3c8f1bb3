//! What a job needs of storage: the seam between the agent and `outrider-storage-client`.

mod client;
mod patient;

use async_trait::async_trait;
use bytes::Bytes;
use outrider_proto::frame::{Presence, Space};
use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::record::Record;
use outrider_proto::rpc;

pub use client::ClientStore;
pub use patient::Patient;

/// Why storage did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// Too few nodes answer; the same may succeed later.
    #[error("storage cannot be used right now: {reason}")]
    Unavailable {
        /// What the client met.
        reason: String,
    },
    /// A storage node has no space left; the same may succeed when somebody made room.
    #[error("storage is full: {reason}")]
    Full {
        /// What the client met.
        reason: String,
    },
    /// Another lease of this job has written since: this one is superseded.
    #[error("superseded at storage: {reason}")]
    Fenced {
        /// The node's sentence.
        reason: String,
    },
    /// No replica has a readable copy.
    #[error(
        "chunk {id:?} is on none of its storage nodes: start the nodes that are down, or use another recovery point"
    )]
    Missing {
        /// Chunk.
        id: ChunkId,
    },
    /// Refused for good (certificate, ticket, no space).
    #[error("storage refused: {reason}")]
    Refused {
        /// The node's sentence.
        reason: String,
    },
}

/// Why a barrier did not give receipts for everything.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BarrierError {
    /// These ids have to be sent again (a storage node restarted, a replica changed).
    #[error("{} ids sent since the last barrier are not durable and have to be sent again", ids.len())]
    Lost {
        /// The ids.
        ids: Vec<ChunkId>,
    },
    /// Anything else.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A record kept under a name.
#[derive(Debug, Clone)]
pub struct Named {
    /// Key.
    pub key: Vec<u8>,
    /// Lease epoch it was written under.
    pub fence: u64,
    /// Record.
    pub record: Record,
}

/// One job's session with storage. All methods may be called by many tasks at once.
#[async_trait]
pub trait JobStore: Send + Sync + 'static {
    /// Whether ids are durable, in the order asked; every yes counts in the current window.
    async fn have(&self, ids: &[ChunkId]) -> Result<Vec<Presence>, StoreError>;

    /// Sends a record. Returns when it was taken in; waits while too much is in flight. Durable only after
    /// [`JobStore::barrier`].
    async fn put(&self, record: Record) -> Result<(), StoreError>;

    /// Closes the window: everything put before is durable on enough replicas when this returns.
    async fn barrier(&self) -> Result<(), BarrierError>;

    /// Reads records, in the order asked.
    async fn get(&self, ids: &[ChunkId]) -> Result<Vec<Record>, StoreError>;

    /// What a commit has to show for the windows so far.
    fn claims(&self) -> Vec<rpc::WindowClaim>;

    /// Forgets the claims of these PGs: their ids have been asked for again.
    fn drop_claims(&self, pgs: &[PgId]);

    /// Sealed bytes times the replicas that confirmed them, so far.
    fn stored_bytes(&self) -> u64;

    /// The PG of an id at the current layout.
    fn pg_of(&self, id: &ChunkId) -> Option<PgId>;

    /// Keeps a record under a name, durable when this returns; gives the encoded receipts.
    async fn put_named(
        &self,
        space: Space,
        key: Vec<u8>,
        fence: u64,
        record: Record,
    ) -> Result<Vec<Bytes>, StoreError>;

    /// The records of a space whose key starts with `prefix`, in key order.
    async fn list_named(&self, space: Space, prefix: &[u8]) -> Result<Vec<Named>, StoreError>;
}
