//! The QUIC listener: who may connect, what a session may do, one task a request.

mod access;
mod named;
mod read;
mod receive_budget;
mod write;

use std::sync::Arc;
use std::time::Duration;

use outrider_process::clock::Clock;
use outrider_process::identity::{Identity, Role, peer_of_connection};
use outrider_process::tasks::{TaskGroup, TaskSpawner};
use outrider_process::telemetry::set_parent;
use outrider_proto::frame::{
    ALPN, Frame, OLDEST_VERSION, PROTOCOL_VERSION, Refusal, close, common_version,
};
use outrider_proto::ids::FabricId;
use outrider_proto::layout::Layout;
use outrider_storage_client::frame_io::{FrameIoError, FrameReader, finish_with, write_frame};
use outrider_storage_client::quic::tuning;
use quinn::{Connection, Endpoint, SendStream};
use tokio::sync::watch;
use tracing::Instrument;

use crate::error::StoreError;
use crate::metrics::StorageMetrics;
use crate::peers::Peers;
use crate::store::Store;
use crate::windows::Windows;

use self::access::Access;
use self::receive_budget::{LEAST, ReceiveBudget};

/// A handshake that takes longer is given up.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What requests work with.
pub struct Node {
    /// Fabric.
    pub fabric: FabricId,
    /// Name.
    pub name: String,
    /// Identity; its signing key signs receipts.
    pub identity: Arc<Identity>,
    /// Store.
    pub store: Arc<Store>,
    /// Windows.
    pub windows: Windows,
    /// Other nodes.
    pub peers: Arc<Peers>,
    /// Layout.
    pub layout: watch::Receiver<Layout>,
    /// Public key of tickets; none before a coordinator has told it.
    pub ticket_key: watch::Receiver<Option<[u8; 32]>>,
    /// Whether this node may lack what it should keep.
    pub catching_up: watch::Receiver<bool>,
    /// Clock for tickets.
    pub clock: Arc<dyn Clock>,
    /// Figures.
    pub metrics: StorageMetrics,
    /// How long a barrier waits for replicas.
    pub barrier: Duration,
    /// How long a question to replicas may take.
    pub peer_request: Duration,
}

/// Why a request ends without its answer.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The client is told.
    Refused(Refusal, String),
    /// The stream or connection is gone.
    Broken(FrameIoError),
}

impl From<FrameIoError> for Ending {
    fn from(error: FrameIoError) -> Self {
        if error.is_protocol() {
            Self::Refused(Refusal::Protocol, error.to_string())
        } else {
            Self::Broken(error)
        }
    }
}

impl From<StoreError> for Ending {
    fn from(error: StoreError) -> Self {
        let refusal = match &error {
            StoreError::Full { .. } => Refusal::Full,
            StoreError::Failed { .. } | StoreError::Tables { .. } => Refusal::Io,
            StoreError::Fenced { .. } => Refusal::Fenced,
            StoreError::Closed { .. } => Refusal::Unavailable,
        };
        Self::Refused(refusal, error.to_string())
    }
}

/// An ending that the client is told.
pub(crate) fn refuse<T>(refusal: Refusal, message: impl Into<String>) -> Result<T, Ending> {
    Err(Ending::Refused(refusal, message.into()))
}

/// Accepts connections until the group stops. `budget`: bytes of the receive windows of all of them, `window`: of one.
pub fn serve(node: Arc<Node>, endpoint: Endpoint, budget: u64, window: u32, tasks: &TaskGroup) {
    let (spawner, token) = (tasks.spawner(), tasks.token());
    let budget = ReceiveBudget::new(budget, window);
    tasks.spawn("accept", async move {
        loop {
            let incoming = tokio::select! {
                incoming = endpoint.accept() => incoming,
                () = token.cancelled() => None,
            };
            let Some(incoming) = incoming else { break };
            let (node, spawner_of, stop) = (Arc::clone(&node), spawner.clone(), token.clone());
            let budget = Arc::clone(&budget);
            spawner.spawn("connection", async move {
                let Ok(Ok(connection)) = tokio::time::timeout(HANDSHAKE, incoming).await else {
                    return;
                };
                let _share = budget.join(connection.clone());
                tokio::select! {
                    () = converse(&node, &connection, &spawner_of) => {}
                    () = stop.cancelled() => {
                        connection.close(close::GOING_AWAY.into(), b"this node is shutting down");
                    }
                }
            });
        }
        endpoint.close(close::GOING_AWAY.into(), b"this node is shutting down");
        endpoint.wait_idle().await;
    });
}

/// Settings of the listener. `window` bounds the streams; what all of a connection may hold is its share of the budget.
///
/// # Errors
/// The identity cannot be used for TLS.
pub fn listener(
    identity: &Identity,
    window: u32,
) -> Result<quinn::ServerConfig, outrider_process::identity::IdentityError> {
    let mut settings = tuning::server(window);
    settings.receive_window(LEAST.into());
    identity.quinn_server(&[ALPN], Arc::new(settings))
}

