//! Raft: openraft over a log in sled, a state machine in memory with snapshots in sled, and gRPC between members.
//!
//! Everything that is stored or sent is JSON of types that grow by optional fields, so that members of two releases
//! understand each other during an upgrade.

mod admission;
mod inquiry;
mod log_store;
mod member;
mod network;
mod service;
mod state_machine;
mod store;

#[cfg(test)]
mod tests;

use std::io::Cursor;

pub(crate) use inquiry::settle;
pub use member::StartError;
pub(crate) use member::{Member, ProposeError, RaftTimes};
pub(crate) use service::RaftService;
pub(crate) use store::Store;
pub use store::StoreError;

use crate::state::{Command, Outcome};

openraft::declare_raft_types!(
    /// openraft's types, filled in.
    pub(crate) Types:
        D = Command,
        R = Outcome,
        NodeId = u64,
        Node = openraft::BasicNode,
        Entry = openraft::Entry<Types>,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = openraft::TokioRuntime,
);

pub(crate) type Raft = openraft::Raft<Types>;
pub(crate) type StorageError = openraft::StorageError<u64>;
pub(crate) type LogId = openraft::LogId<u64>;
pub(crate) type Entry = openraft::Entry<Types>;
