//! Why the lab itself fails, or refuses a control command.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use outrider_disk::DiskError;

/// An error of the lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The address is taken or not ours.
    #[error("the lab cannot listen on {addr}: {source}; choose another address or port 0")]
    Listen {
        /// Address asked for.
        addr: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The configuration makes no sense.
    #[error("the lab's configuration is wrong: {0}")]
    Config(String),
    /// A file or folder failed.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A virtual disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// No such thing.
    #[error("the lab has no {kind} {name:?}")]
    Unknown {
        /// Kind of thing.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The cluster refuses, with the code that a caller through WMI would have got.
    #[error("{object} refused: {reason} ({code})")]
    Refused {
        /// VM, host or the like.
        object: String,
        /// Why.
        reason: String,
        /// Return code.
        code: u32,
    },
    /// A wait's deadline passed.
    #[error("waited {waited_ms} ms in vain for {what}; now: {now}")]
    Deadline {
        /// Condition.
        what: String,
        /// How long.
        waited_ms: u64,
        /// What is the case instead.
        now: String,
    },
    /// The lab is ending.
    #[error("the lab is shutting down")]
    Ending,
}

impl LabError {
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }

    pub(crate) fn unknown(kind: &'static str, name: impl std::fmt::Display) -> Self {
        Self::Unknown { kind, name: name.to_string() }
    }

    pub(crate) fn refused(
        object: impl std::fmt::Display,
        code: u32,
        reason: impl Into<String>,
    ) -> Self {
        Self::Refused { object: object.to_string(), reason: reason.into(), code }
    }
}
