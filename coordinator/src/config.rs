//! Configuration of a coordinator.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use outrider_process::config::time;
use outrider_process::telemetry::{LogConfig, TraceConfig};
use outrider_proto::ids::FabricId;
use serde::Deserialize;

/// `coordinator.toml`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name in the certificate.
    pub name: String,
    /// Number of this member; never reused for another one.
    pub id: u64,
    /// The fabric.
    pub fabric: FabricId,
    /// Certificate and keys.
    pub identity_dir: PathBuf,
    /// Database.
    pub data_dir: PathBuf,
    /// Key-encryption key of the fabric.
    pub kek_file: PathBuf,
    /// gRPC for agents, storage nodes, operators and members.
    pub listen: SocketAddr,
    /// "host:port" under which agents, storage nodes and operators reach it; none: as in `members`.
    pub advertise: Option<String>,
    /// All members, this one included.
    pub members: Vec<MemberConfig>,
    /// Leases of jobs.
    #[serde(default)]
    pub lease: LeaseConfig,
    /// The layout to make.
    #[serde(default)]
    pub storage: StorageConfig,
    /// Raft's times.
    #[serde(default)]
    pub raft: RaftConfig,
    /// Machines that join.
    #[serde(default)]
    pub enrolment: EnrolmentConfig,
    /// Bounds of the fabric's work.
    #[serde(default)]
    pub limits: LimitsConfig,
    /// What backups leave on hosts.
    #[serde(default)]
    pub traces: TracesConfig,
    /// Metrics and health, plain HTTP.
    pub observability: Option<SocketAddr>,
    /// Traces.
    #[serde(default)]
    pub telemetry: TraceConfig,
    /// The log.
    #[serde(default)]
    pub log: LogConfig,
}

/// A member.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    /// Its number.
    pub id: u64,
    /// "host:port" of its gRPC.
    pub address: String,
}

/// `[lease]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LeaseConfig {
    /// By the leader's clock, a lease that was not renewed is over after this.
    #[serde(with = "time")]
    pub duration: Duration,
    /// How often agents renew.
    #[serde(with = "time")]
    pub renew: Duration,
    /// By its own clock, an agent stops all work on a lease that was not renewed after this.
    #[serde(with = "time")]
    pub cutoff: Duration,
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(30),
            renew: Duration::from_secs(10),
            cutoff: Duration::from_secs(20),
        }
    }
}

/// `[storage]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StorageConfig {
    /// Storage nodes to wait for before the layout is made.
    pub nodes: u16,
    /// Placement groups.
    pub pg_count: u16,
    /// Copies of each chunk.
    pub replicas: u8,
    /// Copies that make a chunk durable.
    pub min_durable: u8,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self { nodes: 3, pg_count: 64, replicas: 3, min_durable: 2 }
    }
}

/// `[raft]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RaftConfig {
    /// Between heartbeats of the leader.
    #[serde(with = "time")]
    pub heartbeat: Duration,
    /// Silence after which a member stands for election, at least.
    #[serde(with = "time")]
    pub election_min: Duration,
    /// At most.
    #[serde(with = "time")]
    pub election_max: Duration,
}

impl Default for RaftConfig {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(150),
            election_min: Duration::from_millis(600),
            election_max: Duration::from_millis(1200),
        }
    }
}

/// `[traces]`: how often hosts are looked at for what backups left there, and what is an alarm.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TracesConfig {
    /// Between two looks at a host.
    #[serde(with = "time")]
    pub every: Duration,
    /// Age of a backup's checkpoint, ours or another product's.
    #[serde(with = "time")]
    pub checkpoint_age: Duration,
    /// How long a merge may take.
    #[serde(with = "time")]
    pub merge: Duration,
    /// Between the two looks of all hosts of a realm that prove that a VM is nowhere there any more.
    #[serde(with = "time")]
    pub absent_after: Duration,
}

impl Default for TracesConfig {
    fn default() -> Self {
        Self {
            every: Duration::from_secs(300),
            checkpoint_age: Duration::from_secs(24 * 3600),
            merge: Duration::from_secs(4 * 3600),
            absent_after: Duration::from_secs(3600),
        }
    }
}

