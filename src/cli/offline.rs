//! Tools beside storage nodes: `outrider storage inspect` looks into their files without a fabric, `outrider storage probe` at the way to them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use futures::future::join_all;
use outrider_process::network::Network;
use outrider_proto::ids::FabricId;
use outrider_proto::layout::StorageNode;
use outrider_storage_client::ClientRole;
use outrider_storage_client::quic::probe::{Prober, told};
use serde_json::json;

use super::Done;
use super::connect::Connection;
use crate::output;
use crate::report::Failure;

#[derive(Debug, Subcommand)]
pub(crate) enum StorageCommand {
    /// Which records a segment file holds, and whether each is whole
    Inspect {
        /// The file
        segment: PathBuf,
    },
    /// Whether this machine reaches the storage nodes over UDP, how fast, and how large packets may be. Exits with 1 when one
    /// cannot be reached
    Probe(Connection),
}

pub(super) async fn storage(command: StorageCommand, json: bool) -> Done {
    match command {
        StorageCommand::Inspect { segment } => inspect(&segment, json),
        StorageCommand::Probe(connection) => probe(&connection, json).await,
    }
}

async fn probe(connection: &Connection, json: bool) -> Done {
    let operator = connection.open()?;
    let status = operator.status().await?;
    let fabric: FabricId = status.fabric.parse().map_err(|_| {
        Failure::new("the coordinators name no fabric").because(status.fabric.clone())
    })?;
    let nodes = status.storage.iter().filter_map(|s| s.node.as_ref());
    let nodes: Vec<StorageNode> = nodes
        .map(|node| StorageNode::try_from(node).map_err(|e| Failure::new(e.to_string())))
        .collect::<Result<_, _>>()?;
    let network = Network::default();
    let prober = Prober::new(operator.identity(), fabric, ClientRole::Operator, network)
        .map_err(|e| Failure::new(e.to_string()))?;
    let tries = nodes.iter().flat_map(|node| node.addresses.iter().map(move |at| (node, at)));
    let tries = tries.map(|(node, at)| {
        let prober = &prober;
        async move { (node, at, prober.try_path(node, at).await) }
    });
    let tried = join_all(tries).await;
    let failed = tried.iter().filter(|(_, _, path)| path.is_err()).count();
    if json {
        let list: Vec<_> = tried
            .iter()
            .map(|(node, at, path)| {
                let found = path.as_ref().ok();
                json!({
                    "node": node.name, "address": at, "reached": found.is_some(),
                    "rtt_us": found.map(|p| u64::try_from(p.rtt.as_micros()).unwrap_or(u64::MAX)),
                    "packet_bytes": found.map(|p| p.packet), "detail": told(path),
                })
            })
            .collect();
        output::json(&json!({ "ok": failed == 0 && !tried.is_empty(), "paths": list }));
    } else {
        let rows = tried.iter().map(|(node, at, path)| {
            let rtt = path
                .as_ref()
                .map_or_else(|_| "-".into(), |p| format!("{:.1} ms", p.rtt.as_secs_f64() * 1000.0));
            let packet = path.as_ref().map_or_else(|_| "-".into(), |p| p.packet.to_string());
            [node.name.clone(), (*at).clone(), rtt, packet, told(path)]
        });
        let headers = ["storage", "address", "round trip", "packet", "found"];
        println!("{}", output::right(output::table(headers, rows.collect()), &[2, 3]));
    }
    if tried.is_empty() {
        return Err(Failure::new("no storage node has joined yet")
            .hint("Start them; `outrider status` shows them."));
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn inspect(segment: &Path, json: bool) -> Done {
    let found = outrider_format::inspect::inspect(segment)?;
    let sound = found.is_sound();
    if json {
        let damage: Vec<_> = found.scan.damage.iter().map(|d| format!("{d:?}")).collect();
        output::json(&json!({
            "ok": sound, "path": found.path, "file_bytes": found.file_len, "sealed": found.sealed,
            "watermark": found.watermark, "record_bytes": found.record_bytes, "named": found.named,
            "records_by_pg": found.by_pg.iter().map(|(pg, n)| json!([pg.0, n])).collect::<Vec<_>>(),
            "footer_problem": found.footer_problem, "damage": damage,
        }));
    } else {
        println!("{found}");
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
