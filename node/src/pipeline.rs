//! A disk into a tree of chunks: read -> zero-detect -> hash -> ask -> seal -> send, with bounded buffers.
//!
//! | file | idea |
//! | --- | --- |
//! | `pool` | worker threads and bytes in flight, shared by all jobs of the host |
//! | `plan` | which leaf pages and chunks have to be looked at: pure |
//! | `parent` | the tree of the parent point, fetched along the changed paths only |
//! | `leaf` | one leaf page (128 chunks): the unit of work |
//! | `run` | several leaves in flight, barriers, the journal, what has to be done again |
//! | `tree` | inner pages up to the root; subtrees that did not change are taken from the parent |
//! | `recheck` | after storage lost receipts: ask again, read again, send again |
//! | `sample` | is what tracking calls unchanged really unchanged? |
//! | `adopt` | leaves that an earlier attempt on the same checkpoint has stored |
//! | `stats` | figures |

mod adopt;
mod leaf;
mod parent;
pub mod plan;
mod pool;
mod recheck;
mod run;
pub mod sample;
mod stats;
mod tree;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outrider_disk::{DiskError, ReadDisk};
use outrider_proto::frame::Presence;
use outrider_proto::ids::ChunkId;
use outrider_proto::record::{Kind, Record};
use outrider_proto::seal::{SealError, Sealer};
use outrider_proto::wire::DecodeError;

pub use parent::ParentTree;
pub(crate) use parent::fetch_page;
pub use plan::DiskPlan;
pub use pool::{Pool, PoolError, Turns};
pub use stats::{Stats, StatsSnapshot};
pub use tree::TreeRoot;

use crate::journal::{JournalError, JournalWriter};
use crate::lease::{Lease, LeaseLost};
use crate::store::{JobStore, StoreError};

/// Why a pipeline stopped.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// A source cannot be read.
    #[error("the source cannot be read: {0}")]
    Source(#[from] DiskError),
    /// Storage.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Sealing or opening a record failed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A page of the parent is malformed.
    #[error("page {id:?} of the parent recovery point is malformed: {source}")]
    Page {
        /// Page.
        id: ChunkId,
        /// Why.
        source: DecodeError,
    },
    /// A page is not where the tree says.
    #[error("page {id:?} is no page of level {level}")]
    WrongPage {
        /// Page.
        id: ChunkId,
        /// Level expected.
        level: u8,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A worker thread failed.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The lease is over.
    #[error(transparent)]
    Lease(#[from] LeaseLost),
    /// Storage goes on losing what is sent.
    #[error(
        "storage lost records again and again ({rounds} rounds): a storage node seems to restart all the time; look at \
         the storage nodes' logs"
    )]
    KeepsLosing {
        /// Rounds tried.
        rounds: u32,
    },
}

/// Bounds of a pipeline.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Size of one read, bytes; a multiple of the chunk size is made of it.
    pub read_size: usize,
    /// Sealed bytes between two barriers.
    pub barrier_bytes: u64,
    /// Longest time between two barriers while something is sent.
    pub barrier_interval: Duration,
}

/// A disk to be captured.
pub struct DiskJob {
    /// Its bytes.
    pub source: Arc<dyn ReadDisk>,
    /// What to look at.
    pub plan: DiskPlan,
}

/// A leaf page that is finished: its id, and its children as long as they may have to be looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeafDone {
    pub(crate) key: LeafKey,
    pub(crate) page: ChunkId,
    pub(crate) children: Vec<ChunkId>,
}

/// (disk, leaf).
pub(crate) type LeafKey = (usize, u64);

/// A journal that the pipeline and the phases around it append to.
pub type SharedJournal = Arc<tokio::sync::Mutex<JournalWriter>>;

