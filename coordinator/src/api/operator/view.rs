//! The state as operators see it.

use std::collections::BTreeMap;

use openraft::ServerState;
use outrider_proto::error_code;
use outrider_proto::ids::{GroupId, VmKey};
use outrider_proto::rpc;

use super::wire;
use crate::leader::{Leader, Outlook, wire_layout};
use crate::schedule::{self, Live};
use crate::state::State;
use crate::state::groups::Policy;
use crate::state::jobs::{End, Job, Stage, Work};
use crate::state::points::Point;

/// Jobs in a list when no number is asked for.
const JOBS: usize = 100;

pub(super) fn hosts(state: &State, live: &Live, heard: &BTreeMap<String, u64>) -> Vec<rpc::Host> {
    let mut vms: BTreeMap<&str, u32> = BTreeMap::new();
    for host in state.vms.values().filter_map(|vm| vm.host.as_deref()) {
        *vms.entry(host).or_default() += 1;
    }
    let mut jobs: BTreeMap<&str, u32> = BTreeMap::new();
    for lease in state.jobs.unfinished().filter_map(Job::lease) {
        *jobs.entry(lease.host.as_str()).or_default() += 1;
    }
    state
        .hosts
        .iter()
        .map(|(name, host)| rpc::Host {
            name: name.clone(),
            realm: host.realm.clone(),
            state: match (host.up, live.attached.contains_key(name)) {
                (false, _) => "down",
                (true, true) => "up",
                (true, false) => "silent",
            }
            .to_owned()
                + if host.leaving.is_some() { ", leaving" } else { "" },
            version: host.version.clone(),
            hypervisor: host.hypervisor.clone(),
            vms: vms.get(name.as_str()).copied().unwrap_or_default(),
            jobs: jobs.get(name.as_str()).copied().unwrap_or_default(),
            last_heard_unix_ms: heard.get(name).copied().unwrap_or(host.attached_ms),
        })
        .collect()
}

pub(super) fn vms(state: &State, keys: Vec<VmKey>) -> Vec<rpc::Vm> {
    let mut points: BTreeMap<&VmKey, (u64, u64)> = BTreeMap::new();
    for point in state.points.values() {
        let (count, last) = points.entry(&point.vm).or_default();
        *count += 1;
        *last = (*last).max(point.taken_ms);
    }
    keys.into_iter()
        .filter_map(|key| {
            let vm = state.vms.get(&key)?;
            let (count, last) = points.get(&key).copied().unwrap_or_default();
            let group = state.group_of(&key);
            Some(rpc::Vm {
                key: Some((&key).into()),
                name: vm.name.clone(),
                host: vm.host.clone().unwrap_or_default(),
                placement_epoch: vm.placement.0,
                incarnation: vm.incarnation.0,
                state: if vm.gone_since_ms.is_some() { "gone".into() } else { vm.state.clone() },
                disks: vm.disks.iter().map(wire::disk).collect(),
                group_id: group.map(|(id, _)| id.to_string()).unwrap_or_default(),
                group_name: group.map(|(_, g)| g.name.clone()).unwrap_or_default(),
                last_point_unix_ms: last,
                points: count,
                bound_reference_point: state
                    .bases
                    .get(&key)
                    .map(|base| base.binding.reference_point.clone())
                    .unwrap_or_default(),
                duties: state.open_duties(&key).map(wire::duty).collect(),
                duplicate: vm.duplicate,
            })
        })
        .collect()
}

pub(super) fn group(state: &State, id: GroupId) -> Option<rpc::Group> {
    let group = state.groups.get(&id)?;
    Some(rpc::Group {
        group_id: id.to_string(),
        name: group.name.clone(),
        vms: state.members(id).iter().map(Into::into).collect(),
        name_patterns: group.patterns.clone(),
        policy: Some(policy(&group.policy)),
        next_run_unix_ms: group.next_run_ms.unwrap_or(0),
        skipped_runs: group.skipped_runs,
    })
}

fn policy(policy: &Policy) -> rpc::Policy {
    rpc::Policy {
        every_ms: policy.every_ms,
        wanted: wire::consistency(policy.wanted).into(),
        minimum: wire::consistency(policy.minimum).into(),
        chunk_size: policy.chunk_size,
        require_all_disks: policy.require_all_disks,
        allow_offline: policy.allow_offline,
        no_quiesce: policy.no_quiesce,
        truncate_logs: policy.truncate_logs,
        no_change_tracking: policy.no_change_tracking,
        skip_page_files: policy.skip_page_files,
        check_within_ms: Some(policy.check_within_ms),
        flat_checkpoints: policy.flat_checkpoints,
        before_command: policy.before_command.clone(),
        after_command: policy.after_command.clone(),
        command_failure_fails: policy.command_failure_fails,
    }
}

