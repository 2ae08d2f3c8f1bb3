//! What a lease asks for: a backup, a restore, or cleaning up. Phases are explicit, and each arrow between two of them
//! survives being killed (see `backup`).
//!
//! | file | idea |
//! | --- | --- |
//! | `backup` | the order of the phases, and where a later attempt enters |
//! | `around` | commands before and after it |
//! | `checkpoint` | prechecks, the duty, the checkpoint and its name |
//! | `base` | the base rule: what an incremental may start from (pure) |
//! | `capture` | disks, changes, configuration: what the pipeline is fed with |
//! | `config` | configuration sets of checkpoints, saved states included |
//! | `exclude` | page files that the policy leaves out |
//! | `layers` | the checkpoints that administrators made, as layers of the disks |
//! | `carry` | what of a lost checkpoint goes over to a new one (pure, but for the questions) |
//! | `commit` | manifest, root record, the proposal |
//! | `handover` | convert, bind, remove the older reference point |
//! | `leftovers` | what earlier attempts and jobs left at the hypervisor |
//! | `error` | what ends an attempt, and whether another one may succeed |

mod around;
mod backup;
mod base;
mod capture;
mod carry;
mod checkpoint;
mod commit;
mod config;
mod error;
mod exclude;
mod handover;
mod layers;
mod leftovers;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use outrider_process::clock::Clock;
use outrider_process::telemetry::host_events;
use outrider_proto::ids::VmKey;
use outrider_proto::model;
use outrider_proto::rpc::{self, job_lease::Work};
use outrider_proto::seal::Sealer;
use tokio::sync::watch;

pub use around::Told;
pub(crate) use around::after_cancelling;
pub use base::{BaseDecision, BasePlan, DiskFacts, plan_base};
pub(crate) use checkpoint::is_name_of_ours;
pub use error::JobError;

use crate::commands::Table;
use crate::config::{JobTimes, Limits};
use crate::coordinator_client::Coordinator;
use crate::hypervisor::Hypervisor;
use crate::lease::Lease;
use crate::metrics::NodeMetrics;
use crate::pipeline::{Bounds, Pool, Stats, StatsSnapshot};
use crate::source::Sources;
use crate::store::JobStore;

/// How often the figures of a running job are looked at.
const TICK: Duration = Duration::from_millis(250);

/// Everything that a job works with.
#[derive(Clone)]
pub struct JobContext {
    /// The hypervisor of this host.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// The leader.
    pub coordinator: Arc<dyn Coordinator>,
    /// Storage, under the job's ticket.
    pub store: Arc<dyn JobStore>,
    /// The domain's keys.
    pub sealer: Sealer,
    /// The lease.
    pub lease: Lease,
    /// Open source files.
    pub sources: Sources,
    /// Worker threads and bytes in flight.
    pub pool: Pool,
    /// Bounds.
    pub limits: Limits,
    /// Patience.
    pub times: JobTimes,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// This host's name.
    pub host: String,
    /// Folder for files in hand.
    pub scratch: PathBuf,
    /// Where progress is told.
    pub progress: watch::Sender<Progress>,
    /// The process's metrics.
    pub metrics: NodeMetrics,
    /// Commands that this host permits.
    pub commands: Arc<Table>,
    /// What the commands of this attempt did.
    pub told: Told,
}

/// How far a job is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// What it does.
    pub phase: &'static str,
    /// Figures.
    pub stats: StatsSnapshot,
    /// Bytes to be read, as known now.
    pub total_bytes: u64,
}

impl JobContext {
    /// Tells the phase.
    pub(crate) fn phase(&self, phase: &'static str) {
        tracing::info!(phase, "job phase");
        self.progress.send_modify(|p| p.phase = phase);
    }

    pub(crate) fn bounds(&self) -> Bounds {
        Bounds {
            read_size: self.limits.read_size.as_usize(),
            barrier_bytes: self.times.barrier_bytes.0,
            barrier_interval: self.times.barrier_interval,
        }
    }
}

