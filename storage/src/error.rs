//! Why the store of a node does not do what was asked.

use std::path::PathBuf;

use outrider_process::fs::FsError;

/// A store that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file operation failed; for a folder in use by another process, the sentence says who has it.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// A segment cannot be read or mended.
    #[error(
        "segment {path} cannot be opened: {source}; check the disk, and start this node with an empty data_dir if it is lost (the others hold copies)"
    )]
    Segment {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The folder belongs to another node or fabric.
    #[error(
        "{path} was written by another storage node or for another fabric; give this node a data_dir of its own"
    )]
    Foreign {
        /// The file that tells.
        path: PathBuf,
    },
    /// The node's tables cannot be opened even after they were made anew.
    #[error("the tables in {path} cannot be opened: {source}")]
    Tables {
        /// Folder.
        path: PathBuf,
        /// What sled said.
        source: sled::Error,
    },
    /// A small state file is not what this program writes.
    #[error(
        "{path} is damaged: it holds {found:?}, expected {expected}; restore it, or start with an empty data_dir"
    )]
    State {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
        /// What was expected.
        expected: &'static str,
    },
}

/// Why a write or a read was refused. Cheap to clone: one failure answers many waiters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No space: nothing was lost, nothing new is taken.
    #[error("the disk of storage node {node} is full: add storage, or let retention remove points")]
    Full {
        /// Node.
        node: String,
    },
    /// A write or sync failed once. The store takes nothing more until the process is started again: after a failed sync
    /// nobody knows which bytes are on disk, and trying again would report success for bytes that are gone.
    #[error(
        "storage node {node} stopped taking writes after a disk error ({why}); check its disk, then restart the node"
    )]
    Failed {
        /// Node.
        node: String,
        /// The first error.
        why: String,
    },
    /// A newer fence was seen.
    #[error("a newer lease has written here (fence {seen}, this write has {given})")]
    Fenced {
        /// Highest fence seen.
        seen: u64,
        /// Fence of the write.
        given: u64,
    },
    /// The tables refused.
    #[error("the tables of storage node {node} failed: {why}; restart the node, it rebuilds them")]
    Tables {
        /// Node.
        node: String,
        /// What they said.
        why: String,
    },
    /// The store was closed.
    #[error("storage node {node} is shutting down")]
    Closed {
        /// Node.
        node: String,
    },
}
