//! Metrics of a coordinator: `outrider_coordinator_*`.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// One word.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Word {
    pub(crate) outcome: &'static str,
}

/// Counters and gauges; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    /// 1 on the leader.
    pub(crate) leader: Gauge,
    pub(crate) term: Gauge<u64, AtomicU64>,
    pub(crate) applied: Gauge<u64, AtomicU64>,
    pub(crate) reigns: Counter,
    pub(crate) commits: Family<Word, Counter>,
    pub(crate) leases: Counter,
    pub(crate) leases_lost: Counter,
    pub(crate) renewals: Counter,
    pub(crate) agents: Gauge,
    pub(crate) storage_nodes: Gauge,
    pub(crate) jobs_running: Gauge,
    pub(crate) jobs_pending: Gauge,
    pub(crate) vms: Gauge,
    pub(crate) points: Gauge,
    pub(crate) open_duties: Gauge,
    pub(crate) resting_duties: Gauge,
    /// What lasts too long on hosts.
    pub(crate) trace_alarms: Gauge,
}

impl Metrics {
    /// Metrics that a registry shows.
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let m = Self::default();
        registry.register("leader", "1 while this member leads", m.leader.clone());
        registry.register("raft_term", "Current Raft term", m.term.clone());
        registry.register("raft_applied_index", "Last applied log entry", m.applied.clone());
        registry.register("reigns", "Times this member began to lead", m.reigns.clone());
        registry.register("commits", "Commits asked for, by outcome", m.commits.clone());
        registry.register("leases", "Leases given", m.leases.clone());
        registry.register(
            "leases_lost",
            "Leases ended because the holder was silent",
            m.leases_lost.clone(),
        );
        registry.register("renewals", "Lease renewals sent", m.renewals.clone());
        registry.register("agents", "Node agents attached to this leader", m.agents.clone());
        registry.register(
            "storage_nodes",
            "Storage nodes attached to this leader",
            m.storage_nodes.clone(),
        );
        registry.register("jobs_running", "Jobs leased to a host", m.jobs_running.clone());
        registry.register("jobs_pending", "Jobs that wait for a host", m.jobs_pending.clone());
        registry.register("vms", "VMs known", m.vms.clone());
        registry.register("points", "Recovery points", m.points.clone());
        registry.register("open_duties", "Duties not done yet", m.open_duties.clone());
        registry.register(
            "resting_duties",
            "Duties of VMs that are nowhere any more",
            m.resting_duties.clone(),
        );
        registry.register(
            "trace_alarms",
            "Checkpoints too old, chains that grow and merges that do not end",
            m.trace_alarms.clone(),
        );
        m
    }
}

/// For gauges.
pub(crate) fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
