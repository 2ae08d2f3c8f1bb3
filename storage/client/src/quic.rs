//! [`ChunkTransport`] over QUIC: mutual TLS, one connection a session, one bidirectional stream a request.

pub mod probe;
mod session;
mod socket;
pub mod tuning;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use outrider_process::identity::{Identity, Role, peer_of_connection};
use outrider_process::network::{Network, NetworkError};
use outrider_proto::frame::{ALPN, Frame, OLDEST_VERSION, PROTOCOL_VERSION, close, common_version};
use outrider_proto::ids::FabricId;
use outrider_proto::layout::StorageNode;
use quinn::{Connection, Endpoint};

use crate::error::TransportError;
use crate::frame_io::{FrameReader, write_frame};
use crate::limits::Limits;
use crate::transport::{ChunkSession, ChunkTransport, ClientRole, Opened, Opening};

use self::session::QuicSession;

pub use self::socket::endpoint;

/// Connects to storage nodes over QUIC. One UDP socket for all of them, or one for each address of ours that the operator
/// wants connections to leave from.
#[derive(Debug)]
pub struct QuicTransport {
    endpoint: Endpoint,
    config: quinn::ClientConfig,
    network: Network,
    bound: Mutex<HashMap<IpAddr, Endpoint>>,
    fabric: FabricId,
    role: ClientRole,
    limits: Limits,
}

/// Why nothing can be sent from this host to a storage node.
#[derive(Debug, thiserror::Error)]
enum NoEndpoint {
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("no socket on {address}: {error}")]
    Socket { address: IpAddr, error: std::io::Error },
}

impl QuicTransport {
    /// A transport that shows `identity`.
    ///
    /// # Errors
    /// [`TransportError::Unreachable`] when the system gives no UDP socket or the identity cannot be used for TLS.
    pub fn new(
        identity: &Identity,
        fabric: FabricId,
        role: ClientRole,
        limits: &Limits,
    ) -> Result<Self, TransportError> {
        Self::with(identity, fabric, role, limits, tuning::client(limits))
    }

    /// As [`Self::new`], with other settings.
    fn with(
        identity: &Identity,
        fabric: FabricId,
        role: ClientRole,
        limits: &Limits,
        settings: quinn::TransportConfig,
    ) -> Result<Self, TransportError> {
        let unusable = |why: String| TransportError::Unreachable {
            node: "any".to_owned(),
            address: "the local UDP socket".to_owned(),
            why,
        };
        let config = identity
            .quinn_client(&[ALPN], Arc::new(settings))
            .map_err(|e| unusable(e.to_string()))?;
        let mut endpoint = endpoint(None, None).map_err(|e| unusable(e.to_string()))?;
        endpoint.set_default_client_config(config.clone());
        let (network, bound) = (Network::default(), Mutex::default());
        Ok(Self { endpoint, config, network, bound, fabric, role, limits: limits.clone() })
    }

    /// Connects over these networks only.
    #[must_use]
    pub fn over(mut self, network: Network) -> Self {
        self.network = network;
        self
    }

    /// The endpoint that connections to `remote` leave from.
    fn endpoint_to(&self, remote: IpAddr) -> Result<Endpoint, NoEndpoint> {
        let Some(source) = self.network.source_for(remote)? else {
            return Ok(self.endpoint.clone());
        };
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(endpoint) = bound.get(&source) {
            return Ok(endpoint.clone());
        }
        let made = UdpSocket::bind((source, 0)).and_then(|socket| endpoint(Some(socket), None));
        let mut made = made.map_err(|error| NoEndpoint::Socket { address: source, error })?;
        made.set_default_client_config(self.config.clone());
        bound.insert(source, made.clone());
        Ok(made)
    }

