//! What the hypervisor shows: a full inventory, then differences. When events are lost or the hypervisor was out of reach,
//! a full inventory again.

use std::sync::Arc;
use std::time::Duration;

use outrider_process::backoff::Backoff;
use outrider_process::observability::Readiness;
use outrider_proto::rpc::agent_up::What;
use tokio::sync::{mpsc, watch};

use super::Agent;
use super::wire::Wire;
use crate::hypervisor::{Change, HypervisorError};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Sends messages for one stream to the leader until its receiver is gone. An agent that is attached and cannot see its
/// hypervisor is not ready.
pub(super) async fn report(
    agent: &Arc<Agent>,
    up: mpsc::Sender<What>,
    readiness: &watch::Sender<Readiness>,
) {
    let wire = Wire { realm: agent.config.realm.clone() };
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE, Backoff::any_seed());
    loop {
        match watch_once(agent, &wire, &up, readiness).await {
            Ok(()) if up.is_closed() => return,
            Ok(()) => backoff.reset(),
            Err(e) => {
                tracing::warn!(error = %e, "the hypervisor cannot be watched, trying again");
                let why = format!("the hypervisor cannot be watched: {e}");
                readiness.send_replace(Readiness::NotReady(why));
            }
        }
        tokio::select! {
            () = up.closed() => return,
            () = tokio::time::sleep(backoff.next_wait()) => {}
        }
    }
}

async fn watch_once(
    agent: &Agent,
    wire: &Wire,
    up: &mpsc::Sender<What>,
    readiness: &watch::Sender<Readiness>,
) -> Result<(), HypervisorError> {
    // Subscribed before the inventory, so that nothing falls between the two.
    let mut changes = agent.hypervisor.watch().await?;
    if !send_inventory(agent, wire, up).await? {
        return Ok(());
    }
    readiness.send_replace(Readiness::Ready);
    loop {
        let change = tokio::select! {
            () = up.closed() => return Ok(()),
            change = changes.recv() => change,
        };
        let Some(change) = change else { return Ok(()) };
        let going_on = match wire.change(&change) {
            Some(message) => up.send(What::Change(message)).await.is_ok(),
            None => send_inventory(agent, wire, up).await?,
        };
        if let Change::Gone(vm, _) = change {
            tracing::info!(%vm, "a VM left this host");
        }
        if !going_on {
            return Ok(());
        }
    }
}

/// What the cluster has for itself is not ours to use (O8).
pub(super) async fn keep_off_cluster_networks(agent: &Agent) {
    match agent.hypervisor.cluster_only_networks().await {
        Ok(networks) => agent.network.keep_off(networks),
        // As before; the next inventory asks again.
        Err(e) => tracing::warn!(error = %e, "the cluster's networks are not known"),
    }
}

async fn send_inventory(
    agent: &Agent,
    wire: &Wire,
    up: &mpsc::Sender<What>,
) -> Result<bool, HypervisorError> {
    let inventory = agent.hypervisor.inventory().await?;
    keep_off_cluster_networks(agent).await;
    let realized = inventory.vms.iter().filter(|vm| vm.realized).count();
    agent.metrics.vms.set(i64::try_from(realized).unwrap_or(i64::MAX));
    Ok(up.send(What::Inventory(wire.inventory(&inventory))).await.is_ok())
}
