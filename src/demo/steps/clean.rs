//! hosts-clean: from the lab's own view, nothing of ours is left but one bound reference point a VM.

use serde_json::json;

use super::Figures;
use crate::demo::stage::{PATIENCE, Stage};
use crate::report::Failure;

pub(super) async fn run(stage: &mut Stage) -> Result<Figures, Failure> {
    // Merges go on in the background; the story waits for their end and no longer.
    stage
        .until("every host is clean", PATIENCE, async || {
            let complaints = complaints(stage).await?;
            Ok(if complaints.is_empty() { Ok(()) } else { Err(complaints.join("; ")) })
        })
        .await?;
    let status = stage.operator.status().await?;
    stage.tell.note(format!(
        "no checkpoint of ours on {} VMs, one bound reference point each, every chain as short as it was, no duty open",
        stage.vms.len()
    ));
    Ok(super::figures([
        ("vms", json!(stage.vms.len())),
        ("reference_points", json!(stage.vms.len())),
        ("open_duties", json!(status.open_duties)),
    ]))
}

async fn complaints(stage: &Stage) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    let lab = stage.lab.state().await?;
    let known = stage.operator.vms("").await?;
    for state in &lab.vms {
        let ours = stage.vms.iter().find(|v| v.guid == state.id);
        let name = &state.name;
        let checkpoints = state.recovery_checkpoints().count();
        if checkpoints != 0 {
            found.push(format!("{name:?} has {checkpoints} recovery checkpoints"));
        }
        if state.merges != 0 {
            found.push(format!("{name:?} has {} merges pending", state.merges));
        }
        let wanted = usize::from(ours.is_some());
        if state.reference_points.len() != wanted {
            found.push(format!(
                "{name:?} has {} reference points, not {wanted}",
                state.reference_points.len()
            ));
        }
        let Some(vm) = ours else { continue };
        let chains: Vec<_> = state.disks.iter().map(|d| d.chain.len()).collect();
        if chains != vm.chains {
            found.push(format!(
                "the chains of {name:?} have {chains:?} files, {:?} at the start",
                vm.chains
            ));
        }
        let bound = known
            .iter()
            .find(|k| k.key.as_ref().is_some_and(|k| k.guid.eq_ignore_ascii_case(&vm.id())))
            .map(|k| k.bound_reference_point.to_lowercase())
            .unwrap_or_default();
        let exists = state.reference_points.iter().any(|r| bound.contains(&r.id.to_string()));
        if !exists {
            found.push(format!(
                "{name:?} is bound to reference point {bound:?}, which its host does not have"
            ));
        }
    }
    let duties = stage.operator.status().await?.open_duties;
    if duties != 0 {
        found.push(format!("{duties} duties are open"));
    }
    Ok(found)
}
