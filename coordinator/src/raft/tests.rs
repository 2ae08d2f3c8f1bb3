//! openraft's own suite over our store, and what a restart finds.

use std::time::Duration;

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::testing::{StoreBuilder, Suite};
use openraft::{CommittedLeaderId, EntryPayload, RaftLogReader, RaftSnapshotBuilder, Vote};

use super::log_store::LogStore;
use super::state_machine::StateMachine;
use super::store::Store;
use super::{Entry, LogId, StorageError, Types};
use crate::state::hosts::Attached;
use crate::state::{Change, Command};

struct Builder;

impl StoreBuilder<Types, LogStore, StateMachine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, StateMachine), StorageError> {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("a new database opens");
        Ok((dir, store.log, store.machine))
    }
}

#[test]
fn the_store_keeps_what_openraft_asks_of_it() {
    Suite::test_all(Builder).expect("the suite passes");
}

fn entry(index: u64) -> Entry {
    let attached = Attached {
        host: format!("hv{index}"),
        realm: "r".into(),
        version: "1".into(),
        hypervisor: "hyperv".into(),
        boot_id: index,
        started_ms: 0,
        key: String::new(),
    };
    let command = Command { at_ms: index, change: Change::HostAttached(attached) };
    Entry { log_id: log_id(index), payload: EntryPayload::Normal(command) }
}

fn log_id(index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(1, 1), index)
}

/// sled releases its lock a moment after the last handle is gone.
fn reopen(dir: &std::path::Path) -> Store {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        match Store::open(dir) {
            Ok(store) => return store,
            Err(error) if std::time::Instant::now() > deadline => panic!("{error}"),
            Err(_) => std::thread::yield_now(),
        }
    }
}

#[tokio::test]
async fn log_vote_and_snapshot_survive_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let expected = {
        let mut store = reopen(dir.path());
        store.log.save_vote(&Vote::new(3, 1)).await.expect("saved");
        store.log.blocking_append((1..=10).map(entry)).await.expect("appended");
        store.machine.apply((1..=7).map(entry)).await.expect("applied");
        let snapshot = store.machine.build_snapshot().await.expect("built");
        assert_eq!(snapshot.meta.last_log_id, Some(log_id(7)));
        store.log.purge(log_id(5)).await.expect("purged");
        store.replica.read(Clone::clone)
    };
    let mut store = reopen(dir.path());
    assert_eq!(store.log.read_vote().await.expect("read"), Some(Vote::new(3, 1)));
    let state = store.log.get_log_state().await.expect("read");
    assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(log_id(5)), Some(log_id(10))));
    let entries = store.log.try_get_log_entries(..).await.expect("read");
    assert_eq!(entries.len(), 5);
    assert_eq!(store.machine.applied_state().await.expect("read").0, Some(log_id(7)));
    assert_eq!(store.replica.read(Clone::clone), expected);
}

#[tokio::test]
async fn a_snapshot_carries_the_whole_state_to_another_member() {
    let (a, b) = (tempfile::tempdir().expect("a"), tempfile::tempdir().expect("b"));
    let (mut from, mut to) = (reopen(a.path()), reopen(b.path()));
    from.machine.apply((1..=50).map(entry)).await.expect("applied");
    let snapshot = from.machine.build_snapshot().await.expect("built");
    to.machine.install_snapshot(&snapshot.meta, snapshot.snapshot).await.expect("installed");
    assert_eq!(from.replica.read(Clone::clone), to.replica.read(Clone::clone));
    let kept = to.machine.get_current_snapshot().await.expect("read").expect("there");
    assert_eq!(kept.meta, snapshot.meta);
    drop(to);
    assert_eq!(reopen(b.path()).replica.read(|s| s.hosts.len()), 50);
}

#[test]
fn a_database_of_a_later_release_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    drop(reopen(dir.path()));
    {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let db = loop {
            match sled::open(dir.path()) {
                Ok(db) => break db,
                Err(error) if std::time::Instant::now() > deadline => panic!("{error}"),
                Err(_) => std::thread::yield_now(),
            }
        };
        let meta = db.open_tree("meta").expect("opens");
        meta.insert("format", "999").expect("written");
        meta.flush().expect("flushed");
    }
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let text = loop {
        match Store::open(dir.path()).map(drop) {
            Err(super::StoreError::Newer { found, .. }) => break found.to_string(),
            other if std::time::Instant::now() > deadline => panic!("{other:?}"),
            _ => std::thread::yield_now(),
        }
    };
    assert_eq!(text, "999");
}