/// Newest first.
pub(super) fn jobs(
    state: &State,
    outlook: &Outlook,
    vm: Option<&VmKey>,
    wanted: &str,
    limit: u32,
) -> Vec<rpc::Job> {
    let mut jobs: Vec<&Job> =
        state.jobs.iter().filter(|job| vm.is_none_or(|vm| job.vm == *vm)).collect();
    jobs.sort_by_key(|job| std::cmp::Reverse((job.created_ms, job.id)));
    let limit = if limit == 0 { JOBS } else { limit as usize };
    jobs.into_iter()
        .map(|found| (found, job(state, outlook, found)))
        .filter(|(found, shown)| match wanted {
            "" => true,
            "running" => found.lease().is_some(),
            wanted => shown.state == wanted,
        })
        .map(|(_, shown)| shown)
        .take(limit)
        .collect()
}

/// A job with its progress, if it runs.
pub(super) fn job(state: &State, outlook: &Outlook, job: &Job) -> rpc::Job {
    let progress = outlook.progress.get(&job.id).filter(|_| job.lease().is_some());
    let phase = progress.as_ref().map(|p| p.phase.clone()).unwrap_or_default();
    let last_host = || job.attempts.last().map(|a| a.host.clone()).unwrap_or_default();
    let (shown, reason, host, ended) = match &job.stage {
        Stage::Pending { .. } => {
            let waits = schedule::waits(state, &outlook.live, &outlook.limits, job, outlook.now_ms);
            let mut reason = waits.map(|w| w.to_string()).unwrap_or_default();
            if !job.message.is_empty() {
                reason = format!("{reason} (last attempt: {})", job.message).trim().to_owned();
            }
            ("pending".to_owned(), reason, String::new(), 0)
        }
        Stage::Leased(lease) => {
            let shown = if phase.is_empty() { "preparing".to_owned() } else { phase.clone() };
            (shown, String::new(), lease.host.clone(), 0)
        }
        Stage::Ended { at_ms, end } => {
            (ended_word(job, *end).to_owned(), job.message.clone(), last_host(), *at_ms)
        }
    };
    let (stats, total_bytes) =
        progress.map_or((job.stats, 0), |progress| (progress.stats, progress.total_bytes));
    let (point_id, backup_kind) = match &job.work {
        Work::Backup { kind, .. } => {
            (job.committed.map(|p| p.to_string()).unwrap_or_default(), wire::backup_kind(*kind))
        }
        Work::Restore(restore) => (restore.point.to_string(), rpc::BackupKind::Unspecified),
        Work::Cleanup { .. } => (String::new(), rpc::BackupKind::Unspecified),
    };
    rpc::Job {
        job_id: job.id.to_string(),
        kind: job.work.name().to_owned(),
        vm: Some((&job.vm).into()),
        vm_name: job.vm_name.clone(),
        state: shown,
        reason,
        host,
        attempts: job.attempts.iter().map(attempt).collect(),
        stats: Some(wire::stats(&stats)),
        total_bytes,
        created_unix_ms: job.created_ms,
        ended_unix_ms: ended,
        data_safe: job.data_safe,
        host_clean: job.host_clean,
        point_id,
        backup_kind: backup_kind.into(),
        warnings: job.warnings.clone(),
        error_code: job.error_code.clone(),
        restored_vm: job.restored_vm.as_ref().map(Into::into),
        phase,
        commands: job.commands.iter().map(wire::command).collect(),
    }
}

/// A job whose host is not clean is not green.
fn ended_word(job: &Job, end: End) -> &'static str {
    match end {
        End::Completed if job.error_code == error_code::NOT_BOOTED.code => "completed, not booted",
        End::Completed if job.host_clean && job.warnings.is_empty() => "completed",
        End::Completed => "completed with warnings",
        End::Failed => "failed",
        End::Cancelled => "cancelled",
    }
}

fn attempt(attempt: &crate::state::jobs::Attempt) -> rpc::Attempt {
    rpc::Attempt {
        number: attempt.number,
        host: attempt.host.clone(),
        lease_epoch: attempt.epoch.0,
        started_unix_ms: attempt.started_ms,
        ended_unix_ms: attempt.ended_ms,
        end: attempt.end.clone(),
    }
}

