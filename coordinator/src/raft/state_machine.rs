//! The state machine: the state in memory, rebuilt at a start from the last snapshot and the log behind it.

use std::io::Cursor;
use std::sync::{Arc, Mutex, PoisonError};

use openraft::storage::{RaftStateMachine, Snapshot};
use openraft::{
    AnyError, BasicNode, EntryPayload, OptionalSend, RaftSnapshotBuilder, SnapshotMeta,
    StorageIOError, StoredMembership,
};

use super::store::{Applied, Replica, encode};
use super::{Entry, LogId, StorageError, Types};
use crate::state::Outcome;

/// Clones share one state.
#[derive(Clone)]
pub(crate) struct StateMachine {
    snapshots: sled::Tree,
    replica: Replica,
    /// Held while a snapshot takes the place of another.
    storing: Arc<Mutex<()>>,
}

const META: &str = "meta";
const CONTENT: &str = "content";

impl StateMachine {
    pub(super) fn new(snapshots: sled::Tree, replica: Replica) -> Self {
        Self { snapshots, replica, storing: Arc::default() }
    }

    /// The last snapshot: its meta record and its content.
    pub(super) fn stored(
        snapshots: &sled::Tree,
    ) -> Result<Option<(sled::IVec, sled::IVec)>, sled::Error> {
        Ok(snapshots.get(META)?.zip(snapshots.get(CONTENT)?))
    }

    /// On disk when it returns: the log before it may be purged. Never in the place of a newer one: a snapshot is built beside
    /// the one that a leader sends, and the log between them may be gone by then.
    async fn store(
        &self,
        meta: &SnapshotMeta<u64, BasicNode>,
        content: &[u8],
    ) -> Result<(), StorageError> {
        {
            let _turn = self.storing.lock().unwrap_or_else(PoisonError::into_inner);
            let stored = self.snapshots.get(META).map_err(|e| failed(&e))?;
            let stored: Option<SnapshotMeta<u64, BasicNode>> = stored
                .map(|meta| serde_json::from_slice(&meta))
                .transpose()
                .map_err(|e| failed(&e))?;
            if stored.is_some_and(|stored| stored.last_log_id > meta.last_log_id) {
                return Ok(());
            }
            let mut batch = sled::Batch::default();
            batch.insert(META, encode(meta));
            batch.insert(CONTENT, content);
            self.snapshots.apply_batch(batch).map_err(|e| failed(&e))?;
        }
        self.snapshots.flush_async().await.map_err(|e| failed(&e))?;
        Ok(())
    }
}

impl RaftStateMachine<Types> for StateMachine {
    type SnapshotBuilder = Self;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId>, StoredMembership<u64, BasicNode>), StorageError> {
        Ok(self.replica.with_applied(|applied| (applied.last, applied.membership.clone())))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Outcome>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        Ok(self.replica.update(|applied| {
            entries
                .into_iter()
                .map(|entry| {
                    applied.last = Some(entry.log_id);
                    match entry.payload {
                        EntryPayload::Blank => Outcome::Done,
                        EntryPayload::Normal(command) => applied.state.apply(command),
                        EntryPayload::Membership(membership) => {
                            applied.membership =
                                StoredMembership::new(Some(entry.log_id), membership);
                            Outcome::Done
                        }
                    }
                })
                .collect()
        }))
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, BasicNode>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError> {
        let content = snapshot.into_inner();
        let received: Applied = serde_json::from_slice(&content).map_err(|e| failed(&e))?;
        self.store(meta, &content).await?;
        self.replica.update(|applied| *applied = received);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, StorageError> {
        let Some((meta, content)) = Self::stored(&self.snapshots).map_err(|e| failed(&e))? else {
            return Ok(None);
        };
        let meta = serde_json::from_slice(&meta).map_err(|e| failed(&e))?;
        Ok(Some(Snapshot { meta, snapshot: Box::new(Cursor::new(content.to_vec())) }))
    }
}

impl RaftSnapshotBuilder<Types> for StateMachine {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, StorageError> {
        // Encoding a large state takes long; nobody waits for it, neither for the state nor for the thread.
        let applied = self.replica.with_applied(Applied::clone);
        let (last_log_id, last_membership) = (applied.last, applied.membership.clone());
        let content =
            tokio::task::spawn_blocking(move || encode(&applied)).await.map_err(|e| failed(&e))?;
        let snapshot_id = last_log_id.map_or_else(
            || "empty".to_owned(),
            |id| format!("{}-{}-{}", id.leader_id.term, id.leader_id.node_id, id.index),
        );
        let meta = SnapshotMeta { last_log_id, last_membership, snapshot_id };
        self.store(&meta, &content).await?;
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(content)) })
    }
}

fn failed<E: std::error::Error + 'static>(error: &E) -> StorageError {
    StorageIOError::write_snapshot(None, AnyError::new(error)).into()
}
