//! From a configuration file to a running process: load, start telemetry, run until a signal, leave in order.
//!
//! All of what a role does is in its crate's `run`; here is only what the operating system sees.

mod export;
mod parent;
#[cfg(windows)]
pub(crate) mod service;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use outrider_process::config;
use outrider_process::ports::Ready;
use outrider_process::signals;
use outrider_process::telemetry::{self, LogConfig, TelemetryConfig, host_events};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

pub(crate) use export::{What, export_disks};

use crate::cli::Done;
use crate::report::Failure;

/// How a process of the fabric is started.
#[derive(Debug, Clone, Args)]
pub(crate) struct RoleArgs {
    /// The configuration (TOML)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// Written once the process serves: its process id and bound addresses as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) ready_file: Option<PathBuf>,
    /// Append the log here; without it the log goes to standard error
    #[arg(long, value_name = "FILE")]
    pub(crate) log_file: Option<PathBuf>,
    /// Leave when standard input closes: for a parent that must not leave processes behind, however it dies
    #[arg(long)]
    pub(crate) until_stdin_closes: bool,
}

/// `outrider storage` is a process and a noun.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct StorageArgs {
    #[command(subcommand)]
    pub(crate) command: Option<crate::cli::StorageCommand>,
    #[command(flatten)]
    pub(crate) role: Option<RoleArgs>,
}

/// `outrider node` is a process and a service.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct NodeArgs {
    #[command(subcommand)]
    pub(crate) command: Option<crate::cli::node::NodeCommand>,
    #[command(flatten)]
    pub(crate) role: Option<RoleArgs>,
}

/// What a service manager adds to a process.
#[derive(Default)]
pub(crate) struct Steering {
    /// Cancelled when it must leave.
    pub(crate) token: CancellationToken,
    /// Told when it serves.
    pub(crate) ready: Option<oneshot::Sender<()>>,
}

/// Who the process is, for its log and traces.
struct Who {
    role: &'static str,
    name: String,
    otlp_endpoint: Option<String>,
    log: LogConfig,
}

pub(crate) async fn coordinator(args: RoleArgs) -> Done {
    let config: outrider_coordinator::Config = config::load(&args.config)?;
    let who = Who {
        role: "coordinator",
        name: config.name.clone(),
        otlp_endpoint: config.telemetry.otlp_endpoint.clone(),
        log: config.log.clone(),
    };
    let run = |ready, token| outrider_coordinator::run(config, ready, token);
    Box::pin(serve(args, who, run, |_, ready: Ready| ready)).await
}

pub(crate) async fn storage(args: RoleArgs) -> Done {
    let config: outrider_storage::Config = config::load(&args.config)?;
    let who = Who {
        role: "storage",
        name: config.name.clone(),
        otlp_endpoint: config.telemetry.otlp_endpoint.clone(),
        log: LogConfig::default(),
    };
    let run = |ready, token| outrider_storage::run(config, ready, token);
    Box::pin(serve(args, who, run, |_, ready: Ready| ready)).await
}

pub(crate) async fn node(args: RoleArgs) -> Done {
    node_with(args, Steering::default()).await
}

/// A node agent that somebody else may steer, too.
pub(crate) async fn node_with(args: RoleArgs, steering: Steering) -> Done {
    let config: outrider_node::Config = config::load(&args.config)?;
    let who = Who {
        role: "node",
        name: config.name.clone(),
        otlp_endpoint: config.telemetry.otlp_endpoint.clone(),
        log: config.log.clone(),
    };
    let run = |ready, token| outrider_node::run(config, ready, token);
    let announce = |ready: Ready, bound: outrider_node::error::Bound| match bound.observability {
        Some(address) => ready.with("metrics", address),
        None => ready,
    };
    Box::pin(steered(args, who, steering, run, announce)).await
}

pub(crate) async fn lab(args: RoleArgs) -> Done {
    let config: outrider_lab::LabConfig = config::load(&args.config)?;
    let who = Who {
        role: "lab",
        name: config.realm.clone(),
        otlp_endpoint: None,
        log: LogConfig::default(),
    };
    let run = |ready, token| outrider_lab::run(config, token, Some(ready));
    Box::pin(serve(args, who, run, |ready, bound: SocketAddr| ready.with("lab", bound))).await
}

/// Runs a role until it is asked to leave by a signal or by the end of its parent.
async fn serve<R, E, Fut>(
    args: RoleArgs,
    who: Who,
    run: impl FnOnce(oneshot::Sender<R>, CancellationToken) -> Fut,
    announce: impl FnOnce(Ready, R) -> Ready,
) -> Done
where
    E: Into<Failure>,
    Fut: Future<Output = Result<(), E>>,
{
    steered(args, who, Steering::default(), run, announce).await
}

/// As [`serve`], also when whoever steers it says so.
async fn steered<R, E, Fut>(
    args: RoleArgs,
    who: Who,
    steering: Steering,
    run: impl FnOnce(oneshot::Sender<R>, CancellationToken) -> Fut,
    announce: impl FnOnce(Ready, R) -> Ready,
) -> Done
where
    E: Into<Failure>,
    Fut: Future<Output = Result<(), E>>,
{
    let mut log = who.log;
    log.file = args.log_file.or(log.file);
    let telemetry = telemetry::init(&TelemetryConfig {
        role: who.role.to_owned(),
        name: who.name.clone(),
        otlp_endpoint: who.otlp_endpoint,
        log,
        host_events: steering.ready.is_some(),
    })?;
    let Steering { token, ready: mut steered } = steering;
    tracing::info!(
        event_id = host_events::STARTED,
        role = who.role,
        name = who.name,
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    if args.until_stdin_closes {
        parent::leave_with_parent(token.clone());
    }
    let (ready, mut started) = oneshot::channel();
    let running = run(ready, token.clone());
    tokio::pin!(running);
    let mut announce = Some(announce);
    let result = loop {
        tokio::select! {
            result = &mut running => break result.map_err(Into::into),
            Ok(bound) = &mut started, if announce.is_some() => {
                if let Some(steered) = steered.take() {
                    // Nobody may be waiting any more.
                    let _ = steered.send(());
                }
                let ready = Ready::this_process(who.role, &who.name);
                if let Some(announce) = announce.take() {
                    let ready = announce(ready, bound);
                    if let Some(path) = &args.ready_file
                        && let Err(error) = ready.write(path)
                    {
                        token.cancel();
                        let _ = (&mut running).await;
                        break Err(error.into());
                    }
                }
            }
            signal = signals::wait_for_shutdown(), if !token.is_cancelled() => {
                tracing::info!(signal = signal.unwrap_or("unknown"), "leaving");
                token.cancel();
            }
        }
    };
    if result.is_ok() {
        tracing::info!(event_id = host_events::STOPPED, role = who.role, "ended");
    }
    telemetry.shutdown().await;
    result.map(|()| ExitCode::SUCCESS)
}
