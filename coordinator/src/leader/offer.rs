//! Offers: a lease as the agent gets it, with all it needs to work.

use std::time::Duration;

use outrider_proto::ids::{JobId, LeaseEpoch, VmGuid};
use outrider_proto::layout::Layout;
use outrider_proto::rpc;
use outrider_proto::rpc::job_lease::Work as WireWork;
use outrider_proto::ticket::{Operations, Ticket};

use super::Settings;
use crate::api::wire;
use crate::keys::KeyRing;
use crate::state::State;
use crate::state::groups::Policy;
use crate::state::jobs::{Job, Lease, Work};

/// A ticket is given once a lease, and a lease lasts as long as its job goes on: the first backup of a large VM takes days. What a
/// ticket that lives too long could do is little: it is good for its host's certificate only, it reads no data, what it writes is
/// fenced by the lease's epoch, and commits are fenced by the state.
const BACKUP_TICKET_LIFE: Duration = Duration::from_secs(60 * DAY);
/// One for a restore reads data.
const RESTORE_TICKET_LIFE: Duration = Duration::from_secs(14 * DAY);
const DAY: u64 = 24 * 3600;
/// Reads of this size run at a disk's full speed.
const READ_BYTES: u32 = 4 << 20;

/// The layout on the wire; none while there is none.
pub(crate) fn wire_layout(layout: &Layout) -> Option<rpc::Layout> {
    (!layout.pgs.is_empty()).then(|| layout.into())
}

#[expect(clippy::too_many_arguments, reason = "one message is made of all the leader knows")]
pub(super) fn lease_message(
    settings: &Settings,
    keys: &KeyRing,
    state: &State,
    job: &Job,
    lease: &Lease,
    layout: Option<rpc::Layout>,
    beat: u64,
    predecessor_open: bool,
    now_ms: u64,
) -> rpc::JobLease {
    let (domain_keys, domain_chunk) = keys.default_domain();
    let policy = state.group_of(&job.vm).map(|(_, g)| g.policy.clone()).unwrap_or_default();
    let (operations, life) = match job.work {
        Work::Backup { .. } => (Operations::BACKUP, BACKUP_TICKET_LIFE),
        Work::Restore(_) => (Operations::RESTORE, RESTORE_TICKET_LIFE),
        // Cleaning up needs the hypervisor only.
        Work::Cleanup { .. } => (Operations(0), BACKUP_TICKET_LIFE),
    };
    let ticket = Ticket {
        operations,
        fabric: settings.fabric,
        job: job.id,
        vm: job.vm.guid,
        domain: domain_keys.domain,
        lease_epoch: lease.epoch,
        not_after_unix_ms: not_after(now_ms, life),
        host: lease.host.clone(),
    };
    rpc::JobLease {
        job_id: job.id.to_string(),
        attempt: job.attempts.last().map_or(0, |a| a.number),
        lease_epoch: lease.epoch.0,
        vm: Some((&job.vm).into()),
        vm_name: state.vms.get(&job.vm).map_or_else(|| job.vm_name.clone(), |vm| vm.name.clone()),
        placement_epoch: lease.placement.0,
        incarnation: lease.incarnation.0,
        ticket: keys.sign(&ticket),
        keys: Some(domain_keys.as_ref().into()),
        layout,
        traceparent: job.traceparent.clone(),
        chunk_size: if policy.chunk_size == 0 { domain_chunk } else { policy.chunk_size },
        predecessor_open,
        beat,
        duties: state.open_duties(&job.vm).map(wire::duty).collect(),
        binding: state.bases.get(&job.vm).map(|base| (&base.binding).into()),
        no_base: state.unbased.get(&job.vm).cloned().unwrap_or_default(),
        work: Some(work(&job.work, &policy)),
    }
}

fn work(work: &Work, policy: &Policy) -> WireWork {
    match work {
        Work::Backup { kind, why, point } => WireWork::Backup(rpc::BackupWork {
            kind: wire::backup_kind(*kind).into(),
            why: why.clone(),
            wanted: wire::consistency(policy.wanted).into(),
            minimum: wire::consistency(policy.minimum).into(),
            point_id: point.to_string(),
            read_bytes: READ_BYTES,
            require_all_disks: policy.require_all_disks,
            allow_offline: policy.allow_offline,
            no_quiesce: policy.no_quiesce,
            truncate_logs: policy.truncate_logs,
            no_change_tracking: policy.no_change_tracking,
            skip_page_files: policy.skip_page_files,
            flat_checkpoints: policy.flat_checkpoints,
            before_command: policy.before_command.clone(),
            after_command: policy.after_command.clone(),
            command_failure_fails: policy.command_failure_fails,
        }),
        Work::Restore(r) => WireWork::Restore(rpc::RestoreWork {
            point_id: r.point.to_string(),
            manifest_id: r.manifest.to_string(),
            target_name: r.name.clone(),
            target_folder: r.folder.clone(),
            keep_guid: r.keep_guid,
            overwrite: r.overwrite,
            power_on: r.power_on,
            highly_available: r.highly_available,
            switches: r
                .switches
                .iter()
                .map(|(from, to)| rpc::SwitchChoice { from: from.clone(), to: to.clone() })
                .collect(),
            disconnect: r.disconnect,
            discard_saved_state: r.discard_saved_state,
            with_checkpoints: r.with_checkpoints,
            checkpoint: r.checkpoint.clone(),
            keep_replaced: r.keep_replaced,
            boot_check: r.boot_check.as_ref().map(|check| rpc::BootCheck {
                patience_ms: check.patience_ms,
                text: check.text.clone(),
                screen: check.screen,
            }),
        }),
        Work::Cleanup { why } => WireWork::Cleanup(rpc::CleanupWork { why: why.clone() }),
    }
}

/// A ticket with which an operator's own machine may read a point.
pub(crate) fn operator_ticket(
    settings: &Settings,
    keys: &KeyRing,
    vm: VmGuid,
    operator: &str,
    now_ms: u64,
) -> Vec<u8> {
    let (domain, _) = keys.default_domain();
    keys.sign(&Ticket {
        operations: Operations::RESTORE,
        fabric: settings.fabric,
        job: JobId::random(),
        vm,
        domain: domain.domain,
        lease_epoch: LeaseEpoch(0),
        not_after_unix_ms: not_after(now_ms, RESTORE_TICKET_LIFE),
        host: operator.to_owned(),
    })
}

fn not_after(now_ms: u64, life: Duration) -> u64 {
    now_ms.saturating_add(u64::try_from(life.as_millis()).unwrap_or(u64::MAX))
}
