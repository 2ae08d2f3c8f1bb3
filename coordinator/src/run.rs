//! A coordinator process, from its configuration to its end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use outrider_process::clock::{Clock, SystemClock};
use outrider_process::fs::{self, DirLock, FsError};
use outrider_process::identity::enrolment::{EnrolmentError, SealedEnrolment};
use outrider_process::identity::{Identity, IdentityError, Role};
use outrider_process::metrics::Metrics as ProcessMetrics;
use outrider_process::observability::{self, Readiness};
use outrider_process::ports::{self, BindError, Ready};
use outrider_process::secret::kek::{KekError, KeyEncryptionKey, load_kek};
use outrider_process::tasks::{TaskGroup, TaskSpawner};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::api::agent::AgentService;
use crate::api::enrolment::{CertificatesService, EnrolmentService};
use crate::api::operator::OperatorService;
use crate::api::storage::StorageService;
use crate::config::{Config, ConfigConflict};
use crate::doors;
use crate::enrolment::Enroller;
use crate::keys::{self, KeyRing, KeysError};
use crate::leader::{Leader, Settings};
use crate::metrics::Metrics;
use crate::raft::{Member, RaftService, RaftTimes, StartError, Store, StoreError, settle};
use crate::schedule::Limits;
use crate::state::Change;
use crate::state::enrolment::Authority;

/// How long tasks may take to leave.
const GRACE: Duration = Duration::from_secs(5);
/// HTTP/2 pings find an agent that stands still although its connection does not fail.
const PING: Duration = Duration::from_secs(5);
/// Unanswered for this long, the connection is cut.
const PONG: Duration = Duration::from_secs(10);

