//! QUIC frames between agents, storage nodes and operators' restores. ALPN `outrider-chunk/1`.
//!
//! A frame is `length u32 (of what follows) · type u8 · body`. The first bidirectional stream of a connection carries
//! [`Frame::Hello`] both ways (frozen for ever), then [`Frame::Open`] and [`Frame::Opened`]. After that each request has a
//! bidirectional stream of its own: the client sends its request frames and finishes the stream; the server answers and
//! finishes. Many requests may be in flight. See `docs/protocol.md` for the order of frames of each request.
//!
//! | request | frames up | frames down |
//! | --- | --- | --- |
//! | put | `Put`, then `Chunk`... | `PutDone` |
//! | have | `Have` | `HaveAnswer` |
//! | get | `Get` | `Chunk` or `Missing` for each id, in order |
//! | barrier | `Barrier` | `Receipts` |
//! | put named | `PutNamed` | `Named` |
//! | list named | `ListNamed` | `NamedRecord`... then `End` |
//! | list PG (storage nodes only) | `ListPg` | `PgIds`... then `End` |
//! | list names (storage nodes only, from version 2) | `ListNames` | `Names` |
//! | any | | `Refused` instead of the answer |

mod coding;

use bytes::Bytes;

use crate::ids::{ChunkId, FabricId, JobId, LayoutEpoch, NodeIncarnation, PgId, SessionId, Window};
use crate::record::{HEADER_LEN, MAX_PAYLOAD};
use crate::wire::DecodeError;

/// ALPN protocol id.
pub const ALPN: &[u8] = b"outrider-chunk/1";
/// Protocol version spoken by this release. 2 has [`Frame::ListNames`] and [`Frame::Names`].
pub const PROTOCOL_VERSION: u16 = 2;
/// Oldest version that this release understands.
pub const OLDEST_VERSION: u16 = 1;
/// Largest frame: the largest record with its prefix, rounded up. Checked before anything is allocated.
pub const MAX_FRAME_LEN: usize = HEADER_LEN + MAX_PAYLOAD + 1024;
/// Most ids in one `Have`, `Get` or `PgIds`: 1 MiB of ids.
pub const MAX_IDS: usize = 32_768;
/// Most names in one `Names`: some 600 KiB of the longest keys.
pub const MAX_NAMES: usize = 8192;
/// Longest key of a named record.
pub const MAX_KEY_LEN: usize = 64;

/// Close codes of connections and reset codes of streams, one an error class.
pub mod close {
    /// Normal end.
    pub const DONE: u32 = 0;
    /// The peer broke the protocol.
    pub const PROTOCOL: u32 = 1;
    /// Certificate or ticket refused.
    pub const DENIED: u32 = 2;
    /// The node is shutting down: use another replica.
    pub const GOING_AWAY: u32 = 3;
}

/// The version that both sides of a session speak: the highest one that neither has left behind. `None`: there is none.
#[must_use]
pub const fn common_version(version: u16, oldest: u16) -> Option<u16> {
    let common = if version < PROTOCOL_VERSION { version } else { PROTOCOL_VERSION };
    if common >= oldest && common >= OLDEST_VERSION { Some(common) } else { None }
}

/// Where named records live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Space {
    /// Root records, key = point id.
    Root = 1,
    /// Journal entries, key = job id, then sequence as big-endian u32.
    Journal = 2,
    /// Copies of the coordinator's state, key = chosen by the coordinator.
    State = 3,
}

