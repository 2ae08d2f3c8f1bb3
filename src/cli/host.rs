//! `outrider host`

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use outrider_proto::rpc;
use serde_json::json;
use tokio::time::Instant;

use super::connect::Connection;
use super::{Done, duration, view};
use crate::output;
use crate::report::Failure;

/// Between two looks at a host that is being cleaned.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// All hosts with an agent
    List(Connection),
    /// Checkpoints, child files and reference points on hosts that no job of this fabric explains, other products' included.
    /// Only looks. Exits with 1 when a host could not be looked at
    Orphans(Orphans),
    /// Let a host leave: no new work for it, and what is ours there is removed
    Retire(Retire),
    /// Remove a host that has left: frees its name, refuses its certificate
    Forget(Forget),
}

#[derive(Debug, Args)]
pub(super) struct Orphans {
    /// Look at this host only
    host: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Args)]
pub(super) struct Retire {
    /// The host
    host: String,
    /// It stays after all
    #[arg(long)]
    cancel: bool,
    /// How long to wait until it is clean; 0s only begins
    #[arg(long, default_value = "10m", value_parser = duration, value_name = "TIME", conflicts_with = "cancel")]
    wait: Duration,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Args)]
pub(super) struct Forget {
    /// The host
    host: String,
    /// Also when something of ours may be left there, as when the machine is gone for good
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    match command {
        Command::List(connection) => list(&connection, json).await,
        Command::Orphans(args) => orphans(args, json).await,
        Command::Retire(args) => retire(args, json).await,
        Command::Forget(args) => forget(args, json).await,
    }
}

async fn list(connection: &Connection, json: bool) -> Done {
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

async fn orphans(args: Orphans, json: bool) -> Done {
    let reply = args.connection.open()?.orphans(args.host.as_deref().unwrap_or_default()).await?;
    let blind = reply.looked.iter().filter(|l| !l.failure.is_empty()).count();
    if json {
        let orphans: Vec<_> = reply.orphans.iter().map(view::orphan).collect();
        let looked: Vec<_> = reply
            .looked
            .iter()
            .map(|l| json!({ "host": l.host, "failure": l.failure, "explained": l.explained }))
            .collect();
        output::json(&json!({ "ok": blind == 0, "orphans": orphans, "hosts": looked }));
    } else {
        show(&reply);
    }
    Ok(if blind == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(reply: &rpc::ListOrphansReply) {
    if !reply.orphans.is_empty() {
        let rows = reply.orphans.iter().map(|o| {
            let name = if o.name.is_empty() { o.id.clone() } else { o.name.clone() };
            let age = if o.created_unix_ms == 0 {
                "unknown".to_owned()
            } else {
                output::ago(o.created_unix_ms)
            };
            [o.host.clone(), o.vm_name.clone(), o.what.clone(), name, o.owner.clone(), age]
        });
        let headers = ["host", "vm", "what", "name", "owner", "made"];
        println!("{}", output::table(headers, rows.collect()));
    }
    for o in &reply.orphans {
        println!("\n{} {:?} of VM {} on {}", o.what, o.id, o.vm_name, o.host);
        println!("  why   {}", o.why);
        if !o.chain.is_empty() {
            println!("  chain {}", o.chain.join("\n     <- "));
        }
        println!("  next  {}", o.next);
    }
    for looked in &reply.looked {
        if looked.failure.is_empty() {
            eprintln!(
                "{}: {} checkpoints and reference points are explained",
                looked.host, looked.explained
            );
        } else {
            eprintln!("{} was not looked at: {}", looked.host, looked.failure);
        }
    }
    if reply.orphans.is_empty() {
        eprintln!("nothing unexplained was found");
    }
}

async fn retire(args: Retire, json: bool) -> Done {
    let operator = args.connection.open()?;
    let mut reply = operator.retire_host(&args.host, args.cancel).await?;
    if args.cancel {
        return told(&reply, json, "stays");
    }
    let until = Instant::now() + args.wait;
    let mut told_waits = Vec::new();
    while !reply.waits.is_empty() {
        if reply.waits != told_waits {
            for wait in &reply.waits {
                eprintln!("{wait}");
            }
            told_waits.clone_from(&reply.waits);
        }
        if Instant::now() >= until {
            if args.wait.is_zero() {
                return told(&reply, json, "is leaving");
            }
            return Err(not_clean(&args.host, &reply.waits));
        }
        tokio::time::sleep(LOOK).await;
        reply = operator.retire_host(&args.host, false).await?;
    }
    told(&reply, json, "is clean; it gets no work any more")
}

fn told(reply: &rpc::RetireHostReply, json: bool, what: &str) -> Done {
    let host = reply.host.clone().unwrap_or_default();
    if json {
        output::json(
            &json!({ "ok": true, "host": view::host(&host), "clean": reply.waits.is_empty(), "waits": reply.waits }),
        );
    } else {
        eprintln!("host {} {what}", host.name);
    }
    Ok(ExitCode::SUCCESS)
}

fn not_clean(host: &str, waits: &[String]) -> Failure {
    Failure::new(format!("host {host} is not clean yet"))
        .because(waits.join("; "))
        .hint("It goes on leaving; ask again, or keep it with `outrider host retire --cancel`.")
}

async fn forget(args: Forget, json: bool) -> Done {
    let reply = args.connection.open()?.forget_host(&args.host, args.force).await?;
    if json {
        output::json(&json!({ "ok": true, "host": args.host, "left": reply.left }));
        return Ok(ExitCode::SUCCESS);
    }
    for left in &reply.left {
        eprintln!("left behind: {left}");
    }
    eprintln!("host {} is forgotten; its name is free, its certificate is refused", args.host);
    Ok(ExitCode::SUCCESS)
}
