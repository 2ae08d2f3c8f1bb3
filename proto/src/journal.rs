//! The journal of a job: which leaf pages of which checkpoint are finished, so that whoever continues on the same
//! checkpoint reads only what is missing.
//!
//! Entries are records of kind journal, named `(job, sequence)` in the storage nodes' journal space and fenced by the lease
//! epoch. Clear bytes: version u16 (1), zero u16, sequence u32, job 16, checkpoint 16, lease epoch u64 (48 bytes). The sealed
//! body is a version (16 bits) and a [`JournalEntry`] in postcard encoding.

use serde::{Deserialize, Serialize};

use crate::ids::{CheckpointId, ChunkId, DiskId, JobId, LeaseEpoch, PointId};
use crate::record::{Kind, Record};
use crate::seal::{SealError, Sealer};
use crate::wire::{DecodeError, Put, Reader};

/// Version of the sealed body that is written when nothing was left out of the disks.
pub const JOURNAL_VERSION: u16 = 1;
/// Version of a [`JournalStart`] with [`JournalStart::excluded`] behind it. A release that does not know it takes the journal
/// for not begun and starts over, as it must.
const VERSION_WITH_EXCLUDED: u16 = 2;
/// Version of a [`JournalEntry::Layers`]. A release that does not know it skips the entry, and the leaves that only it
/// gives a meaning to: it reads the checkpoints again, or keeps none.
const VERSION_OF_LAYERS: u16 = 3;

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JournalEntry {
    /// The first entry: what is read, and against which base. Valid for this checkpoint only.
    Start(JournalStart),
    /// Leaf pages that were put, as (disk index, leaf index, page id).
    Leaves(Vec<(u32, u64, ChunkId)>),
    /// About to be committed with this manifest: lets a later attempt bind the point without reading the checkpoint.
    Committing {
        /// Manifest.
        manifest: ChunkId,
    },
    /// The checkpoint is about to be converted; these reference points existed before. One that is there afterwards
    /// and was not recorded as ours is of unknown origin: it may be removed, and is never bound.
    Converting {
        /// The hypervisor's ids.
        reference_points: Vec<String>,
        /// The one that was bound; empty: none. To be removed once the new one is bound.
        bound: String,
    },
    /// Layers of user checkpoints that are about to be read. Their leaves are journalled under the numbers that follow those
    /// of the disks of the start and of earlier such entries.
    Layers(Vec<JournalLayer>),
}

/// A layer of a user checkpoint: a disk that it froze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalLayer {
    /// The user checkpoint.
    pub checkpoint: CheckpointId,
    /// VirtualDiskId.
    pub disk_id: DiskId,
    /// Slot.
    pub slot: String,
    /// Size, bytes.
    pub size: u64,
    /// The files of the frozen chain as they were, leaf first; leaves are taken over only while they are the same.
    pub files: Vec<FileStamp>,
}

/// What tells whether a file of a frozen chain was written to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    /// File name without folders.
    pub name: String,
    /// DataWriteGuid; nil when the file does not tell.
    pub written: uuid::Uuid,
    /// Sequence number of the header in force, which grows whenever anything of the file is written; 0: not told.
    pub sequence: u64,
}

impl FileStamp {
    /// Whether the file tells at all whether it was written to.
    #[must_use]
    pub fn tells(&self) -> bool {
        !self.written.is_nil() && self.sequence != 0
    }
}

/// What the first entry holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalStart {
    /// The checkpoint; on another one the journal is void.
    pub checkpoint: CheckpointId,
    /// Chunk size of the trees.
    pub chunk_size: u32,
    /// When the checkpoint was made.
    pub taken_unix_ms: u64,
    /// Consistency that the checkpoint reached.
    pub consistency: String,
    /// Kind of the run and the reasons for it.
    pub kind: i32,
    /// Reasons.
    pub reasons: Vec<String>,
    /// Parent whose unchanged pages are reused: (point, manifest).
    pub parent: Option<(PointId, ChunkId)>,
    /// The disks with their change lists, computed once per checkpoint.
    pub disks: Vec<JournalDisk>,
    /// Ranges that the policy leaves out of each disk, as (offset, length): they read as zeros. Empty: nothing of any disk
    /// (version 1), else one list a disk.
    #[serde(skip)]
    pub excluded: Vec<Vec<(u64, u64)>>,
}

