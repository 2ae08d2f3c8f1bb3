//! What bounds a client's memory and patience.

use std::time::Duration;

/// Bounds of a client. Every buffer and every wait of this crate has its size from here.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of records taken by `put` and not yet taken in by a storage node, per job.
    pub in_flight: usize,
    /// Bytes of records that travel in one put request.
    pub batch: usize,
    /// Put requests in flight to one storage node.
    pub lanes: usize,
    /// Flow-control window of one connection: rate x round-trip time.
    pub connection_window: u32,
    /// Ids in one `Have` request.
    pub ids_per_have: usize,
    /// Ids in one `Get` request.
    pub ids_per_get: usize,
    /// A connection attempt that takes longer is given up.
    pub connect: Duration,
    /// A request without an answer for this long means that the node is lost.
    pub request: Duration,
    /// How long a barrier may take at a storage node; longer than the node's own limit for its replicas.
    pub barrier: Duration,
    /// How often a barrier asks again for ids whose receipts fell short before it gives up.
    pub barrier_attempts: u32,
    /// How long named records wait for nodes beyond `min_durable`.
    pub laggards: Duration,
    /// Pause before a lost node is tried again; doubles up to `longest_pause`.
    pub first_pause: Duration,
    /// Longest such pause.
    pub longest_pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            in_flight: 32 << 20,
            batch: 4 << 20,
            lanes: 4,
            connection_window: 64 << 20,
            ids_per_have: 8192,
            ids_per_get: 32,
            connect: Duration::from_secs(3),
            request: Duration::from_secs(30),
            barrier: Duration::from_secs(40),
            barrier_attempts: 4,
            laggards: Duration::from_millis(300),
            first_pause: Duration::from_millis(50),
            longest_pause: Duration::from_secs(2),
        }
    }
}
