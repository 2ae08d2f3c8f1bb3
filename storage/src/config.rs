//! Configuration of a storage node (`storage.toml`).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use outrider_process::config::{ByteSize, time};
use outrider_process::telemetry::{LogConfig, TraceConfig};
use outrider_proto::ids::FabricId;
use serde::Deserialize;

/// A storage node's file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name, as in the certificate.
    pub name: String,
    /// Folder of the identity.
    pub identity_dir: PathBuf,
    /// Where metrics and health are served; nowhere if absent.
    #[serde(default)]
    pub observability: Option<SocketAddr>,
    /// Traces.
    #[serde(default)]
    pub telemetry: TraceConfig,
    /// The log.
    #[serde(default)]
    pub log: LogConfig,
    /// Fabric.
    pub fabric: FabricId,
    /// Folder of the store, used by this node alone.
    pub data_dir: PathBuf,
    /// UDP address of the QUIC listener.
    pub listen: SocketAddr,
    /// "host:port" under which others reach it, preferred first; the bound address if empty.
    #[serde(default)]
    pub advertise: Vec<String>,
    /// "host:port" of the coordinators.
    pub coordinators: Vec<String>,
    /// Failure domain; the node's name if empty.
    #[serde(default)]
    pub zone: String,
    /// Capacity: the node's weight in the layout.
    #[serde(default = "tebibyte")]
    pub capacity: ByteSize,
    /// Segments are sealed at this size.
    #[serde(default = "segment")]
    pub segment_size: ByteSize,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
}

/// Bounds of a storage node's memory and patience.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Memory of all connections' receive windows together.
    pub receive_budget: ByteSize,
    /// Largest receive window of one connection.
    pub connection_window: ByteSize,
    /// Bytes in line for each other replica.
    pub forward_queue: ByteSize,
    /// Bytes in line for the disk.
    pub write_queue: ByteSize,
    /// A group commit happens at the latest after this many bytes.
    pub sync_bytes: ByteSize,
    /// With less free space nothing new is taken.
    pub min_free: ByteSize,
    /// Cache of the tables.
    pub table_cache: ByteSize,
    /// Windows remembered for receipts.
    pub windows: usize,
    /// How long a full line to a slow replica is waited for before it is left behind.
    #[serde(with = "time")]
    pub forward_patience: Duration,
    /// How long a barrier waits for replicas.
    #[serde(with = "time")]
    pub barrier: Duration,
    /// How long a question to other replicas may take.
    #[serde(with = "time")]
    pub peer_request: Duration,
    /// Bytes a second that catching up may fetch.
    pub catch_up_rate: ByteSize,
    /// Pause between two looks for what is missing.
    #[serde(with = "time")]
    pub catch_up_every: Duration,
    /// Pause between two status reports to the leader.
    #[serde(with = "time")]
    pub status_every: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            receive_budget: ByteSize::mib(128),
            connection_window: ByteSize::mib(32),
            forward_queue: ByteSize::mib(16),
            write_queue: ByteSize::mib(32),
            sync_bytes: ByteSize::mib(16),
            min_free: ByteSize::mib(256),
            table_cache: ByteSize::mib(32),
            windows: 4096,
            forward_patience: Duration::from_secs(2),
            barrier: Duration::from_secs(15),
            peer_request: Duration::from_secs(5),
            catch_up_rate: ByteSize::mib(200),
            catch_up_every: Duration::from_secs(30),
            status_every: Duration::from_secs(5),
        }
    }
}

fn tebibyte() -> ByteSize {
    ByteSize::tib(1)
}

fn segment() -> ByteSize {
    ByteSize::mib(256)
}
