//! storage-killed: a storage node dies under a job; the data is safe on the others, and the node catches up.

use outrider_proto::rpc;
use serde_json::json;

use super::{Figures, stats_figures};
use crate::demo::configs::{STORAGE, storage_name};
use crate::demo::stage::{PATIENCE, Stage};
use crate::report::Failure;

const WRITES: u64 = 48 << 20;

pub(super) async fn run(stage: &mut Stage) -> Result<Figures, Failure> {
    let vm = stage.by_size(2);
    let name = stage.vms[vm].name.clone();
    let written = stage.guest_writes(vm, WRITES, true, 300).await?;
    let gate = stage.gate(vm, written / 2).await?;
    let jobs = stage.start_backup(Some(vm), rpc::BackupKind::Incremental).await?;
    stage.held(gate, &jobs).await?;

    let node = STORAGE[1];
    let before = incarnation(stage, node).await?;
    let pid = stage.processes.kill(&storage_name(node)).await?;
    stage
        .tell
        .note(format!("{name} is held in mid-backup; storage node {node} is killed (pid {pid})"));
    stage.lab.release_gate(gate).await?;
    let jobs = stage.finish(&jobs).await?;
    stage.tell.note("the job completed on the two nodes that are left");
    let compared = stage.verify(vm, &jobs[0].point_id).await?;
    stage.tell.note("the point, read from the two nodes, is the checkpoint byte for byte");

    stage.processes.restart(&storage_name(node)).await?;
    stage
        .until("the storage node has caught up", PATIENCE, async || {
            let s = stage.operator.status().await?;
            let find =
                |n: &&rpc::StorageNodeStatus| n.node.as_ref().is_some_and(|n| n.name == node);
            let Some(now) = s.storage.iter().find(find) else {
                return Ok(Err("it is not listed".into()));
            };
            let online = now.node.as_ref().is_some_and(|n| n.online && n.incarnation > before);
            Ok(
                if online
                    && now.catching_up_ids == 0
                    && now.state == "serving"
                    && now.damaged_records == 0
                {
                    Ok(())
                } else {
                    Err(format!(
                        "online {online}, {:?}, {} ids behind",
                        now.state, now.catching_up_ids
                    ))
                },
            )
        })
        .await?;
    stage.tell.note(format!("{node} was started again and has caught up"));
    let mut figures = stats_figures(&jobs[0].stats.unwrap_or_default());
    figures.extend(super::figures([
        ("vm", json!(name)),
        ("killed", json!(node)),
        ("attempts", json!(jobs[0].attempts.len())),
        ("compared_bytes", json!(compared)),
    ]));
    Ok(figures)
}

async fn incarnation(stage: &Stage, node: &str) -> Result<u64, Failure> {
    let status = stage.operator.status().await?;
    let nodes = status.storage.into_iter().filter_map(|n| n.node);
    Ok(nodes.filter(|n| n.name == node).map(|n| n.incarnation).max().unwrap_or(0))
}
