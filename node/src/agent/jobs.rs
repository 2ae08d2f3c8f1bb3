//! The leases that this host holds, and the task of each.

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use outrider_process::tasks::{TaskGroup, panic_text};
use outrider_process::telemetry::propagate;
use outrider_proto::ids::{JobId, LeaseEpoch, WriterId};
use outrider_proto::model::parse;
use outrider_proto::rpc;
use outrider_proto::seal::{DomainKeys, Sealer};
use outrider_storage_client::JobAccess;
use tokio::sync::{mpsc, watch};
use tracing::Instrument;

use super::Agent;
use crate::job::{self, JobContext, Progress};
use crate::lease::Lease;
use crate::source::Sources;
use crate::store::{ClientStore, Patient};

/// Closed leases that are told again to the next leader.
const REMEMBERED: usize = 256;
/// Used until the leader said its own.
const DEFAULT_CUTOFF: Duration = Duration::from_secs(20);

/// All jobs of this host.
pub(super) struct Jobs {
    agent: Arc<Agent>,
    tasks: TaskGroup,
    cutoff: Duration,
    running: HashMap<JobId, Running>,
    closed_in: mpsc::Sender<rpc::SourcesClosed>,
    closed_out: mpsc::Receiver<rpc::SourcesClosed>,
    closed: VecDeque<rpc::SourcesClosed>,
}

struct Running {
    lease: Lease,
    progress: watch::Receiver<Progress>,
    /// Turns true when the task has closed all its files.
    done: watch::Receiver<bool>,
    /// Said before the lease ends, when an operator cancelled the job.
    cancelled: watch::Sender<bool>,
}

impl Jobs {
    pub(super) fn new(agent: Arc<Agent>, tasks: TaskGroup) -> Self {
        let (closed_in, closed_out) = mpsc::channel(REMEMBERED);
        Self {
            agent,
            tasks,
            cutoff: DEFAULT_CUTOFF,
            running: HashMap::new(),
            closed_in,
            closed_out,
            closed: VecDeque::new(),
        }
    }

    /// The leader's lease rules.
    pub(super) fn welcome(&mut self, cutoff: Duration) {
        if !cutoff.is_zero() {
            self.cutoff = cutoff;
        }
    }

    /// The next lease whose files are all closed.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn next_closed(&mut self) -> rpc::SourcesClosed {
        let closed = self.closed_out.recv().await;
        // A sender lives in `self`.
        let closed = closed.expect("the channel stays open");
        if let Ok(job) = closed.job_id.parse::<JobId>()
            && self.running.get(&job).is_some_and(|r| r.lease.epoch().0 == closed.lease_epoch)
        {
            self.running.remove(&job);
            self.count();
        }
        if self.closed.len() == REMEMBERED {
            self.closed.pop_front();
        }
        self.closed.push_back(closed.clone());
        closed
    }

    /// What was closed lately, for a leader that may not know.
    pub(super) fn closed_lately(&self) -> Vec<rpc::SourcesClosed> {
        self.closed.iter().cloned().collect()
    }

    /// Progress of the jobs whose progress changed.
    pub(super) fn progress(&mut self) -> Vec<rpc::JobProgress> {
        let changed =
            self.running.iter_mut().filter(|(_, r)| r.progress.has_changed().unwrap_or(false));
        changed
            .map(|(job, r)| {
                let now = r.progress.borrow_and_update().clone();
                rpc::JobProgress {
                    job_id: job.to_string(),
                    lease_epoch: r.lease.epoch().0,
                    phase: now.phase.to_owned(),
                    stats: Some(now.stats.into()),
                    total_bytes: now.total_bytes,
                }
            })
            .collect()
    }

    pub(super) fn renewed(&self, job: &str, epoch: u64, sent: Duration) {
        if let Some(running) = self.find(job, epoch) {
            running.lease.renew(sent);
        }
    }

    pub(super) fn ended(&self, job: &str, epoch: u64, reason: &str, cancelled: bool) {
        if let Some(running) = self.find(job, epoch) {
            running.cancelled.send_replace(cancelled);
            tracing::info!(job, epoch, reason, "the lease was ended");
            running.lease.end(reason);
        }
    }

    pub(super) fn predecessor_closed(&self, job: &str, epoch: u64) {
        if let Some(running) = self.find(job, epoch) {
            running.lease.predecessor_closed();
        }
    }

    fn find(&self, job: &str, epoch: u64) -> Option<&Running> {
        let job: JobId = job.parse().ok()?;
        self.running.get(&job).filter(|r| r.lease.epoch().0 == epoch)
    }

    /// A lease arrived; returns whether it is new work.
    pub(super) fn leased(&mut self, message: rpc::JobLease) -> bool {
        let job: JobId = match parse("JobLease", "job_id", &message.job_id) {
            Ok(job) => job,
            Err(e) => {
                tracing::error!(error = %e, "a lease that cannot be read was ignored");
                return false;
            }
        };
        let epoch = LeaseEpoch(message.lease_epoch);
        let mut earlier = None;
        if let Some(running) = self.running.get(&job) {
            if running.lease.epoch() >= epoch {
                return false;
            }
            running.lease.end("superseded by a newer lease of this host");
            earlier = Some(running.done.clone());
        }
        let lease = Lease::granted(
            job,
            epoch,
            self.cutoff,
            message.predecessor_open,
            self.agent.clock.clone(),
        );
        let (progress, progress_seen) = watch::channel(Progress::default());
        let (done, done_seen) = watch::channel(false);
        let (cancelled, cancelled_seen) = watch::channel(false);
        self.running.insert(
            job,
            Running { lease: lease.clone(), progress: progress_seen, done: done_seen, cancelled },
        );
        self.count();
        let span =
            tracing::info_span!("job", %job, attempt = message.attempt, vm = message.vm_name);
        propagate::set_parent(&span, &message.traceparent);
        let (agent, closed) = (self.agent.clone(), self.closed_in.clone());
        let task = async move {
            if let Some(mut earlier) = earlier {
                // The task drops its sender when it ends, whatever happened to it.
                let _ = earlier.wait_for(|done| *done).await;
            }
            work(agent, message, lease, progress, cancelled_seen).await;
            done.send_replace(true);
            // The agent is ending when nobody listens.
            let message = rpc::SourcesClosed { job_id: job.to_string(), lease_epoch: epoch.0 };
            let _ = closed.send(message).await;
        };
        self.tasks.spawn(&format!("job {job}"), task.instrument(span));
        true
    }

    fn count(&self) {
        self.agent.metrics.jobs_running.set(i64::try_from(self.running.len()).unwrap_or(i64::MAX));
    }
}

