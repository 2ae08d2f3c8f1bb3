//! Between the state and the messages.

use outrider_proto::ids::{DutyId, JobId, LeaseEpoch};
use outrider_proto::model::{FieldError, parse};
use outrider_proto::rpc;

use crate::follow::Instance;
use crate::state::duties::{Duty, DutyState};
use crate::state::facts::{BackupKind, Consistency, Disk, Stats};
use crate::state::jobs::CommandRun;
use crate::state::vms::Sighting;

/// Job and lease that nearly every call of an agent names.
pub(crate) fn held(
    message: &'static str,
    job: &str,
    epoch: u64,
) -> Result<(JobId, LeaseEpoch), FieldError> {
    Ok((parse(message, "job_id", job)?, LeaseEpoch(epoch)))
}

pub(crate) fn duty(duty: &Duty) -> rpc::Duty {
    let state = match duty.state {
        DutyState::Recorded => rpc::DutyState::Recorded,
        DutyState::Created => rpc::DutyState::Created,
        DutyState::Converted => rpc::DutyState::Converted,
        DutyState::Done => rpc::DutyState::Done,
    };
    rpc::Duty {
        duty_id: duty.id.to_string(),
        vm: Some((&duty.vm).into()),
        job_id: duty.job.to_string(),
        attempt: duty.attempt,
        state: state.into(),
        checkpoint_name: duty.checkpoint_name.clone(),
        checkpoint_id: duty.checkpoint.clone(),
        reference_point_id: duty.reference_point.clone(),
        converting: duty.converting.is_some(),
        reference_points_before: duty.converting.clone().unwrap_or_default(),
    }
}

/// A duty that is over.
pub(crate) fn done_duty(id: DutyId, job: JobId) -> rpc::Duty {
    rpc::Duty {
        duty_id: id.to_string(),
        job_id: job.to_string(),
        state: rpc::DutyState::Done.into(),
        ..rpc::Duty::default()
    }
}

pub(crate) fn duty_state(state: rpc::DutyState) -> Option<DutyState> {
    match state {
        rpc::DutyState::Unspecified => None,
        rpc::DutyState::Recorded => Some(DutyState::Recorded),
        rpc::DutyState::Created => Some(DutyState::Created),
        rpc::DutyState::Converted => Some(DutyState::Converted),
        rpc::DutyState::Done => Some(DutyState::Done),
    }
}

pub(crate) fn consistency(consistency: Consistency) -> rpc::Consistency {
    match consistency {
        Consistency::Crash => rpc::Consistency::Crash,
        Consistency::FileSystem => rpc::Consistency::FileSystem,
        Consistency::Application => rpc::Consistency::Application,
        Consistency::SavedState => rpc::Consistency::SavedState,
        Consistency::Off => rpc::Consistency::Off,
    }
}

pub(crate) fn to_consistency(consistency: rpc::Consistency) -> Option<Consistency> {
    match consistency {
        rpc::Consistency::Unspecified => None,
        rpc::Consistency::Crash => Some(Consistency::Crash),
        rpc::Consistency::FileSystem => Some(Consistency::FileSystem),
        rpc::Consistency::Application => Some(Consistency::Application),
        rpc::Consistency::SavedState => Some(Consistency::SavedState),
        rpc::Consistency::Off => Some(Consistency::Off),
    }
}

pub(crate) fn backup_kind(kind: BackupKind) -> rpc::BackupKind {
    match kind {
        BackupKind::Incremental => rpc::BackupKind::Incremental,
        BackupKind::Full => rpc::BackupKind::Full,
        BackupKind::ConsistencyCheck => rpc::BackupKind::ConsistencyCheck,
    }
}

/// Without a word: incremental.
pub(crate) fn to_backup_kind(kind: rpc::BackupKind) -> BackupKind {
    match kind {
        rpc::BackupKind::Unspecified | rpc::BackupKind::Incremental => BackupKind::Incremental,
        rpc::BackupKind::Full => BackupKind::Full,
        rpc::BackupKind::ConsistencyCheck => BackupKind::ConsistencyCheck,
    }
}

pub(crate) fn disk(disk: &Disk) -> rpc::DiskIdentity {
    rpc::DiskIdentity {
        disk_id: disk.id.clone(),
        size_bytes: disk.size_bytes,
        slot: disk.slot.clone(),
    }
}

pub(crate) fn to_disk(disk: rpc::DiskIdentity) -> Disk {
    Disk { id: disk.disk_id, size_bytes: disk.size_bytes, slot: disk.slot }
}

/// What an agent saw.
pub(crate) fn to_instance(facts: rpc::VmFacts) -> Result<Instance, FieldError> {
    let vm = outrider_proto::model::vm_key("VmFacts", facts.vm.as_ref())?;
    Ok(Instance {
        realized: facts.realized,
        owner: (!facts.cluster_owner.is_empty()).then_some(facts.cluster_owner),
        facts: Sighting {
            vm,
            name: facts.name,
            state: facts.state,
            generation: facts.generation,
            config_version: facts.config_version,
            disks: facts.disks.into_iter().map(to_disk).collect(),
            clustered: facts.clustered,
        },
    })
}

macro_rules! stats {
    ($($field:ident),* $(,)?) => {
        pub(crate) fn stats(s: &Stats) -> rpc::JobStats {
            rpc::JobStats { $($field: s.$field),* }
        }
        pub(crate) fn to_stats(s: Option<rpc::JobStats>) -> Stats {
            let s = s.unwrap_or_default();
            Stats { $($field: s.$field),* }
        }
    };
}

stats!(
    disk_bytes,
    changed_bytes,
    read_bytes,
    reread_bytes,
    zero_bytes,
    known_bytes,
    sent_bytes,
    resent_bytes,
    reused_pages,
    adopted_pages,
    chunks_new,
    chunks_known,
    stored_bytes,
    duration_ms,
    sampled_chunks,
    excluded_bytes,
);

/// Longest text of a command that is kept in the state; agents keep to less.
const MAX_OUTPUT: usize = 16 << 10;

pub(crate) fn to_command(c: rpc::CommandReport) -> CommandRun {
    let bounded = |text: String| text.chars().take(MAX_OUTPUT).collect::<String>();
    CommandRun {
        name: bounded(c.name),
        when: bounded(c.when),
        host: bounded(c.host),
        started_ms: c.started_unix_ms,
        duration_ms: c.duration_ms,
        end: bounded(c.end),
        output: bounded(c.output),
        good: c.good,
    }
}

pub(crate) fn command(c: &CommandRun) -> rpc::CommandReport {
    rpc::CommandReport {
        name: c.name.clone(),
        when: c.when.clone(),
        host: c.host.clone(),
        started_unix_ms: c.started_ms,
        duration_ms: c.duration_ms,
        end: c.end.clone(),
        output: c.output.clone(),
        good: c.good,
    }
}
