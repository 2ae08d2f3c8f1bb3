//! The agent's process: hypervisor and identity up, a stream to the leader, one task per job.
//!
//! | file | idea |
//! | --- | --- |
//! | `link` | the stream: what goes up, what comes down, finding the leader again |
//! | `watcher` | what the hypervisor shows, full and as differences |
//! | `survey` | what backups left here, when the leader asks |
//! | `jobs` | the leases that this host holds, and their tasks |
//! | `wire` | our facts as messages |

mod jobs;
mod link;
mod survey;
mod watcher;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use outrider_process::clock::{Clock, SystemClock};
use outrider_process::identity::{Identity, Role};
use outrider_process::leader::LeaderClient;
use outrider_process::metrics::Metrics;
use outrider_process::network::Network;
use outrider_process::observability::{self, Readiness};
use outrider_process::renewal::keep_fresh;
use outrider_process::tasks::TaskGroup;
use outrider_proto::ids::FabricId;
use outrider_proto::layout::Layout;
use outrider_storage_client::{ClientRole, Limits as StoreLimits, StoreClient};
use outrider_wmi::lab::{LabFiles, LabWmi};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::commands;
use crate::config::{Config, HypervisorKind};
use crate::coordinator_client::GrpcCoordinator;
use crate::error::{Bound, NodeError};
use crate::hypervisor::Hypervisor;
use crate::hypervisor::hyperv::HyperV;
use crate::hypervisor::traces::VmTraces;
use crate::metrics::NodeMetrics;
use crate::pipeline::Pool;
use crate::status;

/// How long running jobs may take to close their files when the process is asked to end.
const GRACE: Duration = Duration::from_secs(10);
/// How long a hypervisor may take to tell what backups left.
const LOOK: Duration = Duration::from_secs(60);

/// What every part of the agent shares.
pub(crate) struct Agent {
    pub(crate) config: Config,
    pub(crate) fabric: FabricId,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) coordinator: Arc<GrpcCoordinator>,
    pub(crate) leader: Arc<LeaderClient>,
    pub(crate) storage: StoreClient,
    pub(crate) layout: watch::Sender<Layout>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) pool: Pool,
    pub(crate) metrics: NodeMetrics,
    pub(crate) network: Network,
    pub(crate) boot_id: u64,
    pub(crate) commands: Arc<commands::Table>,
}

/// Runs a node agent until `token` is cancelled. `ready` hears where it can be reached once it works.
///
/// # Errors
/// [`NodeError`]: nothing that waiting would cure.
pub async fn run(
    config: Config,
    ready: oneshot::Sender<Bound>,
    token: CancellationToken,
) -> Result<(), NodeError> {
    let identity = Arc::new(Identity::load(&config.identity_dir)?);
    let peer = identity.peer();
    if peer.role != Role::Node || peer.name != config.name {
        return Err(NodeError::WrongIdentity {
            dir: config.identity_dir.display().to_string(),
            found: peer.to_string(),
            expected: config.name.clone(),
        });
    }
    let fabric = fabric_of(&config)?;
    if config.coordinators.is_empty() {
        return Err(NodeError::Config {
            key: "coordinators",
            value: "[]".into(),
            reason: "expected at least one \"ip:port\"".into(),
        });
    }
    if let Some((value, reason)) = commands::wrong(&config.commands) {
        return Err(NodeError::Config { key: "commands", value, reason });
    }
    let tasks = TaskGroup::new("node");
    let mut registry = Metrics::new("node", &config.name);
    let metrics = NodeMetrics::register(&mut registry);
    let (readiness, ready_now) = watch::channel(Readiness::starting());
    if let Some(path) = &config.status_file {
        let (path, name) = (path.clone(), config.name.clone());
        let (seen, token) = (ready_now.clone(), tasks.token());
        tasks.spawn("status", status::keep(path, name, seen, metrics.clone(), token));
    }
    let mut bound = Bound::default();
    if let Some(address) = config.observability {
        bound.observability =
            Some(observability::serve(address, Arc::new(registry), ready_now, &tasks).await?);
    }
    let hypervisor = tokio::select! {
        connected = connect(&config, fabric, &tasks) => connected?,
        () = token.cancelled() => return Ok(()),
    };
    let (layout, layout_seen) = watch::channel(Layout::default());
    let store_limits =
        StoreLimits { in_flight: config.limits.in_flight.as_usize(), ..StoreLimits::default() };
    let network = Network::new(config.network.clone());
    let (role, through) = (ClientRole::Agent, network.clone());
    let storage = StoreClient::through(&identity, fabric, layout_seen, role, store_limits, through)
        .map_err(|e| NodeError::Storage(e.to_string()))?;
    let leader = Arc::new(
        LeaderClient::new(config.coordinators.clone(), Arc::clone(&identity)).over(network.clone()),
    );
    tasks.spawn("renewal", keep_fresh(identity, Arc::clone(&leader), tasks.token()));
    let agent = Arc::new(Agent {
        fabric,
        hypervisor,
        coordinator: Arc::new(GrpcCoordinator::new(leader.clone(), config.jobs.coordinator_wait)),
        leader,
        storage,
        layout,
        clock: Arc::new(SystemClock::new()),
        pool: Pool::new(config.limits.worker_count(), config.limits.in_flight.as_usize()),
        metrics,
        network,
        boot_id: rand::random(),
        commands: Arc::new(config.commands.clone()),
        config,
    });
    // Before the first connection, where the hypervisor answers by then.
    watcher::keep_off_cluster_networks(&agent).await;
    // Nobody waits for the address when the caller has gone on without it.
    let _ = ready.send(bound);
    let served = tokio::select! {
        () = link::serve(&agent, &tasks, &readiness) => Ok(()),
        () = token.cancelled() => Ok(()),
    };
    readiness.send_replace(Readiness::NotReady("ending".into()));
    let report = tasks.shutdown(GRACE).await;
    if !report.is_clean() {
        tracing::warn!(%report, "the agent ends while tasks were still at work");
    }
    served
}

