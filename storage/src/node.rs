//! A storage node put together.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::clock::SystemClock;
use outrider_process::identity::{Identity, IdentityError};
use outrider_process::leader::LeaderClient;
use outrider_process::metrics::Metrics;
use outrider_process::observability::{self, Readiness};
use outrider_process::ports::{self, BindError, Ready};
use outrider_process::renewal::keep_fresh;
use outrider_process::tasks::TaskGroup;
use outrider_proto::layout::{Layout, StorageNode};
use outrider_storage_client::quic::{QuicTransport, endpoint};
use outrider_storage_client::transport::ClientRole;
use outrider_storage_client::{Limits as ClientLimits, TransportError};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::catch_up::CatchUp;
use crate::config::Config;
use crate::error::OpenError;
use crate::metrics::StorageMetrics;
use crate::peers::{PeerLimits, Peers};
use crate::registry::{Facts, Registry};
use crate::server::{self, Node};
use crate::store::{Store, StoreConfig};
use crate::windows::Windows;

/// How long requests may take to end at a shutdown.
const GRACE: Duration = Duration::from_secs(10);

/// Why a storage node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The certificate names another node or fabric than the configuration.
    #[error(
        "the certificate in {dir} is of {found}, the configuration of storage node {name} in fabric {fabric}: correct one of them"
    )]
    OtherIdentity {
        /// Identity folder.
        dir: String,
        /// Who it names.
        found: String,
        /// Name configured.
        name: String,
        /// Fabric configured.
        fabric: String,
    },
    /// The store.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A port.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The QUIC endpoint.
    #[error("storage node {name} cannot open its QUIC endpoint on {address}")]
    Endpoint {
        /// Node.
        name: String,
        /// Address.
        address: SocketAddr,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The client side.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A task that may not end.
    #[error("a part of storage node {name} ended unexpectedly; see its log")]
    Ended {
        /// Node.
        name: String,
    },
}

/// A running storage node.
pub struct StorageServer {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it is in the layout.
    pub described: StorageNode,
    /// Its store.
    pub store: Arc<Store>,
    /// Its layout: coordinators, or a test, put it here.
    pub layout: watch::Sender<Layout>,
    /// Its ticket key.
    pub ticket_key: watch::Sender<Option<[u8; 32]>>,
    /// Whether something may be missing here.
    pub incomplete: watch::Receiver<bool>,
    metrics: StorageMetrics,
    tasks: TaskGroup,
}

impl StorageServer {
    /// Opens the store and serves. Coordinators are not contacted: see [`run`].
    ///
    /// # Errors
    /// [`StorageError`].
    pub async fn start(
        config: &Config,
        identity: Arc<Identity>,
        metrics: &mut Metrics,
        tasks: TaskGroup,
    ) -> Result<Self, StorageError> {
        let peer = identity.peer();
        if peer.name != config.name || peer.fabric != config.fabric.to_string() {
            return Err(StorageError::OtherIdentity {
                dir: config.identity_dir.display().to_string(),
                found: format!("{peer} in fabric {}", peer.fabric),
                name: config.name.clone(),
                fabric: config.fabric.to_string(),
            });
        }
        let limits = &config.limits;
        let socket = ports::bind_udp(config.listen, "listen")?;
        let bytes = |size: outrider_process::config::ByteSize| {
            usize::try_from(size.as_u64()).unwrap_or(usize::MAX)
        };
        let store_config = StoreConfig {
            segment_size: config.segment_size.as_u64(),
            sync_bytes: limits.sync_bytes.as_u64(),
            queue_bytes: bytes(limits.write_queue),
            min_free: limits.min_free.as_u64(),
            table_cache: limits.table_cache.as_u64(),
            ..StoreConfig::new(config.fabric, config.name.clone())
        };
        let dir = config.data_dir.clone();
        let store = tokio::task::spawn_blocking(move || Store::open(&dir, store_config))
            .await
            .map_err(|_| StorageError::Ended { name: config.name.clone() })??;
        let store = Arc::new(store);
        let facts = Facts::load(&config.data_dir);
        let (layout, layout_view) = watch::channel(facts.layout);
        let (ticket_key, ticket_view) = watch::channel(facts.ticket_key);
        let (incomplete_sender, incomplete) = watch::channel(true);
        let window = u32::try_from(limits.connection_window.as_u64()).unwrap_or(u32::MAX);
        let client = ClientLimits {
            connection_window: window,
            barrier: limits.barrier,
            ..ClientLimits::default()
        };
        let transport = QuicTransport::new(&identity, config.fabric, ClientRole::Storage, &client)?;
        let peer_limits = PeerLimits {
            queue_bytes: bytes(limits.forward_queue),
            patience: limits.forward_patience,
            pauses: (client.first_pause, client.longest_pause),
        };
        let peers = Arc::new(Peers::new(
            Arc::new(transport),
            layout_view.clone(),
            peer_limits,
            tasks.child("peers"),
        ));
        let figures = StorageMetrics::register(metrics);
        let node = Arc::new(Node {
            fabric: config.fabric,
            name: config.name.clone(),
            identity: Arc::clone(&identity),
            store: Arc::clone(&store),
            windows: Windows::new(limits.windows),
            peers: Arc::clone(&peers),
            layout: layout_view.clone(),
            ticket_key: ticket_view,
            catching_up: incomplete.clone(),
            clock: Arc::new(SystemClock::new()),
            metrics: figures.clone(),
            barrier: limits.barrier,
            peer_request: limits.peer_request,
        });
        let failed = |source| StorageError::Endpoint {
            name: config.name.clone(),
            address: config.listen,
            source,
        };
        let listener =
            endpoint(Some(socket), Some(server::listener(&identity, window)?)).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let budget = limits.receive_budget.as_u64();
        server::serve(node, listener, budget, window, &tasks);
        let catch_up = CatchUp {
            name: config.name.clone(),
            store: Arc::clone(&store),
            peers,
            layout: layout_view,
            incomplete: incomplete_sender,
            metrics: figures.clone(),
            rate: limits.catch_up_rate.as_u64(),
            every: limits.catch_up_every,
        };
        tasks.spawn("catch-up", catch_up.run(tasks.token()));
        let advertised = if config.advertise.is_empty() {
            vec![address.to_string()]
        } else {
            config.advertise.clone()
        };
        let zone = if config.zone.is_empty() { &config.name } else { &config.zone };
        let described = StorageNode {
            name: config.name.clone(),
            addresses: advertised,
            zone: zone.clone(),
            capacity_bytes: config.capacity.as_u64(),
            receipt_key: identity.signing_key().public_key().to_vec(),
            incarnation: store.incarnation(),
            online: true,
        };
        Ok(Self {
            address,
            described,
            store,
            layout,
            ticket_key,
            incomplete,
            metrics: figures,
            tasks,
        })
    }

