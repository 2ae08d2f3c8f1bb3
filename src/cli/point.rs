//! `outrider point`

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

use super::connect::Connection;
use super::{Done, view};
use crate::output::{self, bytes};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Recovery points, the newest last
    List {
        /// Only points of this VM (name or id)
        #[arg(long)]
        vm: Option<String>,
        #[command(flatten)]
        connection: Connection,
    },
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    let Command::List { vm, connection } = command;
    let mut points = connection.open()?.points(&vm.unwrap_or_default()).await?;
    points.sort_by_key(|p| p.committed_unix_ms);
    if json {
        let points: Vec<_> = points.iter().map(view::point).collect();
        output::json(&json!({ "ok": true, "points": points }));
        return Ok(ExitCode::SUCCESS);
    }
    let rows = points.iter().map(|p| {
        let stats = p.stats.unwrap_or_default();
        let kind = view::kind(p.kind());
        [
            p.point_id.clone(),
            p.vm_name.clone(),
            output::time(p.taken_unix_ms),
            if p.tracking_unproven {
                format!("{kind}, tracking unproven")
            } else {
                kind.to_owned()
            },
            view::consistency(p.consistency()).to_owned(),
            bytes(p.disks.iter().map(|d| d.size_bytes).sum()),
            bytes(stats.read_bytes),
            bytes(stats.sent_bytes),
            p.hosts.join(" -> "),
        ]
    });
    let headers = ["point", "vm", "taken", "kind", "consistency", "disks", "read", "sent", "hosts"];
    println!("{}", output::right(output::table(headers, rows.collect()), &[5, 6, 7]));
    Ok(ExitCode::SUCCESS)
}