async fn converse(node: &Arc<Node>, connection: &Connection, tasks: &TaskSpawner) {
    let access = match tokio::time::timeout(HANDSHAKE, greet(node, connection)).await {
        Ok(Ok(access)) => Arc::new(access),
        Ok(Err(Ending::Refused(refusal, message))) => {
            node.metrics.refused.inc();
            tracing::warn!(?refusal, message, peer = %connection.remote_address(), "connection refused");
            let code = if refusal == Refusal::Protocol { close::PROTOCOL } else { close::DENIED };
            // The refusal frame was sent; the peer closes when it has read it, or is closed.
            let _ = tokio::time::timeout(Duration::from_secs(1), connection.closed()).await;
            connection.close(code.into(), message.as_bytes());
            return;
        }
        Ok(Err(Ending::Broken(_))) | Err(_) => return,
    };
    tracing::debug!(peer = %access, "session opened");
    while let Ok((send, recv)) = connection.accept_bi().await {
        let (node, access) = (Arc::clone(node), Arc::clone(&access));
        tasks.spawn("request", async move {
            answer(&node, &access, send, FrameReader::new(recv)).await;
        });
    }
}

async fn greet(node: &Node, connection: &Connection) -> Result<Access, Ending> {
    let lost = |e: quinn::ConnectionError| Ending::Broken(FrameIoError::Broken(e.into()));
    let (mut send, recv) = connection.accept_bi().await.map_err(lost)?;
    let mut recv = FrameReader::new(recv);
    let access = match open(node, connection, &mut send, &mut recv).await {
        Ok(access) => access,
        Err(Ending::Refused(refusal, message)) => {
            let refused = Frame::Refused { refusal, message: message.clone() };
            finish_with(&mut send, &refused).await?;
            return Err(Ending::Refused(refusal, message));
        }
        Err(broken) => return Err(broken),
    };
    let opened = Frame::Opened {
        fabric: node.fabric,
        node: node.name.clone(),
        incarnation: node.store.incarnation(),
        layout_epoch: node.layout.borrow().epoch,
    };
    finish_with(&mut send, &opened).await?;
    Ok(access)
}

async fn open(
    node: &Node,
    connection: &Connection,
    send: &mut SendStream,
    recv: &mut FrameReader,
) -> Result<Access, Ending> {
    let Frame::Hello { version, oldest, role } = recv.expect("Hello").await? else {
        return refuse(Refusal::Protocol, "a session begins with Hello");
    };
    let ours = Frame::Hello { version: PROTOCOL_VERSION, oldest: OLDEST_VERSION, role: 2 };
    write_frame(send, &ours).await?;
    if common_version(version, oldest).is_none() {
        return refuse(
            Refusal::Protocol,
            format!(
                "this node speaks versions {OLDEST_VERSION} to {PROTOCOL_VERSION}, the client {oldest} to {version}: upgrade the older one"
            ),
        );
    }
    let peer = match peer_of_connection(connection) {
        Ok(peer) if peer.fabric == node.fabric.to_string() => peer,
        Ok(peer) => {
            return refuse(
                Refusal::Denied,
                format!("{peer} belongs to fabric {}, this node to {}", peer.fabric, node.fabric),
            );
        }
        Err(error) => return refuse(Refusal::Denied, error.to_string()),
    };
    let says = match peer.role {
        Role::Node => 1,
        Role::Storage => 2,
        Role::Operator => 3,
        Role::Coordinator => 4,
    };
    if says != role {
        return refuse(
            Refusal::Denied,
            format!("{peer} said Hello as role {role}, its certificate says {says}"),
        );
    }
    let Frame::Open { session, ticket, .. } = recv.expect("Open").await? else {
        return refuse(Refusal::Protocol, "Hello is followed by Open");
    };
    Access::check(node, peer, session, &ticket)
}

async fn answer(node: &Node, access: &Access, mut send: SendStream, mut recv: FrameReader) {
    let outcome = async {
        match recv.expect("a request").await? {
            Frame::Put { job, session, window, layout_epoch } => {
                let head = access.head(job, session, window, layout_epoch)?;
                write::put(node, access, head, &mut recv, &mut send).await
            }
            Frame::Have { job, session, window, layout_epoch, ids } => {
                let head = access.head(job, session, window, layout_epoch)?;
                read::have(node, access, head, ids, &mut send).await
            }
            Frame::HaveLocal { ids } => read::have_local(node, access, &ids, &mut send).await,
            Frame::Get { ids } => read::get(node, access, ids, &mut send).await,
            Frame::ListPg { pg, after } => read::list_pg(node, access, pg, after, &mut send).await,
            Frame::Barrier { job, session, window, layout_epoch, pgs, traceparent } => {
                let head = access.head(job, session, window, layout_epoch)?;
                let span = tracing::info_span!("barrier", job_id = %job, window = window.0);
                set_parent(&span, &traceparent);
                write::barrier(node, access, head, pgs, &mut send).instrument(span).await
            }
            Frame::PutNamed { space, key, fence, record } => {
                named::put(node, access, space, key, fence, record, &mut send).await
            }
            Frame::ListNamed { space, prefix } => {
                named::list(node, access, space, &prefix, &mut send).await
            }
            Frame::ListNames { space, after } => {
                named::list_names(node, access, space, &after, &mut send).await
            }
            other => refuse(Refusal::Protocol, format!("{} is no request", other.name())),
        }
    }
    .await;
    match outcome {
        Ok(()) => {}
        Err(Ending::Refused(refusal, message)) => {
            node.metrics.refused.inc();
            tracing::info!(?refusal, message, peer = %access, "request refused");
            recv.stop(close::DENIED);
            // A client that is gone needs no sentence.
            let _ = finish_with(&mut send, &Frame::Refused { refusal, message }).await;
        }
        Err(Ending::Broken(error)) => tracing::debug!(%error, peer = %access, "request broken off"),
    }
}
