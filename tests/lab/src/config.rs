//! What the lab simulates.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The lab's configuration (TOML-able).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabConfig {
    /// Where to listen; port 0 takes a free one.
    #[serde(default = "loopback")]
    pub listen: SocketAddr,
    /// A file that receives the bound address as text once the lab listens.
    #[serde(default)]
    pub address_file: Option<PathBuf>,
    /// Name of the failover cluster.
    pub realm: String,
    /// Host names.
    pub hosts: Vec<String>,
    /// Cluster Shared Volumes.
    pub csvs: Vec<CsvConfig>,
    /// Seed of everything the lab decides by chance.
    #[serde(default)]
    pub seed: u64,
    /// How long things take.
    #[serde(default)]
    pub delays: Delays,
    /// What a migration does to a recovery checkpoint; changeable at run time.
    #[serde(default)]
    pub checkpoint_on_migration: CheckpointOnMigration,
    /// Where and how long the exact bytes of checkpoints are kept.
    pub truth: TruthConfig,
}

/// A Cluster Shared Volume: a folder that all hosts see under the same path.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CsvConfig {
    /// Name, e.g. `Volume1`.
    pub name: String,
    /// The folder; made if missing.
    pub path: PathBuf,
}

/// Durations in milliseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Delays {
    /// Before a WMI job begins its work.
    pub job_ms: u64,
    /// Each phase of a migration.
    pub migration_ms: u64,
    /// Before a background merge begins.
    pub merge_ms: u64,
    /// How long a finished job can still be asked about.
    pub job_retention_ms: u64,
}

impl Default for Delays {
    fn default() -> Self {
        Self { job_ms: 20, migration_ms: 40, merge_ms: 20, job_retention_ms: 300_000 }
    }
}

/// What a migration does to a recovery checkpoint. No source is sure, so all three exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointOnMigration {
    /// The checkpoint goes along to the new host.
    #[default]
    Travels,
    /// The checkpoint is silently merged away.
    Lost,
    /// The migration is refused while there is one.
    Blocks,
}

/// Where the exact bytes of every disk at every recovery checkpoint are kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TruthConfig {
    /// Folder; made if missing.
    pub dir: PathBuf,
    /// Raw copies kept per VM; of older checkpoints only the hashes stay.
    #[serde(default = "keep")]
    pub keep: usize,
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn keep() -> usize {
    8
}
