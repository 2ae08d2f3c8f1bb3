//! `outrider job`, and waiting for jobs with progress on a terminal or plain lines elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use outrider_proto::rpc;
use serde_json::json;

use super::connect::Connection;
use super::{Done, view};
use crate::operator::{Follow, Operator, has_ended, has_succeeded};
use crate::output::{self, bytes};
use crate::report::Failure;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Jobs, the newest first
    List {
        /// Only jobs of this VM
        #[arg(long)]
        vm: Option<String>,
        /// Only jobs in this state, such as running or failed
        #[arg(long)]
        state: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: u32,
        #[command(flatten)]
        connection: Connection,
    },
    /// Follow jobs until they end; without ids all jobs, until Ctrl-C
    Watch {
        /// Job ids
        jobs: Vec<String>,
        #[command(flatten)]
        connection: Connection,
    },
    /// Stop a job; its host is left clean
    Cancel {
        /// Job id
        job: String,
        #[command(flatten)]
        connection: Connection,
    },
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    match command {
        Command::List { vm, state, limit, connection } => {
            let request = rpc::ListJobsRequest {
                vm: vm.unwrap_or_default(),
                state: state.unwrap_or_default(),
                limit,
                job_id: String::new(),
            };
            let jobs = connection.open()?.jobs(request).await?;
            show(&jobs, json);
            Ok(ExitCode::SUCCESS)
        }
        Command::Watch { jobs, connection } => follow(&connection.open()?, &jobs, json).await,
        Command::Cancel { job, connection } => {
            let job = connection.open()?.cancel_job(&job).await?;
            show(&[job], json);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Says which jobs were made, or waits for them.
pub(super) async fn started(
    operator: &Operator,
    jobs: Vec<rpc::Job>,
    wait: bool,
    json: bool,
) -> Done {
    if wait {
        let ids: Vec<_> = jobs.into_iter().map(|j| j.job_id).collect();
        return follow(operator, &ids, json).await;
    }
    show(&jobs, json);
    if !json && let Some(job) = jobs.first() {
        eprintln!("started; follow with `outrider job watch {}`", job.job_id);
    }
    Ok(ExitCode::SUCCESS)
}

fn show(jobs: &[rpc::Job], json: bool) {
    if json {
        let jobs: Vec<_> = jobs.iter().map(view::job).collect();
        output::json(&json!({ "ok": true, "jobs": jobs }));
        return;
    }
    let rows = jobs.iter().map(|j| {
        let stats = j.stats.unwrap_or_default();
        let kind = match view::kind(j.backup_kind()) {
            "" => j.kind.clone(),
            kind => format!("{} ({kind})", j.kind),
        };
        [
            j.job_id.clone(),
            kind,
            j.vm_name.clone(),
            j.state.clone(),
            output::or_dash(&j.host),
            j.attempts.len().to_string(),
            bytes(stats.read_bytes),
            bytes(stats.sent_bytes),
            results(j),
            output::time(j.created_unix_ms),
            output::or_dash(&j.reason),
        ]
    });
    let headers = [
        "job", "kind", "vm", "state", "host", "tries", "read", "sent", "results", "created",
        "reason",
    ];
    println!("{}", output::right(output::table(headers, rows.collect()), &[5, 6, 7]));
}

/// The two results of promise 5.
fn results(job: &rpc::Job) -> String {
    if !has_ended(job) {
        return "-".to_owned();
    }
    let safe = if job.data_safe { "data safe" } else { "no data" };
    let clean = if job.host_clean { "host clean" } else { "host not clean" };
    format!("{safe}, {clean}")
}

async fn follow(operator: &Operator, ids: &[String], json: bool) -> Done {
    let mut progress = Progress::new(json);
    let jobs = operator
        .watch(ids, |job| {
            progress.update(job);
            Follow::On
        })
        .await?;
    progress.finish();
    let failed: Vec<_> = jobs.iter().filter(|j| !has_succeeded(j)).collect();
    if json {
        let jobs: Vec<_> = jobs.iter().map(view::job).collect();
        output::json(&json!({ "ok": failed.is_empty(), "jobs": jobs }));
        return Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    for job in &failed {
        eprintln!("{}", failure_of(job));
    }
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A job that ended without success, as a failure.
pub(crate) fn failure_of(job: &rpc::Job) -> Failure {
    let failure =
        Failure::new(format!("the {} of {:?} ended as {}", job.kind, job.vm_name, job.state));
    let failure = if job.reason.is_empty() { failure } else { failure.because(&job.reason) };
    if job.error_code.is_empty() { failure } else { failure.with_code(&job.error_code) }
}

/// Bars on a terminal, a line for every change of state elsewhere; nothing with `--json`.
struct Progress {
    bars: Option<MultiProgress>,
    lines: bool,
    jobs: HashMap<String, (ProgressBar, String)>,
}

impl Progress {
    fn new(json: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self {
            bars: (terminal && !json).then(MultiProgress::new),
            lines: !terminal && !json,
            jobs: HashMap::new(),
        }
    }

    fn update(&mut self, job: &rpc::Job) {
        let stats = job.stats.unwrap_or_default();
        let phase = if job.phase.is_empty() || has_ended(job) { &job.state } else { &job.phase };
        let (bar, said) = self.jobs.entry(job.job_id.clone()).or_insert_with(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template(
                "{prefix:.bold} [{bar:24}] {bytes}/{total_bytes} {bytes_per_sec} {msg}",
            );
            bar.set_style(
                style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "),
            );
            let bar = match &self.bars {
                Some(bars) => bars.add(bar),
                None => ProgressBar::hidden(),
            };
            bar.set_prefix(job.vm_name.clone());
            bar.enable_steady_tick(Duration::from_millis(250));
            (bar, String::new())
        });
        let message = format!("{phase} on {}", output::or_dash(&job.host));
        bar.set_length(job.total_bytes.max(stats.read_bytes));
        bar.set_position(stats.read_bytes);
        bar.set_message(message.clone());
        if *said != message {
            if self.lines {
                let sent = bytes(stats.sent_bytes);
                eprintln!(
                    "{}: {message} (read {}, sent {sent})",
                    job.vm_name,
                    bytes(stats.read_bytes)
                );
            }
            *said = message;
        }
        if has_ended(job) {
            bar.finish();
        }
    }

    fn finish(self) {
        for (bar, _) in self.jobs.into_values() {
            bar.finish();
        }
    }
}
