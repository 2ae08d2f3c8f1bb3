//! QUIC's settings, for both ends.

use std::sync::Arc;
use std::time::Duration;

use quinn::{EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};

use crate::limits::Limits;

/// A connection without a sign of life for this long is lost.
pub const IDLE: Duration = Duration::from_secs(10);
/// Signs of life while nothing else is said.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// Packets are probed up to this size: loopback and jumbo frames carry them, others stay where probes end.
const LARGEST_PACKET: u16 = 16_336;
/// Requests that a client may have in flight on one connection.
pub const REQUESTS: u32 = 256;

/// Transport settings of a client.
#[must_use]
pub fn client(limits: &Limits) -> TransportConfig {
    let mut config = base(limits.connection_window);
    // Storage nodes never open streams.
    config.max_concurrent_bidi_streams(0u32.into());
    config
}

/// Transport settings of a storage node, per connection.
#[must_use]
pub fn server(window: u32) -> TransportConfig {
    let mut config = base(window);
    config.max_concurrent_bidi_streams(REQUESTS.into());
    config
}

fn base(window: u32) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .receive_window(window.into())
        .stream_receive_window((window / 2).max(1 << 20).into())
        .send_window(u64::from(window))
        .max_idle_timeout(Some(VarInt::from_u32(IDLE.as_millis() as u32).into()))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_uni_streams(0u32.into())
        .datagram_receive_buffer_size(None)
        // First come, first served: a batch that is nearly through frees its memory first.
        .send_fairness(false);
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(LARGEST_PACKET);
    config.mtu_discovery_config(Some(mtu));
    config.congestion_controller_factory(Arc::new(quinn::congestion::CubicConfig::default()));
    config
}

/// Endpoint settings: packets as large as the other side cares to send.
#[must_use]
pub fn endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(65_527).expect("65527 is QUIC's own maximum");
    config
}
