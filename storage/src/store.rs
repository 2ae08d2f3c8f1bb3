//! The store of a node: what it took in, what of that is durable, and where.
//!
//! One thread writes (`committer`); everybody reads. An id is known here only after its bytes are synced.

mod committer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use outrider_format::entry::{Name, Provenance};
use outrider_process::clock::{Clock, SystemClock};
use outrider_process::fs::{self, DirLock, FsError};
use outrider_proto::frame::Space;
use outrider_proto::ids::{ChunkId, FabricId, NodeIncarnation};
use outrider_proto::record::Record;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::error::{OpenError, StoreError};
use crate::index::{ChunkIndex, IndexError, Location, MemoryIndex, SledIndex};
use crate::named::{NamedEntry, NamedTable};
use crate::segment::disk::{Disk, SystemDisk};
use crate::segment::reader::SegmentReader;
use crate::segment::recovery::recover;
use crate::segment::writer::{SegmentPlace, SegmentSet};

use self::committer::{Command, Committer, FoundBy};

/// Which chunk index a store uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexKind {
    /// On disk, in sled.
    Sled,
    /// In memory, rebuilt at every start.
    Memory,
}

/// Sizes of a store.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Fabric.
    pub fabric: FabricId,
    /// Name of the node.
    pub node: String,
    /// A segment is sealed before it would grow beyond this.
    pub segment_size: u64,
    /// A group commit happens at the latest when this many bytes wait for it.
    pub sync_bytes: u64,
    /// Bytes of records in line for the writing thread.
    pub queue_bytes: usize,
    /// With less free space than this nothing new is taken.
    pub min_free: u64,
    /// Chunk index.
    pub index: IndexKind,
    /// Cache of the tables, bytes.
    pub table_cache: u64,
}

impl StoreConfig {
    /// The usual sizes.
    #[must_use]
    pub fn new(fabric: FabricId, node: impl Into<String>) -> Self {
        Self {
            fabric,
            node: node.into(),
            segment_size: 256 << 20,
            sync_bytes: 16 << 20,
            queue_bytes: 32 << 20,
            min_free: 256 << 20,
            index: IndexKind::Sled,
            table_cache: 32 << 20,
        }
    }
}

/// A record to append, with its conditions.
#[derive(Debug, Clone)]
pub struct Append {
    /// Conditions.
    pub provenance: Provenance,
    /// Record; its payload hash has been checked.
    pub record: Record,
}

/// Figures of a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreStatus {
    /// Bytes of all segments.
    pub stored_bytes: u64,
    /// Free bytes of the disk.
    pub free_bytes: u64,
    /// Durable chunks.
    pub chunks: u64,
    /// Segment files.
    pub segments: u64,
    /// Damaged ranges known.
    pub damaged: u64,
    /// Group commits so far.
    pub commits: u64,
    /// Why the store stopped taking writes.
    pub failed: Option<String>,
    /// Whether the last write was refused for lack of space.
    pub full: bool,
}

pub(crate) struct Shared {
    config: StoreConfig,
    index: Arc<dyn ChunkIndex>,
    named: NamedTable,
    failed: OnceLock<String>,
    stored_bytes: AtomicU64,
    free_bytes: AtomicU64,
    segments: AtomicU64,
    damaged: AtomicU64,
    commits: AtomicU64,
    full: std::sync::atomic::AtomicBool,
}

/// The store. Dropping it makes everything durable that was taken in, and ends its thread.
pub struct Store {
    shared: Arc<Shared>,
    reader: Arc<SegmentReader>,
    incarnation: NodeIncarnation,
    commands: Option<mpsc::Sender<Command>>,
    queue: Arc<Semaphore>,
    thread: Mutex<Option<JoinHandle<()>>>,
    db: sled::Db,
    dir: PathBuf,
    _lock: DirLock,
}

impl Store {
    /// Opens the store in a folder, or makes it. Recovers whatever a crash left; takes the next incarnation.
    ///
    /// # Errors
    /// [`OpenError`]. Blocks while segments are read.
    pub fn open(dir: &Path, config: StoreConfig) -> Result<Self, OpenError> {
        Self::open_on(dir, config, Arc::new(SystemDisk))
    }