    /// Stops serving, makes everything durable, and closes the store.
    pub async fn shutdown(self) {
        let report = self.tasks.shutdown(GRACE).await;
        tracing::info!(%report, "storage node stopped");
        let closing = tokio::task::spawn_blocking(move || drop(self.store)).await;
        if closing.is_err() {
            tracing::error!("closing the store panicked");
        }
    }
}

/// Runs a storage node until `token` is cancelled. `ready` is told the bound addresses: `chunks` (UDP) and, if
/// configured, `observability`.
///
/// # Errors
/// [`StorageError`].
pub async fn run(
    config: Config,
    ready: oneshot::Sender<Ready>,
    token: CancellationToken,
) -> Result<(), StorageError> {
    let identity = Arc::new(Identity::load(&config.identity_dir)?);
    let tasks = TaskGroup::new("storage");
    let mut metrics = Metrics::new("storage", &config.name);
    let serving = tasks.child("node");
    let started = StorageServer::start(&config, Arc::clone(&identity), &mut metrics, serving).await;
    let server = started?;
    let mut told = Ready::this_process("storage", &config.name).with("chunks", server.address);
    let (readiness, readiness_view) = watch::channel(Readiness::starting());
    if let Some(address) = config.observability {
        let bound =
            observability::serve(address, Arc::new(metrics), readiness_view, &tasks).await?;
        told = told.with("observability", bound);
    }
    let leader = Arc::new(LeaderClient::new(config.coordinators.clone(), Arc::clone(&identity)));
    let renewal = keep_fresh(identity, Arc::clone(&leader), tasks.token());
    tasks.spawn("renewal", renewal);
    let registry = Registry {
        leader,
        fabric: config.fabric,
        node: server.described.clone(),
        store: Arc::clone(&server.store),
        metrics: server.metrics.clone(),
        layout: server.layout.clone(),
        ticket_key: server.ticket_key.clone(),
        incomplete: server.incomplete.clone(),
        dir: config.data_dir.clone(),
        every: config.limits.status_every,
    };
    tasks.spawn_critical("registry", registry.run(tasks.token()));
    let mut layout = server.layout.subscribe();
    let watched = tasks.token();
    tasks.spawn("readiness", async move {
        let known = layout.wait_for(|l| l.epoch.0 > 0);
        tokio::select! {
            _ = known => {
                readiness.send_replace(Readiness::Ready);
            }
            () = watched.cancelled() => return,
        }
        // The sender must live as long as somebody asks.
        watched.cancelled().await;
    });
    // Whoever started us may not wait for it.
    let _ = ready.send(told);
    let broken = tasks.token();
    let asked = tokio::select! {
        () = token.cancelled() => true,
        () = broken.cancelled() => false,
    };
    let name = config.name.clone();
    let report = tasks.shutdown(GRACE).await;
    tracing::info!(%report, "storage node stops");
    server.shutdown().await;
    if asked { Ok(()) } else { Err(StorageError::Ended { name }) }
}