/// A coordinator that could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    /// Settings that contradict each other.
    #[error("the configuration contradicts itself")]
    Config(#[from] ConfigConflict),
    /// Certificate or keys.
    #[error("this coordinator has no usable identity")]
    Identity(#[from] IdentityError),
    /// A certificate for something else.
    #[error(
        "the certificate in {dir} is for {found}, the configuration for {expected}; issue one for this coordinator, or correct `name` and `fabric`"
    )]
    OtherIdentity {
        /// Identity directory.
        dir: PathBuf,
        /// Fabric, role and name in the certificate.
        found: String,
        /// As configured.
        expected: String,
    },
    /// Key-encryption key.
    #[error("the key-encryption key cannot be loaded")]
    Kek(#[from] KekError),
    /// Keys that it does not open.
    #[error("this coordinator must not serve")]
    Keys(#[from] KeysError),
    /// Enrolment authority.
    #[error("the enrolment authority beside this coordinator's certificate cannot be used")]
    Enrolment(#[from] EnrolmentError),
    /// Data directory.
    #[error("the data directory cannot be used")]
    Fs(#[from] FsError),
    /// Database.
    #[error("the database cannot be used")]
    Store(#[from] StoreError),
    /// Raft.
    #[error("Raft did not start")]
    Raft(#[from] StartError),
    /// A port.
    #[error("a port cannot be used")]
    Bind(#[from] BindError),
    /// TLS or the server.
    #[error("the gRPC server failed")]
    Server(#[source] tonic::transport::Error),
    /// A task panicked.
    #[error("a part of this coordinator stopped by itself; see the log above and report it")]
    Stopped,
}

/// Runs a coordinator until the token is cancelled. `ready` is told the bound addresses (`api`, `metrics`) as soon as it
/// serves.
///
/// # Errors
/// [`CoordinatorError`]: each needs somebody to act; starting again changes nothing.
pub async fn run(
    config: Config,
    ready: oneshot::Sender<Ready>,
    token: CancellationToken,
) -> Result<(), CoordinatorError> {
    config.validate()?;
    let identity = Arc::new(identity(&config)?);
    let kek = load_kek(&config.kek_file)?;
    let enrolment = SealedEnrolment::load(&config.identity_dir)?;
    if let Some(sealed) = &enrolment {
        sealed.open(&config.fabric.to_string(), &kek)?;
    }
    fs::create_dir_durable(&config.data_dir)?;
    let _lock = DirLock::acquire(&config.data_dir)?;
    let store = open_store(&config.data_dir.join("db")).await?;
    let opened = store.replica.read(|state| {
        state.keys.as_ref().map(|keys| KeyRing::open(keys, config.fabric, &kek)).transpose()
    })?;
    // Bound before Raft starts: a port in use must not leave a candidate behind.
    let listener = ports::bind_tcp(config.listen, "listen").await?;
    let bound = listener.local_addr().map_err(|source| BindError::Other {
        address: config.listen,
        setting: "listen".to_owned(),
        source,
    })?;

    let group = TaskGroup::new(format!("coordinator {}", config.name));
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let times = RaftTimes {
        heartbeat: config.raft.heartbeat,
        election_min: config.raft.election_min,
        election_max: config.raft.election_max,
    };
    let member = Member::start(config.id, store, Arc::clone(&identity), times, clock).await?;
    let mut process_metrics = ProcessMetrics::new("coordinator", &config.name);
    let metrics = Metrics::register(process_metrics.of("coordinator"));
    let (leader, queue) =
        Leader::new(member.clone(), settings(&config, &identity, enrolment), metrics);
    if let Some(keys) = opened {
        leader.set_keys(keys);
    }

    let failed: CancellationToken = CancellationToken::new();
    let enroller =
        Arc::new(Enroller::new(config.fabric.to_string(), kek.clone(), config.enrolment.valid));
    let served = serve(&leader, &enroller, &identity, listener, &group, failed.clone())?;
    let (start_error, mut start_failed) = oneshot::channel();
    {
        let (member, identity, stop) = (member.clone(), Arc::clone(&identity), group.token());
        let members = config.member_addresses();
        group.spawn_critical("settle", async move {
            if let Err(error) = settle(&member, &identity, &members, stop).await {
                let _ = start_error.send(error);
            }
        });
    }
    {
        let (leader, stop) = (Arc::clone(&leader), group.token());
        group.spawn_critical("lead", async move { leader.lead(stop).await });
    }
    {
        let (leader, stop) = (Arc::clone(&leader), group.token());
        group.spawn_critical("doubt", async move { leader.doubt(stop).await });
    }
    {
        let (leader, stop) = (Arc::clone(&leader), group.token());
        group.spawn_critical("follow", async move { leader.follow(queue, stop).await });
    }
    let (key_error, mut keys_failed) = oneshot::channel();
    {
        let (leader, stop, fabric) = (Arc::clone(&leader), group.token(), config.fabric);
        group.spawn_critical("keys", async move {
            tokio::select! {
                () = stop.cancelled() => {}
                result = hold_keys(&leader, fabric, &kek) => if let Err(error) = result {
                    let _ = key_error.send(error);
                },
            }
        });
    }
    let mut announced = Ready::this_process("coordinator", &config.name).with("api", bound);
    if let Some(address) = config.observability {
        let readiness = watch_readiness(&leader, &group.spawner());
        let bound =
            observability::serve(address, Arc::new(process_metrics), readiness, &group).await;
        match bound {
            Ok(bound) => announced = announced.with("metrics", bound),
            Err(error) => {
                stop(group, &member).await;
                return Err(error.into());
            }
        }
    }
    tracing::info!(name = config.name, id = config.id, address = %bound, "coordinator serves");
    // Nobody may be waiting for it.
    let _ = ready.send(announced);

    let group_stopped = group.token();
    let mut result = tokio::select! {
        () = token.cancelled() => Ok(()),
        Ok(error) = &mut keys_failed => Err(CoordinatorError::Keys(error)),
        Ok(error) = &mut start_failed => Err(CoordinatorError::Raft(error)),
        () = failed.cancelled() => Err(CoordinatorError::Stopped),
        () = group_stopped.cancelled() => Err(CoordinatorError::Stopped),
    };
    stop(group, &member).await;
    if let Ok(Err(error)) = served.await
        && result.is_ok()
    {
        result = Err(CoordinatorError::Server(error));
    }
    result
}

/// sled releases its own lock a moment after its last handle is gone, which matters to whoever starts a coordinator
/// again in the same process. Ours is held already: no other process can be the one that holds it.
async fn open_store(dir: &Path) -> Result<Store, StoreError> {
    let deadline = tokio::time::Instant::now() + GRACE;
    loop {
        match Store::open(dir) {
            Err(error) if error.is_locked() && tokio::time::Instant::now() < deadline => {
                // sled tells nobody when it lets go.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            opened => return opened,
        }
    }
}

async fn stop(group: TaskGroup, member: &Member) {
    // Raft first: another member should take over while our streams close.
    member.shutdown().await;
    let report = group.shutdown(GRACE).await;
    if !report.is_clean() {
        tracing::warn!(%report, "the coordinator stopped late");
    }
}

fn identity(config: &Config) -> Result<Identity, CoordinatorError> {
    let identity = Identity::load(&config.identity_dir)?;
    let peer = identity.peer();
    let fits = peer.role == Role::Coordinator
        && peer.name == config.name
        && peer.fabric == config.fabric.to_string();
    if fits {
        return Ok(identity);
    }
    Err(CoordinatorError::OtherIdentity {
        dir: config.identity_dir.clone(),
        found: peer.to_uri(),
        expected: format!("coordinator {} in fabric {}", config.name, config.fabric),
    })
}

fn settings(config: &Config, identity: &Identity, enrolment: Option<SealedEnrolment>) -> Settings {
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    Settings {
        fabric: config.fabric,
        id: config.id,
        address: config.advertised(),
        lease: config.lease.clone(),
        storage: config.storage.clone(),
        limits: Limits {
            per_host: config.limits.jobs_per_host,
            fabric: config.limits.jobs,
            runs: config.limits.runs,
            back_off_ms: millis(config.limits.back_off),
            back_off_max_ms: millis(config.limits.back_off_max),
        },
        look_every: config.traces.every,
        bearable: crate::traces::Bounds {
            checkpoint_ms: millis(config.traces.checkpoint_age),
            merge_ms: millis(config.traces.merge),
        },
        absent_after: config.traces.absent_after,
        ca_pem: String::from_utf8_lossy(identity.authority_pem()).into_owned(),
        enrolment: enrolment.map(|e| Authority { cert_pem: e.cert_pem, key: e.key }),
    }
}

type Served = oneshot::Receiver<Result<(), tonic::transport::Error>>;

fn serve(
    leader: &Arc<Leader>,
    enroller: &Arc<Enroller>,
    identity: &Identity,
    listener: tokio::net::TcpListener,
    group: &TaskGroup,
    failed: CancellationToken,
) -> Result<Served, CoordinatorError> {
    let tasks = group.spawner();
    let (doors, passing) = doors::open(listener, identity, tasks.clone())?;
    let server = || {
        Server::builder().http2_keepalive_interval(Some(PING)).http2_keepalive_timeout(Some(PONG))
    };
    let joining = server()
        .concurrency_limit_per_connection(1)
        .add_service(EnrolmentService::server(Arc::clone(leader), Arc::clone(enroller)));
    let router = server()
        .add_service(CertificatesService::server(Arc::clone(leader), Arc::clone(enroller)))
        .add_service(RaftService::server(leader.member().clone()))
        .add_service(AgentService::server(Arc::clone(leader), tasks.clone()))
        .add_service(StorageService::server(Arc::clone(leader), tasks.clone()))
        .add_service(OperatorService::server(Arc::clone(leader), tasks));
    let (done, served) = oneshot::channel();
    let stop = group.token();
    group.spawn_critical("gRPC", async move {
        // Streams live as long as their sessions; the server does not wait for clients that keep connections open.
        let result = tokio::select! {
            result = router.serve_with_incoming(doors.members) => {
                failed.cancel();
                result
            }
            result = joining.serve_with_incoming(doors.joining) => {
                failed.cancel();
                result
            }
            () = passing => Ok(()),
            () = stop.cancelled() => Ok(()),
        };
        let _ = done.send(result);
    });
    Ok(served)
}

/// Makes the keys if this member leads first, and opens what the fabric agreed on. A member that cannot open them must
/// not lead.
async fn hold_keys(
    leader: &Leader,
    fabric: outrider_proto::ids::FabricId,
    kek: &KeyEncryptionKey,
) -> Result<(), KeysError> {
    let replica = leader.member().replica();
    let mut applied = replica.changes();
    let mut raft = leader.member().raft().metrics();
    while leader.keys().is_none() {
        applied.mark_unchanged();
        raft.mark_unchanged();
        if let Some(keys) = replica.read(|state| state.keys.clone()) {
            match KeyRing::open(&keys, fabric, kek) {
                Ok(ring) => leader.set_keys(ring),
                Err(error) => {
                    leader.member().stand_back();
                    return Err(error);
                }
            }
            break;
        }
        if leader.member().leads().is_some() && leader.member().prove().await.is_ok() {
            let keys = keys::create(fabric, kek)?;
            if let Err(error) = leader.propose(Change::CreateKeys(Box::new(keys))).await {
                tracing::debug!(%error, "another leader makes the keys");
            }
            continue;
        }
        tokio::select! {
            _ = applied.changed() => {}
            _ = raft.changed() => {}
        }
    }
    // The task is critical only until it is done.
    Ok(())
}

/// Ready while this member knows a leader and takes part.
fn watch_readiness(leader: &Arc<Leader>, tasks: &TaskSpawner) -> watch::Receiver<Readiness> {
    let (sender, receiver) = watch::channel(Readiness::starting());
    let mut raft = leader.member().raft().metrics();
    let mut takes_part = leader.member().takes_part();
    let stop = tasks.token();
    tasks.spawn("readiness", async move {
        loop {
            let known = raft.borrow_and_update().current_leader.is_some();
            let readiness = if !*takes_part.borrow_and_update() {
                Readiness::NotReady(
                    "this member started with an empty database and has not caught up; all other coordinators must run"
                        .to_owned(),
                )
            } else if known {
                Readiness::Ready
            } else {
                Readiness::NotReady(
                    "no leader is known; a majority of the coordinators must run".to_owned(),
                )
            };
            sender.send_if_modified(|now| {
                let differs = *now != readiness;
                *now = readiness;
                differs
            });
            tokio::select! {
                () = stop.cancelled() => return,
                changed = raft.changed() => if changed.is_err() { return },
                changed = takes_part.changed() => if changed.is_err() { return },
            }
        }
    });
    receiver
}
