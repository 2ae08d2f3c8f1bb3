//! Looking whether a storage node can be reached, and how large packets may be on the way (O8). Nothing is asked of the node.

use std::time::Duration;

use outrider_process::identity::{Identity, Role, peer_of_connection};
use outrider_process::network::Network;
use outrider_proto::frame::close;
use outrider_proto::ids::FabricId;
use outrider_proto::layout::StorageNode;
use quinn::Connection;
use tokio::time::Instant;

use super::{QuicTransport, tuning};
use crate::error::TransportError;
use crate::limits::Limits;
use crate::transport::ClientRole;

/// Packets in quick succession: a probe that was lost is noticed by what comes after it.
const BEAT: Duration = Duration::from_millis(50);
/// The size that passes is known when it did not grow for this long.
const SETTLED: Duration = Duration::from_millis(1500);
/// Longest look.
const LONGEST: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(50);
/// What an Ethernet without jumbo frames carries, less the headers of IPv6 and UDP.
const ETHERNET: u16 = 1452;

/// A path that works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// Round trip.
    pub rtt: Duration,
    /// Bytes of the largest UDP payload that passed.
    pub packet: u16,
    /// The search was not over yet: larger ones may pass, too.
    pub at_least: bool,
}

impl Path {
    /// Whether packets are smaller than on an ordinary network.
    #[must_use]
    pub fn is_narrow(&self) -> bool {
        self.packet < ETHERNET && !self.at_least
    }
}

/// Tries paths to storage nodes.
#[derive(Debug)]
pub struct Prober(QuicTransport);

impl Prober {
    /// One that shows `identity` and leaves from these networks only.
    ///
    /// # Errors
    /// As [`QuicTransport::new`].
    pub fn new(
        identity: &Identity,
        fabric: FabricId,
        role: ClientRole,
        network: Network,
    ) -> Result<Self, TransportError> {
        let limits = Limits::default();
        let mut config = tuning::client(&limits);
        config.keep_alive_interval(Some(BEAT));
        Ok(Self(QuicTransport::with(identity, fabric, role, &limits, config)?.over(network)))
    }

    /// Tries one advertised address of a node.
    ///
    /// # Errors
    /// [`TransportError::Unreachable`] when nothing came back; [`TransportError::WrongPeer`] when somebody else answers there.
    pub async fn try_path(
        &self,
        node: &StorageNode,
        address: &str,
    ) -> Result<Path, TransportError> {
        let connection = self.0.connect(node, address).await?;
        let peer = peer_of_connection(&connection);
        let named = peer.as_ref().is_ok_and(|p| {
            p.name == node.name && p.role == Role::Storage && p.fabric == self.0.fabric.to_string()
        });
        let path = if named {
            Ok(measured(&connection).await)
        } else {
            Err(TransportError::WrongPeer {
                node: node.name.clone(),
                address: address.to_owned(),
                found: peer.map_or_else(|e| e.to_string(), |p| format!("{p} of {}", p.fabric)),
            })
        };
        connection.close(close::DONE.into(), b"");
        path
    }
}

/// Waits until the connection has found out what passes.
async fn measured(connection: &Connection) -> Path {
    let begun = Instant::now();
    let mut best = (connection.stats().path.current_mtu, begun);
    loop {
        let now = connection.stats().path.current_mtu;
        if now > best.0 {
            best = (now, Instant::now());
        }
        let settled = best.1.elapsed() >= SETTLED.max(connection.rtt() * 8);
        if settled || begun.elapsed() >= LONGEST {
            return Path { rtt: connection.rtt(), packet: best.0, at_least: !settled };
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// A path in a sentence, with what to do where it is not as it should be.
#[must_use]
pub fn told(tried: &Result<Path, TransportError>) -> String {
    match tried {
        Ok(path) if path.is_narrow() => format!(
            "answers over UDP in {:.1} ms, and packets of more than {} bytes do not pass: look for a tunnel or a wrong MTU on the \
             way; backups work, slower than they could",
            path.rtt.as_secs_f64() * 1000.0,
            path.packet
        ),
        Ok(path) => format!(
            "answers over UDP in {:.1} ms; packets of {}{} bytes pass",
            path.rtt.as_secs_f64() * 1000.0,
            if path.at_least { "at least " } else { "" },
            path.packet
        ),
        Err(error @ TransportError::Unreachable { .. }) => format!(
            "{error}: UDP to this address is blocked, the node is down, or packets of 1200 bytes do not pass; let UDP to its port \
             through every firewall between, both ways"
        ),
        Err(error) => error.to_string(),
    }
}