/// Everything of one job's capture: feeds disks in, gives tree roots out.
pub struct Pipeline {
    store: Arc<dyn JobStore>,
    sealer: Sealer,
    pool: Pool,
    turns: Turns,
    lease: Lease,
    stats: Arc<Stats>,
    bounds: Bounds,
    chunk_size: u32,
    disks: Vec<DiskJob>,
    parents: Vec<tokio::sync::Mutex<ParentTree>>,
    journal: Option<SharedJournal>,
    /// The number of each disk in the journal.
    numbers: Vec<u32>,
    /// Leaves of an earlier attempt on this checkpoint, as its journal tells.
    journalled: HashMap<LeafKey, ChunkId>,
    /// Whether an earlier attempt has read from this checkpoint.
    resumed: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// New leaves of this job by disk.
    leaves: Vec<BTreeMap<u64, ChunkId>>,
    /// Leaves that have to be read whole, since what their parent's page refers to is not there any more.
    forced: HashSet<LeafKey>,
    /// Subtrees taken from the parent: id -> where.
    reused: HashMap<ChunkId, (usize, u8, u64)>,
    /// Records other than leaf pages and data, kept to be sent again: inner pages, configuration, the manifest.
    small: HashMap<ChunkId, Record>,
    /// Data put since the barrier before the last: another copy in flight need not be sent.
    recent: [HashSet<ChunkId>; 2],
    /// Ids that a barrier reported lost, with the number of that report.
    lost: HashMap<ChunkId, u64>,
    losses: u64,
}

impl Pipeline {
    /// A pipeline over the disks of one checkpoint.
    #[must_use]
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        store: Arc<dyn JobStore>,
        sealer: Sealer,
        pool: Pool,
        lease: Lease,
        stats: Arc<Stats>,
        bounds: Bounds,
        chunk_size: u32,
        disks: Vec<DiskJob>,
    ) -> Self {
        let parents = disks
            .iter()
            .map(|d| {
                let root = d.plan.parent_root();
                tokio::sync::Mutex::new(ParentTree::new(
                    store.clone(),
                    sealer.clone(),
                    root,
                    d.plan.root_level(),
                ))
            })
            .collect();
        let numbers = (0..).take(disks.len()).collect();
        let state = State { leaves: vec![BTreeMap::new(); disks.len()], ..State::default() };
        Self {
            store,
            sealer,
            turns: pool.turns(),
            pool,
            lease,
            stats,
            bounds,
            chunk_size,
            disks,
            parents,
            journal: None,
            numbers,
            journalled: HashMap::new(),
            resumed: false,
            state: Mutex::new(state),
        }
    }

    /// Writes finished leaves to this journal, and takes what it holds already.
    #[must_use]
    pub fn with_journal(
        mut self,
        journal: SharedJournal,
        journalled: HashMap<(usize, u64), ChunkId>,
    ) -> Self {
        self.journal = Some(journal);
        self.journalled = journalled;
        self
    }

    /// Journals the disks under these numbers instead of 0, 1, ...: one for each disk.
    #[must_use]
    pub fn numbered(mut self, numbers: Vec<u32>) -> Self {
        self.numbers = numbers;
        self
    }

    /// Says that an earlier attempt has read from this checkpoint: what storage has of a leaf that it did not finish counts
    /// as read again.
    #[must_use]
    pub fn resumed(mut self, resumed: bool) -> Self {
        self.resumed = resumed;
        self
    }

    /// Figures so far.
    #[must_use]
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Puts a record that is no data chunk of a disk, unless storage has it, and remembers it so that it can be sent
    /// again.
    ///
    /// # Errors
    /// [`PipelineError`].
    pub async fn put_small(&self, record: Record) -> Result<(), PipelineError> {
        let id = record.id();
        self.state().small.insert(id, record.clone());
        if self.store.have(&[id]).await?[0] != Presence::Yes {
            self.put(record).await?;
        }
        Ok(())
    }

    /// Seals and puts a configuration file's bytes; gives its chunks.
    ///
    /// # Errors
    /// [`PipelineError`].
    pub async fn put_file(&self, bytes: &[u8]) -> Result<Vec<ChunkId>, PipelineError> {
        let mut ids = Vec::new();
        for chunk in bytes.chunks(self.chunk_size as usize) {
            if outrider_proto::seal::is_zero(chunk) {
                ids.push(ChunkId::HOLE);
                continue;
            }
            let id = self.sealer.chunk_id(chunk);
            self.put_small(self.sealer.seal(Kind::Data, id, &[], chunk)?).await?;
            ids.push(id);
        }
        Ok(ids)
    }

    async fn put(&self, record: Record) -> Result<(), PipelineError> {
        let length = record.bytes().len() as u64;
        self.store.put(record).await?;
        self.stats.sent(length);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Only plain inserts and removals happen while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