pub(super) fn point(point: &Point) -> rpc::Point {
    rpc::Point {
        point_id: point.id.to_string(),
        vm: Some((&point.vm).into()),
        vm_name: point.vm_name.clone(),
        manifest_id: point.manifest.to_string(),
        job_id: point.job.to_string(),
        taken_unix_ms: point.taken_ms,
        committed_unix_ms: point.committed_ms,
        consistency: wire::consistency(point.consistency).into(),
        kind: wire::backup_kind(point.kind).into(),
        stats: Some(wire::stats(&point.stats)),
        reasons: point.reasons.clone(),
        incarnation: point.incarnation.0,
        checkpoint_id: point.checkpoint.clone(),
        tracking_unproven: point.tracking_unproven,
        disks: point.disks.iter().map(wire::disk).collect(),
        hosts: point.hosts.clone(),
        parent_point_id: point.parent.map(|p| p.to_string()).unwrap_or_default(),
    }
}

pub(super) fn status(leader: &Leader, stale: bool) -> rpc::StatusReply {
    let live = leader.live();
    let lasting = leader.trace_alarms();
    let statuses = leader.storage_statuses();
    let layout = leader.layout();
    let metrics = leader.member().raft().metrics().borrow().clone();
    let advertised = leader.member().replica().read(|state| state.advertised.clone());
    let members = metrics
        .membership_config
        .membership()
        .nodes()
        .map(|(id, node)| rpc::Member {
            id: *id,
            address: advertised.get(id).unwrap_or(&node.addr).clone(),
            role: if metrics.current_leader == Some(*id) {
                "leader"
            } else if *id == metrics.id && metrics.state == ServerState::Learner {
                "learner"
            } else {
                "follower"
            }
            .to_owned(),
        })
        .collect();
    leader.member().replica().read(|state| {
        let up = state.hosts.values().filter(|h| h.up).count();
        let protected = state.vms.keys().filter(|key| state.group_of(key).is_some()).count();
        let storage = state
            .storage
            .nodes
            .values()
            .map(|node| {
                let session = statuses.get(&node.name);
                let said = session.cloned().flatten().unwrap_or_default();
                rpc::StorageNodeStatus {
                    node: Some(rpc::StorageNode { online: session.is_some(), ..node.into() }),
                    state: match session {
                        None if stale => "unknown".to_owned(),
                        None => "offline".to_owned(),
                        Some(None) => "attached".to_owned(),
                        Some(Some(status)) => status.state.clone(),
                    },
                    stored_bytes: said.stored_bytes,
                    free_bytes: said.free_bytes,
                    chunks: said.chunks,
                    catching_up_ids: said.catching_up_ids,
                    damaged_records: said.damaged_records,
                }
            })
            .collect::<Vec<_>>();
        rpc::StatusReply {
            fabric: leader.settings().fabric.to_string(),
            members,
            leader_id: metrics.current_leader.unwrap_or(0),
            term: metrics.current_term,
            layout: wire_layout(&layout),
            hosts_up: count(up),
            hosts_down: count(state.hosts.len() - up),
            vms: count(state.vms.len()),
            vms_protected: count(protected),
            jobs_running: count(state.jobs.unfinished().filter(|j| j.lease().is_some()).count()),
            points: state.points.len() as u64,
            open_duties: count(state.duties.values().filter(|duty| duty.is_open()).count()),
            alarms: if stale {
                Vec::new()
            } else {
                alarms(state, &live, &storage).into_iter().chain(lasting).collect()
            },
            storage,
            stale,
        }
    })
}

fn alarms(state: &State, live: &Live, storage: &[rpc::StorageNodeStatus]) -> Vec<String> {
    let mut alarms = Vec::new();
    if state.storage.layout.pgs.is_empty() {
        alarms
            .push("too few storage nodes have joined: nothing can be backed up; start more".into());
    }
    for node in storage.iter().filter(|s| s.state == "offline") {
        let name = node.node.as_ref().map(|n| n.name.as_str()).unwrap_or_default();
        alarms
            .push(format!("storage node {name} is not connected; start it, and check its network"));
    }
    for (name, host) in &state.hosts {
        if !host.up {
            alarms.push(format!("host {name} is down"));
        } else if !live.attached.contains_key(name) {
            alarms.push(format!(
                "the agent on host {name} is silent; start it, and check its network"
            ));
        }
    }
    for (vm, tries) in state.cleanups.iter().filter(|(_, tries)| tries.failed > 0) {
        alarms.push(format!(
            "the host of VM {vm} is not clean after {} tries; look for a stuck merge there",
            tries.failed
        ));
    }
    alarms.extend(state.left_by_deleted().into_iter().map(|left| left.alarm()));
    alarms
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
