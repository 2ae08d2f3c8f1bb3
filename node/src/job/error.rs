//! What ends an attempt.

use outrider_disk::DiskError;
use outrider_proto::error_code::{self, Class, ErrorCode};
use outrider_proto::ids::VmGuid;
use outrider_proto::manifest::ManifestError;
use outrider_proto::model::FieldError;
use outrider_proto::seal::SealError;

use crate::consistency::NoWay;
use crate::coordinator_client::CoordinatorError;
use crate::hypervisor::{HypervisorError, Retry};
use crate::journal::JournalError;
use crate::lease::LeaseLost;
use crate::pipeline::{PipelineError, PoolError};
use crate::precheck::Obstacle;
use crate::restore::RestoreError;
use crate::store::StoreError;

/// Why an attempt failed.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The lease is over.
    #[error(transparent)]
    Lease(#[from] LeaseLost),
    /// The hypervisor.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// Reading or sending.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// Storage.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The coordinator.
    #[error(transparent)]
    Coordinator(#[from] CoordinatorError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Sealing.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A worker thread failed.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A message that cannot be understood.
    #[error("the coordinator's lease cannot be understood: {0}")]
    Message(#[from] FieldError),
    /// No way to the consistency asked for.
    #[error(transparent)]
    Consistency(#[from] NoWay),
    /// Refused before anything was done.
    #[error("{}", .0.sentence)]
    Precheck(Obstacle),
    /// The checkpoint went away while it was read.
    #[error(
        "the checkpoint {name:?} went away while it was read; the job starts over from its base"
    )]
    CheckpointGone {
        /// Its name.
        name: String,
    },
    /// The VM went away while it was read, and did not come back.
    #[error(
        "VM {vm:?} ended while it was backed up (shut down, killed, or moved away) and is not on this host again; nothing has to be \
         done: the run goes on where the VM is started, with what its change tracking proves, else the next one does"
    )]
    VmEnded {
        /// Its name.
        vm: String,
    },
    /// The coordinator says that the job is somebody else's.
    #[error("the commit was refused as superseded: {reason}")]
    Superseded {
        /// Its sentence.
        reason: String,
    },
    /// Receipts go on lacking.
    #[error(
        "the coordinator still lacks receipts after {rounds} rounds of sending again: {reason}"
    )]
    ReceiptsLacking {
        /// Rounds.
        rounds: u32,
        /// Its last sentence.
        reason: String,
    },
    /// A file cannot be read or written.
    #[error("cannot {doing} {path}: {source}")]
    File {
        /// As a verb.
        doing: &'static str,
        /// The file.
        path: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A reference point of ours is among several that nobody explains.
    #[error(
        "VM {vm} has reference points that nobody explains, and one of them may be ours: {}; none is touched, for another \
         product's base would be lost. The next backup of that product removes its own; then Outrider removes ours",
        points.join(", ")
    )]
    Unclear {
        /// VM.
        vm: VmGuid,
        /// Their ids.
        points: Vec<String>,
    },
    /// A command of the group failed, and the group says that this ends the run.
    #[error("the command {name:?} {when} the backup failed: {how}{}", said(.output))]
    Command {
        /// Its name.
        name: String,
        /// "before" or "after".
        when: &'static str,
        /// How it ended.
        how: String,
        /// The last line that it printed.
        output: String,
    },
    /// Restoring.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A restore's target is taken.
    #[error("{0}")]
    TargetTaken(String),
    /// The host cannot run what is to be restored.
    #[error("{0}")]
    Unfit(String),
    /// The restored VM is there and was not seen to boot.
    #[error("{0}")]
    NotBooted(String),
    /// A recovery point that does not hold what a restore needs.
    #[error("{0}")]
    Unrestorable(String),
}

fn said(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!("; it said: {output}") }
}

impl JobError {
    /// Whether somebody else works on the job now, so that nothing is to be reported or cleaned by us.
    #[must_use]
    pub fn is_superseded(&self) -> bool {
        match self {
            Self::Lease(_) | Self::Superseded { .. } => true,
            Self::Hypervisor(e) => matches!(e, HypervisorError::Lease(_)),
            Self::Coordinator(e) => matches!(e, CoordinatorError::Superseded { .. }),
            Self::Store(e) => matches!(e, StoreError::Fenced { .. }),
            Self::Journal(JournalError::Store(e)) => matches!(e, StoreError::Fenced { .. }),
            Self::Pipeline(e) => match e {
                PipelineError::Lease(_) => true,
                PipelineError::Store(e) | PipelineError::Journal(JournalError::Store(e)) => {
                    matches!(e, StoreError::Fenced { .. })
                }
                _ => false,
            },
            _ => false,
        }
    }