/// What backups left on this host, without coordinators. Only looks.
///
/// # Errors
/// [`NodeError`]: the hypervisor does not answer.
pub async fn look(config: &Config) -> Result<Vec<VmTraces>, NodeError> {
    let fabric = fabric_of(config)?;
    let tasks = TaskGroup::new("look");
    let looked = async {
        let hypervisor = connect(config, fabric, &tasks).await?;
        hypervisor.traces().await.map_err(|e| NodeError::Traces(e.to_string()))
    };
    let found = match tokio::time::timeout(LOOK, looked).await {
        Ok(found) => found,
        Err(_) => Err(NodeError::Traces("it did not answer within a minute".into())),
    };
    tasks.shutdown(GRACE).await;
    found
}

fn fabric_of(config: &Config) -> Result<FabricId, NodeError> {
    config.fabric.parse().map_err(|_| NodeError::Config {
        key: "fabric",
        value: config.fabric.clone(),
        reason: "expected the fabric's UUID, as `outrider fabric init` printed it".into(),
    })
}

/// Connects to the hypervisor. The lab may start later than its agents: it is asked again.
async fn connect(
    config: &Config,
    fabric: FabricId,
    tasks: &TaskGroup,
) -> Result<Arc<dyn Hypervisor>, NodeError> {
    match config.hypervisor {
        HypervisorKind::Hyperv => this_host(config),
        HypervisorKind::Qemu => connect_qemu(config, fabric, tasks).await,
        HypervisorKind::Lab => {
            let lab = config.lab.as_ref().ok_or_else(|| NodeError::Config {
                key: "[lab] address",
                value: String::new(),
                reason: "it is needed with hypervisor = \"lab\"".into(),
            })?;
            let mut backoff = outrider_process::backoff::Backoff::new(
                Duration::from_millis(50),
                Duration::from_secs(2),
                outrider_process::backoff::Backoff::any_seed(),
            );
            let wmi = loop {
                match LabWmi::connect(&lab.address, &config.name).await {
                    Ok(wmi) => break wmi,
                    Err(e) if e.is_transient() => {
                        tracing::warn!(error = %e, "waiting for the hypervisor");
                        tokio::time::sleep(backoff.next_wait()).await;
                    }
                    Err(e) => return Err(NodeError::Hypervisor(e)),
                }
            };
            let files = Arc::new(LabFiles::new(&lab.address, config.name.clone()));
            Ok(Arc::new(HyperV::new(Arc::new(wmi), files, config.jobs.clone())))
        }
    }
}

#[cfg(unix)]
async fn connect_qemu(
    config: &Config,
    fabric: FabricId,
    tasks: &TaskGroup,
) -> Result<Arc<dyn Hypervisor>, NodeError> {
    let qemu = config.qemu.clone().ok_or_else(|| NodeError::Config {
        key: "[qemu] sockets",
        value: String::new(),
        reason: "it is needed with hypervisor = \"qemu\"; see docs/qemu.md".into(),
    })?;
    let started = crate::hypervisor::qemu::Qemu::start(
        qemu,
        &config.scratch_dir,
        fabric,
        tasks.child("qemu"),
    );
    Ok(Arc::new(started.await.map_err(|e| NodeError::Qemu(e.to_string()))?))
}

#[cfg(not(unix))]
async fn connect_qemu(
    _config: &Config,
    _fabric: FabricId,
    _tasks: &TaskGroup,
) -> Result<Arc<dyn Hypervisor>, NodeError> {
    Err(NodeError::Qemu("it is spoken to through Unix sockets, which this system lacks".into()))
}

/// Hyper-V of this machine. Whether it has any is seen when it is watched: it may come later, and then needs no new start.
#[cfg(windows)]
fn this_host(config: &Config) -> Result<Arc<dyn Hypervisor>, NodeError> {
    let wmi = outrider_wmi::com::ComWmi::start().map_err(NodeError::Hypervisor)?;
    let files = Arc::new(outrider_wmi::files::WindowsFiles::new());
    Ok(Arc::new(HyperV::new(Arc::new(wmi), files, config.jobs.clone())))
}

#[cfg(not(windows))]
fn this_host(_config: &Config) -> Result<Arc<dyn Hypervisor>, NodeError> {
    Err(NodeError::NoHyperV)
}
