//! What can go wrong with a virtual disk, in sentences an operator can act on.

use std::io;
use std::path::{Path, PathBuf};

/// Every failure of this crate. The text names the file, what was found, what was expected and,
/// where somebody can do something about it, what to do.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file is not a format that we read.
    #[error(
        "{} is not a virtual disk that can be read: found {found}; expected a VHDX, AVHDX, VHD or AVHD file, or a raw \
         image named .raw or .img. Check that the path names the VM's disk and that it was copied completely",
        path.display()
    )]
    NotAVirtualDisk {
        /// The file.
        path: PathBuf,
        /// What the file looks like instead.
        found: String,
    },
    /// The file ends before something that it refers to.
    #[error(
        "{} is cut off: its {structure} needs the file to be at least {needed} bytes long, but it has {found}. \
         Copy the file again or use another copy of it",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The structure that lies beyond the end.
        structure: &'static str,
        /// Bytes that the file would have to have.
        needed: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// The file has all its bytes but they contradict the format or themselves.
    #[error("{} is damaged: its {structure} {detail}. Restore the disk or use another copy of the file", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The damaged structure.
        structure: &'static str,
        /// What was found there and what was expected.
        detail: String,
    },
    /// A valid file that uses something this version cannot handle.
    #[error("{} cannot be used: its {structure} {detail}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The structure in question.
        structure: &'static str,
        /// What it asks for, and what is supported.
        detail: String,
    },
    /// A differencing disk's parent is at none of the places that the child names.
    #[error(
        "{} is a differencing disk and its parent was not found at {}. Put the parent back or copy the whole \
         checkpoint chain into one folder",
        child.display(),
        join_paths(tried)
    )]
    ParentMissing {
        /// The file whose parent is missing.
        child: PathBuf,
        /// Where it was looked for, in order.
        tried: Vec<PathBuf>,
    },
    /// The parent exists but is not, or no longer, the disk that the child was made from.
    #[error(
        "{} does not belong to its parent {}: the {what} of the parent should be {expected} but is {found}. \
         The parent was changed or replaced after the child was made; reading them together would give wrong data",
        child.display(),
        parent.display()
    )]
    ParentMismatch {
        /// The differencing disk.
        child: PathBuf,
        /// The file found in the parent's place.
        parent: PathBuf,
        /// The property that differs.
        what: &'static str,
        /// The value that the child asks for.
        expected: Box<str>,
        /// The value that the parent has.
        found: Box<str>,
    },
    /// A chain that leads back to itself.
    #[error("the checkpoint chain of {} is circular: {} is its own ancestor", leaf.display(), again.display())]
    ChainCycle {
        /// The leaf that was opened.
        leaf: PathBuf,
        /// The file that was met twice.
        again: PathBuf,
    },
    /// More parents than any hypervisor makes.
    #[error("the checkpoint chain of {} has more than {limit} files; merge checkpoints first", leaf.display())]
    ChainTooDeep {
        /// The leaf that was opened.
        leaf: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// A read or write outside the disk; a mistake of the caller.
    #[error("{} bytes at offset {offset} are outside of {}, which has {size} bytes", len, path.display())]
    OutOfBounds {
        /// The file.
        path: PathBuf,
        /// First byte asked for.
        offset: u64,
        /// Number of bytes asked for.
        len: u64,
        /// Size of the virtual disk.
        size: u64,
    },
    /// A disk was asked for that the format cannot express.
    #[error("{} cannot be created with {option} {value}: it must be {expected}", path.display())]
    InvalidOption {
        /// The file to be made.
        path: PathBuf,
        /// The option's name.
        option: &'static str,
        /// The value given.
        value: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// Two disks that must have one size do not.
    #[error("the disks have different sizes: {left} and {right} bytes")]
    SizesDiffer {
        /// Size of the first disk.
        left: u64,
        /// Size of the second disk.
        right: u64,
    },
    /// An earlier write or flush failed, so the writer no longer knows what is on the medium.
    #[error(
        "{} cannot be written any more because an earlier write or flush failed; open it again, which replays its log",
        path.display()
    )]
    WriterFailed {
        /// The file.
        path: PathBuf,
    },
    /// The caller asked to stop.
    #[error("{} was not finished: it was asked to stop; nothing is left of it", path.display())]
    Stopped {
        /// The file that was being written.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("could not {op} {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done, as a verb.
        op: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl DiskError {
    pub(crate) fn io(path: &Path, op: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, op, source }
    }
}

fn join_paths(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "any place (the file names none)".to_owned();
    }
    paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// A fault found in bytes alone, before it is known which file they are from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than the structure needs.
    #[error("{structure} is cut off: {needed} bytes needed, {found} found")]
    Truncated {
        /// The structure.
        structure: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes found.
        found: u64,
    },
    /// Bytes that contradict the format.
    #[error("{structure} {detail}")]
    Corrupt {
        /// The structure.
        structure: &'static str,
        /// Found and expected.
        detail: String,
    },
    /// Valid, but not supported.
    #[error("{structure} {detail}")]
    Unsupported {
        /// The structure.
        structure: &'static str,
        /// What it asks for.
        detail: String,
    },
}

impl FormatError {
    pub(crate) fn corrupt(structure: &'static str, detail: impl Into<String>) -> Self {
        Self::Corrupt { structure, detail: detail.into() }
    }

    pub(crate) fn unsupported(structure: &'static str, detail: impl Into<String>) -> Self {
        Self::Unsupported { structure, detail: detail.into() }
    }

    /// The same fault, naming the file that has it.
    pub fn in_file(self, path: &Path) -> DiskError {
        let path = path.to_owned();
        match self {
            Self::Truncated { structure, needed, found } => {
                DiskError::Truncated { path, structure, needed, found }
            }
            Self::Corrupt { structure, detail } => DiskError::Corrupt { path, structure, detail },
            Self::Unsupported { structure, detail } => {
                DiskError::Unsupported { path, structure, detail }
            }
        }
    }
}