    /// The stable code.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        let of_store = |e: &StoreError| match e {
            StoreError::Unavailable { .. } => error_code::STORAGE_UNREACHABLE,
            StoreError::Full { .. } => error_code::STORAGE_FULL,
            StoreError::Fenced { .. } => error_code::SUPERSEDED,
            StoreError::Missing { .. } => error_code::CHUNK_LOST,
            StoreError::Refused { .. } => error_code::DENIED,
        };
        let of_disk = |e: &DiskError| match e {
            DiskError::ParentMissing { .. } | DiskError::ParentMismatch { .. } => {
                error_code::PARENT_MISSING
            }
            DiskError::Io { source, .. } if source.kind() == std::io::ErrorKind::TimedOut => {
                error_code::HOST_UNUSABLE
            }
            DiskError::Io { source, .. } if source.kind() == std::io::ErrorKind::ResourceBusy => {
                error_code::VM_BUSY
            }
            _ => error_code::DISK_BROKEN,
        };
        match self {
            Self::Lease(_) | Self::Superseded { .. } => error_code::SUPERSEDED,
            Self::Hypervisor(_) => error_code::CHECKPOINT_FAILED,
            Self::Pipeline(PipelineError::Store(e)) | Self::Store(e) => of_store(e),
            Self::Pipeline(PipelineError::Journal(JournalError::Store(e)))
            | Self::Journal(JournalError::Store(e)) => of_store(e),
            Self::Pipeline(PipelineError::Source(e)) | Self::Disk(e) => of_disk(e),
            Self::Pipeline(PipelineError::Lease(_)) => error_code::SUPERSEDED,
            Self::Pipeline(PipelineError::KeepsLosing { .. }) => error_code::STORAGE_UNREACHABLE,
            Self::Pipeline(PipelineError::Page { .. } | PipelineError::WrongPage { .. })
            | Self::Manifest(_)
            | Self::Unrestorable(_) => error_code::CHUNK_LOST,
            Self::Coordinator(CoordinatorError::Superseded { .. }) => error_code::SUPERSEDED,
            Self::Coordinator(_) => error_code::NO_LEADER,
            Self::Precheck(obstacle) => obstacle.code,
            Self::Consistency(_) => error_code::CONSISTENCY_UNREACHABLE,
            Self::CheckpointGone { .. } | Self::VmEnded { .. } => error_code::CHECKPOINT_GONE,
            Self::ReceiptsLacking { .. } => error_code::RECEIPTS_LACKING,
            Self::Command { .. } => error_code::COMMAND_FAILED,
            Self::Restore(RestoreError::Store(e)) => of_store(e),
            Self::Restore(RestoreError::Disk(_)) => error_code::LOW_SPACE,
            Self::Restore(_) => error_code::CHUNK_LOST,
            Self::Unclear { .. } => error_code::HOST_UNCLEAN,
            Self::TargetTaken(_) => error_code::VM_EXISTS,
            Self::Unfit(_) => error_code::HOST_UNFIT,
            Self::NotBooted(_) => error_code::NOT_BOOTED,
            Self::File { .. } => error_code::LOW_SPACE,
            Self::Pipeline(_)
            | Self::Journal(_)
            | Self::Seal(_)
            | Self::Pool(_)
            | Self::Message(_) => error_code::INTERNAL,
        }
    }

    /// Whether another attempt may succeed without anybody acting.
    #[must_use]
    pub fn retry(&self) -> bool {
        match self {
            Self::Precheck(obstacle) => obstacle.passes,
            Self::Hypervisor(
                HypervisorError::NoSuchVm { .. } | HypervisorError::CheckpointGone { .. },
            ) => true,
            Self::Hypervisor(e) => e.retry() != Retry::No,
            Self::Consistency(_) | Self::File { .. } => false,
            Self::Coordinator(e) => matches!(e, CoordinatorError::Unavailable { .. }),
            _ => self.code().class == Class::Retry,
        }
    }

    /// An I/O failure.
    pub(crate) fn file(
        doing: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.display().to_string();
        move |source| Self::File { doing, path, source }
    }
}
