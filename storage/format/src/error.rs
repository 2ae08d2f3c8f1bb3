//! Why a segment cannot be read.

use std::path::PathBuf;

use outrider_proto::wire::DecodeError;

/// A segment file that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The system refused.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// No segment, or one that this release cannot read.
    #[error("{path} is no segment that can be read: {source}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: DecodeError,
    },
}