/// `[enrolment]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EnrolmentConfig {
    /// How long certificates of machines that joined are valid; they renew them by themselves.
    #[serde(with = "time")]
    pub valid: Duration,
}

impl Default for EnrolmentConfig {
    fn default() -> Self {
        Self { valid: Duration::from_secs(90 * 24 * 3600) }
    }
}

/// `[limits]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Jobs that one host works on at a time.
    pub jobs_per_host: usize,
    /// Jobs that the fabric works on at a time.
    pub jobs: usize,
    /// Attempts that may fail before the job does.
    pub runs: u32,
    /// First wait before another attempt; doubled with each.
    #[serde(with = "time")]
    pub back_off: Duration,
    /// Longest wait.
    #[serde(with = "time")]
    pub back_off_max: Duration,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            jobs_per_host: 4,
            jobs: 64,
            runs: 3,
            back_off: Duration::from_secs(5),
            back_off_max: Duration::from_secs(300),
        }
    }
}

/// Settings that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigConflict {
    /// This member is not in the list.
    #[error(
        "members does not list id {id}: add this member, with the address that the others reach it under"
    )]
    NotListed {
        /// This member.
        id: u64,
    },
    /// Listed twice.
    #[error("members lists id {id} twice: give each member a number of its own")]
    Twice {
        /// The number.
        id: u64,
    },
    /// Two or more than seven members.
    #[error(
        "members lists {found} members: take 1, 3 or 5, since an even number survives no more losses than one less"
    )]
    Count {
        /// How many.
        found: usize,
    },
    /// Times of leases in the wrong order.
    #[error(
        "[lease] needs renew < cutoff < duration: an agent must have stopped before its lease is given to another"
    )]
    LeaseOrder,
    /// Times of Raft in the wrong order.
    #[error("[raft] needs heartbeat < election_min < election_max")]
    RaftOrder,
    /// Copies that cannot be kept.
    #[error("[storage] needs 1 <= min_durable <= replicas <= nodes and at least one PG")]
    Copies,
    /// A limit of nothing.
    #[error("[limits] needs at least one job per host, one job and one run")]
    Limits,
}

impl Config {
    /// Checks what the types cannot.
    ///
    /// # Errors
    /// [`ConfigConflict`].
    pub fn validate(&self) -> Result<(), ConfigConflict> {
        let mut ids = BTreeMap::new();
        for member in &self.members {
            if ids.insert(member.id, ()).is_some() {
                return Err(ConfigConflict::Twice { id: member.id });
            }
        }
        if !ids.contains_key(&self.id) {
            return Err(ConfigConflict::NotListed { id: self.id });
        }
        if !matches!(self.members.len(), 1 | 3 | 5 | 7) {
            return Err(ConfigConflict::Count { found: self.members.len() });
        }
        let l = &self.lease;
        if !(l.renew < l.cutoff && l.cutoff < l.duration) {
            return Err(ConfigConflict::LeaseOrder);
        }
        let r = &self.raft;
        if !(r.heartbeat < r.election_min && r.election_min < r.election_max) {
            return Err(ConfigConflict::RaftOrder);
        }
        let s = &self.storage;
        let copies = 1 <= s.min_durable
            && s.min_durable <= s.replicas
            && u16::from(s.replicas) <= s.nodes
            && s.pg_count > 0;
        if !copies {
            return Err(ConfigConflict::Copies);
        }
        if self.limits.jobs_per_host == 0 || self.limits.jobs == 0 || self.limits.runs == 0 {
            return Err(ConfigConflict::Limits);
        }
        Ok(())
    }

    /// Members by number, as they reach each other.
    #[must_use]
    pub fn member_addresses(&self) -> BTreeMap<u64, String> {
        self.members.iter().map(|m| (m.id, m.address.clone())).collect()
    }

    /// Where agents, storage nodes and operators reach this member.
    #[must_use]
    pub fn advertised(&self) -> String {
        let own = || self.members.iter().find(|m| m.id == self.id).map(|m| m.address.clone());
        self.advertise.clone().or_else(own).unwrap_or_else(|| self.listen.to_string())
    }
}

#[cfg(test)]
mod tests;
