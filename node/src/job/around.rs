//! Commands around a job (C5, decision 0032): *before* when an attempt is about to make a checkpoint, *after* when an attempt ends by
//! itself, well or not.

use std::sync::{Arc, Mutex, PoisonError};

use outrider_proto::ids::VmKey;
use outrider_proto::rpc;

use super::{JobContext, JobError, Outcome};
use crate::commands::{self, Ended};

/// What the commands of an attempt did. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Told(Arc<Mutex<Vec<rpc::CommandReport>>>);

impl Told {
    /// In the order of running.
    #[must_use]
    pub fn reports(&self) -> Vec<rpc::CommandReport> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether *before* ran, and *after* has not yet.
    fn is_between(&self) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.last().is_some_and(|report| report.when == BEFORE)
    }

    fn add(&self, report: rpc::CommandReport) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(report);
    }
}

const BEFORE: &str = "before";
const AFTER: &str = "after";

/// Runs the command before a checkpoint. Its warnings are those of the job.
///
/// # Errors
/// [`JobError::Command`]: it failed, and the policy says that this ends the attempt.
pub(super) async fn before(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::BackupWork,
    warnings: &mut Vec<String>,
) -> Result<(), JobError> {
    if work.before_command.is_empty() {
        return Ok(());
    }
    context.phase("running the command before");
    let Some(failure) = run(context, message, vm, &work.before_command, BEFORE, None).await else {
        return Ok(());
    };
    // It may have taken long.
    context.lease.check()?;
    if work.command_failure_fails {
        return Err(failure);
    }
    warnings.push(failure.to_string());
    Ok(())
}

/// Runs the command after an attempt that ended by itself. What it does changes nothing of the job's results.
pub(super) async fn after(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    work: &rpc::BackupWork,
    outcome: &mut Outcome,
) {
    if work.after_command.is_empty() || outcome.error.as_ref().is_some_and(JobError::is_superseded)
    {
        return;
    }
    context.phase("running the command after");
    let word = match (outcome.data_safe, outcome.host_clean) {
        (true, true) => "good",
        (true, false) => "unclean",
        (false, _) => "failed",
    };
    let error = outcome.error.as_ref().map(ToString::to_string).unwrap_or_default();
    let ended = (word, error);
    if let Some(failure) = run(context, message, vm, &work.after_command, AFTER, Some(ended)).await
    {
        outcome.warnings.push(failure.to_string());
    }
}

/// Runs the command after a job that an operator cancelled while it worked: nobody else will.
pub(crate) async fn after_cancelling(context: &JobContext, message: &rpc::JobLease) {
    let Some(rpc::job_lease::Work::Backup(work)) = &message.work else { return };
    let Ok(vm) = outrider_proto::model::vm_key("JobLease", message.vm.as_ref()) else { return };
    if work.after_command.is_empty() || !context.told.is_between() {
        return;
    }
    let ended = ("cancelled", String::new());
    run(context, message, &vm, &work.after_command, AFTER, Some(ended)).await;
}

/// None: it did well.
async fn run(
    context: &JobContext,
    message: &rpc::JobLease,
    vm: &VmKey,
    name: &str,
    when: &'static str,
    ended: Option<(&'static str, String)>,
) -> Option<JobError> {
    let started_unix_ms = context.clock.unix_millis();
    let kind = match &message.work {
        Some(rpc::job_lease::Work::Backup(work)) => match work.kind() {
            rpc::BackupKind::Full => "full",
            rpc::BackupKind::ConsistencyCheck => "consistency check",
            rpc::BackupKind::Incremental | rpc::BackupKind::Unspecified => "incremental",
        },
        _ => "",
    };
    let mut environment = vec![
        ("OUTRIDER_WHEN", when.to_owned()),
        ("OUTRIDER_HOST", context.host.clone()),
        ("OUTRIDER_REALM", vm.realm.clone()),
        ("OUTRIDER_VM", message.vm_name.clone()),
        ("OUTRIDER_VM_ID", vm.guid.to_string()),
        ("OUTRIDER_JOB", message.job_id.clone()),
        ("OUTRIDER_ATTEMPT", message.attempt.to_string()),
        ("OUTRIDER_KIND", kind.to_owned()),
    ];
    if let Some((outcome, error)) = ended {
        environment.push(("OUTRIDER_OUTCOME", outcome.to_owned()));
        environment.push(("OUTRIDER_ERROR", error));
    }
    let ran = match context.commands.get(name) {
        Some(command) => commands::run(command, &environment).await,
        None => Ended {
            good: false,
            how: format!(
                "host {} permits no command of this name: define [commands.{name}] in its configuration",
                context.host
            ),
            output: String::new(),
            took: std::time::Duration::ZERO,
        },
    };
    if ran.good {
        tracing::info!(command = name, when, took = ?ran.took, "a command around the job did well");
    } else {
        tracing::warn!(
            command = name,
            when,
            how = ran.how,
            output = ran.output,
            "a command around the job failed"
        );
    }
    context.told.add(rpc::CommandReport {
        name: name.to_owned(),
        when: when.to_owned(),
        host: context.host.clone(),
        started_unix_ms,
        duration_ms: u64::try_from(ran.took.as_millis()).unwrap_or(u64::MAX),
        end: ran.how.clone(),
        output: ran.output.clone(),
        good: ran.good,
    });
    (!ran.good).then(|| JobError::Command {
        name: name.to_owned(),
        when,
        how: ran.how,
        output: ran.output.lines().last().unwrap_or_default().to_owned(),
    })
}
