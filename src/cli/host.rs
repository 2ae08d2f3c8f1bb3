//! `outrider host`

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

use super::connect::Connection;
use super::{Done, view};
use crate::output;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// All hosts with an agent
    List(Connection),
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    let Command::List(connection) = command;
    let hosts = connection.open()?.hosts().await?;
    if json {
        let hosts: Vec<_> = hosts.iter().map(view::host).collect();
        output::json(&json!({ "ok": true, "hosts": hosts }));
        return Ok(ExitCode::SUCCESS);
    }
    let rows = hosts.into_iter().map(|h| {
        let heard = output::ago(h.last_heard_unix_ms);
        [
            h.name,
            h.realm,
            h.state,
            h.hypervisor,
            h.vms.to_string(),
            h.jobs.to_string(),
            heard,
            h.version,
        ]
    });
    let headers = ["host", "realm", "state", "hypervisor", "vms", "jobs", "heard", "version"];
    println!("{}", output::right(output::table(headers, rows.collect()), &[4, 5]));
    Ok(ExitCode::SUCCESS)
}
