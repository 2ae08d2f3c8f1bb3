//! A tree of tasks with names and an end.
//!
//! A [`TaskGroup`] owns what it spawned: [`TaskGroup::shutdown`] asks all to stop, waits, aborts
//! what does not leave, and says who that was. A child group stops with its parent and is waited
//! for by it. Dropping a group cancels it, so a forgotten group cannot leave tasks that run on for
//! ever; only `shutdown` also waits.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;

/// The owner of tasks.
#[must_use = "dropping a TaskGroup cancels its tasks"]
#[derive(Debug)]
pub struct TaskGroup {
    spawner: TaskSpawner,
}

/// A handle that adds tasks to a [`TaskGroup`] without owning it.
#[derive(Debug, Clone)]
pub struct TaskSpawner {
    group: Arc<Group>,
}

/// What a shutdown found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShutdownReport {
    /// Path of the group.
    pub group: String,
    /// Tasks that had not ended when the grace was over; they were aborted.
    pub aborted: Vec<String>,
}

impl ShutdownReport {
    /// Whether every task left by itself.
    pub fn is_clean(&self) -> bool {
        self.aborted.is_empty()
    }
}

impl fmt::Display for ShutdownReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_clean() {
            write!(f, "{}: all tasks ended", self.group)
        } else {
            write!(f, "{}: aborted after the grace: {}", self.group, self.aborted.join(", "))
        }
    }
}

impl TaskGroup {
    /// A root group.
    pub fn new(name: impl Into<String>) -> Self {
        Self { spawner: TaskSpawner { group: Group::new(name.into(), None) } }
    }

    /// A group that stops with this one, and that this one waits for.
    pub fn child(&self, name: &str) -> Self {
        self.spawner.child(name)
    }

    /// A handle to spawn from elsewhere.
    pub fn spawner(&self) -> TaskSpawner {
        self.spawner.clone()
    }

    /// Cancelled when the group is asked to stop.
    pub fn token(&self) -> CancellationToken {
        self.spawner.token()
    }

    /// Runs a task until it ends or is aborted after the grace of a shutdown.
    ///
    /// A panic is logged with the task's name and stays in the task.
    pub fn spawn(&self, name: &str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawner.spawn(name, task);
    }

    /// Like [`Self::spawn`]; a panic also cancels the group, because the rest is of no use
    /// without this task.
    pub fn spawn_critical(&self, name: &str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawner.spawn_critical(name, task);
    }

    /// Names of the tasks that still run, those of child groups included.
    pub fn running(&self) -> Vec<String> {
        self.spawner.group.running()
    }

    /// Cancels the group, waits at most `grace`, aborts what is left and waits for that.
    ///
    /// Code that blocks its thread cannot be aborted: such a task is named and left behind.
    pub async fn shutdown(self, grace: Duration) -> ShutdownReport {
        let group = &self.spawner.group;
        group.token.cancel();
        group.tracker.close();
        let mut aborted = Vec::new();
        if tokio::time::timeout(grace, group.tracker.wait()).await.is_err() {
            for (name, abort) in group.lock().values() {
                aborted.push(name.clone());
                if let Some(abort) = abort {
                    abort.abort();
                }
            }
            // An aborted task ends at its next await; one that never awaits must not hold us.
            let _ = tokio::time::timeout(Duration::from_secs(1), group.tracker.wait()).await;
            tracing::warn!(group = %group.path, tasks = ?aborted, "tasks were aborted");
        }
        ShutdownReport { group: group.path.clone(), aborted }
    }
}

impl Drop for TaskGroup {
    fn drop(&mut self) {
        self.spawner.group.token.cancel();
    }
}

impl TaskSpawner {
    /// See [`TaskGroup::token`].
    pub fn token(&self) -> CancellationToken {
        self.group.token.clone()
    }

    /// See [`TaskGroup::child`].
    pub fn child(&self, name: &str) -> TaskGroup {
        let group =
            Group::new(format!("{}/{name}", self.group.path), Some(Arc::clone(&self.group)));
        TaskGroup { spawner: Self { group } }
    }

    /// See [`TaskGroup::spawn`].
    pub fn spawn(&self, name: &str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(name, false, task);
    }