/// A disk of the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalDisk {
    /// VirtualDiskId.
    pub disk_id: DiskId,
    /// Size, bytes.
    pub size: u64,
    /// Ranges to read, as (offset, length).
    pub to_read: Vec<(u64, u64)>,
    /// Whether `to_read` is relative to the parent (false: everything else is zeros).
    pub incremental: bool,
}

/// The clear bytes of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalClear {
    /// Position.
    pub sequence: u32,
    /// Job.
    pub job: JobId,
    /// Checkpoint.
    pub checkpoint: CheckpointId,
    /// Lease under which it was written.
    pub lease_epoch: LeaseEpoch,
}

/// Bytes that are no journal entry of this job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Malformed clear bytes.
    #[error("journal entry has malformed clear bytes")]
    Clear(#[source] DecodeError),
    /// Could not be opened.
    #[error("journal entry cannot be opened")]
    Seal(#[source] SealError),
    /// Malformed body.
    #[error("journal entry has a malformed body: {0}")]
    Body(String),
}

impl JournalClear {
    /// Encodes the clear bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(48);
        out.put_u16(1);
        out.put_u16(0);
        out.put_u32(self.sequence);
        out.extend_from_slice(&self.job.to_bytes());
        out.extend_from_slice(&self.checkpoint.to_bytes());
        out.put_u64(self.lease_epoch.0);
        out
    }

    /// Decodes the clear bytes.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(clear: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("journal entry", clear);
        let version = r.u16()?;
        if version != 1 {
            return Err(DecodeError::Value {
                what: "journal version",
                found: version.to_string(),
                expected: "1",
            });
        }
        r.u16()?;
        let sequence = r.u32()?;
        let entry = Self {
            sequence,
            job: JobId::from_bytes(r.array()?),
            checkpoint: CheckpointId::from_bytes(r.array()?),
            lease_epoch: LeaseEpoch(r.u64()?),
        };
        r.finish()?;
        Ok(entry)
    }
}

impl JournalEntry {
    /// Seals an entry.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn seal(&self, sealer: &Sealer, clear: &JournalClear) -> Result<Record, JournalError> {
        let clear = clear.encode();
        let failed = |e: postcard::Error| JournalError::Body(e.to_string());
        let excluded = match self {
            Self::Start(start) if !start.excluded.is_empty() => Some(&start.excluded),
            _ => None,
        };
        let mut body = Vec::new();
        body.put_u16(match (self, excluded) {
            (Self::Layers(_), _) => VERSION_OF_LAYERS,
            (_, Some(_)) => VERSION_WITH_EXCLUDED,
            (_, None) => JOURNAL_VERSION,
        });
        let mut body = postcard::to_extend(self, body).map_err(failed)?;
        if let Some(excluded) = excluded {
            body = postcard::to_extend(excluded, body).map_err(failed)?;
        }
        let id = sealer.id_of(Kind::Journal, &clear, &body);
        sealer.seal(Kind::Journal, id, &clear, &body).map_err(JournalError::Seal)
    }

    /// Opens an entry.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(sealer: &Sealer, record: &Record) -> Result<(JournalClear, Self), JournalError> {
        let clear = JournalClear::decode(record.clear()).map_err(JournalError::Clear)?;
        let plain = sealer.open(record).map_err(JournalError::Seal)?;
        let mut r = Reader::new("journal body", &plain);
        let version = r.u16().map_err(|e| JournalError::Body(e.to_string()))?;
        if !(JOURNAL_VERSION..=VERSION_OF_LAYERS).contains(&version) {
            return Err(JournalError::Body(format!("version {version}")));
        }
        let failed = |e: postcard::Error| JournalError::Body(e.to_string());
        let (mut entry, rest): (Self, &[u8]) =
            postcard::take_from_bytes(r.rest()).map_err(failed)?;
        match &mut entry {
            Self::Start(start) if version == VERSION_WITH_EXCLUDED => {
                start.excluded = postcard::from_bytes(rest).map_err(failed)?;
                if start.excluded.len() != start.disks.len() {
                    return Err(JournalError::Body("excluded ranges of other disks".into()));
                }
            }
            Self::Layers(_) if version == VERSION_OF_LAYERS && rest.is_empty() => {}
            _ if !rest.is_empty() || version != JOURNAL_VERSION => {
                return Err(JournalError::Body("trailing bytes".into()));
            }
            _ => {}
        }
        Ok((clear, entry))
    }
}