/// Does the work of a lease and returns when all its files are closed.
async fn work(
    agent: Arc<Agent>,
    message: rpc::JobLease,
    lease: Lease,
    progress: watch::Sender<Progress>,
    cancelled: watch::Receiver<bool>,
) {
    let sources = Sources::new(agent.hypervisor.clone(), agent.config.jobs.volume_patience);
    match context(&agent, &message, &lease, &sources, progress) {
        Err(e) => tracing::error!(error = %e, "a lease that cannot be understood was not begun"),
        Ok(context) => {
            let attempt = attempt(&agent, context, message, &lease, &sources, cancelled).boxed();
            if !survived(&lease, attempt).await {
                agent.metrics.jobs_bad.inc();
            }
        }
    }
    sources.close().await;
}

/// Runs an attempt; gives whether it came to an end by itself. One that panics gives its lease up: the leader would renew it for
/// ever, and nobody would ever work on the VM again.
async fn survived(lease: &Lease, attempt: impl Future<Output = ()>) -> bool {
    match AssertUnwindSafe(attempt).catch_unwind().await {
        Ok(()) => true,
        Err(panic) => {
            let panic = panic_text(&*panic);
            tracing::error!(
                panic,
                "the job panicked: this is a defect of Outrider, please report it with this log"
            );
            lease.end("the job panicked");
            false
        }
    }
}

async fn attempt(
    agent: &Agent,
    context: JobContext,
    message: rpc::JobLease,
    lease: &Lease,
    sources: &Sources,
    cancelled: watch::Receiver<bool>,
) {
    let around = (context.clone(), message.clone());
    tokio::select! {
        lost = lease.lost() => {
            agent.metrics.leases_lost.inc();
            tracing::warn!(reason = %lost, "the job stops here");
            sources.close().await;
            if *cancelled.borrow() {
                job::after_cancelling(&around.0, &around.1).await;
            }
        }
        good = job::run(context, message) => {
            // The job itself may be the first to notice, at its next step.
            let lost = !good && lease.check().is_err();
            match (good, lost) {
                (true, _) => agent.metrics.jobs_good.inc(),
                (false, true) => agent.metrics.leases_lost.inc(),
                (false, false) => agent.metrics.jobs_bad.inc(),
            };
        }
    }
}

fn context(
    agent: &Arc<Agent>,
    message: &rpc::JobLease,
    lease: &Lease,
    sources: &Sources,
    progress: watch::Sender<Progress>,
) -> Result<JobContext, outrider_proto::model::FieldError> {
    let keys = outrider_proto::model::required("JobLease", "keys", message.keys.as_ref())?;
    let keys = DomainKeys::try_from(keys)?;
    let writer = WriterId::of(agent.fabric, &agent.config.name);
    let store = agent.storage.open_job(JobAccess {
        job: lease.job(),
        ticket: message.ticket.clone().into(),
        lease_epoch: lease.epoch(),
    });
    let store = Patient::new(Arc::new(ClientStore(store)), agent.config.jobs.storage_patience);
    Ok(JobContext {
        hypervisor: agent.hypervisor.clone(),
        coordinator: agent.coordinator.clone(),
        store: Arc::new(store),
        sealer: Sealer::new(Arc::new(keys), writer),
        lease: lease.clone(),
        sources: sources.clone(),
        pool: agent.pool.clone(),
        limits: agent.config.limits.clone(),
        times: agent.config.jobs.clone(),
        clock: agent.clock.clone(),
        host: agent.config.name.clone(),
        scratch: agent.config.scratch_dir.clone(),
        progress,
        metrics: agent.metrics.clone(),
        commands: agent.commands.clone(),
        told: job::Told::default(),
    })
}

#[cfg(test)]
mod tests {
    use outrider_process::clock::SystemClock;

    use super::*;

    #[tokio::test]
    async fn a_job_that_panics_gives_its_lease_up() {
        let clock = Arc::new(SystemClock::new());
        let hour = Duration::from_secs(3600);
        let granted = || Lease::granted(JobId::random(), LeaseEpoch(1), hour, false, clock.clone());
        let lease = granted();
        assert!(!survived(&lease, async { panic!("as a defect would") }).await);
        assert!(lease.check().expect_err("it is over").to_string().contains("panicked"));
        let lease = granted();
        assert!(survived(&lease, async {}).await);
        lease.check().expect("still held");
    }
}
