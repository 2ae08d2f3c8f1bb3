//! `outrider vm`

use std::process::ExitCode;

use clap::Subcommand;
use outrider_proto::rpc;
use serde_json::json;

use super::connect::Connection;
use super::{Done, view};
use crate::output;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// All VMs that agents report
    List {
        /// Only VMs of this name
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        connection: Connection,
    },
    /// Say that what a VM left that was deleted in mid-backup was looked after: ends its alarm. See `outrider host orphans`
    Settle {
        /// Name or id
        vm: String,
        #[command(flatten)]
        connection: Connection,
    },
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    match command {
        Command::List { name, connection } => list(name, &connection, json).await,
        Command::Settle { vm, connection } => {
            let settled = connection.open()?.settle_vm(&vm).await?;
            if json {
                output::json(&json!({ "ok": true, "vm": view::vm(&settled) }));
            } else {
                eprintln!("nothing is owed any more for what VM {} left", settled.name);
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn list(name: Option<String>, connection: &Connection, json: bool) -> Done {
    let vms = connection.open()?.vms(&name.unwrap_or_default()).await?;
    if json {
        let vms: Vec<_> = vms.iter().map(view::vm).collect();
        output::json(&json!({ "ok": true, "vms": vms }));
        return Ok(ExitCode::SUCCESS);
    }
    let rows = vms.iter().map(|v| {
        let size: u64 = v.disks.iter().map(|d| d.size_bytes).sum();
        [
            v.name.clone(),
            output::or_dash(&v.host),
            v.state.clone(),
            output::bytes(size),
            output::or_dash(&v.group_name),
            v.points.to_string(),
            output::time(v.last_point_unix_ms),
            note(v),
            view::vm_key(v.key.as_ref()),
        ]
    });
    let headers = ["vm", "host", "state", "disks", "group", "points", "last point", "note", "id"];
    println!("{}", output::right(output::table(headers, rows.collect()), &[3, 5]));
    Ok(ExitCode::SUCCESS)
}

fn note(v: &rpc::Vm) -> String {
    let role = v.key.as_ref().map_or(rpc::VmRole::Primary, rpc::VmKey::role);
    if role == rpc::VmRole::TestReplica {
        "test failover: never backed up".to_owned()
    } else if role == rpc::VmRole::Replica && v.group_name.is_empty() {
        format!("replica: protected only as {:?}", format!("{}@replica", v.name))
    } else if role == rpc::VmRole::Replica {
        "replica".to_owned()
    } else if v.duplicate {
        "seen on two hosts".to_owned()
    } else if !v.duties.is_empty() {
        format!("{} open duties", v.duties.len())
    } else {
        "-".to_owned()
    }
}