    /// As [`Store::open`], on another disk.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on(
        dir: &Path,
        config: StoreConfig,
        disk: Arc<dyn Disk>,
    ) -> Result<Self, OpenError> {
        fs::create_dir_durable(dir)?;
        let lock = DirLock::acquire(dir)?;
        let segments = dir.join("segments");
        fs::create_dir_durable(&segments)?;
        let incarnation = next_incarnation(&dir.join("incarnation"))?;
        let db = open_tables(&dir.join("tables"), config.table_cache)?;
        let tables = |error: IndexError| OpenError::Segment {
            path: dir.join("tables"),
            source: std::io::Error::other(error.to_string()),
        };
        let named = NamedTable::open(&db).map_err(tables)?;
        let index: Arc<dyn ChunkIndex> = match config.index {
            IndexKind::Memory => Arc::new(MemoryIndex::default()),
            IndexKind::Sled => {
                let tree = db.open_tree("chunks").map_err(|e| tables(e.into()))?;
                Arc::new(SledIndex::open(tree).map_err(tables)?)
            }
        };
        let place = SegmentPlace {
            dir: segments.clone(),
            fabric: config.fabric,
            node: config.node.clone(),
            incarnation,
            segment_size: config.segment_size,
            disk,
        };
        let recovered = recover(&place, &*index, &named)?;
        let report = &recovered.report;
        tracing::info!(
            %incarnation,
            chunks = index.count(),
            segments = report.sealed + recovered.open.len() as u64,
            indexed = report.indexed,
            cut_bytes = report.cut_bytes,
            damaged = report.damage.len(),
            "store opened"
        );
        let shared = Arc::new(Shared {
            named,
            index,
            failed: OnceLock::new(),
            stored_bytes: AtomicU64::new(report.stored_bytes),
            free_bytes: AtomicU64::new(u64::MAX),
            segments: AtomicU64::new(0),
            damaged: AtomicU64::new(report.damage.len() as u64),
            commits: AtomicU64::new(0),
            full: false.into(),
            config,
        });
        let set = SegmentSet::new(
            place,
            recovered.open,
            recovered.generation,
            recovered.next,
            recovered.report.sealed,
        )
        .map_err(|source| OpenError::Segment { path: segments.clone(), source })?;
        let (commands, receiver) = mpsc::channel(1024);
        let committer = Committer::new(set, Arc::clone(&shared), receiver);
        let thread = std::thread::Builder::new()
            .name("store-commit".to_owned())
            .spawn(move || committer.run())
            .map_err(|source| OpenError::Segment { path: segments.clone(), source })?;
        Ok(Self {
            queue: Arc::new(Semaphore::new(shared.config.queue_bytes.max(1))),
            shared,
            reader: Arc::new(SegmentReader::new(segments)),
            incarnation,
            commands: Some(commands),
            thread: Mutex::new(Some(thread)),
            db,
            dir: dir.to_owned(),
            _lock: lock,
        })
    }

    /// The incarnation of this process.
    #[must_use]
    pub fn incarnation(&self) -> NodeIncarnation {
        self.incarnation
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Appends records that are not there yet. When it returns they are written, not yet durable: see [`Store::sync`].
    /// Waits while too many bytes are in line.
    ///
    /// # Errors
    /// [`StoreError::Full`]: some of the records may have been taken, none of them may be counted.
    pub async fn append(&self, records: Vec<Append>) -> Result<(), StoreError> {
        let bytes: usize = records.iter().map(|a| a.record.bytes().len()).sum();
        let wanted = bytes.clamp(1, self.shared.config.queue_bytes.max(1));
        let permit = Arc::clone(&self.queue)
            .acquire_many_owned(u32::try_from(wanted).unwrap_or(u32::MAX))
            .await
            .map_err(|_| self.closed())?;
        self.ask(|done| Command::Append { records, _permit: permit, done }).await
    }

    /// Makes everything durable whose append has returned. Many waiters share one sync.
    ///
    /// # Errors
    /// [`StoreError::Failed`]: nothing may be believed to be durable that was not before.
    pub async fn sync(&self) -> Result<(), StoreError> {
        self.ask(|done| Command::Sync { done }).await
    }

    /// Keeps a record under a name; durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] when a newer fence was seen for the first 16 bytes of the key.
    pub async fn put_named(
        &self,
        name: Name,
        provenance: Provenance,
        record: Record,
    ) -> Result<(), StoreError> {
        self.ask(|done| Command::Named { name, append: Append { provenance, record }, done }).await
    }

    /// Whether a chunk is durable here.
    ///
    /// # Errors
    /// [`StoreError::Tables`].
    pub fn contains(&self, id: &ChunkId) -> Result<bool, StoreError> {
        Ok(self.shared.index.get(id).map_err(|e| self.shared.tables(&e))?.is_some())
    }

    /// Reads a durable chunk; `None` when it is not here or cannot be read. Damaged bytes are counted and reported, and when
    /// this returns their id is known here no longer.
    ///
    /// # Errors
    /// [`StoreError::Tables`].
    pub async fn get(&self, id: ChunkId) -> Result<Option<Record>, StoreError> {
        let found = self.shared.index.get(&id).map_err(|e| self.shared.tables(&e))?;
        let Some(at) = found else { return Ok(None) };
        Ok(self.read(id, at, FoundBy::Id(id)).await)
    }

    /// Up to `limit` durable ids after `after` and not after `last`, in order.
    ///
    /// # Errors
    /// [`StoreError::Tables`].
    pub fn list(
        &self,
        after: ChunkId,
        last: ChunkId,
        limit: usize,
    ) -> Result<Vec<ChunkId>, StoreError> {
        self.shared.index.list(after, last, limit).map_err(|e| self.shared.tables(&e))
    }

    /// The named records of a prefix, in key order, without their bytes.
    ///
    /// # Errors
    /// [`StoreError::Tables`].
    pub fn list_named(&self, space: Space, prefix: &[u8]) -> Result<Vec<NamedEntry>, StoreError> {
        self.shared.named.list(space as u8, prefix).map_err(|e| self.shared.tables(&e))
    }

    /// Up to `limit` names of a space after `after`, in key order, without their bytes.
    ///
    /// # Errors
    /// [`StoreError::Tables`].
    pub fn list_names(
        &self,
        space: Space,
        after: &[u8],
        limit: usize,
    ) -> Result<Vec<NamedEntry>, StoreError> {
        let listed = self.shared.named.list_after(space as u8, after, limit);
        listed.map_err(|e| self.shared.tables(&e))
    }

    /// The entry of a name.
    ///
    /// # Errors
    /// [`StoreError::Tables`].
    pub fn find_named(&self, space: Space, key: &[u8]) -> Result<Option<NamedEntry>, StoreError> {
        self.shared.named.get(space as u8, key).map_err(|e| self.shared.tables(&e))
    }

    /// The bytes of a named record; `None` when they cannot be read. As with [`Store::get`], damaged ones are known no
    /// longer.
    pub async fn get_named(&self, space: Space, entry: &NamedEntry) -> Option<Record> {
        let found_by = FoundBy::Name { space: space as u8, key: entry.key.clone() };
        self.read(entry.id, entry.location, found_by).await
    }

    /// Figures of this moment.
    #[must_use]
    pub fn status(&self) -> StoreStatus {
        let s = &self.shared;
        StoreStatus {
            stored_bytes: s.stored_bytes.load(Ordering::Relaxed),
            free_bytes: s.free_bytes.load(Ordering::Relaxed),
            chunks: s.index.count(),
            segments: s.segments.load(Ordering::Relaxed),
            damaged: s.damaged.load(Ordering::Relaxed),
            commits: s.commits.load(Ordering::Relaxed),
            failed: s.failed.get().cloned(),
            full: s.full.load(Ordering::Relaxed),
        }
    }

    /// Makes everything durable and ends the thread. Blocks.
    pub fn close(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.commands = None;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the writing thread of the store panicked");
        }
        if let Err(error) =
            self.shared.index.flush().and(self.db.flush().map(drop).map_err(Into::into))
        {
            tracing::warn!(%error, "the tables were not flushed; the next start rebuilds what is missing");
        }
    }

    async fn read(&self, id: ChunkId, at: Location, found_by: FoundBy) -> Option<Record> {
        use std::io::ErrorKind::{InvalidData, UnexpectedEof};
        let reader = Arc::clone(&self.reader);
        let read = tokio::task::spawn_blocking(move || reader.read(at)).await;
        let why = match read {
            Ok(Ok((_, record))) if record.id() == id => return Some(record),
            Ok(Ok((_, other))) => format!("record {:?} is in its place", other.id()),
            Ok(Err(error)) if matches!(error.kind(), InvalidData | UnexpectedEof) => {
                error.to_string()
            }
            // The disk does not say what the bytes are: they may be good when it answers again.
            Ok(Err(error)) => return self.unreadable(at, &error),
            Err(error) => return self.unreadable(at, &error),
        };
        let forgotten = self.ask(|done| Command::Damaged { found_by, at, why, done }).await;
        if let Err(error) = forgotten {
            tracing::error!(%error, segment = %at.segment, offset = at.offset, "a damaged record could not be taken out of the tables");
        }
        None
    }

    fn unreadable(&self, at: Location, error: &dyn std::fmt::Display) -> Option<Record> {
        tracing::error!(segment = %at.segment, offset = at.offset, %error, "a durable record cannot be read; a replica has to give its copy");
        None
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Command,
    ) -> Result<T, StoreError> {
        let (done, answer) = oneshot::channel();
        let Some(commands) = &self.commands else { return Err(self.closed()) };
        commands.send(command(done)).await.map_err(|_| self.closed())?;
        answer.await.map_err(|_| self.closed())?
    }

    fn closed(&self) -> StoreError {
        match self.shared.failed.get() {
            Some(why) => {
                StoreError::Failed { node: self.shared.config.node.clone(), why: why.clone() }
            }
            None => StoreError::Closed { node: self.shared.config.node.clone() },
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.commands.is_some() {
            self.end();
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Shared {
    fn tables(&self, error: &IndexError) -> StoreError {
        StoreError::Tables { node: self.config.node.clone(), why: error.to_string() }
    }
}

/// The incarnation of this start, durable before it is used: more than the last one, and not less than the wall clock in
/// milliseconds. The clock is what makes a folder that was emptied, or set back to an older snapshot, another incarnation
/// than the one whose receipts speak of what was lost with it. Were it set back, too, the number would be an older one, and
/// the coordinator refuses those.
fn next_incarnation(path: &Path) -> Result<NodeIncarnation, OpenError> {
    let last = match std::fs::read_to_string(path) {
        Ok(text) => text.trim().parse::<u64>().map_err(|_| OpenError::State {
            path: path.to_owned(),
            found: text.clone(),
            expected: "a number",
        })?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => return Err(FsError::io("read", path)(error).into()),
    };
    let next = last.saturating_add(1).max(SystemClock::new().unix_millis());
    fs::write_atomic(path, format!("{next}\n").as_bytes())?;
    Ok(NodeIncarnation(next))
}

/// Opens sled; tables that do not open are made anew, since the segments hold everything that is in them.
fn open_tables(dir: &Path, cache: u64) -> Result<sled::Db, OpenError> {
    let open = || sled::Config::new().path(dir).cache_capacity(cache).open();
    match open() {
        Ok(db) => Ok(db),
        Err(error) => {
            tracing::warn!(%error, path = %dir.display(), "the tables do not open; they are rebuilt from the segments");
            match std::fs::remove_dir_all(dir) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(FsError::io("remove", dir)(e).into());
                }
                _ => {}
            }
            open().map_err(|source| OpenError::Tables { path: dir.to_owned(), source })
        }
    }
}
