//! Metrics of the node agent (`outrider_node_*`).

use outrider_process::metrics::Metrics;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

use crate::pipeline::StatsSnapshot;

/// Counters and gauges; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct NodeMetrics {
    /// VMs of this host.
    pub vms: Gauge,
    /// Jobs at work.
    pub jobs_running: Gauge,
    /// Whether a leader is attached (1) or not (0).
    pub attached: Gauge,
    /// Attempts that ended with data safe and host clean.
    pub jobs_good: Counter,
    /// Attempts that ended otherwise.
    pub jobs_bad: Counter,
    /// Leases lost in the middle of a job.
    pub leases_lost: Counter,
    /// Bytes read from source disks.
    pub read_bytes: Counter,
    /// Sealed bytes sent to storage.
    pub sent_bytes: Counter,
    /// Plain bytes that storage had already.
    pub known_bytes: Counter,
    /// Plain bytes of zeros.
    pub zero_bytes: Counter,
    /// Bytes written by restores.
    pub restored_bytes: Counter,
}

impl NodeMetrics {
    /// Registers everything.
    #[must_use]
    pub fn register(metrics: &mut Metrics) -> Self {
        let all = Self::default();
        let r = metrics.of("node");
        r.register("vms", "VMs of this host", all.vms.clone());
        r.register("jobs_running", "Jobs at work on this host", all.jobs_running.clone());
        r.register("attached", "Whether the agent is attached to a leader", all.attached.clone());
        r.register(
            "jobs_good",
            "Attempts that ended with data safe and host clean",
            all.jobs_good.clone(),
        );
        r.register(
            "jobs_bad",
            "Attempts that failed or left the host unclean",
            all.jobs_bad.clone(),
        );
        r.register(
            "leases_lost",
            "Leases that ended in the middle of a job",
            all.leases_lost.clone(),
        );
        r.register("read_bytes", "Bytes read from source disks", all.read_bytes.clone());
        r.register("sent_bytes", "Sealed bytes sent to storage", all.sent_bytes.clone());
        r.register("known_bytes", "Plain bytes that storage had already", all.known_bytes.clone());
        r.register("zero_bytes", "Plain bytes that were zeros", all.zero_bytes.clone());
        r.register("restored_bytes", "Bytes written by restores", all.restored_bytes.clone());
        all
    }

    /// Adds what a job did.
    pub fn add(&self, stats: &StatsSnapshot) {
        self.read_bytes.inc_by(stats.read_bytes);
        self.sent_bytes.inc_by(stats.sent_bytes);
        self.known_bytes.inc_by(stats.known_bytes);
        self.zero_bytes.inc_by(stats.zero_bytes);
    }
}