/// The two results of an attempt (promise 5), and what to tell with them.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) data_safe: bool,
    pub(crate) host_clean: bool,
    pub(crate) error: Option<JobError>,
    pub(crate) warnings: Vec<String>,
    pub(crate) restored_vm: Option<VmKey>,
}

impl Outcome {
    fn failed(error: JobError, host_clean: bool) -> Self {
        Self { host_clean, error: Some(error), ..Self::default() }
    }
}

/// Does the work of a lease and reports how it ended. Returns whether both results are good.
pub async fn run(context: JobContext, message: rpc::JobLease) -> bool {
    let started = context.clock.monotonic();
    let stats = Arc::new(Stats::default());
    let outcome = {
        let ticking = async {
            let mut tick = tokio::time::interval(TICK);
            loop {
                tick.tick().await;
                let now = stats.snapshot();
                context.progress.send_if_modified(|p| {
                    let changed = p.stats != now;
                    p.stats = now;
                    p.total_bytes = now.changed_bytes;
                    changed
                });
            }
        };
        tokio::select! {
            // Boxed: the phases together make a large future.
            outcome = dispatch(&context, &message, &stats).boxed() => outcome,
            () = ticking => return false,
        }
    };
    let passed = context.clock.monotonic().saturating_sub(started);
    Stats::set(&stats.duration_ms, u64::try_from(passed.as_millis()).unwrap_or(u64::MAX));
    let figures = stats.snapshot();
    context.metrics.add(&figures);
    let good = outcome.data_safe && outcome.host_clean && outcome.error.is_none();
    if let Some(error) = &outcome.error {
        if error.is_superseded() {
            // Somebody else has the job: nothing of it is ours to report.
            tracing::info!(reason = %error, "the job is somebody else's now");
            return false;
        }
        tracing::warn!(
            event_id = host_events::JOB_FAILED,
            error = %error,
            code = error.code().code,
            "the attempt failed"
        );
    }
    if !outcome.host_clean {
        tracing::warn!(
            event_id = host_events::HOST_UNCLEAN,
            "something of ours is left on the host: a cleanup removes it, or the job's report says what to do"
        );
    }
    let request = rpc::FinishRequest {
        job_id: context.lease.job().to_string(),
        lease_epoch: context.lease.epoch().0,
        data_safe: outcome.data_safe,
        host_clean: outcome.host_clean,
        error_code: outcome.error.as_ref().map(|e| e.code().code.to_owned()).unwrap_or_default(),
        message: outcome.error.as_ref().map(ToString::to_string).unwrap_or_default(),
        retry: outcome.error.as_ref().is_some_and(JobError::retry),
        stats: Some(figures.into()),
        warnings: outcome.warnings,
        restored_vm: outcome.restored_vm.as_ref().map(Into::into),
        commands: context.told.reports(),
    };
    context.phase("finishing");
    if let Err(e) = context.coordinator.finish(request).await {
        tracing::warn!(error = %e, "the end of the attempt could not be reported; its lease will end");
    }
    good
}

async fn dispatch(context: &JobContext, message: &rpc::JobLease, stats: &Arc<Stats>) -> Outcome {
    let vm = match model::vm_key("JobLease", message.vm.as_ref()) {
        Ok(vm) => vm,
        Err(e) => return Outcome::failed(JobError::Message(e), true),
    };
    match &message.work {
        Some(Work::Backup(work)) => backup::run(context, message, vm, work, stats).boxed().await,
        Some(Work::Cleanup(work)) => leftovers::run(context, message, vm, work).boxed().await,
        Some(Work::Restore(work)) => crate::restore::run(context, message, vm, work).boxed().await,
        None => Outcome::failed(
            JobError::Message(model::FieldError {
                message: "JobLease",
                field: "work",
                reason: "is missing: this agent is older than the coordinator".into(),
            }),
            true,
        ),
    }
}
