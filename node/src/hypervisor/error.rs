//! What a hypervisor can answer instead of doing it, and whether asking again makes sense.

pub mod codes;

use std::path::PathBuf;
use std::time::Duration;

use outrider_proto::ids::VmGuid;
use outrider_wmi::WmiError;

use crate::lease::LeaseLost;

/// Whether the same request may succeed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Busy: wait and ask again.
    Later,
    /// The outcome is unknown: look at what is there first.
    Inspect,
    /// Somebody has to act, or something else has to be tried.
    No,
}

/// A refusal or failure of the hypervisor.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HypervisorError {
    /// The provider gave no answer.
    #[error("could not {doing}: {source}")]
    Provider {
        /// What was wanted.
        doing: String,
        /// The transport's answer.
        source: WmiError,
    },
    /// A method refused, or its job failed.
    #[error("the hypervisor refused to {doing}: {reason} (code {code}); {remedy}")]
    Refused {
        /// What was wanted.
        doing: String,
        /// Return value or error code.
        code: u32,
        /// The hypervisor's own words, or what the code means.
        reason: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A job vanished before it was seen to finish.
    #[error("the hypervisor lost track of its own job to {doing}; its outcome is unknown")]
    OutcomeUnknown {
        /// What was wanted.
        doing: String,
    },
    /// A job took too long.
    #[error(
        "the hypervisor did not finish to {doing} within {waited:?}; look at the VM on its host"
    )]
    TooLong {
        /// What was wanted.
        doing: String,
        /// Bound.
        waited: Duration,
    },
    /// The VM is not on this host.
    #[error("VM {vm} is not on this host (any more)")]
    NoSuchVm {
        /// VM.
        vm: VmGuid,
    },
    /// Another recovery checkpoint appeared first; a VM has one at a time.
    #[error("VM {vm} has got another recovery checkpoint, {name:?}, before ours could be made")]
    Occupied {
        /// VM.
        vm: VmGuid,
        /// Name of the other one.
        name: String,
    },
    /// The checkpoint was made, and got no name.
    #[error("checkpoint {checkpoint} was made and could not be named: {source}")]
    Nameless {
        /// Its handle.
        checkpoint: String,
        /// Why.
        source: Box<HypervisorError>,
    },
    /// The checkpoint is not there.
    #[error("the checkpoint {checkpoint} is gone")]
    CheckpointGone {
        /// Its name or handle.
        checkpoint: String,
    },
    /// Change tracking of a disk cannot be used.
    #[error("change tracking of {} cannot be used: {reason}", disk.display())]
    TrackingLost {
        /// Disk.
        disk: PathBuf,
        /// Why.
        reason: String,
    },
    /// The provider's answer lacks what it must have.
    #[error("the hypervisor's answer to {doing} makes no sense: {detail}")]
    Odd {
        /// What was wanted.
        doing: String,
        /// What is missing.
        detail: String,
    },
    /// It cannot be told whether a file of a VM is there.
    #[error("cannot tell whether {} is there: {reason}; see that its volume is online", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        reason: String,
    },
    /// QEMU, its guest agent or its processes.
    #[cfg(unix)]
    #[error(transparent)]
    Qemu(#[from] super::qemu::QemuError),
    /// The call was not made, because the lease does not allow it.
    #[error(transparent)]
    Lease(#[from] LeaseLost),
}

impl HypervisorError {
    /// Whether and how to go on (facts, section 1.11).
    #[must_use]
    pub fn retry(&self) -> Retry {
        match self {
            Self::Provider { source, .. } if source.is_transient() => Retry::Inspect,
            Self::OutcomeUnknown { .. } => Retry::Inspect,
            #[cfg(unix)]
            Self::Qemu(e) if e.passes() => Retry::Later,
            #[cfg(unix)]
            Self::Qemu(e) if e.is_unknown() => Retry::Inspect,
            Self::Occupied { .. } | Self::File { .. } => Retry::Later,
            Self::Nameless { source, .. } => source.retry(),
            Self::Refused { code, reason, .. } => {
                codes::of(*code, reason).map_or(Retry::No, |known| known.next.retry())
            }
            _ => Retry::No,
        }
    }

    /// Whether a checkpoint that was asked for was certainly not made: it was refused, or another one was first. A call whose
    /// outcome is not known, and one that failed after the checkpoint was there, say nothing of the kind.
    #[must_use]
    pub fn has_made_nothing(&self) -> bool {
        match self {
            Self::Occupied { .. } => true,
            Self::Refused { .. } => self.retry() != Retry::Inspect,
            _ => false,
        }
    }

    /// Whether the VM is not here, or its process ended while it was asked.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        match self {
            Self::NoSuchVm { .. } => true,
            #[cfg(unix)]
            Self::Qemu(e) => e.is_absent(),
            _ => false,
        }
    }

    /// Whether the guest (not the host) failed to bring its data to rest: another way of taking the checkpoint may work.
    #[must_use]
    pub fn is_guest_failure(&self) -> bool {
        match self {
            Self::Refused { code, reason, .. } => {
                codes::of(*code, reason).is_some_and(|known| known.next == codes::Next::OtherWay)
            }
            #[cfg(unix)]
            Self::Qemu(super::qemu::QemuError::Guest { .. }) => true,
            _ => false,
        }
    }
}

/// What a code of a Hyper-V method or job means, and what to do about it. `text` is the job's own.
#[must_use]
pub fn meaning(code: u32, text: &str) -> (&'static str, &'static str) {
    codes::of(code, text)
        .map_or(("unknown reason", "look at the host's Hyper-V-VMMS event log"), |known| {
            (known.meaning, known.remedy)
        })
}
