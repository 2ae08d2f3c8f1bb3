//! The one thread that writes: appends in order, syncs in groups, indexes after the sync, and stops for good at the first
//! error of the disk.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use outrider_format::entry::Name;
use outrider_proto::ids::ChunkId;
use outrider_proto::record::{self, Record};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::error::StoreError;
use crate::index::Location;
use crate::named::fence_key;
use crate::segment::writer::{AppendError, SegmentSet};

use super::{Append, Shared};

type Done = oneshot::Sender<Result<(), StoreError>>;

/// What a record is found by.
#[derive(Debug)]
pub(super) enum FoundBy {
    Id(ChunkId),
    Name { space: u8, key: Vec<u8> },
}

/// What the thread is asked to do.
pub(super) enum Command {
    Append { records: Vec<Append>, _permit: OwnedSemaphorePermit, done: Done },
    Named { name: Name, append: Append, done: Done },
    Sync { done: Done },
    Damaged { found_by: FoundBy, at: Location, why: String, done: Done },
}

/// Bytes between two looks at the free space.
const LOOK_EVERY: u64 = 32 << 20;

/// State of the writing thread.
pub(super) struct Committer {
    set: SegmentSet,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    waiters: Vec<Done>,
    /// Written, not yet synced.
    pending: Vec<(ChunkId, Location)>,
    pending_ids: HashSet<ChunkId>,
    pending_names: Vec<(Name, ChunkId, Location)>,
    pending_fences: HashMap<Vec<u8>, u64>,
    unsynced: u64,
    since_look: u64,
}

impl Committer {
    pub(super) fn new(
        set: SegmentSet,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let mut committer = Self {
            set,
            shared,
            commands,
            waiters: Vec::new(),
            pending: Vec::new(),
            pending_ids: HashSet::new(),
            pending_names: Vec::new(),
            pending_fences: HashMap::new(),
            unsynced: 0,
            since_look: LOOK_EVERY,
        };
        committer.look_at_space();
        committer.publish();
        committer
    }

