//! Why storage did not do what was asked.

use outrider_proto::frame::{Refusal, Space};
use outrider_proto::ids::{ChunkId, PgId};

/// A request that one storage node did not answer as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// No connection.
    #[error(
        "storage node {node} cannot be reached at {address}: {why}; check that it runs and that UDP to this port is not blocked"
    )]
    Unreachable {
        /// Node.
        node: String,
        /// Addresses tried.
        address: String,
        /// The last answer.
        why: String,
    },
    /// Somebody answered at the node's address who is not the node.
    #[error(
        "at {address} answers {found}, not storage node {node}: correct the node's advertised address, or its certificate"
    )]
    WrongPeer {
        /// Node expected.
        node: String,
        /// Address.
        address: String,
        /// Who answered.
        found: String,
    },
    /// The connection broke, or the node went silent.
    #[error("the connection to storage node {node} was lost: {why}")]
    Lost {
        /// Node.
        node: String,
        /// Why.
        why: String,
    },
    /// The node refused.
    #[error("storage node {node} refused: {message}")]
    Refused {
        /// Node.
        node: String,
        /// Class.
        refusal: Refusal,
        /// Its sentence.
        message: String,
    },
    /// The node answered something that is no answer.
    #[error("storage node {node} broke the protocol: {what}; upgrade the older of the two")]
    Protocol {
        /// Node.
        node: String,
        /// What was wrong.
        what: String,
    },
}

impl TransportError {
    /// The refusal, if the node refused.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Refused { refusal, .. } => Some(*refusal),
            _ => None,
        }
    }

    /// Whether the session cannot be used any more.
    #[must_use]
    pub fn ends_session(&self) -> bool {
        match self {
            Self::Refused { refusal, .. } => matches!(
                refusal,
                Refusal::StaleLayout | Refusal::UnknownSession | Refusal::Unavailable | Refusal::Io
            ),
            _ => true,
        }
    }
}

/// Why the storage tier did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The coordinator has not made a layout yet.
    #[error(
        "there is no storage layout yet: start enough storage nodes and wait until they have joined"
    )]
    NoLayout,
    /// No replica of a PG answers. May succeed later.
    #[error("no storage node that keeps placement group {pg} can be used: {last}", last = .last.as_ref().map_or_else(|| "none is known".to_owned(), ToString::to_string))]
    NoReplica {
        /// PG.
        pg: PgId,
        /// What the last node tried said.
        last: Option<TransportError>,
    },
    /// Too few nodes took or listed a named record. May succeed later.
    #[error("{got} of the {needed} storage nodes needed for {space:?} records answered: {last}", last = .last.as_ref().map_or_else(|| "no more nodes are known".to_owned(), ToString::to_string))]
    TooFewNodes {
        /// Space.
        space: Space,
        /// Nodes that answered.
        got: usize,
        /// Nodes needed.
        needed: usize,
        /// What the last node that failed said.
        last: Option<TransportError>,
    },
    /// What was sent is there, and the nodes that keep it do not confirm that it is durable. May succeed later.
    #[error("storage nodes do not confirm that what was sent is durable: {reason}")]
    Unconfirmed {
        /// What the last one said.
        reason: String,
    },
    /// A newer lease wrote: stop.
    #[error("storage node {node} refused a write of this job, since {message}")]
    Fenced {
        /// Node.
        node: String,
        /// Its sentence.
        message: String,
    },
    /// Refused on purpose; the same will be refused again.
    #[error("storage node {node} refused: {message}")]
    Refused {
        /// Node.
        node: String,
        /// Class.
        refusal: Refusal,
        /// Its sentence.
        message: String,
    },
    /// Every replica was asked, none has a readable copy.
    #[error("no replica of placement group {pg} has a readable copy of chunk {id:?}{}: start the storage nodes that are down", .last.as_ref().map_or_else(String::new, |l| format!(" ({l})")))]
    Missing {
        /// Chunk.
        id: ChunkId,
        /// Its PG.
        pg: PgId,
        /// What the last node that could not be asked said.
        last: Option<TransportError>,
    },
    /// The job's store was closed.
    #[error("the job's connection to storage was closed")]
    Closed,
}

impl StoreError {
    /// Whether the same request may succeed later, when nodes have come back.
    #[must_use]
    pub fn may_succeed_later(&self) -> bool {
        matches!(
            self,
            Self::NoLayout
                | Self::NoReplica { .. }
                | Self::TooFewNodes { .. }
                | Self::Unconfirmed { .. }
        )
    }

    /// What the last node asked refused with, if it refused.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Refused { refusal, .. } => Some(*refusal),
            Self::NoReplica { last, .. }
            | Self::TooFewNodes { last, .. }
            | Self::Missing { last, .. } => last.as_ref().and_then(TransportError::refusal),
            Self::NoLayout | Self::Unconfirmed { .. } | Self::Fenced { .. } | Self::Closed => None,
        }
    }

    /// A refusal that no other replica would take back, as an error of the store.
    pub(crate) fn final_refusal(error: &TransportError) -> Option<Self> {
        let TransportError::Refused { node, refusal, message } = error else { return None };
        let (node, message, refusal) = (node.clone(), message.clone(), *refusal);
        match refusal {
            Refusal::Fenced => Some(Self::Fenced { node, message }),
            Refusal::Denied | Refusal::Protocol => Some(Self::Refused { node, refusal, message }),
            _ => None,
        }
    }
}

/// Why a window could not be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BarrierError {
    /// These ids are not durable and have to be sent again; all others of the window are.
    #[error("{} records sent since the last barrier are not durable and have to be sent again: {reason}", ids.len())]
    Lost {
        /// The ids, each once.
        ids: Vec<ChunkId>,
        /// What happened to them.
        reason: String,
    },
    /// Nobody could be asked what is there; nothing is forgotten, the same call may succeed later.
    #[error(transparent)]
    Store(#[from] StoreError),
}