/// Answer of `Have` for one id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Presence {
    /// Not known here, or condemned: send it.
    No = 0,
    /// Durable on `min_durable` replicas at this layout epoch.
    Yes = 1,
    /// Cannot tell (index being rebuilt, replicas not reachable): send it.
    Unknown = 2,
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Refusal {
    /// The request was malformed or out of order.
    Protocol = 1,
    /// Ticket or certificate does not allow it.
    Denied = 2,
    /// The layout epoch of the request is not the node's: fetch the layout.
    StaleLayout = 3,
    /// This node keeps no replica of the PG.
    NotAReplica = 4,
    /// A newer lease wrote here: the caller is superseded.
    Fenced = 5,
    /// No space, or read-only.
    Full = 6,
    /// Too few replicas answered: wait and try again.
    TooFewReplicas = 7,
    /// The node cannot serve right now: use another replica.
    Unavailable = 8,
    /// A disk error at the node.
    Io = 9,
    /// The session or window is not known (the node restarted): ask for what was sent and send what is missing.
    UnknownSession = 10,
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// First frame both ways; its bytes are frozen.
    Hello {
        /// Protocol version wanted.
        version: u16,
        /// Oldest version that is understood.
        oldest: u16,
        /// 1 agent, 2 storage node, 3 operator, 4 coordinator.
        role: u8,
    },
    /// Opens the session of this connection. The ticket is empty for storage nodes.
    Open {
        /// Session chosen by the client.
        session: SessionId,
        /// Layout that the client works under.
        layout_epoch: LayoutEpoch,
        /// Ticket, see [`crate::ticket`].
        ticket: Bytes,
    },
    /// The session is open.
    Opened {
        /// Fabric.
        fabric: FabricId,
        /// Node's name.
        node: String,
        /// Node's incarnation: when it changes, receipts are void.
        incarnation: NodeIncarnation,
        /// Layout that the node works under.
        layout_epoch: LayoutEpoch,
    },
    /// Announces chunks of a window. `origin` is set by a storage node that forwards.
    Put {
        /// Job.
        job: JobId,
        /// Session that numbered the chunks.
        session: SessionId,
        /// Window.
        window: Window,
        /// Layout epoch of the numbering.
        layout_epoch: LayoutEpoch,
    },
    /// One record. In a put: its PG and number within the window; in an answer both are zero.
    Chunk {
        /// PG.
        pg: PgId,
        /// 1.. within (session, window, PG).
        sequence: u32,
        /// The sealed record.
        record: Bytes,
    },
    /// The put was taken in (not yet durable: see `Barrier`).
    PutDone {
        /// Chunks taken.
        taken: u32,
    },
    /// Asks whether ids are durable. Counted as `haves` of the window where the answer is yes.
    Have {
        /// Job.
        job: JobId,
        /// Session.
        session: SessionId,
        /// Window.
        window: Window,
        /// Layout epoch.
        layout_epoch: LayoutEpoch,
        /// Ids, all of PGs that the node keeps.
        ids: Vec<ChunkId>,
    },
    /// One answer for each id, in order.
    HaveAnswer {
        /// Answers.
        answers: Vec<Presence>,
    },
    /// Asks for records.
    Get {
        /// Ids.
        ids: Vec<ChunkId>,
    },
    /// This id is not (or not readable) here.
    Missing {
        /// Id.
        id: ChunkId,
    },
    /// Makes a window durable: answered when `min_durable` replicas of every PG have synced it.
    Barrier {
        /// Job.
        job: JobId,
        /// Session.
        session: SessionId,
        /// Window, closed by this.
        window: Window,
        /// Layout epoch.
        layout_epoch: LayoutEpoch,
        /// Per PG: puts sent (numbers 1..=puts).
        pgs: Vec<(PgId, u32)>,
        /// W3C trace context of the job, so that one trace reaches the fsync; empty: none.
        traceparent: String,
    },
    /// Signed receipts, one a replica, this node's first.
    Receipts {
        /// Encoded [`crate::receipt::Receipt`]s.
        receipts: Vec<Bytes>,
    },
    /// Keeps a record under a name, durable when answered.
    PutNamed {
        /// Space.
        space: Space,
        /// Key.
        key: Vec<u8>,
        /// A lower fence than the highest seen for the key's first 16 bytes is refused.
        fence: u64,
        /// Record.
        record: Bytes,
    },
    /// Signed receipt of a named record.
    Named {
        /// Encoded [`crate::receipt::NamedReceipt`].
        receipt: Bytes,
    },
    /// Asks for the named records whose key starts with `prefix`, in key order.
    ListNamed {
        /// Space.
        space: Space,
        /// Prefix.
        prefix: Vec<u8>,
    },
    /// A named record.
    NamedRecord {
        /// Key.
        key: Vec<u8>,
        /// Fence it was written under.
        fence: u64,
        /// Record.
        record: Bytes,
    },
    /// End of a list.
    End,
    /// Storage nodes only: ids of a PG, from `after` (exclusive) in id order.
    ListPg {
        /// PG.
        pg: PgId,
        /// Where to go on; the hole id to start.
        after: ChunkId,
    },
    /// Some ids of a PG.
    PgIds {
        /// Ids in order.
        ids: Vec<ChunkId>,
    },
    /// Storage nodes only: whether ids are fsynced on this node alone. Answered with `HaveAnswer`.
    HaveLocal {
        /// Ids.
        ids: Vec<ChunkId>,
    },
    /// Storage nodes only, from version 2: the names of a space, from `after` (exclusive) in key order.
    ListNames {
        /// Space.
        space: Space,
        /// Where to go on; empty to start.
        after: Vec<u8>,
    },
    /// Some names of a space, without their records; none: the end of the space.
    Names {
        /// Keys in order, each with the fence it was written under. At most [`MAX_NAMES`].
        names: Vec<(Vec<u8>, u64)>,
    },
    /// The request was refused.
    Refused {
        /// Class.
        refusal: Refusal,
        /// One sentence: what, why, what to do.
        message: String,
    },
}

/// A frame that cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length field exceeds [`MAX_FRAME_LEN`]: nothing was allocated.
    #[error("frame of {len} bytes announced, at most {MAX_FRAME_LEN} allowed")]
    TooLong {
        /// Announced length.
        len: usize,
    },
    /// The body is malformed.
    #[error("frame of type {kind} is malformed")]
    Malformed {
        /// Frame type.
        kind: u8,
        /// Why.
        #[source]
        source: DecodeError,
    },
}

impl Frame {
    /// Name for logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "Hello",
            Self::Open { .. } => "Open",
            Self::Opened { .. } => "Opened",
            Self::Put { .. } => "Put",
            Self::Chunk { .. } => "Chunk",
            Self::PutDone { .. } => "PutDone",
            Self::Have { .. } => "Have",
            Self::HaveAnswer { .. } => "HaveAnswer",
            Self::Get { .. } => "Get",
            Self::Missing { .. } => "Missing",
            Self::Barrier { .. } => "Barrier",
            Self::Receipts { .. } => "Receipts",
            Self::PutNamed { .. } => "PutNamed",
            Self::Named { .. } => "Named",
            Self::ListNamed { .. } => "ListNamed",
            Self::NamedRecord { .. } => "NamedRecord",
            Self::End => "End",
            Self::ListPg { .. } => "ListPg",
            Self::PgIds { .. } => "PgIds",
            Self::HaveLocal { .. } => "HaveLocal",
            Self::ListNames { .. } => "ListNames",
            Self::Names { .. } => "Names",
            Self::Refused { .. } => "Refused",
        }
    }

    /// Checks an announced length.
    ///
    /// # Errors
    /// [`FrameError::TooLong`].
    pub fn check_len(len: u32) -> Result<usize, FrameError> {
        let len = len as usize;
        if len == 0 || len > MAX_FRAME_LEN {
            return Err(FrameError::TooLong { len });
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests;