    async fn connect(
        &self,
        node: &StorageNode,
        address: &str,
    ) -> Result<Connection, TransportError> {
        let unreachable = |why: String| TransportError::Unreachable {
            node: node.name.clone(),
            address: address.to_owned(),
            why,
        };
        let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address)
            .await
            .map_err(|e| unreachable(format!("the address does not resolve: {e}")))?
            .collect();
        let mut last = unreachable(
            "the name has no address, or none in a network that may be used".to_owned(),
        );
        for remote in self.network.order(resolved) {
            let endpoint = match self.endpoint_to(remote.ip()) {
                Ok(endpoint) => endpoint,
                Err(why) => {
                    last = unreachable(why.to_string());
                    continue;
                }
            };
            let connecting = match endpoint.connect(remote, &Role::Storage.server_name()) {
                Ok(connecting) => connecting,
                Err(error) => {
                    last = unreachable(error.to_string());
                    continue;
                }
            };
            match tokio::time::timeout(self.limits.connect, connecting).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => last = unreachable(error.to_string()),
                Err(_) => {
                    last = unreachable(format!("no answer within {:?}", self.limits.connect));
                }
            }
        }
        Err(last)
    }

    /// Advertised addresses in the order to try them. Names keep their place behind addresses that are preferred.
    fn preferred<'a>(&self, addresses: &'a [String]) -> Vec<&'a String> {
        let literal = |text: &String| text.parse::<SocketAddr>().ok();
        let order = self.network.order(addresses.iter().filter_map(literal).collect());
        let rank = |text: &&String| match literal(text) {
            Some(at) => order.iter().position(|other| *other == at).unwrap_or(usize::MAX),
            None => order.len(),
        };
        let mut sorted: Vec<&String> = addresses.iter().collect();
        if !self.network.is_any() {
            sorted.sort_by_key(rank);
        }
        sorted
    }

    async fn greet(
        &self,
        connection: &Connection,
        node: &StorageNode,
        address: &str,
        opening: Opening,
    ) -> Result<Opened, TransportError> {
        let peer = peer_of_connection(connection);
        let named = peer.as_ref().is_ok_and(|p| {
            p.name == node.name && p.role == Role::Storage && p.fabric == self.fabric.to_string()
        });
        if !named {
            return Err(TransportError::WrongPeer {
                node: node.name.clone(),
                address: address.to_owned(),
                found: peer.map_or_else(|e| e.to_string(), |p| format!("{p} of {}", p.fabric)),
            });
        }
        let failed =
            |e: crate::frame_io::FrameIoError| session::failure(&node.name, connection, &e);
        let (mut send, recv) = connection
            .open_bi()
            .await
            .map_err(|e| TransportError::Lost { node: node.name.clone(), why: e.to_string() })?;
        let mut recv = FrameReader::new(recv);
        let hello = Frame::Hello {
            version: PROTOCOL_VERSION,
            oldest: OLDEST_VERSION,
            role: self.role as u8,
        };
        write_frame(&mut send, &hello).await.map_err(failed)?;
        let version = match recv.expect("Hello").await.map_err(failed)? {
            Frame::Hello { version, oldest, .. } => {
                common_version(version, oldest).ok_or_else(|| TransportError::Protocol {
                    node: node.name.clone(),
                    what: format!(
                        "it speaks versions {oldest} to {version}, this process {OLDEST_VERSION} to {PROTOCOL_VERSION}"
                    ),
                })?
            }
            other => return Err(session::unexpected(&node.name, "Hello", other)),
        };
        let open = Frame::Open {
            session: opening.session,
            layout_epoch: opening.layout_epoch,
            ticket: opening.ticket,
        };
        // A node that refuses stops reading; its answer says why.
        match write_frame(&mut send, &open).await {
            Err(error) if error.is_connection() => return Err(failed(error)),
            _ => crate::frame_io::finish(&mut send),
        }
        match recv.expect("Opened").await.map_err(failed)? {
            Frame::Opened { fabric, node: name, incarnation, layout_epoch } => {
                if fabric != self.fabric || name != node.name {
                    return Err(TransportError::WrongPeer {
                        node: node.name.clone(),
                        address: address.to_owned(),
                        found: format!("{name} of fabric {fabric}"),
                    });
                }
                Ok(Opened { fabric, node: name, incarnation, layout_epoch, version })
            }
            other => Err(session::unexpected(&node.name, "Opened", other)),
        }
    }
}

#[async_trait]
impl ChunkTransport for QuicTransport {
    async fn open(
        &self,
        node: &StorageNode,
        opening: Opening,
    ) -> Result<Arc<dyn ChunkSession>, TransportError> {
        let mut last = TransportError::Unreachable {
            node: node.name.clone(),
            address: "no address".to_owned(),
            why: "the node has advertised none".to_owned(),
        };
        for address in self.preferred(&node.addresses) {
            let connection = match self.connect(node, address).await {
                Ok(connection) => connection,
                Err(error) => {
                    last = error;
                    continue;
                }
            };
            let greeting = self.greet(&connection, node, address, opening.clone());
            match tokio::time::timeout(self.limits.connect, greeting).await {
                Ok(Ok(opened)) => {
                    let session = QuicSession::new(connection, opened, self.limits.clone());
                    return Ok(Arc::new(session));
                }
                Ok(Err(error)) => {
                    connection.close(close::DONE.into(), b"");
                    last = error;
                }
                Err(_) => {
                    connection.close(close::DONE.into(), b"");
                    last = TransportError::Unreachable {
                        node: node.name.clone(),
                        address: address.clone(),
                        why: "it accepted the connection, but does not answer".to_owned(),
                    };
                }
            }
        }
        Err(last)
    }
}

impl Drop for QuicTransport {
    fn drop(&mut self) {
        self.endpoint.close(close::DONE.into(), b"");
        for endpoint in self.bound.get_mut().unwrap_or_else(PoisonError::into_inner).values() {
            endpoint.close(close::DONE.into(), b"");
        }
    }
}
