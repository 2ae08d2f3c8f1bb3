//! What is shown of the fabric's objects, once as JSON and in parts as table cells.

use outrider_proto::model;
use outrider_proto::rpc;
use serde_json::{Value, json};

/// `realm/guid` with the role where it is not the primary.
pub(crate) fn vm_key(vm: Option<&rpc::VmKey>) -> String {
    vm.map(|v| model::vm_key("Vm", Some(v)).map_or_else(|_| v.guid.clone(), |k| k.to_string()))
        .unwrap_or_default()
}

pub(crate) fn kind(kind: rpc::BackupKind) -> &'static str {
    match kind {
        rpc::BackupKind::Unspecified => "",
        rpc::BackupKind::Incremental => "incremental",
        rpc::BackupKind::Full => "full",
        rpc::BackupKind::ConsistencyCheck => "consistency check",
    }
}

pub(crate) fn consistency(consistency: rpc::Consistency) -> &'static str {
    match consistency {
        rpc::Consistency::Unspecified => "",
        rpc::Consistency::Crash => "crash",
        rpc::Consistency::FileSystem => "file system",
        rpc::Consistency::Application => "application",
        rpc::Consistency::SavedState => "saved state",
        rpc::Consistency::Off => "off",
    }
}

pub(crate) fn duty(state: rpc::DutyState) -> &'static str {
    match state {
        rpc::DutyState::Unspecified => "",
        rpc::DutyState::Recorded => "recorded",
        rpc::DutyState::Created => "created",
        rpc::DutyState::Converted => "converted",
        rpc::DutyState::Done => "done",
    }
}

pub(crate) fn stats(stats: Option<&rpc::JobStats>) -> Value {
    let Some(s) = stats else { return Value::Null };
    json!({
        "disk_bytes": s.disk_bytes, "changed_bytes": s.changed_bytes, "read_bytes": s.read_bytes,
        "reread_bytes": s.reread_bytes, "zero_bytes": s.zero_bytes, "known_bytes": s.known_bytes,
        "sent_bytes": s.sent_bytes, "resent_bytes": s.resent_bytes, "stored_bytes": s.stored_bytes,
        "reused_pages": s.reused_pages, "adopted_pages": s.adopted_pages, "chunks_new": s.chunks_new,
        "chunks_known": s.chunks_known, "sampled_chunks": s.sampled_chunks, "duration_ms": s.duration_ms,
        "excluded_bytes": s.excluded_bytes,
    })
}

pub(crate) fn job(j: &rpc::Job) -> Value {
    let attempts: Vec<_> = j
        .attempts
        .iter()
        .map(|a| {
            json!({
                "number": a.number, "host": a.host, "lease_epoch": a.lease_epoch,
                "started_unix_ms": a.started_unix_ms, "ended_unix_ms": a.ended_unix_ms, "end": a.end,
            })
        })
        .collect();
    let commands: Vec<_> = j
        .commands
        .iter()
        .map(|c| {
            json!({
                "name": c.name, "when": c.when, "host": c.host, "started_unix_ms": c.started_unix_ms,
                "duration_ms": c.duration_ms, "good": c.good, "end": c.end, "output": c.output,
            })
        })
        .collect();
    json!({
        "job_id": j.job_id, "kind": j.kind, "backup_kind": kind(j.backup_kind()), "vm": vm_key(j.vm.as_ref()),
        "vm_name": j.vm_name, "state": j.state, "phase": j.phase, "reason": j.reason, "host": j.host,
        "attempts": attempts, "stats": stats(j.stats.as_ref()), "total_bytes": j.total_bytes,
        "created_unix_ms": j.created_unix_ms, "ended_unix_ms": j.ended_unix_ms, "data_safe": j.data_safe,
        "host_clean": j.host_clean, "point_id": j.point_id, "warnings": j.warnings, "error_code": j.error_code,
        "restored_vm": vm_key(j.restored_vm.as_ref()), "commands": commands,
    })
}

pub(crate) fn point(p: &rpc::Point) -> Value {
    json!({
        "point_id": p.point_id, "vm": vm_key(p.vm.as_ref()), "vm_name": p.vm_name, "manifest_id": p.manifest_id,
        "job_id": p.job_id, "taken_unix_ms": p.taken_unix_ms, "committed_unix_ms": p.committed_unix_ms,
        "consistency": consistency(p.consistency()), "kind": kind(p.kind()), "stats": stats(p.stats.as_ref()),
        "reasons": p.reasons, "incarnation": p.incarnation, "checkpoint_id": p.checkpoint_id,
        "tracking_unproven": p.tracking_unproven, "disks": disks(&p.disks), "hosts": p.hosts,
        "parent_point_id": p.parent_point_id,
    })
}