    /// See [`TaskGroup::spawn_critical`].
    pub fn spawn_critical(&self, name: &str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(name, true, task);
    }

    fn start(&self, name: &str, critical: bool, task: impl Future<Output = ()> + Send + 'static) {
        let path = format!("{}/{name}", self.group.path);
        let membership = Membership::enter(&self.group, &path);
        let ids = membership.ids();
        let token = self.group.token.clone();
        let span = tracing::debug_span!("task", task = %path);
        let running = async move {
            let _membership = membership;
            if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
                tracing::error!(task = %path, critical, panic = panic_text(&*panic), "task panicked");
                if critical {
                    token.cancel();
                }
            }
        };
        let abort = tokio::spawn(running.instrument(span)).abort_handle();
        for (group, id) in ids {
            if let Some(entry) = group.lock().get_mut(&id) {
                entry.1 = Some(abort.clone());
            }
        }
    }
}

#[derive(Debug)]
struct Group {
    path: String,
    token: CancellationToken,
    tracker: TaskTracker,
    parent: Option<Arc<Group>>,
    next_id: AtomicU64,
    tasks: Mutex<BTreeMap<u64, (String, Option<AbortHandle>)>>,
}

impl Group {
    fn new(path: String, parent: Option<Arc<Group>>) -> Arc<Self> {
        let token = parent.as_ref().map_or_else(CancellationToken::new, |p| p.token.child_token());
        Arc::new(Self {
            path,
            token,
            tracker: TaskTracker::new(),
            parent,
            next_id: AtomicU64::new(0),
            tasks: Mutex::default(),
        })
    }

    fn running(&self) -> Vec<String> {
        self.lock().values().map(|(name, _)| name.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (String, Option<AbortHandle>)>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task's entries in its group and all groups above; leaving is dropping.
struct Membership {
    entries: Vec<(Arc<Group>, u64, TaskTrackerToken)>,
}

impl Membership {
    fn enter(group: &Arc<Group>, path: &str) -> Self {
        let above = std::iter::successors(Some(group), |group| group.parent.as_ref());
        let entries = above
            .map(|group| {
                let id = group.next_id.fetch_add(1, Ordering::Relaxed);
                group.lock().insert(id, (path.to_owned(), None));
                (Arc::clone(group), id, group.tracker.token())
            })
            .collect();
        Self { entries }
    }

    fn ids(&self) -> Vec<(Arc<Group>, u64)> {
        self.entries.iter().map(|(group, id, _)| (Arc::clone(group), *id)).collect()
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        for (group, id, _) in &self.entries {
            group.lock().remove(id);
        }
    }
}

/// What a panic said.
#[must_use]
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no text")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn shutdown_stops_children_first_asked_then_waited_for() {
        let group = TaskGroup::new("root");
        let child = group.child("child");
        let token = child.token();
        child.spawn("waits", async move { token.cancelled().await });
        assert_eq!(group.running(), ["root/child/waits"]);
        let report = group.shutdown(GRACE).await;
        assert!(report.is_clean(), "{report}");
        assert!(child.running().is_empty());
    }

    #[tokio::test]
    async fn what_does_not_leave_is_named_and_aborted() {
        let group = TaskGroup::new("root");
        group.spawn("stubborn", std::future::pending());
        group.spawn("quick", async {});
        let report = group.shutdown(Duration::from_millis(10)).await;
        assert_eq!(report.aborted, ["root/stubborn"]);
        assert!(report.to_string().contains("root/stubborn"));
    }

    #[tokio::test]
    async fn dropping_a_group_cancels_its_tasks() {
        let group = TaskGroup::new("root");
        let token = group.token();
        drop(group);
        tokio::time::timeout(GRACE, token.cancelled()).await.expect("cancelled by the drop");
    }

    #[tokio::test]
    async fn a_panic_stays_in_its_task_unless_it_is_critical() {
        let group = TaskGroup::new("root");
        group.spawn("careless", async { panic!("not the others' problem") });
        while !group.running().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(!group.token().is_cancelled());

        group.spawn_critical("heart", async { panic!("nothing works without me") });
        tokio::time::timeout(GRACE, group.token().cancelled()).await.expect("cancelled");
        assert!(group.shutdown(GRACE).await.is_clean());
    }
}
