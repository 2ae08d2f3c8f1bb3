//! `outrider point`

use std::process::ExitCode;

use clap::Subcommand;
use outrider_proto::rpc;
use serde_json::json;

use super::connect::Connection;
use super::{Done, view};
use crate::output::{self, bytes};
use crate::report::Failure;

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
    /// All that is known of a recovery point, with the reasons for how it was made
    Show {
        /// Its id
        point: String,
        #[command(flatten)]
        connection: Connection,
    },
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    let (vm, connection) = match command {
        Command::List { vm, connection } => (vm, connection),
        Command::Show { point, connection } => return show(&point, connection, json).await,
    };
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
            remarks(kind, p),
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

/// The kind with what else matters at first sight.
fn remarks(kind: &str, p: &rpc::Point) -> String {
    let mut text = kind.to_owned();
    if p.tracking_unproven {
        text.push_str(", tracking unproven");
    }
    let left_out = p.stats.map_or(0, |s| s.excluded_bytes);
    if left_out > 0 {
        text.push_str(&format!(", {} left out", bytes(left_out)));
    }
    text
}

async fn show(id: &str, connection: Connection, json: bool) -> Done {
    let points = connection.open()?.points("").await?;
    let Some(p) = points.iter().find(|p| p.point_id == id) else {
        return Err(Failure::new(format!("no recovery point has the id {id:?}"))
            .hint("List them with `outrider point list`."));
    };
    if json {
        output::json(&json!({ "ok": true, "point": view::point(p) }));
        return Ok(ExitCode::SUCCESS);
    }
    let stats = p.stats.unwrap_or_default();
    println!("point       {}", p.point_id);
    println!("vm          {}", p.vm_name);
    println!("taken       {}", output::time(p.taken_unix_ms));
    println!("committed   {}", output::time(p.committed_unix_ms));
    println!("kind        {}", remarks(view::kind(p.kind()), p));
    println!("consistency {}", view::consistency(p.consistency()));
    println!("hosts       {}", p.hosts.join(" -> "));
    println!("read        {}, sent {}", bytes(stats.read_bytes), bytes(stats.sent_bytes));
    if stats.excluded_bytes > 0 {
        println!(
            "left out    {} of page and swap files: restored as zeros",
            bytes(stats.excluded_bytes)
        );
    }
    for disk in &p.disks {
        println!("disk        {} {}", disk.slot, bytes(disk.size_bytes));
    }
    for reason in &p.reasons {
        println!("because     {reason}");
    }
    Ok(ExitCode::SUCCESS)
}
