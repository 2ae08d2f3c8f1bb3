//! `outrider node`: a process, and the service that runs it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::{Done, duration};
use crate::{install, output};
use outrider_node::doctor::Verdict;

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Make this machine a host of a fabric: joins, and runs the agent as a service. Again: upgrades it
    Install(Install),
    /// Remove the agent from this machine
    Uninstall(Uninstall),
    /// Start the installed agent
    Start,
    /// Stop the installed agent
    Stop,
    /// How the installed agent is; exits with 1 when it is not connected
    Status {
        /// An image of a Linux machine instead of this one
        #[arg(long, value_name = "DIR")]
        root: Option<PathBuf>,
    },
    /// Compare this host with what backups need of it; changes nothing. Exits with 1 when something would stop backups
    Doctor {
        /// The agent's configuration (TOML)
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// What the service manager of Windows runs
    #[cfg(windows)]
    #[command(hide = true)]
    Service {
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Install {
    /// The token that `outrider fabric token create --role node` printed; @FILE reads it from a file. Not needed again once
    /// this machine has joined
    #[arg(long, env = "OUTRIDER_JOIN_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    join: Option<String>,
    /// Name of the host; this machine's host name by default
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The failover cluster; found by itself on Windows, the host's own name where there is none
    #[arg(long, value_name = "NAME")]
    realm: Option<String>,
    /// The hypervisor, if it is not the usual one of this system
    #[arg(long, value_name = "KIND")]
    hypervisor: Option<String>,
    /// Serve metrics and health there, such as 0.0.0.0:9803
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// More settings for the configuration (TOML), such as its table limits
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// How long to wait for jobs of an agent that is to be replaced
    #[arg(long, default_value = "10m", value_parser = duration, value_name = "TIME")]
    wait: Duration,
    /// How long to wait until the agent is connected; exits with 4 if it is not
    #[arg(long, default_value = "60s", value_parser = duration, value_name = "TIME")]
    connect: Duration,
    /// Say nothing unless something fails
    #[arg(long)]
    quiet: bool,
    /// Only tell what would be done
    #[arg(long)]
    dry_run: bool,
    /// Install into an image of a Linux machine; the service starts when the image does
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Uninstall {
    /// Keep certificate, keys and configuration, for an installation that follows
    #[arg(long)]
    keep_identity: bool,
    /// First have checkpoints and reference points of ours removed from the hypervisor, and the host forgotten by the fabric:
    /// its name is free and its certificate refused. Needs the agent to run and the coordinators to answer
    #[arg(long, conflicts_with = "keep_identity")]
    clean: bool,
    /// With --clean: remove the agent also where that cannot be done, and tell what stays behind
    #[arg(long, requires = "clean")]
    force: bool,
    /// How long to wait for jobs on this host, and for its cleaning
    #[arg(long, default_value = "10m", value_parser = duration, value_name = "TIME")]
    wait: Duration,
    /// Say nothing unless something fails
    #[arg(long)]
    quiet: bool,
    /// Remove it from an image of a Linux machine
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

pub(crate) async fn run(command: NodeCommand, json: bool) -> Done {
    match command {
        NodeCommand::Install(i) => {
            let options = install::Install {
                join: i.join,
                name: i.name,
                realm: i.realm,
                hypervisor: i.hypervisor,
                metrics: i.metrics,
                settings: i.settings,
                root: i.root,
                wait: i.wait,
                connect: i.connect,
                quiet: i.quiet,
                dry_run: i.dry_run,
            };
            install::install(options, json).await
        }
        NodeCommand::Uninstall(u) => {
            let options = install::Uninstall {
                keep_identity: u.keep_identity,
                clean: u.clean,
                force: u.force,
                root: u.root,
                wait: u.wait,
                quiet: u.quiet,
            };
            install::uninstall(options, json).await
        }
        NodeCommand::Start => install::steer(true, json).await,
        NodeCommand::Stop => install::steer(false, json).await,
        NodeCommand::Status { root } => install::status(root, json),
        NodeCommand::Doctor { config } => doctor(&config, json).await,
        #[cfg(windows)]
        NodeCommand::Service { config } => crate::roles::service::dispatch(config).await,
    }
}

async fn doctor(config: &std::path::Path, json: bool) -> Done {
    let config: outrider_node::Config = outrider_process::config::load(config)?;
    let findings = outrider_node::doctor::examine(&config).await;
    let stops = findings.iter().filter(|f| f.verdict == Verdict::Stops).count();
    if json {
        let list: Vec<_> = findings
            .iter()
            .map(|f| {
                serde_json::json!({
                    "area": f.area, "what": f.what, "verdict": f.verdict.as_str(), "detail": f.detail,
                })
            })
            .collect();
        output::json(&serde_json::json!({ "ok": stops == 0, "findings": list }));
    } else {
        let rows = findings
            .into_iter()
            .map(|f| [f.area.to_owned(), f.what, f.verdict.as_str().to_owned(), f.detail]);
        println!("{}", output::table(["area", "what", "verdict", "found"], rows.collect()));
        match stops {
            0 => eprintln!("nothing here stops backups"),
            1 => eprintln!("1 thing stops backups"),
            n => eprintln!("{n} things stop backups"),
        }
    }
    Ok(if stops == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
