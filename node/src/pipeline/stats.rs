//! Figures of a job, counted while it runs.

use std::sync::atomic::{AtomicU64, Ordering};

use outrider_proto::rpc;

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters; shared by everything that works on the job.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[$doc])* pub $name: AtomicU64,)* }

        /// The counters at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct StatsSnapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Stats {
            /// The counters now.
            #[must_use]
            pub fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }

        impl From<StatsSnapshot> for rpc::JobStats {
            fn from(s: StatsSnapshot) -> Self {
                Self { $($name: s.$name,)* }
            }
        }
    };
}

stats! {
    /// Size of all disks.
    disk_bytes,
    /// Bytes that the change list or allocation map named.
    changed_bytes,
    /// Bytes read from the source.
    read_bytes,
    /// Of these, ranges that an earlier attempt had read and stored.
    reread_bytes,
    /// Plain bytes that were zeros.
    zero_bytes,
    /// Plain bytes that storage had already.
    known_bytes,
    /// Sealed bytes put to storage.
    sent_bytes,
    /// Of these, chunks that an earlier attempt had stored.
    resent_bytes,
    /// Pages of unchanged regions taken from the parent (whole subtrees count as one).
    reused_pages,
    /// Leaf pages taken from the journal of an earlier attempt.
    adopted_pages,
    /// Chunks sent.
    chunks_new,
    /// Chunks that storage had.
    chunks_known,
    /// Sealed bytes times replicas.
    stored_bytes,
    /// Milliseconds.
    duration_ms,
    /// Chunks re-read although tracking called them unchanged.
    sampled_chunks,
    /// Bytes left out by policy.
    excluded_bytes,
}

impl Stats {
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn set(counter: &AtomicU64, n: u64) {
        counter.store(n, Ordering::Relaxed);
    }

    /// Adds what another part of the same job has read and sent since `before`.
    pub(crate) fn absorb(&self, part: &StatsSnapshot, before: &StatsSnapshot) {
        for (counter, now, then) in [
            (&self.read_bytes, part.read_bytes, before.read_bytes),
            (&self.reread_bytes, part.reread_bytes, before.reread_bytes),
            (&self.zero_bytes, part.zero_bytes, before.zero_bytes),
            (&self.known_bytes, part.known_bytes, before.known_bytes),
            (&self.sent_bytes, part.sent_bytes, before.sent_bytes),
            (&self.resent_bytes, part.resent_bytes, before.resent_bytes),
            (&self.adopted_pages, part.adopted_pages, before.adopted_pages),
            (&self.chunks_new, part.chunks_new, before.chunks_new),
            (&self.chunks_known, part.chunks_known, before.chunks_known),
            (&self.sampled_chunks, part.sampled_chunks, before.sampled_chunks),
        ] {
            Self::add(counter, now.saturating_sub(then));
        }
    }

    pub(crate) fn sent(&self, sealed: u64) {
        Self::add(&self.sent_bytes, sealed);
    }
}
