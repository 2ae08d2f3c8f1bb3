//! The member's database, and the replicated state as it stands here.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use openraft::StoredMembership;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::LogId;
use super::admission::{Admission, MARK};
use super::log_store::LogStore;
use super::state_machine::StateMachine;
use crate::state::State;

/// Version of what this release stores.
pub(super) const FORMAT: u32 = 1;

/// A database that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// sled refuses.
    #[error(
        "cannot open the coordinator's database in {path}; check the disk, or restore the directory from a copy"
    )]
    Open {
        /// Directory.
        path: PathBuf,
        /// Why.
        source: sled::Error,
    },
    /// A record does not read back.
    #[error(
        "the coordinator's database in {path} is damaged ({what}); remove the directory, and this member is filled anew by the others"
    )]
    Damaged {
        /// Directory.
        path: PathBuf,
        /// Which record.
        what: &'static str,
    },
    /// Written by a later release.
    #[error(
        "the database in {path} has format {found}, this program reads up to {FORMAT}; use the release that wrote it"
    )]
    Newer {
        /// Directory.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

impl StoreError {
    /// Whether somebody has the database open.
    pub(crate) fn is_locked(&self) -> bool {
        // sled wraps the system's answer in an error of another kind, with this text in front.
        let text = "could not acquire lock";
        matches!(self, Self::Open { source: sled::Error::Io(error), .. } if error.to_string().contains(text))
    }
}

/// The two halves that openraft wants, and the state to read from.
pub(crate) struct Store {
    pub(crate) log: LogStore,
    pub(crate) machine: StateMachine,
    pub(crate) replica: Replica,
    pub(super) admission: Admission,
}

/// The replicated state on this member. Cheap to clone; reading never waits for I/O.
#[derive(Clone)]
pub(crate) struct Replica {
    applied: Arc<RwLock<Applied>>,
    changed: watch::Sender<u64>,
}

/// The state with its place in the log: the content of a snapshot.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Applied {
    pub(super) last: Option<LogId>,
    pub(super) membership: StoredMembership<u64, openraft::BasicNode>,
    pub(super) state: State,
}

impl Store {
    /// Opens or creates the database in `dir`.
    ///
    /// # Errors
    /// [`StoreError`]; nothing to retry before somebody acted.
    pub(crate) fn open(dir: &Path) -> Result<Self, StoreError> {
        let open = |source| StoreError::Open { path: dir.to_owned(), source };
        let db = sled::Config::new()
            .path(dir)
            // The state lives in memory; the log is read from front to back.
            .cache_capacity(16 << 20)
            .open()
            .map_err(open)?;
        let meta = db.open_tree("meta").map_err(open)?;
        match meta.get("format").map_err(open)? {
            None => {
                meta.insert("format", encode(&FORMAT)).map_err(open)?;
                meta.flush().map_err(open)?;
            }
            Some(bytes) => {
                let found: u32 = decode(dir, "format", &bytes)?;
                if found > FORMAT {
                    return Err(StoreError::Newer { path: dir.to_owned(), found });
                }
            }
        }
        let snapshots = db.open_tree("snapshot").map_err(open)?;
        let applied = match StateMachine::stored(&snapshots).map_err(open)? {
            Some((_, content)) => decode(dir, "snapshot", &content)?,
            None => Applied::default(),
        };
        let log = LogStore::new(db.open_tree("log").map_err(open)?, meta.clone());
        let empty = applied.last.is_none() && log.is_empty().map_err(open)?;
        let mark = meta.get(MARK).map_err(open)?;
        let mark = mark.map(|bytes| decode(dir, MARK, &bytes)).transpose()?;
        let admission = Admission::new(meta, mark, empty);
        let replica = Replica::new(applied);
        let machine = StateMachine::new(snapshots, replica.clone());
        Ok(Self { log, machine, replica, admission })
    }
}

impl Replica {
    fn new(applied: Applied) -> Self {
        let changed = watch::Sender::new(applied.last.map_or(0, |id| id.index));
        Self { applied: Arc::new(RwLock::new(applied)), changed }
    }

    /// Looks at the state. Keep it short: nothing is applied meanwhile.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.applied.read().unwrap_or_else(PoisonError::into_inner).state)
    }

    /// Tells of every applied entry (its index).
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn with_applied<T>(&self, look: impl FnOnce(&Applied) -> T) -> T {
        look(&self.applied.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn update<T>(&self, change: impl FnOnce(&mut Applied) -> T) -> T {
        let (result, index) = {
            let mut applied = self.applied.write().unwrap_or_else(PoisonError::into_inner);
            (change(&mut applied), applied.last.map_or(0, |id| id.index))
        };
        self.changed.send_replace(index);
        result
    }
}

pub(super) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("our types have text keys only and serialise always")
}

fn decode<T: DeserializeOwned>(
    dir: &Path,
    what: &'static str,
    bytes: &[u8],
) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|_| StoreError::Damaged { path: dir.to_owned(), what })
}