    /// Runs until the store is dropped; what was taken in is durable then.
    pub(super) fn run(mut self) {
        while let Some(first) = self.commands.blocking_recv() {
            self.handle(first);
            while self.unsynced < self.shared.config.sync_bytes {
                match self.commands.try_recv() {
                    Ok(next) => self.handle(next),
                    Err(_) => break,
                }
            }
            if !self.waiters.is_empty() || self.unsynced >= self.shared.config.sync_bytes {
                self.commit();
            }
        }
        self.commit();
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Append { records, done, .. } => {
                let taken = self.append_all(&records);
                // Nobody waits any more: the records are kept all the same.
                let _ = done.send(taken);
            }
            Command::Named { name, append, done } => match self.named(&name, &append) {
                Ok(()) => self.waiters.push(done),
                Err(error) => drop(done.send(Err(error))),
            },
            Command::Sync { done } => self.waiters.push(done),
            Command::Damaged { found_by, at, why, done } => {
                // The reader may have gone: what it found is true all the same.
                let _ = done.send(self.forget(&found_by, at, &why));
            }
        }
    }

    fn append_all(&mut self, records: &[Append]) -> Result<(), StoreError> {
        for append in records {
            let id = append.record.id();
            // A second copy is no work; it is durable when the first one is.
            if self.pending_ids.contains(&id) {
                continue;
            }
            let known = self.shared.index.get(&id).map_err(|e| self.shared.tables(&e))?;
            if known.is_some() {
                continue;
            }
            let at = self.write(append, None)?;
            self.pending.push((id, at));
            self.pending_ids.insert(id);
        }
        Ok(())
    }

    fn named(&mut self, name: &Name, append: &Append) -> Result<(), StoreError> {
        let fences = fence_key(name.space, &name.key);
        let durable =
            self.shared.named.fence(name.space, &name.key).map_err(|e| self.shared.tables(&e))?;
        let seen = durable.max(self.pending_fences.get(&fences).copied().unwrap_or(0));
        if name.fence < seen {
            return Err(StoreError::Fenced { seen, given: name.fence });
        }
        let known =
            self.shared.named.get(name.space, &name.key).map_err(|e| self.shared.tables(&e))?;
        if known.is_some_and(|k| k.id == append.record.id() && k.fence == name.fence) {
            return Ok(());
        }
        let at = self.write(append, Some(name))?;
        self.pending_names.push((name.clone(), append.record.id(), at));
        self.pending_fences.insert(fences, name.fence);
        Ok(())
    }

    /// A record whose bytes are damaged is known no longer, so that a good copy is taken in again: from whoever puts it, or
    /// from another replica. This thread does it because only its own writes may come between the look and the removal.
    /// The place is counted once: whoever finds it a second time finds it forgotten.
    ///
    /// A restart may bring the place back, since the footer of its segment lists it: its next reader has it forgotten again.
    /// A good copy that was taken in meanwhile is in a later place, and later places win.
    fn forget(&self, found_by: &FoundBy, at: Location, why: &str) -> Result<(), StoreError> {
        let shared = &self.shared;
        let known = match found_by {
            FoundBy::Id(id) => shared.index.remove(id, &at),
            FoundBy::Name { space, key } => shared.named.remove(*space, key, &at),
        };
        if known.map_err(|e| shared.tables(&e))? {
            shared.damaged.fetch_add(1, Ordering::Relaxed);
            tracing::error!(segment = %at.segment, offset = at.offset, why, ?found_by, "a durable record is damaged: this node no longer answers for it; another replica has to give its copy");
        }
        Ok(())
    }

    fn write(&mut self, append: &Append, name: Option<&Name>) -> Result<Location, StoreError> {
        let node = || self.shared.config.node.clone();
        if let Some(why) = self.shared.failed.get() {
            return Err(StoreError::Failed { node: node(), why: why.clone() });
        }
        let bytes = record_bytes(&append.record);
        self.since_look += bytes;
        if self.since_look >= LOOK_EVERY {
            self.look_at_space();
        }
        let free = self.shared.free_bytes.load(Ordering::Relaxed);
        if free < self.shared.config.min_free.saturating_add(bytes) {
            self.since_look = LOOK_EVERY;
            self.shared.full.store(true, Ordering::Relaxed);
            return Err(StoreError::Full { node: self.shared.config.node.clone() });
        }
        match self.set.append(&append.provenance, name, &append.record) {
            Ok(at) => {
                self.unsynced += bytes;
                self.shared.full.store(false, Ordering::Relaxed);
                self.shared.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
                Ok(at)
            }
            Err(AppendError::Full(_)) => {
                self.shared.full.store(true, Ordering::Relaxed);
                Err(StoreError::Full { node: self.shared.config.node.clone() })
            }
            Err(AppendError::Failed(error)) => Err(self.fail(&format!("write: {error}"))),
        }
    }

    fn commit(&mut self) {
        let outcome = self.try_commit();
        for waiter in self.waiters.drain(..) {
            // A waiter that went away needs no answer.
            let _ = waiter.send(outcome.clone());
        }
    }

    fn try_commit(&mut self) -> Result<(), StoreError> {
        if let Some(why) = self.shared.failed.get() {
            let node = self.shared.config.node.clone();
            return Err(StoreError::Failed { node, why: why.clone() });
        }
        if self.unsynced == 0 && self.pending.is_empty() && self.pending_names.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.set.sync() {
            return Err(self.fail(&format!("sync: {error}")));
        }
        let through: Vec<_> = self.set.lengths().collect();
        let indexed = self.shared.index.insert(&self.pending, &through);
        let named = self
            .pending_names
            .iter()
            .try_for_each(|(name, id, at)| self.shared.named.insert(name, *id, *at));
        if let Err(error) = indexed.and(named) {
            return Err(self.fail(&error.to_string()));
        }
        self.pending.clear();
        self.pending_ids.clear();
        self.pending_names.clear();
        self.pending_fences.clear();
        self.unsynced = 0;
        self.shared.commits.fetch_add(1, Ordering::Relaxed);
        self.publish();
        Ok(())
    }

    fn look_at_space(&mut self) {
        match self.set.free_space() {
            Ok(free) => self.shared.free_bytes.store(free, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "the free space of the disk cannot be read"),
        }
        self.since_look = 0;
    }

    fn publish(&self) {
        self.shared.segments.store(self.set.count(), Ordering::Relaxed);
    }

    fn fail(&self, why: &str) -> StoreError {
        let node = self.shared.config.node.clone();
        tracing::error!(
            node,
            why,
            "the store stops taking writes; restart the node after its disk was checked"
        );
        let why = self.shared.failed.get_or_init(|| why.to_owned()).clone();
        StoreError::Failed { node, why }
    }
}

fn record_bytes(record: &Record) -> u64 {
    (record.bytes().len() + record::HEADER_LEN) as u64
}