pub(crate) fn disks(disks: &[rpc::DiskIdentity]) -> Value {
    disks
        .iter()
        .map(|d| json!({ "disk_id": d.disk_id, "size_bytes": d.size_bytes, "slot": d.slot }))
        .collect()
}

pub(crate) fn vm(v: &rpc::Vm) -> Value {
    let duties: Vec<_> = v
        .duties
        .iter()
        .map(|d| {
            json!({
                "duty_id": d.duty_id, "job_id": d.job_id, "state": duty(d.state()),
                "checkpoint_name": d.checkpoint_name, "checkpoint_id": d.checkpoint_id,
            })
        })
        .collect();
    json!({
        "vm": vm_key(v.key.as_ref()), "name": v.name, "host": v.host, "placement_epoch": v.placement_epoch,
        "incarnation": v.incarnation, "state": v.state, "disks": disks(&v.disks), "group_id": v.group_id,
        "group_name": v.group_name, "last_point_unix_ms": v.last_point_unix_ms, "points": v.points,
        "bound_reference_point": v.bound_reference_point, "duties": duties, "duplicate": v.duplicate,
    })
}

pub(crate) fn host(h: &rpc::Host) -> Value {
    json!({
        "name": h.name, "realm": h.realm, "state": h.state, "version": h.version, "hypervisor": h.hypervisor,
        "vms": h.vms, "jobs": h.jobs, "last_heard_unix_ms": h.last_heard_unix_ms,
    })
}

pub(crate) fn group(g: &rpc::Group) -> Value {
    let policy = g.policy.as_ref().map(|p| {
        json!({
            "every_ms": p.every_ms, "wanted": consistency(p.wanted()), "minimum": consistency(p.minimum()),
            "chunk_size": p.chunk_size, "require_all_disks": p.require_all_disks,
            "allow_offline": p.allow_offline, "no_quiesce": p.no_quiesce, "truncate_logs": p.truncate_logs,
            "no_change_tracking": p.no_change_tracking, "skip_page_files": p.skip_page_files,
            "before_command": p.before_command, "after_command": p.after_command,
            "before_must_succeed": p.command_failure_fails,
            "check_within_ms": p.check_within_ms,
            "checkpoints": if p.flat_checkpoints { "flat" } else { "tree" },
        })
    });
    json!({
        "group_id": g.group_id, "name": g.name, "vms": g.vms.iter().map(|v| vm_key(Some(v))).collect::<Vec<_>>(),
        "name_patterns": g.name_patterns, "policy": policy, "next_run_unix_ms": g.next_run_unix_ms,
        "skipped_runs": g.skipped_runs,
    })
}

pub(crate) fn status(s: &rpc::StatusReply) -> Value {
    let members: Vec<_> = s
        .members
        .iter()
        .map(|m| json!({ "id": m.id, "address": m.address, "role": m.role }))
        .collect();
    let storage: Vec<_> = s.storage.iter().map(storage_node).collect();
    let layout = s.layout.as_ref().map(|l| {
        json!({
            "epoch": l.epoch, "pg_count": l.pg_count, "replicas": l.replicas, "min_durable": l.min_durable,
        })
    });
    json!({
        "fabric": s.fabric, "members": members, "leader_id": s.leader_id, "term": s.term, "layout": layout,
        "storage": storage, "hosts_up": s.hosts_up, "hosts_down": s.hosts_down, "vms": s.vms,
        "vms_protected": s.vms_protected, "jobs_running": s.jobs_running, "points": s.points,
        "open_duties": s.open_duties, "alarms": s.alarms, "stale": s.stale,
    })
}

fn storage_node(s: &rpc::StorageNodeStatus) -> Value {
    let node = s.node.as_ref();
    json!({
        "name": node.map(|n| n.name.as_str()), "zone": node.map(|n| n.zone.as_str()),
        "addresses": node.map(|n| n.addresses.as_slice()), "online": node.map(|n| n.online),
        "incarnation": node.map(|n| n.incarnation), "state": s.state, "stored_bytes": s.stored_bytes,
        "free_bytes": s.free_bytes, "chunks": s.chunks, "catching_up_ids": s.catching_up_ids,
        "damaged_records": s.damaged_records,
    })
}

pub(crate) fn orphan(o: &rpc::Orphan) -> Value {
    json!({
        "host": o.host, "vm": vm_key(o.vm.as_ref()), "vm_name": o.vm_name, "what": o.what, "id": o.id,
        "name": o.name, "owner": o.owner, "created_unix_ms": o.created_unix_ms, "chain": o.chain,
        "why": o.why, "next": o.next,
    })
}
