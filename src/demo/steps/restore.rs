//! restore: another host, another name, and every byte of the checkpoint.

use outrider_proto::rpc;
use serde_json::json;
use uuid::Uuid;

use super::Figures;
use crate::demo::configs::HOSTS;
use crate::demo::stage::Stage;
use crate::output::{bytes, millis};
use crate::report::Failure;

pub(super) async fn run(stage: &mut Stage) -> Result<Figures, Failure> {
    let vm = stage.by_size(0);
    let name = stage.vms[vm].name.clone();
    let point_id = stage.vms[vm].points.last().cloned().unwrap_or_default();
    let point = stage.point(vm, &point_id).await?;
    let from = stage.lab_vm(vm).await?.host;
    let to = HOSTS.iter().rev().find(|h| **h != from).copied().unwrap_or(HOSTS[0]);
    let new_name = format!("{name} (restored)");
    let request = rpc::RestoreRequest {
        point_id,
        to_host: to.into(),
        new_name: new_name.clone(),
        power_on: true,
        ..Default::default()
    };
    let job = stage.operator.restore(request).await?;
    let jobs = stage.finish(&[job]).await?;
    let guid = jobs[0].restored_vm.as_ref().map(|v| v.guid.clone()).unwrap_or_default();
    let guid: Uuid = guid.parse().map_err(|_| {
        Failure::new(format!("the restore does not say which VM it made (it says {guid:?})"))
    })?;
    let restored = stage.lab.vm(&guid.to_string()).await?;
    if restored.id == stage.vms[vm].guid {
        return Err(Failure::new(
            "the restored VM has the GUID of the original, which still exists",
        ));
    }
    if restored.host != to || restored.name != new_name {
        return Err(Failure::new(format!(
            "asked for {new_name:?} on {to}; the lab has {:?} on {}",
            restored.name, restored.host
        )));
    }
    if restored.enabled_state != 2 {
        return Err(Failure::new(format!(
            "{new_name:?} was to be started, but its state is {}",
            restored.enabled_state
        )));
    }
    let files: Vec<_> = restored.disks.iter().filter_map(|d| d.chain.last().cloned()).collect();
    if files.len() != stage.vms[vm].disks.len() {
        return Err(Failure::new(format!(
            "{new_name:?} came back with {} disks, {name:?} has {}",
            files.len(),
            stage.vms[vm].disks.len()
        )));
    }
    stage.compare(vm, &point, &files).await?;
    let took = jobs[0].ended_unix_ms.saturating_sub(jobs[0].created_unix_ms);
    let size = stage.vms[vm].size();
    stage.tell.note(format!(
        "{new_name:?} runs on {to} after {}; its {} are identical to the checkpoint of {name:?}",
        millis(took),
        bytes(size)
    ));
    Ok(super::figures([
        ("vm", json!(name)),
        ("restored_as", json!(new_name)),
        ("host", json!(to)),
        ("compared_bytes", json!(size)),
        ("duration_ms", json!(took)),
    ]))
}
