//! A job's journal in storage: written as leaves are finished, read by whoever continues.
//!
//! Entries are named `(job, sequence)` and fenced by the lease epoch. They are optimistic: an adopter asks storage for
//! every id before it relies on one. What stands before the last [`JournalStart`] of the wanted checkpoint is void.

use std::collections::HashMap;
use std::sync::Arc;

use outrider_proto::frame::Space;
use outrider_proto::ids::{CheckpointId, ChunkId, JobId, LeaseEpoch};
use outrider_proto::journal::{JournalClear, JournalEntry, JournalLayer, JournalStart};
use outrider_proto::seal::Sealer;

use crate::store::{JobStore, StoreError};

/// Most leaves in one entry: keeps a record small.
const LEAVES_PER_ENTRY: usize = 4096;

/// Why the journal cannot be written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JournalError {
    /// Storage.
    #[error("the job's journal cannot be used: {0}")]
    Store(#[from] StoreError),
    /// An entry cannot be sealed.
    #[error("an entry of the job's journal cannot be sealed: {0}")]
    Seal(#[from] outrider_proto::journal::JournalError),
}

/// What a journal says about one checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adopted {
    /// What is read, and against which base.
    pub start: JournalStart,
    /// Layers of user checkpoints that were begun; their leaves are numbered behind the disks of the start.
    pub layers: Vec<JournalLayer>,
    /// Leaf pages by (disk, leaf).
    pub leaves: HashMap<(usize, u64), ChunkId>,
    /// Manifest of a commit that was about to happen.
    pub manifest: Option<ChunkId>,
    /// Reference points that existed before the checkpoint was to be converted.
    pub before_conversion: Option<BeforeConversion>,
}

/// The reference points of the VM before its checkpoint was to be converted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BeforeConversion {
    /// All, by the hypervisor's ids.
    pub all: Vec<String>,
    /// The bound one.
    pub bound: Option<String>,
}

/// A job's journal as it was found.
#[derive(Debug, Clone, Default)]
pub struct Journal {
    entries: Vec<(JournalClear, JournalEntry)>,
}

impl Journal {
    /// Reads the journal of a job. Entries that do not open are skipped and logged: what they named is read again.
    ///
    /// # Errors
    /// [`JournalError::Store`].
    pub async fn read(
        store: &dyn JobStore,
        sealer: &Sealer,
        job: JobId,
    ) -> Result<Self, JournalError> {
        let named = store.list_named(Space::Journal, &job.to_bytes()).await?;
        let mut entries = Vec::with_capacity(named.len());
        for record in named {
            match JournalEntry::open(sealer, &record.record) {
                Ok((clear, entry)) if clear.job == job => entries.push((clear, entry)),
                Ok(_) => tracing::warn!(%job, "a journal entry of another job was ignored"),
                Err(e) => tracing::warn!(%job, error = %e, "a journal entry was ignored"),
            }
        }
        entries.sort_by_key(|(clear, _)| clear.sequence);
        Ok(Self { entries })
    }

    /// The number that the next entry gets.
    #[must_use]
    pub fn next_sequence(&self) -> u32 {
        self.entries.last().map_or(0, |(clear, _)| clear.sequence.saturating_add(1))
    }

    /// What is known of a checkpoint; `None` when nothing was begun on it.
    #[must_use]
    pub fn of(&self, checkpoint: CheckpointId) -> Option<Adopted> {
        let mut found: Option<Adopted> = None;
        for (_, entry) in self.entries.iter().filter(|(clear, _)| clear.checkpoint == checkpoint) {
            match (entry, found.as_mut()) {
                (JournalEntry::Start(start), _) if start.checkpoint == checkpoint => {
                    found = Some(Adopted {
                        start: start.clone(),
                        layers: Vec::new(),
                        leaves: HashMap::new(),
                        manifest: None,
                        before_conversion: None,
                    });
                }
                (JournalEntry::Leaves(leaves), Some(adopted)) => {
                    for (disk, leaf, page) in leaves {
                        adopted.leaves.insert((*disk as usize, *leaf), *page);
                    }
                }
                (JournalEntry::Layers(layers), Some(adopted)) => {
                    adopted.layers.extend(layers.iter().cloned());
                }
                (JournalEntry::Committing { manifest }, Some(adopted)) => {
                    adopted.manifest = Some(*manifest);
                }
                (JournalEntry::Converting { reference_points, bound }, Some(adopted)) => {
                    adopted.before_conversion = Some(BeforeConversion {
                        all: reference_points.clone(),
                        bound: (!bound.is_empty()).then(|| bound.clone()),
                    });
                }
                _ => {}
            }
        }
        found
    }

    /// What is known of the checkpoint that was begun last.
    #[must_use]
    pub fn latest(&self) -> Option<Adopted> {
        let starts = self.entries.iter().rev();
        let last = starts.filter_map(|(_, e)| match e {
            JournalEntry::Start(start) => Some(start.checkpoint),
            _ => None,
        });
        last.take(1).find_map(|checkpoint| self.of(checkpoint))
    }
}

/// Appends to a journal under one lease, for one checkpoint.
pub struct JournalWriter {
    store: Arc<dyn JobStore>,
    sealer: Sealer,
    job: JobId,
    checkpoint: CheckpointId,
    lease_epoch: LeaseEpoch,
    next: u32,
}

impl JournalWriter {
    /// Goes on behind `journal`.
    #[must_use]
    pub fn after(
        journal: &Journal,
        store: Arc<dyn JobStore>,
        sealer: Sealer,
        job: JobId,
        checkpoint: CheckpointId,
        lease_epoch: LeaseEpoch,
    ) -> Self {
        Self { store, sealer, job, checkpoint, lease_epoch, next: journal.next_sequence() }
    }

    /// Appends an entry; durable when this returns.
    ///
    /// # Errors
    /// [`JournalError`]; [`StoreError::Fenced`] within means that a newer lease has written.
    pub async fn append(&mut self, entry: &JournalEntry) -> Result<(), JournalError> {
        let clear = JournalClear {
            sequence: self.next,
            job: self.job,
            checkpoint: self.checkpoint,
            lease_epoch: self.lease_epoch,
        };
        let record = entry.seal(&self.sealer, &clear)?;
        let mut key = self.job.to_bytes().to_vec();
        key.extend_from_slice(&self.next.to_be_bytes());
        self.store.put_named(Space::Journal, key, self.lease_epoch.0, record).await?;
        self.next += 1;
        Ok(())
    }

    /// Appends finished leaves.
    ///
    /// # Errors
    /// As [`JournalWriter::append`].
    pub async fn leaves(&mut self, leaves: &[(u32, u64, ChunkId)]) -> Result<(), JournalError> {
        for part in leaves.chunks(LEAVES_PER_ENTRY) {
            self.append(&JournalEntry::Leaves(part.to_vec())).await?;
        }
        Ok(())
    }
}
