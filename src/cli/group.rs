//! `outrider group`

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use outrider_proto::rpc;
use serde_json::json;

use super::connect::Connection;
use super::{Done, view};
use crate::output;
use crate::report::Failure;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// A new protection group
    Create {
        /// Its name
        name: String,
        /// A VM by name or id; may be given several times
        #[arg(long = "vm", value_name = "VM")]
        vms: Vec<String>,
        /// A pattern of names with * and ?; VMs created later are included
        #[arg(long = "match", value_name = "PATTERN")]
        patterns: Vec<String>,
        /// How often to back up; without it only when asked
        #[arg(long, value_parser = super::duration, value_name = "TIME")]
        every: Option<Duration>,
        #[command(flatten)]
        connection: Connection,
    },
    /// All protection groups
    List(Connection),
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    match command {
        Command::Create { name, vms, patterns, every, connection } => {
            if vms.is_empty() && patterns.is_empty() {
                return Err(Failure::usage(format!("the group {name:?} would protect nothing"))
                    .hint("Name its VMs with --vm, or a pattern with --match '*'."));
            }
            let policy = rpc::Policy {
                every_ms: every.map_or(0, |e| u64::try_from(e.as_millis()).unwrap_or(u64::MAX)),
                ..Default::default()
            };
            let request = rpc::CreateGroupRequest {
                name,
                vms,
                name_patterns: patterns,
                policy: Some(policy),
            };
            let group = connection.open()?.create_group(request).await?;
            if json {
                output::json(&json!({ "ok": true, "group": view::group(&group) }));
            } else {
                println!("{}  {}", group.group_id, group.name);
                eprintln!("made; run it now with `outrider backup run --group {:?}`", group.name);
            }
        }
        Command::List(connection) => {
            let groups = connection.open()?.groups().await?;
            if json {
                let groups: Vec<_> = groups.iter().map(view::group).collect();
                output::json(&json!({ "ok": true, "groups": groups }));
                return Ok(ExitCode::SUCCESS);
            }
            let rows = groups.into_iter().map(|g| {
                let every = g.policy.as_ref().map_or(0, |p| p.every_ms);
                let every = match every {
                    0 => "when asked".to_owned(),
                    ms => humantime::format_duration(Duration::from_millis(ms)).to_string(),
                };
                let patterns = output::or_dash(&g.name_patterns.join(", "));
                let next = output::time(g.next_run_unix_ms);
                [
                    g.name,
                    g.vms.len().to_string(),
                    patterns,
                    every,
                    next,
                    g.skipped_runs.to_string(),
                    g.group_id,
                ]
            });
            let headers = ["group", "vms", "match", "every", "next run", "skipped", "id"];
            println!("{}", output::right(output::table(headers, rows.collect()), &[1, 5]));
        }
    }
    Ok(ExitCode::SUCCESS)
}
