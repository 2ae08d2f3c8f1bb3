//! `outrider_storage_*`.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64};

use outrider_process::metrics::Metrics;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;

/// Figures of a storage node.
#[derive(Debug, Clone, Default)]
pub struct StorageMetrics {
    /// Records put by clients.
    pub put_records: Counter<u64, AtomicU64>,
    /// Their bytes.
    pub put_bytes: Counter<u64, AtomicU64>,
    /// Records forwarded by other nodes.
    pub forwarded_records: Counter<u64, AtomicU64>,
    /// Records that a replica was left without.
    pub left_behind: Counter<u64, AtomicU64>,
    /// Records read.
    pub got_records: Counter<u64, AtomicU64>,
    /// Ids asked for.
    pub asked_ids: Counter<u64, AtomicU64>,
    /// Barriers answered.
    pub barriers: Counter<u64, AtomicU64>,
    /// Requests refused.
    pub refused: Counter<u64, AtomicU64>,
    /// Records fetched from other replicas.
    pub caught_up: Counter<u64, AtomicU64>,
    /// Ids known to be missing here.
    pub catching_up: Gauge<i64, AtomicI64>,
    /// Bytes of all segments.
    pub stored_bytes: Gauge<i64, AtomicI64>,
    /// Durable chunks.
    pub chunks: Gauge<i64, AtomicI64>,
    /// Damaged records.
    pub damaged: Gauge<i64, AtomicI64>,
    /// Group commits.
    pub commits: Gauge<i64, AtomicI64>,
}

impl StorageMetrics {
    /// Registers all of them.
    #[must_use]
    pub fn register(metrics: &mut Metrics) -> Self {
        let m = Self::default();
        let r = metrics.of("storage");
        r.register("put_records", "Records put by clients", m.put_records.clone());
        r.register("put_bytes", "Sealed bytes put by clients", m.put_bytes.clone());
        r.register("forwarded_records", "Records other nodes sent", m.forwarded_records.clone());
        r.register(
            "left_behind_records",
            "Records a replica was left without",
            m.left_behind.clone(),
        );
        r.register("got_records", "Records read", m.got_records.clone());
        r.register("asked_ids", "Ids asked for", m.asked_ids.clone());
        r.register("barriers", "Barriers answered", m.barriers.clone());
        r.register("refused_requests", "Requests refused", m.refused.clone());
        r.register("caught_up_records", "Records fetched from replicas", m.caught_up.clone());
        r.register("catching_up_ids", "Ids known to be missing here", m.catching_up.clone());
        r.register("stored_bytes", "Bytes of all segments", m.stored_bytes.clone());
        r.register("chunks", "Durable chunks", m.chunks.clone());
        r.register("damaged_records", "Records that cannot be read", m.damaged.clone());
        r.register("group_commits", "Group commits since the start", m.commits.clone());
        m
    }

    /// Takes over the figures of the store.
    pub fn observe(&self, store: &crate::store::Store) -> Arc<crate::store::StoreStatus> {
        let status = store.status();
        let gauge = |g: &Gauge<i64, AtomicI64>, n: u64| g.set(i64::try_from(n).unwrap_or(i64::MAX));
        gauge(&self.stored_bytes, status.stored_bytes);
        gauge(&self.chunks, status.chunks);
        gauge(&self.damaged, status.damaged);
        gauge(&self.commits, status.commits);
        Arc::new(status)
    }
}
