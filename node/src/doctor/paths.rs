//! The way from this host to the storage nodes (O8): over UDP, with how large packets may be.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use outrider_process::identity::Identity;
use outrider_process::leader::LeaderClient;
use outrider_process::network::Network;
use outrider_proto::layout::Layout;
use outrider_proto::rpc::StoragePlacesRequest;
use outrider_proto::rpc::agent_client::AgentClient;
use outrider_storage_client::ClientRole;
use outrider_storage_client::quic::probe::{Prober, told};

use super::{Finding, Verdict, finding};
use crate::config::Config;

const AREA: &str = "storage";
/// How long a coordinator that leads is looked for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Tries every address of every storage node, all at once.
pub(super) async fn storage(config: &Config) -> Vec<Finding> {
    let unknown = |verdict, why: String| vec![finding(AREA, "paths", verdict, why)];
    let identity = match Identity::load(&config.identity_dir) {
        Ok(identity) => Arc::new(identity),
        Err(e) => return unknown(Verdict::Stops, format!("not tried, without an identity: {e}")),
    };
    let network = Network::new(config.network.clone());
    let leader =
        LeaderClient::new(config.coordinators.clone(), identity.clone()).over(network.clone());
    let asked = leader.call(PATIENCE, |channel| async move {
        Ok(AgentClient::new(channel).storage_places(StoragePlacesRequest {}).await?.into_inner())
    });
    let layout = match asked.await {
        Ok(layout) => layout,
        Err(e) => {
            let why =
                format!("not tried, the coordinators do not say where they are: {}", e.message());
            return unknown(Verdict::Differs, why);
        }
    };
    let layout = match Layout::try_from(&layout) {
        Ok(layout) if layout.nodes.is_empty() => {
            return unknown(Verdict::Stops, "no storage node has joined yet: start them".into());
        }
        Ok(layout) => layout,
        Err(e) => return unknown(Verdict::Differs, e.to_string()),
    };
    let fabric = match config.fabric.parse() {
        Ok(fabric) => fabric,
        Err(_) => {
            return unknown(Verdict::Stops, "`fabric` of the configuration is no UUID".into());
        }
    };
    let prober = match Prober::new(&identity, fabric, ClientRole::Agent, network) {
        Ok(prober) => prober,
        Err(e) => return unknown(Verdict::Stops, e.to_string()),
    };
    let prober = &prober;
    let tries = layout.nodes.iter().map(|node| async move {
        let of =
            node.addresses.iter().map(|at| async move { (at, prober.try_path(node, at).await) });
        (node, join_all(of).await)
    });
    let mut findings = Vec::new();
    for (node, tried) in join_all(tries).await {
        // One way is enough for backups.
        let reached = tried.iter().any(|(_, path)| path.is_ok());
        for (address, path) in tried {
            let verdict = match &path {
                Ok(path) if path.is_narrow() => Verdict::Differs,
                Ok(_) => Verdict::Good,
                Err(_) if reached => Verdict::Differs,
                Err(_) => Verdict::Stops,
            };
            findings.push(finding(AREA, format!("{} {address}", node.name), verdict, told(&path)));
        }
        if node.addresses.is_empty() {
            findings.push(finding(
                AREA,
                node.name.clone(),
                Verdict::Stops,
                "it advertises no address",
            ));
        }
    }
    findings
}
