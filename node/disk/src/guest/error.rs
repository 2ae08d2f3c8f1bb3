//! What can go wrong with a guest's file system.

use crate::DiskError;

/// Every failure of reading a guest's disk.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The disk itself.
    #[error("the disk cannot be read: {0}")]
    Disk(#[from] DiskError),
    /// Bytes that contradict the format.
    #[error("{structure} is damaged: {detail}")]
    Damaged {
        /// The structure.
        structure: &'static str,
        /// Found and expected.
        detail: String,
    },
    /// Valid, and not read by this release.
    #[error("{structure} cannot be read: {detail}")]
    Unsupported {
        /// The structure.
        structure: &'static str,
        /// What it asks for.
        detail: String,
    },
    /// A volume without a file system that we read.
    #[error("volume {volume} cannot be read: {reason}")]
    NotReadable {
        /// Number of the volume.
        volume: u32,
        /// What it holds and why it is not read.
        reason: String,
    },
    /// No volume of this number.
    #[error("there is no volume {volume}: the disk has {}", volumes(known))]
    NoVolume {
        /// Number asked for.
        volume: u32,
        /// Numbers that exist.
        known: Vec<u32>,
    },
    /// Nothing at this path.
    #[error("{path} does not exist: {}", nearest(found_until, there))]
    NotFound {
        /// The path.
        path: String,
        /// The part of it that exists.
        found_until: String,
        /// Names there, the first few.
        there: Vec<String>,
    },
    /// A path that goes through something that is no directory.
    #[error("{path} is {kind}, not a directory")]
    NotADirectory {
        /// The path.
        path: String,
        /// What it is.
        kind: &'static str,
    },
    /// Something without content of its own.
    #[error("{path} is {kind}, not a file with content")]
    NotAFile {
        /// The path.
        path: String,
        /// What it is.
        kind: &'static str,
    },
    /// A file whose content is not laid out plainly on the disk.
    #[error("the content of this file {reason}")]
    NoExtents {
        /// Why, as the end of a sentence.
        reason: &'static str,
    },
    /// More work than a sound file system would need, or too slow.
    #[error(
        "reading the guest's file system was given up after {what}: the file system is damaged, or much larger than \
         expected"
    )]
    Limit {
        /// The limit that was reached.
        what: String,
    },
}

impl GuestError {
    pub(crate) fn damaged(structure: &'static str, detail: impl Into<String>) -> Self {
        Self::Damaged { structure, detail: detail.into() }
    }

    pub(crate) fn unsupported(structure: &'static str, detail: impl Into<String>) -> Self {
        Self::Unsupported { structure, detail: detail.into() }
    }
}

fn volumes(known: &[u32]) -> String {
    match known {
        [] => "no volume".to_owned(),
        [one] => format!("volume {one} only"),
        many => {
            format!("volumes {}", many.iter().map(u32::to_string).collect::<Vec<_>>().join(", "))
        }
    }
}

fn nearest(until: &str, there: &[String]) -> String {
    if there.is_empty() {
        return format!("{until} is empty");
    }
    format!("{until} holds {}", there.join(", "))
}
