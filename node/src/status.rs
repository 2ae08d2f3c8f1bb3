//! How the agent is, in a file: for `outrider node status`, for installers that wait until a host is connected, and for
//! upgrades, which must not fall into a checkpoint (O9).
//!
//! The file is written when something changes, and once more when the agent leaves. Its process id tells whether it is
//! still true.

use std::path::{Path, PathBuf};
use std::time::Duration;

use outrider_process::clock::{Clock, SystemClock};
use outrider_process::fs;
use outrider_process::observability::Readiness;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::metrics::NodeMetrics;

/// Between two looks at what no event announces.
const LOOK: Duration = Duration::from_millis(250);

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Process id of the agent.
    pub pid: u32,
    /// Its release.
    pub version: String,
    /// Its host.
    pub name: String,
    /// Whether the coordinators' leader has welcomed it.
    pub connected: bool,
    /// Why it is not connected.
    pub reason: String,
    /// Jobs at work, each with a checkpoint or a half restored VM.
    pub jobs: i64,
    /// Whether it has left.
    pub ended: bool,
    /// Since when it says so, Unix milliseconds.
    pub since_unix_ms: u64,
}

impl Status {
    /// Reads the file; `None` if there is none that can be read.
    #[must_use]
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    fn differs(&self, other: &Self) -> bool {
        Self { since_unix_ms: 0, ..self.clone() } != Self { since_unix_ms: 0, ..other.clone() }
    }
}

/// Writes the file until cancelled.
pub(crate) async fn keep(
    path: PathBuf,
    name: String,
    mut readiness: watch::Receiver<Readiness>,
    metrics: NodeMetrics,
    token: CancellationToken,
) {
    let clock = SystemClock::new();
    let mut written: Option<Status> = None;
    loop {
        let ended = token.is_cancelled();
        let (connected, reason) = match &*readiness.borrow_and_update() {
            Readiness::Ready => (true, String::new()),
            Readiness::NotReady(reason) => (false, reason.clone()),
        };
        let now = Status {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            name: name.clone(),
            connected: connected && !ended,
            reason: if ended { "the agent has ended".to_owned() } else { reason },
            jobs: metrics.jobs_running.get(),
            ended,
            since_unix_ms: clock.unix_millis(),
        };
        if written.as_ref().is_none_or(|before| before.differs(&now)) {
            let json = serde_json::to_vec_pretty(&now).expect("texts and numbers always serialise");
            if let Err(error) = fs::write_atomic(&path, &json) {
                tracing::warn!(%error, "the status file was not written");
            }
            written = Some(now);
        }
        if ended {
            return;
        }
        tokio::select! {
            () = token.cancelled() => {}
            _ = readiness.changed() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_process::tasks::TaskGroup;

    async fn until(path: &Path, what: impl Fn(&Status) -> bool) -> Status {
        let poll = async {
            loop {
                if let Some(status) = Status::read(path).filter(&what) {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), poll).await.expect("the file says so")
    }

    #[tokio::test]
    async fn the_file_follows_the_agent_to_its_end() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("status.json");
        let (sender, readiness) = watch::channel(Readiness::starting());
        let metrics = NodeMetrics::default();
        let tasks = TaskGroup::new("test");
        tasks.spawn(
            "status",
            keep(path.clone(), "hv1".into(), readiness, metrics.clone(), tasks.token()),
        );
        until(&path, |s| !s.connected && !s.reason.is_empty()).await;
        sender.send_replace(Readiness::Ready);
        until(&path, |s| s.connected && s.jobs == 0 && s.pid == std::process::id()).await;
        metrics.jobs_running.inc();
        until(&path, |s| s.jobs == 1).await;
        assert!(tasks.shutdown(Duration::from_secs(10)).await.is_clean());
        let last = Status::read(&path).expect("written");
        assert!(last.ended && !last.connected, "{last:?}");
    }
}
