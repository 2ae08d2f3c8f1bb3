//! What goes wrong with QEMU, its guest agent and its processes, in sentences that say what to do.

use std::path::PathBuf;
use std::time::Duration;

use outrider_proto::ids::VmGuid;

use super::qmp::{QmpError, Version};

/// A failure of the QEMU backend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QemuError {
    /// The monitor.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A QEMU that cannot do it.
    #[error(
        "VM {vm:?} runs in QEMU {found}; backups need {needed} or later, whose copy-before-write gives up the backup and not the \
         guest when space runs out. Update QEMU, then restart the VM or move it to an updated host"
    )]
    TooOld {
        /// Name.
        vm: String,
        /// Version.
        found: Version,
        /// Oldest that will do.
        needed: Version,
    },
    /// Something is under way that a checkpoint would disturb.
    #[error("VM {vm:?} cannot have a checkpoint now: {what}; the run is repeated")]
    Busy {
        /// Name.
        vm: String,
        /// What is under way.
        what: String,
    },
    /// QEMU serves NBD for somebody else.
    #[error(
        "the QEMU of VM {vm:?} serves NBD for another program (a backup of another product, or a storage migration): wait until \
         that has ended, or stop it with nbd-server-stop"
    )]
    ServerTaken {
        /// Name.
        vm: String,
    },
    /// The guest could not be brought to rest.
    #[error("the guest agent of VM {vm:?} {reason}")]
    Guest {
        /// Name.
        vm: String,
        /// What happened and what to do.
        reason: String,
    },
    /// Nothing can be captured.
    #[error("VM {vm:?} has no disk that can be captured: {reason}")]
    NoDisk {
        /// Name.
        vm: String,
        /// Why the first one cannot.
        reason: String,
    },
    /// The scratch folder.
    #[error("the scratch folder {} cannot be used: {reason}; see [qemu] scratch", path.display())]
    Scratch {
        /// Folder.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// A file of ours.
    #[error("cannot {doing} {}: {reason}", path.display())]
    File {
        /// As a verb.
        doing: &'static str,
        /// File.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// A definition that cannot be used.
    #[error("the VM definition {} cannot be used: {reason}", path.display())]
    Definition {
        /// File.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A VM that could not be brought back, and so is not replaced.
    #[error(
        "VM {vm:?} is not replaced, since it could not be brought back if the restored one fails: {reason}. Restore under another \
         name, or remove the VM through the program that started it and restore then"
    )]
    NotReplaced {
        /// Name.
        vm: String,
        /// Why.
        reason: String,
    },
    /// A name that is taken in the sockets folder.
    #[error(
        "{} exists: a VM of this name is defined on this host; restore under another name, or remove that file",
        path.display()
    )]
    NameTaken {
        /// File.
        path: PathBuf,
    },
    /// A VM that did not come up.
    #[error("VM {vm:?} did not start: {reason}. Its output is in {}", log.display())]
    NotStarted {
        /// Name.
        vm: String,
        /// Why.
        reason: String,
        /// Log file.
        log: PathBuf,
    },
    /// A VM that came up and was gone before anything could be asked.
    #[error("VM {vm:?} ended right after its start: {said}. Its output is in {}", log.display())]
    EndedSoon {
        /// Name.
        vm: String,
        /// The last line that QEMU said.
        said: String,
        /// Log file.
        log: PathBuf,
    },
    /// A definition without a process.
    #[error("VM {vm} is defined on this host and does not run; start it first")]
    NotRunning {
        /// VM.
        vm: VmGuid,
    },
    /// Something took too long.
    #[error("{doing} took longer than {waited:?}; look at the VM on its host")]
    TooLong {
        /// What was done.
        doing: String,
        /// Bound.
        waited: Duration,
    },
}

impl QemuError {
    /// Whether the same may succeed a little later.
    #[must_use]
    pub fn passes(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::ServerTaken { .. })
    }

    /// Whether there is no process of the VM (any more).
    #[must_use]
    pub fn is_absent(&self) -> bool {
        match self {
            Self::NotRunning { .. } => true,
            Self::Qmp(e) => e.is_gone(),
            _ => false,
        }
    }

    /// Whether the outcome has to be looked at before anything else is done.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::TooLong { .. }) || matches!(self, Self::Qmp(e) if !e.is_refusal())
    }
}
