//! `outrider status`

use std::process::ExitCode;

use serde_json::json;

use super::connect::Connection;
use super::{Done, view};
use crate::output::{self, bytes};

pub(super) async fn run(connection: &Connection, json: bool) -> Done {
    let s = connection.open()?.status().await?;
    if json {
        output::json(&json!({ "ok": true, "status": view::status(&s) }));
        return Ok(ExitCode::SUCCESS);
    }
    println!("fabric      {}", s.fabric);
    println!(
        "hosts       {} up, {} down\nvms         {} seen, {} protected\njobs        {} running\npoints      {}\nduties      {} open",
        s.hosts_up, s.hosts_down, s.vms, s.vms_protected, s.jobs_running, s.points, s.open_duties
    );
    if let Some(l) = s.layout.as_ref().filter(|l| l.epoch > 0) {
        println!(
            "layout      epoch {}: {} PGs, {} copies, durable on {}",
            l.epoch, l.pg_count, l.replicas, l.min_durable
        );
    } else {
        println!("layout      none yet: waiting for storage nodes");
    }
    println!();
    let members = s.members.iter().map(|m| {
        let role = if m.id == s.leader_id { "leader".to_owned() } else { m.role.clone() };
        [m.id.to_string(), m.address.clone(), role]
    });
    println!("{}\n", output::table(["coordinator", "address", "role"], members.collect()));
    let storage = s.storage.iter().map(|n| {
        let node = n.node.clone().unwrap_or_default();
        [
            node.name,
            node.zone,
            if node.online { n.state.clone() } else { "offline".to_owned() },
            n.chunks.to_string(),
            bytes(n.stored_bytes),
            bytes(n.free_bytes),
            n.catching_up_ids.to_string(),
            n.damaged_records.to_string(),
        ]
    });
    let headers = ["storage", "zone", "state", "chunks", "stored", "free", "behind", "damaged"];
    println!("{}", output::right(output::table(headers, storage.collect()), &[3, 4, 5, 6, 7]));
    for alarm in &s.alarms {
        println!("\nalarm: {alarm}");
    }
    if s.stale {
        eprintln!("this answer comes from a member that does not lead; it may lag behind");
    }
    Ok(ExitCode::SUCCESS)
}
