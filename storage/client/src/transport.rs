//! The seam between what a client wants and how it travels: one method per kind of request.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use outrider_proto::frame::{Presence, Space};
use outrider_proto::ids::{
    ChunkId, FabricId, JobId, LayoutEpoch, NodeIncarnation, PgId, SessionId, Window,
};
use outrider_proto::layout::StorageNode;
use outrider_proto::record::Record;

use crate::error::TransportError;

/// What a client is; says the `Hello`, proven by its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ClientRole {
    /// The agent on a host.
    Agent = 1,
    /// Another storage node.
    Storage = 2,
    /// An operator's restore.
    Operator = 3,
    /// A coordinator that keeps copies of its state.
    Coordinator = 4,
}

/// What a session is opened with.
#[derive(Debug, Clone)]
pub struct Opening {
    /// Chosen by the client, new for every connection.
    pub session: SessionId,
    /// Layout that the client works under.
    pub layout_epoch: LayoutEpoch,
    /// The job's ticket; empty for storage nodes.
    pub ticket: Bytes,
}

/// What the node said of itself when the session was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// Fabric.
    pub fabric: FabricId,
    /// Node.
    pub node: String,
    /// Its incarnation.
    pub incarnation: NodeIncarnation,
    /// Layout that it works under.
    pub layout_epoch: LayoutEpoch,
    /// Protocol version that both sides speak.
    pub version: u16,
}

/// The window that a request belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WindowHead {
    /// Job.
    pub job: JobId,
    /// Session that numbered the puts.
    pub session: SessionId,
    /// Window.
    pub window: Window,
    /// Layout of the numbering.
    pub layout_epoch: LayoutEpoch,
}

/// A record with its place in a window.
#[derive(Debug, Clone)]
pub struct NumberedRecord {
    /// PG of its id.
    pub pg: PgId,
    /// 1.. within (session, window, PG).
    pub sequence: u32,
    /// The sealed record.
    pub record: Record,
}

/// A record kept under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedRecord {
    /// Key.
    pub key: Vec<u8>,
    /// Fence it was written under.
    pub fence: u64,
    /// Record.
    pub record: Record,
}

/// Named records as they arrive.
pub type NamedStream<'a> = BoxStream<'a, Result<NamedRecord, TransportError>>;

/// Makes sessions with storage nodes.
#[async_trait]
pub trait ChunkTransport: Send + Sync + 'static {
    /// Connects to a node and opens a session.
    async fn open(
        &self,
        node: &StorageNode,
        opening: Opening,
    ) -> Result<Arc<dyn ChunkSession>, TransportError>;
}

/// A session with one storage node. Requests of one session may be in flight at the same time; a failed request has no
/// effect that the caller may count on.
#[async_trait]
pub trait ChunkSession: Send + Sync + 'static {
    /// What the node said of itself.
    fn opened(&self) -> &Opened;

    /// Sends records of a window; gives how many were taken in (not yet durable).
    async fn put(
        &self,
        head: WindowHead,
        records: Vec<NumberedRecord>,
    ) -> Result<u32, TransportError>;

    /// Asks whether ids are durable on `min_durable` replicas; one answer each, in order.
    async fn have(
        &self,
        head: WindowHead,
        ids: Vec<ChunkId>,
    ) -> Result<Vec<Presence>, TransportError>;

    /// Asks whether ids are durable on this node alone (storage nodes only).
    async fn have_local(&self, ids: Vec<ChunkId>) -> Result<Vec<Presence>, TransportError>;

    /// Reads records; `None` where this node has no readable copy. The caller verifies.
    async fn get(&self, ids: Vec<ChunkId>) -> Result<Vec<Option<Record>>, TransportError>;

    /// Closes a window; gives signed receipts, the node's own first.
    async fn barrier(
        &self,
        head: WindowHead,
        pgs: Vec<(PgId, u32)>,
    ) -> Result<Vec<Bytes>, TransportError>;

    /// Keeps a record under a name; gives the signed receipt.
    async fn put_named(
        &self,
        space: Space,
        key: Vec<u8>,
        fence: u64,
        record: Record,
    ) -> Result<Bytes, TransportError>;

    /// The named records of a prefix, in key order, one after the other. However many there are and however slowly they
    /// are taken, no more of them are in memory than flow control lets through.
    fn stream_named(&self, space: Space, prefix: Vec<u8>) -> NamedStream<'_>;

    /// The named records of a prefix, in key order, all in memory: for prefixes of one job or point.
    async fn list_named(
        &self,
        space: Space,
        prefix: Vec<u8>,
    ) -> Result<Vec<NamedRecord>, TransportError> {
        self.stream_named(space, prefix).try_collect().await
    }

    /// The names of a space after `after`, in key order, each with its fence; empty at the end (storage nodes only, and only
    /// where [`Opened::version`] is 2 at least).
    async fn list_names(
        &self,
        space: Space,
        after: Vec<u8>,
    ) -> Result<Vec<(Vec<u8>, u64)>, TransportError>;

    /// Ids of a PG on this node after `after`, in order; empty at the end (storage nodes only).
    async fn list_pg(&self, pg: PgId, after: ChunkId) -> Result<Vec<ChunkId>, TransportError>;

    /// Whether the connection is gone.
    fn is_closed(&self) -> bool;

    /// Ends the session.
    fn close(&self);
}
