//! Small facts that several parts of the state hold.

use serde::{Deserialize, Serialize};

/// How consistent a recovery point is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Consistency {
    Crash,
    FileSystem,
    Application,
    SavedState,
    Off,
}

/// What a backup is to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum BackupKind {
    Incremental,
    Full,
    ConsistencyCheck,
}

/// One disk as the hypervisor identifies it. An id that is no UUID is kept as it came, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disk {
    pub(crate) id: String,
    pub(crate) size_bytes: u64,
    pub(crate) slot: String,
}

/// Figures of a run; the meaning of each stands in `types.proto`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Stats {
    pub(crate) disk_bytes: u64,
    pub(crate) changed_bytes: u64,
    pub(crate) read_bytes: u64,
    pub(crate) reread_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) known_bytes: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) resent_bytes: u64,
    pub(crate) reused_pages: u64,
    pub(crate) adopted_pages: u64,
    pub(crate) chunks_new: u64,
    pub(crate) chunks_known: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) duration_ms: u64,
    pub(crate) sampled_chunks: u64,
    #[serde(default)]
    pub(crate) excluded_bytes: u64,
}
