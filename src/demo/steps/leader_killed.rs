//! leader-killed: the coordinators go on without the one that led, and so does the job.

use outrider_proto::rpc;
use serde_json::json;

use super::{Figures, stats_figures};
use crate::demo::configs::coordinator_name;
use crate::demo::stage::{PATIENCE, Stage};
use crate::output::bytes;
use crate::report::Failure;

const WRITES: u64 = 48 << 20;

pub(super) async fn run(stage: &mut Stage) -> Result<Figures, Failure> {
    let vm = stage.by_size(1);
    let name = stage.vms[vm].name.clone();
    let written = stage.guest_writes(vm, WRITES, true, 200).await?;
    let gate = stage.gate(vm, written / 2).await?;
    let jobs = stage.start_backup(Some(vm), rpc::BackupKind::Incremental).await?;
    stage.held(gate, &jobs).await?;

    let old = stage.operator.status().await?.leader_id;
    let pid = stage.processes.kill(&coordinator_name(old)).await?;
    stage.tell.note(format!(
        "{name} is held in mid-backup; coordinator {old} led and is killed (pid {pid})"
    ));
    let new = stage
        .until("the coordinators elect another leader", PATIENCE, async || {
            let s = stage.operator.status().await?;
            Ok(if s.leader_id != old && s.leader_id != 0 && !s.stale {
                Ok(s.leader_id)
            } else {
                Err(format!("leader {} in term {}", s.leader_id, s.term))
            })
        })
        .await;
    stage.lab.release_gate(gate).await?;
    let new = new?;
    stage.tell.note(format!("coordinator {new} leads"));
    let jobs = stage.finish(&jobs).await?;
    let compared = stage.verify(vm, &jobs[0].point_id).await?;
    stage.tell.note(format!(
        "the job completed; its point is the checkpoint byte for byte ({} compared)",
        bytes(compared)
    ));

    stage.processes.restart(&coordinator_name(old)).await?;
    stage
        .until("the killed coordinator follows again", PATIENCE, async || {
            let s = stage.operator.status().await?;
            let role =
                s.members.iter().find(|m| m.id == old).map(|m| m.role.clone()).unwrap_or_default();
            Ok(if matches!(role.as_str(), "follower" | "leader") {
                Ok(())
            } else {
                Err(format!("it is {role:?}"))
            })
        })
        .await?;
    stage.tell.note(format!("coordinator {old} was started again and follows"));
    let mut figures = stats_figures(&jobs[0].stats.unwrap_or_default());
    figures.extend(super::figures([
        ("vm", json!(name)),
        ("killed_leader", json!(old)),
        ("new_leader", json!(new)),
        ("attempts", json!(jobs[0].attempts.len())),
        ("compared_bytes", json!(compared)),
    ]));
    Ok(figures)
}
