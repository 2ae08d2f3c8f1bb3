//! The Raft log in sled: entries by big-endian index, vote and marks beside them. Nothing is acknowledged before it was
//! flushed.
#![expect(clippy::result_large_err, reason = "openraft asks for this error type")]

use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};

use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{
    AnyError, ErrorSubject, ErrorVerb, OptionalSend, RaftLogId, RaftLogReader, StorageIOError, Vote,
};
use serde::de::DeserializeOwned;

use super::store::encode;
use super::{Entry, LogId, StorageError, Types};

/// Clones share one log.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    log: sled::Tree,
    meta: sled::Tree,
}

const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";

impl LogStore {
    pub(super) fn new(log: sled::Tree, meta: sled::Tree) -> Self {
        Self { log, meta }
    }

    /// Whether it holds neither a vote nor an entry, and never did.
    pub(super) fn is_empty(&self) -> sled::Result<bool> {
        Ok(self.log.is_empty()
            && !self.meta.contains_key(VOTE)?
            && !self.meta.contains_key(PURGED)?)
    }

    fn mark<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StorageError> {
        match self.meta.get(name).map_err(read)? {
            Some(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(read),
            None => Ok(None),
        }
    }

    async fn flush(&self) -> Result<(), StorageError> {
        // One database below both trees: this flushes both.
        self.log.flush_async().await.map(drop).map_err(write)
    }
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        let key = |bound: Bound<&u64>| match bound {
            Bound::Included(index) => Bound::Included(index.to_be_bytes()),
            Bound::Excluded(index) => Bound::Excluded(index.to_be_bytes()),
            Bound::Unbounded => Bound::Unbounded,
        };
        self.log
            .range((key(range.start_bound()), key(range.end_bound())))
            .map(|found| {
                let (_, bytes) = found.map_err(read)?;
                serde_json::from_slice(&bytes).map_err(read)
            })
            .collect()
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, StorageError> {
        let purged: Option<LogId> = self.mark(PURGED)?;
        let last = match self.log.last().map_err(read)? {
            Some((_, bytes)) => {
                let entry: Entry = serde_json::from_slice(&bytes).map_err(read)?;
                Some(*entry.get_log_id())
            }
            None => purged,
        };
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError> {
        self.meta.insert(VOTE, encode(vote)).map_err(write)?;
        self.flush().await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError> {
        self.mark(VOTE)
    }

    /// Not flushed: a restart with an older mark only waits for the leader to tell it again.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        self.meta.insert(COMMITTED, encode(&committed)).map(drop).map_err(write)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        Ok(self.mark::<Option<LogId>>(COMMITTED)?.flatten())
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: LogFlushed<Types>,
    ) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut batch = sled::Batch::default();
        for entry in entries {
            batch.insert(&entry.get_log_id().index.to_be_bytes(), encode(&entry));
        }
        self.log.apply_batch(batch).map_err(write)?;
        self.flush().await?;
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        // From the end: a crash between two removals leaves no hole.
        let from = log_id.index.to_be_bytes();
        for key in self.log.range(from..).keys().rev() {
            self.log.remove(key.map_err(read)?).map_err(write)?;
        }
        self.flush().await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        self.meta.insert(PURGED, encode(&log_id)).map_err(write)?;
        self.flush().await?;
        for key in self.log.range(..=log_id.index.to_be_bytes()).keys() {
            self.log.remove(key.map_err(read)?).map_err(write)?;
        }
        self.flush().await
    }
}

fn read<E: std::error::Error + 'static>(error: E) -> StorageError {
    StorageIOError::new(ErrorSubject::Logs, ErrorVerb::Read, AnyError::new(&error)).into()
}

fn write<E: std::error::Error + 'static>(error: E) -> StorageError {
    StorageIOError::new(ErrorSubject::Logs, ErrorVerb::Write, AnyError::new(&error)).into()
}
