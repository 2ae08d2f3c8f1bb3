//! The steps of the story. Each does one thing to the fabric, checks what really came of it, and gives its figures.

mod clean;
mod first_backup;
mod incremental;
mod leader_killed;
mod migrate;
mod restore;
mod restore_to;
mod storage_killed;

use futures::future::LocalBoxFuture;
use outrider_proto::rpc;
use serde_json::{Map, Value};

use super::stage::Stage;
use crate::report::Failure;

pub(super) use restore_to::{RestoreTo, check_target, run as restore_to};

/// What a step measured, by name.
pub(super) type Figures = Map<String, Value>;

/// A step: its name in the JSON, its line in the story, what it does.
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) run: for<'a> fn(&'a mut Stage) -> LocalBoxFuture<'a, Result<Figures, Failure>>,
}

/// The story, in order.
pub(super) const STORY: &[Step] = &[
    Step {
        name: "first-backup",
        title: "First backup of the whole group",
        run: |s| Box::pin(first_backup::run(s)),
    },
    Step {
        name: "incremental",
        title: "The guests write; an incremental moves only what changed",
        run: |s| Box::pin(incremental::run(s)),
    },
    Step {
        name: "migrate-mid-backup",
        title: "A VM is live-migrated in the middle of its backup; the new host finishes it",
        run: |s| Box::pin(migrate::run(s)),
    },
    Step {
        name: "leader-killed",
        title: "The Raft leader is killed with SIGKILL during a job",
        run: |s| Box::pin(leader_killed::run(s)),
    },
    Step {
        name: "storage-killed",
        title: "A storage node is killed with SIGKILL during a job, and comes back",
        run: |s| Box::pin(storage_killed::run(s)),
    },
    Step {
        name: "restore",
        title: "A VM is restored on another host under another name",
        run: |s| Box::pin(restore::run(s)),
    },
    Step { name: "hosts-clean", title: "The hosts are clean", run: |s| Box::pin(clean::run(s)) },
];

/// Sums of what jobs report.
pub(super) fn sum<'a>(stats: impl Iterator<Item = Option<&'a rpc::JobStats>>) -> rpc::JobStats {
    let mut total = rpc::JobStats::default();
    for s in stats.flatten() {
        total.disk_bytes += s.disk_bytes;
        total.changed_bytes += s.changed_bytes;
        total.read_bytes += s.read_bytes;
        total.reread_bytes += s.reread_bytes;
        total.zero_bytes += s.zero_bytes;
        total.known_bytes += s.known_bytes;
        total.sent_bytes += s.sent_bytes;
        total.resent_bytes += s.resent_bytes;
        total.reused_pages += s.reused_pages;
        total.adopted_pages += s.adopted_pages;
        total.chunks_new += s.chunks_new;
        total.chunks_known += s.chunks_known;
        total.stored_bytes += s.stored_bytes;
        total.duration_ms += s.duration_ms;
        total.sampled_chunks += s.sampled_chunks;
    }
    total
}

/// Figures from pairs.
pub(super) fn figures<const N: usize>(pairs: [(&str, Value); N]) -> Figures {
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// Everything that `JobStats` holds, as figures.
pub(super) fn stats_figures(stats: &rpc::JobStats) -> Figures {
    match crate::cli::view::stats(Some(stats)) {
        Value::Object(map) => map,
        _ => Figures::new(),
    }
}
